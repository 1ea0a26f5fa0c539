#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cpu/weights.h"
#include "csrc/ops/weights_arguments.h"

namespace pydetox::ops {
namespace {

template <class Work>
void over_chunks(int64_t chunks, const Work& work) {
  torch::stable::parallel_for(0, chunks, 1, work);
}

// partials [chunks, values], added up in the order of the chunks.
void add_chunks(const double* partials, int64_t chunks, int64_t values, double* sums) {
  std::fill(sums, sums + values, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t v = 0; v < values; ++v) sums[v] += partials[chunk * values + v];
  }
}

Tensor doubles(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Double);
}
double* data(const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

Tensor weight_diff_gram(std::vector<Tensor> base, std::vector<Tensor> models, int64_t count) {
  WeightLists lists("weight_diff_gram", base);
  lists.add("models", models, count);
  const auto table = lists.table();
  const int64_t pairs = count * (count + 1) / 2;
  std::vector<double> partials(static_cast<size_t>(table.chunks() * pairs));
  over_chunks(table.chunks(), [&](int64_t begin, int64_t end) {
    cpu::weight_kernels().gram(table, partials.data(), begin, end);
  });
  std::vector<double> sums(static_cast<size_t>(pairs));
  add_chunks(partials.data(), table.chunks(), pairs, sums.data());
  Tensor result = doubles(lists.first(), {count, count});
  unpack_symmetric(sums.data(), count, data(result));
  return result;
}

Tensor weight_diff_project(std::vector<Tensor> base, std::vector<Tensor> model,
                           std::vector<Tensor> directions, int64_t count) {
  WeightLists lists("weight_diff_project", base);
  lists.add("model", model, 1);
  lists.add("directions", directions, count);
  const auto table = lists.table();
  std::vector<double> partials(static_cast<size_t>(table.chunks() * count));
  over_chunks(table.chunks(), [&](int64_t begin, int64_t end) {
    cpu::weight_kernels().project(table, partials.data(), begin, end);
  });
  Tensor result = doubles(lists.first(), {count});
  add_chunks(partials.data(), table.chunks(), count, data(result));
  return result;
}

Tensor weight_diff_sketch(std::vector<Tensor> base, std::vector<Tensor> model,
                          std::vector<int64_t> keys, int64_t size) {
  WeightLists lists("weight_diff_sketch", base);
  lists.add("model", model, 1);
  const auto table = lists.table();
  const auto chunks = sketch_chunks(table, size, keys.size());
  const std::vector<uint64_t> unsigned_keys(keys.begin(), keys.end());
  const cpu::SketchParams params{table, unsigned_keys.data(), size, chunks.blocks_per_chunk,
                                 chunks.first_chunk.data()};
  const int64_t total = chunks.first_chunk.back();
  std::vector<double> partials(static_cast<size_t>(total * size));
  over_chunks(total, [&](int64_t begin, int64_t end) {
    cpu::weight_kernels().sketch(params, partials.data(), begin, end);
  });
  Tensor result = doubles(lists.first(), {size});
  add_chunks(partials.data(), total, size, data(result));
  return result;
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
  const auto table = lists.table();
  const cpu::ApplyParams params{table, rows, results,
                                static_cast<const double*>(coefficients.const_data_ptr()),
                                coefficients.dim() == 3};
  over_chunks(table.chunks(),
              [&](int64_t begin, int64_t end) { cpu::weight_kernels().apply(params, begin, end); });
}

}  // namespace
}  // namespace pydetox::ops

STABLE_TORCH_LIBRARY_IMPL(pydetox, CPU, library) {
  library.impl("weight_diff_gram", TORCH_BOX(&pydetox::ops::weight_diff_gram));
  library.impl("weight_diff_project", TORCH_BOX(&pydetox::ops::weight_diff_project));
  library.impl("weight_diff_sketch", TORCH_BOX(&pydetox::ops::weight_diff_sketch));
  library.impl("apply_task_vectors", TORCH_BOX(&pydetox::ops::apply_task_vectors));
}
