// Which of the two compilations of the CPU kernels runs.
#pragma once

namespace fastnlp {

// Whether the processor has x86-64-v3, unless a test has chosen the baseline.
bool use_v3();

}  // namespace fastnlp

// For tests, through ctypes: kernels of calls that begin later are those of the baseline. Returns what was set before.
extern "C" __attribute__((visibility("default"))) bool fastnlp_ops_use_baseline(bool on);
