#include "csrc/ops/weights_arguments.h"

#include <torch/csrc/stable/ops.h>

#include "csrc/ops/check.h"

namespace pydetox::ops {
namespace {

DType weight_dtype(const char* op, const char* name, size_t index, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      check(false, op, ": ", name, " tensor ", index,
            " must be float16, bfloat16, float32 or float64");
      return DType::kFloat32;
  }
}

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

}  // namespace

WeightLists::WeightLists(const char* op, const std::vector<Tensor>& base) : op_(op), base_(base) {
  check(!base.empty(), op, ": base must hold at least one tensor");
  first_chunk_.push_back(0);
  for (const auto& tensor : base) {
    counts_.push_back(tensor.numel());
    first_chunk_.push_back(first_chunk_.back() + chunks_of(tensor.numel()));
  }
  add_list("base", base_.data(), false);
}

void WeightLists::add(const char* name, const std::vector<Tensor>& tensors, int64_t count) {
  check(count >= 0 && tensors.size() == base_.size() * static_cast<size_t>(count), op_, ": ", name,
        " must hold ", count, " lists of ", base_.size(), " tensors, not ", tensors.size(),
        " tensors in all");
  for (int64_t i = 0; i < count; ++i) {
    add_list(name, tensors.data() + static_cast<size_t>(i) * base_.size(), false);
  }
}

void WeightLists::add_results(const char* name, const std::vector<Tensor>& tensors, int64_t count) {
  check(count >= 0 && tensors.size() == base_.size() * static_cast<size_t>(count), op_, ": ", name,
        " must hold ", count, " lists of ", base_.size(), " tensors, not ", tensors.size(),
        " tensors in all");
  for (int64_t i = 0; i < count; ++i) {
    add_list(name, tensors.data() + static_cast<size_t>(i) * base_.size(), true);
  }
}

void WeightLists::add_list(const char* name, const Tensor* tensors, bool written) {
  std::vector<Source> list;
  for (size_t i = 0; i < base_.size(); ++i) {
    const Tensor& tensor = tensors[i];
    check(same_shape(tensor, base_[i]), op_, ": ", name, " tensor ", i, " has shape ",
          ShapeOf{tensor}, ", base has ", ShapeOf{base_[i]});
    check(tensor.device() == base_.front().device(), op_, ": ", name, " tensor ", i,
          " is on another device than base");
    const DType dtype = weight_dtype(op_, name, i, tensor);
    if (written) {
      check(tensor.is_contiguous(), op_, ": ", name, " tensor ", i, " must be contiguous");
      owned_.push_back(tensor);
    } else {
      owned_.push_back(torch::stable::contiguous(tensor));
    }
    list.push_back({owned_.back().const_data_ptr(), dtype});
  }
  lists_.push_back(std::move(list));
}

WeightTable WeightLists::table() {
  sources_.clear();
  for (size_t tensor = 0; tensor < base_.size(); ++tensor) {
    for (const auto& list : lists_) sources_.push_back(list[tensor]);
  }
  return {static_cast<int64_t>(base_.size()), static_cast<int64_t>(lists_.size()), counts_.data(),
          first_chunk_.data(), sources_.data()};
}

void unpack_symmetric(const double* pairs, int64_t n, double* matrix) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) matrix[i * n + j] = matrix[j * n + i] = *pairs++;
  }
}

void pack_symmetric(const double* matrix, int64_t n, double* pairs) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) *pairs++ = matrix[i * n + j];
  }
}

void check_start(const char* op, const std::optional<Tensor>& start,
                 const std::vector<int64_t>& sizes) {
  if (!start) return;
  bool fits = start->scalar_type() == ScalarType::Double && start->is_contiguous() &&
              start->is_cpu() && start->dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = start->size(static_cast<int64_t>(i)) == sizes[i];
  }
  check(fits, op, ": start must be contiguous float64 on the CPU, of the result's shape, not ",
        ShapeOf{*start});
}

SketchChunks sketch_chunks(const WeightTable& table, int64_t size, size_t keys) {
  check(size >= 64 && (size & (size - 1)) == 0,
        "weight_diff_sketch: size must be a power of two, at least 64, not ", size);
  check(keys == static_cast<size_t>(table.tensors), "weight_diff_sketch: ", table.tensors,
        " tensors need as many keys, not ", keys);
  SketchChunks chunks{};
  // A chunk's partial sums are `size` numbers: 64 blocks make reading them back a 32nd of the work.
  chunks.blocks_per_chunk = 64;
  chunks.first_chunk.push_back(0);
  const int64_t elements = chunks.blocks_per_chunk * size;
  for (int64_t i = 0; i < table.tensors; ++i) {
    chunks.first_chunk.push_back(chunks.first_chunk.back() +
                                 (table.counts[i] + elements - 1) / elements);
  }
  return chunks;
}

void check_coefficients(const Tensor& coefficients, const Tensor& base, int64_t vectors,
                        int64_t results, int64_t tensors) {
  check(coefficients.scalar_type() == ScalarType::Double && coefficients.is_contiguous(),
        "apply_task_vectors: coefficients must be float64 and contiguous");
  check(coefficients.device() == base.device(),
        "apply_task_vectors: coefficients must be on the device of base");
  const bool fits =
      (coefficients.dim() == 2 || (coefficients.dim() == 3 && coefficients.size(2) == tensors)) &&
      coefficients.size(0) == results && coefficients.size(1) == vectors;
  check(fits, "apply_task_vectors: coefficients must be [", results, ", ", vectors, "] or [",
        results, ", ", vectors, ", ", tensors, "], not ", ShapeOf{coefficients});
}

}  // namespace pydetox::ops
