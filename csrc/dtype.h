// The floating-point types that kernels read.
#pragma once
#include <cstdint>

namespace fastnlp {

enum class DType : int32_t { f32, f64, f16, bf16 };

}  // namespace fastnlp
