// What the kernels of one step share: the arguments, the scalars of a tensor, four columns at a time in any layout and
// type, and sums over a block whose order is fixed.
#pragma once
#include "adafactor.h"
#include "device.cuh"

namespace fastnlp::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kQuads = 4;  // of columns that a thread keeps in registers
constexpr int64_t kFusedColumns = int64_t(kThreads) * kQuads * 4;
constexpr int kApplyRows = 512;  // whose factors a block holds

struct SumPartial {  // of a unit of sums
  double grad_squares, param_squares;
  double update_squares, product;  // of vectors
};
struct NormPartial {  // of a unit of norms
  double update_squares, product, col_factors;
  double least_row, least_col, largest_divisor;
};
struct ExactPartial {  // of a unit of apply
  double update_squares, product;
};
struct Control {  // of a tensor
  AdafactorScalars step;
  AdafactorGain gain;
  uint64_t key;
};

template <typename C>
struct Arguments {
  const AdafactorItem* items;
  const AdafactorGroup* groups;
  const AdafactorUnit* sum_units;
  const AdafactorUnit* norm_units;
  const AdafactorUnit* apply_units;
  void* const* grads;
  const double* lr;
  float* steps;
  float* rms;
  const float* grad_scale;
  const float* found_inf;
  double max_grad_norm;
  uint64_t seed;
  int64_t phases;
  int tensors;
  int sum_unit_count;
  bool skip_nonfinite;
  bool sharded;
  C* sums;
  C* partials;
  Control* control;
  SumPartial* sum_partials;
  NormPartial* norm_partials;
  ExactPartial* exact_partials;

  __device__ double scale() const { return grad_scale ? 1 / double(*grad_scale) : 1; }
  // Known once the squares of all gradients are in sums[0].
  __device__ double clip() const {
    return max_grad_norm > 0 ? adafactor_clip(max_grad_norm, sqrt(double(sums[0])) * fabs(scale())) : 1;
  }
};

// The four types that tensors may have in memory.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

// `count` elements, fewer than four at the end of a row: the others become 0.
template <typename T, typename C>
__device__ void load_quad(const T* from, int64_t stride, int count, C* to) {
  if (count == 4 && stride == 1 && (reinterpret_cast<uintptr_t>(from) & (4 * sizeof(T) - 1)) == 0) {
    const Four<T> x = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = C(upcast(x.value[e]));
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = e < count ? C(upcast(from[e * stride])) : C(0);
  }
}

__host__ __device__ constexpr DType dtype_of(float) { return DType::f32; }
__host__ __device__ constexpr DType dtype_of(double) { return DType::f64; }
__device__ inline DType dtype_of(__half) { return DType::f16; }
__device__ inline DType dtype_of(__nv_bfloat16) { return DType::bf16; }

__device__ inline void narrow(float* to, float x) { *to = x; }
__device__ inline void narrow(double* to, double x) { *to = x; }
__device__ inline void narrow(__half* to, float x) { *to = __float2half_rn(x); }
__device__ inline void narrow(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

template <typename T>
__device__ void store_quad(T* to, int64_t stride, int count, const T* x) {
  if (count == 4 && stride == 1 && (reinterpret_cast<uintptr_t>(to) & (4 * sizeof(T) - 1)) == 0) {
    Four<T> packed;
#pragma unroll
    for (int e = 0; e < 4; ++e) packed.value[e] = x[e];
    *reinterpret_cast<Four<T>*>(to) = packed;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < count) to[e * stride] = x[e];
  }
}

// A gradient whose type is only known when the kernel runs.
struct AnyType {};
template <typename C>
__device__ void load_quad(const void* data, DType dtype, int64_t at, int64_t stride, int count, C* to) {
  switch (dtype) {
    case DType::f64: return load_quad(static_cast<const double*>(data) + at, stride, count, to);
    case DType::f16: return load_quad(static_cast<const __half*>(data) + at, stride, count, to);
    case DType::bf16: return load_quad(static_cast<const __nv_bfloat16*>(data) + at, stride, count, to);
    default: return load_quad(static_cast<const float*>(data) + at, stride, count, to);
  }
}
template <typename G>
struct Grad {
  const void* data;
  DType dtype;
  template <typename C>
  __device__ void load(int64_t at, int64_t stride, int count, C* to) const {
    load_quad(static_cast<const G*>(data) + at, stride, count, to);
  }
};
template <>
struct Grad<AnyType> {
  const void* data;
  DType dtype;
  template <typename C>
  __device__ void load(int64_t at, int64_t stride, int count, C* to) const {
    load_quad(data, dtype, at, stride, count, to);
  }
};

__device__ inline int quad_count(int64_t first, int64_t end) {
  return end - first >= 4 ? 4 : end > first ? int(end - first) : 0;
}

// Largest and sum over the block, in an order that only the number of threads decides; every thread gets the result.
// `room` [kWarps] may be used again after the next barrier.
__device__ inline double block_sum(double x, double* room) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += room[warp];
  return sum;
}
__device__ inline double block_min(double x, double* room) {
  for (int lane = 16; lane > 0; lane /= 2) x = fmin(x, __shfl_xor_sync(kFullWarp, x, lane));
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  double least = room[0];
  for (int warp = 1; warp < kWarps; ++warp) least = fmin(least, room[warp]);
  return least;
}

// One tensor as the kernels see it.
template <typename C>
struct View {
  const Arguments<C>& call;
  const AdafactorItem& item;
  const AdafactorTensor& t;
  const AdafactorGroup& group;
  const Control& control;
  int index;

  __device__ View(const Arguments<C>& call, int index)
      : call(call),
        item(call.items[index]),
        t(item.tensor),
        group(call.groups[t.group]),
        control(call.control[index]),
        index(index) {}

  __device__ bool torch_mode() const { return group.torch_mode != 0; }
  __device__ bool product() const { return group.layer_adaptation != 0; }
  __device__ bool needs_param() const { return torch_mode() || product() || group.scale_parameter != 0; }
  __device__ const void* grad() const { return call.grads[index]; }

  // Column sums of a strip, or of a matrix.
  __device__ int64_t columns_size() const { return adafactor_columns(t.cols, product()); }
  __device__ int64_t behind() const { return columns_size() - 2; }  // where sum R stands, and then the flag
  __device__ C* columns(int64_t b) const { return call.sums + t.columns_at + b * columns_size(); }
  __device__ C* strip(int64_t b, int s) const {
    return item.strips == 1 ? columns(b) : call.partials + item.partials_at + (b * item.strips + s) * columns_size();
  }
  __device__ C* row_sums(int64_t b) const { return call.sums + t.rows_at + b * t.rows; }
  __device__ C* row_state(int64_t b) const { return static_cast<C*>(t.row) + b * t.rows; }

  // The new factor of a row, of its sum of squares. `share` turns a sum into a mean.
  __device__ C row_share(double grad) const { return C(grad * grad / double(t.whole_cols)); }
  __device__ C row_factor(C state, C sum, C share) const {
    return C(control.step.beta2) * state + C(control.step.fresh) * (share * sum + C(control.step.floor));
  }
  // What the product of the factors is divided by.
  __device__ C divisor(C factors) const {
    const C mean = factors / C(t.transposed ? t.whole_cols : t.whole_rows);
    return torch_mode() && mean < C(group.eps1) ? C(group.eps1) : mean;
  }
};

// Calls `with` with a type of gradients as its first argument's type.
template <typename With>
__device__ void with_grad(const void* data, DType dtype, const With& with) {
  switch (dtype) {
    case DType::f64: return with(Grad<double>{data, dtype});
    case DType::f16: return with(Grad<__half>{data, dtype});
    case DType::bf16: return with(Grad<__nv_bfloat16>{data, dtype});
    default: return with(Grad<float>{data, dtype});
  }
}

// What adafactor_step launches, in this order.
template <typename C>
cudaError_t launch_prepare(const Arguments<C>& call, cudaStream_t stream);
template <typename C>
cudaError_t launch_rows(const Arguments<C>& call, cudaStream_t stream);
template <typename C>
cudaError_t launch_total(const Arguments<C>& call, cudaStream_t stream);
template <typename C>
cudaError_t launch_columns(const Arguments<C>& call, cudaStream_t stream);
template <typename C>
cudaError_t launch_norms(const Arguments<C>& call, int64_t units, cudaStream_t stream);
template <typename C>
cudaError_t launch_exact(const Arguments<C>& call, int64_t units, cudaStream_t stream);
template <typename C>
cudaError_t launch_gain(const Arguments<C>& call, cudaStream_t stream);
template <typename C>
cudaError_t launch_apply(const Arguments<C>& call, int64_t units, cudaStream_t stream);

}  // namespace fastnlp::cuda
