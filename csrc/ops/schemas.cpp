// Every operator of pydetox, by schema. Kernels are registered by <op>_cpu.cpp (library _C) and
// <op>_cuda.cpp (library _C_cuda), fake and autograd kernels in Python (pydetox/ops).

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pydetox, library) {
  // images [B,C,H,W], or [K,B,C,H,W] where every trigger has its own; mask_logits [K,H,W];
  // pattern_logits [K,C,H,W]; mean, std: C numbers each; patch_size 0: [K,B,C,H,W];
  // P: [K,B,(H/P)(W/P),C*P*P]. With corners, int64 [K,2] on the device of the images, the logits
  // are those of a box of h x w pixels, whose top left pixel the corners name: [K,h,w] and
  // [K,C,h,w].
  library.def(
      "stamp_triggers(Tensor images, Tensor mask_logits, Tensor pattern_logits, float[] mean, "
      "float[] std, int patch_size, ScalarType dtype, Tensor? corners=None) -> Tensor");
  // -> gradients of mask_logits and pattern_logits.
  library.def(
      "stamp_triggers_backward(Tensor gradient, Tensor images, Tensor mask_logits, "
      "Tensor pattern_logits, float[] mean, float[] std, int patch_size, Tensor? corners=None) "
      "-> (Tensor, Tensor)");
  // The same two into memory of the caller; no autograd. only_box: out is right outside of the
  // boxes.
  library.def(
      "stamp_triggers_out(Tensor images, Tensor mask_logits, Tensor pattern_logits, float[] mean, "
      "float[] std, int patch_size, Tensor(a!) out, Tensor? corners=None, bool only_box=False) "
      "-> ()");
  library.def(
      "stamp_triggers_backward_out(Tensor gradient, Tensor images, Tensor mask_logits, "
      "Tensor pattern_logits, float[] mean, float[] std, int patch_size, "
      "Tensor(a!) mask_logits_gradient, Tensor(b!) pattern_logits_gradient, "
      "Tensor? corners=None) -> ()");

  // Lists of tensors as state dicts hold them. models, directions, vectors, out: `count` lists one
  // after the other, each like base. -> float64 [count, count]
  // start, here and below: a result to add to, before anything else (CPU). What comes in parts, cut
  // at multiples of kChunk elements, thus gives the bits of one call.
  library.def(
      "weight_diff_gram(Tensor[] base, Tensor[] models, int count, Tensor? start=None) -> Tensor");
  // -> float64 [count]
  library.def(
      "weight_diff_project(Tensor[] base, Tensor[] model, Tensor[] directions, int count, "
      "Tensor? start=None) -> Tensor");
  // keys: one for each tensor, of seed and name. first_blocks: where in it each begins, in blocks
  // of `size` elements; parts are cut at multiples of 64 blocks (CPU). -> float64 [size]
  library.def(
      "weight_diff_sketch(Tensor[] base, Tensor[] model, int[] keys, int size, "
      "int[]? first_blocks=None, Tensor? start=None) -> Tensor");
  // Tensors [m, ...] as matrices [m, n]; factors: float64 [n, width], left: [m, width], each of a
  // width of its own. -> float64 [m, width], left: [width, n]
  library.def(
      "weight_diff_matmul(Tensor[] base, Tensor[] model, Tensor[] factors, bool left) -> Tensor[]");
  // coefficients: float64 [M, R] or [M, R, tensors]; vectors: R lists; out: M lists.
  library.def(
      "apply_task_vectors(Tensor[] base, Tensor[] vectors, Tensor coefficients, "
      "Tensor(a!)[] out) -> ()");

  // One step of Adam for K triggers, in place: logits, moments, steps where active; the best where
  // eligible and smaller. -> float64 [K], |mask|_1 before the step
  library.def(
      "trigger_update(Tensor(a!) mask_logits, Tensor(b!) pattern_logits, Tensor mask_gradient, "
      "Tensor pattern_gradient, Tensor(c!) mask_first, Tensor(d!) pattern_first, "
      "Tensor(e!) mask_second, Tensor(f!) pattern_second, Tensor cost, Tensor learning_rate, "
      "Tensor? total_variation, Tensor(g!) steps, Tensor active, Tensor(h!)? best_mask, "
      "Tensor(i!)? best_pattern, Tensor(j!)? best_norm, Tensor? eligible, float beta1, "
      "float beta2, float epsilon) -> Tensor");

  // z [K,B,D] -> [K]
  library.def("embedding_collapse(Tensor z) -> Tensor");
  library.def("embedding_collapse_backward(Tensor gradient, Tensor z) -> Tensor");
  // head [C,D], targets int64 [K] -> loss [K], success [K], and with_gradient that of loss[k] by
  // z[k], [K,B,D]; else [0].
  library.def(
      "zero_shot_loss(Tensor z, Tensor head, Tensor targets, float logit_scale, "
      "bool with_gradient) -> (Tensor, Tensor, Tensor)");
  // gradient [K] of loss; z only says what the result depends on. -> gradient of z
  library.def(
      "zero_shot_loss_backward(Tensor gradient, Tensor z, Tensor embeddings_gradient) -> Tensor");
}
