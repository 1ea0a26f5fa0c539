#pragma once

// From tensors to kernel parameters, with every check that keeps a kernel from reading what is not
// there.

#include <cstdint>
#include <optional>
#include <vector>

#include "csrc/common/check.h"
#include "csrc/stamp_triggers/core.h"

namespace pydetox {

// What all of them take. `corners` may be on the CPU for images on a GPU: on the CPU they are
// checked, and copied then; on a GPU the kernels keep a box inside the image
// (csrc/stamp_triggers/core.h).
struct StampInputs {
  const Tensor& images;
  const Tensor& mask_logits;
  const Tensor& pattern_logits;
  const std::vector<double>& mean;
  const std::vector<double>& std;
  std::optional<int64_t> patch_size;  // none: NCHW
  const std::optional<Tensor>& corners;
};

// The tensors that own what parameters point to: contiguous copies where an argument was not
// contiguous.
class StampTensors {
 protected:
  explicit StampTensors(const StampInputs& in);
  template <class Params>
  void fill(const StampInputs& in, Params& params) const;

 private:
  bool problem_checked_;  // before anything is copied
  Tensor images_, mask_logits_, pattern_logits_;
  std::optional<Tensor> corners_;
};

// Parameters and results. A result is made here, or it is the caller's: contiguous, of the right
// shape and dtype, and apart from every argument.
struct StampForward : private StampTensors {
  StampForward(const StampInputs& in, ScalarType dtype);
  StampForward(const StampInputs& in, const Tensor& out, bool only_box);
  StampForwardParams params{};
  Tensor output;
};

struct StampBackward : private StampTensors {
  StampBackward(const Tensor& gradient, const StampInputs& in);
  StampBackward(const Tensor& gradient, const StampInputs& in, const Tensor& mask_logits_out,
                const Tensor& pattern_logits_out);
  StampBackwardParams params{};
  Tensor mask_logits_gradient, pattern_logits_gradient;

 private:
  Tensor gradient_;
};

}  // namespace pydetox
