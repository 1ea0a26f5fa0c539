#pragma once

// Parts of a file mapped to be read, in a way that a file which shrinks meanwhile cannot end the
// process.
//
// A mapped page that the file no longer reaches, or that the disk cannot read, raises SIGBUS when
// it is touched. The handler that is installed with the first mapping puts zeros in the place of
// what is gone and marks the file as damaged; whoever reads it asks for that before a result
// counts. Any other SIGBUS goes where it went before.

#include <atomic>
#include <cstddef>
#include <memory>

namespace pydetox {

// Set from a signal handler, by any mapping of one file.
using Damage = std::shared_ptr<std::atomic<bool>>;

// `count` bytes of an open file from `offset` on. Small windows, not the whole file: what is
// touched counts as memory of the process, and touching one byte maps up to 2 MiB around it, but
// never more than the mapping.
class MappedBytes {
 public:
  // std::system_error: they cannot be mapped.
  MappedBytes(int descriptor, std::size_t offset, std::size_t count, Damage damage);
  ~MappedBytes();
  MappedBytes(const MappedBytes&) = delete;
  MappedBytes& operator=(const MappedBytes&) = delete;

  const void* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  Damage damage_;
  void* pages_ = nullptr;  // the mapping begins at a page, the bytes somewhere in it
  std::size_t mapped_ = 0;
  const void* data_ = nullptr;
  std::size_t size_;
  int slot_ = -1;  // in the handler's table
};

}  // namespace pydetox
