// One token: the state of a sequence and key head is read and written once, in place.
#pragma once
#include "linear_attention_ends.h"

namespace fastnlp {
namespace {

template <class C>
struct Step {
  const LinearAttentionItem& item;
  const LinearAttentionWork& work;
  const LinearAttentionProblem& p;
  const Sizes<C> sizes;
  const StateOffsets<C> at;
  C *key, *query, *factors, *value, *sums;

  static size_t bytes(const LinearAttentionProblem& p) {
    const Sizes<C> s(p);
    return static_cast<size_t>(3 * (s.feature_stride + kPanel<C>)+2 * s.value_stride) * sizeof(C) + 5 * 64;
  }
  Step(const LinearAttentionItem& item, void* scratch)
      : item(item), work(*item.work), p(work.problem), sizes(p), at(item) {
    Arena arena(scratch);
    for (C** to : {&key, &query, &factors}) *to = arena.take<C>(sizes.feature_stride + kPanel<C>);
    for (C** to : {&value, &sums}) *to = arena.take<C>(sizes.value_stride);
  }

  void read(const HeadTensor& from, int64_t head, int64_t size, C* to) const {
    const int64_t offset = item.sequence->batch * from.batch_stride + head * from.head_stride;
    read_rows(p.dtype, from.data, offset, 0, 1, 0, size, to, 0);
  }

  // key <- phi(k), factors <- what scales the channels of the state.
  void read_key() const {
    read(p.k, item.key_head, sizes.channels, key + sizes.constants);
    read(p.v, item.key_head, sizes.values, value);
    C decay = 1;
    if (p.log_decay) {
      const int64_t row = p.decay_per_token ? item.sequence->batch * p.key_heads : 0;
      decay = std::exp(static_cast<const C*>(p.log_decay)[row + item.key_head]);
    }
    std::fill(factors, factors + sizes.features, decay);
    if (!p.has_maximum()) {
      C norm;
      return map_rows(p.feature_map, 1, sizes.channels, key, sizes.feature_stride, &norm);
    }
    C* const max = at.of_max(work.key_max);
    for (int64_t d = 0; d < sizes.channels; ++d) {
      const C top = key[d] > max[d] ? key[d] : max[d];
      factors[d] = max[d] == kNothing<C> ? C{0} : std::exp(max[d] - top);
      key[d] = top == kNothing<C> ? key[d] * 0 : std::exp(key[d] - top);
      max[d] = top;
    }
  }

  // query <- phi(q); returns what its scores are scaled by, as a logarithm.
  C read_query(int64_t head) const {
    read(p.q, head, sizes.channels, query + sizes.constants);
    if (!p.has_maximum()) {
      C norm;
      map_rows(p.feature_map, 1, sizes.channels, query, sizes.feature_stride, &norm);
      return 0;
    }
    const C* const max = at.of_max(work.key_max);
    C top = kNothing<C>;
    for (int64_t d = 0; d < sizes.channels; ++d)
      if (max[d] != kNothing<C> && query[d] + max[d] > top) top = query[d] + max[d];
    for (int64_t d = 0; d < sizes.channels; ++d)
      query[d] = top == kNothing<C> || max[d] == kNothing<C> ? C{0} : std::exp(query[d] + max[d] - top);
    return top;
  }

  // sums <- query kv, VECTORS at a time; UPDATE: kv <- factors kv + key value^T first.
  template <bool UPDATE, int VECTORS>
  void columns(C* kv, int64_t y) const {
    constexpr int lanes = Simd<C>::lanes;
    Vec<C> total[VECTORS] = {}, v[VECTORS];
    for (int i = 0; i < VECTORS; ++i) v[i] = load(value + y + i * lanes);
    for (int64_t d = 0; d < sizes.features; ++d) {
      C* const row = kv + d * sizes.values + y;
      const Vec<C> q = splat(query[d]), k = splat(key[d]), factor = splat(factors[d]);
      for (int i = 0; i < VECTORS; ++i) {
        Vec<C> s = load(row + i * lanes);
        if (UPDATE) store(row + i * lanes, s = s * factor + k * v[i]);
        total[i] += q * s;
      }
    }
    for (int i = 0; i < VECTORS; ++i) store(sums + y + i * lanes, total[i]);
  }
  template <bool UPDATE>
  void read_state() const {
    constexpr int lanes = Simd<C>::lanes;
    C* const kv = at.of_kv(work.kv);
    int64_t y = 0;
    for (; y + 4 * lanes <= sizes.values; y += 4 * lanes) columns<UPDATE, 4>(kv, y);
    for (; y + lanes <= sizes.values; y += lanes) columns<UPDATE, 1>(kv, y);
    for (; y < sizes.values; ++y) {
      C total = 0;
      for (int64_t d = 0; d < sizes.features; ++d) {
        C& s = kv[d * sizes.values + y];
        if (UPDATE) s = s * factors[d] + key[d] * value[y];
        total += query[d] * s;
      }
      sums[y] = total;
    }
  }

  void run() const {
    read_key();
    C* const key_sum = at.of_sum(work.key_sum);
    for (int64_t d = 0; d < sizes.features; ++d) key_sum[d] = key_sum[d] * factors[d] + key[d];
    for (int64_t h = 0; h < p.group(); ++h) {
      const int64_t head = item.key_head * p.group() + h;
      const C shift = read_query(head);
      if (h == 0)
        read_state<true>();
      else
        read_state<false>();
      C factor = static_cast<C>(p.scale);
      if (p.normalize || p.feature_map == FeatureMap::softmax) {
        const C z = dot(query, static_cast<const C*>(key_sum), sizes.features), eps = static_cast<C>(p.eps);
        const C safe = !p.has_maximum() && z < eps && z > -eps ? (z < 0 ? -eps : eps) : z;
        factor = (p.normalize ? C{1} : factor) * (p.has_maximum() && z == 0 ? C{0} : C{1} / safe);
      } else if (p.has_maximum()) {
        factor *= std::exp(shift);
      }
      for (int64_t y = 0; y < sizes.values; ++y) sums[y] *= factor;
      write_rows(p.dtype, 1, sizes.values, sums, sizes.value_stride, work.out,
                 (item.sequence->batch * p.heads + head) * sizes.values, 0);
    }
  }
};

}  // namespace
}  // namespace fastnlp
