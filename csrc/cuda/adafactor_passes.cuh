// What two of the passes over elements share: parameters of any type, and vectors, whose variances are not factored.
#pragma once
#include "adafactor.cuh"

namespace fastnlp::cuda {

constexpr int64_t kVectorChunk = 4096;  // elements for a block

// The new variances of four elements of a vector, and what U is the product of with the gradient.
template <typename C>
struct Variance {
  C beta2;
  C fresh;
  C floor;
  C least;  // torch mode's clamp

  __device__ explicit Variance(const View<C>& view)
      : beta2(C(view.control.step.beta2)),
        fresh(C(view.control.step.fresh * view.control.grad * view.control.grad)),
        floor(C(view.control.step.fresh * view.control.step.floor)),
        least(view.torch_mode() ? C(view.group.eps1 * view.group.eps1) : C(0)) {}

  __device__ C next(C state, C g) const { return beta2 * state + (fresh * (g * g) + floor); }
  __device__ C scale(C variance) const {
    const C clamped = variance < least ? least : variance;
    return clamped == 0 ? C(0) : rsqrt(clamped);
  }
};

// The sums over one chunk of a vector.
template <typename C>
__device__ void vector_pass(const View<C>& view, int chunk, int64_t phases, double* room, SumPartial* partial) {
  const AdafactorTensor& t = view.t;
  const double grad = view.control.grad;
  const Variance<C> variance(view);
  const C* const state = static_cast<const C*>(t.row);
  const int64_t begin = chunk * kVectorChunk, end = min(begin + kVectorChunk, t.cols);
  const bool needs_param = view.needs_param();
  C grads = 0, params = 0, updates = 0, products = 0;
  for (int64_t j = begin + 4 * int64_t(threadIdx.x); j < end; j += 4 * kThreads) {
    const int count = quad_count(j, end);
    const Quad<C> g = load_now<C>(view.grad(), t.grad_dtype, j * t.grad.col_stride, t.grad.col_stride, count);
    Quad<C> p{};
    if (needs_param) p = load_now<C>(t.param.data, t.param_dtype, j * t.param.col_stride, t.param.col_stride, count);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const C x = g.value[e], y = p.value[e];
      grads += x * x;
      params += y * y;
      const C u = e < count ? x * variance.scale(variance.next(state[j + e], x)) : C(0);
      updates += u * u;
      products += u * y;
    }
  }
  if (phases & kAdafactorRows) {
    partial->grad_squares = block_sum(double(grads), room);
    partial->param_squares = block_sum(double(params), room);
  }
  if (phases & kAdafactorColumns) {
    partial->update_squares = block_sum(double(updates), room) * grad * grad;
    partial->product = block_sum(double(products), room) * grad;
  }
}

// Rows of all matrices that one block of the second pass takes, and where each lies. A vector is one row.
template <typename C>
struct RowRoom {
  int64_t param[kApplyRows];
  int64_t grad[kApplyRows];
  int64_t moment[kApplyRows];
  int64_t average[kApplyRows];
  uint64_t number[kApplyRows];  // of its first element
  int32_t matrix[kApplyRows];
  C factor[kApplyRows];  // of the gradient, without that of the column
  bool still[kApplyRows];
};

// Fills the room; the next barrier publishes it. Returns the number of rows. `keep` gets (b, i, factor R) of each.
template <typename C, typename Keep>
__device__ int begin_rows(const View<C>& view, int unit, bool clamped, C total, RowRoom<C>& room, const Keep& keep) {
  const AdafactorTensor& t = view.t;
  const int64_t first = int64_t(unit) * view.item.apply_rows;
  const int count = int(max(int64_t{0}, min(int64_t(view.item.apply_rows), t.batch * t.rows - first)));
  for (int r = threadIdx.x; r < count; r += kThreads) {
    const unsigned b = unsigned(first + r) / unsigned(t.rows), i = unsigned(first + r) % unsigned(t.rows);
    const C sum = view.row_sums(b)[i], factor = view.row_factor(view.row_state(b)[i], sum);
    const C divisor = view.divisor(t.transposed ? total : view.columns(b)[view.behind()]);
    room.param[r] = adafactor_matrix(t, t.param, b) + i * t.param.row_stride;
    room.grad[r] = adafactor_matrix(t, t.grad, b) + i * t.grad.row_stride;
    room.moment[r] = adafactor_matrix(t, t.moment, b) + i * t.moment.row_stride;
    room.average[r] = adafactor_matrix(t, t.average, b) + i * t.average.row_stride;
    room.number[r] = t.first + b * t.per_batch + i * t.per_row;
    room.matrix[r] = int32_t(b);
    room.factor[r] = factor == 0 ? (clamped ? C(INFINITY) : C(0)) : sqrt(divisor / factor);
    room.still[r] = view.group.lazy != 0 && sum == 0;
    keep(b, i, factor);
  }
  return count;
}

// Calls `with(row, col, count)` for every four columns of `rows` rows: neighbours in memory for neighbouring threads.
template <typename With>
__device__ void each_quad(int rows, int64_t cols, const With& with) {
  const auto quads = unsigned(ceil_div(cols, 4));
  if (quads == 0) return;
  const unsigned row_step = kThreads / quads, quad_step = kThreads % quads;
  unsigned row = threadIdx.x / quads, quad = threadIdx.x % quads;
  while (row < unsigned(rows)) {
    const int64_t col = 4 * int64_t(quad);
    with(int(row), col, quad_count(col, cols));
    row += row_step;
    quad += quad_step;
    if (quad >= quads) {
      quad -= quads;
      ++row;
    }
  }
}

}  // namespace fastnlp::cuda
