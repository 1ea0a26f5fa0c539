#pragma once

// From tensors to the parameters of the objectives, with every check that keeps a kernel from
// touching what is not there.

#include <cstdint>

#include "csrc/common/check.h"
#include "csrc/objectives/core.h"

namespace pydetox {

// Parameters and the tensors that own what they point to: contiguous copies where an argument was
// not contiguous, workspace and results.
struct Collapse {
  explicit Collapse(const Tensor& z);
  CollapseParams params{};
  Tensor cosine;

 protected:
  Tensor z_, sums_, inverse_norms_;
};

struct CollapseBackward : Collapse {
  CollapseBackward(const Tensor& gradient, const Tensor& z);
  Tensor result;

 private:
  Tensor gradient_;
};

struct ZeroShot {
  ZeroShot(const Tensor& z, const Tensor& head, const Tensor& targets, double logit_scale,
           bool with_gradient);
  ZeroShotParams params{};
  Tensor loss, success, gradient;  // gradient: [0] if it is not wanted

 private:
  Tensor z_, head_, targets_, row_losses_, row_hits_, inverse_norms_;
};

// result[k] = gradient[k] * embeddings_gradient[k]
struct ScaledTriggers {
  ScaledTriggers(const Tensor& gradient, const Tensor& z, const Tensor& embeddings_gradient);
  ScaleParams params{};
  Tensor result;

 private:
  Tensor gradient_, embeddings_gradient_;
};

}  // namespace pydetox
