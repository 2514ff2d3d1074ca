// The passes over the gradients: row sums, and with them the column sums cs, W, X (csrc/adafactor.h). Up to 4096
// columns a row stays in registers until its sum is known, so that one reading is enough; wider matrices, and those
// with sum U p, take a second kernel. Strips of rows write sums of their own, which adafactor_norms.cu adds up in
// order.
#include "adafactor_passes.cuh"

namespace fastnlp::cuda {
namespace {

// sum x^2 over `count` rows from row `first` of all matrices on, a warp for each. Of gradients the rows' sums are kept.
template <typename C>
__device__ double squares_of(const View<C>& view, bool grads, int64_t first, int64_t count) {
  const AdafactorTensor& t = view.t;
  const AdafactorView& x = grads ? t.grad : t.param;
  const void* const data = grads ? view.grad() : t.param.data;
  const DType dtype = grads ? t.grad_dtype : t.param_dtype;
  double squares = 0;
  for (int64_t row = threadIdx.x / 32; row < count; row += kWarps) {
    const unsigned b = unsigned(first + row) / unsigned(t.rows), i = unsigned(first + row) % unsigned(t.rows);
    const int64_t from = adafactor_matrix(t, x, b) + i * x.row_stride;
    C sum = 0;
    for (int64_t col = 4 * (threadIdx.x % 32); col < t.cols; col += 4 * 32 * kQuads) {
      Quad<C> quads[kQuads];
#pragma unroll
      for (int v = 0; v < kQuads; ++v) {
        const int64_t at = col + 4 * 32 * v;
        quads[v] = load_quad<C>(data, dtype, from + at * x.col_stride, x.col_stride, quad_count(at, t.cols));
      }
#pragma unroll
      for (int v = 0; v < kQuads; ++v) {
        quads[v].unpack(dtype);
        const C* const y = quads[v].value;
        sum += (y[0] * y[0] + y[1] * y[1]) + (y[2] * y[2] + y[3] * y[3]);
      }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 != 0) continue;
    if (grads) view.row_sums(b)[i] = sum;
    squares += double(sum);
  }
  return squares;
}

// What fuse() keeps in shared memory.
template <typename C>
struct FuseRoom {
  C warp_sums[2][kWarps];  // of two rows in turn, so that one barrier a row is enough
  C columns[2][kFusedColumns / 2];
  C factors[kWarps];
  C least[kWarps];
};

// Teams of threads take rows in turn. A thread has the same columns of each row: four times four, team * 4 apart.
template <typename C>
__device__ double fuse(const View<C>& view, int unit, FuseRoom<C>& room) {
  const AdafactorItem& item = view.item;
  const AdafactorTensor& t = view.t;
  const int team = int(threadIdx.x) / item.team, lane = int(threadIdx.x) % item.team, teams = kThreads / item.team;
  const int64_t b = item.packed ? int64_t(unit) * teams + team : unit / item.strips;
  const int64_t begin = item.packed ? 0 : int64_t(unit % item.strips) * item.strip_rows;
  const int64_t end = b < t.batch ? min(begin + item.strip_rows, t.rows) : begin;
  const int64_t step = item.packed ? 1 : teams;
  // All teams go round as often as the longest one: they meet at barriers.
  const auto held = unsigned(min(begin + item.strip_rows, t.rows) - begin);
  const int rounds = int((held + unsigned(step) - 1) / unsigned(step));
  const int64_t stride = t.grad.col_stride;
  const int64_t matrix = b < t.batch ? adafactor_matrix(t, t.grad, b) : 0;
  const C scale = C(view.control.grad * view.control.grad);

  C cs[4 * kQuads] = {}, w[4 * kQuads] = {};
  C factors = 0, least = INFINITY;
  double squares = 0;
  // A row is on its way while the one before it is summed.
  Quad<C> next[kQuads] = {};
  C next_state = 0;
  int64_t i = begin + (item.packed ? 0 : team) - step;
  for (int round = -1; round < rounds; ++round, i += step) {
    C row[4 * kQuads];
#pragma unroll
    for (int v = 0; v < kQuads; ++v) {
      next[v].unpack(t.grad_dtype);
#pragma unroll
      for (int e = 0; e < 4; ++e) row[4 * v + e] = next[v].value[e];
    }
    const C state = next_state;
    const int64_t coming = i + step;
    const bool comes = coming < end;
#pragma unroll
    for (int v = 0; v < kQuads; ++v) {
      const int64_t col = 4 * (int64_t(v) * item.team + lane);
      next[v] = load_quad<C>(view.grad(), t.grad_dtype, matrix + coming * t.grad.row_stride + col * stride, stride,
                             comes ? quad_count(col, t.cols) : 0);
    }
    next_state = comes ? view.row_state(b)[coming] : C(0);
    if (round < 0) continue;
    C sum = 0;
#pragma unroll
    for (int e = 0; e < 4 * kQuads; e += 2) sum += row[e] * row[e] + row[e + 1] * row[e + 1];
    sum = warp_sum(sum);
    C* const sums = room.warp_sums[round % 2];
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int warp = 0; warp < item.team / 32; ++warp) sum += sums[team * (item.team / 32) + warp];
    if (i < end) {
      const C factor = view.row_factor(state, sum);
      const C weight = factor == 0 ? C(0) : scale / factor;
#pragma unroll
      for (int e = 0; e < 4 * kQuads; ++e) {
        const C square = row[e] * row[e];
        cs[e] += square;
        w[e] += square * weight;
      }
      if (lane == 0) {
        view.row_sums(b)[i] = sum;
        squares += double(sum);
        factors += factor;
        if (sum != 0) least = fmin(least, factor);
      }
    }
  }

  const auto each_column = [&](const auto& with) {
#pragma unroll
    for (int v = 0; v < kQuads; ++v)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t col = 4 * (int64_t(v) * item.team + lane) + e;
        if (col < t.cols) with(col, cs[4 * v + e], w[4 * v + e]);
      }
  };
  C* to = b < t.batch ? view.strip(b, item.packed ? 0 : unit % item.strips) : nullptr;
  if (item.packed || teams == 1) {
    if (!to) return squares;
    each_column([&](int64_t col, C c, C weighted) {
      to[col] = c;
      to[t.cols + col] = weighted;
    });
    if (lane == 0) {
      to[2 * t.cols] = factors;
      to[2 * t.cols + 1] = least;
    }
    return squares;
  }
  for (int turn = 0; turn < teams; ++turn) {
    if (team == turn) {
      each_column([&](int64_t col, C c, C weighted) {
        room.columns[0][col] = turn == 0 ? c : room.columns[0][col] + c;
        room.columns[1][col] = turn == 0 ? weighted : room.columns[1][col] + weighted;
      });
      if (lane == 0) room.factors[turn] = factors, room.least[turn] = least;
    }
    __syncthreads();
  }
  for (int64_t col = threadIdx.x; col < t.cols; col += kThreads) {
    to[col] = room.columns[0][col];
    to[t.cols + col] = room.columns[1][col];
  }
  if (threadIdx.x == 0) {
    for (int k = 1; k < teams; ++k) factors += room.factors[k], least = fmin(least, room.least[k]);
    to[2 * t.cols] = factors;
    to[2 * t.cols + 1] = least;
  }
  return squares;
}

template <typename C>
__global__ void __launch_bounds__(kThreads, sizeof(C) == 4 ? 2 : 1) adafactor_rows_kernel(Arguments<C> call) {
  __shared__ FuseRoom<C> room;
  __shared__ double totals[kWarps];
  const AdafactorUnit unit = call.sum_units[blockIdx.x];
  const View<C> view(call, unit.tensor);
  const AdafactorItem& item = view.item;
  const AdafactorTensor& t = view.t;
  SumPartial partial{};
  if (!t.factored) {
    vector_pass(view, unit.index, call.phases, totals, &partial);
  } else {
    const int64_t held = item.packed ? kThreads / item.team : 1;
    const int64_t b = item.packed ? unit.index * held : unit.index / item.strips;
    const int64_t begin = item.packed ? 0 : int64_t(unit.index % item.strips) * item.strip_rows;
    const int64_t end = min(begin + item.strip_rows, t.rows);
    const int64_t first = b * t.rows + begin;  // of the rows of all matrices
    const int64_t count = item.packed ? (min(b + held, t.batch) - b) * t.rows : end - begin;
    const bool fused = item.fused && call.phases & kAdafactorColumns;
    if (fused) partial.grad_squares = block_sum(fuse(view, unit.index, room), totals);
    for (int grads = fused ? 0 : 1; grads >= (view.needs_param() ? 0 : 1); --grads) {
      const double squares = block_sum(squares_of(view, grads != 0, first, count), totals);
      (grads ? partial.grad_squares : partial.param_squares) = squares;
    }
  }
  if (threadIdx.x == 0) call.sum_partials[blockIdx.x] = partial;
}

constexpr int64_t kTileRows = 32;

// Column sums from complete row sums.
template <typename C>
struct ColumnRoom {
  C roots[kTileRows];  // of what g^2 is multiplied with
  C factors[kTileRows];
};

template <typename C>
__device__ void sum_columns(const View<C>& view, int64_t b, int strip, ColumnRoom<C>& room) {
  const AdafactorTensor& t = view.t;
  const int64_t begin = int64_t(strip) * view.item.strip_rows, end = min(begin + view.item.strip_rows, t.rows);
  const C grad = C(view.control.grad);
  const bool product = view.product();
  C* const to = view.strip(b, strip);
  C factors = 0, least = INFINITY;
  for (int64_t tile = 0; tile < t.cols || tile == 0; tile += 4 * kThreads) {
    const int64_t col = tile + 4 * int64_t(threadIdx.x);
    const int count = quad_count(col, t.cols);
    int64_t grad_at = adafactor_matrix(t, t.grad, b) + begin * t.grad.row_stride + col * t.grad.col_stride;
    int64_t param_at = adafactor_matrix(t, t.param, b) + begin * t.param.row_stride + col * t.param.col_stride;
    C cs[4] = {}, w[4] = {}, x[4] = {};
    for (int64_t first = begin; first < end; first += kTileRows) {
      const int rows = int(min(kTileRows, end - first));
      __syncthreads();
      if (int(threadIdx.x) < rows) {
        const C sum = view.row_sums(b)[first + threadIdx.x];
        const C factor = view.row_factor(view.row_state(b)[first + threadIdx.x], sum);
        room.roots[threadIdx.x] = factor == 0 ? C(0) : grad * rsqrt(factor);
        room.factors[threadIdx.x] = sum == 0 ? -factor : factor;  // the sign tells rows without gradient
      }
      __syncthreads();
      if (tile == 0 && threadIdx.x == 0)
        for (int r = 0; r < rows; ++r) {
          const C factor = room.factors[r];
          factors += fabs(factor);
          if (factor > 0 || factor != factor) least = fmin(least, factor);
        }
      if (count == 0) continue;
      // Sums of few rows first: each number added to a long sum is rounded to the sum's last place.
      C tile_cs[4] = {}, tile_w[4] = {};
#pragma unroll 1
      for (int r = 0; r < rows; ++r) {
        const C root = room.roots[r];
        const Quad<C> g = load_now<C>(view.grad(), t.grad_dtype, grad_at, t.grad.col_stride, count);
        grad_at += t.grad.row_stride;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const C square = g.value[e] * g.value[e];
          tile_cs[e] += square;
          tile_w[e] += square * (root * root);
        }
        if (!product) continue;
        const Quad<C> p = load_now<C>(t.param.data, t.param_dtype, param_at, t.param.col_stride, count);
        param_at += t.param.row_stride;
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] += g.value[e] * p.value[e] * root;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) cs[e] += tile_cs[e], w[e] += tile_w[e];
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e >= count) continue;
      to[col + e] = cs[e];
      to[t.cols + col + e] = w[e];
      if (product) to[2 * t.cols + col + e] = x[e];
    }
  }
  if (threadIdx.x == 0) {
    to[view.behind()] = factors;
    to[view.behind() + 1] = least;
  }
}

// For what adafactor_rows_kernel leaves out, and once more for all where the global norm turned out too large.
template <typename C>
__global__ void __launch_bounds__(kThreads, 2) adafactor_columns_kernel(Arguments<C> call) {
  __shared__ ColumnRoom<C> room;
  __shared__ double totals[kWarps];
  const AdafactorUnit unit = call.sum_units[blockIdx.x];
  const View<C> view(call, unit.tensor);
  const AdafactorItem& item = view.item;
  const AdafactorTensor& t = view.t;
  const bool summed = call.phases & kAdafactorRows && (!t.factored || item.fused);
  if (summed && view.control.clip == 1) return;
  if (!t.factored) {
    SumPartial partial = call.sum_partials[blockIdx.x];
    __syncthreads();
    vector_pass(view, unit.index, kAdafactorColumns, totals, &partial);
    if (threadIdx.x == 0) call.sum_partials[blockIdx.x] = partial;
    return;
  }
  const int64_t held = item.packed ? kThreads / item.team : 1;
  const int64_t b = item.packed ? unit.index * held : unit.index / item.strips;
  for (int64_t m = b; m < (item.packed ? min(b + held, t.batch) : b + 1); ++m)
    sum_columns(view, m, item.packed ? 0 : unit.index % item.strips, room);
}

// sum g^2 of the call, and what clipping by it makes of the gradients' factors.
template <typename C>
__global__ void __launch_bounds__(kThreads) adafactor_total_kernel(Arguments<C> call) {
  __shared__ double totals[kWarps];
  double squares = 0;
  for (int unit = threadIdx.x; unit < call.sum_unit_count; unit += kThreads)
    squares += call.sum_partials[unit].grad_squares;
  squares = block_sum(squares, totals);
  if (threadIdx.x == 0) call.sums[0] = C(squares);
  if (call.max_grad_norm == 0) return;
  const double clip = call.clip(C(squares));
  for (int i = threadIdx.x; i < call.tensors; i += kThreads) call.control[i].clip_by(clip, call.items[i].tensor);
}

template <typename C>
__global__ void __launch_bounds__(kThreads) adafactor_prepare_kernel(Arguments<C> call) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x);
  if (i >= call.tensors) return;
  const AdafactorTensor& t = call.items[i].tensor;
  const double step = double(call.steps[i]) + 1;
  Control& control = call.control[i];
  control.step = adafactor_scalars(call.groups[t.group], step, call.lr[t.group], call.scale());
  control.key = adafactor_key(call.seed, uint64_t(step), t.id);
  // Where this call sums the squares itself, clipping comes after.
  const bool known = call.max_grad_norm > 0 && !(call.phases & kAdafactorRows);
  control.clip_by(known ? call.clip(call.sums[0]) : 1, t);
}

}  // namespace

template <typename C>
cudaError_t launch_prepare(const Arguments<C>& call, cudaStream_t stream) {
  return launch(adafactor_prepare_kernel<C>, dim3(unsigned(ceil_div(call.tensors, kThreads))), kThreads, stream, call);
}
template <typename C>
cudaError_t launch_rows(const Arguments<C>& call, cudaStream_t stream) {
  return launch(adafactor_rows_kernel<C>, dim3(unsigned(call.sum_unit_count)), kThreads, stream, call);
}
template <typename C>
cudaError_t launch_total(const Arguments<C>& call, cudaStream_t stream) {
  return launch(adafactor_total_kernel<C>, dim3(1), kThreads, stream, call);
}
template <typename C>
cudaError_t launch_columns(const Arguments<C>& call, cudaStream_t stream) {
  return launch(adafactor_columns_kernel<C>, dim3(unsigned(call.sum_unit_count)), kThreads, stream, call);
}

template cudaError_t launch_prepare(const Arguments<float>&, cudaStream_t);
template cudaError_t launch_prepare(const Arguments<double>&, cudaStream_t);
template cudaError_t launch_rows(const Arguments<float>&, cudaStream_t);
template cudaError_t launch_rows(const Arguments<double>&, cudaStream_t);
template cudaError_t launch_total(const Arguments<float>&, cudaStream_t);
template cudaError_t launch_total(const Arguments<double>&, cudaStream_t);
template cudaError_t launch_columns(const Arguments<float>&, cudaStream_t);
template cudaError_t launch_columns(const Arguments<double>&, cudaStream_t);

}  // namespace fastnlp::cuda
