#include "csrc/native/mapped_file.h"

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

namespace pydetox {
namespace {

// What the handler reads: nothing that takes a lock. begin is 0 in a slot that is free.
struct Slot {
  std::atomic<std::uintptr_t> begin, end;
  std::atomic<std::atomic<bool>*> damaged;
};
constexpr int kSlots = 1 << 16;  // no process may have more mappings by default
static_assert(std::atomic<std::uintptr_t>::is_always_lock_free);
static_assert(std::atomic<std::atomic<bool>*>::is_always_lock_free);

Slot slots[kSlots];
std::atomic<int> slots_used{0};  // slots from here on were never taken
std::mutex free_slots_mutex;
std::vector<int> free_slots;
struct sigaction handler_before;
const auto page_size = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));

std::uintptr_t page_of(std::uintptr_t address) { return address / page_size * page_size; }

// Zeros from the page of `address` on, to the end of the mapping that it is in.
bool mend(std::uintptr_t address) {
  const int used = slots_used;
  for (int i = 0; i < used; ++i) {
    const std::uintptr_t begin = slots[i].begin, end = slots[i].end;
    if (begin == 0 || address < begin || address >= end) continue;
    *slots[i].damaged.load() = true;
    return mmap(reinterpret_cast<void*>(page_of(address)), end - page_of(address), PROT_READ,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
  }
  return false;
}

void on_sigbus(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  const bool from_memory = info->si_code > 0;  // not sent by a process
  const bool mended = from_memory && mend(reinterpret_cast<std::uintptr_t>(info->si_addr));
  errno = error;
  if (mended) return;
  if ((handler_before.sa_flags & SA_SIGINFO) != 0) {
    handler_before.sa_sigaction(signal, info, context);
  } else if (handler_before.sa_handler != SIG_DFL && handler_before.sa_handler != SIG_IGN) {
    handler_before.sa_handler(signal);
  } else {
    // Ends the process: when the instruction runs again, or by the signal itself.
    sigaction(SIGBUS, &handler_before, nullptr);
    if (!from_memory) raise(signal);
  }
}

// Once, for good: whoever installs a handler later may call this one from it.
void install_handler() {
  static const int failure = [] {
    struct sigaction action{};
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, &handler_before) == 0 ? 0 : errno;
  }();
  if (failure != 0) throw std::system_error(failure, std::generic_category(), "sigaction");
}

int take_slot() {
  const std::lock_guard<std::mutex> lock(free_slots_mutex);
  if (!free_slots.empty()) {
    const int slot = free_slots.back();
    free_slots.pop_back();
    return slot;
  }
  if (slots_used == kSlots) throw std::system_error(ENOMEM, std::generic_category(), "mmap");
  return slots_used++;
}

void release_slot(int slot) {
  const std::lock_guard<std::mutex> lock(free_slots_mutex);
  free_slots.push_back(slot);
}

}  // namespace

MappedBytes::MappedBytes(int descriptor, std::size_t offset, std::size_t count, Damage damage)
    : damage_(std::move(damage)), size_(count) {
  if (count == 0) return;
  install_handler();
  const std::size_t first = page_of(offset);
  mapped_ = offset + count - first;
  slot_ = take_slot();
  pages_ = mmap(nullptr, mapped_, PROT_READ, MAP_SHARED, descriptor, static_cast<off_t>(first));
  if (pages_ == MAP_FAILED) {
    const int error = errno;
    release_slot(slot_);
    throw std::system_error(error, std::generic_category(), "mmap");
  }
  // What is not in memory yet is read ahead of where it is touched.
  madvise(pages_, mapped_, MADV_SEQUENTIAL);
  data_ = static_cast<const char*>(pages_) + (offset - first);
  const auto begin = reinterpret_cast<std::uintptr_t>(pages_);
  slots[slot_].damaged = damage_.get();
  slots[slot_].end = page_of(begin + mapped_ + page_size - 1);
  slots[slot_].begin = begin;
}

MappedBytes::~MappedBytes() {
  if (slot_ < 0) return;
  // First: the addresses may be somebody else's as soon as they are unmapped.
  slots[slot_].begin = 0;
  munmap(pages_, mapped_);
  release_slot(slot_);
}

}  // namespace pydetox
