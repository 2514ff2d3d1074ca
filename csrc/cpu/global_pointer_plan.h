// What the host works out before kernels run: sequences without their masked tokens, angles, labels by tile.
#pragma once
#include <algorithm>
#include <vector>

#include "../global_pointer_call.h"
#include "global_pointer.h"
#include "threads.h"

namespace fastnlp {

// The sequences of a call, longest first so that the last thread to finish has little left to do.
struct SpanPlan {
  std::vector<SpanSequence> sequences;
  std::vector<int32_t> position, first, last;  // [B or 1, n]
  std::vector<int32_t> token;                  // [B or 1, n]: the number of a token among the valid ones, or -1
  int64_t cells = 0;                           // of all items

  explicit SpanPlan(const GlobalPointerProblem& p) {
    const int64_t different = p.mask ? p.batch : std::min<int64_t>(1, p.batch), n = p.length;
    for (std::vector<int32_t>* column : {&position, &first, &last, &token}) column->resize(different * n);
    for (int64_t b = 0; b < p.batch; ++b) {
      if (b < different)
        add(p, b);
      else
        sequences.push_back(sequences[0]);
      sequences[b].index = b;
      for (int64_t t = 0; t < sequences[b].count; ++t)
        cells += (sequences[b].last[t] - sequences[b].first[t]) * p.dot_heads;
    }
    std::stable_sort(sequences.begin(), sequences.end(),
                     [](const SpanSequence& a, const SpanSequence& b) { return a.count > b.count; });
  }

  const int32_t* positions(const GlobalPointerProblem& p, int64_t b) const {
    return position.data() + (p.mask ? b * p.length : 0);
  }
  const int32_t* tokens(const GlobalPointerProblem& p, const SpanSequence& sequence) const {
    return token.data() + (p.mask ? sequence.index * p.length : 0);
  }

 private:
  void add(const GlobalPointerProblem& p, int64_t b) {
    const int64_t n = p.length;
    int32_t* at = position.data() + b * n;
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const bool on = !p.mask || p.mask[b * n + i];
      token[b * n + i] = on ? static_cast<int32_t>(count) : -1;
      if (on) at[count++] = static_cast<int32_t>(i);
    }
    const int64_t reach = p.max_span_length > 0 ? std::min(p.max_span_length, n) : n;
    int64_t from = 0, to = 0;
    for (int64_t t = 0; t < count; ++t) {
      while (at[from] <= at[t] - reach) ++from;
      while (to < count && at[to] < at[t] + reach) ++to;
      first[b * n + t] = static_cast<int32_t>(p.tril_mask ? t : from);
      last[b * n + t] = static_cast<int32_t>(to);
    }
    sequences.push_back({b, count, at, first.data() + b * n, last.data() + b * n});
  }
};

// Cosines and sines of position * 10000^(-2m / d).
class SpanRotations {
 public:
  explicit SpanRotations(const GlobalPointerProblem& p)
      : p_(p),
        rows_(p.position_ids ? p.batch * p.length : p.length),
        width_((p.size / 2 + 7) / 8 * 8),
        cosines_(bytes()),
        sines_(bytes()) {
    if (p.dtype == DType::f64)
      fill(static_cast<double*>(cosines_.get()), static_cast<double*>(sines_.get()));
    else
      fill(static_cast<float*>(cosines_.get()), static_cast<float*>(sines_.get()));
  }
  SpanAngles get() const { return {cosines_.get(), sines_.get(), width_, p_.position_ids != nullptr}; }

 private:
  size_t bytes() const { return static_cast<size_t>(rows_ * width_) * (p_.dtype == DType::f64 ? 8 : 4); }
  int64_t position(int64_t row) const { return p_.position_ids ? p_.position_ids[row] : row; }

  // For float32, angles are taken anew every 32 rows; from one position to the next they are turned by a step.
  template <class C>
  void fill(C* cosines, C* sines) const {
    constexpr int64_t run = 32;
    const int64_t pairs = p_.size / 2;
    std::vector<double> theta(pairs), step_cosine(pairs), step_sine(pairs);
    for (int64_t m = 0; m < pairs; ++m) {
      theta[m] = std::pow(10000.0, -2.0 * static_cast<double>(m) / static_cast<double>(p_.size));
      step_cosine[m] = std::cos(theta[m]);
      step_sine[m] = std::sin(theta[m]);
    }
    const int64_t runs = (rows_ + run - 1) / run;
    parallel_for(0, runs, std::max<int64_t>(1, 256 / pairs), [&](int64_t begin, int64_t end) {
      std::vector<double> cosine(width_), sine(width_);
      for (int64_t row = begin * run; row < std::min(end * run, rows_); ++row) {
        const bool follows =
            sizeof(C) == 4 && row % run != 0 && position(row - 1) < INT64_MAX && position(row) == position(row - 1) + 1;
        for (int64_t m = 0; m < pairs; ++m) {
          const double angle = static_cast<double>(position(row)) * theta[m], c = cosine[m], s = sine[m];
          cosine[m] = follows ? c * step_cosine[m] - s * step_sine[m] : std::cos(angle);
          sine[m] = follows ? s * step_cosine[m] + c * step_sine[m] : std::sin(angle);
        }
        std::copy(cosine.begin(), cosine.end(), cosines + row * width_);
        std::copy(sine.begin(), sine.end(), sines + row * width_);
      }
    });
  }

  const GlobalPointerProblem& p_;
  const int64_t rows_;
  const int64_t width_;
  const Memory cosines_;
  const Memory sines_;
};

// The labels of one item by tile. `cells`: sorted, see csrc/ops.cpp. Whatever is not a valid cell is passed over.
class SpanLabels {
 public:
  SpanLabels(const GlobalPointerProblem& p, const SpanPlan& plan, const SpanSequence& sequence, int64_t dot_head,
             const int64_t* cells, int64_t count)
      : p_(p), sequence_(sequence), token_(plan.tokens(p, sequence)) {
    const int64_t heads = p.heads_per_dot(), area = p.length * p.length;
    const int64_t tiles = sequence.row_blocks() * sequence.column_blocks();
    tiles_.assign(tiles + 2, 0);
    const int64_t* const excluded_end = std::lower_bound(cells, cells + count, 0);
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t base = (sequence.index * p.heads + dot_head * heads + h) * area;
        // Excluded cells are stored as -1 - key: they sort downwards.
        const int64_t* none = std::lower_bound(cells, excluded_end, -base - area);
        const int64_t* none_end = std::lower_bound(none, excluded_end, -base);
        const int64_t* some = std::lower_bound(excluded_end, cells + count, base);
        const int64_t* some_end = std::lower_bound(some, cells + count, base + area);
        int64_t before = -1;
        while (none < none_end || some < some_end) {
          const int64_t excluded = none < none_end ? -1 - none_end[-1] : INT64_MAX;
          const int64_t labelled = some < some_end ? *some : INT64_MAX;
          const int64_t key = std::min(excluded, labelled);
          const bool is_label = none == none_end || labelled < excluded;
          if (is_label)
            ++some;
          else
            --none_end;
          // Cells that are not sorted may lead anywhere.
          if (key != before && key >= base && key - base < area) place(pass, key - base, h, is_label);
          before = key;
        }
      }
      if (pass == 0) {
        for (int64_t t = 1; t < tiles + 2; ++t) tiles_[t] += tiles_[t - 1];
        marks_.resize(tiles_[tiles + 1]);
      }
    }
  }
  SpanMarks get() { return {tiles_.data(), marks_.data()}; }

 private:
  // First pass: counts at tile + 2. Second pass: the start of tile t is at t + 1 and moves on to its end.
  void place(int pass, int64_t cell, int64_t head, bool positive) {
    const int32_t start = token_[cell / p_.length], end = token_[cell % p_.length];
    if (start < 0 || end < sequence_.first[start] || end >= sequence_.last[start]) return;
    const int64_t tile = start / kSpanRows * sequence_.column_blocks() + end / kSpanColumns;
    if (pass == 0)
      ++tiles_[tile + 2];
    else
      marks_[tiles_[tile + 1]++] = {start, end, static_cast<int32_t>(head), positive, 0};
  }

  const GlobalPointerProblem& p_;
  const SpanSequence& sequence_;
  const int32_t* token_;
  std::vector<int64_t> tiles_;
  std::vector<SpanMark> marks_;
};

}  // namespace fastnlp
