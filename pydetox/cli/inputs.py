"""From options to models, images and configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import identify_checkpoint, load_checkpoint
from ..checkpoints.architecture import close_matches
from ..data import ImageSet, ImageSource, Template
from ..detect.calibration_file import read_calibration
from ..detect.configuration import ScanConfig
from ..detect.references import ReferencePlan
from ..errors import DataError, UsageError
from ..inversion import InversionConfig, RecoveredTrigger
from ..inversion.trigger_file import load_triggers
from ..models import OpenClipModel
from ..models.device import find_device
from ..plausibility import doubts
from ..reporting.values import clean_text
from ..scanning.config import DEFAULT_REFERENCE_EPOCHS
from ..session import ModelLike
from ..training import TrainConfig
from .group import print_warning
from .wording import in_options


@dataclass(frozen=True)
class Inputs:
    """Reads models and the images that fit them; images of one size are decoded once.

    Attributes: source: the images. model, weights_key, base, base_model, offline, device: the
    options of the same names; the key is that of a suspect, not of bases and references.
    preprocess: what options say about preparing images, as open_clip's ``preprocess_cfg`` has it.
    warnings: what was said on stderr so far.
    """

    source: ImageSource
    model: str | None
    weights_key: str | None
    offline: bool
    device: torch.device
    base: str | None = None
    base_model: str | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, options: dict[str, Any]) -> Inputs:
        """Take the options of `image_options`, `model_options` and `machine_options`.

        Sets the number of threads. Raises UsageError for a device that is not there.
        """
        if options["threads"] is not None:
            torch.set_num_threads(options["threads"])
        names = ("class_names", "templates", "max_images", "resize", "seed", "strict")
        source = ImageSource(options["images"], **{name: options[name] for name in names})
        given = {
            "mean": options["image_mean"],
            "std": options["image_std"],
            "interpolation": options["interpolation"],
            "resize_mode": options["resize_mode"],
        }
        return cls(
            source,
            options["model"],
            options["weights_key"],
            options["offline"],
            find_device(options["device"]),
            options.get("base"),
            options.get("base_model"),
            {k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if v is not None},
        )

    @property
    def prompts(self) -> tuple[Template, ...]:
        """The prompt templates."""
        return self.source.prompts

    def read_suspect(self, reference: ModelLike) -> OpenClipModel:
        """Read the checkpoint that the command is about; raises what `read_model` raises."""
        return self._read(reference, self.model, self.preprocess, self.weights_key)

    def read_model(self, reference: ModelLike) -> OpenClipModel:
        """Read a checkpoint by name; raises what `load_checkpoint` and `OpenClipModel` raise.

        What of its configuration is a guess is said on stderr.
        """
        return self._read(reference, self.model, self.preprocess)

    def read_other(self, reference: ModelLike) -> OpenClipModel:
        """Read the base or a reference model; like `read_model`.

        What options say about preparing images counts for a base that does not tell itself.
        """
        if str(reference) != self.base:
            return self.read_model(reference)
        model = self.base_model or self.model
        identity = identify_checkpoint(str(reference), model=model, offline=self.offline)
        given = {} if identity.tells_preprocessing() else self.preprocess
        return self._read(reference, model, given)

    def _read(
        self,
        reference: ModelLike,
        architecture: str | None,
        preprocess: Mapping[str, Any],
        weights_key: str | None = None,
    ) -> OpenClipModel:
        checkpoint = load_checkpoint(
            str(reference),
            model=architecture,
            preprocess=preprocess,
            offline=self.offline,
            weights_key=weights_key,
        )
        model = OpenClipModel.from_checkpoint(checkpoint, consume=True)
        self.warn(*model.warnings)
        # It is shown with progress bars, at a terminal.
        model.name = clean_text(model.name)
        return model.to(self.device)

    def warn(self, *lines: str) -> None:
        """Say something on stderr, once, and keep it for the result."""
        for line in lines:
            if line not in self.warnings:
                self.warnings.append(line)
                print_warning(line)

    def used(self, model: OpenClipModel) -> dict[str, Any]:
        """Return what every result records: the images, how they were prepared, and warnings."""
        report = self.source.read(model.resizing).report
        return {
            "preprocessing": model.preprocessing,
            "image_files": None if report is None else report.to_dict(),
            "warnings": list(map(in_options, self.warnings)),
        }

    def require_class(self, name: str) -> None:
        """Raise UsageError for a class that the images do not have, before anything is read.

        Where only reading the images tells their classes, it is checked then.
        """
        known = self.source.known_names()
        if known is not None:
            class_index(name, known, self.source.spec)

    def read_images(self, model: OpenClipModel, *, examine: bool = True) -> ImageSet:
        """Return the images in the model's size; raises what `load_images` raises.

        examine: Whether to say what speaks against their belonging together, on stderr.
        """
        images = self.source.read(model.resizing)
        line = None if images.report is None else images.report.line()
        if line is not None:
            self.warn(line)
        if examine:
            self.warn(*doubts(model, images, self.prompts))
        return images


def inversion_config(options: dict[str, Any]) -> InversionConfig:
    """Return the search that `search_options` describe."""
    return InversionConfig(
        steps=options["steps"], batch_size=options["batch_size"], precision=options["precision"]
    )


def scan_config(options: dict[str, Any]) -> ScanConfig:
    """Return the configuration that the options describe."""
    config = ScanConfig(
        objective=options["objective"],
        families=options["families"],
        inversion=inversion_config(options),
        restarts=options["restarts"],
        positive_control=options["positive_control"],
        seed=options["seed"],
    )
    training, rate = None, options["reference_learning_rate"]
    if rate is not None:
        epochs = options["reference_epochs"] or DEFAULT_REFERENCE_EPOCHS
        training = TrainConfig(epochs=epochs, learning_rate=rate)
    elif options["reference_epochs"] is not None:
        raise UsageError("--reference-epochs needs a --reference-learning-rate")
    if options["keep_all"]:
        config = config.every_class()
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
    hint = ""
    if name.isascii() and name.isdigit() and int(name) < len(names):
        hint = f" (a name is expected, not a number: the class of label {name} is "
        hint += f"{names[int(name)]!r})"
    else:
        hint = close_matches(name, names)
    raise UsageError(f"class {name!r} is not in {source}; it has {shown or 'no class names'}{hint}")


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
    index = class_index(str(name), images.class_names, images.source)
    return index, [file.trigger(k) for k in chosen]


def require_labels(images: ImageSet) -> None:
    """Raise DataError for images that no accuracy can be measured on."""
    if images.labels is None:
        raise DataError(
            f"{images.source}: no labels; accuracy cannot be measured without them: put the images "
            "into one folder per class (a scan and a repair need no labels)"
        )


def require_class_names(images: ImageSet) -> tuple[str, ...]:
    """Return the class names of the images; DataError if they have none."""
    if not images.class_names:
        raise DataError(f"{images.source}: no class names; give some with class_names=")
    return images.class_names
