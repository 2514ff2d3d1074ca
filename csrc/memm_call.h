// From the tensors of a MEMM op to a MemmProblem, with the checks and the output shapes that CPU and CUDA share.
#pragma once
#include "crf_call.h"
#include "memm.h"

namespace fastnlp {

struct MemmCall {
  MemmProblem problem;
  ScalarType compute;
  const Tensor& emissions;

  MemmCall(const Tensor& emissions, const Tensor& tags, const Tensor& transitions, const std::optional<Tensor>& mask,
           bool bidirectional)
      : emissions(emissions) {
    const CrfCall call(emissions, transitions, std::nullopt, std::nullopt, mask, std::nullopt);
    const CrfProblem& crf = call.problem;
    check(!crf.transitions_per_position, "transitions must be [N, N], got ", shape_of(transitions));
    compute = call.compute;
    problem = {crf.batch,
               crf.steps,
               crf.tags,
               crf.emissions,
               crf.emissions_dtype,
               crf.emissions_batch_stride,
               crf.emissions_step_stride,
               crf.transitions,
               crf.transitions_from_stride,
               crf.transitions_to_stride,
               call.tags(tags),
               crf.mask,
               bidirectional};
  }

  Tensor per_sequence() const { return new_tensor(emissions, {problem.batch}, compute); }
  Tensor like_emissions() const {
    return new_tensor(emissions, {problem.batch, problem.steps, problem.tags}, emissions.scalar_type());
  }
  Tensor like_transitions(bool wanted) const {
    if (!wanted) return new_tensor(emissions, {0}, compute);
    return new_tensor(emissions, {problem.tags, problem.tags}, compute);
  }
  const void* grad(const Tensor& grad) const {
    check_dense(grad, "grad", {problem.batch}, compute, emissions);
    return grad.const_data_ptr();
  }
};

}  // namespace fastnlp
