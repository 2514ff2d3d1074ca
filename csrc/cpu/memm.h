// What csrc/cpu/memm_ops.cpp calls: CPU kernels that take one block of steps of one sequence at a time. They are
// compiled for the baseline and for x86-64-v3, in a namespace each; memm_kernels() of either fills the same table.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../memm.h"

namespace fastnlp {

// Everything that the items of one call share. C arrays are void* here.
struct MemmWork {
  MemmProblem problem;
  void* matrices = nullptr;  // see MemmKernels::matrices_size

  double* partial = nullptr;  // [items], written by forward

  const void* grad = nullptr;  // C [B], and what backward writes:
  void* demissions = nullptr;
};

struct MemmKernels {
  // Bytes of `matrices` (filled once by prepare), of a thread's scratch and of the sums of one group of items.
  size_t (*matrices_size)(const MemmProblem&);
  void (*prepare)(const MemmWork&);
  size_t (*scratch)(const MemmProblem&);
  size_t (*sums_size)(const MemmProblem&);

  // Both return the first step whose tag is out of range, in which case they have read nothing with it, or -1.
  int64_t (*forward)(const MemmWork&, int64_t item, void* scratch);
  int64_t (*backward)(const MemmWork&, int64_t item, void* scratch, void* sums);  // sums: zeroed at first, or null
  // Row i of dtransitions, C [N, N], from the sums of all groups in their order.
  void (*reduce)(const MemmWork&, const void* sums, int64_t groups, int64_t i, void* dtransitions);
};

namespace baseline {
MemmKernels memm_kernels(DType emissions);
}
namespace v3 {
MemmKernels memm_kernels(DType emissions);
}

}  // namespace fastnlp
