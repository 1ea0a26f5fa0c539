"""The search for words against DBS as published, one class after another: CPU time of each.

    python benchmarks/bench_text_search.py [--quick] [--seed 100] [--attack word]
        [--output runs/text-search]

Both look at the same backdoored model with the same clean texts, and neither has a reference or a
base. The two take turns within one run: a whole search for all classes, then DBS for one class,
until every class had its turn. A search of ours counts with the median of its times. DBS is
described, with its constants, in `pydetox.research.text.dbs`.

`scan.vs_dbs` is how many times the CPU time of DBS that of a search is. Verdicts of ours compare
with clean references, which are searched once for all suspects: `scan.vs_dbs_with_references`
counts the searches of three references to the search of this one suspect. `scan.target_right` and
`dbs.target_right` are 1 if the class with the smallest loss is the true one. MiniLM has to be there
(`make data-text`), `--quick` takes a small model without it.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import click

from pydetox.atomic import write_file
from pydetox.errors import PydetoxError
from pydetox.reporting import to_json
from pydetox.research.text.dbs import DbsConfig, invert_class, verdict_of
from pydetox.research.text.verdicts import FULL_VERDICTS, QUICK_VERDICTS
from pydetox.research.text.victims import TextVictim, TextWorkshop
from pydetox.text.search import TextSearch, search_words

REFERENCES = 3


@click.command()
@click.option("--quick", is_flag=True, help="A small model, in a few minutes.")
@click.option("--seed", default=100, help="The seed of the model.")
@click.option("--attack", default="word", help="The attack.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/text-search"))
def main(quick: bool, seed: int, attack: str, output: Path) -> None:
    """Run the comparison."""
    plan = QUICK_VERDICTS if quick else FULL_VERDICTS
    shop = TextWorkshop(plan.victims, seed)
    victim = TextVictim(seed, attack)
    try:
        model, backdoor = shop.model(victim), shop.backdoor(victim)
    except PydetoxError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    assert backdoor is not None
    texts = shop.corpus.defender
    times, found, ours = list[float](), list[object](), list[TextSearch]()
    dbs = []
    for target in range(len(model.class_names)):
        start = time.process_time()
        ours.append(search_words(model, texts, plan.scan))
        times.append(time.process_time() - start)
        dbs.append(invert_class(model, texts, target, DbsConfig()))
        tokens = model.tokenizer.decode(dbs[-1].tokens) if dbs[-1].tokens else "nothing"
        click.echo(
            f"{model.class_names[target]}: search of all classes {times[-1]:.1f} s, DBS "
            f"{dbs[-1].seconds:.1f} s, loss {dbs[-1].loss:.3g}: {tokens}",
            err=True,
        )
    losses = [min(one.loss for one in row) for row in ours[-1].found]
    theirs = [one.loss for one in dbs]
    search, inversion = statistics.median(times), sum(one.seconds for one in dbs)
    figures = {
        "scan.seconds": search,
        "dbs.seconds": inversion,
        "scan.vs_dbs": inversion / search,
        "scan.vs_dbs_with_references": inversion / (search * (1 + REFERENCES)),
        "scan.target_right": int(losses.index(min(losses)) == backdoor.target),
        "dbs.target_right": int(theirs.index(min(theirs)) == backdoor.target),
        "dbs.backdoored": int(verdict_of(dbs) is not None),
    }
    for row in ours[-1].found:
        found.append([{"words": one.trigger.text, "loss": one.loss} for one in row])
    output.mkdir(parents=True, exist_ok=True)
    document = {"model": victim.name, "search": found, "dbs": [asdict(one) for one in dbs]}
    write_file(output / "results.json", to_json(document | {"summary": figures}) + "\n")
    write_file(output / "summary.json", to_json(figures) + "\n")
    for key, value in figures.items():
        click.echo(f"{key:40}{value:10.4g}")


if __name__ == "__main__":
    main()
