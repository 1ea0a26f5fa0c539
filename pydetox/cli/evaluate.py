"""`pydetox eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import exit_codes, options

if TYPE_CHECKING:
    from ..scanning.targets import Target


@click.command("eval")
@click.argument("checkpoints", nargs=-1, required=True, metavar="TARGET...")
@options.data_options
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
@options.table_format_option
@options.output_option
def command(
    checkpoints: tuple[str, ...],
    trigger: Path | None,
    target: str | None,
    format_: str,
    output: Path | None,
    **given: Any,
) -> int:
    """Measure clean accuracy (CA) and, with a trigger, its attack success rate (ASR).

    The images need labels, and so do the texts of text models (--texts). ASR is the share of images
    of the other classes that the trigger sends to the target class. Both come with a 95% Wilson
    interval.

    A target is a checkpoint, a folder, a glob or a list of them, as in `scan`: the `logs/` of a
    training means all its epochs. Of several checkpoints, one that cannot be read does not keep the
    others from being measured.

    Exit code: 0 if all was measured, 2 otherwise. The command does not judge the model; see `scan`.
    """
    from ..errors import UsageError
    from ..evaluation import evaluate
    from ..models.open_clip_model import HeadMemo
    from ..reporting.documents import evaluation_document, evaluation_row
    from ..text.causal.evaluation import CausalEvaluation
    from .causal_commands import in_words
    from .inputs import Inputs, read_triggers, require_class_names, require_labels
    from .many import emit_all, expand, run_each
    from .outputs import check_files
    from .summaries import card
    from .text_commands import TextInputs, evaluation_of_text
    from .texts import is_text_target, needs_images, say_unused, take_text_options

    taken = take_text_options(given)
    if target is not None and trigger is None:
        raise UsageError("--target needs --trigger, the trigger that leads to this class")
    targets = expand(checkpoints)
    inputs = None if given["images"] is None else Inputs.of(given)
    text_inputs = None if taken["texts"] is None else TextInputs(given, taken["texts"])
    check_files(output=output)
    if inputs is not None and text_inputs is not None:
        kinds = [is_text_target(one, given["offline"]) for one in targets]
        say_unused(taken["texts"], given["images"], kinds)
    if target is not None and inputs is not None and text_inputs is None:
        inputs.require_class(target)
    heads, table, cards = HeadMemo(), list[dict[str, Any]](), list[dict[str, str]]()

    def measure(one: Target) -> dict[str, Any]:
        if text_inputs is not None and is_text_target(one, given["offline"]):
            document, found = evaluation_of_text(
                one,
                text_inputs,
                texts=taken["texts"],
                trigger=trigger,
                target_name=target,
                seed=given["seed"],
            )
            if isinstance(found, CausalEvaluation):
                cards.append(card(document["name"], in_words(found)))
            else:
                table.append(evaluation_row(found, document["name"]))
            return document
        if inputs is None:
            raise needs_images(one.reference, given["offline"])
        model = inputs.read_suspect(one.reference)
        model.heads = heads
        images = inputs.read_images(model)
        require_labels(images)
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
        table.append(evaluation_row(result, model.name))
        return {
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

    documents, code = run_each(targets, measure, "pydetox.eval/1")
    emit_all(
        documents,
        [_row(one) for one in documents],
        {"title": "pydetox eval", "summary": cards, "evaluation": table},
        code=code,
        schema="pydetox.evals/1",
        format_=format_,
        output=output,
    )
    return code


def _row(document: dict[str, Any]) -> dict[str, Any]:
    """Return the line of a checkpoint in a table."""
    low, high = document.get("clean_accuracy_ci") or (None, None)
    asr_low, asr_high = document.get("attack_success_rate_ci") or (None, None)
    return {
        "name": document["name"],
        "sha256": document.get("sha256"),
        "clean_accuracy": document.get("clean_accuracy"),
        "clean_accuracy_low": low,
        "clean_accuracy_high": high,
        "n_clean": document.get("n_clean"),
        "target": document.get("target_name"),
        "attack_success_rate": document.get("attack_success_rate"),
        "attack_success_rate_low": asr_low,
        "attack_success_rate_high": asr_high,
        "n_attack": document.get("n_attack"),
        "perplexity": document.get("perplexity"),
        "error": document.get("error"),
    }
