#include "crf_parts.cuh"
namespace fastnlp::cuda {
int64_t crf_large_forward_bytes(const CrfProblem& problem, const CrfForward& call){return 0;}
cudaError_t crf_large_forward(const CrfProblem& problem, const CrfSequences& sequences, const CrfForward& call, void* workspace, cudaStream_t stream){return 1;}
int64_t crf_large_backward_bytes(const CrfProblem& problem, const CrfBackward& call){return 0;}
cudaError_t crf_large_backward(const CrfProblem& problem, const CrfSequences& sequences, const CrfBackward& call, void* workspace, cudaStream_t stream){return 1;}
int64_t crf_viterbi_bytes(const CrfProblem& problem){return 0;}
cudaError_t crf_viterbi(const CrfProblem& problem, const CrfSequences& sequences, int64_t* paths, void* scores, void* workspace, cudaStream_t stream){return 1;}
int64_t crf_viterbi_n_best_bytes(const CrfProblem& problem, int64_t n){return 0;}
cudaError_t crf_viterbi_n_best(const CrfProblem& problem, const CrfSequences& sequences, int64_t n, int64_t* paths, void* scores, void* workspace, cudaStream_t stream){return 1;}
cudaError_t crf_sample(const CrfProblem& problem, const CrfSequences& sequences, const void* messages, const float* uniforms, int64_t samples, int64_t* paths, cudaStream_t stream){return 1;}
cudaError_t crf_entropy(const CrfProblem& problem, const CrfSequences& sequences, const void* messages, void* entropy, cudaStream_t stream){return 1;}
}
