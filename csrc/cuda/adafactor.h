// The CUDA side of one step of Adafactor over many parameters (csrc/adafactor.h): a plan made on the host, a table of
// it on the device, and launches whose number does not depend on how many tensors there are.
#pragma once
#include <vector>

#include "../adafactor.h"
#ifndef FASTNLP_EMULATION
#include <cuda_runtime_api.h>
#endif

namespace fastnlp::cuda {

// One block's share of a tensor.
struct AdafactorUnit {
  int32_t tensor;
  int32_t index;
};

// A tensor and how its work is shared out.
struct AdafactorItem {
  AdafactorTensor tensor;  // the gradient's address is kept apart, because it changes more often
  int32_t strips;          // of strip_rows rows; their column sums lie in the workspace where there is more than one
  int32_t strip_rows;
  int32_t team;        // threads that share a row
  int32_t fused;       // rows and columns in one pass; otherwise two kernels
  int32_t packed;      // a team takes a whole matrix
  int32_t apply_rows;  // rows of all matrices, or elements of a vector, for a block that updates
  int32_t norm_width;  // columns of all matrices for a block that reduces
  int32_t sum_units;
  int32_t norm_units;
  int32_t apply_units;
  int32_t first_sum_unit;
  int32_t first_norm_unit;
  int32_t first_apply_unit;
  int64_t partials_at;
};

// Everything about a call that stays the same from step to step, and the few addresses and numbers that do not.
struct AdafactorPlan {
  int64_t tensors;
  int64_t groups;
  bool wide = false;  // some tensor is not fused
  bool factored = false;
  bool torch_mode = false;
  int64_t sum_units = 0;
  int64_t norm_units = 0;
  int64_t apply_units = 0;
  int64_t partials = 0;  // numbers
  std::vector<char> fixed;
  std::vector<char> fresh;

  // lr: null where it is read from the device.
  AdafactorPlan(const std::vector<AdafactorTensor>& tensors, const std::vector<AdafactorGroup>& groups,
                const double* lr);
};

struct AdafactorLaunch {
  const void* fixed;  // the plan's tables on the device
  const void* fresh;
  const double* lr;  // on the device, or null: the plan's
  float* steps;
  float* rms;               // or null
  const float* grad_scale;  // or null
  const float* found_inf;   // or null
  double max_grad_norm;
  bool skip_nonfinite;
  bool sharded;
  uint64_t seed;
  int64_t phases;
  void* sums;         // C [sums_size]
  bool sums_wanted;   // by the caller, not only by the kernels
  bool wide_numbers;  // C is double
};

// Bytes of the workspace, which is aligned to 256 bytes.
int64_t adafactor_workspace(const AdafactorPlan& plan, bool wide_numbers);
// Bytes travel as arguments of kernels: no host memory has to outlive the call, also where a graph captures it.
cudaError_t adafactor_upload(const std::vector<char>& from, void* to, cudaStream_t stream);
cudaError_t adafactor_step(const AdafactorPlan& plan, const AdafactorLaunch& call, void* workspace,
                           cudaStream_t stream);

}  // namespace fastnlp::cuda
