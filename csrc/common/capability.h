#pragma once

// Which instruction set the CPU kernels use: the best this CPU has, or what the environment
// variable PYDETOX_CPU_CAPABILITY asks for.

#include <string>
#include <vector>

namespace pydetox::cpu {

enum class Capability { kScalar, kAvx2, kAvx2Wide, kAvx512 };

#define PYDETOX_EXPORT __attribute__((visibility("default")))

// Names that this build knows and this CPU can run, slowest first.
PYDETOX_EXPORT std::vector<std::string> supported_capabilities();

// The capability in use. The first call reads PYDETOX_CPU_CAPABILITY; std::invalid_argument for a
// name that is unknown or that this CPU cannot run.
PYDETOX_EXPORT std::string capability_name();

// Changes the capability for the whole process (tests and benchmarks; not while an operator runs).
PYDETOX_EXPORT void set_capability(const std::string& name);

Capability capability();

}  // namespace pydetox::cpu
