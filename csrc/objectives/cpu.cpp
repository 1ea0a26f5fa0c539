// Collapse and zero-shot loss of embeddings for one instruction set (see csrc/common/vec.h).

#include "csrc/objectives/cpu.h"

#include "csrc/common/buffer.h"
#include "csrc/common/logarithm.h"
#include "csrc/common/sigmoid.h"
#include "csrc/common/vec.h"

namespace pydetox::cpu {
inline namespace PYDETOX_ISA {
namespace {

using Doubles = Vec<double, kLanes<double>>;

// The doubles of kLanes<double> elements of T.
template <class T>
PYDETOX_HD Doubles wide(const T* from) {
  if constexpr (sizeof(T) == 8) {
    return load<Doubles>(from);
  } else {
#if PYDETOX_VEC_BYTES > 0
    return doubles_of_floats(from);
#else
    return static_cast<double>(*from);
#endif
  }
}

// sum over d of term(a[d]), in kRowParts parts; term: of doubles and the index of the first.
template <class T, class Term>
PYDETOX_HD double sum_of_row(const T* row, int64_t dim, const Term& term) {
  constexpr int N = kLanes<double>;
  double parts[kRowParts] = {};
  int64_t d = 0;
  for (; d + kRowParts <= dim; d += kRowParts) {
    PYDETOX_UNROLL
    for (int i = 0; i < kRowParts; i += N) {
      store(parts + i, load<Doubles>(parts + i) + term(wide(row + d + i), Width<N>{}, d + i));
    }
  }
  for (int i = 0; d < dim; ++d, ++i) {
    parts[i] += term(static_cast<double>(row[d]), Width<1>{}, d);
  }
  for (int half = kRowParts / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}

template <class T>
double square_of_row(const T* row, int64_t dim) {
  return sum_of_row(row, dim, [](auto v, auto, int64_t) { return v * v; });
}

// ---- collapse ----

template <class T>
void sum_unit_rows(const CollapseParams& p, int64_t k, int64_t& rows) {
  const int64_t images = p.z.images, dim = p.z.dim;
  double* sum = p.sums + k * dim;
  memset(sum, 0, static_cast<size_t>(dim) * sizeof(double));
  rows = 0;
  for (int64_t b = 0; b < images; ++b) {
    const T* row = static_cast<const T*>(p.z.data) + (k * images + b) * dim;
    const double inverse = inverse_norm(square_of_row(row, dim));
    p.inverse_norms[k * images + b] = inverse;
    if (inverse == 0) continue;
    ++rows;
    constexpr int N = kLanes<double>;
    int64_t d = 0;
    for (; d + N <= dim; d += N) store(sum + d, load<Doubles>(sum + d) + wide(row + d) * inverse);
    for (; d < dim; ++d) sum[d] += static_cast<double>(row[d]) * inverse;
  }
}

double square_of_sum(const double* sum, int64_t dim) {
  double parts[kSumParts] = {};
  for (int64_t begin = 0; begin < dim; begin += kSumParts) {
    const int64_t n = dim - begin < kSumParts ? dim - begin : kSumParts;
    for (int64_t i = 0; i < n; ++i) parts[i] += sum[begin + i] * sum[begin + i];
  }
  for (int half = kSumParts / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}

template <class T>
void collapse_items(const CollapseParams& p, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    int64_t rows = 0;
    sum_unit_rows<T>(p, k, rows);
    const double square = square_of_sum(p.sums + k * p.z.dim, p.z.dim);
    static_cast<T*>(p.cosine)[k] = static_cast<T>(mean_cosine(square, rows, p.z.images));
  }
}

template <class T>
void collapse_gradient_items(const CollapseParams& p, int64_t begin, int64_t end) {
  const int64_t images = p.z.images, dim = p.z.dim;
  for (int64_t k = begin; k < end; ++k) {
    int64_t rows = 0;
    sum_unit_rows<T>(p, k, rows);
    const double* sum = p.sums + k * dim;
    const double scale =
        collapse_scale(static_cast<double>(static_cast<const T*>(p.gradient)[k]), images);
    for (int64_t b = 0; b < images; ++b) {
      const T* row = static_cast<const T*>(p.z.data) + (k * images + b) * dim;
      T* gradient = static_cast<T*>(p.embeddings_gradient) + (k * images + b) * dim;
      const double inverse = p.inverse_norms[k * images + b];
      const double projection = sum_of_row(row, dim, [&](auto v, auto lanes, int64_t d) {
        using V = Vec<double, decltype(lanes)::value>;
        return load<V>(sum + d) * (v * inverse);
      });
      for (int64_t d = 0; d < dim; ++d) {
        gradient[d] = static_cast<T>(
            collapse_gradient(scale, inverse, sum[d], projection, static_cast<double>(row[d])));
      }
    }
  }
}

// ---- zero-shot loss ----
//
// Rows are the lanes: an item packs its rows' embeddings as [D, rows], and everything that follows
// is a sum over dimensions or classes in which every row goes its own way, in ascending order. So
// the bits depend neither on the width of vectors nor on how rows are grouped.

constexpr int64_t kDepth = 128;  // terms that are added up in a register

// The matrix b [depth, outputs] as it lies in the head: one of its steps is 1.
template <class T, bool kTransposed>
struct Matrix {
  const T* data;
  int64_t step;

  PYDETOX_HD const T* at(int64_t i, int64_t j) const {
    return kTransposed ? data + j * step + i : data + i * step + j;
  }
};

// Products of one tile: for V vectors of rows and J outputs j,
//   out[j, rows] (+)= sum over i of a[i, rows] * b[i, j].
template <class T, int V, int J, bool kTransposed>
PYDETOX_HD void multiply_tile(const T* a, int64_t rows, const Matrix<T, kTransposed>& b,
                              int64_t count, bool first, T* out) {
  constexpr int N = kLanes<T>;
  using Lane = Vec<T, N>;
  Lane sum[J][V] = {};
  for (int64_t i = 0; i < count; ++i) {
    Lane left[V];
    PYDETOX_UNROLL
    for (int v = 0; v < V; ++v) left[v] = load<Lane>(a + i * rows + v * N);
    PYDETOX_UNROLL
    for (int j = 0; j < J; ++j) {
      const Lane right = *b.at(i, j) - Lane{};  // in every lane; "- 0" changes nothing
      PYDETOX_UNROLL
      for (int v = 0; v < V; ++v) sum[j][v] = fused_as<T, N>(left[v], right, sum[j][v]);
    }
  }
  PYDETOX_UNROLL
  for (int j = 0; j < J; ++j) {
    PYDETOX_UNROLL
    for (int v = 0; v < V; ++v) {
      T* to = out + j * rows + v * N;
      store(to, first ? sum[j][v] : load<Lane>(to) + sum[j][v]);
    }
  }
}

template <class T, int J, bool kTransposed>
PYDETOX_HD void multiply_columns(const T* a, int64_t rows, const Matrix<T, kTransposed>& b,
                                 int64_t count, bool first, T* out) {
  constexpr int N = kLanes<T>;
  int64_t r = 0;
  for (; r + 2 * N <= rows; r += 2 * N) {
    multiply_tile<T, 2, J>(a + r, rows, b, count, first, out + r);
  }
  for (; r < rows; r += N) multiply_tile<T, 1, J>(a + r, rows, b, count, first, out + r);
}

// out [outputs, rows] = a [depth, rows] times b, in chunks of kDepth terms. rows: a multiple of
// kGroupRows.
template <class T, bool kTransposed>
void multiply(const T* a, int64_t rows, int64_t depth, const Matrix<T, kTransposed>& b,
              int64_t outputs, T* out) {
  constexpr int J = PYDETOX_VEC_BYTES == 64 ? 8 : 4;
  if (depth == 0) memset(out, 0, static_cast<size_t>(outputs * rows) * sizeof(T));
  for (int64_t i = 0; i < depth; i += kDepth) {
    const int64_t count = depth - i < kDepth ? depth - i : kDepth;
    const auto part = [&](int64_t j) { return Matrix<T, kTransposed>{b.at(i, j), b.step}; };
    const T* left = a + i * rows;
    int64_t j = 0;
    for (; j + J <= outputs; j += J) {
      multiply_columns<T, J>(left, rows, part(j), count, i == 0, out + j * rows);
    }
    for (; j + 2 <= outputs; j += 2) {
      multiply_columns<T, 2>(left, rows, part(j), count, i == 0, out + j * rows);
    }
    for (; j < outputs; ++j) {
      multiply_columns<T, 1>(left, rows, part(j), count, i == 0, out + j * rows);
    }
  }
}

// total[r] = sum over i of term(i, r), for every lane of rows: in T inside a chunk, and over the
// chunks.
template <class T, class Term>
PYDETOX_HD void sum_lanes(int64_t rows, int64_t count, T* total, const Term& term) {
  constexpr int64_t kChunkTerms = 32;
  constexpr int N = kLanes<T>;
  using Lane = Vec<T, N>;
  for (int64_t r = 0; r < rows; r += N) {
    Lane sum{};
    for (int64_t begin = 0; begin < count; begin += kChunkTerms) {
      const int64_t end = begin + kChunkTerms < count ? begin + kChunkTerms : count;
      Lane chunk{};
      for (int64_t i = begin; i < end; ++i) chunk += term(i, r);
      sum += chunk;
    }
    store(total + r, sum);
  }
}

// One item: `count` rows from `first` on, padded to `rows` lanes.
template <class T>
class ZeroShotItem {
 public:
  ZeroShotItem(const ZeroShotParams& params, int64_t most_rows)
      : p_(params),
        packed_(params.z.dim * most_rows),
        weights_(params.classes * most_rows),
        pulled_(params.gradient == nullptr ? 0 : params.z.dim * most_rows),
        factor_(most_rows),
        largest_(most_rows),
        target_dot_(most_rows),
        target_weight_(most_rows),
        others_(most_rows),
        inverse_(most_rows),
        projection_(most_rows) {}

  void run(int64_t first, int64_t count, int64_t rows) {
    first_ = first;
    count_ = count;
    rows_ = rows;
    pack();
    const T* head = static_cast<const T*>(p_.head);
    multiply(packed_.get(), rows_, p_.z.dim, Matrix<T, true>{head, p_.z.dim}, p_.classes,
             weights_.get());
    find_largest();
    exponentiate();
    finish_losses();
    if (p_.gradient != nullptr) pull_back();
  }

 private:
  static constexpr int N = kLanes<T>;
  using Lane = Vec<T, N>;

  int64_t target(int64_t r) const { return p_.targets[(first_ + r) / p_.z.images]; }

  void pack() {
    const int64_t dim = p_.z.dim;
    const T* from = static_cast<const T*>(p_.z.data) + first_ * dim;
    if (count_ < rows_) memset(packed_.get(), 0, static_cast<size_t>(dim * rows_) * sizeof(T));
    for (int64_t d = 0; d < dim; d += kGroupRows) {  // in squares that stay in the cache
      const int64_t d_end = d + kGroupRows < dim ? d + kGroupRows : dim;
      for (int64_t r = 0; r < count_; ++r) {
        for (int64_t i = d; i < d_end; ++i) packed_.get()[i * rows_ + r] = from[r * dim + i];
      }
    }
    for (int64_t r = 0; r < rows_; ++r) {
      const double inverse = r < count_ ? inverse_norm(square_of_row(from + r * dim, dim)) : 0;
      inverse_.get()[r] = inverse;
      factor_.get()[r] = static_cast<T>(p_.scale * inverse);
    }
  }

  // A NaN is never the largest, but turns what is made of it into NaN.
  void find_largest() {
    for (int64_t r = 0; r < rows_; r += N) {
      Lane largest = load<Lane>(weights_.get() + r);
      for (int64_t c = 1; c < p_.classes; ++c) {
        const Lane dot = load<Lane>(weights_.get() + c * rows_ + r);
        largest = dot > largest ? dot : largest;
      }
      store(largest_.get() + r, largest);
    }
  }

  // exp(logit - largest logit) in place of the products; the target's is put aside.
  void exponentiate() {
    for (int64_t r = 0; r < count_; ++r) {
      const T dot = weights_.get()[target(r) * rows_ + r];
      target_dot_.get()[r] = dot;
      bool hit = dot == largest_.get()[r];
      for (int64_t c = 0; hit && c < target(r); ++c) hit = weights_.get()[c * rows_ + r] < dot;
      p_.row_hits[first_ + r] = hit ? 1 : 0;
    }
    for (int64_t c = 0; c < p_.classes; ++c) {
      for (int64_t r = 0; r < rows_; r += N) {
        T* at = weights_.get() + c * rows_ + r;
        const Lane lowest = Lane{} - Ieee<T>::kExpLimit;
        Lane x = (load<Lane>(at) - load<Lane>(largest_.get() + r)) * load<Lane>(factor_.get() + r);
        x = x < lowest ? lowest : x;  // written so that NaN stays
        store(at, exp_of_negative(x).high);
      }
    }
    for (int64_t r = 0; r < count_; ++r) {
      T& weight = weights_.get()[target(r) * rows_ + r];
      target_weight_.get()[r] = weight;
      weight = 0;
    }
    sum_lanes(rows_, p_.classes, others_.get(),
              [&](int64_t c, int64_t r) { return load<Lane>(weights_.get() + c * rows_ + r); });
  }

  void finish_losses() {
    for (int64_t r = 0; r < count_; ++r) {
      const double sum =
          static_cast<double>(others_.get()[r]) + static_cast<double>(target_weight_.get()[r]);
      const double behind =
          (static_cast<double>(largest_.get()[r]) - static_cast<double>(target_dot_.get()[r])) *
          (p_.scale * inverse_.get()[r]);
      const double loss = natural_log(sum) + behind;
      p_.row_losses[first_ + r] = loss;
      if (loss != loss) p_.row_hits[first_ + r] = 0;
    }
  }

  // h = sum over c of (softmax - target) head[c]; the gradient is (h - (h u) u) scale / |z| / B.
  void pull_back() {
    const int64_t dim = p_.z.dim;
    for (int64_t r = 0; r < count_; ++r) {  // the target's weight: less the others', exactly
      weights_.get()[target(r) * rows_ + r] = -others_.get()[r];
    }
    multiply(weights_.get(), rows_, p_.classes,
             Matrix<T, false>{static_cast<const T*>(p_.head), dim}, dim, pulled_.get());
    sum_lanes(rows_, dim, projection_.get(), [&](int64_t d, int64_t r) {
      return load<Lane>(pulled_.get() + d * rows_ + r) * load<Lane>(packed_.get() + d * rows_ + r);
    });
    T* to = static_cast<T*>(p_.gradient) + first_ * dim;
    for (int64_t r = 0; r < count_; ++r) {
      const double inverse = inverse_.get()[r];
      const double sum =
          static_cast<double>(others_.get()[r]) + static_cast<double>(target_weight_.get()[r]);
      factor_.get()[r] =
          static_cast<T>(p_.scale * inverse / sum / static_cast<double>(p_.z.images));
      projection_.get()[r] =
          static_cast<T>(static_cast<double>(projection_.get()[r]) * inverse * inverse);
    }
    for (int64_t d = 0; d < dim; d += kGroupRows) {
      const int64_t d_end = d + kGroupRows < dim ? d + kGroupRows : dim;
      for (int64_t r = 0; r < count_; ++r) {
        const T factor = factor_.get()[r], projection = projection_.get()[r];
        for (int64_t i = d; i < d_end; ++i) {
          const int64_t at = i * rows_ + r;
          to[r * dim + i] = factor * (pulled_.get()[at] - projection * packed_.get()[at]);
        }
      }
    }
  }

  const ZeroShotParams& p_;
  Buffer<T> packed_;   // [D, rows]: z
  Buffer<T> weights_;  // [C, rows]: products with the head, then exponentials
  Buffer<T> pulled_;   // [D, rows]: h
  Buffer<T> factor_, largest_, target_dot_, target_weight_, others_;
  Buffer<double> inverse_;
  Buffer<T> projection_;
  int64_t first_ = 0, count_ = 0, rows_ = 0;
};

template <class T>
void zero_shot_items(const ZeroShotParams& p, const RowTiling& tiling, int64_t begin, int64_t end) {
  int64_t most = 0;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t groups = tiling.begin(item + 1) - tiling.begin(item);
    most = groups > most ? groups : most;
  }
  ZeroShotItem<T> work(p, most * kGroupRows);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = tiling.begin(item) * kGroupRows;
    const int64_t rows = tiling.begin(item + 1) * kGroupRows - first;
    const int64_t left = p.z.rows() - first;
    work.run(first, rows < left ? rows : left, rows);
  }
}

void collapse(const CollapseParams& p, int64_t begin, int64_t end) {
  if (p.z.dtype == DType::kFloat64) return collapse_items<double>(p, begin, end);
  return collapse_items<float>(p, begin, end);
}

void collapse_gradient(const CollapseParams& p, int64_t begin, int64_t end) {
  if (p.z.dtype == DType::kFloat64) return collapse_gradient_items<double>(p, begin, end);
  return collapse_gradient_items<float>(p, begin, end);
}

void zero_shot(const ZeroShotParams& p, const RowTiling& tiling, int64_t begin, int64_t end) {
  if (p.z.dtype == DType::kFloat64) return zero_shot_items<double>(p, tiling, begin, end);
  return zero_shot_items<float>(p, tiling, begin, end);
}

}  // namespace

extern const ObjectiveKernels kObjectiveKernels;
const ObjectiveKernels kObjectiveKernels{collapse, collapse_gradient, zero_shot};

}  // namespace PYDETOX_ISA
}  // namespace pydetox::cpu
