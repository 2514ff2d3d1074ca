// From the arguments of adafactor_step_ to an AdafactorCall, with the checks that CPU and CUDA share.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "adafactor.h"
#include "checks.h"

namespace fastnlp {

struct AdafactorArguments {
  const std::vector<Tensor>& params;
  const std::vector<Tensor>& grads;
  const std::vector<Tensor>& rows;
  const std::vector<Tensor>& cols;
  const std::vector<Tensor>& vectors;
  const std::vector<Tensor>& moments;
  const std::vector<Tensor>& averages;
  const Tensor& steps;
  const std::optional<Tensor>& rms;
  const Tensor& lr;
  const std::vector<int64_t>& group_of;
  const std::vector<double>& options;
  const std::optional<Tensor>& grad_scale;
  const std::optional<Tensor>& found_inf;
  double max_grad_norm;
  bool skip_nonfinite;
  int64_t seed;
  const std::vector<int64_t>& ids;
  const std::optional<Tensor>& sums;
  const std::vector<int64_t>& shards;
  int64_t phases;
};

struct AdafactorCall {
  const AdafactorArguments& arguments;
  ScalarType compute = ScalarType::Float;
  std::vector<AdafactorGroup> groups;
  std::vector<AdafactorTensor> tensors;
  int64_t sums_size = 1;

  explicit AdafactorCall(const AdafactorArguments& a) : arguments(a) {
    const size_t n = a.params.size();
    check(a.grads.size() == n, "grads must have one entry for each of the ", n, " params, got ", a.grads.size());
    check(a.group_of.size() == n, "group_of must have one entry for each of the ", n, " params, got ",
          a.group_of.size());
    check(a.ids.empty() || a.ids.size() == n, "ids must be empty or have one entry for each of the ", n,
          " params, got ", a.ids.size());
    check(a.shards.empty() || a.shards.size() == 6 * n, "shards must be empty or have 6 entries for each of the ", n,
          " params, got ", a.shards.size());
    check(a.options.size() % kAdafactorOptions == 0, "options must have ", kAdafactorOptions,
          " entries for each group, got ", a.options.size());
    check(a.phases >= 0 && a.phases <= kAdafactorAll, "phases must be in [0, 15], got ", a.phases);
    groups.resize(a.options.size() / kAdafactorOptions);
    if (!groups.empty())
      std::memcpy(static_cast<void*>(groups.data()), a.options.data(), a.options.size() * sizeof(double));
    const int64_t group_count = static_cast<int64_t>(groups.size());
    check(a.lr.dim() == 1 && a.lr.numel() == group_count && a.lr.scalar_type() == ScalarType::Double &&
              a.lr.is_contiguous(),
          "lr must be a contiguous float64 tensor with one entry for each of the ", group_count, " groups, got ",
          shape_of(a.lr));
    if (n == 0) return;
    if (a.params[0].scalar_type() == ScalarType::Double) compute = ScalarType::Double;
    check(a.lr.device() == first().device() || a.lr.is_cpu(), "lr must be on the CPU or on the device of params");
    check_list(a.steps, "steps");
    if (a.rms) check_list(*a.rms, "rms");
    if (a.grad_scale) check_scalar(*a.grad_scale, "grad_scale");
    if (a.found_inf) check_scalar(*a.found_inf, "found_inf");

    tensors.reserve(n);
    size_t factored = 0, vectors = 0, moments = 0, averages = 0;
    for (size_t i = 0; i < n; ++i) {
      check(a.group_of[i] >= 0 && a.group_of[i] < group_count, "group_of must be in [0, ", group_count, "), got ",
            a.group_of[i]);
      const AdafactorGroup& group = groups[a.group_of[i]];
      const bool matrix = a.params[i].dim() >= 2;
      size_t& state = matrix ? factored : vectors;
      const Tensor& row = entry(matrix ? a.rows : a.vectors, state, matrix ? "rows" : "vectors");
      const Tensor* col = matrix ? &entry(a.cols, state, "cols") : nullptr;
      const Tensor* moment = group.beta1 >= 0 ? &entry(a.moments, moments++, "moments") : nullptr;
      const Tensor* average = group.average_decay >= 0 ? &entry(a.averages, averages++, "averages") : nullptr;
      ++state;
      add(static_cast<int64_t>(i), row, col, moment, average);
    }
    check(a.rows.size() == factored && a.cols.size() == factored, "rows and cols must have one entry for each of the ",
          factored, " params of two or more dimensions, got ", a.rows.size(), " and ", a.cols.size());
    check(a.vectors.size() == vectors, "vectors must have one entry for each of the ", vectors,
          " params of less than two dimensions, got ", a.vectors.size());
    check(a.moments.size() == moments, "moments must have one entry for each of the ", moments,
          " params whose group has beta1, got ", a.moments.size());
    check(a.averages.size() == averages, "averages must have one entry for each of the ", averages,
          " params whose group has an average, got ", a.averages.size());
    lay_out_sums();
  }

  const AdafactorGroup& group_of(const AdafactorTensor& tensor) const { return groups[tensor.group]; }

 private:
  static const Tensor& entry(const std::vector<Tensor>& list, size_t index, const char* name) {
    check(index < list.size(), name, " must have more entries than ", list.size(), " for these params");
    return list[index];
  }

  const Tensor& first() const { return arguments.params[0]; }

  void check_list(const Tensor& tensor, const char* name) const {
    const int64_t n = static_cast<int64_t>(arguments.params.size());
    check(tensor.dim() == 1 && tensor.numel() == n && tensor.scalar_type() == ScalarType::Float &&
              tensor.is_contiguous() && tensor.device() == first().device(),
          name, " must be a contiguous float32 tensor [", n, "] on the device of params, got ", shape_of(tensor));
  }
  void check_scalar(const Tensor& tensor, const char* name) const {
    check(tensor.numel() == 1 && tensor.scalar_type() == ScalarType::Float && tensor.device() == first().device(), name,
          " must be one float32 number on the device of params, got ", shape_of(tensor));
  }

  void add(int64_t i, const Tensor& row, const Tensor* col, const Tensor* moment, const Tensor* average) {
    const AdafactorArguments& a = arguments;
    const Tensor& param = a.params[i];
    const Tensor& grad = a.grads[i];
    AdafactorTensor t{};
    t.param_dtype = dtype_of(param, "params");
    t.grad_dtype = dtype_of(grad, "grads");
    check((t.param_dtype == DType::f64) == (compute == ScalarType::Double),
          "params must be all float64 or none of them, got ", torch::headeronly::toString(param.scalar_type()),
          " at index ", i);
    check(param.device() == first().device(), "params must be on one device, got another at index ", i);
    t.group = static_cast<int32_t>(a.group_of[i]);
    t.id = static_cast<uint64_t>(a.ids.empty() ? i : a.ids[i]);
    t.factored = col != nullptr;
    const int64_t dim = param.dim();
    t.cols = dim >= 1 ? param.size(dim - 1) : 1;
    t.rows = t.factored ? param.size(dim - 2) : 1;
    t.batch = 1;
    for (int64_t d = 0; d < dim - 2; ++d) t.batch *= param.size(d);
    check(t.batch <= INT32_MAX, "params must have fewer than 2^31 matrices, got ", shape_of(param), " at index ", i);
    t.param = view(param, param, "params", i, true);
    t.grad = view(grad, param, "grads", i, false);
    if (moment) t.moment = view(state(*moment, "moments", i), param, "moments", i, true);
    if (average) t.average = view(state(*average, "averages", i), param, "averages", i, true);
    fold_batch(t, param, {{&t.param, &param}, {&t.grad, &grad}, {&t.moment, moment}, {&t.average, average}});
    t.row = factor(row, t.factored ? t.batch * t.rows : t.cols, t.factored ? "rows" : "vectors", i);
    if (col) t.col = factor(*col, t.batch * t.cols, "cols", i);

    t.whole_numel = t.batch * t.rows * t.cols, t.whole_rows = t.rows, t.whole_cols = t.cols;
    int64_t origin[3] = {0, 0, 0};
    if (!a.shards.empty()) {
      const int64_t* shard = a.shards.data() + 6 * i;
      t.whole_numel = shard[0], t.whole_rows = shard[1], t.whole_cols = shard[2];
      std::copy(shard + 3, shard + 6, origin);
      check(t.whole_rows >= t.rows && t.whole_cols >= t.cols && t.whole_numel >= t.batch * t.rows * t.cols,
            "shards must name whole tensors no smaller than params, got ", shape_of(param), " at index ", i);
    }
    const auto whole_rows = static_cast<uint64_t>(t.whole_rows), whole_cols = static_cast<uint64_t>(t.whole_cols);
    t.per_batch = whole_rows * whole_cols, t.per_row = whole_cols, t.per_col = 1;
    t.first = static_cast<uint64_t>(origin[0]) * t.per_batch + static_cast<uint64_t>(origin[1]) * t.per_row +
              static_cast<uint64_t>(origin[2]);
    transpose(t);
    tensors.push_back(t);
  }

  const Tensor& state(const Tensor& tensor, const char* name, int64_t i) const {
    check(tensor.scalar_type() == compute, name, " must be ", torch::headeronly::toString(compute), ", got ",
          torch::headeronly::toString(tensor.scalar_type()), " at index ", i);
    return tensor;
  }

  void* factor(const Tensor& tensor, int64_t numel, const char* name, int64_t i) const {
    check(tensor.numel() == numel && state(tensor, name, i).is_contiguous() && tensor.device() == first().device(),
          name, " must be contiguous with ", numel, " numbers on the device of params for params[", i, "], got ",
          shape_of(tensor));
    return tensor.mutable_data_ptr();
  }

  // The shape must be that of the parameter; what is written must not overlap itself.
  AdafactorView view(const Tensor& tensor, const Tensor& param, const char* name, int64_t i, bool written) const {
    const int64_t dim = param.dim();
    check(tensor.layout() == torch::headeronly::Layout::Strided, name, " must be dense, got a sparse one at index ", i);
    const auto sizes = tensor.sizes(), wanted = param.sizes(), strides = tensor.strides();
    check(tensor.dim() == dim && std::equal(sizes.begin(), sizes.end(), wanted.begin()) &&
              tensor.device() == first().device(),
          name, " must have the shape and the device of params at index ", i, ", got ", shape_of(tensor), " for ",
          shape_of(param));
    if (written && !tensor.is_contiguous()) {
      std::vector<std::array<int64_t, 2>> extents;  // stride, size
      for (int64_t d = 0; d < dim; ++d)
        if (sizes[d] > 1) extents.push_back({strides[d], sizes[d]});
      std::sort(extents.begin(), extents.end());
      int64_t reach = 0;
      for (const auto& extent : extents) {
        check(extent[0] > reach || tensor.numel() == 0, name, " must not overlap in memory, got ", shape_of(tensor),
              " with a stride of ", extent[0], " at index ", i);
        reach += extent[0] * (extent[1] - 1);
      }
    }
    AdafactorView v{};
    v.data = const_cast<void*>(tensor.const_data_ptr());
    v.col_stride = dim >= 1 && sizes[dim - 1] > 1 ? strides[dim - 1] : 1;
    v.row_stride = dim >= 2 ? strides[dim - 2] : 0;
    return v;
  }

  // Leading dimensions that lie behind one another in all tensors become one.
  static void fold_batch(AdafactorTensor& t, const Tensor& param,
                         std::initializer_list<std::pair<AdafactorView*, const Tensor*>> views) {
    std::fill(t.batch_size, t.batch_size + kAdafactorBatchDims, int64_t{1});
    int at = kAdafactorBatchDims;  // filled from the last, which runs fastest
    for (int64_t d = param.dim() - 3; d >= 0; --d) {
      const int64_t size = param.size(d);
      if (size == 1) continue;
      bool folds = at < kAdafactorBatchDims;
      for (const auto& [view, tensor] : views)
        folds = folds && (!tensor || tensor->stride(d) == view->batch_stride[at] * t.batch_size[at]);
      if (folds) {
        t.batch_size[at] *= size;
        continue;
      }
      check(--at >= 0, "params must have at most ", kAdafactorBatchDims,
            " leading dimensions that do not fold into one, got ", shape_of(param));
      t.batch_size[at] = size;
      for (const auto& [view, tensor] : views)
        if (tensor) view->batch_stride[at] = tensor->stride(d);
    }
  }

  // A matrix stored by columns is read as its transpose. Sums between ranks and lazy rows know rows and columns apart.
  void transpose(AdafactorTensor& t) const {
    const bool by_columns = t.param.row_stride == 1 && (t.param.col_stride != 1 || t.cols == 1);
    if (!t.factored || !by_columns || t.rows == 1 || t.batch != 1 || arguments.sums || groups[t.group].lazy != 0)
      return;
    t.transposed = true;
    std::swap(t.rows, t.cols);
    std::swap(t.row, t.col);
    std::swap(t.whole_rows, t.whole_cols);
    std::swap(t.per_row, t.per_col);
    for (AdafactorView* view : {&t.param, &t.grad, &t.moment, &t.average})
      std::swap(view->row_stride, view->col_stride);
  }

  void lay_out_sums() {
    sums_size = 1 + 3 * static_cast<int64_t>(tensors.size());
    for (AdafactorTensor& t : tensors) {
      if (!t.factored) continue;
      t.columns_at = sums_size;
      sums_size += t.batch * adafactor_columns(t.cols, group_of(t).layer_adaptation != 0);
    }
    for (AdafactorTensor& t : tensors) {
      if (!t.factored) continue;
      t.rows_at = sums_size;
      sums_size += t.batch * t.rows;
    }
    const std::optional<Tensor>& sums = arguments.sums;
    check(sums || arguments.phases == kAdafactorAll || arguments.phases == 0,
          "sums must be given where phases is not 15, got ", arguments.phases);
    if (!sums) return;
    check(sums->dim() == 1 && sums->numel() == sums_size && sums->is_contiguous() && sums->scalar_type() == compute &&
              sums->device() == first().device(),
          "sums must be a contiguous ", torch::headeronly::toString(compute), " tensor [", sums_size,
          "] on the device of params, got ", shape_of(*sums));
  }
};

}  // namespace fastnlp
