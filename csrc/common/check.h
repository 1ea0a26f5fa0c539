#pragma once

// Checks of an operator's arguments. A failed one throws std::invalid_argument, which Python sees
// as ValueError and pydetox/ops/_library.py turns into UsageError. A message is one line that names
// the operator and the argument, what was expected and what was found.

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace pydetox {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws unless `holds`; the parts are put together to the message. (STD_TORCH_CHECK would put the
// path of the build machine into it.)
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << std::boolalpha;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// ---- what stands in messages ----

struct SizesOf {
  const std::vector<int64_t>& sizes;
};
inline std::ostream& operator<<(std::ostream& stream, const SizesOf& shape) {
  stream << '[';
  for (size_t i = 0; i < shape.sizes.size(); ++i) stream << (i == 0 ? "" : ", ") << shape.sizes[i];
  return stream << ']';
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return sizes;
}

struct ShapeOf {
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& stream, const ShapeOf& shape) {
  return stream << SizesOf{sizes_of(shape.tensor)};
}

// As PyTorch calls it: float32, not Float.
inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}
inline const char* dtype_name(const Tensor& tensor) { return name_of(tensor.scalar_type()); }

struct DeviceOf {
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& stream, const DeviceOf& device) {
  if (device.tensor.is_cpu()) return stream << "cpu";
  return stream << (device.tensor.is_cuda() ? "cuda:" : "device ")
                << device.tensor.get_device_index();
}

// ---- what several operators check ----

inline bool has_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  return sizes_of(tensor) == sizes;
}

// `op: name must be on DEVICE as LIKE_NAME is, found DEVICE`.
template <class Name, class LikeName>
void check_device(const char* op, const Name& name, const Tensor& tensor, const LikeName& like_name,
                  const Tensor& like) {
  check(tensor.device() == like.device(), op, ": ", name, " must be on ", DeviceOf{like}, " as ",
        like_name, " is, found ", DeviceOf{tensor});
}

struct Named {
  const char* name;
  Tensor tensor;
};

// What is written must be nobody else's memory. Of a strided argument only the first element's
// place is known here: it is enough to tell a view of `written` that begins inside it, and a copy
// is made of it before anything is written.
inline void check_apart(const char* op, const Named& written, const Named& other) {
  const auto begin = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr());
  };
  const auto end = [&](const Tensor& t) {
    const auto bytes = static_cast<uintptr_t>(t.numel()) * t.element_size();
    return begin(t) + (t.is_contiguous() || bytes == 0 ? bytes : 1);
  };
  check(begin(written.tensor) >= end(other.tensor) || begin(other.tensor) >= end(written.tensor),
        op, ": ", written.name, " must not share memory with ", other.name);
}

}  // namespace pydetox
