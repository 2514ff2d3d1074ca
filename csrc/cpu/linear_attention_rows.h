// Rows of q, k, v to and from memory, through the feature maps and back.
#pragma once
#include "linear_attention_tile.h"

namespace fastnlp {
namespace {

template <class C>
constexpr C kNothing = -static_cast<C>(INFINITY);  // the maximum of a channel that has seen no key

// Sizes of the rows of a problem.
template <class C>
struct Sizes {
  const int64_t features;   // F
  const int64_t constants;  // channels in front of phi's own
  const int64_t channels;   // Dk
  const int64_t values;     // Dv
  const int64_t width;      // Dv in whole panels
  const int64_t feature_stride;
  const int64_t value_stride;

  explicit Sizes(const LinearAttentionProblem& p)
      : features(p.features()),
        constants(p.constants()),
        channels(p.key_size),
        values(p.value_size),
        width(padded_to_panel<C>(p.value_size)),
        feature_stride(row_stride<C>(
            std::max(features + Simd<C>::lanes, constants + padded_to_panel<C>(channels)))),  // whole panels behind it
        value_stride(row_stride<C>(p.value_size)) {}
};

// n rows of a tensor; those `next` rows further on will be wanted.
template <class C>
void read_rows(DType dtype, const void* data, int64_t offset, int64_t step, int64_t n, int64_t next, int64_t size,
               C* to, int64_t stride, Ahead& ahead) {
  with_stored<C>(dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(data) + offset;
    for (int64_t i = 0; i < n; ++i) load_row(from + i * step, size, padded_to_panel<C>(size), C{0}, to + i * stride);
    constexpr int64_t bytes = sizeof(*type);
    if (next) ahead.expect(reinterpret_cast<uintptr_t>(from) + next * step * bytes, step * bytes, n, size * bytes);
  });
}

template <class C>
void write_rows(DType dtype, int64_t n, int64_t size, const C* from, int64_t stride, void* data, int64_t offset,
                int64_t step) {
  with_stored<C>(dtype, [&](auto* type) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    S* to = static_cast<S*>(data) + offset;
    for (int64_t i = 0; i < n; ++i) store_rounded(to + i * step, size, from + i * stride);
  });
}

// exp of anything.
FASTNLP_INLINE Simd<float>::V any_exponential(Simd<float>::V x) {
  const Simd<float>::V y = exponential(minimum(splat(88.0f), x));
  return x > splat(88.0f) ? splat(static_cast<float>(INFINITY)) : y;
}
FASTNLP_INLINE Simd<double>::V any_exponential(Simd<double>::V x) { return exponential(x); }

// row[x] <- f(x, row[x]) by vectors
template <class C, class F>
FASTNLP_INLINE void each_vector(C* row, int64_t size, const F& f) {
  for (int64_t x = 0; x < size; x += Simd<C>::lanes) store(row + x, f(x, load(row + x)));
}

// Rows of x become rows of phi(x). The maps with a maximum are not among these. `norms`: of cosine+1.
template <class C>
void map_rows(FeatureMap map, int64_t n, int64_t size, C* rows, int64_t stride, C* norms) {
  using V = Vec<C>;
  const V zero = {}, one = splat(C{1});
  const auto each = [&](const auto& f) {
    for (int64_t i = 0; i < n; ++i) each_vector(rows + i * stride, size, [&](int64_t, V x) { return f(x); });
  };
  switch (map) {
    case FeatureMap::elu_plus_one:
      return each([&](V x) {
        const V low = exponential(minimum(zero, x));
        return x > zero ? x + one : low;
      });
    case FeatureMap::relu: return each([&](V x) { return maximum(zero, x); });
    case FeatureMap::relu_squared:
      return each([&](V x) {
        const V y = maximum(zero, x);
        return y * y;
      });
    case FeatureMap::cosine_plus_one:
      for (int64_t i = 0; i < n; ++i) {
        C* const row = rows + i * stride;
        norms[i] = std::sqrt(dot(row + 1, row + 1, size));
        const V inverse = splat(C{1} / (norms[i] < C(1e-12) ? C(1e-12) : norms[i]));
        each_vector(row + 1, size, [&](int64_t, V x) { return x * inverse; });
        row[0] = 1;
      }
      return;
    default: return;
  }
}

// Rows of d, the gradient of phi(x), become the gradient of x.
template <class C>
void chain_rows(FeatureMap map, int64_t n, int64_t size, const C* rows, C* d, int64_t stride, const C* norms) {
  using V = Vec<C>;
  const V zero = {}, one = splat(C{1});
  const auto each = [&](const auto& f) {
    for (int64_t i = 0; i < n; ++i)
      each_vector(d + i * stride, size, [&](int64_t x, V dy) { return f(load(rows + i * stride + x), dy); });
  };
  switch (map) {
    case FeatureMap::elu_plus_one: return each([&](V y, V dy) { return dy * minimum(one, y); });
    case FeatureMap::relu: return each([&](V y, V dy) { return y > zero ? dy : zero; });
    case FeatureMap::relu_squared:
      return each([&](V y, V dy) {
        V root;
        for (int l = 0; l < Simd<C>::lanes; ++l) root[l] = std::sqrt(y[l]);
        return (root + root) * dy;
      });
    case FeatureMap::exponential: return each([&](V y, V dy) { return y * dy; });
    case FeatureMap::cosine_plus_one:
      for (int64_t i = 0; i < n; ++i) {
        const C* const y = rows + i * stride + 1;
        C* const dy = d + i * stride + 1;
        const bool tiny = norms[i] < C(1e-12);
        const V along = splat(tiny ? C{0} : dot(y, static_cast<const C*>(dy), size));
        const V inverse = splat(C{1} / (tiny ? C(1e-12) : norms[i]));
        each_vector(dy, size, [&](int64_t x, V dx) { return (dx - load(y + x) * along) * inverse; });
      }
      return;
    default: return;
  }
}

// Softmax over the channels of each row, and its way back.
template <class C>
void softmax_rows(int64_t n, int64_t size, C* rows, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    C* const row = rows + i * stride;
    C top = kNothing<C>, sum = 0;
    for (int64_t x = 0; x < size; ++x) top = row[x] > top ? row[x] : top;
    const Vec<C> shift = splat(top);
    each_vector(row, size, [&](int64_t, Vec<C> x) { return exponential(x - shift); });
    for (int64_t x = 0; x < size; ++x) sum += row[x];
    const Vec<C> inverse = splat(C{1} / sum);
    each_vector(row, size, [&](int64_t, Vec<C> x) { return x * inverse; });
  }
}
template <class C>
void chain_softmax_rows(int64_t n, int64_t size, const C* rows, C* d, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    const C* const y = rows + i * stride;
    C* const dy = d + i * stride;
    const Vec<C> mean = splat(dot(y, static_cast<const C*>(dy), size));
    each_vector(dy, size, [&](int64_t x, Vec<C> dx) { return load(y + x) * (dx - mean); });
  }
}

}  // namespace
}  // namespace fastnlp
