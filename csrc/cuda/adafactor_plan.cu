// The host's part of a step on CUDA: how the tensors are shared out among blocks, the tables of it, and the launches.
#include <cstring>

#include "adafactor_passes.cuh"

namespace fastnlp::cuda {
namespace {

constexpr int64_t kStrip = 96 << 10;  // elements of a block's strip of rows
constexpr int64_t kStripRows = 64;    // at least, so that its column sums are few beside its elements
constexpr int64_t kTeamRows = 32;     // at most: a column's squares are added one by one, each with a rounding
constexpr int64_t kApply = 48 << 10;  // elements of a block of the second pass
constexpr int64_t kPackedRows = 64;   // of the matrices that a team takes whole
constexpr size_t kPayload = 3968;     // bytes that travel with one launch, below the 4096 of all its arguments

int64_t at_least(int64_t least, int64_t x) { return x > least ? x : least; }
int64_t at_most(int64_t most, int64_t x) { return x < most ? x : most; }

AdafactorItem share_out(const AdafactorTensor& t, const AdafactorGroup& group) {
  AdafactorItem item{};
  item.tensor = t;
  item.tensor.grad.data = nullptr;
  item.strips = 1;
  if (!t.factored) {
    item.sum_units = item.apply_units = int32_t(at_least(1, ceil_div(t.cols, kVectorChunk)));
    return item;
  }
  item.fused = t.cols <= kFusedColumns && group.layer_adaptation == 0;
  item.team = 32;
  while (item.team < kThreads && item.team * 4 * kQuads < t.cols) item.team *= 2;
  const int64_t teams = kThreads / item.team;
  item.packed = t.rows <= kPackedRows && t.batch >= teams;
  const int64_t strip = at_most(kTeamRows * teams, kStrip / at_least(1, t.cols));
  item.strip_rows = int32_t(at_most(t.rows, item.packed ? t.rows : at_least(kStripRows, strip)));
  item.strip_rows = int32_t(at_least(1, item.strip_rows));
  item.strips = int32_t(at_least(1, ceil_div(t.rows, item.strip_rows)));
  item.sum_units = int32_t(item.packed ? ceil_div(t.batch, teams) : t.batch * item.strips);
  item.norm_width = item.strips > 1 ? 32 : kThreads;
  item.norm_units = int32_t(ceil_div(t.batch * t.cols, item.norm_width));
  item.apply_rows = int32_t(at_least(1, at_most(kApplyRows, kApply / at_least(1, t.cols))));
  item.apply_units = int32_t(at_least(1, ceil_div(t.batch * t.rows, item.apply_rows)));
  return item;
}

template <typename T>
void append(std::vector<char>& bytes, const std::vector<T>& values) {
  const size_t at = bytes.size();
  bytes.resize(at + values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(bytes.data() + at, values.data(), values.size() * sizeof(T));
}

void units_of(std::vector<AdafactorUnit>& units, int64_t tensor, int32_t count) {
  for (int32_t index = 0; index < count; ++index) units.push_back({int32_t(tensor), index});
}

struct Payload {
  unsigned char bytes[kPayload];
};
__global__ void __launch_bounds__(kThreads) adafactor_upload_kernel(Payload payload, int count, unsigned char* to) {
  for (int i = threadIdx.x; i < count; i += kThreads) to[i] = payload.bytes[i];
}

// Takes memory for one array after another.
struct Carver {
  char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* const at = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
    return at;
  }
};

template <typename C>
int64_t carve(const AdafactorPlan& plan, void* workspace, Arguments<C>* call) {
  Carver carver{static_cast<char*>(workspace)};
  call->control = carver.take<Control>(plan.tensors);
  call->sum_partials = carver.take<SumPartial>(plan.sum_units);
  call->norm_partials = carver.take<NormPartial>(plan.norm_units);
  call->exact_partials = carver.take<ExactPartial>(plan.torch_mode ? plan.apply_units : 0);
  call->partials = carver.take<C>(plan.partials);
  return carver.used;
}

template <typename C>
cudaError_t step_of(const AdafactorPlan& plan, const AdafactorLaunch& given, void* workspace, cudaStream_t stream) {
  Arguments<C> call{};
  carve(plan, workspace, &call);
  const char* const fixed = static_cast<const char*>(given.fixed);
  call.items = reinterpret_cast<const AdafactorItem*>(fixed);
  call.groups = reinterpret_cast<const AdafactorGroup*>(call.items + plan.tensors);
  call.sum_units = reinterpret_cast<const AdafactorUnit*>(call.groups + plan.groups);
  call.norm_units = call.sum_units + plan.sum_units;
  call.apply_units = call.norm_units + plan.norm_units;
  call.grads = static_cast<void* const*>(given.fresh);
  call.lr = given.lr ? given.lr : reinterpret_cast<const double*>(call.grads + plan.tensors);
  call.steps = given.steps;
  call.rms = given.rms;
  call.grad_scale = given.grad_scale;
  call.found_inf = given.found_inf;
  call.max_grad_norm = given.max_grad_norm;
  call.seed = given.seed;
  call.phases = given.phases;
  call.tensors = int(plan.tensors);
  call.sum_unit_count = int(plan.sum_units);
  call.skip_nonfinite = given.skip_nonfinite;
  call.sharded = given.sharded;
  call.sums = static_cast<C*>(given.sums);

  const bool rows = given.phases & kAdafactorRows, columns = given.phases & kAdafactorColumns;
  const bool norms = given.phases & kAdafactorNorms;
  const bool gated = given.max_grad_norm > 0 || given.skip_nonfinite;
  cudaError_t error = launch_prepare(call, stream);
  if (error == cudaSuccess && rows) error = launch_rows(call, stream);
  if (error == cudaSuccess && rows && (gated || given.sums_wanted)) error = launch_total(call, stream);
  if (error == cudaSuccess && columns && (plan.wide || !rows || given.max_grad_norm > 0))
    error = launch_columns(call, stream);
  if (error == cudaSuccess && plan.norm_units > 0 && (columns || norms))
    error = launch_norms(call, plan.norm_units, stream);
  if (error == cudaSuccess && norms && plan.torch_mode) error = launch_exact(call, plan.apply_units, stream);
  if (error == cudaSuccess) error = launch_gain(call, stream);
  if (error == cudaSuccess && given.phases & kAdafactorApply) error = launch_apply(call, plan.apply_units, stream);
  return error;
}

}  // namespace

AdafactorPlan::AdafactorPlan(const std::vector<AdafactorTensor>& list, const std::vector<AdafactorGroup>& group_list,
                             const double* lr)
    : tensors(int64_t(list.size())), groups(int64_t(group_list.size())) {
  std::vector<AdafactorItem> items;
  std::vector<AdafactorUnit> sums, norms, applies;
  std::vector<const void*> grads;
  for (const AdafactorTensor& tensor : list) {
    const AdafactorGroup& group = group_list[size_t(tensor.group)];
    AdafactorItem item = share_out(tensor, group);
    item.first_sum_unit = int32_t(sums.size());
    item.first_norm_unit = int32_t(norms.size());
    item.first_apply_unit = int32_t(applies.size());
    item.partials_at = partials;
    if (item.strips > 1)
      partials += tensor.batch * item.strips * adafactor_columns(tensor.cols, group.layer_adaptation != 0);
    units_of(sums, int64_t(items.size()), item.sum_units);
    units_of(norms, int64_t(items.size()), item.norm_units);
    units_of(applies, int64_t(items.size()), item.apply_units);
    wide = wide || (tensor.factored && !item.fused);
    torch_mode = torch_mode || (tensor.factored && group.torch_mode != 0);
    grads.push_back(tensor.grad.data);
    items.push_back(item);
  }
  sum_units = int64_t(sums.size());
  norm_units = int64_t(norms.size());
  apply_units = int64_t(applies.size());
  append(fixed, items);
  append(fixed, group_list);
  append(fixed, sums);
  append(fixed, norms);
  append(fixed, applies);
  append(fresh, grads);
  if (lr) append(fresh, std::vector<double>(lr, lr + groups));
}

int64_t adafactor_workspace(const AdafactorPlan& plan, bool wide_numbers) {
  Arguments<float> narrow{};
  Arguments<double> wide{};
  return wide_numbers ? carve(plan, nullptr, &wide) : carve(plan, nullptr, &narrow);
}

cudaError_t adafactor_upload(const std::vector<char>& from, void* to, cudaStream_t stream) {
  for (size_t at = 0; at < from.size(); at += kPayload) {
    Payload payload;
    const size_t count = from.size() - at < kPayload ? from.size() - at : kPayload;
    std::memcpy(payload.bytes, from.data() + at, count);
    std::memset(payload.bytes + count, 0, kPayload - count);
    const cudaError_t error = launch(adafactor_upload_kernel, dim3(1), kThreads, stream, payload, int(count),
                                     static_cast<unsigned char*>(to) + at);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t adafactor_step(const AdafactorPlan& plan, const AdafactorLaunch& call, void* workspace,
                           cudaStream_t stream) {
  if (plan.tensors == 0) return cudaSuccess;
  return call.wide_numbers ? step_of<double>(plan, call, workspace, stream)
                           : step_of<float>(plan, call, workspace, stream);
}

}  // namespace fastnlp::cuda
