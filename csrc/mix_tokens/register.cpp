#include "csrc/common/register.h"

#include "csrc/common/place.h"
#include "csrc/mix_tokens/arguments.h"

namespace pydetox {
namespace {

std::tuple<Tensor, Tensor> mix_tokens(const Tensor& logits, const Tensor& table,
                                      const Tensor& temperature, std::optional<Tensor> allowed) {
  const Place place(logits);
  MixTokens call(logits, table, temperature, allowed);
  place.run(run_mix_tokens, call.params, "mix_tokens");
  return {call.mixed, call.softmax};
}

Tensor mix_tokens_backward(const Tensor& gradient, const Tensor& mixed, const Tensor& softmax,
                           const Tensor& logits, const Tensor& table, const Tensor& temperature,
                           std::optional<Tensor> allowed) {
  const Place place(logits);
  MixTokensBackward call(gradient, mixed, softmax, logits, table, temperature, allowed);
  place.run(run_mix_tokens_update, call.params, "mix_tokens_backward");
  return call.result;
}

void mix_tokens_update(const Tensor& gradient, const Tensor& mixed, const Tensor& softmax,
                       Tensor logits, Tensor first, Tensor second, const Tensor& table,
                       const Tensor& temperature, std::optional<Tensor> allowed,
                       const Tensor& learning_rate, Tensor steps, const Tensor& active,
                       double beta1, double beta2, double epsilon) {
  const Place place(logits);
  MixTokensUpdate call(gradient, mixed, softmax, logits, first, second, table, temperature, allowed,
                       learning_rate, steps, active, beta1, beta2, epsilon);
  place.run(run_mix_tokens_update, call.params, "mix_tokens_update");
}

std::tuple<Tensor, Tensor> top_swaps(const Tensor& gradient, const Tensor& table,
                                     const Tensor& current, std::optional<Tensor> allowed,
                                     int64_t k) {
  const Place place(gradient);
  TopSwaps call(gradient, table, current, allowed, k);
  // A look at a GPU's memory would wait for it: there all scores of the row are NaN.
  for (int64_t r = 0; !kRunsCuda && r < call.params.rows; ++r) {
    const int64_t found = call.params.current[r];
    check(found >= 0 && found < call.params.table.tokens, "top_swaps: current must be from 0 to ",
          call.params.table.tokens - 1, ", found ", found);
  }
  place.run(run_top_swaps, call.params, "top_swaps");
  return {call.scores, call.tokens};
}

}  // namespace
}  // namespace pydetox

PYDETOX_SCHEMAS(library) {
  // logits [R,V], table [V,D], temperature [R], allowed bool [V] -> the mixed embeddings [R,D], and
  // [R,2]: the largest allowed logit of each row, 1 / the sum of its weights.
  library.def(
      "mix_tokens(Tensor logits, Tensor table, Tensor temperature, Tensor? allowed) "
      "-> (Tensor, Tensor)");
  // gradient [R,D] of the mixed embeddings; the two results of mix_tokens. -> of the logits [R,V]
  library.def(
      "mix_tokens_backward(Tensor gradient, Tensor mixed, Tensor softmax, Tensor logits, "
      "Tensor table, Tensor temperature, Tensor? allowed) -> Tensor");
  // The step of Adam along it, in place, without the gradient: logits, moments [R,V] and steps [R]
  // where active [R].
  library.def(
      "mix_tokens_update(Tensor gradient, Tensor mixed, Tensor softmax, Tensor(a!) logits, "
      "Tensor(b!) first, Tensor(c!) second, Tensor table, Tensor temperature, Tensor? allowed, "
      "Tensor learning_rate, Tensor(d!) steps, Tensor active, float beta1, float beta2, "
      "float epsilon) -> ()");
  // gradient [R,D], current int64 [R] -> the k smallest gradient . (e - e_current), and their
  // tokens
  library.def(
      "top_swaps(Tensor gradient, Tensor table, Tensor current, Tensor? allowed, int k) "
      "-> (Tensor, Tensor)");
}

PYDETOX_KERNELS(library) {
  using namespace pydetox;
  library.impl("mix_tokens", TORCH_BOX(&mix_tokens));
  library.impl("mix_tokens_backward", TORCH_BOX(&mix_tokens_backward));
  library.impl("mix_tokens_update", TORCH_BOX(&mix_tokens_update));
  library.impl("top_swaps", TORCH_BOX(&top_swaps));
}
