#pragma once

// What happens between begin() and end(): one call of an operator of torch.ops.pydetox_emulator.

#include <cstddef>
#include <vector>

#include "csrc/emulator/cuda_on_host.h"

namespace pydetox::emulator {

struct Session {
  Schedule schedule;
  std::vector<Range> memory;     // of all tensors that the operator has handed to kernels
  std::vector<Traffic> traffic;  // of each launch
  std::optional<KernelError> error;
};

// The session that runs; KernelError where none does.
Session& session();

void begin(const Schedule& schedule);
// What the launches moved; throws the error of a kernel.
std::vector<Traffic> end();

// Memory that kernels of this session may read, or write too.
void allow(const void* begin, std::size_t bytes, bool writable);

}  // namespace pydetox::emulator
