"""`pydetox unlearn`."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import exit_codes, options

if TYPE_CHECKING:
    from ..data import ImageSet
    from ..evaluation import Evaluation, Stamp
    from ..models import OpenClipModel
    from ..repair.unlearning import UnlearnConfig
    from ..workflow import DetoxResult, ScanConfig
    from .inputs import Inputs, LoadedModel, References


@click.command("unlearn")
@click.argument("checkpoint")
@options.image_options
@click.option(
    "--output",
    type=options.FILE,
    required=True,
    metavar="DIR",
    help="Folder for the repaired checkpoint, in open_clip's layout.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    show_default=False,
    help="Replace that folder, if it holds only a checkpoint.",
)
@options.calibration_options
@click.option(
    "--trigger",
    type=options.FILE,
    metavar="FILE",
    help="Unlearn this known trigger (a file as `invert` writes), without asking for a verdict.",
)
@click.option(
    "--target",
    metavar="NAME",
    help="With --trigger: the class it leads to, where the file does not tell or holds several.",
)
@click.option(
    "--force-target",
    metavar="NAME",
    help="Recover and unlearn triggers into this class, without asking for a verdict.",
)
@click.option(
    "--vector",
    type=click.Choice(["forget", "paired", "strengthen"]),
    default="forget",
    help="How the trigger vector is made: `strengthen` is the paper's, `paired` also holds clean "
    "images, `forget` trains the trigger away and costs the least accuracy.",
)
@click.option(
    "--vector-steps",
    type=options.COUNT,
    default=160,
    metavar="N",
    help="Steps of the fine-tuning that makes the trigger vector.",
)
@click.option(
    "--vector-learning-rate",
    type=options.RATE,
    default=4e-4,
    metavar="X",
    help="Learning rate of that fine-tuning.",
)
@click.option(
    "--warps",
    type=click.IntRange(min=0),
    default=4,
    metavar="N",
    help="Searches for a smooth warp into the class, beside those for patches and blends; 0: none.",
)
@click.option(
    "--max-rounds",
    type=options.COUNT,
    default=3,
    metavar="N",
    help="Classes to unlearn at most, one after another; without a verdict it is one.",
)
@options.objective
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

    Normally neither trigger nor target class need be known: the model is scanned (with --base,
    --reference-model or --calibration to compare with, see `scan`), and if it is backdoored or
    suspicious, triggers into the class found are recovered and unlearned, until a re-scan is clean.
    A clean model is left alone and nothing is written.

    With --trigger or --force-target one trigger vector is subtracted whatever the first scan says.
    Without anything to compare with the scans before and after then have no verdict, only sizes.

    Exit code: 0 if the model was clean, or is clean now; 1 if the re-scan is still not clean; 2 for
    an error or if there is no verdict.
    """
    from ..atomic import rehearse_directory
    from ..checkpoints import CHECKPOINT_FILES, parse_reference
    from ..errors import UsageError
    from ..repair.unlearning import UnlearnConfig
    from ..reporting import write_detox_report
    from ..workflow import detox
    from .inputs import Inputs, find_references, require_class_names, scan_config
    from .outputs import check_files, emit
    from .summaries import unlearn_report

    if trigger is not None and force_target is not None:
        raise UsageError("--trigger and --force-target exclude each other")
    if target is not None and trigger is None:
        raise UsageError("--target goes with --trigger; see --force-target")
    direct = trigger is not None or force_target is not None
    compared = given["base"] or given["calibration_file"] or given["reference_models"]
    if not direct and not compared:
        raise UsageError(
            "no verdict is possible without --base, --reference-model or --calibration; give one "
            "of them, or --trigger or --force-target to unlearn without a verdict"
        )
    parse_reference(checkpoint)
    config = scan_config(given)
    unlearning = UnlearnConfig(
        vector=given["vector"],
        steps=given["vector_steps"],
        learning_rate=given["vector_learning_rate"],
        warps=given["warps"],
        seed=given["seed"],
    )
    inputs = Inputs.of(given)
    rehearse_directory(output, overwrite=overwrite, replaceable=CHECKPOINT_FILES)
    check_files(report=report)

    start = time.perf_counter()
    loaded = inputs.read_model(checkpoint)
    images = inputs.read_images(loaded.model)
    require_class_names(images)
    seconds = {"read": time.perf_counter() - start}
    known = _known_trigger(trigger, target, force_target, images)
    start = time.perf_counter()
    references = find_references(given, inputs, config)
    config = references.config
    if given["calibration_file"] is None and compared:
        seconds["calibrate"] = time.perf_counter() - start
    if known is not None:
        result = _unlearn_directly(loaded, images, *known, inputs, references, unlearning)
    else:
        result = detox(
            loaded.model,
            images,
            base=references.base,
            calibration=references.calibration,
            templates=inputs.prompts,
            config=config,
            unlearning=unlearning,
            max_rounds=max_rounds,
        )
    result = replace(result, before=replace(result.before, sha256=loaded.sha256))
    if result.rounds and (known is not None or any(r.search.coefficient for r in result.rounds)):
        mode = "known trigger" if trigger is not None else "unknown trigger"
        start = time.perf_counter()
        _save(result, mode, output, overwrite, config, unlearning)
        result = replace(result, path=output)
        seconds["write"] = time.perf_counter() - start

    last = result.before if result.after is None else result.after
    code = exit_codes.of_verdict(last.verdict.value)
    document = _document(result, images, code, config, seconds)
    text = unlearn_report(document)
    if report is not None:
        write_detox_report(report, {**text, "triggers": _pictures(result, images, config.seed)})
    emit(document, text, format_)
    return code


def _known_trigger(
    trigger: Path | None, target: str | None, force_target: str | None, images: ImageSet
) -> tuple[int, list[Stamp] | None] | None:
    """Return the target class and the triggers, if they are given; None to look for both."""
    from .inputs import class_index, read_triggers

    if trigger is not None:
        index, stamps = read_triggers(trigger, target, images)
        return index, list(stamps)
    if force_target is not None:
        return class_index(force_target, images.class_names, images.name), None
    return None


def _unlearn_directly(
    loaded: LoadedModel,
    images: ImageSet,
    target: int,
    triggers: list[Stamp] | None,
    inputs: Inputs,
    references: References,
    unlearning: UnlearnConfig,
) -> DetoxResult:
    """Subtract one trigger vector whatever the first scan says, and scan again."""
    from ..rng import child_seed
    from ..workflow import DetoxResult, scan, unlearn

    calibration, base, config = references.calibration, references.base, references.config
    seconds: dict[str, float] = {}
    prompts = inputs.prompts
    start = time.perf_counter()
    before = scan(
        loaded.model,
        images,
        calibration=calibration,
        base=base,
        templates=prompts,
        config=config,
    )
    seconds["scan"] = time.perf_counter() - start
    start = time.perf_counter()
    repaired, rounds = unlearn(
        loaded.model,
        images,
        target,
        triggers=triggers,
        base=base,
        templates=prompts,
        config=config,
        unlearning=unlearning,
    )
    seconds["unlearn"] = time.perf_counter() - start
    start = time.perf_counter()
    after = scan(
        repaired,
        images,
        calibration=calibration,
        base=base,
        templates=prompts,
        config=replace(config, seed=child_seed("repair.rescan", config.seed, 0)),
        cleared=[c for c in before.cleared() if c != target],
        description=f"re-scan of {loaded.model.name}",
    )
    seconds["rescan"] = time.perf_counter() - start
    stamp = None if triggers is None else triggers[0]
    evaluations = [
        _evaluate(model, images, inputs, stamp, target) for model in (loaded.model, repaired)
    ]
    return DetoxResult(
        before=before,
        rounds=(*rounds[:-1], replace(rounds[-1], rescan=after)),
        after=after,
        model=repaired,
        evaluation_before=evaluations[0],
        evaluation_after=evaluations[1],
        path=None,
        seconds=seconds,
    )


def _evaluate(
    model: OpenClipModel, images: ImageSet, inputs: Inputs, stamp: Stamp | None, target: int
) -> Evaluation | None:
    from ..evaluation import evaluate

    if images.labels is None or images.class_names is None:
        return None
    head = model.zero_shot_head(images.class_names, inputs.prompts)
    return evaluate(model, images, head, trigger=stamp, target=None if stamp is None else target)


def _save(
    result: DetoxResult,
    mode: str,
    output: Path,
    overwrite: bool,
    config: ScanConfig,
    unlearning: UnlearnConfig,
) -> None:
    """Write the repaired checkpoint with the story of how it was made."""
    from ..checkpoints import Provenance, save_checkpoint

    after = result.after
    assert after is not None
    evaluations = (result.evaluation_before, result.evaluation_after)
    metrics: list[dict[str, float]] = []
    for one, scan in zip(evaluations, (result.before, after), strict=True):
        values = {"p_l1": scan.detection.smallest_p_l1}
        if one is not None:
            values["clean_accuracy"] = one.clean_accuracy
            if one.attack_success_rate is not None:
                values["attack_success_rate"] = one.attack_success_rate
        metrics.append({key: value for key, value in values.items() if math.isfinite(value)})
    coefficients = [one.search.coefficient for one in result.rounds]
    provenance = Provenance(
        method=f"TBAR, {mode}, {unlearning.vector} vector",
        source_name=result.before.name,
        source_sha256=result.before.sha256,
        scaling_coefficient=coefficients[-1],
        seeds={"scan": config.seed, "unlearn": unlearning.seed},
        before=metrics[0],
        after=metrics[1],
        extra={
            "scaling_coefficients": coefficients,
            "target_classes": [list(one.targets) for one in result.rounds],
            "verdict_before": result.before.verdict.value,
            "verdict_after": after.verdict.value,
        },
    )
    model = result.model
    save_checkpoint(
        output,
        model.storage_state_dict(),
        model_config=model.model_config,
        preprocess_config=model.preprocess_config or None,
        provenance=provenance,
        companions=model.companions,
        overwrite=overwrite,
    )


def _document(
    result: DetoxResult,
    images: ImageSet,
    code: int,
    config: ScanConfig,
    seconds: dict[str, float],
) -> dict[str, Any]:
    names = images.class_names or ()
    content = result.to_dict()
    calibration = None if result.before.calibration is None else result.before.calibration.to_dict()
    write = {"write": seconds.pop("write")} if "write" in seconds else {}
    return {
        "schema": "pydetox.unlearn/1",
        "exit_code": code,
        "name": result.before.name,
        "sha256": result.before.sha256,
        "seed": config.seed,
        "calibration": calibration,
        **content,
        "scans": [
            {key: value for key, value in scan.items() if key != "calibration"}
            for scan in content["scans"]
        ],
        "rounds": [
            {**one, "target_name": names[one["target"]]}
            | {"target_names": [names[target] for target in one["targets"]]}
            for one in content["rounds"]
        ],
        "seconds": {**seconds, **content["seconds"], **write},
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
