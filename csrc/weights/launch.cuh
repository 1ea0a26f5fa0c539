#pragma once

// From a table of weights to launches: which tensors travel together, on what grid.

#include <cstdint>

#include "csrc/weights/cuda.cuh"

namespace pydetox::cuda {

template <class Visit>
bool for_type(DType dtype, const Visit& visit) {
  bool done = false;
  with_type<double, float, BFloat16, Float16>(dtype, [&](auto type) { done = visit(type); });
  return done;
}

// visit(TypeTag of the dtype of all lists, or of Mixed; WeightBatch; chunks of it), for tensors of
// one kind at a time. false where one tensor's lists do not fit into a launch.
template <class Visit>
bool for_each_batch(const WeightTable& table, const int64_t* first_chunk, const Visit& visit) {
  if (table.lists > kMaxLists) return false;
  const int64_t fitting = kMaxLists / table.lists;
  const int64_t most = fitting < kMaxTensors ? fitting : kMaxTensors;
  const auto is_of = [&](int64_t tensor, DType dtype) {
    for (int64_t list = 0; list < table.lists; ++list) {
      if (table.source(tensor, list).dtype != dtype) return false;
    }
    return true;
  };
  const auto launch_all = [&](auto type, const auto& wanted) {
    for (int64_t next = 0; next < table.tensors;) {
      WeightBatch batch{};
      batch.lists = static_cast<int32_t>(table.lists);
      int64_t chunks = 0;
      for (; next < table.tensors && batch.tensors < most; ++next) {
        if (table.counts[next] == 0 || !wanted(next)) continue;
        const int32_t t = batch.tensors++;
        batch.tensor[t] = static_cast<int32_t>(next);
        batch.counts[t] = table.counts[next];
        batch.first_chunk[t] = chunks;
        batch.table_chunk[t] = first_chunk[next];
        chunks += first_chunk[next + 1] - first_chunk[next];
        for (int64_t list = 0; list < table.lists; ++list) {
          batch.data[t * table.lists + list] = table.source(next, list).data;
          batch.dtypes[t * table.lists + list] =
              static_cast<uint8_t>(table.source(next, list).dtype);
        }
      }
      batch.first_chunk[batch.tensors] = chunks;
      if (chunks > 0 && !visit(type, batch, chunks)) return false;
    }
    return true;
  };
  constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  for (const DType dtype : kDTypes) {
    const bool done = for_type(dtype, [&](auto type) {
      return launch_all(type, [&](int64_t tensor) { return is_of(tensor, dtype); });
    });
    if (!done) return false;
  }
  return launch_all(TypeTag<Mixed>{}, [&](int64_t tensor) {
    for (const DType dtype : kDTypes) {
      if (is_of(tensor, dtype)) return false;
    }
    return true;
  });
}

constexpr int64_t kWarps = kWeightThreads / kWarpSize;

// launch(kernel, parameters, LaunchShape) -> bool.
template <class Launch>
bool launch_sum(const double* partials, int64_t chunks, int64_t values, double* sums,
                const Launch& launch) {
  const SumParams params{partials, chunks, values, sums};
  return launch(&sum_chunks<16>, params,
                LaunchShape{ceil_div(values, kWeightThreads), kWeightThreads, 0});
}

template <class T, int kRows, class Launch>
bool launch_gram_chunks(const GramLaunch& params, int64_t chunks, const Launch& launch) {
  constexpr int64_t kRowBytes = kWarps * kRows * static_cast<int64_t>(sizeof(double));
  const int64_t tiles = ceil_div(params.models, kRows), others = tiles * (tiles - 1) / 2;
  const LaunchShape same{chunks * tiles, kWeightThreads, kRowBytes * kRows};
  if (!launch(&gram_chunks<T, kRows, true>, params, same)) return false;
  if constexpr (kRows == kManyModels) {
    constexpr int kColumns = kGramColumns<T>;
    return launch(
        &gram_chunks<T, kRows, false>, params,
        LaunchShape{chunks * others * (kRows / kColumns), kWeightThreads, kRowBytes * kColumns});
  }
  return true;
}

template <class Launch>
bool launch_gram(const GramParams& p, const Launch& launch) {
  const int64_t models = p.table.lists - 1;
  const auto visit = [&](auto type, const WeightBatch& batch, int64_t chunks) {
    using T = typename decltype(type)::Type;
    const GramLaunch params{batch, models, p.partials};
    return models <= kFewModels ? launch_gram_chunks<T, kFewModels>(params, chunks, launch)
                                : launch_gram_chunks<T, kManyModels>(params, chunks, launch);
  };
  return for_each_batch(p.table, p.table.first_chunk, visit) &&
         launch_sum(p.partials, p.table.chunks(), gram_values(models), p.sums, launch) &&
         launch(&unpack_gram<kWeightThreads>, UnpackParams{p.sums, models, p.result},
                LaunchShape{ceil_div(models * models, kWeightThreads), kWeightThreads, 0});
}

template <class Launch>
bool launch_project(const ProjectParams& p, const Launch& launch) {
  const int64_t directions = p.table.lists - 2, tile = project_tile(directions);
  const auto visit = [&](auto type, const WeightBatch& batch, int64_t chunks) {
    using T = typename decltype(type)::Type;
    return launch(tile == kFewDirections ? &project_chunks<T, kFewDirections>
                                         : &project_chunks<T, kManyDirections>,
                  ProjectLaunch{batch, directions, p.partials},
                  LaunchShape{chunks * ceil_div(directions, tile), kWeightThreads,
                              kWarps * tile * static_cast<int64_t>(sizeof(double))});
  };
  return for_each_batch(p.table, p.table.first_chunk, visit) &&
         launch_sum(p.partials, p.table.chunks(), project_values(directions), p.sums, launch);
}

template <class Launch>
bool launch_sketch(const SketchParams& p, const Launch& launch) {
  const auto visit = [&](auto type, const WeightBatch& batch, int64_t chunks) {
    SketchLaunch params{batch, p.size, p.blocks_per_chunk, {}, p.partials};
    for (int32_t t = 0; t < batch.tensors; ++t) params.keys[t] = p.keys[batch.tensor[t]];
    return launch(&sketch_chunks<typename decltype(type)::Type>, params,
                  LaunchShape{chunks * ceil_div(p.size, kSketchPlaces), kWeightThreads,
                              sketch_shared_bytes(p.blocks_per_chunk)});
  };
  return for_each_batch(p.table, p.first_chunk, visit) &&
         launch_sum(p.partials, p.first_chunk[p.table.tensors], p.size, p.sums, launch);
}

template <class Launch>
bool launch_apply(const ApplyParams& p, const Launch& launch) {
  const auto visit = [&](auto type, const WeightBatch& batch, int64_t chunks) {
    using T = typename decltype(type)::Type;
    const ApplyLaunch params{batch,           p.vectors,    p.results,
                             p.table.tensors, p.per_tensor, p.coefficients};
    const auto kernel = p.vectors <= kFewVectors    ? &apply_chunks<T, kFewVectors>
                        : p.vectors <= kManyVectors ? &apply_chunks<T, kManyVectors>
                                                    : &apply_many<T>;
    return launch(kernel, params, LaunchShape{chunks, kWeightThreads, 0});
  };
  return for_each_batch(p.table, p.table.first_chunk, visit);
}

}  // namespace pydetox::cuda
