#include "isa.h"

#include <atomic>

namespace fastnlp {
namespace {

std::atomic<bool> baseline_chosen{false};

}  // namespace

bool use_v3() {
  static const bool has_v3 = __builtin_cpu_supports("x86-64-v3");
  return has_v3 && !baseline_chosen.load(std::memory_order_relaxed);
}

}  // namespace fastnlp

bool fastnlp_ops_use_baseline(bool on) { return fastnlp::baseline_chosen.exchange(on); }
