// Log-partition, log-likelihood and their gradients for one sequence: filter from both ends, smooth from the middle.
//
// filter: two chains walk towards the middle edge (m-1, m), the left one over T, the right one over T transposed:
//     a_0 = start + e_0,          a_k(j) = e_k(j) + log sum_i exp(a_{k-1}(i) + T_ij),   k < m
//     b_{L-1} = end + e_{L-1},    b_k(i) = e_k(i) + log sum_j exp(b_{k+1}(j) + T_ij),   k >= m
//     log Z = log sum_ij exp(a_{m-1}(i) + T_ij + b_m(j))
// Neither needs the other, so the processor runs both at once: each hides the other's latency. `messages` keeps a and
// b, shifted to maximum 0: as many numbers as there are emissions, and all that the backward pass needs.
//
// smooth: the marginals gamma_m at the middle follow from the join; from there they walk back through the posterior
// kernels P(i | j) = p_i E_ij / s_j, with p = exp(a_{k-1}), E_ij = exp(T_ij - top_j), s_j = sum_i p_i E_ij:
//     gamma_{k-1}(i) = sum_j gamma_k(j) P(i | j),     xi_ij = gamma_k(j) P(i | j) = the gradient of T at this edge
// Everything is a probability, so nothing overflows where alpha and beta disagree (products of the two give NaN there).
#include "crf_decode.h"

namespace fastnlp {
namespace FASTNLP_ISA {
namespace {

// float32 sums of xi are emptied into float64 ones this often, and gamma is made to sum to 1 again.
constexpr int64_t kFlushSteps = 512;
constexpr int64_t kRenormaliseSteps = 64;

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
  using Base::n;
  using Base::padded;
  using Base::previous;
  using Base::x;
  static constexpr int lanes = Simd<C>::lanes;
  static constexpr int T = tile<BLOCK>;

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
  void read_message(int64_t k, C* to) const { load_row(message(k), n, padded, -static_cast<C>(INFINITY), to); }
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
    if (work.messages) store_row(message(k), n, a);
  }

  // gamma moves to valid step k, whose message is stored, over the entered edge.
  void smooth_step(int64_t k, double coefficient, const CrfSums& sums) {
    const Vec<C> guard = splat(static_cast<C>(kGuard));
    C* const p = p_rows + pending * padded;
    C* const w = weights + pending * padded;
    read_message(k, previous);
    for (int64_t i = 0; i < padded; i += lanes) store(p + i, exponential(load(previous + i)));
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
    for (int64_t i = 0; i < padded; ++i) slow[i] = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (!(x[j] < static_cast<C>(kGuard)) || gamma[j] <= 0) continue;
      const C normaliser = column_logsumexp(matrix, previous, j, n, padded);
      if (normaliser == -static_cast<C>(INFINITY)) continue;
      for (int64_t i = 0; i < n; ++i) {
        const C xi = gamma[j] * std::exp(previous[i] + matrix.scores[i * padded + j] - normaliser);
        slow[i] += xi;
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
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const C xi = pairs[i * padded + j] * matrix.products[i * padded + j];
        if (xi != 0) add_transition(k, i, j, coefficient * xi, sums);  // NaN is not 0
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

// left.a <- the joint of the middle edge seen from its later end (or of the only step), normalised; returns the
// logarithm of its sum.
template <class C, int BLOCK>
double join(Side<C, BLOCK>& left, const Side<C, BLOCK>& right, int64_t length, int64_t middle) {
  if (length > 1) {
    left.enter(middle);
    std::memcpy(left.e, right.a, static_cast<size_t>(left.padded) * sizeof(C));
    left.advance(left.matrix);
  } else if (left.work.problem.end) {
    for (int64_t j = 0; j < left.n; ++j) left.a[j] += static_cast<const C*>(left.work.problem.end)[j];
    left.offset += normalise(left.a, left.padded);
  }
  Vec<C> sum = {};
  for (int64_t j = 0; j < left.padded; j += Simd<C>::lanes) sum += exponential(load(left.a + j));
  return left.offset + std::log(static_cast<double>(sum_of(sum)));
}

// Score of the given tags in float64; sets *bad to the first k with a tag out of range.
template <class C, int BLOCK>
double gold_score(const Side<C, BLOCK>& side, int64_t* bad) {
  const CrfProblem& p = side.work.problem;
  const CrfSequence& s = side.sequence;
  double score = 0;
  int64_t previous = 0;
  for (int64_t k = 0; k < s.length; ++k) {
    const int64_t tag = side.work.tags[side.row(k)];
    if (tag < 0 || tag >= p.tags) {
      *bad = k;
      return 0;
    }
    const int64_t step = p.cu_seqlens ? side.row(k) : s.position(k);
    score += load_emission<C>(p, s.index * p.emissions_batch_stride + step * p.emissions_step_stride + tag);
    if (k > 0) {
      const int64_t edge = p.transitions_per_position
                               ? s.index * p.transitions_batch_stride + (s.position(k) - 1) * p.transitions_step_stride
                               : 0;
      score += static_cast<const C*>(
          p.transitions)[edge + previous * p.transitions_from_stride + tag * p.transitions_to_stride];
    } else if (p.start) {
      score += static_cast<const C*>(p.start)[tag];
    }
    previous = tag;
  }
  if (p.end && s.length > 0) score += static_cast<const C*>(p.end)[previous];
  return score;
}

template <class C, int BLOCK>
int64_t filter(const CrfWork& work, const CrfSequence& sequence, void* scratch) {
  const int64_t length = sequence.length;
  const int64_t middle = (length + 1) / 2;
  C* value = static_cast<C*>(work.value) + sequence.index;
  *value = 0;
  if (length == 0) return -1;
  Side<C, BLOCK> left(work, sequence, true, scratch);
  Side<C, BLOCK> right(work, sequence, false, scratch);
  double gold = 0;
  if (work.tags) {
    int64_t bad = -1;
    gold = gold_score(left, &bad);
    if (bad >= 0) return bad;
  }
  left.filter_first(0);
  if (length > 1) right.filter_first(length - 1);
  for (int64_t k = 1; k < middle; ++k) {
    left.filter_step(k);
    if (k < length - middle) right.filter_step(length - 1 - k);
  }
  const double log_partition = join(left, right, length, middle) + (length > 1 ? right.offset : 0);
  if (!work.tags)
    *value = static_cast<C>(log_partition);
  else if (log_partition == -INFINITY)
    *value = -INFINITY;  // and not NaN where the gold path is forbidden as well
  else
    *value = static_cast<C>(gold - log_partition);
  return -1;
}

template <class C, int BLOCK>
void smooth(const CrfWork& work, const CrfSequence& sequence, void* scratch, const CrfSums& sums) {
  const CrfProblem& p = work.problem;
  const int64_t n = p.tags;
  const int64_t length = sequence.length;
  const int64_t middle = (length + 1) / 2;
  const size_t bytes = p.emissions_dtype == DType::f64 ? 8 : p.emissions_dtype == DType::f32 ? 4 : 2;
  if (length < sequence.steps || length == 0)
    std::memset(static_cast<char*>(work.demissions) + sequence.row0 * n * bytes, 0, sequence.steps * n * bytes);
  if (length == 0) return;

  Side<C, BLOCK> left(work, sequence, true, scratch);
  Side<C, BLOCK> right(work, sequence, false, scratch);
  const auto padded = left.padded;
  left.read_message(middle - 1, left.a);
  left.begin();
  if (length > 1) right.read_message(middle, right.a);
  if (join(left, right, length, middle) == -INFINITY) {
    std::memset(static_cast<char*>(work.demissions) + sequence.row0 * n * bytes, 0, sequence.steps * n * bytes);
    return;
  }

  const double grad = static_cast<const C*>(work.grad)[sequence.index];
  const double sign = work.tags ? -grad : grad;  // of the marginals; the gold path counts +grad
  const auto tag_at = [&](int64_t k) {
    const int64_t tag = work.tags ? work.tags[left.row(k)] : -1;
    return tag < n ? tag : -1;
  };
  const auto write = [&](Side<C, BLOCK>& side, int64_t k) {  // demissions of step k from gamma
    const int64_t tag = tag_at(k);
    for (int64_t j = 0; j < padded; ++j) side.e[j] = static_cast<C>(sign) * side.gamma[j];
    if (tag >= 0) side.e[tag] += static_cast<C>(grad);
    store_emissions_grad(p, work.demissions, left.row(k), side.e);
    for (int boundary = 0; boundary < 2; ++boundary) {
      if (k != (boundary ? length - 1 : 0)) continue;
      double* to = boundary ? sums.end : sums.start;
      for (int64_t j = 0; j < n; ++j) to[j] += side.e[j];
    }
  };

  for (int64_t j = 0; j < padded; j += Simd<C>::lanes) store(left.gamma + j, exponential(load(left.a + j)));
  left.renormalise();
  left.clear_pairs();
  right.clear_pairs();
  if (length > 1) {
    std::memcpy(right.gamma, left.gamma, static_cast<size_t>(padded) * sizeof(C));
    write(right, middle);
    left.smooth_step(middle - 1, sign, sums);  // join() has entered the middle edge
  }
  write(left, middle - 1);
  for (int64_t d = 1; d < middle || middle + d < length; ++d) {
    if (d < middle) {
      left.enter(middle - d);
      left.smooth_step(middle - 1 - d, sign, sums);
      write(left, middle - 1 - d);
    }
    if (middle + d < length) {
      right.enter(middle + d);
      right.smooth_step(middle + d, sign, sums);
      write(right, middle + d);
    }
  }
  if (!p.transitions_per_position && length > 1) {
    left.flush(0, sign, sums);
    right.flush(0, sign, sums);
  }
  if (work.tags && work.transition_grad)
    for (int64_t k = 1; k < length; ++k)
      if (tag_at(k - 1) >= 0 && tag_at(k) >= 0) left.add_transition(k - 1, tag_at(k - 1), tag_at(k), grad, sums);
}

template <class C, int BLOCK>
CrfKernels table() {
  CrfKernels kernels = decode_kernels<C, BLOCK>();
  kernels.matrices_size = [](const CrfProblem& p) -> size_t {
    return p.transitions_per_position ? 0 : 2 * Matrix<C>::elements(p.tags, padded_tags<C, BLOCK>(p.tags)) * sizeof(C);
  };
  kernels.prepare = [](const CrfWork& w) {
    if (w.problem.transitions_per_position || w.problem.batch == 0) return;
    const CrfSequence none = {};
    Side<C, BLOCK>(w, none, true, nullptr).prepare_edge(0);
    Side<C, BLOCK>(w, none, false, nullptr).prepare_edge(0);
  };
  kernels.chain_scratch = [](const CrfProblem& p) -> size_t { return 2 * Side<C, BLOCK>::elements(p) * sizeof(C); };
  kernels.filter = filter<C, BLOCK>;
  kernels.smooth = smooth<C, BLOCK>;
  return kernels;
}

// Tiles of 1, 2, 3, 4, 6 or 8 vectors: a row of up to 64 float32 tags is one tile and stays in registers.
template <class C>
CrfKernels table_for(int64_t tags) {
  const int64_t vectors = padded_tags<C, 1>(tags) / Simd<C>::lanes;
  if (vectors <= 1) return table<C, 1>();
  if (vectors <= 2) return table<C, 2>();
  if (vectors <= 3) return table<C, 3>();
  if (vectors <= 4) return table<C, 4>();
  if (vectors <= 6) return table<C, 6>();
  if (vectors <= 8) return table<C, 8>();
  return table<C, 0>();
}

}  // namespace

CrfKernels crf_kernels(const CrfProblem& problem) {
  return problem.emissions_dtype == DType::f64 ? table_for<double>(problem.tags) : table_for<float>(problem.tags);
}

}  // namespace FASTNLP_ISA
}  // namespace fastnlp
