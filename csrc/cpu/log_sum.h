// Sums of exponentials that neither overflow nor lose small terms.
#pragma once
#include <cmath>

namespace fastnlp {

// sum e^x over some cells, as scaled * e^top: top is at least 0, the score of the virtual class, which is left out.
struct LogSum {
  double top = 0;
  double scaled = 0;
  bool infinite = false;  // some x was +inf; it is in neither of the two
};

namespace {

static inline void raise(LogSum& sum, double top) {
  if (!(top > sum.top)) return;
  sum.scaled *= std::exp(sum.top - top);
  sum.top = top;
}
static inline void add(LogSum& sum, double x) {
  if (x == INFINITY) {
    sum.infinite = true;
    return;
  }
  raise(sum, x);
  sum.scaled += std::exp(x - sum.top);
}
static inline void add(LogSum& sum, const LogSum& other) {
  raise(sum, other.top);
  sum.scaled += other.scaled * std::exp(other.top - sum.top);
  sum.infinite |= other.infinite;
}

// log(1 + sum e^x)
static inline double with_one(const LogSum& sum) {
  if (sum.infinite) return INFINITY;
  return sum.top == 0 ? std::log1p(sum.scaled) : sum.top + std::log(std::exp(-sum.top) + sum.scaled);
}

}  // namespace
}  // namespace fastnlp
