"""DECREE's loop in plain PyTorch, for comparison.

Written from the paper (Feng et al., "Detecting Backdoors in Pre-trained Encoders", CVPR 2023) with
the choices of its published code: one trigger, the whole model with its weights' gradients on, in
float32; blending in float64; normalisation image by image; the mean over a B x B matrix of cosines
whose diagonal is masked out; loss, similarity and size fetched to the host in every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_SUCCESS = 0.99
_PATIENCE = 5
_COST_FACTOR = 5.0


class Decree:
    """The state of one search; `step` takes a batch uint8 [B, C, H, W]."""

    def __init__(
        self,
        tower: nn.Module,
        channels: int,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        seed: int = 0,
        learning_rate: float = 0.5,
        cost: float = 1e-3,
        device: torch.device | str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._tower = tower.requires_grad_(True)
        self._mean = torch.tensor(mean, dtype=torch.float64, device=device)[:, None, None]
        self._std = torch.tensor(std, dtype=torch.float64, device=device)[:, None, None]
        shape = (size, size)
        # The same numbers on every device.
        self.mask_logits, self.pattern_logits = (
            torch.randn(sizes, dtype=torch.float64, generator=generator).to(device)
            for sizes in (shape, (channels, *shape))
        )
        logits = [self.mask_logits.requires_grad_(), self.pattern_logits.requires_grad_()]
        self._optimizer = torch.optim.Adam(logits, lr=learning_rate, betas=(0.5, 0.9))
        self._cost = cost
        self._hits = self._misses = 0
        self.smallest = float("inf")

    def step(self, images: Tensor) -> tuple[float, float]:
        """Take one step; return (mean cosine, |mask|_1)."""
        mask = torch.tanh(self.mask_logits) / 2 + 0.5
        pattern = torch.tanh(self.pattern_logits) / 2 + 0.5
        pixels = images.to(torch.float64) / 255
        stamped = torch.clip((1 - mask) * pixels + mask * pattern, 0, 1)
        normalized = torch.stack([(image - self._mean) / self._std for image in stamped])
        cosine = mean_cosine(self._tower(normalized.to(torch.float32)))
        norm = mask.abs().sum()
        loss = -cosine + self._cost * norm
        self._optimizer.zero_grad()
        self._tower.zero_grad()
        loss.backward()
        self._optimizer.step()
        reached, size = float(cosine.item()), float(norm.item())
        self._adapt(abs(reached) > _SUCCESS, size)
        return reached, size

    def _adapt(self, succeeded: bool, size: float) -> None:
        if succeeded:
            self._hits, self._misses = self._hits + 1, 0
            self.smallest = min(self.smallest, size)
        else:
            self._hits, self._misses = 0, self._misses + 1
        if self._hits > _PATIENCE:
            self._cost, self._hits = self._cost * _COST_FACTOR, 0
        if self._misses > _PATIENCE:
            self._cost, self._misses = self._cost / _COST_FACTOR, 0


def mean_cosine(embeddings: Tensor) -> Tensor:
    """Mean over the pairs i != j, by the B x B matrix."""
    units = embeddings / embeddings.norm(dim=-1, keepdim=True)
    cosines = units @ units.T
    others = ~torch.eye(len(units), dtype=torch.bool, device=units.device)
    return torch.masked_select(cosines, others).mean()
