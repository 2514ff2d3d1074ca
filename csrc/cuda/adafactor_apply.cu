// The second reading of the gradients: state, parameters, momentum, averages and step counts.
#include "adafactor_passes.cuh"

namespace fastnlp::cuda {
namespace {

// x cut to a bfloat16 or a float16, or rounded up to the next with the probability that its distance has.
__device__ inline float dithered(DType dtype, float x, uint32_t random) {
  const uint32_t bits = uint32_t(__float_as_int(x)), magnitude = bits & 0x7fffffff;
  if (dtype == DType::bf16) {
    if (magnitude >= 0x7f800000) return x;
    return __int_as_float(int((bits + (random >> 16)) & 0xffff0000));
  }
  if (magnitude >= 0x477fe000) return x;  // 65504, inf, NaN
  if (magnitude >= 0x38800000) return __int_as_float(int((bits + (random >> 19)) & 0xffffe000));
  // Below 2^-14 float16 has steps of 2^-24.
  const float steps = fabsf(x) * 16777216.0f, whole = floorf(steps);
  const float rounded = steps - whole > float(random >> 8) * 5.9604645e-8f ? whole + 1 : whole;
  return copysignf(rounded * 5.9604645e-8f, x);
}

// What is the same for all elements of a tensor.
template <typename C>
struct Update {
  C keep;
  C gain;  // of the gradient's factors, sign and scale included
  C limit;
  C beta1;
  C fresh;  // 1 - average_decay
  uint64_t key;
  bool dither;

  __device__ Update(const View<C>& view, bool clamped)
      : keep(C(view.control.gain.keep)),
        gain(C(view.control.gain.gain * view.control.grad)),
        limit(clamped ? C(1 / view.group.eps1) : C(INFINITY)),
        beta1(C(view.group.beta1)),
        fresh(C(1 - view.group.average_decay)),
        key(view.control.key),
        dither(view.group.stochastic != 0 && is_half(view.t.param_dtype)) {}
};

// Four elements of row r. `factor`: what U is the product of with the gradient.
template <typename C>
__device__ void update_quad(const AdafactorTensor& t, const Update<C>& u, const RowRoom<C>& rows, int r, int64_t col,
                            int count, Quad<C> g, Quad<C> p, const C* factor) {
  C change[4], x[4];
  g.unpack(t.grad_dtype);
#pragma unroll
  for (int e = 0; e < 4; ++e) change[e] = u.gain * (g.value[e] * (factor[e] > u.limit ? u.limit : factor[e]));
  if (t.moment.data) {
    const int64_t at = rows.moment[r] + col * t.moment.col_stride;
    const Quad<C> m = load_quad<C>(t.moment.data, kComputeType<C>, at, t.moment.col_stride, count);
#pragma unroll
    for (int e = 0; e < 4; ++e) change[e] = u.beta1 * m.value[e] + (C(1) - u.beta1) * change[e];
    store_quad(t.moment.data, kComputeType<C>, at, t.moment.col_stride, count, change);
  }
  p.unpack(t.param_dtype);
  if (rows.still[r]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = p.value[e];
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = u.keep * p.value[e] - change[e];
    if constexpr (sizeof(C) == 4) {
      if (u.dither) {
        const uint64_t first = rows.number[r] + uint64_t(col) * t.per_col;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint64_t number = first + uint64_t(e) * t.per_col;
          x[e] = dithered(t.param_dtype, x[e], adafactor_bits(adafactor_key_of(u.key, number), number));
        }
      }
    }
    store_quad(t.param.data, t.param_dtype, rows.param[r] + col * t.param.col_stride, t.param.col_stride, count, x);
  }
  if (!t.average.data) return;
  if constexpr (sizeof(C) == 4) {  // the average follows what is stored
    if (is_half(t.param_dtype)) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = half_value(t.param_dtype, half_bits(t.param_dtype, x[e]));
    }
  }
  const int64_t at = rows.average[r] + col * t.average.col_stride;
  Quad<C> a = load_quad<C>(t.average.data, kComputeType<C>, at, t.average.col_stride, count);
#pragma unroll
  for (int e = 0; e < 4; ++e) a.value[e] += u.fresh * (x[e] - a.value[e]);
  store_quad(t.average.data, kComputeType<C>, at, t.average.col_stride, count, a.value);
}

// The block's rows of a factored tensor, whose state it writes; the units share that of the columns between them.
template <typename C>
__device__ int begin_matrix(const View<C>& view, int unit, bool clamped, RowRoom<C>& rows) {
  const AdafactorTensor& t = view.t;
  const C total = t.transposed ? view.columns(0)[view.behind()] : C(0);
  const int count = begin_rows(view, unit, clamped, total, rows,
                               [&](int64_t b, int64_t i, C factor) { view.row_state(b)[i] = factor; });
  const int64_t columns = t.batch * t.cols;
  const int64_t share = (unsigned(columns) + unsigned(view.item.apply_units) - 1) / unsigned(view.item.apply_units);
  const int64_t first = unit * share, last = min(first + share, columns);
  for (int64_t q = first + threadIdx.x; q < last; q += kThreads) {
    const unsigned b = unsigned(q) / unsigned(t.cols);
    static_cast<C*>(t.col)[q] = view.columns(b)[q - int64_t(b) * t.cols];
  }
  return count;
}

// A chunk of a vector as one row.
template <typename C>
__device__ int begin_vector(const AdafactorTensor& t, int64_t begin, RowRoom<C>& rows) {
  if (threadIdx.x == 0) {
    rows.param[0] = begin * t.param.col_stride;
    rows.grad[0] = begin * t.grad.col_stride;
    rows.moment[0] = begin * t.moment.col_stride;
    rows.average[0] = begin * t.average.col_stride;
    rows.number[0] = t.first + uint64_t(begin) * t.per_col;
    rows.still[0] = false;
  }
  return 1;
}

template <typename C>
__global__ void __launch_bounds__(kThreads, 3) adafactor_apply_kernel(Arguments<C> call) {
  __shared__ RowRoom<C> rows;
  if (call.found_inf && *call.found_inf != 0) return;
  if (call.skip_nonfinite && !(fabs(double(call.sums[0])) < INFINITY)) return;
  const AdafactorUnit unit = call.apply_units[blockIdx.x];
  const View<C> view(call, unit.tensor);
  const AdafactorTensor& t = view.t;
  if (unit.index == 0 && threadIdx.x == 0) {
    call.steps[unit.tensor] += 1;
    if (call.rms && t.whole_numel > 0 && (view.torch_mode() || view.group.scale_parameter != 0))
      call.rms[unit.tensor] = float(view.control.gain.rms);
  }
  if (t.whole_numel == 0) return;
  const bool factored = t.factored;
  const bool clamped = factored && view.torch_mode() && t.batch > 0 && view.columns(0)[view.behind() + 1] != 0;
  const int64_t begin = factored ? 0 : unit.index * kVectorChunk;
  const int64_t cols = factored ? t.cols : min(kVectorChunk, t.cols - begin);
  const int count = factored ? begin_matrix(view, unit.index, clamped, rows) : begin_vector(t, begin, rows);
  __syncthreads();
  const Update<C> u(view, clamped);
  const Variance<C> variance(view);
  C* const state = static_cast<C*>(t.row) + begin;
  each_quad(count, cols, [&](int r, int64_t col, int columns) {
    const Quad<C> g =
        load_quad<C>(view.grad(), t.grad_dtype, rows.grad[r] + col * t.grad.col_stride, t.grad.col_stride, columns);
    const Quad<C> p = load_quad<C>(t.param.data, t.param_dtype, rows.param[r] + col * t.param.col_stride,
                                   t.param.col_stride, columns);
    C factor[4] = {};
    if (factored) {
      const C* const roots = view.columns(rows.matrix[r]) + t.cols + col;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const C root = e < columns ? roots[e] : C(0);
        factor[e] = rows.factor[r] * (clamped && root == 0 ? C(INFINITY) : root);
      }
    } else {
      Quad<C> x = g;
      x.unpack(t.grad_dtype);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (e >= columns) continue;
        const C v = variance.next(state[col + e], x.value[e]);
        state[col + e] = v;
        factor[e] = variance.scale(v);
      }
    }
    update_quad(t, u, rows, r, col, columns, g, p, factor);
  });
}

}  // namespace

template <typename C>
cudaError_t launch_apply(const Arguments<C>& call, int64_t units, cudaStream_t stream) {
  return launch(adafactor_apply_kernel<C>, dim3(unsigned(units)), kThreads, stream, call);
}

template cudaError_t launch_apply(const Arguments<float>&, int64_t, cudaStream_t);
template cudaError_t launch_apply(const Arguments<double>&, int64_t, cudaStream_t);

}  // namespace fastnlp::cuda
