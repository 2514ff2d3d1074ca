// Sums of exponentials that neither overflow nor lose small terms.
#pragma once
#include <cmath>
#include <cstdint>

namespace fastnlp {

// sum e^x over some classes as scaled * e^top. The virtual class x = 0 is not in it, but top is at least 0. Where some
// x is +inf, top is, and scaled is 0 or NaN.
struct LogSum {
  double top = 0;
  double scaled = 0;
};

// log(1 + the sum of some parts), in their order.
static inline double log_one_plus(const LogSum* parts, int64_t count) {
  double top = 0, scaled = 0;
  for (int64_t i = 0; i < count; ++i) top = parts[i].top > top ? parts[i].top : top;
  for (int64_t i = 0; i < count; ++i)
    scaled += parts[i].top == top ? parts[i].scaled : parts[i].scaled * std::exp(parts[i].top - top);
  if (top == INFINITY) return top + scaled;
  return top == 0 ? std::log1p(scaled) : top + std::log(scaled + std::exp(-top));
}

}  // namespace fastnlp
