// Backward pass for up to 1024 tags: the walk of crf_smooth.cu for a group of sequences, which leaves the weights w of
// its posterior kernels; dT is then one product of messages and weights over all rows.
#include "crf_large.cuh"

namespace fastnlp::cuda {
namespace {

// Above it, log w belongs to a column that a sum in the exp domain cannot be trusted with (see crf_smooth.cu).
template <typename C>
constexpr C kSafeLogWeight = sizeof(C) == 4 ? C(55.2) : C(460);

// weights [R, N] (or null): log w of the step's own tags, in the row of the step that the chain goes to.
template <typename C, int kColumns>
__global__ void __launch_bounds__(kLargeThreads, 1)
    crf_large_smooth_kernel(CrfProblem problem, CrfSequences sequences, CrfBackward call, LargeEdges<C> edges,
                            C* weights, C* partials) {
  constexpr int G = kGroup<C>;
  __shared__ Pack<C> p[kMaxTags];  // then log w - column of the columns that go the exact way
  __shared__ Pack<C> w[kMaxTags];
  __shared__ C sums_of[kLargeThreads / 32][G];
  const int side = blockIdx.y;
  const int sign = side ? 1 : -1;
  const int N = int(problem.tags);
  const bool per_position = problem.transitions_per_position;
  const C* messages = static_cast<const C*>(call.messages);
  C* dtransitions = static_cast<C*>(call.dtransitions);

  int count[G], middle[G], longest = 0;
  bool alive[G];
  C gamma[kColumns][G], dstart[kColumns], dend[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) dstart[c] = dend[c] = 0;

  const auto tag_at = [&](const Steps& steps, int k) {
    if (!call.tags || k < 0 || k >= steps.length) return -1;
    const int64_t tag = call.tags[steps.row + steps.position(k)];
    return tag >= 0 && tag < N ? int(tag) : -1;
  };
  const auto emit = [&](int g, const Steps& steps, int k) {
    const C grad = static_cast<const C*>(call.grad)[int64_t(blockIdx.x) * G + g];
    const int tag = tag_at(steps, k);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int own = own_tag(c);
      if (own >= N) continue;
      const C value = !alive[g]   ? C(0)
                      : call.tags ? grad * ((tag == own ? C(1) : C(0)) - gamma[c][g])
                                  : grad * gamma[c][g];
      store(call.demissions, problem.emissions_dtype, (steps.row + steps.position(k)) * N + own, value);
      if (k == 0) dstart[c] += value;
      if (k == steps.length - 1) dend[c] += value;
    }
  };

#pragma unroll
  for (int g = 0; g < G; ++g) {
    const int64_t b = int64_t(blockIdx.x) * G + g;
    count[g] = middle[g] = 0;
    bool some = false;
    int length = 0;
    if (b < problem.batch) {
      const Steps steps(problem, sequences, b);
      length = steps.length;
      middle[g] = length / 2;
      count[g] = length == 0 ? 0 : side ? length - 1 - middle[g] : middle[g];
      longest = max(longest, count[g]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        gamma[c][g] = 0;
        if (own_tag(c) < N && length > 0) gamma[c][g] = exp(messages[(steps.row + middle[g]) * N + own_tag(c)]);
        some = some || !(gamma[c][g] == 0);
      }
    }
    alive[g] = __syncthreads_or(some);
    if (side && length > 0) emit(g, Steps(problem, sequences, b), middle[g]);
  }

  for (int t = 0; t < longest; ++t) {
    C log_here[kColumns][G];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int own = own_tag(c);
      Pack<C> pack;
#pragma unroll
      for (int g = 0; g < G; ++g) {
        log_here[c][g] = -INFINITY;
        if (own < N && t < count[g]) {
          const Steps steps(problem, sequences, int64_t(blockIdx.x) * G + g);
          log_here[c][g] = messages[(steps.row + middle[g] + sign * (t + 1)) * N + own];
        }
        pack.value[g] = exp(log_here[c][g]);
      }
      if (own < N) p[own] = pack;
    }
    __syncthreads();
    C sums[kColumns][G], exact[kColumns][G];  // exact: log w - column where slow, else -inf
    if (!per_position) multiply<C, kColumns>(p, edges.into + int64_t(side) * N * N, N, sums);
    bool any = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int own = own_tag(c);
      Pack<C> pack;
#pragma unroll
      for (int g = 0; g < G; ++g) {
        pack.value[g] = 0;
        exact[c][g] = -INFINITY;
        if (own >= N || t >= count[g] || !alive[g]) continue;
        const int64_t b = int64_t(blockIdx.x) * G + g;
        const Steps steps(problem, sequences, b);
        const int k = middle[g] + sign * (t + 1);
        C log_weight = -INFINITY;
        if (per_position || gamma[c][g] * Numbers<C>::tiny > sums[c][g]) {
          const Transitions<C> transitions(problem, b, side == 1);
          const C* edge = transitions.at(per_position ? steps.position(side ? k : k + 1) : 0);
          const C log_sum = exact_column(transitions, edge, messages + (steps.row + k) * N, 1, own, N);
          if (!(log_sum == -INFINITY)) exact[c][g] = log(gamma[c][g]) - log_sum;
          any = true;
          log_weight = exact[c][g] + (per_position ? C(0) : edges.columns[side * N + own]);
        } else if (!(gamma[c][g] == 0) && sums[c][g] != 0) {
          pack.value[g] = gamma[c][g] / sums[c][g];
          log_weight = log(gamma[c][g]) - log(sums[c][g]);
        }
        if (weights) weights[(steps.row + k) * N + own] = log_weight;
      }
      if (own < N) w[own] = pack;
    }
    const bool slow = __syncthreads_or(any);
    if (!per_position) {
      multiply<C, kColumns>(w, edges.out + int64_t(side) * N * N, N, sums);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int g = 0; g < G; ++g) sums[c][g] *= exp(log_here[c][g]);
    }
    if (slow) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        Pack<C> pack;
#pragma unroll
        for (int g = 0; g < G; ++g) pack.value[g] = exact[c][g];
        if (own_tag(c) < N) p[own_tag(c)] = pack;
      }
      __syncthreads();
#pragma unroll
      for (int g = 0; g < G; ++g) {
        if (t >= count[g] || !alive[g]) continue;
        const int64_t b = int64_t(blockIdx.x) * G + g;
        const Steps steps(problem, sequences, b);
        const Transitions<C> transitions(problem, b, side == 1);
        const int k = middle[g] + sign * (t + 1);
        const int entered = per_position ? steps.position(side ? k : k + 1) : 0;
        const C* edge = transitions.at(entered);
        const C grad = static_cast<const C*>(call.grad)[b];
        const int tag = tag_at(steps, k);
        const int tag_before = tag_at(steps, k - sign);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int own = own_tag(c);
          if (own >= N) continue;
          if (per_position) sums[c][g] = 0;
#pragma unroll 1
          for (int j = 0; j < N; ++j) {
            const C share = p[j].value[g];
            const C pair = share == -INFINITY ? C(0) : exp(log_here[c][g] + transitions(edge, own, j) + share);
            sums[c][g] += pair;
            if (per_position && dtransitions) {
              const C gold = tag == own && tag_before == j ? C(1) : C(0);
              C* to = dtransitions + (b * (problem.steps - 1) + entered - 1) * N * N;
              to[side ? int64_t(j) * N + own : int64_t(own) * N + j] = call.tags ? grad * (gold - pair) : grad * pair;
            }
          }
        }
      }
    }
    if (t % 32 == 31) {  // rounding: sums of gamma drift by about 1e-7 a step
      C total[G];
#pragma unroll
      for (int g = 0; g < G; ++g) {
        total[g] = 0;
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          if (own_tag(c) < N) total[g] += sums[c][g];
      }
      block_sum<C, G>(total, sums_of);
#pragma unroll
      for (int g = 0; g < G; ++g)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          if (total[g] > 0) sums[c][g] /= total[g];
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (t >= count[g]) continue;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) gamma[c][g] = sums[c][g];
      emit(g, Steps(problem, sequences, int64_t(blockIdx.x) * G + g), middle[g] + sign * (t + 1));
    }
    __syncthreads();
  }

  partials += (2 * int64_t(blockIdx.x) + side) * 2 * N;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (own_tag(c) >= N) continue;
    partials[own_tag(c)] = dstart[c];
    partials[N + own_tag(c)] = dend[c];
  }
}

constexpr int kTile = 64;
constexpr int kSlab = 16;

// dT: block (x, y) makes tile x of the sum over the sequences of split y. Of an edge, `other` is the tag at the row and
// `own` the tag at the row's neighbour towards the middle: pair = exp(message(other)) * E * w(own).
template <typename C>
__global__ void __launch_bounds__(kLargeThreads, 1)
    crf_large_pairs_kernel(CrfProblem problem, CrfSequences sequences, CrfBackward call, LargeEdges<C> edges,
                           const C* weights, int64_t per_split, C* partials) {
  alignas(16) __shared__ C from_values[kSlab][kTile];
  alignas(16) __shared__ C to_values[kSlab][kTile];
  __shared__ int from_tags[kSlab], to_tags[kSlab];
  const int N = int(problem.tags);
  const int tiles = (N + kTile - 1) / kTile;
  const int from0 = int(blockIdx.x) / tiles * kTile;
  const int to0 = int(blockIdx.x) % tiles * kTile;
  const int i0 = int(threadIdx.x) / 16 * 4;
  const int j0 = int(threadIdx.x) % 16 * 4;
  const C* messages = static_cast<const C*>(call.messages);
  C total[4][4] = {};

#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const int own0 = side ? from0 : to0;
    const int other0 = side ? to0 : from0;
    C(*const own_values)[kTile] = side ? from_values : to_values;
    C(*const other_values)[kTile] = side ? to_values : from_values;
    C sums[4][4] = {};
    const int64_t end = min((int64_t(blockIdx.y) + 1) * per_split, problem.batch);
#pragma unroll 1
    for (int64_t b = int64_t(blockIdx.y) * per_split; b < end; ++b) {
      const Steps steps(problem, sequences, b);
      const int middle = steps.length / 2;
      const int first = side ? middle + 1 : 0;
      const int last = side ? steps.length : middle;
      if (first >= last) continue;
      const C grad = static_cast<const C*>(call.grad)[b];
      const C of_marginal = call.tags ? -grad : grad;
      // Without any path there is no gradient, not even of the gold path; the middle row tells.
      bool some = false;
      for (int j = threadIdx.x; j < N; j += kLargeThreads)
        some = some || !(exp(messages[(steps.row + middle) * N + j]) == 0);
      if (!__syncthreads_or(some)) continue;
#pragma unroll 1
      for (int k0 = first; k0 < last; k0 += kSlab) {
        bool slow = false;
        for (int x = threadIdx.x; x < kSlab * kTile; x += kLargeThreads) {
          const int r = x / kTile;
          const int64_t row = (steps.row + k0 + r) * N;
          const int own = own0 + x % kTile;
          const int other = other0 + x % kTile;
          const C log_weight = k0 + r < last && own < N ? weights[row + own] : -INFINITY;
          const bool unsafe = log_weight > kSafeLogWeight<C>;
          slow = slow || unsafe;
          own_values[r][x % kTile] = unsafe ? C(0) : of_marginal * exp(log_weight);
          other_values[r][x % kTile] = k0 + r < last && other < N ? exp(messages[row + other]) : C(0);
        }
        if (threadIdx.x < kSlab) {
          const int k = k0 + int(threadIdx.x);
          const bool edge = call.tags && k < last;
          const int64_t* tags = call.tags + steps.row;
          from_tags[threadIdx.x] = edge ? int(tags[steps.position(side ? k - 1 : k)]) - from0 : -1;
          to_tags[threadIdx.x] = edge ? int(tags[steps.position(side ? k : k + 1)]) - to0 : -1;
        }
        const bool any = __syncthreads_or(slow);
#pragma unroll 4
        for (int r = 0; r < kSlab; ++r) {
          C x[4], y[4];
#pragma unroll
          for (int u = 0; u < 4; ++u) x[u] = from_values[r][i0 + u];
#pragma unroll
          for (int u = 0; u < 4; ++u) y[u] = to_values[r][j0 + u];
#pragma unroll
          for (int u = 0; u < 4; ++u)
#pragma unroll
            for (int v = 0; v < 4; ++v) sums[u][v] += x[u] * y[v];
          const int u_gold = from_tags[r] - i0;
          const int v_gold = to_tags[r] - j0;
          if (unsigned(u_gold) < 4 && unsigned(v_gold) < 4) {
#pragma unroll
            for (int u = 0; u < 4; ++u)
#pragma unroll
              for (int v = 0; v < 4; ++v)
                if (u == u_gold && v == v_gold) total[u][v] += grad;
          }
        }
        if (any) {
          const Transitions<C> transitions(problem, b, side == 1);
#pragma unroll 1
          for (int cell = 0; cell < 16; ++cell) {  // rare: one copy of the code, and no registers kept for it
            const int u = cell / 4;
            const int v = cell % 4;
            const int own = side ? from0 + i0 + u : to0 + j0 + v;
            const int other = side ? to0 + j0 + v : from0 + i0 + u;
            if (own >= N || other >= N) continue;
            C sum = 0;
#pragma unroll 1
            for (int r = 0; r < kSlab && k0 + r < last; ++r) {
              const int64_t row = (steps.row + k0 + r) * N;
              if (!(weights[row + own] > kSafeLogWeight<C>)) continue;
              const C log_weight = weights[row + own] - edges.columns[side * N + own];
              sum +=
                  of_marginal * exp(messages[row + other] + transitions(transitions.matrix, other, own) + log_weight);
            }
#pragma unroll
            for (int x = 0; x < 16; ++x)
              if (x == cell) total[x / 4][x % 4] += sum;
          }
        }
        __syncthreads();
      }
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int own = side ? from0 + i0 + u : to0 + j0 + v;
        const int other = side ? to0 + j0 + v : from0 + i0 + u;
        if (own < N && other < N) total[u][v] += sums[u][v] * edges.into[(int64_t(side) * N + other) * N + own];
      }
    }
  }
  partials += int64_t(blockIdx.y) * N * N;
#pragma unroll
  for (int u = 0; u < 4; ++u)
#pragma unroll
    for (int v = 0; v < 4; ++v)
      if (from0 + i0 + u < N && to0 + j0 + v < N) partials[int64_t(from0 + i0 + u) * N + to0 + j0 + v] = total[u][v];
}

template <typename C>
struct BackwardSpace {
  LargeEdges<C> edges;
  int64_t groups, tiles, splits, per_split;
  C* bounds;             // [2 * groups, 2 N]
  C* weights = nullptr;  // [R, N]
  C* pairs = nullptr;    // [splits, N, N]
  BackwardSpace(const CrfProblem& problem, const CrfBackward& call, Workspace& space) {
    const int64_t N = problem.tags;
    edges = take_edges<C>(problem, space);
    groups = ceil_div(problem.batch, kGroup<C>);
    bounds = space.take<C>(2 * groups * 2 * N);
    // About 512 blocks in all: four for every SM of a large card.
    tiles = ceil_div(N, kTile) * ceil_div(N, kTile);
    per_split = ceil_div(problem.batch > 0 ? problem.batch : 1, ceil_div(512, tiles));
    splits = ceil_div(problem.batch, per_split);
    if (!call.dtransitions || problem.transitions_per_position) return;
    weights = space.take<C>(rows_of(problem) * N);
    pairs = space.take<C>(splits * N * N);
  }
};

template <typename C>
cudaError_t backward(const CrfProblem& problem, const CrfSequences& sequences, const CrfBackward& call, void* workspace,
                     cudaStream_t stream) {
  Workspace memory{static_cast<char*>(workspace)};
  const BackwardSpace<C> space(problem, call, memory);
  FASTNLP_RETURN_IF_ERROR(crf_large_edges(problem, space.edges, stream));
  FASTNLP_RETURN_IF_ERROR(with_columns(problem.tags, [&](auto columns) {
    return launch(crf_large_smooth_kernel<C, decltype(columns)::value>, dim3(unsigned(space.groups), 2), kLargeThreads,
                  stream, problem, sequences, call, space.edges, space.weights, space.bounds);
  }));
  FASTNLP_RETURN_IF_ERROR(crf_sum_partials<C>(space.bounds, 2 * space.groups, 0, problem.tags, nullptr,
                                              static_cast<C*>(call.dstart), static_cast<C*>(call.dend), stream));
  if (!space.pairs) return cudaSuccess;
  FASTNLP_RETURN_IF_ERROR(launch(crf_large_pairs_kernel<C>, dim3(unsigned(space.tiles), unsigned(space.splits)),
                                 kLargeThreads, stream, problem, sequences, call, space.edges,
                                 static_cast<const C*>(space.weights), space.per_split, space.pairs));
  return crf_sum_partials<C>(space.pairs, space.splits, problem.tags * problem.tags, 0,
                             static_cast<C*>(call.dtransitions), nullptr, nullptr, stream);
}

}  // namespace

int64_t crf_large_backward_bytes(const CrfProblem& problem, const CrfBackward& call) {
  Workspace space{nullptr};
  if (problem.emissions_dtype == DType::f64)
    BackwardSpace<double>(problem, call, space);
  else
    BackwardSpace<float>(problem, call, space);
  return space.used;
}

cudaError_t crf_large_backward(const CrfProblem& problem, const CrfSequences& sequences, const CrfBackward& call,
                               void* workspace, cudaStream_t stream) {
  if (problem.emissions_dtype == DType::f64) return backward<double>(problem, sequences, call, workspace, stream);
  return backward<float>(problem, sequences, call, workspace, stream);
}

}  // namespace fastnlp::cuda
