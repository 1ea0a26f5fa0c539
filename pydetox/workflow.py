"""From a suspicious checkpoint to a repaired one: the steps, and one call that takes them all.

`scan` reconstructs a trigger for every class and gives a verdict, `calibrate` makes the clean
references that a verdict needs, `unlearn` subtracts a trigger vector, `detox` does all of it and
scans the repaired model again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from .atomic import rehearse_directory
from .checkpoints import CHECKPOINT_FILES, Checkpoint, Provenance, load_checkpoint, save_checkpoint
from .data import DEFAULT_TEMPLATES, ImageSet, Template
from .detect.key import require_equal_keys, search_key
from .detect.statistics import FINDINGS, Calibration, Detection, Verdict, detect
from .errors import DataError, UsageError
from .evaluation import Evaluation, Stamp, evaluate, predict
from .inversion import (
    CollapseObjective,
    ContrastObjective,
    Elimination,
    InversionConfig,
    InversionResult,
    Objective,
    TargetObjective,
    TriggerFamily,
    WarpConfig,
    WarpResult,
    invert,
    invert_warps,
)
from .models import OpenClipModel
from .repair.task_vectors import TaskVector
from .repair.unlearning import (
    CoefficientSearch,
    UnlearnConfig,
    search_coefficient,
    subtract,
    trigger_vector,
)
from .rng import child_seed
from .training import TrainConfig, train_on_prompts

#: A model, a checkpoint that was read, or the name of one (see `pydetox.checkpoints`).
ModelLike: TypeAlias = "OpenClipModel | Checkpoint | str | Path"

# Success that a trigger needs in contrast to a base; docs/method.md has the measurements.
_CONTRAST_SUCCESS = 0.9

_NO_CALIBRATION = (
    "a search in contrast to the base has nothing to compare with: give calibration=, made by "
    "`calibrate` with base= and at least 2 references="
)

# Clean images that say how often a base answers with each class.
_SHARE_IMAGES = 512

ObjectiveName = Literal["targeted", "label-free"]


@dataclass(frozen=True)
class ScanConfig:
    """How to scan.

    Attributes:
        objective: `targeted` looks for a trigger into each class (needs class names), `label-free`
            for one that makes all images alike (needs neither labels nor a text tower).
        inversion: The search. Its seed is replaced by one derived from `seed`, its family by each
            of `families`.
        families: Kinds of triggers to search for; the verdict is that of the kind that stands out
            most, its p-value corrected for their number. A label-free scan searches for the first.
        contrast: Search for triggers that work in the model but not in the base that it was
            fine-tuned from (see `inversion.ContrastObjective`). Every step of the work then needs
            that base, and a calibration needs reference models of the suspects' own kind.
        restarts: Searches per class, or in all without classes; the smallest mask counts.
        references: Clean reference models of a calibration: the base and copies of it fine-tuned
            on the defender's images, at least 2.
        reference_training: How those copies are fine-tuned. Choose it as strong as what a suspect
            may have been through: it decides how much scatter counts as harmless.
        p_backdoored, p_suspicious: Chance of a false alarm per model at which the verdict changes.
        drop_below: With a calibration, a class whose score is below this on the way is given up
            (see `Detection.class_scores`); None to search all of them to the end. References are
            always searched to the end: one calibration serves every value. In contrast to a
            base nothing is dropped: see `Calibration.relative`.
        seed: Of everything random.
    """

    objective: ObjectiveName = "targeted"
    inversion: InversionConfig = field(default_factory=lambda: InversionConfig(steps=150))
    families: tuple[TriggerFamily, ...] = ("patch", "blend")
    contrast: bool = False
    restarts: int = 1
    references: int = 3
    reference_training: TrainConfig = field(
        default_factory=lambda: TrainConfig(epochs=3, learning_rate=1e-5)
    )
    p_backdoored: float = 0.01
    p_suspicious: float = 0.05
    drop_below: float | None = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in ("targeted", "label-free"):
            raise UsageError(f"objective {self.objective!r}; expected targeted or label-free")
        if self.contrast and self.objective != "targeted":
            raise UsageError(
                "contrast with a base is for targeted scans; a label-free one has none"
            )
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

    @property
    def searched(self) -> tuple[TriggerFamily, ...]:
        """The families that a scan searches for."""
        return self.families if self.objective == "targeted" else self.families[:1]

    def in_contrast(self) -> ScanConfig:
        """Return the same scan in contrast to a base, with the threshold that was measured for it.

        A trigger's success then has what it does to the base taken off.
        """
        search = replace(self.inversion, success_threshold=_CONTRAST_SUCCESS)
        return replace(self, contrast=True, inversion=search)

    def search(self, family: TriggerFamily) -> InversionConfig:
        """Return the search for one family."""
        return replace(self.inversion, family=family)

    def calibration_key(
        self,
        images: ImageSet,
        model: OpenClipModel,
        family: TriggerFamily,
        *,
        templates: Sequence[Template] | None = None,
        base: OpenClipModel | None = None,
    ) -> str:
        """Return what two scans must share for their sizes to compare (see `detect.key`).

        model: for its architecture and preprocessing. family: of the triggers. templates: None for
        the default ones. base: what triggers are in contrast to.
        """
        search = asdict(self.search(family))
        for name in ("seed", "max_batch", "check_images"):  # which change no size
            del search[name]
        search |= {"objective": self.objective, "restarts": self.restarts}
        return search_key(
            search,
            images,
            model,
            class_names=_classes(images, self),
            templates=templates or DEFAULT_TEMPLATES,
            base=base,
        )


@dataclass(frozen=True, eq=False)
class FamilyScan:
    """What the search for one family of triggers found.

    Attributes:
        family: Of the triggers (see `inversion.FAMILIES`).
        detection: Verdict and numbers.
        inversion: The recovered triggers: `restarts` per class, classes in order.
        calibration: What the sizes were compared with, or None.
    """

    family: TriggerFamily
    detection: Detection
    inversion: InversionResult
    calibration: Calibration | None


@dataclass(frozen=True, eq=False)
class ScanResult:
    """What a scan found.

    Attributes:
        name: Of the checkpoint.
        sha256: Of its weights file; None for a model that came from no file.
        objective: As in ScanConfig.
        class_names: The classes, or None in a label-free scan without class names.
        detection: Verdict and numbers.
        target: The class that the smallest trigger leads to; None when that is unknown.
        inversion: The recovered triggers: `restarts` per class, classes in order.
        calibration: What the sizes were compared with, or None.
        seconds: Wall time of the scan without the calibration.
        family: Which family of triggers these are: of all that were searched for the one with the
            smallest p-value, the first without a calibration.
        others: What the searches for the other families found.
    """

    name: str
    sha256: str | None
    objective: ObjectiveName
    class_names: tuple[str, ...] | None
    detection: Detection
    target: int | None
    inversion: InversionResult
    calibration: Calibration | None
    seconds: float
    family: TriggerFamily = "patch"
    others: tuple[FamilyScan, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The conclusion."""
        return self.detection.verdict

    @property
    def target_name(self) -> str | None:
        """Name of the target class."""
        if self.target is None or self.class_names is None:
            return None
        return self.class_names[self.target]

    def cleared(self) -> tuple[int, ...]:
        """Return the classes that are no finding, of any family, and were all searched to the end.

        Empty without a verdict on classes.
        """
        every = [self.detection, *(one.detection for one in self.others)]
        if self.objective != "targeted" or not all(one.class_scores for one in every):
            return ()
        return tuple(
            c
            for c in range(len(self.detection.p_l1))
            if all(one.dropped[c] is None and c not in one.suspects for one in every)
        )

    def targets(self) -> tuple[int, ...]:
        """Return the classes to unlearn: the target, then all others that are surely backdoored.

        Of any family. Empty without a finding. A model can hold more than one backdoor, and the
        repair of one weakens the others' triggers enough to hide them from a re-scan, not enough
        to disarm them.
        """
        if self.detection.verdict not in FINDINGS or self.target is None:
            return ()
        if self.objective != "targeted":
            return (self.target,)
        every = [self.detection, *(one.detection for one in self.others)]
        return tuple(dict.fromkeys([self.target, *(c for one in every for c in one.backdoored)]))

    def class_steps(self) -> list[int]:
        """Return the steps that each class was searched for, of its longest restart."""
        steps = self.inversion.trigger_steps.view(len(self.detection.p_l1), -1)
        return [int(n) for n in steps.max(dim=1).values]

    def reference_sizes(self) -> list[float]:
        """Return the references' mean P-L1 per class, at the step where the class was dropped."""
        if self.calibration is None:
            return []
        sizes = []
        for c, step in enumerate(self.detection.dropped):
            rows = (self.calibration if step is None else self.calibration.at(step)).p_l1
            sizes.append(sum(row[c] for row in rows) / len(rows))
        return sizes

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON and reports; images are left out."""
        found, reference = self.detection, self.calibration
        names = list(self.class_names or [])
        if self.objective != "targeted":
            names = ["any class"]
        return {
            "name": self.name,
            "sha256": self.sha256,
            "objective": self.objective,
            "verdict": found.verdict.value,
            "reason": found.reason,
            "p_l1": found.smallest_p_l1,
            "score": found.score,
            "threshold": found.threshold,
            "p_value": found.p_value,
            "anomaly_index": found.anomaly_index,
            "target": self.target_name if found.verdict in FINDINGS else None,
            "targets": [(self.class_names or names)[c] for c in self.targets()],
            "cleared": [names[c] for c in found.cleared],
            "weakest_class": self.target_name,
            "class_names": names,
            "class_p_l1": list(found.p_l1),
            "class_scores": list(found.class_scores),
            "class_dropped": list(found.dropped),
            "class_steps": self.class_steps(),
            "reference_p_l1": self.reference_sizes(),
            "calibration": None if reference is None else reference.to_dict(),
            "tower": self.inversion.tower,
            "seconds": self.seconds,
            "family": self.family,
            "other_families": [
                {
                    "family": one.family,
                    "verdict": one.detection.verdict.value,
                    "p_l1": one.detection.smallest_p_l1,
                    "score": one.detection.score,
                    "p_value": one.detection.p_value,
                    "class_p_l1": list(one.detection.p_l1),
                    "class_scores": list(one.detection.class_scores),
                }
                for one in self.others
            ],
        }


@dataclass(frozen=True, eq=False)
class UnlearnRound:
    """One trigger vector that was subtracted.

    Several of them may follow each other before the model is scanned again.

    targets: Class indices, the most suspect one first. triggers: What was recovered for each of
    them, by family; empty for known triggers. search: CA and ASR over alpha. vector: The trigger
    vector. rescan: The model afterwards; None when it was not scanned again. warps: What searches
    for a warp found for each of the targets; empty without such searches.
    """

    targets: tuple[int, ...]
    triggers: tuple[InversionResult, ...]
    search: CoefficientSearch
    vector: TaskVector
    rescan: ScanResult | None
    warps: tuple[WarpResult, ...] = ()

    @property
    def target(self) -> int:
        """The most suspect class."""
        return self.targets[0]


@dataclass(frozen=True, eq=False)
class DetoxResult:
    """The whole story of one checkpoint.

    Attributes:
        before: The first scan.
        rounds: What was subtracted, in order; empty when the model was left as it is.
        after: The last re-scan, None when nothing was subtracted.
        model: The repaired model, or the given one.
        evaluation_before, evaluation_after: CA on the given images, None without labels.
        path: Where the repaired checkpoint was written, or None.
        seconds: Wall time by step.
    """

    before: ScanResult
    rounds: tuple[UnlearnRound, ...]
    after: ScanResult | None
    model: OpenClipModel
    evaluation_before: Evaluation | None
    evaluation_after: Evaluation | None
    path: Path | None
    seconds: dict[str, float]

    @property
    def verdict(self) -> Verdict:
        """The verdict of the first scan."""
        return self.before.verdict

    @property
    def repaired(self) -> bool:
        """Whether something was subtracted and the re-scan is clean."""
        return self.after is not None and self.after.verdict is Verdict.CLEAN

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON and reports."""
        rows = [
            evaluation.to_report_row(name)
            for name, evaluation in (
                ("before", self.evaluation_before),
                ("after", self.evaluation_after),
            )
            if evaluation is not None
        ]
        return {
            "verdict": self.verdict.value,
            "repaired": self.repaired,
            "scans": [self.before.to_dict(), *([self.after.to_dict()] if self.after else [])],
            "rounds": [
                {
                    "target": one.target,
                    "targets": list(one.targets),
                    "alpha": one.search.coefficient,
                    "limits_reached": one.search.reached,
                    "vector_norm": one.vector.norm(),
                    "warps": sum(len(found.working()) for found in one.warps),
                    "alpha_search": {
                        "alpha": list(one.search.coefficients),
                        "ca": list(one.search.clean_accuracy),
                        "asr": list(one.search.attack_success_rate),
                        "asr_kind": "recovered" if one.triggers else "known",
                        "chosen": one.search.coefficient,
                    },
                    "verdict": None if one.rescan is None else one.rescan.verdict.value,
                }
                for one in self.rounds
            ],
            "evaluation": rows,
            "path": None if self.path is None else str(self.path),
            "seconds": dict(self.seconds),
        }


def as_model(
    checkpoint: ModelLike, *, architecture: str | None = None, offline: bool = False
) -> tuple[OpenClipModel, str | None]:
    """Return the model of a checkpoint and the sha256 of its weights file, if it has one.

    Raises what `load_checkpoint` and `OpenClipModel.from_checkpoint` raise.
    """
    if isinstance(checkpoint, OpenClipModel):
        return checkpoint, None
    if isinstance(checkpoint, Checkpoint):
        return OpenClipModel.from_checkpoint(checkpoint), checkpoint.sha256
    read = load_checkpoint(checkpoint, model=architecture, offline=offline)
    return OpenClipModel.from_checkpoint(read, take=True), read.sha256


def zero_shot_head(
    model: OpenClipModel, images: ImageSet, templates: Sequence[Template] | None
) -> torch.Tensor:
    """Return the head [C, D] for the class names of the images; DataError if they have none."""
    if not images.class_names:
        raise DataError(
            f"{images.name}: no class names; give some (class_names= of load_images) or scan "
            'label-free (objective="label-free")'
        )
    return model.zero_shot_head(images.class_names, templates or DEFAULT_TEMPLATES)


def calibrate(
    base: ModelLike | None,
    images: ImageSet,
    *,
    references: Sequence[ModelLike] | None = None,
    templates: Sequence[Template] | None = None,
    config: ScanConfig | None = None,
    architecture: str | None = None,
) -> Calibration:
    """Scan clean references: given models, or the base and copies of it fine-tuned on the images.

    Args:
        base: A model believed clean, of the same architecture as the suspects: the pre-trained
            model they were fine-tuned from, at best. None with references and without contrast.
        images: The defender's; without labels the base's own predictions serve.
        references: Models believed clean that were made as the suspects were: other fine-tunings of
            the base, say. At least 2. Better than copies where there are some, and needed in
            contrast to the base (`ScanConfig.contrast`): a copy that a few images have hardly moved
            says nothing of what harmless fine-tuning does.
        templates: As in `scan`.
        config: As in `scan`. `references` and `reference_training` are of copies.
        architecture: As in `scan`.

    The copies differ in their seeds, and every scan has a seed of its own. Raises DataError when
    the images have no class names and the copies cannot be trained; UsageError for less than two
    references, and for none in contrast to the base.
    """
    config, images = config or ScanConfig(), images.in_content_order()
    if references is not None and len(references) < 2:
        raise UsageError(f"{len(references)} reference model; a calibration needs at least 2")
    if config.contrast and references is None:
        raise UsageError(
            "a search in contrast to the base needs reference models (references=): clean ones "
            "that were fine-tuned from it as the suspects were, at least 2"
        )
    first_model = base if base is not None or not references else references[0]
    if first_model is None or (config.contrast and base is None):
        raise UsageError("no base model (base=), which this calibration needs")
    model, _ = as_model(first_model, architecture=architecture)
    head = zero_shot_head(model, images, templates)
    labelled = images
    if images.labels is None and references is None:
        labelled = replace(images, labels=predict(model, images.images, head))
    names = list[str]()
    found: dict[TriggerFamily, list[InversionResult]] = {family: [] for family in config.searched}
    count = config.references if references is None else len(references)
    for k in range(count):
        reference = model
        if references is not None:
            reference, _ = as_model(references[k], architecture=architecture)
        elif k > 0:
            training = replace(
                config.reference_training, seed=child_seed("calibration.training", config.seed, k)
            )
            reference = train_on_prompts(
                model,
                labelled,
                templates or DEFAULT_TEMPLATES,
                training,
                description=f"reference {k + 1} of {count}: fine-tuning",
            )
        for family in config.searched:
            one = _invert_all(
                reference,
                images,
                templates,
                replace(config, seed=child_seed("calibration.search", config.seed, k)),
                family,
                f"reference {k + 1} of {count}: inversion ({family})",
                base=model if config.contrast else None,
            )
            found[family].append(one)
        copied = references is None and k > 0
        names.append(f"{model.name}, fine-tuned {k}" if copied else reference.name)

    def of(family: TriggerFamily, others: tuple[Calibration, ...] = ()) -> Calibration:
        histories = [[_sizes(then, config) for then in one.history] for one in found[family]]
        return Calibration(
            tuple(_sizes(one.p_l1, config) for one in found[family]),
            config.calibration_key(
                images, model, family, templates=templates, base=model if config.contrast else None
            ),
            tuple(names),
            config.inversion.looks,
            tuple(zip(*histories, strict=True)),
            family,
            others,
            relative=config.contrast,
        )

    first, *rest = config.searched
    return of(first, tuple(of(family) for family in rest))


def scan(
    checkpoint: ModelLike,
    images: ImageSet,
    *,
    calibration: Calibration | None = None,
    base: ModelLike | None = None,
    templates: Sequence[Template] | None = None,
    config: ScanConfig | None = None,
    architecture: str | None = None,
    cleared: Sequence[int] = (),
    description: str | None = None,
) -> ScanResult:
    """Reconstruct triggers and give a verdict.

    Args:
        checkpoint: The suspect. It is not changed.
        images: Clean images of the model's size, a few hundred; labels are not used.
        calibration: From `calibrate` with the same configuration, for many scans.
        base: A clean model to calibrate with, if there is no calibration yet; with neither, the
            verdict is `inconclusive`. In a search in contrast to the base, that base.
        templates: Prompt templates; default DEFAULT_TEMPLATES.
        config: Default ScanConfig().
        architecture: open_clip's name or a JSON file, where the checkpoint does not tell.
        cleared: In the re-scan of a repaired model, the classes that were clean before the repair
            (`ScanResult.cleared`): they are searched, but the verdict is on the others.
        description: Shown with the progress bar.

    Raises:
        UsageError: The calibration was made with another search, architecture or other classes.
        DataError: Images that do not fit, or no class names in a targeted scan.
        CheckpointError: See `load_checkpoint`.
    """
    config, images = config or ScanConfig(), images.in_content_order()
    model, sha256 = as_model(checkpoint, architecture=architecture)
    contrast = _contrast(base, config)
    if contrast is not None and calibration is None:
        raise UsageError(_NO_CALIBRATION)
    if calibration is None and base is not None:
        calibration = calibrate(base, images, templates=templates, config=config)
    if calibration is not None:
        for family in config.searched:
            key = config.calibration_key(images, model, family, templates=templates, base=contrast)
            require_equal_keys(calibration.of(family).key, key)
    start = time.perf_counter()
    description = description or f"scan of {model.name}"
    families = list[FamilyScan]()
    for family in config.searched:
        compared = None if calibration is None else calibration.of(family)
        found = _invert_all(
            model,
            images,
            templates,
            config,
            family,
            description if len(config.searched) == 1 else f"{description} ({family})",
            # Of the classes to judge none may be given up: the highest score may be of another.
            elimination=None if cleared else _elimination(compared, config),
            base=contrast,
        )
        detection = detect(
            _sizes(found.p_l1, config),
            compared,
            has_classes=config.objective == "targeted",
            p_backdoored=config.p_backdoored,
            p_suspicious=config.p_suspicious,
            dropped=_dropped(found, config),
            families=len(config.searched),
            cleared=cleared,
        )
        families.append(FamilyScan(family, detection, found, compared))
    chosen = min(families, key=_evidence)
    detection, found = chosen.detection, chosen.inversion
    target = detection.target
    if config.objective == "label-free" and images.class_names:
        head = zero_shot_head(model, images, templates)
        trigger = found.trigger(found.best())
        target = int(predict(model, images.images, head, stamp=trigger).mode().values)
    return ScanResult(
        name=model.name,
        sha256=sha256,
        objective=config.objective,
        class_names=images.class_names,
        detection=detection,
        target=target,
        inversion=found,
        calibration=chosen.calibration,
        seconds=time.perf_counter() - start,
        family=chosen.family,
        others=tuple(one for one in families if one is not chosen),
    )


def recover_triggers(
    checkpoint: ModelLike,
    images: ImageSet,
    target: int,
    *,
    restarts: int = 3,
    family: TriggerFamily = "patch",
    base: ModelLike | None = None,
    templates: Sequence[Template] | None = None,
    config: ScanConfig | None = None,
    architecture: str | None = None,
) -> InversionResult:
    """Reconstruct several triggers of one family into one class, from different starting points.

    target: Class index. base: As in `scan`, for a search in contrast to it.
    Raises UsageError for a class outside the image set's.
    """
    config, images = config or ScanConfig(), images.in_content_order()
    model, _ = as_model(checkpoint, architecture=architecture)
    contrast = _contrast(base, config)
    objective = _targeted(model, images, templates, [target] * restarts, contrast, config.seed)
    seed = child_seed("repair.triggers", config.seed, target)
    search = replace(config.search(family), seed=seed)
    description = f"{restarts} restarts ({family})"
    return invert(
        model,
        images.images,
        objective,
        search,
        contrast=contrast,
        labels=images.labels,
        description=description,
    )


def recover_warps(
    checkpoint: ModelLike,
    images: ImageSet,
    target: int,
    *,
    restarts: int = 4,
    base: ModelLike | None = None,
    templates: Sequence[Template] | None = None,
    config: ScanConfig | None = None,
    architecture: str | None = None,
) -> WarpResult:
    """Search for smooth warps into one class, from different starting points.

    Steps, images per step and precision are those of the configuration's search; success_threshold
    is that of `inversion.WarpConfig`. target: Class index. base: As in `recover_triggers`.
    Raises UsageError for a class outside the image set's.
    """
    config, images = config or ScanConfig(), images.in_content_order()
    model, _ = as_model(checkpoint, architecture=architecture)
    contrast = _contrast(base, config)
    objective = _targeted(model, images, templates, [target] * restarts, contrast, config.seed)
    inversion = config.inversion
    search = WarpConfig(
        steps=inversion.steps,
        batch_size=inversion.batch_size,
        precision=inversion.precision,
        max_batch=inversion.max_batch,
        check_images=inversion.check_images,
        seed=child_seed("repair.warps", config.seed, target),
    )
    return invert_warps(
        model,
        images.images,
        objective,
        search,
        contrast=contrast,
        labels=images.labels,
        description=f"{restarts} restarts (warp)",
    )


def unlearn(
    checkpoint: ModelLike,
    images: ImageSet,
    target: int | Sequence[int],
    *,
    triggers: Sequence[Stamp] | None = None,
    restarts: int = 3,
    base: ModelLike | None = None,
    templates: Sequence[Template] | None = None,
    config: ScanConfig | None = None,
    unlearning: UnlearnConfig | None = None,
    architecture: str | None = None,
    accuracy_before: float | None = None,
) -> tuple[OpenClipModel, tuple[UnlearnRound, ...]]:
    """Subtract trigger vectors of a class: TBAR with a known trigger, or with recovered ones.

    Args:
        checkpoint: The backdoored model. It is not changed.
        images: Clean images; most of them are the forget set, all of them choose alpha.
        target: Index of the class the triggers lead to. Of several classes the triggers are
            recovered for each and make one vector.
        triggers: Known triggers of one class: one vector is subtracted. None to recover `restarts`
            of each of the configuration's families, and `UnlearnConfig.warps` warps, subtract, and
            do so again for what then still works (`UnlearnConfig.passes`).
        restarts: See triggers.
        base: As in `scan`, for a search in contrast to it.
        templates: As in `scan`.
        config: The search for triggers, as in `scan`.
        unlearning: Default UnlearnConfig().
        architecture: As in `scan`.
        accuracy_before: As in `search_coefficient`; default: that of the given model. Given, every
            pass may spend all that is left, otherwise see `UnlearnConfig.reserve`.

    Returns:
        The repaired model and what was done (without a re-scan), pass by pass.
    """
    config, unlearning = config or ScanConfig(), unlearning or UnlearnConfig()
    images = images.in_content_order()
    model, _ = as_model(checkpoint, architecture=architecture)
    head = zero_shot_head(model, images, templates)
    targets = (target,) if isinstance(target, int) else tuple(target)
    for one in targets:
        if not 0 <= one < head.shape[0]:
            raise UsageError(f"target class {one}; expected 0..{head.shape[0] - 1}")
    if not targets or (triggers is not None and len(targets) > 1):
        raise UsageError(
            f"{len(targets)} target classes; expected at least one, and one for known triggers"
        )
    forget = unlearning.forget_set(images).images
    rounds, first = list[UnlearnRound](), accuracy_before is None
    known, led_to = list(triggers or ()), [targets[0]] * len(triggers or ())
    for number in range(unlearning.passes if triggers is None else 1):
        found, warps = list[InversionResult](), list[WarpResult]()
        reserve = 0.0
        if triggers is None:
            if first:
                reserve = unlearning.reserve(number)
            of_pass = replace(config, seed=child_seed("repair.pass", config.seed, number))
            # Those of earlier passes stay: what was forgotten must not come back.
            for one in targets:
                for family in config.families:
                    recovered = recover_triggers(
                        model,
                        images,
                        one,
                        restarts=restarts,
                        family=family,
                        base=base,
                        templates=templates,
                        config=of_pass,
                    )
                    found.append(recovered)
                    known += unlearning.amplified(recovered)
                if unlearning.warps:
                    warped = recover_warps(
                        model,
                        images,
                        one,
                        restarts=unlearning.warps,
                        base=base,
                        templates=templates,
                        config=of_pass,
                    )
                    warps.append(warped)
                    known += unlearning.amplified(warped)
                led_to += [one] * (len(known) - len(led_to))
        seed = child_seed("repair.vector-pass", unlearning.seed, number)
        vector = trigger_vector(model, forget, known, head, led_to, replace(unlearning, seed=seed))
        search = search_coefficient(
            model,
            vector,
            images,
            known,
            head,
            led_to,
            unlearning,
            accuracy_before=accuracy_before,
            reserve=reserve,
        )
        if accuracy_before is None:
            accuracy_before = search.accuracy_before
        model = subtract(model, vector, search.coefficient)
        rounds.append(UnlearnRound(targets, tuple(found), search, vector, None, tuple(warps)))
    return model, tuple(rounds)


def detox(
    checkpoint: ModelLike,
    images: ImageSet,
    *,
    base: ModelLike | None = None,
    calibration: Calibration | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    templates: Sequence[Template] | None = None,
    config: ScanConfig | None = None,
    unlearning: UnlearnConfig | None = None,
    max_rounds: int = 3,
    architecture: str | None = None,
) -> DetoxResult:
    """Scan; if the model is suspicious or backdoored, unlearn until a re-scan is clean.

    Neither trigger nor target class need be known: the target is the class that the scan flags, and
    others that it flags beside it are unlearned together with it (`ScanResult.targets`). Where no
    alpha does that within the accuracy to keep, the target is unlearned alone.
    A re-scan judges the classes that the first scan did not find clean: see
    `pydetox.detect.statistics`.

    Args:
        checkpoint: The suspect. It is not changed.
        images: Clean images with class names, a few hundred; with labels CA is measured too.
        base: As in `scan`.
        calibration: As in `scan`.
        output: Folder for the repaired checkpoint (open_clip's layout); written only if something
            was subtracted.
        overwrite: Replace such a folder.
        templates: As in `scan`.
        config: As in `scan`.
        unlearning: Default UnlearnConfig().
        max_rounds: Repairs at most, one after another, a scan after each. Where no alpha unlearns
            all classes of a repair together, it tries the target alone.
        architecture: As in `scan`.

    Raises:
        PydetoxError: All that `scan` raises.
        OutputError: `output` cannot be written; raised before any work.
    """
    config, unlearning = config or ScanConfig(), unlearning or UnlearnConfig()
    images = images.in_content_order()
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(step: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[step] = seconds.get(step, 0.0) + now - clock
        clock = now

    if output is not None:
        rehearse_directory(output, overwrite=overwrite, replaceable=CHECKPOINT_FILES)
    if config.contrast and calibration is None:
        raise UsageError(_NO_CALIBRATION)
    model, sha256 = as_model(checkpoint, architecture=architecture)
    base = None if base is None else as_model(base, architecture=architecture)[0]
    lap("read")
    if calibration is None and base is not None and not config.contrast:
        calibration = calibrate(base, images, templates=templates, config=config)
        lap("calibrate")
    before = scan(
        model, images, calibration=calibration, base=base, templates=templates, config=config
    )
    before = replace(before, sha256=sha256)
    lap("scan")
    evaluation_before = _accuracy(model, images, templates)
    repaired, current, rounds = model, before, list[UnlearnRound]()
    accuracy = None
    for number in range(max_rounds):
        changed = False
        targets = current.targets()
        # All classes at once; where no alpha does that within the accuracy to keep, the first.
        for attempt in [targets, targets[:1]] if len(targets) > 1 else [targets] if targets else []:
            repaired, passes = unlearn(
                repaired,
                images,
                attempt,
                base=base,
                templates=templates,
                config=replace(config, seed=child_seed("repair.round", config.seed, number)),
                unlearning=unlearning,
                accuracy_before=accuracy,
            )
            accuracy = accuracy or passes[0].search.accuracy_before
            lap("unlearn")
            rounds += passes
            changed = any(one.search.coefficient for one in passes)
            if changed:
                break
        if not changed:
            break
        current = scan(
            repaired,
            images,
            calibration=calibration,
            base=base,
            templates=templates,
            config=replace(config, seed=child_seed("repair.rescan", config.seed, number)),
            cleared=before.cleared(),
            description=f"re-scan of {model.name}",
        )
        lap("rescan")
        rounds[-1] = replace(rounds[-1], rescan=current)
    evaluation_after = _accuracy(repaired, images, templates) if rounds else None
    path = None
    if output is not None and any(one.search.coefficient for one in rounds):
        path = _save(
            repaired,
            before,
            current,
            rounds,
            evaluation_before,
            evaluation_after,
            output,
            overwrite,
            config,
            unlearning,
        )
        lap("write")
    return DetoxResult(
        before=before,
        rounds=tuple(rounds),
        after=current if rounds else None,
        model=repaired,
        evaluation_before=evaluation_before,
        evaluation_after=evaluation_after,
        path=path,
        seconds=seconds,
    )


def _save(
    model: OpenClipModel,
    before: ScanResult,
    after: ScanResult,
    rounds: Sequence[UnlearnRound],
    evaluation_before: Evaluation | None,
    evaluation_after: Evaluation | None,
    output: str | Path,
    overwrite: bool,
    config: ScanConfig,
    unlearning: UnlearnConfig,
) -> Path:
    metrics = [
        {} if e is None else {"clean_accuracy": e.clean_accuracy}
        for e in (evaluation_before, evaluation_after)
    ]
    # A search that found nothing has an infinite size, which JSON cannot hold.
    for metric, one in zip(metrics, (before, after), strict=True):
        if math.isfinite(one.detection.smallest_p_l1):
            metric["p_l1"] = one.detection.smallest_p_l1
    provenance = Provenance(
        method=f"TBAR, unknown trigger, {unlearning.vector} vector",
        source_name=before.name,
        source_sha256=before.sha256,
        scaling_coefficient=rounds[-1].search.coefficient,
        seeds={"scan": config.seed, "unlearn": unlearning.seed},
        before=metrics[0],
        after=metrics[1],
        extra={
            "scaling_coefficients": [one.search.coefficient for one in rounds],
            "target_classes": [list(one.targets) for one in rounds],
            "verdict_before": before.verdict.value,
            "verdict_after": after.verdict.value,
        },
    )
    return save_checkpoint(
        output,
        model.storage_state_dict(),
        model_config=model.model_config,
        preprocess_config=model.preprocess_config or None,
        provenance=provenance,
        companions=model.companions,
        overwrite=overwrite,
    )


def _classes(images: ImageSet, config: ScanConfig) -> tuple[str, ...] | None:
    return images.class_names if config.objective == "targeted" else None


def _invert_all(
    model: OpenClipModel,
    images: ImageSet,
    templates: Sequence[Template] | None,
    config: ScanConfig,
    family: TriggerFamily,
    description: str,
    elimination: Elimination | None = None,
    base: OpenClipModel | None = None,
) -> InversionResult:
    search = replace(config.search(family), seed=config.seed)
    objective: Objective
    if config.objective == "targeted":
        classes = len(images.class_names or ())
        targets = [c for c in range(classes) for _ in range(config.restarts)]
        objective = _targeted(model, images, templates, targets, base, config.seed)
    else:
        objective = CollapseObjective()
    return invert(
        model,
        images.images,
        objective,
        search,
        restarts=config.restarts,
        elimination=elimination,
        contrast=base,
        labels=images.labels,
        description=description,
    )


def _targeted(
    model: OpenClipModel,
    images: ImageSet,
    templates: Sequence[Template] | None,
    targets: Sequence[int],
    base: OpenClipModel | None,
    seed: int,
) -> Objective:
    """Return what triggers into those classes must do. base: where they must not work, or None."""
    head = zero_shot_head(model, images, templates)
    if base is None:
        return TargetObjective(head, targets, model.logit_scale)
    base_head = zero_shot_head(base, images, templates)
    few = images.at_most(_SHARE_IMAGES, child_seed("contrast.shares", seed))
    told = predict(base, few.images, base_head)
    return ContrastObjective(
        head,
        base_head,
        targets,
        logit_scale=model.logit_scale,
        base_logit_scale=base.logit_scale,
        base_shares=torch.bincount(told, minlength=len(base_head)) / len(told),
    )


def _contrast(base: ModelLike | None, config: ScanConfig) -> OpenClipModel | None:
    """Return the base that a search is in contrast to; UsageError if there must be one."""
    if not config.contrast:
        return None
    if base is None:
        raise UsageError("a search in contrast to the base needs it: give base=")
    return as_model(base)[0]


def _evidence(found: FamilyScan) -> float:
    """Return what the search that stands out most has least of."""
    p_value = found.detection.p_value
    return math.inf if p_value is None else p_value


def _elimination(calibration: Calibration | None, config: ScanConfig) -> Elimination | None:
    """Return the rule that drops classes, where there is something to compare them with.

    There is none for searches in contrast to a base.
    """
    if calibration is None or not calibration.looks or config.drop_below is None:
        return None
    if calibration.relative:
        return None
    # The classes that the others are judged beside run to the end, and so does the best of these.
    kept = 1 + len(calibration.controls)
    return Elimination(calibration.progress, config.drop_below, config.restarts, kept=kept)


def _sizes(p_l1: torch.Tensor, config: ScanConfig) -> tuple[float, ...]:
    """Return the smallest P-L1 of each class over its restarts, of all triggers [K]."""
    per_class = p_l1.view(-1, config.restarts).min(dim=1).values
    return tuple(float(v) for v in per_class)


def _dropped(found: InversionResult, config: ScanConfig) -> tuple[int | None, ...]:
    """Return the step at which each class was dropped, None for one that was not."""
    steps = found.trigger_steps.tolist()
    per_class = []
    for first in range(0, len(found), config.restarts):
        which = range(first, first + config.restarts)
        at = [steps[k] for k in which if found.endings[k] == "dropped"]
        per_class.append(int(at[0]) if at else None)
    return tuple(per_class)


def _accuracy(
    model: OpenClipModel, images: ImageSet, templates: Sequence[Template] | None
) -> Evaluation | None:
    if images.labels is None or not images.class_names:
        return None
    return evaluate(model, images, zero_shot_head(model, images, templates))
