// Between the two readings of the gradient: strips' column sums added in order, new column factors, the tensors'
// sum U^2 and what follows from it.
#include "adafactor_passes.cuh"

namespace fastnlp::cuda {
namespace {

// Columns of all matrices, side by side: where a matrix has many strips, eight lanes take them in turn for each column.
template <typename C>
__global__ void __launch_bounds__(kThreads, 3) adafactor_norms_kernel(Arguments<C> call) {
  struct Sums {
    double cs, w, x, factors, least;
  };
  __shared__ Sums shared[kThreads];
  __shared__ double room[kWarps];
  const AdafactorUnit unit = call.norm_units[blockIdx.x];
  const View<C> view(call, unit.tensor);
  const AdafactorItem& item = view.item;
  const AdafactorTensor& t = view.t;
  const int width = item.norm_width, x = int(threadIdx.x) % width, y = int(threadIdx.x) / width;
  const int64_t q = int64_t(unit.index) * width + x;
  const bool inside = q < t.batch * t.cols;
  const int64_t b = inside ? unsigned(q) / unsigned(t.cols) : 0, j = inside ? q - b * t.cols : 0;
  const bool product = view.product(), own_columns = call.phases & kAdafactorColumns;
  const int64_t behind = view.behind();

  Sums sums{0, 0, 0, 0, INFINITY};
  if (inside) {
    // A caller's sums are complete; ours lie in strips.
    const int strips = own_columns ? item.strips : 1;
    for (int s = y; s < strips; s += kThreads / width) {
      const C* const from = own_columns ? view.strip(b, s) : view.columns(b);
      sums.cs += double(from[j]);
      sums.w += double(from[t.cols + j]);
      if (product) sums.x += double(from[2 * t.cols + j]);
      sums.factors += double(from[behind]);
      sums.least = fmin(sums.least, double(from[behind + 1]));
    }
  }
  shared[threadIdx.x] = sums;
  __syncthreads();
  if (y == 0)
    for (int k = 1; k < kThreads / width; ++k) {
      const Sums& more = shared[k * width + x];
      sums.cs += more.cs, sums.w += more.w, sums.x += more.x, sums.factors += more.factors;
      sums.least = fmin(sums.least, more.least);
    }

  double update = 0, cross = 0, factors = 0, least = INFINITY, divisor = 0;
  if (y == 0 && inside) {
    C* const to = view.columns(b);
    C first = C(sums.cs), second = C(sums.w);
    if (call.phases & kAdafactorNorms) {
      const C mean = C(view.control.col_share) * first;
      const C state = static_cast<const C*>(t.col)[q];
      const C factor =
          C(view.control.step.beta2) * state + C(view.control.step.fresh) * (mean + C(view.control.step.floor));
      const C root = factor == 0 ? C(0) : rsqrt(factor);
      divisor = t.transposed ? 1 : double(view.divisor(C(sums.factors)));
      update = factor == 0 ? 0 : divisor * (sums.w / double(factor));
      cross = sqrt(divisor) * sums.x * double(root);
      factors = double(factor);
      if (first != 0) least = double(factor);
      first = factor;
      second = root;
    }
    if (own_columns || call.phases & kAdafactorNorms) {
      to[j] = first;
      to[t.cols + j] = second;
      if (product) to[2 * t.cols + j] = C(sums.x);
    }
    if (own_columns && item.strips > 1 && j == 0) {
      to[behind] = C(sums.factors);
      to[behind + 1] = C(sums.least);
    }
  }
  NormPartial partial;
  partial.update_squares = block_sum(update, room);
  partial.product = block_sum(cross, room);
  partial.col_factors = block_sum(factors, room);
  partial.least_col = block_min(least, room);
  partial.least_row = block_min(sums.least, room);
  partial.largest_divisor = -block_min(-divisor, room);
  if (threadIdx.x == 0) call.norm_partials[blockIdx.x] = partial;
}

// Sum of the column factors of a transposed tensor, of which there is one matrix.
template <typename C>
__device__ double column_factors(const View<C>& view, double* room) {
  double factors = 0;
  if (view.t.transposed)
    for (int u = threadIdx.x; u < view.item.norm_units; u += kThreads)
      factors += view.call.norm_partials[view.item.first_norm_unit + u].col_factors;
  return block_sum(factors, room);
}

// Whether torch mode's clamp of the variances at eps1^2 may change an element whose gradient is not 0. All threads
// of the block ask together.
template <typename C>
__device__ bool clamps(const View<C>& view, double* room) {
  if (!view.t.factored || !view.torch_mode()) return false;
  if (view.call.sharded) return true;
  double row = INFINITY, col = INFINITY, divisor = 0;
  for (int u = threadIdx.x; u < view.item.norm_units; u += kThreads) {
    const NormPartial& partial = view.call.norm_partials[view.item.first_norm_unit + u];
    row = fmin(row, partial.least_row);
    col = fmin(col, partial.least_col);
    divisor = fmax(divisor, partial.largest_divisor);
  }
  row = block_min(row, room);
  col = block_min(col, room);
  divisor = -block_min(-divisor, room);
  if (view.t.transposed) divisor = double(view.divisor(C(column_factors(view, room))));
  return row * col < view.group.eps1 * view.group.eps1 * divisor;
}

// Sum U^2 and sum U p over the elements of a clamped tensor.
template <typename C>
__global__ void __launch_bounds__(kThreads) adafactor_exact_kernel(Arguments<C> call) {
  __shared__ RowRoom<C> rows;
  __shared__ double room[kWarps];
  const AdafactorUnit unit = call.apply_units[blockIdx.x];
  const View<C> view(call, unit.tensor);
  const AdafactorTensor& t = view.t;
  if (!clamps(view, room)) return;
  const C factors = C(column_factors(view, room));
  const double grad = view.control.grad;
  const C limit = C(1 / view.group.eps1);
  const int count = begin_rows(view, unit.index, true, factors, rows, [](int64_t, int64_t, C) {});
  __syncthreads();
  C squares = 0, cross = 0;
  each_quad(count, t.cols, [&](int r, int64_t col, int columns) {
    const Quad<C> g =
        load_now<C>(view.grad(), t.grad_dtype, rows.grad[r] + col * t.grad.col_stride, t.grad.col_stride, columns);
    Quad<C> p{};
    if (view.product())
      p = load_now<C>(t.param.data, t.param_dtype, rows.param[r] + col * t.param.col_stride, t.param.col_stride,
                      columns);
    const C* const roots = view.columns(rows.matrix[r]) + t.cols + col;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const C root = e < columns ? roots[e] : C(1);
      const C scale = rows.factor[r] * (root == 0 ? C(INFINITY) : root);
      const C u = g.value[e] * (scale > limit ? limit : scale);
      squares += u * u;
      cross += u * p.value[e];
    }
  });
  const double all_squares = block_sum(double(squares), room), all_cross = block_sum(double(cross), room);
  if (threadIdx.x == 0) call.exact_partials[blockIdx.x] = {all_squares * grad * grad, all_cross * grad};
}

// One block adds up what the units of a tensor have left.
template <typename C>
__global__ void __launch_bounds__(kThreads) adafactor_gain_kernel(Arguments<C> call) {
  __shared__ double room[kWarps];
  const View<C> view(call, int(blockIdx.x));
  const AdafactorItem& item = view.item;
  const AdafactorTensor& t = view.t;
  const int64_t phases = call.phases;
  const bool clamped = phases & kAdafactorNorms && clamps(view, room);
  const double factors = column_factors(view, room);
  double params = 0, updates = 0, cross = 0;
  for (int u = threadIdx.x; u < item.sum_units; u += kThreads) {
    const SumPartial& partial = call.sum_partials[item.first_sum_unit + u];
    if (phases & kAdafactorRows) params += partial.param_squares;
    if (!t.factored && phases & kAdafactorColumns) updates += partial.update_squares, cross += partial.product;
  }
  if (t.factored && phases & kAdafactorNorms) {
    for (int u = threadIdx.x; u < item.norm_units; u += kThreads) {
      const NormPartial& partial = call.norm_partials[item.first_norm_unit + u];
      if (!clamped) updates += partial.update_squares, cross += partial.product;
    }
    for (int u = threadIdx.x; clamped && u < item.apply_units; u += kThreads) {
      const ExactPartial& partial = call.exact_partials[item.first_apply_unit + u];
      updates += partial.update_squares, cross += partial.product;
    }
  }
  params = block_sum(params, room);
  updates = block_sum(updates, room);
  cross = block_sum(cross, room);
  if (t.factored && view.torch_mode() && phases & kAdafactorNorms)
    for (int64_t b = threadIdx.x; b < t.batch; b += kThreads) view.columns(b)[view.behind() + 1] = C(clamped);
  if (threadIdx.x != 0) return;
  C* const sums = call.sums + adafactor_sum(view.index, kSumParam);
  if (t.transposed && phases & kAdafactorNorms) {
    if (!clamped) {
      const double divisor = double(view.divisor(C(factors)));
      updates *= divisor;
      cross *= sqrt(divisor);
    }
    view.columns(0)[view.behind()] = C(factors);
  }
  if (phases & kAdafactorRows) sums[kSumParam] = C(params);
  if (phases & (t.factored ? kAdafactorNorms : kAdafactorColumns)) {
    sums[kSumUpdate] = C(updates);
    sums[kSumProduct] = C(cross);
  }
  if (!(phases & kAdafactorApply)) return;
  Control& control = call.control[view.index];
  AdafactorScalars step = control.step;
  control.gain = adafactor_gain(view.group, step, double(t.whole_numel), double(sums[kSumParam]),
                                double(sums[kSumUpdate]), double(sums[kSumProduct]));
}

}  // namespace

template <typename C>
cudaError_t launch_norms(const Arguments<C>& call, int64_t units, cudaStream_t stream) {
  return launch(adafactor_norms_kernel<C>, dim3(unsigned(units)), kThreads, stream, call);
}
template <typename C>
cudaError_t launch_exact(const Arguments<C>& call, int64_t units, cudaStream_t stream) {
  return launch(adafactor_exact_kernel<C>, dim3(unsigned(units)), kThreads, stream, call);
}
template <typename C>
cudaError_t launch_gain(const Arguments<C>& call, cudaStream_t stream) {
  return launch(adafactor_gain_kernel<C>, dim3(unsigned(call.tensors)), kThreads, stream, call);
}

template cudaError_t launch_norms(const Arguments<float>&, int64_t, cudaStream_t);
template cudaError_t launch_norms(const Arguments<double>&, int64_t, cudaStream_t);
template cudaError_t launch_exact(const Arguments<float>&, int64_t, cudaStream_t);
template cudaError_t launch_exact(const Arguments<double>&, int64_t, cudaStream_t);
template cudaError_t launch_gain(const Arguments<float>&, cudaStream_t);
template cudaError_t launch_gain(const Arguments<double>&, cudaStream_t);

}  // namespace fastnlp::cuda
