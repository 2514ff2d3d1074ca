// Log-likelihood of a maximum-entropy Markov model and its gradients: one warp per row (step), a lane for every 32nd
// tag. csrc/cpu/memm.cpp states the mathematics. Rows need nothing of one another. The gradient of the transitions is
// summed by groups of rows whose number follows from the shape: a warp owns the sums of its group, and no atomics are
// needed.
#include "device.cuh"
#include "memm.h"

namespace fastnlp::cuda {
namespace {

constexpr int kWarps = 4;  // rows or groups of a block

template <typename T>
__device__ T warp_top(T x) {
  for (int lane = 16; lane > 0; lane /= 2) x = fmax(x, __shfl_xor_sync(kFullWarp, x, lane));
  return x;
}

__device__ inline void put(float* to, float x) { *to = x; }
__device__ inline void put(double* to, double x) { *to = x; }
__device__ inline void put(__half* to, float x) { *to = __float2half_rn(x); }
__device__ inline void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

// The nearest valid step before or behind step t, or -1: 32 steps of the mask at a time.
__device__ inline int64_t valid_before(const Bool* mask, int64_t t, int lane) {
  if (!mask) return t - 1;
  for (; t > 0; t -= 32) {
    const int64_t at = t - 1 - lane;
    const unsigned on = __ballot_sync(kFullWarp, at >= 0 && mask[at]);
    if (on) return t - __ffs(int(on));
  }
  return -1;
}
__device__ inline int64_t valid_behind(const Bool* mask, int64_t t, int64_t steps, int lane) {
  if (!mask) return t + 1 < steps ? t + 1 : -1;
  for (; t + 1 < steps; t += 32) {
    const int64_t at = t + 1 + lane;
    const unsigned on = __ballot_sync(kFullWarp, at < steps && mask[at]);
    if (on) return t + __ffs(int(on));
  }
  return -1;
}

// Scores of a row: (e_j + given_j) / 2, or e_j where no tag is given (`given` points somewhere all the same: a select
// is cheaper than a branch). Loops run over whole warps, so that their ends need no reconvergence; unrolled they would
// spill registers for trips that up to 32 tags never make.
template <typename C, typename E>
struct Row {
  const E* e;
  const C* given;
  int64_t stride;
  bool has_given;
  int tags;
  int lane;

  __device__ C score(int64_t j) const {
    const C own = C(upcast(e[j])), mean = (own + given[j * stride]) * C(0.5);
    return has_given ? mean : own;
  }
  __device__ C shift() const {
    C top = -INFINITY;
#pragma unroll 1
    for (int first = 0; first < tags; first += 32)
      top = fmax(top, first + lane < tags ? score(first + lane) : C(-INFINITY));
    top = warp_top(top);
    return top == -INFINITY ? C(0) : top;
  }
  // NaN where a score is NaN, 0 where all are -inf.
  __device__ C total(C shift) const {
    C sum = 0;
#pragma unroll 1
    for (int first = 0; first < tags; first += 32)
      sum += exp((first + lane < tags ? score(first + lane) : C(-INFINITY)) - shift);
    return warp_sum(sum);
  }
};

// What the warp of step t of sequence b reads. A tag outside [0, N) is read as 0; the sequence is NaN anyway.
template <typename C, typename E>
struct Step {
  Row<C, E> forward;
  Row<C, E> reversed;
  int64_t before;  // given tags, -1 where there is no neighbour
  int64_t behind;
  int64_t tag;
  bool valid;  // the tag is in [0, N)

  __device__ Step(const MemmProblem& p, int64_t b, int64_t t, int lane) {
    const Bool* mask = p.mask ? p.mask + b * p.steps : nullptr;
    const int64_t* gold = p.gold + b * p.steps;
    const E* e = static_cast<const E*>(p.emissions) + b * p.emissions_batch_stride + t * p.emissions_step_stride;
    const C* transitions = static_cast<const C*>(p.transitions);
    const auto inside = [&](int64_t y) { return y >= 0 && y < p.tags ? y : 0; };
    valid = gold[t] >= 0 && gold[t] < p.tags;
    tag = inside(gold[t]);
    before = valid_before(mask, t, lane);
    if (before >= 0) before = inside(gold[before]);
    behind = p.bidirectional ? valid_behind(mask, t, p.steps, lane) : -1;
    if (behind >= 0) behind = inside(gold[behind]);
    const int64_t from = p.transitions_from_stride, to = p.transitions_to_stride;
    forward = {e, transitions + (before < 0 ? 0 : before * from), to, before >= 0, int(p.tags), lane};
    reversed = {e, transitions + (behind < 0 ? 0 : behind * to), from, behind >= 0, int(p.tags), lane};
  }
};

template <typename C, typename E>
__device__ double log_p(const Row<C, E>& row, int64_t tag) {
  const C shift = row.shift();
  const C total = row.total(shift);
  return total == 0 ? -INFINITY : double(row.score(tag) - shift - log(total));
}

// log p of every row, the mean of both directions; 0 at masked steps.
template <typename C, typename E>
__global__ void __launch_bounds__(32 * kWarps)
    memm_rows_kernel(MemmProblem problem, unsigned blocks_per_sequence, double* rows) {
  const int64_t b = blockIdx.x / blocks_per_sequence;
  const int64_t t = int64_t(blockIdx.x % blocks_per_sequence) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (t >= problem.steps) return;
  const int64_t r = b * problem.steps + t;
  double value = 0;
  if (!problem.mask || problem.mask[r]) {
    const Step<C, E> step(problem, b, t, lane);
    value = log_p(step.forward, step.tag);
    if (problem.bidirectional) value = (value + log_p(step.reversed, step.tag)) / 2;
    if (!step.valid) value = NAN;
  }
  if (lane == 0) rows[r] = value;
}

// One warp adds the rows of one sequence, in an order that does not depend on anything else.
template <typename C>
__global__ void __launch_bounds__(32 * kWarps)
    memm_sequences_kernel(const double* rows, int64_t batch, int64_t steps, C* log_likelihood) {
  const int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (b >= batch) return;
  double sum = 0;
  for (int64_t t = lane; t < steps; t += 32) sum += rows[b * steps + t];
  sum = warp_sum(sum);
  if (lane == 0) log_likelihood[b] = C(sum);
}

// The upstream gradient of every sequence, NaN where one of its valid steps has a tag outside [0, N).
template <typename C>
__global__ void __launch_bounds__(32 * kWarps) memm_upstream_kernel(MemmProblem problem, const C* grad, C* upstream) {
  const int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (b >= problem.batch) return;
  bool bad = false;
  for (int64_t t = lane; t < problem.steps; t += 32) {
    const int64_t at = b * problem.steps + t;
    if (!problem.mask || problem.mask[at]) bad |= problem.gold[at] < 0 || problem.gold[at] >= problem.tags;
  }
  bad = __any_sync(kFullWarp, bad);
  if (lane == 0) upstream[b] = bad ? C(NAN) : grad[b];
}

// One direction of one row: the derivative of grad * log p by score j, times the weight of the emission in the score.
template <typename C, typename E>
struct Side {
  const Row<C, E>& row;
  C grad;
  C shift;
  C scale;

  __device__ Side(const Row<C, E>& row, C upstream) : row(row), grad(row.has_given ? upstream * C(0.5) : upstream) {
    shift = row.shift();
    const C total = row.total(shift);
    if (total == 0) grad = 0;  // no distribution: the value is -inf whatever the scores
    scale = total == 0 ? C(0) : grad / total;
  }
  __device__ C at(int64_t j, int64_t tag) const { return (j == tag ? grad : C(0)) - exp(row.score(j) - shift) * scale; }
};

// One warp walks the rows of one group. sums [groups, 2, N, N] start at 0: rows given a tag before, rows given one
// behind.
template <typename C, typename E>
__global__ void __launch_bounds__(32 * kWarps, 4)
    memm_gradients_kernel(MemmProblem problem, const C* upstream, E* demissions, C* sums, int64_t groups) {
  const int64_t group = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (group >= groups) return;
  const int64_t rows = problem.batch * problem.steps, n = problem.tags;
  C* own = sums ? sums + group * 2 * n * n : nullptr;
  const int64_t size = (unsigned(rows) + unsigned(groups) - 1) / unsigned(groups);
  const int64_t end = min((group + 1) * size, rows);
  int64_t r = group * size, b = unsigned(r) / unsigned(problem.steps), t = r - b * problem.steps;
  for (; r < end; ++r, ++t) {
    if (t == problem.steps) {
      t = 0;
      ++b;
    }
    E* to = demissions + r * n;
    if (problem.mask && !problem.mask[r]) {
      for (int64_t j = lane; j < n; j += 32) put(to + j, C(0));
      continue;
    }
    const Step<C, E> step(problem, b, t, lane);
    if (!problem.bidirectional) {
      const Side<C, E> forward(step.forward, upstream[b]);
#pragma unroll 1
      for (int64_t j = lane; j < n; j += 32) {
        const C before = forward.at(j, step.tag);
        if (own && step.before >= 0) own[step.before * n + j] += before;
        put(to + j, before);
      }
      continue;
    }
    const Side<C, E> forward(step.forward, upstream[b] * C(0.5)), reversed(step.reversed, upstream[b] * C(0.5));
#pragma unroll 1
    for (int64_t j = lane; j < n; j += 32) {
      const C before = forward.at(j, step.tag), behind = reversed.at(j, step.tag);
      if (own && step.before >= 0) own[step.before * n + j] += before;
      if (own && step.behind >= 0) own[(n + step.behind) * n + j] += behind;
      put(to + j, before + behind);
    }
  }
}

// One warp for each transition: the lanes take groups in turn.
template <typename C>
__global__ void __launch_bounds__(32 * kWarps)
    memm_transitions_kernel(const C* sums, int64_t groups, int64_t n, C* dtransitions) {
  const int64_t at = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (at >= n * n) return;
  double sum = 0;
  for (int64_t group = lane; group < groups; group += 32) {
    const C* own = sums + group * 2 * n * n;
    const int64_t from = unsigned(at) / unsigned(n), to = at - from * n;
    sum += double(own[at]) + double(own[n * n + to * n + from]);
  }
  sum = warp_sum(sum);
  if (lane == 0) dtransitions[at] = C(sum);
}

dim3 blocks(int64_t warps) { return dim3(unsigned(ceil_div(warps, kWarps))); }

int64_t compute_bytes(const MemmProblem& problem) { return problem.emissions_dtype == DType::f64 ? 8 : 4; }
int64_t upstream_bytes(const MemmProblem& problem) {
  return ceil_div(problem.batch * compute_bytes(problem), 256) * 256;
}

// Groups of 8 rows or more: 2048 warps fill a device, and the sums stay below 2^24 numbers.
int64_t groups_of(const MemmProblem& problem, bool transition_grad) {
  const int64_t rows = problem.batch * problem.steps;
  if (!transition_grad) return rows;
  const int64_t by_memory = (int64_t{1} << 23) / (problem.tags * problem.tags);
  return max(int64_t{1}, min(min(rows / 8, int64_t{2048}), by_memory));
}

template <typename C, typename E>
cudaError_t forward_of(const MemmProblem& problem, void* log_likelihood, double* rows, cudaStream_t stream) {
  const int64_t count = problem.batch * problem.steps;
  cudaError_t error = cudaSuccess;
  if (count > 0) {
    const int64_t each = ceil_div(problem.steps, kWarps);
    error = launch(memm_rows_kernel<C, E>, dim3(unsigned(problem.batch * each)), 32 * kWarps, stream, problem,
                   unsigned(each), rows);
  }
  if (error != cudaSuccess || problem.batch == 0) return error;
  return launch(memm_sequences_kernel<C>, blocks(problem.batch), 32 * kWarps, stream, static_cast<const double*>(rows),
                problem.batch, problem.steps, static_cast<C*>(log_likelihood));
}

template <typename C, typename E>
cudaError_t backward_of(const MemmProblem& problem, const MemmBackward& call, void* workspace, cudaStream_t stream) {
  const int64_t rows = problem.batch * problem.steps, n = problem.tags;
  const int64_t groups = groups_of(problem, call.dtransitions != nullptr);
  C* upstream = static_cast<C*>(workspace);
  C* sums = nullptr;
  cudaError_t error = cudaSuccess;
  if (call.dtransitions) {
    void* at = static_cast<char*>(workspace) + upstream_bytes(problem);
    error = cudaMemsetAsync(at, 0, size_t(groups * 2 * n * n) * sizeof(C), stream);
    sums = static_cast<C*>(at);
  }
  if (error == cudaSuccess && rows > 0) {
    error = launch(memm_upstream_kernel<C>, blocks(problem.batch), 32 * kWarps, stream, problem,
                   static_cast<const C*>(call.grad), upstream);
  }
  if (error == cudaSuccess && rows > 0) {
    error = launch(memm_gradients_kernel<C, E>, blocks(groups), 32 * kWarps, stream, problem,
                   static_cast<const C*>(upstream), static_cast<E*>(call.demissions), sums, groups);
  }
  if (error != cudaSuccess || !sums) return error;
  return launch(memm_transitions_kernel<C>, blocks(n * n), 32 * kWarps, stream, static_cast<const C*>(sums), groups, n,
                static_cast<C*>(call.dtransitions));
}

}  // namespace

int64_t memm_forward_bytes(const MemmProblem& problem) { return problem.batch * problem.steps * 8; }

cudaError_t memm_forward(const MemmProblem& problem, void* log_likelihood, void* workspace, cudaStream_t stream) {
  double* rows = static_cast<double*>(workspace);
  switch (problem.emissions_dtype) {
    case DType::f64: return forward_of<double, double>(problem, log_likelihood, rows, stream);
    case DType::f16: return forward_of<float, __half>(problem, log_likelihood, rows, stream);
    case DType::bf16: return forward_of<float, __nv_bfloat16>(problem, log_likelihood, rows, stream);
    default: return forward_of<float, float>(problem, log_likelihood, rows, stream);
  }
}

int64_t memm_backward_bytes(const MemmProblem& problem, const MemmBackward& call) {
  const int64_t sums = groups_of(problem, true) * 2 * problem.tags * problem.tags * compute_bytes(problem);
  return upstream_bytes(problem) + (call.dtransitions ? sums : 0);
}

cudaError_t memm_backward(const MemmProblem& problem, const MemmBackward& call, void* workspace, cudaStream_t stream) {
  switch (problem.emissions_dtype) {
    case DType::f64: return backward_of<double, double>(problem, call, workspace, stream);
    case DType::f16: return backward_of<float, __half>(problem, call, workspace, stream);
    case DType::bf16: return backward_of<float, __nv_bfloat16>(problem, call, workspace, stream);
    default: return backward_of<float, float>(problem, call, workspace, stream);
  }
}

}  // namespace fastnlp::cuda
