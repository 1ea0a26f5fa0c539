"""Configuration of a repair: how to find and subtract trigger vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..errors import UsageError
from ..evaluation import Stamp
from ..inversion import InversionResult, WarpResult

#: See `pydetox.repair.trigger_vector`.
VectorKind = Literal["forget", "paired", "strengthen"]


@dataclass(frozen=True)
class AdvancedUnlearnConfig:
    """Constants of a repair that you hardly ever need to change.

    docs/method.md, "Unlearning", names the experiment that each of them comes from. `make
    bench-defenses` measures them together.

    Attributes:
        certainly_target: With `forget`, triggered images whose clean version has at least this
            probability of the target class keep it; all others are pushed away from that class,
            the nearer ones among them too: a clean model takes a few images for the target anyway,
            and those that it takes for something else by a hair are the first to follow a trigger.
        augment: Whether each image is mirrored or not and moved by up to a sixteenth of its side,
            at random in every step, before it is triggered. What the model says of the moved image
            is asked for anew, so that this needs no label either.
        forget_share: Share of the given images that make the trigger vector; alpha is chosen on
            all of them.
        amplifications: Factors of a recovered patch's mask; each trigger is used with each. The
            search ends with the faintest mask that works, and a model that forgot only that still
            obeys the attacker's stronger one.
        blend_amplifications: The same for recovered blends.
        warp_amplifications: Factors of a recovered warp's offsets.
        surrogates: Images without a class, made of the given ones, whose features are held.
        triggered_surrogates: What their features with a trigger weigh, which are pushed to those
            without it; the features themselves weigh 1.
    """

    certainly_target: float = 0.9
    augment: bool = True
    forget_share: float = 0.8
    amplifications: tuple[float, ...] = (1.0, 2.0, 4.0)
    blend_amplifications: tuple[float, ...] = (1.0, 2.0)
    warp_amplifications: tuple[float, ...] = (1.0, 2.0)
    surrogates: int = 1024
    triggered_surrogates: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.certainly_target <= 1 or not 0 < self.forget_share <= 1:
            raise UsageError(
                f"certainly_target {self.certainly_target}, forget_share {self.forget_share}; "
                "expected shares in (0, 1]"
            )
        if not (self.amplifications and self.blend_amplifications and self.warp_amplifications):
            raise UsageError("no amplifications; expected at least one factor for each family")
        if self.surrogates < 2 or not 0 <= self.triggered_surrogates < math.inf:
            raise UsageError(
                f"surrogates {self.surrogates}, triggered_surrogates {self.triggered_surrogates}; "
                "expected at least 2, and a weight of at least 0"
            )


@dataclass(frozen=True)
class UnlearnConfig:
    """How to find and subtract the trigger vector.

    Attributes:
        vector: Which trigger vector, see `pydetox.repair.trigger_vector`.
        steps: Optimiser steps of the fine-tuning.
        learning_rate: Its peak rate.
        batch_size: Clean images per step; as many triggered ones are added.
        passes: With recovered triggers, how often to recover and subtract before the next scan: the
            triggers that still work on the repaired model join those found before.
        warps: With recovered triggers, searches for a smooth warp into each target class, in every
            pass; 0 for none. Of these only those that find one have a part in the vector.
        coefficients: Candidate values of alpha, ascending and at least 0. 0, which leaves the model
            as it is, is tried whether it is among them or not.
        max_attack_success: ASR on validation images that is small enough, a share.
        attacked_images: Stamped images to try for every alpha, shared out over the triggers, but at
            least 50 with each, if there are so many.
        safety_factor: The smallest alpha within the limits is raised by up to this factor while the
            accuracy allows it: recovered triggers only estimate the attacker's.
        min_accuracy_kept: Least share of the clean accuracy of theta_b to keep. A pass whose
            vector cannot finish leaves an equal part of the rest to each that follows.
        retention: With `forget`, the weight of holding the model's own image features, on the given
            images and on surrogates made of them, so that classes and tasks without names among
            the given ones are kept; in units of the class logits. 0 holds predictions alone.
        max_drift: How far image features may move from those of the model before any repair: the
            mean of 1 - cos on surrogates that were not held (`pydetox.repair.retention`).
        seed: Of everything random in it.
        advanced: Constants of a repair.
    """

    vector: VectorKind = "forget"
    steps: int = 160
    learning_rate: float = 4e-4
    batch_size: int = 64
    passes: int = 2
    warps: int = 4
    coefficients: tuple[float, ...] = tuple(round(0.1 * k, 1) for k in range(21))
    max_attack_success: float = 0.01
    attacked_images: int = 1000
    safety_factor: float = 1.2
    min_accuracy_kept: float = 0.97
    retention: float = 1.0
    max_drift: float = 0.05
    seed: int = 0
    advanced: AdvancedUnlearnConfig = field(default_factory=AdvancedUnlearnConfig)

    def __post_init__(self) -> None:
        if self.vector not in ("forget", "paired", "strengthen"):
            raise UsageError(
                f"trigger vector {self.vector!r}; expected forget, paired or strengthen"
            )
        if self.steps < 1 or self.batch_size < 1 or not self.learning_rate > 0:
            raise UsageError(
                f"steps {self.steps}, batch_size {self.batch_size}, learning_rate "
                f"{self.learning_rate}; expected all above 0"
            )
        if self.passes < 1:
            raise UsageError(f"passes {self.passes}; expected at least 1")
        if self.attacked_images < 1 or self.safety_factor < 1:
            raise UsageError(
                f"attacked_images {self.attacked_images}, safety_factor {self.safety_factor}; "
                "expected at least 1 each"
            )
        if not 0 <= self.retention < math.inf or not self.max_drift > 0:
            raise UsageError(
                f"retention {self.retention}, max_drift {self.max_drift}; expected a weight of at "
                "least 0, and a distance above 0"
            )
        if self.warps < 0:
            raise UsageError(f"warps {self.warps}; expected at least 0")
        if not self.coefficients or list(self.coefficients) != sorted(set(self.coefficients)):
            raise UsageError(f"coefficients {self.coefficients}; expected ascending numbers")
        if not all(0 <= one < math.inf for one in self.coefficients):
            raise UsageError(f"coefficients {self.coefficients}; expected finite numbers from 0")

    def reserve(self, number: int) -> float:
        """Return the share of the accuracy to spend that pass 0..passes-1 leaves to later passes.

        Without a reserve, a first pass whose vector cannot finish could spend all of the accuracy.
        The next pass, which knows more triggers, could then subtract nothing.
        """
        return 1 - (number + 1) / self.passes

    def amplified(self, recovered: InversionResult | WarpResult) -> list[Stamp]:
        """Return the recovered triggers that work, each amplified by each factor of its family."""
        factors = self.advanced
        if isinstance(recovered, WarpResult):
            return [
                recovered.trigger(k).amplified(factor)
                for k in recovered.working()
                for factor in factors.warp_amplifications
            ]
        blend = recovered.family == "blend"
        working = torch.isfinite(recovered.p_l1).nonzero().flatten().tolist()
        return [
            recovered.trigger(k).amplified(factor)
            # If no search succeeded, the triggers of the last step are still the best estimate.
            for k in working or range(len(recovered))
            for factor in (factors.blend_amplifications if blend else factors.amplifications)
        ]
