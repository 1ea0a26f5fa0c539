"""`ReferencePlan`: the clean models that a verdict compares with, decided in one place.

References are clean models that are searched as a suspect is. Python, the command line and the
workers of a scan use the same plan. There are four ways to get references:

* a `base` alone: copies of it that are fine-tuned on the clean images until they have moved a
  little less and a little further from it than the suspect (or as `ScanConfig.reference_training`
  says, if it is given);
* `references` alone: clean models that were made as the suspects were;
* both: the same models, and every search is in contrast to the base;
* a `calibration` that one of these made earlier, with the base if it was made in contrast to one,
  or of copies that moved as far as suspects.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..data import ImageSet, Template
from ..errors import DataError, PydetoxWarning, UsageError
from ..models import OpenClipModel
from ..session import ModelLike, Session, as_model
from .calibrate import calibrate_references
from .configuration import ScanConfig
from .copies import OutOfReachError
from .distance import model_distance, rungs_around, too_far
from .interpolation import around
from .key import calibration_key, require_alike, require_equal_keys
from .statistics import Calibration


def check_given(references: Sequence[object] | None, calibration: Calibration | None) -> None:
    """Raise UsageError for a single reference, and for references beside a calibration."""
    if references is not None and calibration is not None:
        raise UsageError("references= and calibration= exclude each other; give one of them")
    if references is not None and len(references) < 2:
        raise UsageError(
            f"{len(references)} reference model; a calibration needs at least 2 in references="
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """A plan whose models were read.

    Attributes:
        config: The scan, with the decision whether it is in contrast to a base.
        calibration: The sizes of the references; None without a verdict.
        base: The base of searches in contrast to it, or None.
        start: The base that was read, whether searches are in contrast to it or not.
        unfit: The reason why there are no references for this suspect; None if there are some, or
            if none were given.
        distance: How far the suspect's weights lie from the base's, if references are matched to
            that (see `detect.distance`).
    """

    config: ScanConfig
    calibration: Calibration | None
    base: OpenClipModel | None
    unfit: str | None = None
    distance: float | None = None
    start: OpenClipModel | None = None

    def require_fit(self, session: Session) -> None:
        """Raise UsageError, naming what differs, if the calibration is of other scans than this."""
        if self.calibration is None:
            return
        for family in self.config.families:
            distance = self.calibration.distance
            key = calibration_key(self.config, session, family, distance=distance)
            require_equal_keys(self.calibration.of(family).key, key)


@dataclass(frozen=True, eq=False)
class ReferencePlan:
    """The references of a scan, decided and checked before any work. `decide` makes a plan.

    Attributes:
        config: The scan, with a decided `contrast`.
        base: The base model if the comparison needs one, else None.
        references: The clean models, or None.
        calibration: An earlier calibration, or None.
        start: The base that was given, also where the comparison needs none. A repair leads to it.
    """

    config: ScanConfig
    base: ModelLike | None
    references: tuple[ModelLike, ...] | None
    calibration: Calibration | None
    start: ModelLike | None = None

    @classmethod
    def decide(
        cls,
        config: ScanConfig | None = None,
        *,
        base: ModelLike | None = None,
        references: Sequence[ModelLike] | None = None,
        calibration: Calibration | None = None,
    ) -> ReferencePlan:
        """Return the plan that follows from what there is.

        config: its `contrast`, where it is not None, is kept. UsageError for less than two
        references, for references beside a calibration, and for a search in contrast to a base
        without the base or without anything to compare with.
        """
        config = config or ScanConfig()
        check_given(references, calibration)
        # Copies that moved as far as the suspect also show what a label-free search finds.
        matched_copies = config.objective == "label-free" and config.reference_training is None
        contrast = config.contrast
        if contrast is None:
            if calibration is not None:
                contrast = calibration.relative
            else:
                contrast = base is not None and (bool(references) or matched_copies)
        if contrast and base is None:
            if calibration is not None and calibration.relative:
                raise UsageError("the calibration was made in contrast to a base: give that base=")
            raise UsageError("a search in contrast to the base needs it: give base=")
        if contrast and references is None and calibration is None and not matched_copies:
            raise UsageError(
                "a search in contrast to the base has nothing to compare with: give references=, "
                "clean models that were fine-tuned from it as the suspects were, at least 2, or a "
                "calibration= that was made of such models"
            )
        start, matched = base, calibration is not None and calibration.distance is not None
        if matched and base is None:
            raise UsageError(
                "the references of the calibration moved as far from a base as suspects did: give "
                "that base="
            )
        if not contrast and not matched and (calibration is not None or references):
            base = None  # nothing is compared with it
        return cls(
            replace(config, contrast=contrast),
            base,
            None if references is None else tuple(references),
            calibration,
            start,
        )

    @property
    def makes_calibration(self) -> bool:
        """Whether references must be searched."""
        return self.calibration is None and (self.base is not None or self.references is not None)

    @property
    def compares(self) -> bool:
        """Whether there are references; without them, there is no verdict."""
        return self.calibration is not None or self.makes_calibration

    @property
    def by_distance(self) -> bool:
        """Whether a suspect is compared with references that moved about as far from the base."""
        if self.calibration is not None:
            return self.calibration.distance is not None
        own = self.base is not None and self.references is None
        return own and self.config.reference_training is None

    def prepare(
        self,
        images: ImageSet,
        *,
        templates: Sequence[Template] | None = None,
        read: Callable[[ModelLike], OpenClipModel] = as_model,
        suspect: OpenClipModel | None = None,
        distance: float | None = None,
        repair: bool = False,
    ) -> Comparison:
        """Read the models and make the calibration where there is none.

        images, templates: As in `pydetox.scan`. read: Reads a model. suspect: What the calibration
        is for; None if it is not known yet. distance: How far the suspect's weights lie from the
        base's, if that is known already. repair: Whether a repair may lead to the base, so that it
        is read even if the comparison needs none. Raises UsageError, before any search, for a base
        or reference of another architecture or preprocessing than the suspect, and for references
        that are to be matched to a suspect that is not given.
        """
        contrast = bool(self.config.contrast)
        unknown = self.by_distance and distance is None
        if unknown and suspect is None:
            raise UsageError(
                "copies of the base are fine-tuned until they have moved as far as the suspects, "
                "and none are given: give suspects=, or say how to fine-tune copies "
                "(ScanConfig.reference_training)"
            )
        base = None
        if self.base is not None and (self.makes_calibration or contrast or unknown):
            base = read(self.base)
        start = base
        if repair and start is None and self.start is not None:
            start = read(self.start)
        models = None if self.references is None else [read(one) for one in self.references]
        if suspect is not None and (self.makes_calibration or unknown or start is not base):
            for one in [*([] if start is None else [start]), *(models or [])]:
                theirs = one.model_config, one.preprocess_config
                ours = suspect.model_config, suspect.preprocess_config
                require_alike(one.name, theirs, suspect.name, ours)
        if unknown and base is not None and suspect is not None:
            distance = model_distance(base, suspect)
        calibration, unfit = self.calibration, None
        try:
            if self.by_distance:
                calibration = self._at_distance(distance, base, images, templates)
            elif self.makes_calibration:
                calibration = calibrate_references(
                    base, images, references=models, templates=templates, config=self.config
                )
        except OutOfReachError as error:
            calibration, unfit = None, str(error)
        in_contrast = base if contrast else None
        return Comparison(self.config, calibration, in_contrast, unfit, distance, start)

    def _at_distance(
        self,
        distance: float | None,
        base: OpenClipModel | None,
        images: ImageSet,
        templates: Sequence[Template] | None,
    ) -> Calibration:
        """Return the calibration for a suspect at a distance; OutOfReachError if there is none."""
        assert distance is not None
        name = self.base if isinstance(self.base, str | Path) else getattr(self.base, "name", "")
        rungs = _rungs(distance, str(name))
        calibration = self.calibration
        if calibration is None:
            assert base is not None
            made = Rungs(self, base, images, templates)
            made.require(rungs)
            calibration = made.calibration()
        found = around(calibration, rungs)
        if found is None:
            has = [one.distance for one in (calibration, *calibration.rungs)]
            raise OutOfReachError(
                f"the calibration has no references that moved as far as this model ({distance:.2g}"
                f" of the base's norm; it has {', '.join(f'{d:.2g}' for d in has if d)}): calibrate"
                " for this model, too"
            )
        return found


def calibrate_plan(
    plan: ReferencePlan,
    images: ImageSet,
    suspects: Sequence[ModelLike],
    *,
    templates: Sequence[Template] | None = None,
    read: Callable[[ModelLike], OpenClipModel] = as_model,
) -> Calibration:
    """Return the calibration of a plan that has none yet; the arguments are `pydetox.calibrate`'s.

    Where references are matched to suspects, there are those at the rungs around each distance.
    Raises DataError if no suspect can be matched.
    """
    if not plan.by_distance or not suspects:
        calibration = plan.prepare(images, templates=templates, read=read).calibration
        assert calibration is not None
        return calibration
    assert plan.base is not None
    base = read(plan.base)
    made, problems = Rungs(plan, base, images, templates), list[str]()
    for one in suspects:
        suspect = read(one)
        theirs = base.model_config, base.preprocess_config
        require_alike(
            base.name, theirs, suspect.name, (suspect.model_config, suspect.preprocess_config)
        )
        try:
            made.require(_rungs(model_distance(base, suspect), base.name))
        except OutOfReachError as error:
            problems.append(f"{suspect.name}: {error}")
    if not made.found:
        raise DataError(problems[0])
    for line in problems:
        warnings.warn(line, PydetoxWarning, stacklevel=3)
    return made.calibration()


class Rungs:
    """The references of a plan at several distances, each made once."""

    def __init__(
        self,
        plan: ReferencePlan,
        base: OpenClipModel,
        images: ImageSet,
        templates: Sequence[Template] | None,
    ) -> None:
        """Begin without any; base: that of the plan. The other arguments are as in `prepare`."""
        self.found: dict[float, Calibration] = {}
        self._unfit: dict[float, OutOfReachError] = {}
        self._plan, self._base, self._images, self._templates = plan, base, images, templates

    def require(self, weights: Mapping[float, float]) -> None:
        """Make the references at some rungs, the nearest one first.

        weights: Of each rung, as `distance.rungs_around` returns them. Raises OutOfReachError if
        there are none at the nearest rung. Then none are made at the other one.
        """
        nearest = max(weights, key=weights.__getitem__)
        for rung in sorted(weights, key=weights.__getitem__, reverse=True):
            self._make(rung)
            if rung == nearest and rung in self._unfit:
                raise self._unfit[rung]

    def calibration(self) -> Calibration:
        """Return all that were made as one calibration, in the order of their distances."""
        first, *others = (self.found[rung] for rung in sorted(self.found))
        return first.with_rungs(others)

    def _make(self, rung: float) -> None:
        if rung in self.found or rung in self._unfit:
            return
        try:
            self.found[rung] = calibrate_references(
                self._base,
                self._images,
                references=None,
                templates=self._templates,
                config=self._plan.config,
                distance=rung,
            )
        except OutOfReachError as error:
            self._unfit[rung] = error


def _rungs(distance: float, base: str) -> dict[float, float]:
    """Return the rungs around a distance with their weights; OutOfReachError without any."""
    if distance == 0:
        raise OutOfReachError(
            f"it is compared with itself: {base!r} has the same image tower; give other clean "
            "models"
        )
    rungs = rungs_around(distance)
    if rungs is None:
        raise OutOfReachError(too_far(distance))
    return rungs
