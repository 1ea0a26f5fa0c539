"""`pydetox bench`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import click

from . import exit_codes, options


@click.command("bench")
@click.option(
    "--data",
    default="fashion-mnist",
    metavar="SPEC",
    help="Labelled images with class names: `fashion-mnist`, `digits`, a folder or a .npz file.",
)
@click.option(
    "--quick",
    is_flag=True,
    show_default=False,
    help="A run of minutes: two attacks, one seed, no tuning.",
)
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    metavar="NAME",
    help="Plant only this attack; can be given several times. Without it, all attacks of the plan.",
)
@click.option(
    "--defense",
    "defenses",
    multiple=True,
    metavar="NAME",
    help="Run only this defence; can be given several times. Without it, all defences.",
)
@click.option(
    "--seeds",
    type=options.COUNT,
    metavar="N",
    help="The number of seeds. Without it, that of the plan.",
)
@click.option(
    "--first-seed",
    type=options.SEED,
    metavar="N",
    help="The first seed; the others follow it. Without it, that of the plan.",
)
@click.option(
    "--workers",
    type=options.COUNT,
    default=2,
    metavar="N",
    help="The number of processes, of one thread each.",
)
@click.option(
    "--output",
    type=options.FILE,
    default=Path("runs/defenses"),
    metavar="DIR",
    help="The folder for summary.json, report.html, results.csv, results.md and results/.",
)
@click.option(
    "--cache",
    type=options.FILE,
    metavar="DIR",
    help="The folder of cached models and results. Without it, `cache` in the output folder.",
)
@options.device
@options.format_option
def command(
    data: str,
    quick: bool,
    attacks: tuple[str, ...],
    defenses: tuple[str, ...],
    seeds: int | None,
    first_seed: int | None,
    workers: int,
    output: Path,
    cache: Path | None,
    device: str,
    format_: str,
) -> int:
    """Compare defences against backdoor attacks on small CLIP models.

    The command trains a base model per seed, plants every attack in copies of it, repairs each
    victim with each method, and measures clean accuracy (CA) and attack success (ASR) on test
    images. It scans clean models as well as victims. Models and results are cached by their
    content, so a second run computes only what changed.

    Exit code: 0 if the benchmark was completed, whatever the figures are.
    """
    from ..models.device import find_device
    from ..reporting import to_json
    from ..research.bench import Plan, markdown, quick_plan, run, write_outputs
    from ..research.bench.outputs import OUTPUT_NAMES, begin_outputs
    from .outputs import check_replaced, to_stdout

    find_device(device)
    plan = replace(quick_plan(data) if quick else Plan(data=data), device=device)
    if attacks:
        plan = replace(plan, attacks=attacks)
    count = len(plan.seeds) if seeds is None else seeds
    first = plan.seeds[0] if first_seed is None else first_seed
    plan = replace(plan, seeds=tuple(range(first, first + count)))
    for name in OUTPUT_NAMES:
        check_replaced(output / name)
    begin_outputs(output, plan)
    result = run(
        plan,
        output / "cache" if cache is None else cache,
        defenses=defenses or None,
        workers=workers,
        log=lambda line: click.echo(line, err=True),
    )
    result["made"] = {"date": date.today().isoformat(), "command": _command_line()}
    write_outputs(output, result)
    with to_stdout():
        if format_ == "json":
            document = {
                "schema": "pydetox.bench/1",
                "exit_code": exit_codes.CLEAN,
                "summary": result["summary"],
            }
            click.echo(f"{to_json(document)}\n".encode(), nl=False)
        else:
            click.echo(markdown(result))
    click.echo(f"report: {click.format_filename(output / 'report.html')}", err=True)
    return exit_codes.CLEAN


def _command_line() -> str:
    """Return what was typed, without the path of the program."""
    return shlex.join(["pydetox", *sys.argv[1:]])
