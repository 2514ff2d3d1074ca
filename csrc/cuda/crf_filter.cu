// Forward pass for up to 64 tags: log partition or log-likelihood, and the messages that the backward pass starts from.
#include "crf_parts.cuh"

namespace fastnlp::cuda {
namespace {

constexpr int kFindWarps = 4;

// One warp per sequence packs the valid steps. Eight loads are in flight at once: a mask is read at memory latency.
__global__ void __launch_bounds__(32 * kFindWarps, 1)
    crf_find_sequences_kernel(const Bool* mask, int64_t batch, int64_t steps, int32_t* lengths, int32_t* positions) {
  constexpr int kLoads = 8;
  const int64_t b = int64_t(blockIdx.x) * kFindWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (b >= batch) return;
  int32_t found = 0;
  for (int64_t t0 = 0; t0 < steps; t0 += 32 * kLoads) {
    bool on[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64_t t = t0 + u * 32 + lane;
      on[u] = t < steps && mask[b * steps + t];
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const unsigned all = __ballot_sync(kFullWarp, on[u]);
      if (on[u]) positions[b * steps + found + __popc(all & ((1u << lane) - 1))] = int32_t(t0 + u * 32 + lane);
      found += __popc(all);
    }
  }
  if (lane == 0) lengths[b] = found;
}

// One block per segment: a team of 32 (64) threads walks from each end, they meet in the middle. messages afterwards
// hold the left messages below the middle, the logarithm of the marginals at it, and the right messages beyond: all
// that the backward pass needs, normalised so that it has no use for log Z.
template <typename C, typename E, int K>
__global__ void __launch_bounds__(2 * Chain<C, K>::team, 1)
    crf_filter_kernel(CrfProblem problem, CrfSequences sequences, CrfForward call, int64_t chunks) {
  constexpr int team = Chain<C, K>::team;
  __shared__ ChainShared<C, K> shared[2];
  __shared__ C meeting[team];
  __shared__ double meeting_offset;
  __shared__ double parts[2 * team / 32];

  const int64_t b = blockIdx.x / chunks;
  const Steps steps(problem, sequences, b);
  Segment segment(problem, steps, blockIdx.x % chunks, chunks > 1);
  C* output = static_cast<C*>(call.output);
  C* messages = static_cast<C*>(call.messages);
  if (segment.first >= segment.end) {
    if (output && steps.length == 0 && threadIdx.x == 0) output[b] = 0;
    return;
  }
  if (call.left_only) segment.middle = segment.end;

  const bool right = threadIdx.x >= team;
  const int own = threadIdx.x % team;
  const int N = int(problem.tags);
  double gold = 0;
  if (call.tags) gold = gold_part<C, E>(problem, steps, b, call.tags, segment.first, segment.end);

  Chain<C, K> chain(shared[right], problem, b, right, own);
  const bool whole = right ? segment.ends : segment.starts;
  const C* score = static_cast<const C*>(right ? problem.end : problem.start);
  if (!whole) score = messages + (right ? segment.right_boundary : segment.left_boundary) * N;
  const C initial = own >= N ? -INFINITY : score ? score[own] : 0;
  walk<C, E>(chain, problem, steps, b, right ? segment.end - 1 : segment.first, right,
             right ? segment.end - segment.middle : segment.middle - segment.first, initial, !right && !whole, messages,
             segment.middle);
  if (call.left_only) return;

  // The join is one more step of the left chain, with the right message for an emission.
  if (right) {
    meeting[own] = chain.a;
    if (own == 0) meeting_offset = chain.offset;
  }
  if (call.tags)
    gold = sum_parts(gold, parts);
  else
    __syncthreads();
  if (right) return;
  if (segment.middle == 0)
    chain.begin(initial + meeting[own], 0);
  else
    chain.step(meeting[own], 0, steps.position(segment.middle));
  const C log_sum = chain.log_sum();
  if (messages && own < N) {
    C log_marginal = log_sum == -INFINITY ? log_sum : chain.a - log_sum;
    if (gold != gold) log_marginal = NAN;
    messages[(steps.row + segment.middle) * N + own] = log_marginal;
  }
  if (output && own == 0)
    output[b] = C(forward_value(call.tags != nullptr, gold, chain.offset + meeting_offset + double(log_sum)));
}

}  // namespace

int64_t crf_sequences_bytes(const CrfProblem& problem) {
  Workspace space{nullptr};
  if (problem.mask) {
    space.take<int32_t>(problem.batch);
    space.take<int32_t>(problem.batch * problem.steps);
  }
  return space.used;
}

cudaError_t crf_find_sequences(const CrfProblem& problem, void* workspace, CrfSequences* found, cudaStream_t stream) {
  *found = CrfSequences();
  if (!problem.mask || problem.batch == 0 || problem.steps == 0) return cudaSuccess;
  Workspace space{static_cast<char*>(workspace)};
  int32_t* lengths = space.take<int32_t>(problem.batch);
  int32_t* positions = space.take<int32_t>(problem.batch * problem.steps);
  *found = CrfSequences{lengths, positions};
  return launch(crf_find_sequences_kernel, dim3(unsigned(ceil_div(problem.batch, kFindWarps))), 32 * kFindWarps, stream,
                problem.mask, problem.batch, problem.steps, lengths, positions);
}

// The scan does N times the arithmetic of a walk, spread over the card: with B * N <= 256 it fits beside itself on 132
// SMs, and from 2048 steps on its depth (about 256 + T/256 + 128 steps against T/2) pays for three more launches.
bool crf_chunked(const CrfProblem& problem) {
  const int64_t batch = problem.batch > 0 ? problem.batch : 1;
  const int64_t steps = rows_of(problem) / batch;
  const bool one_warp = problem.tags <= 32 && fits_registers(problem);
  return one_warp && !problem.transitions_per_position && batch * problem.tags <= 256 && steps >= 2048;
}

int64_t crf_forward_bytes(const CrfProblem& problem, const CrfForward& call) {
  if (!fits_registers(problem)) return crf_large_forward_bytes(problem, call);
  return call.chunked ? crf_scan_bytes(problem) : 0;
}

cudaError_t crf_forward(const CrfProblem& problem, const CrfSequences& sequences, const CrfForward& call,
                        void* workspace, cudaStream_t stream) {
  if (problem.batch == 0) return cudaSuccess;
  if (!fits_registers(problem)) return crf_large_forward(problem, sequences, call, workspace, stream);
  CrfForward filter = call;
  if (call.chunked) {
    FASTNLP_RETURN_IF_ERROR(crf_scan(problem, sequences, call, workspace, stream));
    if (!call.messages) return cudaSuccess;
    filter.output = nullptr;
  }
  const int64_t chunks = chunks_of(problem, call.chunked);
  return with_types(problem.emissions_dtype, [&](auto compute, auto emission) {
    using C = type_of<decltype(compute)>;
    using E = type_of<decltype(emission)>;
    return with_size<C>(problem.tags, [&](auto size) {
      constexpr int K = decltype(size)::value;
      return launch(crf_filter_kernel<C, E, K>, dim3(unsigned(problem.batch * chunks)), 2 * Chain<C, K>::team, stream,
                    problem, sequences, filter, chunks);
    });
  });
}

}  // namespace fastnlp::cuda
