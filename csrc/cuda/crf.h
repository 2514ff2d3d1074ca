// Launchers of the CUDA kernels of the crf family: plain pointers and a stream. C is the compute type (double where the
// emissions are double, else float). Every launcher returns the first launch error; none synchronises. Workspaces are
// raw device memory of the size that the function beside the launcher names (0 bytes: null is fine), aligned to 256
// bytes.
#pragma once
#include "../crf.h"
#ifndef FASTNLP_EMULATION
#include <cuda_runtime_api.h>
#endif

namespace fastnlp::cuda {

constexpr int64_t kMaxTags = 1024;
constexpr int64_t kMaxBestCells = 2048;  // N * n_best
constexpr int64_t kChunk = 256;          // steps of a chunk of the long-sequence path

// Rows of `messages` for R = B * T (or total) rows of emissions; the extra rows hold chunk boundaries.
inline int64_t crf_message_rows(int64_t rows) { return rows + 2 * (rows / kChunk); }

// Whether a call takes the long-sequence path: by shape only, the same for forward and backward.
bool crf_chunked(const CrfProblem& problem);

// Valid steps, found on the device; every launcher below takes the result. Without a mask there is nothing to find.
struct CrfSequences {
  const int32_t* lengths = nullptr;    // [B]
  const int32_t* positions = nullptr;  // [B, T], the valid steps in order
};
int64_t crf_sequences_bytes(const CrfProblem& problem);
cudaError_t crf_find_sequences(const CrfProblem& problem, void* workspace, CrfSequences* found, cudaStream_t stream);

struct CrfForward {
  const int64_t* tags = nullptr;  // null: log partition; else log-likelihood
  void* messages = nullptr;       // C [crf_message_rows, N], or null where no gradient will be asked for
  void* output = nullptr;         // C [B], or null
  bool chunked = false;
  // Walk every step from the left and do not meet in the middle: all messages are left messages (sampling, entropy).
  bool left_only = false;
};
int64_t crf_forward_bytes(const CrfProblem& problem, const CrfForward& call);
cudaError_t crf_forward(const CrfProblem& problem, const CrfSequences& sequences, const CrfForward& call,
                        void* workspace, cudaStream_t stream);

// With counts c (of the gold path, 0 without tags) and marginals p, every gradient is grad * (c - p) with tags, grad *
// p without.
struct CrfBackward {
  const void* grad = nullptr;      // C [B]
  const void* messages = nullptr;  // as the forward call left them
  const int64_t* tags = nullptr;
  void* demissions = nullptr;    // emissions' type [R, N]
  void* dtransitions = nullptr;  // C [N, N] or [B, T-1, N, N], null: not wanted
  void* dstart = nullptr;        // C [N], never null
  void* dend = nullptr;          // C [N], never null
  bool chunked = false;
};
int64_t crf_backward_bytes(const CrfProblem& problem, const CrfBackward& call);
cudaError_t crf_backward(const CrfProblem& problem, const CrfSequences& sequences, const CrfBackward& call,
                         void* workspace, cudaStream_t stream);

// paths int64 [R], -1 at masked steps; scores C [B].
int64_t crf_viterbi_bytes(const CrfProblem& problem);
cudaError_t crf_viterbi(const CrfProblem& problem, const CrfSequences& sequences, int64_t* paths, void* scores,
                        void* workspace, cudaStream_t stream);

// paths int64 [B, n, T] ([n, total] where packed), scores C [B, n]; N * n at most kMaxBestCells.
int64_t crf_viterbi_n_best_bytes(const CrfProblem& problem, int64_t n);
cudaError_t crf_viterbi_n_best(const CrfProblem& problem, const CrfSequences& sequences, int64_t n, int64_t* paths,
                               void* scores, void* workspace, cudaStream_t stream);

// Both read messages that crf_forward left with left_only. uniforms float [S, R], paths int64 [S, R], entropy C [B].
cudaError_t crf_sample(const CrfProblem& problem, const CrfSequences& sequences, const void* messages,
                       const float* uniforms, int64_t samples, int64_t* paths, cudaStream_t stream);
cudaError_t crf_entropy(const CrfProblem& problem, const CrfSequences& sequences, const void* messages, void* entropy,
                        cudaStream_t stream);

}  // namespace fastnlp::cuda
