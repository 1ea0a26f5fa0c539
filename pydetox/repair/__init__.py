"""Subtracting a backdoor in weight space (TBAR), and proving it.

`trigger_vector` finds the vector, `alpha` how much of it to subtract, `subtraction` does it,
`recovery` finds the triggers that a vector is made of, `retention` holds what the defender does not
measure on the images of `surrogates`, `passes` makes one repair of these, `detox` the whole from
scan to re-scan, `provenance` saves what came out.
"""

from __future__ import annotations

from .alpha import CoefficientSearch, choose_coefficient, search_coefficient
from .configuration import AdvancedUnlearnConfig, UnlearnConfig
from .result import DetoxResult, UnlearnRound
from .retention import DriftProbe, FeatureDrift
from .subtraction import subtract
from .task_vectors import TaskVector
from .trigger_vector import trigger_vector

__all__ = [
    "AdvancedUnlearnConfig",
    "CoefficientSearch",
    "DetoxResult",
    "DriftProbe",
    "FeatureDrift",
    "TaskVector",
    "UnlearnConfig",
    "UnlearnRound",
    "choose_coefficient",
    "search_coefficient",
    "subtract",
    "trigger_vector",
]
