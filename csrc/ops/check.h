#pragma once

#include <sstream>
#include <stdexcept>

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

}  // namespace pydetox::ops
