// From the tensors of a CRF op to a CrfProblem, with the checks and the output shapes that CPU and CUDA share.
#pragma once
#include "checks.h"
#include "crf.h"

namespace fastnlp {

struct CrfCall {
  CrfProblem problem;
  ScalarType compute;  // Double where the emissions are, else Float
  int64_t rows;        // B * T, or the number of packed rows
  const Tensor& emissions;
  bool packed;

  CrfCall(const Tensor& emissions, const Tensor& transitions, const std::optional<Tensor>& start,
          const std::optional<Tensor>& end, const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens)
      : emissions(emissions), packed(cu_seqlens.has_value()) {
    CrfProblem& p = problem;
    p.emissions_dtype = dtype_of(emissions, "emissions");
    compute = p.emissions_dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
    const int64_t dim = packed ? 2 : 3;
    check(emissions.dim() == dim, "emissions must be ", packed ? "[total, N]" : "[B, T, N]", ", got ",
          shape_of(emissions));
    p.tags = emissions.size(dim - 1);
    check(p.tags >= 1, "emissions must have at least one tag, got ", shape_of(emissions));
    check(p.tags == 1 || emissions.stride(dim - 1) == 1 || emissions.numel() == 0,
          "emissions must have adjacent tags (stride 1)");
    p.emissions = emissions.const_data_ptr();
    p.steps = emissions.size(dim - 2);
    p.emissions_step_stride = emissions.stride(dim - 2);
    p.mask = nullptr;
    p.cu_seqlens = nullptr;
    if (packed) {
      check(!mask.has_value(), "mask must be None where cu_seqlens is given");
      p.batch = cu_seqlens->numel() - 1;
      check(p.batch >= 0, "cu_seqlens must be [B + 1], got ", shape_of(*cu_seqlens));
      check_dense(*cu_seqlens, "cu_seqlens", {p.batch + 1}, ScalarType::Long, emissions);
      p.cu_seqlens = cu_seqlens->const_data_ptr<int64_t>();
      p.emissions_batch_stride = 0;
      rows = p.steps;
    } else {
      p.batch = emissions.size(0);
      p.emissions_batch_stride = emissions.stride(0);
      rows = p.batch * p.steps;
      if (mask) {
        check_dense(*mask, "mask", {p.batch, p.steps}, ScalarType::Bool, emissions);
        p.mask = static_cast<const Bool*>(mask->const_data_ptr());
      }
    }

    p.transitions_per_position = transitions.dim() == 4;
    check(transitions.scalar_type() == compute && transitions.device() == emissions.device(), "transitions must be ",
          torch::headeronly::toString(compute), " on the device of emissions");
    const int64_t base = transitions.dim() - 2;
    const int64_t edges = p.steps > 0 ? p.steps - 1 : 0;
    const bool shaped = p.transitions_per_position
                            ? !packed && transitions.size(0) == p.batch && transitions.size(1) == edges
                            : transitions.dim() == 2;
    check(shaped && transitions.size(base) == p.tags && transitions.size(base + 1) == p.tags,
          "transitions must be [N, N]", packed ? "" : " or [B, T-1, N, N]", " with N = ", p.tags, ", got ",
          shape_of(transitions));
    p.transitions = transitions.const_data_ptr();
    p.transitions_batch_stride = p.transitions_per_position ? transitions.stride(0) : 0;
    p.transitions_step_stride = p.transitions_per_position ? transitions.stride(1) : 0;
    p.transitions_from_stride = transitions.stride(base);
    p.transitions_to_stride = transitions.stride(base + 1);
    p.start = boundary(start, "start_transitions");
    p.end = boundary(end, "end_transitions");
  }

  const void* boundary(const std::optional<Tensor>& scores, const char* name) const {
    if (!scores) return nullptr;
    check_dense(*scores, name, {problem.tags}, compute, emissions);
    return scores->const_data_ptr();
  }

  const int64_t* tags(const Tensor& tags) const {
    if (packed)
      check_dense(tags, "tags", {rows}, ScalarType::Long, emissions);
    else
      check_dense(tags, "tags", {problem.batch, problem.steps}, ScalarType::Long, emissions);
    return tags.const_data_ptr<int64_t>();
  }

  Tensor per_sequence() const { return new_tensor(emissions, {problem.batch}, compute); }
  Tensor per_step(ScalarType dtype) const {
    return packed ? new_tensor(emissions, {rows}, dtype) : new_tensor(emissions, {problem.batch, problem.steps}, dtype);
  }
  Tensor like_emissions() const {
    return packed ? new_tensor(emissions, {rows, problem.tags}, emissions.scalar_type())
                  : new_tensor(emissions, {problem.batch, problem.steps, problem.tags}, emissions.scalar_type());
  }
  Tensor like_transitions() const {
    const int64_t edges = problem.steps > 0 ? problem.steps - 1 : 0;
    return problem.transitions_per_position
               ? new_tensor(emissions, {problem.batch, edges, problem.tags, problem.tags}, compute)
               : new_tensor(emissions, {problem.tags, problem.tags}, compute);
  }
  Tensor like_boundary() const { return new_tensor(emissions, {problem.tags}, compute); }
};

}  // namespace fastnlp
