"""The operators in plain PyTorch. Tests and benchmarks compare the native kernels with these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from .update import BestTriggers


def stamp_triggers(
    images: Tensor,
    mask_logits: Tensor,
    pattern_logits: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    patch_size: int | None = None,
    dtype: torch.dtype | None = None,
    corners: Sequence[tuple[int, int]] | Tensor | None = None,
) -> Tensor:
    """Stamp K triggers on B images; the arguments are those of `pydetox.ops.stamp_triggers`.

    It computes in the dtype of the logits, which may be any floating-point dtype. It is
    differentiable any number of times, in every argument that requires a gradient.
    """
    compute = mask_logits.dtype
    pixels = images.to(compute)  # [B, C, H, W] or [K, B, C, H, W]
    if images.dtype == torch.uint8:
        pixels = pixels / 255
    mask = torch.tanh(mask_logits) / 2 + 0.5
    pattern = torch.tanh(pattern_logits) / 2 + 0.5
    if corners is not None:
        places = corners.tolist() if isinstance(corners, Tensor) else corners
        mask, pattern = (_around_boxes(t, places, images.shape[-2:]) for t in (mask, pattern))
    mask = mask[:, None, None]  # [K, 1, 1, H, W]
    pattern = pattern[:, None]  # [K, 1, C, H, W]
    stamped = ((1 - mask) * pixels + mask * pattern).clamp(0, 1)  # [K, B, C, H, W]
    if mean is not None:
        stamped = stamped - torch.tensor(mean, dtype=compute, device=images.device)[:, None, None]
    if std is not None:
        stamped = stamped / torch.tensor(std, dtype=compute, device=images.device)[:, None, None]
    if patch_size is not None:
        stamped = to_patch_rows(stamped, patch_size)
    return stamped.to(dtype or compute)


def _around_boxes(boxes: Tensor, corners: Sequence[Sequence[int]], size: Sequence[int]) -> Tensor:
    """Put boxes [K, ..., h, w] into zeros [K, ..., H, W], each at its (top, left)."""
    height, width = boxes.shape[-2:]
    planes = [
        pad(box, (left, size[1] - width - left, top, size[0] - height - top))
        for box, (top, left) in zip(boxes, corners, strict=True)
    ]
    return torch.stack(planes) if planes else pad(boxes, (0, size[1] - width, 0, size[0] - height))


def to_patch_rows(images: Tensor, patch_size: int) -> Tensor:
    """Cut images [..., C, H, W] into patch rows [..., (H/P)(W/P), C*P*P].

    Patches are in row-major order, and columns in the order (c, py, px), as in the weights of a
    convolution. For a convolution whose kernel and stride are both P, such as the first layer of a
    vision transformer, `rows @ conv.weight.flatten(1).T` equals `conv(images)`.
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


def weight_diff_matmul(
    base: Sequence[Tensor], model: Sequence[Tensor], factors: Sequence[Tensor], *, side: str
) -> list[Tensor]:
    """Return products of differences; see `pydetox.ops.weight_diff_matmul`."""
    products = []
    for start, end, factor in zip(base, model, factors, strict=True):
        rows = (start.shape[0], math.prod(start.shape[1:]))
        difference = end.to(torch.float64).reshape(rows) - start.to(torch.float64).reshape(rows)
        wide = factor.to(torch.float64)
        products.append(wide.T @ difference if side == "left" else difference @ wide)
    return products


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
        if not blocks:
            continue
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


def embedding_collapse(z: Tensor) -> Tensor:
    """Return (|sum u_i|^2 - sum |u_i|^2) / (B (B - 1)); see `pydetox.ops.embedding_collapse`."""
    count = z.shape[1]
    units = _unit_rows(z)
    total = units.sum(dim=1).square().sum(dim=-1)
    return (total - units.square().sum(dim=(1, 2))) / (count * (count - 1))


def zero_shot_loss(
    z: Tensor, head: Tensor, targets: Tensor, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """Return (loss [K], success [K]); see `pydetox.ops.zero_shot_loss`."""
    logits = logit_scale * _unit_rows(z) @ head.T  # [K, B, C]
    wanted = targets[:, None, None].expand(*logits.shape[:2], 1)
    loss = (logits.logsumexp(dim=-1) - logits.gather(-1, wanted)[..., 0]).mean(dim=1)
    hits = logits.detach().argmax(dim=-1).eq(targets[:, None]) & logits.isfinite().all(dim=-1)
    return loss, hits.to(z.dtype).mean(dim=1)


@torch.no_grad()
def trigger_update(
    logits: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    *,
    cost: Tensor,
    learning_rate: Tensor,
    steps: Tensor,
    active: Tensor,
    betas: tuple[float, float],
    epsilon: float = 1e-8,
    total_variation: Tensor | None = None,
    best: BestTriggers | None = None,
) -> Tensor:
    """Take a step of Adam in place; see `pydetox.ops.trigger_update`.

    With m = tanh(w)/2 + 1/2 the mask logits' gradient gains 2 m (1 - m) times cost plus
    total_variation times the sum, over the neighbours n of a pixel, of the sign of m - m_n.
    """
    mask = torch.tanh(logits[0]) / 2 + 0.5
    norms = mask.sum(dim=(1, 2), dtype=torch.float64)
    weight = cost.to(mask.dtype)[:, None, None].expand_as(mask)
    if total_variation is not None:
        signs = _variation_signs(logits[0])
        weight = weight + total_variation.to(mask.dtype)[:, None, None] * signs
    slope = 2 * mask * (1 - mask) * weight
    if best is not None:
        better = active & best.eligible & (norms < best.norm)
        best.norm.copy_(torch.where(better, norms, best.norm))
        for kept, now in zip(best.logits, logits, strict=True):
            kept.copy_(torch.where(better.view(-1, *(1,) * (now.dim() - 1)), now, kept))
    steps += active.to(steps.dtype)
    taken = steps.clamp(min=1).double()  # one that was never active is not divided by zero
    rate = learning_rate.double() / (1 - betas[0] ** taken)
    correction = (1 - betas[1] ** taken).sqrt()
    for w, g, m, v in zip(logits, (gradients[0] + slope, gradients[1]), first, second, strict=True):
        each = (-1, *(1,) * (w.dim() - 1))
        moves = active.view(each)
        m.copy_(torch.where(moves, betas[0] * m + (1 - betas[0]) * g, m))
        v.copy_(torch.where(moves, betas[1] * v + (1 - betas[1]) * g.square(), v))
        denominator = v.sqrt() / correction.to(w.dtype).view(each) + epsilon
        step = rate.to(w.dtype).view(each) * m / denominator
        w.copy_(torch.where(moves, w - step, w))
    return torch.where(active, norms, torch.nan)


def _variation_signs(mask_logits: Tensor) -> Tensor:
    """Return the subgradient of the total variation by the mask, which grows with its logits."""

    def sign(difference: Tensor) -> Tensor:
        return torch.where(difference.isnan(), 0, difference.sign())

    signs = torch.zeros_like(mask_logits)
    down = sign(mask_logits[:, 1:] - mask_logits[:, :-1])
    right = sign(mask_logits[:, :, 1:] - mask_logits[:, :, :-1])
    signs[:, 1:] += down
    signs[:, :-1] -= down
    signs[:, :, 1:] += right
    signs[:, :, :-1] -= right
    return signs


def _unit_rows(z: Tensor) -> Tensor:
    """Divide rows by their norm; a row of zeros stays zero and gets no gradient."""
    norm = z.norm(dim=-1, keepdim=True)
    zero = norm == 0  # not `norm > 0`, which would hide a NaN
    return torch.where(
        zero, torch.zeros_like(z), z / torch.where(zero, torch.ones_like(norm), norm)
    )


def mix_tokens(
    logits: Tensor, table: Tensor, temperature: float | Tensor, allowed: Tensor | None = None
) -> Tensor:
    """Return softmax(logits / temperature) @ table; see `pydetox.ops.mix_tokens`."""
    scaled = logits / _for_each_row(temperature)
    if allowed is not None:
        scaled = scaled.masked_fill(~allowed, -torch.inf)
    return scaled.softmax(dim=-1) @ table.to(logits.dtype)


@torch.no_grad()
def mix_tokens_forward(
    logits: Tensor, table: Tensor, temperature: float | Tensor, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (mixed [R, d], softmax [R, 2]); see `pydetox.ops.mix_tokens_forward`."""
    kept = logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
    largest = kept.amax(dim=-1, keepdim=True)
    total = ((kept - largest) / _for_each_row(temperature)).exp().sum(dim=-1, keepdim=True)
    softmax = torch.cat([largest, 1 / total], dim=-1)
    return mix_tokens(logits, table, temperature, allowed), softmax


@torch.no_grad()
def mix_tokens_update(
    gradient: Tensor,
    mixture: tuple[Tensor, Tensor],
    logits: Tensor,
    first: Tensor,
    second: Tensor,
    table: Tensor,
    temperature: float | Tensor,
    allowed: Tensor | None = None,
    *,
    learning_rate: Tensor,
    steps: Tensor,
    active: Tensor,
    betas: tuple[float, float],
    epsilon: float = 1e-8,
) -> None:
    """Take a step of Adam on the logits, in place; see `pydetox.ops.mix_tokens_update`."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        mixed = mix_tokens(leaf, table, temperature, allowed)
        (slope,) = torch.autograd.grad(mixed, leaf, gradient.to(mixed.dtype))
    steps += active.to(steps.dtype)
    taken = steps.clamp(min=1).double()  # one that was never active is not divided by zero
    rate = (learning_rate.double() / (1 - betas[0] ** taken)).to(logits.dtype)[:, None]
    correction = (1 - betas[1] ** taken).sqrt().to(logits.dtype)[:, None]
    moves = active[:, None] if allowed is None else active[:, None] & allowed
    new_first = betas[0] * first + (1 - betas[0]) * slope
    new_second = betas[1] * second + (1 - betas[1]) * slope.square()
    moved = logits - rate * new_first / (new_second.sqrt() / correction + epsilon)
    for state, after in ((logits, moved), (first, new_first), (second, new_second)):
        state.copy_(torch.where(moves, after, state))


def top_swaps(
    gradient: Tensor, table: Tensor, current: Tensor, allowed: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Return (scores [R, k], tokens [R, k]); see `pydetox.ops.top_swaps`."""
    wide = table.to(gradient.dtype)
    products = gradient @ wide.T
    scores = products - products.gather(1, current[:, None]) + 0.0
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.inf)
    scores, tokens = scores.sort(dim=-1, stable=True)
    scores, tokens = scores[:, :k], tokens[:, :k]
    if allowed is not None:
        tokens = torch.where(allowed[tokens], tokens, -1)
    return scores, tokens


def _for_each_row(temperature: float | Tensor) -> float | Tensor:
    return temperature[:, None] if isinstance(temperature, Tensor) else temperature
