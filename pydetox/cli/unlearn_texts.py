"""`unlearn` for a text model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from ..atomic import rehearse_directory
from ..data.names import load_class_names
from ..errors import UsageError
from ..models.device import find_device
from ..repair.configuration import UnlearnConfig
from ..reporting import write_detox_report
from ..reporting.text_documents import text_detox_document, word_scan_row
from ..text.causal.detox import CausalDetoxResult, detox_causal_model
from ..text.causal.repair import CAUSAL_UNLEARNING
from ..text.detox import TextDetoxResult, detox_text_model
from ..text.kinds import texts_for
from ..text.models import TextModel, load_text_model
from ..text.repair import TEXT_UNLEARNING
from ..text.saving import TEXT_MODEL_FILES
from ..text.towers.detox import detox_text_tower
from ..text.towers.repair import TOWER_UNLEARNING
from ..text.trigger_file import read_words
from ..text.triggers import TokenTrigger
from . import exit_codes, options
from .causal_commands import in_words, known_words
from .outputs import check_files, check_replaced, emit
from .summaries import card, left_of_triggers
from .texts import text_scan_config
from .wording import in_options

# Options of `unlearn` and the values of `UnlearnConfig` that they stand for; the defaults of some
# are for images, so they count where they were given.
_OPTIONS = {
    "vector": "vector",
    "vector_steps": "steps",
    "vector_learning_rate": "learning_rate",
    "passes": "passes",
    "min_accuracy_kept": "min_accuracy_kept",
    "max_drift": "max_drift",
    "toward_base": "toward_base",
}


def unlearn_text_model(
    checkpoint: str,
    output: Path,
    given: Mapping[str, Any],
    taken: Mapping[str, Any],
    *,
    overwrite: bool,
    trigger: Path | None,
    target: str | None,
    force_target: str | None,
    max_rounds: int,
    format_: str,
    report: Path | None,
) -> int:
    """Run the command on a text model and return its exit code; the arguments are its options."""
    references, base = given["reference_models"], given["base"]
    if options.lora_rank_of(dict(given)) is not None:
        raise UsageError(
            "--output-format lora is for image models; a text model is written as a whole"
        )
    if given.get("calibration") is not None:
        raise UsageError("--calibration is for image models; give --base or --reference-model")
    if trigger is None and force_target is None and base is None and not references:
        raise UsageError(
            "no verdict is possible without --base or --reference-model; give one of them, or "
            "--trigger or --force-target to unlearn without a verdict"
        )
    config = text_scan_config(dict(given), dict(taken))
    check_replaced(output)
    rehearse_directory(output, overwrite=overwrite, replaceable=TEXT_MODEL_FILES)
    check_files(report=report)
    if given["threads"] is not None:
        torch.set_num_threads(given["threads"])
    find_device(given["device"])
    start = time.perf_counter()

    def read(name: str) -> TextModel:
        return load_text_model(name, device=given["device"], offline=given["offline"])

    model = read(checkpoint)
    names = given["class_names"]
    known = None if names is None else load_class_names(Path(names))
    texts = texts_for(model, taken["texts"], known)
    wanted = force_target
    stamps: tuple[TokenTrigger, ...] = ()
    if model.kind == "causal":
        if force_target is not None:
            raise UsageError(
                "--force-target is for models with classes; give --trigger and --target, the words "
                "and the text that they bring"
            )
        stamps, wanted = known_words(trigger, target)
    elif trigger is not None:
        file = read_words(trigger)
        chosen = file.select(target)
        wanted = target or file.targets[chosen[0]]
        if wanted is None:
            raise UsageError(f"{trigger}: names no class; give --target")
        stamps = tuple(file.triggers[k] for k in chosen)
    if model.kind == "classifier" and wanted is not None and wanted not in model.class_names:
        raise UsageError(
            f"class {wanted!r} is not one of {model.name}'s: {', '.join(model.class_names)}"
        )
    base_model = None if base is None else read(base)
    others = [read(name) for name in references] or None
    seconds = {"read": time.perf_counter() - start}
    result: TextDetoxResult
    if model.kind == "causal":
        result = detox_causal_model(
            model,
            texts,
            base=base_model,
            references=others,
            config=config,
            unlearning=_unlearning(given, CAUSAL_UNLEARNING),
            targets=() if wanted is None else (wanted,),
            triggers=stamps,
            max_rounds=max_rounds,
            output=output,
            overwrite=overwrite,
        )
    elif model.kind == "tower":
        if trigger is not None or force_target is not None:
            raise UsageError(
                "--trigger and --force-target are for models with classes; the trigger of a text "
                "tower is recovered"
            )
        result, _ = detox_text_tower(
            model,
            texts,
            base=base_model,
            references=others,
            config=config,
            unlearning=_unlearning(given, TOWER_UNLEARNING),
            max_rounds=max_rounds,
            output=output,
            overwrite=overwrite,
        )
    else:
        result = detox_text_model(
            model,
            texts,
            base=base_model,
            references=others,
            config=config,
            unlearning=_unlearning(given, TEXT_UNLEARNING),
            target=None if wanted is None else model.class_names.index(wanted),
            triggers=stamps,
            max_rounds=max_rounds,
            output=output,
            overwrite=overwrite,
        )
    last = result.before if result.after is None else result.after
    code = exit_codes.of_verdict(last.verdict.value)
    document = {
        "schema": "pydetox.unlearn/1",
        "exit_code": code,
        "kind": "text",
        "name": result.before.name,
        "sha256": result.before.sha256,
        "seed": config.seed,
        "texts": taken["texts"],
        **text_detox_document(result),
    }
    document["seconds"] = {**seconds, **result.seconds}
    shown = [(result.before, "before")]
    shown += [] if result.after is None else [(result.after, "after")]
    lines = {}
    if isinstance(result, CausalDetoxResult):
        lines = {
            when: in_words(one)
            for when, one in (
                ("before", result.perplexity_before),
                ("after", result.perplexity_after),
            )
            if one is not None
        }
    text = _report(document, lines)
    if report is not None:
        rows = [
            word_scan_row(scan, f"{scan.name}, {when}", config)
            for scan, when in shown
            if all(scan.search.found)
        ]
        write_detox_report(report, {**text, "word_scans": rows})
    emit(document, text, format_)
    return code


def _unlearning(given: Mapping[str, Any], usual: UnlearnConfig) -> UnlearnConfig:
    ctx = click.get_current_context()
    changes = {
        name: given[option]
        for option, name in _OPTIONS.items()
        if ctx.get_parameter_source(option) not in (None, ParameterSource.DEFAULT)
    }
    return replace(usual, seed=given["seed"], **changes)


def _report(document: Mapping[str, Any], lines: Mapping[str, str]) -> dict[str, Any]:
    """Return the report of a repair. lines: Perplexities of a causal model, by when."""
    scans = document["scans"]
    summary = [
        card(
            f"{document['name']}, {when}",
            f"{one['verdict']}: {in_options(one['reason'])}",
            one["verdict"],
        )
        for one, when in zip(scans, ("before", "after"), strict=False)
    ]
    for place, one in enumerate(document["rounds"], start=1):
        words = ", ".join(repr(row["text"]) for row in one["words"]) or "known words"
        classes = "class" if len(one["target_names"]) == 1 else "classes"
        reached = "" if one["limits_reached"] else "; no α keeps all limits"
        if one["alpha"] == 0:
            reached += "; nothing subtracted"
        summary.append(
            card(
                f"trigger vector {place}",
                f"target {classes} {', '.join(one['target_names'])}, {words}, "
                f"α = {one['alpha']:g}{reached}",
                "" if one["limits_reached"] else "suspicious",
            )
        )
    summary += [card(f"{document['name']}, {when}", line) for when, line in lines.items()]
    summary += left_of_triggers(document)
    path = document["path"]
    summary.append(card("repaired checkpoint", path or "not written: nothing was subtracted"))
    rounds = document["rounds"]
    return {
        "title": "pydetox unlearn",
        "subtitle": document["name"],
        "summary": summary,
        "scans": [
            {"name": f"{document['name']}, {when}", **one}
            for one, when in zip(
                [{k: v for k, v in scan.items() if k != "name"} for scan in scans],
                ("before", "after"),
                strict=False,
            )
        ],
        "alpha_search": rounds[0]["alpha_search"] if rounds else None,
        "evaluation": document["evaluation"],
        "seconds": document["seconds"],
    }
