"""Objectives: what a trigger must do to the embeddings of the images that it is stamped on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import UsageError
from ..ops import embedding_collapse, zero_shot_loss

# The share by which a base may predict the target class more often than without a trigger.
_ALLOWANCE = 0.05


class Objective(Protocol):
    """A loss for K triggers, each judged on its own B stamped images."""

    @property
    def targets(self) -> tuple[int, ...] | None:
        """The target class of each trigger; None if triggers have no target."""
        ...

    def __call__(self, embeddings: Tensor, triggers: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss [K], success [K]) of embeddings [K, B, D], both float32.

        The loss is differentiable and does not contain the mask term. The success, in [0, 1] and
        without gradient, is how well a trigger works now. It is comparable with
        InversionConfig.success_threshold.

        triggers: int64 [K], the indices of the objective's triggers that the embeddings belong to.
        """
        ...


class CollapseObjective:
    """The label-free objective: all stamped images must have the same embedding.

    The success is the mean of cos(z_i, z_j) over i != j, and the loss is its negative. This is
    DECREE's self-supervised objective (Feng et al., CVPR 2023); see `ops.embedding_collapse`.
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
    """The class-targeted objective: every stamped image must get its trigger's target class.

    The loss is the cross-entropy of the zero-shot logits with the target class. The success is the
    share of images that are classified as the target. This is Neural Cleanse's objective (Wang et
    al., S&P 2019) with all classes in one batch; see `ops.zero_shot_loss`.

    Args:
        head: Unit rows [C, D].
        targets: K class indices, one per trigger. A class may occur several times (restarts).
        logit_scale: The factor of the cosines.
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


class ContrastObjective:
    """The objective in contrast to a base: the trigger must work in the model but not in its base.

    Small triggers that send every image into one class exist in clean models, too. Such a trigger
    mostly works in the base model as well, because a model and its base share their features. A
    trigger that a backdoored fine-tuning planted does not work in the base. Therefore

        loss = cross-entropy(model, target) - mean log(1 - p_base(target)),
        success = share(model predicts target) - max(0, share(base predicts target) - allowance).

    The allowance is the share of clean images for which the base predicts the target, plus 0.05.
    The search thus looks for a trigger that explains what the fine-tuning changed. docs/method.md
    has measurements.

    The embeddings are those of a `TowerPair`: [K, B, D1 + D2], with those of the model first.

    Args:
        head: The model's zero-shot head, unit rows [C, D1].
        base_head: The base's zero-shot head, unit rows [C, D2].
        targets: K class indices, one per trigger. A class may occur several times (restarts).
        logit_scale: The factor of the model's cosines.
        base_logit_scale: The factor of the base's cosines.
        base_shares: float [C], the share of clean images that the base gives each class.
    """

    def __init__(
        self,
        head: Tensor,
        base_head: Tensor,
        targets: Sequence[int],
        *,
        logit_scale: float,
        base_logit_scale: float,
        base_shares: Tensor,
    ) -> None:
        self._own = TargetObjective(head, targets, logit_scale)
        if len(base_head) != len(head) or len(base_shares) != len(head):
            raise UsageError(
                f"{len(head)} classes, but {len(base_head)} in the base's head and "
                f"{len(base_shares)} shares"
            )
        self.targets: tuple[int, ...] | None = tuple(targets)
        self._dimension = head.shape[1]
        self._base_head = base_head.detach().float()
        self._base_scale = base_logit_scale
        self._index = torch.tensor(list(targets), device=head.device)
        self._allowance = base_shares.to(head.device, torch.float32) + _ALLOWANCE

    def __call__(self, embeddings: Tensor, triggers: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss [K], success [K]) of embeddings [K, B, D1 + D2]."""
        both = embeddings.float()
        own, other = both[..., : self._dimension], both[..., self._dimension :]
        loss, success = self._own(own.contiguous(), triggers)
        target = self._index[triggers]
        logits = self._base_scale * (normalize(other, dim=2) @ self._base_head.T)
        at = target[:, None, None].expand(-1, logits.shape[1], 1)
        # log(1 - p) comes from the other logits, because p itself rounds to 1.
        rest = logits.scatter(2, at, -torch.inf).logsumexp(dim=2) - logits.logsumexp(dim=2)
        obeys = (logits.argmax(dim=2) == target[:, None]).float().mean(dim=1)
        too_often = (obeys - self._allowance[target]).clamp(min=0)
        return loss - rest.mean(dim=1), success - too_often.detach()
