#include "csrc/common/register.h"

#include <algorithm>

#include "csrc/common/place.h"
#include "csrc/common/tensors.h"
#include "csrc/weights/arguments.h"

namespace pydetox {
namespace {

Tensor weight_diff_gram(std::vector<Tensor> base, std::vector<Tensor> models, int64_t count,
                        std::optional<Tensor> start) {
  constexpr const char* kOp = "weight_diff_gram";
  WeightLists lists(kOp, base);
  lists.add_lists("models", models, count);
  const Place place(lists.first());
  const auto table = lists.table();
  const int64_t values = gram_values(count);
  const Tensor partials = new_doubles(lists.first(), {table.chunks(), values});
  const Tensor sums = new_doubles(lists.first(), {values});
  Tensor result = new_doubles(lists.first(), {count, count});
  place.run(run_gram,
            {table, checked_start(kOp, start, {count, count}), written<double>(partials),
             written<double>(sums), written<double>(result)},
            kOp);
  return result;
}

Tensor weight_diff_project(std::vector<Tensor> base, std::vector<Tensor> model,
                           std::vector<Tensor> directions, int64_t count,
                           std::optional<Tensor> start) {
  constexpr const char* kOp = "weight_diff_project";
  WeightLists lists(kOp, base);
  lists.add("model", model);
  lists.add_lists("directions", directions, count);
  const Place place(lists.first());
  const auto table = lists.table();
  const int64_t values = project_values(count);
  const Tensor partials = new_doubles(lists.first(), {table.chunks(), values});
  Tensor sums = new_doubles(lists.first(), {values});
  place.run(
      run_project,
      {table, checked_start(kOp, start, {count}), written<double>(partials), written<double>(sums)},
      kOp);
  // A copy: the result owns no more memory than it shows.
  Tensor result = new_doubles(lists.first(), {count});
  torch::stable::copy_(result, torch::stable::narrow(sums, 0, 0, count));
  return result;
}

Tensor weight_diff_sketch(std::vector<Tensor> base, std::vector<Tensor> model,
                          std::vector<int64_t> keys, int64_t size,
                          std::optional<std::vector<int64_t>> first_elements,
                          std::optional<Tensor> start) {
  constexpr const char* kOp = "weight_diff_sketch";
  WeightLists lists(kOp, base);
  lists.add("model", model);
  const Place place(lists.first());
  const auto table = lists.table();
  const SketchChunks chunks(table, size, keys, first_elements);
  const double* from = checked_start(kOp, start, {size});
  const Tensor partials = new_doubles(lists.first(), {chunks.first_chunk.back(), size});
  Tensor result = new_doubles(lists.first(), {size});
  place.run(run_sketch,
            {table, chunks.keys.data(), chunks.first_block.data(), size, chunks.blocks_per_chunk,
             chunks.first_chunk.data(), from, written<double>(partials), written<double>(result)},
            kOp);
  return result;
}

void apply_task_vectors(std::vector<Tensor> base, std::vector<Tensor> vectors,
                        const Tensor& coefficients, std::vector<Tensor> out) {
  constexpr const char* kOp = "apply_task_vectors";
  const auto tensors = static_cast<int64_t>(std::max<size_t>(1, base.size()));
  const auto rows = static_cast<int64_t>(vectors.size()) / tensors;
  const auto results = static_cast<int64_t>(out.size()) / tensors;
  WeightLists lists(kOp, base);
  lists.add_lists("vectors", vectors, rows);
  lists.add_results("out", out, results);
  check_coefficients(coefficients, lists.first(), rows, results, tensors);
  const Place place(lists.first());
  place.run(run_apply,
            {lists.table(), rows, results, read<double>(coefficients), coefficients.dim() == 3},
            kOp);
}

}  // namespace
}  // namespace pydetox

PYDETOX_SCHEMAS(library) {
  // Lists of tensors as state dicts hold them. models, directions, vectors, out: `count` lists one
  // after the other, each like base. -> float64 [count, count]
  // start, here and below: a result to add to, before anything else (CPU). What comes in parts, cut
  // at multiples of kChunk elements, thus gives the bits of one call.
  library.def(
      "weight_diff_gram(Tensor[] base, Tensor[] models, int count, Tensor? start=None) -> Tensor");
  // -> float64 [count]
  library.def(
      "weight_diff_project(Tensor[] base, Tensor[] model, Tensor[] directions, int count, "
      "Tensor? start=None) -> Tensor");
  // keys: one for each tensor, of seed and name. first_elements: where in it each begins, at
  // multiples of 64 * size (CPU). -> float64 [size]
  library.def(
      "weight_diff_sketch(Tensor[] base, Tensor[] model, int[] keys, int size, "
      "int[]? first_elements=None, Tensor? start=None) -> Tensor");
  // coefficients: float64 [M, R] or [M, R, tensors]; vectors: R lists; out: M lists.
  library.def(
      "apply_task_vectors(Tensor[] base, Tensor[] vectors, Tensor coefficients, "
      "Tensor(a!)[] out) -> ()");
}

PYDETOX_KERNELS(library) {
  using namespace pydetox;
  library.impl("weight_diff_gram", TORCH_BOX(&weight_diff_gram));
  library.impl("weight_diff_project", TORCH_BOX(&weight_diff_project));
  library.impl("weight_diff_sketch", TORCH_BOX(&weight_diff_sketch));
  library.impl("apply_task_vectors", TORCH_BOX(&apply_task_vectors));
}
