"""The parts of a data set that a benchmark keeps apart."""

from __future__ import annotations

from dataclasses import dataclass

from .image_set import ImageSet


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint parts, each stratified by class.

    attacker: what base models and victims are trained on. defender: what a defence may use.
    validation: what settings are chosen on. test: for the final figures alone; where a data set
    brings a test part of its own, it comes from there.
    """

    attacker: ImageSet
    defender: ImageSet
    validation: ImageSet
    test: ImageSet


def split_in_four(images: ImageSet, seed: int) -> Splits:
    """Split a set that brings no test part: 50% attacker, 15%, 10%, 25% test."""
    return Splits(*images.split((0.5, 0.15, 0.1, 0.25), seed=seed))
