// The passes over a segment. A causal one goes block by block: a triangle of scores within the block, the state for
// everything before it. Without causality all queries read one state.
//     forward            n = phi(q) S              z = phi(q) s           left to right
//     query gradients    dphi(q) = S dn + s dz                            left to right
//     key gradients      dphi(k) = dS v + ds       dv = phi(k) dS         right to left
#pragma once
#include "linear_attention_block.h"

namespace fastnlp {
namespace {

template <class C>
void key_sums(const LinearAttentionItem& item, int64_t begin, int64_t end, const void*, void* local, void* scratch) {
  Block<C> block(item, nullptr, local, scratch);
  for (int64_t t = begin, n; t < end; t += n) {
    n = std::min(kBlock, end - t);
    if (block.all_masked(t, n)) continue;
    n = block.read_source_keys(t, end);
    if (block.decays()) block.scale_rows(n, block.keys_out, block.trail, block.keys_out);
    block.add_keys(n, block.keys_out);
  }
}

// What queries read where nothing is causal. Shen's softmax divides each channel by the sum of its keys.
template <class C>
const State<C>& whole_state(const Block<C>& block) {
  if (block.p.feature_map != FeatureMap::softmax) return block.base;
  const Sizes<C>& sizes = block.sizes;
  for (int64_t d = 0; d < sizes.features; ++d) {
    const Vec<C> inverse = splat(block.base.sum[d] == 0 ? C{0} : C{1} / block.base.sum[d]);
    const C* const from = block.base.kv + d * sizes.value_stride;
    each_vector(block.joined.kv + d * sizes.value_stride, sizes.width,
                [&](int64_t y, Vec<C>) { return load(from + y) * inverse; });
    block.joined.sum[d] = 0;
    block.joined.max[d] = block.base.max[d];
  }
  return block.joined;
}

// shift <- max_d (q_d + max_d), over channels that have seen a key.
template <class C>
void largest_scores(const Block<C>& block, int64_t n, const C* max) {
  for (int64_t i = 0; i < n; ++i) {
    const C* const row = block.queries + i * block.sizes.feature_stride;
    const Vec<C> nothing = splat(kNothing<C>);
    Vec<C> most = nothing;
    for (int64_t d = 0; d < block.sizes.channels; d += Simd<C>::lanes) {
      const Vec<C> of_keys = load(max + d);
      const Mask<C> seen = lanes_below<C>(block.sizes.channels - d) & (of_keys != nothing);
      most = maximum(seen ? load(row + d) + of_keys : nothing, most);
    }
    block.shift[i] = max_of(most);
  }
}

// rows <- out, from numerators; z is complete. Divided, not multiplied by an inverse: where a query has one key, out is
// v then, and its gradient cancels.
template <class C>
void write_out(const Block<C>& block, int64_t t, int64_t n, int64_t h) {
  const LinearAttentionProblem& p = block.p;
  const bool exponential = p.feature_map == FeatureMap::exponential;
  for (int64_t i = 0; i < n; ++i) {
    C* const row = block.rows + i * block.sizes.value_stride;
    const C z = block.z[i];
    if (p.divides()) {
      const Vec<C> divisor = splat(exponential ? (z == 0 ? C{1} : z) : block.guarded(z));
      each_vector(row, block.sizes.width, [&](int64_t, Vec<C> x) { return x / divisor; });
    } else {
      const C scale = p.normalize ? C{1} : static_cast<C>(p.scale);
      const Vec<C> factor = splat(exponential ? scale * std::exp(block.shift[i]) : scale);
      each_vector(row, block.sizes.width, [&](int64_t, Vec<C> x) { return x * factor; });
    }
    if (block.work.normalizer) block.normalizer(t + i, h) = exponential ? block.shift[i] + std::log(z) : z;
  }
  write_rows(p.dtype, n, block.sizes.values, block.rows, block.sizes.value_stride, block.work.out,
             block.query_row(t, h) * block.sizes.values, p.heads * block.sizes.values);
}

template <class C>
void forward(const LinearAttentionItem& item, int64_t begin, int64_t end, const void* base, void* local,
             void* scratch) {
  Block<C> block(item, base, local, scratch);
  const LinearAttentionProblem& p = block.p;
  const Sizes<C>& sizes = block.sizes;
  const State<C>* state = p.causal ? nullptr : &whole_state(block);
  const C* keys = nullptr;
  for (int64_t t = begin, n; t < end; t += n) {
    n = std::min(kBlock, end - t);
    if (p.causal) {
      n = block.read_source_keys(t, end);
      state = &block.state();
      keys = block.near_rows(n, *state, block.keys_out, block.keys);
      to_panels(n, sizes.features, keys, sizes.feature_stride, block.panels);
    }
    const Triangle<C> triangle{n, false};
    for (int64_t h = 0; h < block.heads(); ++h) {
      block.expect_rows(block.work.out, block.query_row(t, h), p.heads, sizes.values, n);
      block.read_raw_queries(t, n, h, block.queries);
      if (p.feature_map == FeatureMap::exponential) largest_scores(block, n, state->max);
      block.map_queries(n, state->max, block.shift);
      const C* reading = block.queries;
      if (block.decays()) {
        block.scale_rows(n, block.queries, block.lead, block.queries_out);
        reading = block.queries_out;
      }
      multiply<C, false>(n, sizes.features, sizes.width, reading, sizes.feature_stride, 1, state->kv,
                         sizes.value_stride, block.rows, sizes.value_stride, block.ahead);
      for (int64_t i = 0; i < n && p.divides(); ++i)
        block.z[i] = dot(reading + i * sizes.feature_stride, static_cast<const C*>(state->sum), sizes.features);
      if (p.causal) {
        triangle.score(sizes.features, block.queries, sizes.feature_stride, block.panels, block.tile);
        triangle.finish(nullptr, nullptr, block.decay_weights(), block.tile, block.z);
        triangle.add_rows(block.tile, sizes.width, block.values, sizes.value_stride, block.rows);
      }
      write_out(block, t, n, h);
    }
    if (!p.causal) continue;
    if (block.decays()) block.scale_rows(n, block.keys_out, block.trail, block.keys_out);
    block.add_keys(n, block.keys_out);
  }
}

template <class C>
void query_gradients(const LinearAttentionItem& item, int64_t begin, int64_t end, const void* base, void* local,
                     void* scratch) {
  Block<C> block(item, base, local, scratch);
  const LinearAttentionProblem& p = block.p;
  const Sizes<C>& sizes = block.sizes;
  const State<C>* state = p.causal ? nullptr : &whole_state(block);
  if (!p.causal) std::fill(block.local.max, block.local.max + sizes.channels, C{0});  // one scale for all queries
  const C* keys = nullptr;
  for (int64_t t = begin, n; t < end; t += n) {
    n = std::min(kBlock, end - t);
    if (p.causal) {
      n = block.read_source_keys(t, end, true);
      state = &block.state();
      keys = block.near_rows(n, *state, block.keys_out, block.keys);
    }
    const Triangle<C> triangle{n, true};
    for (int64_t h = 0; h < block.heads(); ++h) {
      block.expect_rows(block.work.dq, block.query_row(t, h), p.heads, sizes.channels, n);
      block.read_raw_queries(t, n, h, block.queries);
      block.map_queries(n, state->max, block.read_shift(t, n, h));
      block.read_dn(t, n, h);
      to_panels(n, sizes.values, block.dn, sizes.value_stride, block.panels);
      block.make_dz(t, n, h, block.panels);
      block.read_state(*state, n, block.panels, block.dz, block.decays() ? block.lead : nullptr);
      if (p.causal) {
        triangle.score(sizes.values, block.values, sizes.value_stride, block.panels, block.dtile);
        triangle.finish(nullptr, block.dz, block.decay_weights(), block.dtile, nullptr);
        triangle.add_transposed(sizes.features, keys, sizes.feature_stride, block.dtile, block.columns);
      } else {
        block.local.add(sizes, n, block.queries, block.dn, block.dz, block.ahead);
      }
      to_rows(n, sizes.features, block.columns, block.rows, sizes.feature_stride);
      block.add_decay_terms(t, n, block.queries, 1);
      if (p.feature_map == FeatureMap::softmax)
        chain_softmax_rows(n, sizes.channels, block.queries, block.rows, sizes.feature_stride);
      else
        chain_rows(p.feature_map, n, sizes.channels, block.queries, block.rows, sizes.feature_stride,
                   block.query_norms);
      write_rows(p.dtype, n, sizes.channels, block.rows + sizes.constants, sizes.feature_stride, block.work.dq,
                 block.query_row(t, h) * sizes.channels, p.heads * sizes.channels);
    }
    if (!p.causal) continue;
    if (block.decays()) block.scale_rows(n, block.keys_out, block.trail, block.keys_out);
    block.add_keys(n, block.keys_out);
  }
}

// Queries of a causal sweep from the right. A block ends at `end`; its maximum is that of all heads of the group.
template <class C>
struct QuerySource {
  Block<C>& block;
  const LinearAttentionProblem& p;
  const Sizes<C>& sizes;

  explicit QuerySource(Block<C>& block) : block(block), p(block.p), sizes(block.sizes) { block.next = -kBlock; }

  int64_t start(int64_t begin, int64_t end) const {
    int64_t n = std::min(kBlock, end - begin);
    for (; p.has_maximum(); n /= 2) {
      block.start_rise();
      for (int64_t h = 0; h < block.heads(); ++h) {
        read_scores(end - n, n, h);
        for (int64_t i = 0; i < n; ++i) block.see(block.queries_out + i * sizes.feature_stride, i == n - 1);
      }
      if (!block.fits()) continue;
      block.local.raise(sizes, block.top);
      break;
    }
    block.read_decay(end - n, n, false);
    return n;
  }
  // queries_out <- q - log z
  void read_scores(int64_t t, int64_t n, int64_t h) const {
    block.read_raw_queries(t, n, h, block.queries_out);
    const C* const shift = block.read_shift(t, n, h);
    for (int64_t i = 0; i < n; ++i) {
      const bool none = shift[i] == kNothing<C>;
      each_vector(block.queries_out + i * sizes.feature_stride, sizes.channels,
                  [&](int64_t, Vec<C> x) { return none ? splat(kNothing<C>) : x - splat(shift[i]); });
    }
  }
  void read(int64_t t, int64_t n, int64_t h) const {
    if (p.has_maximum()) {
      read_scores(t, n, h);
      block.source_rows(n, block.queries_out);
    } else {
      block.read_raw_queries(t, n, h, block.queries_out);
      map_rows(p.feature_map, n, sizes.channels, block.queries_out, sizes.feature_stride, block.query_norms);
    }
    block.read_dn(t, n, h);
    block.read_dz(t, n, h);
  }
  void add(int64_t n) const {
    if (block.decays()) block.scale_rows(n, block.queries_out, block.lead, block.queries_out);
    block.local.add(sizes, n, block.queries_out, block.dn, block.dz, block.ahead);
  }
};

template <class C>
void query_sums(const LinearAttentionItem& item, int64_t begin, int64_t end, const void*, void* local, void* scratch) {
  Block<C> block(item, nullptr, local, scratch);
  const QuerySource<C> source(block);
  for (int64_t n; end > begin; end -= n) {
    n = source.start(begin, end);
    block.decay_local();
    for (int64_t h = 0; h < block.heads(); ++h) {
      source.read(end - n, n, h);
      source.add(n);
    }
  }
}

// dk and dv from rows and dvalues; zeros for masked keys, whatever stands there.
template <class C>
void write_key_gradients(const Block<C>& block, int64_t t, int64_t n) {
  const LinearAttentionProblem& p = block.p;
  const Sizes<C>& sizes = block.sizes;
  for (int64_t i = 0; i < n; ++i) {
    if (!block.masked(t + i)) continue;
    C *const k = block.rows + i * sizes.feature_stride, *const v = block.dvalues + i * sizes.value_stride;
    std::fill(k, k + sizes.features, C{0});
    std::fill(v, v + sizes.width, C{0});
  }
  const int64_t row = block.key_row(t);
  write_rows(p.dtype, n, sizes.channels, block.rows + sizes.constants, sizes.feature_stride, block.work.dk,
             row * sizes.channels, p.key_heads * sizes.channels);
  write_rows(p.dtype, n, sizes.values, block.dvalues, sizes.value_stride, block.work.dv, row * sizes.values,
             p.key_heads * sizes.values);
}

template <class C>
void key_gradients(const LinearAttentionItem& item, int64_t begin, int64_t end, const void* base, void* local,
                   void* scratch) {
  Block<C> block(item, base, local, scratch);
  const LinearAttentionProblem& p = block.p;
  const Sizes<C>& sizes = block.sizes;
  const QuerySource<C> source(block);
  for (int64_t n; end > begin; end -= n) {
    n = p.causal ? source.start(begin, end) : std::min(kBlock, end - begin);
    const int64_t t = end - n;
    if (!p.causal && block.all_masked(t, n)) {
      write_key_gradients(block, t, n);
      continue;
    }
    const State<C>& state = p.causal ? block.state() : block.base;
    block.expect_rows(block.work.dk, block.key_row(t), p.key_heads, sizes.channels, n);
    block.expect_rows(block.work.dv, block.key_row(t), p.key_heads, sizes.values, n);
    block.read_raw_keys(t, n, block.keys);
    if (p.has_maximum())
      block.target_rows(n, block.keys, state.max, nullptr);
    else
      block.map_keys(t, n, block.keys);
    const C* reading = block.keys;
    if (block.decays()) {
      block.scale_rows(n, block.keys, block.trail, block.keys_out);
      reading = block.keys_out;
    }
    to_panels(n, sizes.values, block.values, sizes.value_stride, block.panels);
    block.read_state(state, n, block.panels, nullptr, block.decays() ? block.trail : nullptr);
    multiply<C, false>(n, sizes.features, sizes.width, reading, sizes.feature_stride, 1, state.kv, sizes.value_stride,
                       block.dvalues, sizes.value_stride, block.ahead);
    if (p.causal) {
      const Triangle<C> triangle{n, false};
      to_panels(n, sizes.features, block.keys, sizes.feature_stride, block.more_panels);
      // Before local moves on: without a base it is the state.
      block.decay_local();
      for (int64_t h = 0; h < block.heads(); ++h) {
        source.read(t, n, h);
        const C* queries = block.near_rows(n, state, block.queries_out, block.queries);
        triangle.score(sizes.features, queries, sizes.feature_stride, block.more_panels, block.tile);
        triangle.finish(nullptr, nullptr, block.decay_weights(), block.tile, nullptr);
        triangle.score(sizes.values, block.dn, sizes.value_stride, block.panels, block.dtile);
        triangle.finish(block.dz, nullptr, block.decay_weights(), block.dtile, nullptr);
        triangle.add_transposed(sizes.features, queries, sizes.feature_stride, block.dtile, block.columns);
        triangle.add_columns(block.tile, sizes.width, block.dn, sizes.value_stride, block.dvalues);
        source.add(n);
      }
    }
    to_rows(n, sizes.features, block.columns, block.rows, sizes.feature_stride);
    block.add_decay_terms(t, n, block.keys, -1);
    chain_rows(p.has_maximum() ? FeatureMap::exponential : p.feature_map, n, sizes.channels, block.keys, block.rows,
               sizes.feature_stride, block.key_norms);
    write_key_gradients(block, t, n);
  }
}

}  // namespace
}  // namespace fastnlp
