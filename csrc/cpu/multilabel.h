// What csrc/cpu/multilabel_ops.cpp calls: CPU kernels that take one block of classes of one row at a time. They are
// compiled for the baseline and for x86-64-v3, in a namespace each; multilabel_kernels() of either fills the same
// table.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../dtype.h"
#include "log_sum.h"

namespace fastnlp {

// Classes of one item of work. Partial sums belong to items, whose number follows from the shapes alone: results are
// the same for any number of threads. 2^15 scores are some 15 microseconds of work.
constexpr int64_t kMultilabelBlock = int64_t{1} << 15;

enum class Labels : int32_t { dense, soft, sparse };

// Compute type C: double where the scores are double, else float. C arrays are void* here.
struct MultilabelWork {
  int64_t rows;
  int64_t classes;
  const void* scores;  // [R, C], classes are adjacent
  DType scores_dtype;
  int64_t scores_stride;  // elements from row to row
  Labels kind;
  const void* labels;  // dense: Bool [R, C]; soft: C [R, C]; sparse: int64 [R, P], negative for none
  int64_t indices;     // P

  const void* dloss = nullptr;  // C [R], and what else backward reads:
  const void* log_negative = nullptr;
  const void* log_positive = nullptr;
  void* dscores = nullptr;  // [R, C] like scores, contiguous

  int64_t blocks() const { return (classes + kMultilabelBlock - 1) / kMultilabelBlock; }  // items of one row
  int64_t items() const { return rows * blocks(); }
};

struct MultilabelKernels {
  void (*forward)(const MultilabelWork&, int64_t item, LogSum* negative, LogSum* positive);
  void (*backward)(const MultilabelWork&, int64_t item);
};

namespace baseline {
MultilabelKernels multilabel_kernels(DType scores);
}
namespace v3 {
MultilabelKernels multilabel_kernels(DType scores);
}

}  // namespace fastnlp
