#include "csrc/weights/arguments.h"

#include <utility>

#include "csrc/common/place.h"
#include "csrc/common/tensors.h"

namespace pydetox {

WeightLists::WeightLists(const char* op, const std::vector<Tensor>& base) : op_(op), base_(base) {
  check(!base.empty(), op, ": base must hold at least one tensor");
  first_chunk_.push_back(0);
  for (const auto& tensor : base) {
    counts_.push_back(tensor.numel());
    first_chunk_.push_back(first_chunk_.back() + chunks_of(tensor.numel()));
  }
  add_list("base", base_.data(), false);
}

void WeightLists::add(const char* name, const std::vector<Tensor>& tensors) {
  check(tensors.size() == base_.size(), op_, ": ", name, " must hold ", base_.size(),
        " tensors as base does, found ", tensors.size());
  add_list(name, tensors.data(), false);
}

void WeightLists::add_lists(const char* name, const std::vector<Tensor>& tensors, int64_t count) {
  add_joined(name, tensors, count, false);
}

void WeightLists::add_results(const char* name, const std::vector<Tensor>& tensors, int64_t count) {
  add_joined(name, tensors, count, true);
}

void WeightLists::add_joined(const char* name, const std::vector<Tensor>& tensors, int64_t count,
                             bool written) {
  check(count >= 0 && tensors.size() == base_.size() * static_cast<size_t>(count), op_, ": ", name,
        " must hold ", count, " lists of ", base_.size(), " tensors, found ", tensors.size(),
        " tensors in all");
  for (int64_t i = 0; i < count; ++i) {
    add_list(std::string(name) + "[" + std::to_string(i) + "]",
             tensors.data() + static_cast<size_t>(i) * base_.size(), written);
  }
}

void WeightLists::add_list(const std::string& list_name, const Tensor* tensors, bool is_written) {
  std::vector<Source> list;
  for (size_t i = 0; i < base_.size(); ++i) {
    const Tensor& tensor = tensors[i];
    const auto name = [&] { return list_name + "[" + std::to_string(i) + "]"; };
    check(has_sizes(tensor, sizes_of(base_[i])), op_, ": ", name(), " must be ", ShapeOf{base_[i]},
          " as base[", i, "] is, found ", ShapeOf{tensor});
    const auto type = tensor.scalar_type();
    check(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
              type == ScalarType::Double,
          op_, ": ", name(), " must be float16, bfloat16, float32 or float64, found ",
          name_of(type));
    check_device(op_, name(), tensor, "base[0]", base_.front());
    if (is_written) {
      check(tensor.is_contiguous(), op_, ": ", name(), " must be contiguous");
      owned_.push_back(tensor);
    } else {
      owned_.push_back(torch::stable::contiguous(tensor));
    }
    list.push_back({is_written ? written(owned_.back()) : read(owned_.back()), dtype_of(tensor)});
  }
  lists_.push_back(std::move(list));
}

WeightTable WeightLists::table() {
  sources_.clear();
  for (size_t tensor = 0; tensor < base_.size(); ++tensor) {
    for (const auto& list : lists_) sources_.push_back(list[tensor]);
  }
  const auto lists = static_cast<int64_t>(lists_.size());
  check(!kRunsCuda || lists <= kMaxLists, op_, ": at most ", kMaxLists, " lists on CUDA, found ",
        lists);
  return {static_cast<int64_t>(base_.size()), lists, counts_.data(), first_chunk_.data(),
          sources_.data()};
}

const double* checked_start(const char* op, const std::optional<Tensor>& start,
                            const std::vector<int64_t>& sizes) {
  if (!start) return nullptr;
  check(!kRunsCuda, op, ": sums go on from a start on the CPU alone");
  check(start->scalar_type() == ScalarType::Double && start->is_contiguous() && start->is_cpu() &&
            has_sizes(*start, sizes),
        op, ": start must be contiguous float64 ", SizesOf{sizes}, " on the CPU, found ",
        dtype_name(*start), " ", ShapeOf{*start}, " on ", DeviceOf{*start});
  return read<double>(*start);
}

SketchChunks::SketchChunks(const WeightTable& table, int64_t size,
                           const std::vector<int64_t>& given,
                           const std::optional<std::vector<int64_t>>& first_elements)
    // A chunk's partial sums are `size` numbers: 64 blocks make reading them back a 32nd of the
    // work.
    : blocks_per_chunk(64),
      first_chunk{0},
      first_block(given.size()),
      keys(given.begin(), given.end()) {
  constexpr const char* kOp = "weight_diff_sketch";
  check(size >= 64 && (size & (size - 1)) == 0, kOp,
        ": size must be a power of two, at least 64, found ", size);
  check(static_cast<int64_t>(given.size()) == table.tensors, kOp, ": ", table.tensors,
        " tensors need as many keys, found ", given.size());
  const int64_t elements = blocks_per_chunk * size;
  for (int64_t i = 0; i < table.tensors; ++i) {
    first_chunk.push_back(first_chunk.back() + (table.counts[i] + elements - 1) / elements);
  }
  if (!first_elements) return;
  check(!kRunsCuda, kOp, ": tensors begin at a first element on the CPU alone");
  bool fits = first_elements->size() == given.size();
  for (const int64_t element : *first_elements)
    fits = fits && element >= 0 && element % elements == 0;
  check(fits, kOp, ": first_elements must be ", given.size(), " multiples of ", elements,
        ", found ", SizesOf{*first_elements});
  for (size_t i = 0; i < given.size(); ++i) first_block[i] = (*first_elements)[i] / size;
}

void check_coefficients(const Tensor& coefficients, const Tensor& base, int64_t vectors,
                        int64_t results, int64_t tensors) {
  constexpr const char* kOp = "apply_task_vectors";
  const bool fits =
      (coefficients.dim() == 2 || (coefficients.dim() == 3 && coefficients.size(2) == tensors)) &&
      coefficients.size(0) == results && coefficients.size(1) == vectors;
  check(fits, kOp, ": coefficients must be [", results, ", ", vectors, "] or [", results, ", ",
        vectors, ", ", tensors, "] for ", results, " results, ", vectors, " vectors and ", tensors,
        " tensors, found ", ShapeOf{coefficients});
  check(coefficients.scalar_type() == ScalarType::Double && coefficients.is_contiguous(), kOp,
        ": coefficients must be float64 and contiguous");
  check_device(kOp, "coefficients", coefficients, "base[0]", base);
}

}  // namespace pydetox
