#pragma once

// From tensors to kernel parameters, with every check that keeps a kernel from reading what is not
// there. Shared by the CPU and the CUDA registration. Failed checks throw std::runtime_error.

#include <cstdint>
#include <utility>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "csrc/core/stamp.h"

namespace pydetox::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Parameters and the tensors that own what they point to: contiguous copies where an argument was
// not contiguous, and the results. A result is made here, or it is the caller's: contiguous, of the
// right shape and dtype, and apart from every argument.
struct StampForward {
  StampForward(const Tensor& images, const Tensor& mask_logits, const Tensor& pattern_logits,
               const std::vector<double>& mean, const std::vector<double>& std, int64_t patch_size,
               ScalarType dtype);
  StampForward(const Tensor& images, const Tensor& mask_logits, const Tensor& pattern_logits,
               const std::vector<double>& mean, const std::vector<double>& std, int64_t patch_size,
               const Tensor& out);
  StampForwardParams params;
  Tensor output;

 private:
  Tensor images_, mask_logits_, pattern_logits_;
};

struct StampBackward {
  StampBackward(const Tensor& gradient, const Tensor& images, const Tensor& mask_logits,
                const Tensor& pattern_logits, const std::vector<double>& mean,
                const std::vector<double>& std, int64_t patch_size);
  StampBackward(const Tensor& gradient, const Tensor& images, const Tensor& mask_logits,
                const Tensor& pattern_logits, const std::vector<double>& mean,
                const std::vector<double>& std, int64_t patch_size, const Tensor& mask_logits_out,
                const Tensor& pattern_logits_out);
  StampBackwardParams params;
  Tensor mask_logits_gradient, pattern_logits_gradient;

 private:
  Tensor gradient_, images_, mask_logits_, pattern_logits_;
};

}  // namespace pydetox::ops
