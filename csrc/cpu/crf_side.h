// The left or the right half of one sequence: its chain while it filters, its marginals while it smooths. The
// mathematics is at the top of crf.cpp, which includes this.
#pragma once
#include "crf_chain.h"

namespace fastnlp {
namespace FASTNLP_ISA {
namespace {

// float32 sums of xi are emptied into float64 ones this often, and gamma is made to sum to 1 again: it drifts by about
// 1e-7 a step, and always to one side where the same tag has all of it.
constexpr int64_t kFlushSteps = 512;
constexpr int64_t kRenormaliseSteps = 4;

// Steps whose p and w rows wait to be added to `pairs` together: a product of matrices [N, 16] x [16, N] loads and
// stores each sum once for 16 multiply-adds.
constexpr int64_t kPending = 16;

template <class C, int BLOCK>
struct Side : Chain<C, BLOCK> {
  using Base = Chain<C, BLOCK>;
  using Base::a;
  using Base::advance;
  using Base::begin;
  using Base::e;
  using Base::lanes;
  using Base::n;
  using Base::padded;
  using Base::T;
  using Base::x;

  const CrfWork& work;
  const CrfSequence& sequence;
  const bool left;
  Matrix<C> matrix;
  C* gamma;
  C* slow;
  C* pairs;    // [N, P] sums of p_i w_j, to be multiplied by E_ij
  C* p_rows;   // [16, P]
  C* weights;  // [16, P] w_j = gamma_j / s_j
  int64_t pending = 0;
  int64_t steps = 0;

  static int64_t elements(const CrfProblem& problem) {
    const int64_t padded = padded_tags<C, BLOCK>(problem.tags);
    const int64_t own = problem.transitions_per_position ? Matrix<C>::elements(problem.tags, padded) : 0;
    return own + (Base::rows + 2 + problem.tags + 2 * kPending) * padded;
  }

  Side(const CrfWork& w, const CrfSequence& s, bool left, void* scratch) : work(w), sequence(s), left(left) {
    C* memory = this->place(static_cast<C*>(scratch) + (left ? 0 : elements(w.problem)), w.problem.tags);
    gamma = memory;
    slow = gamma + padded;
    p_rows = slow + padded;
    weights = p_rows + kPending * padded;
    pairs = weights + kPending * padded;
    const int64_t behind = left ? 0 : Matrix<C>::elements(n, padded);
    matrix = w.problem.transitions_per_position ? Matrix<C>(pairs + n * padded, n, padded)
                                                : Matrix<C>(static_cast<C*>(w.matrices) + behind, n, padded);
  }

  int64_t row(int64_t k) const { return sequence.row0 + sequence.position(k); }
  C* message(int64_t k) const { return static_cast<C*>(work.messages) + row(k) * n; }
  void read_emissions(int64_t k, C* to) const {
    const CrfProblem& p = work.problem;
    const int64_t step = p.cu_seqlens ? row(k) : sequence.position(k);
    load_emissions(p, sequence.index * p.emissions_batch_stride + step * p.emissions_step_stride, padded, to);
  }

  // Makes `matrix` that of the edge whose later end is valid step k.
  void enter(int64_t k) {
    if (!work.problem.transitions_per_position) return;
    prepare_edge(sequence.index * work.problem.transitions_batch_stride +
                 (sequence.position(k) - 1) * work.problem.transitions_step_stride);
  }
  void prepare_edge(int64_t offset) {
    const C* transitions = static_cast<const C*>(work.problem.transitions) + offset;
    const int64_t from = work.problem.transitions_from_stride, to = work.problem.transitions_to_stride;
    matrix.prepare(transitions, left ? from : to, left ? to : from, n, padded);
  }

  void filter_first(int64_t k) {
    const C* boundary = static_cast<const C*>(left ? work.problem.start : work.problem.end);
    read_emissions(k, a);
    if (boundary)
      for (int64_t j = 0; j < n; ++j) a[j] += boundary[j];
    begin();
    keep(k);
  }
  void filter_step(int64_t k) {
    enter(left ? k : k + 1);
    read_emissions(k, e);
    advance(matrix);
    keep(k);
  }
  void keep(int64_t k) {
    if (work.messages) this->write(message(k));
  }

  // gamma moves to valid step k, whose message is stored, over the entered edge.
  void smooth_step(int64_t k, double coefficient, const CrfSums& sums) {
    const Vec<C> guard = splat(static_cast<C>(kGuard));
    C* const p = p_rows + pending * padded;
    C* const w = weights + pending * padded;
    this->p = p;
    this->read(message(k));
    bool any_slow = false;
    for (int64_t block = 0; block < padded; block += T * lanes) {
      Vec<C> s[T];
      dot_block<C, T>(p, matrix.products + block, n, padded, s);
      Mask<C> below = {};
      for (int v = 0; v < T; ++v) {
        const int64_t j = block + v * lanes;
        below |= s[v] < guard;
        store(w + j, s[v] < guard ? Vec<C>{} : load(gamma + j) / s[v]);
        store(x + j, s[v]);
      }
      any_slow = any_slow || any(below);
    }
    if (any_slow) slow_columns(k, coefficient, sums);
    for (int64_t block = 0; block < padded; block += T * lanes) {
      Vec<C> r[T];
      dot_block<C, T>(w, matrix.transposed + block, n, padded, r);
      for (int v = 0; v < T; ++v) {
        const int64_t i = block + v * lanes;
        const Vec<C> moved = load(p + i) * r[v];
        store(gamma + i, any_slow ? moved + load(slow + i) : moved);
      }
    }
    if (++steps % kRenormaliseSteps == 0) renormalise();
    if (work.transition_grad && ++pending == kPending) add_pending();
    if (work.problem.transitions_per_position || steps % kFlushSteps == 0) flush(k, coefficient, sums);
  }

  // pairs_ij += sum of p_i w_j over the pending steps.
  void add_pending() {
    constexpr int together = T <= 2 ? 4 : T <= 4 ? 2 : 1;
    int64_t i = 0;
    for (; i + together <= n; i += together) add_rows<together>(i);
    for (; i < n; ++i) add_rows<1>(i);
    pending = 0;
  }
  template <int ROWS>
  void add_rows(int64_t i) {
    for (int64_t block = 0; block < padded; block += T * lanes) {
      Vec<C> sums[ROWS][T];
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < T; ++v) sums[r][v] = load(pairs + (i + r) * padded + block + v * lanes);
      for (int64_t u = 0; u < pending; ++u)
        for (int r = 0; r < ROWS; ++r)
          for (int v = 0; v < T; ++v)
            sums[r][v] += splat(p_rows[u * padded + i + r]) * load(weights + u * padded + block + v * lanes);
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < T; ++v) store(pairs + (i + r) * padded + block + v * lanes, sums[r][v]);
    }
  }

  // The columns whose sum (in x) is below the guard, exactly: their part of gamma at the earlier step, into `slow`.
  __attribute__((noinline)) void slow_columns(int64_t k, double coefficient, const CrfSums& sums) {
    this->logarithms();
    for (int64_t i = 0; i < padded; ++i) slow[i] = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (!(x[j] < static_cast<C>(kGuard)) || gamma[j] <= 0) continue;
      const ColumnSum column = sum_column(matrix, a, j, n, padded);
      if (column.top == -INFINITY) continue;
      for (int64_t i = 0; i < n; ++i) {
        const double score = static_cast<double>(a[i]) + matrix.scores[i * padded + j];
        const double xi = gamma[j] * (std::exp(score - column.top) / column.scaled);
        slow[i] += static_cast<C>(xi);
        if (work.transition_grad) add_transition(k, i, j, coefficient * xi, sums);
      }
    }
  }

  // (from, to) as this chain walks; k is the valid step that the chain's edge starts from.
  void add_transition(int64_t k, int64_t from, int64_t to, double value, const CrfSums& sums) {
    const int64_t cell = left ? from * n + to : to * n + from;
    if (work.problem.transitions_per_position)
      edge_gradient(left ? k + 1 : k)[cell] += static_cast<C>(value);
    else
      sums.transitions[cell] += value;
  }
  C* edge_gradient(int64_t later) const {
    const int64_t edge = sequence.index * (work.problem.steps - 1) + sequence.position(later) - 1;
    return static_cast<C*>(work.dtransitions_per_position) + edge * n * n;
  }

  void flush(int64_t k, double coefficient, const CrfSums& sums) {
    if (!work.transition_grad) return;
    add_pending();
    const bool each = work.problem.transitions_per_position;
    for (int64_t i = 0; i < n; ++i) {
      const C* pair = pairs + i * padded;
      const C* product = matrix.products + i * padded;
      if (each)
        for (int64_t j = 0; j < n; ++j) add_transition(k, i, j, coefficient * (pair[j] * product[j]), sums);
      else if (left)
        for (int64_t j = 0; j < n; ++j) sums.transitions[i * n + j] += coefficient * (pair[j] * product[j]);
      else
        for (int64_t j = 0; j < n; ++j) sums.transitions[j * n + i] += coefficient * (pair[j] * product[j]);
    }
    clear_pairs();
  }
  void clear_pairs() {
    if (work.transition_grad) std::memset(pairs, 0, static_cast<size_t>(n * padded) * sizeof(C));
  }
  void renormalise() {
    Vec<C> total = {};
    for (int64_t j = 0; j < padded; j += lanes) total += load(gamma + j);
    const C sum = sum_of(total);
    if (!(sum > 0)) return;
    for (int64_t j = 0; j < padded; j += lanes) store(gamma + j, load(gamma + j) / splat(sum));
  }
};

}  // namespace
}  // namespace FASTNLP_ISA
}  // namespace fastnlp
