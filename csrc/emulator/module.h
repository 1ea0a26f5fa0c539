#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "csrc/emulator/cuda_on_host.h"

namespace pydetox::emulator {

// The bytes of a C-contiguous array, as global memory that a kernel may read, or write too.
Range range_of(const char* name, const pybind11::array& array, bool writable);

void bind_self_test(pybind11::module_& module);

}  // namespace pydetox::emulator
