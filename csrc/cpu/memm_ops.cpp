// Host side of the MEMM ops on CPU: outputs, work for the threads, and one call of a kernel for each block of steps.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "../memm_call.h"
#include "isa.h"
#include "memm.h"
#include "threads.h"

namespace fastnlp {
namespace {

using OptionalTensor = std::optional<Tensor>;

MemmKernels kernels_for(const MemmProblem& problem) {
  return use_v3() ? v3::memm_kernels(problem.emissions_dtype) : baseline::memm_kernels(problem.emissions_dtype);
}

struct Run {
  MemmCall call;
  MemmWork work;
  MemmKernels kernels;
  std::vector<double> matrices;  // doubles, so that rows of either type are aligned

  Run(const Tensor& emissions, const Tensor& tags, const Tensor& transitions, const OptionalTensor& mask,
      bool bidirectional)
      : call(emissions, tags, transitions, mask, bidirectional), kernels(kernels_for(call.problem)) {
    work.problem = call.problem;
    if (call.problem.items() == 0) return;
    matrices.resize(kernels.matrices_size(call.problem) / sizeof(double));
    work.matrices = matrices.data();
    kernels.prepare(work);
  }

  // A thread is worth waking for about 20 microseconds of work: 2^14 exponentials.
  template <class F>
  void parallel(int64_t count, const F& f) const {
    const MemmProblem& p = call.problem;
    const int64_t cost = p.batch * p.steps * p.tags * (p.bidirectional ? 2 : 1) / std::max<int64_t>(1, count);
    parallel_for(0, count, std::max<int64_t>(1, (int64_t{1} << 14) / std::max<int64_t>(1, cost)), f);
  }

  std::vector<double> scratch() const { return std::vector<double>(kernels.scratch(call.problem) / sizeof(double)); }

  void complain(const std::vector<int64_t>& bad) const {
    for (size_t item = 0; item < bad.size(); ++item) {
      if (bad[item] < 0) continue;
      const int64_t b = static_cast<int64_t>(item) / call.problem.blocks();
      check(false, "tags must be in [0, ", call.problem.tags, "), got tag ",
            call.problem.gold[b * call.problem.steps + bad[item]], " at sequence ", b, ", step ", bad[item]);
    }
  }
};

Tensor memm_log_likelihood(Tensor emissions, Tensor tags, Tensor transitions, OptionalTensor mask, bool bidirectional) {
  Run run(emissions, tags, transitions, mask, bidirectional);
  const MemmProblem& p = run.call.problem;
  Tensor value = run.call.per_sequence();
  std::vector<double> partial(p.items());
  std::vector<int64_t> bad(p.items(), -1);
  run.work.partial = partial.data();
  run.parallel(p.items(), [&](int64_t begin, int64_t end) {
    std::vector<double> scratch = run.scratch();
    for (int64_t i = begin; i < end; ++i) bad[i] = run.kernels.forward(run.work, i, scratch.data());
  });
  run.complain(bad);
  for (int64_t b = 0; b < p.batch; ++b) {
    double sum = 0;
    for (int64_t k = 0; k < p.blocks(); ++k) sum += partial[b * p.blocks() + k];
    if (run.call.compute == ScalarType::Double)
      value.mutable_data_ptr<double>()[b] = sum;
    else
      value.mutable_data_ptr<float>()[b] = static_cast<float>(sum);
  }
  return value;
}

// Items are dealt to groups with sums of their own: enough groups to keep threads busy, few enough that clearing and
// adding them up costs less than the rows do.
int64_t groups_of(const MemmProblem& p) {
  const int64_t by_rows = p.batch * p.steps / p.tags;
  const int64_t by_memory = (int64_t{1} << 22) / (p.tags * p.tags);
  return std::max<int64_t>(1, std::min({int64_t{32}, p.items(), by_rows, by_memory}));
}

std::tuple<Tensor, Tensor> memm_log_likelihood_backward(Tensor grad, Tensor emissions, Tensor tags, Tensor transitions,
                                                        OptionalTensor mask, bool bidirectional, bool transition_grad) {
  Run run(emissions, tags, transitions, mask, bidirectional);
  const MemmProblem& p = run.call.problem;
  Tensor demissions = run.call.like_emissions();
  Tensor dtransitions = run.call.like_transitions(transition_grad);
  run.work.grad = run.call.grad(grad);
  run.work.demissions = demissions.mutable_data_ptr();
  const int64_t groups = transition_grad ? groups_of(p) : p.items();
  const size_t size = transition_grad ? run.kernels.sums_size(p) / sizeof(double) : 0;
  std::vector<double> sums(groups * size);
  std::vector<int64_t> bad(p.items(), -1);
  run.parallel(groups, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch = run.scratch();
    for (int64_t g = begin; g < end; ++g) {
      void* own = transition_grad ? sums.data() + g * size : nullptr;
      for (int64_t i = g * p.items() / groups; i < (g + 1) * p.items() / groups; ++i)
        bad[i] = run.kernels.backward(run.work, i, scratch.data(), own);
    }
  });
  run.complain(bad);
  if (transition_grad) {
    void* to = dtransitions.mutable_data_ptr();
    run.parallel(p.tags, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run.kernels.reduce(run.work, sums.data(), groups, i, to);
    });
  }
  return {demissions, dtransitions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnlp_ops, CPU, m) {
  m.impl("memm_log_likelihood", TORCH_BOX(&memm_log_likelihood));
  m.impl("memm_log_likelihood_backward", TORCH_BOX(&memm_log_likelihood_backward));
}

}  // namespace fastnlp
