// Host side of the Adafactor op on CUDA: the plan, its tables on the device, a workspace and the launches. Nothing here
// waits for the device or reads from it.
#include "adafactor.h"

#ifndef USE_CUDA
#define USE_CUDA  // torch's header declares the function for the current stream only then
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <list>
#include <mutex>

#include "../adafactor_call.h"

namespace fastnlp {
namespace {

void must(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// A plan's tables on the device. They are written when a plan is new, and the fresh one when an address or a learning
// rate has changed.
struct Tables {
  int32_t device;
  cudaStream_t stream;
  bool captured;  // a graph reads them from now on: they keep their contents for good
  std::vector<char> fixed;
  std::vector<char> fresh;
  Tensor fixed_on_device;
  Tensor fresh_on_device;
};

constexpr size_t kTables = 16;  // kept beside the captured ones

Tensor bytes_on_device(const Tensor& like, int64_t bytes) { return new_tensor(like, {bytes}, ScalarType::Byte); }

const Tables& tables_of(const cuda::AdafactorPlan& plan, const Tensor& like, cudaStream_t stream) {
  static auto& kept = *new std::list<Tables>;  // never destroyed: at exit CUDA may be gone before us
  cudaStreamCaptureStatus status;
  must(cudaStreamIsCapturing(stream, &status));
  const bool capturing = status != cudaStreamCaptureStatusNone;
  const int32_t device = like.get_device_index();
  for (auto at = kept.begin(); at != kept.end(); ++at) {
    if (at->device != device || at->fixed != plan.fixed) continue;
    const bool same = at->fresh == plan.fresh;
    if (capturing ? !same : at->stream != stream || (at->captured && !same)) continue;
    if (!same) {
      must(cuda::adafactor_upload(plan.fresh, at->fresh_on_device.mutable_data_ptr(), stream));
      at->fresh = plan.fresh;
    }
    at->captured = at->captured || capturing;
    kept.splice(kept.begin(), kept, at);
    return kept.front();
  }
  kept.push_front({device, stream, capturing, plan.fixed, plan.fresh,
                   bytes_on_device(like, static_cast<int64_t>(plan.fixed.size())),
                   bytes_on_device(like, static_cast<int64_t>(plan.fresh.size()))});
  Tables& fresh = kept.front();
  must(cuda::adafactor_upload(plan.fixed, fresh.fixed_on_device.mutable_data_ptr(), stream));
  must(cuda::adafactor_upload(plan.fresh, fresh.fresh_on_device.mutable_data_ptr(), stream));
  size_t others = 0;
  for (auto at = kept.begin(); at != kept.end();) {
    const bool drop = !at->captured && ++others > kTables;
    at = drop ? kept.erase(at) : std::next(at);
  }
  return fresh;
}

const float* number(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; }

void adafactor_step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> rows,
                     std::vector<Tensor> cols, std::vector<Tensor> vectors, std::vector<Tensor> moments,
                     std::vector<Tensor> averages, Tensor steps, std::optional<Tensor> rms, Tensor lr,
                     std::vector<int64_t> group_of, std::vector<double> options, std::optional<Tensor> grad_scale,
                     std::optional<Tensor> found_inf, double max_grad_norm, bool skip_nonfinite, int64_t seed,
                     std::vector<int64_t> ids, std::optional<Tensor> sums, std::vector<int64_t> shards,
                     int64_t phases) {
  const AdafactorCall call(AdafactorArguments{
      params,  grads,      rows,      cols,          vectors,        moments, averages, steps, rms,    lr,    group_of,
      options, grad_scale, found_inf, max_grad_norm, skip_nonfinite, seed,    ids,      sums,  shards, phases});
  if (params.empty()) return;
  for (const AdafactorTensor& t : call.tensors)
    check(t.batch * t.rows < INT32_MAX && t.batch * t.cols < INT32_MAX,
          "params on CUDA must have fewer than 2^31 rows and columns");
  if (phases == 0) return;
  const Tensor& like = params[0];
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &current));
  const auto stream = static_cast<cudaStream_t>(current);

  const cuda::AdafactorPlan plan(call.tensors, call.groups, lr.is_cpu() ? lr.const_data_ptr<double>() : nullptr);
  const bool wide_numbers = call.compute == ScalarType::Double;
  const Tensor own_sums = sums ? *sums : new_tensor(like, {call.sums_size}, call.compute);
  const Tensor workspace = bytes_on_device(like, cuda::adafactor_workspace(plan, wide_numbers));
  cuda::AdafactorLaunch launch;
  launch.lr = lr.is_cpu() ? nullptr : lr.const_data_ptr<double>();
  launch.steps = steps.mutable_data_ptr<float>();
  launch.rms = rms ? rms->mutable_data_ptr<float>() : nullptr;
  launch.grad_scale = number(grad_scale);
  launch.found_inf = number(found_inf);
  launch.max_grad_norm = max_grad_norm;
  launch.skip_nonfinite = skip_nonfinite;
  launch.sharded = !shards.empty();
  launch.seed = static_cast<uint64_t>(seed);
  launch.phases = phases;
  launch.sums = own_sums.mutable_data_ptr();
  launch.sums_wanted = sums.has_value();
  launch.wide_numbers = wide_numbers;
  static std::mutex turn;  // tables may be rewritten by another thread's step between finding and using them
  const std::lock_guard<std::mutex> lock(turn);
  const Tables& tables = tables_of(plan, like, stream);
  launch.fixed = tables.fixed_on_device.const_data_ptr();
  launch.fresh = tables.fresh_on_device.const_data_ptr();
  must(cuda::adafactor_step(plan, launch, workspace.mutable_data_ptr(), stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnlp_ops, CUDA, m) { m.impl("adafactor_step_", TORCH_BOX(&adafactor_step_)); }

}  // namespace fastnlp
