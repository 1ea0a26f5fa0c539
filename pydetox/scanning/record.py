"""What a scan says about one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .tasks import ErrorKind

RecordVerdict = Literal["clean", "suspicious", "backdoored", "inconclusive", "error", "skipped"]

#: Verdicts, those that need a person first.
VERDICTS: tuple[RecordVerdict, ...] = (
    "backdoored",
    "suspicious",
    "error",
    "inconclusive",
    "skipped",
    "clean",
)

#: Parts of a record that differ between two runs that found the same.
_COST = ("seconds", "attempts", "resumed")


@dataclass(frozen=True, eq=False)
class ScanRecord:
    """The verdict on one target and the numbers behind it.

    Attributes:
        name: Of the target.
        verdict: `clean`, `suspicious`, `backdoored` or `inconclusive` from a scan; `error` when it
            could not be scanned, `skipped` when it was not to be.
        reason: One line that says why.
        error_kind: Why it could not be scanned (see `tasks`); None without an error.
        key: Of the result: content, configuration and code; equal for targets of equal content.
        sha256: Of the weights file; None when it was not read to the end.
        duplicate_of: Name of the target with the same content that was scanned.
        weights: Relation to the base (see `weights.Reference.relation`); None without a base.
        findings: What is odd about the file: `rule` and `message` of each (see
            `pydetox.checkpoints.Finding`); they are no part of the verdict.
        scan: `ScanResult.to_dict()` without name, calibration and seconds; empty without a scan.
        seconds: Wall time by step.
        attempts: 2 when a worker died over it.
        resumed: It was taken from an earlier run.
        artifacts: The most suspect trigger: `trigger.safetensors`, `mask.png`, `pattern.png`,
            `stamped.png`; empty without a scan, and where a run folder holds them.
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
        """Name of the class that the trigger leads to, for a finding."""
        target: str | None = self.scan.get("target")
        return target

    @property
    def error(self) -> str | None:
        """The reason, if it could not be scanned."""
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
        """Return what is equal whenever the same was found, however it was computed."""
        return {k: v for k, v in self.to_dict().items() if k not in _COST}
