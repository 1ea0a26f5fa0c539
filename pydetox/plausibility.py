"""Checks whether images, class names and a model belong together.

A scan with class names that are no words, or with an activation that the weights were not trained
with, runs like any other, but its verdict means little. `examine` measures this. Every scan does so
before its search, and has no verdict where the images mean nothing to the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.nn.functional import normalize

from .data import ImageSet, Template
from .errors import ArchitectureError
from .evaluation import predict, wilson_interval
from .models import OpenClipModel
from .rng import child_seed

#: With fewer images there is no check of accuracy, because the intervals are too wide.
LEAST_IMAGES = 50
_MOST_IMAGES = 256
#: The relative decrease of the entropy with the other activation that is reported.
_LOWER_ENTROPY = 0.02

_NO_WORD = re.compile(r"n\d{8}|\d+")


@dataclass(frozen=True)
class Plausibility:
    """What speaks against a verdict.

    Attributes:
        doubts: One line for each reason to doubt that images, class names and model belong
            together.
        obstacle: The reason why there can be no verdict; None if there can. It is one of `doubts`.
    """

    doubts: tuple[str, ...] = ()
    obstacle: str | None = None


def examine(
    model: OpenClipModel,
    images: ImageSet,
    templates: Sequence[Template],
    *,
    seed: int = 0,
    head: Tensor | None = None,
) -> Plausibility:
    """Measure whether images, class names and model belong together.

    There are three reasons for doubt:

    * Class names are numbers or ids of WordNet.
    * The lower end of the 95% interval of the accuracy, on a sample of labelled images, is below
      `least_accuracy`. If the accuracy itself is below it, there is no verdict.
    * The user named the architecture, and the model's answers are more certain with the other one
      of GELU and QuickGELU.

    model: It is not changed. images: uint8 of the model's size; without class names there is no
    doubt. templates: The prompts. seed: The seed of the sample. head: The model's class head, if it
    is known already.
    """
    names = images.class_names
    if not names:
        return Plausibility()
    found = list[str]()
    odd = [name for name in names if _NO_WORD.fullmatch(name)]
    if 2 * len(odd) >= len(names):
        found.append(
            f"{images.name}: {len(odd)} of {len(names)} class names are no words ({odd[0]!r}, "
            "...), and the model is asked about words: give some with class_names="
        )
    if len(images) < LEAST_IMAGES:
        return Plausibility(tuple(found))
    few = images.at_most(_MOST_IMAGES, child_seed("plausibility.sample", seed))
    try:
        head = _head(model, names, templates) if head is None else head
    except ArchitectureError:  # its tokenizer is not here; who needs it says so
        return Plausibility(tuple(found))
    obstacle = None
    low = _accuracy_below_level(model, few, head)
    if low is not None:
        line, below = low
        found.append(line)
        obstacle = line if below else None
    activation = _other_activation(model, few, head, templates)
    if activation is not None:
        found.append(activation)
    return Plausibility(tuple(found), obstacle)


def doubts(
    model: OpenClipModel, images: ImageSet, templates: Sequence[Template], *, seed: int = 0
) -> list[str]:
    """Return the lines of `examine`."""
    return list(examine(model, images, templates, seed=seed).doubts)


def least_accuracy(classes: int) -> float:
    """Return the accuracy below which images mean too little to a model for a verdict.

    This is three times chance or, for few classes, half-way between chance and 1. classes: At least
    2.
    """
    chance = 1 / classes
    return min(3 * chance, (1 + chance) / 2)


def _accuracy_below_level(
    model: OpenClipModel, few: ImageSet, head: Tensor
) -> tuple[str, bool] | None:
    """Return a line if the accuracy may be below the level, and whether it is."""
    if few.labels is None or len(head) < 2:
        return None
    right = int((predict(model, few.images, head) == few.labels).sum())
    low, _ = wilson_interval(right, len(few))
    level = least_accuracy(len(head))
    if low >= level:
        return None
    share = right / len(few)
    below = share < level
    line = (
        f"{few.name}: the model gives {right} of {len(few)} images their class ({share:.1%}; "
        f"chance is {1 / len(head):.1%}, and a verdict needs {level:.1%}): images or class names "
        f"mean {'too ' if below else ''}little to it; check that the names are words, in the "
        "order of the labels"
    )
    return line, below


def _other_activation(
    model: OpenClipModel, few: ImageSet, head: Tensor, templates: Sequence[Template]
) -> str | None:
    """Return a line if zero-shot answers are more certain with the other activation."""
    if model.named is None or not any(True for _ in _activations(model.clip)):
        return None
    assert few.class_names is not None
    own = _entropy(model, few, head)
    with _swapped(model.clip):
        other = _entropy(model, few, _head(model, few.class_names, templates))
    if other >= own * (1 - _LOWER_ENTROPY):
        return None
    used, rest = (
        ("QuickGELU", "GELU")
        if model.model_config.get("quick_gelu")
        else (
            "GELU",
            "QuickGELU",
        )
    )
    return (
        f"{model.name}: with {rest} in place of {used} its answers on {few.name} are surer "
        f"(entropy {other:.3f} instead of {own:.3f}): the weights may have been trained with "
        f"that; see open_clip's name with and without -quickgelu for {model.named}"
    )


def _head(model: OpenClipModel, names: Sequence[str], templates: Sequence[Template]) -> Tensor:
    kept, model.heads = model.heads, None  # whose key does not know the activation
    try:
        return model.zero_shot_head(names, templates)
    finally:
        model.heads = kept


def _entropy(model: OpenClipModel, few: ImageSet, head: Tensor) -> float:
    """Return the mean entropy of the answers in nats."""
    with torch.no_grad():
        units = normalize(model.encode_pixels(model.pixels(few.images)), dim=-1)
        shares = (model.logit_scale * units @ head.T).log_softmax(dim=-1)
        return float(-(shares.exp() * shares).sum(dim=-1).mean())


def _activations(module: nn.Module) -> Iterator[nn.Sequential]:
    """Yield the two-layer networks of open_clip's transformers, whose activation has a name."""
    for part in module.modules():
        if isinstance(part, nn.Sequential) and type(getattr(part, "gelu", None)) in (
            nn.GELU,
            QuickGELU,
        ):
            yield part


@contextmanager
def _swapped(module: nn.Module) -> Iterator[None]:
    """Exchange GELU and QuickGELU within the block; the module is as it was afterwards."""
    before = [(part, part.gelu) for part in _activations(module)]
    try:
        for part, own in before:
            part.gelu = nn.GELU() if isinstance(own, QuickGELU) else QuickGELU()
        yield
    finally:
        for part, own in before:
            part.gelu = own
