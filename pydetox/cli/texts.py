"""Text models on the command line: which targets are some, and what options mean for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..checkpoints.identity import identify_checkpoint
from ..data.names import load_class_names
from ..errors import CheckpointError, PydetoxError, UsageError
from ..scanning.targets import Target, find_targets
from ..scanning.texts import TextScannerConfig
from ..text.configuration import TextScanConfig
from ..text.files import is_text_model, require_text_model
from .group import print_warning

#: Options that mean nothing for text models.
_OF_IMAGES = {
    "model": "--model",
    "base_model": "--base-model",
    "max_images": "--max-images",
    "resize": "--resize",
    "strict": "--strict",
    "calibration_file": "--calibration",
    "save_calibration": "--save-calibration",
    "known_vectors": "--known-vector",
    "before": "--before",
    "objective": "--objective",
    "families": "--families",
    "inversion": "--inversion",
    "positive_control": "--positive-control",
    "keep_all": "--keep-all",
    "templates": "--templates",
    "reference_learning_rate": "--reference-learning-rate",
    "reference_epochs": "--reference-epochs",
    "weights_key": "--weights-key",
    "engine": "--engine",
    "workers": "--workers",
    "timeout": "--timeout",
    "max_size": "--max-size",
    "max_memory": "--max-memory",
}

#: What --quick and --thorough stand for in a search for words.
_PRESETS: dict[str | None, dict[str, Any]] = {
    "quick": {"steps": 15, "texts": 48},
    "thorough": {"steps": 60, "restarts": 2, "texts": 192},
}


def take_text_options(given: dict[str, Any]) -> dict[str, Any]:
    """Take the options of `options.text_options` out of the others.

    Raises click.UsageError if there are neither images nor texts.
    """
    names = ("texts", "place", "trigger_length", "max_texts")
    taken = {name: given.pop(name) for name in names if name in given}
    if taken["texts"] is None:
        ctx = click.get_current_context()
        for name in names[1:]:
            if name in taken and was_given(name):
                option = f"--{name.replace('_', '-')}"
                raise click.UsageError(f"{option} is for text models and needs --texts", ctx)
    taken["preset"] = next((one for one in ("quick", "thorough") if given.get(one)), None)
    if given["images"] is None and taken["texts"] is None:
        raise click.UsageError(
            "Missing option '--images' (or '--texts', for text models).",
            click.get_current_context(),
        )
    return taken


def sort_targets(
    checkpoints: Sequence[str],
    texts: str | None,
    images: str | None,
    *,
    shard: tuple[int, int] | None = None,
    offline: bool = False,
) -> tuple[list[str], list[Target], list[tuple[str, str]]]:
    """Return the targets that need images, the text models, and what was passed over.

    Without texts, all targets are as they were given. Raises UsageError for a target that needs
    images where there are none.
    """
    if texts is None:
        return list(checkpoints), [], []
    found = find_targets(checkpoints, shard=shard)
    text = [
        one
        for one in found.targets
        if is_text_target(one, offline) or (images is None and not _is_there(one, offline))
    ]
    others = [one for one in found.targets if one not in text]
    if others and images is None:
        raise needs_images(others[0].reference, offline)
    return [one.reference for one in others], text, found.ignored


def needs_images(reference: str, offline: bool) -> PydetoxError:
    """Return the error of a target that is no text model, where there are texts alone."""
    try:
        identify_checkpoint(reference, offline=offline)
    except CheckpointError as error:
        return error
    try:
        require_text_model(reference, offline=offline)
        reason = "is no text model"
    except PydetoxError as error:
        reason = str(error)
    told = reason if reference in reason else f"{reference}: {reason}"
    return UsageError(f"{told}; models of images need --images")


def _is_there(target: Target, offline: bool) -> bool:
    """Return whether a target can be found; the scan of one that cannot says why."""
    try:
        identify_checkpoint(target.reference, offline=offline)
    except (CheckpointError, OSError):
        return False
    return target.problem is None


def was_given(option: str) -> bool:
    """Return whether an option has a value that somebody gave."""
    source = click.get_current_context().get_parameter_source(option)
    return source not in (None, ParameterSource.DEFAULT)


def say_unused(texts: str | None, images: str | None, is_text: Sequence[bool]) -> None:
    """Say on stderr that no target needs the texts, or the images, where both were given.

    is_text: For each target, whether it is a text model.
    """
    if texts is None or images is None or len(set(is_text)) != 1:
        return
    unused, kind = ("--images", "image models") if is_text[0] else ("--texts", "text models")
    print_warning(f"{unused} is not used: it is for {kind}, and no target is one")


def refuse_image_options() -> None:
    """Raise UsageError for an option that a scan of nothing but text models would not heed."""
    for option, name in _OF_IMAGES.items():
        if was_given(option):
            raise UsageError(f"{name} is for image models, and all targets are text models")


def is_text_target(target: Target, offline: bool) -> bool:
    """Return whether a target is a text model."""
    return target.problem is None and is_text_model(target.reference, offline=offline)


def text_scanner_config(
    given: dict[str, Any], taken: dict[str, Any], *, alone: bool
) -> TextScannerConfig:
    """Return the configuration of a scan of text models.

    given: The other options. The base and the reference models that are text models count.
    alone: Whether all targets are text models, so that a base can be for no other.
    """
    offline = given["offline"]

    def is_text(name: str | None) -> bool:
        return name is not None and is_text_model(name, offline=offline)

    base = given["base"]
    if alone:
        for name in (*([] if base is None else [base]), *given["reference_models"]):
            require_text_model(name, offline=offline)
    references = tuple(name for name in given["reference_models"] if is_text(name))
    names = given["class_names"]
    return TextScannerConfig(
        texts=str(taken["texts"]),
        class_names=None if names is None else load_class_names(Path(names)),
        base=base if is_text(base) else None,
        reference_models=references,
        scan=text_scan_config(given, taken),
        device=given["device"],
        threads=given["threads"],
        offline=offline,
        retry_errors=given.get("retry_errors", False),
    )


def text_scan_config(given: dict[str, Any], taken: dict[str, Any]) -> TextScanConfig:
    """Return the search; options whose default is for images count where they were given."""
    config = TextScanConfig(
        **_PRESETS.get(taken["preset"], {}),
        length=taken["trigger_length"],
        place=taken["place"],
        references=given.get("references", TextScanConfig.references),
        seed=given["seed"],
    )
    for option in ("steps", "batch_size", "restarts"):
        if was_given(option):
            config = replace(config, **{option: given[option]})
    if taken["max_texts"] is not None:
        config = replace(config, texts=taken["max_texts"])
    return config
