"""`pydetox report`."""

from __future__ import annotations

from pathlib import Path

import click

from . import options
from .scan import FAIL_ON


@click.command("report")
@click.argument("run", type=options.FILE, metavar="RUN")
@click.option(
    "--fail-on",
    type=click.Choice(FAIL_ON),
    default="suspicious",
    help="The weakest verdict that gives exit code 1.",
)
@options.run_format_option
@click.option(
    "--output",
    type=options.FILE,
    metavar="FILE",
    help="Write the result to a file instead of stdout.",
)
def command(run: Path, fail_on: str, format_: str, output: Path | None) -> int:
    """Show the results of the last scan in a run folder, also while it is running.

    If the scan has not reached some targets, the report names them and the exit code is 2.
    Otherwise, the exit code is that of the scan.
    """
    from ..scanning.runs import load_run
    from .outputs import check_files
    from .runs import emit_run, exit_code

    check_files(output=output)
    found = load_run(run)
    code = exit_code(found.records, fail_on, complete=not found.not_reached)
    emit_run(
        found.records,
        code=code,
        seed=int(found.configuration["seed"]),
        images=str(found.configuration.get("images") or ""),
        texts=found.configuration.get("texts"),
        calibration=found.calibration,
        ignored=found.ignored,
        not_reached=found.not_reached,
        run=run,
        format_=format_,
        output=output,
        report=None,
    )
    return code
