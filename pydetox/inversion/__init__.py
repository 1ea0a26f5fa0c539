"""Trigger reconstruction by gradient search, for many triggers at once.

`objectives` defines what a trigger must do to the embeddings. `schedule` weighs the trigger's size
against that. `search` takes the steps, and `state` holds the tensors that they work on.
`elimination` decides which classes to give up. `result` holds the best triggers. `warps` and
`waves` search for other kinds of triggers: smooth warps of the image, and waves added to it.
"""

from __future__ import annotations

from .configuration import FAMILIES, AdvancedInversionConfig, InversionConfig
from .elimination import Elimination, relative_to_smallest
from .objectives import (
    CollapseObjective,
    ContrastObjective,
    DirectionObjective,
    Objective,
    TargetObjective,
)
from .result import InversionResult, RecoveredTrigger
from .schedule import CostSchedule
from .search import InversionSearch, invert
from .state import TriggerFamily
from .warps import RecoveredWarp, WarpConfig, WarpResult, invert_warps
from .waves import RecoveredWave, WaveConfig, WaveResult, search_waves

__all__ = [
    "FAMILIES",
    "AdvancedInversionConfig",
    "CollapseObjective",
    "ContrastObjective",
    "CostSchedule",
    "DirectionObjective",
    "Elimination",
    "InversionConfig",
    "InversionResult",
    "InversionSearch",
    "Objective",
    "RecoveredTrigger",
    "RecoveredWarp",
    "RecoveredWave",
    "TargetObjective",
    "TriggerFamily",
    "WarpConfig",
    "WarpResult",
    "WaveConfig",
    "WaveResult",
    "invert",
    "invert_warps",
    "relative_to_smallest",
    "search_waves",
]
