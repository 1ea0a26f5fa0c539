"""`pydetox scan`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import exit_codes, options
from .group import print_error
from .wording import in_options

if TYPE_CHECKING:
    from collections.abc import Generator

    from ..scanning import ScannerConfig, ScanRecord
    from ..scanning.texts import TextScannerConfig

FAIL_ON = ("backdoored", "suspicious")


def _size(ctx: click.Context, param: click.Parameter, value: Any) -> int | None:
    """Read a number of bytes, such as 2000000, 500M or 2G."""
    if value is None:
        return None
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    text = str(value).strip().upper().removesuffix("B")
    number = text.rstrip("KMGT")
    unit = units.get(text[len(number) :])
    if unit and number.isascii() and number.isdigit() and int(number) > 0:
        return int(number) * unit
    raise click.BadParameter(f"{value!r}; expected such as 2000000, 500M or 2G", ctx, param)


def _shard(ctx: click.Context, param: click.Parameter, value: Any) -> tuple[int, int] | None:
    """Read i/n with 1 <= i <= n."""
    if value is None:
        return None
    first, _, second = str(value).partition("/")
    numbers = all(part.isascii() and part.isdigit() for part in (first, second))
    if numbers and 1 <= int(first) <= int(second):
        return int(first), int(second)
    raise click.BadParameter(f"{value!r}; expected such as 1/4 to 4/4", ctx, param)


# Options whose parameters have other names.
_NAMES = {
    "calibration": "calibration_file",
    "format": "format_",
    "known_vector": "known_vectors",
    "reference_model": "reference_models",
}


def _read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make the entries of a file the defaults of the options."""
    if path is None:
        return
    from ..scanning.config import read_config_file
    from .outputs import CONFIG_KEY

    ctx.meta[CONFIG_KEY] = path

    names = {p.name for p in ctx.command.params if isinstance(p, click.Option)} - {"config"}
    content, spelt = dict[str, Any](), dict[str, str]()
    for key, value in read_config_file(path).items():
        name = _NAMES.get(key.replace("-", "_"), key.replace("-", "_"))
        if name in content:
            raise click.UsageError(f"{path}: {spelt[name]!r} and {key!r} are the same option", ctx)
        content[name], spelt[name] = value, key
    unknown = sorted(set(content) - {str(name) for name in names})
    if unknown:
        raise click.UsageError(f"{path}: {unknown[0]!r} is no option of scan", ctx)
    ctx.default_map = {**(ctx.default_map or {}), **content}


@click.command("scan")
@click.argument("checkpoints", nargs=-1, required=True, metavar="TARGET...")
@options.data_options
@options.text_options
@options.calibration_options
@click.option(
    "--save-calibration",
    type=options.FILE,
    metavar="FILE",
    help="Write the calibration from --base or --reference-model to a file, for later scans with "
    "the same images and options.",
)
@click.option(
    "--before",
    metavar="REF",
    help="The model before its repair, if the target was repaired. It is scanned as well, and a "
    "class counts only if it stands out in both, as in the re-scan of `unlearn`.",
)
@click.option(
    "--known-vector",
    "known_vectors",
    multiple=True,
    metavar="FILE",
    help="With --base: a .safetensors file with the weight difference of a known attack, to "
    "compare with.",
)
@options.objective
@options.presets
@options.families
@options.search_options
@options.restarts("per class")
@click.option(
    "--inversion/--no-inversion",
    default=True,
    help="Whether to reconstruct triggers. Without this, weights are only read, checked and "
    "compared.",
)
@options.model_options
@options.machine_options
@click.option(
    "--run",
    type=options.FILE,
    metavar="FOLDER",
    help="The folder that keeps all results. A later scan resumes from it.",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "inline", "local", "ray"]),
    default="auto",
    help="Where the work runs: in this process, in processes on this machine, or on a Ray cluster."
    " auto is inline for a single target and local for several.",
)
@click.option(
    "--workers",
    type=options.COUNT,
    metavar="N",
    help="The number of workers. Without it, one per GPU or per four CPU cores. If there are more "
    "than GPUs, they share the GPUs and their memory evenly.",
)
@click.option(
    "--address",
    metavar="ADDRESS",
    help="The address of the Ray cluster. Without it, a cluster starts on this machine.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="The time that the survey and the scan of a checkpoint may take, each.",
)
@click.option(
    "--max-size",
    callback=_size,
    metavar="SIZE",
    help="Skip checkpoints with larger weights files, such as 2G.",
)
@click.option(
    "--max-memory",
    callback=_size,
    metavar="SIZE",
    help="Skip checkpoints for which a worker needs more memory, such as 4G.",
)
@click.option(
    "--shard",
    callback=_shard,
    metavar="I/N",
    help="Scan the I-th of N parts of the targets; I is 1 to N.",
)
@click.option(
    "--retry-errors",
    is_flag=True,
    show_default=False,
    help="With --run: scan checkpoints again that ended in an error.",
)
@click.option(
    "--fail-on",
    type=click.Choice(FAIL_ON),
    default="suspicious",
    help="The weakest verdict that gives exit code 1.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    show_default=False,
    help="Only list the targets, and estimate the time and memory from a few steps on the first "
    "checkpoint.",
)
@click.option(
    "--config",
    type=options.FILE,
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help='A JSON or YAML file with options, such as {"max_images": 500}. The command line '
    "overrides it.",
)
@options.run_format_option
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
    run: Path | None,
    fail_on: str,
    dry_run: bool,
    output: Path | None,
    report: Path | None,
    format_: str,
    **given: Any,
) -> int:
    """Reconstruct a trigger for every class, and say whether one of them is too small.

    A target is a checkpoint (see pydetox --help), a folder or a glob that holds checkpoints, or a
    text file that names one target per line.

    The size of a trigger means nothing on its own. It is compared with the sizes in clean
    references, which are scanned in the same way. Give a clean --base, from which references are
    made, or at least two clean models (--reference-model), or a saved --calibration. Without any of
    them, the verdict is `inconclusive`. --base together with --reference-model finds most: then the
    search looks for triggers that work in the suspect but not in its base.

    Text models (sequence classifiers of transformers) are scanned with --texts. A trigger is then a
    few words, and the same references and verdicts are there. One command takes both kinds.

    All targets share the references. If a checkpoint cannot be scanned, its verdict is `error`, and
    the others are scanned all the same. With --run, the same command continues an interrupted scan.

    Exit code: 0 if all are clean, 1 if one is backdoored or suspicious, 2 if one is not scanned or
    inconclusive, 3 if there is no checkpoint.
    """
    from ..detect.calibration_file import write_calibration
    from ..detect.statistics import Calibration
    from ..errors import UsageError
    from ..models.device import find_device
    from ..presets import SCAN_PRESETS
    from ..scanning import Scanner, find_targets
    from ..scanning.display import Display
    from ..scanning.estimate import estimate
    from ..scanning.texts import TextScanner
    from .outputs import check_files
    from .runs import emit_dry_run, emit_run, exit_code
    from .texts import (
        refuse_image_options,
        say_unused,
        sort_targets,
        take_text_options,
        text_scanner_config,
    )

    taken = take_text_options(given)
    options.apply_preset(given, SCAN_PRESETS)
    if given["images"] is not None:
        options.choose_objective(given)
    find_device(given["device"])
    shard = given["shard"]
    names, text_targets, passed_over = sort_targets(
        checkpoints, taken["texts"], given["images"], shard=shard, offline=given["offline"]
    )
    text_config = text_scanner_config(given, taken, alone=not names) if text_targets else None
    if text_config is not None:
        if not names:
            refuse_image_options()
        _without_text_models(given, text_config)
    config = _config({**given, "images": given["images"] or ""})
    if save_calibration is not None and not config.makes_calibration:
        raise UsageError(
            "--save-calibration needs --base or --reference-model to make the calibration"
        )
    check_files(output=output, report=report, save_calibration=save_calibration)
    say_unused(taken["texts"], given["images"], [False] * len(names) + [True] * len(text_targets))
    if dry_run:
        found_targets = find_targets(checkpoints, shard=config.shard)
        if not names:
            emit_dry_run(found_targets, None, format_, output)
            return exit_codes.CLEAN
        emit_dry_run(
            found_targets, estimate(config.absolute(), found_targets.targets), format_, output
        )
        return exit_codes.CLEAN

    with Display() as display:

        def notify(event: str, **particulars: Any) -> None:
            if event == "warning":
                particulars["message"] = in_options(particulars["message"])
            display(event, **particulars)
            if event == "calibrated" and save_calibration is not None:
                calibration = Calibration.from_dict(particulars["calibration"])
                write_calibration(save_calibration, calibration)

        scanner = Scanner(config, run=run, notify=notify)
        records: list[ScanRecord] = []
        said: set[str] = set()
        text_scanner = (
            None if text_config is None else TextScanner(text_config, run=run, notify=notify)
        )

        def scanned() -> Generator[ScanRecord, None, None]:
            if names:
                with contextlib.closing(scanner.scan(names)) as found:
                    yield from found
            if text_scanner is not None:
                with contextlib.closing(
                    text_scanner.scan(text_targets, beside=tuple(records), ignored=passed_over)
                ) as found:
                    yield from found

        with contextlib.closing(scanned()) as found:
            for record in found:
                records.append(record)
                if record.error is not None:
                    display.log(in_options(record.error))
                for warning in record.scan.get("warnings", ()):
                    if warning not in said:  # of the images, for instance
                        said.add(warning)
                        display.log(in_options(warning), kind="warning")
    targets = [*scanner.targets.targets, *text_targets]
    order = {target.name: place for place, target in enumerate(targets)}
    records.sort(key=lambda record: order[record.name])
    if not records:
        print_error("nothing to scan: no checkpoint is among the targets")
    code = exit_code(records, fail_on)
    calibration = scanner.calibration
    if calibration is None and text_scanner is not None and text_scanner.calibration is not None:
        calibration = text_scanner.calibration.to_dict()
    emit_run(
        records,
        code=code,
        seed=config.seed,
        images=config.images,
        texts=taken["texts"],
        calibration=calibration,
        ignored=scanner.targets.ignored if names else passed_over,
        run=run,
        format_=format_,
        output=output,
        report=report,
    )
    return code


def _without_text_models(given: dict[str, Any], text: TextScannerConfig) -> None:
    """Leave the base and the references that are text models to the scan of text models."""
    if given["base"] == text.base:
        given["base"] = None
    others = [one for one in given["reference_models"] if one not in text.reference_models]
    given["reference_models"] = tuple(others)


def _config(given: dict[str, Any]) -> ScannerConfig:
    from ..scanning import ScannerConfig

    values: dict[str, Any] = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    values["calibration"] = values.pop("calibration_file")
    return ScannerConfig(**values)
