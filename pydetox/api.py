"""The steps from a suspicious checkpoint to a repaired one, as functions.

`calibrate` makes the clean references of a verdict. `scan` reconstructs a trigger for every class
and gives a verdict. `unlearn` subtracts trigger vectors. `detox` does all of it and scans the
repaired model again. `evaluate` measures accuracy. Each opens a `Session`, which resolves models
and images, and calls the module of its step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from .atomic import rehearse_directory
from .checkpoints import CHECKPOINT_FILES
from .data import ImageData, Template
from .detect.configuration import ScanConfig
from .detect.references import ReferencePlan, calibrate_plan
from .detect.result import ScanResult
from .detect.scan import scan_session
from .detect.statistics import Calibration, RepairHistory
from .errors import DataError, OutputError, UsageError
from .evaluation import Evaluation, Stamp
from .evaluation import evaluate as evaluate_head
from .inversion import InversionResult, TriggerFamily, WarpResult
from .models import OpenClipModel
from .repair.configuration import UnlearnConfig
from .repair.detox import KnownTarget, repair_session
from .repair.passes import subtract_passes
from .repair.recovery import recover_patches_or_blends, recover_smooth_warps
from .repair.result import DetoxResult, UnlearnRound
from .session import ModelLike, Session, as_model


def calibrate(
    base: ModelLike | None,
    images: ImageData,
    *,
    references: Sequence[ModelLike] | None = None,
    suspects: Sequence[ModelLike] = (),
    templates: Sequence[Template] | None = None,
    class_names: Sequence[str] | None = None,
    config: ScanConfig | None = None,
    architecture: str | None = None,
) -> Calibration:
    """Scan clean reference models, and return their trigger sizes for later verdicts.

    The references are the given models or, without any, copies of the base that are fine-tuned on
    the images until their weights have moved about as far from the base as the suspects' have.

    Args:
        base: A model that you believe to be clean, of the same architecture as the suspects, at
            best the pre-trained model that they were fine-tuned from. If references are given as
            well, triggers are searched in contrast to this base; None then searches them plainly.
        images: As in `scan`, with class names. Copies learn labels, or the base's predictions.
        references: At least two models that you believe to be clean and that were made as the
            suspects were, such as other fine-tunings of the base. Prefer them to copies if you have
            some. A search in contrast to the base (`ScanConfig.contrast`) needs them: a copy that a
            few images have hardly changed does not show what harmless fine-tuning does.
        suspects: The models that the calibration is for, if copies are made and
            `ScanConfig.reference_training` does not say how. Suspects that moved about as far share
            references (see `detect.references`). One that moved too far is left out with a warning.
        templates: As in `scan`.
        class_names: As in `scan`.
        config: As in `scan`. `references` and `reference_training` describe the copies.
        architecture: As in `scan`.

    Raises:
        UsageError: There is neither a base nor references, there are fewer than two references, a
            search in contrast to a base lacks the base or the references, or there are no suspects
            although copies are to be matched to them.
        DataError: The images do not fit the model or have no class names, or no suspect can be
            matched.
        CheckpointError: See `load_checkpoint`.
    """
    plan = ReferencePlan.decide(config, base=base, references=references)
    if not plan.makes_calibration:
        raise UsageError("no base model and no reference models: give base=, references= or both")
    models = [one for one in (plan.base, *(plan.references or ())) if one is not None]
    first = as_model(models[0], architecture=architecture)  # all of them need the same images
    plan = replace(plan, base=first) if plan.base is not None else plan
    session = Session.open(first, images, templates=templates, class_names=class_names)
    session.warn()
    return calibrate_plan(
        plan, session.images, suspects, templates=session.templates, read=_reader(architecture)
    )


def scan(
    checkpoint: ModelLike,
    images: ImageData,
    *,
    calibration: Calibration | None = None,
    base: ModelLike | None = None,
    references: Sequence[ModelLike] | None = None,
    templates: Sequence[Template] | None = None,
    class_names: Sequence[str] | None = None,
    config: ScanConfig | None = None,
    architecture: str | None = None,
    cleared: Sequence[int] = (),
    description: str | None = None,
) -> ScanResult:
    """Reconstruct triggers and give a verdict.

    Args:
        checkpoint: The suspect: the name of a checkpoint, or an object (a model of open_clip, a
            CLIPModel of transformers, a `VisionLanguageModel`, or the result of `from_encoder`). It
            is not changed.
        images: A few hundred clean images: an `ImageSet` of the model's size, or anything that
            `load_images` reads, such as a folder, an array uint8 [N, H, W, 3], a list of Pillow's
            images, or a data set of torch or Hugging Face. If there are labels, they only tell
            whether the images mean anything to the model (see `ScanResult.warnings`).
        calibration: The result of `calibrate` with the same configuration, images and prompts. One
            calibration serves many scans.
        base: A clean model to calibrate with, if there is no calibration yet, at best the model
            that the suspect was fine-tuned from: references are copies of it that move as far as
            the suspect has moved. In a search in contrast to a base, this is that base. Without
            calibration, base and references, the verdict is `inconclusive`.
        references: Clean models to calibrate with, as in `calibrate`.
        templates: Prompt templates; default: those that suit the images.
        class_names: The classes, in the order that defines the labels, as in `load_images`. None to
            use the names that come with the images or with the head of an `EncoderModel`.
        config: How to scan; default: ScanConfig().
        architecture: open_clip's name or a JSON file, if the checkpoint does not tell it.
        cleared: The classes that were clean before the repair (`ScanResult.cleared`), in the
            re-scan of a repaired model. They are searched, but the verdict concerns the others.
        description: A text that is shown with the progress bar.

    Raises:
        UsageError: The calibration was made with another search, architecture or preprocessing, or
            with other images, classes or prompts; the message names what differs. Or a search in
            contrast to a base lacks the base or anything to compare with. Both are raised before
            the search.
        DataError: The images do not fit the model, or a targeted scan has no class names.
        CheckpointError: See `load_checkpoint`.
    """
    plan = ReferencePlan.decide(config, base=base, references=references, calibration=calibration)
    session = Session.open(
        checkpoint, images, templates=templates, class_names=class_names, architecture=architecture
    )
    session.warn()
    comparison = plan.prepare(
        session.images,
        templates=session.templates,
        read=_reader(architecture),
        suspect=session.model,
    )
    session = session.with_base(comparison.base)
    history = RepairHistory.clearing(cleared)
    return scan_session(session, comparison, history=history, description=description)


def recover_triggers(
    checkpoint: ModelLike,
    images: ImageData,
    target: int | str,
    *,
    restarts: int = 3,
    family: TriggerFamily = "patch",
    base: ModelLike | None = None,
    templates: Sequence[Template] | None = None,
    class_names: Sequence[str] | None = None,
    config: ScanConfig | None = None,
    architecture: str | None = None,
) -> InversionResult:
    """Reconstruct several triggers of one family into one class, from different starting points.

    Args:
        checkpoint: As in `scan`.
        images: As in `scan`.
        target: The class that the triggers lead to, as an index or a name.
        restarts: The number of triggers.
        family: The family of triggers, one of `inversion.FAMILIES`.
        base: The base of a search in contrast to it; None for a plain search.
        templates: As in `scan`.
        class_names: As in `scan`.
        config: As in `scan`.
        architecture: As in `scan`.

    Raises:
        UsageError: The image set has no such class.
        PydetoxError: All that `scan` raises.
    """
    session, config = _searching(
        checkpoint, images, base, templates, class_names, config, architecture
    )
    index = session.class_index(target)
    return recover_patches_or_blends(session, index, family, config, restarts=restarts)


def recover_warps(
    checkpoint: ModelLike,
    images: ImageData,
    target: int | str,
    *,
    restarts: int = 4,
    base: ModelLike | None = None,
    templates: Sequence[Template] | None = None,
    class_names: Sequence[str] | None = None,
    config: ScanConfig | None = None,
    architecture: str | None = None,
) -> WarpResult:
    """Search for smooth warps into one class, from different starting points.

    The number of steps, the images per step and the precision are those of `config.inversion`. The
    success threshold is that of `inversion.WarpConfig`. Arguments and errors are those of
    `recover_triggers`.
    """
    session, config = _searching(
        checkpoint, images, base, templates, class_names, config, architecture
    )
    index = session.class_index(target)
    return recover_smooth_warps(session, index, config, restarts=restarts)


def unlearn(
    checkpoint: ModelLike,
    images: ImageData,
    target: int | str | Sequence[int],
    *,
    triggers: Sequence[Stamp] | None = None,
    restarts: int = 3,
    base: ModelLike | None = None,
    templates: Sequence[Template] | None = None,
    class_names: Sequence[str] | None = None,
    config: ScanConfig | None = None,
    unlearning: UnlearnConfig | None = None,
    architecture: str | None = None,
    accuracy_before: float | None = None,
) -> tuple[OpenClipModel, tuple[UnlearnRound, ...]]:
    """Subtract trigger vectors of a class: TBAR with a known trigger, or with recovered ones.

    With known triggers, one vector is subtracted. Otherwise this function recovers triggers and
    subtracts their vector, and repeats both for triggers that still work (`UnlearnConfig.passes`).

    Args:
        checkpoint: The backdoored model. It is not changed.
        images: Clean images, as in `scan`. Most of them are the forget set. All of them choose
            alpha.
        target: The class that the triggers lead to, as an index or a name. If several classes are
            given, triggers are recovered for each of them and make one vector.
        triggers: Known triggers into one class; None to recover triggers: `restarts` of each family
            in `config.families`, and `UnlearnConfig.warps` warps.
        restarts: The number of triggers of each family to recover.
        base: The base of a search in contrast to it (see `ScanConfig.contrast`).
        templates: As in `scan`.
        class_names: As in `scan`.
        config: The search for triggers, as in `scan`.
        unlearning: How to unlearn; default: UnlearnConfig().
        architecture: As in `scan`.
        accuracy_before: The clean accuracy that CA is compared with, as in `search_coefficient`;
            default: that of the given model. If it is given, every pass may spend all accuracy that
            is left; otherwise see `UnlearnConfig.reserve`.

    Returns:
        The repaired model, and what each pass did. There is no re-scan.
    """
    session, config = _searching(
        checkpoint, images, base, templates, class_names, config, architecture
    )
    targets = [target] if isinstance(target, int | str) else list(target)
    return subtract_passes(
        session,
        tuple(session.class_index(one) for one in targets),
        config,
        unlearning or UnlearnConfig(),
        triggers=triggers,
        restarts=restarts,
        accuracy_before=accuracy_before,
    )


def detox(
    checkpoint: ModelLike,
    images: ImageData,
    *,
    base: ModelLike | None = None,
    references: Sequence[ModelLike] | None = None,
    calibration: Calibration | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    templates: Sequence[Template] | None = None,
    class_names: Sequence[str] | None = None,
    config: ScanConfig | None = None,
    unlearning: UnlearnConfig | None = None,
    max_rounds: int = 3,
    triggers: Sequence[Stamp] | None = None,
    target: int | str | None = None,
    architecture: str | None = None,
) -> DetoxResult:
    """Scan a model and, if it is suspicious or backdoored, unlearn until a re-scan is clean.

    You need to know neither the trigger nor the target class. The target is the class that the scan
    flags. Other classes that it flags are unlearned together with the target
    (`ScanResult.targets`). If no alpha does so within the accuracy to keep, the target is unlearned
    alone. A re-scan flags a class only if it stands out before the repair and after it (see
    `pydetox.detect.rescan`).

    If `target` is given, one repair is made, whatever the first scan says, with known or recovered
    triggers.

    Args:
        checkpoint: The suspect. It is not changed.
        images: A few hundred clean images with class names, as in `scan`. With labels, CA is
            measured as well.
        base: As in `scan`.
        references: As in `scan`.
        calibration: As in `scan`.
        output: The folder for the repaired checkpoint. It has the layout of the suspect, or
            open_clip's if the suspect is a single file. It is written only if something was
            subtracted.
        overwrite: Whether to replace an earlier folder of this kind.
        templates: As in `scan`.
        class_names: As in `scan`.
        config: As in `scan`.
        unlearning: How to unlearn; default: UnlearnConfig().
        max_rounds: The largest number of repairs. A scan follows each of them.
        triggers: Known triggers into `target`; None to recover triggers.
        target: A class to unlearn whatever the verdict is, as an index or a name; None to unlearn
            what the scan finds.
        architecture: As in `scan`.

    Raises:
        OutputError: `output` cannot be written, or no folder can hold the model
            (`OpenClipModel.layout_obstacle`). This is raised before any work.
        PydetoxError: All that `scan` raises.
    """
    if triggers is not None and (target is None or not triggers):
        raise UsageError(
            "triggers= needs target=, the class they lead to, and at least one of them"
        )
    if max_rounds < 1:
        raise UsageError(f"max_rounds {max_rounds}; expected at least 1")
    plan = ReferencePlan.decide(config, base=base, references=references, calibration=calibration)
    if output is not None:
        rehearse_directory(output, overwrite=overwrite, replaceable=CHECKPOINT_FILES)
    start = time.perf_counter()
    session = Session.open(
        checkpoint, images, templates=templates, class_names=class_names, architecture=architecture
    )
    if output is not None and session.model.layout_obstacle is not None:
        raise OutputError(f"{session.model.name}: {session.model.layout_obstacle}")
    session.warn()
    known = None
    if target is not None:
        known = KnownTarget(session.class_index(target), tuple(triggers or ()))
    seconds = {"read": time.perf_counter() - start}
    return repair_session(
        session,
        plan,
        unlearning or UnlearnConfig(),
        known=known,
        max_rounds=max_rounds,
        output=output,
        overwrite=overwrite,
        read=_reader(architecture),
        seconds=seconds,
    )


def evaluate(
    checkpoint: ModelLike,
    images: ImageData,
    head: Tensor | None = None,
    *,
    trigger: Stamp | None = None,
    target: int | str | None = None,
    templates: Sequence[Template] | None = None,
    class_names: Sequence[str] | None = None,
    architecture: str | None = None,
    batch_size: int = 256,
    description: str | None = None,
) -> Evaluation:
    """Measure CA and, with a trigger and its target class, ASR on the images of other classes.

    Args:
        checkpoint: As in `scan`.
        images: Images with labels and class names, as in `scan`.
        head: The class head [C, D]; default: the model's own for the class names.
        trigger: A function from uint8 [n, 3, H, W] to uint8 [n, 3, H, W], such as a trigger.
        target: The class that the trigger leads to, as an index or a name.
        templates: As in `scan`.
        class_names: As in `scan`.
        architecture: As in `scan`.
        batch_size: The number of images per batch.
        description: A text that is shown with a progress bar; None for no bar.

    Raises:
        DataError: The images have no labels or no class names, or do not fit the model.
        UsageError: There is a trigger without a target or a target without a trigger, or there is
            no such class.
        PydetoxError: All that `scan` raises for models and images.
    """
    if (trigger is None) != (target is None):
        raise UsageError("trigger and target class go together; only one of them was given")
    session = Session.open(
        checkpoint, images, templates=templates, class_names=class_names, architecture=architecture
    )
    session.warn(examine=False)
    if session.images.labels is None:
        name = session.images.name
        raise DataError(f"{name}: no labels; accuracy cannot be measured without them")
    index = target
    if isinstance(target, str) or (head is None and target is not None):
        index = session.class_index(target)
    assert not isinstance(index, str)
    return evaluate_head(
        session.model,
        session.images,
        session.head if head is None else head,
        trigger=trigger,
        target=index,
        batch_size=batch_size,
        description=description,
    )


def _reader(architecture: str | None) -> Callable[[ModelLike], OpenClipModel]:
    return partial(as_model, architecture=architecture)


def _searching(
    checkpoint: ModelLike,
    images: ImageData,
    base: ModelLike | None,
    templates: Sequence[Template] | None,
    class_names: Sequence[str] | None,
    config: ScanConfig | None,
    architecture: str | None,
) -> tuple[Session, ScanConfig]:
    """Open the session of a search for given classes, which compares with nothing but a base."""
    config = config or ScanConfig()
    contrast = base is not None if config.contrast is None else config.contrast
    if contrast and base is None:
        raise UsageError("a search in contrast to the base needs it: give base=")
    session = Session.open(
        checkpoint,
        images,
        templates=templates,
        class_names=class_names,
        base=_reader(architecture)(base) if contrast and base is not None else None,
        architecture=architecture,
    )
    session.warn()
    return session, replace(config, contrast=contrast)
