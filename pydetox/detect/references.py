"""`ReferencePlan`: the clean models that a verdict compares with, decided in one place.

References are clean models that are searched as a suspect is. Python, the command line and the
workers of a scan use the same plan. There are four ways to get references:

* a `base` alone: the base itself and copies of it that are fine-tuned on the clean images;
* `references` alone: clean models that were made as the suspects were;
* both: the same models, and every search is in contrast to the base;
* a `calibration` that one of these made earlier, with the base if it was made in contrast to one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..data import ImageSet, Template
from ..errors import UsageError
from ..models import OpenClipModel
from ..session import ModelLike, Session, as_model
from .calibrate import calibrate_references
from .configuration import ScanConfig
from .key import calibration_key, require_alike, require_equal_keys
from .statistics import Calibration


@dataclass(frozen=True, eq=False)
class Comparison:
    """A plan whose models were read.

    Attributes:
        config: The scan, with the decision whether it is in contrast to a base.
        calibration: The sizes of the references; None without a verdict.
        base: The base of searches in contrast to it, or None.
    """

    config: ScanConfig
    calibration: Calibration | None
    base: OpenClipModel | None

    def require_fit(self, session: Session) -> None:
        """Raise UsageError, naming what differs, if the calibration is of other scans than this."""
        if self.calibration is None:
            return
        for family in self.config.searched:
            key = calibration_key(self.config, session, family)
            require_equal_keys(self.calibration.of(family).key, key)


@dataclass(frozen=True, eq=False)
class ReferencePlan:
    """The references of a scan, decided and checked before any work. `decide` makes a plan.

    Attributes:
        config: The scan, with a decided `contrast`.
        base: The base model if one is needed, else None.
        references: The clean models, or None.
        calibration: An earlier calibration, or None.
    """

    config: ScanConfig
    base: ModelLike | None
    references: tuple[ModelLike, ...] | None
    calibration: Calibration | None

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
        if references is not None and calibration is not None:
            raise UsageError("references= and calibration= exclude each other; give one of them")
        if references is not None and len(references) < 2:
            raise UsageError(
                f"{len(references)} reference model; a calibration needs at least 2 in references="
            )
        contrast = config.contrast
        if contrast is None:
            if calibration is not None:
                contrast = calibration.relative
            else:
                contrast = base is not None and bool(references)
            if config.objective != "targeted":
                contrast = False
        if contrast and base is None:
            if calibration is not None and calibration.relative:
                raise UsageError("the calibration was made in contrast to a base: give that base=")
            raise UsageError("a search in contrast to the base needs it: give base=")
        if contrast and references is None and calibration is None:
            raise UsageError(
                "a search in contrast to the base has nothing to compare with: give references=, "
                "clean models that were fine-tuned from it as the suspects were, at least 2, or a "
                "calibration= that was made of such models"
            )
        if not contrast and (calibration is not None or references):
            base = None  # nothing is compared with it
        return cls(
            replace(config, contrast=contrast),
            base,
            None if references is None else tuple(references),
            calibration,
        )

    @property
    def makes_calibration(self) -> bool:
        """Whether references must be searched."""
        return self.calibration is None and (self.base is not None or self.references is not None)

    @property
    def compares(self) -> bool:
        """Whether there are references; without them, there is no verdict."""
        return self.calibration is not None or self.makes_calibration

    def prepare(
        self,
        images: ImageSet,
        *,
        templates: Sequence[Template] | None = None,
        read: Callable[[ModelLike], OpenClipModel] = as_model,
        suspect: OpenClipModel | None = None,
    ) -> Comparison:
        """Read the models and make the calibration where there is none.

        images, templates: As in `pydetox.scan`. read: Reads a model. suspect: What the calibration
        is for; None if it is not known yet. Raises UsageError, before any search, for a base or
        reference of another architecture or preprocessing than the suspect.
        """
        base = None if self.base is None else read(self.base)
        calibration = self.calibration
        if self.makes_calibration:
            models = None if self.references is None else [read(one) for one in self.references]
            if suspect is not None:
                for one in [*([] if base is None else [base]), *(models or [])]:
                    theirs = one.model_config, one.preprocess_config
                    ours = suspect.model_config, suspect.preprocess_config
                    require_alike(one.name, theirs, suspect.name, ours)
            calibration = calibrate_references(
                base, images, references=models, templates=templates, config=self.config
            )
        return Comparison(self.config, calibration, base if self.config.contrast else None)
