#include <algorithm>
#include <atomic>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cpu/weights.h"
#include "csrc/ops/check.h"
#include "csrc/ops/matmul_arguments.h"
#include "csrc/ops/weights_arguments.h"

namespace pydetox::ops {
namespace {

// A few chunks at a time, to whoever is free: chunks of small tensors are small, and a call over
// parts of files, with ten chunks in all, has no large numbers to even that out.
template <class Work>
void share_out(int64_t chunks, const Work& work) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t run = std::max<int64_t>(1, chunks / (16 * threads));
  std::atomic<int64_t> next{0};
  const auto take = [&](int64_t, int64_t) {
    for (int64_t begin = next.fetch_add(run); begin < chunks; begin = next.fetch_add(run)) {
      work(begin, std::min(begin + run, chunks));
    }
  };
  torch::stable::parallel_for(0, std::min(chunks, threads), 1, take);
}

// Elements that a unit of a left product reads, about; as many columns side by side as that allows,
// so that memory is read in longer stretches.
constexpr int64_t kLeftUnit = 1 << 20;

// The parts that the products are computed in.
std::vector<cpu::MatmulUnit> matmul_units(const std::vector<MatmulTask>& tasks, bool left) {
  std::vector<cpu::MatmulUnit> units;
  for (size_t i = 0; i < tasks.size(); ++i) {
    const MatmulTask& task = tasks[i];
    if (task.width == 0) continue;
    const int64_t size = left ? task.columns : task.rows;   // split up
    const int64_t depth = left ? task.rows : task.columns;  // summed
    const int64_t runs = left ? std::clamp<int64_t>(kLeftUnit / (kRun * (depth + 1)), 1, 4) : 1;
    for (int64_t first = 0; first < size; first += runs * kRun) {
      const int64_t count = std::min(runs * kRun, size - first);
      units.push_back({static_cast<int64_t>(i), first, count});
    }
  }
  return units;
}

// partials [chunks, values], added to `sums` in the order of the chunks.
void add_chunks(const double* partials, int64_t chunks, int64_t values, double* sums) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t v = 0; v < values; ++v) sums[v] += partials[chunk * values + v];
  }
}

Tensor doubles(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Double);
}
double* data(const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

// The result that sums go on from, or zeros.
std::vector<double> values_of(const std::optional<Tensor>& start, int64_t count) {
  if (!start) return std::vector<double>(static_cast<size_t>(count));
  const auto* from = static_cast<const double*>(start->const_data_ptr());
  return {from, from + count};
}
Tensor as_tensor(const std::vector<double>& sums, const Tensor& like) {
  Tensor result = doubles(like, {static_cast<int64_t>(sums.size())});
  std::copy(sums.begin(), sums.end(), data(result));
  return result;
}

Tensor weight_diff_gram(std::vector<Tensor> base, std::vector<Tensor> models, int64_t count,
                        std::optional<Tensor> start) {
  WeightLists lists("weight_diff_gram", base);
  lists.add("models", models, count);
  check_start("weight_diff_gram", start, {count, count});
  const auto table = lists.table();
  const int64_t pairs = count * (count + 1) / 2;
  std::vector<double> partials(static_cast<size_t>(table.chunks() * pairs));
  share_out(table.chunks(), [&](int64_t begin, int64_t end) {
    cpu::weight_kernels().gram(table, partials.data(), begin, end);
  });
  std::vector<double> sums(static_cast<size_t>(pairs));
  if (start) {
    pack_symmetric(static_cast<const double*>(start->const_data_ptr()), count, sums.data());
  }
  add_chunks(partials.data(), table.chunks(), pairs, sums.data());
  Tensor result = doubles(lists.first(), {count, count});
  unpack_symmetric(sums.data(), count, data(result));
  return result;
}

Tensor weight_diff_project(std::vector<Tensor> base, std::vector<Tensor> model,
                           std::vector<Tensor> directions, int64_t count,
                           std::optional<Tensor> start) {
  WeightLists lists("weight_diff_project", base);
  lists.add("model", model, 1);
  lists.add("directions", directions, count);
  check_start("weight_diff_project", start, {count});
  const auto table = lists.table();
  std::vector<double> partials(static_cast<size_t>(table.chunks() * count));
  share_out(table.chunks(), [&](int64_t begin, int64_t end) {
    cpu::weight_kernels().project(table, partials.data(), begin, end);
  });
  auto sums = values_of(start, count);
  add_chunks(partials.data(), table.chunks(), count, sums.data());
  return as_tensor(sums, lists.first());
}

Tensor weight_diff_sketch(std::vector<Tensor> base, std::vector<Tensor> model,
                          std::vector<int64_t> keys, int64_t size,
                          std::optional<std::vector<int64_t>> first_blocks,
                          std::optional<Tensor> start) {
  WeightLists lists("weight_diff_sketch", base);
  lists.add("model", model, 1);
  const auto table = lists.table();
  const auto chunks = sketch_chunks(table, size, keys.size());
  check_start("weight_diff_sketch", start, {size});
  const std::vector<int64_t> blocks = first_blocks.value_or(std::vector<int64_t>(keys.size()));
  check(blocks.size() == keys.size(), "weight_diff_sketch: ", keys.size(),
        " tensors need as many first blocks, not ", blocks.size());
  for (const int64_t block : blocks) {
    check(block >= 0 && block % chunks.blocks_per_chunk == 0,
          "weight_diff_sketch: first blocks must be multiples of ", chunks.blocks_per_chunk,
          ", not ", block);
  }
  const std::vector<uint64_t> unsigned_keys(keys.begin(), keys.end());
  const cpu::SketchParams params{table, unsigned_keys.data(),    blocks.data(),
                                 size,  chunks.blocks_per_chunk, chunks.first_chunk.data()};
  const int64_t total = chunks.first_chunk.back();
  std::vector<double> partials(static_cast<size_t>(total * size));
  share_out(total, [&](int64_t begin, int64_t end) {
    cpu::weight_kernels().sketch(params, partials.data(), begin, end);
  });
  auto sums = values_of(start, size);
  add_chunks(partials.data(), total, size, sums.data());
  return as_tensor(sums, lists.first());
}

std::vector<Tensor> weight_diff_matmul(std::vector<Tensor> base, std::vector<Tensor> model,
                                       std::vector<Tensor> factors, bool left) {
  MatmulArguments arguments(base, model, factors, left);
  const auto units = matmul_units(arguments.tasks(), left);
  const cpu::MatmulParams params{arguments.tasks().data(), units.data(), left};
  share_out(static_cast<int64_t>(units.size()),
            [&](int64_t begin, int64_t end) { cpu::weight_kernels().matmul(params, begin, end); });
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
  const auto table = lists.table();
  const cpu::ApplyParams params{table, rows, results,
                                static_cast<const double*>(coefficients.const_data_ptr()),
                                coefficients.dim() == 3};
  share_out(table.chunks(),
            [&](int64_t begin, int64_t end) { cpu::weight_kernels().apply(params, begin, end); });
}

}  // namespace
}  // namespace pydetox::ops

STABLE_TORCH_LIBRARY_IMPL(pydetox, CPU, library) {
  library.impl("weight_diff_gram", TORCH_BOX(&pydetox::ops::weight_diff_gram));
  library.impl("weight_diff_project", TORCH_BOX(&pydetox::ops::weight_diff_project));
  library.impl("weight_diff_sketch", TORCH_BOX(&pydetox::ops::weight_diff_sketch));
  library.impl("weight_diff_matmul", TORCH_BOX(&pydetox::ops::weight_diff_matmul));
  library.impl("apply_task_vectors", TORCH_BOX(&pydetox::ops::apply_task_vectors));
}
