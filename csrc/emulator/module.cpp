// pydetox._emulator: CUDA kernels on the CPU, for the tests. Not part of the wheel.

#include "csrc/emulator/module.h"

#include <pybind11/stl.h>

namespace py = pybind11;

namespace pydetox::emulator {

Range range_of(const char* name, const py::array& array, bool writable) {
  if (!(array.flags() & py::array::c_style)) {
    throw py::value_error(std::string(name) + " must be C-contiguous");
  }
  return {name, array.data(), static_cast<std::size_t>(array.nbytes()), writable};
}

}  // namespace pydetox::emulator

PYBIND11_MODULE(_emulator, module) {
  using namespace pydetox::emulator;
  module.doc() = "Runs the CUDA kernels of csrc/cuda on the CPU, one fiber per CUDA thread.";
  py::register_exception<KernelError>(module, "KernelError", PyExc_RuntimeError);

  py::class_<Schedule>(module, "Schedule", "In which order blocks and threads run.")
      .def(py::init([](std::uint64_t seed, int dropped_barrier,
                       std::optional<std::int64_t> only_block, std::size_t cache_bytes) {
             return Schedule{seed, dropped_barrier, only_block, cache_bytes};
           }),
           py::kw_only(), py::arg("seed") = 0, py::arg("dropped_barrier") = kDropNone,
           py::arg("only_block") = py::none(), py::arg("cache_bytes") = 0);
  module.attr("DROP_ALL_BARRIERS") = kDropAll;

  py::class_<Traffic>(module, "Traffic", "What one launch moved through global memory.")
      .def_readonly("loads", &Traffic::loads)
      .def_readonly("stores", &Traffic::stores)
      .def_readonly("bytes_loaded", &Traffic::bytes_loaded)
      .def_readonly("bytes_stored", &Traffic::bytes_stored)
      .def_readonly("dram_bytes_read", &Traffic::dram_bytes_read)
      .def_readonly("barriers", &Traffic::barriers);

  bind_self_test(module);
  bind_objectives(module);
  bind_stamp_triggers(module);
  bind_trigger_update(module);
  bind_weights(module);
}
