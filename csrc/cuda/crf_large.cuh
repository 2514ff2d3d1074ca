// Tags beyond the register kernels, up to 1024: a block walks one chain of several sequences, so that each transition
// it reads from L2 serves all of them (four floats or two doubles: one 128-bit access to shared memory per tag).
#pragma once
#include "crf_parts.cuh"

namespace fastnlp::cuda {

constexpr int kLargeThreads = 256;
template <typename C>
constexpr int kGroup = Pack<C>::size;

// exp(transitions - column) as both chains (0 left, 1 right) read them, made once per call.
template <typename C>
struct LargeEdges {
  C* into;     // [2, other, own]
  C* out;      // [2, own, other]
  C* columns;  // [2, own], the largest transition into own
};

template <typename C>
LargeEdges<C> take_edges(const CrfProblem& problem, Workspace& space) {
  const int64_t cells = problem.transitions_per_position ? 0 : 2 * problem.tags * problem.tags;
  return {space.take<C>(cells), space.take<C>(cells), space.take<C>(2 * problem.tags)};
}

template <typename C>
cudaError_t crf_large_edges(const CrfProblem& problem, const LargeEdges<C>& edges, cudaStream_t stream);

// The columns of one thread: own(c) = threadIdx.x + 256 c. Reads beyond the last tag are sent to it and thrown away.
__device__ inline int own_tag(int c) { return int(threadIdx.x) + c * kLargeThreads; }

// sums[c][g] = sum_i vectors[i][g] * matrix[i, own(c)]
template <typename C, int kColumns>
__device__ void multiply(const Pack<C>* vectors, const C* matrix, int N, C (&sums)[kColumns][kGroup<C>]) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
#pragma unroll
    for (int g = 0; g < kGroup<C>; ++g) sums[c][g] = 0;
  int at[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) at[c] = min(own_tag(c), N - 1);
#pragma unroll 4
  for (int i = 0; i < N; ++i) {
    const Pack<C> vector = vectors[i];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const C edge = matrix[int64_t(i) * N + at[c]];
#pragma unroll
      for (int g = 0; g < kGroup<C>; ++g) sums[c][g] += vector.value[g] * edge;
    }
  }
}

// The block's largest (summed) value for each of its sequences. Two barriers.
template <int kValues>
__device__ void block_max(float (&x)[kValues], float (*shared)[kValues] /* [warps] */) {
#pragma unroll
  for (int g = 0; g < kValues; ++g) {
    const float top = warp_max(x[g]);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32][g] = top;
  }
  __syncthreads();
#pragma unroll
  for (int g = 0; g < kValues; ++g) {
    x[g] = shared[0][g];
    for (int warp = 1; warp < kLargeThreads / 32; ++warp) x[g] = max(x[g], shared[warp][g]);
  }
  __syncthreads();
}

template <typename C, int kValues>
__device__ void block_sum(C (&x)[kValues], C (*shared)[kValues] /* [warps] */) {
#pragma unroll
  for (int g = 0; g < kValues; ++g) {
    const C sum = warp_sum(x[g]);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32][g] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int g = 0; g < kValues; ++g) {
    x[g] = shared[0][g];
    for (int warp = 1; warp < kLargeThreads / 32; ++warp) x[g] += shared[warp][g];
  }
  __syncthreads();
}

template <typename F>
cudaError_t with_columns(int64_t tags, F f) {
  if (tags <= kLargeThreads) return f(Size<1>{});
  if (tags <= 2 * kLargeThreads) return f(Size<2>{});
  if (tags <= 4 * kLargeThreads) return f(Size<4>{});
  return cudaErrorInvalidValue;
}

}  // namespace fastnlp::cuda
