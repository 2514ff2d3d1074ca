// Best paths. Candidates are compared as (score + transition) + emission, in that order of rounding, and the lowest
// index wins a tie: a strict comparison, and parts of the tags that are merged in order.
#include "crf_parts.cuh"

namespace fastnlp::cuda {
namespace {

constexpr int kTraceSteps =
    64;  // back-pointers are read in tiles: following them in global memory costs a latency a step

template <typename C, typename E, int K>
__global__ void __launch_bounds__(K > 32 ? 64 : 32, 1)
    crf_viterbi_kernel(CrfProblem problem, CrfSequences sequences, uint8_t* pointers /* [R, K] */, int64_t* paths,
                       C* best_scores) {
  constexpr int kThreads = K > 32 ? 64 : 32;
  constexpr int kAhead = 4;
  constexpr int kParts = 4;
  alignas(16) __shared__ C scores[2][kThreads];
  alignas(16) __shared__ uint8_t tile[kTraceSteps][K];
  __shared__ int path[kTraceSteps];
  __shared__ int last;
  const int64_t b = blockIdx.x;
  const Steps steps(problem, sequences, b);
  const Emissions<E> emissions(problem, steps, b);
  const Transitions<C> transitions(problem, b, false);
  const int N = int(problem.tags);
  const int own = threadIdx.x;
  const int L = steps.length;
  if (L == 0) {
    if (own == 0) best_scores[b] = 0;
    return;
  }
  pointers += steps.row * K;

  C into[K];
  const auto load_transitions = [&](int entered) {
    const C* edge = transitions.at(entered);
#pragma unroll
    for (int i = 0; i < K; ++i) into[i] = i < N && own < N ? transitions(edge, i, own) : -INFINITY;
  };
  load_transitions(0);
  const auto fetch = [&](int k) { return own < N && k < L ? C(emissions.load(steps, k, own)) : C(0); };
  C ring[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) ring[u] = fetch(u);
  for (int k0 = 0; k0 < L; k0 += kAhead) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int k = k0 + u;
      if (k >= L) break;
      const C e = ring[u];
      ring[u] = fetch(k + kAhead);
      C score = own < N ? (problem.start ? static_cast<const C*>(problem.start)[own] : C(0)) + e : -INFINITY;
      if (k > 0) {
        if (problem.transitions_per_position) load_transitions(steps.position(k));
        C best[kParts];
        int from[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          best[part] = -INFINITY;
          from[part] = 0;
        }
#pragma unroll
        for (int i = 0; i < K; i += Pack<C>::size) {
          const Pack<C> pack = *reinterpret_cast<const Pack<C>*>(&scores[(k - 1) & 1][i]);
#pragma unroll
          for (int v = 0; v < Pack<C>::size; ++v) {
            const int part = (i + v) / (K / kParts);
            const C candidate = (pack.value[v] + into[i + v]) + e;
            if (candidate > best[part]) {
              best[part] = candidate;
              from[part] = i + v;
            }
          }
        }
#pragma unroll
        for (int part = 1; part < kParts; ++part) {
          if (best[part] > best[0]) {
            best[0] = best[part];
            from[0] = from[part];
          }
        }
        score = best[0];
        if (own < K) pointers[int64_t(k) * K + own] = uint8_t(from[0]);
      }
      scores[k & 1][own] = score;
      __syncthreads();
    }
  }

  if (own == 0) {
    const C* end = static_cast<const C*>(problem.end);
    C best = -INFINITY;
    int tag = 0;
    for (int j = 0; j < N; ++j) {
      const C candidate = scores[(L - 1) & 1][j] + (end ? end[j] : C(0));
      if (candidate > best) {
        best = candidate;
        tag = j;
      }
    }
    best_scores[b] = best;
    last = tag;
  }
  __syncthreads();
  for (int end = L; end > 0; end -= kTraceSteps) {
    const int first = end > kTraceSteps ? end - kTraceSteps : 0;
    using Word = uint64_t;
    const int words = (end - first) * K / int(sizeof(Word));
    for (int x = own; x < words; x += kThreads)
      reinterpret_cast<Word*>(tile)[x] = reinterpret_cast<const Word*>(pointers + int64_t(first) * K)[x];
    __syncthreads();
    if (own == 0) {
      int tag = last;
      for (int k = end - 1; k >= first; --k) {
        path[k - first] = tag;
        if (k > 0) tag = tile[k - first][tag];
      }
      last = tag;
    }
    __syncthreads();
    for (int k = first + own; k < end; k += kThreads) paths[steps.row + steps.position(k)] = path[k - first];
  }
}

constexpr int kLargeThreads = 256;

template <typename C, typename E>
__global__ void __launch_bounds__(kLargeThreads, 1)
    crf_viterbi_large_kernel(CrfProblem problem, CrfSequences sequences, uint16_t* pointers /* [R, N] */,
                             int64_t* paths, C* best_scores) {
  __shared__ C scores[2][kMaxTags];
  const int64_t b = blockIdx.x;
  const Steps steps(problem, sequences, b);
  const Emissions<E> emissions(problem, steps, b);
  const Transitions<C> transitions(problem, b, false);
  const int N = int(problem.tags);
  const int L = steps.length;
  const C* start = static_cast<const C*>(problem.start);
  const C* end = static_cast<const C*>(problem.end);
  pointers += steps.row * N;
  for (int k = 0; k < L; ++k) {
    const C* before = scores[(k & 1) ^ 1];
    const C* edge = transitions.at(steps.position(k));
    for (int own = threadIdx.x; own < N; own += kLargeThreads) {
      const C e = emissions.load(steps, k, own);
      C best = -INFINITY;
      int from = 0;
      if (k == 0) {
        best = (start ? start[own] : C(0)) + e;
      } else {
#pragma unroll 8
        for (int i = 0; i < N; ++i) {
          const C candidate = (before[i] + transitions(edge, i, own)) + e;
          if (candidate > best) {
            best = candidate;
            from = i;
          }
        }
        pointers[int64_t(k) * N + own] = uint16_t(from);
      }
      scores[k & 1][own] = best;
    }
    __syncthreads();
  }
  if (threadIdx.x > 0) return;
  if (L == 0) {
    best_scores[b] = 0;
    return;
  }
  C best = -INFINITY;
  int tag = 0;
  for (int j = 0; j < N; ++j) {
    const C candidate = scores[(L - 1) & 1][j] + (end ? end[j] : C(0));
    if (candidate > best) {
      best = candidate;
      tag = j;
    }
  }
  best_scores[b] = best;
  for (int k = L - 1; k >= 0; --k) {
    paths[steps.row + steps.position(k)] = tag;
    if (k > 0) tag = pointers[int64_t(k) * N + tag];
  }
}

// The n best scores of every tag, kept sorted in shared memory: cell tag * n + rank. Candidates come in the order of
// cells, and an equal one goes behind, so that ties keep that order.
constexpr int kBestThreads = 128;

template <typename C, typename E>
__global__ void __launch_bounds__(kBestThreads, 1)
    crf_viterbi_n_best_kernel(CrfProblem problem, CrfSequences sequences, int n, uint16_t* pointers /* [R, N * n] */,
                              int64_t* paths, C* best_scores) {
  __shared__ C scores[2][kMaxBestCells];
  __shared__ uint16_t origins[kMaxBestCells];
  const int64_t b = blockIdx.x;
  const Steps steps(problem, sequences, b);
  const Emissions<E> emissions(problem, steps, b);
  const Transitions<C> transitions(problem, b, false);
  const int N = int(problem.tags);
  const int cells = N * n;
  const int L = steps.length;
  const C* start = static_cast<const C*>(problem.start);
  const C* end = static_cast<const C*>(problem.end);
  pointers += steps.row * cells;

  const auto insert = [&](C* list, uint16_t* from, int& kept, C candidate, int cell) {
    if (kept == n && !(candidate > list[n - 1])) return;
    int at = kept < n ? kept++ : n - 1;
    for (; at > 0 && candidate > list[at - 1]; --at) {
      list[at] = list[at - 1];
      from[at] = from[at - 1];
    }
    list[at] = candidate;
    from[at] = uint16_t(cell);
  };

  for (int k = 0; k < L; ++k) {
    const C* before = scores[(k & 1) ^ 1];
    C* now = scores[k & 1];
    const C* edge = transitions.at(steps.position(k));
    for (int own = threadIdx.x; own < N; own += kBestThreads) {
      const C e = emissions.load(steps, k, own);
      if (k == 0) {
        for (int r = 0; r < n; ++r) now[own * n + r] = r ? -INFINITY : (start ? start[own] : C(0)) + e;
        continue;
      }
      int kept = 0;
      for (int i = 0; i < N; ++i) {
        const C move = transitions(edge, i, own);
        for (int r = 0; r < n; ++r)
          insert(now + own * n, origins + own * n, kept, (before[i * n + r] + move) + e, i * n + r);
      }
      for (int r = 0; r < n; ++r) pointers[int64_t(k) * cells + own * n + r] = origins[own * n + r];
    }
    __syncthreads();
  }
  const C* last = scores[(L - 1) & 1];
  C* list = scores[L & 1];
  if (threadIdx.x == 0) {
    int kept = 0;
    for (int cell = 0; L > 0 && cell < cells; ++cell)
      insert(list, origins, kept, last[cell] + (end ? end[cell / n] : C(0)), cell);
    for (int r = 0; r < n; ++r) best_scores[b * n + r] = L > 0 ? list[r] : r ? -INFINITY : C(0);
  }
  __syncthreads();
  for (int r = threadIdx.x; L > 0 && r < n; r += kBestThreads) {
    if (r > 0 && list[r] == -INFINITY) continue;  // no such path
    int64_t* path = paths + (problem.cu_seqlens ? r * problem.steps + steps.row : (b * n + r) * problem.steps);
    int cell = origins[r];
    for (int k = L - 1; k >= 0; --k) {
      path[steps.position(k)] = cell / n;
      if (k > 0) cell = pointers[int64_t(k) * cells + cell];
    }
  }
}

int64_t padded_tags(int64_t tags) { return tags <= 8 ? 8 : tags <= 16 ? 16 : tags <= 32 ? 32 : 64; }

}  // namespace

int64_t crf_viterbi_bytes(const CrfProblem& problem) {
  const int64_t R = rows_of(problem);
  return fits_registers(problem) ? R * padded_tags(problem.tags) : R * problem.tags * int64_t(sizeof(uint16_t));
}

cudaError_t crf_viterbi(const CrfProblem& problem, const CrfSequences& sequences, int64_t* paths, void* scores,
                        void* workspace, cudaStream_t stream) {
  FASTNLP_RETURN_IF_ERROR(cudaMemsetAsync(paths, 0xff, size_t(rows_of(problem)) * sizeof(int64_t), stream));
  if (problem.batch == 0) return cudaSuccess;
  return with_types(problem.emissions_dtype, [&](auto compute, auto emission) {
    using C = type_of<decltype(compute)>;
    using E = type_of<decltype(emission)>;
    const dim3 grid(unsigned(problem.batch));
    if (!fits_registers(problem))
      return launch(crf_viterbi_large_kernel<C, E>, grid, kLargeThreads, stream, problem, sequences,
                    static_cast<uint16_t*>(workspace), paths, static_cast<C*>(scores));
    return with_size<C>(problem.tags, [&](auto size) {
      constexpr int K = decltype(size)::value;
      return launch(crf_viterbi_kernel<C, E, K>, grid, K > 32 ? 64 : 32, stream, problem, sequences,
                    static_cast<uint8_t*>(workspace), paths, static_cast<C*>(scores));
    });
  });
}

int64_t crf_viterbi_n_best_bytes(const CrfProblem& problem, int64_t n) {
  return rows_of(problem) * problem.tags * n * int64_t(sizeof(uint16_t));
}

cudaError_t crf_viterbi_n_best(const CrfProblem& problem, const CrfSequences& sequences, int64_t n, int64_t* paths,
                               void* scores, void* workspace, cudaStream_t stream) {
  FASTNLP_RETURN_IF_ERROR(cudaMemsetAsync(paths, 0xff, size_t(n * rows_of(problem)) * sizeof(int64_t), stream));
  if (problem.batch == 0) return cudaSuccess;
  return with_types(problem.emissions_dtype, [&](auto compute, auto emission) {
    using C = type_of<decltype(compute)>;
    using E = type_of<decltype(emission)>;
    return launch(crf_viterbi_n_best_kernel<C, E>, dim3(unsigned(problem.batch)), kBestThreads, stream, problem,
                  sequences, int(n), static_cast<uint16_t*>(workspace), paths, static_cast<C*>(scores));
  });
}

}  // namespace fastnlp::cuda
