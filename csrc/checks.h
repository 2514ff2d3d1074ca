// One wording for all argument errors: "<name> must be <what>, got <fact>". The public Python functions say the same
// sentences first; here stands what protects memory when an op is called without them.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#ifdef __linux__
#include <sys/mman.h>
#endif

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

// "shape (2, 3)" or "(2, 3)", written only when an error needs it: a stream costs as much as a small kernel.
struct ShapeOf {
  const Tensor& tensor;
};
struct Sizes {
  std::initializer_list<int64_t> sizes;
};
inline ShapeOf shape_of(const Tensor& tensor) { return {tensor}; }
inline std::ostream& operator<<(std::ostream& to, const Sizes& shape) {
  to << "(";
  for (const int64_t& size : shape.sizes) to << (&size == shape.sizes.begin() ? "" : ", ") << size;
  return to << (shape.sizes.size() == 1 ? ",)" : ")");
}
inline std::ostream& operator<<(std::ostream& to, const ShapeOf& shape) {
  to << "shape (";
  for (int64_t d = 0; d < shape.tensor.dim(); ++d) to << (d ? ", " : "") << shape.tensor.size(d);
  return to << (shape.tensor.dim() == 1 ? ",)" : ")");
}

// The tensor has exactly this shape, dtype and device (where `like` is), and is contiguous.
inline void check_dense(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, ScalarType dtype,
                        const Tensor& like) {
  bool same_shape = tensor.dim() == static_cast<int64_t>(shape.size());
  for (int64_t d = 0; same_shape && d < tensor.dim(); ++d) same_shape = tensor.size(d) == shape.begin()[d];
  check(same_shape, name, " must have shape ", Sizes{shape}, ", got ", shape_of(tensor));
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

// Large results on the CPU are asked for in huge pages, where the system leaves that to programs (Debian and Ubuntu
// do): glibc gives back what is freed, and then memory of the next step is touched anew, page by page. Linear
// attention's backward pass takes a seventh less where it does.
inline void in_huge_pages(const Tensor& tensor, int64_t numel, int32_t device_type) {
#ifdef MADV_HUGEPAGE
  const size_t bytes = static_cast<size_t>(numel) * tensor.element_size();
  if (device_type != aoti_torch_device_type_cpu() || bytes < (size_t{4} << 20)) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr()), page = 4096;
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: without it all is as right
#endif
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  int64_t strides[8];
  int64_t stride = 1;
  bool fits = true;
  for (int64_t d = static_cast<int64_t>(shape.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    fits = !__builtin_mul_overflow(stride, shape.begin()[d], &stride) && fits;
  }
  int32_t device_type;
  int32_t device_index;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  fits = fits && aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides,
                                          static_cast<int32_t>(dtype), device_type, device_index, &handle) == 0;
  if (!fits) {  // in torch's words, which callers look for
    std::ostringstream sentence;
    sentence << (device_type == aoti_torch_device_type_cpu() ? "DefaultCPUAllocator: can't allocate memory for"
                                                             : "CUDA out of memory. No room for")
             << " a result of shape " << Sizes{shape} << " in " << torch::headeronly::toString(dtype);
    throw std::runtime_error(sentence.str());
  }
  Tensor tensor(handle);
  in_huge_pages(tensor, stride, device_type);
  return tensor;
}

}  // namespace fastnlp
