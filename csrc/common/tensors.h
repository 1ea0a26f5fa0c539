#pragma once

// From tensors to the pointers and dtypes that parameters hold.

#include <cstdint>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "csrc/common/check.h"
#include "csrc/common/dtype.h"
#if defined(PYDETOX_EMULATOR)
#include "csrc/emulator/session.h"
#endif

namespace pydetox {

// The dtype of a tensor that was checked to be of one that kernels know.
inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Byte:
      return DType::kUInt8;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      check(false, "no kernel computes with ", dtype_name(tensor));
      return DType::kUInt8;
  }
}

// The memory of a contiguous tensor that a kernel reads (`read`), or may write too (`written`). The
// emulator learns from these what a kernel may touch.
template <class T = void>
const T* read(const Tensor& tensor) {
#if defined(PYDETOX_EMULATOR)
  emulator::allow(tensor.const_data_ptr(),
                  static_cast<size_t>(tensor.numel()) * tensor.element_size(), false);
#endif
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T = void>
T* written(const Tensor& tensor) {
#if defined(PYDETOX_EMULATOR)
  emulator::allow(tensor.const_data_ptr(),
                  static_cast<size_t>(tensor.numel()) * tensor.element_size(), true);
#endif
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Uninitialised float64 on the device of `like`.
inline Tensor new_doubles(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Double);
}

}  // namespace pydetox
