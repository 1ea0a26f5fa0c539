"""Find backdoors in CLIP checkpoints, subtract them in weight space, prove the repair.

One call: `detox`. Its steps alone: `scan`, `invert`, `unlearn`, `evaluate`. The fused kernels:
`pydetox.ops`. Names are imported on first use, so that `import pydetox` is cheap.
"""

from __future__ import annotations

import sys

if not getattr(sys.flags, "safe_path", False) and sys.orig_argv[1:3] == ["-m", "pydetox"]:
    # `python -m` looks for modules in the current folder first, which may be that of an untrusted
    # checkpoint: `pydetox` does not look there, and neither does this.
    del sys.path[0]

from typing import TYPE_CHECKING, Any

from .lazy import known_names, load_name

if TYPE_CHECKING:
    from ._build_info import build_info
    from .api import calibrate, detox, evaluate, recover_triggers, recover_warps, scan, unlearn
    from .checkpoints import load_checkpoint, save_checkpoint
    from .data import ImageSet, load_images
    from .detect.configuration import ScanConfig
    from .detect.result import ScanResult
    from .detect.statistics import Calibration, Detection, Verdict
    from .errors import PydetoxError
    from .evaluation import Evaluation
    from .inversion import InversionConfig, InversionResult, invert
    from .models import OpenClipModel
    from .models.encoder import EncoderModel, VisionLanguageModel, from_encoder
    from .models.objects import copy_weights
    from .repair.configuration import UnlearnConfig
    from .repair.result import DetoxResult
    from .session import as_model

_HOME = {
    "Calibration": "detect.statistics",
    "Detection": "detect.statistics",
    "DetoxResult": "repair.result",
    "EncoderModel": "models.encoder",
    "Evaluation": "evaluation",
    "ImageSet": "data",
    "InversionConfig": "inversion",
    "InversionResult": "inversion",
    "OpenClipModel": "models",
    "PydetoxError": "errors",
    "ScanConfig": "detect.configuration",
    "ScanResult": "detect.result",
    "UnlearnConfig": "repair.configuration",
    "Verdict": "detect.statistics",
    "VisionLanguageModel": "models.encoder",
    "as_model": "session",
    "build_info": "_build_info",
    "calibrate": "api",
    "copy_weights": "models.objects",
    "detox": "api",
    "evaluate": "api",
    "from_encoder": "models.encoder",
    "invert": "inversion",
    "load_checkpoint": "checkpoints",
    "load_images": "data",
    "recover_triggers": "api",
    "recover_warps": "api",
    "save_checkpoint": "checkpoints",
    "scan": "api",
    "unlearn": "api",
}

__all__ = [
    "Calibration",
    "Detection",
    "DetoxResult",
    "EncoderModel",
    "Evaluation",
    "ImageSet",
    "InversionConfig",
    "InversionResult",
    "OpenClipModel",
    "PydetoxError",
    "ScanConfig",
    "ScanResult",
    "UnlearnConfig",
    "Verdict",
    "VisionLanguageModel",
    "as_model",
    "build_info",
    "calibrate",
    "copy_weights",
    "detox",
    "evaluate",
    "from_encoder",
    "invert",
    "load_checkpoint",
    "load_images",
    "recover_triggers",
    "recover_warps",
    "save_checkpoint",
    "scan",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    return load_name(__name__, _HOME, name)


def __dir__() -> list[str]:
    return known_names(__name__, _HOME)
