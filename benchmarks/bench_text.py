"""Text models: what attacks plant, what scans say, and what repairs leave of it.

    python benchmarks/bench_text.py [--quick] [--part verdicts] [--seeds 100,101]
        [--attacks word,phrase] [--defenses known,onion] [--minutes 60] [--device cuda]
        [--with EARLIER.json] [--output runs/text]

The part `verdicts` scans backdoored classifiers and clean ones that no reference is made of, and
repairs what it finds with the trigger unknown. The part `search` compares the CPU time of a search
with that of DBS, one class after another. The part `causal` scans and repairs models that continue
texts, and the part `towers` does so with the text towers of CLIPs. The part `defenses` repairs
classifiers with known triggers and by other defences. Without `--part`, all run. `--seeds`,
`--attacks` and `--minutes` are of the parts about classifiers. `--with` adds the models of the part
`verdicts` that an earlier run wrote to its results.json.

Prints one line per model and the figures, and writes results.json with everything that was
measured, and summary.json with the flat figures. The texts and the pretrained model have to be
there (`make data-text`); `--quick` needs neither. Models and results are cached outside of the
repository, below $XDG_CACHE_HOME/pydetox; a run that was stopped goes on, and a second run computes
what changed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

# The script's own folder is on the path, the project's is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.earlier import earlier_option, read_earlier, with_earlier
from pydetox.atomic import write_file
from pydetox.errors import PydetoxError
from pydetox.models.device import find_device
from pydetox.reporting import to_json
from pydetox.research.text.bench import FULL, QUICK, run_text_benchmark
from pydetox.research.text.causal import bench as causal_bench
from pydetox.research.text.search_speed import SpeedPlan, compare_searches
from pydetox.research.text.towers import bench as towers_bench
from pydetox.research.text.verdicts import (
    FULL_VERDICTS,
    QUICK_VERDICTS,
    run_text_verdicts,
    summarize_text_verdicts,
)

PARTS = ("verdicts", "search", "causal", "towers", "defenses")


@click.command()
@click.option("--quick", is_flag=True, help="A run of a minute that shows that it works.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS),
    default=PARTS,
    help="Run this part alone; can be given several times.",
)
@click.option("--seeds", help="Other seeds, separated by commas.")
@click.option("--attacks", help="Fewer attacks, separated by commas.")
@click.option("--defenses", help="Fewer defences, separated by commas.")
@click.option(
    "--clean", type=click.IntRange(0), help="Clean models per seed, instead of those of the plan."
)
@click.option("--minutes", type=float, default=float("inf"), help="Begin no model after this time.")
@earlier_option("Part verdicts: the results.json")
@click.option("--device", default="cpu", help="Where to compute: cpu, cuda or cuda:1.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/text"))
def main(
    quick: bool,
    parts: tuple[str, ...],
    seeds: str | None,
    attacks: str | None,
    defenses: str | None,
    clean: int | None,
    minutes: float,
    earlier: tuple[Path, ...],
    device: str,
    output: Path,
) -> None:
    """Run the benchmark."""
    end = time.monotonic() + 60 * minutes
    document: dict[str, Any] = {"summary": {}}
    try:
        find_device(device)
        chosen: dict[str, Any] = {}
        if seeds is not None:
            chosen["seeds"] = tuple(int(one) for one in seeds.split(","))
        if attacks is not None:
            chosen["attacks"] = tuple(attacks.split(","))
        if clean is not None:
            chosen["clean"] = clean
        for one in parts:
            before = read_earlier(earlier, "verdicts") if one == "verdicts" else []
            made = _part(
                one, quick, chosen, _names(defenses), (end - time.monotonic()) / 60, device
            )
            if one == "verdicts":
                for kind in ("rows", "repairs"):
                    made[kind] = with_earlier(made[kind], before, kind, ("name",))
                made["summary"] = summarize_text_verdicts(made["rows"], made["repairs"])
            document["summary"] |= made.pop("summary")
            document[one] = made
    except (PydetoxError, ValueError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    output.mkdir(parents=True, exist_ok=True)
    write_file(output / "results.json", to_json(document) + "\n")
    write_file(output / "summary.json", to_json(document["summary"]) + "\n")
    for key, value in document["summary"].items():
        click.echo(f"{key:40}{value:10.4g}")


def _names(text: str | None) -> Sequence[str] | None:
    return None if text is None else tuple(text.split(","))


def _part(
    name: str,
    quick: bool,
    chosen: dict[str, Any],
    defenses: Sequence[str] | None,
    minutes: float,
    device: str,
) -> dict[str, Any]:
    def log(text: str) -> None:
        click.echo(text, err=True)

    judged = QUICK_VERDICTS if quick else FULL_VERDICTS
    judged = replace(judged, victims=replace(judged.victims, device=device), **chosen)
    if name == "verdicts":
        return run_text_verdicts(judged, minutes=minutes, log=log)
    if name != "defenses" and minutes <= 0:
        log(f"the part {name} was not run: the time is over")
        return {"summary": {}}
    if name == "search":
        return compare_searches(SpeedPlan(judged, attack=judged.attacks[0]), log=log)
    if name == "causal":
        causal = causal_bench.QUICK if quick else causal_bench.FULL
        causal = replace(causal, victims=replace(causal.victims, device=device))
        return causal_bench.run_causal_benchmark(causal, log=log)
    if name == "towers":
        towers = towers_bench.QUICK if quick else towers_bench.FULL
        return towers_bench.run_tower_benchmark(towers, log=log)
    plan = QUICK if quick else FULL
    plan = replace(plan, victims=replace(plan.victims, device=device), **chosen)
    if defenses is not None:
        plan = replace(plan, defenses=tuple(defenses))
    return run_text_benchmark(plan, minutes=minutes, log=log)


if __name__ == "__main__":
    main()
