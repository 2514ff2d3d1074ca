// What follows from left messages alone: samples of paths, and the entropy over paths.
#include "crf_parts.cuh"

namespace fastnlp::cuda {
namespace {

constexpr int kSampleWarps = 4;

// One warp per (sample, sequence), from the last step back: tag k ~ exp(message_k + transitions[:, tag k + 1]).
template <typename C>
__global__ void __launch_bounds__(32 * kSampleWarps, 1)
    crf_sample_kernel(CrfProblem problem, CrfSequences sequences, const C* messages, const float* uniforms,
                      int64_t samples, int64_t rows, int64_t* paths) {
  const int64_t index = int64_t(blockIdx.x) * kSampleWarps + threadIdx.x / 32;
  if (index >= samples * problem.batch) return;
  const int64_t b = index % problem.batch;
  const int64_t sample = index / problem.batch;
  const int lane = threadIdx.x % 32;
  const int N = int(problem.tags);
  const Steps steps(problem, sequences, b);
  const Transitions<C> transitions(problem, b, false);
  const C* end = static_cast<const C*>(problem.end);
  int tag = 0;
  for (int k = steps.length - 1; k >= 0; --k) {
    const C* message = messages + (steps.row + k) * N;
    const bool last = k == steps.length - 1;
    const C* edge = transitions.at(last ? 0 : steps.position(k + 1));
    const auto logit = [&](int j) {
      if (j >= N) return C(-INFINITY);
      return message[j] + (last ? (end ? end[j] : C(0)) : transitions(edge, j, tag));
    };
    float top = -INFINITY;
    for (int j0 = 0; j0 < N; j0 += 32) top = max(top, warp_max(float(logit(j0 + lane))));
    top = finite_or_zero(top);
    const auto scan = [&](C p) {  // sum over the lanes up to this one
      for (int delta = 1; delta < 32; delta *= 2) {
        const C below = __shfl_up_sync(kFullWarp, p, delta);
        if (lane >= delta) p += below;
      }
      return p;
    };
    C total = 0;
    int possible = 0;  // rounding must not pick a tag behind the last possible one
    for (int j0 = 0; j0 < N; j0 += 32) {
      const C p = exp(logit(j0 + lane) - top);
      total += __shfl_sync(kFullWarp, scan(p), 31);
      const unsigned some = __ballot_sync(kFullWarp, p > 0);
      if (some) possible = j0 + 31 - __clz(int(some));
    }
    const int position = steps.position(k);
    const C bar = C(uniforms[sample * rows + steps.row + position]) * total;
    C sum = 0;
    int picked = possible;
    for (int j0 = 0; j0 < N; j0 += 32) {
      const C upto = scan(exp(logit(j0 + lane) - top));
      const unsigned above = __ballot_sync(kFullWarp, sum + upto > bar);
      if (above) {
        picked = min(possible, j0 + __ffs(int(above)) - 1);
        break;
      }
      sum += __shfl_sync(kFullWarp, upto, 31);
    }
    tag = picked;
    if (lane == 0) paths[sample * rows + steps.row + position] = tag;
  }
}

constexpr int kEntropyThreads = 256;

// One block per sequence: H_k(j) = sum_i P(i | j) (H_{k-1}(i) - log P(i | j)), the last step being `end`.
template <typename C>
__global__ void __launch_bounds__(kEntropyThreads, 1)
    crf_entropy_kernel(CrfProblem problem, CrfSequences sequences, const C* messages, C* entropy) {
  __shared__ C values[2][kMaxTags];
  __shared__ C logs[kMaxTags];
  const int64_t b = blockIdx.x;
  const int N = int(problem.tags);
  const Steps steps(problem, sequences, b);
  const Transitions<C> transitions(problem, b, false);
  const C* end = static_cast<const C*>(problem.end);
  for (int j = threadIdx.x; j < N; j += kEntropyThreads) values[0][j] = 0;
  for (int k = 1; k <= steps.length; ++k) {
    const bool last = k == steps.length;
    for (int j = threadIdx.x; j < N; j += kEntropyThreads)
      logs[j] = messages[(steps.row + k - 1) * N + j] + (last && end ? end[j] : C(0));
    __syncthreads();
    const C* before = values[(k - 1) & 1];
    const C* edge = transitions.at(last ? 0 : steps.position(k));
    for (int j = threadIdx.x; j < (last ? 1 : N); j += kEntropyThreads) {
      const auto logit = [&](int i) { return logs[i] + (last ? C(0) : transitions(edge, i, j)); };
      C top = -INFINITY;
      for (int i = 0; i < N; ++i) top = logit(i) > top ? logit(i) : top;
      if (top == -INFINITY) top = 0;
      C sum = 0;
      for (int i = 0; i < N; ++i) sum += exp(logit(i) - top);
      const C log_sum = log(sum);
      C value = 0;
      for (int i = 0; i < N; ++i) {
        const C log_p = logit(i) - top - log_sum;
        // Nothing leads here (sum 0), or not from i: no share. NaN goes through.
        if (sum != 0 && !(log_p == -INFINITY)) value += exp(log_p) * (before[i] - log_p);
      }
      values[k & 1][j] = value;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) entropy[b] = steps.length > 0 ? values[steps.length & 1][0] : C(0);
}

}  // namespace

cudaError_t crf_sample(const CrfProblem& problem, const CrfSequences& sequences, const void* messages,
                       const float* uniforms, int64_t samples, int64_t* paths, cudaStream_t stream) {
  const int64_t rows = rows_of(problem);
  FASTNLP_RETURN_IF_ERROR(cudaMemsetAsync(paths, 0xff, size_t(samples * rows) * sizeof(int64_t), stream));
  if (problem.batch == 0 || samples == 0) return cudaSuccess;
  const dim3 grid(unsigned(ceil_div(samples * problem.batch, kSampleWarps)));
  if (problem.emissions_dtype == DType::f64)
    return launch(crf_sample_kernel<double>, grid, 32 * kSampleWarps, stream, problem, sequences,
                  static_cast<const double*>(messages), uniforms, samples, rows, paths);
  return launch(crf_sample_kernel<float>, grid, 32 * kSampleWarps, stream, problem, sequences,
                static_cast<const float*>(messages), uniforms, samples, rows, paths);
}

cudaError_t crf_entropy(const CrfProblem& problem, const CrfSequences& sequences, const void* messages, void* entropy,
                        cudaStream_t stream) {
  if (problem.batch == 0) return cudaSuccess;
  const dim3 grid(unsigned(problem.batch));
  if (problem.emissions_dtype == DType::f64)
    return launch(crf_entropy_kernel<double>, grid, kEntropyThreads, stream, problem, sequences,
                  static_cast<const double*>(messages), static_cast<double*>(entropy));
  return launch(crf_entropy_kernel<float>, grid, kEntropyThreads, stream, problem, sequences,
                static_cast<const float*>(messages), static_cast<float*>(entropy));
}

}  // namespace fastnlp::cuda
