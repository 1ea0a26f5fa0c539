"""`pydetox unlearn`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import exit_codes, options

if TYPE_CHECKING:
    from ..data import ImageSet
    from ..detect.references import ReferencePlan
    from ..repair.configuration import UnlearnConfig
    from ..repair.result import DetoxResult
    from ..session import Session


# Work of fewer seconds is not announced.
_SHORT = 20.0


@click.command("unlearn")
@click.argument("checkpoint")
@options.data_options
@options.text_options
@click.option(
    "--output",
    type=options.FILE,
    required=True,
    metavar="DIR",
    help="The folder for the repaired checkpoint.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    show_default=False,
    help="Replace this folder if it holds nothing but a checkpoint.",
)
@options.output_format_options
@options.calibration_options
@click.option(
    "--trigger",
    type=options.FILE,
    metavar="FILE",
    help="A known trigger to unlearn, whatever the verdict is: a file as `invert` writes.",
)
@click.option(
    "--target",
    metavar="NAME",
    help="With --trigger: the class that it leads to, if the file does not name one class.",
)
@click.option(
    "--force-target",
    metavar="NAME",
    help="A class to recover and unlearn triggers for, whatever the verdict is.",
)
@click.option(
    "--vector",
    type=click.Choice(["forget", "paired", "strengthen"]),
    default="forget",
    help="How the trigger vector is made. `strengthen` is the paper's method, `paired` also holds "
    "clean images, and `forget` trains the trigger away and costs the least accuracy.",
)
@click.option(
    "--vector-steps",
    type=options.COUNT,
    default=160,
    metavar="N",
    help="The number of steps of the fine-tuning that makes the trigger vector.",
)
@click.option(
    "--vector-learning-rate",
    callback=options.rate_or_auto,
    default="auto",
    metavar="X|auto",
    help="The learning rate of this fine-tuning. auto takes one for each layer, relative to the "
    "size and the width of its weights.",
)
@click.option(
    "--retention",
    type=click.FloatRange(min=0),
    default=1.0,
    metavar="X",
    help="The weight of holding the model's own image features, which keeps what it knows beyond "
    "the named classes. 0 holds only the predictions of the named classes.",
)
@click.option(
    "--max-drift",
    type=click.FloatRange(min=0, min_open=True),
    default=0.02,
    metavar="X",
    help="The largest mean distance, 1 - cos, that image features may move on surrogates: images "
    "that are made of the given ones and belong to no class.",
)
@click.option(
    "--toward-base/--anywhere",
    default=True,
    help="Whether the trigger vector leads from the suspect's weights to those of --base, each by "
    "a share, so that a repair takes back a part of the fine-tuning; else it may lead anywhere. "
    "This is for `--vector forget` with an automatic rate. Without --base, or with one of another "
    "shape, it always may. Of text models, it is for text towers.",
)
@click.option(
    "--min-accuracy-kept",
    type=click.FloatRange(min=0, max=1),
    default=0.97,
    metavar="X",
    help="The least share of the clean accuracy on the given images to keep. Without labels, the "
    "agreement with the model before the repair counts instead.",
)
@click.option(
    "--warps",
    type=click.IntRange(min=0),
    default=4,
    metavar="N",
    help="The number of searches for a smooth warp into the class, in addition to those for "
    "patches and blends; 0 for none.",
)
@click.option(
    "--waves",
    type=click.IntRange(min=0),
    default=2,
    metavar="N",
    help="The largest number of faint waves over the whole image to search for, into the class, "
    "or, without classes, into one direction that the base does not know; 0 for none. This search "
    "is short.",
)
@click.option(
    "--passes",
    type=options.COUNT,
    default=2,
    metavar="N",
    help="The largest number of times that triggers are recovered and subtracted in one repair. A "
    "pass is the last one if a scan after it shows no trace of a backdoor.",
)
@click.option(
    "--max-rounds",
    type=options.COUNT,
    default=3,
    metavar="N",
    help="The largest number of repairs, each followed by a scan. Without a verdict there is one.",
)
@options.objective
@options.presets
@options.families
@options.search_options
@options.restarts("per class in a scan")
@options.model_options
@options.machine_options
@options.format_option
@options.report_option
def command(
    checkpoint: str,
    output: Path,
    overwrite: bool,
    trigger: Path | None,
    target: str | None,
    force_target: str | None,
    max_rounds: int,
    format_: str,
    report: Path | None,
    **given: Any,
) -> int:
    """Scan, subtract the backdoor from the weights, and scan again.

    Normally you need to know neither the trigger nor the target class. The command scans the model
    and compares it with references (--base, --reference-model or --calibration, see `scan`). If it
    is backdoored or suspicious, the command recovers triggers into the class that was found and
    unlearns them, until a re-scan is clean. It does not change a clean model, and writes nothing.

    With --trigger or --force-target, it makes one repair whatever the first scan says. Nothing is
    written if no coefficient removes anything within the accuracy to keep.
    Without references, the scans before and after then have sizes but no verdict.

    A text model (--texts) is repaired in the same way, with words for triggers, and written in its
    own layout.

    Exit code: 0 if the model was clean or is clean now, 1 if the re-scan is still not clean, 2 for
    an error or if there is no verdict.
    """
    from ..atomic import rehearse_directory
    from ..checkpoints import CHECKPOINT_FILES, parse_reference
    from ..checkpoints.adapter_writing import ADAPTER_FILES
    from ..checkpoints.noted import told_base
    from ..errors import OutputError, UsageError
    from ..presets import SCAN_PRESETS, UNLEARN_PRESETS
    from ..repair.configuration import UnlearnConfig
    from ..repair.detox import KnownTarget, repair_session
    from ..repair.provenance import adapter_obstacle
    from ..reporting import write_detox_report
    from ..session import Session
    from ..text.files import is_text_model
    from .inputs import (
        Inputs,
        class_index,
        read_triggers,
        reference_plan,
        require_class_names,
        scan_config,
    )
    from .many import one_checkpoint
    from .outputs import check_files, check_replaced, emit
    from .summaries import unlearn_report
    from .texts import needs_images, say_unused, take_text_options
    from .unlearn_texts import unlearn_text_model

    if trigger is not None and force_target is not None:
        raise UsageError("--trigger and --force-target exclude each other")
    if target is not None and trigger is None:
        raise UsageError("--target needs --trigger; without a known trigger, use --force-target")
    parse_reference(checkpoint)
    taken = take_text_options(given)
    is_text = taken["texts"] is not None and is_text_model(checkpoint, offline=given["offline"])
    say_unused(taken["texts"], given["images"], [is_text])
    if is_text:
        return unlearn_text_model(
            checkpoint,
            output,
            given,
            taken,
            overwrite=overwrite,
            trigger=trigger,
            target=target,
            force_target=force_target,
            max_rounds=max_rounds,
            format_=format_,
            report=report,
        )
    if given["images"] is None:
        raise needs_images(checkpoint, given["offline"])
    options.apply_preset(given, SCAN_PRESETS, UNLEARN_PRESETS)
    if trigger is None and force_target is None:
        options.choose_objective(given)
    config = scan_config(given)
    plan = reference_plan(given, config)
    if trigger is None and force_target is None and not plan.compares:
        told = told_base(Path(checkpoint)) if Path(checkpoint).is_dir() else None
        hint = "" if told is None else f" (its config.json names {told}: --base hf-hub:{told})"
        raise UsageError(
            "no verdict is possible without --base, the clean model that this one was fine-tuned "
            f"from{hint}, --reference-model or --calibration; give one of them, or --trigger or "
            "--force-target to unlearn without a verdict"
        )
    unlearning = UnlearnConfig(
        vector=given["vector"],
        steps=given["vector_steps"],
        learning_rate=given["vector_learning_rate"],
        warps=given["warps"],
        waves=given["waves"],
        passes=given["passes"],
        retention=given["retention"],
        max_drift=given["max_drift"],
        toward_base=given["toward_base"],
        min_accuracy_kept=given["min_accuracy_kept"],
        seed=given["seed"],
    )
    inputs = Inputs.of(given)
    rank = options.lora_rank_of(given)
    files = CHECKPOINT_FILES if rank is None else ADAPTER_FILES
    check_replaced(output)
    rehearse_directory(output, overwrite=overwrite, replaceable=files)
    check_files(report=report)
    wanted = force_target or target
    if wanted is not None:
        inputs.require_class(wanted)

    start = time.perf_counter()
    model = inputs.read_suspect(one_checkpoint(checkpoint))
    if rank is not None and (obstacle := adapter_obstacle(model)) is not None:
        raise OutputError(f"{model.name}: {obstacle}")
    images = inputs.read_images(model, examine=False)
    if config.objective != "label-free" or wanted is not None or trigger is not None:
        require_class_names(images)
    session = Session.open(model, images, templates=inputs.prompts)
    inputs.warn(*session.doubts)
    known = None
    if trigger is not None:
        index, stamps = read_triggers(trigger, target, images)
        known = KnownTarget(index, tuple(stamps))
    elif force_target is not None:
        known = KnownTarget(class_index(force_target, images.class_names, images.name))
    _say_estimate(session, plan, unlearning, max_rounds, recovers=trigger is None)
    result = repair_session(
        session,
        plan,
        unlearning,
        known=known,
        max_rounds=max_rounds,
        output=output,
        overwrite=overwrite,
        read=inputs.read_other,
        seconds={"read": time.perf_counter() - start},
        lora_rank=rank,
    )

    last = result.before if result.after is None else result.after
    code = exit_codes.of_verdict(last.verdict.value)
    document = {**_document(result, images, code, config.seed), **inputs.used(model)}
    text = unlearn_report(document)
    if report is not None:
        write_detox_report(report, {**text, "triggers": _pictures(result, images, config.seed)})
    emit(document, text, format_)
    return code


def _say_estimate(
    session: Session,
    plan: ReferencePlan,
    unlearning: UnlearnConfig,
    max_rounds: int,
    *,
    recovers: bool,
) -> None:
    """Say on stderr what the command should take at most, if that is long."""
    from ..repair.estimate import estimate_repair
    from ..reporting.values import duration

    found = estimate_repair(session, plan, unlearning, recovers=recovers)
    before = found.references + found.scan
    if before + found.repair < _SHORT:
        return
    click.echo(
        f"at most about {duration(before)} until the verdict, then {duration(found.repair)} and a "
        f"scan of {duration(found.scan)} for each of at most {max_rounds} repairs; about "
        f"{found.memory / 2**30:.1f} GiB of memory beside the images",
        err=True,
    )


def _document(result: DetoxResult, images: ImageSet, code: int, seed: int) -> dict[str, Any]:
    from ..reporting.documents import detox_document

    names = images.class_names or ()
    content = detox_document(result)
    calibration = content["scans"][0]["calibration"]
    return {
        "schema": "pydetox.unlearn/1",
        "exit_code": code,
        "name": result.before.name,
        "sha256": result.before.sha256,
        "seed": seed,
        "calibration": calibration,
        **content,
        "scans": [
            {key: value for key, value in scan.items() if key != "calibration"}
            for scan in content["scans"]
        ],
        "rounds": [
            {**one, "target_name": None if one["target"] is None else names[one["target"]]}
            | {"target_names": [names[target] for target in one["targets"]]}
            for one in content["rounds"]
        ],
    }


def _pictures(result: DetoxResult, images: ImageSet, seed: int) -> list[dict[str, Any]]:
    from ..reporting.pictures import example_image, report_pictures

    example = example_image(images, seed)

    scans = [("before", result.before)]
    if result.after is not None:
        scans.append(("after", result.after))
    return [
        picture for caption, scan in scans for picture in report_pictures(scan, example, caption)
    ]
