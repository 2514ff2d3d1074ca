// Host side of the CRF ops on CUDA: outputs and workspaces from torch's allocator, launches on torch's current stream.
// Nothing here waits for the device or reads from it.
#include "crf.h"

#ifndef USE_CUDA
#define USE_CUDA  // torch's header declares the function for the current stream only then
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../crf_call.h"

namespace fastnlp {
namespace {

using OptionalTensor = std::optional<Tensor>;
using torch::stable::accelerator::DeviceGuard;

struct Run {
  CrfCall call;
  DeviceGuard guard;
  cudaStream_t stream = nullptr;
  Tensor positions;
  cuda::CrfSequences sequences;

  Run(const Tensor& emissions, const Tensor& transitions, const OptionalTensor& start, const OptionalTensor& end,
      const OptionalTensor& mask, const OptionalTensor& cu_seqlens)
      : call(emissions, transitions, start, end, mask, cu_seqlens), guard(emissions.get_device_index()) {
    const CrfProblem& p = call.problem;
    check(p.tags <= cuda::kMaxTags, "emissions on CUDA may have at most ", cuda::kMaxTags, " tags, got N = ", p.tags);
    check(p.steps < INT32_MAX - cuda::kChunk, "emissions on CUDA must have fewer than 2^31 - 256 steps, got ", p.steps);
    check(p.batch < INT32_MAX, "emissions on CUDA must have fewer than 2^31 - 1 sequences, got ", p.batch);
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(emissions.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
    positions = workspace(cuda::crf_sequences_bytes(p));
    launched(cuda::crf_find_sequences(p, data(positions), &sequences, stream));
  }

  // Memory from torch's caching allocator: freed when the tensor goes, and reused only by later work on this stream.
  Tensor workspace(int64_t bytes) const { return new_tensor(call.emissions, {bytes}, ScalarType::Byte); }
  static void* data(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

  static void launched(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }

  std::tuple<Tensor, Tensor> forward(const Tensor* tags, bool save_messages) {
    const int64_t rows = save_messages ? cuda::crf_message_rows(call.rows) : 0;
    Tensor value = call.per_sequence();
    Tensor messages = new_tensor(call.emissions, {rows, call.problem.tags}, call.compute);
    cuda::CrfForward forward;
    forward.tags = tags ? call.tags(*tags) : nullptr;
    forward.messages = save_messages ? data(messages) : nullptr;
    forward.output = data(value);
    forward.chunked = cuda::crf_chunked(call.problem);
    launch_forward(forward);
    return {value, messages};
  }

  void launch_forward(const cuda::CrfForward& forward) {
    const Tensor space = workspace(cuda::crf_forward_bytes(call.problem, forward));
    launched(cuda::crf_forward(call.problem, sequences, forward, data(space), stream));
  }

  Tensor left_messages() {
    Tensor messages = new_tensor(call.emissions, {call.rows, call.problem.tags}, call.compute);
    cuda::CrfForward forward;
    forward.messages = data(messages);
    forward.left_only = true;
    launch_forward(forward);
    return messages;
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& messages, const Tensor* tags,
                                                      bool transition_grad) {
    const CrfProblem& p = call.problem;
    check_dense(grad, "grad", {p.batch}, call.compute, call.emissions);
    check_dense(messages, "messages", {cuda::crf_message_rows(call.rows), p.tags}, call.compute, call.emissions);
    Tensor demissions = call.like_emissions();
    Tensor dtransitions = transition_grad ? call.like_transitions() : new_tensor(call.emissions, {0}, call.compute);
    Tensor dstart = call.like_boundary();
    Tensor dend = call.like_boundary();
    cuda::CrfBackward backward;
    backward.grad = grad.const_data_ptr();
    backward.messages = messages.const_data_ptr();
    backward.tags = tags ? call.tags(*tags) : nullptr;
    backward.demissions = data(demissions);
    backward.dtransitions = dtransitions.numel() > 0 ? data(dtransitions) : nullptr;
    backward.dstart = data(dstart);
    backward.dend = data(dend);
    backward.chunked = cuda::crf_chunked(p);
    const Tensor space = workspace(cuda::crf_backward_bytes(p, backward));
    launched(cuda::crf_backward(p, sequences, backward, data(space), stream));
    return {demissions, dtransitions, dstart, dend};
  }
};

std::tuple<Tensor, Tensor> crf_log_partition(const Tensor& emissions, const Tensor& transitions,
                                             const OptionalTensor& start, const OptionalTensor& end,
                                             const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                             bool save_messages) {
  return Run(emissions, transitions, start, end, mask, cu_seqlens).forward(nullptr, save_messages);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> crf_log_partition_backward(
    const Tensor& grad, const Tensor& messages, const Tensor& emissions, const Tensor& transitions,
    const OptionalTensor& start, const OptionalTensor& end, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens, bool transition_grad) {
  return Run(emissions, transitions, start, end, mask, cu_seqlens).backward(grad, messages, nullptr, transition_grad);
}

std::tuple<Tensor, Tensor> crf_log_likelihood(const Tensor& emissions, const Tensor& tags, const Tensor& transitions,
                                              const OptionalTensor& start, const OptionalTensor& end,
                                              const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                              bool save_messages, bool /* check_start */) {
  return Run(emissions, transitions, start, end, mask, cu_seqlens).forward(&tags, save_messages);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> crf_log_likelihood_backward(
    const Tensor& grad, const Tensor& messages, const Tensor& emissions, const Tensor& tags, const Tensor& transitions,
    const OptionalTensor& start, const OptionalTensor& end, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens, bool transition_grad) {
  return Run(emissions, transitions, start, end, mask, cu_seqlens).backward(grad, messages, &tags, transition_grad);
}

std::tuple<Tensor, Tensor> crf_viterbi(const Tensor& emissions, const Tensor& transitions, const OptionalTensor& start,
                                       const OptionalTensor& end, const OptionalTensor& mask,
                                       const OptionalTensor& cu_seqlens, bool /* check_start */) {
  Run run(emissions, transitions, start, end, mask, cu_seqlens);
  Tensor paths = run.call.per_step(ScalarType::Long);
  Tensor scores = run.call.per_sequence();
  const Tensor space = run.workspace(cuda::crf_viterbi_bytes(run.call.problem));
  run.launched(cuda::crf_viterbi(run.call.problem, run.sequences, paths.mutable_data_ptr<int64_t>(), run.data(scores),
                                 run.data(space), run.stream));
  return {paths, scores};
}

std::tuple<Tensor, Tensor> crf_viterbi_n_best(const Tensor& emissions, const Tensor& transitions,
                                              const OptionalTensor& start, const OptionalTensor& end,
                                              const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                              int64_t n_best) {
  check(n_best >= 1, "n_best must be at least 1, got ", n_best);
  Run run(emissions, transitions, start, end, mask, cu_seqlens);
  const CrfProblem& p = run.call.problem;
  check(n_best <= cuda::kMaxBestCells / p.tags, "n_best on CUDA may be at most ", cuda::kMaxBestCells / p.tags,
        " with ", p.tags, " tags, got ", n_best);
  Tensor paths = run.call.packed ? new_tensor(emissions, {n_best, run.call.rows}, ScalarType::Long)
                                 : new_tensor(emissions, {p.batch, n_best, p.steps}, ScalarType::Long);
  Tensor scores = new_tensor(emissions, {p.batch, n_best}, run.call.compute);
  const Tensor space = run.workspace(cuda::crf_viterbi_n_best_bytes(p, n_best));
  run.launched(cuda::crf_viterbi_n_best(p, run.sequences, n_best, paths.mutable_data_ptr<int64_t>(), run.data(scores),
                                        run.data(space), run.stream));
  return {paths, scores};
}

Tensor crf_sample(const Tensor& emissions, const Tensor& transitions, const OptionalTensor& start,
                  const OptionalTensor& end, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                  const Tensor& uniforms) {
  Run run(emissions, transitions, start, end, mask, cu_seqlens);
  const CrfProblem& p = run.call.problem;
  const int64_t samples = uniforms.dim() > 0 ? uniforms.size(0) : 0;
  if (run.call.packed)
    check_dense(uniforms, "uniforms", {samples, run.call.rows}, ScalarType::Float, emissions);
  else
    check_dense(uniforms, "uniforms", {samples, p.batch, p.steps}, ScalarType::Float, emissions);
  check(samples * p.batch < INT32_MAX, "uniforms on CUDA must ask for fewer than 2^31 - 1 paths, got ",
        samples * p.batch);
  Tensor paths = run.call.packed ? new_tensor(emissions, {samples, run.call.rows}, ScalarType::Long)
                                 : new_tensor(emissions, {samples, p.batch, p.steps}, ScalarType::Long);
  const Tensor messages = run.left_messages();
  run.launched(cuda::crf_sample(p, run.sequences, run.data(messages), uniforms.const_data_ptr<float>(), samples,
                                paths.mutable_data_ptr<int64_t>(), run.stream));
  return paths;
}

Tensor crf_entropy(const Tensor& emissions, const Tensor& transitions, const OptionalTensor& start,
                   const OptionalTensor& end, const OptionalTensor& mask, const OptionalTensor& cu_seqlens) {
  Run run(emissions, transitions, start, end, mask, cu_seqlens);
  Tensor entropy = run.call.per_sequence();
  const Tensor messages = run.left_messages();
  run.launched(cuda::crf_entropy(run.call.problem, run.sequences, run.data(messages), run.data(entropy), run.stream));
  return entropy;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnlp_ops, CUDA, m) {
  m.impl("crf_log_partition", TORCH_BOX(&crf_log_partition));
  m.impl("crf_log_partition_backward", TORCH_BOX(&crf_log_partition_backward));
  m.impl("crf_log_likelihood", TORCH_BOX(&crf_log_likelihood));
  m.impl("crf_log_likelihood_backward", TORCH_BOX(&crf_log_likelihood_backward));
  m.impl("crf_viterbi", TORCH_BOX(&crf_viterbi));
  m.impl("crf_viterbi_n_best", TORCH_BOX(&crf_viterbi_n_best));
  m.impl("crf_sample", TORCH_BOX(&crf_sample));
  m.impl("crf_entropy", TORCH_BOX(&crf_entropy));
}

}  // namespace fastnlp
