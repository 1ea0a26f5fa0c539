"""`pydetox eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import exit_codes, options


@click.command("eval")
@click.argument("checkpoint")
@options.image_options
@click.option(
    "--trigger",
    type=options.FILE,
    metavar="FILE",
    help="A trigger whose success is measured: a file as `invert` writes. If it holds several "
    "triggers into the target class, the smallest counts.",
)
@click.option(
    "--target",
    metavar="NAME",
    help="The class that the trigger leads to, if the file does not name one class.",
)
@options.seed
@options.model_options
@options.machine_options
@options.format_option
def command(
    checkpoint: str, trigger: Path | None, target: str | None, format_: str, **given: Any
) -> int:
    """Measure clean accuracy (CA) and, with a trigger, its attack success rate (ASR).

    The images need labels. ASR is the share of images of the other classes that the trigger sends
    to the target class. Both come with a 95% Wilson interval.

    Exit code: 0 if all was measured, 2 otherwise. The command does not judge the model; see `scan`.
    """
    from ..errors import UsageError
    from ..evaluation import evaluate
    from ..reporting.documents import evaluation_document, evaluation_row
    from .inputs import Inputs, read_triggers, require_class_names
    from .outputs import emit

    if target is not None and trigger is None:
        raise UsageError("--target needs --trigger, the trigger that leads to this class")
    inputs = Inputs.of(given)
    if target is not None:
        inputs.require_class(target)
    model = inputs.read_suspect(checkpoint)
    images = inputs.read_images(model)
    names = require_class_names(images)
    index, stamp = None, None
    if trigger is not None:
        index, stamps = read_triggers(trigger, target, images)
        stamp = stamps[0]
    result = evaluate(
        model,
        images,
        model.zero_shot_head(names, inputs.prompts),
        trigger=stamp,
        target=index,
        description=f"evaluation of {model.name}",
    )
    document = {
        "schema": "pydetox.eval/1",
        "exit_code": exit_codes.CLEAN,
        "name": model.name,
        "sha256": model.sha256,
        "images": given["images"],
        "trigger": trigger,
        "target_name": None if index is None else names[index],
        "class_names": names,
        **inputs.used(model),
        **evaluation_document(result),
    }
    text = {"title": "pydetox eval", "evaluation": [evaluation_row(result, model.name)]}
    emit(document, text, format_)
    return exit_codes.CLEAN
