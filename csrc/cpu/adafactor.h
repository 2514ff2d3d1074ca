// What csrc/cpu/adafactor_ops.cpp calls: CPU kernels over rows of one matrix, or over elements of one vector. They are
// compiled for the baseline and for x86-64-v3, in a namespace each; adafactor_kernels() of either fills the same table.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../adafactor.h"

namespace fastnlp {

// One tensor in one step. C arrays are void* here.
struct AdafactorItem {
  const AdafactorTensor* tensor;
  const AdafactorGroup* group;
  void* sums;  // C, of the whole call
  AdafactorScalars step;
  AdafactorGain gain;  // for apply
  uint64_t key;        // of the random bits
  bool sharded;        // torch mode then sums U^2 over the elements that this rank has
};

// Partial sums of a strip, added up by the caller in the order of the strips.
struct AdafactorTotals {
  double grad_squares = 0;
  double param_squares = 0;
  double row_factors = 0;
  double update_squares = 0;
  double product = 0;
};

struct AdafactorKernels {
  int64_t (*padded)(int64_t cols);          // columns of a strip's sums, C [2 or 3, padded]
  size_t (*scratch)(const AdafactorItem&);  // bytes that every function below may need

  // kAdafactorRows and kAdafactorColumns of rows [begin, end) of matrix b. Without `columns` the strip is the whole
  // matrix, and no reduce() follows.
  void (*accumulate)(const AdafactorItem&, int64_t phases, int64_t b, int64_t begin, int64_t end, void* columns,
                     void* scratch, AdafactorTotals&);
  // The column sums of matrix b from those of its strips.
  void (*reduce)(const AdafactorItem&, int64_t b, const void* columns, int64_t strips, double row_factors);
  // kAdafactorNorms of matrix b, and what it leaves to the elements of some matrices in torch mode.
  void (*norms)(const AdafactorItem&, int64_t b, AdafactorTotals&);
  void (*exact)(const AdafactorItem&, int64_t b, int64_t begin, int64_t end, void* scratch, AdafactorTotals&);
  // kAdafactorApply of rows [begin, end) of matrix b.
  void (*apply)(const AdafactorItem&, int64_t b, int64_t begin, int64_t end, void* scratch);

  // Elements [begin, end) of a vector.
  void (*accumulate_vector)(const AdafactorItem&, int64_t phases, int64_t begin, int64_t end, void* scratch,
                            AdafactorTotals&);
  void (*apply_vector)(const AdafactorItem&, int64_t begin, int64_t end, void* scratch);
};

namespace baseline {
AdafactorKernels adafactor_kernels(DType param, DType grad);
}
namespace v3 {
AdafactorKernels adafactor_kernels(DType param, DType grad);
}

}  // namespace fastnlp
