#include "csrc/emulator/session.h"

#include <utility>

namespace pydetox::emulator {
namespace {

std::optional<Session> current;

}  // namespace

Session& session() {
  if (!current) throw KernelError("the emulator runs operators between begin() and end() alone");
  return *current;
}

void begin(const Schedule& schedule) { current = Session{schedule, {}, {}, std::nullopt}; }

std::vector<Traffic> end() {
  Session ended = std::move(session());
  current.reset();
  if (ended.error) throw *ended.error;
  return std::move(ended.traffic);
}

void allow(const void* begin, std::size_t bytes, bool writable) {
  if (bytes == 0) return;
  auto& memory = session().memory;
  memory.push_back({"tensor " + std::to_string(memory.size()), begin, bytes, writable});
}

}  // namespace pydetox::emulator
