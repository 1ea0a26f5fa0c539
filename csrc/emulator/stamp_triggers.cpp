// The kernels of csrc/cuda/stamp_triggers.cuh, launched as csrc/cuda/stamp_triggers.cu does.

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

StampShape shape_of(const py::array& images, const py::array& mask_logits, std::int64_t patch) {
  return {mask_logits.shape(0), images.shape(0), images.shape(1),
          images.shape(2),      images.shape(3), patch};
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
                      std::int64_t patch_size, const Schedule& schedule) {
  StampForwardParams params{};
  params.shape = shape_of(images, mask_logits, patch_size);
  params.normalization = normalization_of(mean, std);
  params.compute_dtype = dtype_of(mask_logits);
  params.image_dtype = dtype_of(images);
  params.output_dtype = dtype_of(output);
  params.images = images.data();
  params.mask_logits = mask_logits.data();
  params.pattern_logits = pattern_logits.data();
  params.output = output.mutable_data();
  std::vector<Range> memory = {
      range_of("images", images, false), range_of("mask_logits", mask_logits, false),
      range_of("pattern_logits", pattern_logits, false), range_of("output", output, true)};
  Traffic traffic;
  return finish(cuda::dispatch_stamp_forward(
                    params, launcher("stamp_forward", memory, params, schedule, traffic)),
                traffic);
}

Traffic stamp_backward(const py::array& gradient, const py::array& images,
                       const py::array& mask_logits, const py::array& pattern_logits,
                       py::array& mask_logits_gradient, py::array& pattern_logits_gradient,
                       const std::vector<double>& mean, const std::vector<double>& std,
                       std::int64_t patch_size, const Schedule& schedule) {
  StampBackwardParams params{};
  params.shape = shape_of(images, mask_logits, patch_size);
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

// (blocks, threads, shared bytes) of a launch with aligned tensors. sizes: K, B, C, H, W, patch.
py::tuple launch_shape(bool backward, const std::vector<std::int64_t>& sizes,
                       const std::string& compute, const std::string& image,
                       const std::string& output) {
  const StampShape shape{sizes.at(0), sizes.at(1), sizes.at(2),
                         sizes.at(3), sizes.at(4), sizes.at(5)};
  cuda::LaunchShape found{};
  const auto note = [&](auto, const cuda::LaunchShape& s) {
    found = s;
    return true;
  };
  if (backward) {
    StampBackwardParams params{};
    params.shape = shape;
    params.compute_dtype = dtype_named(compute);
    params.image_dtype = dtype_named(image);
    params.gradient_dtype = dtype_named(output);
    cuda::dispatch_stamp_backward(params, note);
  } else {
    StampForwardParams params{};
    params.shape = shape;
    params.compute_dtype = dtype_named(compute);
    params.image_dtype = dtype_named(image);
    params.output_dtype = dtype_named(output);
    cuda::dispatch_stamp_forward(params, note);
  }
  return py::make_tuple(found.blocks, found.threads, found.shared_bytes);
}

}  // namespace

void bind_stamp_triggers(py::module_& module) {
  module.def("stamp_forward", &stamp_forward, py::arg("images"), py::arg("mask_logits"),
             py::arg("pattern_logits"), py::arg("output"), py::arg("mean"), py::arg("std"),
             py::arg("patch_size"), py::arg("schedule"));
  module.def("stamp_backward", &stamp_backward, py::arg("gradient"), py::arg("images"),
             py::arg("mask_logits"), py::arg("pattern_logits"), py::arg("mask_logits_gradient"),
             py::arg("pattern_logits_gradient"), py::arg("mean"), py::arg("std"),
             py::arg("patch_size"), py::arg("schedule"));
  module.def("stamp_launch_shape", &launch_shape, py::arg("backward"), py::arg("sizes"),
             py::arg("compute") = "float32", py::arg("image") = "uint8",
             py::arg("output") = "float32");
}

}  // namespace pydetox::emulator
