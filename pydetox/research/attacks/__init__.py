"""Attacks: the triggers and the poisoning that benchmarks and tests need.

Each trigger is a function from uint8 images to uint8 images, with its definition, seed and source
in its docstring, at the parameters of the CLIP literature scaled to the image size. `catalogue`
names them all.
"""

from __future__ import annotations

from .badclip import optimised_patch
from .catalogue import ATTACKS, AttackerView, draw_attack
from .overlays import RandomBlend, SinusoidTrigger, blended, stripes, text_overlay, triangles
from .patches import (
    RandomPatternPatch,
    RandomPlacePatch,
    badnets,
    badnets_random_pattern,
    badnets_random_place,
)
from .poisoning import Backdoor, plant, poison
from .triggers import BlendTrigger, PatchTrigger, Trigger
from .warping import WarpTrigger, wanet

__all__ = [
    "ATTACKS",
    "AttackerView",
    "Backdoor",
    "BlendTrigger",
    "PatchTrigger",
    "RandomBlend",
    "RandomPatternPatch",
    "RandomPlacePatch",
    "SinusoidTrigger",
    "Trigger",
    "WarpTrigger",
    "badnets",
    "badnets_random_pattern",
    "badnets_random_place",
    "blended",
    "draw_attack",
    "optimised_patch",
    "plant",
    "poison",
    "stripes",
    "text_overlay",
    "triangles",
    "wanet",
]
