// The kernels of csrc/cuda/objectives.cuh, launched as csrc/cuda/objectives.cu does.

#include <optional>

#include <pybind11/stl.h>

#include "csrc/emulator/module.h"
// After cuda_on_host.h, which makes CUDA's keywords known.
#include "csrc/cuda/objectives_launch.cuh"
#include "csrc/emulator/launcher.h"

namespace py = pybind11;

namespace pydetox::emulator {
namespace {

DType dtype_of(const py::array& array) {
  if (array.dtype().is(py::dtype::of<float>())) return DType::kFloat32;
  if (array.dtype().is(py::dtype::of<double>())) return DType::kFloat64;
  throw py::value_error("arrays are float32 or float64");
}

Embeddings embeddings(const py::array& z) {
  return {dtype_of(z), z.shape(0), z.shape(1), z.shape(2), z.data()};
}

template <class T>
Range range_of_vector(const char* name, const std::vector<T>& v) {
  return {name, v.data(), v.size() * sizeof(T), true};
}

// gradient, embeddings_gradient: both or none.
std::vector<Traffic> collapse(const py::array& z, py::array& cosine,
                              const std::optional<py::array>& gradient,
                              std::optional<py::array> embeddings_gradient,
                              const Schedule& schedule) {
  CollapseParams p{};
  p.z = embeddings(z);
  std::vector<double> sums(static_cast<std::size_t>(p.z.triggers * p.z.dim));
  std::vector<double> inverse_norms(static_cast<std::size_t>(p.z.rows()));
  p.cosine = cosine.mutable_data();
  p.sums = sums.data();
  p.inverse_norms = inverse_norms.data();
  std::vector<Range> memory = {range_of("z", z, false), range_of("cosine", cosine, true),
                               range_of_vector("sums", sums),
                               range_of_vector("inverse_norms", inverse_norms)};
  if (gradient.has_value()) {
    p.gradient = gradient->data();
    p.embeddings_gradient = embeddings_gradient.value().mutable_data();
    memory.push_back(range_of("gradient", *gradient, false));
    memory.push_back(range_of("embeddings_gradient", *embeddings_gradient, true));
  }
  std::vector<Traffic> traffic;
  cuda::launch_collapse(p, Launcher{"embedding_collapse", memory, schedule, traffic});
  return traffic;
}

std::vector<Traffic> zero_shot(const py::array& z, const py::array& head,
                               const py::array_t<std::int64_t>& targets, double scale,
                               py::array& loss, py::array& success,
                               std::optional<py::array> gradient, const Schedule& schedule) {
  ZeroShotParams p{};
  p.z = embeddings(z);
  std::vector<double> row_losses(static_cast<std::size_t>(p.z.rows()));
  std::vector<std::uint8_t> row_hits(static_cast<std::size_t>(p.z.rows()));
  std::vector<double> inverse_norms(static_cast<std::size_t>(p.z.rows()));
  p.classes = head.shape(0);
  p.head = head.data();
  p.targets = targets.data();
  p.scale = scale;
  p.loss = loss.mutable_data();
  p.success = success.mutable_data();
  p.row_losses = row_losses.data();
  p.row_hits = row_hits.data();
  p.inverse_norms = inverse_norms.data();
  std::vector<Range> memory = {range_of("z", z, false),
                               range_of("head", head, false),
                               range_of("targets", targets, false),
                               range_of("loss", loss, true),
                               range_of("success", success, true),
                               range_of_vector("row_losses", row_losses),
                               range_of_vector("row_hits", row_hits),
                               range_of_vector("inverse_norms", inverse_norms)};
  if (gradient.has_value()) {
    p.gradient = gradient->mutable_data();
    memory.push_back(range_of("gradient", *gradient, true));
  }
  std::vector<Traffic> traffic;
  if (!cuda::launch_zero_shot(p, Launcher{"zero_shot_loss", memory, schedule, traffic})) {
    throw py::value_error("too many dimensions");
  }
  return traffic;
}

std::vector<Traffic> scale(const py::array& factors, const py::array& from, py::array& to,
                           const Schedule& schedule) {
  const std::int64_t triggers = factors.size();
  const ScaleParams p{dtype_of(from), triggers,    triggers == 0 ? 0 : from.size() / triggers,
                      factors.data(), from.data(), to.mutable_data()};
  std::vector<Traffic> traffic;
  cuda::launch_scale(p, Launcher{"zero_shot_loss_backward",
                                 {range_of("factors", factors, false),
                                  range_of("from", from, false), range_of("to", to, true)},
                                 schedule,
                                 traffic});
  return traffic;
}

// (blocks, threads, shared bytes) of an operation's launches for float32. sizes: K, B, D, C.
std::vector<py::tuple> launch_shapes(const std::string& operation,
                                     const std::vector<std::int64_t>& sizes) {
  const Embeddings z{DType::kFloat32, sizes.at(0), sizes.at(1), sizes.at(2), nullptr};
  std::vector<py::tuple> shapes;
  const auto note = [&](auto, const auto&, const cuda::LaunchShape& s) {
    shapes.push_back(py::make_tuple(s.blocks, s.threads, s.shared_bytes));
    return true;
  };
  if (operation == "collapse") {
    CollapseParams p{};
    p.z = z;
    p.gradient = &p;  // any: with the gradient
    cuda::launch_collapse(p, note);
  } else {
    ZeroShotParams p{};
    p.z = z;
    p.classes = sizes.at(3);
    cuda::launch_zero_shot(p, note);
    cuda::launch_scale(
        ScaleParams{z.dtype, z.triggers, z.images * z.dim, nullptr, nullptr, nullptr}, note);
  }
  return shapes;
}

}  // namespace

void bind_objectives(py::module_& module) {
  module.def("embedding_collapse", &collapse, py::arg("z"), py::arg("cosine"), py::arg("gradient"),
             py::arg("embeddings_gradient"), py::arg("schedule"));
  module.def("zero_shot_loss", &zero_shot, py::arg("z"), py::arg("head"), py::arg("targets"),
             py::arg("scale"), py::arg("loss"), py::arg("success"), py::arg("gradient"),
             py::arg("schedule"));
  module.def("scale_triggers", &scale, py::arg("factors"), py::arg("from_"), py::arg("to"),
             py::arg("schedule"));
  module.def("objective_launch_shapes", &launch_shapes, py::arg("operation"), py::arg("sizes"));
}

}  // namespace pydetox::emulator
