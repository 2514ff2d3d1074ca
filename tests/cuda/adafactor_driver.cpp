// Runs adafactor_step on calls from a file and writes what they leave: the emulated twin of
// csrc/cuda/adafactor_ops.cpp. Every array is an allocation of its exact size, so that AddressSanitizer sees any step
// beside it; the workspace starts as 0xff (NaN).
#include <list>
#include <vector>

#include "cuda/adafactor.h"

using namespace fastnlp;
using namespace fastnlp::cuda;

namespace {

struct Memory {
  int64_t bytes;
  char* data;
  explicit Memory(int64_t bytes) : bytes(bytes), data(static_cast<char*>(std::malloc(size_t(bytes > 0 ? bytes : 1)))) {
    std::memset(data, 0xff, size_t(bytes));
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(data); }
};

FILE* input;
FILE* output;

void read(void* to, int64_t bytes) {
  if (bytes > 0 && std::fread(to, 1, size_t(bytes), input) != size_t(bytes)) std::abort();
}
int64_t number() {
  int64_t x;
  read(&x, 8);
  return x;
}
void must(cudaError_t error) {
  if (error != cudaSuccess) std::abort();
}

// What a step reads and leaves, in the order of the file.
struct Arrays {
  std::list<Memory> all;
  void* next(bool written) {
    const int64_t bytes = number();
    if (bytes < 0) return nullptr;
    all.emplace_back(bytes);
    read(all.back().data, bytes);
    if (written) results.push_back(&all.back());
    return all.back().data;
  }
  std::vector<Memory*> results;
};

// Strides of the folded batch, of rows and of columns.
AdafactorView view(Arrays& arrays, bool written) {
  AdafactorView v{};
  v.data = arrays.next(written);
  v.batch_stride[kAdafactorBatchDims - 1] = number();
  v.row_stride = number();
  v.col_stride = number();
  return v;
}

void run_call(int64_t tensor_count) {
  const int64_t group_count = number();
  const bool wide_numbers = number();
  Arrays arrays;
  std::vector<AdafactorGroup> groups(static_cast<size_t>(group_count));
  read(groups.data(), group_count * int64_t(sizeof(AdafactorGroup)));
  AdafactorLaunch launch{};
  launch.wide_numbers = wide_numbers;
  const bool lr_on_device = number();
  const auto* lr = static_cast<const double*>(arrays.next(false));
  launch.lr = lr_on_device ? lr : nullptr;
  launch.steps = static_cast<float*>(arrays.next(true));
  launch.rms = static_cast<float*>(arrays.next(true));
  launch.grad_scale = static_cast<const float*>(arrays.next(false));
  launch.found_inf = static_cast<const float*>(arrays.next(false));
  read(&launch.max_grad_norm, 8);
  launch.skip_nonfinite = number();
  launch.sharded = number();
  launch.seed = uint64_t(number());
  launch.phases = number();
  launch.sums = arrays.next(true);
  launch.sums_wanted = launch.sums != nullptr;

  std::vector<AdafactorTensor> tensors(static_cast<size_t>(tensor_count));
  int64_t sums_size = 1 + 3 * tensor_count;
  for (AdafactorTensor& t : tensors) {
    t = AdafactorTensor{};
    t.factored = number();
    t.transposed = number();
    t.param_dtype = DType(number());
    t.grad_dtype = DType(number());
    t.group = int32_t(number());
    t.id = uint64_t(number());
    t.batch = number(), t.rows = number(), t.cols = number();
    t.whole_numel = number(), t.whole_rows = number(), t.whole_cols = number();
    t.first = uint64_t(number()), t.per_batch = uint64_t(number());
    t.per_row = uint64_t(number()), t.per_col = uint64_t(number());
    for (int64_t& size : t.batch_size) size = 1;
    t.batch_size[kAdafactorBatchDims - 1] = t.batch;
    t.param = view(arrays, true);
    t.grad = view(arrays, false);
    t.moment = view(arrays, true);
    t.average = view(arrays, true);
    t.row = arrays.next(true);
    t.col = arrays.next(true);
    if (!t.factored) continue;
    t.columns_at = sums_size;
    sums_size += t.batch * adafactor_columns(t.cols, groups[size_t(t.group)].layer_adaptation != 0);
  }
  for (AdafactorTensor& t : tensors)
    if (t.factored) t.rows_at = sums_size, sums_size += t.batch * t.rows;

  const AdafactorPlan plan(tensors, groups, lr_on_device ? nullptr : lr);
  Memory sums(sums_size * (wide_numbers ? 8 : 4)), fixed(int64_t(plan.fixed.size())), fresh(int64_t(plan.fresh.size()));
  Memory workspace(adafactor_workspace(plan, wide_numbers));
  if (!launch.sums) launch.sums = sums.data;
  launch.fixed = fixed.data;
  launch.fresh = fresh.data;
  must(adafactor_upload(plan.fixed, fixed.data, nullptr));
  must(adafactor_upload(plan.fresh, fresh.data, nullptr));
  emulation::machine.launches = 0;
  must(adafactor_step(plan, launch, workspace.data, nullptr));
  for (const Memory* result : arrays.results) std::fwrite(result->data, 1, size_t(result->bytes), output);
  std::fwrite(&emulation::machine.launches, 1, 8, output);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  input = std::fopen(argv[1], "rb");
  output = std::fopen(argv[2], "wb");
  int64_t count;
  while (std::fread(&count, sizeof count, 1, input) == 1) run_call(count);
  std::fclose(output);
  return 0;
}
