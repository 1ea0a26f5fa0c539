# The torch that the interpreter sees, without importing it and without find_package(Torch): that one
# wants a full CUDA toolkit whenever torch was built with CUDA.
#
# Defines torch_stable (headers and libraries of the stable ABI), torch_stable_cuda, TORCH_VERSION,
# TORCH_CUDA_VERSION (empty for a CPU torch) and PYDETOX_PYBIND11_DIR.

execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/locate.py"
  OUTPUT_VARIABLE located ERROR_VARIABLE problem RESULT_VARIABLE status
  OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${problem}")
endif()
list(GET located 0 torch_root)
list(GET located 1 TORCH_VERSION)
list(GET located 2 TORCH_CUDA_VERSION)
list(GET located 3 PYDETOX_PYBIND11_DIR)
if(TORCH_CUDA_VERSION STREQUAL "none")
  set(TORCH_CUDA_VERSION "")
endif()
message(STATUS "torch ${TORCH_VERSION} (CUDA: ${TORCH_CUDA_VERSION}) at ${torch_root}")

# One binary runs with this release of torch and later ones.
set(TORCH_TARGET "2.10")
if(TORCH_VERSION VERSION_LESS TORCH_TARGET)
  message(FATAL_ERROR "pydetox needs torch>=${TORCH_TARGET}; ${Python_EXECUTABLE} has ${TORCH_VERSION}")
endif()

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${torch_root}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# Found at run time because torch is imported first; no rpath.
target_link_libraries(torch_stable INTERFACE
  "${torch_root}/lib/libtorch.so" "${torch_root}/lib/libtorch_cpu.so" "${torch_root}/lib/libc10.so")

if(TORCH_CUDA_VERSION)
  add_library(torch_stable_cuda INTERFACE)
  target_compile_definitions(torch_stable_cuda INTERFACE USE_CUDA)
  target_link_libraries(torch_stable_cuda INTERFACE torch_stable "${torch_root}/lib/libtorch_cuda.so")
endif()
