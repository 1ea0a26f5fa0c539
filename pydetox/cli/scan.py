"""`pydetox scan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import exit_codes, options
from .group import explain, print_error

if TYPE_CHECKING:
    from torch import Tensor

    from ..detection import Calibration
    from ..workflow import ScanConfig, ScanResult
    from .inputs import Inputs


@click.command("scan")
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@options.image_options
@options.calibration_options
@click.option(
    "--save-calibration",
    type=options.FILE,
    metavar="FILE",
    help="With --base: write the calibration, for later scans of the same images and options.",
)
@options.objective
@options.search_options
@options.restarts("per class")
@options.model_options
@options.machine_options
@options.format_option
@click.option(
    "--output",
    type=options.FILE,
    metavar="FILE",
    help="Write the result to a file instead of stdout.",
)
@options.report_option
def command(
    checkpoints: tuple[str, ...],
    save_calibration: Path | None,
    output: Path | None,
    report: Path | None,
    format_: str,
    **given: Any,
) -> int:
    """Reconstruct a trigger for every class, and say whether one of them is too small.

    Trigger sizes mean nothing on their own. They are compared with those of clean references,
    scanned in the same way: give a clean --base, from which some are made, or a --calibration that
    was saved. With neither, the verdict is `inconclusive`.

    Several checkpoints share the references. One that cannot be scanned is reported as an error,
    the others are scanned all the same.

    Exit code: 0 all clean, 1 something backdoored or suspicious, 2 something not scanned or
    inconclusive.
    """
    from ..checkpoints import parse_reference
    from ..errors import UsageError
    from ..reporting import write_detox_report
    from .inputs import Inputs, find_calibration, scan_config, write_calibration
    from .outputs import check_files, emit
    from .pictures import report_pictures
    from .summaries import scan_report

    for reference in checkpoints:
        parse_reference(reference)
    if save_calibration is not None and given["base"] is None:
        raise UsageError("--save-calibration needs --base to make the calibration")
    config = scan_config(given)
    inputs = Inputs.of(given)
    check_files(output=output, report=report, save_calibration=save_calibration)
    calibration = find_calibration(given, inputs, config)
    if calibration is not None and save_calibration is not None:
        write_calibration(save_calibration, calibration)

    entries: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    codes: list[int] = []
    for reference in checkpoints:
        try:
            result, example = _scan(reference, inputs, calibration, config)
        except Exception as error:
            line = explain(error)
            if line is None:
                raise
            print_error(line)
            entries.append({"name": reference, "verdict": None, "error": line})
            usage = isinstance(error, UsageError)
            codes.append(exit_codes.USAGE if usage else exit_codes.ERROR)
            continue
        entries.append({**_without_calibration(result), "error": None})
        codes.append(exit_codes.of_verdict(result.verdict.value))
        pictures += report_pictures(result, example, result.name)
    code = exit_codes.combine(codes)
    document = {
        "schema": "pydetox.scan/1",
        "exit_code": code,
        "seed": config.seed,
        "images": given["images"],
        "calibration": None if calibration is None else calibration.to_dict(),
        "results": entries,
    }
    compared = (
        "compared with nothing: no calibration"
        if calibration is None
        else "compared with " + ", ".join(calibration.models)
    )
    text = scan_report(entries, compared)
    if report is not None:
        write_detox_report(report, {**text, "triggers": pictures})
    emit(document, text, format_, output)
    return code


def _scan(
    reference: str, inputs: Inputs, calibration: Calibration | None, config: ScanConfig
) -> tuple[ScanResult, Tensor]:
    """Return the result and an image to show triggers on."""
    from dataclasses import replace

    from .. import workflow

    loaded = inputs.read_model(reference)
    images = inputs.read_images(loaded.model)
    result = workflow.scan(
        loaded.model, images, calibration=calibration, templates=inputs.prompts, config=config
    )
    return replace(result, sha256=loaded.sha256), images.images[0]


def _without_calibration(result: ScanResult) -> dict[str, Any]:
    """The calibration is the same for all checkpoints and stands above them."""
    return {key: value for key, value in result.to_dict().items() if key != "calibration"}
