#pragma once

#include <sstream>
#include <stdexcept>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace pydetox::ops {

// Throws unless `holds`; the parts are put together to the message. (STD_TORCH_CHECK would put the
// path of the build machine into it.)
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A tensor's shape in a message.
struct ShapeOf {
  const torch::stable::Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& stream, const ShapeOf& shape) {
  stream << '[';
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) {
    stream << (i == 0 ? "" : ", ") << shape.tensor.size(i);
  }
  return stream << ']';
}

struct SizesOf {
  const std::vector<int64_t>& sizes;
};
inline std::ostream& operator<<(std::ostream& stream, const SizesOf& shape) {
  stream << '[';
  for (size_t i = 0; i < shape.sizes.size(); ++i) stream << (i == 0 ? "" : ", ") << shape.sizes[i];
  return stream << ']';
}

}  // namespace pydetox::ops
