"""Subtracting a backdoor in weight space (TBAR), and proving it.

`recovery` finds the triggers that a trigger vector is made of. `trigger_vector` computes the
vector, `alpha` chooses how much of it to subtract, and `subtraction` subtracts it. `passes`
combines these into one repair. `detox` goes from the scan to the re-scan, and `provenance` saves
the result.
"""

from __future__ import annotations

from .alpha import CoefficientSearch, choose_coefficient, search_coefficient
from .configuration import AdvancedUnlearnConfig, UnlearnConfig
from .result import DetoxResult, UnlearnRound
from .subtraction import subtract
from .task_vectors import TaskVector
from .trigger_vector import trigger_vector

__all__ = [
    "AdvancedUnlearnConfig",
    "CoefficientSearch",
    "DetoxResult",
    "TaskVector",
    "UnlearnConfig",
    "UnlearnRound",
    "choose_coefficient",
    "search_coefficient",
    "subtract",
    "trigger_vector",
]
