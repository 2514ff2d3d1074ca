// What every CUDA kernel here builds on: launching, warp exchange and the scalar traits of a compute type. The same
// text is compiled by g++ for the tests (tests/cuda/emulation.h), which is why launches and named barriers have one
// home.
#pragma once
#include <cstdint>

#ifndef FASTNLP_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fastnlp {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream, Arguments... arguments) {
  kernel<<<grid, threads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

// Barrier `id` (1 to 15; 0 is __syncthreads) over `threads` threads of the block; returns whether any brought true.
__device__ inline bool named_barrier_or(int id, int threads, bool value) {
  int any;
  asm volatile("{ .reg .pred p, q; setp.ne.s32 p, %1, 0; barrier.cta.red.or.pred q, %2, %3, p; selp.s32 %0, 1, 0, q; }"
               : "=r"(any)
               : "r"(int(value)), "r"(id), "r"(threads)
               : "memory");
  return any != 0;
}

}  // namespace fastnlp
#endif

namespace fastnlp {

constexpr unsigned kFullWarp = 0xffffffffu;

// tiny: a column sum below it may have lost terms to underflow (sums are taken of p * E with E <= 1 and p <= N^2), so
// it is recomputed in the log domain: 64^3 * 1.2e-38 / 1e-24 = 3e-9 is the largest share that can be missing above it.
template <typename C>
struct Numbers;

template <>
struct Numbers<float> {
  static constexpr float tiny = 1e-24f;
  static constexpr float ln2 = 0.69314718f;
  static __device__ int magnitude(float x) { return __float_as_int(x); }  // ordered like x for x >= 0
  static __device__ int exponent(int magnitude) { return (magnitude >> 23) - 127; }
  static __device__ float power_of_two(int n) { return __int_as_float((127 + n) << 23); }
};

template <>
struct Numbers<double> {
  static constexpr double tiny = 1e-200;
  static constexpr double ln2 = 0.69314718055994530942;
  static __device__ int magnitude(double x) { return __double2hiint(x); }
  static __device__ int exponent(int magnitude) { return (magnitude >> 20) - 1023; }
  static __device__ double power_of_two(int n) { return __hiloint2double((1023 + n) << 20, 0); }
};

__device__ inline float upcast(float x) { return x; }
__device__ inline double upcast(double x) { return x; }
__device__ inline float upcast(__half x) { return __half2float(x); }
__device__ inline float upcast(__nv_bfloat16 x) { return __bfloat162float(x); }

// Largest float of the warp by one integer reduction (floats map to integers of the same order); NaN may count or not.
__device__ inline float warp_max(float x) {
  int key = __float_as_int(x);
  key ^= (key >> 31) & 0x7fffffff;
  key = __reduce_max_sync(kFullWarp, key);
  return __int_as_float(key ^ ((key >> 31) & 0x7fffffff));
}

template <typename T>
__device__ T warp_sum(T x) {
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(kFullWarp, x, lane);
  return x;
}

// Shifts and maxima only have to be close, so float serves for both compute types; no finite maximum gives 0.
__device__ inline float finite_or_zero(float x) { return x == -INFINITY ? 0.0f : x; }

template <typename C>
struct alignas(16) Pack {  // one 128-bit access
  static constexpr int size = 16 / sizeof(C);
  C value[size];
};

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastnlp
