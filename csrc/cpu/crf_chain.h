// One chain of a CRF: a prepared transition matrix and the guarded semi-log step that all CPU kernels share.
#pragma once
#include "crf.h"
#include "simd.h"

namespace fastnlp {
namespace {

// Rows of emissions of any dtype, `offset` elements behind the base, to and from the compute type.
FASTNLP_INLINE void load_emissions(const CrfProblem& p, int64_t offset, int64_t padded, float* to) {
  const float fill = -INFINITY;
  if (p.emissions_dtype == DType::f32)
    load_row(static_cast<const float*>(p.emissions) + offset, p.tags, padded, fill, to);
  else if (p.emissions_dtype == DType::bf16)
    load_row(static_cast<const BFloat16*>(p.emissions) + offset, p.tags, padded, fill, to);
  else
    load_row(static_cast<const Half*>(p.emissions) + offset, p.tags, padded, fill, to);
}
FASTNLP_INLINE void load_emissions(const CrfProblem& p, int64_t offset, int64_t padded, double* to) {
  load_row(static_cast<const double*>(p.emissions) + offset, p.tags, padded, -static_cast<double>(INFINITY), to);
}
template <class C>
FASTNLP_INLINE C load_emission(const CrfProblem& p, int64_t offset) {
  switch (p.emissions_dtype) {
    case DType::f32: return static_cast<const float*>(p.emissions)[offset];
    case DType::f64: return static_cast<C>(static_cast<const double*>(p.emissions)[offset]);
    case DType::bf16: return static_cast<const BFloat16*>(p.emissions)[offset];
    default: return static_cast<const Half*>(p.emissions)[offset];
  }
}
FASTNLP_INLINE void store_emissions_grad(const CrfProblem& p, void* demissions, int64_t row, const float* from) {
  const int64_t n = p.tags;
  if (p.emissions_dtype == DType::f32) return store_row(static_cast<float*>(demissions) + row * n, n, from);
  for (int64_t j = 0; j < n; ++j) {
    if (p.emissions_dtype == DType::bf16)
      static_cast<BFloat16*>(demissions)[row * n + j] = BFloat16::round(from[j]);
    else
      static_cast<Half*>(demissions)[row * n + j] = Half::round(from[j]);
  }
}
FASTNLP_INLINE void store_emissions_grad(const CrfProblem& p, void* demissions, int64_t row, const double* from) {
  store_row(static_cast<double*>(demissions) + row * p.tags, p.tags, from);
}

// A step works on tiles of up to 8 vectors of tags, as many sums as stay in registers. BLOCK is the number of vectors
// of a row that is one tile, which makes every loop over it a constant; 0 stands for rows of several tiles of 8.
template <int BLOCK>
constexpr int tile = BLOCK > 0 ? BLOCK : 8;

template <class C, int BLOCK>
constexpr int64_t padded_tags(int64_t n) {
  constexpr int64_t width = tile<BLOCK> * Simd<C>::lanes;
  return (n + width - 1) / width * width;
}

template <class C, int BLOCK>
struct Padded {
  int64_t value;
  operator int64_t() const { return BLOCK > 0 ? BLOCK * Simd<C>::lanes : value; }
};

// Below this sum of products a column is recomputed in the log domain. Terms that exp() flushed to zero are below
// 1e-38 each, so a sum above the guard lost less than N * 1e-14 of its value; plain scaled products without the guard
// are off by 2.8 nats at emission std 30 with BIO bans, and by infinity at 100.
constexpr double kGuard = 1e-24;

// T[from, to] seen by a chain that walks from `from` to `to`; the right chain of a CRF walks the transposed matrix.
template <class C>
struct Matrix {
  C* scores;      // [N, P] T_ij, -inf in the padding
  C* products;    // [N, P] exp(T_ij - top_j), 1 in the padding (so that padding never looks like a slow column)
  C* transposed;  // [N, P] products of [to, from], 0 in the padding
  C* top;         // [P] max_i T_ij, 0 where that is -inf and in the padding

  static int64_t elements(int64_t n, int64_t padded) { return 3 * n * padded + padded; }
  Matrix() = default;
  Matrix(C* memory, int64_t n, int64_t padded)
      : scores(memory),
        products(memory + n * padded),
        transposed(memory + 2 * n * padded),
        top(memory + 3 * n * padded) {}

  void prepare(const C* transitions, int64_t from_stride, int64_t to_stride, int64_t n, int64_t padded) {
    constexpr int lanes = Simd<C>::lanes;
    const C infinity = INFINITY;
    for (int64_t j = 0; j < padded; ++j) top[j] = -infinity;
    for (int64_t i = 0; i < n; ++i) {
      C* row = scores + i * padded;
      const C* from = transitions + i * from_stride;
      for (int64_t j = 0; j < n; ++j) row[j] = from[j * to_stride];
      for (int64_t j = n; j < padded; ++j) row[j] = -infinity;
      for (int64_t j = 0; j < padded; j += lanes) store(top + j, maximum(load(row + j), load(top + j)));
    }
    for (int64_t j = 0; j < padded; ++j) top[j] = top[j] == -infinity ? 0 : top[j];
    for (int64_t i = 0; i < n; ++i) {
      C* row = products + i * padded;
      for (int64_t j = 0; j < padded; j += lanes)
        store(row + j, exponential(load(scores + i * padded + j) - load(top + j)));
      for (int64_t j = 0; j < n; ++j) transposed[j * padded + i] = row[j];
      for (int64_t j = n; j < padded; ++j) row[j] = 1;
    }
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = n; i < padded; ++i) transposed[j * padded + i] = 0;
  }
};

// to_j = sum_i p_i M_ij for one block of columns. Short rows take several sums at a time, because one chain of
// dependent multiply-adds would wait 4 cycles for each.
template <class C, int BLOCK>
FASTNLP_INLINE void dot_block(const C* p, const C* matrix, int64_t n, int64_t padded, Vec<C> (&sums)[BLOCK]) {
  constexpr int lanes = Simd<C>::lanes;
  constexpr int unroll = BLOCK <= 2 ? 4 : BLOCK <= 4 ? 2 : 1;
  Vec<C> partial[unroll][BLOCK] = {};
  int64_t i = 0;
  for (; i + unroll <= n; i += unroll)
    for (int u = 0; u < unroll; ++u)
      for (int v = 0; v < BLOCK; ++v) partial[u][v] += splat(p[i + u]) * load(matrix + (i + u) * padded + v * lanes);
  for (; i < n; ++i)
    for (int v = 0; v < BLOCK; ++v) partial[0][v] += splat(p[i]) * load(matrix + i * padded + v * lanes);
  for (int v = 0; v < BLOCK; ++v) {
    sums[v] = partial[0][v];
    for (int u = 1; u < unroll; ++u) sums[v] += partial[u][v];
  }
}

// sum_i exp(a_i + T_ij) = scaled exp(top), exactly shifted; top is -inf where no i reaches j. In float64, because
// a_i + T_ij may be -1e4 where float32 knows four decimals, and exp of the difference is a probability.
struct ColumnSum {
  double top;
  double scaled;
};
template <class C>
__attribute__((noinline)) ColumnSum sum_column(const Matrix<C>& m, const C* a, int64_t j, int64_t n, int64_t padded) {
  ColumnSum sum = {-INFINITY, 0};
  for (int64_t i = 0; i < n; ++i) {
    const double x = static_cast<double>(a[i]) + m.scores[i * padded + j];
    sum.top = x > sum.top ? x : sum.top;
  }
  for (int64_t i = 0; i < n && sum.top != -INFINITY; ++i)
    sum.scaled += std::exp(static_cast<double>(a[i]) + m.scores[i * padded + j] - sum.top);
  return sum;
}

// Subtracts the maximum of `a` and returns it; a row that is -inf throughout stays as it is.
template <class C>
FASTNLP_INLINE C normalise(C* a, int64_t padded) {
  constexpr int lanes = Simd<C>::lanes;
  Vec<C> top = splat(-static_cast<C>(INFINITY));
  for (int64_t j = 0; j < padded; j += lanes) top = maximum(load(a + j), top);
  const C m = max_of(top);
  if (m == -static_cast<C>(INFINITY)) return 0;
  for (int64_t j = 0; j < padded; j += lanes) store(a + j, load(a + j) - splat(m));
  return m;
}

// Where a number of a message is below this, the message is kept as logarithms too: a later step may need what it
// hides.
constexpr double kThin = 1e-30;

// The message of a chain. Numbers p carry the recurrence,
//     p'_j = (sum_i p_i E_ij) x_j 2^r,    x_j = exp(e_j + top_j - d),    d = max_j (e_j + top_j),
// because x needs the emissions alone and 2^r the step before: neither exp nor log is on the path from step to step,
// and nothing takes a logarithm at all until a column falls below the guard or a number below kThin.
template <class C, int BLOCK>
struct Chain {
  static constexpr int lanes = Simd<C>::lanes;
  static constexpr int T = tile<BLOCK>;
  static constexpr int64_t rows = 5;

  int64_t n;
  Padded<C, BLOCK> padded;
  C* p;           // 0 in the padding
  C* a;           // logarithms with maximum 0 (or -inf throughout); valid where `thin`, or after logarithms()
  C* next;        // scratch
  C* e;           // the emissions of the step to come; -inf in the padding
  C* x;           // scratch
  double shift;   // the message is p exp(shift)
  double offset;  // and exp(a + offset)
  int exponent;   // r
  C rescale;      // 2^r
  bool thin;

  C* place(C* memory, int64_t tags) {
    n = tags;
    padded.value = padded_tags<C, BLOCK>(tags);
    C** const all[] = {&p, &a, &next, &e, &x};
    for (C** row : all) {
      *row = memory;
      memory += padded;
    }
    return memory;
  }

  // From unnormalised logarithms in a.
  void begin() {
    offset = shift = normalise(a, padded);
    exponent = 0;
    rescale = 1;
    Mask<C> small = {};
    for (int64_t j = 0; j < padded; j += lanes) {
      const Vec<C> number = exponential(load(a + j));
      small |= (number < splat(static_cast<C>(kThin))) & lanes_below<C>(n - j);
      store(p + j, number);
    }
    thin = any(small);
  }

  void logarithms() {
    if (thin) return;
    const C infinity = INFINITY;
    for (int64_t j = 0; j < padded; j += lanes)
      store(a + j, lanes_below<C>(n - j) ? logarithm(load(p + j)) : splat(-infinity));
    offset = shift + normalise(a, padded);
  }

  // p_j <- exp(e_j) sum_i p_i exp(T_ij).
  void advance(const Matrix<C>& m) {
    Vec<C> top = splat(-static_cast<C>(INFINITY));
    for (int64_t j = 0; j < padded; j += lanes) {
      const Vec<C> f = load(e + j) + load(m.top + j);
      store(e + j, f);
      top = maximum(f, top);
    }
    C d = max_of(top);
    if (d == -static_cast<C>(INFINITY)) d = 0;
    for (int64_t j = 0; j < padded; j += lanes) store(x + j, exponential(load(e + j) - splat(d)) * splat(rescale));
    Vec<C> largest = {};
    Mask<C> rare = {};
    for (int64_t block = 0; block < padded; block += T * lanes) {
      Vec<C> sums[T];
      dot_block<C, T>(p, m.products + block, n, padded, sums);
      for (int v = 0; v < T; ++v) {
        const int64_t j = block + v * lanes;
        const Vec<C> moved = sums[v] * load(x + j);
        store(next + j, moved);
        largest = maximum(moved, largest);
        const Mask<C> below = (sums[v] < splat(static_cast<C>(kGuard))) | (moved < splat(static_cast<C>(kThin)));
        rare |= below & lanes_below<C>(n - j);
      }
    }
    if (__builtin_expect(any(rare), 0)) return advance_in_logarithms(m, d);
    swap(p, next);
    thin = false;
    shift += d - exponent * 0.693147180559945309417;
    exponent = -exponent_of(max_of(largest));
    rescale = power_of_two<C>(exponent);
  }

  // The same step where a number of it is too small to be trusted or kept; e holds e_j + top_j.
  __attribute__((noinline)) void advance_in_logarithms(const Matrix<C>& m, C d) {
    logarithms();
    for (int64_t block = 0; block < padded; block += T * lanes) {
      Vec<C> sums[T];
      dot_block<C, T>(p, m.products + block, n, padded, sums);
      for (int v = 0; v < T; ++v) {
        const int64_t j = block + v * lanes;
        store(next + j, logarithm(sums[v]) + (load(e + j) - splat(d)));
      }
      for (int64_t j = block; j < block + T * lanes && j < n; ++j)
        if (sums[(j - block) / lanes][(j - block) % lanes] < static_cast<C>(kGuard)) {
          const ColumnSum sum = sum_column(m, a, j, n, padded);
          next[j] = static_cast<C>(sum.top + std::log(sum.scaled) + (e[j] - m.top[j]) - d + (offset - shift));
        }
    }
    swap(a, next);
    const double moved = shift + d;
    begin();
    shift = offset = offset + moved;
  }

  // A message as it is stored: the numbers, or the logarithms less 1, which no number looks like.
  void write(C* row) {
    if (!thin) return store_row(row, n, p);
    for (int64_t j = 0; j < padded; j += lanes) store(x + j, load(a + j) - splat(C{1}));
    store_row(row, n, x);
  }
  void read(const C* row) {
    load_row(row, n, padded, C{0}, p);
    Mask<C> negative = {};
    for (int64_t j = 0; j < padded; j += lanes) negative |= load(p + j) < Vec<C>{};
    thin = any(negative);
    shift = offset = 0;
    exponent = 0;
    rescale = 1;
    if (!thin) return;
    load_row(row, n, padded, -static_cast<C>(INFINITY), a);
    for (int64_t j = 0; j < padded; j += lanes) {
      store(a + j, load(a + j) + splat(C{1}));
      store(p + j, exponential(load(a + j)));
    }
  }

  static void swap(C*& one, C*& other) {
    C* const kept = one;
    one = other;
    other = kept;
  }
};

}  // namespace
}  // namespace fastnlp
