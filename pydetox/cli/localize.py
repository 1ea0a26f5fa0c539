"""`pydetox localize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import exit_codes, options

if TYPE_CHECKING:
    from collections.abc import Mapping


@click.command("localize")
@click.argument("checkpoint")
@options.image_options
@click.option(
    "--trigger",
    type=options.FILE,
    metavar="FILE",
    help="The trigger: a file as `invert` writes. Without it, triggers into --target are recovered"
    " first.",
)
@click.option("--target", metavar="NAME", help="The class that the trigger leads to.")
@click.option(
    "--base",
    metavar="REF",
    help="The clean model that the checkpoint was fine-tuned from. It adds overlaps and ξ.",
)
@options.base_model
@click.option(
    "--vector",
    type=click.Choice(["forget", "paired", "strengthen"]),
    default="forget",
    help="How the trigger vector is made, see `unlearn`.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(min=0),
    metavar="X",
    help="The coefficient of the vector. Without it, it is chosen as in `unlearn`.",
)
@click.option(
    "--grid",
    type=click.IntRange(min=2),
    default=9,
    metavar="N",
    help="With --base: the number of coefficients from -2 to 2 in each direction of the map of ξ.",
)
@options.search_options
@options.model_options
@options.machine_options
@options.format_option
@options.report_option
def command(
    checkpoint: str,
    trigger: Path | None,
    target: str | None,
    alpha: float | None,
    grid: int,
    format_: str,
    report: Path | None,
    **given: Any,
) -> int:
    """Show where in the weights a backdoor sits.

    The command makes a trigger vector. It reports the energy of the vector by layer and by kind of
    module, the effective rank of its matrices, and the clean accuracy (CA) and attack success (ASR)
    after subtracting it in one layer alone. With --base, it also reports the overlap with the whole
    fine-tuning, and the disentanglement error ξ over a grid of coefficients.

    Exit code: 0 if all was computed, 2 otherwise. The command does not judge the model; see `scan`.
    """
    from ..analysis.localization import localize, removals
    from ..api import recover_triggers
    from ..atomic import write_file
    from ..detect.configuration import ScanConfig
    from ..errors import UsageError
    from ..repair.alpha import search_coefficient
    from ..repair.configuration import UnlearnConfig
    from ..repair.retention import DriftProbe
    from ..repair.task_vectors import TaskVector
    from ..repair.trigger_vector import trigger_vector
    from ..reporting.documents import localization_document
    from ..reporting.localization import localization_report
    from .inputs import (
        Inputs,
        class_index,
        inversion_config,
        read_triggers,
        require_class_names,
    )
    from .many import one_checkpoint
    from .outputs import check_files, emit

    base: str | None = given["base"]
    if trigger is None and target is None:
        raise UsageError("give --trigger, --target, or both")
    inputs = Inputs.of(given)
    check_files(report=report)
    if target is not None:
        inputs.require_class(target)
    model = inputs.read_suspect(one_checkpoint(checkpoint))
    images = inputs.read_images(model)
    names = require_class_names(images)
    if images.labels is None:
        raise UsageError(f"{images.name}: no labels; localize measures accuracy and needs them")
    head = model.zero_shot_head(names, inputs.prompts)
    if trigger is not None:
        index, stamps = read_triggers(trigger, target, images)
    else:
        index = class_index(str(target), names, images.source)
        search = ScanConfig(inversion=inversion_config(given), seed=given["seed"])
        found = recover_triggers(model, images, index, templates=inputs.prompts, config=search)
        order = [int(k) for k in found.p_l1.argsort()]
        stamps = [found.trigger(k) for k in order]
    unlearning = UnlearnConfig(vector=given["vector"], seed=given["seed"])
    share = unlearning.advanced.forget_share
    forget, held = images.split((share, 1 - share), seed=given["seed"])
    vector = trigger_vector(model, forget.images, stamps, head, index, unlearning)
    if alpha is None:
        probe = DriftProbe(model, images.images, seed=given["seed"])
        alpha = search_coefficient(
            model, vector, images, stamps, head, index, unlearning, probe=probe
        ).coefficient
    assert held.labels is not None
    removed = removals(model, vector, alpha, held.images, held.labels, stamps[0], index, head)
    whole, xi = None, None
    if base is not None:
        start = inputs.read_other(base)
        whole = TaskVector.between(start.clip.state_dict(), model.clip.state_dict())
        xi = _disentanglement(start, whole, vector * alpha, held.images, stamps[0], head, grid)
    located = localize(vector, whole=whole, removed=removed, disentanglement=xi)
    document = {
        "schema": "pydetox.localize/1",
        "exit_code": exit_codes.CLEAN,
        "name": model.name,
        "sha256": model.sha256,
        "target": names[index],
        "alpha": alpha,
        "vector": given["vector"],
        "seed": given["seed"],
        **inputs.used(model),
        "localization": localization_document(located),
    }
    if report is not None:
        sources = {"sha256": model.sha256, "seed": given["seed"], "base": base or "not given"}
        write_file(report, localization_report({**document, "provenance": sources}))
    emit(document, _text(document), format_)
    return exit_codes.CLEAN


def _disentanglement(
    start: Any, whole: Any, trigger: Any, clean: Any, stamp: Any, head: Any, grid: int
) -> Any:
    """Return ξ between what fine-tuning did besides the backdoor, and the backdoor."""
    from ..analysis.localization import disentanglement_error

    points = [round(-2 + 4 * k / (grid - 1), 6) for k in range(grid)]
    return disentanglement_error(
        start,
        whole - trigger,
        trigger,
        clean,
        stamp(clean),
        head,
        first_coefficients=points,
        second_coefficients=points,
    )


def _text(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report for the terminal."""
    from ..reporting.values import number, percent

    found = document["localization"]
    summary = [
        {"label": "target class, α", "value": f"{document['target']}, {document['alpha']:g}"}
    ]
    if found["overlap"] is not None:
        summary.append({"label": "overlap with the fine-tuning", "value": number(found["overlap"])})
    if found["disentanglement"] is not None:
        mean = number(found["disentanglement"]["mean"])
        summary.append({"label": "ξ, mean over [0, 1]²", "value": mean})
    for kind in ("layers", "modules"):
        for one in found[kind]:
            value = f"{percent(one['energy'])} of the energy, density {number(one['density'])}"
            if one["overlap"] is not None:
                value += f", overlap {number(one['overlap'])}"
            summary.append({"label": one["group"], "value": value})
    rows = [
        {
            "name": f"removed in {one['layer']}",
            "ca": one["clean_accuracy"],
            "asr": one["attack_success_rate"],
        }
        for one in found["removals"]
    ]
    return {
        "title": "pydetox localize",
        "subtitle": document["name"],
        "summary": summary,
        "evaluation": rows,
    }
