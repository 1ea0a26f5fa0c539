#pragma once

// What the CPU kernels of mix_tokens and top_swaps share, for one instruction set: a run of the
// table's rows in the first cache levels, and the matrix product over a run.

#include <cstdint>

#include "csrc/common/buffer.h"
#include "csrc/common/vec.h"
#include "csrc/mix_tokens/core.h"

namespace pydetox::cpu {
inline namespace PYDETOX_ISA {
namespace {

// Tiles of rows by two vectors: as many sums as the registers hold.
constexpr int kTokenTileRows = PYDETOX_VEC_BYTES == 64 ? 8 : 6;

PYDETOX_HD int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Cache lines of the run to come, asked for while this one is multiplied: all at once they would
// only queue, and the memory would rest afterwards.
class ComingLines {
 public:
  PYDETOX_HD void clear() {
    rows_ = next_ = 0;
    line_ = end_ = 0;
  }
  PYDETOX_HD void add(const void* data, int64_t bytes) {
    begin_[rows_] = reinterpret_cast<uintptr_t>(data) & ~uintptr_t{63};
    stop_[rows_++] = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
  }
  PYDETOX_HD void ask_for_one() {
    if (line_ >= end_) {
      if (next_ == rows_) return;
      line_ = begin_[next_];
      end_ = stop_[next_++];
    }
    __builtin_prefetch(reinterpret_cast<const void*>(line_), 0, 2);
    line_ += 64;
  }

 private:
  uintptr_t begin_[kTokenRun], stop_[kTokenRun];
  int rows_ = 0, next_ = 0;
  uintptr_t line_ = 0, end_ = 0;
};

template <class T>
struct TokenLeft {  // A(p, t) = data[p * row + t]
  const T* data;
  int64_t row;
};
template <class T>
struct TokenRight {  // B(t, q) = data[t * row + q]
  const T* data;
  int64_t row;
};

// kRows rows and kVectors vectors of C += A B over `depth`.
template <class T, int kRows, int kVectors>
PYDETOX_HD void multiply_token_tile(TokenLeft<T> a, TokenRight<T> b, int64_t depth, T* c,
                                    int64_t c_row, ComingLines& lines) {
  constexpr int N = kLanes<T>;
  using V = Vec<T, N>;
  V sum[kRows][kVectors] = {};
  for (int64_t t = 0; t < depth; ++t) {
    lines.ask_for_one();
    lines.ask_for_one();
    V right[kVectors];
    PYDETOX_UNROLL
    for (int q = 0; q < kVectors; ++q) right[q] = load<V>(b.data + t * b.row + q * N);
    PYDETOX_UNROLL
    for (int p = 0; p < kRows; ++p) {
      const V left = a.data[p * a.row + t] - V{};  // in every lane; "- 0" changes nothing
      PYDETOX_UNROLL
      for (int q = 0; q < kVectors; ++q) sum[p][q] = fused_as<T, N>(left, right[q], sum[p][q]);
    }
  }
  PYDETOX_UNROLL
  for (int p = 0; p < kRows; ++p) {
    PYDETOX_UNROLL
    for (int q = 0; q < kVectors; ++q) {
      T* to = c + p * c_row + q * N;
      store(to, load<V>(to) + sum[p][q]);
    }
  }
}

template <class T, int kVectors>
PYDETOX_HD void multiply_token_rows(TokenLeft<T> a, TokenRight<T> b, int64_t rows, int64_t depth,
                                    T* c, int64_t c_row, ComingLines& lines) {
  int64_t p = 0;
  const auto some = [&](auto tile) {
    constexpr int kRows = decltype(tile)::value;
    for (; p + kRows <= rows; p += kRows) {
      multiply_token_tile<T, kRows, kVectors>({a.data + p * a.row, a.row}, b, depth, c + p * c_row,
                                              c_row, lines);
    }
  };
  if constexpr (kVectors == 1) some(Width<2 * kTokenTileRows>{});  // as many sums as with two
  some(Width<kTokenTileRows>{});
  some(Width<4>{});
  some(Width<2>{});
  some(Width<1>{});
}

// C [rows, columns] += A B over `depth` products, at most kTokenRun; columns: a multiple of
// kTokenColumns.
template <class T>
void multiply_tokens(TokenLeft<T> a, TokenRight<T> b, int64_t rows, int64_t columns, int64_t depth,
                     T* c, int64_t c_row, ComingLines& lines) {
  constexpr int N = kLanes<T>;
  int64_t q = 0;
  for (; q + 2 * N <= columns; q += 2 * N) {
    multiply_token_rows<T, 2>(a, {b.data + q, b.row}, rows, depth, c + q, c_row, lines);
  }
  for (; q < columns; q += N) {
    multiply_token_rows<T, 1>(a, {b.data + q, b.row}, rows, depth, c + q, c_row, lines);
  }
}

// `count` elements of the table in T.
template <class T, class S>
PYDETOX_HD void widen_tokens(const S* from, int64_t count, T* to) {
  constexpr int N = kLanes<T>;
  int64_t i = 0;
  for (; i + N <= count; i += N) store(to + i, widen<S, T, N>(from + i));
  for (; i < count; ++i) to[i] = load_gradient<T>(from[i]);
}

// The rows of a run of the table, those that are allowed, in T, one after the other with zeros up
// to `stride`. Room for kTokenRun rows.
template <class T>
class TokenRows {
 public:
  explicit TokenRows(const TokenTable& table)
      : table_(table),
        // Not a power of two, or a column would share a few sets of the cache.
        stride_(table.stride() + kTokenColumns),
        block_(kTokenRun * stride_) {
    memset(block_.get(), 0, static_cast<size_t>(kTokenRun * stride_) * sizeof(T));
  }

  // Run `run`; the lines of run `next` are asked for later, unless it is `run`.
  void read(int64_t run, int64_t next, ComingLines& lines) {
    list(next, tokens_);
    lines.clear();
    const int64_t bytes = table_.dim * size_of(table_.dtype);
    for (int i = 0; next != run && i < count_; ++i) {
      lines.add(static_cast<const char*>(table_.data) + tokens_[i] * bytes, bytes);
    }
    list(run, tokens_);
    for (int i = 0; i < count_; ++i) {
      T* to = block_.get() + i * stride_;
      const int64_t from = tokens_[i] * table_.dim;
      if (sizeof(T) == 4 && table_.dtype == DType::kBFloat16) {
        if constexpr (sizeof(T) == 4) {
          widen_tokens(static_cast<const BFloat16*>(table_.data) + from, table_.dim, to);
        }
      } else {
        widen_tokens(static_cast<const T*>(table_.data) + from, table_.dim, to);
      }
    }
  }
  // How many tokens are allowed, and which: their numbers less the run's first.
  int count() const { return count_; }
  int64_t place(int i) const { return tokens_[i] % kTokenRun; }
  int64_t token(int i) const { return tokens_[i]; }
  const T* data() const { return block_.get(); }
  int64_t stride() const { return stride_; }

 private:
  void list(int64_t run, int64_t* tokens) {
    const int64_t begin = run * kTokenRun, end = smaller_of(begin + kTokenRun, table_.tokens);
    count_ = 0;
    for (int64_t v = begin; v < end; ++v) {
      if (table_.allowed == nullptr || table_.allowed[v] != 0) tokens[count_++] = v;
    }
  }

  const TokenTable& table_;
  int64_t stride_;
  Buffer<T> block_;
  int64_t tokens_[kTokenRun];
  int count_ = 0;
};

// Rows of gradients as panels whose lanes are the rows: kTokenPanel rows each (the last one: a
// multiple of kTokenColumns), [dim, width] one after the other.
constexpr int64_t kTokenPanel = 32;

// The products of a run's rows with all rows of gradients: for each panel [kTokenRun, width].
template <class T>
class TokenProducts {
 public:
  TokenProducts(const TokenTable& table, int64_t rows)
      : table_(table), rows_(rows), products_(kTokenRun * padded(rows)) {}

  static int64_t padded(int64_t rows) { return token_ceil(rows, kTokenColumns) * kTokenColumns; }
  static int64_t width(int64_t rows, int64_t first) {
    return smaller_of(kTokenPanel, padded(rows) - first);
  }

  void multiply(const TokenRows<T>& block, const T* panels, ComingLines& lines) {
    const int64_t all = padded(rows_);
    memset(products_.get(), 0, static_cast<size_t>(kTokenRun * all) * sizeof(T));
    for (int64_t d = 0; d < table_.dim; d += kTokenRun) {
      const int64_t depth = smaller_of(kTokenRun, table_.dim - d);
      for (int64_t first = 0; first < all; first += kTokenPanel) {
        const int64_t wide = width(rows_, first);
        multiply_tokens<T>({block.data() + d, block.stride()},
                           {panels + first * table_.dim + d * wide, wide}, block.count(), wide,
                           depth, products_.get() + first * kTokenRun, wide, lines);
      }
    }
  }
  // The product of the run's token 0 with row r, and how far it is to the next token's.
  const T* of(int64_t r) const {
    return products_.get() + r / kTokenPanel * kTokenPanel * kTokenRun + r % kTokenPanel;
  }
  int64_t step(int64_t r) const { return width(rows_, r / kTokenPanel * kTokenPanel); }

 private:
  const TokenTable& table_;
  int64_t rows_;
  Buffer<T> products_;
};

}  // namespace
}  // namespace PYDETOX_ISA
}  // namespace pydetox::cpu
