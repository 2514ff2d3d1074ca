// Sums of exponentials that neither overflow nor lose small terms.
#pragma once
#include <cmath>
#include <cstdint>

namespace fastnlp {

// sum e^x over some cells, as scaled * e^top: top is at least 0, the score of the virtual class, which is left out.
// Where some x is +inf, top is, and scaled 0 or NaN.
struct LogSum {
  double top = 0;
  double scaled = 0;
};

namespace {

static inline void raise(LogSum& sum, double top) {
  if (!(top > sum.top)) return;
  sum.scaled *= std::exp(sum.top - top);
  sum.top = top;
}
static inline void add(LogSum& sum, double x) {
  raise(sum, x);
  if (x != INFINITY) sum.scaled += std::exp(x - sum.top);
}
static inline void add(LogSum& sum, const LogSum& other) {
  raise(sum, other.top);
  sum.scaled += other.top == sum.top ? other.scaled : other.scaled * std::exp(other.top - sum.top);
}

// log(1 + the sum of some parts), in their order.
static inline double log_one_plus(const LogSum* parts, int64_t count) {
  double top = 0, scaled = 0;
  for (int64_t i = 0; i < count; ++i) top = parts[i].top > top ? parts[i].top : top;
  for (int64_t i = 0; i < count; ++i)
    scaled += parts[i].top == top ? parts[i].scaled : parts[i].scaled * std::exp(parts[i].top - top);
  if (top == INFINITY) return top + scaled;
  return top == 0 ? std::log1p(scaled) : top + std::log(scaled + std::exp(-top));
}

}  // namespace
}  // namespace fastnlp
