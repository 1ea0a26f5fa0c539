"""Attacks: the triggers and the poisoning that benchmarks and tests need.

METHOD: BadNets (Gu et al. 2017) and Blended (Chen et al. 2017), scaled to the image size.
"""

from __future__ import annotations

from .poisoning import poison
from .triggers import BlendTrigger, PatchTrigger, Trigger, badnets, blended

__all__ = ["BlendTrigger", "PatchTrigger", "Trigger", "badnets", "blended", "poison"]
