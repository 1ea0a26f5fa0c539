"""Scans of many text models: the driver, in this process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..detect.calibration import Calibration
from ..errors import OutputError, PydetoxError, UnsafeCheckpointError, UsageError, explain
from ..models.device import find_device
from ..reporting.serialize import to_plain
from ..reporting.text_documents import text_scan_document
from ..reporting.values import clean_text
from ..text.configuration import TextScanConfig
from ..text.copies import nearest_rung, text_distance
from ..text.files import TextKind
from ..text.kinds import compare_text_model, judge_text_model, kind_of_calibration, texts_for
from ..text.models import TextModel, load_text_model
from ..text.references import TextComparison
from ..text.texts import TextSet, load_texts
from ..text.verdict import TextScanResult
from .record import ScanRecord
from .scanner import record_of_part
from .store import RunStore
from .targets import Target
from .tasks import ErrorKind, Notify
from .version import code_version


@dataclass(frozen=True)
class TextScannerConfig:
    """How to scan text models.

    Attributes:
        texts: Clean texts, as in `load_texts`.
        class_names: The class names in the order of the labels; None takes each model's own.
        base: A clean model; see `text.references`.
        reference_models: Clean models, at least 2; empty for copies of the base.
        scan: The search and the verdict.
        device: Where models compute.
        threads: The number of CPU threads; None keeps it.
        offline: Whether to use only files on this machine.
        retry_errors: Whether to scan models again that ended in an error in an earlier run.
    """

    texts: str
    class_names: tuple[str, ...] | None = None
    base: str | None = None
    reference_models: tuple[str, ...] = ()
    scan: TextScanConfig = field(default_factory=TextScanConfig)
    device: str = "cpu"
    threads: int | None = None
    offline: bool = False
    retry_errors: bool = False

    def __post_init__(self) -> None:
        if len(self.reference_models) == 1:
            raise UsageError("one reference model; a calibration needs at least 2")

    def results_part(self) -> dict[str, Any]:
        """Return what decides the results, as plain data."""
        scan = to_plain(self.scan.to_dict())
        scan["max_texts"] = scan.pop("texts")
        return {
            "texts": self.texts,
            "class_names": None if self.class_names is None else list(self.class_names),
            "base": self.base,
            "reference_models": list(self.reference_models),
            "device": self.device.partition(":")[0],
            **scan,
        }


class TextScanner:
    """A scan of text models. It yields the record of each as soon as it is done.

    A run folder keeps the results, and a later scan with the same configuration continues from it.
    """

    def __init__(
        self,
        config: TextScannerConfig,
        *,
        run: str | os.PathLike[str] | None = None,
        notify: Notify | None = None,
    ) -> None:
        """Prepare a scan; nothing is read yet. The arguments are those of `Scanner`."""
        self._config = config
        self._run = None if run is None else Path(run)
        self._notify: Notify = notify or (lambda event, **particulars: None)
        self._store: RunStore | None = None
        self._calibrations: dict[tuple[TextKind, float | None], Calibration] = {}
        #: The first calibration in use; None without one.
        self.calibration: Calibration | None = None

    def scan(
        self,
        targets: Sequence[Target],
        *,
        beside: Sequence[ScanRecord] = (),
        ignored: Sequence[tuple[str, str]] = (),
    ) -> Generator[ScanRecord, None, None]:
        """Yield one record for each target, in order.

        An error of a single model becomes its record, with the verdict `error`. beside: Records of
        other models that the same run has scanned. ignored: What is no checkpoint.

        Raises:
            UsageError: The run folder is in use or of another run, or the options make no sense.
            DataError, CheckpointError: Texts, base or references cannot be read.
            OutputError: The run folder cannot be written.
        """
        config = self._config
        find_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        texts = load_texts(config.texts, class_names=config.class_names)
        contents = {"texts": _texts_digest(texts)}
        for name, model in self._others.items():
            contents[name] = model.digest()
        digest = hashlib.sha256(
            json.dumps([config.results_part(), contents], sort_keys=True).encode()
        ).hexdigest()
        prefix = f"{digest}:{code_version()}"
        try:
            if self._run is not None:
                self._store = RunStore(self._run, lambda line: self._tell("warning", message=line))
                if not beside:
                    self._store.bind(config.results_part(), digest, contents)
                self._log(
                    "run-started",
                    code=code_version(),
                    targets=[*(one.name for one in beside), *(one.name for one in targets)],
                    ignored=[list(one) for one in ignored],
                    other_shards=0,
                    execution={"threads": config.threads, "offline": config.offline},
                )
                known = self._store.read_calibration(prefix)
                if known is not None:
                    self.calibration = Calibration.from_dict(known)
                    kind = kind_of_calibration(self.calibration)
                    self._calibrations[kind, None] = self.calibration
            for record in beside:
                self._log_record(record, again=True)
            self._notify("stage", name="scan", total=len(targets))
            for target in targets:
                record = self._record(target, prefix)
                self._log_record(record)
                yield record
            self._log("run-finished")
        except BaseException as error:
            with contextlib.suppress(OutputError):
                self._log("run-ended", because=type(error).__name__)
            raise
        finally:
            if self._store is not None:
                self._store.close()
                self._store = None

    @cached_property
    def _others(self) -> dict[str, TextModel]:
        """The base and the references, by name; one that cannot be read stops the scan."""
        config = self._config
        names = [*([] if config.base is None else [config.base]), *config.reference_models]
        return {name: self._read(name) for name in names}

    def _read(self, name: str) -> TextModel:
        model = load_text_model(name, device=self._config.device, offline=self._config.offline)
        model.name = clean_text(model.name)  # it is shown at a terminal
        return model

    def _record(self, target: Target, prefix: str) -> ScanRecord:
        start = time.perf_counter()
        key = hashlib.sha256(f"{prefix}:{target.name}:{target.signature()}".encode())
        try:
            if target.problem is not None:
                raise UsageError(target.problem)
            model = self._read(target.reference)
            digest = model.digest()
            key = hashlib.sha256(f"{prefix}:{digest}".encode())
            name = key.hexdigest()[:32]
            part = self._known_part(name)
            if part is not None:
                return record_of_part(target.name, name, part, resumed=True)
            part = self._scanned(model, digest, prefix)
        except Exception as error:
            line = explain(error)
            if line is None:
                raise
            name = key.hexdigest()[:32]
            part = {
                "verdict": "error",
                "reason": line if target.name in line else f"{target.name}: {line}",
                "error_kind": _kind(error),
            }
        part["seconds"] = {**part.get("seconds", {}), "total": time.perf_counter() - start}
        part.setdefault("attempts", 1)
        if self._store is not None:
            self._store.write_part(name, part, {})
        return record_of_part(target.name, name, part)

    def _scanned(self, model: TextModel, digest: str, prefix: str) -> dict[str, Any]:
        config = self._config
        texts = texts_for(model, config.texts, config.class_names)
        base = None if config.base is None else self._others[config.base]
        references = [self._others[name] for name in config.reference_models]
        # A registry may hold text models of several kinds; each has the references of its own.
        given = len(self._others)
        base = base if base is not None and base.kind == model.kind else None
        references = [one for one in references if one.kind == model.kind]
        rung = None
        if not references and base is not None:
            rung = nearest_rung(text_distance(base, model))
        known = self._calibrations.get((model.kind, rung))
        if known is not None and digest in known.digests:
            known = None  # compared with itself, which is said below
        if given and base is None and not references:
            unfit = (
                f"none of the base and the reference models is a {model.kind} model like "
                f"{model.name}; give some that are"
            )
            return self._part(
                judge_text_model(model, texts, TextComparison(None, unfit=unfit), config.scan)
            )
        comparison = compare_text_model(
            model,
            texts,
            config.scan,
            base=base,
            references=None if known is not None else references or None,
            calibration=known,
        )
        made = comparison.calibration
        if known is None and made is not None:
            self._calibrations[model.kind, rung] = made
            self.calibration = self.calibration or made
            # Copies at other distances are made again: they are of other suspects.
            # A run folder has one file for a calibration: that of the first kind of model.
            if self._store is not None and rung is None and self.calibration is made:
                self._store.write_calibration(prefix, made.to_dict())
        return self._part(judge_text_model(model, texts, comparison, config.scan))

    def _part(self, scan: TextScanResult) -> dict[str, Any]:
        """Return what a run folder keeps of a scan."""
        document = to_plain(text_scan_document(scan))
        for key in ("calibration", "name"):
            del document[key]
        seconds = {"inversion": document.pop("seconds")}
        return {
            "verdict": document["verdict"],
            "reason": document["reason"],
            "sha256": scan.sha256,
            "scan": document,
            "seconds": seconds,
        }

    def _known_part(self, key: str) -> dict[str, Any] | None:
        if self._store is None or not self._store.has_part(key):
            return None
        part = self._store.read_part(key)
        return None if part["verdict"] == "error" and self._config.retry_errors else part

    def _log_record(self, record: ScanRecord, *, again: bool = False) -> None:
        if self._store is not None:
            self._store.keep_record(record)
        if not again:
            self._notify("record", record=record)

    def _tell(self, event: str, **particulars: Any) -> None:
        self._notify(event, **particulars)

    def _log(self, event: str, **particulars: Any) -> None:
        if self._store is not None:
            self._store.event(event, **particulars)


def _texts_digest(texts: TextSet) -> str:
    content = [texts.digest, sorted(zip(texts.texts, texts.labels or (), strict=False))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _kind(error: BaseException) -> ErrorKind:
    if isinstance(error, UnsafeCheckpointError):
        return "unsafe"
    if isinstance(error, UsageError):
        return "usage"
    return "checkpoint" if isinstance(error, PydetoxError | OSError) else "internal"
