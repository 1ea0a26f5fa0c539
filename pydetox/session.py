"""`Session`: what all steps of the work on one checkpoint share.

A session resolves a model, the images that fit it, the prompts, and the base of a search in
contrast to it once. Only a session hands out images: either all of them, in an order that does not
depend on the order of files, or a seeded sample of all classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from .checkpoints import Checkpoint, load_checkpoint
from .data import DEFAULT_TEMPLATES, ImageSet, Template
from .errors import ArchitectureError, DataError, PydetoxWarning, UsageError
from .evaluation import Evaluation, Stamp, evaluate, predict
from .models import OpenClipModel
from .prototypes import image_prototypes
from .rng import child_seed

#: A model, a checkpoint that was read, or the name of one (see `pydetox.checkpoints`).
ModelLike: TypeAlias = "OpenClipModel | Checkpoint | str | Path"

# The number of clean images that measure how often a base predicts each class. The standard error
# of a share of one tenth is then 0.013, a quarter of the allowance that is added to the share
# (`ContrastObjective`).
_SHARE_IMAGES = 512


def as_model(checkpoint: ModelLike, *, architecture: str | None = None) -> OpenClipModel:
    """Return the model of a checkpoint; a model is returned as it is.

    architecture: The architecture, as open_clip's name or a JSON file, if the checkpoint does not
    name it. Raises what `load_checkpoint` and `OpenClipModel.from_checkpoint` raise.
    """
    if isinstance(checkpoint, OpenClipModel):
        return checkpoint
    if isinstance(checkpoint, Checkpoint):
        return OpenClipModel.from_checkpoint(checkpoint)
    read = load_checkpoint(checkpoint, model=architecture)
    model = OpenClipModel.from_checkpoint(read, consume=True)
    for line in model.warnings:
        warnings.warn(line, PydetoxWarning, stacklevel=2)
    return model


@dataclass(frozen=True, eq=False)
class Session:
    """One model, with the images, the prompts and the base that all steps on it use.

    Attributes:
        model: The model. No step changes it.
        images: All clean images, uint8 [N, 3, H, W] of the model's size, in content order (see
            `ImageSet.in_content_order`).
        templates: Prompt templates.
        base: The base of searches in contrast to it; None for plain searches.
    """

    model: OpenClipModel
    images: ImageSet
    templates: tuple[Template, ...] = DEFAULT_TEMPLATES
    base: OpenClipModel | None = None

    @classmethod
    def open(
        cls,
        checkpoint: ModelLike,
        images: ImageSet,
        *,
        templates: Sequence[Template] | None = None,
        base: OpenClipModel | None = None,
        architecture: str | None = None,
    ) -> Session:
        """Read a checkpoint and order the images; raises what `as_model` raises.

        Warns where the images were scaled in another way than the model's configuration tells.
        """
        model = as_model(checkpoint, architecture=architecture)
        scaled = None if images.report is None else images.report.resizing
        if scaled not in (None, model.resizing):
            warnings.warn(
                f"{images.name}: the images were scaled as {scaled}, and {model.name} expects "
                f"{model.resizing}: load them with resizing=model.resizing",
                PydetoxWarning,
                stacklevel=3,
            )
        return cls(
            model,
            images.in_content_order(),
            tuple(templates or DEFAULT_TEMPLATES),
            base,
        )

    @cached_property
    def has_head(self) -> bool:
        """Whether class names and a text tower give the model a zero-shot head.

        Without one, label-free steps use `prototypes` in its place.
        """
        if not self.images.class_names:
            return False
        try:
            return len(self.head) > 0
        except (ArchitectureError, DataError):  # no texts, no tokenizer, or other classes
            return False

    @cached_property
    def prototypes(self) -> Tensor:
        """The centres of the groups that the model sees among the images, unit rows [K, D]."""
        return image_prototypes(self.model, self.images.images)

    def with_image_tower_of(self, model: OpenClipModel) -> Session:
        """Return the session of a model that differs from this one only in its image tower."""
        session = replace(self, model=model)
        # The head is of the text tower and takes a while to make. Prototypes stand for it: they are
        # those of the first model, as its texts are.
        kept = ("head", "has_head", "prototypes")
        session.__dict__.update({k: self.__dict__[k] for k in kept if k in self.__dict__})
        return session

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names of the images; DataError if they have none."""
        if not self.images.class_names:
            raise DataError(
                f"{self.images.name}: no class names; give some (class_names=) or scan label-free"
            )
        return self.images.class_names

    @cached_property
    def head(self) -> Tensor:
        """The model's zero-shot head, unit rows [C, D]; DataError without class names."""
        return self.model.zero_shot_head(self.class_names, self.templates)

    @cached_property
    def base_head(self) -> Tensor:
        """The base's zero-shot head, unit rows [C, D]; UsageError without a base."""
        return self._required_base.zero_shot_head(self.class_names, self.templates)

    def base_shares(self, seed: int) -> Tensor:
        """Return the share of clean images that the base gives each class, float32 [C].

        seed: The seed of the sample of images that is used.
        """
        few = self.images.at_most(_SHARE_IMAGES, child_seed("contrast.shares", seed))
        answers = predict(self._required_base, few.images, self.base_head)
        return torch.bincount(answers, minlength=len(self.base_head)) / len(answers)

    def forget_set(self, share: float, seed: int) -> ImageSet:
        """Return the sample of images that makes trigger vectors; `share` of all, in (0, 1]."""
        if share == 1:
            return self.images
        return self.images.split((share,), seed=child_seed("repair.forget", seed))[0]

    def class_index(self, target: int | str) -> int:
        """Return the index of a class that is given as index or name; UsageError if unknown."""
        names = self.class_names
        if isinstance(target, str):
            if names.count(target) != 1:
                raise UsageError(
                    f"class {target!r} stands {names.count(target)} times among the class names of "
                    f"{self.images.name}; expected once"
                )
            return names.index(target)
        if not 0 <= target < len(names):
            raise UsageError(f"target class {target}; expected 0..{len(names) - 1}")
        return target

    def evaluate(
        self, *, trigger: Stamp | None = None, target: int | None = None
    ) -> Evaluation | None:
        """Return CA and, with a trigger, ASR on the images; None without labels or a head."""
        if self.images.labels is None or not self.has_head:
            return None
        return evaluate(self.model, self.images, self.head, trigger=trigger, target=target)

    @property
    def _required_base(self) -> OpenClipModel:
        if self.base is None:
            raise UsageError("a search in contrast to the base needs it: give base=")
        return self.base
