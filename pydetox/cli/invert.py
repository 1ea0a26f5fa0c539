"""`pydetox invert`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import exit_codes, options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..data import ImageSet
    from ..inversion import InversionConfig, InversionResult
    from ..inversion.trigger_file import TriggerFile
    from ..models import OpenClipModel
    from ..scanning.targets import Target
    from .inputs import Inputs

_TRIGGERS_NAME = "triggers.safetensors"
_WORDS_NAME = "triggers.json"
_PICTURE_NAME = re.compile(r"\d{4,}(_[a-z0-9-]+)?_(mask|pattern|stamped)\.png")


@click.command("invert")
@click.argument("checkpoints", nargs=-1, required=True, metavar="TARGET...")
@options.data_options
@options.text_options
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME",
    show_default=False,
    help="A class to search a trigger for; can be given several times. Without it, all classes.",
)
@click.option(
    "--output",
    type=options.FILE,
    required=True,
    metavar="DIR",
    help="The folder for the triggers and their pictures; of several checkpoints, each gets a "
    "folder in it.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    show_default=False,
    help="Replace this folder if it holds only files that this command writes.",
)
@options.objective
@options.search_options
@options.restarts("per class")
@options.model_options
@options.machine_options
@options.table_format_option
def command(
    checkpoints: tuple[str, ...],
    targets: tuple[str, ...],
    output: Path,
    overwrite: bool,
    restarts: int,
    format_: str,
    **given: Any,
) -> int:
    """Reconstruct triggers and write them to a folder.

    The folder gets the file triggers.safetensors, with the tensors `mask` [K, H, W], `pattern`
    [K, 3, H, W] and `p_l1` [K], and with the target classes in its metadata. It also gets pictures
    of each trigger: its mask, its pattern, and a stamped image. `unlearn` and `eval` take the file
    as --trigger.

    P-L1 is the share of the image that a trigger covers: the sum of its mask over the number of
    pixels. Every class of every model has some trigger, so this command gives no verdict. See
    `scan`.

    Targets are checkpoints, folders, globs or lists, as in `scan`. Of a text model (--texts), the
    folder gets the file triggers.json with the words of each class and length, for `eval`.

    Exit code: 0 if at least one search of each checkpoint found a working trigger, 2 otherwise.
    """
    from ..atomic import atomic_directory, rehearse_directory
    from ..errors import UsageError
    from ..inversion import InversionConfig
    from ..reporting.pictures import example_image
    from ..reporting.result import P_L1_NOTE
    from .inputs import Inputs
    from .many import emit_all, expand, run_each
    from .outputs import check_replaced
    from .summaries import card
    from .text_commands import TextInputs, words_of_text
    from .texts import (
        is_text_target,
        needs_images,
        say_unused,
        take_text_options,
        text_scan_config,
    )

    taken = take_text_options(given)
    if given["images"] is not None and not targets:
        options.choose_objective(given)
    objective = given["objective"]
    if objective == "label-free" and targets:
        raise UsageError("--target and --objective label-free exclude each other")
    found_targets = expand(checkpoints)
    inputs = None if given["images"] is None else Inputs.of(given)
    text_inputs = None if taken["texts"] is None else TextInputs(given, taken["texts"])
    folders = _folders(output, found_targets)
    for folder in folders.values():
        check_replaced(folder)
        rehearse_directory(folder, overwrite=overwrite, replaceable=_own_names(folder))
    if inputs is not None and text_inputs is not None:
        kinds = [is_text_target(one, given["offline"]) for one in found_targets]
        say_unused(taken["texts"], given["images"], kinds)
    if inputs is not None and text_inputs is None:
        for target in targets:
            inputs.require_class(target)
    search = InversionConfig(
        steps=given["steps"],
        batch_size=given["batch_size"],
        precision=given["precision"],
        seed=given["seed"],
    )

    def reconstruct(one: Target) -> dict[str, Any]:
        if text_inputs is not None and is_text_target(one, given["offline"]):
            return words_of_text(
                one,
                text_inputs,
                text_scan_config({**given, "restarts": restarts}, taken),
                classes=targets,
                folder=folders[one.name],
                overwrite=overwrite,
            )
        if inputs is None:
            raise needs_images(one.reference, given["offline"])
        model = inputs.read_suspect(one.reference)
        images = inputs.read_images(model)
        found, names = _invert(model, images, inputs, objective, targets, restarts, search)
        extra = {
            "checkpoint": model.name,
            "sha256": model.sha256,
            "objective": objective,
            "steps": search.steps,
            "seed": search.seed,
        }
        triggers = _best_of(found, names, restarts, extra)
        place = folders[one.name]
        with atomic_directory(place, overwrite=overwrite, replaceable=_own_names(place)) as folder:
            (folder / _TRIGGERS_NAME).write_bytes(triggers.to_bytes())
            _write_pictures(folder, triggers, example_image(images, search.seed))

        assert triggers.success is not None
        rows = [
            {"target": name, "p_l1": size, "success": success, "steps": steps}
            for name, size, success, steps in zip(
                triggers.targets,
                triggers.p_l1.tolist(),
                triggers.success.tolist(),
                triggers.extra["trigger_steps"],
                strict=True,
            )
        ]
        works = bool(triggers.p_l1.isfinite().any())
        return {
            "schema": "pydetox.invert/1",
            "exit_code": exit_codes.CLEAN if works else exit_codes.ERROR,
            "name": model.name,
            "sha256": model.sha256,
            "seed": search.seed,
            "objective": objective,
            "triggers": rows,
            "path": place / _TRIGGERS_NAME,
            **inputs.used(model),
            "seconds": found.seconds,
        }

    documents, code = run_each(found_targets, reconstruct, "pydetox.invert/1")
    several = len(documents) > 1
    summary = [
        card(
            f"{one['name']}: {row['target'] or 'any class'}"
            if several
            else row["target"] or "any class",
            _in_words(row),
        )
        for one in documents
        for row in one.get("triggers", ())
    ]
    text = {
        "title": "pydetox invert",
        "subtitle": f"{len(documents)} checkpoints" if several else documents[0]["name"],
        "summary": [
            *summary,
            card("written to", str(output)),
            *([] if inputs is None else [card("P-L1", P_L1_NOTE.removeprefix("P-L1: "))]),
        ],
    }
    emit_all(
        documents,
        [row for one in documents for row in _table_rows(one)],
        text,
        code=code,
        schema="pydetox.inverts/1",
        format_=format_,
        output=None,
    )
    return code


def _folders(output: Path, targets: Sequence[Target]) -> dict[str, Path]:
    """Return the folder for the triggers of each checkpoint, by name."""
    if len(targets) == 1:
        return {targets[0].name: output}
    found: dict[str, Path] = {}
    for number, target in enumerate(targets):
        # A name may be anything: only its harmless characters go into that of a folder.
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", target.name).strip("-.")[-80:]
        found[target.name] = output / f"{number:04d}-{slug}"
    return found


def _table_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of a checkpoint in a table: one per trigger, or one for an error."""
    nothing = {"target": None, "p_l1": None, "success": None, "steps": None}
    if document.get("kind") == "text":
        nothing |= {"text": None, "loss": None}
    beside = {key: document.get(key) for key in ("name", "sha256")}
    after = {"path": document.get("path"), "error": document.get("error")}
    return [
        {**beside, **{k: row.get(k) for k in nothing}, **after}
        for row in document.get("triggers") or [nothing]
    ]


def _invert(
    model: OpenClipModel,
    images: ImageSet,
    inputs: Inputs,
    objective: str,
    targets: tuple[str, ...],
    restarts: int,
    search: InversionConfig,
) -> tuple[InversionResult, list[str | None]]:
    """Return `restarts` triggers per class, and the names of the classes."""
    from ..inversion import DirectionObjective, TargetObjective, invert
    from ..prototypes import image_features
    from .inputs import class_index, require_class_names

    if objective == "label-free":
        found = invert(
            model,
            images.images,
            DirectionObjective(image_features(model, images.images), model.logit_scale),
            search,
            restarts=restarts,
            labels=images.labels,
        )
        return found, [None]
    known = require_class_names(images)
    chosen = [class_index(t, known, images.source) for t in targets] or list(range(len(known)))
    head = model.zero_shot_head(known, inputs.prompts)
    wanted = [index for index in chosen for _ in range(restarts)]
    goal = TargetObjective(head, wanted, model.logit_scale)
    return invert(model, images.images, goal, search, labels=images.labels), [
        known[index] for index in chosen
    ]


def _best_of(
    found: InversionResult, names: list[str | None], restarts: int, extra: dict[str, Any]
) -> TriggerFile:
    """Keep the smallest trigger of each class."""
    import torch

    from ..inversion.trigger_file import TriggerFile

    best = found.p_l1.view(-1, restarts).argmin(dim=1)
    index = best + restarts * torch.arange(len(best))
    return TriggerFile(
        masks=found.masks.cpu()[index],
        patterns=found.patterns.cpu()[index],
        targets=tuple(names),
        p_l1=found.p_l1[index],
        success=found.success[index],
        extra={**extra, "trigger_steps": found.trigger_steps[index].tolist()},
    )


def _in_words(row: dict[str, Any]) -> str:
    from ..reporting.values import finite, number, percent

    if "text" in row:
        return f"{row['text']!r}, success {percent(row['success'])}, loss {number(row['loss'])}"
    if finite(row["p_l1"]) is None:
        return "no working trigger found"
    return f"P-L1 {number(row['p_l1'])}, success {percent(row['success'])}"


def _write_pictures(folder: Path, triggers: TriggerFile, example: Tensor) -> None:
    from ..reporting.pictures import png, trigger_pictures

    for index, target in enumerate(triggers.targets):
        # A class name may be anything: only its harmless characters go into a file name.
        slug = re.sub(r"[^a-z0-9]+", "-", (target or "").lower()).strip("-")[:40]
        stem = f"{index:04d}_{slug}" if slug else f"{index:04d}"
        for kind, image in trigger_pictures(triggers.trigger(index), example).items():
            (folder / f"{stem}_{kind}.png").write_bytes(png(image))


def _own_names(folder: Path) -> set[str]:
    """Return the names in a folder that this command can have written."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return set()  # not there, or unusable: `rehearse_directory` says so
    own = {_TRIGGERS_NAME, _WORDS_NAME}
    return {name for name in names if name in own or _PICTURE_NAME.fullmatch(name)}
