// pydetox._emulator: CUDA kernels on the CPU, for the tests. Not part of the wheel.
//
// No operator has bindings here. The operators' register.cpp and .cu, compiled for the emulator,
// register them with torch under their own schemas (csrc/common/register.h).

#include "csrc/emulator/module.h"

#include <pybind11/stl.h>

#include "csrc/emulator/session.h"

namespace py = pybind11;

namespace pydetox::emulator {

Range range_of(const char* name, const py::array& array, bool writable) {
  if (!(array.flags() & py::array::c_style)) {
    throw py::value_error(std::string(name) + " must be C-contiguous");
  }
  return {name, array.data(), static_cast<std::size_t>(array.nbytes()), writable};
}

namespace {

py::tuple run(const std::string& name, const py::args& arguments, const py::kwargs& options) {
  const py::object operators = py::module_::import("torch").attr("ops").attr("pydetox_emulator");
  const py::object call = operators.attr(name.c_str()).attr("default");
  begin(options.contains("schedule") ? options["schedule"].cast<Schedule>() : Schedule{});
  try {
    const py::object result = call(*arguments);
    return py::make_tuple(result, py::cast(end()));
  } catch (const py::error_already_set&) {
    end();  // a kernel's own error says more
    throw;
  }
}

}  // namespace
}  // namespace pydetox::emulator

PYBIND11_MODULE(_emulator, module) {
  using namespace pydetox::emulator;
  module.doc() = "Runs the CUDA kernels of csrc/cuda on the CPU, one fiber per CUDA thread.";
  py::register_exception<KernelError>(module, "KernelError", PyExc_RuntimeError);

  py::class_<Schedule>(module, "Schedule", "In which order blocks and threads run.")
      .def(py::init([](std::uint64_t seed, int dropped_barrier,
                       std::optional<std::int64_t> only_block, std::size_t cache_bytes, bool dry) {
             return Schedule{seed, dropped_barrier, only_block, cache_bytes, dry};
           }),
           py::kw_only(), py::arg("seed") = 0, py::arg("dropped_barrier") = kDropNone,
           py::arg("only_block") = py::none(), py::arg("cache_bytes") = 0, py::arg("dry") = false);
  module.attr("DROP_ALL_BARRIERS") = kDropAll;

  py::class_<Traffic>(module, "Traffic", "One launch, and what it moved through global memory.")
      .def(py::init<>())
      .def_readonly("blocks", &Traffic::blocks)
      .def_readonly("threads", &Traffic::threads)
      .def_readonly("shared_bytes", &Traffic::shared_bytes)
      .def_readonly("loads", &Traffic::loads)
      .def_readonly("stores", &Traffic::stores)
      .def_readonly("bytes_loaded", &Traffic::bytes_loaded)
      .def_readonly("bytes_stored", &Traffic::bytes_stored)
      .def_readonly("dram_bytes_read", &Traffic::dram_bytes_read)
      .def_readonly("barriers", &Traffic::barriers);

  module.def("run", &run,
             "run(operator, *arguments, schedule=Schedule()): call an operator of "
             "torch.ops.pydetox_emulator; returns its result and its launches. KernelError: what "
             "ended one of them.");

  bind_self_test(module);
}
