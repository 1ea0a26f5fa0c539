#include "csrc/mix_tokens/arguments.h"

#include <algorithm>
#include <vector>

#include "csrc/common/tensors.h"

namespace pydetox {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

// One number for each row, of the logits' dtype.
void check_rows(const char* op, const Named& t, const Named& like) {
  check(t.tensor.scalar_type() == like.tensor.scalar_type() &&
            has_sizes(t.tensor, {like.tensor.size(0)}),
        op, ": ", t.name, " must be ", dtype_name(like.tensor), " [", like.tensor.size(0),
        "], one for each row, found ", dtype_name(t.tensor), " ", ShapeOf{t.tensor});
  check_device(op, t.name, t.tensor, like.name, like.tensor);
}

void check_like(const char* op, const Named& t, const Named& like,
                const std::vector<int64_t>& sizes) {
  check(t.tensor.scalar_type() == like.tensor.scalar_type() && has_sizes(t.tensor, sizes), op, ": ",
        t.name, " must be ", dtype_name(like.tensor), " ", SizesOf{sizes}, " for ", like.name, " ",
        ShapeOf{like.tensor}, ", found ", dtype_name(t.tensor), " ", ShapeOf{t.tensor});
  check_device(op, t.name, t.tensor, like.name, like.tensor);
}

void check_logits(const char* op, const Tensor& logits, const Tensor& table) {
  check(logits.dim() == 2 && logits.size(1) == table.size(0), op, ": logits must be [R, ",
        table.size(0), "] for table ", ShapeOf{table}, ", found ", ShapeOf{logits});
}

}  // namespace

TokenArguments::TokenArguments(const char* op, const Named& of_rows, const Tensor& given,
                               const std::optional<Tensor>& mask)
    : params{}, table(contiguous(given)), allowed(mask) {
  const auto type = of_rows.tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, op, ": ", of_rows.name,
        " must be float32 or float64, found ", name_of(type));
  check(given.dim() == 2 && given.size(0) > 0 && given.size(1) > 0, op,
        ": table must be [V, d] with at least one token and one dimension, found ", ShapeOf{given});
  const auto stored = given.scalar_type();
  check(stored == type || (stored == ScalarType::BFloat16 && type == ScalarType::Float), op,
        ": table must be ", type == ScalarType::Float ? "float32 or bfloat16" : "float64", " for ",
        of_rows.name, " of ", name_of(type), ", found ", name_of(stored));
  check_device(op, "table", given, of_rows.name, of_rows.tensor);
  params.dtype = dtype_of(given);
  params.tokens = given.size(0);
  params.dim = given.size(1);
  params.data = read(table);
  if (mask.has_value()) {
    check(mask->scalar_type() == ScalarType::Bool && has_sizes(*mask, {params.tokens}), op,
          ": allowed must be bool [", params.tokens, "], one for each token of table, found ",
          dtype_name(*mask), " ", ShapeOf{*mask});
    check_device(op, "allowed", *mask, of_rows.name, of_rows.tensor);
    allowed = contiguous(*mask);
    params.allowed = read<uint8_t>(*allowed);
  }
}

MixTokens::MixTokens(const Tensor& logits, const Tensor& table, const Tensor& temperature,
                     const std::optional<Tensor>& allowed)
    : mixed(logits),
      softmax(logits),
      shared_("mix_tokens", {"logits", logits}, table, allowed),
      logits_(contiguous(logits)),
      temperature_(contiguous(temperature)),
      sums_(logits),
      largest_(logits),
      totals_(logits) {
  check_logits("mix_tokens", logits, table);
  check_rows("mix_tokens", {"temperature", temperature}, {"logits", logits});
  const TokenTable& t = params.table = shared_.params;
  params.dtype = dtype_of(logits);
  params.rows = logits.size(0);
  params.logits = read(logits_);
  params.temperature = read(temperature_);
  mixed = new_empty(logits, {params.rows, t.dim});
  params.mixed = written(mixed);
  softmax = new_empty(logits, {params.rows, 2});
  params.softmax = written(softmax);
  sums_ = new_empty(logits, {t.parts(), kTokenRows, t.stride()});
  params.sums = written(sums_);
  largest_ = new_empty(logits, {t.parts(), kTokenRows});
  params.largest = written(largest_);
  totals_ = new_empty(logits, {t.parts(), kTokenRows});
  params.totals = written(totals_);
}

MixGradient::MixGradient(const char* op, const Tensor& gradient, const Tensor& mixed,
                         const Tensor& softmax, const Tensor& logits, const Tensor& table,
                         const Tensor& temperature, const std::optional<Tensor>& allowed)
    : shared_(op, {"logits", logits}, table, allowed),
      gradient_(contiguous(gradient)),
      mixed_(contiguous(mixed)),
      softmax_(contiguous(softmax)),
      temperature_(contiguous(temperature)),
      states_(logits) {
  check_logits(op, logits, table);
  const Named like{"logits", logits};
  const int64_t rows = logits.size(0);
  check_like(op, {"gradient", gradient}, like, {rows, table.size(1)});
  check_like(op, {"mixed", mixed}, like, {rows, table.size(1)});
  check_like(op, {"softmax", softmax}, like, {rows, 2});
  check_rows(op, {"temperature", temperature}, like);
  params.table = shared_.params;
  params.dtype = dtype_of(logits);
  params.rows = rows;
  params.upstream = read(gradient_);
  params.mixed = read(mixed_);
  params.softmax = read(softmax_);
  params.temperature = read(temperature_);
  static_assert(sizeof(RowState<float>) % sizeof(float) == 0);
  constexpr auto kNumbers = static_cast<int64_t>(sizeof(RowState<float>) / sizeof(float));
  static_assert(sizeof(RowState<double>) == kNumbers * sizeof(double));
  states_ = new_empty(logits, {rows, kNumbers});
  params.states = written(states_);
}

MixTokensBackward::MixTokensBackward(const Tensor& gradient, const Tensor& mixed,
                                     const Tensor& softmax, const Tensor& logits,
                                     const Tensor& table, const Tensor& temperature,
                                     const std::optional<Tensor>& allowed)
    : MixGradient("mix_tokens_backward", gradient, mixed, softmax, logits, table, temperature,
                  allowed),
      result(new_empty(logits, {params.rows, params.table.tokens})),
      logits_(contiguous(logits)) {
  params.logits = read(logits_);
  params.gradient = written(result);
}

MixTokensUpdate::MixTokensUpdate(const Tensor& gradient, const Tensor& mixed, const Tensor& softmax,
                                 const Tensor& logits, const Tensor& first, const Tensor& second,
                                 const Tensor& table, const Tensor& temperature,
                                 const std::optional<Tensor>& allowed, const Tensor& learning_rate,
                                 const Tensor& steps, const Tensor& active, double beta1,
                                 double beta2, double epsilon)
    : MixGradient("mix_tokens_update", gradient, mixed, softmax, logits, table, temperature,
                  allowed),
      learning_rate_(contiguous(learning_rate)),
      active_(contiguous(active)) {
  constexpr const char* kOp = "mix_tokens_update";
  const Named like{"logits", logits};
  const int64_t rows = params.rows;
  const auto sizes = sizes_of(logits);
  check_like(kOp, {"first", first}, like, sizes);
  check_like(kOp, {"second", second}, like, sizes);
  const auto rate = learning_rate.scalar_type();
  check(
      (rate == ScalarType::Float || rate == ScalarType::Double) && has_sizes(learning_rate, {rows}),
      kOp, ": learning_rate must be float32 or float64 [", rows, "], one for each row, found ",
      name_of(rate), " ", ShapeOf{learning_rate});
  check(steps.scalar_type() == ScalarType::Long && has_sizes(steps, {rows}), kOp,
        ": steps must be int64 [", rows, "], one for each row, found ", dtype_name(steps), " ",
        ShapeOf{steps});
  check(active.scalar_type() == ScalarType::Bool && has_sizes(active, {rows}), kOp,
        ": active must be bool [", rows, "], one for each row, found ", dtype_name(active), " ",
        ShapeOf{active});
  check(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, kOp,
        ": betas must be in [0, 1), found ", beta1, " and ", beta2);
  check(epsilon >= 0, kOp, ": epsilon must not be negative, found ", epsilon);
  const std::vector<Named> changed = {like, {"first", first}, {"second", second}, {"steps", steps}};
  std::vector<Named> all = changed;
  all.insert(all.end(), {{"gradient", gradient},
                         {"mixed", mixed},
                         {"softmax", softmax},
                         {"table", table},
                         {"temperature", temperature},
                         {"learning_rate", learning_rate},
                         {"active", active}});
  if (allowed.has_value()) all.push_back({"allowed", *allowed});
  for (const auto& one : all) check_device(kOp, one.name, one.tensor, "logits", logits);
  for (size_t i = 0; i < changed.size(); ++i) {
    check(changed[i].tensor.is_contiguous(), kOp, ": ", changed[i].name, " must be contiguous");
    for (size_t j = 0; j < all.size(); ++j) {
      if (i != j) check_apart(kOp, changed[i], all[j]);
    }
  }
  params.moved = written(logits);
  params.logits = params.moved;
  params.first = written(first);
  params.second = written(second);
  params.learning_rate = read(learning_rate_);
  params.rate_dtype = dtype_of(learning_rate_);
  params.steps = written<int64_t>(steps);
  params.active = read<uint8_t>(active_);
  params.beta1 = beta1;
  params.beta2 = beta2;
  params.epsilon = epsilon;
}

TopSwaps::TopSwaps(const Tensor& gradient, const Tensor& table, const Tensor& current,
                   const std::optional<Tensor>& allowed, int64_t count)
    : scores(gradient),
      tokens(gradient),
      shared_("top_swaps", {"gradient", gradient}, table, allowed),
      gradient_(contiguous(gradient)),
      current_(contiguous(current)),
      offsets_(gradient),
      lists_(gradient),
      merged_(gradient) {
  constexpr const char* kOp = "top_swaps";
  check(gradient.dim() == 2 && gradient.size(1) == table.size(1), kOp, ": gradient must be [R, ",
        table.size(1), "] for table ", ShapeOf{table}, ", found ", ShapeOf{gradient});
  const int64_t rows = gradient.size(0);
  check(current.scalar_type() == ScalarType::Long && has_sizes(current, {rows}), kOp,
        ": current must be int64 [", rows, "], one for each row, found ", dtype_name(current), " ",
        ShapeOf{current});
  check_device(kOp, "current", current, "gradient", gradient);
  const int64_t most = std::min(kMostSwaps, table.size(0));
  check(count >= 1 && count <= most, kOp, ": k must be from 1 to ", most, " for table ",
        ShapeOf{table}, ", found ", count);
  params.table = shared_.params;
  params.dtype = dtype_of(gradient);
  params.rows = rows;
  params.count = count;
  params.upstream = read(gradient_);
  params.current = read<int64_t>(current_);
  scores = new_empty(gradient, {rows, count});
  params.scores = written(scores);
  tokens = new_empty(gradient, {rows, count}, ScalarType::Long);
  params.tokens = written<int64_t>(tokens);
  offsets_ = new_empty(gradient, {rows});
  params.offsets = written(offsets_);
  params.slices = swap_slices(params.table, rows, count);
  static_assert(sizeof(Swap) == 2 * sizeof(int64_t));
  const std::vector<int64_t> lists = {rows, params.slices, count, 2};
  lists_ = new_empty(gradient, lists, ScalarType::Long);
  params.lists = written<Swap>(lists_);
  merged_ = new_empty(gradient, lists, ScalarType::Long);
  params.merged = written<Swap>(merged_);
}

}  // namespace pydetox
