#pragma once

// How many numbers the sums over weights take. That is what the CUDA kernels write, in whole tiles;
// the CPU takes less.

#include <cstdint>

#include "csrc/common/macros.h"

namespace pydetox {

constexpr int64_t kMaxLists = 320;  // that CUDA takes: their pointers travel in one launch
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

}  // namespace pydetox
