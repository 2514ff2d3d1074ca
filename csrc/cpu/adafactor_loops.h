// The loops over one row, or over a few rows at once: sums, products and the update. Internal linkage as in simd.h.
#pragma once
#include <algorithm>

#include "adafactor_rows.h"

namespace fastnlp {
namespace {

constexpr int64_t kBlock = 2048;  // longest sum in C
constexpr int64_t kAhead = 512;   // elements of a row that are asked for before they are wanted
constexpr int kRows = 4;          // that enter the column sums at a time, so that those are read and written once

template <class C>
int64_t padded_row(int64_t n) {
  return (n + Simd<C>::lanes - 1) / Simd<C>::lanes * Simd<C>::lanes;
}

template <class C, class T>
double sum_of_squares(const T* row, int64_t n) {
  constexpr int lanes = Simd<C>::lanes;
  double total = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = std::min(n, first + kBlock);
    Vec<C> sum[4] = {};
    int64_t j = first;
    for (; j + 4 * lanes <= last; j += 4 * lanes)
      for (int k = 0; k < 4; ++k) {
        const Vec<C> x = widen(row + j + k * lanes);
        sum[k] += x * x;
      }
    for (; j + lanes <= last; j += lanes) {
      const Vec<C> x = widen(row + j);
      sum[0] += x * x;
    }
    if (j < last) {
      const Vec<C> x = widen_tail(row + j, last - j);
      sum[1] += x * x;
    }
    total += static_cast<double>(sum_of((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
  return total;
}

// kRows rows that will be wanted soon: asked for while others are added, else memory would idle. They are not read, and
// may lie outside of the tensor.
template <class C, class T>
struct RowsAhead {
  const T* first;
  int64_t stride;

  // Half of them at a time: a vector of float32 is half a line of the cache.
  FASTNLP_MEMBER void ask(int64_t j) const {
    const int64_t half = j / Simd<C>::lanes % 2 * (kRows / 2);
    for (int64_t k = half; k < half + kRows / 2; ++k) __builtin_prefetch(first + k * stride + j, 0, 2);
  }
};

// cs += g^2, W += g^2 * weight for K rows. ahead(j) asks for what will be wanted next.
template <int K, class C, class G, class Ahead>
void add_columns(const G* const* rows, const C* weights, int64_t n, C* cs, C* w, const Ahead& ahead) {
  constexpr int lanes = Simd<C>::lanes;
  Vec<C> g[K];
  const auto add = [&](int64_t j) {
    Vec<C> sum = load(cs + j), weighted = load(w + j);
    for (int k = 0; k < K; ++k) {
      const Vec<C> square = g[k] * g[k];
      sum += square;
      weighted += square * splat(weights[k]);
    }
    store(cs + j, sum);
    store(w + j, weighted);
  };
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    for (int k = 0; k < K; ++k) g[k] = widen(rows[k] + j);
    ahead(j);
    add(j);
  }
  if (j == n) return;
  for (int k = 0; k < K; ++k) g[k] = widen_tail(rows[k] + j, n - j);
  add(j);
}

// x += g * p * weight.
template <class C, class P, class G>
void add_product(const G* g, const P* p, C weight, int64_t n, C* x) {
  constexpr int lanes = Simd<C>::lanes;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) store(x + j, load(x + j) + widen(g + j) * widen(p + j) * splat(weight));
  if (j < n) store(x + j, load(x + j) + widen_tail(g + j, n - j) * widen_tail(p + j, n - j) * splat(weight));
}

// Of one row: U = g * min(row * column, limit), d = gain * U, p = keep * p - d, and what surrounds it.
template <class C>
struct Update {
  C keep;
  C gain;
  C row;
  C limit;     // infinity, or what torch mode's clamp leaves
  C beta1;     // momentum, where m is not null
  C fresh;     // 1 - average_decay, where e is not null
  bool still;  // a row without gradient keeps its value
  bool dither;
  uint64_t first;  // number of the first element
};

// p = keep * p - factor * (g * column) for K rows: no momentum, average, clamp or dithering.
template <int K, class C, class P, class G>
void update_plainly(C keep, const C* factors, P* const* rows, const G* const* grads, const C* column, int64_t n) {
  constexpr int lanes = Simd<C>::lanes;
  const auto updated = [&](Vec<C> p, Vec<C> g, Vec<C> c, int k) {
    return splat(keep) * p - splat(factors[k]) * (g * c);
  };
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    const Vec<C> c = load(column + j);
    for (int k = 0; k < K; ++k) {
      if ((j / lanes + k) % 2 == 0) {  // a vector of float32 is half a line of the cache
        __builtin_prefetch(rows[k] + j + kAhead, 1, 2);
        __builtin_prefetch(grads[k] + j + kAhead, 0, 2);
      }
      narrow(rows[k] + j, updated(widen(rows[k] + j), widen(grads[k] + j), c, k));
    }
  }
  if (j == n) return;
  const Vec<C> c = widen_tail(column + j, n - j);
  for (int k = 0; k < K; ++k)
    narrow_tail(rows[k] + j, updated(widen_tail(rows[k] + j, n - j), widen_tail(grads[k] + j, n - j), c, k), n - j);
}

template <class C, class P, class G>
void update_fully(const Update<C>& u, Dither& random, P* p, const G* g, const C* column, C* m, C* e, int64_t n) {
  constexpr int lanes = Simd<C>::lanes;
  for (int64_t j = 0; j < n; j += lanes) {
    const int64_t count = std::min<int64_t>(lanes, n - j);
    const Vec<C> old = widen_tail(p + j, count);
    const Vec<C> factor = splat(u.row) * widen_tail(column + j, count), limit = splat(u.limit);
    Vec<C> change = splat(u.gain) * (widen_tail(g + j, count) * (factor > limit ? limit : factor));
    if (m) {
      change = splat(u.beta1) * widen_tail(m + j, count) + splat(1 - u.beta1) * change;
      narrow_tail(m + j, change, count);
    }
    P stored[8];
    Vec<C> updated = u.still ? old : splat(u.keep) * old - change;
    if constexpr (sizeof(P) == 2)
      if (u.dither && !u.still)
        updated = dithered(stored, updated, random.bits(u.first + static_cast<uint64_t>(j) * random.step));
    narrow(stored, updated);
    for (int64_t k = 0; k < count; ++k) p[j + k] = stored[k];
    if (!e) continue;
    const Vec<C> average = widen_tail(e + j, count);
    narrow_tail(e + j, average + splat(u.fresh) * (widen(stored) - average), count);
  }
}

}  // namespace
}  // namespace fastnlp
