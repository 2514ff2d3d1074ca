// Launchers of the CUDA kernels of the memm family: plain pointers and a stream. C is the compute type (double where
// the emissions are double, else float). Each returns the first launch error; none synchronises. Workspaces are raw
// device memory of the size that the function beside the launcher names, aligned to 256 bytes. B * T must be
// below 2^31: the kernels divide row numbers in 32 bits, because a 64-bit division is a call that spills registers.
#pragma once
#include "../memm.h"
#ifndef FASTNLP_EMULATION
#include <cuda_runtime_api.h>
#endif

namespace fastnlp::cuda {

// log_likelihood C [B]; NaN where a valid step has a tag outside [0, N).
int64_t memm_forward_bytes(const MemmProblem& problem);
cudaError_t memm_forward(const MemmProblem& problem, void* log_likelihood, void* workspace, cudaStream_t stream);

struct MemmBackward {
  const void* grad = nullptr;    // C [B]
  void* demissions = nullptr;    // emissions' type [B, T, N]
  void* dtransitions = nullptr;  // C [N, N], or null: not wanted
};
int64_t memm_backward_bytes(const MemmProblem& problem, const MemmBackward& call);
cudaError_t memm_backward(const MemmProblem& problem, const MemmBackward& call, void* workspace, cudaStream_t stream);

}  // namespace fastnlp::cuda
