"""Messages of the library in the words of the command line.

The library names its arguments, as in "give base=". A user of the command line knows options
instead. The command line therefore translates a message before it shows or writes it.
"""

from __future__ import annotations

import re

#: Arguments of the library and the options that stand for them.
OPTIONS = {
    "architecture": "--model",
    "base": "--base",
    "before": "--before",
    "calibration": "--calibration",
    "base_model": "--base-model",
    "class_names": "--class-names",
    "image_mean": "--image-mean",
    "image_std": "--image-std",
    "interpolation": "--interpolation",
    "max_images": "--max-images",
    "max_memory": "--max-memory",
    "max_size": "--max-size",
    "model": "--model",
    "objective": "--objective",
    "offline": "--offline",
    "overwrite": "--overwrite",
    "reference_learning_rate": "--reference-learning-rate",
    "references": "--reference-model",
    "resize": "--resize",
    "resize_mode": "--resize-mode",
    "strict": "--strict",
    "target": "--target",
    "templates": "--templates",
    "timeout": "--timeout",
    "trigger": "--trigger",
    "triggers": "--trigger",
    "weights_key": "--weights-key",
}

# An argument without a value, as in "give base=" or "(class_names=)".
_ARGUMENT = re.compile(rf"\b({'|'.join(OPTIONS)})=(?=[\s,.;:)]|$)")


def in_options(message: str) -> str:
    """Return a message of the library with the options in place of the arguments it names."""
    return _ARGUMENT.sub(lambda found: OPTIONS[found[1]], message)
