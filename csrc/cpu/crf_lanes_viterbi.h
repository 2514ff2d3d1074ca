// Viterbi for eight sequences at once, one in each lane, where the tags are few: candidates are compared as torchcrf
// does, with the emission added, so scores, paths and ties are those of crf_decode.h to the bit.
#pragma once
#include "crf_lane_rows.h"

namespace fastnlp {
namespace FASTNLP_ISA {
namespace {

struct LaneViterbi : LaneRows {
  float *a, *next, *e, *buffer;  // [N, 8]
  float* transitions;            // [N, N, 8], spread
  int32_t* from;                 // [length, N, 8]: the best tag before

  static size_t bytes(const CrfProblem& p, int64_t longest) {
    return static_cast<size_t>((4 + p.tags + longest) * p.tags * kLanes) * sizeof(float);
  }

  LaneViterbi(const CrfWork& w, const CrfSequence* s, int count, int64_t padded, void* scratch)
      : LaneRows(w, s, count, Part::whole) {
    const int64_t row = n * kLanes;
    a = static_cast<float*>(scratch);
    next = a + row;
    e = next + row;
    buffer = e + row;
    transitions = buffer + row;
    from = reinterpret_cast<int32_t*>(transitions + n * row);
    spread_matrix(static_cast<const float*>(w.matrices), n, padded, 1, transitions);
  }

  // The best candidates of J tags.
  template <int J>
  FASTNLP_MEMBER void best_of(int64_t j, int32_t* to) {
    Float8 best[J];
    Mask8 index[J] = {};
    for (int b = 0; b < J; ++b) best[b] = (load(a) + load(transitions + (j + b) * kLanes)) + load(e + (j + b) * kLanes);
    Mask8 i8 = {};
    for (int64_t i = 1; i < n; ++i) {
      i8 += 1;
      for (int b = 0; b < J; ++b) {
        const Float8 candidate =
            (load(a + i * kLanes) + load(transitions + (i * n + j + b) * kLanes)) + load(e + (j + b) * kLanes);
        const Mask8 better = candidate > best[b];
        best[b] = better ? candidate : best[b];
        index[b] = better ? i8 : index[b];
      }
    }
    for (int b = 0; b < J; ++b) {
      store(next + (j + b) * kLanes, best[b]);
      std::memcpy(to + (j + b) * kLanes, &index[b], sizeof index[b]);
    }
  }

  // What is set in the answer are sequences with a NaN, or empty: they take the other kernel.
  unsigned run() {
    const int64_t n = this->n;
    Mask8 strange = {};
    read_emissions(0, false, count, buffer, e);
    const float* const start = static_cast<const float*>(work.problem.start);
    for (int64_t j = 0; j < n; ++j) {
      const Float8 emission = load(e + j * kLanes);
      strange |= emission != emission;
      store(a + j * kLanes, splat(start ? start[j] : 0.0f) + emission);
    }
    for (int64_t k = 1; k < lengths[0]; ++k) {
      const int live = longer_than(k);
      const Mask8 lanes = lanes_below<float>(live);
      read_emissions(k, false, live, buffer, e);
      for (int64_t j = 0; j < n; ++j) strange |= load(e + j * kLanes) != load(e + j * kLanes);
      int32_t* const to = from + k * n * kLanes;
      int64_t j = 0;
      for (; j + 3 <= n; j += 3) best_of<3>(j, to);
      if (n - j == 2) best_of<2>(j, to);
      if (n - j == 1) best_of<1>(j, to);
      if (live < count)
        for (j = 0; j < n; ++j) store(next + j * kLanes, lanes ? load(next + j * kLanes) : load(a + j * kLanes));
      float* const kept = a;
      a = next;
      next = kept;
    }

    const float* const end = static_cast<const float*>(work.problem.end);
    Float8 best = {};
    Mask8 tag = {};
    for (int64_t j = 0; j < n; ++j) {
      const Float8 score = load(a + j * kLanes) + splat(end ? end[j] : 0.0f);
      const Mask8 better = j == 0 ? ~Mask8{} : score > best;
      best = better ? score : best;
      tag = better ? Mask8{} + static_cast<int32_t>(j) : tag;
    }
    int32_t at[kLanes];
    for (int l = 0; l < kLanes; ++l) at[l] = tag[l];
    for (int l = 0; l < count; ++l) {
      const CrfSequence& s = sequences[l];
      static_cast<float*>(work.scores)[s.index] = best[l];
      if (s.length < s.steps)
        for (int64_t t = 0; t < s.steps; ++t) work.paths[s.row0 + t] = -1;
    }
    for (int64_t k = lengths[0] - 1; k >= 0; --k) {
      const int live = longer_than(k);
      const Rows rows = rows_of(paths, k, false, live);
      const int32_t* const before = from + k * n * kLanes;
      for (int l = 0; l < live; ++l) {
        *rows.row<int64_t>(l) = at[l];
        if (k > 0) at[l] = before[at[l] * kLanes + l];
      }
    }
    return bits_of(strange & lanes_below<float>(count));
  }
};

// For up to 16 tags. Many tags keep scores alone and take the arg max again along the best path: crf_decode.h.
template <int BLOCK>
void lanes_viterbi_kernels(CrfKernels& kernels) {
  constexpr auto width = padded_tags<float, BLOCK>;
  kernels.viterbi_lanes_scratch = [](const CrfWork& w, int64_t longest) {
    return LaneViterbi::bytes(w.problem, longest);
  };
  kernels.viterbi_lanes = [](const CrfWork& w, const CrfSequence* s, int64_t count, void* scratch) {
    int some = 0;
    while (some < count && s[some].length > 0) ++some;
    const unsigned empty = ((1u << count) - 1) & ~((1u << some) - 1);
    return empty | (some > 0 ? LaneViterbi(w, s, some, width(w.problem.tags), scratch).run() : 0u);
  };
}

}  // namespace
}  // namespace FASTNLP_ISA
}  // namespace fastnlp
