#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "csrc/emulator/cuda_on_host.h"

namespace pydetox::emulator {

// The bytes of a C-contiguous array, as global memory that a kernel may read, or write too.
Range range_of(const char* name, const pybind11::array& array, bool writable);

void bind_self_test(pybind11::module_& module);
void bind_objectives(pybind11::module_& module);
void bind_stamp_triggers(pybind11::module_& module);
void bind_trigger_update(pybind11::module_& module);
void bind_weights(pybind11::module_& module);

}  // namespace pydetox::emulator
