"""What a trigger must do to the embeddings of the images that it is stamped on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import UsageError
from ..ops import embedding_collapse, zero_shot_loss

# By how much more than without a trigger a base may say the target class.
_ALLOWANCE = 0.05


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


class ContrastObjective:
    """Class-targeted, in contrast to a base: the model must obey the trigger, its base must not.

    A small trigger that sends every image into one class exists in clean models too. What fools a
    model that way mostly fools the model that it was fine-tuned from as well, for both share their
    features; what a backdoored fine-tuning planted, the base does not know. So

        loss = cross-entropy(model, target) - mean log(1 - p_base(target)),
        success = share(model says target) - max(0, share(base says target) - allowance),

    where the allowance is what the base says without any trigger and a twentieth. Searched for is
    thus a trigger that explains what the fine-tuning changed; docs/method.md has what it is worth.

    Embeddings are those of a `TowerPair`: [K, B, D1 + D2], the model's first.

    Args:
        head: Of the model, unit rows [C, D1].
        base_head: Of the base, unit rows [C, D2].
        targets: K class indices, one per trigger, repeats allowed (restarts).
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
        # log(1 - p) from the other logits: p itself rounds to 1.
        rest = logits.scatter(2, at, -torch.inf).logsumexp(dim=2) - logits.logsumexp(dim=2)
        obeys = (logits.argmax(dim=2) == target[:, None]).float().mean(dim=1)
        too_often = (obeys - self._allowance[target]).clamp(min=0)
        return loss - rest.mean(dim=1), success - too_often.detach()
