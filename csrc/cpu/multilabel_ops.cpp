// Host side of the multilabel ops on CPU: checks, outputs, and one call of a kernel for each block of classes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "isa.h"
#include "multilabel.h"
#include "threads.h"

namespace fastnlp {
namespace {

MultilabelKernels kernels_for(DType scores) {
  return use_v3() ? v3::multilabel_kernels(scores) : baseline::multilabel_kernels(scores);
}

struct Call {
  MultilabelWork work;
  MultilabelKernels kernels;
  ScalarType compute;
  const Tensor& scores;

  Call(const Tensor& scores, const Tensor& labels, bool sparse) : scores(scores) {
    check(scores.dim() == 2, "scores must be [R, C], got ", shape_of(scores));
    work.rows = scores.size(0);
    work.classes = scores.size(1);
    check(work.classes <= 1 || scores.stride(1) == 1 || work.rows == 0, "scores must have adjacent classes (stride 1)");
    work.scores = scores.const_data_ptr();
    work.scores_dtype = dtype_of(scores, "scores");
    work.scores_stride = scores.stride(0);
    compute = work.scores_dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
    if (sparse) {
      check(labels.dim() == 2, "indices must be [R, P], got ", shape_of(labels));
      work.indices = labels.size(1);
      check_dense(labels, "indices", {work.rows, work.indices}, ScalarType::Long, scores);
      work.kind = Labels::sparse;
    } else {
      const bool hard = labels.scalar_type() == ScalarType::Bool;
      check_dense(labels, "labels", {work.rows, work.classes}, hard ? ScalarType::Bool : compute, scores);
      work.indices = 0;
      work.kind = hard ? Labels::dense : Labels::soft;
    }
    work.labels = labels.const_data_ptr();
    kernels = kernels_for(work.scores_dtype);
  }

  // A thread is worth waking for 2^15 scores.
  template <class F>
  void parallel(int64_t items, int64_t scores_each, const F& f) const {
    parallel_for(0, items, std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(1, scores_each)), f);
  }

  Tensor per_row() const { return new_tensor(scores, {work.rows}, compute); }
  const void* row(const Tensor& values, const char* name) const {
    check_dense(values, name, {work.rows}, compute, scores);
    return values.const_data_ptr();
  }

  void check_indices() const {
    if (work.kind != Labels::sparse) return;
    const int64_t* index = static_cast<const int64_t*>(work.labels);
    for (int64_t i = 0; i < work.rows * work.indices; ++i)
      check((index[i] >= -1 || index[i] == -100) && index[i] < work.classes, "indices must be in [0, ", work.classes,
            "), or -1 or -100 for none, got index ", index[i], " at row ", i / work.indices, ", position ",
            i % work.indices);
  }
};

void put(void* values, ScalarType compute, int64_t row, double value) {
  if (compute == ScalarType::Double)
    static_cast<double*>(values)[row] = value;
  else
    static_cast<float*>(values)[row] = static_cast<float>(value);
}

std::tuple<Tensor, Tensor> forward(const Tensor& scores, const Tensor& labels, bool sparse) {
  const Call call(scores, labels, sparse);
  call.check_indices();
  const MultilabelWork& work = call.work;
  Tensor log_negative = call.per_row(), log_positive = call.per_row();
  void *to_negative = log_negative.mutable_data_ptr(), *to_positive = log_positive.mutable_data_ptr();
  std::vector<LogSum> negative(work.items()), positive(work.items());
  call.parallel(work.items(), std::min(work.classes, kMultilabelBlock), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) call.kernels.forward(work, i, &negative[i], &positive[i]);
  });
  const int64_t blocks = work.blocks();
  call.parallel(work.rows, 64 * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      put(to_negative, call.compute, row, log_one_plus(negative.data() + row * blocks, blocks));
      put(to_positive, call.compute, row, log_one_plus(positive.data() + row * blocks, blocks));
    }
  });
  return {log_negative, log_positive};
}

Tensor backward(const Tensor& dloss, const Tensor& log_negative, const Tensor& log_positive, const Tensor& scores,
                const Tensor& labels, bool sparse) {
  Call call(scores, labels, sparse);
  MultilabelWork& work = call.work;
  Tensor dscores = new_tensor(scores, {work.rows, work.classes}, scores.scalar_type());
  work.dloss = call.row(dloss, "dloss");
  work.log_negative = call.row(log_negative, "log_negative");
  work.log_positive = call.row(log_positive, "log_positive");
  work.dscores = dscores.mutable_data_ptr();
  call.parallel(work.items(), std::min(work.classes, kMultilabelBlock), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) call.kernels.backward(work, i);
  });
  return dscores;
}

std::tuple<Tensor, Tensor> dense(Tensor scores, Tensor labels) { return forward(scores, labels, false); }
std::tuple<Tensor, Tensor> sparse(Tensor scores, Tensor indices) { return forward(scores, indices, true); }
Tensor dense_backward(Tensor dloss, Tensor log_negative, Tensor log_positive, Tensor scores, Tensor labels) {
  return backward(dloss, log_negative, log_positive, scores, labels, false);
}
Tensor sparse_backward(Tensor dloss, Tensor log_negative, Tensor log_positive, Tensor scores, Tensor indices) {
  return backward(dloss, log_negative, log_positive, scores, indices, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnlp_ops, CPU, m) {
  m.impl("multilabel_categorical_crossentropy", TORCH_BOX(&dense));
  m.impl("multilabel_categorical_crossentropy_backward", TORCH_BOX(&dense_backward));
  m.impl("sparse_multilabel_categorical_crossentropy", TORCH_BOX(&sparse));
  m.impl("sparse_multilabel_categorical_crossentropy_backward", TORCH_BOX(&sparse_backward));
}

}  // namespace fastnlp
