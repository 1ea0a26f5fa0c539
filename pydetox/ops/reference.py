"""The operators in plain PyTorch: their definition, and what tests and benchmarks compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def stamp_triggers(
    images: Tensor,
    mask_logits: Tensor,
    pattern_logits: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    patch_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Stamp K triggers on B images; the arguments are those of `pydetox.ops.stamp_triggers`.

    Works for every float dtype of the logits, computes in it, and is differentiable, any number of
    times, in whatever requires a gradient.
    """
    compute = mask_logits.dtype
    pixels = images.to(compute)  # [B, C, H, W]
    if images.dtype == torch.uint8:
        pixels = pixels / 255
    mask = (torch.tanh(mask_logits) / 2 + 0.5)[:, None, None]  # [K, 1, 1, H, W]
    pattern = (torch.tanh(pattern_logits) / 2 + 0.5)[:, None]  # [K, 1, C, H, W]
    stamped = ((1 - mask) * pixels + mask * pattern).clamp(0, 1)  # [K, B, C, H, W]
    if mean is not None:
        stamped = stamped - torch.tensor(mean, dtype=compute, device=images.device)[:, None, None]
    if std is not None:
        stamped = stamped / torch.tensor(std, dtype=compute, device=images.device)[:, None, None]
    if patch_size is not None:
        stamped = to_patch_rows(stamped, patch_size)
    return stamped.to(dtype or compute)


def to_patch_rows(images: Tensor, patch_size: int) -> Tensor:
    """Cut images [..., C, H, W] into patch rows [..., (H/P)(W/P), C*P*P].

    Patches are in row-major order, columns in the order (c, py, px), which is that of a
    convolution's weights: `rows @ conv.weight.flatten(1).T` is `conv(images)` for a convolution
    whose kernel and stride are both P, as the first layer of a vision transformer is.
    """
    *batch, channels, height, width = images.shape
    grid = images.reshape(
        *batch, channels, height // patch_size, patch_size, width // patch_size, patch_size
    )
    count = len(batch)
    order = (*range(count), count + 1, count + 3, count, count + 2, count + 4)
    return grid.permute(order).reshape(
        *batch,
        (height // patch_size) * (width // patch_size),
        channels * patch_size * patch_size,
    )


def weight_diff_gram(base: Sequence[Tensor], models: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return inner products of differences; see `pydetox.ops.weight_diff_gram`."""
    differences = torch.stack([_flat(model) - _flat(base) for model in models])
    return differences @ differences.T


def weight_diff_project(
    base: Sequence[Tensor], model: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Return projections of a difference; see `pydetox.ops.weight_diff_project`."""
    difference = _flat(model) - _flat(base)
    return torch.stack([_flat(direction) for direction in directions]) @ difference


def apply_task_vectors(
    base: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]], coefficients: Tensor
) -> list[list[Tensor]]:
    """Return base + coefficients @ vectors; see `pydetox.ops.apply_task_vectors`."""
    rows = coefficients.to(torch.float64)
    rows = rows[:, :, None].expand(-1, -1, len(base)) if rows.ndim == 2 else rows
    return [
        [
            sum((row[r, i] * v[i].double() for r, v in enumerate(vectors)), start.double()).to(
                start.dtype
            )
            for i, start in enumerate(base)
        ]
        for row in rows
    ]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.to(torch.float64).flatten() for tensor in tensors])


def weight_diff_sketch(
    base: Sequence[Tensor], model: Sequence[Tensor], names: Sequence[str], *, seed: int, size: int
) -> Tensor:
    """Return a random projection; see `pydetox.ops.weight_diff_sketch` (here on the CPU)."""
    from .weights import sketch_key

    result = np.zeros(size)
    for start, end, name in zip(base, model, names, strict=True):
        difference = (_flat([end]) - _flat([start])).cpu().numpy()
        key = sketch_key(seed, name) % 2**64
        blocks = -(-len(difference) // size)
        padded = np.zeros((blocks, size))
        padded.reshape(-1)[: len(difference)] = difference
        block = np.arange(blocks, dtype=np.uint64)
        rotation = philox(key, block, np.zeros_like(block))[:, 0].astype(np.int64) % size
        groups = np.arange(-(-size // 128), dtype=np.uint64)
        words = philox(key, block.repeat(len(groups)), 1 + np.tile(groups, blocks))
        bits = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")
        signs = 1.0 - 2.0 * bits.reshape(blocks, -1)[:, :size]
        for row, turn in zip(signs * padded, rotation, strict=True):
            result += np.roll(row, turn)
    return torch.from_numpy(result)


def philox(
    key: int, counter_low: npt.NDArray[np.uint64], counter_high: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint32]:
    """Return Philox4x32-10 of [n] counters, [n, 4] (Salmon et al., SC 2011)."""
    half = np.uint64(32)
    mask = np.uint64(0xFFFFFFFF)
    a, b = counter_low & mask, counter_low >> half
    c, d = counter_high & mask, counter_high >> half
    low, high = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b = (second >> half) ^ b ^ np.uint64(low), second & mask
        c, d = (first >> half) ^ d ^ np.uint64(high), first & mask
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([a, b, c, d], axis=-1).astype(np.uint32)
