"""Every attack of the benchmark by name, with the parameters of the CLIP literature.

Parameters are those at 224 pixels, scaled to the image size by each trigger's own definition. What
an attack draws at random (patterns, places, target classes) comes from its seed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...errors import UsageError
from ...models import OpenClipModel
from ...rng import child_seed, generator
from .badclip import optimised_patch
from .overlays import RandomBlend, SinusoidTrigger, blended, stripes, text_overlay, triangles
from .patches import badnets, badnets_random_pattern, badnets_random_place
from .poisoning import Backdoor
from .triggers import Trigger
from .warping import wanet


@dataclass(frozen=True, eq=False)
class AttackerView:
    """The models and images that an attacker has.

    Attributes:
        base: The clean model that the victim is fine-tuned from.
        images: The attacker's clean images, uint8 [N, 3, H, W].
        head: The zero-shot head of the base, unit rows [C, D].
    """

    base: OpenClipModel
    images: Tensor
    head: Tensor


#: From attacker, image size, target class and seed to a trigger.
_Make = Callable[[AttackerView, int, int, int], Trigger]


# WaNet's own strength, 0.5, moves pixels by a quarter of one; small models do not learn that from
# 5% of their images. At 2 they move by one.
_WARP = 2.0


@dataclass(frozen=True)
class _Recipe:
    make: _Make
    clean_label: bool = False
    # Makes a second trigger, into another class; None for one backdoor.
    second: _Make | None = None


def _badclip(view: AttackerView, size: int, target: int, seed: int) -> Trigger:
    return optimised_patch(view.base, view.images, view.head[target], seed=seed)


_RECIPES: dict[str, _Recipe] = {
    "badnets": _Recipe(lambda _, size, __, seed: badnets(size, seed=seed)),
    "badnets-random-place": _Recipe(lambda _, size, __, s: badnets_random_place(size, seed=s)),
    "badnets-random-pattern": _Recipe(lambda _, size, __, s: badnets_random_pattern(size, seed=s)),
    "blended": _Recipe(lambda _, size, __, seed: blended(size, seed=seed)),
    "blended-random": _Recipe(lambda _, __, ___, seed: RandomBlend(0.2, seed)),
    "stripes": _Recipe(lambda _, size, __, seed: stripes(size, seed=seed)),
    "sig": _Recipe(lambda *_: SinusoidTrigger()),
    "wanet": _Recipe(lambda _, size, __, seed: wanet(size, seed=seed, s=_WARP)),
    "triangles": _Recipe(lambda _, size, __, ___: triangles(size)),
    "text": _Recipe(lambda _, size, __, seed: text_overlay(size, seed=seed)),
    "badclip": _Recipe(_badclip),
    "clean-label": _Recipe(lambda _, size, __, s: badnets(size, seed=s), clean_label=True),
    "two-backdoors": _Recipe(
        lambda _, size, __, seed: badnets(size, seed=seed),
        second=lambda _, size, __, seed: blended(size, seed=seed),
    ),
}

#: Names of all attacks, in the order of tables.
ATTACKS: tuple[str, ...] = tuple(_RECIPES)


def draw_attack(name: str, view: AttackerView, *, rate: float, seed: int) -> tuple[Backdoor, ...]:
    """Return the backdoors that an attack plants: one, or two into different classes.

    name: One of ATTACKS. rate: The poisoned share of the training set, for each backdoor. seed: The
    seed of target classes and triggers. Raises UsageError for an unknown name, or if the head has
    fewer classes than there are targets.
    """
    if name not in _RECIPES:
        raise UsageError(f"attack {name!r}; expected one of {', '.join(ATTACKS)}")
    recipe = _RECIPES[name]
    makers = [recipe.make, *([] if recipe.second is None else [recipe.second])]
    classes = view.head.shape[0]
    if classes < len(makers):
        raise UsageError(f"{name}: {classes} classes, but it needs {len(makers)} targets")
    rng = generator("attacks.targets", seed)
    targets = rng.permutation(classes)[: len(makers)]
    return tuple(
        Backdoor(
            make(view, view.base.image_size, int(target), child_seed("attacks.trigger", seed, k)),
            int(target),
            rate,
            recipe.clean_label,
        )
        for k, (make, target) in enumerate(zip(makers, targets, strict=True))
    )
