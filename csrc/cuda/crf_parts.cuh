// What the launchers of the crf kernels share: workspace, dispatch on types and sizes, and the parts that other files
// hold.
#pragma once
#include "crf_chain.cuh"

namespace fastnlp::cuda {

// Hands out pieces of one allocation; with a null base it only counts.
struct Workspace {
  char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
    return piece;
  }
};

template <typename T>
struct Type {
  using type = T;
};
template <typename T>
using type_of = typename T::type;

// f(compute type, emissions' type)
template <typename F>
cudaError_t with_types(DType emissions, F f) {
  switch (emissions) {
    case DType::f64: return f(Type<double>{}, Type<double>{});
    case DType::f16: return f(Type<float>{}, Type<__half>{});
    case DType::bf16: return f(Type<float>{}, Type<__nv_bfloat16>{});
    default: return f(Type<float>{}, Type<float>{});
  }
}

template <int K>
struct Size {
  static constexpr int value = K;
};

// Tags that the register kernels hold: the backward one keeps a column, a row and a gradient of the matrix in each
// thread, 192 of 255 registers for 64 floats; 32 doubles would spill.
inline bool fits_registers(const CrfProblem& problem) {
  return problem.tags <= (problem.emissions_dtype == DType::f64 ? 16 : 64);
}

// f(Size<K>) with the smallest K that holds the tags
template <typename C, typename F>
cudaError_t with_size(int64_t tags, F f) {
  if (tags <= 8) return f(Size<8>{});
  if (tags <= 16) return f(Size<16>{});
  if constexpr (sizeof(C) == 4) {
    if (tags <= 32) return f(Size<32>{});
    if (tags <= 64) return f(Size<64>{});
  }
  return cudaErrorInvalidValue;
}

#define FASTNLP_RETURN_IF_ERROR(call)       \
  do {                                      \
    const cudaError_t error = (call);       \
    if (error != cudaSuccess) return error; \
  } while (0)

__device__ inline void store(void* out, DType dtype, int64_t at, double value) {
  static_cast<double*>(out)[at] = value;
}
__device__ inline void store(void* out, DType dtype, int64_t at, float value) {
  if (dtype == DType::f32)
    static_cast<float*>(out)[at] = value;
  else if (dtype == DType::f16)
    static_cast<__half*>(out)[at] = __float2half_rn(value);
  else
    static_cast<__nv_bfloat16*>(out)[at] = __float2bfloat16_rn(value);
}

// crf_scan.cu: boundaries of all chunks, and the op's output.
int64_t crf_scan_bytes(const CrfProblem& problem);
cudaError_t crf_scan(const CrfProblem& problem, const CrfSequences& sequences, const CrfForward& call, void* workspace,
                     cudaStream_t stream);

// crf_large.cu, crf_large_smooth.cu: tags beyond the register kernels.
int64_t crf_large_forward_bytes(const CrfProblem& problem, const CrfForward& call);
cudaError_t crf_large_forward(const CrfProblem& problem, const CrfSequences& sequences, const CrfForward& call,
                              void* workspace, cudaStream_t stream);
int64_t crf_large_backward_bytes(const CrfProblem& problem, const CrfBackward& call);
cudaError_t crf_large_backward(const CrfProblem& problem, const CrfSequences& sequences, const CrfBackward& call,
                               void* workspace, cudaStream_t stream);

// crf_smooth.cu: sums of partials [rows, matrix + 2 tags] over the rows, in a fixed order, to dT [matrix], dstart and
// dend.
template <typename C>
cudaError_t crf_sum_partials(const C* partials, int64_t rows, int64_t matrix, int64_t tags, C* dtransitions, C* dstart,
                             C* dend, cudaStream_t stream);

}  // namespace fastnlp::cuda
