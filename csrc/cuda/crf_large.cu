// Forward pass for up to 1024 tags.
#include "crf_large.cuh"

namespace fastnlp::cuda {
namespace {

constexpr int kEdgeColumns = 32;
constexpr int kEdgeParts = kLargeThreads / kEdgeColumns;

template <typename C>
__global__ void __launch_bounds__(kLargeThreads, 1) crf_large_edges_kernel(CrfProblem problem, LargeEdges<C> edges) {
  __shared__ C tops[kEdgeParts][kEdgeColumns];
  const int side = blockIdx.y;
  const int x = threadIdx.x % kEdgeColumns;
  const int part = threadIdx.x / kEdgeColumns;
  const int N = int(problem.tags);
  const int own = int(blockIdx.x) * kEdgeColumns + x;
  const Transitions<C> transitions(problem, 0, side == 1);
  C column = -INFINITY;
  for (int i = part; own < N && i < N; i += kEdgeParts) {
    const C value = transitions(transitions.matrix, i, own);
    column = value > column ? value : column;
  }
  tops[part][x] = column;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEdgeParts; ++i) column = tops[i][x] > column ? tops[i][x] : column;
  if (own >= N) return;
  for (int i = part; i < N; i += kEdgeParts) {
    const C value = transitions(transitions.matrix, i, own);
    const C edge = value == -INFINITY ? C(0) : exp(value - column);
    edges.into[(int64_t(side) * N + i) * N + own] = edge;
    edges.out[(int64_t(side) * N + own) * N + i] = edge;
  }
  if (part == 0) edges.columns[side * N + own] = column;
}

// Block (x, y): chain y of the x-th group of sequences. Each step takes the block's exact maximum: its two barriers are
// small beside the step's N * N products. `ends` and `offsets` [B, 2, N], [B, 2]: where each chain arrives.
template <typename C, typename E, int kColumns>
__global__ void __launch_bounds__(kLargeThreads, 1)
    crf_large_filter_kernel(CrfProblem problem, CrfSequences sequences, CrfForward call, LargeEdges<C> edges, C* ends,
                            double* offsets) {
  constexpr int G = kGroup<C>;
  __shared__ Pack<C> p[kMaxTags];
  __shared__ C logs[G][kMaxTags];
  __shared__ float tops[kLargeThreads / 32][G];
  const int side = blockIdx.y;
  const int N = int(problem.tags);
  const int sign = side ? -1 : 1;
  const bool per_position = problem.transitions_per_position;
  const C* score = static_cast<const C*>(side ? problem.end : problem.start);
  C* messages = static_cast<C*>(call.messages);

  int count[G], origin[G], longest = 0;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const int64_t b = int64_t(blockIdx.x) * G + g;
    const int length = b < problem.batch ? Steps(problem, sequences, b).length : 0;
    const int middle = call.left_only ? length : length / 2;
    count[g] = side ? length - middle : middle;
    origin[g] = side ? length - 1 : 0;
    longest = max(longest, count[g]);
  }

  C a[kColumns][G], e[kColumns][G], next[kColumns][G], column[kColumns];
  double offset[G];
  const auto fetch = [&](int t) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (t >= count[g]) continue;
      const int64_t b = int64_t(blockIdx.x) * G + g;
      const Steps steps(problem, sequences, b);
      const Emissions<E> emissions(problem, steps, b);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        next[c][g] = emissions.load(steps, origin[g] + sign * t, min(own_tag(c), N - 1));
    }
  };
#pragma unroll
  for (int c = 0; c < kColumns; ++c) column[c] = per_position ? C(0) : edges.columns[side * N + min(own_tag(c), N - 1)];
#pragma unroll
  for (int g = 0; g < G; ++g) offset[g] = 0;
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
#pragma unroll
    for (int g = 0; g < G; ++g) a[c][g] = -INFINITY;
  fetch(0);
  for (int t = 0; t < longest; ++t) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int g = 0; g < G; ++g) e[c][g] = next[c][g];
    fetch(t + 1);
    C sums[kColumns][G];
    if (t > 0 && !per_position) multiply<C, kColumns>(p, edges.into + int64_t(side) * N * N, N, sums);
    float top[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      top[g] = -INFINITY;
      if (t >= count[g]) continue;
      const int64_t b = int64_t(blockIdx.x) * G + g;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int own = own_tag(c);
        if (own >= N) continue;
        if (t == 0) {
          a[c][g] = (score ? score[own] : C(0)) + e[c][g];
        } else if (per_position || (sums[c][g] < Numbers<C>::tiny && e[c][g] + column[c] > -INFINITY)) {
          const Steps steps(problem, sequences, b);
          const Transitions<C> transitions(problem, b, side == 1);
          const int k = origin[g] + sign * t;
          const C* edge = transitions.at(per_position ? steps.position(side ? k + 1 : k) : 0);
          a[c][g] = exact_column(transitions, edge, logs[g], 1, own, N) + e[c][g];
        } else {
          a[c][g] = log(sums[c][g]) + column[c] + e[c][g];
        }
        top[g] = max(top[g], float(a[c][g]));
      }
    }
    block_max<G>(top, tops);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int own = own_tag(c);
      if (own >= N) continue;
      Pack<C> pack;
#pragma unroll
      for (int g = 0; g < G; ++g) {
        if (t < count[g]) a[c][g] -= finite_or_zero(top[g]);
        pack.value[g] = exp(a[c][g]);
        logs[g][own] = a[c][g];
        if (t < count[g] && messages) {
          const Steps steps(problem, sequences, int64_t(blockIdx.x) * G + g);
          messages[(steps.row + origin[g] + sign * t) * N + own] = a[c][g];
        }
      }
      p[own] = pack;
    }
#pragma unroll
    for (int g = 0; g < G; ++g)
      if (t < count[g]) offset[g] += finite_or_zero(top[g]);
    __syncthreads();
  }
  if (!ends) return;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const int64_t b = int64_t(blockIdx.x) * G + g;
    if (b >= problem.batch) continue;
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (own_tag(c) < N) ends[(b * 2 + side) * N + own_tag(c)] = a[c][g];
    if (threadIdx.x == 0) offsets[b * 2 + side] = offset[g];
  }
}

// One block per sequence: both chains' messages meet on the edge that enters the middle.
template <typename C, typename E>
__global__ void __launch_bounds__(kLargeThreads, 1)
    crf_large_join_kernel(CrfProblem problem, CrfSequences sequences, CrfForward call, const C* ends,
                          const double* offsets) {
  constexpr int kColumns = int(kMaxTags) / kLargeThreads;
  __shared__ float tops[kLargeThreads / 32][1];
  __shared__ C sums[kLargeThreads / 32][1];
  __shared__ double parts[kLargeThreads / 32];
  const int64_t b = blockIdx.x;
  const Steps steps(problem, sequences, b);
  const int N = int(problem.tags);
  C* output = static_cast<C*>(call.output);
  C* messages = static_cast<C*>(call.messages);
  if (steps.length == 0) {
    if (output && threadIdx.x == 0) output[b] = 0;
    return;
  }
  double gold = 0;
  if (call.tags) gold = sum_parts(gold_part<C, E>(problem, steps, b, call.tags, 0, steps.length), parts);
  const int middle = steps.length / 2;
  const Transitions<C> transitions(problem, b, false);
  const C* edge = transitions.at(steps.position(middle));
  const C* start = static_cast<const C*>(problem.start);
  C values[kColumns];
  float top[1] = {-INFINITY};
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int own = own_tag(c);
    values[c] = -INFINITY;
    if (own >= N) continue;
    values[c] =
        middle == 0 ? (start ? start[own] : C(0)) : exact_column(transitions, edge, ends + 2 * b * N, 1, own, N);
    values[c] += ends[(2 * b + 1) * N + own];
    top[0] = max(top[0], float(values[c]));
  }
  block_max<1>(top, tops);
  const float shift = finite_or_zero(top[0]);
  C sum[1] = {0};
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    if (own_tag(c) < N) sum[0] += exp(values[c] - shift);
  block_sum<C, 1>(sum, sums);
  const C log_sum = shift + log(sum[0]);
  if (messages) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      C log_marginal = log_sum == -INFINITY ? log_sum : values[c] - log_sum;
      if (gold != gold) log_marginal = NAN;
      if (own_tag(c) < N) messages[(steps.row + middle) * N + own_tag(c)] = log_marginal;
    }
  }
  const double offset = (middle ? offsets[2 * b] : 0) + offsets[2 * b + 1];
  if (output && threadIdx.x == 0) output[b] = C(forward_value(call.tags != nullptr, gold, offset + double(log_sum)));
}

template <typename C>
struct ForwardSpace {
  LargeEdges<C> edges;
  C* ends = nullptr;
  double* offsets = nullptr;
  ForwardSpace(const CrfProblem& problem, const CrfForward& call, Workspace& space) {
    edges = take_edges<C>(problem, space);
    if (call.left_only) return;
    ends = space.take<C>(problem.batch * 2 * problem.tags);
    offsets = space.take<double>(problem.batch * 2);
  }
};

}  // namespace

template <typename C>
cudaError_t crf_large_edges(const CrfProblem& problem, const LargeEdges<C>& edges, cudaStream_t stream) {
  if (problem.transitions_per_position) return cudaSuccess;
  return launch(crf_large_edges_kernel<C>, dim3(unsigned(ceil_div(problem.tags, kEdgeColumns)), 2), kLargeThreads,
                stream, problem, edges);
}
template cudaError_t crf_large_edges(const CrfProblem&, const LargeEdges<float>&, cudaStream_t);
template cudaError_t crf_large_edges(const CrfProblem&, const LargeEdges<double>&, cudaStream_t);

int64_t crf_large_forward_bytes(const CrfProblem& problem, const CrfForward& call) {
  Workspace space{nullptr};
  if (problem.emissions_dtype == DType::f64)
    ForwardSpace<double>(problem, call, space);
  else
    ForwardSpace<float>(problem, call, space);
  return space.used;
}

cudaError_t crf_large_forward(const CrfProblem& problem, const CrfSequences& sequences, const CrfForward& call,
                              void* workspace, cudaStream_t stream) {
  return with_types(problem.emissions_dtype, [&](auto compute, auto emission) {
    using C = type_of<decltype(compute)>;
    using E = type_of<decltype(emission)>;
    Workspace memory{static_cast<char*>(workspace)};
    const ForwardSpace<C> space(problem, call, memory);
    FASTNLP_RETURN_IF_ERROR(crf_large_edges(problem, space.edges, stream));
    const dim3 grid(unsigned(ceil_div(problem.batch, kGroup<C>)), call.left_only ? 1 : 2);
    FASTNLP_RETURN_IF_ERROR(with_columns(problem.tags, [&](auto columns) {
      return launch(crf_large_filter_kernel<C, E, decltype(columns)::value>, grid, kLargeThreads, stream, problem,
                    sequences, call, space.edges, space.ends, space.offsets);
    }));
    if (call.left_only) return cudaSuccess;
    return launch(crf_large_join_kernel<C, E>, dim3(unsigned(problem.batch)), kLargeThreads, stream, problem, sequences,
                  call, static_cast<const C*>(space.ends), static_cast<const double*>(space.offsets));
  });
}

}  // namespace fastnlp::cuda
