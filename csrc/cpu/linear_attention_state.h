// States: sums over tokens of phi(k) v^T and phi(k), which reach queries, or of phi(q) dn^T and phi(q) dz, which reach
// keys. With a maximum, channel d of phi(x) is exp(x_d - max_d), and grows with what the state has seen.
#pragma once
#include "linear_attention_rows.h"

namespace fastnlp {
namespace {

// exp(difference of two maxima), 0 where the channel has seen nothing.
template <class C>
FASTNLP_INLINE C rescale(C from, C to) {
  return from == kNothing<C> ? C{0} : std::exp(from - to);
}

template <class C>
struct State {
  C* kv;   // [F, value_stride]
  C* sum;  // [F]
  C* max;  // [Dk]
  double* log_decay;

  static int64_t padded(int64_t n) { return row_stride<C>(n + 4 * Simd<C>::lanes); }
  static size_t bytes(const LinearAttentionProblem& p) {
    const Sizes<C> sizes(p);
    return static_cast<size_t>(sizes.features * sizes.value_stride + 2 * padded(sizes.features)) * sizeof(C) + 128;
  }
  State(const Sizes<C>& sizes, const void* memory) {
    Arena arena(const_cast<void*>(memory));
    kv = arena.take<C>(sizes.features * sizes.value_stride);
    sum = arena.take<C>(padded(sizes.features));
    max = arena.take<C>(padded(sizes.features));
    log_decay = arena.take<double>(1);
  }

  void clear(const Sizes<C>& sizes) const {
    std::fill(kv, kv + sizes.features * sizes.value_stride, C{0});
    std::fill(sum, sum + padded(sizes.features), C{0});
    std::fill(max, max + padded(sizes.features), kNothing<C>);
    *log_decay = 0;
  }

  void decay(const Sizes<C>& sizes, C factor) const {
    for (int64_t d = 0; d < sizes.features; ++d) {
      each_vector(kv + d * sizes.value_stride, sizes.width, [&](int64_t, Vec<C> x) { return x * splat(factor); });
      sum[d] *= factor;
    }
  }

  // The maxima rise to those of `top` [Dk], and the sums follow.
  void raise(const Sizes<C>& sizes, const C* top) const {
    for (int64_t d = 0; d < sizes.channels; ++d) {
      if (!(top[d] > max[d])) continue;
      const C factor = rescale(max[d], top[d]);
      C* const row = kv + d * sizes.value_stride;
      each_vector(row, sizes.width, [&](int64_t, Vec<C> x) { return x * splat(factor); });
      sum[d] *= factor;
      max[d] = top[d];
    }
  }

  // this <- base, decayed by what lies between, and local
  void join(const Sizes<C>& sizes, bool has_maximum, const State& base, const State& local) const {
    const C decay = static_cast<C>(std::exp(*local.log_decay));
    for (int64_t d = 0; d < sizes.features; ++d) {
      C of_base = decay, of_local = 1;
      if (has_maximum) {
        const C top = local.max[d] > base.max[d] ? local.max[d] : base.max[d];
        of_base = rescale(base.max[d], top);
        of_local = rescale(local.max[d], top);
        max[d] = top;
      }
      const C *from = base.kv + d * sizes.value_stride, *more = local.kv + d * sizes.value_stride;
      C* const to = kv + d * sizes.value_stride;
      for (int64_t y = 0; y < sizes.width; y += Simd<C>::lanes)
        store(to + y, load(from + y) * splat(of_base) + load(more + y) * splat(of_local));
      sum[d] = base.sum[d] * of_base + local.sum[d] * of_local;
    }
    *log_decay = *base.log_decay + *local.log_decay;
  }

  // kv += rows^T y, sum += rows^T w, of n tokens: rows [n, F], y [n, Dv], w [n] or null: ones.
  void add(const Sizes<C>& sizes, int64_t n, const C* rows, const C* y, const C* w, Ahead& ahead) const {
    multiply<C, true>(sizes.features, n, sizes.width, rows, 1, sizes.feature_stride, y, sizes.value_stride, kv,
                      sizes.value_stride, ahead);
    if (w)
      add_sums<true>(sizes, n, rows, w);
    else
      add_sums<false>(sizes, n, rows, w);
  }
  // Four vectors at a time hide the latency of an addition.
  template <bool WEIGHTED>
  void add_sums(const Sizes<C>& sizes, int64_t n, const C* rows, const C* w) const {
    constexpr int lanes = Simd<C>::lanes;
    int64_t d = 0;
    for (; d + 4 * lanes <= sizes.feature_stride && d < sizes.features; d += 4 * lanes)
      add_columns<WEIGHTED, 4>(sizes, n, rows, w, d);
    for (; d < sizes.features; d += lanes) add_columns<WEIGHTED, 1>(sizes, n, rows, w, d);
  }
  template <bool WEIGHTED, int VECTORS>
  void add_columns(const Sizes<C>& sizes, int64_t n, const C* rows, const C* w, int64_t d) const {
    constexpr int lanes = Simd<C>::lanes;
    Vec<C> total[VECTORS] = {};
    for (int64_t i = 0; i < n; ++i) {
      const Vec<C> weight = splat(WEIGHTED ? w[i] : C{1});
      for (int v = 0; v < VECTORS; ++v) {
        const Vec<C> x = load(rows + i * sizes.feature_stride + d + v * lanes);
        total[v] += WEIGHTED ? x * weight : x;
      }
    }
    for (int v = 0; v < VECTORS; ++v) store(sum + d + v * lanes, load(sum + d + v * lanes) + total[v]);
  }

  // From and to tensors of the compute type.
  void read(const Sizes<C>& sizes, const C* from_kv, const C* from_sum, const C* from_max) const {
    clear(sizes);
    for (int64_t d = 0; d < sizes.features; ++d) {
      if (from_kv) std::copy(from_kv + d * sizes.values, from_kv + (d + 1) * sizes.values, kv + d * sizes.value_stride);
      if (from_sum) sum[d] = from_sum[d];
    }
    if (from_max) std::copy(from_max, from_max + sizes.channels, max);
  }
  void write(const Sizes<C>& sizes, C* to_kv, C* to_sum, C* to_max) const {
    for (int64_t d = 0; d < sizes.features; ++d) {
      const C* const row = kv + d * sizes.value_stride;
      std::copy(row, row + sizes.values, to_kv + d * sizes.values);
      to_sum[d] = sum[d];
    }
    if (to_max) std::copy(max, max + sizes.channels, to_max);
  }
};

}  // namespace
}  // namespace fastnlp
