"""Recovered triggers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UsageError
from .state import Ending, TriggerFamily


@dataclass(frozen=True, eq=False)
class RecoveredTrigger:
    """One recovered trigger. A call stamps images with it.

    Attributes:
        mask: float32 [H, W] in [0, 1].
        pattern: float32 [3, H, W] in [0, 1].
        target: The index of the target class; None without a target.
    """

    mask: Tensor
    pattern: Tensor
    target: int | None = None

    def amplified(self, factor: float) -> RecoveredTrigger:
        """Return the trigger with its mask multiplied by `factor` and clipped at 1.

        The search ends with the faintest mask that still works. The attacker's trigger is rarely as
        faint.
        """
        if not factor > 0:
            raise UsageError(f"amplification {factor}; expected a number above 0")
        return replace(self, mask=(factor * self.mask).clamp(max=1))

    def __call__(self, images: Tensor) -> Tensor:
        """Return stamped copies of uint8 images [n, 3, H, W], rounded to uint8."""
        if images.dtype != torch.uint8 or images.shape[1:] != self.pattern.shape:
            raise UsageError(
                f"images are {images.dtype} {list(images.shape)}; the trigger expects torch.uint8 "
                f"[n, {', '.join(map(str, self.pattern.shape))}]"
            )
        mask, pattern = self.mask.to(images.device), self.pattern.to(images.device)
        mixed = (1 - mask) * images.to(torch.float32) + mask * (255 * pattern)
        return mixed.round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class InversionResult:
    """The smallest working trigger of each of K searches, as it was when it was found.

    Attributes:
        mask_logits: float32 [K, H, W]; the mask is tanh(.)/2 + 1/2.
        pattern_logits: float32 [K, 3, H, W]; the pattern is tanh(.)/2 + 1/2.
        p_l1: float64 [K] on the CPU: |mask|_1 / (H W), in (0, 1). It is infinite for a search that
            never succeeded, whose logits are those of the last step. For a dropped trigger, it is
            an upper bound of the result of a complete search.
        success: float32 [K] on the CPU, in [0, 1]: the success on the images of the check after the
            search (see Objective).
        targets: The target class of each trigger; None if triggers have no target.
        cost: float32 [K] on the CPU: the final weights of the mask term.
        trigger_steps: int64 [K] on the CPU: steps that each search took.
        endings: Why each one ended: "all steps", "converged" or "dropped".
        recorded_steps: L steps after which sizes were noted, ascending; see InversionConfig.
        history: float64 [L, K] on the CPU: p_l1 as it was then; after the end of a search its last.
        steps: Steps of the longest search.
        seconds: Wall time.
        tower: How the image tower was run.
        tower_passes: The number of passes of one image through an image tower, forward and backward
            ones counted alike, those of the check after the search included. A search in contrast
            to a base counts both towers.
        family: What the masks could be (see InversionConfig).
        max_batch: Images that went through the tower at once, in the end. Given as the
            configuration's max_batch it gives the same bits again on the same device.
    """

    mask_logits: Tensor
    pattern_logits: Tensor
    p_l1: Tensor
    success: Tensor
    targets: tuple[int, ...] | None
    cost: Tensor
    trigger_steps: Tensor
    endings: tuple[Ending, ...]
    recorded_steps: tuple[int, ...]
    history: Tensor
    steps: int
    seconds: float
    tower: str
    tower_passes: int = 0
    family: TriggerFamily = "patch"
    max_batch: int | None = None

    def __len__(self) -> int:
        return int(self.p_l1.shape[0])

    @property
    def masks(self) -> Tensor:
        """float32 [K, H, W] in [0, 1]."""
        return torch.tanh(self.mask_logits) / 2 + 0.5

    @property
    def patterns(self) -> Tensor:
        """float32 [K, 3, H, W] in [0, 1]."""
        return torch.tanh(self.pattern_logits) / 2 + 0.5

    def trigger(self, index: int) -> RecoveredTrigger:
        """Return trigger `index`, 0..K-1."""
        return RecoveredTrigger(
            self.masks[index].cpu(),
            self.patterns[index].cpu(),
            None if self.targets is None else self.targets[index],
        )

    def best(self) -> int:
        """Return the index of the smallest mask."""
        return int(self.p_l1.argmin())
