// Where the rows of up to eight sequences stand, one sequence in each lane: whole ones, or their left or right halves.
#pragma once
#include "crf_chain.h"
#include "lanes.h"

namespace fastnlp {
namespace {

enum class Part { whole, left, right };

// Sequences are sorted, longest first, so that those with a step k are always the first lanes.
struct LaneRows {
  const CrfWork& work;
  const CrfSequence* const sequences;
  const int count;
  const bool forwards;  // from the outer end of the part
  const bool narrow;    // emissions of half precision
  const int64_t n;
  int64_t lengths[kLanes];  // of the parts
  bool holes = false;
  Strip emissions, messages, demissions, tags, paths;

  LaneRows(const CrfWork& w, const CrfSequence* s, int count, Part part)
      : work(w),
        sequences(s),
        count(count),
        forwards(part != Part::right),
        narrow(w.problem.emissions_dtype != DType::f32),
        n(w.problem.tags) {
    const CrfProblem& problem = w.problem;
    const int64_t size = narrow ? 2 : 4;
    for (int l = 0; l < kLanes; ++l) {
      const CrfSequence& own = s[l < count ? l : 0];
      holes = holes || own.positions;
      lengths[l] = part == Part::whole ? own.length : part == Part::left ? (own.length + 1) / 2 : own.length / 2;
      const int64_t outermost = forwards ? own.row0 : own.row0 + own.length - 1;
      const int64_t innermost = forwards ? own.row0 + lengths[l] - 1 : own.row0 + own.length - lengths[l];
      const auto place = [&](Strip& strip, const void* base, int64_t offset, int64_t bytes) {
        strip.bytes = bytes;
        strip.zero.at[l] = reinterpret_cast<int64_t>(base) + offset;
        strip.ends[0].at[l] = strip.zero.at[l] + outermost * bytes;
        strip.ends[1].at[l] = strip.zero.at[l] + innermost * bytes;
      };
      const int64_t step = problem.emissions_step_stride;
      place(emissions, problem.emissions,
            problem.cu_seqlens ? 0 : (own.index * problem.emissions_batch_stride - own.row0 * step) * size,
            step * size);
      place(messages, w.messages, 0, n * static_cast<int64_t>(sizeof(float)));
      place(demissions, w.demissions, 0, n * size);
      place(tags, w.tags, 0, sizeof(int64_t));
      place(paths, w.paths, 0, sizeof(int64_t));
    }
  }

  // How many parts have more than `steps` steps.
  int longer_than(int64_t steps) const {
    int lanes = count;
    while (lanes > 0 && lengths[lanes - 1] <= steps) --lanes;
    return lanes;
  }
  // The rows of a step, counted from the outer end or from the inner one. The lanes behind `live` repeat lane 0.
  FASTNLP_MEMBER Rows rows_of(const Strip& strip, int64_t step, bool inwards, int live) const {
    Rows rows;
    const int64_t move = (forwards == inwards ? -step : step) * strip.bytes;
    for (int l = 0; l < kLanes; ++l) rows.at[l] = strip.ends[inwards].at[l] + move;
    if (holes)
      for (int l = 0; l < live; ++l) {
        const CrfSequence& s = sequences[l];
        const int64_t k = inwards ? lengths[l] - 1 - step : step;
        rows.at[l] = strip.zero.at[l] + (s.row0 + s.position(forwards ? k : s.length - 1 - k)) * strip.bytes;
      }
    for (int l = live; l < kLanes; ++l) rows.at[l] = rows.at[0];
    return rows;
  }
  // to <- the emissions of a step. Half precision goes through the buffer [8, N].
  FASTNLP_MEMBER void read_emissions(int64_t step, bool inwards, int live, float* buffer, float* to) const {
    Rows rows = rows_of(emissions, step, inwards, live);
    if (narrow)
      for (int l = 0; l < kLanes; ++l) {
        const char* const base = static_cast<const char*>(work.problem.emissions);
        load_emissions(work.problem, (rows.row<const char>(l) - base) / 2, n, buffer + l * n);
        rows.at[l] = reinterpret_cast<int64_t>(buffer + l * n);
      }
    gather(rows, n, to);
  }
};

}  // namespace
}  // namespace fastnlp
