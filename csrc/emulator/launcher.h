#pragma once

// What the launch functions of csrc/cuda are given to launch with: runs each kernel, and adds up
// what it moves.

#include <string>
#include <utility>
#include <vector>

#include "csrc/cuda/grid.h"
#include "csrc/emulator/cuda_on_host.h"

namespace pydetox::emulator {

struct Launcher {
  std::string name;
  std::vector<Range> memory;
  const Schedule& schedule;
  std::vector<Traffic>& traffic;

  template <class Params>
  bool operator()(void (*kernel)(Params), const Params& params,
                  const cuda::LaunchShape& shape) const {
    if (shape.blocks == 0) return true;
    Launch launch;
    launch.kernel = name + ", launch " + std::to_string(traffic.size());
    launch.grid.x = static_cast<unsigned>(shape.blocks);
    launch.block.x = static_cast<unsigned>(shape.threads);
    launch.shared_bytes = static_cast<std::size_t>(shape.shared_bytes);
    launch.memory = memory;
    traffic.push_back(emulate(launch, schedule, [&] { kernel(params); }));
    return true;
  }
};

}  // namespace pydetox::emulator
