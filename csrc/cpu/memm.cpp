// Log-likelihood of a maximum-entropy Markov model and its gradients, one row (step) at a time. A row is
//     x_j = (e_j + T[given tag, j]) / 2, or e_j where there is no neighbour,     log p = x_y - log sum_j exp(x_j)
// forward given the tag before it and, bidirectional, once more given the tag behind it, over T transposed. Its
// gradient is indicator - softmax(x), so that no state has to be kept for the backward pass.
#include "memm.h"

#include <algorithm>

#include "simd.h"

namespace fastnlp {
namespace FASTNLP_ISA {
namespace {

template <class C>
int64_t padded_row(int64_t n) {
  return (n + Simd<C>::lanes - 1) / Simd<C>::lanes * Simd<C>::lanes;
}

// The valid steps of one item, with the valid steps before and behind it.
struct Steps {
  int64_t position[kMemmBlock + 2];  // [0]: before, or -1; [count + 1]: behind, or -1
  int64_t count = 0;

  Steps(const MemmProblem& p, int64_t sequence, int64_t first, int64_t last) {
    const Bool* mask = p.mask ? p.mask + sequence * p.steps : nullptr;
    const auto on = [mask](int64_t t) { return !mask || mask[t]; };
    int64_t before = first - 1;
    while (before >= 0 && !on(before)) --before;
    int64_t behind = last;
    while (behind < p.steps && !on(behind)) ++behind;
    position[0] = before;
    for (int64_t t = first; t < last; ++t)
      if (on(t)) position[++count] = t;
    position[count + 1] = behind < p.steps ? behind : -1;
  }
};

FASTNLP_INLINE void store_rounded(float* to, int64_t n, const float* from) { store_row(to, n, from); }
FASTNLP_INLINE void store_rounded(double* to, int64_t n, const double* from) { store_row(to, n, from); }
template <class S>
FASTNLP_INLINE void store_rounded(S* to, int64_t n, const float* from) {
  for (int64_t j = 0; j < n; ++j) to[j] = S::round(from[j]);
}

// S: type of the emissions.
template <class S, class C>
struct Item {
  const MemmProblem& p;
  const int64_t n;
  const int64_t padded;
  const int64_t sequence;
  const int64_t first;
  const int64_t last;
  const Steps steps;
  const int64_t* gold;
  const C* matrix;      // [N, P]
  const C* transposed;  // [N, P]
  C* e;                 // [P] each
  C* x;
  C* de;

  Item(const MemmWork& work, int64_t item, void* scratch)
      : p(work.problem),
        n(p.tags),
        padded(padded_row<C>(n)),
        sequence(item / p.blocks()),
        first(item % p.blocks() * kMemmBlock),
        last(std::min(first + kMemmBlock, p.steps)),
        steps(p, sequence, first, last),
        gold(p.gold + sequence * p.steps),
        matrix(static_cast<const C*>(work.matrices)),
        transposed(matrix + n * padded),
        e(static_cast<C*>(scratch)),
        x(e + padded),
        de(x + padded) {}

  int64_t first_bad_tag() const {
    for (int64_t k = 0; k < steps.count + 2; ++k) {
      const int64_t t = steps.position[k];
      if (t >= 0 && (gold[t] < 0 || gold[t] >= n)) return t;
    }
    return -1;
  }

  void read(int64_t t) {
    const S* row =
        static_cast<const S*>(p.emissions) + sequence * p.emissions_batch_stride + t * p.emissions_step_stride;
    load_row(row, n, padded, -static_cast<C>(INFINITY), e);
  }

  struct Row {
    C gold;   // x_y - max
    C total;  // sum_j exp(x_j - max): NaN where a score is NaN, 0 where all are -inf
  };

  // Fills x with exp(x_j - max). `given`: row of a matrix, or null where the step has no neighbour.
  Row softmax(const C* given, int64_t tag) {
    constexpr int lanes = Simd<C>::lanes;
    const Vec<C> half = splat(static_cast<C>(0.5));
    Vec<C> top = splat(-static_cast<C>(INFINITY));
    for (int64_t j = 0; j < padded; j += lanes) {
      const Vec<C> score = given ? (load(e + j) + load(given + j)) * half : load(e + j);
      store(x + j, score);
      top = maximum(top, score);
    }
    C shift = max_of(top);
    if (shift == -static_cast<C>(INFINITY)) shift = 0;
    const C at_gold = x[tag] - shift;
    Vec<C> total = {};
    for (int64_t j = 0; j < padded; j += lanes) {
      const Vec<C> weight = exponential(load(x + j) - splat(shift));
      store(x + j, weight);
      total += weight;
    }
    return {at_gold, sum_of(total)};
  }

  const C* before(int64_t k) const {
    return steps.position[k - 1] < 0 ? nullptr : matrix + gold[steps.position[k - 1]] * padded;
  }
  const C* behind(int64_t k) const {
    return steps.position[k + 1] < 0 ? nullptr : transposed + gold[steps.position[k + 1]] * padded;
  }

  static double log_p(const Row& row) {
    if (row.total == 0) return -INFINITY;
    return static_cast<double>(row.gold - std::log(row.total));
  }

  double log_likelihood() {
    double sum = 0;
    for (int64_t k = 1; k <= steps.count; ++k) {
      const int64_t t = steps.position[k];
      read(t);
      sum += log_p(softmax(before(k), gold[t]));
      if (p.bidirectional) sum += log_p(softmax(behind(k), gold[t]));
    }
    return p.bidirectional ? sum / 2 : sum;
  }

  // de += grad * (indicator - softmax), and the same onto the row of `sums` that belongs to the given tag.
  void differentiate(const C* given, C* sums, int64_t tag, C grad) {
    constexpr int lanes = Simd<C>::lanes;
    const C total = softmax(given, tag).total;
    if (total == 0) return;  // no distribution: the log-likelihood is -inf whatever the scores
    if (given) grad *= static_cast<C>(0.5);
    const Vec<C> scale = splat(grad / total);
    for (int64_t j = 0; j < padded; j += lanes) store(de + j, load(de + j) - load(x + j) * scale);
    de[tag] += grad;
    if (!given || !sums) return;
    for (int64_t j = 0; j < padded; j += lanes) store(sums + j, load(sums + j) - load(x + j) * scale);
    sums[tag] += grad;
  }

  void gradients(const MemmWork& work, C* sums) {
    const C grad = static_cast<const C*>(work.grad)[sequence] * static_cast<C>(p.bidirectional ? 0.5 : 1.0);
    S* rows = static_cast<S*>(work.demissions) + sequence * p.steps * n;
    std::memset(static_cast<void*>(rows + first * n), 0, static_cast<size_t>((last - first) * n) * sizeof(S));
    for (int64_t k = 1; k <= steps.count; ++k) {
      const int64_t t = steps.position[k], tag = gold[t];
      read(t);
      std::memset(de, 0, static_cast<size_t>(padded) * sizeof(C));
      const C* given = before(k);
      differentiate(given, given && sums ? sums + (given - matrix) : nullptr, tag, grad);
      if (p.bidirectional) {
        given = behind(k);
        differentiate(given, given && sums ? sums + n * padded + (given - transposed) : nullptr, tag, grad);
      }
      store_rounded(rows + t * n, n, de);
    }
  }
};

template <class S, class C>
MemmKernels table() {
  MemmKernels kernels;
  kernels.matrices_size = [](const MemmProblem& p) -> size_t { return 2 * p.tags * padded_row<C>(p.tags) * sizeof(C); };
  kernels.sums_size = kernels.matrices_size;
  kernels.scratch = [](const MemmProblem& p) -> size_t { return 3 * padded_row<C>(p.tags) * sizeof(C); };
  kernels.prepare = [](const MemmWork& work) {
    const MemmProblem& p = work.problem;
    const int64_t n = p.tags, padded = padded_row<C>(n);
    const C* from = static_cast<const C*>(p.transitions);
    C* matrix = static_cast<C*>(work.matrices);
    C* transposed = matrix + n * padded;
    std::memset(work.matrices, 0, static_cast<size_t>(2 * n * padded) * sizeof(C));
    constexpr int64_t tile = 32;
    for (int64_t i0 = 0; i0 < n; i0 += tile)
      for (int64_t j0 = 0; j0 < n; j0 += tile)
        for (int64_t i = i0; i < std::min(i0 + tile, n); ++i)
          for (int64_t j = j0; j < std::min(j0 + tile, n); ++j) {
            const C score = from[i * p.transitions_from_stride + j * p.transitions_to_stride];
            matrix[i * padded + j] = score;
            transposed[j * padded + i] = score;
          }
  };
  kernels.forward = [](const MemmWork& work, int64_t index, void* scratch) -> int64_t {
    Item<S, C> item(work, index, scratch);
    const int64_t bad = item.first_bad_tag();
    if (bad < 0) work.partial[index] = item.log_likelihood();
    return bad;
  };
  kernels.backward = [](const MemmWork& work, int64_t index, void* scratch, void* sums) -> int64_t {
    Item<S, C> item(work, index, scratch);
    const int64_t bad = item.first_bad_tag();
    if (bad < 0) item.gradients(work, static_cast<C*>(sums));
    return bad;
  };
  kernels.reduce = [](const MemmWork& work, const void* sums, int64_t groups, int64_t i, void* dtransitions) {
    const int64_t n = work.problem.tags, padded = padded_row<C>(n), size = 2 * n * padded;
    const C* group = static_cast<const C*>(sums);
    C* to = static_cast<C*>(dtransitions) + i * n;
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t g = 0; g < groups; ++g)
        sum += static_cast<double>(group[g * size + i * padded + j]) +
               static_cast<double>(group[g * size + (n + j) * padded + i]);
      to[j] = static_cast<C>(sum);
    }
  };
  return kernels;
}

}  // namespace

MemmKernels memm_kernels(DType emissions) {
  switch (emissions) {
    case DType::f64: return table<double, double>();
    case DType::f16: return table<Half, float>();
    case DType::bf16: return table<BFloat16, float>();
    default: return table<float, float>();
  }
}

}  // namespace FASTNLP_ISA
}  // namespace fastnlp
