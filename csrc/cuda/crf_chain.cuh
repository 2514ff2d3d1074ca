// The recurrence of the small kernels (N <= 64) and the ways to find a sequence's steps, shared by all crf kernels.
#pragma once
#include "crf.h"
#include "device.cuh"

namespace fastnlp::cuda {

__device__ inline int64_t clamp64(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// One sequence's valid steps. `row` is the first row of its contiguous outputs; step k of it is row + position(k).
// Messages are stored by k, without holes.
struct Steps {
  int64_t row;
  int length;
  const int32_t* positions;  // null: k itself

  __device__ Steps(const CrfProblem& problem, const CrfSequences& sequences, int64_t b) {
    positions = nullptr;
    if (problem.cu_seqlens) {  // clamped, so that no value can lead outside the tensors
      row = clamp64(problem.cu_seqlens[b], 0, problem.steps);
      length = int(clamp64(problem.cu_seqlens[b + 1], row, problem.steps) - row);
    } else {
      row = b * problem.steps;
      length = sequences.lengths ? sequences.lengths[b] : int(problem.steps);
      if (sequences.positions) positions = sequences.positions + row;
    }
  }
  __device__ int position(int k) const { return positions ? positions[k] : k; }
};

template <typename E>
struct Emissions {
  const E* first;
  int64_t stride;
  __device__ Emissions(const CrfProblem& problem, const Steps& steps, int64_t b) {
    stride = problem.emissions_step_stride;
    first = static_cast<const E*>(problem.emissions) +
            (problem.cu_seqlens ? steps.row * stride : b * problem.emissions_batch_stride);
  }
  __device__ auto load(const Steps& steps, int k, int tag) const {
    return upcast(first[steps.position(k) * stride + tag]);
  }
};

// A sequence, or one chunk of it: steps first .. end - 1; the chains meet on the edge that enters `middle`. Where the
// sequence's own start (end) is elsewhere, the message of the step before (the log weight of all that follows) stands
// in.
struct Segment {
  int first, end, middle;
  bool starts, ends;
  int64_t left_boundary, right_boundary;  // rows of messages

  __device__ Segment(const CrfProblem& problem, const Steps& steps, int64_t chunk, bool chunked) {
    const int64_t rows = problem.cu_seqlens ? problem.steps : problem.batch * problem.steps;
    first = chunked ? int(chunk * kChunk < steps.length ? chunk * kChunk : steps.length) : 0;
    end = chunked && steps.length - first > kChunk ? first + int(kChunk) : steps.length;
    middle = first + (end - first) / 2;
    starts = first == 0;
    ends = end == steps.length;
    right_boundary = rows + 2 * (steps.row / kChunk + chunk) + 1;
    left_boundary = right_boundary - 3;  // the slot of the chunk before
  }
};

inline int64_t rows_of(const CrfProblem& problem) {
  return problem.cu_seqlens ? problem.steps : problem.batch * problem.steps;
}
inline int64_t chunks_of(const CrfProblem& problem, bool chunked) {
  return chunked ? ceil_div(problem.steps > 0 ? problem.steps : 1, kChunk) : 1;
}

// Transitions as one chain sees them: `own` is the tag whose column a thread holds, `other` the tag summed over. The
// left chain sums over `from`, the right chain over `to`; nothing else tells them apart.
template <typename C>
struct Transitions {
  const C* matrix;
  int64_t other_stride, own_stride, step_stride;
  __device__ Transitions(const CrfProblem& problem, int64_t b, bool right) {
    matrix = static_cast<const C*>(problem.transitions) + b * problem.transitions_batch_stride;
    step_stride = problem.transitions_step_stride;
    other_stride = right ? problem.transitions_to_stride : problem.transitions_from_stride;
    own_stride = right ? problem.transitions_from_stride : problem.transitions_to_stride;
  }
  // `entered`: the position of the later step of the edge.
  __device__ const C* at(int entered) const { return matrix + (entered > 0 ? entered - 1 : 0) * step_stride; }
  __device__ C operator()(const C* edge, int other, int own) const {
    return edge[other * other_stride + own * own_stride];
  }
};

// log sum exp over `other` of logs + transitions; -inf where nothing leads here, never NaN for want of a maximum.
template <typename C>
__device__ C exact_column(const Transitions<C>& transitions, const C* edge, const C* logs, int64_t logs_stride, int own,
                          int tags) {
  C top = -INFINITY;
#pragma unroll 1
  for (int i = 0; i < tags; ++i) {
    const C x = logs[i * logs_stride] + transitions(edge, i, own);
    if (x > top) top = x;
  }
  if (top == -INFINITY) top = 0;
  C sum = 0;
#pragma unroll 1
  for (int i = 0; i < tags; ++i) sum += exp(logs[i * logs_stride] + transitions(edge, i, own) - top);
  return top + log(sum);
}

// Score of the gold path over steps first .. end - 1 (edges that enter them included); NaN where a tag is out of range.
// Every thread of the block brings its part; the parts are added in a fixed order by `sum_parts`.
template <typename C, typename E>
__device__ double gold_part(const CrfProblem& problem, const Steps& steps, int64_t b, const int64_t* tags, int first,
                            int end) {
  const Emissions<E> emissions(problem, steps, b);
  const Transitions<C> transitions(problem, b, false);
  const int N = int(problem.tags);
  double sum = 0;
  for (int k = first + int(threadIdx.x); k < end; k += int(blockDim.x)) {
    const int position = steps.position(k);
    const int64_t tag = tags[steps.row + position];
    const int64_t before = k > 0 ? tags[steps.row + steps.position(k - 1)] : 0;
    if (uint64_t(tag) >= uint64_t(N) || uint64_t(before) >= uint64_t(N)) {
      sum = NAN;
      continue;
    }
    sum += emissions.load(steps, k, int(tag));
    if (k > 0) sum += transitions(transitions.at(position), int(before), int(tag));
    if (k == 0 && problem.start) sum += static_cast<const C*>(problem.start)[tag];
    if (k == steps.length - 1 && problem.end) sum += static_cast<const C*>(problem.end)[tag];
  }
  return sum;
}

// Sum over the block in a fixed order, known to every thread. Holds barriers.
__device__ inline double sum_parts(double part, double* parts /* [warps] */) {
  part = warp_sum(part);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = part;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) sum += parts[warp];
  __syncthreads();
  return sum;
}

// log Z -> the value of the op. A sequence without any path has log-likelihood -inf; a bad tag gives NaN.
__device__ inline double forward_value(bool likelihood, double gold, double log_partition) {
  if (!likelihood) return log_partition;
  return log_partition == -INFINITY && gold == gold ? log_partition : gold - log_partition;
}

template <typename C, int K>
struct ChainShared {
  static constexpr int width = K < 32 ? 32 : K;  // lanes beyond K write zeros that nobody reads
  alignas(16) C p[2][width];
  C logs[width];
  float exchange[4];
  float shift[2][2];
  int top[2][2];
  C sums[2];
};

// A left or right chain, walked by a team of 32 threads (64 for K = 64), one tag a thread. The state is kept twice: as
// p = exp(a) for the next step's sums, and as a, its logarithm, for the guard and for storing; both relative to
// `offset`. p never passes through the logarithm: p' = s * exp(e + c - shift) * 2^-lift, so a step's critical path is
// broadcast, K multiply-adds, two products. `shift` (the largest e + c of the step) does not depend on the state,
// `lift` (the exponent of p two steps ago) lags; any shift is exact as long as p stays below N^2 (it does) and sums
// below Numbers::tiny are recomputed from the logarithms.
template <typename C, int K>
struct Chain {
  static constexpr int warps = K > 32 ? 2 : 1;
  static constexpr int team = 32 * warps;
  using Math = Numbers<C>;

  ChainShared<C, K>& shared;
  const Transitions<C> transitions;
  const int tags, own, barrier;
  C edges[K];  // exp(transitions - column), 0 where there is none
  C column;    // the largest transition into own; -inf where nothing leads here
  C a, p;
  double offset = 0;
  float shift = 0;
  int lift = 0, parity = 0;
  bool per_position;

  __device__ Chain(ChainShared<C, K>& shared, const CrfProblem& problem, int64_t b, bool right, int thread)
      : shared(shared),
        transitions(problem, b, right),
        tags(int(problem.tags)),
        own(thread),
        barrier(1 + right),
        per_position(problem.transitions_per_position) {
    column = -INFINITY;
    const C* edge = transitions.at(0);
#pragma unroll
    for (int i = 0; i < K; ++i)
      edges[i] = i < tags && own < tags && !per_position ? transitions(edge, i, own) : -INFINITY;
#pragma unroll
    for (int i = 0; i < K; ++i) column = edges[i] > column ? edges[i] : column;
    if (per_position && own < tags) column = 0;
#pragma unroll
    for (int i = 0; i < K; ++i) edges[i] = edges[i] == -INFINITY ? C(0) : exp(edges[i] - column);
  }

  __device__ bool sync_or(bool value) {
    if (warps > 1) return named_barrier_or(barrier, team, value);
    __syncwarp();
    return __any_sync(kFullWarp, value);
  }
  __device__ void sync() {
    if (warps > 1)
      named_barrier_or(barrier, team, false);
    else
      __syncwarp();
  }
  __device__ float team_max(C x) {
    float top = warp_max(float(x));
    if (warps > 1) {
      if (own % 32 == 0) shared.exchange[own / 32] = top;
      sync();
      top = max(shared.exchange[0], shared.exchange[1]);
      sync();
    }
    return top;
  }
  __device__ C team_sum(C x) {
    x = warp_sum(x);
    if (warps > 1) {
      if (own % 32 == 0) shared.sums[own / 32] = x;
      sync();
      x = shared.sums[0] + shared.sums[1];
      sync();
    }
    return x;
  }

  __device__ C dot(const C* vector) const {
    C sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < K; i += Pack<C>::size) {
      const Pack<C> pack = *reinterpret_cast<const Pack<C>*>(vector + i);
#pragma unroll
      for (int u = 0; u < Pack<C>::size; ++u) sums[(i + u) % 4] += pack.value[u] * edges[i + u];
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // Makes `logs` the state, its maximum 0. `next`: the emission of the coming step.
  __device__ void begin(C logs, C next) {
    const float top = finite_or_zero(team_max(logs));
    a = logs - top;
    p = exp(a);
    offset += top;
    lift = 0;
    shift = finite_or_zero(team_max(next + column));
    shared.p[parity][own] = p;
    sync();
  }

  // One step along the edge that enters position `entered`, with emission e; `next` is the emission after it.
  __device__ void step(C e, C next, int entered) {
    const int top = __reduce_max_sync(kFullWarp, Math::magnitude(p));
    const float next_shift = warp_max(float(next + column));
    const C s = dot(shared.p[parity]);
    const C d = e + column - shift;  // at most 0, up to the rounding of shift
    const C before = a;
    a = log(s) + (d - lift * Math::ln2);
    p = s * (exp(d) * Math::power_of_two(-lift));
    const bool lost = per_position ? own < tags : s < Math::tiny && d > -INFINITY;
    parity ^= 1;
    shared.p[parity][own] = p;
    if (warps > 1 && own % 32 == 0) {
      shared.shift[parity][own / 32] = next_shift;
      shared.top[parity][own / 32] = top;
    }
    const bool any = sync_or(lost);
    const double moved = double(shift) + lift * Numbers<double>::ln2;
    offset += moved;
    shift = finite_or_zero(warps > 1 ? max(shared.shift[parity][0], shared.shift[parity][1]) : next_shift);
    const int exponent = Math::exponent(warps > 1 ? max(shared.top[parity][0], shared.top[parity][1]) : top);
    // top was read before this step's lift took hold, hence the difference; 128 and above: inf or NaN, -127 and below:
    // 0.
    lift = exponent > 120 || exponent < -120 ? 0 : min(max(exponent - lift, -120), 120);
    if (any) repair(before, lost, e - C(moved), entered);
  }

  // Columns whose sum underflowed, from the logarithms; then the state's maximum is made 0.
  __device__ void repair(C before, bool lost, C e, int entered) {
    shared.logs[own] = before;
    sync();
    if (lost) a = exact_column(transitions, transitions.at(entered), shared.logs, 1, own, tags) + e;
    const float top = finite_or_zero(team_max(a));
    a -= top;
    p = exp(a);
    offset += top;
    lift = 0;
    shared.p[parity][own] = p;
    sync();
  }

  // log sum exp of the state, without offset.
  __device__ C log_sum() {
    const float top = finite_or_zero(team_max(a));
    return top + log(team_sum(exp(a - top)));
  }
};

// Walks `count` steps from step `origin` on, leftwards or rightwards. `initial` is what stands before the first step: a
// start (or end) score that needs no edge, or, `by_edge`, the message of the step before. Messages of all steps but
// `skip` are stored. Emissions are fetched kAhead steps early: 8 steps of about 80 ns cover a read from DRAM.
template <typename C, typename E, int K>
__device__ void walk(Chain<C, K>& chain, const CrfProblem& problem, const Steps& steps, int64_t b, int origin,
                     bool right, int count, C initial, bool by_edge, C* messages, int skip) {
  constexpr int kAhead = K > 32 ? 4 : 8;
  const Emissions<E> emissions(problem, steps, b);
  const int sign = right ? -1 : 1;
  const bool real = chain.own < chain.tags;
  const auto fetch = [&](int t) {
    return real && t < count ? C(emissions.load(steps, origin + sign * t, chain.own)) : C(0);
  };
  C ring[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) ring[u] = fetch(u);
  if (by_edge) chain.begin(initial, ring[0]);
  for (int t0 = 0; t0 < count; t0 += kAhead) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int t = t0 + u;
      if (t < count) {
        const C e = ring[u];
        const C next = ring[(u + 1) % kAhead];
        ring[u] = fetch(t + kAhead);
        const int k = origin + sign * t;
        if (t == 0 && !by_edge)
          chain.begin(initial + e, next);
        else
          chain.step(e, next, chain.per_position ? steps.position(right ? k + 1 : k) : 0);
        if (messages && real && k != skip) messages[(steps.row + k) * chain.tags + chain.own] = chain.a;
      }
    }
  }
}

}  // namespace fastnlp::cuda
