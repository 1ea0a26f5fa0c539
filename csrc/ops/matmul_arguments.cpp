#include "csrc/ops/matmul_arguments.h"

#include <torch/csrc/stable/ops.h>

#include "csrc/ops/check.h"

namespace pydetox::ops {

MatmulArguments::MatmulArguments(const std::vector<Tensor>& base, const std::vector<Tensor>& model,
                                 const std::vector<Tensor>& factors, bool left)
    : lists_("weight_diff_matmul", base) {
  const char* op = "weight_diff_matmul";
  lists_.add("model", model, 1);
  check(factors.size() == base.size(), op, ": ", base.size(), " tensors need as many factors, not ",
        factors.size());
  const auto table = lists_.table();
  for (size_t i = 0; i < base.size(); ++i) {
    check(base[i].dim() > 0, op, ": base tensor ", i, " has no dimension: a matrix needs rows");
    const int64_t rows = base[i].size(0);
    int64_t columns = 1;
    for (int64_t d = 1; d < base[i].dim(); ++d) columns *= base[i].size(d);
    const Tensor& factor = factors[i];
    check(factor.scalar_type() == ScalarType::Double, op, ": factors must be float64");
    check(factor.device() == base.front().device(), op, ": factor ", i,
          " is on another device than base");
    check(factor.dim() == 2 && factor.size(0) == (left ? rows : columns), op, ": factor ", i,
          " must be [", left ? rows : columns, ", width] for base ", ShapeOf{base[i]}, ", not ",
          ShapeOf{factor});
    factors_.push_back(torch::stable::contiguous(factor));
    const int64_t width = factor.size(1);
    const std::vector<int64_t> shape =
        left ? std::vector<int64_t>{width, columns} : std::vector<int64_t>{rows, width};
    results_.push_back(torch::stable::new_empty(factor, shape, ScalarType::Double));
    const auto tensor = static_cast<int64_t>(i);
    tasks_.push_back({rows, columns, width, table.source(tensor, 0), table.source(tensor, 1),
                      static_cast<const double*>(factors_.back().const_data_ptr()),
                      static_cast<double*>(results_.back().mutable_data_ptr())});
  }
}

}  // namespace pydetox::ops
