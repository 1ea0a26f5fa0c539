#include "csrc/ops/mapped_file.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <mutex>
#include <system_error>

#include <sys/mman.h>
#include <unistd.h>

namespace pydetox {
namespace {

// What the handler reads: nothing that takes a lock. begin is 0 in a slot that is free.
struct Slot {
  std::atomic<std::uintptr_t> begin, end;
  std::atomic<bool> damaged;
};
constexpr int kSlots = 4096;
static_assert(std::atomic<std::uintptr_t>::is_always_lock_free);

Slot slots[kSlots];
std::mutex slots_mutex;
struct sigaction handler_before;
const auto page_size = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));

// Zeros from the page of `address` on, to the end of the mapping that it is in.
bool mend(std::uintptr_t address) {
  for (auto& slot : slots) {
    const std::uintptr_t begin = slot.begin.load(), end = slot.end.load();
    if (begin == 0 || address < begin || address >= end) continue;
    const std::uintptr_t page = address / page_size * page_size;
    slot.damaged = true;
    return mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
  }
  return false;
}

void on_sigbus(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  // Not one that a process sent.
  const bool from_memory = info->si_code > 0;
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
  static const bool installed = [] {
    struct sigaction action{};
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, &handler_before) == 0;
  }();
  if (!installed) throw std::system_error(errno, std::generic_category(), "sigaction");
}

int take_slot(std::uintptr_t begin, std::uintptr_t end) {
  const std::lock_guard<std::mutex> lock(slots_mutex);
  for (int i = 0; i < kSlots; ++i) {
    if (slots[i].begin != 0) continue;
    slots[i].damaged = false;
    slots[i].end = end;
    slots[i].begin = begin;
    return i;
  }
  return -1;
}

}  // namespace

MappedFile::MappedFile(int descriptor, std::size_t size) : size_(size) {
  if (size == 0) return;
  install_handler();
  data_ = mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0);
  if (data_ == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  const auto begin = reinterpret_cast<std::uintptr_t>(data_);
  slot_ = take_slot(begin, begin + (size + page_size - 1) / page_size * page_size);
  if (slot_ < 0) {
    munmap(data_, size);
    throw std::system_error(EMFILE, std::generic_category(), "mmap");
  }
  // Files that are not in memory yet are read ahead of where they are touched.
  madvise(data_, size, MADV_SEQUENTIAL);
}

MappedFile::~MappedFile() {
  if (slot_ < 0) return;
  // First: the addresses may be somebody else's as soon as they are unmapped.
  slots[slot_].begin = 0;
  munmap(data_, size_);
}

bool MappedFile::damaged() const { return slot_ >= 0 && slots[slot_].damaged; }

void MappedFile::discard(std::size_t begin, std::size_t count) const {
  if (count == 0 || begin >= size_) return;
  const std::size_t from = begin / page_size * page_size;
  const std::size_t to = std::min(size_, begin + std::min(count, size_ - begin));
  madvise(static_cast<char*>(data_) + from, to - from, MADV_DONTNEED);
}

}  // namespace pydetox
