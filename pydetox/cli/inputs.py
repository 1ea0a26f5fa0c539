"""From options to models, images and configurations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..atomic import write_file
from ..checkpoints import load_checkpoint
from ..data import (
    DEFAULT_TEMPLATES,
    DIGIT_TEMPLATES,
    ImageSet,
    load_class_names,
    load_images,
    load_templates,
)
from ..detection import Calibration
from ..errors import DataError, UsageError
from ..inversion import InversionConfig, RecoveredTrigger
from ..inversion.trigger_file import load_triggers
from ..models import OpenClipModel
from ..reporting import to_json
from ..reporting.values import clean_text
from ..training import TrainConfig
from ..workflow import ScanConfig, calibrate

CALIBRATION_SCHEMA = "pydetox.calibration/1"

# A calibration of 1000 classes and 100 references has 2 MB.
_MAX_CALIBRATION_BYTES = 64 << 20


@dataclass(frozen=True)
class LoadedModel:
    """A model that was read, on its device. sha256: of its weights file."""

    model: OpenClipModel
    sha256: str


@dataclass
class Inputs:
    """Reads models and the images that fit them; images of one size are decoded once.

    Attributes are the options of the same names.
    """

    images: str
    class_names: Path | None
    templates: Path | None
    max_images: int | None
    resize: bool
    model: str | None
    offline: bool
    seed: int
    device: torch.device
    _names: tuple[str, ...] | None = field(init=False)
    _decoded: dict[tuple[int, str], ImageSet] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._names = None if self.class_names is None else load_class_names(self.class_names)
        if self.templates is not None:
            self.prompts: tuple[str, ...] = load_templates(self.templates)
        else:
            self.prompts = DIGIT_TEMPLATES if self.images == "digits" else DEFAULT_TEMPLATES

    @classmethod
    def of(cls, options: dict[str, Any]) -> Inputs:
        """Take the options of `image_options`, `model_options` and `machine_options`.

        Sets the number of threads. Raises UsageError for a device that is not there.
        """
        if options["threads"] is not None:
            torch.set_num_threads(options["threads"])
        names = ("images", "class_names", "templates", "max_images", "resize", "model", "offline")
        taken = {name: options[name] for name in names}
        return cls(**taken, seed=options["seed"], device=find_device(options["device"]))

    def read_model(self, reference: str) -> LoadedModel:
        """Read a checkpoint; raises what `load_checkpoint` and `OpenClipModel` raise."""
        checkpoint = load_checkpoint(reference, model=self.model, offline=self.offline)
        model = OpenClipModel.from_checkpoint(checkpoint)
        # It is shown with progress bars, at a terminal.
        model.name = clean_text(model.name)
        return LoadedModel(model.to(self.device), checkpoint.sha256)

    def read_images(self, model: OpenClipModel) -> ImageSet:
        """Return the images in the model's size; raises what `load_images` raises."""
        interpolation = str(model.preprocess_config.get("interpolation", "bicubic"))
        key = (model.image_size, interpolation)
        if key not in self._decoded:
            self._decoded[key] = load_images(
                self.images,
                image_size=model.image_size,
                max_images=self.max_images,
                seed=self.seed,
                class_names=self._names,
                interpolation=interpolation,
                resize=self.resize,
            )
        return self._decoded[key]


def find_device(name: str) -> torch.device:
    """Return the device; UsageError when there is none of that name."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}; expected cpu, cuda or cuda:1")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"device {name!r}: torch sees {count} GPUs here")
    return device


def scan_config(options: dict[str, Any]) -> ScanConfig:
    """Return the configuration that the options describe."""
    inversion = InversionConfig(
        steps=options["steps"], batch_size=options["batch_size"], precision=options["precision"]
    )
    config = ScanConfig(
        objective=options["objective"],
        inversion=inversion,
        restarts=options["restarts"],
        seed=options["seed"],
    )
    training = TrainConfig(
        epochs=options["reference_epochs"], learning_rate=options["reference_learning_rate"]
    )
    if options["keep_all"]:
        config = replace(config, drop_below=None)
    return replace(config, references=options["references"], reference_training=training)


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file; DataError, naming it, for anything else."""
    try:
        if path.stat().st_size > _MAX_CALIBRATION_BYTES:
            raise DataError(f"{path}: too large for a calibration")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no calibration: not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != CALIBRATION_SCHEMA:
        raise DataError(f'{path}: no calibration: expected "schema": "{CALIBRATION_SCHEMA}"')
    try:
        calibration = Calibration.from_dict(content)
    except UsageError as error:
        raise DataError(f"{path}: {error}") from error
    sizes = [value for row in calibration.p_l1 for value in row]
    if not all(0 < value <= 1 or value == math.inf for value in sizes):
        raise DataError(f"{path}: no calibration: expected values of P-L1 in (0, 1] or null")
    return calibration


def find_calibration(
    options: dict[str, Any], inputs: Inputs, config: ScanConfig
) -> Calibration | None:
    """Read or make the calibration that `calibration_options` ask for; None for neither.

    Raises UsageError for both, and what `calibrate` raises.
    """
    base, path = options["base"], options["calibration_file"]
    if base is not None and path is not None:
        raise UsageError("--base and --calibration exclude each other")
    if path is not None:
        return read_calibration(path)
    if base is None:
        return None
    model = inputs.read_model(base).model
    return calibrate(model, inputs.read_images(model), templates=inputs.prompts, config=config)


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration file for `read_calibration`."""
    content = {"schema": CALIBRATION_SCHEMA, **calibration.to_dict()}
    write_file(path, f"{to_json(content)}\n")


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
        raise DataError(f"{images.name}: no class names; give some with --class-names")
    return images.class_names
