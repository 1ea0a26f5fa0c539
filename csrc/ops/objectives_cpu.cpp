#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cpu/objectives.h"
#include "csrc/ops/check.h"
#include "csrc/ops/objectives_arguments.h"

namespace pydetox::ops {
namespace {

// Elements of embeddings that are worth a thread of their own, and products of them with a head.
constexpr int64_t kGrainElements = 1 << 18, kGrainProducts = 1 << 21;

int64_t grain(const Embeddings& z) {
  const int64_t each = z.images * z.dim;
  return each > kGrainElements ? 1 : kGrainElements / (each > 0 ? each : 1) + 1;
}

Tensor embedding_collapse(const Tensor& z) {
  Collapse call(z);
  torch::stable::parallel_for(0, call.params.z.triggers, grain(call.params.z),
                              [&](int64_t begin, int64_t end) {
                                cpu::objective_kernels().collapse(call.params, begin, end);
                              });
  return call.cosine;
}

Tensor embedding_collapse_backward(const Tensor& gradient, const Tensor& z) {
  CollapseBackward call(gradient, z);
  torch::stable::parallel_for(0, call.params.z.triggers, grain(call.params.z),
                              [&](int64_t begin, int64_t end) {
                                cpu::objective_kernels().collapse_gradient(call.params, begin, end);
                              });
  return call.result;
}

template <class T>
void mean_of_rows(const ZeroShotParams& p) {
  const auto count = static_cast<double>(p.z.images);
  for (int64_t k = 0; k < p.z.triggers; ++k) {
    double loss = 0;
    int64_t hits = 0;
    for (int64_t row = k * p.z.images; row < (k + 1) * p.z.images; ++row) {
      loss += p.row_losses[row];
      hits += p.row_hits[row];
    }
    static_cast<T*>(p.loss)[k] = static_cast<T>(loss / count);
    static_cast<T*>(p.success)[k] = static_cast<T>(static_cast<double>(hits) / count);
  }
}

std::tuple<Tensor, Tensor, Tensor> zero_shot_loss(const Tensor& z, const Tensor& head,
                                                  const Tensor& targets, double logit_scale,
                                                  bool with_gradient) {
  ZeroShot call(z, head, targets, logit_scale, with_gradient);
  const auto& params = call.params;
  for (int64_t k = 0; k < params.z.triggers; ++k) {
    check(params.targets[k] >= 0 && params.targets[k] < params.classes,
          "zero_shot_loss: targets must be from 0 to ", params.classes - 1, ", not ",
          params.targets[k]);
  }
  const int64_t products = params.z.rows() * params.classes * params.z.dim;
  const bool alone = products < 2 * kGrainProducts;
  const auto tiling = cpu::row_tiling(params, alone ? 1 : torch::stable::get_num_threads());
  torch::stable::parallel_for(0, tiling.items, alone ? tiling.items + 1 : 1,
                              [&](int64_t begin, int64_t end) {
                                cpu::objective_kernels().zero_shot(params, tiling, begin, end);
                              });
  if (params.z.dtype == DType::kFloat64) {
    mean_of_rows<double>(params);
  } else {
    mean_of_rows<float>(params);
  }
  return {call.loss, call.success, call.gradient};
}

template <class T>
void scale(const ScaleParams& p) {
  const T* factors = static_cast<const T*>(p.factors);
  const T* from = static_cast<const T*>(p.from);
  T* to = static_cast<T*>(p.to);
  for (int64_t k = 0; k < p.triggers; ++k) {
    for (int64_t i = k * p.count; i < (k + 1) * p.count; ++i) to[i] = factors[k] * from[i];
  }
}

Tensor zero_shot_loss_backward(const Tensor& gradient, const Tensor& z,
                               const Tensor& embeddings_gradient) {
  ScaledTriggers call(gradient, z, embeddings_gradient);
  if (call.params.dtype == DType::kFloat64) {
    scale<double>(call.params);
  } else {
    scale<float>(call.params);
  }
  return call.result;
}

}  // namespace
}  // namespace pydetox::ops

STABLE_TORCH_LIBRARY_IMPL(pydetox, CPU, library) {
  library.impl("embedding_collapse", TORCH_BOX(&pydetox::ops::embedding_collapse));
  library.impl("embedding_collapse_backward",
               TORCH_BOX(&pydetox::ops::embedding_collapse_backward));
  library.impl("zero_shot_loss", TORCH_BOX(&pydetox::ops::zero_shot_loss));
  library.impl("zero_shot_loss_backward", TORCH_BOX(&pydetox::ops::zero_shot_loss_backward));
}
