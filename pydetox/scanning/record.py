"""`ScanRecord`: the result of a scan for one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .tasks import ErrorKind

RecordVerdict = Literal["clean", "suspicious", "backdoored", "inconclusive", "error", "skipped"]

#: The verdicts. Those that a person must look at come first.
VERDICTS: tuple[RecordVerdict, ...] = (
    "backdoored",
    "suspicious",
    "error",
    "inconclusive",
    "skipped",
    "clean",
)

#: The attributes of a record that can differ between two runs with the same findings.
_COST = ("seconds", "attempts", "resumed")


@dataclass(frozen=True, eq=False)
class ScanRecord:
    """The verdict on one target and the numbers behind it.

    Attributes:
        name: The name of the target.
        verdict: `clean`, `suspicious`, `backdoored` or `inconclusive` for a scanned checkpoint;
            `error` if it could not be scanned; `skipped` if a limit excluded it.
        reason: One line that explains the verdict.
        error_kind: The kind of error (see `tasks`); None without an error.
        key: The key of the result: a hash of content, configuration and code. Targets of equal
            content have equal keys.
        sha256: The SHA-256 of the weights; None if they were not read to the end.
        duplicate_of: The name of the scanned target with the same content; None if this target was
            scanned itself.
        weights: The relation to the base (see `weights.Reference.relation`); None without a base.
        findings: Odd things about the file, each with `rule` and `message` (see
            `pydetox.checkpoints.Finding`). They are no part of the verdict.
        scan: The document of the scan without name, calibration and seconds; empty without a scan.
        seconds: The wall time of each step, in seconds.
        attempts: The number of attempts: 2 if a worker died during the first one.
        resumed: Whether the result comes from an earlier run.
        artifacts: The files of the most suspect trigger: `trigger.safetensors`, `mask.png`,
            `pattern.png`, `stamped.png`. Empty without a scan, or if a run folder holds them.
    """

    name: str
    verdict: RecordVerdict
    reason: str
    error_kind: ErrorKind | None = None
    key: str | None = None
    sha256: str | None = None
    duplicate_of: str | None = None
    weights: Mapping[str, Any] | None = None
    findings: Sequence[Mapping[str, str]] = ()
    scan: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    attempts: int = 0
    resumed: bool = False
    artifacts: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def target(self) -> str | None:
        """The name of the target class of a finding; None without one."""
        target: str | None = self.scan.get("target")
        return target

    @property
    def error(self) -> str | None:
        """The reason why the checkpoint could not be scanned; None without an error."""
        return self.reason if self.verdict == "error" else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "reason": self.reason,
            "error": self.error,
            "error_kind": self.error_kind,
            "key": self.key,
            "sha256": self.sha256,
            "duplicate_of": self.duplicate_of,
            "weights": None if self.weights is None else dict(self.weights),
            "findings": [dict(finding) for finding in self.findings],
            **{k: v for k, v in self.scan.items() if k not in ("verdict", "reason", "sha256")},
            "seconds": dict(self.seconds),
            "attempts": self.attempts,
            "resumed": self.resumed,
        }

    def content(self) -> dict[str, Any]:
        """Return the part that is equal for equal findings, however they were computed."""
        return {k: v for k, v in self.to_dict().items() if k not in _COST}
