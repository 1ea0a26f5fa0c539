"""Trigger reconstruction by gradient search, for many triggers at once.

`objectives` says what a trigger must do to the embeddings, `schedule` how its size is weighed
against that, `adam` takes the step, `search` runs the loop and keeps the best triggers, `result`
holds them.
"""

from __future__ import annotations

from .objectives import CollapseObjective, Objective, TargetObjective
from .result import InversionResult, RecoveredTrigger
from .schedule import CostSchedule
from .search import InversionConfig, InversionSearch, invert

__all__ = [
    "CollapseObjective",
    "CostSchedule",
    "InversionConfig",
    "InversionResult",
    "InversionSearch",
    "Objective",
    "RecoveredTrigger",
    "TargetObjective",
    "invert",
]
