// Every operator of pydetox, by schema. Kernels are registered by <op>_cpu.cpp (library _C) and
// <op>_cuda.cpp (library _C_cuda), fake and autograd kernels in Python (pydetox/ops).

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pydetox, library) {
  // images [B,C,H,W]; mask_logits [K,H,W]; pattern_logits [K,C,H,W]; mean, std: C numbers each;
  // patch_size 0: [K,B,C,H,W]; P: [K,B,(H/P)(W/P),C*P*P].
  library.def(
      "stamp_triggers(Tensor images, Tensor mask_logits, Tensor pattern_logits, float[] mean, "
      "float[] std, int patch_size, ScalarType dtype) -> Tensor");
  // -> gradients of mask_logits and pattern_logits.
  library.def(
      "stamp_triggers_backward(Tensor gradient, Tensor images, Tensor mask_logits, "
      "Tensor pattern_logits, float[] mean, float[] std, int patch_size) -> (Tensor, Tensor)");
  // The same two into memory of the caller; no autograd.
  library.def(
      "stamp_triggers_out(Tensor images, Tensor mask_logits, Tensor pattern_logits, float[] mean, "
      "float[] std, int patch_size, Tensor(a!) out) -> ()");
  library.def(
      "stamp_triggers_backward_out(Tensor gradient, Tensor images, Tensor mask_logits, "
      "Tensor pattern_logits, float[] mean, float[] std, int patch_size, "
      "Tensor(a!) mask_logits_gradient, Tensor(b!) pattern_logits_gradient) -> ()");
}
