"""What a trigger must do to the embeddings of the images that it is stamped on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UsageError
from ..ops import embedding_collapse, zero_shot_loss


class Objective(Protocol):
    """A loss for K triggers, each judged on its own B stamped images."""

    @property
    def targets(self) -> tuple[int, ...] | None:
        """The target class of each trigger; None when triggers have none."""
        ...

    def __call__(self, embeddings: Tensor, triggers: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss [K], success [K]) of embeddings [K, B, D], both float32.

        triggers: int64 [K], which of the objective's triggers the embeddings belong to.

        loss: differentiable, without the mask term. success: how well the triggers work now, in
        [0, 1], without gradient; comparable with InversionConfig.success_threshold.
        """
        ...


class CollapseObjective:
    """Label-free: all stamped images must land on one embedding, wherever that is.

    loss = -mean over i != j of cos(z_i, z_j), success = the same mean without the sign: DECREE's
    self-supervised objective (Feng et al., CVPR 2023); see `ops.embedding_collapse`.
    """

    targets: tuple[int, ...] | None = None

    def __call__(self, embeddings: Tensor, triggers: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss [K], success [K]) of embeddings [K, B, D], B at least 2."""
        count = embeddings.shape[1]
        if count < 2:
            raise UsageError(f"{count} image a step; the label-free objective needs at least 2")
        cosine = embedding_collapse(embeddings.float())
        return -cosine, cosine.detach().clamp(0, 1)


class TargetObjective:
    """Class-targeted: every stamped image must get its trigger's target class.

    loss = cross-entropy of the zero-shot logits with the target class, success = share of images
    that get it: Neural Cleanse (Wang et al., S&P 2019), with all classes in one batch; see
    `ops.zero_shot_loss`.

    head: unit rows [C, D]. targets: K class indices, one per trigger, repeats allowed (restarts).
    logit_scale: factor of the cosines.
    """

    def __init__(self, head: Tensor, targets: Sequence[int], logit_scale: float) -> None:
        classes = head.shape[0]
        wrong = [t for t in targets if not 0 <= t < classes]
        if wrong or not targets:
            raise UsageError(f"target classes {list(targets)}; expected indices 0..{classes - 1}")
        self.targets: tuple[int, ...] | None = tuple(targets)
        self._head = head.detach().float()
        self._index = torch.tensor(list(targets), device=head.device)
        self._scale = logit_scale

    def __call__(self, embeddings: Tensor, triggers: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss [K], success [K]) of embeddings [K, B, D]."""
        return zero_shot_loss(embeddings.float(), self._head, self._index[triggers], self._scale)
