// mix_tokens, its update and top_swaps for one instruction set (see csrc/common/vec.h);
// csrc/mix_tokens/core.h has the order of the sums.
//
// A run of the table is widened once, into the second-level cache, and meets all rows there. Tokens
// that are not allowed are left out of it, and cost next to nothing.

#include "csrc/mix_tokens/cpu.h"

#include "csrc/common/buffer.h"
#include "csrc/common/vec.h"
#include "csrc/mix_tokens/cpu_tiles.h"

namespace pydetox::cpu {
inline namespace PYDETOX_ISA {
namespace {

// The logits of one run of a row, as vectors.
template <class T>
class RunOfLogits {
  static constexpr int N = kLanes<T>;
  using V = Vec<T, N>;
  using Bits = typename Lanes<T>::Bits;
  using Masks = Vec<Bits, N>;

 public:
  RunOfLogits(const TokenTable& table, int64_t run) : begin_(run * kTokenRun) {
    count_ = static_cast<int>(smaller_of(kTokenRun, table.tokens - begin_));
    whole_ = count_ == kTokenRun;
    for (int i = 0; i < kTokenRun; ++i) {
      const bool in = i < count_ && (table.allowed == nullptr || table.allowed[begin_ + i] != 0);
      mask_[i] = in ? ~Bits{0} : Bits{0};
      whole_ = whole_ && in;
    }
  }
  int64_t begin() const { return begin_; }
  int count() const { return count_; }
  // All kTokenRun tokens are there and allowed.
  bool whole() const { return whole_; }
  bool allowed(int i) const { return mask_[i] != 0; }

  // The tokens' elements of a row [V]; a run at the end of the table is copied to `local`.
  const T* of(const T* row, T* local) const {
    if (count_ == kTokenRun) return row + begin_;
    memcpy(local, row + begin_, static_cast<size_t>(count_) * sizeof(T));
    memset(local + count_, 0, static_cast<size_t>(kTokenRun - count_) * sizeof(T));
    return local;
  }
  // values[i ..], `other` where a token is not allowed.
  PYDETOX_HD V keep(V values, T other, int i) const {
    if (whole_) return values;
    const Masks mask = load<Masks>(mask_ + i);
    const V rest = V{} + other;
    return bit_cast<V>((bit_cast<Masks>(values) & mask) | (bit_cast<Masks>(rest) & ~mask));
  }

 private:
  int64_t begin_;
  int count_;
  bool whole_;
  Bits mask_[kTokenRun];
};

template <class T>
PYDETOX_HD T fused_number(T a, T b, T c) {
  if constexpr (sizeof(T) == 8) {
    return __builtin_fma(a, b, c);
  } else {
    return __builtin_fmaf(a, b, c);
  }
}

template <class T>
PYDETOX_HD T inverse_of(const void* temperature, int64_t r) {
  return static_cast<T>(1 / static_cast<double>(static_cast<const T*>(temperature)[r]));
}

// ---- mixing ----

// The largest of a run and of `before`; a NaN is never the largest.
template <class T>
PYDETOX_HD T largest_of_run(const RunOfLogits<T>& run, const T* row, T before) {
  constexpr int N = kLanes<T>;
  using V = Vec<T, N>;
  const T lowest = -static_cast<T>(HUGE_VAL);
  T local[kTokenRun];
  const T* from = run.of(row, local);
  V largest = V{} + before;
  for (int i = 0; i < kTokenRun; i += N) {
    const V values = run.keep(load<V>(from + i), lowest, i);
    largest = values > largest ? values : largest;
  }
  T lanes[N];
  store(lanes, largest);
  for (int i = 0; i < N; ++i) before = lanes[i] > before ? lanes[i] : before;
  return before;
}

// The weights of a run of a row, and their sum by halving.
template <class T>
PYDETOX_HD T weights_of_run(const RunOfLogits<T>& run, const T* row, T shift, T inverse_temperature,
                            T* weights) {
  constexpr int N = kLanes<T>;
  using V = Vec<T, N>;
  T local[kTokenRun];
  const T* from = run.of(row, local);
  for (int i = 0; i < kTokenRun; i += N) {
    const V weight = token_weight(load<V>(from + i), shift, inverse_temperature);
    store(weights + i, run.keep(weight, T{}, i));
  }
  T sums[kTokenRun];
  memcpy(sums, weights, sizeof(sums));
  for (int half = kTokenRun / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

template <class T>
void mix_part(const MixParams& p, int64_t part, TokenRows<T>& block, T* weights) {
  const int64_t tokens = p.table.tokens, stride = p.table.stride(), rows = p.block_rows();
  const int64_t begin = part * part_tokens(tokens) / kTokenRun;
  const int64_t end = smaller_of(begin + part_tokens(tokens) / kTokenRun, p.table.runs());
  T* sums = static_cast<T*>(p.sums) + part * kTokenRows * stride;
  T* largest = static_cast<T*>(p.largest) + part * kTokenRows;
  T* totals = static_cast<T*>(p.totals) + part * kTokenRows;
  const T* logits = static_cast<const T*>(p.logits) + p.first_row * tokens;
  memset(sums, 0, static_cast<size_t>(rows * stride) * sizeof(T));
  for (int64_t r = 0; r < rows; ++r) {
    largest[r] = -static_cast<T>(HUGE_VAL);
    totals[r] = 0;
  }
  for (int64_t run = begin; run < end; ++run) {
    const RunOfLogits<T> own(p.table, run);
    for (int64_t r = 0; r < rows; ++r) {
      largest[r] = largest_of_run(own, logits + r * tokens, largest[r]);
    }
  }
  ComingLines lines;
  for (int64_t run = begin; run < end; ++run) {
    block.read(run, run + 1 < end ? run + 1 : run, lines);
    if (block.count() == 0) continue;
    const RunOfLogits<T> own(p.table, run);
    for (int64_t r = 0; r < rows; ++r) {
      T* to = weights + r * kTokenRun;
      totals[r] += weights_of_run(own, logits + r * tokens, shift_of(largest[r]),
                                  inverse_of<T>(p.temperature, p.first_row + r), to);
      if (block.count() < kTokenRun) {
        for (int i = 0; i < block.count(); ++i) to[i] = to[block.place(i)];
      }
    }
    multiply_tokens<T>({weights, kTokenRun}, {block.data(), block.stride()}, rows, stride,
                       block.count(), sums, stride, lines);
  }
}

template <class T>
void mix_parts_as(const MixParams& p, int64_t begin, int64_t end) {
  TokenRows<T> block(p.table);
  Buffer<T> weights(kTokenRows * kTokenRun);
  for (int64_t part = begin; part < end; ++part) mix_part(p, part, block, weights.get());
}

template <class T>
void mix_rows_as(const MixParams& p, int64_t begin, int64_t end) {
  constexpr int N = kLanes<T>;
  using V = Vec<T, N>;
  const int64_t stride = p.table.stride(), parts = p.table.parts();
  Buffer<T> mixed(stride);
  for (int64_t r = begin; r < end; ++r) {
    const T* largest_of = static_cast<const T*>(p.largest) + r;
    T largest = -static_cast<T>(HUGE_VAL);
    for (int64_t part = 0; part < parts; ++part) {
      const T other = largest_of[part * kTokenRows];
      largest = other > largest ? other : largest;
    }
    const T shift = shift_of(largest);
    const T inverse_temperature = inverse_of<T>(p.temperature, p.first_row + r);
    double total = 0;
    memset(mixed.get(), 0, static_cast<size_t>(stride) * sizeof(T));
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t at = part * kTokenRows + r;
      const T factor =
          token_weight(static_cast<const T*>(p.largest)[at], shift, inverse_temperature);
      total +=
          static_cast<double>(factor) * static_cast<double>(static_cast<const T*>(p.totals)[at]);
      const T* sums = static_cast<const T*>(p.sums) + at * stride;
      const V left = factor - V{};
      for (int64_t d = 0; d < stride; d += N) {
        T* to = mixed.get() + d;
        store(to, fused_as<T, N>(left, load<V>(sums + d), load<V>(to)));
      }
    }
    const T inverse = static_cast<T>(1 / total);
    T* to = static_cast<T*>(p.mixed) + (p.first_row + r) * p.table.dim;
    for (int64_t d = 0; d < p.table.dim; ++d) to[d] = mixed.get()[d] * inverse;
    T* softmax = static_cast<T*>(p.softmax) + (p.first_row + r) * 2;
    softmax[0] = shift;
    softmax[1] = inverse;
  }
}

// ---- gradient and update ----

template <class T>
PYDETOX_HD void fill_panel(const T* row, int64_t rows, int64_t r, int64_t dim, T* panels) {
  const int64_t first = r / kTokenPanel * kTokenPanel;
  const int64_t width = TokenProducts<T>::width(rows, first);
  T* to = panels + first * dim + (r - first);
  for (int64_t d = 0; d < dim; ++d) to[d * width] = row[d];
}

template <class T>
PYDETOX_HD double product_of_rows(const T* a, const T* b, int64_t dim) {
  double parts[kTokenRowParts] = {};
  for (int64_t d = 0; d < dim; d += kTokenRowParts) {
    const int64_t count = smaller_of(kTokenRowParts, dim - d);
    for (int64_t i = 0; i < count; ++i) {
      parts[i] += static_cast<double>(a[d + i]) * static_cast<double>(b[d + i]);
    }
  }
  for (int half = kTokenRowParts / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}

template <class T>
void states_as(const UpdateParams& p, T* panels, int64_t begin, int64_t end) {
  const int64_t dim = p.table.dim;
  for (int64_t r = begin; r < end; ++r) {
    const T* upstream = static_cast<const T*>(p.upstream) + r * dim;
    fill_panel(upstream, p.rows, r, dim, panels);
    const double product = product_of_rows(upstream, static_cast<const T*>(p.mixed) + r * dim, dim);
    const bool moves = p.gradient == nullptr && p.active[r] != 0;
    const int64_t taken = moves ? ++p.steps[r] : 0;
    const double rate = !moves ? 0
                        : p.rate_dtype == DType::kFloat64
                            ? static_cast<const double*>(p.learning_rate)[r]
                            : static_cast<double>(static_cast<const float*>(p.learning_rate)[r]);
    const T* softmax = static_cast<const T*>(p.softmax) + 2 * r;
    static_cast<RowState<T>*>(p.states)[r] =
        row_state(p, softmax[0], softmax[1], static_cast<const T*>(p.temperature)[r], product,
                  moves, taken, rate);
  }
}

// One run of a row: its gradient is written, or its step is taken.
template <class T>
PYDETOX_HD void update_run(const UpdateParams& p, const RunOfLogits<T>& run, int64_t r,
                           const T* products) {
  constexpr int N = kLanes<T>;
  using V = Vec<T, N>;
  const RowState<T>& state = static_cast<const RowState<T>*>(p.states)[r];
  const int64_t row = r * p.table.tokens, at = row + run.begin();
  T local[kTokenRun];
  const T* logits = run.of(static_cast<const T*>(p.logits) + row, local);
  if (p.gradient != nullptr) {
    T* gradient = static_cast<T*>(p.gradient) + at;
    T kept[kTokenRun];
    T* to = run.count() == kTokenRun ? gradient : kept;
    for (int i = 0; i < kTokenRun; i += N) {
      const V slope = logit_gradient(load<V>(logits + i), load<V>(products + i), state);
      store(to + i, run.keep(slope, T{}, i));
    }
    if (to == kept) memcpy(gradient, kept, static_cast<size_t>(run.count()) * sizeof(T));
    return;
  }
  T* moved = static_cast<T*>(p.moved) + at;
  T* first = static_cast<T*>(p.first) + at;
  T* second = static_cast<T*>(p.second) + at;
  const auto step = [&](AdamState<V> before, int i) {
    const V slope = logit_gradient(before.logit, load<V>(products + i), state);
    return adam_step(before, slope, state.adam, [](V v) { return root<T, N>(v); });
  };
  if (run.whole()) {
    for (int i = 0; i < kTokenRun; i += N) {
      const AdamState<V> after =
          step({load<V>(moved + i), load<V>(first + i), load<V>(second + i)}, i);
      store(moved + i, after.logit);
      store(first + i, after.first);
      store(second + i, after.second);
    }
    return;
  }
  T firsts[kTokenRun], seconds[kTokenRun], logit[kTokenRun];
  const T* from[2] = {run.of(static_cast<const T*>(p.first) + row, firsts),
                      run.of(static_cast<const T*>(p.second) + row, seconds)};
  for (int i = 0; i < kTokenRun; i += N) {
    const AdamState<V> after =
        step({load<V>(logits + i), load<V>(from[0] + i), load<V>(from[1] + i)}, i);
    store(logit + i, after.logit);
    T both[2][N];
    store(both[0], after.first);
    store(both[1], after.second);
    for (int n = 0; n < N; ++n) {
      if (!run.allowed(i + n)) continue;
      moved[i + n] = logit[i + n];
      first[i + n] = both[0][n];
      second[i + n] = both[1][n];
    }
  }
}

template <class T>
void update_as(const UpdateParams& p, const T* panels, int64_t begin, int64_t end) {
  TokenRows<T> block(p.table);
  TokenProducts<T> products(p.table, p.rows);
  ComingLines lines;
  for (int64_t run = begin; run < end; ++run) {
    block.read(run, run + 1 < end ? run + 1 : run, lines);
    const RunOfLogits<T> own(p.table, run);
    products.multiply(block, panels, lines);
    for (int64_t r = 0; r < p.rows; ++r) {
      if (p.gradient == nullptr && static_cast<const RowState<T>*>(p.states)[r].moves == 0) {
        continue;
      }
      T of_row[kTokenRun] = {};
      const T* from = products.of(r);
      const int64_t width = products.step(r);
      if (block.count() == kTokenRun) {
        for (int i = 0; i < kTokenRun; ++i) of_row[i] = from[i * width];
      } else {
        for (int i = 0; i < block.count(); ++i) of_row[block.place(i)] = from[i * width];
      }
      update_run(p, own, r, of_row);
    }
  }
}

// ---- swaps ----

template <class T>
PYDETOX_HD T element_of(const TokenTable& table, int64_t i) {
  if constexpr (sizeof(T) == 4) {
    if (table.dtype == DType::kBFloat16) {
      return to_float(static_cast<const BFloat16*>(table.data)[i]);
    }
  }
  return static_cast<const T*>(table.data)[i];
}

template <class T>
void offsets_as(const SwapParams& p, T* panels, int64_t begin, int64_t end) {
  const int64_t dim = p.table.dim;
  for (int64_t r = begin; r < end; ++r) {
    const T* upstream = static_cast<const T*>(p.upstream) + r * dim;
    fill_panel(upstream, p.rows, r, dim, panels);
    T total{};
    for (int64_t d = 0; d < dim; d += kTokenRun) {
      T sum{};
      for (int64_t i = d; i < smaller_of(d + kTokenRun, dim); ++i) {
        sum = fused_number(element_of<T>(p.table, p.current[r] * dim + i), upstream[i], sum);
      }
      total += sum;
    }
    static_cast<T*>(p.offsets)[r] = total;
  }
}

// Puts a candidate into a sorted list, whose last one drops out.
PYDETOX_HD void insert(Swap* list, int64_t count, const Swap& found) {
  if (!before(found, list[count - 1])) return;
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (before(found, list[middle])) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  memmove(list + low + 1, list + low, static_cast<size_t>(count - 1 - low) * sizeof(Swap));
  list[low] = found;
}

template <class T>
PYDETOX_HD T threshold_of(const Swap& last) {
  return last.score == no_swap().score ? static_cast<T>(HUGE_VAL)
                                       : static_cast<T>(score_of(last.score));
}

template <class T>
void swaps_as(const SwapParams& p, const T* panels, Swap* lists, int64_t begin, int64_t end) {
  TokenRows<T> block(p.table);
  TokenProducts<T> products(p.table, p.rows);
  ComingLines lines;
  Buffer<T> thresholds(p.rows);
  const T* offsets = static_cast<const T*>(p.offsets);
  for (int64_t r = 0; r < p.rows; ++r) {
    thresholds.get()[r] = threshold_of<T>(lists[(r + 1) * p.count - 1]);
  }
  for (int64_t run = begin; run < end; ++run) {
    block.read(run, run + 1 < end ? run + 1 : run, lines);
    products.multiply(block, panels, lines);
    for (int64_t first = 0; first < p.rows; first += kTokenPanel) {
      const int64_t rows = smaller_of(kTokenPanel, p.rows - first);
      const int64_t width = products.step(first);
      const T* from = products.of(first);
      for (int i = 0; i < block.count(); ++i) {
        for (int64_t n = 0; n < rows; ++n) {
          const int64_t r = first + n;
          const T score = swap_score(from[i * width + n], offsets[r]);
          // Written so that NaN goes on.
          if (score > thresholds.get()[r]) continue;
          Swap* list = lists + r * p.count;
          insert(list, p.count, {ordered_bits(static_cast<double>(score)), block.token(i)});
          thresholds.get()[r] = threshold_of<T>(list[p.count - 1]);
        }
      }
    }
  }
}

// ---- for both types ----

void mix_parts(const MixParams& p, int64_t begin, int64_t end) {
  with_type<float, double>(
      p.dtype, [&](auto type) { mix_parts_as<typename decltype(type)::Type>(p, begin, end); });
}

void mix_rows(const MixParams& p, int64_t begin, int64_t end) {
  with_type<float, double>(
      p.dtype, [&](auto type) { mix_rows_as<typename decltype(type)::Type>(p, begin, end); });
}

void states(const UpdateParams& p, void* panels, int64_t begin, int64_t end) {
  with_type<float, double>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    states_as<T>(p, static_cast<T*>(panels), begin, end);
  });
}

void update(const UpdateParams& p, const void* panels, int64_t begin, int64_t end) {
  with_type<float, double>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    update_as<T>(p, static_cast<const T*>(panels), begin, end);
  });
}

void offsets(const SwapParams& p, void* panels, int64_t begin, int64_t end) {
  with_type<float, double>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    offsets_as<T>(p, static_cast<T*>(panels), begin, end);
  });
}

void swaps(const SwapParams& p, const void* panels, Swap* lists, int64_t begin, int64_t end) {
  with_type<float, double>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    swaps_as<T>(p, static_cast<const T*>(panels), lists, begin, end);
  });
}

}  // namespace

extern const TokenKernels kTokenKernels;
const TokenKernels kTokenKernels{mix_parts, mix_rows, states, update, offsets, swaps};

}  // namespace PYDETOX_ISA
}  // namespace pydetox::cpu
