// Multilabel cross entropy of rows of scores s, and its gradients:
//     log_negative = log(1 + sum_{not a label} e^s)      log_positive = log(1 + sum_{label} e^-s)
//     dL/ds = e^(s - log_negative), or -e^(-s - log_positive) of a label
// Soft labels t weigh a class into both sums with 1 - t and t. Labels are left out of the negative sum before it is
// taken; a sum over all classes minus that of the labels cancels. A score of -inf takes no part, whatever its label.
//
// Forward reads a row once. It goes by tiles that fit the first cache: a tile's exponents are laid out with -inf for
// the classes of the other sum, and added under the largest exponent so far.
#include "multilabel.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace fastnlp {
namespace FASTNLP_ISA {
namespace {

constexpr int64_t kTile = 512;

template <class C>
constexpr C kNone = -static_cast<C>(INFINITY);

// sum += sum w e^x over a padded tile; w null: all 1. An x of +inf is taken out of the tile.
template <class C>
void add(LogSum& sum, C* x, const C* w, int64_t padded) {
  constexpr int lanes = Simd<C>::lanes;
  Vec<C> most = splat(kNone<C>);
  for (int64_t j = 0; j < padded; j += lanes) most = maximum(most, load(x + j));
  const C top = max_of(most);
  if (top == kNone<C>) return;
  raise(sum, top);
  if (top == static_cast<C>(INFINITY))
    for (int64_t j = 0; j < padded; ++j) x[j] = x[j] == top ? kNone<C> : x[j];
  const Vec<C> shift = splat(static_cast<C>(sum.top));
  Vec<C> even = {}, odd = {};
  const auto term = [&](int64_t j) {
    const Vec<C> e = exponential(load(x + j) - shift);
    return w ? e * load(w + j) : e;
  };
  int64_t j = 0;
  for (; j + 2 * lanes <= padded; j += 2 * lanes) {
    even += term(j);
    odd += term(j + lanes);
  }
  if (j < padded) even += term(j);
  sum.scaled += static_cast<double>(sum_of(even + odd));
}

// The scores of one item and what the two sums take of them. S: type of the scores.
template <class S, class C>
struct Item {
  static constexpr int lanes = Simd<C>::lanes;
  const MultilabelWork& work;
  const int64_t row;
  const int64_t first;  // class
  const int64_t count;
  const S* scores;

  Item(const MultilabelWork& work, int64_t item)
      : work(work),
        row(item / work.blocks()),
        first(item % work.blocks() * kMultilabelBlock),
        count(std::min(kMultilabelBlock, work.classes - first)),
        scores(static_cast<const S*>(work.scores) + row * work.scores_stride + first) {}

  static int64_t pad(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

  static Mask<C> labels_at(const Bool* label, int64_t n) {
    typedef uint8_t Bytes __attribute__((vector_size(lanes)));
    Bytes bytes = {};
    if (n >= lanes)
      std::memcpy(&bytes, label, lanes);
    else
      std::memcpy(&bytes, label, static_cast<size_t>(n));
    return __builtin_convertvector(bytes, Mask<C>) != Mask<C>{};
  }

  template <class L>
  const L* labels() const {
    return static_cast<const L*>(work.labels) + row * work.classes + first;
  }

  // f(class within this item) for every label of sparse labels, in any order, twice where it is listed twice.
  template <class F>
  void each_index(F f) const {
    const int64_t* index = static_cast<const int64_t*>(work.labels) + row * work.indices;
    for (int64_t p = 0; p < work.indices; ++p) {
      const int64_t c = index[p] - first;
      if (c >= 0 && c < count) f(c);
    }
  }

  // Each of these splits a tile: negative holds its scores on entry, and -inf instead of those of labels in the end;
  // positive holds minus the scores of labels. False where there are none: positive is not written then.
  static bool split(const Bool* label, int64_t n, C* negative, C* positive) {
    bool found = false;
    for (int64_t j = 0; j < n; ++j) found |= label[j];
    if (!found) return false;
    for (int64_t j = 0; j < n; j += lanes) {
      const Mask<C> labelled = labels_at(label + j, n - j);
      const Vec<C> s = load(negative + j), none = splat(kNone<C>);
      store(positive + j, labelled & (s != none) ? -s : none);
      store(negative + j, labelled ? none : s);
    }
    return true;
  }

  // Bit c of `on` is set where class c of the tile is a label.
  static bool split(const uint64_t* on, int64_t n, C* negative, C* positive) {
    bool found = false;
    for (int64_t word = 0; word < (n + 63) / 64; ++word)
      for (uint64_t left = on[word]; left; left &= left - 1) {
        const int64_t j = word * 64 + __builtin_ctzll(left);
        if (!found) std::fill(positive, positive + pad(n), kNone<C>);
        found = true;
        if (negative[j] != kNone<C>) positive[j] = -negative[j];
        negative[j] = kNone<C>;
      }
    return found;
  }

  void forward(LogSum* negative_sum, LogSum* positive_sum) const {
    alignas(64) C negative[kTile], positive[kTile], not_t[kTile], t[kTile];
    uint64_t on[kMultilabelBlock / 64];
    if (work.kind == Labels::sparse) {
      std::fill(on, on + (count + 63) / 64, 0);
      each_index([&](int64_t c) { on[c / 64] |= uint64_t{1} << c % 64; });
    }
    for (int64_t j = 0; j < count; j += kTile) {
      const int64_t n = std::min(kTile, count - j), padded = pad(n);
      load_row(scores + j, n, padded, kNone<C>, negative);
      bool found;
      if (work.kind == Labels::soft) {
        load_row(labels<C>() + j, n, padded, C{0}, t);
        Mask<C> labelled = {};
        for (int64_t i = 0; i < padded; i += lanes) {
          const Vec<C> s = load(negative + i), weight = load(t + i), rest = splat(C{1}) - weight;
          store(not_t + i, rest);
          store(positive + i, (weight == Vec<C>{}) | (s == splat(kNone<C>)) ? splat(kNone<C>) : -s);
          store(negative + i, rest == Vec<C>{} ? splat(kNone<C>) : s);
          labelled |= weight != Vec<C>{};
        }
        found = any(labelled);
        add(*negative_sum, negative, not_t, padded);
      } else {
        found = work.kind == Labels::dense ? split(labels<Bool>() + j, n, negative, positive)
                                           : split(on + j / 64, n, negative, positive);
        add(*negative_sum, negative, static_cast<const C*>(nullptr), padded);
      }
      if (found) add(*positive_sum, positive, work.kind == Labels::soft ? t : nullptr, padded);
    }
  }

  void backward() const {
    const C dloss = static_cast<const C*>(work.dloss)[row];
    const C log_negative = static_cast<const C*>(work.log_negative)[row];
    const C log_positive = static_cast<const C*>(work.log_positive)[row];
    S* to = static_cast<S*>(work.dscores) + row * work.classes + first;
    alignas(64) C s[kTile], t[kTile], d[kTile];
    for (int64_t j = 0; j < count; j += kTile) {
      const int64_t n = std::min(kTile, count - j), padded = pad(n);
      load_row(scores + j, n, padded, kNone<C>, s);
      if (work.kind == Labels::soft) {
        load_row(labels<C>() + j, n, padded, C{0}, t);
        soft_gradients(s, t, dloss, log_negative, log_positive, d, padded);
      } else {
        const Bool* label = work.kind == Labels::dense ? labels<Bool>() + j : nullptr;
        for (int64_t i = 0; i < padded; i += lanes) {
          const Mask<C> labelled = label ? labels_at(label + i, n - i) : Mask<C>{};
          const Vec<C> x = load(s + i), none = splat(kNone<C>);
          const Vec<C> e = exponential(x == none  ? none
                                       : labelled ? -x - splat(log_positive)
                                                  : x - splat(log_negative));
          store(d + i, e * (labelled ? splat(-dloss) : splat(dloss)));
        }
      }
      store_rounded(to + j, n, d);
    }
    if (work.kind == Labels::sparse)
      each_index([&](int64_t c) {
        const C x = scores[c];
        to[c] = rounded(x == kNone<C> ? C{0} : -dloss * std::exp(-x - log_positive));
      });
  }

  // A weight so small that it is no normal number lets an exponent reach 104: the exponential is taken in two halves.
  static void soft_gradients(const C* s, const C* t, C dloss, C log_negative, C log_positive, C* d, int64_t padded) {
    const auto half = [](Vec<C> x, Mask<C> on) { return exponential(on ? x * splat(C{0.5}) : splat(kNone<C>)); };
    for (int64_t i = 0; i < padded; i += lanes) {
      const Vec<C> x = load(s + i), weight = load(t + i), rest = splat(C{1}) - weight;
      const Mask<C> on = x != splat(kNone<C>);
      const Vec<C> down = half(x - splat(log_negative), on & (rest != Vec<C>{}));
      const Vec<C> up = half(-x - splat(log_positive), on & (weight != Vec<C>{}));
      store(d + i, (rest * down * down - weight * up * up) * splat(dloss));
    }
  }

  static S rounded(C x) {
    if constexpr (sizeof(S) == 2)
      return S::round(x);
    else
      return x;
  }
  static void store_rounded(S* to, int64_t n, const C* from) {
    if constexpr (sizeof(S) == 2)
      for (int64_t j = 0; j < n; ++j) to[j] = S::round(from[j]);
    else
      store_row(to, n, from);
  }
};

template <class S, class C>
MultilabelKernels table() {
  MultilabelKernels kernels;
  kernels.forward = [](const MultilabelWork& work, int64_t item, LogSum* negative, LogSum* positive) {
    Item<S, C>(work, item).forward(negative, positive);
  };
  kernels.backward = [](const MultilabelWork& work, int64_t item) { Item<S, C>(work, item).backward(); };
  return kernels;
}

}  // namespace

MultilabelKernels multilabel_kernels(DType scores) {
  switch (scores) {
    case DType::f64: return table<double, double>();
    case DType::f16: return table<Half, float>();
    case DType::bf16: return table<BFloat16, float>();
    default: return table<float, float>();
  }
}

}  // namespace FASTNLP_ISA
}  // namespace fastnlp
