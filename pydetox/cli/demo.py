"""`pydetox demo`."""

from __future__ import annotations

from pathlib import Path

import click

from . import exit_codes, options


@click.command("demo")
@click.option(
    "--output",
    type=options.FILE,
    default=None,
    metavar="DIR",
    help="The folder for report.html, summary.json and the checkpoints. An earlier demo is "
    "replaced.  [default: runs/demo]",
)
@click.option(
    "--text",
    "on_texts",
    is_flag=True,
    show_default=False,
    help="The demo on texts: a classifier that follows words. It needs the extra `text` and the "
    "pretrained model (make data-text), and writes to runs/demo-text by default.",
)
@options.seed
@click.option("--threads", type=options.COUNT, metavar="N", help="CPU threads.")
@options.device
@options.format_option
def command(
    output: Path | None, on_texts: bool, seed: int, threads: int | None, device: str, format_: str
) -> int:
    """Plant a backdoor in a small CLIP, find it, remove it, and prove it.

    The demo trains a CLIP of 3 million weights on the digits, fine-tunes a clean and a backdoored
    copy, and scans both. It repairs the backdoored copy without knowing the trigger or the target.
    Then it measures this copy with the true trigger, before and after.

    With --text, it fine-tunes the pretrained MiniLM on texts about Python instead, three times
    without and once with a backdoor that words trigger.

    Exit code: 0 if the repaired model is clean in the re-scan, 1 if it is not, 2 for an error or if
    there is no verdict.
    """
    import torch

    from ..errors import UsageError
    from ..models.device import find_device
    from ..research.demo import run_demo
    from .outputs import emit

    if on_texts and device != "cpu":
        raise UsageError(f"--device {device}: the demo on texts runs on the CPU")
    output = output or Path("runs/demo-text" if on_texts else "runs/demo")

    if threads is not None:
        torch.set_num_threads(threads)
    if on_texts:
        from ..research.text.demo import run_text_demo

        result = run_text_demo(output, seed)
    else:
        result = run_demo(output, seed, device=find_device(device))
    code = exit_codes.of_verdict(result.summary["rescan"]["verdict"] or "inconclusive")
    document = {
        "schema": "pydetox.demo-text/1" if on_texts else "pydetox.demo/1",
        "exit_code": code,
        "seed": seed,
        **result.summary,
    }
    emit(document, result.report, format_)
    click.echo(f"report: {click.format_filename(output / 'report.html')}", err=True)
    return code
