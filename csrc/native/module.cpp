// pydetox._native: what Python needs of the native code that is not a tensor operator.

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <system_error>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "csrc/common/capability.h"
#include "csrc/native/mapped_file.h"

PYBIND11_MODULE(_native, module) {
  namespace py = pybind11;
  module.doc() = "CPU capability in use and how the native code was built.";
  module.def("supported_cpu_capabilities", &pydetox::cpu::supported_capabilities,
             "Names of the CPU capabilities that this build and this CPU have, slowest first.");
  module.def("cpu_capability", &pydetox::cpu::capability_name,
             "The CPU capability in use. ValueError: PYDETOX_CPU_CAPABILITY names no usable one.");
  module.def("set_cpu_capability", &pydetox::cpu::set_capability, py::arg("name"),
             "Change the CPU capability of the process, for tests and benchmarks.");
  module.def(
      "compile_info",
      [] {
        py::dict info;
        info["version"] = PYDETOX_VERSION;
        info["compiler"] = PYDETOX_COMPILER;
        info["build_type"] = PYDETOX_BUILD_TYPE;
        info["torch_target"] = PYDETOX_TORCH_TARGET;
        info["torch_built_with"] = PYDETOX_TORCH_BUILT_WITH;
        info["cuda"] = static_cast<bool>(PYDETOX_WITH_CUDA);
        info["cuda_toolkit"] = PYDETOX_CUDA_TOOLKIT;
        info["cuda_architectures"] = PYDETOX_CUDA_ARCHITECTURES;
        return info;
      },
      "How this build was made.");

  // The damage of one file, shared by all that is mapped of it.
  py::class_<std::atomic<bool>, pydetox::Damage>(
      module, "Damage", "Whether bytes that were mapped could not be read; zeros stand for them.")
      .def(py::init([] { return std::make_shared<std::atomic<bool>>(false); }))
      .def("__bool__", [](const std::atomic<bool>& damage) { return damage.load(); });

  using pydetox::MappedBytes;
  py::class_<MappedBytes>(module, "MappedBytes", py::buffer_protocol(),
                          "Bytes of an open file, mapped as long as this object or a view of its "
                          "buffer lives. OSError: they cannot be mapped.")
      .def(py::init([](int descriptor, std::size_t offset, std::size_t count,
                       const pydetox::Damage& damage) {
             try {
               return std::make_unique<MappedBytes>(descriptor, offset, count, damage);
             } catch (const std::system_error& error) {
               errno = error.code().value();
               PyErr_SetFromErrno(PyExc_OSError);
               throw py::error_already_set();
             }
           }),
           py::arg("descriptor"), py::arg("offset"), py::arg("count"), py::arg("damage"))
      .def_buffer([](const MappedBytes& bytes) {
        return py::buffer_info(static_cast<std::uint8_t*>(const_cast<void*>(bytes.data())),
                               static_cast<py::ssize_t>(bytes.size()), /*readonly=*/true);
      });
}
