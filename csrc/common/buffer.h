#pragma once

// For the sources that include csrc/common/vec.h.

#include <cstdint>
#include <cstdlib>
#include <new>

namespace pydetox::cpu {
inline namespace PYDETOX_ISA {

// Uninitialised memory for `count` elements, aligned for any vector and padded by one. (Not a
// std::vector: what is compiled out of line of it here could be the copy that the linker keeps for
// code that runs without these instructions.)
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(
            std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

}  // namespace PYDETOX_ISA
}  // namespace pydetox::cpu
