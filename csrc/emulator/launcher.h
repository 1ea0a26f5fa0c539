#pragma once

// The emulator's counterpart of csrc/common/launcher.h: runs each kernel, and notes what it moves.

#include <utility>

#include "csrc/common/grid.h"
#include "csrc/emulator/session.h"

namespace pydetox::cuda {

struct Launcher {
  template <class Params>
  bool operator()(void (*kernel)(Params), const Params& params, const LaunchShape& shape) const {
    static_assert(sizeof(Params) <= 4096, "kernel parameters have 4 KiB");
    if (shape.blocks == 0) return true;
    emulator::Session& session = emulator::session();
    emulator::Launch launch;
    launch.kernel = "launch " + std::to_string(session.traffic.size());
    launch.grid.x = static_cast<unsigned>(shape.blocks);
    launch.block.x = static_cast<unsigned>(shape.threads);
    launch.shared_bytes = static_cast<std::size_t>(shape.shared_bytes);
    launch.memory = session.memory;
    try {
      emulator::Traffic traffic;
      if (!session.schedule.dry) {
        traffic = emulator::emulate(launch, session.schedule, [&] { kernel(params); });
      }
      traffic.blocks = shape.blocks;
      traffic.threads = shape.threads;
      traffic.shared_bytes = shape.shared_bytes;
      session.traffic.push_back(std::move(traffic));
    } catch (const emulator::KernelError& error) {
      session.error = error;  // torch would make another exception of it
      throw;
    }
    return true;
  }
};

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

template <class Run>
int with_launcher(void*, const Run& run) {
  return run(Launcher{}) ? 0 : kInvalidValue;
}

}  // namespace pydetox::cuda
