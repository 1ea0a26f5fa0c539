#pragma once

// How many numbers the sums over weights take. That is what the CUDA kernels write, in whole tiles;
// the CPU takes less.

#include <cstdint>

#include "csrc/common/macros.h"

namespace pydetox {

constexpr int64_t kMaxLists = 320;  // that CUDA takes: their pointers travel in one launch

// Models whose differences a thread of the Gram kernel holds at once, and directions likewise: few
// where there are few, so that a thread reads more of each list instead.
constexpr int64_t kFewModels = 2, kManyModels = 8;
constexpr int64_t kFewDirections = 2, kManyDirections = 16;

PYDETOX_HD constexpr int64_t gram_tile(int64_t models) {
  return models <= kFewModels ? kFewModels : kManyModels;
}
PYDETOX_HD constexpr int64_t gram_tiles(int64_t models) {
  return (models + gram_tile(models) - 1) / gram_tile(models);
}
PYDETOX_HD constexpr int64_t gram_tile_pairs(int64_t models) {
  return gram_tiles(models) * (gram_tiles(models) + 1) / 2;
}
constexpr int64_t project_tile(int64_t directions) {
  return directions <= kFewDirections ? kFewDirections : kManyDirections;
}

// Numbers that a chunk writes: whole tiles.
constexpr int64_t gram_values(int64_t models) {
  return gram_tile_pairs(models) * gram_tile(models) * gram_tile(models);
}
constexpr int64_t project_values(int64_t directions) {
  const int64_t tile = project_tile(directions);
  return (directions + tile - 1) / tile * tile;
}

// Where entry (i, j), i <= j, of the Gram matrix is among a chunk's numbers.
PYDETOX_HD constexpr int64_t gram_index(int64_t models, int64_t i, int64_t j) {
  const int64_t tile = gram_tile(models), tiles = gram_tiles(models);
  const int64_t a = i / tile, b = j / tile;
  const int64_t pair = a * tiles - a * (a - 1) / 2 + (b - a);
  return (pair * tile + i % tile) * tile + j % tile;
}

}  // namespace pydetox
