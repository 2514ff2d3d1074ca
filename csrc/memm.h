// One call of a maximum-entropy Markov model, described without torch: what the CPU kernels (csrc/cpu/memm.cpp) and the
// CUDA kernels (csrc/cuda/memm.cu) both take.
#pragma once
#include <cstdint>

#include "crf.h"

namespace fastnlp {

// Steps of one item of work. Partial sums belong to items and groups of items, whose numbers follow from the shapes
// alone: results are the same for any number of threads.
constexpr int64_t kMemmBlock = 256;

// Compute type C: double where the emissions are double, else float. Strides count elements, not bytes.
struct MemmProblem {
  int64_t batch;  // B
  int64_t steps;  // T
  int64_t tags;   // N, at least 1

  const void* emissions;  // [B, T, N], tags are adjacent (stride 1)
  DType emissions_dtype;
  int64_t emissions_batch_stride;
  int64_t emissions_step_stride;

  const void* transitions;  // C [N, N], [from, to]
  int64_t transitions_from_stride;
  int64_t transitions_to_stride;

  const int64_t* gold;  // [B, T] contiguous
  const Bool* mask;     // [B, T] contiguous, or null: every step is on
  bool bidirectional;

  int64_t blocks() const { return (steps + kMemmBlock - 1) / kMemmBlock; }  // items of one sequence
  int64_t items() const { return batch * blocks(); }
};

}  // namespace fastnlp
