// The second reading of the gradients: state, parameters, momentum, averages and step counts.
#include <type_traits>

#include "adafactor_passes.cuh"

namespace fastnlp::cuda {
namespace {

// x cut to a bfloat16 or a float16, or rounded up to the next with the probability that its distance has.
__device__ inline float dithered(__nv_bfloat16, float x, uint32_t random) {
  const uint32_t bits = uint32_t(__float_as_int(x));
  if ((bits & 0x7f800000) == 0x7f800000) return x;
  return __int_as_float(int((bits + (random >> 16)) & 0xffff0000));
}
__device__ inline float dithered(__half, float x, uint32_t random) {
  const uint32_t bits = uint32_t(__float_as_int(x)), magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x477fe000) return x;  // 65504, inf, NaN
  if (magnitude >= 0x38800000) return __int_as_float(int((bits + (random >> 19)) & 0xffffe000));
  // Below 2^-14 float16 has steps of 2^-24.
  const float steps = fabsf(x) * 16777216.0f, whole = floorf(steps);
  const float rounded = steps - whole > float(random >> 8) * 5.9604645e-8f ? whole + 1 : whole;
  return copysignf(rounded * 5.9604645e-8f, x);
}
__device__ inline float dithered(float, float x, uint32_t) { return x; }
__device__ inline double dithered(double, double x, uint32_t) { return x; }

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

  __device__ Update(const View<C>& view, double grad, bool clamped)
      : keep(C(view.control.gain.keep)),
        gain(C(view.control.gain.gain * grad)),
        limit(clamped ? C(1 / view.group.eps1) : C(INFINITY)),
        beta1(C(view.group.beta1)),
        fresh(C(1 - view.group.average_decay)),
        key(view.control.key),
        dither(view.group.stochastic != 0) {}
};

// Where four elements lie in each tensor, and the number of the first.
struct Place {
  int64_t param, moment, average;
  uint64_t number;
  int count;
  bool still;
};

template <typename C, typename P>
__device__ void update_quad(const AdafactorTensor& t, const Update<C>& u, const Place& at, const C* g,
                            const C* factor) {
  P* const to = static_cast<P*>(t.param.data) + at.param;
  C p[4], change[4];
  load_quad(to, t.param.col_stride, at.count, p);
#pragma unroll
  for (int e = 0; e < 4; ++e) change[e] = u.gain * (g[e] * (factor[e] > u.limit ? u.limit : factor[e]));
  if (t.moment.data) {
    C* const moment = static_cast<C*>(t.moment.data) + at.moment;
    C m[4];
    load_quad(moment, t.moment.col_stride, at.count, m);
#pragma unroll
    for (int e = 0; e < 4; ++e) change[e] = u.beta1 * m[e] + (C(1) - u.beta1) * change[e];
    store_quad(moment, t.moment.col_stride, at.count, change);
  }
  P stored[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    C x = at.still ? p[e] : u.keep * p[e] - change[e];
    if (sizeof(P) == 2 && u.dither && !at.still) {
      const uint64_t number = at.number + uint64_t(e) * t.per_col;
      x = dithered(P{}, x, adafactor_bits(adafactor_key_of(u.key, number), number));
    }
    narrow(stored + e, x);
  }
  if (!at.still) store_quad(to, t.param.col_stride, at.count, stored);
  if (!t.average.data) return;
  C* const average = static_cast<C*>(t.average.data) + at.average;
  C a[4];
  load_quad(average, t.average.col_stride, at.count, a);
#pragma unroll
  for (int e = 0; e < 4; ++e) a[e] += u.fresh * (C(upcast(stored[e])) - a[e]);
  store_quad(average, t.average.col_stride, at.count, a);
}

template <typename C, typename P, typename G>
__device__ void apply_rows(const View<C>& view, const Grad<G>& grad, const Update<C>& u, int count, bool clamped,
                           const RowRoom<C>& rows) {
  const AdafactorTensor& t = view.t;
  each_quad(count, t.cols, [&](int r, int64_t col, int columns) {
    C g[4], factor[4];
    grad.load(rows.grad[r] + col * t.grad.col_stride, t.grad.col_stride, columns, g);
    const C* const roots = view.columns(rows.matrix[r]) + t.cols + col;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const C root = e < columns ? roots[e] : C(0);
      factor[e] = rows.factor[r] * (clamped && root == 0 ? C(INFINITY) : root);
    }
    Place at;
    at.param = rows.param[r] + col * t.param.col_stride;
    at.moment = rows.moment[r] + col * t.moment.col_stride;
    at.average = rows.average[r] + col * t.average.col_stride;
    at.number = t.first + uint64_t(rows.matrix[r]) * t.per_batch + uint64_t(rows.row[r]) * t.per_row +
                uint64_t(col) * t.per_col;
    at.count = columns;
    at.still = rows.still[r];
    update_quad<C, P>(t, u, at, g, factor);
  });
}

template <typename C, typename P, typename G>
__device__ void apply_vector(const View<C>& view, const Grad<G>& grad, const Update<C>& u, int chunk,
                             double grad_factor) {
  const AdafactorTensor& t = view.t;
  const Variance<C> variance(view, grad_factor);
  C* const state = static_cast<C*>(t.row);
  const int64_t begin = chunk * kVectorChunk, end = min(begin + kVectorChunk, t.cols);
  for (int64_t j = begin + 4 * int64_t(threadIdx.x); j < end; j += 4 * kThreads) {
    const int count = quad_count(j, end);
    C g[4], factor[4] = {};
    grad.load(j * t.grad.col_stride, t.grad.col_stride, count, g);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e >= count) continue;
      const C v = variance.next(state[j + e], g[e]);
      state[j + e] = v;
      factor[e] = variance.scale(v);
    }
    Place at;
    at.param = j * t.param.col_stride;
    at.moment = j * t.moment.col_stride;
    at.average = j * t.average.col_stride;
    at.number = t.first + uint64_t(j) * t.per_col;
    at.count = count;
    at.still = false;
    update_quad<C, P>(t, u, at, g, factor);
  }
}

template <typename C, typename P, typename G>
__device__ void apply_unit(const View<C>& view, const Grad<G>& grad, const Update<C>& u, int unit, double grad_factor,
                           int count, bool clamped, const RowRoom<C>& rows) {
  if (view.t.factored)
    apply_rows<C, P>(view, grad, u, count, clamped, rows);
  else
    apply_vector<C, P>(view, grad, u, unit, grad_factor);
}

template <typename C>
__global__ void __launch_bounds__(kThreads) adafactor_apply_kernel(Arguments<C> call) {
  __shared__ RowRoom<C> rows;
  if (call.found_inf && *call.found_inf != 0) return;
  if (call.skip_nonfinite && !(fabs(double(call.sums[0])) < INFINITY)) return;
  const AdafactorUnit unit = call.apply_units[blockIdx.x];
  const View<C> view(call, unit.tensor);
  const AdafactorTensor& t = view.t;
  const double grad_factor = view.control.step.grad * call.clip();
  if (unit.index == 0 && threadIdx.x == 0) {
    call.steps[unit.tensor] += 1;
    if (call.rms && t.whole_numel > 0 && (view.torch_mode() || view.group.scale_parameter != 0))
      call.rms[unit.tensor] = float(view.control.gain.rms);
  }
  if (t.whole_numel == 0) return;
  int count = 0;
  bool clamped = false;
  if (t.factored) {
    clamped = view.torch_mode() && t.batch > 0 && view.columns(0)[view.behind() + 1] != 0;
    const C total = t.transposed ? view.columns(0)[view.behind()] : C(0);
    count = begin_rows(view, unit.index, grad_factor, clamped, total, rows,
                       [&](int64_t b, int64_t i, C factor) { view.row_state(b)[i] = factor; });
    // The units share the columns' state between them.
    const int64_t columns = t.batch * t.cols;
    const int64_t share = (unsigned(columns) + unsigned(view.item.apply_units) - 1) / unsigned(view.item.apply_units);
    const int64_t first = unit.index * share, last = min(first + share, columns);
    for (int64_t q = first + threadIdx.x; q < last; q += kThreads) {
      const unsigned b = unsigned(q) / unsigned(t.cols);
      static_cast<C*>(t.col)[q] = view.columns(b)[q - int64_t(b) * t.cols];
    }
    __syncthreads();
  }
  const Update<C> u(view, grad_factor, clamped);
  const auto with_param = [&](const auto& zero) {
    using P = std::decay_t<decltype(zero)>;
    // A gradient of another type is told apart for every four elements.
    if (dtype_of(P{}) == t.grad_dtype)
      apply_unit<C, P>(view, Grad<P>{view.grad(), t.grad_dtype}, u, unit.index, grad_factor, count, clamped, rows);
    else
      apply_unit<C, P>(view, Grad<AnyType>{view.grad(), t.grad_dtype}, u, unit.index, grad_factor, count, clamped,
                       rows);
  };
  if constexpr (sizeof(C) == 8) {
    with_param(0.0);
  } else {
    switch (t.param_dtype) {
      case DType::f16: return with_param(__half{});
      case DType::bf16: return with_param(__nv_bfloat16{});
      default: return with_param(0.0f);
    }
  }
}

}  // namespace

template <typename C>
cudaError_t launch_apply(const Arguments<C>& call, int64_t units, cudaStream_t stream) {
  return launch(adafactor_apply_kernel<C>, dim3(unsigned(units)), kThreads, stream, call);
}

template cudaError_t launch_apply(const Arguments<float>&, int64_t, cudaStream_t);
template cudaError_t launch_apply(const Arguments<double>&, int64_t, cudaStream_t);

}  // namespace fastnlp::cuda
