"""The interface of all defences: what they get, and what they return."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ...data import ImageSet, Template
from ...detect.configuration import ScanConfig
from ...detect.statistics import Calibration
from ...errors import DataError, UsageError
from ...evaluation import Stamp
from ...models import OpenClipModel

C = TypeVar("C")


@dataclass(frozen=True, eq=False)
class KnownTrigger:
    """A trigger that a defence knows.

    Attributes:
        trigger: A function that stamps uint8 images.
        target: The index of the class that the trigger leads to.
    """

    trigger: Stamp
    target: int


@dataclass(frozen=True, eq=False)
class DefenderData:
    """Everything that a defence may use, the same for every method of a comparison.

    Attributes:
        images: Clean images with labels and class names. A method that uses no labels says so in
            its cost.
        templates: Prompt templates.
        triggers: The backdoors' triggers and targets; empty for a defence that does not know them.
        base: The clean model that the suspect was fine-tuned from, for defences that scan; None for
            the others.
        calibration: The sizes of clean references, for defences that scan; None for the others.
        scan: The configuration of those scans.
    """

    images: ImageSet
    templates: Sequence[Template]
    triggers: tuple[KnownTrigger, ...] = ()
    base: OpenClipModel | None = None
    calibration: Calibration | None = None
    scan: ScanConfig = field(default_factory=ScanConfig)

    def head(self, model: OpenClipModel) -> Tensor:
        """Return the zero-shot head [C, D]; DataError without class names."""
        if not self.images.class_names:
            raise DataError(f"{self.images.name}: no class names; a defence needs them")
        return model.zero_shot_head(self.images.class_names, self.templates)

    @property
    def label_count(self) -> int:
        """The number of labels: one per image, or 0 for a set without labels."""
        return 0 if self.images.labels is None else len(self.images)

    def labels(self) -> Tensor:
        """Return the labels int64 [N]; DataError without them."""
        if self.images.labels is None:
            raise DataError(f"{self.images.name}: no labels; this defence needs them")
        return self.images.labels

    def known(self, name: str) -> tuple[KnownTrigger, ...]:
        """Return the triggers; UsageError, naming the defence, when there are none."""
        if not self.triggers:
            raise UsageError(f"{name}: it needs the trigger, and none was given")
        return self.triggers


@dataclass(frozen=True)
class Cost:
    """The cost of a defence.

    Attributes:
        seconds: The wall time.
        images: The number of distinct images.
        labels: The number of distinct labels.
    """

    seconds: float
    images: int
    labels: int


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a defence.

    Attributes:
        model: The repaired model, which is a new one.
        cost: The cost of the defence.
        details: Details of this method for reports.
    """

    model: OpenClipModel
    cost: Cost
    details: dict[str, Any] = field(default_factory=dict)


class Defense(Protocol[C]):
    """One method of repairing a model.

    Attributes:
        name: The name in tables.
        needs_trigger: Whether the method needs the trigger and the target.
        grid: The settings that are tried before a comparison, on models that are not part of it.
            The first is the default. All methods have equally many (`TUNING_EFFORT`).
    """

    @property
    def name(self) -> str:
        """The name in tables."""
        ...

    @property
    def needs_trigger(self) -> bool:
        """Whether the method needs the trigger and the target."""
        ...

    @property
    def grid(self) -> tuple[C, ...]:
        """The settings that are tried."""
        ...

    def defend(self, model: OpenClipModel, data: DefenderData, config: C) -> Outcome:
        """Return a repaired copy; the given model is not changed."""
        ...


class Stopwatch:
    """A clock for the cost of a defence. It starts when it is made."""

    def __init__(self, images: int, labels: int) -> None:
        self._start = time.perf_counter()
        self._images, self._labels = images, labels

    def stop(self) -> Cost:
        """Return the cost until now."""
        return Cost(time.perf_counter() - self._start, self._images, self._labels)
