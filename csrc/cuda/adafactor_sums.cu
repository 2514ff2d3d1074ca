// The passes over the gradients: row sums, and with them the column sums cs, W, X (csrc/adafactor.h). Up to 4096
// columns a row stays in registers until its sum is known, so that one reading is enough; wider matrices, and those
// with sum U p, take a second kernel. Strips of rows write sums of their own, which adafactor_norms.cu adds up in
// order.
#include "adafactor_passes.cuh"

namespace fastnlp::cuda {
namespace {

// sum p^2 over rows [first, first + count) of all matrices.
template <typename C, typename P>
__device__ double param_squares(const AdafactorTensor& t, int64_t first, int64_t count) {
  const int64_t quads = ceil_div(t.cols, 4);
  double squares = 0;
  for (int64_t row = threadIdx.x / 32; row < count; row += kWarps) {
    const unsigned b = unsigned(first + row) / unsigned(t.rows), i = unsigned(first + row) % unsigned(t.rows);
    const P* from = static_cast<const P*>(t.param.data) + adafactor_matrix(t, t.param, b) + i * t.param.row_stride;
    C sum = 0;
    for (int64_t q = threadIdx.x % 32; q < quads; q += 32) {
      C x[4];
      load_quad(from + 4 * q * t.param.col_stride, t.param.col_stride, quad_count(4 * q, t.cols), x);
      sum += (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
    }
    squares += double(sum);
  }
  return squares;
}
template <typename C>
__device__ double param_squares(const AdafactorTensor& t, int64_t first, int64_t count) {
  if constexpr (sizeof(C) == 8) {
    return param_squares<C, double>(t, first, count);
  } else {
    switch (t.param_dtype) {
      case DType::f16: return param_squares<C, __half>(t, first, count);
      case DType::bf16: return param_squares<C, __nv_bfloat16>(t, first, count);
      default: return param_squares<C, float>(t, first, count);
    }
  }
}

// Row sums alone: a warp for each row.
template <typename C, typename G>
__device__ double sum_rows(const View<C>& view, const Grad<G>& grad, int64_t b, int64_t begin, int64_t end) {
  const AdafactorTensor& t = view.t;
  const int64_t matrix = adafactor_matrix(t, t.grad, b), quads = ceil_div(t.cols, 4);
  double squares = 0;
  for (int64_t i = begin + threadIdx.x / 32; i < end; i += kWarps) {
    const int64_t from = matrix + i * t.grad.row_stride;
    C sum = 0;
    for (int64_t q = threadIdx.x % 32; q < quads; q += 32) {
      C x[4];
      grad.load(from + 4 * q * t.grad.col_stride, t.grad.col_stride, quad_count(4 * q, t.cols), x);
      sum += (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
      view.row_sums(b)[i] = sum;
      squares += double(sum);
    }
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
template <typename C, typename G>
__device__ double fuse(const View<C>& view, const Grad<G>& grad, int unit, FuseRoom<C>& room) {
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
  const C scale = C(view.control.step.grad * view.control.step.grad), share = view.row_share(view.control.step.grad);
  const auto load = [&](int64_t i, C* to) {
#pragma unroll
    for (int v = 0; v < kQuads; ++v) {
      const int64_t col = 4 * (int64_t(v) * item.team + lane);
      const int count = i < end ? quad_count(col, t.cols) : 0;
      grad.load(matrix + i * t.grad.row_stride + col * stride, stride, count, to + 4 * v);
    }
  };

  C row[4 * kQuads], next[4 * kQuads], cs[4 * kQuads] = {}, w[4 * kQuads] = {};
  C factors = 0, least = INFINITY;
  double squares = 0;
  int64_t i = begin + (item.packed ? 0 : team);
  load(i, row);
  for (int round = 0; round < rounds; ++round, i += step) {
    load(i + step, next);
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
      const C factor = view.row_factor(view.row_state(b)[i], sum, share);
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
#pragma unroll
    for (int e = 0; e < 4 * kQuads; ++e) row[e] = next[e];
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
  double squares = 0;
  int64_t first = 0, count = 0;  // rows of all matrices
  if (!t.factored) {
    vector_pass(view, unit.index, call.phases, 1.0, totals, &partial);
  } else {
    const int64_t held = item.packed ? kThreads / item.team : 1;
    const int64_t b = item.packed ? unit.index * held : unit.index / item.strips;
    const int64_t begin = item.packed ? 0 : int64_t(unit.index % item.strips) * item.strip_rows;
    const int64_t end = min(begin + item.strip_rows, t.rows);
    first = b * t.rows + begin;
    count = item.packed ? (min(b + held, t.batch) - b) * t.rows : end - begin;
    const bool fused = item.fused && call.phases & kAdafactorColumns;
    with_grad(view.grad(), t.grad_dtype, [&](const auto& grad) {
      if (fused) {
        squares = fuse(view, grad, unit.index, room);
      } else {
        for (int64_t m = b; m < (item.packed ? min(b + held, t.batch) : b + 1); ++m)
          squares += sum_rows(view, grad, m, begin, end);
      }
    });
    partial.grad_squares = block_sum(squares, totals);
    if (view.needs_param()) partial.param_squares = block_sum(param_squares<C>(t, first, count), totals);
  }
  if (threadIdx.x == 0) call.sum_partials[blockIdx.x] = partial;
}

// Column sums from complete row sums.
template <typename C>
struct ColumnRoom {
  C weights[64];
  C roots[64];
  C factors[64];
};

template <typename C, typename G>
__device__ void sum_columns(const View<C>& view, const Grad<G>& grad, int64_t b, int strip, double factor_of_grad,
                            ColumnRoom<C>& room) {
  const AdafactorTensor& t = view.t;
  const int64_t begin = int64_t(strip) * view.item.strip_rows, end = min(begin + view.item.strip_rows, t.rows);
  const int64_t grads = adafactor_matrix(t, t.grad, b), params = adafactor_matrix(t, t.param, b);
  const C share = view.row_share(factor_of_grad);
  const bool product = view.product();
  C* const to = view.strip(b, strip);
  C factors = 0, least = INFINITY;
  for (int64_t tile = 0; tile < t.cols || tile == 0; tile += 4 * kThreads) {
    const int64_t col = tile + 4 * int64_t(threadIdx.x);
    const int count = quad_count(col, t.cols);
    C cs[4] = {}, w[4] = {}, x[4] = {};
    for (int64_t first = begin; first < end; first += 64) {
      const int rows = int(min(int64_t{64}, end - first));
      __syncthreads();
      if (int(threadIdx.x) < rows) {
        const C sum = view.row_sums(b)[first + threadIdx.x];
        const C factor = view.row_factor(view.row_state(b)[first + threadIdx.x], sum, share);
        room.weights[threadIdx.x] = factor == 0 ? C(0) : C(factor_of_grad * factor_of_grad) / factor;
        room.roots[threadIdx.x] = factor == 0 ? C(0) : C(factor_of_grad) / sqrt(factor);
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
      for (int r = 0; r < rows; ++r) {
        const int64_t i = first + r;
        C g[4];
        grad.load(grads + i * t.grad.row_stride + col * t.grad.col_stride, t.grad.col_stride, count, g);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const C square = g[e] * g[e];
          cs[e] += square;
          w[e] += square * room.weights[r];
        }
        if (!product) continue;
        C p[4];
        load_param(t, params + i * t.param.row_stride + col * t.param.col_stride, t.param.col_stride, count, p);
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] += g[e] * p[e] * room.roots[r];
      }
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
__global__ void __launch_bounds__(kThreads) adafactor_columns_kernel(Arguments<C> call) {
  __shared__ ColumnRoom<C> room;
  __shared__ double totals[kWarps];
  const AdafactorUnit unit = call.sum_units[blockIdx.x];
  const View<C> view(call, unit.tensor);
  const AdafactorItem& item = view.item;
  const AdafactorTensor& t = view.t;
  const double clip = call.clip();
  const bool summed = call.phases & kAdafactorRows && (!t.factored || item.fused);
  if (summed && clip == 1) return;
  if (!t.factored) {
    SumPartial partial = call.sum_partials[blockIdx.x];
    __syncthreads();
    vector_pass(view, unit.index, kAdafactorColumns, clip, totals, &partial);
    if (threadIdx.x == 0) call.sum_partials[blockIdx.x] = partial;
    return;
  }
  const double grad_factor = view.control.step.grad * clip;
  with_grad(view.grad(), t.grad_dtype, [&](const auto& grad) {
    const int64_t held = item.packed ? kThreads / item.team : 1;
    const int64_t b = item.packed ? unit.index * held : unit.index / item.strips;
    for (int64_t m = b; m < (item.packed ? min(b + held, t.batch) : b + 1); ++m)
      sum_columns(view, grad, m, item.packed ? 0 : unit.index % item.strips, grad_factor, room);
  });
}

// sum g^2 of the call.
template <typename C>
__global__ void __launch_bounds__(kThreads) adafactor_total_kernel(Arguments<C> call) {
  __shared__ double totals[kWarps];
  double squares = 0;
  for (int unit = threadIdx.x; unit < call.sum_unit_count; unit += kThreads)
    squares += call.sum_partials[unit].grad_squares;
  squares = block_sum(squares, totals);
  if (threadIdx.x == 0) call.sums[0] = C(squares);
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
