# What the targets of CMakeLists.txt have in common.

# No -march=native: the build machine does not decide where the result runs. No -ffast-math, and no
# contraction of a * b + c to one rounding: every instruction set and the GPU give the same bits.
add_library(pydetox_options INTERFACE)
target_include_directories(pydetox_options INTERFACE "${PROJECT_SOURCE_DIR}")
target_compile_options(pydetox_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off -Wall -Wextra $<$<BOOL:${PYDETOX_WERROR}>:-Werror>>
  $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false --threads=0 -Xcompiler=-Wall>)

# A library that registers operators with torch when it is loaded. Not a Python module: one file serves
# every Python version.
function(pydetox_torch_library name)
  add_library(${name} SHARED ${ARGN})
  target_link_libraries(${name} PRIVATE pydetox_options torch_stable)
  set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX ".so" SKIP_BUILD_RPATH ON)
  if(PYDETOX_EMULATOR)
    target_compile_definitions(${name} PRIVATE PYDETOX_TEST_KERNELS)
  endif()
  install(TARGETS ${name} LIBRARY DESTINATION . COMPONENT pydetox)
endfunction()

# The CPU kernels for one instruction set: its name, bytes per vector (0: none), its flags.
function(pydetox_cpu_kernels isa vec_bytes)
  add_library(cpu_kernels_${isa} OBJECT ${cpu_kernel_sources})
  target_link_libraries(cpu_kernels_${isa} PRIVATE pydetox_options)
  target_compile_options(cpu_kernels_${isa} PRIVATE ${ARGN} -O3 -Wno-psabi)
  target_compile_definitions(cpu_kernels_${isa} PRIVATE
    PYDETOX_ISA=${isa} PYDETOX_VEC_BYTES=${vec_bytes})
  set(cpu_kernel_targets ${cpu_kernel_targets} cpu_kernels_${isa} PARENT_SCOPE)
endfunction()
