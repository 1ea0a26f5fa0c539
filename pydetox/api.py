"""The steps from a suspicious checkpoint to a repaired one, as functions.

`scan` reconstructs a trigger for every class and gives a verdict, `calibrate` makes the clean
references that a verdict needs, `unlearn` subtracts trigger vectors, `detox` does all of it and
scans the repaired model again. Each opens a `Session` and calls the step's own module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from .atomic import rehearse_directory
from .checkpoints import CHECKPOINT_FILES
from .data import ImageSet, Template
from .detect.configuration import ScanConfig
from .detect.references import ReferencePlan
from .detect.result import ScanResult
from .detect.scan import scan_session
from .detect.statistics import Calibration
from .errors import UsageError
from .evaluation import Stamp
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
            model they were fine-tuned from, at best. With references, what triggers are searched
            in contrast to; None for plain searches in them.
        images: The defender's; without labels the base's own predictions serve.
        references: Models believed clean that were made as the suspects were: other fine-tunings of
            the base, say. At least 2. Better than copies where there are some, and needed in
            contrast to the base (`ScanConfig.contrast`): a copy that a few images have hardly moved
            says nothing of what harmless fine-tuning does.
        templates: As in `scan`.
        config: As in `scan`. `references` and `reference_training` are of copies.
        architecture: As in `scan`.

    Raises:
        UsageError: No base and no references, less than two references, or a search in contrast to
            a base without base or references.
        DataError: Images that do not fit, or without class names.
        CheckpointError: See `load_checkpoint`.
    """
    plan = ReferencePlan.decide(config, base=base, references=references)
    if not plan.makes_calibration:
        raise UsageError("no base model and no reference models: give base=, references= or both")
    comparison = plan.prepare(images, templates=templates, read=_reader(architecture))
    calibration = comparison.calibration
    assert calibration is not None
    return calibration


def scan(
    checkpoint: ModelLike,
    images: ImageSet,
    *,
    calibration: Calibration | None = None,
    base: ModelLike | None = None,
    references: Sequence[ModelLike] | None = None,
    templates: Sequence[Template] | None = None,
    config: ScanConfig | None = None,
    architecture: str | None = None,
    cleared: Sequence[int] = (),
    description: str | None = None,
) -> ScanResult:
    """Reconstruct triggers and give a verdict.

    Args:
        checkpoint: The suspect. It is not changed.
        images: Clean images, uint8 [N, 3, H, W] of the model's size, a few hundred; labels are not
            used.
        calibration: From `calibrate` with the same configuration, images and prompts, for many
            scans.
        base: A clean model to calibrate with, if there is no calibration yet; with neither, the
            verdict is `inconclusive`. In a search in contrast to the base, that base.
        references: Clean models to calibrate with, as in `calibrate`.
        templates: Prompt templates; default DEFAULT_TEMPLATES.
        config: Default ScanConfig().
        architecture: open_clip's name or a JSON file, where the checkpoint does not tell.
        cleared: In the re-scan of a repaired model, the classes that were clean before the repair
            (`ScanResult.cleared`): they are searched, but the verdict is on the others.
        description: Shown with the progress bar.

    Raises:
        UsageError: The calibration was made with another search, architecture, preprocessing, other
            images, classes or prompts: the message names what differs. A search in contrast to a
            base without the base or without anything to compare with. Nothing is searched then.
        DataError: Images that do not fit, or no class names in a targeted scan.
        CheckpointError: See `load_checkpoint`.
    """
    plan = ReferencePlan.decide(config, base=base, references=references, calibration=calibration)
    session = Session.open(checkpoint, images, templates=templates, architecture=architecture)
    comparison = plan.prepare(
        images, templates=templates, read=_reader(architecture), suspect=session.model
    )
    session = replace(session, base=comparison.base)
    return scan_session(session, comparison, cleared=cleared, description=description)


def recover_triggers(
    checkpoint: ModelLike,
    images: ImageSet,
    target: int | str,
    *,
    restarts: int = 3,
    family: TriggerFamily = "patch",
    base: ModelLike | None = None,
    templates: Sequence[Template] | None = None,
    config: ScanConfig | None = None,
    architecture: str | None = None,
) -> InversionResult:
    """Reconstruct several triggers of one family into one class, from different starting points.

    target: Class index or name. base: For a search in contrast to it. The others as in `scan`.
    Raises UsageError for a class outside the image set's, and what `scan` raises.
    """
    session, config = _searching(checkpoint, images, base, templates, config, architecture)
    index = session.class_index(target)
    return recover_patches_or_blends(session, index, family, config, restarts=restarts)


def recover_warps(
    checkpoint: ModelLike,
    images: ImageSet,
    target: int | str,
    *,
    restarts: int = 4,
    base: ModelLike | None = None,
    templates: Sequence[Template] | None = None,
    config: ScanConfig | None = None,
    architecture: str | None = None,
) -> WarpResult:
    """Search for smooth warps into one class, from different starting points.

    Steps, images per step and precision are those of the configuration's search; success_threshold
    is that of `inversion.WarpConfig`. The arguments are those of `recover_triggers`.
    """
    session, config = _searching(checkpoint, images, base, templates, config, architecture)
    index = session.class_index(target)
    return recover_smooth_warps(session, index, config, restarts=restarts)


def unlearn(
    checkpoint: ModelLike,
    images: ImageSet,
    target: int | str | Sequence[int],
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
        target: The class that the triggers lead to, an index or a name. Of several classes the
            triggers are recovered for each and make one vector.
        triggers: Known triggers of one class: one vector is subtracted. None to recover `restarts`
            of each of the configuration's families, and `UnlearnConfig.warps` warps, subtract, and
            do so again for what then still works (`UnlearnConfig.passes`).
        restarts: See triggers.
        base: For a search in contrast to it (see `ScanConfig.contrast`).
        templates: As in `scan`.
        config: The search for triggers, as in `scan`.
        unlearning: Default UnlearnConfig().
        architecture: As in `scan`.
        accuracy_before: As in `search_coefficient`; default: that of the given model. Given, every
            pass may spend all that is left, otherwise see `UnlearnConfig.reserve`.

    Returns:
        The repaired model and what was done (without a re-scan), pass by pass.
    """
    session, config = _searching(checkpoint, images, base, templates, config, architecture)
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
    images: ImageSet,
    *,
    base: ModelLike | None = None,
    references: Sequence[ModelLike] | None = None,
    calibration: Calibration | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    templates: Sequence[Template] | None = None,
    config: ScanConfig | None = None,
    unlearning: UnlearnConfig | None = None,
    max_rounds: int = 3,
    triggers: Sequence[Stamp] | None = None,
    target: int | str | None = None,
    architecture: str | None = None,
) -> DetoxResult:
    """Scan; if the model is suspicious or backdoored, unlearn until a re-scan is clean.

    Neither trigger nor target class need be known: the target is the class that the scan flags, and
    others that it flags beside it are unlearned together with it (`ScanResult.targets`). Where no
    alpha does that within the accuracy to keep, the target is unlearned alone.
    A re-scan judges the classes that the first scan did not find clean: see
    `pydetox.detect.statistics`.

    With a target one repair is made, whatever the first scan says, of known or recovered triggers.

    Args:
        checkpoint: The suspect. It is not changed.
        images: Clean images with class names, a few hundred; with labels CA is measured too.
        base: As in `scan`.
        references: As in `scan`.
        calibration: As in `scan`.
        output: Folder for the repaired checkpoint, in the layout that it came in (open_clip's for
            what came from a file); written only if something was subtracted.
        overwrite: Replace such a folder.
        templates: As in `scan`.
        config: As in `scan`.
        unlearning: Default UnlearnConfig().
        max_rounds: Repairs at most, one after another, a scan after each. Where no alpha unlearns
            all classes of a repair together, it tries the target alone.
        triggers: Known triggers into `target`; None to recover them.
        target: A class to unlearn without asking for a verdict, an index or a name; None to unlearn
            what the scan finds.
        architecture: As in `scan`.

    Raises:
        What `scan` raises; OutputError before any work when `output` cannot be written.
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
    session = Session.open(checkpoint, images, templates=templates, architecture=architecture)
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


def _reader(architecture: str | None) -> Callable[[ModelLike], OpenClipModel]:
    return partial(as_model, architecture=architecture)


def _searching(
    checkpoint: ModelLike,
    images: ImageSet,
    base: ModelLike | None,
    templates: Sequence[Template] | None,
    config: ScanConfig | None,
    architecture: str | None,
) -> tuple[Session, ScanConfig]:
    """Return what searches for given classes need: they compare with nothing but a base."""
    config = config or ScanConfig()
    contrast = base is not None if config.contrast is None else config.contrast
    if contrast and base is None:
        raise UsageError("a search in contrast to the base needs it: give base=")
    session = Session.open(
        checkpoint,
        images,
        templates=templates,
        base=_reader(architecture)(base) if contrast and base is not None else None,
        architecture=architecture,
    )
    return session, replace(config, contrast=contrast)
