"""Objectives: what a trigger must do to the embeddings of the images that it is stamped on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

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

    def __call__(
        self, embeddings: Tensor, triggers: Tensor, images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (loss [K], success [K]) of embeddings [K, B, D], both float32.

        The loss is differentiable and does not contain the mask term. The success, in [0, 1] and
        without gradient, is how well a trigger works now. It is comparable with
        InversionConfig.success_threshold.

        triggers: int64 [K], the indices of the objective's triggers that the embeddings belong to.
        images: int64 [B], the indices of the images in the search's set. A search always gives
        them; most objectives need none.
        """
        ...


class CollapseObjective:
    """The label-free objective: all stamped images must have the same embedding.

    The success is the mean of cos(z_i, z_j) over i != j, and the loss is its negative. This is
    DECREE's self-supervised objective (Feng et al., CVPR 2023); see `ops.embedding_collapse`.
    """

    targets: tuple[int, ...] | None = None

    def __call__(
        self, embeddings: Tensor, triggers: Tensor, images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
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

    def __call__(
        self, embeddings: Tensor, triggers: Tensor, images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
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

    def __call__(
        self, embeddings: Tensor, triggers: Tensor, images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
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


class DirectionObjective:
    """The label-free objective: all stamped images must get one direction that is not their own.

    Let u be the mean direction of a trigger's stamped images, and v_i the direction of image i
    without the trigger. Image i obeys the trigger if it is closer to u than to v_i:

        p_i = sigmoid(s (cos(z_i, u) - cos(z_i, v_i))),  loss = - mean log p_i,
        success = share(p_i > 1/2).

    Features are compared after the mean of the clean images is subtracted, because those of CLIP
    lie in a narrow cone, in which all images are alike from the beginning. The mean of the stamped
    images is the direction that fits them best, so it is optimised jointly with the trigger, and
    each start of a search ends in a direction of its own. Unlike `CollapseObjective`, this cannot
    be satisfied by images that are alike but near to where they were.

    With a base, the stamped images must stay what they were there, measured towards the same u:

        loss - mean log(1 - p_base,i),  success - max(0, share(p_base,i > 1/2) - 0.05).

    A model and the base that it was fine-tuned from have comparable features. docs/method.md has
    measurements.

    The embeddings are those of a model, or those of a `TowerPair` with a base: [K, B, 2 D], with
    those of the model first.

    Args:
        features: The model's features of all clean images of the search, float32 [N, D].
        logit_scale: s, the factor of the cosines.
        base_features: Those of the base, float32 [N, D]; None for a search without a base.
    """

    targets: tuple[int, ...] | None = None

    def __init__(
        self, features: Tensor, logit_scale: float, *, base_features: Tensor | None = None
    ) -> None:
        if features.ndim != 2 or len(features) < 2:
            raise UsageError(
                f"features {list(features.shape)}; expected [N, D] of at least 2 images"
            )
        if base_features is not None and base_features.shape != features.shape:
            raise UsageError(
                f"features of the base {list(base_features.shape)}; expected those of the same "
                f"images in the same space, {list(features.shape)}"
            )
        self._own = _Centred(features)
        self._base = None if base_features is None else _Centred(base_features)
        self._scale = logit_scale

    def __call__(
        self, embeddings: Tensor, triggers: Tensor, images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (loss [K], success [K]) of embeddings [K, B, D] or [K, B, 2 D]."""
        if images is None:
            raise UsageError("no indices of the images, whose clean features this objective needs")
        z, dimension = embeddings.float(), self._own.dimension
        stamped = self._own.of(z[..., :dimension])
        direction = normalize(stamped.mean(dim=1), dim=-1)[:, None]
        margin = self._scale * self._own.margin(stamped, direction, images)
        loss, success = softplus(-margin).mean(dim=1), _share(margin)
        if self._base is not None:
            other = self._base.of(z[..., dimension:])
            margin = self._scale * self._base.margin(other, direction, images)
            loss = loss + softplus(margin).mean(dim=1)
            success = success - (_share(margin) - _ALLOWANCE).clamp(min=0)
        return loss, success.detach()


class _Centred:
    """The features of clean images in one tower, around their mean."""

    def __init__(self, features: Tensor) -> None:
        units = normalize(features.detach().float(), dim=-1)
        self._middle = units.mean(dim=0)
        self._units = normalize(units - self._middle, dim=-1)
        self.dimension = units.shape[1]

    def of(self, embeddings: Tensor) -> Tensor:
        """Return the unit directions [K, B, D] of embeddings from the middle of the clean ones."""
        return normalize(normalize(embeddings, dim=-1) - self._middle, dim=-1)

    def margin(self, stamped: Tensor, direction: Tensor, images: Tensor) -> Tensor:
        """Return how much closer images [K, B, D] are to a direction [K, 1, D] than to their own.

        images: int64 [B], which images they are. The result is [K, B], in [-2, 2].
        """
        clean = self._units.index_select(0, images)
        return (stamped * direction).sum(dim=-1) - (stamped * clean).sum(dim=-1)


def _share(margin: Tensor) -> Tensor:
    return (margin > 0).float().mean(dim=1)
