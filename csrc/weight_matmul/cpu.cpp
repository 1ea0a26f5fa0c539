// (A - B) F and F^T (A - B) for one instruction set (see csrc/common/vec.h);
// csrc/weight_matmul/core.h has the order of the sums.
//
// Both sides are one matrix product C(p, q) += sum over t of A(p, t) B(t, q) over a run of t, in
// tiles of C that stay in registers: right has the difference for A, left for B. A block of
// differences is widened to double once, in the first-level cache, and meets every column of the
// factor there.

#include "csrc/weight_matmul/cpu.h"

#include "csrc/weights/cpu_blocks.h"

namespace pydetox::cpu {
inline namespace PYDETOX_ISA {
namespace {

// Tiles of kTileRows by two vectors: as many sums as the registers hold.
constexpr int kTileRows = PYDETOX_VEC_BYTES == 64 ? 8 : 6;
// Local matrices have rows of whole vectors on every instruction set.
constexpr int64_t kWhole = 8;
// Doubles from row to row of a block of differences: not a power of two, or a column of them would
// share a few sets of the cache.
constexpr int64_t kBlockStride = kRun + kWhole;

PYDETOX_HD constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYDETOX_HD constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
PYDETOX_HD void zero(double* from, int64_t count) {
  if (count > 0) memset(from, 0, static_cast<size_t>(count) * sizeof(double));
}
PYDETOX_HD void copy(const double* from, int64_t count, double* to) {
  if (count > 0) memcpy(to, from, static_cast<size_t>(count) * sizeof(double));
}
PYDETOX_HD constexpr int64_t whole(int64_t count) { return (count + kWhole - 1) / kWhole * kWhole; }

struct Left {  // A(p, t) = data[p * row + t * step]
  const double* data;
  int64_t row, step;
};
struct Right {  // B(t, q) = data[t * row + q]
  const double* data;
  int64_t row;
};

// Cache lines of the block to come, asked for one by one while this one is multiplied: all at once
// they would only queue, and the memory would rest afterwards.
class Lines {
 public:
  // Room for `rows` rows of kRun elements of two tensors.
  explicit Lines(int64_t rows) : lines_(rows * kMost) {}
  void clear() { next_ = end_ = lines_.get(); }
  PYDETOX_HD void add(const Source& source, int64_t begin, int64_t count) {
    const int64_t size = size_of(source.dtype);
    const auto from =
        reinterpret_cast<uintptr_t>(source.data) + static_cast<uintptr_t>(begin * size);
    const uintptr_t to = from + static_cast<uintptr_t>(count * size);
    for (uintptr_t line = from & ~uintptr_t{63}; line < to; line += 64) *end_++ = line;
  }
  PYDETOX_HD void ask_for_one() {
    if (next_ != end_) __builtin_prefetch(reinterpret_cast<const void*>(*next_++), 0, 2);
  }
  PYDETOX_HD void ask_for_all() {
    while (next_ != end_) ask_for_one();
  }

 private:
  static constexpr int64_t kMost = 2 * (kRun * sizeof(double) / 64 + 1);
  Buffer<uintptr_t> lines_;
  uintptr_t* next_ = lines_.get();
  uintptr_t* end_ = lines_.get();
};

// kRows rows and kVectors vectors of C.
template <int kRows, int kVectors>
PYDETOX_HD void multiply_tile(Left a, Right b, int64_t depth, double* c, int64_t c_row,
                              Lines& lines) {
  Doubles sum[kRows][kVectors];
  PYDETOX_UNROLL
  for (int p = 0; p < kRows; ++p) {
    PYDETOX_UNROLL
    for (int q = 0; q < kVectors; ++q) sum[p][q] = Doubles{};
  }
  for (int64_t t = 0; t < depth; ++t) {
    lines.ask_for_one();
    Doubles right[kVectors];
    PYDETOX_UNROLL
    for (int q = 0; q < kVectors; ++q) right[q] = load<Doubles>(b.data + t * b.row + q * kLane);
    PYDETOX_UNROLL
    for (int p = 0; p < kRows; ++p) {
      const Doubles left = broadcast<Doubles>(a.data[p * a.row + t * a.step]);
      PYDETOX_UNROLL
      for (int q = 0; q < kVectors; ++q) sum[p][q] = fused(left, right[q], sum[p][q]);
    }
  }
  PYDETOX_UNROLL
  for (int p = 0; p < kRows; ++p) {
    PYDETOX_UNROLL
    for (int q = 0; q < kVectors; ++q) {
      double* to = c + p * c_row + q * kLane;
      store(to, load<Doubles>(to) + sum[p][q]);
    }
  }
}

template <int kVectors>
PYDETOX_HD void multiply_rows(Left a, Right b, int64_t rows, int64_t depth, double* c,
                              int64_t c_row, Lines& lines) {
  int64_t p = 0;
  const auto some = [&](auto tile) {
    constexpr int kRows = decltype(tile)::value;
    for (; p + kRows <= rows; p += kRows) {
      multiply_tile<kRows, kVectors>({a.data + p * a.row, a.row, a.step}, b, depth, c + p * c_row,
                                     c_row, lines);
    }
  };
  some(Width<kTileRows>{});
  some(Width<4>{});
  some(Width<2>{});
  some(Width<1>{});
}

// C [rows, columns] += A B over `depth` products; columns: a multiple of kWhole.
void multiply(Left a, Right b, int64_t rows, int64_t columns, int64_t depth, double* c,
              int64_t c_row, Lines& lines) {
  int64_t q = 0;
  for (; q + 2 * kLane <= columns; q += 2 * kLane) {
    multiply_rows<2>(a, {b.data + q, b.row}, rows, depth, c + q, c_row, lines);
  }
  for (; q < columns; q += kLane) {
    multiply_rows<1>(a, {b.data + q, b.row}, rows, depth, c + q, c_row, lines);
  }
}

// The difference's elements (row .. row + rows, column .. column + columns), row by row with
// kBlockStride between them, and zeros up to a whole vector. `ahead`: from where on, in elements
// after those, the next block will be read.
void widen_block(const MatmulTask& task, int64_t row, int64_t rows, int64_t column, int64_t columns,
                 int64_t ahead, double* block, Lines& lines) {
  double base[kRun];
  lines.clear();
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (row + i) * task.columns + column;
    lines.add(task.base, at + ahead, columns);
    lines.add(task.model, at + ahead, columns);
    difference_of(task.base, task.model, at, columns, base, block + i * kBlockStride);
    for (int64_t j = columns; j < whole(columns); ++j) block[i * kBlockStride + j] = 0;
  }
}

// Rows [first, first + count) of D F. The factor's run stays in the first-level cache for all of
// them; differences are widened for one row of tiles at a time.
void multiply_right(const MatmulTask& task, int64_t first, int64_t count, double* block,
                    double* factor, double* sums, Lines& lines) {
  const int64_t width = task.width, row = whole(width);
  zero(sums, count * row);
  for (int64_t t = 0; t < task.columns; t += kRun) {
    const int64_t depth = smaller(kRun, task.columns - t);
    Right run{task.factor + t * width, width};
    if (width != row) {
      for (int64_t i = 0; i < depth; ++i) {
        copy(run.data + i * width, width, factor + i * row);
        zero(factor + i * row + width, row - width);
      }
      run = {factor, row};
    }
    for (int64_t i = 0; i < count; i += kTileRows) {
      const int64_t some = smaller(kTileRows, count - i);
      widen_block(task, first + i, some, t, depth, kRun, block, lines);
      multiply({block, kBlockStride, 1}, run, some, row, depth, sums + i * row, row, lines);
      lines.ask_for_all();
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    copy(sums + i * row, width, task.result + (first + i) * width);
  }
}

// Columns [first, first + count) of F^T D.
void multiply_left(const MatmulTask& task, int64_t first, int64_t count, double* block,
                   double* sums, Lines& lines) {
  const int64_t width = task.width, row = whole(count);
  zero(sums, width * row);
  for (int64_t t = 0; t < task.rows; t += kRun) {
    const int64_t depth = smaller(kRun, task.rows - t);
    for (int64_t j = 0; j < count; j += kRun) {
      const int64_t some = smaller(kRun, count - j);
      const int64_t ahead = j + kRun < count ? kRun : kRun * task.columns - j;
      widen_block(task, t, depth, first + j, some, ahead, block, lines);
      multiply({task.factor + t * width, 1, width}, {block, kBlockStride}, width, whole(some),
               depth, sums + j, row, lines);
      lines.ask_for_all();
    }
  }
  for (int64_t k = 0; k < width; ++k) {
    copy(sums + k * row, count, task.result + k * task.columns + first);
  }
}

void matmul(const MatmulParams& params, const MatmulUnit* units, int64_t begin, int64_t end) {
  if (begin == end) return;
  int64_t most = 0, widest = 0;
  for (int64_t i = begin; i < end; ++i) {
    most = larger(most, whole(units[i].count));
    widest = larger(widest, whole(params.tasks[units[i].task].width));
  }
  Buffer<double> block(kRun * kBlockStride), factor(kRun * widest), sums(most * widest);
  Lines lines(kRun);
  for (int64_t i = begin; i < end; ++i) {
    const MatmulUnit& unit = units[i];
    const MatmulTask& task = params.tasks[unit.task];
    if (params.left) {
      multiply_left(task, unit.first, unit.count, block.get(), sums.get(), lines);
    } else {
      multiply_right(task, unit.first, unit.count, block.get(), factor.get(), sums.get(), lines);
    }
  }
}

}  // namespace

extern const MatmulKernels kMatmulKernels;
const MatmulKernels kMatmulKernels{matmul};

}  // namespace PYDETOX_ISA
}  // namespace pydetox::cpu
