"""Configuration of a repair: how to find and subtract trigger vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..errors import UsageError
from ..evaluation import Stamp
from ..inversion import InversionResult, WarpResult, WaveResult
from ..models import OpenClipModel
from ..presets import UNLEARN_PRESETS
from ..session import Session
from .toward_base import leads

#: See `pydetox.repair.trigger_vector`.
VectorKind = Literal["forget", "paired", "strengthen"]


@dataclass(frozen=True)
class AdvancedUnlearnConfig:
    """Constants of a repair that you hardly ever need to change.

    docs/method.md, "Unlearning", names the experiment that each of them comes from. `make
    bench-defenses` measures them together.

    Attributes:
        certainly_target: The probability of the target class above which `forget` keeps an image's
            prediction. A clean model classifies a few images as the target anyway. All other
            triggered images are pushed away from the target. This includes images that nearly
            reach it without a trigger, because they are the first to follow one.
        augment: Whether each image is randomly mirrored and shifted by up to a sixteenth of its
            side, in every step, before it is triggered. The model predicts the shifted image anew,
            so this needs no label.
        forget_share: The share of the given images that make the trigger vector. All of them choose
            alpha.
        amplifications: The factors of a recovered patch's mask. Each trigger is used with each
            factor. The search ends with the faintest mask that works, and a model that forgot only
            this mask would still obey the attacker's stronger one.
        blend_amplifications: The factors of a recovered blend's mask.
        warp_amplifications: The factors of a recovered warp's offsets.
        wave_amplifications: The factors of a recovered wave's amplitude.
        largest_warp: The mean offset, as a share of the side of an image, up to which a recovered
            warp counts. A larger one makes another picture of the image, in clean models too, and
            no alpha removes it.
        surrogates: The number of images without a class, made of the given ones, whose features are
            held.
        triggered_surrogates: The weight of their features with a trigger, which are pushed to those
            without it. The weight of the features themselves is 1.
        alpha_stride: Every so many of the candidates of alpha are measured first, and then those
            between them that decide (`pydetox.repair.coarse_to_fine`). 1 measures all of them.
        reuse_scans: Whether the triggers of a scan count among those that the next pass recovers,
            and whether a scan after a pass can end a repair before `passes`.
    """

    certainly_target: float = 0.9
    augment: bool = True
    forget_share: float = 0.8
    amplifications: tuple[float, ...] = (1.0, 2.0, 4.0)
    blend_amplifications: tuple[float, ...] = (1.0, 2.0)
    warp_amplifications: tuple[float, ...] = (1.0, 2.0)
    wave_amplifications: tuple[float, ...] = (1.0, 1.5)
    largest_warp: float = 0.05
    surrogates: int = 1024
    triggered_surrogates: float = 0.5
    alpha_stride: int = 4
    reuse_scans: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.certainly_target <= 1 or not 0 < self.forget_share <= 1:
            raise UsageError(
                f"certainly_target {self.certainly_target}, forget_share {self.forget_share}; "
                "expected shares in (0, 1]"
            )
        factors = (
            *(self.amplifications, self.blend_amplifications),
            *(self.warp_amplifications, self.wave_amplifications),
        )
        if not all(factors):
            raise UsageError("no amplifications; expected at least one factor for each family")
        if self.surrogates < 2 or not 0 <= self.triggered_surrogates < math.inf:
            raise UsageError(
                f"surrogates {self.surrogates}, triggered_surrogates {self.triggered_surrogates}; "
                "expected at least 2, and a weight of at least 0"
            )
        if self.alpha_stride < 1 or not self.largest_warp > 0:
            raise UsageError(
                f"alpha_stride {self.alpha_stride}, largest_warp {self.largest_warp}; expected at "
                "least 1, and a share above 0"
            )


@dataclass(frozen=True)
class UnlearnConfig:
    """How to find and subtract the trigger vector.

    Attributes:
        vector: The kind of trigger vector, see `pydetox.repair.trigger_vector`.
        steps: The number of optimiser steps of the fine-tuning.
        learning_rate: The peak learning rate of the fine-tuning, the same for all weights. None
            takes a rate for each tensor that is relative to its weights (`repair.step_sizes`), so
            that one setting fits towers of all sizes. A given rate leaves out `toward_base`.
        batch_size: The number of clean images per step. As many triggered images are added.
        passes: The largest number of times that triggers are recovered and subtracted in a round.
            Triggers that still work on the repaired model join those found before. A pass is the
            last one if it reaches all limits, finds no small warp, and the scan after it shows no
            trace of a backdoor (`pydetox.repair.passes.looks_clean`). Known triggers need only one
            pass.
        warps: The number of searches for a smooth warp into each target class, in every pass; 0 for
            none. Searches that find no warp contribute nothing to the vector. Known triggers need
            no such search.
        waves: The largest number of waves to search for into each target class, in every pass; 0
            for none. As with warps, those that do not work contribute nothing. Without classes,
            waves into one direction are searched for, in contrast to a base.
        coefficients: The candidate values of alpha, ascending and at least 0. The value 0, which
            leaves the model unchanged, is always tried.
        max_attack_success: The largest acceptable ASR on validation images, in [0, 1].
        attacked_images: The number of stamped images to try for every alpha. They are divided among
            the triggers, with at least 50 per trigger if there are as many images.
        safety_factor: The largest factor that the smallest alpha within the limits is multiplied
            by, as far as the accuracy allows. Recovered triggers only estimate the attacker's.
        min_accuracy_kept: The least share of the clean accuracy of theta_b to keep, in [0, 1]. A
            pass whose vector cannot finish leaves an equal part of the rest to each later pass.
        retention: The weight of holding the model's own image features with `forget`, in units of
            the class logits. The features are held on the given images and on surrogates made of
            them, so that classes and tasks are kept that the given class names do not cover. 0
            holds predictions alone.
        max_drift: The largest acceptable distance of image features from those of the model before
            any repair: the mean of 1 - cos on surrogates that were not held
            (`pydetox.repair.retention`).
        toward_base: Whether `forget` leads, weight by weight, from the suspect to the base where
            there is one of the same shape (`pydetox.repair.toward_base`). With alpha = 1, every
            weight is then between the two; features are held, and `max_drift` counts, from what
            lies between those of both.
        seed: The seed of every random choice of a repair.
        advanced: Constants that you hardly ever need to change.
    """

    vector: VectorKind = "forget"
    steps: int = 160
    learning_rate: float | None = None
    batch_size: int = 64
    passes: int = 2
    warps: int = 4
    waves: int = 2
    coefficients: tuple[float, ...] = tuple(round(0.1 * k, 1) for k in range(21))
    max_attack_success: float = 0.01
    attacked_images: int = 1000
    safety_factor: float = 1.2
    min_accuracy_kept: float = 0.97
    retention: float = 1.0
    max_drift: float = 0.02
    toward_base: bool = True
    seed: int = 0
    advanced: AdvancedUnlearnConfig = field(default_factory=AdvancedUnlearnConfig)

    def __post_init__(self) -> None:
        if self.vector not in ("forget", "paired", "strengthen"):
            raise UsageError(
                f"trigger vector {self.vector!r}; expected forget, paired or strengthen"
            )
        rate = self.learning_rate
        if self.steps < 1 or self.batch_size < 1 or not (rate is None or rate > 0):
            raise UsageError(
                f"steps {self.steps}, batch_size {self.batch_size}, learning_rate {rate}; expected "
                "all above 0"
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
        if min(self.warps, self.waves) < 0:
            raise UsageError(f"warps {self.warps}, waves {self.waves}; expected at least 0 each")
        if not self.coefficients or list(self.coefficients) != sorted(set(self.coefficients)):
            raise UsageError(f"coefficients {self.coefficients}; expected ascending numbers")
        if not all(0 <= one < math.inf for one in self.coefficients):
            raise UsageError(f"coefficients {self.coefficients}; expected finite numbers from 0")

    @classmethod
    def quick(cls) -> UnlearnConfig:
        """Return a repair of one short pass that searches for neither warps nor waves."""
        return _preset("quick")

    @classmethod
    def thorough(cls) -> UnlearnConfig:
        """Return a repair with more passes, steps, warps and waves than the default."""
        return _preset("thorough")

    def alphas(self) -> tuple[float, ...]:
        """Return `coefficients` with 0, which is chosen where no other alpha keeps the limits."""
        return self.coefficients if self.coefficients[0] == 0 else (0.0, *self.coefficients)

    @property
    def leads_to_base(self) -> bool:
        """Whether vectors stay between the suspect and a base, where there is one."""
        return self.toward_base and self.vector == "forget" and self.learning_rate is None

    def end_of(self, session: Session) -> OpenClipModel | None:
        """Return the model that vectors lead to, or None if they may lead anywhere."""
        end = session.start if self.leads_to_base else None
        return end if end is not None and leads(session.model, end) else None

    def reserve(self, number: int) -> float:
        """Return the share of the accuracy to spend that pass 0..passes-1 leaves to later passes.

        Without a reserve, a first pass whose vector cannot finish could spend all of the accuracy.
        The next pass, which knows more triggers, could then subtract nothing.
        """
        return 1 - (number + 1) / self.passes

    def warps_that_count(self, recovered: WarpResult) -> list[int]:
        """Return the indices of the warps that work and are small enough."""
        most = self.advanced.largest_warp * recovered.offsets.shape[-1]
        return [k for k in recovered.working() if float(recovered.sizes[k]) <= most]

    def amplified(
        self, recovered: InversionResult | WarpResult | WaveResult, *, most: float = math.inf
    ) -> list[Stamp]:
        """Return the recovered triggers that work, each amplified by each factor of its family.

        most: The size up to which patches and blends count, as a multiple of the smallest.
        """
        factors = self.advanced
        if isinstance(recovered, WarpResult):
            return [
                recovered.trigger(k).amplified(factor)
                for k in self.warps_that_count(recovered)
                for factor in factors.warp_amplifications
            ]
        if isinstance(recovered, WaveResult):
            return [
                recovered.trigger(k).amplified(factor)
                for k in recovered.working()
                for factor in factors.wave_amplifications
            ]
        blend = recovered.family == "blend"
        sizes = recovered.p_l1
        counts = torch.isfinite(sizes) & (sizes <= most * sizes.min())
        working = counts.nonzero().flatten().tolist()
        return [
            recovered.trigger(k).amplified(factor)
            # If no search succeeded, the triggers of the last step are still the best estimate.
            for k in working or range(len(recovered))
            for factor in (factors.blend_amplifications if blend else factors.amplifications)
        ]


def _preset(name: str) -> UnlearnConfig:
    values = dict(UNLEARN_PRESETS[name])
    return UnlearnConfig(steps=values.pop("vector_steps"), **values)
