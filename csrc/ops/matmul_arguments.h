#pragma once

// From the arguments of weight_diff_matmul to one task for each tensor, with every check that keeps
// a kernel from reading what is not there. Shared by the CPU and the CUDA registration.

#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "csrc/core/matmul.h"
#include "csrc/ops/weights_arguments.h"

namespace pydetox::ops {

// The tasks, and what owns the memory that they point to. Results are uninitialised.
class MatmulArguments {
 public:
  MatmulArguments(const std::vector<Tensor>& base, const std::vector<Tensor>& model,
                  const std::vector<Tensor>& factors, bool left);

  const std::vector<MatmulTask>& tasks() const { return tasks_; }
  const std::vector<Tensor>& results() const { return results_; }
  const Tensor& first() const { return lists_.first(); }

 private:
  WeightLists lists_;
  std::vector<Tensor> factors_, results_;
  std::vector<MatmulTask> tasks_;
};

}  // namespace pydetox::ops
