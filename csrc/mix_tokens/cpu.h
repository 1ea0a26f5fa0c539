#pragma once

// The CPU kernels of mix_tokens, its update and top_swaps, one set per instruction set. An item
// owns its part of the results.

#include <cstdint>

#include "csrc/mix_tokens/core.h"

namespace pydetox::cpu {

struct TokenKernels {
  // Items: parts of the table, for the rows of a block.
  void (*mix_parts)(const MixParams&, int64_t begin, int64_t end);
  // Items: rows of a block.
  void (*mix_rows)(const MixParams&, int64_t begin, int64_t end);
  // Items: rows; writes their states, and the upstream gradient as panels (cpu_tiles.h).
  void (*states)(const UpdateParams&, void* panels, int64_t begin, int64_t end);
  // Items: runs of the table.
  void (*update)(const UpdateParams&, const void* panels, int64_t begin, int64_t end);
  // Items: rows; writes offsets and panels.
  void (*offsets)(const SwapParams&, void* panels, int64_t begin, int64_t end);
  // Items: runs of the table, whose candidates go to the sorted lists [R, k].
  void (*swaps)(const SwapParams&, const void* panels, Swap* lists, int64_t begin, int64_t end);
};

// Elements of T in the panels of `rows` gradients.
constexpr int64_t panel_elements(const TokenTable& table, int64_t rows) {
  return token_ceil(rows, kTokenColumns) * kTokenColumns * table.dim;
}

// The kernels for the capability in use (csrc/common/capability.h).
const TokenKernels& token_kernels();

}  // namespace pydetox::cpu
