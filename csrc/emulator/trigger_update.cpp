// The kernels of csrc/cuda/trigger_update.cuh, launched as csrc/cuda/trigger_update.cu does.

#include <optional>

#include <pybind11/stl.h>

#include "csrc/emulator/module.h"
// After cuda_on_host.h, which makes CUDA's keywords known.
#include "csrc/cuda/trigger_update_launch.cuh"
#include "csrc/emulator/launcher.h"

namespace py = pybind11;

namespace pydetox::emulator {
namespace {

DType dtype_of(const py::array& array) {
  if (array.dtype().is(py::dtype::of<float>())) return DType::kFloat32;
  if (array.dtype().is(py::dtype::of<double>())) return DType::kFloat64;
  throw py::value_error("arrays are float32 or float64");
}

// arrays: what the operator takes, by the names of its schema; absent ones are left out.
std::vector<Traffic> trigger_update(const py::dict& arrays, double beta1, double beta2,
                                    double epsilon, const Schedule& schedule) {
  std::vector<Range> memory;
  const auto array = [&](const char* name) { return arrays[name].cast<py::array>(); };
  const auto read = [&](const char* name) -> const void* {
    memory.push_back(range_of(name, array(name), false));
    return array(name).data();
  };
  const auto written = [&](const char* name) -> void* {
    memory.push_back(range_of(name, array(name), true));
    return array(name).mutable_data();
  };
  const bool best = arrays.contains("best_mask");
  const bool variation = arrays.contains("total_variation");

  const auto pattern = array("pattern_logits");
  TriggerUpdateParams p{};
  p.dtype = dtype_of(pattern);
  p.triggers = pattern.shape(0);
  p.channels = pattern.shape(1);
  p.height = pattern.shape(2);
  p.width = pattern.shape(3);
  p.mask = {written("mask_logits"), read("mask_gradient"), written("mask_first"),
            written("mask_second"), best ? written("best_mask") : nullptr};
  p.pattern = {written("pattern_logits"), read("pattern_gradient"), written("pattern_first"),
               written("pattern_second"), best ? written("best_pattern") : nullptr};
  const auto numbers = [&](const char* name) {
    return PerTrigger{read(name), dtype_of(array(name))};
  };
  p.cost = numbers("cost");
  p.learning_rate = numbers("learning_rate");
  if (variation) p.variation = numbers("total_variation");
  p.steps = static_cast<std::int64_t*>(written("steps"));
  p.active = static_cast<const std::uint8_t*>(read("active"));
  if (best) {
    p.best_norm = static_cast<double*>(written("best_norm"));
    p.eligible = static_cast<const std::uint8_t*>(read("eligible"));
  }
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.epsilon = epsilon;
  p.norms = static_cast<double*>(written("norms"));

  std::vector<double> partials(static_cast<std::size_t>(p.triggers * p.mask_chunks()));
  std::vector<TriggerStep> plans(static_cast<std::size_t>(p.triggers));
  std::vector<std::int8_t> signs(variation ? static_cast<std::size_t>(p.triggers * p.pixels()) : 0);
  p.partials = partials.data();
  p.plans = plans.data();
  if (variation) p.signs = signs.data();
  memory.push_back({"partials", partials.data(), partials.size() * sizeof(double), true});
  memory.push_back({"plans", plans.data(), plans.size() * sizeof(TriggerStep), true});
  memory.push_back({"signs", signs.data(), signs.size(), true});
  std::vector<Traffic> traffic;
  cuda::launch_trigger_update(p, Launcher{"trigger_update", memory, schedule, traffic});
  return traffic;
}

// (blocks, threads, shared bytes) of the launches for float32. sizes: K, C, H, W.
std::vector<py::tuple> launch_shapes(const std::vector<std::int64_t>& sizes) {
  TriggerUpdateParams p{};
  p.dtype = DType::kFloat32;
  p.triggers = sizes.at(0);
  p.channels = sizes.at(1);
  p.height = sizes.at(2);
  p.width = sizes.at(3);
  std::vector<py::tuple> shapes;
  cuda::launch_trigger_update(p, [&](auto, const auto&, const cuda::LaunchShape& s) {
    shapes.push_back(py::make_tuple(s.blocks, s.threads, s.shared_bytes));
    return true;
  });
  return shapes;
}

}  // namespace

void bind_trigger_update(py::module_& module) {
  module.def("trigger_update", &trigger_update, py::arg("arrays"), py::arg("beta1"),
             py::arg("beta2"), py::arg("epsilon"), py::arg("schedule"));
  module.def("trigger_update_launch_shapes", &launch_shapes, py::arg("sizes"));
}

}  // namespace pydetox::emulator
