// One call of a linear-chain CRF kernel, described without torch: what the CPU kernels (csrc/cpu/crf.cpp) and the CUDA
// kernels (csrc/cuda/crf.cu) both take.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace fastnlp {

// Compute type C: double where the emissions are double, else float. Strides count elements, not bytes.
struct CrfProblem {
  int64_t batch;  // B
  int64_t steps;  // T of padded emissions [B, T, N]; the number of rows of packed emissions [total, N]
  int64_t tags;   // N, at least 1

  const void* emissions;  // tags are adjacent (stride 1)
  DType emissions_dtype;
  int64_t emissions_batch_stride;  // 0 where packed
  int64_t emissions_step_stride;

  const void* transitions;  // C, [from, to]; at step t of sequence b: + b * batch_stride + (t - 1) * step_stride
  int64_t transitions_batch_stride;  // both 0 where one [N, N] serves every position
  int64_t transitions_step_stride;
  int64_t transitions_from_stride;
  int64_t transitions_to_stride;
  bool transitions_per_position;  // [B, T-1, N, N]; never with packed emissions

  const void* start;  // C [N], or null: zeros
  const void* end;    // C [N], or null: zeros

  const Bool* mask;           // [B, T] contiguous, or null: every step is on. A masked step is skipped, wherever it is
  const int64_t* cu_seqlens;  // [B + 1], or null: padded. Sequence b is rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1

  // Row of step t of sequence b in every contiguous output ([B, T, ...] or [total, ...]).
  int64_t row(int64_t b, int64_t t) const { return cu_seqlens ? cu_seqlens[b] + t : b * steps + t; }
};

}  // namespace fastnlp
