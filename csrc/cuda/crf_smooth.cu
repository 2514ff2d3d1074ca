// Backward pass for up to 64 tags: from the middle outwards by posterior kernels P(tag there | tag here), whose columns
// sum to one whatever the scale of the messages. No product of left and right messages, which would underflow together.
#include "crf_parts.cuh"

namespace fastnlp::cuda {
namespace {

// Blocks, and with them partial sums of dT, are bounded by shape alone, so that sums are added in the same order
// anywhere.
constexpr int64_t kMaxBlocks = 1024;

template <typename C, int K, bool kTransitions>
struct SmoothShared {
  static constexpr int width = K < 32 ? 32 : K;  // lanes beyond K write zeros that nobody reads
  alignas(16) C p[4][width];                     // three are alive: read by dT, read by the sums, being written
  alignas(16) C w[2][width];
  C logs[width], slow[width], slow_log[width];
  C sums[2], dstart[width], dend[width];
  C extra[kTransitions ? K * K : 1];  // [other, own]: gold counts, and pairs whose column went the exact way
};

template <typename C, int K>
__device__ C dot(const C* vector, const C (&edges)[K]) {
  C sums[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < K; i += Pack<C>::size) {
    const Pack<C> pack = *reinterpret_cast<const Pack<C>*>(vector + i);
#pragma unroll
    for (int u = 0; u < Pack<C>::size; ++u) sums[(i + u) % 4] += pack.value[u] * edges[i + u];
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// A block takes segments in turn; its two teams walk from the middle to the left and to the right. A thread holds tag
// `own`: at the step where the chain stands while it sums over `other` tags of the next one, and of the next one after
// it.
template <typename C, int K, bool kTransitions>
__global__ void __launch_bounds__(2 * Chain<C, K>::team, 1)
    crf_smooth_kernel(CrfProblem problem, CrfSequences sequences, CrfBackward call, int64_t chunks, C* partials) {
  constexpr int team = Chain<C, K>::team;
  constexpr int kAhead = K * sizeof(C) > 64 ? 2 : 4;  // each copy of the body costs registers; more would spill
  __shared__ SmoothShared<C, K, kTransitions> both[2];
  const bool right = threadIdx.x >= team;
  const int own = threadIdx.x % team;
  const int sign = right ? 1 : -1;
  const int N = int(problem.tags);
  const bool real = own < N;
  const bool per_position = problem.transitions_per_position;
  SmoothShared<C, K, kTransitions>& shared = both[right];
  const C* messages = static_cast<const C*>(call.messages);

  const auto sync_or = [&](bool value) {
    if (team > 32) return named_barrier_or(1 + right, team, value);
    __syncwarp();
    return bool(__any_sync(kFullWarp, value));
  };

  // into[i] = exp(T(other i, own) - column(own)); out[j] = exp(T(other own, own j) - column(j)), 0 where there is none.
  C into[K], out[K], pairs[kTransitions ? K : 1];
  {
    const Transitions<C> transitions(problem, 0, right);
    C column = -INFINITY;
#pragma unroll
    for (int i = 0; i < K; ++i) {
      into[i] = i < N && real && !per_position ? transitions(transitions.matrix, i, own) : -INFINITY;
      column = into[i] > column ? into[i] : column;
    }
    shared.logs[own] = column;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < K; ++i) {
      into[i] = into[i] == -INFINITY ? C(0) : exp(into[i] - column);
      const C x = i < N && real && !per_position ? transitions(transitions.matrix, own, i) : -INFINITY;
      out[i] = x == -INFINITY ? C(0) : exp(x - shared.logs[i]);
    }
    __syncthreads();
  }
  if constexpr (kTransitions) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      pairs[i] = 0;
      if (own < K) shared.extra[i * K + own] = 0;
    }
  }
  shared.dstart[own] = shared.dend[own] = 0;

  for (int64_t index = blockIdx.x; index < problem.batch * chunks; index += gridDim.x) {
    const int64_t b = index / chunks;
    const Steps steps(problem, sequences, b);
    const Segment segment(problem, steps, index % chunks, chunks > 1);
    if (segment.first >= segment.end) continue;
    const C grad = static_cast<const C*>(call.grad)[b];
    const C of_count = call.tags ? grad : C(0);
    const C of_marginal = call.tags ? -grad : grad;
    const C* rows = messages + steps.row * N;

    C gamma = real ? exp(rows[int64_t(segment.middle) * N + own]) : C(0);
    const bool alive = __syncthreads_or(!(gamma == 0));  // without any path every gradient is 0

    struct Fetched {
      C log;
      int tag, position;
    };
    const int count = right ? segment.end - 1 - segment.middle : segment.middle - segment.first + !segment.starts;
    const auto fetch = [&](int t) {
      Fetched f{-INFINITY, -1, 0};
      if (t >= count) return f;
      const int k = segment.middle + sign * (t + 1);
      f.position = k >= 0 ? steps.position(k) : 0;
      if (real) f.log = k < segment.first ? messages[segment.left_boundary * N + own] : rows[int64_t(k) * N + own];
      if (call.tags) {
        const int64_t tag = call.tags[steps.row + f.position];
        f.tag = tag >= 0 && tag < N ? int(tag) : -1;
      }
      return f;
    };
    const auto emit = [&](int k, int position, int tag, C gamma) {
      if (!real) return;
      const C value = alive ? of_marginal * gamma + (tag == own ? of_count : C(0)) : C(0);
      store(call.demissions, problem.emissions_dtype, (steps.row + position) * N + own, value);
      if (k == 0) shared.dstart[own] += value;
      if (k == steps.length - 1) shared.dend[own] += value;
    };

    int tag = -1;
    int position = steps.position(segment.middle);
    if (call.tags) {
      const int64_t at = call.tags[steps.row + position];
      tag = at >= 0 && at < N ? int(at) : -1;
    }
    if (right) emit(segment.middle, position, tag, gamma);

    Fetched ring[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) ring[u] = fetch(u);
    C p = exp(ring[0].log);
    shared.p[0][own] = p;
    sync_or(false);
    C s = dot(shared.p[0], into);

    for (int t0 = 0; t0 < count; t0 += kAhead) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int t = t0 + u;
        if (t >= count) break;
        const Fetched here = ring[u];
        ring[u] = fetch(t + kAhead);
        const int k = segment.middle + sign * (t + 1);
        if (!alive) {
          if (k >= segment.first) emit(k, here.position, here.tag, 0);
          continue;
        }
        // A share above 1 / tiny means that s may have lost terms that matter: at most p * E < 1e-38 is lost of a sum,
        // so below it no pair is wrong by more than 64 * 1e-38 * 1e24 = 1e-12, not even where s is 0.
        const bool slow = per_position ? real : gamma * Numbers<C>::tiny > s;
        const C w = slow || s == 0 ? C(0) : gamma / s;
        const C p_next = exp(ring[(u + 1) % kAhead].log);
        shared.w[t & 1][own] = w;
        shared.p[(t + 1) & 3][own] = p_next;
        const bool any = sync_or(slow);
        C next = p * dot(shared.w[t & 1], out);
        s = dot(shared.p[(t + 1) & 3], into);
        if constexpr (kTransitions) {
          const C weight = of_marginal * w;
#pragma unroll
          for (int i = 0; i < K; i += Pack<C>::size) {
            const Pack<C> pack = *reinterpret_cast<const Pack<C>*>(&shared.p[t & 3][i]);
#pragma unroll
            for (int v = 0; v < Pack<C>::size; ++v) pairs[i + v] += pack.value[v] * weight;
          }
          if (!per_position && tag == own && here.tag >= 0) shared.extra[here.tag * K + own] += of_count;
        }
        if (any) {
          const int entered = right ? here.position : position;
          const Transitions<C> transitions(problem, b, right);  // made here to keep registers free elsewhere
          const C* edge = transitions.at(entered);
          shared.logs[own] = here.log;
          sync_or(false);
          const C log_sum = slow ? exact_column(transitions, edge, shared.logs, 1, own, N) : C(0);
          const C share = slow && log_sum != -INFINITY ? gamma : C(0);
          shared.slow[own] = share;
          shared.slow_log[own] = log_sum;
          sync_or(false);
#pragma unroll 1
          for (int j = 0; j < N; ++j) {
            if (real && shared.slow[j] != 0)
              next += shared.slow[j] * exp(here.log + transitions(edge, own, j) - shared.slow_log[j]);
          }
          if constexpr (kTransitions) {
            C* out_edge = static_cast<C*>(call.dtransitions) + (b * (problem.steps - 1) + entered - 1) * N * N;
#pragma unroll 1
            for (int i = 0; slow && i < N; ++i) {
              C value = 0;
              if (share != 0) value = of_marginal * share * exp(shared.logs[i] + transitions(edge, i, own) - log_sum);
              if (!per_position)
                shared.extra[i * K + own] += value;
              else
                out_edge[right ? own * N + i : i * N + own] = value + (tag == own && here.tag == i ? of_count : C(0));
            }
          }
          sync_or(false);
        }
        if (t % 32 == 31) {  // rounding: sums of gamma drift by about 1e-7 a step
          C total = warp_sum(next);
          if (team > 32) {
            if (own % 32 == 0) shared.sums[own / 32] = total;
            sync_or(false);
            total = shared.sums[0] + shared.sums[1];
            sync_or(false);
          }
          if (total > 0) next /= total;
        }
        if (k >= segment.first) emit(k, here.position, here.tag, next);
        gamma = next;
        p = p_next;
        tag = here.tag;
        position = here.position;
      }
    }
  }

  const int64_t matrix = kTransitions && !per_position ? int64_t(N) * N : 0;
  partials += (2 * int64_t(blockIdx.x) + right) * (matrix + 2 * N);
  if (!real) return;
  if constexpr (kTransitions) {
    if (!per_position) {
#pragma unroll
      for (int i = 0; i < K; ++i)
        if (i < N) partials[right ? own * N + i : i * N + own] = pairs[i] * into[i] + shared.extra[i * K + own];
    }
  }
  partials[matrix + own] = shared.dstart[own];
  partials[matrix + N + own] = shared.dend[own];
}

constexpr int kSumColumns = 32;
constexpr int kSumGroups = 16;

template <typename C>
__global__ void __launch_bounds__(kSumColumns* kSumGroups, 1)
    crf_sum_partials_kernel(const C* partials, int64_t rows, int64_t matrix, int64_t tags, C* dtransitions, C* dstart,
                            C* dend) {
  __shared__ double sums[kSumGroups][kSumColumns];
  const int x = threadIdx.x % kSumColumns;
  const int group = threadIdx.x / kSumColumns;
  const int64_t width = matrix + 2 * tags;
  const int64_t column = int64_t(blockIdx.x) * kSumColumns + x;
  double sum = 0;
  if (column < width) {
#pragma unroll 4
    for (int64_t row = group; row < rows; row += kSumGroups) sum += partials[row * width + column];
  }
  sums[group][x] = sum;
  __syncthreads();
  if (group > 0 || column >= width) return;
#pragma unroll
  for (int i = 1; i < kSumGroups; ++i) sum += sums[i][x];
  if (column < matrix)
    dtransitions[column] = C(sum);
  else if (column < matrix + tags)
    dstart[column - matrix] = C(sum);
  else
    dend[column - matrix - tags] = C(sum);
}

int64_t blocks_of(const CrfProblem& problem, const CrfBackward& call) {
  const int64_t segments = problem.batch * chunks_of(problem, call.chunked);
  return segments < kMaxBlocks ? segments : kMaxBlocks;
}

int64_t partial_width(const CrfProblem& problem, const CrfBackward& call) {
  const int64_t N = problem.tags;
  return (call.dtransitions && !problem.transitions_per_position ? N * N : 0) + 2 * N;
}

template <typename C>
cudaError_t smooth(const CrfProblem& problem, const CrfSequences& sequences, const CrfBackward& call, C* partials,
                   cudaStream_t stream) {
  const int64_t chunks = chunks_of(problem, call.chunked);
  const int64_t blocks = blocks_of(problem, call);
  FASTNLP_RETURN_IF_ERROR(with_size<C>(problem.tags, [&](auto size) {
    constexpr int K = decltype(size)::value;
    const auto kernel = call.dtransitions ? crf_smooth_kernel<C, K, true> : crf_smooth_kernel<C, K, false>;
    return launch(kernel, dim3(unsigned(blocks)), 2 * Chain<C, K>::team, stream, problem, sequences, call, chunks,
                  partials);
  }));
  return crf_sum_partials<C>(partials, 2 * blocks, partial_width(problem, call) - 2 * problem.tags, problem.tags,
                             static_cast<C*>(call.dtransitions), static_cast<C*>(call.dstart),
                             static_cast<C*>(call.dend), stream);
}

}  // namespace

template <typename C>
cudaError_t crf_sum_partials(const C* partials, int64_t rows, int64_t matrix, int64_t tags, C* dtransitions, C* dstart,
                             C* dend, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(matrix + 2 * tags, kSumColumns)));
  return launch(crf_sum_partials_kernel<C>, grid, kSumColumns * kSumGroups, stream, partials, rows, matrix, tags,
                dtransitions, dstart, dend);
}
template cudaError_t crf_sum_partials(const float*, int64_t, int64_t, int64_t, float*, float*, float*, cudaStream_t);
template cudaError_t crf_sum_partials(const double*, int64_t, int64_t, int64_t, double*, double*, double*,
                                      cudaStream_t);

int64_t crf_backward_bytes(const CrfProblem& problem, const CrfBackward& call) {
  if (!fits_registers(problem)) return crf_large_backward_bytes(problem, call);
  const int64_t element = problem.emissions_dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return 2 * blocks_of(problem, call) * partial_width(problem, call) * element;
}

cudaError_t crf_backward(const CrfProblem& problem, const CrfSequences& sequences, const CrfBackward& call,
                         void* workspace, cudaStream_t stream) {
  const bool wide = problem.emissions_dtype == DType::f64;
  const int64_t C = wide ? sizeof(double) : sizeof(float);
  const int64_t E = problem.emissions_dtype == DType::f32 ? 4 : wide ? 8 : 2;
  const int64_t N = problem.tags;
  // Steps that no kernel visits: masked ones, and packed rows that no sequence covers.
  if (problem.mask || problem.cu_seqlens)
    FASTNLP_RETURN_IF_ERROR(cudaMemsetAsync(call.demissions, 0, size_t(rows_of(problem) * N * E), stream));
  if (problem.transitions_per_position && call.dtransitions && problem.steps > 1)
    FASTNLP_RETURN_IF_ERROR(
        cudaMemsetAsync(call.dtransitions, 0, size_t(problem.batch * (problem.steps - 1) * N * N * C), stream));
  if (problem.batch == 0) {
    if (call.dtransitions && !problem.transitions_per_position)
      FASTNLP_RETURN_IF_ERROR(cudaMemsetAsync(call.dtransitions, 0, size_t(N * N * C), stream));
    FASTNLP_RETURN_IF_ERROR(cudaMemsetAsync(call.dstart, 0, size_t(N * C), stream));
    return cudaMemsetAsync(call.dend, 0, size_t(N * C), stream);
  }
  if (!fits_registers(problem)) return crf_large_backward(problem, sequences, call, workspace, stream);
  if (wide) return smooth(problem, sequences, call, static_cast<double*>(workspace), stream);
  return smooth(problem, sequences, call, static_cast<float*>(workspace), stream);
}

}  // namespace fastnlp::cuda
