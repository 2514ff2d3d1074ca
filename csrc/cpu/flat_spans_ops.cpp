// Spans that do not overlap, on CPU: a sequence's spans by falling score, each kept unless a token of it is taken.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../checks.h"

namespace fastnlp {
namespace {

// Tokens as bits.
class Tokens {
 public:
  explicit Tokens(int64_t length) : words_((length + 63) / 64) {}
  void clear() { std::fill(words_.begin(), words_.end(), 0); }

  // Takes first .. last, unless one of them is taken.
  bool take(int64_t first, int64_t last) {
    for (int64_t word = first / 64; word <= last / 64; ++word)
      if (words_[word] & bits(word, first, last)) return false;
    for (int64_t word = first / 64; word <= last / 64; ++word) words_[word] |= bits(word, first, last);
    return true;
  }

 private:
  static uint64_t bits(int64_t word, int64_t first, int64_t last) {
    const int64_t from = std::max<int64_t>(0, first - word * 64), to = std::min<int64_t>(63, last - word * 64);
    return ~uint64_t{0} << from & ~uint64_t{0} >> (63 - to);
  }

  std::vector<uint64_t> words_;
};

// NaN first, then falling; of equal scores the first in the list.
template <class C>
struct Candidate {
  C score;
  int64_t index;
  bool operator<(const Candidate& other) const {
    const bool nan = score != score, other_nan = other.score != other.score;
    if (nan != other_nan) return nan;
    if (!nan && score != other.score) return score > other.score;
    return index < other.index;
  }
};

template <class C>
void keep_flat(const int64_t* spans, const C* scores, const std::vector<int64_t>& rows,
               const std::vector<int64_t>& first_row, int64_t length, bool* keep) {
  const int64_t sequences = static_cast<int64_t>(first_row.size()) - 1;
  // A thread is worth waking for some 500 spans.
  const int64_t each = std::max<int64_t>(1, first_row[sequences] / std::max<int64_t>(1, sequences));
  torch::stable::parallel_for(0, sequences, std::max<int64_t>(1, 500 / each), [&](int64_t begin, int64_t end) {
    std::vector<Candidate<C>> candidates;
    Tokens tokens(length);
    for (int64_t b = begin; b < end; ++b) {
      candidates.clear();
      for (int64_t i = first_row[b]; i < first_row[b + 1]; ++i) candidates.push_back({scores[rows[i]], rows[i]});
      std::sort(candidates.begin(), candidates.end());
      tokens.clear();
      for (const Candidate<C>& candidate : candidates) {
        const int64_t start = spans[4 * candidate.index + 2], stop = spans[4 * candidate.index + 3];
        keep[candidate.index] = tokens.take(std::min(start, stop), std::max(start, stop));
      }
    }
  });
}

Tensor flat_spans(Tensor spans, Tensor scores, Tensor q) {
  check(spans.dim() == 2 && spans.size(1) == 4, "spans must be [M, 4], got ", shape_of(spans));
  const int64_t count = spans.size(0);
  check_dense(spans, "spans", {count, 4}, ScalarType::Long, spans);
  const bool wide = scores.scalar_type() == ScalarType::Double;
  check_dense(scores, "scores", {count}, wide ? ScalarType::Double : ScalarType::Float, spans);
  check(q.dim() >= 2, "q must be [B, n, ...], got ", shape_of(q));
  const int64_t sequences = q.size(0), length = q.size(1);
  check(sequences <= INT32_MAX && length <= INT32_MAX, "sequences and length must be below 2^31, got ", sequences,
        " and ", length);
  const int64_t* span = spans.const_data_ptr<int64_t>();
  std::vector<int64_t> first_row(sequences + 1), rows(count);  // the spans of a sequence, in the order of the list
  for (int64_t i = 0; i < count; ++i) {
    const int64_t b = span[4 * i], start = span[4 * i + 2], end = span[4 * i + 3];
    const bool inside = b >= 0 && b < sequences && std::min(start, end) >= 0 && std::max(start, end) < length;
    check(inside, "spans must be within ", sequences, " sequences of ", length, " tokens, got (", b, ", ",
          span[4 * i + 1], ", ", start, ", ", end, ") at row ", i);
    ++first_row[b + 1];
  }
  for (int64_t b = 0; b < sequences; ++b) first_row[b + 1] += first_row[b];
  std::vector<int64_t> next(first_row.begin(), first_row.end() - 1);
  for (int64_t i = 0; i < count; ++i) rows[next[span[4 * i]]++] = i;
  Tensor keep = new_tensor(spans, {count}, ScalarType::Bool);
  bool* to = keep.mutable_data_ptr<bool>();
  if (wide)
    keep_flat(span, scores.const_data_ptr<double>(), rows, first_row, length, to);
  else
    keep_flat(span, scores.const_data_ptr<float>(), rows, first_row, length, to);
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnlp_ops, CPU, m) { m.impl("flat_spans", TORCH_BOX(&flat_spans)); }

}  // namespace fastnlp
