#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace pydetox::cpu {

// A few chunks at a time, to whoever is free: chunks of small tensors are small, and a call over
// parts of files, with ten chunks in all, has no large numbers to even that out.
template <class Work>
void share_out(int64_t chunks, const Work& work) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t run = std::max<int64_t>(1, chunks / (16 * threads));
  std::atomic<int64_t> next{0};
  const auto take = [&](int64_t, int64_t) {
    for (int64_t begin = next.fetch_add(run); begin < chunks; begin = next.fetch_add(run)) {
      work(begin, std::min(begin + run, chunks));
    }
  };
  torch::stable::parallel_for(0, std::min(chunks, threads), 1, take);
}

}  // namespace pydetox::cpu
