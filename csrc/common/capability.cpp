#include "csrc/common/capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace pydetox::cpu {
namespace {

struct Entry {
  const char* name;
  Capability capability;
  bool (*runs_here)();
};

#ifdef __x86_64__
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

constexpr Entry kEntries[] = {
    {"scalar", Capability::kScalar, [] { return true; }},
#ifdef __x86_64__
#ifdef PYDETOX_TEST_KERNELS
    // The vector width of AVX-512 on AVX2: only tests ask for it, so it stands before the faster
    // avx2.
    {"avx2-wide", Capability::kAvx2Wide, has_avx2},
#endif
    {"avx2", Capability::kAvx2, has_avx2},
    {"avx512", Capability::kAvx512, has_avx512},
#endif
};

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Entry& find(const std::string& name, const std::string& asked_by) {
  for (const Entry& entry : kEntries) {
    if (name != entry.name) continue;
    if (entry.runs_here()) return entry;
    throw std::invalid_argument(asked_by + "='" + name + "': this CPU cannot run it; it can run " +
                                listed(supported_capabilities()));
  }
  throw std::invalid_argument(asked_by + "='" + name +
                              "' is not a CPU capability; expected one of " +
                              listed(supported_capabilities()));
}

const Entry& first_choice() {
  constexpr const char* kVariable = "PYDETOX_CPU_CAPABILITY";
  const char* asked = std::getenv(kVariable);
  if (asked != nullptr && *asked != '\0') return find(asked, kVariable);
  return find(supported_capabilities().back(), "capability");
}

std::atomic<const Entry*>& current() {
  static std::atomic<const Entry*> entry{&first_choice()};
  return entry;
}

}  // namespace

std::vector<std::string> supported_capabilities() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) {
    if (entry.runs_here()) names.emplace_back(entry.name);
  }
  return names;
}

std::string capability_name() { return current().load()->name; }
void set_capability(const std::string& name) { current().store(&find(name, "capability")); }
Capability capability() { return current().load()->capability; }

}  // namespace pydetox::cpu
