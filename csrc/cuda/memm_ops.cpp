// Host side of the MEMM ops on CUDA: device guard, outputs, workspace and one launcher each.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../memm_call.h"
#include "memm.h"

namespace fastnlp {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxTags = 32768;  // the square is an unsigned 32-bit number

cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void must(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

void check_rows(const MemmProblem& p) {
  check(p.batch * p.steps < INT32_MAX, "emissions on CUDA must have fewer than 2^31 steps in all, got ",
        p.batch * p.steps);
  check(p.tags <= kMaxTags, "emissions on CUDA may have at most ", kMaxTags, " tags, got N = ", p.tags);
}

Tensor workspace(const Tensor& like, int64_t bytes) { return new_tensor(like, {bytes}, ScalarType::Byte); }

Tensor memm_log_likelihood(Tensor emissions, Tensor tags, Tensor transitions, OptionalTensor mask, bool bidirectional) {
  const torch::stable::accelerator::DeviceGuard guard(emissions.get_device_index());
  const MemmCall call(emissions, tags, transitions, mask, bidirectional);
  check_rows(call.problem);
  Tensor value = call.per_sequence();
  Tensor rows = workspace(emissions, cuda::memm_forward_bytes(call.problem));
  must(cuda::memm_forward(call.problem, value.mutable_data_ptr(), rows.mutable_data_ptr(), stream_of(emissions)));
  return value;
}

std::tuple<Tensor, Tensor> memm_log_likelihood_backward(Tensor grad, Tensor emissions, Tensor tags, Tensor transitions,
                                                        OptionalTensor mask, bool bidirectional, bool transition_grad) {
  const torch::stable::accelerator::DeviceGuard guard(emissions.get_device_index());
  const MemmCall call(emissions, tags, transitions, mask, bidirectional);
  check_rows(call.problem);
  Tensor demissions = call.like_emissions();
  Tensor dtransitions = call.like_transitions(transition_grad);
  cuda::MemmBackward backward;
  backward.grad = call.grad(grad);
  backward.demissions = demissions.mutable_data_ptr();
  backward.dtransitions = transition_grad ? dtransitions.mutable_data_ptr() : nullptr;
  Tensor memory = workspace(emissions, cuda::memm_backward_bytes(call.problem, backward));
  must(cuda::memm_backward(call.problem, backward, memory.mutable_data_ptr(), stream_of(emissions)));
  return {demissions, dtransitions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnlp_ops, CUDA, m) {
  m.impl("memm_log_likelihood", TORCH_BOX(&memm_log_likelihood));
  m.impl("memm_log_likelihood_backward", TORCH_BOX(&memm_log_likelihood_backward));
}

}  // namespace fastnlp
