// The operands of one item: q and k rotated, in the compute type, rows of whole vectors; and the way back of gradients.
#pragma once
#include "global_pointer.h"
#include "operands.h"

namespace fastnlp {
namespace {

FASTNLP_INLINE Simd<float>::V swap_pairs(Simd<float>::V x) {
  return __builtin_shuffle(x, Simd<float>::I{1, 0, 3, 2, 5, 4, 7, 6});
}
FASTNLP_INLINE Simd<double>::V swap_pairs(Simd<double>::V x) {
  return __builtin_shuffle(x, Simd<double>::I{1, 0, 3, 2});
}
FASTNLP_INLINE Simd<float>::V each_twice(Simd<float>::V x, bool upper) {
  return upper ? __builtin_shuffle(x, Simd<float>::I{4, 4, 5, 5, 6, 6, 7, 7})
               : __builtin_shuffle(x, Simd<float>::I{0, 0, 1, 1, 2, 2, 3, 3});
}
FASTNLP_INLINE Simd<double>::V each_twice(Simd<double>::V x, bool upper) {
  return upper ? __builtin_shuffle(x, Simd<double>::I{2, 2, 3, 3}) : __builtin_shuffle(x, Simd<double>::I{0, 0, 1, 1});
}

// Rows of a head are far apart in q and k: each is fetched while those before it are worked on, which takes 7 % off a
// training step at 4 x 512 x 10 x 64.
constexpr int64_t kRowsAhead = 16;
template <class S>
FASTNLP_INLINE void prefetch_row(const S* row, int64_t n) {
  for (int64_t x = 0; x < n; x += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(row + x);
}

// Each pair of a row is turned, (x0, x1) -> scale (x0 cos - x1 sin, x1 cos + x0 sin), by -sin where BACK.
template <bool BACK, class C>
FASTNLP_INLINE void rotate(C* row, int64_t width, const C* cosines, const C* sines, C scale) {
  constexpr int lanes = Simd<C>::lanes;
  Vec<C> signs;
  for (int l = 0; l < lanes; ++l) signs[l] = (l % 2 == 1) != BACK ? scale : -scale;
  for (int64_t x = 0; x < width; x += 2 * lanes) {
    const Vec<C> cosine = load(cosines + x / 2) * splat(scale), sine = load(sines + x / 2);
    for (int half = 0; half < 2; ++half) {
      const Vec<C> pair = load(row + x + half * lanes);
      const Vec<C> turned = swap_pairs(pair) * (signs * each_twice(sine, half));
      store(row + x + half * lanes, pair * each_twice(cosine, half) + turned);
    }
  }
}

template <class C>
struct Packed {
  const GlobalPointerWork& work;
  const GlobalPointerProblem& p;
  const SpanSequence& sequence;
  const int64_t dot_head;
  const int64_t padded;  // tokens
  const int64_t width;   // of a row of q or k: d, padded with zeros
  C* const q;            // [padded, width], times the scale
  C* const k;            // [padded, width]
  C* const panels;       // k transposed: [padded / panel, d, panel]
  C* const biases;       // null, or of each head of the item: of starts [padded], of ends [padded]

  explicit Packed(const SpanItem& item, bool with_biases = true)
      : work(*item.work),
        p(item.work->problem),
        sequence(*item.sequence),
        dot_head(item.dot_head),
        padded(padded_to_panel<C>(item.sequence->count)),
        width(padded_to_panel<C>(p.size)),
        q(static_cast<C*>(item.packed)),
        k(q + padded * width),
        panels(k + padded * width),
        biases(with_biases && p.start_bias.data ? panels + padded * p.size : nullptr) {}

  static int64_t elements(const GlobalPointerProblem& p, int64_t count, bool with_biases = true) {
    const int64_t biases = with_biases && p.start_bias.data ? 2 * p.heads_per_dot() : 0;
    return padded_to_panel<C>(count) * (2 * padded_to_panel<C>(p.size) + p.size + biases);
  }
  C* start_bias(int64_t of_item) const { return biases + 2 * of_item * padded; }
  C* end_bias(int64_t of_item) const { return biases + (2 * of_item + 1) * padded; }

  // Where token t of the q, k or bias of a head starts.
  int64_t offset(const SpanTensor& tensor, int64_t t, int64_t head) const {
    return sequence.index * tensor.batch_stride + sequence.position[t] * tensor.token_stride +
           head * tensor.head_stride;
  }
  int64_t head(int64_t of_item) const { return dot_head * p.heads_per_dot() + of_item; }

  C bias(const SpanTensor& tensor, int64_t t, int64_t of_item) const {
    C value{};
    with_stored<C>(p.dtype, [&](auto* type) {
      value = static_cast<decltype(type)>(tensor.data)[offset(tensor, t, head(of_item))];
    });
    return value;
  }

  // The biases of tokens begin .. end - 1 of one head; zeros up to the next panel.
  void read_bias(const SpanTensor& tensor, int64_t of_item, int64_t begin, int64_t end, C* to) const {
    with_stored<C>(p.dtype, [&](auto* type) {
      const auto* data = static_cast<decltype(type)>(tensor.data);
      for (int64_t t = begin; t < end; ++t) to[t - begin] = data[offset(tensor, t, head(of_item))];
    });
    for (int64_t t = end; t < padded_to_panel<C>(end); ++t) to[t - begin] = 0;
  }

  const C* cosines(int64_t t) const { return rope_row(work.angles.cosines, t); }
  const C* sines(int64_t t) const { return rope_row(work.angles.sines, t); }
  const C* rope_row(const void* table, int64_t t) const {
    const int64_t row = (work.angles.per_sequence ? sequence.index * p.length : 0) + sequence.position[t];
    return static_cast<const C*>(table) + row * work.angles.width;
  }

  void pack(int64_t begin, int64_t end) const {
    with_stored<C>(p.dtype, [&](auto* type) {
      pack_rows(static_cast<decltype(type)>(p.q.data), p.q, static_cast<C>(p.scale), q, begin, end);
      pack_rows(static_cast<decltype(type)>(p.k.data), p.k, C{1}, k, begin, end);
    });
    const int64_t stop = padded_to_panel<C>(end);
    for (C* rows : {q, k}) std::fill(rows + end * width, rows + stop * width, C{0});
    for (int64_t t = begin; t < stop; t += kPanel<C>) transpose_panel(t);
    for (int64_t h = 0; biases && h < p.heads_per_dot(); ++h) {
      read_bias(p.start_bias, h, begin, end, start_bias(h) + begin);
      read_bias(p.end_bias, h, begin, end, end_bias(h) + begin);
    }
  }

  template <class S>
  void pack_rows(const S* data, const SpanTensor& tensor, C scale, C* to, int64_t begin, int64_t end) const {
    for (int64_t t = begin; t < end; ++t) {
      C* row = to + t * width;
      if (t + kRowsAhead < end) prefetch_row(data + offset(tensor, t + kRowsAhead, dot_head), p.size);
      load_row(data + offset(tensor, t, dot_head), p.size, width, C{0}, row);
      turn<false>(row, t, scale);
    }
  }

  template <bool BACK>
  void turn(C* row, int64_t t, C scale) const {
    if (p.rope)
      rotate<BACK>(row, width, cosines(t), sines(t), scale);
    else if (scale != C{1})
      for (int64_t x = 0; x < width; x += Simd<C>::lanes) store(row + x, load(row + x) * splat(scale));
  }

  void transpose_panel(int64_t t) const {
    constexpr int lanes = Simd<C>::lanes;
    C* to = panels + t * p.size;
    for (int64_t x = 0; x < p.size; x += lanes)
      for (int64_t half = 0; half < kPanel<C>; half += lanes) {
        Vec<C> rows[lanes];
        for (int l = 0; l < lanes; ++l) rows[l] = load(k + (t + half + l) * width + x);
        transpose<lanes / 2, C>(rows);
        for (int l = 0; l < lanes && x + l < p.size; ++l) store(to + (x + l) * kPanel<C> + half, rows[l]);
      }
  }

  // Gradients of q or k as they are summed up, [width] for each of the tokens begin .. end - 1, become rows of dq or
  // dk; masked tokens in between get zeros. Overwrites `rows`.
  void write_rows(C* rows, int64_t begin, int64_t end, C scale, void* to) const {
    with_stored<C>(work.gradients.dtype, [&](auto* type) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      const auto at = [&](int64_t position) {
        return static_cast<S*>(to) +
               ((sequence.index * p.length + position) * p.dot_heads + dot_head) * work.gradients.stride;
      };
      int64_t next = sequence.owned_from(begin);
      const auto skip_to = [&](int64_t position) {
        for (; next < position; ++next) std::memset(at(next), 0, static_cast<size_t>(p.size) * sizeof(S));
      };
      for (int64_t t = begin; t < end; ++t) {
        C* row = rows + (t - begin) * width;
        if (t + kRowsAhead < end) prefetch_row(at(sequence.position[t + kRowsAhead]), p.size);
        skip_to(sequence.position[t]);
        turn<true>(row, t, scale);
        store_rounded(at(next++), p.size, row);
      }
      skip_to(sequence.owned_to(end, p.length));
    });
  }

  // The same for the gradient of the bias of one head.
  void write_bias(const C* values, int64_t of_item, int64_t begin, int64_t end, void* to) const {
    with_stored<C>(work.gradients.dtype, [&](auto* type) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      S* column = static_cast<S*>(to) + sequence.index * p.length * p.heads + head(of_item);
      int64_t next = sequence.owned_from(begin);
      const auto skip_to = [&](int64_t position) {
        for (; next < position; ++next) column[next * p.heads] = rounded(C{0}, type);
      };
      for (int64_t t = begin; t < end; ++t) {
        skip_to(sequence.position[t]);
        column[next++ * p.heads] = rounded(values[t - begin], type);
      }
      skip_to(sequence.owned_to(end, p.length));
    });
  }
};

}  // namespace
}  // namespace fastnlp
