"""The driver of a scan of many checkpoints: it surveys all, then scans the most suspect first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..detect.calibration_file import read_calibration
from ..detect.distance import rungs_around
from ..errors import (
    CheckpointError,
    DataError,
    EngineError,
    OutputError,
    PydetoxError,
    UsageError,
)
from .calibrations import Calibrations
from .config import ScannerConfig
from .contents import content_digests
from .engines import open_engine
from .memory import Limits
from .record import ScanRecord
from .store import RunStore
from .targets import Target, Targets, find_targets
from .tasks import Engine, Kind, Notify, Outcome, Task, decode_artifacts, failure
from .version import code_version
from .weights import suspicion

NO_INVERSION = "no triggers were reconstructed: the inversion was switched off"

_ERRORS: dict[str | None, type[PydetoxError]] = {
    "usage": UsageError,
    "crash": EngineError,
    "timeout": EngineError,
    "internal": EngineError,
}
_LOGGED = ("worker-started", "worker-died", "started", "timeout", "memory")


def _silent(event: str, **particulars: Any) -> None:
    del event, particulars


class Scanner:
    """A scan of any number of checkpoints. It yields the record of each as soon as it is done.

    With a run folder, the scan continues an earlier scan with the same configuration, however that
    one ended. Verdicts do not depend on the engine, the number of workers or the order. Numbers are
    equal to the bit for the same number of threads per worker.
    """

    def __init__(
        self,
        config: ScannerConfig,
        *,
        run: str | os.PathLike[str] | None = None,
        notify: Notify | None = None,
        code: str | None = None,
    ) -> None:
        """Prepare a scan; nothing is read yet.

        config: How to scan. run: The run folder; None to keep nothing. notify: A function that is
        called with every event. code: The version under which results are kept and looked up in the
        run folder; None for `code_version()`.
        """
        self._config = config.absolute()
        self._run = None if run is None else Path(run)
        self._notify = notify or _silent
        self._code = code or code_version()
        self._limits = Limits(config.max_size, config.max_memory, 0)
        self._store: RunStore | None = None
        self._prefix = ""
        self._last_id = 0
        #: The targets that `scan` found, as soon as it has begun.
        self.targets = Targets()
        #: The calibration in use, as plain data; None without one.
        self.calibration: dict[str, Any] | None = None
        self._calibrations = Calibrations()

    def scan(self, targets: Iterable[str | os.PathLike[str]]) -> Generator[ScanRecord, None, None]:
        """Yield one record for each target, in the order in which they are done.

        An error of a single checkpoint becomes its record, with the verdict `error`.

        Args:
            targets: The targets, as in `find_targets`.

        Raises:
            UsageError: A name makes no sense, or the run folder is in use or of another run.
            DataError, CheckpointError: Images, base or calibration cannot be read.
            EngineError: Workers cannot be started.
            OutputError: The run folder cannot be written.
        """
        config = self._config
        self._limits = Limits.of(config)
        self.targets = find_targets(targets, shard=config.shard)
        contents = content_digests(config, lambda line: self._tell("warning", message=line))
        digest = config.digest(contents)
        self._prefix = f"{digest}:{self._code}"
        if config.calibration is not None:
            self.calibration = read_calibration(Path(config.calibration)).to_dict()
        if not self.targets.targets:
            return
        engine: Engine | None = None
        try:
            if self._run is not None:
                self._store = RunStore(self._run, self._warn)
                self._store.bind(config.results_part(), digest, contents)
                if self.calibration is not None:
                    self._store.write_calibration(self._prefix, self.calibration)
            self._log_start()
            engine = open_engine(config, len(self.targets.targets), self._tell)
            for record in self._records(engine):
                self._log_record(record)
                yield record
            self._log("run-finished")
        except BaseException as error:
            with contextlib.suppress(OutputError):
                self._log("run-ended", because=type(error).__name__)
            raise
        finally:
            if engine is not None:
                engine.close()
            if self._store is not None:
                self._store.close()
                self._store = None

    def _records(self, engine: Engine) -> Iterator[ScanRecord]:
        """Survey the targets, group equal contents, sort the groups, and scan them."""
        groups: dict[str, _Group] = {}
        for place, target, survey in self._survey(engine):
            value = survey.get("result", {})
            if "content" not in value:
                yield self._not_scanned(target, survey)
                continue
            key = self._key(value["content"])
            groups.setdefault(key, _Group(key, survey)).members.append((place, target))
        waiting = []
        for group in sorted(groups.values(), key=lambda group: group.place):
            part = self._known_part(group.key)
            if part is not None:
                yield from self._of_part(group, part, resumed=True)
            elif self._config.inversion:
                size, parameters = group.size
                refusal = self._limits.refusal(size, parameters)
                if refusal is None:
                    waiting.append(group)
                else:
                    for _, target in group.members:
                        yield self._not_scanned(target, {"result": {"skipped": refusal}})
            else:
                part = {"verdict": "inconclusive", "reason": NO_INVERSION}
                yield from self._finish(group, part, {})
        if self._config.makes_calibration and self._config.inversion:
            self._calibrate(engine, waiting)
        waiting.sort(key=lambda group: suspicion(group.weights), reverse=True)
        self._tell("stage", name="scan", total=len(waiting))
        if waiting:
            needed = max(self._limits.memory(*group.size) for group in waiting)
            self._tell("memory", needed=needed)
        by_task = {self._scan_task(group): group for group in waiting}
        for outcome in engine.run(by_task):
            group = by_task[outcome.task]
            part = _scan_part(outcome, group.first.name)
            yield from self._finish(group, part, decode_artifacts(outcome.value))

    def _survey(self, engine: Engine) -> Iterator[tuple[int, Target, Mapping[str, Any]]]:
        """Yield each target with its index and its survey: {"result"} or {"error"}."""
        known = {} if self._store is None else self._store.surveys(self._code)
        self._tell("stage", name="survey", total=len(self.targets.targets))
        tasks: dict[Task, tuple[int, Target, tuple[int, ...] | None]] = {}
        for place, target in enumerate(self.targets.targets):
            if target.problem is not None:
                yield place, target, failure(target.problem, "checkpoint")
                continue
            identity = target.identity()
            signature = None if identity is None else identity.signature()
            size = target.size(identity)
            refusal = None if size is None else self._limits.refusal(size)
            if refusal is not None:
                yield place, target, {"result": {"skipped": refusal}}
                continue
            survey = None if signature is None else known.get((target.name, signature))
            if survey is not None and not ("error" in survey and self._config.retry_errors):
                yield place, target, survey
                continue
            payload = {"reference": target.reference, "limits": self._limits.to_dict()}
            task = self._task("survey", target.name, payload)
            tasks[task] = (place, target, signature)
        for outcome in engine.run(tasks):
            place, target, signature = tasks[outcome.task]
            value = {**outcome.value, "attempts": outcome.attempts}
            _refuse_setup(outcome)
            self._tell("surveyed", name=target.name)
            # The signature is from before the reading: a file that has changed since is read again.
            self._log(
                "surveyed", name=target.name, signature=signature, code=self._code, value=value
            )
            yield place, target, value

    def _calibrate(self, engine: Engine, waiting: Iterable[_Group]) -> None:
        """Take the calibrations from the run folder, and make those that the groups lack."""
        if self._store is not None:
            self._calibrations = Calibrations.from_dict(self._store.read_calibration(self._prefix))
        wanted = {rung for group in waiting for rung in self._rungs(group)}
        missing = self._calibrations.missing(wanted, matched=self._config.matches_references)
        if missing:
            self._tell("stage", name="calibrate", total=len(missing))
        named = self._config.base or self._config.reference_models[0]
        tasks = {self._task("calibrate", named, {"distance": rung}): rung for rung in missing}
        for outcome in engine.run(tasks):
            if outcome.error is not None:
                raise _ERRORS.get(outcome.error_kind, CheckpointError)(outcome.error)
            self._calibrations.add(tasks[outcome.task], outcome.value["result"])
            if self._store is not None and self._calibrations.made:
                self._store.write_calibration(self._prefix, self._calibrations.to_dict())
        if self._calibrations.made:
            self.calibration = self._calibrations.to_dict()
            if missing:
                self._tell("calibrated", calibration=self.calibration)

    def _rungs(self, group: _Group) -> Mapping[float | None, float]:
        """Return the distances of the references of a group with their weights; None: any.

        The result is empty if the group lies too far from the base, or at no distance.
        """
        if not self._config.matches_references:
            return {None: 1.0}
        if not group.distance:
            return {}
        return dict((rungs_around(group.distance) or {}).items())

    def _scan_task(self, group: _Group) -> Task:
        calibration, unfit = None, None
        if self._config.makes_calibration:
            calibration, unfit = self._calibrations.of(self._rungs(group), group.distance)
        payload = {
            "reference": group.first.reference,
            "sha256": group.survey["result"]["sha256"],
            "content": group.survey["result"]["content"],
            "calibration": calibration,
            "distance": group.distance,
            "unfit": unfit,
        }
        return self._task("scan", group.first.name, payload)

    def _finish(
        self, group: _Group, part: Mapping[str, Any], artifacts: Mapping[str, bytes]
    ) -> Iterator[ScanRecord]:
        """Keep a result and yield the records of all targets that have it."""
        found = group.survey["result"]
        seconds = {"survey": group.survey.get("seconds", {}).get("total")}
        whole = {
            "sha256": found["sha256"],
            "weights": found["weights"],
            "findings": found.get("findings", []),
            **part,
            "seconds": {**seconds, **part.get("seconds", {})},
        }
        if self._store is not None:
            self._store.write_part(group.key, whole, artifacts)
            artifacts = {}
        yield from self._of_part(group, whole, artifacts=artifacts)

    def _of_part(
        self,
        group: _Group,
        part: Mapping[str, Any],
        *,
        resumed: bool = False,
        artifacts: Mapping[str, bytes] | None = None,
    ) -> Iterator[ScanRecord]:
        first = group.first.name
        for _, target in sorted(group.members, key=lambda member: member[0]):
            yield record_of_part(
                target.name,
                group.key,
                part,
                duplicate_of=None if target.name == first else first,
                resumed=resumed,
                artifacts=artifacts,
            )

    def _not_scanned(self, target: Target, survey: Mapping[str, Any]) -> ScanRecord:
        """Return the record of a target whose content could not or must not be read."""
        key = self._key(json.dumps([target.name, target.signature()]))
        skipped = survey.get("result", {}).get("skipped")
        part = {
            "verdict": "error" if skipped is None else "skipped",
            "reason": _naming(target.name, survey["error"]) if skipped is None else skipped,
            "error_kind": survey.get("kind"),
            "seconds": {"survey": survey.get("seconds", {}).get("total")},
            "attempts": survey.get("attempts", 0),
        }
        if self._store is not None:
            self._store.write_part(key, part, {})
        return record_of_part(target.name, key, part)

    def _known_part(self, key: str) -> dict[str, Any] | None:
        if self._store is None or not self._store.has_part(key):
            return None
        try:
            part = self._store.read_part(key)
        except DataError as error:
            self._warn(f"{error}; it is computed again")
            return None
        return None if part["verdict"] == "error" and self._config.retry_errors else part

    def _key(self, content: str) -> str:
        return hashlib.sha256(f"{self._prefix}:{content}".encode()).hexdigest()[:32]

    def _task(self, kind: Kind, name: str, payload: Mapping[str, Any]) -> Task:
        self._last_id += 1
        return Task(self._last_id, kind, name, payload)

    def _tell(self, event: str, **particulars: Any) -> None:
        """Pass an event on, and record the events of workers."""
        if event in _LOGGED:
            self._log(event, **particulars)
        self._notify(event, **particulars)

    def _warn(self, message: str) -> None:
        self._notify("warning", message=message)

    def _log(self, event: str, **particulars: Any) -> None:
        if self._store is not None:
            self._store.event(event, **particulars)

    def _log_start(self) -> None:
        decides = self._config.results_part()
        self._log(
            "run-started",
            code=self._code,
            targets=[target.name for target in self.targets.targets],
            ignored=[list(one) for one in self.targets.ignored],
            other_shards=self.targets.other_shards,
            execution={k: v for k, v in self._config.to_dict().items() if k not in decides},
        )

    def _log_record(self, record: ScanRecord) -> None:
        if self._store is not None:
            self._store.keep_record(record)
        self._notify("record", record=record)


class _Group:
    """The targets that have the same content."""

    def __init__(self, key: str, survey: Mapping[str, Any]) -> None:
        self.key = key
        self.survey = survey
        self.members: list[tuple[int, Target]] = []  # with their places

    @property
    def place(self) -> int:
        return min(place for place, _ in self.members)

    @property
    def first(self) -> Target:
        """The target that gives the group its name: the first in the order of targets."""
        return min(self.members, key=lambda member: member[0])[1]

    @property
    def size(self) -> tuple[int, int]:
        """The bytes of the file, 0 if not known, and the number of parameters."""
        found = self.survey["result"]
        return found.get("size", 0), found["parameters"]

    @property
    def distance(self) -> float | None:
        """The relative distance to the base, None if there is no base or another architecture."""
        distance: float | None = (self.weights or {}).get("distance")
        return distance

    @property
    def weights(self) -> Mapping[str, Any] | None:
        weights: Mapping[str, Any] | None = self.survey["result"]["weights"]
        return weights


def record_of_part(
    name: str,
    key: str,
    part: Mapping[str, Any],
    *,
    duplicate_of: str | None = None,
    resumed: bool = False,
    artifacts: Mapping[str, bytes] | None = None,
) -> ScanRecord:
    """Return the record of a target, made of the result of its content."""
    return ScanRecord(
        name=name,
        verdict=part["verdict"],
        reason=part["reason"],
        error_kind=part.get("error_kind"),
        key=key,
        sha256=part.get("sha256"),
        duplicate_of=duplicate_of,
        weights=part.get("weights"),
        findings=tuple(part.get("findings", ())),
        scan=part.get("scan", {}),
        seconds={k: v for k, v in part.get("seconds", {}).items() if v is not None},
        attempts=part.get("attempts", 0),
        resumed=resumed,
        artifacts=artifacts or {},
    )


def _naming(name: str, error: str) -> str:
    """Return an error whose message names the target."""
    return error if name in error else f"{name}: {error}"


def _scan_part(outcome: Outcome, name: str) -> dict[str, Any]:
    _refuse_setup(outcome)
    common = {"attempts": outcome.attempts, "seconds": outcome.value.get("seconds", {})}
    if outcome.error is not None:
        more = {k: v for k, v in outcome.value.items() if k == "traceback"}
        kind = outcome.error_kind
        reason = _naming(name, outcome.error)
        return {"verdict": "error", "reason": reason, "error_kind": kind, **more, **common}
    scan = outcome.value["result"]
    return {"verdict": scan["verdict"], "reason": scan["reason"], "scan": scan, **common}


def _refuse_setup(outcome: Outcome) -> None:
    if outcome.error_kind == "setup":
        raise CheckpointError(str(outcome.error))
