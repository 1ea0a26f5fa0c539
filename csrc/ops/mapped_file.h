#pragma once

// A file mapped to be read, in a way that a file which shrinks meanwhile cannot end the process.
//
// A page of a mapping that the file no longer reaches, or that the disk cannot read, raises SIGBUS
// when it is touched. While any file is mapped, the process's handler of SIGBUS puts zeros in the
// place of what is gone and marks the file as damaged, whoever maps it asks for that before a
// result counts. Any other SIGBUS goes where it went before.

#include <cstddef>

namespace pydetox {

class MappedFile {
 public:
  // The first `size` bytes of an open file; the descriptor may be closed afterwards.
  // std::system_error: it cannot be mapped.
  MappedFile(int descriptor, std::size_t size);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const void* data() const { return data_; }
  std::size_t size() const { return size_; }
  // Whether any of it could not be read.
  bool damaged() const;
  // Gives the memory behind these bytes back (whole pages, so a little more than that); they can
  // be read again.
  void discard(std::size_t begin, std::size_t count) const;

 private:
  void* data_ = nullptr;
  std::size_t size_;
  int slot_ = -1;  // in the handler's table
};

}  // namespace pydetox
