#include <algorithm>
#include <optional>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cuda/launch.h"
#include "csrc/cuda/weights_layout.h"
#include "csrc/ops/check.h"
#include "csrc/ops/matmul_arguments.h"
#include "csrc/ops/weights_arguments.h"

namespace pydetox::ops {
namespace {

// The device of `on` and its current stream.
struct Place {
  explicit Place(const Tensor& on) : guard(on.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

void check_launch(int error, const char* name) {
  check(error == 0, name, ": ", cuda::error_string(error));
}

Tensor doubles(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Double);
}
double* data(const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

void check_lists(const WeightTable& table, const char* name) {
  check(table.lists <= cuda::kMaxSources, name, ": at most ", cuda::kMaxSources,
        " lists on CUDA, not ", table.lists);
}

// Parts of weights are for files, and files for the CPU.
void check_whole(const char* name, bool whole) {
  check(whole, name, ": sums go on from a start, and tensors begin at a block, on the CPU alone");
}

Tensor weight_diff_gram(std::vector<Tensor> base, std::vector<Tensor> models, int64_t count,
                        std::optional<Tensor> start) {
  check_whole("weight_diff_gram", !start);
  WeightLists lists("weight_diff_gram", base);
  lists.add("models", models, count);
  const Place place(lists.first());
  const auto table = lists.table();
  check_lists(table, "weight_diff_gram");
  const int64_t values = cuda::gram_values(count);
  const Tensor partials = doubles(lists.first(), {table.chunks(), values});
  const Tensor sums = doubles(lists.first(), {values});
  Tensor result = doubles(lists.first(), {count, count});
  check_launch(cuda::weight_gram(table, data(partials), data(sums), data(result), place.stream),
               "weight_diff_gram");
  return result;
}

Tensor weight_diff_project(std::vector<Tensor> base, std::vector<Tensor> model,
                           std::vector<Tensor> directions, int64_t count,
                           std::optional<Tensor> start) {
  check_whole("weight_diff_project", !start);
  WeightLists lists("weight_diff_project", base);
  lists.add("model", model, 1);
  lists.add("directions", directions, count);
  const Place place(lists.first());
  const auto table = lists.table();
  check_lists(table, "weight_diff_project");
  const int64_t values = cuda::project_values(count);
  const Tensor partials = doubles(lists.first(), {table.chunks(), values});
  Tensor sums = doubles(lists.first(), {values});
  check_launch(cuda::weight_project(table, data(partials), data(sums), place.stream),
               "weight_diff_project");
  // A copy: the result owns no more memory than it shows.
  Tensor result = doubles(lists.first(), {count});
  torch::stable::copy_(result, torch::stable::narrow(sums, 0, 0, count));
  return result;
}

Tensor weight_diff_sketch(std::vector<Tensor> base, std::vector<Tensor> model,
                          std::vector<int64_t> keys, int64_t size,
                          std::optional<std::vector<int64_t>> first_blocks,
                          std::optional<Tensor> start) {
  check_whole("weight_diff_sketch", !start && !first_blocks);
  WeightLists lists("weight_diff_sketch", base);
  lists.add("model", model, 1);
  const Place place(lists.first());
  const auto table = lists.table();
  const auto chunks = sketch_chunks(table, size, keys.size());
  const std::vector<uint64_t> unsigned_keys(keys.begin(), keys.end());
  const Tensor partials = doubles(lists.first(), {chunks.first_chunk.back(), size});
  Tensor result = doubles(lists.first(), {size});
  check_launch(
      cuda::weight_sketch(table, chunks.first_chunk.data(), chunks.blocks_per_chunk,
                          unsigned_keys.data(), size, data(partials), data(result), place.stream),
      "weight_diff_sketch");
  return result;
}

std::vector<Tensor> weight_diff_matmul(std::vector<Tensor> base, std::vector<Tensor> model,
                                       std::vector<Tensor> factors, bool left) {
  const MatmulArguments arguments(base, model, factors, left);
  const Place place(arguments.first());
  const auto& tasks = arguments.tasks();
  check_launch(
      cuda::weight_matmul(tasks.data(), static_cast<int64_t>(tasks.size()), left, place.stream),
      "weight_diff_matmul");
  return arguments.results();
}

void apply_task_vectors(std::vector<Tensor> base, std::vector<Tensor> vectors,
                        const Tensor& coefficients, std::vector<Tensor> out) {
  const auto tensors = static_cast<int64_t>(std::max<size_t>(1, base.size()));
  const auto rows = static_cast<int64_t>(vectors.size()) / tensors;
  const auto results = static_cast<int64_t>(out.size()) / tensors;
  WeightLists lists("apply_task_vectors", base);
  lists.add("vectors", vectors, rows);
  lists.add_results("out", out, results);
  check_coefficients(coefficients, lists.first(), rows, results, tensors);
  const Place place(lists.first());
  const auto table = lists.table();
  check_lists(table, "apply_task_vectors");
  check_launch(cuda::weight_apply(table, rows, results,
                                  static_cast<const double*>(coefficients.const_data_ptr()),
                                  coefficients.dim() == 3, place.stream),
               "apply_task_vectors");
}

}  // namespace
}  // namespace pydetox::ops

STABLE_TORCH_LIBRARY_IMPL(pydetox, CUDA, library) {
  library.impl("weight_diff_gram", TORCH_BOX(&pydetox::ops::weight_diff_gram));
  library.impl("weight_diff_project", TORCH_BOX(&pydetox::ops::weight_diff_project));
  library.impl("weight_diff_sketch", TORCH_BOX(&pydetox::ops::weight_diff_sketch));
  library.impl("weight_diff_matmul", TORCH_BOX(&pydetox::ops::weight_diff_matmul));
  library.impl("apply_task_vectors", TORCH_BOX(&pydetox::ops::apply_task_vectors));
}
