#include <optional>
#include <tuple>

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cpu/stamp.h"
#include "csrc/ops/stamp_arguments.h"

namespace pydetox::ops {
namespace {

// A fresh large result is memory that the kernel has yet to hand over, 4 KiB at a time; writing it
// is then mostly page faults. With 2 MiB pages there are 512 times fewer. Only a hint: it may be
// ignored.
void prefer_huge_pages(const Tensor& fresh, DType dtype) {
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto data = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const auto bytes = static_cast<uintptr_t>(fresh.numel() * size_of(dtype));
  const auto begin = (data + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (data + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Over the items of a problem of this shape.
template <class Params>
void run(void (*kernel)(const Params&, const cpu::StampTiling&, int64_t, int64_t),
         const Params& params, const StampShape& shape) {
  const auto tiling =
      cpu::stamp_tiling(shape, params.compute_dtype, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, tiling.items(), 1, [&](int64_t begin, int64_t end) {
    kernel(params, tiling, begin, end);
  });
}

void run_forward(const StampForwardParams& params) {
  const auto& kernels = cpu::stamp_kernels();
  if (params.crop.corners == nullptr) return run(kernels.forward, params, params.shape);
  if (!params.only_box) run(kernels.clean, params, params.shape);
  run(kernels.forward_box, params, params.crop.box(params.shape));
}

void run_backward(const StampBackwardParams& params) {
  const auto& kernels = cpu::stamp_kernels();
  if (params.crop.corners == nullptr) return run(kernels.backward, params, params.shape);
  run(kernels.backward_box, params, params.crop.box(params.shape));
}

Tensor stamp_triggers(const Tensor& images, const Tensor& mask_logits, const Tensor& pattern_logits,
                      std::vector<double> mean, std::vector<double> std, int64_t patch_size,
                      ScalarType dtype, std::optional<Tensor> corners) {
  StampForward call({images, mask_logits, pattern_logits, mean, std, patch_size, corners}, dtype);
  prefer_huge_pages(call.output, call.params.output_dtype);
  run_forward(call.params);
  return call.output;
}

std::tuple<Tensor, Tensor> stamp_triggers_backward(const Tensor& gradient, const Tensor& images,
                                                   const Tensor& mask_logits,
                                                   const Tensor& pattern_logits,
                                                   std::vector<double> mean,
                                                   std::vector<double> std, int64_t patch_size,
                                                   std::optional<Tensor> corners) {
  StampBackward call(gradient,
                     {images, mask_logits, pattern_logits, mean, std, patch_size, corners});
  prefer_huge_pages(call.mask_logits_gradient, call.params.compute_dtype);
  prefer_huge_pages(call.pattern_logits_gradient, call.params.compute_dtype);
  run_backward(call.params);
  return {call.mask_logits_gradient, call.pattern_logits_gradient};
}

void stamp_triggers_out(const Tensor& images, const Tensor& mask_logits,
                        const Tensor& pattern_logits, std::vector<double> mean,
                        std::vector<double> std, int64_t patch_size, Tensor out,
                        std::optional<Tensor> corners, bool only_box) {
  StampForward call({images, mask_logits, pattern_logits, mean, std, patch_size, corners}, out,
                    only_box);
  run_forward(call.params);
}

void stamp_triggers_backward_out(const Tensor& gradient, const Tensor& images,
                                 const Tensor& mask_logits, const Tensor& pattern_logits,
                                 std::vector<double> mean, std::vector<double> std,
                                 int64_t patch_size, Tensor mask_logits_gradient,
                                 Tensor pattern_logits_gradient, std::optional<Tensor> corners) {
  StampBackward call(gradient,
                     {images, mask_logits, pattern_logits, mean, std, patch_size, corners},
                     mask_logits_gradient, pattern_logits_gradient);
  run_backward(call.params);
}

}  // namespace
}  // namespace pydetox::ops

STABLE_TORCH_LIBRARY_IMPL(pydetox, CPU, library) {
  library.impl("stamp_triggers", TORCH_BOX(&pydetox::ops::stamp_triggers));
  library.impl("stamp_triggers_backward", TORCH_BOX(&pydetox::ops::stamp_triggers_backward));
  library.impl("stamp_triggers_out", TORCH_BOX(&pydetox::ops::stamp_triggers_out));
  library.impl("stamp_triggers_backward_out",
               TORCH_BOX(&pydetox::ops::stamp_triggers_backward_out));
}
