"""Scans of many checkpoints: find them, survey them, scan them with workers, and keep the results.

`Scanner` is the driver. `targets` finds the checkpoints. `worker` does the work, in the process
where an engine (`engines`) runs it. `store` keeps the results, so that an interrupted scan can
continue.
"""

from __future__ import annotations

from .config import ScannerConfig
from .record import VERDICTS, ScanRecord
from .scanner import Scanner
from .targets import Target, Targets, find_targets

__all__ = [
    "VERDICTS",
    "ScanRecord",
    "Scanner",
    "ScannerConfig",
    "Target",
    "Targets",
    "find_targets",
]
