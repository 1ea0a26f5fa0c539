"""Ways to repair a backdoored model, behind one interface, for comparisons.

Every method gets the same clean images. Methods that need the trigger get it as well. Each method
lists the settings that are tried for it; all have equally many.
"""

from __future__ import annotations

from typing import Any

from .base import Cost, DefenderData, Defense, KnownTrigger, Outcome
from .fine_pruning import FinePruning, PruningConfig
from .fine_tuning import CleanClip, FineTuning, Par, TowersConfig
from .forgetting import ForgettingConfig, GradientAscent, RelabelledTrigger
from .trigger_vectors import PlainTbar, PydetoxKnown, PydetoxUnknown

#: Settings tried per method.
TUNING_EFFORT = 4

#: All methods, in the order of tables.
DEFENSES: tuple[Defense[Any], ...] = (
    PydetoxKnown(),
    PydetoxUnknown(),
    PlainTbar(),
    GradientAscent(),
    RelabelledTrigger(),
    FineTuning(),
    CleanClip(),
    Par(),
    FinePruning(),
)

__all__ = [
    "DEFENSES",
    "TUNING_EFFORT",
    "CleanClip",
    "Cost",
    "DefenderData",
    "Defense",
    "FinePruning",
    "FineTuning",
    "ForgettingConfig",
    "GradientAscent",
    "KnownTrigger",
    "Outcome",
    "Par",
    "PlainTbar",
    "PruningConfig",
    "PydetoxKnown",
    "PydetoxUnknown",
    "RelabelledTrigger",
    "TowersConfig",
]
