// A block of tokens on its way through a sweep: operands in the compute type, decays, and the state that reaches it.
// What a segment adds up itself (`local`) never depends on what came before it (`base`); both are joined to be read.
#pragma once
#include "linear_attention_state.h"

namespace fastnlp {
namespace {

// Within a block no maximum rises by more than this, in powers of e: what is scaled by the last maximum of the block
// and was alone at its start is still far above the smallest normal number.
constexpr double kRise = 60;

template <class C>
struct Block {
  const LinearAttentionItem& item;
  const LinearAttentionWork& work;
  const LinearAttentionProblem& p;
  const LinearAttentionSequence& sequence;
  const Sizes<C> sizes;
  const bool has_base;
  const State<C> base;
  const State<C> local;
  const State<C> joined;

  // Rows [kBlock, feature_stride]: features as the other side of a tile meets them, and as they enter local.
  C *keys, *keys_out, *queries, *queries_out;
  C *values, *dn, *rows, *dvalues;   // [kBlock, value_stride], rows also of features
  C* columns;                        // [F, kBlock]
  C *panels, *more_panels;           // of rows of either kind
  C *tile, *dtile, *weights;         // [kBlock, kBlock]
  C *key_norms, *query_norms;        // of cosine+1
  C *z, *dz, *shift, *lead, *trail;  // [kBlock]; lead: decay from the block's start to a token's end,
  C *top, *first;                    // [Dk] trail: from there to the block's end
  double total_decay;
  int64_t next = kBlock;  // from a token to its like in the next block
  mutable Ahead ahead;

  static size_t bytes(const LinearAttentionProblem& p) {
    const Sizes<C> s(p);
    const int64_t wide = std::max(s.feature_stride, s.value_stride) + 2 * kPanel<C>;
    const int64_t elements = 8 * wide * kBlock + (s.features + 8) * kBlock + 2 * wide * kBlock +
                             3 * Triangle<C>::elements + 7 * kBlock + 2 * State<C>::padded(s.features);
    return static_cast<size_t>(elements) * sizeof(C) + State<C>::bytes(p) + 64 * 32;
  }

  Block(const LinearAttentionItem& item, const void* base_memory, const void* local_memory, void* scratch)
      : item(item),
        work(*item.work),
        p(work.problem),
        sequence(*item.sequence),
        sizes(p),
        has_base(base_memory != nullptr),
        base(sizes, base_memory),
        local(sizes, local_memory),
        joined(sizes, scratch) {
    Arena arena(static_cast<char*>(scratch) + (State<C>::bytes(p) + 63) / 64 * 64);
    const int64_t wide = std::max(sizes.feature_stride, sizes.value_stride) + 2 * kPanel<C>;
    for (C** to : {&keys, &keys_out, &queries, &queries_out}) *to = arena.take<C>(kBlock * sizes.feature_stride);
    for (C** to : {&values, &dn, &dvalues}) *to = arena.take<C>(kBlock * sizes.value_stride);
    for (C** to : {&rows, &panels, &more_panels}) *to = arena.take<C>(kBlock * wide);
    columns = arena.take<C>((sizes.features + 8) * kBlock);
    for (C** to : {&tile, &dtile, &weights}) *to = arena.take<C>(Triangle<C>::elements);
    for (C** to : {&key_norms, &query_norms, &z, &dz, &shift, &lead, &trail}) *to = arena.take<C>(kBlock);
    for (C** to : {&top, &first}) *to = arena.take<C>(State<C>::padded(sizes.features));
    if (local_memory) local.clear(sizes);
  }

  bool decays() const { return p.log_decay != nullptr; }
  bool masked(int64_t t) const {
    return p.key_padding_mask && !p.key_padding_mask[sequence.batch * p.keys + sequence.key0 + t];
  }
  bool all_masked(int64_t t, int64_t n) const {
    for (int64_t i = 0; i < n; ++i)
      if (!masked(t + i)) return false;
    return true;
  }
  int64_t heads() const { return sequence.queries > 0 ? p.group() : 0; }  // a causal pass may have keys alone
  int64_t head(int64_t h) const { return item.key_head * p.group() + h; }

  // What reaches this block.
  const State<C>& state() const {
    if (!has_base) return local;
    joined.join(sizes, p.has_maximum(), base, local);
    return joined;
  }

  // exp of rows of x. A row whose shift is -inf has no keys, and becomes zeros.
  template <class F>
  void exponential_rows(int64_t n, C* x, const C* shifts, const F& shifted) const {
    for (int64_t i = 0; i < n; ++i) {
      C* const row = x + i * sizes.feature_stride;
      if (shifts && shifts[i] == kNothing<C>)
        std::fill(row, row + sizes.channels, C{0});
      else
        each_vector(row, sizes.channels, [&](int64_t d, Vec<C> v) { return any_exponential(shifted(i, d, v)); });
    }
  }
  // Of those that a state reaches: exp(x + max - shift).
  void target_rows(int64_t n, C* x, const C* max, const C* shifts) const {
    exponential_rows(n, x, shifts, [&](int64_t i, int64_t d, Vec<C> v) {
      const Vec<C> sum = v + load(max + d);
      return shifts ? sum - splat(shifts[i]) : sum;
    });
  }
  // Of those that enter local: exp(x - max).
  void source_rows(int64_t n, C* x) const {
    exponential_rows(n, x, nullptr, [&](int64_t, int64_t d, Vec<C> v) {
      const Vec<C> max = load(local.max + d);
      return v - (max == splat(kNothing<C>) ? Vec<C>{} : max);
    });
  }
  // Rows that entered local, as rows meet them that are scaled by the maximum of `state`.
  C* near_rows(int64_t n, const State<C>& state, C* out, C* near) const {
    if (!p.has_maximum() || !has_base) return out;
    for (int64_t d = 0; d < sizes.channels; ++d) first[d] = rescale(local.max[d], state.max[d]);
    for (int64_t i = 0; i < n; ++i)
      each_vector(near + i * sizes.feature_stride, sizes.channels,
                  [&](int64_t d, Vec<C>) { return load(out + i * sizes.feature_stride + d) * load(first + d); });
    return near;
  }

  static void raise(C* most, const C* x, int64_t size) {
    each_vector(most, size, [&](int64_t d, Vec<C> m) { return maximum(load(x + d), m); });
  }
  void start_rise() const {
    for (C* to : {first, top}) std::copy(local.max, local.max + State<C>::padded(sizes.features), to);
  }
  // The maximum of the block's first token and that of all its tokens.
  void see(const C* row, bool is_first) const {
    if (is_first) raise(first, row, sizes.channels);
    raise(top, row, sizes.channels);
  }
  bool fits() const {
    for (int64_t d = 0; d < sizes.channels; ++d)
      if (top[d] - first[d] > kRise) return false;
    return true;
  }

  void read_head(const HeadTensor& from, int64_t token, int64_t head, int64_t n, int64_t size, C* to,
                 int64_t stride) const {
    const int64_t offset = sequence.batch * from.batch_stride + token * from.token_stride + head * from.head_stride;
    read_rows(p.dtype, from.data, offset, from.token_stride, n, next, size, to, stride, ahead);
  }
  // Rows of out or dout.
  void read_out(const void* from, int64_t t, int64_t h, int64_t n, C* to) const {
    read_rows(p.dtype, from, query_row(t, h) * sizes.values, p.heads * sizes.values, n, next, sizes.values, to,
              sizes.value_stride, ahead);
  }

  // Rows that will be written: of `heads` heads, of `size` numbers each, from `row` on.
  void expect_rows(const void* to, int64_t row, int64_t heads, int64_t size, int64_t n) const {
    with_stored<C>(p.dtype, [&](auto* type) {
      const int64_t bytes = size * sizeof(*type);
      ahead.expect(reinterpret_cast<uintptr_t>(to) + row * bytes, heads * bytes, n, bytes);
    });
  }

  void read_raw_keys(int64_t t, int64_t n, C* to) const {
    read_head(p.k, sequence.key0 + t, item.key_head, n, sizes.channels, to + sizes.constants, sizes.feature_stride);
    read_head(p.v, sequence.key0 + t, item.key_head, n, sizes.values, values, sizes.value_stride);
    for (int64_t i = 0; i < n && p.key_padding_mask; ++i) {
      if (!masked(t + i)) continue;
      C *const k = to + i * sizes.feature_stride, *const v = values + i * sizes.value_stride;
      std::fill(k, k + sizes.features, p.has_maximum() ? kNothing<C> : C{0});
      std::fill(v, v + sizes.width, C{0});
    }
  }
  void map_keys(int64_t t, int64_t n, C* to) const {
    map_rows(p.feature_map, n, sizes.channels, to, sizes.feature_stride, key_norms);
    clear_masked(t, n, to);
  }
  void clear_masked(int64_t t, int64_t n, C* to) const {
    for (int64_t i = 0; i < n && p.key_padding_mask; ++i)
      if (masked(t + i)) std::fill(to + i * sizes.feature_stride, to + i * sizes.feature_stride + sizes.features, C{0});
  }

  // Reads keys t .. end - 1 as far as a block reaches, raises the maximum, and returns how many there are.
  int64_t read_source_keys(int64_t t, int64_t end, bool upper = false) {
    int64_t n = std::min(kBlock, end - t);
    read_raw_keys(t, n, keys_out);
    if (p.has_maximum()) {
      for (;; n /= 2) {
        start_rise();
        for (int64_t i = 0; i < n; ++i) see(keys_out + i * sizes.feature_stride, i == 0);
        if (fits()) break;
      }
      local.raise(sizes, top);
      source_rows(n, keys_out);
    } else {
      map_keys(t, n, keys_out);
    }
    if (p.causal) n = finite_tokens(n);
    read_decay(t, n, upper);
    return n;
  }

  // No row may see what comes after it, not as 0 * NaN either: a token that is not finite starts a block.
  int64_t finite_tokens(int64_t n) const {
    const auto finite = [&](int64_t i) {
      Vec<C> sum = {};
      each_feature(i, [&](Vec<C> x) { sum += x * splat(C{0}); });
      return !any(sum != sum);
    };
    if (n == 1) return n;
    Vec<C> sum = {};
    for (int64_t i = 1; i < n; ++i) each_feature(i, [&](Vec<C> x) { sum += x * splat(C{0}); });
    if (!any(sum != sum)) return n;
    int64_t i = 1;
    while (i < n && finite(i)) ++i;
    return i;
  }
  template <class F>
  void each_feature(int64_t i, const F& f) const {
    const C* const k = keys_out + i * sizes.feature_stride + sizes.constants;
    const C* const v = values + i * sizes.value_stride;
    for (int64_t d = 0; d < sizes.channels; d += Simd<C>::lanes) f(load(k + d));
    for (int64_t d = 0; d < sizes.width; d += Simd<C>::lanes) f(load(v + d));
  }

  // exp of sums of log_decay, every sum by itself: the difference of two long ones has lost digits, and that of two
  // infinite ones is none. weights: from token to token, of the lower or of the upper triangle.
  void read_decay(int64_t t, int64_t n, bool upper) {
    total_decay = 0;
    if (!decays()) return;
    const C* const from = static_cast<const C*>(p.log_decay) + item.key_head;
    double sums[kBlock];  // from behind token j to the end of token i
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = sequence.batch * p.keys + sequence.key0 + t + i;
      const double own = masked(t + i) ? 0 : static_cast<double>(from[p.decay_per_token ? row * p.key_heads : 0]);
      total_decay += own;
      lead[i] = static_cast<C>(std::exp(total_decay));
      C* const of_row = weights + i * Triangle<C>::stride;
      for (int64_t j = 0; j < i; ++j) of_row[j] = static_cast<C>(sums[j] += own);
      of_row[i] = static_cast<C>(sums[i] = 0);
      each_vector(of_row, i + 1, [&](int64_t, Vec<C> x) { return exponential(x); });
      for (int64_t j = 0; upper && j < i; ++j) weights[j * Triangle<C>::stride + i] = of_row[j];
    }
    for (int64_t i = 0; i < n; ++i) trail[i] = static_cast<C>(std::exp(sums[i]));
  }
  const C* decay_weights() const { return decays() ? weights : nullptr; }
  void scale_rows(int64_t n, const C* from, const C* factors, C* to) const {
    for (int64_t i = 0; i < n; ++i)
      each_vector(to + i * sizes.feature_stride, sizes.features,
                  [&](int64_t d, Vec<C>) { return load(from + i * sizes.feature_stride + d) * splat(factors[i]); });
  }
  void decay_local() const {
    if (!decays()) return;
    local.decay(sizes, static_cast<C>(std::exp(total_decay)));
    *local.log_decay += total_decay;
  }
  // The keys of read_source_keys enter local.
  void add_keys(int64_t n, const C* from) const {
    decay_local();
    local.add(sizes, n, from, values, nullptr, ahead);
  }

  void read_raw_queries(int64_t t, int64_t n, int64_t h, C* to) const {
    read_head(p.q, sequence.query0 + t, head(h), n, sizes.channels, to + sizes.constants, sizes.feature_stride);
  }
  int64_t query_row(int64_t t, int64_t h) const {
    return (sequence.batch * p.queries + sequence.query0 + t) * p.heads + head(h);
  }
  int64_t key_row(int64_t t) const {
    return (sequence.batch * p.keys + sequence.key0 + t) * p.key_heads + item.key_head;
  }
  // log z of rows, where exp is normalised; else their features are not scaled.
  const C* read_shift(int64_t t, int64_t n, int64_t h) const {
    for (int64_t i = 0; i < n; ++i) shift[i] = p.divides() ? normalizer(t + i, h) : C{0};
    return shift;
  }
  C& normalizer(int64_t t, int64_t h) const { return static_cast<C*>(work.normalizer)[query_row(t, h)]; }

  // Features of queries t .. t + n - 1, as they read a state with this maximum.
  void map_queries(int64_t n, const C* max, const C* shifts) const {
    if (p.feature_map == FeatureMap::softmax)
      softmax_rows(n, sizes.channels, queries, sizes.feature_stride);
    else if (p.has_maximum())
      target_rows(n, queries, max, shifts);
    else
      map_rows(p.feature_map, n, sizes.channels, queries, sizes.feature_stride, query_norms);
  }

  C guarded(C z) const {
    const C eps = static_cast<C>(p.eps);
    return z < eps && z > -eps ? (z < 0 ? -eps : eps) : z;
  }

  // dn: the gradient of the numerator of queries t .. t + n - 1.
  void read_dn(int64_t t, int64_t n, int64_t h) const {
    if (!work.dout) return std::fill(dn, dn + n * sizes.value_stride, C{0});
    read_out(work.dout, t, h, n, dn);
    for (int64_t i = 0; i < n; ++i) {
      const bool divided = p.divides() && !p.has_maximum();
      const C factor = divided ? C{1} / guarded(normalizer(t + i, h)) : p.normalize ? C{1} : static_cast<C>(p.scale);
      if (factor == C{1}) continue;
      each_vector(dn + i * sizes.value_stride, sizes.width, [&](int64_t, Vec<C> x) { return x * splat(factor); });
    }
  }
  // dz = -dn . out, of the denominator, for the keys' pass too. Added up in the order of dn . v: of a query with one
  // key, whose out is v, they cancel to the bit.
  void make_dz(int64_t t, int64_t n, int64_t h, const C* dn_panels) const {
    std::fill(dz, dz + kBlock, C{0});
    if (!p.divides() || !work.dout) return;
    read_out(work.out, t, h, n, rows);
    to_panels(n, sizes.values, rows, sizes.value_stride, more_panels);
    for (int64_t x = 0; x < n; x += kPanel<C>) {
      const C *a = dn_panels + x * sizes.values, *b = more_panels + x * sizes.values;
      Vec<C> sums[2] = {};
      for (int64_t y = 0; y < sizes.values; ++y, a += kPanel<C>, b += kPanel<C>)
        for (int v = 0; v < 2; ++v) sums[v] += load(a + v * Simd<C>::lanes) * load(b + v * Simd<C>::lanes);
      for (int v = 0; v < 2; ++v) store(dz + x + v * Simd<C>::lanes, -sums[v]);
    }
    for (int64_t i = 0; i < n; ++i) {
      const C z = p.has_maximum() ? C{1} : normalizer(t + i, h), safe = p.has_maximum() ? z : guarded(z);
      if (z != safe && z == z) dz[i] = 0;
      saved_dz(t + i, h) = dz[i];
    }
  }
  C& saved_dz(int64_t t, int64_t h) const { return static_cast<C*>(work.dz)[query_row(t, h)]; }
  void read_dz(int64_t t, int64_t n, int64_t h) const {
    for (int64_t i = 0; i < n; ++i) dz[i] = p.divides() && work.dout ? saved_dz(t + i, h) : C{0};
  }
  // decay_terms += sign phi . dphi, of features and rows.
  void add_decay_terms(int64_t t, int64_t n, const C* features, double sign) const {
    if (!work.decay_terms) return;
    for (int64_t i = 0; i < n; ++i) {
      const C *const own = features + i * sizes.feature_stride, *const d = rows + i * sizes.feature_stride;
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t x = 0; x < sizes.features; ++x) sum += static_cast<double>(own[x]) * static_cast<double>(d[x]);
      const int64_t row = sequence.batch * p.keys + sequence.key0 + t + i;
      work.decay_terms[row * p.key_heads + item.key_head] += sign * sum;
    }
  }

  // columns [F, n] <- (state y^T + sum u^T) w, where y [n, Dv] stands in panels; u and w null: ones.
  void read_state(const State<C>& state, int64_t n, const C* y_panels, const C* u, const C* w) const {
    for (int64_t x = 0; x < n; x += kPanel<C>)
      for (int64_t d = 0; d < sizes.features; d += kGroup) {
        ahead.ask();
        product<C, false>(std::min(kGroup, sizes.features - d), sizes.values, state.kv + d * sizes.value_stride,
                          sizes.value_stride, 1, y_panels + x * sizes.values, kPanel<C>, columns + d * kBlock + x,
                          kBlock);
      }
    const Vec<C> one = splat(C{1});
    for (int64_t d = 0; d < sizes.features; ++d) {
      const Vec<C> sum = splat(state.sum[d]);
      each_vector(columns + d * kBlock, n, [&](int64_t x, Vec<C> own) {
        own += u ? sum * load(u + x) : sum;
        return own * (w ? load(w + x) : one);
      });
    }
  }
};

}  // namespace
}  // namespace fastnlp
