#pragma once

// What csrc/ops calls. No torch, no CUDA header: a stream travels as void*, an error as int.

#include "csrc/core/matmul.h"
#include "csrc/core/objectives.h"
#include "csrc/core/stamp.h"
#include "csrc/core/trigger_update.h"
#include "csrc/core/weights.h"

namespace pydetox::cuda {

// Enqueue on `stream` (a cudaStream_t) of the current device; return a cudaError_t. They neither
// allocate nor synchronise, so that a CUDA graph can capture them, and do nothing where there is
// nothing to compute. cudaErrorInvalidValue: an impossible combination of types or sizes.
int stamp_forward(const StampForwardParams& params, void* stream);
int stamp_backward(const StampBackwardParams& params, void* stream);

// Over lists of weights on the device; coefficients, partials and sums are on the device too, the
// table, first_chunk and keys on the host. partials: room for the values of every chunk, sums: for
// those of one (csrc/cuda/weights_layout.h; of a sketch: size). matrix: [M, M].
int weight_gram(const WeightTable& table, double* partials, double* sums, double* matrix,
                void* stream);
int weight_project(const WeightTable& table, double* partials, double* sums, void* stream);
int weight_sketch(const WeightTable& table, const int64_t* first_chunk, int64_t blocks_per_chunk,
                  const uint64_t* keys, int64_t size, double* partials, double* sums, void* stream);
int weight_apply(const WeightTable& table, int64_t vectors, int64_t results,
                 const double* coefficients, bool per_tensor, void* stream);

// tasks: `count` on the host, pointing to memory on the device.
int weight_matmul(const MatmulTask* tasks, int64_t count, bool left, void* stream);

// All pointers are on the device.
int trigger_update(const TriggerUpdateParams& params, void* stream);
int embedding_collapse(const CollapseParams& params, void* stream);
int zero_shot_loss(const ZeroShotParams& params, void* stream);
int scale_triggers(const ScaleParams& params, void* stream);
int64_t max_zero_shot_dim(DType dtype);

// cudaGetErrorString.
const char* error_string(int error);

}  // namespace pydetox::cuda
