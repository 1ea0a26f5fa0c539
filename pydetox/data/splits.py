"""The parts of a data set that a benchmark keeps apart."""

from __future__ import annotations

from dataclasses import dataclass

from .image_set import ImageSet


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint parts of a data set, each stratified by class.

    Attributes:
        attacker: The images that base models and victims are trained on.
        defender: The images that a defence may use.
        validation: The images that settings are chosen on.
        test: The images for the final figures alone. If a data set has a test part of its own,
            they come from there.
    """

    attacker: ImageSet
    defender: ImageSet
    validation: ImageSet
    test: ImageSet


def split_in_four(images: ImageSet, seed: int) -> Splits:
    """Split a set without a test part: attacker 50%, defender 15%, validation 10%, test 25%."""
    return Splits(*images.split((0.5, 0.15, 0.1, 0.25), seed=seed))
