"""The worker of a scan. Each process of any engine has one; it keeps what it has loaded."""

from __future__ import annotations

import base64
import json
import math
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import Checkpoint, read_checkpoint
from ..checkpoints.loading import require_unambiguous
from ..data import ImageSet
from ..detect.calibration_file import read_calibration
from ..detect.copies import OutOfReachError
from ..detect.key import ConfigPair, require_alike
from ..detect.references import Comparison, ReferencePlan, Rungs
from ..detect.rescan import scan_after_repair
from ..detect.result import ScanResult
from ..detect.scan import scan_session
from ..detect.search import search_classes
from ..detect.statistics import Calibration
from ..errors import (
    CheckpointError,
    PydetoxError,
    PydetoxWarning,
    UnsafeCheckpointError,
    UsageError,
    explain,
)
from ..inversion.trigger_file import TriggerFile
from ..models import OpenClipModel
from ..models.open_clip_model import HeadMemo
from ..reporting.documents import scan_document
from ..reporting.pictures import example_image, png, trigger_pictures, weakest_trigger
from ..reporting.serialize import to_plain
from ..reporting.values import clean_text
from ..session import Session
from .config import ScannerConfig
from .contents import identify
from .memory import Limits, return_freed
from .repaired import doubts_of_repair
from .tasks import ErrorKind, Task, failure
from .weights import Reference

# The number of steps of a search that are timed for an estimate.
_TIMED_STEPS = 4
# The number of classes whose search is timed. Their images fill a batch, and only their text is
# encoded.
_TIMED_CLASSES = 32


class SetupError(PydetoxError):
    """A file that all tasks share cannot be read."""


class _ReadAhead:
    """A thread that reads one checkpoint in the background."""

    def __init__(self, read: Callable[[], Checkpoint]) -> None:
        self._read = read
        self._checkpoint: Checkpoint | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._checkpoint = self._read()
        except BaseException as error:  # noqa: BLE001 - raised where the checkpoint is wanted
            self._error = error

    def result(self) -> Checkpoint:
        """Wait for the checkpoint and return it, once; raise the error of the thread."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._checkpoint is not None
        checkpoint, self._checkpoint = self._checkpoint, None
        return checkpoint


class Worker:
    """A worker carries out one task at a time, and reads the file of the next one ahead.

    It decodes the images of each size once, computes the head of each text tower once, and reads
    the base and the known vectors once. It holds at most two checkpoints: the current one and the
    one that it reads ahead. The last one that it surveyed is not read again if it is the next to
    scan. For a search in contrast to the base, the worker also holds the base as a model.
    """

    def __init__(
        self,
        config: ScannerConfig,
        device: str = "cpu",
        threads: int | None = None,
        *,
        share: float = 1.0,
    ) -> None:
        """Make a worker on a device.

        threads: The number of CPU threads; None keeps it. share: The share of the GPU's memory that
        the tensors of this process may take, in (0, 1].
        """
        self._config = config
        self._device = torch.device(device)
        self._threads = threads
        self._images = config.image_source()
        self._heads: HeadMemo = HeadMemo()
        self._base: Checkpoint | None = None
        self._built_base: OpenClipModel | None = None
        self._reference: Reference | None = None
        self._configurations: dict[str, ConfigPair] | None = None
        self._calibration: tuple[str, Calibration | None] | None = None
        self._ahead: dict[int, _ReadAhead] = {}
        self._surveyed: tuple[str, tuple[int, ...], Checkpoint] | None = None
        if self._device.type == "cuda" and share < 1:
            torch.cuda.set_per_process_memory_fraction(share, self._device)

    def prepare(self, task: Task) -> None:
        """Begin to read the checkpoint of the next task."""
        if task.kind == "scan":
            reference = str(task.payload["reference"])
            self._ahead[task.id] = _ReadAhead(lambda: self._read_to_scan(reference))

    def run(self, task: Task) -> dict[str, Any]:
        """Run a task and return {"result", "seconds"} or {"error", "kind"}, as data for JSON.

        Every expected error becomes an "error". A bug is raised.
        """
        if self._threads is not None:
            # Of this thread: an engine may call from any.
            torch.set_num_threads(self._threads)
        work = {"survey": self._survey, "calibrate": self._calibrate, "scan": self._scan}
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                # They are in the results, and the driver of the scan shows them.
                warnings.simplefilter("ignore", PydetoxWarning)
                value = work[task.kind](task)
        except Exception as error:
            line = explain(error)
            if line is None:
                raise
            return failure(line, _kind(error), seconds={"total": time.perf_counter() - start})
        finally:
            return_freed(self._device)  # before the next checkpoint takes its memory elsewhere
        value.setdefault("seconds", {})["total"] = time.perf_counter() - start
        return value

    def time(self, reference: str) -> tuple[float, float]:
        """Return the seconds to read a checkpoint and those of a step of its searches (or 0).

        A step covers all classes and families, as at the beginning of a search. If there are many
        classes, some are timed, and the others are assumed to take as long. Raises CheckpointError,
        and the errors of images, class names and base.
        """
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        start = time.perf_counter()
        model = self._model(self._read_target(reference), consume=True)
        images = self._images_for(model)
        names = images.class_names or ()
        if len(names) > _TIMED_CLASSES:
            images = replace(images, labels=None, class_names=names[:_TIMED_CLASSES])
        share = min(1.0, _TIMED_CLASSES / max(1, len(names)))
        read = time.perf_counter() - start
        if not self._config.inversion:
            return read, 0.0
        calibration = None
        if self._config.calibration is not None:
            calibration = read_calibration(Path(self._config.calibration))
        plan = self._plan(calibration)
        session = Session.open(
            model,
            images,
            templates=self._images.prompts,
            base=self._base_model() if plan.config.contrast else None,
        )
        seconds = []
        for steps in (1, _TIMED_STEPS):
            few = replace(plan.config, inversion=replace(plan.config.inversion, steps=steps))
            found = [
                search_classes(session, few, family, description=f"timing ({family})")
                for family in few.families
            ]
            seconds.append(sum(one.seconds for one in found))
        return read, max(0.0, seconds[1] - seconds[0]) / (_TIMED_STEPS - 1) / share

    def _plan(self, calibration: Calibration | None) -> ReferencePlan:
        """Return the references of a scan with that calibration."""
        return ReferencePlan.decide(
            self._config.scan_config(),
            base=self._config.base,
            references=None if calibration else self._config.reference_models or None,
            calibration=calibration,
        )

    def _read_target(self, reference: str) -> Checkpoint:
        """Read what is scanned: the weights that the user named, where there are several."""
        return self._read(reference, weights_key=self._config.weights_key)

    def _read(
        self, reference: str, *, is_base: bool = False, weights_key: str | None = None
    ) -> Checkpoint:
        identity = identify(self._config, reference, is_base=is_base)
        checkpoint = read_checkpoint(identity, weights_key=weights_key)
        require_unambiguous(checkpoint)
        return checkpoint

    def _read_to_scan(self, reference: str) -> Checkpoint:
        """Return the checkpoint of the survey if its files are still the same; else read it."""
        kept, self._surveyed = self._surveyed, None
        if kept is not None and kept[0] == reference:
            if identify(self._config, reference).signature() == kept[1]:
                require_unambiguous(kept[2])
                return kept[2]
            kept = None
        del kept  # its memory is for the next one
        return self._read_target(reference)

    def _survey(self, task: Task) -> dict[str, Any]:
        reference, limits = str(task.payload["reference"]), Limits.from_dict(task.payload["limits"])
        self._surveyed = None
        identity = identify(self._config, reference)
        signature = identity.signature()  # from before the reading
        if not (limits.max_size is None and limits.max_memory is None):
            refusal = limits.refusal(identity.nbytes)
            if refusal is not None:
                return {"result": {"skipped": refusal}}
        checkpoint = read_checkpoint(identity, weights_key=self._config.weights_key)
        self._require_fit(checkpoint)
        relation = None
        if self._config.base is not None:
            relation = self._find_reference().relation(checkpoint.state_dict)
        result = {
            "sha256": checkpoint.sha256,
            "content": checkpoint.digest,
            "format": checkpoint.format,
            "size": identity.nbytes,
            "parameters": sum(t.numel() for t in checkpoint.state_dict.values()),
            "weights": relation,
            "findings": [{"rule": f.rule, "message": f.message} for f in checkpoint.findings],
        }
        self._surveyed = reference, signature, checkpoint
        return {"result": to_plain(result)}

    def _require_fit(self, checkpoint: Checkpoint) -> None:
        """Refuse what the base and the references do not fit, before a calibration is made."""
        config = self._config
        if not (config.makes_calibration and config.inversion):
            return
        if self._configurations is None:
            names = [*([] if config.base is None else [config.base]), *config.reference_models]
            try:
                self._configurations = {
                    n: identify(config, n, is_base=n == config.base).configuration() for n in names
                }
            except PydetoxError as error:
                raise SetupError(str(error)) from error
        ours = checkpoint.model_config, checkpoint.preprocess_config
        for name, theirs in self._configurations.items():
            if theirs[0] is not None:  # otherwise it is said when it is read
                require_alike(name, theirs, str(checkpoint.path), ours)

    def _calibrate(self, task: Task) -> dict[str, Any]:
        names = self._config.reference_models
        base = None if self._config.base is None else self._base_model()
        try:
            references = [self._model(self._read(name), consume=True) for name in names]
        except PydetoxError as error:
            raise SetupError(str(error)) from error
        images = self._images_for(references[0] if base is None else base)
        plan = ReferencePlan.decide(
            self._config.scan_config(), base=base, references=references or None
        )
        rung = task.payload.get("distance")
        if rung is None:
            calibration = plan.prepare(images, templates=self._images.prompts).calibration
            assert calibration is not None
            return {"result": calibration.to_dict()}
        assert base is not None
        made = Rungs(plan, base, images, self._images.prompts)
        try:
            made.require({rung: 1.0})
        except OutOfReachError as error:
            return {"result": {"unfit": str(error)}}
        return {"result": made.calibration().to_dict()}

    def _scan(self, task: Task) -> dict[str, Any]:
        start = time.perf_counter()
        ahead = self._ahead.pop(task.id, None)
        if ahead is not None:
            checkpoint = ahead.result()
        else:
            checkpoint = self._read_to_scan(str(task.payload["reference"]))
        if checkpoint.digest != task.payload["content"]:
            raise CheckpointError(f"{checkpoint.path}: changed while it was scanned")
        waited = time.perf_counter() - start
        model = self._model(checkpoint, consume=True)
        origin = replace(checkpoint, state_dict={})
        del checkpoint
        images = self._images_for(model)
        prepared = time.perf_counter() - start - waited
        calibration = self._find_calibration(task)
        try:
            plan = self._plan(calibration)
        except UsageError as error:
            raise SetupError(f"{self._config.calibration}: {error}") from error
        prompts, unfit = self._images.prompts, task.payload.get("unfit")
        if unfit is None:
            comparison = plan.prepare(
                images,
                templates=prompts,
                read=lambda _: self._base_model(),
                suspect=model,
                distance=task.payload.get("distance"),
            )
        else:
            comparison = Comparison(plan.config, None, None, unfit)
        session = Session.open(model, images, templates=prompts, base=comparison.base)
        if self._config.before is None:
            before, found = None, scan_session(session, comparison)
        else:
            before = self._read(self._config.before)
            found = scan_after_repair(session, comparison, self._session_before(before, session))
        doubts = doubts_of_repair(found, origin, before)
        found = replace(found, warnings=(*found.warnings, *doubts))
        result = to_plain(scan_document(found))
        for key in ("calibration", "name", "seconds"):
            del result[key]
        report = images.report
        result |= {
            "preprocessing": model.preprocessing,
            "image_files": None if report is None else report.to_dict(),
        }
        best = weakest_trigger(found)
        return {
            "result": result,
            "artifacts": {
                name: base64.b64encode(data).decode()
                for name, data in _artifacts(found, best, images, self._config.seed).items()
            },
            "seconds": {"read": waited, "prepare": prepared, "inversion": found.inversion.seconds},
        }

    def _session_before(self, before: Checkpoint, session: Session) -> Session:
        """Return the session of the model before the repair of a session's model."""
        model = self._model(before)
        ours = session.model.model_config, session.model.preprocess_config
        theirs = model.model_config, model.preprocess_config
        require_alike(model.name, theirs, session.model.name, ours)
        return Session.open(model, session.images, templates=session.templates, base=session.base)

    def _model(self, checkpoint: Checkpoint, *, consume: bool = False) -> OpenClipModel:
        model = OpenClipModel.from_checkpoint(checkpoint, consume=consume)
        model.name = clean_text(model.name)  # it is shown at a terminal
        if not math.isfinite(model.logit_scale):
            raise CheckpointError(
                f"{checkpoint.path}: its logit_scale is {model.logit_scale}, expected a finite one"
            )
        model.share_heads(self._heads)
        return model.to(self._device)

    def _images_for(self, model: OpenClipModel) -> ImageSet:
        return self._images.read(model.resizing)

    def _find_base(self) -> Checkpoint:
        if self._base is None:
            assert self._config.base is not None
            try:
                self._base = self._read(self._config.base, is_base=True)
            except PydetoxError as error:
                raise SetupError(str(error)) from error
        return self._base

    def _base_model(self) -> OpenClipModel:
        if self._built_base is None:
            self._built_base = self._model(self._find_base())
        return self._built_base

    def _find_reference(self) -> Reference:
        if self._reference is None:
            base = self._find_base()
            try:
                self._reference = Reference.of(base.state_dict, self._config.known_vectors)
            except PydetoxError as error:
                raise SetupError(str(error)) from error
        return self._reference

    def _find_calibration(self, task: Task) -> Calibration | None:
        if self._config.calibration is not None:
            if self._calibration is None:
                self._calibration = ("", read_calibration(Path(self._config.calibration)))
            return self._calibration[1]
        given = task.payload.get("calibration")
        if given is None:
            return None
        key = json.dumps(given, sort_keys=True)
        if self._calibration is None or self._calibration[0] != key:
            self._calibration = (key, Calibration.from_dict(given))
        return self._calibration[1]


def _artifacts(scan: ScanResult, best: int, images: ImageSet, seed: int) -> dict[str, bytes]:
    """Return the files of the most suspect trigger: its tensors and its pictures."""
    trigger = scan.inversion.trigger(best)
    targets = scan.class_names if scan.inversion.targets is not None else None
    target = None if targets is None or trigger.target is None else targets[trigger.target]
    file = TriggerFile(
        masks=trigger.mask[None],
        patterns=trigger.pattern[None],
        targets=(target,),
        p_l1=scan.inversion.p_l1[best : best + 1],
        success=scan.inversion.success[best : best + 1],
    )
    pictures = trigger_pictures(trigger, example_image(images, seed))
    return {
        "trigger.safetensors": file.to_bytes(),
        **{f"{name}.png": png(picture) for name, picture in pictures.items()},
    }


def _kind(error: BaseException) -> ErrorKind:
    if isinstance(error, SetupError):
        return "setup"
    if isinstance(error, UsageError):
        return "usage"
    if isinstance(error, UnsafeCheckpointError):
        return "unsafe"
    return "checkpoint"
