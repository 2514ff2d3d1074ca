// What sweeps over an item begin and end with: states and their gradients as the ops take and return them.
#pragma once
#include "linear_attention_state.h"

namespace fastnlp {
namespace {

// Where the state of an item stands in tensors [N, Hkv, F, Dv], [N, Hkv, F] and [N, Hkv, Dk].
template <class C>
struct StateOffsets {
  int64_t kv, sum, max;
  explicit StateOffsets(const LinearAttentionItem& item) {
    const LinearAttentionProblem& p = item.work->problem;
    const int64_t index = item.sequence->index * p.key_heads + item.key_head;
    sum = index * p.features();
    kv = sum * p.value_size;
    max = index * p.key_size;
  }
  C* of_kv(const void* data) const { return data ? static_cast<C*>(const_cast<void*>(data)) + kv : nullptr; }
  C* of_sum(const void* data) const { return data ? static_cast<C*>(const_cast<void*>(data)) + sum : nullptr; }
  C* of_max(const void* data) const { return data ? static_cast<C*>(const_cast<void*>(data)) + max : nullptr; }
};

template <class C>
void clear_state(const LinearAttentionProblem& p, void* state) {
  const Sizes<C> sizes(p);
  State<C>(sizes, state).clear(sizes);
}
template <class C>
void append(const LinearAttentionProblem& p, void* state, const void* local, bool first) {
  const Sizes<C> sizes(p);
  if (first)
    std::memcpy(state, local, State<C>::bytes(p));
  else
    State<C>(sizes, state).join(sizes, p.has_maximum(), State<C>(sizes, state), State<C>(sizes, local));
}

template <class C>
bool initial_state(const LinearAttentionItem& item, void* memory) {
  const LinearAttentionProblem& p = item.work->problem;
  const StateOffsets<C> at(item);
  const Sizes<C> sizes(p);
  State<C>(sizes, memory)
      .read(sizes, at.of_kv(p.initial_kv), at.of_sum(p.initial_key_sum), at.of_max(p.initial_key_max));
  return p.initial_kv != nullptr;
}
template <class C>
void final_state(const LinearAttentionItem& item, const void* memory) {
  const LinearAttentionWork& work = *item.work;
  const StateOffsets<C> at(item);
  const Sizes<C> sizes(work.problem);
  State<C>(sizes, memory).write(sizes, at.of_kv(work.kv), at.of_sum(work.key_sum), at.of_max(work.key_max));
}
template <class C>
void saved_state(const LinearAttentionItem& item, void* memory) {
  const LinearAttentionWork& work = *item.work;
  const StateOffsets<C> at(item);
  const Sizes<C> sizes(work.problem);
  State<C>(sizes, memory).read(sizes, at.of_kv(work.kv), at.of_sum(work.key_sum), at.of_max(work.key_max));
}

// The gradient of the final state begins the sweep from the right: of channels scaled by their last maximum.
template <class C>
void start_gradient(const LinearAttentionItem& item, const State<C>& state) {
  const LinearAttentionWork& work = *item.work;
  const Sizes<C> sizes(work.problem);
  const C* const max = StateOffsets<C>(item).of_max(work.key_max);
  for (int64_t d = 0; max && d < sizes.channels; ++d) state.max[d] = max[d] == kNothing<C> ? kNothing<C> : -max[d];
}
template <class C>
bool final_gradient(const LinearAttentionItem& item, void* memory) {
  const LinearAttentionWork& work = *item.work;
  const StateOffsets<C> at(item);
  const Sizes<C> sizes(work.problem);
  const State<C> state(sizes, memory);
  state.read(sizes, at.of_kv(work.dkv), at.of_sum(work.dkey_sum), nullptr);
  start_gradient(item, state);
  return work.dkv || work.dkey_sum;
}

// The gradient of the one state that all queries have read.
template <class C>
void total_gradient(const LinearAttentionItem& item, void* memory) {
  const LinearAttentionWork& work = *item.work;
  const StateOffsets<C> at(item);
  const Sizes<C> sizes(work.problem);
  const State<C> state(sizes, memory);
  const C *const dkv = at.of_kv(work.dkv), *const dsum = at.of_sum(work.dkey_sum);
  for (int64_t d = 0; d < sizes.features; ++d) {
    C* const row = state.kv + d * sizes.value_stride;
    if (work.problem.feature_map == FeatureMap::softmax) {  // queries have read kv / key_sum
      const C sum = at.of_sum(work.key_sum)[d], inverse = sum == 0 ? C{0} : C{1} / sum;
      each_vector(row, sizes.width, [&](int64_t, Vec<C> x) { return x * splat(inverse); });
      state.sum[d] = -dot(static_cast<const C*>(row), at.of_kv(work.kv) + d * sizes.values, sizes.values) * inverse;
    }
    for (int64_t y = 0; dkv && y < sizes.values; ++y) row[y] += dkv[d * sizes.values + y];
    if (dsum) state.sum[d] += dsum[d];
  }
  start_gradient(item, state);
}

template <class C>
void initial_gradient(const LinearAttentionItem& item, const void* memory) {
  const LinearAttentionWork& work = *item.work;
  if (!work.dinitial_kv) return;
  const StateOffsets<C> at(item);
  const Sizes<C> sizes(work.problem);
  const State<C> state(sizes, memory);
  C *const kv = at.of_kv(work.dinitial_kv), *const sum = at.of_sum(work.dinitial_key_sum);
  state.write(sizes, kv, sum, nullptr);
  const C* const max = at.of_max(work.problem.initial_key_max);
  for (int64_t d = 0; max && d < sizes.channels; ++d) {
    const bool seen = max[d] != kNothing<C> && state.max[d] != kNothing<C>;
    const C factor = seen ? std::exp(max[d] + state.max[d]) : C{0};
    for (int64_t y = 0; y < sizes.values; ++y) kv[d * sizes.values + y] *= factor;
    sum[d] *= factor;
  }
}

// g_t scales all that reaches token t from the left: d g_t is the reverse cumulative sum of decay_terms, from what the
// final state adds at the right end to what the initial state gets at the left. Rounding misses that end by an error
// that has grown along the way, and is taken back in proportion.
template <class C>
double decay_gradient(const LinearAttentionItem& item) {
  const LinearAttentionWork& work = *item.work;
  const LinearAttentionProblem& p = work.problem;
  const LinearAttentionSequence& s = *item.sequence;
  const StateOffsets<C> at(item);
  const auto product_of = [&](const void* a, const void* b, const void* a_sum, const void* b_sum) {
    double sum = 0;
    const auto add = [&](const C* x, const C* y, int64_t n) {
      for (int64_t i = 0; x && y && i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(y[i]);
    };
    add(at.of_kv(a), at.of_kv(b), p.features() * p.value_size);
    add(at.of_sum(a_sum), at.of_sum(b_sum), p.features());
    return sum;
  };
  const auto row_of = [&](int64_t t) { return (s.batch * p.keys + s.key0 + t) * p.key_heads + item.key_head; };
  double sum = product_of(work.dkv, work.kv, work.dkey_sum, work.key_sum), all = sum, total = 0;
  for (int64_t t = s.keys; t-- > 0;) all += work.decay_terms[row_of(t)];
  const double error = all - product_of(work.dinitial_kv, p.initial_kv, work.dinitial_key_sum, p.initial_key_sum);
  C* const to = static_cast<C*>(work.dlog_decay);
  for (int64_t t = s.keys; t-- > 0;) {
    const int64_t row = row_of(t);
    sum += work.decay_terms[row] - error / static_cast<double>(s.keys);
    const bool on = !p.key_padding_mask || p.key_padding_mask[s.batch * p.keys + s.key0 + t];
    if (p.decay_per_token) to[row] = static_cast<C>(on ? sum : 0);
    total += on ? sum : 0;
  }
  return total;
}

}  // namespace
}  // namespace fastnlp
