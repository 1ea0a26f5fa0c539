"""`pydetox demo`."""

from __future__ import annotations

from pathlib import Path

import click

from . import exit_codes, options


@click.command("demo")
@click.option(
    "--output",
    type=options.FILE,
    default=Path("runs/demo"),
    metavar="DIR",
    help="The folder for report.html, summary.json and the checkpoints. An earlier demo is "
    "replaced.",
)
@options.seed
@click.option("--threads", type=options.COUNT, metavar="N", help="CPU threads.")
@options.device
@options.format_option
def command(output: Path, seed: int, threads: int | None, device: str, format_: str) -> int:
    """Plant a backdoor in a small CLIP, find it, remove it, and prove it.

    The demo trains a CLIP of 3 million weights on the digits, fine-tunes a clean and a backdoored
    copy, and scans both. It repairs the backdoored copy without knowing the trigger or the target.
    Then it measures this copy with the true trigger, before and after.

    Exit code: 0 if the repaired model is clean in the re-scan, 1 if it is not, 2 for an error or if
    there is no verdict.
    """
    import torch

    from ..models.device import find_device
    from ..research.demo import run_demo
    from .outputs import emit

    if threads is not None:
        torch.set_num_threads(threads)
    result = run_demo(output, seed, device=find_device(device))
    code = exit_codes.of_verdict(result.summary["rescan"]["verdict"] or "inconclusive")
    document = {
        "schema": "pydetox.demo/1",
        "exit_code": code,
        "seed": seed,
        **result.summary,
    }
    emit(document, result.report, format_)
    click.echo(f"report: {click.format_filename(output / 'report.html')}", err=True)
    return code
