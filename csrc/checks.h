// One wording for all argument errors: "<name> must be <what>, got <fact>". The public Python functions say the same
// sentences first; here stands what protects memory when an op is called without them.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace fastnlp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// std::invalid_argument reaches Python as ValueError.
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::invalid_argument(sentence.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "shape (";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

// The tensor has exactly this shape, dtype and device (where `like` is), and is contiguous.
inline void check_dense(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, ScalarType dtype,
                        const Tensor& like) {
  bool same_shape = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  std::ostringstream wanted;
  wanted << "(";
  for (int64_t size : shape) {
    same_shape = same_shape && tensor.size(d) == size;
    wanted << (d++ ? ", " : "") << size;
  }
  wanted << (shape.size() == 1 ? ",)" : ")");
  check(same_shape, name, " must have shape ", wanted.str(), ", got ", shape_of(tensor));
  check(tensor.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
  check(tensor.device() == like.device(), name, " must be on the device of emissions");
  check(tensor.is_contiguous(), name, " must be contiguous");
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: check(false, name, " must be float32, float64, float16 or bfloat16"); return DType::f32;
  }
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  int64_t strides[8];
  int64_t stride = 1;
  for (int64_t d = static_cast<int64_t>(shape.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= shape.begin()[d];
  }
  int32_t device_type;
  int32_t device_index;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides,
                                                  static_cast<int32_t>(dtype), device_type, device_index, &handle));
  return Tensor(handle);
}

}  // namespace fastnlp
