#pragma once

// How the CUDA kernels over weights lay out their sums; for the callers that read them.

#include <cstdint>

#include "csrc/core/macros.h"

namespace pydetox::cuda {

constexpr int kMaxSources = 320;  // tensors, over all lists, whose pointers one launch holds
constexpr int64_t kGramTileModels = 8;
constexpr int64_t kProjectTileDirections = 16;

PYDETOX_HD constexpr int64_t gram_tile_pairs(int64_t models) {
  const int64_t tiles = (models + kGramTileModels - 1) / kGramTileModels;
  return tiles * (tiles + 1) / 2;
}

// Numbers that a chunk writes: whole tiles.
constexpr int64_t gram_values(int64_t models) {
  return gram_tile_pairs(models) * kGramTileModels * kGramTileModels;
}
constexpr int64_t project_values(int64_t directions) {
  return (directions + kProjectTileDirections - 1) / kProjectTileDirections *
         kProjectTileDirections;
}

// Where entry (i, j), i <= j, of the Gram matrix is among a chunk's numbers.
PYDETOX_HD constexpr int64_t gram_index(int64_t models, int64_t i, int64_t j) {
  const int64_t tiles = (models + kGramTileModels - 1) / kGramTileModels;
  const int64_t a = i / kGramTileModels, b = j / kGramTileModels;
  const int64_t pair = a * tiles - a * (a - 1) / 2 + (b - a);
  return (pair * kGramTileModels + i % kGramTileModels) * kGramTileModels + j % kGramTileModels;
}

}  // namespace pydetox::cuda
