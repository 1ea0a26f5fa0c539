"""Every CUDA operator once: what compute-sanitizer checks (--small: odd sizes) and ncu reads.

python -m benchmarks.gpu.operators_once --device cuda [--small]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch.nn.functional import normalize

from pydetox import ops

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


class Operands:
    """Random tensors on a device."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device, self.small = device, small
        self._generator = torch.Generator().manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, dtype)

    def images(self, *shape: int) -> torch.Tensor:
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=self._generator)
        return pixels.to(self.device)


def stamping(make: Operands) -> None:
    K, B, side, patch = (3, 19, 42, 14) if make.small else (8, 16, 224, 32)
    images, own = make.images(B, 3, side, side), make.images(K, B, 3, side, side)
    mask, pattern = make.randn(K, side, side), make.randn(K, 3, side, side)
    forms: list[tuple[int | None, torch.dtype]] = [
        (None, torch.float32),
        (patch, torch.bfloat16),
        (14, torch.bfloat16),
    ]
    for patch_size, dtype in forms:
        for pixels in (images, own):
            both(pixels, mask, pattern, patch_size=patch_size, dtype=dtype)
    corners = torch.tensor([[i, 2 * i] for i in range(K)], dtype=torch.int64, device=make.device)
    boxes = make.randn(K, 17, 9), make.randn(K, 3, 17, 9)
    both(images, *boxes, patch_size=None, dtype=torch.float32, corners=corners)


def both(
    images: torch.Tensor,
    mask: torch.Tensor,
    pattern: torch.Tensor,
    *,
    patch_size: int | None,
    dtype: torch.dtype,
    **corners: Any,
) -> None:
    """Forward and backward."""
    how: dict[str, Any] = {"mean": MEAN, "std": STD, "patch_size": patch_size, **corners}
    out = ops.stamp_triggers(images, mask, pattern, **how, dtype=dtype)
    ops.stamp_triggers_gradients(torch.randn_like(out), images, mask, pattern, **how)


def objectives(make: Operands) -> None:
    K, B, D, C = (3, 7, 301, 130) if make.small else (64, 16, 512, 1000)
    z = make.randn(K, B, D).requires_grad_()
    head = normalize(make.randn(C, D), dim=-1)
    targets = torch.arange(K, device=make.device) % C
    loss, _ = ops.zero_shot_loss(z, head, targets, 100.0)
    (ops.embedding_collapse(z).sum() + loss.sum()).backward()


def update(make: Operands) -> None:
    K, side = (3, 67) if make.small else (8, 224)
    logits, gradients, first = (
        (make.randn(K, side, side), make.randn(K, 3, side, side)) for _ in range(3)
    )
    second = logits[0].square(), logits[1].square()
    rates = torch.full((K,), 0.1, device=make.device)
    ops.trigger_update(
        logits,
        gradients,
        first,
        second,
        cost=rates,
        learning_rate=rates,
        steps=torch.zeros(K, dtype=torch.int64, device=make.device),
        active=torch.ones(K, dtype=torch.bool, device=make.device),
        betas=(0.5, 0.9),
        total_variation=rates,
    )


def tokens(make: Operands) -> None:
    R, V, D = (9, 300, 70) if make.small else (64, 30_522, 768)
    places = torch.arange(R, device=make.device)
    for dtype in (torch.float32, torch.bfloat16):
        logits, table = make.randn(R, V), make.randn(V, D, dtype=dtype)
        gradient = make.randn(R, D)
        ops.mix_tokens(logits.requires_grad_(), table, 0.7).backward(gradient)
        moved = logits.detach().clone()
        ops.mix_tokens_update(
            gradient,
            ops.mix_tokens_forward(moved, table, 0.7),
            moved,
            torch.zeros_like(moved),
            torch.zeros_like(moved),
            table,
            0.7,
            learning_rate=torch.full((R,), 0.1, device=make.device),
            steps=torch.zeros(R, dtype=torch.int64, device=make.device),
            active=places >= 0,
            betas=(0.5, 0.9),
        )
        ops.top_swaps(gradient, table, places, None, 64)


def weights(make: Operands) -> None:
    small = [(65, 7, 3, 3), (1, 130), (9,), (70001,)]
    shapes = small if make.small else [(3072, 768), (768,)] * 12
    for dtype in (torch.float32, torch.bfloat16):
        base, *models = [[make.randn(*s, dtype=dtype) for s in shapes] for _ in range(10)]
        ops.weight_diff_gram(base, models)
        ops.weight_diff_project(base, models[0], models[1:])
        ops.weight_diff_sketch(base, models[0], [str(i) for i in range(len(base))], seed=1)
        right = [make.randn(t[0].numel(), 8, dtype=torch.float64) for t in base]
        left = [make.randn(len(t), 8, dtype=torch.float64) for t in base]
        ops.weight_diff_matmul(base, models[0], right)
        ops.weight_diff_matmul(base, models[0], left, side="left")
        ops.apply_task_vectors(base, models[:2], [[0.5, -0.5]])


def main() -> int:
    """Run every operator, twice at real sizes: the first time warms up."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    make = Operands(torch.device(options.device), options.small)
    for _ in range(1 if options.small else 2):
        for operators in (stamping, objectives, update, tokens, weights):
            operators(make)
            if make.device.type == "cuda":
                torch.cuda.synchronize()
            print(f"{operators.__name__}: done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
