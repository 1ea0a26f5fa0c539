"""Run the tutorial: its commands, one after another, and the pictures of it.

    python -m benchmarks.tutorial [--output FOLDER] [--assets docs/assets]

The commands are the blocks of `docs/tutorial.md`, in its order and in one folder. What each prints
on stdout is shown and kept beside the models as transcript.txt; the text of the tutorial is written
by hand from it. With `--assets`, the charts of the reports and the pictures of the trigger that the
commands wrote take the place of those in the documentation.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"

#: The charts: the file of the documentation, the report, and the words of its label.
CHARTS = (
    ("scan.svg", "scan.html", "Mask norm P-L1 of each class"),
    ("rescan.svg", "repair.html", ", after"),
    ("alpha.svg", "repair.html", "over the scaling coefficient"),
)

_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the language and the text of each block that runs, in order.

    The demo is the command's own, without make; what prepares a shell is left out.
    """
    found = [(kind, text) for kind, text in _BLOCK.findall(page)]
    runs = []
    for kind, text in found:
        if text.startswith("source "):
            continue
        runs.append((kind, text.replace("make demo", "pydetox demo")))
    return runs


def chart(report: str, words: str, style: str) -> str:
    """Return the widest chart of a report whose label has these words, as a file of its own.

    Raises ClickException if there is none.
    """
    charts = re.findall(r"<svg viewBox[^>]*aria-label=\"[^\"]*\".*?</svg>", report, re.DOTALL)
    fit = [one for one in charts if words in one.split(">", 1)[0]]
    if not fit:
        raise click.ClickException(f"the report has no chart of {words!r}")
    widest = max(fit, key=lambda one: int(re.findall(r'width="(\d+)"', one)[0]))
    head, body = widest.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{body}\n'


@click.command()
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default="runs/tutorial")
@click.option("--assets", type=click.Path(file_okay=False, exists=True, path_type=Path))
def main(output: Path, assets: Path | None) -> None:
    """Run the tutorial."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    names = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(names), "COLUMNS": "100"}
    transcript = ""
    for kind, text in blocks(PAGE.read_text()):
        command = ["bash", "-c", text] if kind == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=output, env=environment, stdout=subprocess.PIPE)
        transcript += f"$ {text}{done.stdout.decode()}(exit code {done.returncode})\n\n"
        (output / "transcript.txt").write_text(transcript)
        click.echo(transcript.rsplit("$ ", 1)[-1])
        if done.returncode > 1:
            raise click.ClickException(f"this command failed: {text}")
    if assets is None:
        return
    for name, report, words in CHARTS:
        style = re.findall(r"<style>.*?</style>", (assets / name).read_text(), re.DOTALL)[0]
        (assets / name).write_text(chart((output / report).read_text(), words, style))
    sizes = re.findall(r"^(\S+) +P-L1 ([0-9.]+),", transcript, re.MULTILINE)
    smallest = min(sizes, key=lambda one: float(one[1]))[0]
    for kind in ("mask", "pattern", "stamped"):
        (picture,) = (output / "runs" / "triggers").rglob(f"*_{smallest}_{kind}.png")
        shutil.copy(picture, assets / f"trigger-{kind}.png")


if __name__ == "__main__":
    main()
