"""Configuration of a scan."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from ..errors import UsageError
from ..inversion import InversionConfig, TriggerFamily
from ..inversion.configuration import CONTRAST_SUCCESS_THRESHOLD
from ..presets import SCAN_PRESETS
from ..training import TrainConfig

ObjectiveName = Literal["targeted", "label-free"]


@dataclass(frozen=True)
class AdvancedScanConfig:
    """Constants of a scan that you hardly ever need to change.

    docs/method.md, "Many classes", has the measurements behind the defaults.

    Attributes:
        screen_above: The number of classes above which a targeted scan screens all classes and
            searches few of them to the end; None to always search all.
        screening_steps: The steps of the short search of each class for patches. Blends take half
            of them.
        screening_images: The clean images per step of this search. Blends take half of them.
        screening_rate: Adam's learning rate in this search for patches. Blends, whose masks begin
            ten times as large, have three tenths of it.
        searched_classes: The number of classes that are searched to the end for each family of
            triggers, those that stand out most.
        directions: The least number of searches of a label-free scan. Each ends in a direction of
            its own, and not all of them in the attacker's.
    """

    screen_above: int | None = 20
    screening_steps: int = 12
    screening_images: int = 8
    screening_rate: float = 0.1
    searched_classes: int = 3
    directions: int = 8

    def __post_init__(self) -> None:
        counts = (
            self.screening_steps,
            self.screening_images,
            self.searched_classes,
            self.directions,
        )
        if min(counts) < 1 or (self.screen_above is not None and self.screen_above < 1):
            raise UsageError(
                "screening_steps, screening_images, searched_classes, directions "
                f"{counts}, screen_above {self.screen_above}; expected at least 1 each"
            )
        if not 0 < self.screening_rate < math.inf:
            raise UsageError(f"screening_rate {self.screening_rate}; expected a number above 0")


@dataclass(frozen=True)
class ScanConfig:
    """How to scan.

    Attributes:
        objective: `targeted` searches for a trigger into each class and needs class names.
            `label-free` searches for a trigger that sends all images into one direction (see
            `inversion.DirectionObjective`), and needs neither labels nor a text tower.
        inversion: The search. Its seed is replaced by one derived from `seed`, and its family by
            each of `families`.
        families: The families of triggers to search for. The verdict is that of the family that
            stands out most, with its p-value corrected for their number.
        contrast: Whether to search for triggers that work in the model but not in the base that it
            was fine-tuned from (see `inversion.ContrastObjective`). None decides by the references:
            the search is in contrast if both a base and reference models are given, or a
            calibration that was made so (see `detect.references.ReferencePlan`). A label-free
            search is in contrast wherever there is a base.
        restarts: The number of searches per class. A label-free scan makes as many in all, but at
            least `AdvancedScanConfig.directions`. The smallest mask counts.
        references: The number of clean reference models of a calibration, at least 2: copies of the
            base that are fine-tuned on the defender's images. If they are matched to the suspect,
            there are as many at each of the two distances around its own.
        reference_training: The fine-tuning of these copies. None fine-tunes them until their
            weights have moved about as far from the base as the suspect's (see `detect.copies`).
            Otherwise, make it about as strong as that of a suspect, because it decides how much
            scatter counts as harmless. The base itself is then the first of the references.
        p_backdoored, p_suspicious: The chances of a false alarm per model at which the verdict
            changes.
        drop_below: The score below which a class is dropped during the search, with a calibration
            (see `Detection.class_scores`); None to search all classes to the end. References are
            always searched to the end, so that one calibration serves every value. In contrast to a
            base, no class is dropped (see `Calibration.relative`).
        positive_control: Whether to plant a patch in a copy of a model that is found clean, and to
            scan the copy: would this scan have found it (see `detect.control`)? It doubles the time
            of a clean model. A label-free scan has none.
        seed: The seed of every random choice.
        advanced: Constants of the scan.
    """

    objective: ObjectiveName = "targeted"
    inversion: InversionConfig = field(default_factory=lambda: InversionConfig(steps=150))
    families: tuple[TriggerFamily, ...] = ("patch", "blend")
    contrast: bool | None = None
    restarts: int = 1
    references: int = 3
    reference_training: TrainConfig | None = None
    p_backdoored: float = 0.01
    p_suspicious: float = 0.05
    drop_below: float | None = 1.5
    positive_control: bool = False
    seed: int = 0
    advanced: AdvancedScanConfig = field(default_factory=AdvancedScanConfig)

    def __post_init__(self) -> None:
        if self.objective not in ("targeted", "label-free"):
            raise UsageError(f"objective {self.objective!r}; expected targeted or label-free")
        if not self.families or len(set(self.families)) < len(self.families):
            raise UsageError(f"families {list(self.families)}; expected at least one, each once")
        for family in self.families:
            self.search(family)
        if self.restarts < 1 or self.references < 2:
            raise UsageError(
                f"restarts {self.restarts}, references {self.references}; expected at least 1 and 2"
            )
        if not 0 < self.p_backdoored <= self.p_suspicious < 1:
            raise UsageError(
                f"p_backdoored {self.p_backdoored}, p_suspicious {self.p_suspicious}; expected "
                "0 < p_backdoored <= p_suspicious < 1"
            )
        if self.drop_below is not None and not math.isfinite(self.drop_below):
            raise UsageError(f"drop_below {self.drop_below}; expected a finite number or None")

    @classmethod
    def quick(cls) -> ScanConfig:
        """Return a scan that takes about a fifth of the default's time and finds patches alone."""
        return _preset("quick")

    @classmethod
    def thorough(cls) -> ScanConfig:
        """Return a scan with more steps, images, searches and references than the default."""
        return _preset("thorough")

    @property
    def searches_per_class(self) -> int:
        """The number of searches for each class, or in all in a label-free scan."""
        if self.objective == "targeted":
            return self.restarts
        return max(self.restarts, self.advanced.directions)

    def in_contrast(self) -> ScanConfig:
        """Return the same scan in contrast to a base, without any other change."""
        return replace(self, contrast=True)

    def every_class(self) -> ScanConfig:
        """Return the scan that searches every class to the end: none is screened or dropped."""
        return replace(self, drop_below=None, advanced=replace(self.advanced, screen_above=None))

    def search(self, family: TriggerFamily) -> InversionConfig:
        """Return the search for one family, with the success that its triggers need."""
        threshold = self.inversion.needed_success
        if self.contrast and self.inversion.success_threshold is None:
            # The success in contrast is lower, because the success in the base is subtracted.
            threshold = CONTRAST_SUCCESS_THRESHOLD
        return replace(self.inversion, family=family, success_threshold=threshold)


def _preset(name: str) -> ScanConfig:
    values, config = dict(SCAN_PRESETS[name]), ScanConfig()
    search = {key: values.pop(key) for key in ("steps", "batch_size")}
    return replace(config, inversion=replace(config.inversion, **search), **values)
