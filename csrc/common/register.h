#pragma once

// PYDETOX_SCHEMAS(library) { library.def(...); } and PYDETOX_KERNELS(library) { library.impl(...);
// } of a register.cpp, for the backend that it is compiled for (csrc/common/place.h). Schemas come
// with the CPU's kernels. The emulator has all operators once more, under the same schemas, as
// torch.ops.pydetox_emulator.

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#if defined(PYDETOX_EMULATOR)
#define PYDETOX_SCHEMAS(library) STABLE_TORCH_LIBRARY_FRAGMENT(pydetox_emulator, library)
#define PYDETOX_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(pydetox_emulator, CPU, library)
#elif defined(PYDETOX_CUDA)
#define PYDETOX_SCHEMAS(library)                          \
  [[maybe_unused]] static void schemas_come_with_the_cpu( \
      torch::stable::detail::StableLibrary& library)
#define PYDETOX_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(pydetox, CUDA, library)
#else
#define PYDETOX_SCHEMAS(library) STABLE_TORCH_LIBRARY_FRAGMENT(pydetox, library)
#define PYDETOX_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(pydetox, CPU, library)
#endif
