// Host side of the CRF ops on CPU: outputs, work for the threads, and one call of a kernel for each sequence.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../crf_call.h"
#include "crf.h"
#include "isa.h"
#include "threads.h"

namespace fastnlp {
namespace {

using OptionalTensor = std::optional<Tensor>;

CrfKernels kernels_for(const CrfProblem& problem) {
  return use_v3() ? v3::crf_kernels(problem) : baseline::crf_kernels(problem);
}

// The valid steps of every sequence, longest sequence first so that the last thread to finish has little left to do.
struct Plan {
  std::vector<CrfSequence> sequences;
  std::vector<int32_t> positions;
  int64_t longest = 0;
  int64_t total = 0;

  explicit Plan(const CrfCall& call) {
    const CrfProblem& p = call.problem;
    check(p.steps <= INT32_MAX || !p.mask, "mask must have fewer than 2^31 steps");
    if (p.cu_seqlens) {
      bool rises = p.cu_seqlens[0] == 0 && p.cu_seqlens[p.batch] == call.rows;
      for (int64_t b = 0; b < p.batch; ++b) rises = rises && p.cu_seqlens[b] <= p.cu_seqlens[b + 1];
      check(rises, "cu_seqlens must rise from 0 to the number of rows of emissions, ", call.rows);
    }
    sequences.resize(p.batch);
    if (p.mask) positions.resize(call.rows);
    for (int64_t b = 0; b < p.batch; ++b) {
      CrfSequence& s = sequences[b];
      s = {b, p.row(b, 0), p.cu_seqlens ? p.cu_seqlens[b + 1] - p.cu_seqlens[b] : p.steps, 0, nullptr};
      s.length = s.steps;
      if (p.mask) {
        int32_t* to = positions.data() + s.row0;
        s.length = 0;
        for (int64_t t = 0; t < p.steps; ++t) {
          to[s.length] = static_cast<int32_t>(t);
          s.length += p.mask[s.row0 + t] ? 1 : 0;
        }
        if (s.length > 0 && to[s.length - 1] != s.length - 1) s.positions = to;  // else a prefix, or all
      }
      longest = std::max(longest, s.length);
      total += s.length;
    }
    const auto longer = [](const CrfSequence& a, const CrfSequence& b) { return a.length > b.length; };
    if (!std::is_sorted(sequences.begin(), sequences.end(), longer))
      std::stable_sort(sequences.begin(), sequences.end(), longer);
  }
};

struct Run {
  CrfCall call;
  Plan plan;
  CrfWork work;
  CrfKernels kernels;
  std::unique_ptr<Memory> matrices;
  int64_t together;  // sequences that share a call of a kernel; the shape decides, like every order of additions

  Run(const Tensor& emissions, const Tensor& transitions, const OptionalTensor& start, const OptionalTensor& end,
      const OptionalTensor& mask, const OptionalTensor& cu_seqlens)
      : call(emissions, transitions, start, end, mask, cu_seqlens), plan(call), kernels(kernels_for(call.problem)) {
    work.problem = call.problem;
    work.rows = call.rows;
    matrices = std::make_unique<Memory>(kernels.matrices_size(call.problem));
    work.matrices = matrices->get();
    if (plan.total > 0) kernels.prepare(work);
    const CrfProblem& p = work.problem;
    const bool worthwhile = p.batch >= 4 && plan.longest <= 4096 && (p.tags <= 32 || p.batch >= 128);
    together = worthwhile && kernels.filter_lanes && !p.transitions_per_position ? kSequenceLanes : 1;
  }

  void check_start() const {
    const CrfProblem& p = call.problem;
    if (!p.mask || p.steps == 0) return;
    for (int64_t b = 0; b < p.batch; ++b) check(p.mask[b * p.steps], "mask of the first timestep must all be on");
  }

  int64_t items() const { return (call.problem.batch + together - 1) / together; }
  // The sequences of one item: eight at a time, and one by one those that a lane cannot hold.
  template <class Lanes, class Alone>
  void each_of(int64_t item, const Lanes& lanes, const Alone& alone) const {
    const int64_t first = item * together;
    const CrfSequence* const s = &plan.sequences[first];
    const int64_t count = std::min(together, call.problem.batch - first);
    const unsigned left = together > 1 ? lanes(s, count) : 1u;
    for (int64_t l = 0; l < count; ++l)
      if (left >> l & 1) alone(s[l]);
  }

  // A thread is worth waking for about 20 microseconds of work: 2^17 multiply-adds, counting a tag as 8.
  template <class F>
  void parallel(int64_t items, const F& f) const {
    const int64_t n = call.problem.tags;
    const int64_t cost = std::max<int64_t>(1, plan.total / std::max<int64_t>(1, items)) * n * (n + 16);
    parallel_for(0, items, std::max<int64_t>(1, (int64_t{1} << 17) / cost), f);
  }
  template <class Kernel>
  void each_path(Kernel kernel) const {
    each_path(kernel, kernels.path_scratch(work, plan.longest));
  }
  template <class Kernel>
  void each_path(Kernel kernel, size_t bytes) const {
    parallel(call.problem.batch, [&](int64_t begin, int64_t end) {
      const Memory scratch(bytes);
      for (int64_t r = begin; r < end; ++r) kernel(work, plan.sequences[r], scratch.get());
    });
  }

  size_t chain_scratch() const {
    const size_t one = kernels.chain_scratch(call.problem);
    return together > 1 ? std::max(one, kernels.lanes_scratch(call.problem)) : one;
  }

  std::tuple<Tensor, Tensor> forward(const Tensor* tags, bool save_messages) {
    Tensor value = call.per_sequence();
    Tensor messages = new_tensor(call.emissions, {save_messages ? call.rows : 0, call.problem.tags}, call.compute);
    work.tags = tags ? call.tags(*tags) : nullptr;
    work.messages = save_messages ? messages.mutable_data_ptr() : nullptr;
    work.value = value.mutable_data_ptr();
    std::vector<int64_t> bad(call.problem.batch, -1);
    parallel(items(), [&](int64_t begin, int64_t end) {
      const Memory scratch(chain_scratch());
      for (int64_t item = begin; item < end; ++item)
        each_of(
            item, [&](const CrfSequence* s, int64_t n) { return kernels.filter_lanes(work, s, n, scratch.get()); },
            [&](const CrfSequence& s) { bad[&s - plan.sequences.data()] = kernels.filter(work, s, scratch.get()); });
    });
    for (int64_t r = 0; r < call.problem.batch; ++r) {
      if (bad[r] < 0) continue;
      const CrfSequence& s = plan.sequences[r];
      check(false, "tags must be in [0, ", call.problem.tags, "), got tag ", work.tags[s.row0 + s.position(bad[r])],
            " at sequence ", s.index, ", step ", s.position(bad[r]));
    }
    return {value, messages};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& messages, const Tensor* tags,
                                                      bool transition_grad) {
    const int64_t n = call.problem.tags, batch = call.problem.batch;
    check_dense(grad, "grad", {batch}, call.compute, call.emissions);
    check_dense(messages, "messages", {call.rows, n}, call.compute, call.emissions);
    const bool per_position = call.problem.transitions_per_position;
    Tensor demissions = call.like_emissions();
    Tensor dtransitions = transition_grad ? call.like_transitions() : new_tensor(call.emissions, {0}, call.compute);
    Tensor dstart = call.like_boundary();
    Tensor dend = call.like_boundary();
    work.tags = tags ? call.tags(*tags) : nullptr;
    work.messages = messages.mutable_data_ptr();
    work.grad = grad.const_data_ptr();
    work.demissions = demissions.mutable_data_ptr();
    work.transition_grad = transition_grad;
    work.dtransitions_per_position = dtransitions.mutable_data_ptr();
    const size_t size = call.compute == ScalarType::Double ? sizeof(double) : sizeof(float);
    if (transition_grad && per_position && dtransitions.numel() > 0)
      std::memset(dtransitions.mutable_data_ptr(), 0, static_cast<size_t>(dtransitions.numel()) * size);

    // Sums over the batch go through a number of groups that depends on the shape alone, so that their order, and with
    // it every bit of the result, is the same for every number of threads. At most 64 groups and 32 MiB of sums.
    const int64_t cells = transition_grad && !per_position ? n * n : 0;
    const int64_t width = cells + 2 * n;
    const int64_t groups = std::min({items(), int64_t{64}, std::max<int64_t>(4, (int64_t{1} << 22) / width)});
    std::vector<double> sums(static_cast<size_t>(groups * width), 0.0);
    parallel(groups, [&](int64_t begin, int64_t end) {
      const Memory scratch(chain_scratch());
      for (int64_t g = begin; g < end; ++g) {
        double* own = sums.data() + g * width;
        const CrfSums to = {own, own + cells, own + cells + n};
        for (int64_t item = g; item < items(); item += groups)
          each_of(
              item,
              [&](const CrfSequence* s, int64_t n) { return kernels.smooth_lanes(work, s, n, scratch.get(), to); },
              [&](const CrfSequence& s) { kernels.smooth(work, s, scratch.get(), to); });
      }
    });
    for (int64_t g = 1; g < groups; ++g)
      for (int64_t c = 0; c < width; ++c) sums[c] += sums[g * width + c];
    const auto total = [&](int64_t offset, int64_t count, const Tensor& to) {
      for (int64_t c = 0; c < count; ++c) {
        const double sum = groups > 0 ? sums[offset + c] : 0;
        if (call.compute == ScalarType::Double)
          static_cast<double*>(to.mutable_data_ptr())[c] = sum;
        else
          static_cast<float*>(to.mutable_data_ptr())[c] = static_cast<float>(sum);
      }
    };
    total(0, cells, dtransitions);
    total(cells, n, dstart);
    total(cells + n, n, dend);
    return {demissions, dtransitions, dstart, dend};
  }
};

std::tuple<Tensor, Tensor> crf_log_partition(const Tensor& emissions, const Tensor& transitions,
                                             const OptionalTensor& start, const OptionalTensor& end,
                                             const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                             bool save_messages) {
  return Run(emissions, transitions, start, end, mask, cu_seqlens).forward(nullptr, save_messages);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> crf_log_partition_backward(
    const Tensor& grad, const Tensor& messages, const Tensor& emissions, const Tensor& transitions,
    const OptionalTensor& start, const OptionalTensor& end, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens, bool transition_grad) {
  return Run(emissions, transitions, start, end, mask, cu_seqlens).backward(grad, messages, nullptr, transition_grad);
}

std::tuple<Tensor, Tensor> crf_log_likelihood(const Tensor& emissions, const Tensor& tags, const Tensor& transitions,
                                              const OptionalTensor& start, const OptionalTensor& end,
                                              const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                              bool save_messages, bool check_start) {
  Run run(emissions, transitions, start, end, mask, cu_seqlens);
  if (check_start) run.check_start();
  return run.forward(&tags, save_messages);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> crf_log_likelihood_backward(
    const Tensor& grad, const Tensor& messages, const Tensor& emissions, const Tensor& tags, const Tensor& transitions,
    const OptionalTensor& start, const OptionalTensor& end, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens, bool transition_grad) {
  return Run(emissions, transitions, start, end, mask, cu_seqlens).backward(grad, messages, &tags, transition_grad);
}

std::tuple<Tensor, Tensor> crf_viterbi(const Tensor& emissions, const Tensor& transitions, const OptionalTensor& start,
                                       const OptionalTensor& end, const OptionalTensor& mask,
                                       const OptionalTensor& cu_seqlens, bool check_start) {
  Run run(emissions, transitions, start, end, mask, cu_seqlens);
  if (check_start) run.check_start();
  Tensor paths = run.call.per_step(ScalarType::Long);
  Tensor scores = run.call.per_sequence();
  run.work.paths = paths.mutable_data_ptr<int64_t>();
  run.work.scores = scores.mutable_data_ptr();
  const bool lanes = run.together > 1 && run.kernels.viterbi_lanes;
  // Groups hide each other's latency; few sequences had better be shared out among the threads.
  const int64_t batch = run.call.problem.batch;
  const size_t path = run.kernels.path_scratch(run.work, run.plan.longest);
  const int64_t group = batch >= 8 && path <= (size_t{1} << 18) ? kPathGroup : batch >= 4 ? 2 : 1;
  const size_t bytes =
      std::max(group * path, lanes ? run.kernels.viterbi_lanes_scratch(run.work, run.plan.longest) : 0);
  run.parallel(lanes ? run.items() : (batch + group - 1) / group, [&](int64_t begin, int64_t end) {
    const Memory scratch(bytes);
    const auto alone = [&](const CrfSequence* s, int64_t n) { run.kernels.viterbi(run.work, s, n, scratch.get()); };
    for (int64_t item = begin; item < end; ++item) {
      if (!lanes) {
        alone(&run.plan.sequences[item * group], std::min(group, batch - item * group));
        continue;
      }
      run.each_of(
          item,
          [&](const CrfSequence* s, int64_t n) { return run.kernels.viterbi_lanes(run.work, s, n, scratch.get()); },
          [&](const CrfSequence& s) { alone(&s, 1); });
    }
  });
  return {paths, scores};
}

std::tuple<Tensor, Tensor> crf_viterbi_n_best(const Tensor& emissions, const Tensor& transitions,
                                              const OptionalTensor& start, const OptionalTensor& end,
                                              const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                              int64_t n_best) {
  check(n_best >= 1, "n_best must be at least 1, got ", n_best);
  Run run(emissions, transitions, start, end, mask, cu_seqlens);
  const CrfProblem& p = run.call.problem;
  Tensor paths = run.call.packed ? new_tensor(emissions, {n_best, run.call.rows}, ScalarType::Long)
                                 : new_tensor(emissions, {p.batch, n_best, p.steps}, ScalarType::Long);
  Tensor scores = new_tensor(emissions, {p.batch, n_best}, run.call.compute);
  run.work.paths = paths.mutable_data_ptr<int64_t>();
  run.work.scores = scores.mutable_data_ptr();
  run.work.n_best = n_best;
  run.each_path(run.kernels.viterbi_n_best, run.kernels.n_best_scratch(run.work, run.plan.longest));
  return {paths, scores};
}

Tensor crf_sample(const Tensor& emissions, const Tensor& transitions, const OptionalTensor& start,
                  const OptionalTensor& end, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                  const Tensor& uniforms) {
  Run run(emissions, transitions, start, end, mask, cu_seqlens);
  const CrfProblem& p = run.call.problem;
  const int64_t samples = uniforms.dim() > 0 ? uniforms.size(0) : 0;
  if (run.call.packed)
    check_dense(uniforms, "uniforms", {samples, run.call.rows}, ScalarType::Float, emissions);
  else
    check_dense(uniforms, "uniforms", {samples, p.batch, p.steps}, ScalarType::Float, emissions);
  Tensor paths = run.call.packed ? new_tensor(emissions, {samples, run.call.rows}, ScalarType::Long)
                                 : new_tensor(emissions, {samples, p.batch, p.steps}, ScalarType::Long);
  run.work.paths = paths.mutable_data_ptr<int64_t>();
  run.work.uniforms = uniforms.const_data_ptr<float>();
  run.work.samples = samples;
  run.each_path(run.kernels.sample);
  return paths;
}

Tensor crf_entropy(const Tensor& emissions, const Tensor& transitions, const OptionalTensor& start,
                   const OptionalTensor& end, const OptionalTensor& mask, const OptionalTensor& cu_seqlens) {
  Run run(emissions, transitions, start, end, mask, cu_seqlens);
  Tensor value = run.call.per_sequence();
  run.work.value = value.mutable_data_ptr();
  run.each_path(run.kernels.entropy);
  return value;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnlp_ops, CPU, m) {
  m.impl("crf_log_partition", TORCH_BOX(&crf_log_partition));
  m.impl("crf_log_partition_backward", TORCH_BOX(&crf_log_partition_backward));
  m.impl("crf_log_likelihood", TORCH_BOX(&crf_log_likelihood));
  m.impl("crf_log_likelihood_backward", TORCH_BOX(&crf_log_likelihood_backward));
  m.impl("crf_viterbi", TORCH_BOX(&crf_viterbi));
  m.impl("crf_viterbi_n_best", TORCH_BOX(&crf_viterbi_n_best));
  m.impl("crf_sample", TORCH_BOX(&crf_sample));
  m.impl("crf_entropy", TORCH_BOX(&crf_entropy));
}

}  // namespace fastnlp
