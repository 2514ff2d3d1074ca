// Few long sequences: chunks of 256 steps become matrices side by side (depth 256), a walk over the chunks gives the
// messages at their boundaries (depth T / 256), and then every chunk is a sequence of its own (depth 128).
#include "crf_parts.cuh"

namespace fastnlp::cuda {
namespace {

constexpr int kTransferWarps = 4;

// One warp per (sequence, chunk, tag before the chunk): row `before` of the chunk's log transfer matrix, which runs
// from the step before the chunk to the chunk's last step. A row is exp(scale) times what is stored. The first chunk
// has no step before it: its row 0 is the message of its last step.
template <typename C, typename E, int K>
__global__ void __launch_bounds__(32 * kTransferWarps, 1)
    crf_transfer_kernel(CrfProblem problem, CrfSequences sequences, int64_t chunks, C* transfer, double* scales) {
  __shared__ ChainShared<C, K> shared[kTransferWarps];
  const int warp = threadIdx.x / 32;
  const int own = threadIdx.x % 32;
  const int N = int(problem.tags);
  const int64_t row = int64_t(blockIdx.x) * kTransferWarps + warp;
  if (row >= problem.batch * chunks * N) return;
  const int before = int(row % N);
  const int64_t b = row / N / chunks;
  const Steps steps(problem, sequences, b);
  const Segment segment(problem, steps, row / N % chunks, true);
  if (segment.first >= segment.end || (segment.starts && before > 0)) return;

  Chain<C, K> chain(shared[warp], problem, b, false, own);
  C initial = -INFINITY;
  if (own < N && segment.starts) initial = problem.start ? static_cast<const C*>(problem.start)[own] : 0;
  if (own == before && !segment.starts) initial = 0;
  walk<C, E, K>(chain, problem, steps, b, segment.first, false, segment.end - segment.first, initial, !segment.starts,
                nullptr, -1);
  if (own < N) transfer[row * N + own] = chain.a;
  if (own == 0) scales[row] = chain.offset;
}

template <typename C, typename E>
__global__ void __launch_bounds__(kChunk, 1)
    crf_gold_kernel(CrfProblem problem, CrfSequences sequences, int64_t chunks, const int64_t* tags, double* gold) {
  __shared__ double parts[kChunk / 32];
  const int64_t b = blockIdx.x / chunks;
  const Steps steps(problem, sequences, b);
  const Segment segment(problem, steps, blockIdx.x % chunks, true);
  const double sum = sum_parts(gold_part<C, E>(problem, steps, b, tags, segment.first, segment.end), parts);
  if (threadIdx.x == 0) gold[blockIdx.x] = sum;
}

// The widest register kernel (fits_registers), within a warp.
template <typename C>
constexpr int kWidth = sizeof(C) == 8 ? 16 : 32;

// log sum exp over i of v[i] + m[i]
template <typename C>
__device__ C log_dot(const C* v, C (&m)[kWidth<C>]) {
  C top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kWidth<C>; ++i) {
    m[i] += v[i];
    top = m[i] > top ? m[i] : top;
  }
  if (top == -INFINITY) top = 0;
  C sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth<C>; ++i) sum += exp(m[i] - top);
  return top + log(sum);
}

// One block per sequence: warp 0 carries the left message over the chunks, warp 1 the right one. The next chunk's
// matrix is fetched while this one is used.
template <typename C>
__global__ void __launch_bounds__(64, 1)
    crf_boundary_kernel(CrfProblem problem, CrfSequences sequences, int64_t chunks, const C* transfer,
                        const double* scales, const double* gold_parts, C* messages, C* output) {
  __shared__ double parts[2];
  __shared__ C vectors[2][32];
  const int64_t b = blockIdx.x;
  const Steps steps(problem, sequences, b);
  const int N = int(problem.tags);
  const int used = int(ceil_div(steps.length, kChunk));
  double gold = 0;
  if (gold_parts) {
    for (int c = threadIdx.x; c < used; c += 64) gold += gold_parts[b * chunks + c];
    gold = sum_parts(gold, parts);
  }
  if (used == 0) {
    if (threadIdx.x == 0) output[b] = 0;
    return;
  }
  const bool right = threadIdx.x >= 32;
  const int own = threadIdx.x % 32;
  C* vector = vectors[right];
  const int64_t rows = problem.cu_seqlens ? problem.steps : problem.batch * problem.steps;
  C* boundaries = messages ? messages + (rows + 2 * (steps.row / kChunk) + right) * N : nullptr;
  transfer += b * chunks * N * N;
  scales += b * chunks * N;

  C state = -INFINITY;  // of tag own
  double offset = 0;
  if (own < N && !right) state = transfer[own];
  if (own < N && right) state = problem.end ? static_cast<const C*>(problem.end)[own] : 0;
  if (!right) offset = scales[0];

  C matrix[kWidth<C>], coming[kWidth<C>];
  double scale = 0, coming_scale = 0;
  const auto fetch = [&](int t) {  // t-th chunk on the way: 1, 2, ... or last, last - 1, ...
    const int64_t c = right ? used - t : t;
    const C* from = transfer + c * N * N + (right ? own * N : own);
    const int stride = right ? 1 : N;
    const bool real = t < used && own < N;
#pragma unroll
    for (int i = 0; i < kWidth<C>; ++i) coming[i] = real && i < N ? from[i * stride] : -INFINITY;
    coming_scale = t < used && own < N ? scales[c * N + own] : 0;
  };
  fetch(1);
#pragma unroll 1
  for (int t = 1; t < used; ++t) {
    if (!right && boundaries && own < N) boundaries[int64_t(t - 1) * 2 * N + own] = gold == gold ? state : C(NAN);
#pragma unroll
    for (int i = 0; i < kWidth<C>; ++i) matrix[i] = coming[i];
    scale = coming_scale;
    fetch(t + 1);
    // The scale belongs to the tag before the chunk: it is added before the sum going right, after it going left.
    double moved = right ? double(state) : double(state) + scale;
    float top = finite_or_zero(warp_max(float(moved)));
    vector[own] = C(moved - top);
    offset += top;
    __syncwarp();
    state = log_dot(vector, matrix);
    moved = right ? double(state) + scale : double(state);
    top = finite_or_zero(warp_max(float(moved)));
    state = C(moved - top);
    offset += top;
    __syncwarp();
    if (right && boundaries && own < N) boundaries[int64_t(used - t - 1) * 2 * N + own] = gold == gold ? state : C(NAN);
  }
  if (right) return;
  const C last = own < N ? state + (problem.end ? static_cast<const C*>(problem.end)[own] : C(0)) : C(-INFINITY);
  const float top = finite_or_zero(warp_max(float(last)));
  const C sum = warp_sum(own < N ? exp(last - top) : C(0));
  if (own == 0) output[b] = C(forward_value(gold_parts != nullptr, gold, offset + top + double(log(sum))));
}

template <typename C>
struct ScanSpace {
  C* transfer;
  double *scales, *gold;
  ScanSpace(const CrfProblem& problem, Workspace& space) {
    const int64_t segments = problem.batch * chunks_of(problem, true);
    transfer = space.take<C>(segments * problem.tags * problem.tags);
    scales = space.take<double>(segments * problem.tags);
    gold = space.take<double>(segments);
  }
};

}  // namespace

int64_t crf_scan_bytes(const CrfProblem& problem) {
  Workspace space{nullptr};
  if (problem.emissions_dtype == DType::f64)
    ScanSpace<double>(problem, space);
  else
    ScanSpace<float>(problem, space);
  return space.used;
}

cudaError_t crf_scan(const CrfProblem& problem, const CrfSequences& sequences, const CrfForward& call, void* workspace,
                     cudaStream_t stream) {
  const int64_t chunks = chunks_of(problem, true);
  return with_types(problem.emissions_dtype, [&](auto compute, auto emission) {
    using C = type_of<decltype(compute)>;
    using E = type_of<decltype(emission)>;
    Workspace space{static_cast<char*>(workspace)};
    const ScanSpace<C> scan(problem, space);
    FASTNLP_RETURN_IF_ERROR(with_size<C>(problem.tags, [&](auto size) {
      constexpr int K = decltype(size)::value;
      if constexpr (K > 32) {
        return cudaError_t(cudaErrorInvalidValue);
      } else {
        const int64_t blocks = ceil_div(problem.batch * chunks * problem.tags, kTransferWarps);
        return launch(crf_transfer_kernel<C, E, K>, dim3(unsigned(blocks)), 32 * kTransferWarps, stream, problem,
                      sequences, chunks, scan.transfer, scan.scales);
      }
    }));
    if (call.tags)
      FASTNLP_RETURN_IF_ERROR(launch(crf_gold_kernel<C, E>, dim3(unsigned(problem.batch * chunks)), int(kChunk), stream,
                                     problem, sequences, chunks, call.tags, scan.gold));
    return launch(crf_boundary_kernel<C>, dim3(unsigned(problem.batch)), 64, stream, problem, sequences, chunks,
                  static_cast<const C*>(scan.transfer), static_cast<const double*>(scan.scales),
                  static_cast<const double*>(call.tags ? scan.gold : nullptr), static_cast<C*>(call.messages),
                  static_cast<C*>(call.output));
  });
}

}  // namespace fastnlp::cuda
