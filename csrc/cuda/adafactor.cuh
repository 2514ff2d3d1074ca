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
  // Clipping by the global norm changes the next four.
  double clip;
  double grad;       // factor of the gradient
  double row_share;  // what turns a sum of g^2 over a row into a mean
  double col_share;

  __device__ void clip_by(double factor, const AdafactorTensor& t) {
    clip = factor;
    grad = step.grad * factor;
    row_share = grad * grad / double(t.whole_cols);
    col_share = grad * grad / double(t.whole_rows);
  }
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
  // Of the sum of all gradients' squares.
  __device__ double clip(C squares) const {
    return adafactor_clip(max_grad_norm, sqrt(double(squares)) * fabs(scale()));
  }
};

// What tensors hold in memory is told apart when a kernel runs, in branches that all threads of a block take alike. (A
// kernel for each pair of types is what nvcc takes minutes for.)
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};
struct alignas(8) Halves {  // four numbers of 16 bits, the first in the lower half of the first word
  uint32_t word[2];
};

__host__ __device__ constexpr bool is_half(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16; }
__host__ __device__ constexpr int size_of(DType dtype) { return is_half(dtype) ? 2 : dtype == DType::f64 ? 8 : 4; }
template <typename C>
constexpr DType kComputeType = sizeof(C) == 8 ? DType::f64 : DType::f32;

__device__ inline float half_value(DType dtype, uint32_t bits) {
  return dtype == DType::bf16 ? __int_as_float(int(bits << 16)) : __half2float(__ushort_as_half(uint16_t(bits)));
}
__device__ inline uint32_t half_bits(DType dtype, float x) {
  return dtype == DType::bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
}

// Four neighbours in a row. Those of 16 bits stay packed in the first two values until unpack(): a conversion waits for
// its load, and the loads behind it would wait too.
template <typename C>
struct Quad {
  C value[4];
  bool packed;

  __device__ void unpack(DType dtype) {
    if constexpr (sizeof(C) == 4) {
      if (!packed) return;
      const auto low = uint32_t(__float_as_int(value[0])), high = uint32_t(__float_as_int(value[1]));
      value[0] = half_value(dtype, low & 0xffff);
      value[1] = half_value(dtype, low >> 16);
      value[2] = half_value(dtype, high & 0xffff);
      value[3] = half_value(dtype, high >> 16);
      packed = false;
    }
  }
};

__device__ inline bool in_one_piece(const void* data, DType dtype, int64_t at, int64_t stride, int count) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(data) + uintptr_t(at) * unsigned(size_of(dtype));
  return count == 4 && stride == 1 && (from & unsigned(4 * size_of(dtype) - 1)) == 0;
}

// `count` elements, fewer than four at the end of a row: the others become 0.
template <typename C>
__device__ Quad<C> load_quad(const void* data, DType dtype, int64_t at, int64_t stride, int count) {
  Quad<C> quad{};
  if (in_one_piece(data, dtype, at, stride, count)) {
    if (is_half(dtype)) {
      const Halves x = *reinterpret_cast<const Halves*>(static_cast<const uint16_t*>(data) + at);
      if constexpr (sizeof(C) == 4) {
        quad.value[0] = __int_as_float(int(x.word[0]));
        quad.value[1] = __int_as_float(int(x.word[1]));
        quad.packed = true;
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) quad.value[e] = half_value(dtype, x.word[e / 2] >> (16 * (e % 2)) & 0xffff);
      }
    } else if (dtype == DType::f64) {
      const auto x = *reinterpret_cast<const Four<double>*>(static_cast<const double*>(data) + at);
#pragma unroll
      for (int e = 0; e < 4; ++e) quad.value[e] = C(x.value[e]);
    } else {
      const auto x = *reinterpret_cast<const Four<float>*>(static_cast<const float*>(data) + at);
#pragma unroll
      for (int e = 0; e < 4; ++e) quad.value[e] = C(x.value[e]);
    }
    return quad;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (e >= count) continue;
    const int64_t place = at + e * stride;
    quad.value[e] = is_half(dtype)        ? C(half_value(dtype, static_cast<const uint16_t*>(data)[place]))
                    : dtype == DType::f64 ? C(static_cast<const double*>(data)[place])
                                          : C(static_cast<const float*>(data)[place]);
  }
  return quad;
}
template <typename C>
__device__ Quad<C> load_now(const void* data, DType dtype, int64_t at, int64_t stride, int count) {
  Quad<C> quad = load_quad<C>(data, dtype, at, stride, count);
  quad.unpack(dtype);
  return quad;
}

// Of what is written, only float's calls know 16 bits, and all of double's are doubles.
template <typename C>
__device__ void store_quad(void* data, DType dtype, int64_t at, int64_t stride, int count, const C* x) {
  const bool whole = in_one_piece(data, dtype, at, stride, count);
  if constexpr (sizeof(C) == 4) {
    if (is_half(dtype)) {
      uint32_t bits[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) bits[e] = half_bits(dtype, x[e]);
      uint16_t* const to = static_cast<uint16_t*>(data) + at;
      if (whole) {
        *reinterpret_cast<Halves*>(to) = {{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16}};
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (e < count) to[e * stride] = uint16_t(bits[e]);
      }
      return;
    }
  }
  C* const to = static_cast<C*>(data) + at;
  if (whole) {
    *reinterpret_cast<Four<C>*>(to) = {{x[0], x[1], x[2], x[3]}};
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < count) to[e * stride] = x[e];
  }
}

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

  // The new factor of a row, of its sum of squares.
  __device__ C row_factor(C state, C sum) const {
    return C(control.step.beta2) * state + C(control.step.fresh) * (C(control.row_share) * sum + C(control.step.floor));
  }
  // What the product of the factors is divided by.
  __device__ C divisor(C factors) const {
    const C mean = factors / C(t.transposed ? t.whole_cols : t.whole_rows);
    return torch_mode() && mean < C(group.eps1) ? C(group.eps1) : mean;
  }
};

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
