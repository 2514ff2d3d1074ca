// What csrc/cpu/crf_ops.cpp calls: CPU kernels that take one sequence at a time. They are compiled for the baseline
// and for x86-64-v3, in a namespace each; crf_kernels() of either fills the same table.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../crf.h"

namespace fastnlp {

// The valid steps of one sequence: its rows are row0 + position(k), k = 0 .. length - 1.
struct CrfSequence {
  int64_t index;  // b
  int64_t row0;   // row of step 0 in contiguous outputs
  int64_t steps;  // T, or the packed length
  int64_t length;
  const int32_t* positions;  // null: all steps are valid

  int64_t position(int64_t k) const { return positions ? positions[k] : k; }
};

// Everything that the sequences of one call share. C arrays are void* here: C is the compute type of the problem.
struct CrfWork {
  CrfProblem problem;
  void* matrices = nullptr;       // see CrfKernels::matrices_size
  const int64_t* tags = nullptr;  // rows, or null: log-partition instead of log-likelihood
  void* messages = nullptr;       // C [rows, N]: filter writes it where given, smooth reads it

  void* value = nullptr;  // C [B], written by filter

  const void* grad = nullptr;  // C [B], and what smooth writes:
  void* demissions = nullptr;
  bool transition_grad = false;
  void* dtransitions_per_position = nullptr;  // C [B, T-1, N, N]

  int64_t* paths = nullptr;  // rows, rank-major where there are several
  void* scores = nullptr;    // C
  int64_t n_best = 1;
  const float* uniforms = nullptr;  // [samples, rows]
  int64_t samples = 0;
  int64_t rows = 0;
};

constexpr int kSequenceLanes = 8;
constexpr int kPathGroup = 4;  // sequences of one call of `viterbi`

// Float64 sums over the sequences of one group, added up in the order of the groups: [N, N], [N], [N].
struct CrfSums {
  double* transitions;
  double* start;
  double* end;
};

struct CrfKernels {
  // Bytes of `matrices` (shared by all sequences, filled once by prepare; nothing to prepare per position) and of the
  // scratch that a thread gives to a kernel; the scratch of a kernel that walks a whole sequence grows with its length.
  size_t (*matrices_size)(const CrfProblem&);
  void (*prepare)(const CrfWork&);
  size_t (*chain_scratch)(const CrfProblem&);
  size_t (*path_scratch)(const CrfWork&, int64_t longest);
  size_t (*n_best_scratch)(const CrfWork&, int64_t longest);

  int64_t (*filter)(const CrfWork&, const CrfSequence&, void* scratch);  // the first k with a tag out of range, or -1
  void (*smooth)(const CrfWork&, const CrfSequence&, void* scratch, const CrfSums&);
  // The same for up to eight sequences at once, longest first, in lanes_scratch bytes. What is set in the answer are
  // the sequences that need the kernels above instead; nothing is added to the sums for them. Null where there is no
  // such kernel for the problem.
  unsigned (*filter_lanes)(const CrfWork&, const CrfSequence*, int64_t count, void* scratch);
  unsigned (*smooth_lanes)(const CrfWork&, const CrfSequence*, int64_t count, void* scratch, const CrfSums&);
  unsigned (*viterbi_lanes)(const CrfWork&, const CrfSequence*, int64_t count, void* scratch);
  size_t (*lanes_scratch)(const CrfProblem&);
  size_t (*viterbi_lanes_scratch)(const CrfWork&, int64_t longest);
  // Up to kPathGroup sequences, longest first, each with the scratch of a path.
  void (*viterbi)(const CrfWork&, const CrfSequence*, int64_t count, void* scratch);
  void (*viterbi_n_best)(const CrfWork&, const CrfSequence&, void* scratch);
  void (*sample)(const CrfWork&, const CrfSequence&, void* scratch);
  void (*entropy)(const CrfWork&, const CrfSequence&, void* scratch);
};

namespace baseline {
CrfKernels crf_kernels(const CrfProblem&);
}
namespace v3 {
CrfKernels crf_kernels(const CrfProblem&);
}

}  // namespace fastnlp
