"""BackdoorBench's Neural Cleanse, with its arguments and result files.

The original is `defense/nc.py` of github.com/SCLBD/BackdoorBench. It unpickles `attack_result.pt`,
which may run code, and searches class after class. Here nothing is unpickled, and all classes are
searched at once.
"""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from ..atomic import write_file
from ..checkpoints import load_checkpoint
from ..checkpoints.classifier_names import NORMALISATIONS
from ..data import ImageData, ImageSet, load_images
from ..errors import DataError, UsageError
from ..models import OpenClipModel
from ..models.classifiers import Classifier
from ..progress import track
from ..rng import generator
from ..scanning.config import read_config_file
from .cleanse import CleanseRules, FoundMask, Outliers, cleanse, outliers

#: BackdoorBench's own values (config/defense/nc/config.yaml).
_DEFAULTS: Mapping[str, Any] = {
    "device": "cuda",
    "dataset": "cifar10",
    "dataset_path": "./data",
    "log": None,
    "model": None,
    "epochs": 100,
    "batch_size": 256,
    "lr": 0.01,
    "sgd_momentum": 0.9,
    "wd": 5e-4,
    "random_seed": 0,
    "mask_lr": 0.1,
    "init_cost": 1e-3,
    "atk_succ_threshold": 98.0,
    "early_stop": True,
    "early_stop_threshold": 0.99,
    "early_stop_patience": 25,
    "patience": 5,
    "cost_multiplier": 2.0,
    "use_norm": 1,
    "ratio": 0.05,
    "unlearning_ratio": 0.2,
    "nc_epoch": 80,
    "index": None,
    "num_classes": None,
    "result_file": None,
}
#: Arguments that it has, and that say nothing here: how data are loaded, logged and stored.
_WITHOUT_MEANING = (
    *("amp", "pin_memory", "non_blocking", "prefetch", "num_workers", "checkpoint_load"),
    *("checkpoint_save", "client_optimizer", "lr_scheduler", "steplr_stepsize", "steplr_gamma"),
    *("steplr_milestones", "frequency_save", "EPSILON", "to_file", "n_times_test"),
    *("cleaning_ratio", "yaml_path", "save_path", "terminal_info", "input_height", "input_width"),
    *("input_channel", "img_size", "bs", "total_label"),
)
_PADDING = 4


@dataclass(frozen=True, eq=False)
class NeuralCleanseResult:
    """What `neural_cleanse` found and wrote.

    Attributes:
        outliers: The norm of every class's mask, and which classes are flagged.
        masks: The smallest working trigger of every class.
        model: The classifier's weights, under its own names; fine-tuned if a class was flagged.
        accuracy_before: The accuracy on the test images; None without them.
        accuracy: The same of `model`.
        folder: `record/RESULT_FILE/defense/nc`, where the files are.
    """

    outliers: Outliers
    masks: tuple[FoundMask, ...]
    model: Mapping[str, Tensor]
    accuracy_before: float | None
    accuracy: float | None
    folder: Path


def neural_cleanse(
    args: Namespace | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    images: ImageData | None = None,
    test_images: ImageData | None = None,
    **changes: Any,
) -> NeuralCleanseResult:
    """Run BackdoorBench's Neural Cleanse: search all classes, and fine-tune if one is flagged.

    The model is `record/RESULT_FILE/attack_result.pt`. These files are written into
    `record/RESULT_FILE/defense/nc`, where BackdoorBench has them: `defense_result.pt`,
    `nc_df_summary.csv` (with `test_acc` alone), `nc/trigger/DATASET_output_clean.txt`,
    `log/index.txt`, and `log/CLASS/mask.png`, `pattern.png` and `trigger.png`. An earlier result is
    replaced.

    Args:
        args: BackdoorBench's arguments, as its parser returns them, as a mapping, or as the path of
            one of its YAML files. Its defaults hold for the others, but `model` is what the file
            says, and `device` is `cpu` where there is no GPU.
        images: Clean training images with labels, in any form that `load_images` reads; default:
            the data set `dataset` of torchvision below `dataset_path`.
        test_images: Labelled images that the accuracy is measured on; None to measure none. Unlike
            BackdoorBench, it measures no ASR: the attacker's images are not read.
        changes: Single arguments by name, such as `result_file="badnets"`.

    Raises:
        UsageError: There is no such argument, no `result_file`, or fewer than 3 classes.
        DataError: The images cannot be read, or have no labels.
        CheckpointError: See `load_checkpoint`.
    """
    given = _arguments(args, changes)
    if given["result_file"] is None:
        raise UsageError("result_file is missing; expected the name of a folder in record/")
    source = Path("record") / str(given["result_file"])
    device = str(given["device"])
    device = "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device
    seed = int(given["random_seed"])
    model = _read(source / "attack_result.pt", given).to(device.partition(",")[0])
    assert isinstance(model.clip, Classifier)
    training = _images(images, given, model, test=False)
    chosen = _chosen(training, given, seed)
    clean = training.subset(chosen)
    tests = None if test_images is None else _images(test_images, given, model, test=True)
    before = None if tests is None else _accuracy(model, tests)
    found = cleanse(
        lambda x: _logits(model, x),
        lambda number: _augmented(clean, given, seed, number, model.device),
        *_start(model, len(model.clip.rows())),
        _rules(given),
    )
    rules = _rules(given)
    judged = outliers([one.norm(rules) for one in found], lower_middle=True)
    folder = source / "defense" / "nc"
    _write_search(folder, given, chosen, found, judged)
    if judged.backdoored:
        _unlearn(model, clean, [found[c] for c in judged.flagged], given, seed)
    state = model.storage_state_dict()
    after = None if tests is None else _accuracy(model, tests)
    _write_model(folder, model, state, after)
    return NeuralCleanseResult(judged, tuple(found), state, before, after, folder)


def _arguments(
    args: Namespace | Mapping[str, Any] | str | os.PathLike[str] | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    if isinstance(args, Namespace):
        args = vars(args)
    elif isinstance(args, str | os.PathLike):
        args = read_config_file(args)
    given = {k: v for k, v in {**(args or {}), **changes}.items() if v is not None}
    unknown = sorted(set(given) - set(_DEFAULTS) - set(_WITHOUT_MEANING))
    if unknown:
        raise UsageError(
            f"Neural Cleanse of BackdoorBench has no argument {unknown[0]!r}; expected some of "
            f"{', '.join(_DEFAULTS)}"
        )
    if int(given.get("n_times_test", 1)) != 1:
        raise UsageError(f"n_times_test is {given['n_times_test']}; expected 1")
    return {**_DEFAULTS, **{k: v for k, v in given.items() if k in _DEFAULTS}}


def _rules(given: Mapping[str, Any]) -> CleanseRules:
    return CleanseRules(
        epochs=int(given["nc_epoch"]),
        learning_rate=float(given["mask_lr"]),
        initial_cost=float(given["init_cost"]),
        success=float(given["atk_succ_threshold"]) / 100,
        patience=int(given["patience"]),
        cost_multiplier=float(given["cost_multiplier"]),
        early_stop=bool(given["early_stop"]),
        early_stop_threshold=float(given["early_stop_threshold"]),
        early_stop_patience=int(given["early_stop_patience"]),
        norm=int(given["use_norm"]),
    )


def _read(path: Path, given: Mapping[str, Any]) -> OpenClipModel:
    name = given["model"]
    prepared = NORMALISATIONS.get(str(given["dataset"]))
    checkpoint = load_checkpoint(
        path,
        model=None if name is None else f"backdoorbench:{name}",
        preprocess=None if prepared is None else {k: list(v) for k, v in prepared.items()},
    )
    model = OpenClipModel.from_checkpoint(checkpoint, consume=True)
    if not isinstance(model.clip, Classifier):
        raise UsageError(f"{path}: is no classifier of BackdoorBench")
    return model


def _images(
    images: ImageData | None, given: Mapping[str, Any], model: OpenClipModel, *, test: bool
) -> ImageSet:
    spec = images
    if spec is None:
        folder = Path(str(given["dataset_path"])) / str(given["dataset"])
        spec = f"{given['dataset']}={folder}"
    found = load_images(
        spec, image_size=model.image_size, resize_mode="squash", interpolation="bilinear"
    )
    if found.labels is None:
        part = "test_images" if test else "images"
        raise DataError(f"{found.name}: has no labels; expected labelled images as {part}=")
    return found


def _chosen(images: ImageSet, given: Mapping[str, Any], seed: int) -> list[int]:
    """Return the indices of the share `ratio` of the images, or those of the file `index`."""
    if given["index"] is not None:
        try:
            chosen = np.loadtxt(given["index"], dtype=int, ndmin=1).tolist()
        except (OSError, ValueError) as error:
            raise DataError(f"{given['index']}: cannot be read as indices: {error}") from error
        return [int(k) for k in chosen]
    count = int(len(images) * float(given["ratio"]))
    if count < 2:
        raise DataError(
            f"{images.name}: a ratio of {given['ratio']} of {len(images)} images are {count}; "
            "expected at least 2"
        )
    order = generator("compat.clean", seed).permutation(len(images))
    return [int(k) for k in order[:count]]


def _logits(model: OpenClipModel, pixels: Tensor) -> Tensor:
    """Return the classifier's own logits [N, K] of pixels float [N, 3, H, W] in [0, 1]."""
    assert isinstance(model.clip, Classifier)
    answers: Tensor = model.clip.head(model.clip.visual.trunk(model.normalize(pixels)))
    return answers


def _start(model: OpenClipModel, classes: int) -> tuple[Tensor, Tensor]:
    """Return first logits of ones, as BackdoorBench has."""
    size = model.image_size
    ones = torch.ones((classes, 3, size, size), device=model.device)
    return ones.narrow(1, 0, 1).clone(), ones


def _augmented(
    images: ImageSet, given: Mapping[str, Any], seed: int, epoch: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield the batches of an epoch: shuffled, shifted by up to 4 pixels, CIFAR-10 mirrored."""
    for indices, pixels in _batches(images, given, seed, epoch):
        del indices
        yield pixels.to(device).float() / 255


def _batches(
    images: ImageSet, given: Mapping[str, Any], seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    rng = generator("compat.batches", seed, epoch)
    order = torch.from_numpy(rng.permutation(len(images)))
    height, width = images.image_size
    for indices in torch.split(order, int(given["batch_size"])):
        wide = pad(images.images[indices], (_PADDING,) * 4)
        top, left = torch.from_numpy(rng.integers(0, 2 * _PADDING + 1, (2, len(indices), 1)))
        rows = (top + torch.arange(height))[:, None, :, None]
        columns = (left + torch.arange(width))[:, None, None, :]
        every = torch.arange(len(indices))[:, None, None, None]
        pixels = wide[every, torch.arange(3)[None, :, None, None], rows, columns]
        if given["dataset"] == "cifar10":
            mirrored = torch.from_numpy(rng.random(len(indices)) < 0.5)
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        yield indices, pixels


def _unlearn(
    model: OpenClipModel,
    clean: ImageSet,
    triggers: list[FoundMask],
    given: Mapping[str, Any],
    seed: int,
) -> None:
    """Fine-tune on clean images, a share of which carries the triggers and its own labels."""
    labels = clean.labels
    assert labels is not None
    plain = int(len(clean) * (1 - float(given["unlearning_ratio"])))
    kept = list(range(plain))
    stamped = torch.arange(plain, len(clean))
    pixels, classes = [clean.images[kept]], [labels[kept]]
    for one in triggers:
        mask, pattern = one.mask.cpu(), 255 * one.pattern.cpu()
        mixed = torch.lerp(clean.images[stamped].float(), pattern, mask)
        pixels.append(mixed.round().clamp(0, 255).to(torch.uint8))
        classes.append(labels[stamped])
    mixture = ImageSet(torch.cat(pixels), torch.cat(classes), clean.class_names, clean.name)
    assert mixture.labels is not None
    epochs = int(given["epochs"])
    network = model.clip.train().requires_grad_(True)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=float(given["lr"]),
        momentum=float(given["sgd_momentum"]),
        weight_decay=float(given["wd"]),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs))
    try:
        for epoch in track(range(epochs), "Unlearning"):
            # The numbers after those of the search.
            number = int(given["nc_epoch"]) + epoch
            for indices, batch in _batches(mixture, given, seed, number):
                if len(indices) < 2:
                    continue  # a batch of one has no variance
                optimizer.zero_grad(set_to_none=True)
                answers = _logits(model, batch.to(model.device).float() / 255)
                loss = cross_entropy(answers, mixture.labels[indices].to(model.device))
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            schedule.step()
    finally:
        network.eval().requires_grad_(False)


@torch.no_grad()
def _accuracy(model: OpenClipModel, images: ImageSet) -> float:
    assert images.labels is not None
    right = 0
    for part in torch.split(torch.arange(len(images)), 256):
        answers = _logits(model, model.pixels(images.images[part])).argmax(dim=1).cpu()
        right += int((answers == images.labels[part]).sum())
    return right / len(images)


def _write_search(
    folder: Path,
    given: Mapping[str, Any],
    chosen: list[int],
    found: list[FoundMask],
    judged: Outliers,
) -> None:
    log = folder / "log" if given["log"] is None else Path(str(given["log"]))
    write_file(_made(log / "index.txt"), "".join(f"{k}\n" for k in chosen))
    for one in found:
        for name, content in (
            ("mask", one.mask.expand(3, -1, -1)),
            ("pattern", one.pattern),
            ("trigger", one.pattern * one.mask),
        ):
            write_file(_made(log / str(one.target) / f"{name}.png"), _png(content.cpu()))
    lines = [
        f"Output for cleanse:  - {given['dataset']}",
        "-" * 30,
        "Test 0:",
        ", ".join(str(x) for x in (judged.median, judged.mad, judged.anomaly_index)),
        ", ".join(str(x) for x in judged.norms),
    ]
    name = f"{given['dataset']}_output_clean.txt"
    write_file(_made(folder / "nc" / "trigger" / name), "\n".join([*lines, ""]))


def _write_model(
    folder: Path, model: OpenClipModel, state: Mapping[str, Tensor], accuracy: float | None
) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([["", "test_acc"], ["0", "" if accuracy is None else accuracy]])
    write_file(_made(folder / "nc_df_summary.csv"), table.getvalue())
    buffer = io.BytesIO()
    vision = model.model_config["vision_cfg"]
    content = {"model_name": vision["architecture"], "num_classes": vision["classes"]}
    torch.save({**content, "model": dict(state)}, buffer)
    write_file(folder / "defense_result.pt", buffer.getvalue())


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _png(values: Tensor) -> bytes:
    """Return an image [3, H, W] as PNG, stretched to 0..255 as torchvision's save_image does."""
    low, high = values.min(), values.max()
    stretched = (values - low) / (high - low).clamp(min=1e-5)
    pixels = (stretched * 255 + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()
