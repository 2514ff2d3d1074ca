// The types that kernels read.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FASTNLP_ON_BOTH __host__ __device__
#else
#define FASTNLP_ON_BOTH
#endif

namespace fastnlp {

enum class DType : int32_t { f32, f64, f16, bf16 };

// An element of a bool tensor. Any byte but 0 is true, as in torch: a view of uint8 may hold them all, and a C++ bool
// must not.
struct Bool {
  uint8_t byte;
  FASTNLP_ON_BOTH operator bool() const { return byte != 0; }
};

}  // namespace fastnlp
