#pragma once

// From lists of tensors, as state dicts hold them, to kernel parameters, with every check that
// keeps a kernel from reading what is not there.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "csrc/common/check.h"
#include "csrc/weights/core.h"

namespace pydetox {

// Lists of the same tensors, and what owns the memory that the table points to: a tensor that is
// not contiguous is copied, that one alone.
class WeightLists {
 public:
  // op: for messages. base: the list whose shapes all others must have; at least one tensor.
  WeightLists(const char* op, const std::vector<Tensor>& base);

  // One more list.
  void add(const char* name, const std::vector<Tensor>& tensors);
  // `count` more lists, one after the other in `tensors`.
  void add_lists(const char* name, const std::vector<Tensor>& tensors, int64_t count);
  // The same for lists that are written to: they must be contiguous already.
  void add_results(const char* name, const std::vector<Tensor>& tensors, int64_t count);

  WeightTable table();  // points into this object
  const Tensor& first() const { return base_.front(); }

 private:
  void add_list(const std::string& name, const Tensor* tensors, bool written);
  void add_joined(const char* name, const std::vector<Tensor>& tensors, int64_t count,
                  bool written);

  const char* op_;
  std::vector<Tensor> base_;  // as given
  std::vector<Tensor> owned_;
  std::vector<std::vector<Source>> lists_;
  std::vector<int64_t> counts_, first_chunk_;
  std::vector<Source> sources_;  // [tensors, lists]
};

// What sums go on from: float64, on the CPU, of the result's shape; null where there is none. Parts
// of weights are for files, and files for the CPU: CUDA refuses it.
const double* checked_start(const char* op, const std::optional<Tensor>& start,
                            const std::vector<int64_t>& sizes);

// The chunks of a sketch: whole blocks of `size` elements, about as large as any chunk.
struct SketchChunks {
  SketchChunks(const WeightTable& table, int64_t size, const std::vector<int64_t>& keys,
               const std::optional<std::vector<int64_t>>& first_elements);

  int64_t blocks_per_chunk;
  std::vector<int64_t> first_chunk;  // [tensors + 1]
  std::vector<int64_t> first_block;  // [tensors]
  std::vector<uint64_t> keys;        // [tensors]
};

void check_coefficients(const Tensor& coefficients, const Tensor& base, int64_t vectors,
                        int64_t results, int64_t tensors);

}  // namespace pydetox
