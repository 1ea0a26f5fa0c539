"""From options to models, images and configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import load_checkpoint
from ..data import ImageSet, ImageSource
from ..detect.calibration_file import read_calibration
from ..detect.configuration import ScanConfig
from ..detect.references import ReferencePlan
from ..errors import DataError, UsageError
from ..inversion import InversionConfig, RecoveredTrigger
from ..inversion.trigger_file import load_triggers
from ..models import OpenClipModel
from ..models.device import find_device
from ..reporting.values import clean_text
from ..session import ModelLike
from ..training import TrainConfig


@dataclass(frozen=True)
class Inputs:
    """Reads models and the images that fit them; images of one size are decoded once.

    Attributes: source: the images. model, offline, device: the options of the same names.
    """

    source: ImageSource
    model: str | None
    offline: bool
    device: torch.device

    @classmethod
    def of(cls, options: dict[str, Any]) -> Inputs:
        """Take the options of `image_options`, `model_options` and `machine_options`.

        Sets the number of threads. Raises UsageError for a device that is not there.
        """
        if options["threads"] is not None:
            torch.set_num_threads(options["threads"])
        names = ("class_names", "templates", "max_images", "resize", "seed")
        source = ImageSource(options["images"], **{name: options[name] for name in names})
        return cls(source, options["model"], options["offline"], find_device(options["device"]))

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt templates."""
        return self.source.prompts

    def read_model(self, reference: ModelLike) -> OpenClipModel:
        """Read a checkpoint by name; raises what `load_checkpoint` and `OpenClipModel` raise."""
        checkpoint = load_checkpoint(str(reference), model=self.model, offline=self.offline)
        model = OpenClipModel.from_checkpoint(checkpoint, consume=True)
        # It is shown with progress bars, at a terminal.
        model.name = clean_text(model.name)
        return model.to(self.device)

    def read_images(self, model: OpenClipModel) -> ImageSet:
        """Return the images in the model's size; raises what `load_images` raises."""
        return self.source.read(model.resizing)


def inversion_config(options: dict[str, Any]) -> InversionConfig:
    """Return the search that `search_options` describe."""
    return InversionConfig(
        steps=options["steps"], batch_size=options["batch_size"], precision=options["precision"]
    )


def scan_config(options: dict[str, Any]) -> ScanConfig:
    """Return the configuration that the options describe."""
    config = ScanConfig(
        objective=options["objective"],
        inversion=inversion_config(options),
        restarts=options["restarts"],
        seed=options["seed"],
    )
    training = TrainConfig(
        epochs=options["reference_epochs"], learning_rate=options["reference_learning_rate"]
    )
    if options["keep_all"]:
        config = replace(config, drop_below=None)
    return replace(config, references=options["references"], reference_training=training)


def reference_plan(options: dict[str, Any], config: ScanConfig) -> ReferencePlan:
    """Return what the options of `calibration_options` compare with; a calibration file is read.

    Raises UsageError for options that exclude each other or lack another one, before any work.
    """
    path = options["calibration_file"]
    return ReferencePlan.decide(
        config,
        base=options["base"],
        references=options["reference_models"] or None,
        calibration=None if path is None else read_calibration(path),
    )


def class_index(name: str, class_names: Sequence[str] | None, source: str) -> int:
    """Return the index of a class; UsageError for a name that is not, or is twice, among them."""
    names = list(class_names or [])
    if names.count(name) == 1:
        return names.index(name)
    if name in names:
        raise UsageError(f"class {name!r} stands {names.count(name)} times in {source}")
    shown = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
    raise UsageError(f"class {name!r} is not in {source}; it has {shown or 'no class names'}")


def read_triggers(
    path: Path, target: str | None, images: ImageSet
) -> tuple[int, list[RecoveredTrigger]]:
    """Return the target class and its triggers from a file, the smallest first.

    Raises DataError for a file that is none or whose triggers have another size than the images,
    UsageError when it is not clear which class is meant.
    """
    file = load_triggers(path)
    size = tuple(file.masks.shape[1:])
    if size != images.image_size:
        raise DataError(
            f"{path}: triggers of {size[0]}x{size[1]} pixels; the model takes images of "
            f"{images.image_size[0]}x{images.image_size[1]}"
        )
    chosen = file.select(target)
    name = target if target is not None else file.targets[chosen[0]]
    index = class_index(str(name), images.class_names, images.name)
    return index, [file.trigger(k) for k in chosen]


def require_class_names(images: ImageSet) -> tuple[str, ...]:
    """Return the class names of the images; DataError if they have none."""
    if not images.class_names:
        raise DataError(f"{images.name}: no class names; give some with class_names=")
    return images.class_names
