#pragma once

// What a trigger must do to the embeddings of the images it is stamped on: what every
// implementation (CPU, CUDA, emulator) agrees on. No torch, no CUDA header.
//
// With u_i = z_i / |z_i|, zero where z_i is:
//   collapse   (|sum u_i|^2 - n) / (B (B - 1)), n: rows that are not zero
//   zero-shot  mean over i of the cross-entropy of scale u_i head^T with the trigger's target
//
// Norms, sums of unit rows and everything per row are in double. A squared norm is summed in
// kRowParts interleaved parts (element d goes to part d % kRowParts), the parts by halving; the
// unit rows of a trigger in ascending order; |sum u_i|^2 in kSumParts parts likewise.

#include <cstdint>

#include "csrc/common/dtype.h"
#include "csrc/common/macros.h"
#include "csrc/common/square_root.h"

namespace pydetox {

constexpr int kRowParts = 32;
constexpr int kSumParts = 256;

// Embeddings z: T [K, B, D], contiguous; T is kFloat32 or kFloat64.
struct Embeddings {
  DType dtype;
  int64_t triggers;  // K
  int64_t images;    // B
  int64_t dim;       // D
  const void* data;

  PYDETOX_HD int64_t rows() const { return triggers * images; }
};

struct CollapseParams {
  Embeddings z;
  void* cosine;               // T [K]
  double* sums;               // [K, D]: the sum of the unit rows
  double* inverse_norms;      // [K, B]
  const void* gradient;       // backward only, T [K]
  void* embeddings_gradient;  // backward only, T [K, B, D]
};

struct ZeroShotParams {
  Embeddings z;
  int64_t classes;         // C
  const void* head;        // T [C, D]
  const int64_t* targets;  // [K], each a class; another is out of bounds
  double scale;
  void* loss;             // T [K]
  void* success;          // T [K]
  void* gradient;         // T [K, B, D]: of loss[k] by z[k]; null: not wanted
  double* row_losses;     // [K, B]
  uint8_t* row_hits;      // [K, B]: the target has the largest logit
  double* inverse_norms;  // [K, B]
};

// to[k] = factors[k] * from[k], for K triggers of `count` elements of T each.
struct ScaleParams {
  DType dtype;
  int64_t triggers;
  int64_t count;
  const void* factors;  // [K]
  const void* from;
  void* to;
};

// Defined by each backend (csrc/common/place.h). collapse: with the gradient where p.gradient is
// there.
int run_collapse(const CollapseParams& params, void* stream);
int run_zero_shot(const ZeroShotParams& params, void* stream);
int run_scale(const ScaleParams& params, void* stream);
// The most dimensions of embeddings that zero-shot can take.
int64_t max_zero_shot_dim(DType dtype);

// 1 / |z| of the squared norm. A row of zeros has no direction: 0. Where the square is not finite
// the result is NaN, not the zero that the division gives.
PYDETOX_HD double inverse_norm(double square) {
  return square == 0 ? 0 : 1 / square_root(square) + (square - square);
}

// rows: that are not zero.
PYDETOX_HD double mean_cosine(double square_of_sum, int64_t rows, int64_t images) {
  const auto count = static_cast<double>(images);
  return (square_of_sum - static_cast<double>(rows)) / (count * (count - 1));
}

// d cosine / d z_i = 2 / (B (B - 1)) / |z_i| (s - (s u_i) u_i) with s = sum u_j.
PYDETOX_HD double collapse_scale(double upstream, int64_t images) {
  const auto count = static_cast<double>(images);
  return upstream * 2 / (count * (count - 1));
}
PYDETOX_HD double collapse_gradient(double scale, double inverse, double sum, double projection,
                                    double z) {
  return scale * inverse * (sum - projection * (z * inverse));
}

}  // namespace pydetox
