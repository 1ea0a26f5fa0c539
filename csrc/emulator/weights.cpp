// The kernels of csrc/cuda/weights.cuh, launched as csrc/cuda/weights.cu does.

#include <array>

#include <pybind11/stl.h>

#include "csrc/emulator/module.h"
// After cuda_on_host.h, which makes CUDA's keywords known.
#include "csrc/cuda/weights_launch.cuh"
#include "csrc/cuda/weights_matmul_launch.cuh"

namespace py = pybind11;

namespace pydetox::emulator {
namespace {

using Lists = std::vector<std::vector<py::array>>;  // [lists, tensors]

// numpy has no bfloat16: uint16 arrays carry its bits. Half precision is numpy's float16.
DType dtype_of(const py::array& array) {
  if (array.dtype().kind() == 'u' && array.itemsize() == 2) return DType::kBFloat16;
  if (array.dtype().kind() == 'f' && array.itemsize() == 2) return DType::kFloat16;
  if (array.dtype().kind() == 'f' && array.itemsize() == 4) return DType::kFloat32;
  if (array.dtype().kind() == 'f' && array.itemsize() == 8) return DType::kFloat64;
  throw py::value_error("weights are float16, uint16 (bfloat16), float32 or float64");
}

// A table over arrays, and the memory that a kernel may touch.
struct Weights {
  // The lists from `written` on are results.
  Weights(const Lists& lists, std::size_t written) {
    first_chunk.push_back(0);
    for (const auto& array : lists.at(0)) {
      counts.push_back(array.size());
      first_chunk.push_back(first_chunk.back() + chunks_of(array.size()));
    }
    for (std::size_t tensor = 0; tensor < counts.size(); ++tensor) {
      for (std::size_t list = 0; list < lists.size(); ++list) {
        const auto& array = lists[list].at(tensor);
        sources.push_back({array.data(), dtype_of(array)});
        const auto name = "list " + std::to_string(list) + ", tensor " + std::to_string(tensor);
        if (array.size() > 0) {
          memory.push_back(range_of(name.c_str(), array, list >= written));
        }
      }
    }
    table = {static_cast<std::int64_t>(counts.size()), static_cast<std::int64_t>(lists.size()),
             counts.data(), first_chunk.data(), sources.data()};
  }

  std::vector<std::int64_t> counts, first_chunk;
  std::vector<Source> sources;
  std::vector<Range> memory;
  WeightTable table{};
};

// What the launch functions are given to launch with; adds up what the launches move.
struct Launcher {
  std::vector<Range> memory;
  const Schedule& schedule;
  std::vector<Traffic>& traffic;

  template <class Params>
  bool operator()(void (*kernel)(Params), const Params& params,
                  const cuda::LaunchShape& shape) const {
    if (shape.blocks == 0) return true;
    Launch launch;
    launch.kernel = "weights, launch " + std::to_string(traffic.size());
    launch.grid.x = static_cast<unsigned>(shape.blocks);
    launch.block.x = static_cast<unsigned>(shape.threads);
    launch.shared_bytes = static_cast<std::size_t>(shape.shared_bytes);
    launch.memory = memory;
    traffic.push_back(emulate(launch, schedule, [&] { kernel(params); }));
    return true;
  }
};

// Runs launches with buffers of doubles that they may write.
template <class Run>
std::vector<Traffic> run(std::vector<Range> memory, std::initializer_list<py::array*> written,
                         const Schedule& schedule, const Run& launches) {
  for (auto* array : written) {
    if (array->size() > 0) memory.push_back(range_of("sums", *array, true));
  }
  std::vector<Traffic> traffic;
  if (!launches(Launcher{std::move(memory), schedule, traffic})) {
    throw py::value_error("too many lists for a launch");
  }
  return traffic;
}

// (blocks, threads, shared bytes) of the launches over one float32 tensor of `count` elements:
// lists as the operation has them; size: of a sketch.
std::vector<py::tuple> launch_shapes(const std::string& operation, std::int64_t count,
                                     std::int64_t lists, std::int64_t size) {
  const std::vector<Source> sources(static_cast<std::size_t>(lists), {nullptr, DType::kFloat32});
  const std::int64_t elements = operation == "sketch" ? 64 * size : kChunk;
  const std::int64_t first_chunk[] = {0, (count + elements - 1) / elements};
  const WeightTable table{1, lists, &count, first_chunk, sources.data()};
  const std::uint64_t key = 0;
  std::vector<py::tuple> shapes;
  const auto note = [&](auto, const auto&, const cuda::LaunchShape& s) {
    shapes.push_back(py::make_tuple(s.blocks, s.threads, s.shared_bytes));
    return true;
  };
  if (operation == "gram") cuda::launch_gram(table, nullptr, nullptr, nullptr, note);
  if (operation == "project") cuda::launch_project(table, nullptr, nullptr, note);
  if (operation == "sketch") {
    cuda::launch_sketch(table, first_chunk, 64, &key, size, nullptr, nullptr, note);
  }
  if (operation == "matmul") {  // a row of one tensor for each of the columns, width 32
    const MatmulTask task{count / size, size, 32, sources[0], sources[0], nullptr, nullptr};
    cuda::launch_matmul(&task, 1, false, note);
  }
  if (operation == "apply") cuda::launch_apply(table, lists - 2, 1, nullptr, false, note);
  return shapes;
}

double* data(py::array& array) { return static_cast<double*>(array.mutable_data()); }

std::vector<Traffic> gram(const Lists& lists, py::array_t<double> partials,
                          py::array_t<double> sums, py::array_t<double> matrix,
                          const Schedule& schedule) {
  const Weights weights(lists, lists.size());
  return run(weights.memory, {&partials, &sums, &matrix}, schedule, [&](const auto& launch) {
    return cuda::launch_gram(weights.table, data(partials), data(sums), data(matrix), launch);
  });
}

std::vector<Traffic> project(const Lists& lists, py::array_t<double> partials,
                             py::array_t<double> sums, const Schedule& schedule) {
  const Weights weights(lists, lists.size());
  return run(weights.memory, {&partials, &sums}, schedule, [&](const auto& launch) {
    return cuda::launch_project(weights.table, data(partials), data(sums), launch);
  });
}

std::vector<Traffic> sketch(const Lists& lists, const std::vector<std::int64_t>& keys,
                            std::int64_t blocks_per_chunk, py::array_t<double> partials,
                            py::array_t<double> sums, const Schedule& schedule) {
  const Weights weights(lists, lists.size());
  const std::int64_t size = sums.size(), elements = size * blocks_per_chunk;
  std::vector<std::int64_t> first_chunk = {0};
  for (const auto count : weights.counts) {
    first_chunk.push_back(first_chunk.back() + (count + elements - 1) / elements);
  }
  const std::vector<std::uint64_t> unsigned_keys(keys.begin(), keys.end());
  return run(weights.memory, {&partials, &sums}, schedule, [&](const auto& launch) {
    return cuda::launch_sketch(weights.table, first_chunk.data(), blocks_per_chunk,
                               unsigned_keys.data(), size, data(partials), data(sums), launch);
  });
}

std::vector<Traffic> apply(const Lists& lists, std::int64_t vectors, py::array_t<double> rows,
                           bool per_tensor, const Schedule& schedule) {
  const auto results = static_cast<std::int64_t>(lists.size()) - 1 - vectors;
  const Weights weights(lists, static_cast<std::size_t>(1 + vectors));
  auto memory = weights.memory;
  if (rows.size() > 0) memory.push_back(range_of("coefficients", rows, false));
  return run(memory, {}, schedule, [&](const auto& launch) {
    return cuda::launch_apply(weights.table, vectors, results, rows.data(), per_tensor, launch);
  });
}

// shapes: rows, columns and width of each tensor.
std::vector<Traffic> matmul(const Lists& lists,
                            const std::vector<std::array<std::int64_t, 3>>& shapes,
                            std::vector<py::array_t<double>> factors,
                            std::vector<py::array_t<double>> results, bool left,
                            const Schedule& schedule) {
  const Weights weights(lists, lists.size());
  auto memory = weights.memory;
  std::vector<MatmulTask> tasks;
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const auto [rows, columns, width] = shapes[i];
    const auto tensor = static_cast<std::int64_t>(i);
    tasks.push_back({rows, columns, width, weights.table.source(tensor, 0),
                     weights.table.source(tensor, 1), data(factors[i]), data(results[i])});
    if (factors[i].size() > 0) memory.push_back(range_of("factor", factors[i], false));
    if (results[i].size() > 0) memory.push_back(range_of("result", results[i], true));
  }
  return run(memory, {}, schedule, [&](const auto& launch) {
    return cuda::launch_matmul(tasks.data(), static_cast<std::int64_t>(tasks.size()), left, launch);
  });
}

}  // namespace

void bind_weights(py::module_& module) {
  module.def("weight_gram", &gram, py::arg("lists"), py::arg("partials"), py::arg("sums"),
             py::arg("matrix"), py::arg("schedule"));
  module.def("weight_project", &project, py::arg("lists"), py::arg("partials"), py::arg("sums"),
             py::arg("schedule"));
  module.def("weight_sketch", &sketch, py::arg("lists"), py::arg("keys"),
             py::arg("blocks_per_chunk"), py::arg("partials"), py::arg("sums"),
             py::arg("schedule"));
  module.def("weight_apply", &apply, py::arg("lists"), py::arg("vectors"), py::arg("rows"),
             py::arg("per_tensor"), py::arg("schedule"));
  module.def("weight_matmul", &matmul, py::arg("lists"), py::arg("shapes"), py::arg("factors"),
             py::arg("results"), py::arg("left"), py::arg("schedule"));
  module.def("weight_launch_shapes", &launch_shapes, py::arg("operation"), py::arg("count"),
             py::arg("lists"), py::arg("size") = 4096);
  module.def("gram_values", &cuda::gram_values, py::arg("models"));
  module.def("project_values", &cuda::project_values, py::arg("directions"));
}

}  // namespace pydetox::emulator
