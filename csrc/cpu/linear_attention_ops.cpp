// Host side of the linear attention ops on CPU: outputs, and sweeps over segments by as many threads as there are.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../linear_attention_call.h"
#include "isa.h"
#include "linear_attention.h"
#include "threads.h"

namespace fastnlp {
namespace {

using OptionalTensor = std::optional<Tensor>;

LinearAttentionKernels kernels_for(DType dtype) {
  return use_v3() ? v3::linear_attention_kernels(dtype) : baseline::linear_attention_kernels(dtype);
}

struct Segment {
  int64_t item;
  int64_t begin;
  int64_t end;
};

// A tensor's memory, or null where there is none.
void* data_of(const Tensor& tensor) { return tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr; }

struct Run {
  LinearAttentionCall call;
  const LinearAttentionProblem& p;
  LinearAttentionWork work;
  LinearAttentionKernels kernels;
  std::vector<LinearAttentionSequence> sequences;
  size_t state_size;
  size_t scratch_size;
  bool alone;
  int64_t whole;  // items that are one thread's own; the rest is shared out by segments

  Run(const Tensor& q, const Tensor& k, const Tensor& v, const LinearAttentionOptions& options)
      : call(q, k, v, options), p(call.problem), kernels(kernels_for(p.dtype)) {
    work.problem = p;
    const auto& queries = call.query_ends;
    const auto& keys = call.key_ends;
    for (int64_t n = 0; n < p.sequences; ++n) {
      if (queries.empty())
        sequences.push_back({n, n, 0, p.queries, 0, p.keys});
      else
        sequences.push_back({n, 0, queries[n], queries[n + 1] - queries[n], keys[n], keys[n + 1] - keys[n]});
    }
    // Longest first, so that the last thread to finish has little left to do.
    std::stable_sort(sequences.begin(), sequences.end(),
                     [](const auto& a, const auto& b) { return a.keys + a.queries > b.keys + b.queries; });
    state_size = kernels.state_size(p);
    scratch_size = kernels.scratch_size(p);
    const int64_t threads = torch::stable::get_num_threads(), items = p.items();
    const int64_t tokens = p.batch * (p.queries * p.heads + p.keys * p.key_heads);
    alone = threads == 1 || tokens * (p.features() + 16) * (p.value_size + 16) < (int64_t{1} << 19);
    whole = alone || items % threads * 4 >= threads * 3 ? items : items - items % threads;
  }

  LinearAttentionItem item(int64_t index) const {
    return {&work, &sequences[index / p.key_heads], index % p.key_heads};
  }

  void set_state(const Tensor& kv, const Tensor& key_sum, const Tensor& key_max) {
    work.kv = data_of(kv);
    work.key_sum = data_of(key_sum);
    work.key_max = p.has_maximum() ? data_of(key_max) : nullptr;
  }

  std::vector<Segment> segments(int64_t item, bool of_keys, bool backwards) const {
    const LinearAttentionSequence& s = sequences[item / p.key_heads];
    const int64_t tokens = of_keys ? s.keys : s.queries, length = segment_length(tokens);
    std::vector<Segment> segments;
    for (int64_t i = 0; i < segment_count(tokens); ++i)
      segments.push_back({item, i * length, std::min(tokens, (i + 1) * length)});
    if (backwards) std::reverse(segments.begin(), segments.end());
    return segments;
  }

  // f(index, scratch) on some thread, for indices below count.
  template <class F>
  void each(int64_t count, const F& f) const {
    in_parallel(count, alone, [&](Queue& queue) {
      const Memory scratch(scratch_size);
      for (int64_t index; queue.take(&index);) f(index, scratch.get());
    });
  }
  void pass(SegmentPass run, const Segment& s, const void* base, void* local, void* scratch) const {
    run(item(s.item), s.begin, s.end, base, local, scratch);
  }
  char* at(const Memory& states, int64_t index) const { return static_cast<char*>(states.get()) + index * state_size; }

  // The segments of items that are shared out, and where each item's begin.
  struct Shared {
    std::vector<Segment> segments;
    std::vector<int64_t> first;
    int64_t count() const { return static_cast<int64_t>(segments.size()); }
  };
  Shared shared(bool of_keys, bool backwards) const {
    Shared all = {{}, {0}};
    for (int64_t index = whole; index < p.items(); ++index) {
      for (const Segment& segment : segments(index, of_keys, backwards)) all.segments.push_back(segment);
      all.first.push_back(all.count());
    }
    return all;
  }

  // dlog_decay from its terms: by token, or summed over tokens and sequences, in the order of the sequences.
  void finish_decay(const Tensor& dlog_decay) const {
    std::vector<double> sums(p.items());
    each(p.items(), [&](int64_t index, void*) {
      sums[item(index).sequence->index * p.key_heads + index % p.key_heads] = kernels.decay_gradient(item(index));
    });
    for (int64_t head = 0; head < p.key_heads && !p.decay_per_token; ++head) {
      double sum = 0;
      for (int64_t n = 0; n < p.sequences; ++n) sum += sums[n * p.key_heads + head];
      if (call.compute == ScalarType::Double)
        dlog_decay.mutable_data_ptr<double>()[head] = sum;
      else
        dlog_decay.mutable_data_ptr<float>()[head] = static_cast<float>(sum);
    }
  }

  // A causal sweep: every segment is reached by the state before it. start(item, state) says whether there is one
  // before the first; finish(item, state) takes the last.
  struct Sweep {
    SegmentPass sums;
    SegmentPass run;
    bool backwards;
    bool (*start)(const LinearAttentionItem&, void* state);
    void (*finish)(const LinearAttentionItem&, const void* state);
  };

  // Sweeps in turn, item by item: the next one finds in the cache what the one before has read.
  void sweep(std::initializer_list<Sweep> sweeps) const {
    each(whole, [&](int64_t index, void* scratch) {
      for (const Sweep& sweep : sweeps) sweep_item(sweep, index, scratch);
    });
    for (const Sweep& sweep : sweeps)
      if (whole < p.items()) sweep_shared(sweep);
  }
  void sweep_item(const Sweep& sweep, int64_t index, void* scratch) const {
    const Memory states(2 * state_size);
    char *const state = at(states, 0), *const local = at(states, 1);
    bool some = sweep.start(item(index), state);
    for (const Segment& segment : segments(index, true, sweep.backwards)) {
      pass(sweep.run, segment, some ? state : nullptr, local, scratch);
      kernels.append(p, state, local, !some);
      some = true;
    }
    sweep.finish(item(index), state);
  }
  void sweep_shared(const Sweep& sweep) const {
    // The same sums, for all segments but the last at once; then what is before each; then the passes themselves.
    const Shared all = shared(true, sweep.backwards);
    const Memory locals(all.count() * state_size), befores(all.count() * state_size);
    std::vector<char> some(all.count());
    const auto is_last = [&](int64_t s) { return s + 1 == all.first[all.segments[s].item - whole + 1]; };
    each(all.count(), [&](int64_t s, void* scratch) {
      if (!is_last(s)) pass(sweep.sums, all.segments[s], nullptr, at(locals, s), scratch);
    });
    each(p.items() - whole, [&](int64_t left, void*) {
      const int64_t first = all.first[left];
      some[first] = sweep.start(item(whole + left), at(befores, first));
      for (int64_t s = first + 1; s < all.first[left + 1]; ++s) {
        std::memcpy(at(befores, s), at(befores, s - 1), state_size);
        kernels.append(p, at(befores, s), at(locals, s - 1), !some[s - 1]);
        some[s] = true;
      }
    });
    each(all.count(), [&](int64_t s, void* scratch) {
      pass(sweep.run, all.segments[s], some[s] ? at(befores, s) : nullptr, at(locals, s), scratch);
      if (!is_last(s)) return;
      kernels.append(p, at(befores, s), at(locals, s), !some[s]);
      sweep.finish(item(all.segments[s].item), at(befores, s));
    });
  }

  // Without causality: the sums of one side (of keys, or of queries), and passes of the other side that read their
  // total. base(item, state) fills what the sums themselves read.
  template <class Base, class Start, class Finish>
  void total(bool of_keys, SegmentPass sums, SegmentPass run, const Base& base, const Start& start,
             const Finish& finish) const {
    each(whole, [&](int64_t index, void* scratch) {
      const Memory states(3 * state_size);
      base(item(index), at(states, 1));
      bool some = start(item(index), at(states, 0));
      for (const Segment& segment : segments(index, of_keys, false)) {
        pass(sums, segment, at(states, 1), at(states, 2), scratch);
        kernels.append(p, at(states, 0), at(states, 2), !some);
        some = true;
      }
      finish(item(index), at(states, 0));
      for (const Segment& segment : segments(index, !of_keys, false))
        pass(run, segment, at(states, 0), nullptr, scratch);
    });
    if (whole == p.items()) return;

    const Shared summed = shared(of_keys, false), reading = shared(!of_keys, false);
    const int64_t left = p.items() - whole;
    const Memory bases(left * state_size), totals(left * state_size), locals(summed.count() * state_size);
    each(left, [&](int64_t i, void*) { base(item(whole + i), at(bases, i)); });
    each(summed.count(), [&](int64_t s, void* scratch) {
      pass(sums, summed.segments[s], at(bases, summed.segments[s].item - whole), at(locals, s), scratch);
    });
    each(left, [&](int64_t i, void*) {
      bool some = start(item(whole + i), at(totals, i));
      for (int64_t s = summed.first[i]; s < summed.first[i + 1]; ++s) {
        kernels.append(p, at(totals, i), at(locals, s), !some);
        some = true;
      }
      finish(item(whole + i), at(totals, i));
    });
    each(reading.count(), [&](int64_t s, void* scratch) {
      pass(run, reading.segments[s], at(totals, reading.segments[s].item - whole), nullptr, scratch);
    });
  }
};

#define LINEAR_ATTENTION_OPTIONS                                                                                  \
  const OptionalTensor &key_padding_mask, const OptionalTensor &cu_seqlens_q, const OptionalTensor &cu_seqlens_k, \
      const OptionalTensor &log_decay, const OptionalTensor &initial_kv, const OptionalTensor &initial_key_sum,   \
      const OptionalTensor &initial_key_max, int64_t feature_map, bool causal, bool normalize, double scale,      \
      double eps
#define LINEAR_ATTENTION_OPTION_VALUES                                                                     \
  LinearAttentionOptions {                                                                                 \
    key_padding_mask, cu_seqlens_q, cu_seqlens_k, log_decay, initial_kv, initial_key_sum, initial_key_max, \
        feature_map, causal, normalize, scale, eps                                                         \
  }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                    LINEAR_ATTENTION_OPTIONS) {
  Run run(q, k, v, LINEAR_ATTENTION_OPTION_VALUES);
  check(!causal || run.p.feature_map != FeatureMap::softmax, "feature_map must be exp where causal, got softmax");
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> results = {run.call.out(), run.call.normalizer(), run.call.kv(),
                                                                run.call.key_sum(), run.call.key_max()};
  run.work.out = data_of(std::get<0>(results));
  run.work.normalizer = data_of(std::get<1>(results));
  run.set_state(std::get<2>(results), std::get<3>(results), std::get<4>(results));
  const LinearAttentionKernels& kernels = run.kernels;
  const auto nothing = [](const LinearAttentionItem&, void*) {};
  if (causal)
    run.sweep({{kernels.key_sums, kernels.forward, false, kernels.initial_state, kernels.final_state}});
  else
    run.total(true, kernels.key_sums, kernels.forward, nothing, kernels.initial_state, kernels.final_state);
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(
    const OptionalTensor& dout, const OptionalTensor& dkv, const OptionalTensor& dkey_sum, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& normalizer, const Tensor& kv,
    const Tensor& key_sum, const Tensor& key_max, LINEAR_ATTENTION_OPTIONS) {
  Run run(q, k, v, LINEAR_ATTENTION_OPTION_VALUES);
  const LinearAttentionProblem& p = run.p;
  const ScalarType compute = run.call.compute;
  const auto dense = [&](const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape,
                         ScalarType dtype) {
    check_dense(tensor, name, shape, dtype, q);
    return data_of(tensor);
  };
  LinearAttentionWork& work = run.work;
  work.out = dense(out, "out", {p.batch, p.queries, p.heads, p.value_size}, q.scalar_type());
  if (p.divides()) work.normalizer = dense(normalizer, "normalizer", {p.batch, p.queries, p.heads}, compute);
  dense(kv, "kv", {p.sequences, p.key_heads, p.features(), p.value_size}, compute);
  dense(key_sum, "key_sum", {p.sequences, p.key_heads, p.features()}, compute);
  if (p.has_maximum()) dense(key_max, "key_max", {p.sequences, p.key_heads, p.key_size}, compute);
  run.set_state(kv, key_sum, key_max);
  if (dout) work.dout = dense(*dout, "dout", {p.batch, p.queries, p.heads, p.value_size}, q.scalar_type());
  if (dkv) work.dkv = dense(*dkv, "dkv", {p.sequences, p.key_heads, p.features(), p.value_size}, compute);
  if (dkey_sum) work.dkey_sum = dense(*dkey_sum, "dkey_sum", {p.sequences, p.key_heads, p.features()}, compute);

  const bool with_state = initial_kv.has_value(), with_decay = log_decay.has_value();
  const auto none = [&] { return new_tensor(q, {0}, q.scalar_type()); };
  Tensor dq = run.call.like(q), dk = run.call.like(k), dv = run.call.like(v);
  Tensor dlog_decay = with_decay ? run.call.like_decay() : none();
  Tensor dinitial_kv = with_state ? run.call.kv() : none(), dinitial_key_sum = with_state ? run.call.key_sum() : none();
  work.dq = data_of(dq);
  work.dk = data_of(dk);
  work.dv = data_of(dv);
  work.dinitial_kv = data_of(dinitial_kv);
  work.dinitial_key_sum = data_of(dinitial_key_sum);
  const Memory dz(p.divides() ? p.batch * p.queries * p.heads * sizeof(double) : 0);
  work.dz = dz.get();
  std::vector<double> terms(with_decay ? p.batch * p.keys * p.key_heads : 0);
  work.decay_terms = with_decay ? terms.data() : nullptr;
  work.dlog_decay = p.decay_per_token ? data_of(dlog_decay) : nullptr;

  const LinearAttentionKernels& kernels = run.kernels;
  if (causal) {
    const auto nothing = [](const LinearAttentionItem&, const void*) {};
    run.sweep({{kernels.key_sums, kernels.query_gradients, false, kernels.initial_state, nothing},
               {kernels.query_sums, kernels.key_gradients, true, kernels.final_gradient, kernels.initial_gradient}});
  } else {
    const auto start = [&](const LinearAttentionItem& item, void* state) {
      kernels.clear_state(item.work->problem, state);
      return false;
    };
    const auto finish = [&](const LinearAttentionItem& item, void* state) {
      kernels.total_gradient(item, state);
      kernels.initial_gradient(item, state);
    };
    run.total(false, kernels.query_gradients, kernels.key_gradients, kernels.saved_state, start, finish);
  }
  if (with_decay) run.finish_decay(dlog_decay);
  return {dq, dk, dv, dlog_decay, dinitial_kv, dinitial_key_sum};
}

Tensor linear_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv, const Tensor& key_sum,
                             const OptionalTensor& key_max, const OptionalTensor& log_decay, int64_t feature_map,
                             bool normalize, double scale, double eps) {
  LinearAttentionCall call(q, k, v, log_decay, feature_map, normalize, scale, eps);
  LinearAttentionProblem& p = call.problem;
  call.set_state(kv, key_sum, key_max);
  const LinearAttentionKernels kernels = kernels_for(p.dtype);
  Tensor out = new_tensor(q, {p.batch, p.heads, p.value_size}, q.scalar_type());
  LinearAttentionWork work;
  work.problem = p;
  work.out = data_of(out);
  work.kv = data_of(kv);
  work.key_sum = data_of(key_sum);
  work.key_max = p.has_maximum() ? data_of(*key_max) : nullptr;
  const int64_t cost = p.features() * p.value_size * p.group();
  parallel_for(0, p.items(), std::max<int64_t>(1, (int64_t{1} << 16) / cost), [&](int64_t begin, int64_t end) {
    const Memory scratch(kernels.step_scratch_size(p));
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / p.key_heads;
      const LinearAttentionSequence sequence = {b, b, 0, 1, 0, 1};
      kernels.step({&work, &sequence, index % p.key_heads}, scratch.get());
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnlp_ops, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&linear_attention));
  m.impl("linear_attention_backward", TORCH_BOX(&linear_attention_backward));
  m.impl("linear_attention_step", TORCH_BOX(&linear_attention_step));
}

}  // namespace fastnlp
