"""Text classifiers: what attacks plant, what trigger vectors and other defences leave of it.

    python benchmarks/bench_text.py [--quick] [--seeds 100,101] [--attacks word,phrase]
        [--defenses known,onion] [--device cuda] [--output runs/text]

Prints one line per model and defence and the figures, and writes results.json with everything that
was measured, and summary.json with the flat figures. The texts and the pretrained model have to be
there (`make data-text`); `--quick` needs neither. Models and results are cached outside of the
repository, below $XDG_CACHE_HOME/pydetox; a second run computes what changed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pydetox.atomic import write_file
from pydetox.errors import PydetoxError
from pydetox.models.device import find_device
from pydetox.reporting import to_json
from pydetox.research.text.bench import FULL, QUICK, TextBenchPlan, run_text_benchmark
from pydetox.research.text.causal import bench
from pydetox.research.text.towers import bench as towers_bench

PARTS = ("classifiers", "causal", "towers")


@click.command()
@click.option("--quick", is_flag=True, help="A run of a minute that shows that it works.")
@click.option("--seeds", help="Other seeds, separated by commas.")
@click.option("--attacks", help="Fewer attacks, separated by commas.")
@click.option("--defenses", help="Fewer defences, separated by commas.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS),
    default=PARTS,
    help="Run this part alone; can be given several times.",
)
@click.option("--device", default="cpu", help="Where to compute: cpu, cuda or cuda:1.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/text"))
def main(
    quick: bool,
    seeds: str | None,
    attacks: str | None,
    defenses: str | None,
    parts: tuple[str, ...],
    device: str,
    output: Path,
) -> None:
    """Run the benchmark."""
    plan = QUICK if quick else FULL
    try:
        find_device(device)
        plan = replace(plan, victims=replace(plan.victims, device=device))
        if seeds is not None:
            plan = replace(plan, seeds=tuple(int(one) for one in seeds.split(",")))
        if attacks is not None:
            plan = replace(plan, attacks=tuple(attacks.split(",")))
        if defenses is not None:
            plan = replace(plan, defenses=tuple(defenses.split(",")))
        document = _measured(parts, plan, device, quick=quick)
    except (PydetoxError, ValueError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    output.mkdir(parents=True, exist_ok=True)
    write_file(output / "results.json", to_json(document) + "\n")
    write_file(output / "summary.json", to_json(document["summary"]) + "\n")
    for key, value in document["summary"].items():
        click.echo(f"{key:40}{value:10.4g}")


def _measured(
    parts: tuple[str, ...], plan: TextBenchPlan, device: str, *, quick: bool
) -> dict[str, Any]:
    """Run the parts, and return what they measured with all flat figures in one summary."""

    def log(text: str) -> None:
        click.echo(text, err=True)

    document: dict[str, Any] = {"summary": {}}
    if "classifiers" in parts:
        document = run_text_benchmark(plan, log=log)
    if "causal" in parts:
        causal = bench.QUICK if quick else bench.FULL
        causal = replace(causal, victims=replace(causal.victims, device=device))
        document["causal"] = bench.run_causal_benchmark(causal, log=log)
    if "towers" in parts:
        towers = towers_bench.QUICK if quick else towers_bench.FULL
        document["towers"] = towers_bench.run_tower_benchmark(towers, log=log)
    for name in ("causal", "towers"):
        document["summary"] |= document.get(name, {}).pop("summary", {})
    return document


if __name__ == "__main__":
    main()
