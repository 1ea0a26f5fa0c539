"""`Session`: what all steps of the work on one checkpoint share.

Here, and only here, what a caller gives becomes a model (`as_model`) and an image set. A session
resolves a model, the images that fit it, the prompts, and the base of a search in
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
from torch import Tensor, nn

from .checkpoints import Checkpoint, load_checkpoint
from .data import DEFAULT_TEMPLATES, ImageData, ImageSet, Template, default_templates, load_images
from .data.names import given_templates
from .errors import ArchitectureError, DataError, PydetoxWarning, UsageError
from .evaluation import Evaluation, Stamp, evaluate, predict
from .models import OpenClipModel
from .models.encoder import EncoderModel, VisionLanguageModel
from .models.objects import from_object
from .plausibility import Plausibility, examine
from .prototypes import image_prototypes
from .rng import child_seed

#: A model, a checkpoint that was read, the name of one (see `pydetox.checkpoints`), or an object:
#: a model of open_clip, a CLIPModel of transformers or a `VisionLanguageModel`.
ModelLike: TypeAlias = "OpenClipModel | Checkpoint | str | Path | nn.Module | VisionLanguageModel"

# The number of clean images that measure how often a base predicts each class. The standard error
# of a share of one tenth is then 0.013, a quarter of the allowance that is added to the share
# (`ContrastObjective`).
_SHARE_IMAGES = 512


def as_model(checkpoint: ModelLike, *, architecture: str | None = None) -> OpenClipModel:
    """Return the model of a checkpoint or of an object; a model of pydetox is returned as it is.

    checkpoint: An object is not changed: its weights are copied. Everything but a name and a
    `Checkpoint` is one (see `models.objects.from_object`).
    architecture: The architecture, as open_clip's name or a JSON file, if the checkpoint does not
    name it. Raises what `load_checkpoint`, `OpenClipModel.from_checkpoint` and `from_object` raise.
    """
    if isinstance(checkpoint, OpenClipModel):
        return checkpoint
    if isinstance(checkpoint, Checkpoint):
        return OpenClipModel.from_checkpoint(checkpoint)
    if not isinstance(checkpoint, str | Path):
        return from_object(checkpoint, architecture=architecture)
    read = load_checkpoint(checkpoint, model=architecture)
    model = OpenClipModel.from_checkpoint(read, consume=True)
    for line in model.warnings:
        warnings.warn(line, PydetoxWarning, stacklevel=2)
    return model


def _read_images(
    data: ImageData, model: OpenClipModel, class_names: Sequence[str] | None
) -> ImageSet:
    """Return the images for a model."""
    if isinstance(data, ImageSet) and class_names is None:
        images = data  # those who use it check its size, and say more about it
    else:
        images = load_images(
            data,
            resizing=model.resizing,
            class_names=class_names,
            labels_required=False,
            resize=True,
        )
    if images.class_names is None and isinstance(model, EncoderModel) and model.class_names:
        images = replace(images, class_names=model.class_names)
    return images


@dataclass(frozen=True, eq=False)
class Session:
    """One model, with the images, the prompts and the base that all steps on it use.

    Attributes:
        model: The model. No step changes it.
        images: All clean images, uint8 [N, 3, H, W] of the model's size, in content order (see
            `ImageSet.in_content_order`).
        templates: Prompt templates.
        base: The base of searches in contrast to it; None for plain searches.
        start: The model that this one was fine-tuned from, if it is known, whether searches are in
            contrast to it or not. Repairs lead towards it (`UnlearnConfig.toward_base`).
        notes: One line for everything that was left out of the images or done to them in another
            way than the model expects.
    """

    model: OpenClipModel
    images: ImageSet
    templates: tuple[Template, ...] = DEFAULT_TEMPLATES
    base: OpenClipModel | None = None
    notes: tuple[str, ...] = ()
    start: OpenClipModel | None = None

    @classmethod
    def open(
        cls,
        checkpoint: ModelLike,
        data: ImageData,
        *,
        templates: Sequence[Template] | None = None,
        class_names: Sequence[str] | None = None,
        base: OpenClipModel | None = None,
        architecture: str | None = None,
    ) -> Session:
        """Read a checkpoint and its images, in the model's size, and order the images.

        Args:
            checkpoint: As in `as_model`.
            data: As in `load_images`. An image set must have the model's size.
            templates: Prompt templates; default: those that suit the images.
            class_names: As in `load_images`. The head of an `EncoderModel` has names of its own,
                which count if nobody gives any.
            base: The base of searches in contrast to it.
            architecture: As in `as_model`.

        Raises what `as_model` and `load_images` raise.
        """
        model = as_model(checkpoint, architecture=architecture)
        images = _read_images(data, model, class_names)
        notes = list[str]()
        if images.report is not None:
            left_out, scaled = images.report.line(), images.report.resizing
            notes += [] if left_out is None else [left_out]
            if scaled not in (None, model.resizing):
                notes.append(
                    f"{images.name}: the images were scaled as {scaled}, and {model.name} expects "
                    f"{model.resizing}: load them with resizing=model.resizing"
                )
        return cls(
            model,
            images.in_content_order(),
            default_templates(data) if not templates else given_templates(templates),
            base,
            tuple(notes),
            base,
        )

    @property
    def has_head(self) -> bool:
        """Whether class names and a text tower give the model a zero-shot head.

        Without one, label-free steps use `prototypes` in its place.
        """
        return self.optional_head is not None

    @cached_property
    def prototypes(self) -> Tensor:
        """The centres of the groups that the model sees among the images, unit rows [K, D]."""
        return image_prototypes(self.model, self.images.images)

    @cached_property
    def plausibility(self) -> Plausibility:
        """Whether images, class names and model belong together."""
        return examine(self.model, self.images, self.templates, head=self.optional_head)

    @property
    def doubts(self) -> tuple[str, ...]:
        """One line for each reason to doubt what comes out of a scan or a repair."""
        return (*self.model.warnings, *self.notes, *self.plausibility.doubts)

    def warn(self, *, examine: bool = True) -> None:
        """Say `doubts` as Python's warnings, except those that reading the model has said.

        examine: Whether to measure `plausibility` for it.
        """
        for line in (*self.notes, *(self.plausibility.doubts if examine else ())):
            warnings.warn(line, PydetoxWarning, stacklevel=3)

    def with_base(
        self, base: OpenClipModel | None, *, start: OpenClipModel | None = None
    ) -> Session:
        """Return the session of searches in contrast to a base, or of plain ones; see `start`."""
        session = replace(self, base=base, start=start or base)
        for known in ("head", "optional_head", "plausibility"):  # which do not depend on the base
            if known in self.__dict__:
                session.__dict__[known] = self.__dict__[known]
        return session

    def with_image_tower_of(self, model: OpenClipModel) -> Session:
        """Return the session of a model that differs from this one only in its image tower."""
        session = replace(self, model=model)
        # The head is of the text tower and takes a while to make. Prototypes stand for it: they are
        # those of the first model, as its texts are.
        kept = ("head", "optional_head", "prototypes")
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
    def optional_head(self) -> Tensor | None:
        """The model's head; None where it has none, as without names, texts or a tokenizer."""
        if not self.images.class_names:
            return None
        try:
            return self.head if len(self.head) > 0 else None
        except (ArchitectureError, DataError):  # no texts, no tokenizer, or other classes
            return None

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
        if self.images.labels is None or self.optional_head is None:
            return None
        return evaluate(self.model, self.images, self.optional_head, trigger=trigger, target=target)

    @property
    def _required_base(self) -> OpenClipModel:
        if self.base is None:
            raise UsageError("a search in contrast to the base needs it: give base=")
        return self.base
