// Operands of products: whole panels, read from and written to tensors of any type. Everything has internal linkage,
// like simd.h.
#pragma once
#include <algorithm>
#include <cstddef>

#include "../dtype.h"
#include "matmul.h"

namespace fastnlp {
namespace {

// Memory of a thread, dealt out in pieces that are aligned for vectors.
class Arena {
 public:
  explicit Arena(void* memory) : at_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(at_);
    at_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }

 private:
  char* at_;
};

template <class C>
constexpr int64_t padded_to_panel(int64_t n) {
  return (n + kPanel<C> - 1) / kPanel<C> * kPanel<C>;
}

// f(a null pointer of the type that the problem stores).
template <class C, class F>
void with_stored(DType dtype, const F& f) {
  if constexpr (sizeof(C) == 8) {
    f(static_cast<const double*>(nullptr));
  } else {
    if (dtype == DType::f16)
      f(static_cast<const Half*>(nullptr));
    else if (dtype == DType::bf16)
      f(static_cast<const BFloat16*>(nullptr));
    else
      f(static_cast<const float*>(nullptr));
  }
}

FASTNLP_INLINE void store_rounded(float* to, int64_t n, const float* from) { store_row(to, n, from); }
FASTNLP_INLINE void store_rounded(double* to, int64_t n, const double* from) { store_row(to, n, from); }
template <class S>
FASTNLP_INLINE void store_rounded(S* to, int64_t n, const float* from) {
  for (int64_t j = 0; j < n; ++j) to[j] = S::round(from[j]);
}
FASTNLP_INLINE float rounded(float x, const float*) { return x; }
FASTNLP_INLINE double rounded(double x, const double*) { return x; }
template <class S>
FASTNLP_INLINE S rounded(float x, const S*) {
  return S::round(x);
}

// rows[i][l] <-> rows[l][i], by swapping the off-diagonal quarters of ever smaller squares.
template <int WIDTH, class C>
FASTNLP_INLINE void transpose(Vec<C> (&rows)[Simd<C>::lanes]) {
  if constexpr (WIDTH > 0) {
    constexpr int lanes = Simd<C>::lanes;
    Mask<C> upper, lower;
    for (int l = 0; l < lanes; ++l) {
      upper[l] = l & WIDTH ? lanes + l - WIDTH : l;
      lower[l] = l & WIDTH ? lanes + l : l + WIDTH;
    }
    for (int i = 0; i < lanes; ++i) {
      if (i & WIDTH) continue;
      const Vec<C> a = rows[i], b = rows[i + WIDTH];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + WIDTH] = __builtin_shuffle(a, b, lower);
    }
    transpose<WIDTH / 2, C>(rows);
  }
}

}  // namespace
}  // namespace fastnlp
