"""Many checkpoints: find them, survey them, scan them with many workers, keep what was found.

`Scanner` is the driver. `targets` says what there is to scan, `worker` does the work wherever an
engine (`engines`) puts it, `store` keeps the results so that any interruption can be resumed.
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
