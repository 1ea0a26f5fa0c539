#pragma once

// Searches for tokens over a frozen embedding table: what every implementation (CPU, CUDA,
// emulator) agrees on. No torch, no CUDA header.
//
//   mix      out[r] = sum over v of p[r,v] e[v],  p = softmax of logits / temperature over the
//            allowed tokens
//   gradient of logits[r,v]: p[r,v] (g[r] e[v] - g[r] out[r]) / temperature
//   swaps    score[r,v] = g[r] e[v] - g[r] e[current[r]]; the k smallest of each row, equal scores
//            by the smaller token
//
// Nothing of the size rows x tokens is stored but logits, their gradient and Adam's moments. The
// probabilities of a tile are made from the logits where they are needed.
//
// Arithmetic is in T, the logits' type; the table is T, or bfloat16 where T is float. The orders:
//   products     g[r] e[v]: runs of kTokenRun dimensions, each from zero by fused multiply-adds in
//                order; the runs' sums are added in order.
//   mixing       The tokens are cut into parts (part_tokens), each with its own largest logit. A
//                part is cut into runs of kTokenRun tokens: their weights' products with the table
//                are added up like the above, their weights by halving (weights of tokens that are
//                not allowed or not there are 0), and the runs' sums in order. The parts are added
//                in order, each times the weight of its largest logit.
//   g[r] out[r]  in double, kTokenRowParts interleaved parts, by halving.
// So every thread count, instruction set and grid gives the same bits, and a row's result does not
// depend on the other rows.

#include <cmath>
#include <cstdint>

#include "csrc/common/dtype.h"
#include "csrc/common/macros.h"
#include "csrc/common/sigmoid.h"
#include "csrc/trigger_update/core.h"

namespace pydetox {

constexpr int kTokenRun = 64;
constexpr int kTokenRowParts = 32;
// Rows whose parts exist at the same time.
constexpr int64_t kTokenRows = 128;
// Columns of a part's sums are padded to whole vectors.
constexpr int64_t kTokenColumns = 16;
constexpr int64_t kMostSwaps = 256;

PYDETOX_HD constexpr int64_t token_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Tokens of a part, a multiple of kTokenRun: at most 64 parts.
PYDETOX_HD constexpr int64_t part_tokens(int64_t tokens) {
  const int64_t even = token_ceil(token_ceil(tokens, 64), kTokenRun) * kTokenRun;
  return even < 4 * kTokenRun ? 4 * kTokenRun : even;
}

// The embedding table e: [V, D], row by row.
struct TokenTable {
  DType dtype;     // T, or kBFloat16 where T is float
  int64_t tokens;  // V
  int64_t dim;     // D
  const void* data;
  const uint8_t* allowed;  // [V]; null: all

  PYDETOX_HD int64_t parts() const { return token_ceil(tokens, part_tokens(tokens)); }
  PYDETOX_HD int64_t runs() const { return token_ceil(tokens, kTokenRun); }
  PYDETOX_HD int64_t stride() const { return token_ceil(dim, kTokenColumns) * kTokenColumns; }
};

struct MixParams {
  DType dtype;  // T: kFloat32 or kFloat64
  TokenTable table;
  int64_t rows;             // R
  const void* logits;       // T [R, V]
  const void* temperature;  // T [R]
  void* mixed;              // T [R, D]
  void* softmax;            // T [R, 2]: the largest allowed logit, 1 / the sum of the weights
  // Workspace for up to kTokenRows rows, from first_row on.
  int64_t first_row;
  void* sums;     // T [parts, kTokenRows, stride]
  void* largest;  // T [parts, kTokenRows]
  void* totals;   // T [parts, kTokenRows]

  PYDETOX_HD int64_t block_rows() const {
    const int64_t left = rows - first_row;
    return left < kTokenRows ? left : kTokenRows;
  }
};

// What the gradient of a row needs beside its logits.
template <class T>
struct RowState {
  T largest, inverse_temperature;
  T scale;    // 1 / (the sum of the weights * temperature)
  T product;  // g out
  T moves;    // 0: not active
  AdamFactors<T> adam;
};

struct UpdateParams {
  DType dtype;
  TokenTable table;
  int64_t rows;
  const void* upstream;     // T [R, D]
  const void* mixed;        // T [R, D]
  const void* softmax;      // T [R, 2]
  const void* temperature;  // T [R]
  const void* logits;       // T [R, V]
  void* gradient;           // T [R, V]; null: the step is taken
  // Of the step; `moved` are the logits.
  void *moved, *first, *second;  // T [R, V]
  const void* learning_rate;     // float32 or float64 [R]
  DType rate_dtype;
  int64_t* steps;         // [R]
  const uint8_t* active;  // [R]
  double beta1, beta2, epsilon;
  void* states;  // RowState<T> [R]
};

// A candidate: smaller is better.
struct Swap {
  uint64_t score;  // ordered_bits
  int64_t token;
};

struct SwapParams {
  DType dtype;
  TokenTable table;
  int64_t rows;
  const void* upstream;    // T [R, D]
  const int64_t* current;  // [R]
  int64_t count;           // k
  void* scores;            // T [R, k]
  int64_t* tokens;         // [R, k]
  // Workspace of CUDA.
  void* offsets;   // T [R]: g[r] e[current[r]]
  int64_t slices;  // lists of each row
  Swap* lists;     // [R, slices, k]
  Swap* merged;    // [R, slices, k]
};

PYDETOX_HD bool before(const Swap& a, const Swap& b) {
  return a.score != b.score ? a.score < b.score : a.token < b.token;
}
// No token: after all others.
PYDETOX_HD Swap no_swap() { return {~uint64_t{0}, INT64_MAX}; }

// Unsigned numbers in the order of the scores; NaN after all others.
PYDETOX_HD uint64_t ordered_bits(double score) {
  if (score != score) return ~uint64_t{0} - 1;
  const uint64_t bits = bit_cast<uint64_t>(score);
  const uint64_t sign = uint64_t{1} << 63;
  return (bits & sign) != 0 ? ~bits : bits | sign;
}
PYDETOX_HD double score_of(uint64_t ordered) {
  if (ordered == ~uint64_t{0} - 1) return not_a_number();
  const uint64_t sign = uint64_t{1} << 63;
  return bit_cast<double>((ordered & sign) != 0 ? ordered ^ sign : ~ordered);
}
// -0 counts as 0.
template <class T>
PYDETOX_HD T swap_score(T product, T offset) {
  return (product - offset) + T{};
}

// A found token as result i; what is left of a list where too few tokens are allowed: infinity, -1.
template <class T>
struct SwapResult {
  T score;
  int64_t token;
};
template <class T>
PYDETOX_HD SwapResult<T> swap_result(const Swap& found) {
  if (found.score == no_swap().score) return {static_cast<T>(HUGE_VAL), -1};
  return {static_cast<T>(score_of(found.score)), found.token};
}

// Defined by each backend (csrc/common/place.h).
int run_mix_tokens(const MixParams& params, void* stream);
int run_mix_tokens_update(const UpdateParams& params, void* stream);
int run_top_swaps(const SwapParams& params, void* stream);
// How many lists of candidates each row has in the workspace; 0: no workspace is needed.
int64_t swap_slices(const TokenTable& table, int64_t rows, int64_t count);

// What is subtracted from logits: 0 where the largest is -infinity, or -infinity minus itself would
// not be a number.
template <class T>
PYDETOX_HD T shift_of(T largest) {
  return largest == -static_cast<T>(HUGE_VAL) ? T{} : largest;
}

// exp((logit - shift) / temperature), 0 below the smallest normal number; NaN stays.
template <class V, class T>
PYDETOX_HD V token_weight(V logit, T shift, T inverse_temperature) {
  const V x = (logit - shift) * inverse_temperature;
  const V lowest = V{} - static_cast<T>(Ieee<T>::kExpLimit);
  const V weight = exp_of_negative(x < lowest ? lowest : x).high;
  return x < lowest ? V{} : weight;
}

template <class V, class T>
PYDETOX_HD V logit_gradient(V logit, V product, const RowState<T>& s) {
  const V weight = token_weight(logit, s.largest, s.inverse_temperature);
  return weight * s.scale * (product - s.product);
}

// The state of a row; plan: of its step, unless the gradient alone is wanted.
template <class T>
PYDETOX_HD RowState<T> row_state(const UpdateParams& p, T largest, T inverse, T temperature,
                                 double product, bool moves, int64_t taken, double learning_rate) {
  RowState<T> s{};
  s.largest = largest;
  s.scale = static_cast<T>(static_cast<double>(inverse) / static_cast<double>(temperature));
  s.inverse_temperature = static_cast<T>(1 / static_cast<double>(temperature));
  s.product = static_cast<T>(product);
  s.moves = moves ? static_cast<T>(1) : T{};
  if (moves) {
    s.adam = {static_cast<T>(p.beta1),
              static_cast<T>(1 - p.beta1),
              static_cast<T>(p.beta2),
              static_cast<T>(1 - p.beta2),
              static_cast<T>(learning_rate / (1 - power(p.beta1, taken))),
              static_cast<T>(square_root(1 - power(p.beta2, taken))),
              static_cast<T>(p.epsilon),
              T{},
              T{}};
  }
  return s;
}

}  // namespace pydetox
