// The kernels of csrc/cuda/stamp_triggers.cuh, launched as csrc/cuda/stamp_triggers.cu does.

#include <optional>

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "csrc/emulator/module.h"
// After cuda_on_host.h, which makes CUDA's keywords known.
#include "csrc/cuda/stamp_triggers_launch.cuh"

namespace py = pybind11;

namespace pydetox::emulator {
namespace {

// numpy has no bfloat16: uint16 arrays carry its bits.
DType dtype_of(const py::array& array) {
  const auto dtype = array.dtype();
  if (dtype.is(py::dtype::of<std::uint8_t>())) return DType::kUInt8;
  if (dtype.is(py::dtype::of<std::uint16_t>())) return DType::kBFloat16;
  if (dtype.is(py::dtype::of<float>())) return DType::kFloat32;
  if (dtype.is(py::dtype::of<double>())) return DType::kFloat64;
  throw py::value_error("arrays are uint8, uint16 (bfloat16), float32 or float64");
}

using Corners = std::optional<py::array_t<std::int64_t, py::array::c_style>>;

// Shape, crop and stride, as csrc/ops/stamp_arguments.cpp finds them.
template <class Params>
void set_sizes(const py::array& images, const py::array& mask_logits, std::int64_t patch,
               const Corners& corners, Params& params) {
  const py::ssize_t first = images.ndim() == 5 ? 1 : 0;
  params.shape = {mask_logits.shape(0),    images.shape(first),     images.shape(first + 1),
                  images.shape(first + 2), images.shape(first + 3), patch};
  params.crop = {mask_logits.shape(1), mask_logits.shape(2), corners ? corners->data() : nullptr};
  const std::int64_t batch = params.shape.images * params.shape.channels * params.shape.pixels();
  params.image_stride = images.ndim() == 5 ? batch : 0;
}

Normalization normalization_of(const std::vector<double>& mean, const std::vector<double>& std) {
  Normalization result{};
  for (std::size_t c = 0; c < mean.size() && c < kMaxChannels; ++c) {
    result.mean[c] = mean[c];
    result.inverse_std[c] = 1 / std[c];
  }
  return result;
}

// What a dispatch function is given to launch with.
template <class Params>
auto launcher(const char* name, std::vector<Range> memory, const Params& params,
              const Schedule& schedule, Traffic& traffic) {
  return [=, &params, &schedule, &traffic](void (*kernel)(Params), const cuda::LaunchShape& shape) {
    if (shape.blocks == 0) return true;
    Launch launch;
    launch.kernel = name;
    launch.grid.x = static_cast<unsigned>(shape.blocks);
    launch.block.x = static_cast<unsigned>(shape.threads);
    launch.shared_bytes = static_cast<std::size_t>(shape.shared_bytes);
    launch.memory = memory;
    traffic = emulate(launch, schedule, [&] { kernel(params); });
    return true;
  };
}

Traffic finish(bool dispatched, const Traffic& traffic) {
  if (!dispatched) throw py::value_error("no kernel for this combination of types");
  return traffic;
}

Traffic stamp_forward(const py::array& images, const py::array& mask_logits,
                      const py::array& pattern_logits, py::array& output,
                      const std::vector<double>& mean, const std::vector<double>& std,
                      std::int64_t patch_size, const Schedule& schedule, const Corners& corners,
                      bool only_box) {
  StampForwardParams params{};
  set_sizes(images, mask_logits, patch_size, corners, params);
  params.normalization = normalization_of(mean, std);
  params.compute_dtype = dtype_of(mask_logits);
  params.image_dtype = dtype_of(images);
  params.output_dtype = dtype_of(output);
  params.images = images.data();
  params.mask_logits = mask_logits.data();
  params.pattern_logits = pattern_logits.data();
  params.output = output.mutable_data();
  params.only_box = only_box;
  std::vector<Range> memory = {
      range_of("images", images, false), range_of("mask_logits", mask_logits, false),
      range_of("pattern_logits", pattern_logits, false), range_of("output", output, true)};
  if (corners) memory.push_back(range_of("corners", *corners, false));
  Traffic traffic;
  return finish(cuda::dispatch_stamp_forward(
                    params, launcher("stamp_forward", memory, params, schedule, traffic)),
                traffic);
}

Traffic stamp_backward(const py::array& gradient, const py::array& images,
                       const py::array& mask_logits, const py::array& pattern_logits,
                       py::array& mask_logits_gradient, py::array& pattern_logits_gradient,
                       const std::vector<double>& mean, const std::vector<double>& std,
                       std::int64_t patch_size, const Schedule& schedule, const Corners& corners) {
  StampBackwardParams params{};
  set_sizes(images, mask_logits, patch_size, corners, params);
  params.normalization = normalization_of(mean, std);
  params.compute_dtype = dtype_of(mask_logits);
  params.image_dtype = dtype_of(images);
  params.gradient_dtype = dtype_of(gradient);
  params.gradient = gradient.data();
  params.images = images.data();
  params.mask_logits = mask_logits.data();
  params.pattern_logits = pattern_logits.data();
  params.mask_logits_gradient = mask_logits_gradient.mutable_data();
  params.pattern_logits_gradient = pattern_logits_gradient.mutable_data();
  std::vector<Range> memory = {range_of("gradient", gradient, false),
                               range_of("images", images, false),
                               range_of("mask_logits", mask_logits, false),
                               range_of("pattern_logits", pattern_logits, false),
                               range_of("mask_logits_gradient", mask_logits_gradient, true),
                               range_of("pattern_logits_gradient", pattern_logits_gradient, true)};
  if (corners) memory.push_back(range_of("corners", *corners, false));
  Traffic traffic;
  return finish(cuda::dispatch_stamp_backward(
                    params, launcher("stamp_backward", memory, params, schedule, traffic)),
                traffic);
}

DType dtype_named(const std::string& name) {
  if (name == "uint8") return DType::kUInt8;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  throw py::value_error("unknown dtype " + name);
}

// (blocks, threads, shared bytes) of a launch with aligned tensors. sizes: K, B, C, H, W, patch;
// box: nothing, or h and w of a crop whose boxes alone are stamped.
py::tuple launch_shape(bool backward, const std::vector<std::int64_t>& sizes,
                       const std::string& compute, const std::string& image,
                       const std::string& output, const std::vector<std::int64_t>& box) {
  static const std::int64_t corner[2] = {0, 0};  // never read
  const StampShape shape{sizes.at(0), sizes.at(1), sizes.at(2),
                         sizes.at(3), sizes.at(4), sizes.at(5)};
  const StampCrop crop = box.empty() ? StampCrop{} : StampCrop{box.at(0), box.at(1), corner};
  cuda::LaunchShape found{};
  const auto note = [&](auto, const cuda::LaunchShape& s) {
    found = s;
    return true;
  };
  if (backward) {
    StampBackwardParams params{};
    params.shape = shape;
    params.crop = crop;
    params.compute_dtype = dtype_named(compute);
    params.image_dtype = dtype_named(image);
    params.gradient_dtype = dtype_named(output);
    cuda::dispatch_stamp_backward(params, note);
  } else {
    StampForwardParams params{};
    params.shape = shape;
    params.crop = crop;
    params.compute_dtype = dtype_named(compute);
    params.image_dtype = dtype_named(image);
    params.output_dtype = dtype_named(output);
    params.only_box = true;
    cuda::dispatch_stamp_forward(params, note);
  }
  return py::make_tuple(found.blocks, found.threads, found.shared_bytes);
}

}  // namespace

void bind_stamp_triggers(py::module_& module) {
  module.def("stamp_forward", &stamp_forward, py::arg("images"), py::arg("mask_logits"),
             py::arg("pattern_logits"), py::arg("output"), py::arg("mean"), py::arg("std"),
             py::arg("patch_size"), py::arg("schedule"), py::arg("corners") = py::none(),
             py::arg("only_box") = false);
  module.def("stamp_backward", &stamp_backward, py::arg("gradient"), py::arg("images"),
             py::arg("mask_logits"), py::arg("pattern_logits"), py::arg("mask_logits_gradient"),
             py::arg("pattern_logits_gradient"), py::arg("mean"), py::arg("std"),
             py::arg("patch_size"), py::arg("schedule"), py::arg("corners") = py::none());
  module.def("stamp_launch_shape", &launch_shape, py::arg("backward"), py::arg("sizes"),
             py::arg("compute") = "float32", py::arg("image") = "uint8",
             py::arg("output") = "float32", py::arg("box") = std::vector<std::int64_t>{});
}

}  // namespace pydetox::emulator
