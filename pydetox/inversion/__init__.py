"""Trigger reconstruction by gradient search, for many triggers at once.

`objectives` says what a trigger must do to the embeddings, `schedule` how its size is weighed
against that, `search` takes the steps, `state` holds what they work on, `elimination` says which
classes to give up, `result` holds the best triggers. `warps` searches for triggers that are none of
those: smooth warps of the image.
"""

from __future__ import annotations

from .configuration import FAMILIES, AdvancedInversionConfig, InversionConfig
from .elimination import Elimination, relative_to_smallest
from .objectives import CollapseObjective, ContrastObjective, Objective, TargetObjective
from .result import InversionResult, RecoveredTrigger
from .schedule import CostSchedule
from .search import InversionSearch, invert
from .state import TriggerFamily
from .warps import RecoveredWarp, WarpConfig, WarpResult, invert_warps

__all__ = [
    "FAMILIES",
    "AdvancedInversionConfig",
    "CollapseObjective",
    "ContrastObjective",
    "CostSchedule",
    "Elimination",
    "InversionConfig",
    "InversionResult",
    "InversionSearch",
    "Objective",
    "RecoveredTrigger",
    "RecoveredWarp",
    "TargetObjective",
    "TriggerFamily",
    "WarpConfig",
    "WarpResult",
    "invert",
    "invert_warps",
    "relative_to_smallest",
]
