#pragma once

// From tensors to the parameters of mix_tokens, its update and top_swaps, with every check that
// keeps a kernel from touching what is not there.

#include <cstdint>
#include <optional>

#include "csrc/common/check.h"
#include "csrc/mix_tokens/core.h"

namespace pydetox {

// What all of them take. Tensors that are not contiguous are copied, the table too.
struct TokenArguments {
  TokenArguments(const char* op, const Named& of_rows, const Tensor& table,
                 const std::optional<Tensor>& allowed);
  TokenTable params;
  Tensor table;
  std::optional<Tensor> allowed;
};

struct MixTokens {
  MixTokens(const Tensor& logits, const Tensor& table, const Tensor& temperature,
            const std::optional<Tensor>& allowed);
  MixParams params{};
  Tensor mixed, softmax;

 private:
  TokenArguments shared_;
  Tensor logits_, temperature_, sums_, largest_, totals_;
};

// What the gradient and the update take.
struct MixGradient {
  MixGradient(const char* op, const Tensor& gradient, const Tensor& mixed, const Tensor& softmax,
              const Tensor& logits, const Tensor& table, const Tensor& temperature,
              const std::optional<Tensor>& allowed);
  UpdateParams params{};

 protected:
  TokenArguments shared_;
  Tensor gradient_, mixed_, softmax_, temperature_, states_;
};

struct MixTokensBackward : MixGradient {
  MixTokensBackward(const Tensor& gradient, const Tensor& mixed, const Tensor& softmax,
                    const Tensor& logits, const Tensor& table, const Tensor& temperature,
                    const std::optional<Tensor>& allowed);
  Tensor result;

 private:
  Tensor logits_;
};

struct MixTokensUpdate : MixGradient {
  MixTokensUpdate(const Tensor& gradient, const Tensor& mixed, const Tensor& softmax,
                  const Tensor& logits, const Tensor& first, const Tensor& second,
                  const Tensor& table, const Tensor& temperature,
                  const std::optional<Tensor>& allowed, const Tensor& learning_rate,
                  const Tensor& steps, const Tensor& active, double beta1, double beta2,
                  double epsilon);

 private:
  Tensor learning_rate_, active_;
};

struct TopSwaps {
  TopSwaps(const Tensor& gradient, const Tensor& table, const Tensor& current,
           const std::optional<Tensor>& allowed, int64_t count);
  SwapParams params{};
  Tensor scores, tokens;

 private:
  TokenArguments shared_;
  Tensor gradient_, current_, offsets_, lists_, merged_;
};

}  // namespace pydetox
