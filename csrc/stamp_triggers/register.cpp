#include "csrc/common/register.h"

#include <sys/mman.h>

#include "csrc/common/place.h"
#include "csrc/common/tensors.h"
#include "csrc/stamp_triggers/arguments.h"

namespace pydetox {
namespace {

using Numbers = std::vector<double>;

// A fresh large result is memory that the system has yet to hand over, 4 KiB at a time; writing it
// is then mostly page faults. With 2 MiB pages there are 512 times fewer. Only a hint: it may be
// ignored.
void prefer_huge_pages(const Tensor& fresh) {
  if (kRunsCuda) return;
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto data = reinterpret_cast<uintptr_t>(fresh.const_data_ptr());
  const auto bytes = static_cast<uintptr_t>(fresh.numel()) * fresh.element_size();
  const auto begin = (data + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (data + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

Tensor stamp_triggers(const Tensor& images, const Tensor& mask_logits, const Tensor& pattern_logits,
                      Numbers mean, Numbers std, std::optional<int64_t> patch_size,
                      ScalarType dtype, std::optional<Tensor> corners) {
  const Place place(images);
  StampForward call({images, mask_logits, pattern_logits, mean, std, patch_size, corners}, dtype);
  prefer_huge_pages(call.output);
  place.run(run_stamp_forward, call.params, "stamp_triggers");
  return call.output;
}

std::tuple<Tensor, Tensor> stamp_triggers_backward(const Tensor& gradient, const Tensor& images,
                                                   const Tensor& mask_logits,
                                                   const Tensor& pattern_logits, Numbers mean,
                                                   Numbers std, std::optional<int64_t> patch_size,
                                                   std::optional<Tensor> corners) {
  const Place place(images);
  StampBackward call(gradient,
                     {images, mask_logits, pattern_logits, mean, std, patch_size, corners});
  prefer_huge_pages(call.mask_logits_gradient);
  prefer_huge_pages(call.pattern_logits_gradient);
  place.run(run_stamp_backward, call.params, "stamp_triggers_backward");
  return {call.mask_logits_gradient, call.pattern_logits_gradient};
}

void stamp_triggers_out(const Tensor& images, const Tensor& mask_logits,
                        const Tensor& pattern_logits, Numbers mean, Numbers std,
                        std::optional<int64_t> patch_size, Tensor out,
                        std::optional<Tensor> corners, bool only_box) {
  const Place place(images);
  StampForward call({images, mask_logits, pattern_logits, mean, std, patch_size, corners}, out,
                    only_box);
  place.run(run_stamp_forward, call.params, "stamp_triggers");
}

void stamp_triggers_backward_out(const Tensor& gradient, const Tensor& images,
                                 const Tensor& mask_logits, const Tensor& pattern_logits,
                                 Numbers mean, Numbers std, std::optional<int64_t> patch_size,
                                 Tensor mask_logits_gradient, Tensor pattern_logits_gradient,
                                 std::optional<Tensor> corners) {
  const Place place(images);
  StampBackward call(gradient,
                     {images, mask_logits, pattern_logits, mean, std, patch_size, corners},
                     mask_logits_gradient, pattern_logits_gradient);
  place.run(run_stamp_backward, call.params, "stamp_triggers_backward");
}

}  // namespace
}  // namespace pydetox

PYDETOX_SCHEMAS(library) {
  // images [B,C,H,W], or [K,B,C,H,W] where every trigger has its own; mask_logits [K,H,W];
  // pattern_logits [K,C,H,W]; mean, std: C numbers each; without patch_size: [K,B,C,H,W];
  // P: [K,B,(H/P)(W/P),C*P*P]. With corners, int64 [K,2] on the CPU or on the device of the images,
  // the logits are those of a box of h x w pixels, whose top left pixel the corners name: [K,h,w]
  // and [K,C,h,w].
  library.def(
      "stamp_triggers(Tensor images, Tensor mask_logits, Tensor pattern_logits, float[] mean, "
      "float[] std, int? patch_size, ScalarType dtype, Tensor? corners=None) -> Tensor");
  // -> gradients of mask_logits and pattern_logits.
  library.def(
      "stamp_triggers_backward(Tensor gradient, Tensor images, Tensor mask_logits, "
      "Tensor pattern_logits, float[] mean, float[] std, int? patch_size, Tensor? corners=None) "
      "-> (Tensor, Tensor)");
  // The same two into memory of the caller; no autograd. only_box: out is right outside of the
  // boxes.
  library.def(
      "stamp_triggers_out(Tensor images, Tensor mask_logits, Tensor pattern_logits, float[] mean, "
      "float[] std, int? patch_size, Tensor(a!) out, Tensor? corners=None, bool only_box=False) "
      "-> ()");
  library.def(
      "stamp_triggers_backward_out(Tensor gradient, Tensor images, Tensor mask_logits, "
      "Tensor pattern_logits, float[] mean, float[] std, int? patch_size, "
      "Tensor(a!) mask_logits_gradient, Tensor(b!) pattern_logits_gradient, "
      "Tensor? corners=None) -> ()");
}

PYDETOX_KERNELS(library) {
  using namespace pydetox;
  library.impl("stamp_triggers", TORCH_BOX(&stamp_triggers));
  library.impl("stamp_triggers_backward", TORCH_BOX(&stamp_triggers_backward));
  library.impl("stamp_triggers_out", TORCH_BOX(&stamp_triggers_out));
  library.impl("stamp_triggers_backward_out", TORCH_BOX(&stamp_triggers_backward_out));
}
