// The given path: its score, and what it adds to the gradient of the transitions.
#pragma once
#include "crf_chain.h"

namespace fastnlp {
namespace FASTNLP_ISA {
namespace {

// In float64; sets *bad to the first k with a tag out of range.
template <class C>
double gold_score(const CrfWork& work, const CrfSequence& s, int64_t* bad) {
  const CrfProblem& p = work.problem;
  const C* const transitions = static_cast<const C*>(p.transitions);
  double emissions = 0, edges = 0;  // two sums, because each waits for its own additions
  int64_t previous = 0;
  for (int64_t k = 0; k < s.length; ++k) {
    const int64_t t = s.position(k);
    const int64_t tag = work.tags[s.row0 + t];
    if (tag < 0 || tag >= p.tags) {
      *bad = k;
      return 0;
    }
    const int64_t step = p.cu_seqlens ? s.row0 + t : t;
    emissions += load_emission<C>(p, s.index * p.emissions_batch_stride + step * p.emissions_step_stride + tag);
    if (k > 0) {
      const int64_t edge =
          s.index * p.transitions_batch_stride + (t - 1) * p.transitions_step_stride;  // 0 where shared
      edges += transitions[edge + previous * p.transitions_from_stride + tag * p.transitions_to_stride];
    } else if (p.start) {
      edges += static_cast<const C*>(p.start)[tag];
    }
    previous = tag;
  }
  if (p.end && s.length > 0) edges += static_cast<const C*>(p.end)[previous];
  return emissions + edges;
}

// Where one matrix serves every position. Steps with a tag out of range count nothing.
inline void add_gold_transitions(const CrfWork& work, const CrfSequence& s, double grad, const CrfSums& sums) {
  const int64_t n = work.problem.tags;
  int64_t previous = -1;
  for (int64_t k = 0; k < s.length; ++k) {
    const int64_t given = work.tags[s.row0 + s.position(k)];
    const int64_t tag = given < n ? given : -1;
    if (previous >= 0 && tag >= 0) sums.transitions[previous * n + tag] += grad;
    previous = tag;
  }
}

}  // namespace
}  // namespace FASTNLP_ISA
}  // namespace fastnlp
