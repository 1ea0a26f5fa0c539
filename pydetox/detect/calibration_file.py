"""Calibrations as JSON files: what `scan --save-calibration` writes and `--calibration` reads."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..atomic import write_file
from ..errors import DataError, UsageError
from ..reporting.serialize import to_json
from .statistics import Calibration

CALIBRATION_SCHEMA = "pydetox.calibration/3"

# A calibration of 1000 classes and 100 references has 2 MB.
_MAX_CALIBRATION_BYTES = 64 << 20


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file; DataError, which names the file, for anything else."""
    try:
        if path.stat().st_size > _MAX_CALIBRATION_BYTES:
            raise DataError(
                f"{path}: {path.stat().st_size:,} bytes; expected at most "
                f"{_MAX_CALIBRATION_BYTES:,} for a calibration"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no calibration: not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != CALIBRATION_SCHEMA:
        raise DataError(f'{path}: no calibration: expected "schema": "{CALIBRATION_SCHEMA}"')
    try:
        calibration = Calibration.from_dict(content)
    except UsageError as error:
        raise DataError(f"{path}: {error}") from error
    rungs = (calibration, *calibration.rungs)
    for one in (one for rung in rungs for one in (rung, *rung.others)):
        largest = math.inf if one.screened else 1.0
        if not all(0 < v <= largest or v == math.inf for row in one.p_l1 for v in row):
            raise DataError(f"{path}: no calibration: expected values of P-L1 in (0, 1] or null")
    return calibration


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration file for `read_calibration`."""
    content = {"schema": CALIBRATION_SCHEMA, **calibration.to_dict()}
    write_file(path, f"{to_json(content)}\n")
