#pragma once

// The launches of mix_tokens, its update and top_swaps.

#include "csrc/mix_tokens/cuda.cuh"

namespace pydetox::cuda {

// Blocks that keep a large GPU busy.
constexpr int64_t kSwapBlocks = 512;
// Tokens that are worth a list of their own.
constexpr int64_t kSliceTokens = 4 * kTokenTile;

// Whether the table's rows begin at multiples of 16 bytes.
inline bool in_words(const TokenTable& table) {
  return table.dim * size_of(table.dtype) % kMaxWordBytes == 0 &&
         reinterpret_cast<uintptr_t>(table.data) % kMaxWordBytes == 0;
}

// visit(TypeTag<T>, TypeTag<S>, bool_constant) -> bool: the logits' type, the table's, and whether
// it is read in words.
template <class T, class S, class Visit>
bool with_words(const TokenTable& table, const Visit& visit) {
  return in_words(table) ? visit(TypeTag<T>{}, TypeTag<S>{}, TypeTag<char[2]>{})
                         : visit(TypeTag<T>{}, TypeTag<S>{}, TypeTag<char[1]>{});
}
template <class Tag>
constexpr bool kIsWords = sizeof(typename Tag::Type) == 2;

template <class Visit>
bool with_token_types(DType dtype, const TokenTable& table, const Visit& visit) {
  if (dtype == DType::kFloat64) return with_words<double, double>(table, visit);
  return table.dtype == DType::kBFloat16 ? with_words<float, BFloat16>(table, visit)
                                         : with_words<float, float>(table, visit);
}

// launch(kernel, parameters, LaunchShape) -> bool.
template <class Launch>
bool launch_mix_tokens(const MixParams& params, const Launch& launch) {
  MixParams p = params;
  return with_token_types(p.dtype, p.table, [&](auto type, auto stored, auto words) {
    using T = typename decltype(type)::Type;
    using S = typename decltype(stored)::Type;
    for (p.first_row = 0; p.first_row < p.rows; p.first_row += kTokenRows) {
      const int64_t rows = p.block_rows(), parts = p.table.parts();
      const int64_t tiles =
          ceil_div(rows, kMixRows) * ceil_div(p.table.stride(), kTokenTile) * parts;
      const bool done =
          launch(&largest_of_parts<T>, p,
                 LaunchShape{parts * ceil_div(rows, kTokenWarps), kTokenThreads, 0}) &&
          launch(&mix_parts<T, S, kIsWords<decltype(words)>>, p,
                 LaunchShape{tiles, kTokenThreads, kMixSharedBytes<T>}) &&
          launch(&mix_rows<T>, p, LaunchShape{rows, kTokenThreads, kMixRowSharedBytes});
      if (!done) return false;
    }
    return true;
  });
}

template <class Launch>
bool launch_mix_tokens_update(const UpdateParams& p, const Launch& launch) {
  return with_token_types(p.dtype, p.table, [&](auto type, auto stored, auto words) {
    using T = typename decltype(type)::Type;
    using S = typename decltype(stored)::Type;
    constexpr bool kWords = kIsWords<decltype(words)>;
    const LaunchShape shape{ceil_div(p.rows, kMixRows) * ceil_div(p.table.tokens, kTokenTile),
                            kTokenThreads, kGradientSharedBytes<T>};
    return launch(&token_states<T>, p,
                  LaunchShape{ceil_div(p.rows, kTokenWarps), kTokenThreads, 0}) &&
           (p.gradient == nullptr ? launch(&token_gradients<T, S, kWords, true>, p, shape)
                                  : launch(&token_gradients<T, S, kWords, false>, p, shape));
  });
}

inline int64_t slices_of(const TokenTable& table, int64_t rows) {
  const int64_t down = ceil_div(rows, kSwapRows);
  const int64_t wanted = down == 0 ? 1 : ceil_div(kSwapBlocks, down);
  const int64_t most = ceil_div(table.tokens, kSliceTokens);
  return wanted < most ? wanted : most;
}

template <class Launch>
bool launch_top_swaps(const SwapParams& p, const Launch& launch) {
  return with_token_types(p.dtype, p.table, [&](auto type, auto stored, auto words) {
    using T = typename decltype(type)::Type;
    using S = typename decltype(stored)::Type;
    const int64_t shared =
        kSwapTileBytes<T> + kSwapRows * p.count * static_cast<int64_t>(sizeof(Swap));
    const bool done =
        launch(&swap_offsets<T, S>, p,
               LaunchShape{ceil_div(p.rows, kTokenWarps), kTokenThreads, 0}) &&
        launch(&swap_slices_of_rows<T, S, kIsWords<decltype(words)>>, p,
               LaunchShape{ceil_div(p.rows, kSwapRows) * p.slices, kTokenThreads, shared});
    if (!done) return false;
    MergeParams merge{p, p.slices, p.lists, p.merged};
    while (true) {
      const int64_t groups = ceil_div(merge.lists, kMergedLists);
      if (groups == 1) merge.to = nullptr;
      const LaunchShape shape{p.rows * groups, kTokenThreads, 0};
      if (!launch(&merge_swaps<T>, merge, shape)) return false;
      if (groups == 1) return true;
      Swap* free = merge.to == p.merged ? p.lists : p.merged;
      merge = MergeParams{p, groups, merge.to, free};
    }
  });
}

}  // namespace pydetox::cuda
