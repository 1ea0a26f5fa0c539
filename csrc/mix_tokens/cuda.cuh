#pragma once

// Kernels of mix_tokens, its update and top_swaps; csrc/mix_tokens/core.h has the maths and the
// order of the sums, in which these kernels give the CPU's bits. Compiled by nvcc, and by the host
// compiler for the emulator.
//
// Both products with the table go through tiles in shared memory: of the table, widened to T, and
// of what it meets. All loads of a tile are under way before the first is used. A token that is not
// allowed has zeros instead of its row, so that nothing of it is read.

#include <cmath>
#include <cstdint>

#include "csrc/common/block_sum.cuh"
#include "csrc/common/grid.h"
#include "csrc/common/memory.cuh"
#include "csrc/mix_tokens/core.h"

// Whole, such a loop would want more registers than there are.
#if defined(__CUDA_ARCH__)
#define PYDETOX_UNROLL_FOUR _Pragma("unroll 4")
#else
#define PYDETOX_UNROLL_FOUR
#endif

namespace pydetox::cuda {

constexpr int kTokenThreads = 256;
constexpr int kTokenWarps = kTokenThreads / kWarpSize;
constexpr int kTokenTile = 128;  // of the table's columns (mixing) or rows (products)
constexpr int kMixRows = 32;     // of logits in a tile
constexpr int kMixStride = kMixRows + 1;
constexpr int kTokenStride = kTokenTile + 4;  // of a transposed tile: whole words, few conflicts
constexpr int kSwapRows = kTokenWarps;        // of gradients in a tile of top_swaps: one for a warp
constexpr int kMergedLists = 8;

// What is summed before the next barrier; divides kTokenRun.
template <class T>
constexpr int kTokenDepth = sizeof(T) == 8 ? 16 : 32;

// Blocks of a tile's kernel on a multiprocessor. Doubles, and addresses of single elements, need
// the registers of two.
template <class T, bool kWords>
constexpr int kTileBlocks = sizeof(T) == 4 && kWords ? 2 : 1;

template <class T>
__device__ __forceinline__ T token_value(const T* from) {
  T value;
  load<1>(from, &value);
  return value;
}
template <class T>
__device__ __forceinline__ T token_written(const T* from) {
  T value;
  load_written<1>(from, &value);
  return value;
}

template <class T>
__device__ __forceinline__ T inverse_temperature_of(const void* temperature, int64_t r) {
  return static_cast<T>(1 /
                        static_cast<double>(token_value(static_cast<const T*>(temperature) + r)));
}

__device__ __forceinline__ bool token_allowed(const TokenTable& table, int64_t v) {
  return v < table.tokens && (table.allowed == nullptr || token_value(table.allowed + v) != 0);
}

// Rows [first, first + kRows) and columns [column, column + kColumns) of the table: put(row,
// column, value) of each element in T; zeros for what is not there or not allowed.
template <class T, class S, bool kWords, int kRows, int kColumns, class Put>
__device__ __forceinline__ void load_table_tile(const TokenTable& table, int64_t first, int64_t end,
                                                int64_t column, const Put& put) {
  constexpr int kCount = kWords ? kMaxWordBytes / static_cast<int>(sizeof(S)) : 1;
  constexpr int kLoads = kRows * kColumns / kTokenThreads / kCount;
  constexpr int kAcross = kColumns / kCount;
  static_assert(kLoads * kTokenThreads * kCount == kRows * kColumns, "every thread loads as much");
  const int thread = static_cast<int>(threadIdx.x);
  S stored[kLoads][kCount];
  PYDETOX_UNROLL
  for (int i = 0; i < kLoads; ++i) {
    const int at = thread + i * kTokenThreads;
    const int64_t v = first + at / kAcross;
    const int64_t d = column + at % kAcross * kCount;
    PYDETOX_UNROLL
    for (int e = 0; e < kCount; ++e) stored[i][e] = S{};
    // Rows end at multiples of kCount: a word is wanted whole or not at all.
    if (v < end && d < table.dim && token_allowed(table, v)) {
      load<kCount>(static_cast<const S*>(table.data) + v * table.dim + d, stored[i]);
    }
  }
  PYDETOX_UNROLL
  for (int i = 0; i < kLoads; ++i) {
    const int at = thread + i * kTokenThreads;
    PYDETOX_UNROLL
    for (int e = 0; e < kCount; ++e) {
      put(at / kAcross, at % kAcross * kCount + e, load_gradient<T>(stored[i][e]));
    }
  }
}

// Four neighbouring elements of shared memory.
template <class T>
__device__ __forceinline__ void load_four(const T* from, T* to) {
  constexpr int kPerWord = kMaxWordBytes / static_cast<int>(sizeof(T));
  PYDETOX_UNROLL
  for (int i = 0; i < 4 / kPerWord; ++i) {
    const uint4 word = reinterpret_cast<const uint4*>(from)[i];
    memcpy(to + i * kPerWord, &word, sizeof(word));
  }
}

// ---- mixing ----

// One warp: the largest allowed logit of one row in one part.
template <class T>
__global__ void __launch_bounds__(kTokenThreads, 1) largest_of_parts(const MixParams p) {
  const int64_t groups = ceil_div(p.block_rows(), kTokenWarps);
  const int64_t part = blockIdx.x / groups;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t r = blockIdx.x % groups * kTokenWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  if (r >= p.block_rows()) return;
  const int64_t begin = part * part_tokens(p.table.tokens);
  const int64_t stop = begin + part_tokens(p.table.tokens);
  const int64_t end = stop < p.table.tokens ? stop : p.table.tokens;
  const T* row = static_cast<const T*>(p.logits) + (p.first_row + r) * p.table.tokens;
  T largest = -static_cast<T>(HUGE_VAL);
  constexpr int kUnder = 8;  // loads under way
  for (int64_t v = begin + lane; v < end; v += kUnder * kWarpSize) {
    T values[kUnder];
    PYDETOX_UNROLL
    for (int i = 0; i < kUnder; ++i) {
      const int64_t at = v + i * kWarpSize;
      values[i] = -static_cast<T>(HUGE_VAL);
      if (at < end && token_allowed(p.table, at)) load<1>(row + at, &values[i]);
    }
    PYDETOX_UNROLL
    for (int i = 0; i < kUnder; ++i) largest = values[i] > largest ? values[i] : largest;
  }
  PYDETOX_UNROLL
  for (int half = kWarpSize / 2; half > 0; half /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, largest, half);
    largest = other > largest ? other : largest;
  }
  if (lane == 0) store<1>(static_cast<T*>(p.largest) + part * kTokenRows + r, &largest);
}

template <class T>
constexpr int64_t kMixSharedBytes =
    static_cast<int64_t>(sizeof(T)) * (kTokenDepth<T> * kTokenTile + kTokenRun * kMixStride);

// One block: kMixRows rows and kTokenTile columns of one part's sums.
template <class T, class S, bool kWords>
__global__ void __launch_bounds__(kTokenThreads, kTileBlocks<T, kWords>)
    mix_parts(const MixParams p) {
  constexpr int kLanes = 16;  // the block is kLanes by kLanes threads
  constexpr int kRowsEach = kMixRows / kLanes, kColumnsEach = kTokenTile / kLanes;
  constexpr int kDepth = kTokenDepth<T>;
  const int64_t across = ceil_div(p.table.stride(), kTokenTile);
  const int64_t down = ceil_div(p.block_rows(), kMixRows);
  // Neighbouring blocks read the same rows of the table.
  const int64_t column = blockIdx.x % across * kTokenTile;
  const int64_t first_row = blockIdx.x / across % down * kMixRows;
  const int64_t part = blockIdx.x / across / down;
  const int64_t begin = part * part_tokens(p.table.tokens);
  const int64_t stop = begin + part_tokens(p.table.tokens);
  const int64_t end = stop < p.table.tokens ? stop : p.table.tokens;

  T* table = shared_memory<T>();             // [kDepth, kTokenTile]
  T* weights = table + kDepth * kTokenTile;  // [kTokenRun, kMixStride]
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int c = thread % kLanes, s = thread / kLanes;
  // This warp's rows of weights: warp, warp + kTokenWarps, ...
  constexpr int kWarpRows = kMixRows / kTokenWarps;
  T shift[kWarpRows] = {}, inverse_temperature[kWarpRows] = {}, weight_sum[kWarpRows] = {};
  PYDETOX_UNROLL
  for (int i = 0; i < kWarpRows; ++i) {
    const int64_t r = first_row + warp + i * kTokenWarps;
    if (r >= p.block_rows()) continue;
    shift[i] = shift_of(token_written(static_cast<const T*>(p.largest) + part * kTokenRows + r));
    inverse_temperature[i] = inverse_temperature_of<T>(p.temperature, p.first_row + r);
  }

  T total[kRowsEach][kColumnsEach] = {};
  for (int64_t run = begin; run < end; run += kTokenRun) {
    PYDETOX_UNROLL
    for (int i = 0; i < kWarpRows; ++i) {
      const int64_t r = first_row + warp + i * kTokenWarps;
      const T* row = static_cast<const T*>(p.logits) + (p.first_row + r) * p.table.tokens;
      T weight[2] = {};
      PYDETOX_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t v = run + lane + half * kWarpSize;
        if (r < p.block_rows() && v < end && token_allowed(p.table, v)) {
          weight[half] = token_weight(token_value(row + v), shift[i], inverse_temperature[i]);
        }
        weights[(lane + half * kWarpSize) * kMixStride + warp + i * kTokenWarps] = weight[half];
      }
      weight_sum[i] += sum_warp(weight[0] + weight[1]);
    }
    T sum[kRowsEach][kColumnsEach] = {};
    for (int t = 0; t < kTokenRun; t += kDepth) {
      load_table_tile<T, S, kWords, kDepth, kTokenTile>(
          p.table, run + t, end, column,
          [&](int down_tile, int at, T value) { table[down_tile * kTokenTile + at] = value; });
      __syncthreads();  // the tile is there, and the weights
      PYDETOX_UNROLL_FOUR
      for (int k = 0; k < kDepth; ++k) {
        T right[kColumnsEach];
        PYDETOX_UNROLL
        for (int q = 0; q < kColumnsEach; q += 4) {
          load_four(table + k * kTokenTile + q * kLanes + c * 4, right + q);
        }
        PYDETOX_UNROLL
        for (int i = 0; i < kRowsEach; ++i) {
          const T left = weights[(t + k) * kMixStride + s + i * kLanes];
          PYDETOX_UNROLL
          for (int q = 0; q < kColumnsEach; ++q) sum[i][q] = fma(left, right[q], sum[i][q]);
        }
      }
      __syncthreads();  // tile and weights may be overwritten
    }
    PYDETOX_UNROLL
    for (int i = 0; i < kRowsEach; ++i) {
      PYDETOX_UNROLL
      for (int q = 0; q < kColumnsEach; ++q) total[i][q] += sum[i][q];
    }
  }
  PYDETOX_UNROLL
  for (int i = 0; i < kWarpRows; ++i) {
    const int64_t r = first_row + warp + i * kTokenWarps;
    if (column == 0 && lane == 0 && r < p.block_rows()) {
      store<1>(static_cast<T*>(p.totals) + part * kTokenRows + r, &weight_sum[i]);
    }
  }
  PYDETOX_UNROLL
  for (int i = 0; i < kRowsEach; ++i) {
    const int64_t r = first_row + s + i * kLanes;
    PYDETOX_UNROLL
    for (int q = 0; q < kColumnsEach; q += 4) {
      const int64_t at = column + q * kLanes + c * 4;
      if (r < p.block_rows() && at < p.table.stride()) {
        store<4>(static_cast<T*>(p.sums) + (part * kTokenRows + r) * p.table.stride() + at,
                 &total[i][q]);
      }
    }
  }
}

constexpr int64_t kMixRowSharedBytes = 64 * 2 * static_cast<int64_t>(sizeof(double));

// One block: one row, all parts.
template <class T>
__global__ void __launch_bounds__(kTokenThreads, 1) mix_rows(const MixParams p) {
  double* totals = shared_memory<double>();        // [64]
  T* factors = reinterpret_cast<T*>(totals + 64);  // [64]
  const int64_t r = blockIdx.x, parts = p.table.parts();
  const int thread = static_cast<int>(threadIdx.x);
  const T* largest_of = static_cast<const T*>(p.largest) + r;
  T largest = -static_cast<T>(HUGE_VAL);
  for (int64_t part = 0; part < parts; ++part) {
    const T other = token_value(largest_of + part * kTokenRows);
    largest = other > largest ? other : largest;
  }
  const T shift = shift_of(largest);
  if (thread < parts) {
    const T inverse_temperature = inverse_temperature_of<T>(p.temperature, p.first_row + r);
    const int64_t at = thread * kTokenRows;
    const T factor = token_weight(token_value(largest_of + at), shift, inverse_temperature);
    factors[thread] = factor;
    totals[thread] = static_cast<double>(factor) *
                     static_cast<double>(token_value(static_cast<const T*>(p.totals) + at + r));
  }
  __syncthreads();  // factors and totals are there
  double total = 0;
  for (int64_t part = 0; part < parts; ++part) total += totals[part];
  const T inverse = static_cast<T>(1 / total);
  for (int64_t d = thread; d < p.table.dim; d += kTokenThreads) {
    T sum{};
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t at = (part * kTokenRows + r) * p.table.stride() + d;
      sum = fma(factors[part], token_value(static_cast<const T*>(p.sums) + at), sum);
    }
    sum *= inverse;
    store<1>(static_cast<T*>(p.mixed) + (p.first_row + r) * p.table.dim + d, &sum);
  }
  if (thread == 0) {
    T* softmax = static_cast<T*>(p.softmax) + (p.first_row + r) * 2;
    store<1>(softmax, &shift);
    store<1>(softmax + 1, &inverse);
  }
}

// ---- products with the table ----

template <class T, int kRows>
constexpr int64_t kProductSharedBytes =
    static_cast<int64_t>(sizeof(T)) * kTokenDepth<T> * (kTokenStride + kRows + 1);

// Products of kRowLanes * kRowsEach rows of gradients with kTokenTile tokens. Thread (s, c) of
// kRowLanes by kTokenLanes has row s + i * kRowLanes and, for e of 4, token
// q / 4 * 4 * kTokenLanes + 4 c + e.
template <class T, class S, bool kWords, int kRowLanes, int kRowsEach>
__device__ __forceinline__ void products_of_tile(
    const TokenTable& table, const T* upstream, int64_t rows, int64_t first_row, int64_t first,
    int64_t end, T* shared, T (&total)[kRowsEach][kTokenTile * kRowLanes / kTokenThreads]) {
  constexpr int kTokenLanes = kTokenThreads / kRowLanes;
  constexpr int kTokensEach = kTokenTile / kTokenLanes;
  constexpr int kRows = kRowLanes * kRowsEach;
  constexpr int kDepth = kTokenDepth<T>;
  T* tokens = shared;                             // [kDepth, kTokenStride]
  T* gradients = shared + kDepth * kTokenStride;  // [kDepth, kRows + 1]
  const int thread = static_cast<int>(threadIdx.x);
  const int c = thread % kTokenLanes, s = thread / kTokenLanes;
  constexpr int kLoads = (kRows * kDepth + kTokenThreads - 1) / kTokenThreads;
  for (int64_t run = 0; run < table.dim; run += kTokenRun) {
    T sum[kRowsEach][kTokensEach] = {};
    for (int64_t d = run; d < run + kTokenRun && d < table.dim; d += kDepth) {
      T gradient[kLoads] = {};
      PYDETOX_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        const int at = thread + i * kTokenThreads;
        const int64_t r = first_row + at / kDepth, from = d + at % kDepth;
        if (at < kRows * kDepth && r < rows && from < table.dim) {
          load<1>(upstream + r * table.dim + from, &gradient[i]);
        }
      }
      load_table_tile<T, S, kWords, kTokenTile, kDepth>(
          table, first, end, d,
          [&](int token, int at, T value) { tokens[at * kTokenStride + token] = value; });
      PYDETOX_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        const int at = thread + i * kTokenThreads;
        if (at < kRows * kDepth) gradients[at % kDepth * (kRows + 1) + at / kDepth] = gradient[i];
      }
      __syncthreads();  // the tiles are there
      PYDETOX_UNROLL_FOUR
      for (int k = 0; k < kDepth; ++k) {
        T right[kTokensEach];
        PYDETOX_UNROLL
        for (int q = 0; q < kTokensEach; q += 4) {
          load_four(tokens + k * kTokenStride + q * kTokenLanes + c * 4, right + q);
        }
        PYDETOX_UNROLL
        for (int i = 0; i < kRowsEach; ++i) {
          const T left = gradients[k * (kRows + 1) + s + i * kRowLanes];
          PYDETOX_UNROLL
          for (int q = 0; q < kTokensEach; ++q) sum[i][q] = fma(left, right[q], sum[i][q]);
        }
      }
      __syncthreads();  // the tiles may be overwritten
    }
    PYDETOX_UNROLL
    for (int i = 0; i < kRowsEach; ++i) {
      PYDETOX_UNROLL
      for (int q = 0; q < kTokensEach; ++q) total[i][q] += sum[i][q];
    }
  }
}

// ---- gradient and update ----

// Structs of numbers T, one after the other.
template <class T>
__device__ __forceinline__ void store_state(void* states, int64_t r, const RowState<T>& state) {
  constexpr int kNumbers = static_cast<int>(sizeof(state) / sizeof(T));
  T numbers[kNumbers];
  memcpy(numbers, &state, sizeof(state));
  PYDETOX_UNROLL
  for (int i = 0; i < kNumbers; ++i) {
    store<1>(static_cast<T*>(states) + r * kNumbers + i, &numbers[i]);
  }
}
template <class T>
__device__ __forceinline__ RowState<T> load_state(const void* states, int64_t r) {
  constexpr int kNumbers = static_cast<int>(sizeof(RowState<T>) / sizeof(T));
  T numbers[kNumbers];
  PYDETOX_UNROLL
  for (int i = 0; i < kNumbers; ++i) {
    load<1>(static_cast<const T*>(states) + r * kNumbers + i, &numbers[i]);
  }
  RowState<T> state;
  memcpy(&state, numbers, sizeof(state));
  return state;
}

// One warp: one row's state.
template <class T>
__global__ void __launch_bounds__(kTokenThreads, 1) token_states(const UpdateParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t r =
      static_cast<int64_t>(blockIdx.x) * kTokenWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  if (r >= p.rows) return;
  const int64_t dim = p.table.dim;
  double product = 0;
  for (int64_t d = lane; d < dim; d += kWarpSize) {
    product += static_cast<double>(token_value(static_cast<const T*>(p.upstream) + r * dim + d)) *
               static_cast<double>(token_value(static_cast<const T*>(p.mixed) + r * dim + d));
  }
  product = sum_warp(product);
  if (lane != 0) return;
  const bool moves = p.gradient == nullptr && token_value(p.active + r) != 0;
  int64_t taken = 0;
  double rate = 0;
  if (moves) {
    taken = token_written(p.steps + r) + 1;
    store<1>(p.steps + r, &taken);
    rate = p.rate_dtype == DType::kFloat64
               ? token_value(static_cast<const double*>(p.learning_rate) + r)
               : static_cast<double>(token_value(static_cast<const float*>(p.learning_rate) + r));
  }
  const T* softmax = static_cast<const T*>(p.softmax) + 2 * r;
  store_state(p.states, r,
              row_state(p, token_value(softmax), token_value(softmax + 1),
                        token_value(static_cast<const T*>(p.temperature) + r), product, moves,
                        taken, rate));
}

template <class T>
constexpr int64_t kGradientSharedBytes =
    kProductSharedBytes<T, kMixRows> > kMixRows * kTokenTile * static_cast<int64_t>(sizeof(T))
        ? kProductSharedBytes<T, kMixRows>
        : kMixRows * kTokenTile * static_cast<int64_t>(sizeof(T));

// One block: kMixRows rows and kTokenTile tokens of the gradient, or their step.
template <class T, class S, bool kWords, bool kUpdate>
__global__ void __launch_bounds__(kTokenThreads, kTileBlocks<T, kWords>)
    token_gradients(const UpdateParams p) {
  constexpr int kLanes = 16;
  constexpr int kRowsEach = kMixRows / kLanes, kTokensEach = kTokenTile / kLanes;
  const int64_t down = ceil_div(p.rows, kMixRows);
  // Neighbouring blocks read the same rows of the table.
  const int64_t first_row = blockIdx.x % down * kMixRows;
  const int64_t first = blockIdx.x / down * kTokenTile;
  T* shared = shared_memory<T>();
  T total[kRowsEach][kTokensEach] = {};
  products_of_tile<T, S, kWords, kLanes, kRowsEach>(p.table, static_cast<const T*>(p.upstream),
                                                    p.rows, first_row, first, p.table.tokens,
                                                    shared, total);
  // Through shared memory, [kMixRows, kTokenTile], so that neighbouring threads have neighbouring
  // tokens.
  const int thread = static_cast<int>(threadIdx.x);
  const int c = thread % kLanes, s = thread / kLanes;
  PYDETOX_UNROLL
  for (int i = 0; i < kRowsEach; ++i) {
    PYDETOX_UNROLL
    for (int q = 0; q < kTokensEach; ++q) {
      shared[(s + i * kLanes) * kTokenTile + q / 4 * 4 * kLanes + c * 4 + q % 4] = total[i][q];
    }
  }
  __syncthreads();  // the products are there
  const int64_t v = first + thread % kTokenTile;
  if (v >= p.table.tokens) return;
  const bool allowed = token_allowed(p.table, v);
  constexpr int kStep = kTokenThreads / kTokenTile;
  for (int i = thread / kTokenTile; i < kMixRows; i += kStep) {
    const int64_t r = first_row + i;
    if (r >= p.rows) return;
    const T product = shared[i * kTokenTile + thread % kTokenTile];
    const int64_t at = r * p.table.tokens + v;
    if constexpr (kUpdate) {
      const RowState<T> state = load_state<T>(p.states, r);
      if (state.moves == 0 || !allowed) continue;
      T* moved = static_cast<T*>(p.moved) + at;
      T* firsts = static_cast<T*>(p.first) + at;
      T* seconds = static_cast<T*>(p.second) + at;
      const AdamState<T> before{token_written(moved), token_written(firsts),
                                token_written(seconds)};
      const AdamState<T> after = adam_step(before, logit_gradient(before.logit, product, state),
                                           state.adam, [](T value) { return square_root(value); });
      store<1>(moved, &after.logit);
      store<1>(firsts, &after.first);
      store<1>(seconds, &after.second);
    } else {
      T gradient{};
      if (allowed) {
        const RowState<T> state = load_state<T>(p.states, r);
        gradient =
            logit_gradient(token_value(static_cast<const T*>(p.logits) + at), product, state);
      }
      store<1>(static_cast<T*>(p.gradient) + at, &gradient);
    }
  }
}

// ---- swaps ----

// One warp: g e[current] of one row. A lane has a run of dimensions; the runs are added in order.
template <class T, class S>
__global__ void __launch_bounds__(kTokenThreads, 1) swap_offsets(const SwapParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t r =
      static_cast<int64_t>(blockIdx.x) * kTokenWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  if (r >= p.rows) return;
  const int64_t dim = p.table.dim, current = token_value(p.current + r);
  const bool known = current >= 0 && current < p.table.tokens;
  T total = known ? T{} : static_cast<T>(not_a_number());
  const int64_t runs = ceil_div(dim, kTokenRun);
  for (int64_t first = 0; first < runs; first += kWarpSize) {
    const int64_t begin = (first + lane) * kTokenRun;
    const int64_t end = begin + kTokenRun < dim ? begin + kTokenRun : dim;
    T sum{};
    for (int64_t d = begin; known && d < end; ++d) {
      const S stored = token_value(static_cast<const S*>(p.table.data) + current * dim + d);
      sum = fma(load_gradient<T>(stored),
                token_value(static_cast<const T*>(p.upstream) + r * dim + d), sum);
    }
    for (int i = 0; i < kWarpSize; ++i) {
      const T other = __shfl_sync(0xffffffffu, sum, i);
      if (first + i < runs) total += other;
    }
  }
  if (lane == 0) store<1>(static_cast<T*>(p.offsets) + r, &total);
}

// The best candidate of a warp, in all of its lanes.
__device__ __forceinline__ Swap best_of_warp(Swap best) {
  PYDETOX_UNROLL
  for (int half = kWarpSize / 2; half > 0; half /= 2) {
    const Swap other{__shfl_xor_sync(0xffffffffu, best.score, half),
                     __shfl_xor_sync(0xffffffffu, best.token, half)};
    if (before(other, best)) best = other;
  }
  return best;
}

// Puts a candidate, the same in all lanes, into a warp's sorted list in shared memory, whose last
// one drops out.
__device__ __forceinline__ void insert_by_warp(Swap* list, int count, const Swap& found, int lane) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (before(found, list[middle])) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  // From the end on, a warp's width at a time.
  for (int top = count - 1; top > low; top -= kWarpSize) {
    const int to = top - lane;
    Swap moved{};
    if (to > low) moved = list[to - 1];
    __syncwarp();  // all have read
    if (to > low) list[to] = moved;
    __syncwarp();  // the next ones may be overwritten
  }
  __syncwarp();  // nobody searches any more
  if (lane == 0) list[low] = found;
  __syncwarp();  // the list is in order
}

template <class T>
constexpr int64_t kSwapTileBytes = (kProductSharedBytes<T, kSwapRows> + 15) / 16 * 16;

// One block: kSwapRows rows, one for each warp, and one slice of the table.
template <class T, class S, bool kWords>
__global__ void __launch_bounds__(kTokenThreads, 1) swap_slices_of_rows(const SwapParams p) {
  constexpr int kTokensEach = kTokenTile / kWarpSize;
  const int64_t down = ceil_div(p.rows, kSwapRows);
  const int64_t first_row = blockIdx.x % down * kSwapRows;
  const int64_t slice = blockIdx.x / down;
  const int64_t tiles = ceil_div(p.table.tokens, kTokenTile);
  const int64_t begin = slice * tiles / p.slices * kTokenTile;
  const int64_t stop = (slice + 1) * tiles / p.slices * kTokenTile;
  const int64_t end = stop < p.table.tokens ? stop : p.table.tokens;
  T* shared = shared_memory<T>();
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int count = static_cast<int>(p.count);
  Swap* list =
      reinterpret_cast<Swap*>(reinterpret_cast<char*>(shared) + kSwapTileBytes<T>) + warp * count;
  for (int i = lane; i < count; i += kWarpSize) list[i] = no_swap();
  __syncwarp();  // the list is there
  const int64_t r = first_row + warp;
  const T offset = r < p.rows ? token_written(static_cast<const T*>(p.offsets) + r) : T{};
  for (int64_t first = begin; first < end; first += kTokenTile) {
    T total[1][kTokensEach] = {};
    products_of_tile<T, S, kWords, kSwapRows, 1>(p.table, static_cast<const T*>(p.upstream), p.rows,
                                                 first_row, first, end, shared, total);
    Swap found[kTokensEach];
    PYDETOX_UNROLL
    for (int q = 0; q < kTokensEach; ++q) {
      const int64_t v = first + lane * kTokensEach + q;
      found[q] = no_swap();
      if (v < end && token_allowed(p.table, v)) {
        found[q] = {ordered_bits(static_cast<double>(swap_score(total[0][q], offset))), v};
      }
    }
    while (true) {
      Swap own = found[0];
      PYDETOX_UNROLL
      for (int q = 1; q < kTokensEach; ++q) own = before(found[q], own) ? found[q] : own;
      const Swap best = best_of_warp(own);
      if (!before(best, list[count - 1])) break;
      PYDETOX_UNROLL
      for (int q = 0; q < kTokensEach; ++q) {
        if (found[q].token == best.token) found[q] = no_swap();
      }
      __syncwarp();  // all have compared
      insert_by_warp(list, count, best, lane);
    }
  }
  if (r >= p.rows) return;
  for (int i = lane; i < count; i += kWarpSize) {
    store<1>(p.lists + (r * p.slices + slice) * count + i, &list[i]);
  }
}

struct MergeParams {
  SwapParams swaps;
  int64_t lists;  // sorted lists of each row in `from`
  const Swap* from;
  Swap* to;  // lists of p.slices places each; null: the results
};

// How many of a sorted list come before a candidate; `equal`: and how many are equal to it.
__device__ __forceinline__ int64_t place_in(const Swap* list, int64_t count, const Swap& found,
                                            bool equal) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const Swap other = token_written(list + middle);
    if (equal ? !before(found, other) : before(other, found)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One block: kMergedLists lists of one row become one. A candidate's place is how many come before
// it in all of them.
template <class T>
__global__ void __launch_bounds__(kTokenThreads, 1) merge_swaps(const MergeParams m) {
  const SwapParams& p = m.swaps;
  const int64_t groups = ceil_div(m.lists, kMergedLists);
  const int64_t r = blockIdx.x / groups, group = blockIdx.x % groups;
  const int64_t first = group * kMergedLists;
  const int64_t lists = m.lists - first < kMergedLists ? m.lists - first : kMergedLists;
  const Swap* from = m.from + (r * p.slices + first) * p.count;
  for (int64_t i = threadIdx.x; i < lists * p.count; i += kTokenThreads) {
    const Swap found = token_written(from + i);
    const int64_t own = i / p.count;
    int64_t place = i % p.count;
    for (int64_t other = 0; other < lists && place < p.count; ++other) {
      if (other != own) place += place_in(from + other * p.count, p.count, found, other < own);
    }
    if (place >= p.count) continue;
    if (m.to != nullptr) {
      store<1>(m.to + (r * p.slices + group) * p.count + place, &found);
      continue;
    }
    const SwapResult<T> result = swap_result<T>(found);
    store<1>(static_cast<T*>(p.scores) + r * p.count + place, &result.score);
    store<1>(p.tokens + r * p.count + place, &result.token);
  }
}

}  // namespace pydetox::cuda
