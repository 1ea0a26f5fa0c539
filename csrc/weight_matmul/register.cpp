#include "csrc/common/register.h"

#include "csrc/common/place.h"
#include "csrc/common/tensors.h"
#include "csrc/weight_matmul/core.h"
#include "csrc/weights/arguments.h"

namespace pydetox {
namespace {

constexpr const char* kOp = "weight_diff_matmul";

std::vector<Tensor> weight_diff_matmul(std::vector<Tensor> base, std::vector<Tensor> model,
                                       std::vector<Tensor> factors, bool left) {
  WeightLists lists(kOp, base);
  lists.add("model", model);
  check(factors.size() == base.size(), kOp, ": factors must be ", base.size(), " matrices, found ",
        factors.size());
  const Place place(lists.first());
  const auto table = lists.table();
  std::vector<Tensor> owned, results;
  std::vector<MatmulTask> tasks;
  for (size_t i = 0; i < base.size(); ++i) {
    check(base[i].dim() > 0, kOp, ": base[", i, "] must have at least one dimension, found none");
    const int64_t rows = base[i].size(0);
    int64_t columns = 1;
    for (int64_t d = 1; d < base[i].dim(); ++d) columns *= base[i].size(d);
    const Tensor& factor = factors[i];
    const int64_t depth = left ? rows : columns;
    check(factor.dim() == 2 && factor.size(0) == depth, kOp, ": factors[", i, "] must be [", depth,
          ", r] for the ", left ? "left" : "right", " of base[", i, "] ", ShapeOf{base[i]},
          ", found ", ShapeOf{factor});
    check(factor.scalar_type() == ScalarType::Double, kOp, ": factors[", i,
          "] must be float64, found ", dtype_name(factor));
    check_device(kOp, "factors[" + std::to_string(i) + "]", factor, "base[0]", lists.first());
    owned.push_back(torch::stable::contiguous(factor));
    const int64_t width = factor.size(1);
    const std::vector<int64_t> shape =
        left ? std::vector<int64_t>{width, columns} : std::vector<int64_t>{rows, width};
    results.push_back(new_doubles(factor, shape));
    const auto tensor = static_cast<int64_t>(i);
    tasks.push_back({rows, columns, width, table.source(tensor, 0), table.source(tensor, 1),
                     read<double>(owned.back()), written<double>(results.back())});
  }
  place.run(run_matmul, {tasks.data(), static_cast<int64_t>(tasks.size()), left}, kOp);
  return results;
}

}  // namespace
}  // namespace pydetox

PYDETOX_SCHEMAS(library) {
  // Tensors [m, ...] as matrices [m, n]; factors: float64 [n, r], left: [m, r], each of a width r
  // of its own. -> float64 [m, r], left: [r, n]
  library.def(
      "weight_diff_matmul(Tensor[] base, Tensor[] model, Tensor[] factors, bool left) -> Tensor[]");
}

PYDETOX_KERNELS(library) {
  library.impl("weight_diff_matmul", TORCH_BOX(&pydetox::weight_diff_matmul));
}
