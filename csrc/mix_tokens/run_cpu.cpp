// Searches for tokens on the CPU: parts and runs of the table, shared out over threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "csrc/common/cpu_kernels.h"
#include "csrc/common/share_out.h"
#include "csrc/mix_tokens/cpu.h"

namespace pydetox::cpu {

PYDETOX_DEFINE_KERNELS(TokenKernels, token_kernels, kTokenKernels)

}  // namespace pydetox::cpu

namespace pydetox {
namespace {

// Runs whose lists of candidates are filled at a time.
constexpr int64_t kSwapRuns = 16;
// Rows whose sums over the parts are worth a thread.
constexpr int64_t kRowGrain = 1;

// Memory for the panels, aligned for whole vectors; zeros, for the lanes beyond the last row.
class Panels {
 public:
  Panels(const TokenTable& table, DType dtype, int64_t rows)
      : memory_(static_cast<size_t>(cpu::panel_elements(table, rows) * size_of(dtype)) + kAligned) {
  }
  void* data() {
    const auto begin = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (kAligned - begin % kAligned) % kAligned;
  }

 private:
  static constexpr size_t kAligned = 64;
  std::vector<char> memory_;
};

template <class T>
void store_swap(const SwapParams& p, int64_t i, const Swap& found) {
  const SwapResult<T> result = swap_result<T>(found);
  static_cast<T*>(p.scores)[i] = result.score;
  p.tokens[i] = result.token;
}

}  // namespace

int run_mix_tokens(const MixParams& params, void*) {
  const auto& kernels = cpu::token_kernels();
  MixParams p = params;
  for (p.first_row = 0; p.first_row < p.rows; p.first_row += kTokenRows) {
    cpu::share_out(p.table.parts(),
                   [&](int64_t begin, int64_t end) { kernels.mix_parts(p, begin, end); });
    torch::stable::parallel_for(0, p.block_rows(), kRowGrain, [&](int64_t begin, int64_t end) {
      kernels.mix_rows(p, begin, end);
    });
  }
  return 0;
}

int run_mix_tokens_update(const UpdateParams& params, void*) {
  const auto& kernels = cpu::token_kernels();
  if (params.rows == 0) return 0;
  Panels panels(params.table, params.dtype, params.rows);
  torch::stable::parallel_for(0, params.rows, kRowGrain, [&](int64_t begin, int64_t end) {
    kernels.states(params, panels.data(), begin, end);
  });
  cpu::share_out(params.table.runs(), [&](int64_t begin, int64_t end) {
    kernels.update(params, panels.data(), begin, end);
  });
  return 0;
}

int64_t swap_slices(const TokenTable&, int64_t, int64_t) { return 0; }

int run_top_swaps(const SwapParams& params, void*) {
  const auto& kernels = cpu::token_kernels();
  const int64_t rows = params.rows, count = params.count;
  if (rows == 0) return 0;
  Panels panels(params.table, params.dtype, rows);
  torch::stable::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    kernels.offsets(params, panels.data(), begin, end);
  });
  // The k best of all are the k best of the threads' lists, whoever took which run.
  const int64_t chunks = token_ceil(params.table.runs(), kSwapRuns);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), chunks);
  const auto of_list = static_cast<size_t>(rows * count);
  std::vector<std::vector<Swap>> lists(static_cast<size_t>(threads));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      auto& own = lists[static_cast<size_t>(thread)];
      own.assign(of_list, no_swap());
      for (int64_t chunk = next.fetch_add(1); chunk < chunks; chunk = next.fetch_add(1)) {
        kernels.swaps(params, panels.data(), own.data(), chunk * kSwapRuns,
                      std::min((chunk + 1) * kSwapRuns, params.table.runs()));
      }
    }
  });
  std::vector<Swap> all;
  for (int64_t r = 0; r < rows; ++r) {
    all.clear();
    for (const auto& list : lists) {
      all.insert(all.end(), list.begin() + r * count, list.begin() + (r + 1) * count);
    }
    std::sort(all.begin(), all.end(), before);
    for (int64_t i = 0; i < count; ++i) {
      const Swap& found = all[static_cast<size_t>(i)];
      if (params.dtype == DType::kFloat64) {
        store_swap<double>(params, r * count + i, found);
      } else {
        store_swap<float>(params, r * count + i, found);
      }
    }
  }
  return 0;
}

}  // namespace pydetox
