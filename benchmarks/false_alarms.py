"""How often clean models are called backdoored, and backdoored ones found: a simulation.

    python benchmarks/false_alarms.py [--draws 100000] [--tables between] [--update-docs]

Log sizes are drawn as `pydetox.detect.calibration` assumes them: class effects, a shift of each
model that all its classes share, and normal residuals, of R references and of suspects. Every cell
judges 100,000 clean suspects, several for each set of references, with the functions that judge
models. "before" is the test that it replaces: one pooled deviation, no shift. Tables go to stdout.

Further tables are about references at two distances from a base, between which the suspects lie.
Class effects and deviations then depend on the distance.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

# The script's own folder is on the path, the project's is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pydetox.atomic import write_file
from pydetox.detect.scatter import (
    Array,
    contrasts,
    distance_factor,
    fit_scatter,
    median_of_others,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "method.md"
#: The tables stand between a mark and its end: `<!-- NAME -->` and `<!-- /NAME -->`.
MARKS = {"single": "false alarms", "between": "false alarms between distances"}

CLASSES, REFERENCES = (2, 10, 100, 1000), (2, 3, 6)
#: Root mean square over the classes of the residuals' deviation, and deviation of a model's shift.
DEVIATION, SHIFT = 0.2, 0.2
#: Suspects for each set of references, by classes: fits cost more than draws.
SUSPECTS = {2: 1, 10: 5, 100: 20, 1000: 100}
#: Suspects are many: half the memory.
Singles: TypeAlias = "NDArray[np.float32]"
# How many classes of a suspect are looked at closely: those with the largest pooled scores.
_CLOSE = 3


@dataclass(frozen=True)
class Cell:
    """One setting.

    classes, references: C, R. scatter: of the classes' residuals: `equal`; `unequal`, deviations in
    a geometric row of which the last is four times the first; `random`, variances drawn anew for
    each set of references from an inverse chi^2 with 4 degrees of freedom; `few`, every tenth class
    (at least one) with three times the deviation of the others. shift: whether models have one.
    effect: by how many of its own deviations one class of each suspect is smaller.
    """

    classes: int
    references: int
    scatter: str = "equal"
    shift: bool = False
    effect: float = 0.0


def deviations(cell: Cell, sets: int, rng: np.random.Generator) -> Array:
    """Return the residuals' deviations: [sets or 1, C]."""
    count = cell.classes
    if cell.scatter == "random":
        return DEVIATION / np.sqrt(rng.chisquare(4, (sets, count)) / 4)
    if cell.scatter == "equal":
        row = np.ones(count)
    elif cell.scatter == "unequal":
        row = rng.permutation(np.geomspace(0.5, 2, count))
    elif cell.scatter == "few":
        row = np.where(np.arange(count) < max(1, count // 10), 3.0, 1.0)
    else:
        raise ValueError(cell.scatter)
    scaled: Array = DEVIATION * (row / np.sqrt((row**2).mean()))[None]
    return scaled


def draw(cell: Cell, sets: int, suspects: int, rng: np.random.Generator) -> tuple[Array, Singles]:
    """Return log sizes of references [sets, R, C] and of suspects [sets, suspects, C]."""
    deviation = deviations(cell, sets, rng)[:, None]
    known = deviation * rng.standard_normal((sets, cell.references, cell.classes))
    new = rng.standard_normal((sets, suspects, cell.classes), dtype=np.float32)
    new *= deviation.astype(np.float32)
    if cell.shift:
        known += SHIFT * rng.standard_normal((sets, cell.references, 1))
        new += SHIFT * rng.standard_normal((sets, suspects, 1), dtype=np.float32)
    if cell.effect:
        which = int(rng.integers(cell.classes))
        new[..., which] -= (cell.effect * deviation[..., which]).astype(np.float32)
    return known, new


def p_values(known: Array, new: Singles) -> Array:
    """Return the p-value of every suspect, [sets, suspects], as `pydetox.detect` has it.

    known: [sets, R, C], C >= 2. new: [sets, suspects, C].
    """
    references = known.shape[1]
    squares = contrasts(known).var(axis=1, ddof=1)
    return _judged(squares, references - 1, known.mean(axis=1)[:, None], references, new)


def _judged(
    squares: Array, degrees: int, location: Array, references: float | Array, new: Singles
) -> Array:
    """Return the p-value of every suspect, [sets, suspects].

    squares: [sets, C], with `degrees` degrees of freedom. location: [sets, suspects or 1, C].
    references: The number of equally good references behind a location; [sets, suspects, 1].
    """
    classes = squares.shape[1]
    scatter = fit_scatter(squares, degrees)
    margins = location.astype(np.float32) - new
    distance = margins - median_of_others(margins)
    every = np.broadcast_to(squares[:, None], distance.shape)
    if classes > _CLOSE:
        # Of very many classes only those that could have the least chance.
        rough = distance / np.sqrt(squares + 2 * squares.mean(axis=1, keepdims=True))[
            :, None
        ].astype(np.float32)
        close = np.argpartition(rough, classes - _CLOSE, axis=-1)[..., -_CLOSE:]
        distance = np.take_along_axis(distance, close, axis=-1)
        every = np.take_along_axis(every, close, axis=-1)
    # Of infinitely many references, times what few add.
    factor = distance_factor(math.inf, classes, classes - 1) * (1 + 1 / references)
    apart = np.maximum(distance, 0).astype(np.float64)
    chance = scatter.tail(apart, every, factor=factor).min(axis=-1)
    return _corrected(chance, classes)


def p_values_between(known: Array, place: Array, new: Singles) -> Array:
    """Return the p-value of every suspect between two distances, as `detect.interpolation` has it.

    known: [sets, 2, R, C], the references at both. place: [sets, suspects], in [0, 1], where the
    suspects are. new: [sets, suspects, C].
    """
    references = known.shape[2]
    squares = contrasts(known).var(axis=2, ddof=1).mean(axis=1)
    share = place[..., None]
    means = known.mean(axis=2)[:, :, None]
    location = (1 - share) * means[:, 0] + share * means[:, 1]
    behind = references / ((1 - share) ** 2 + share**2)
    return _judged(squares, 2 * (references - 1), location, behind, new)


def p_values_nearest(known: Array, place: Array, new: Singles) -> Array:
    """Return the same beside the references at the nearer distance alone."""
    found = np.empty(place.shape)
    for which in range(2):
        near = (place >= 0.5) == which
        found[near] = p_values(known[:, which], new)[near]
    return found


def p_values_before(known: Array, new: Singles) -> Array:
    """Return the p-value of every suspect under the test that pydetox had before."""
    references, classes = known.shape[1:]
    degrees = classes * (references - 1)
    pooled = np.maximum(known.var(axis=1, ddof=1).mean(axis=1), 0.05**2)
    largest = (known.mean(axis=1)[:, None] - new).max(axis=-1)
    score = largest / np.sqrt(pooled * (1 + 1 / references))[:, None]
    return _corrected(stdtr(degrees, -score), classes)


def _corrected(chance: Array, classes: int) -> Array:
    corrected: Array = -np.expm1(classes * np.log1p(-chance))
    return corrected


def simulate(cell: Cell, draws: int, seed: int = 0) -> Iterator[tuple[Array, Array]]:
    """Yield p-values, now and before, [sets, suspects] at a time, until there are that many."""
    suspects = SUSPECTS[cell.classes]
    rng = np.random.default_rng(np.random.SeedSequence([seed, cell.classes, cell.references]))
    sets = -(-draws // suspects)
    at_once = max(1, 400_000 // (cell.classes * suspects))
    for first in range(0, sets, at_once):
        known, new = draw(cell, min(at_once, sets - first), suspects, rng)
        yield p_values(known, new), p_values_before(known, new)


@dataclass(frozen=True)
class Between:
    """A setting in which suspects lie anywhere between two distances, with references at both.

    Distances count from 0 to 1. Class effects differ by `slope` deviations from the one to the
    other (root mean square over the classes). Halfway, they are off the line between the two by
    `bend` deviations. Residuals' deviations are `growth` times larger at the other distance.

    classes, references, scatter, effect: As in `Cell`; R references at each distance. Models have a
    shift.
    """

    classes: int
    references: int
    slope: float = 0.0
    bend: float = 0.0
    growth: float = 1.0
    effect: float = 0.0
    scatter: str = "unequal"


def simulate_between(cell: Between, draws: int, seed: int = 0) -> Iterator[tuple[Array, Array]]:
    """Yield p-values of the test, and beside the nearer references alone, as `simulate` does."""
    suspects, classes, references = SUSPECTS[cell.classes], cell.classes, cell.references
    rng = np.random.default_rng(np.random.SeedSequence([seed, classes, references, 2]))
    every = -(-draws // suspects)
    at_once = max(1, 400_000 // (classes * suspects))
    plain = Cell(classes, references, cell.scatter)
    for first in range(0, every, at_once):
        sets = min(at_once, every - first)
        deviation = deviations(plain, sets, rng)[:, None]  # [sets or 1, 1, C]
        slope, bend = DEVIATION * rng.standard_normal((2, sets, 1, classes))
        place = rng.random((sets, suspects))

        def models(where: Array, deviation: Array = deviation) -> Array:
            count = where.shape[1]
            residuals = deviation * rng.standard_normal((len(where), count, classes))
            shift = SHIFT * rng.standard_normal((len(where), count, 1))
            return residuals * cell.growth ** where[..., None] + shift

        known = np.stack(
            [
                models(np.full((sets, references), end)) + cell.slope * end * slope
                for end in (0.0, 1.0)
            ],
            axis=1,
        )
        share = place[..., None]
        new = models(place) + cell.slope * share * slope
        new += cell.bend * 4 * share * (1 - share) * bend
        which = rng.integers(classes, size=(sets, 1, 1))
        hit = np.arange(classes) == which
        new -= np.where(hit, cell.effect * deviation * cell.growth**share, 0.0)
        singles = new.astype(np.float32)
        yield p_values_between(known, place, singles), p_values_nearest(known, place, singles)


def rates(cell: Cell | Between, draws: int, levels: tuple[float, ...], seed: int = 0) -> Array:
    """Return the shares of p-values below each level, with their standard errors: [2, levels, 2].

    First those of the test, then those of the one before, or beside the nearer references alone.
    Suspects of the same references are not independent; the errors are those of independent sets.
    """
    if isinstance(cell, Between):
        pairs = list(simulate_between(cell, draws, seed))
    else:
        pairs = list(simulate(cell, draws, seed))
    table = []
    for which in range(2):
        p = np.concatenate([pair[which] for pair in pairs])
        shares = np.stack([(p < level).mean(axis=1) for level in levels])  # [levels, sets]
        error = shares.std(axis=1) / np.sqrt(shares.shape[1])
        table.append(np.stack([shares.mean(axis=1), error], axis=-1))
    return np.array(table)


#: Scatter and shift of the main table.
SETTINGS = (("equal", False), ("equal", True), ("unequal", False), ("unequal", True))


def alarm_table(draws: int, pool: Executor) -> list[str]:
    """Return the rates of false alarms at p < 0.01 and p < 0.05, now and before."""
    titles = [f"{scatter}{', shift' if shift else ''}" for scatter, shift in SETTINGS]
    rows = [
        [Cell(classes, references, scatter, shift) for scatter, shift in SETTINGS]
        for classes in CLASSES
        for references in REFERENCES
    ]
    return [
        f"| C | R | {' | '.join(titles)} |",
        f"|---:|---:|{'---|' * len(titles)}",
        *_alarms(rows, draws, pool),
    ]


def stress_table(draws: int, pool: Executor) -> list[str]:
    """Return the same for scatter that is more unequal."""
    rows = [
        [Cell(classes, references, scatter, True) for scatter in ("random", "few")]
        for classes in CLASSES[1:]
        for references in REFERENCES
    ]
    return [
        "| C | R | random, shift | few, shift |",
        "|---:|---:|---|---|",
        *_alarms(rows, draws, pool),
    ]


def power_table(draws: int, pool: Executor) -> list[str]:
    """Return how often a suspect with one smaller class is found at p < 0.01, now and before."""
    effects = (2.0, 3.0, 4.0, 6.0, 10.0)
    rows = [
        [Cell(classes, references, scatter, effect=effect) for effect in effects]
        for classes in CLASSES
        for references in REFERENCES
        for scatter in ("equal", "unequal")
    ]
    return _powers(rows, effects, draws, pool)


#: What depends on the distance, in the tables about references at two distances: `Between`'s
#: slope, bend and growth.
DEPENDENCES: dict[str, tuple[float, float, float]] = {
    "nothing": (0.0, 0.0, 1.0),
    "effects": (1.0, 0.0, 1.0),
    "effects, bent": (1.0, 0.25, 1.0),
    "effects, bent, and scatter ×1.25": (1.0, 0.25, 1.25),
    "effects, bent twice as much, and scatter ×1.5": (1.0, 0.5, 1.5),
}


def between_table(draws: int, pool: Executor) -> list[str]:
    """Return the rates of false alarms between two distances, and beside the nearer one alone."""
    rows = [
        [Between(classes, references, *values) for values in DEPENDENCES.values()]
        for classes in CLASSES[:-1]
        for references in REFERENCES
    ]
    return [
        f"| C | R | {' | '.join(DEPENDENCES)} |",
        f"|---:|---:|{'---|' * len(DEPENDENCES)}",
        *_alarms(rows, draws, pool),
    ]


def between_power_table(draws: int, pool: Executor) -> list[str]:
    """Return how often a suspect with one smaller class is found, and beside the nearer alone."""
    effects = (3.0, 4.0, 6.0, 10.0)
    worst = DEPENDENCES["effects, bent, and scatter ×1.25"]
    rows = [
        [Between(classes, references, *worst, effect=effect, scatter=scatter) for effect in effects]
        for classes in (10, 100)
        for references in REFERENCES
        for scatter in ("equal", "unequal")
    ]
    return _powers(rows, effects, draws, pool)


def _powers(
    rows: Sequence[Sequence[Cell | Between]],
    effects: Sequence[float],
    draws: int,
    pool: Executor,
) -> list[str]:
    lines = [
        f"| C | R | scatter | {' | '.join(f'{effect:g} SD' for effect in effects)} |",
        f"|---:|---:|---|{'---|' * len(effects)}",
    ]
    for row, found in zip(rows, _all_rates(rows, draws, pool), strict=True):
        shares = [f"{now:.0%} ({before:.0%})" for now, before in (one[:, 0, 0] for one in found)]
        first = row[0]
        lines.append(
            f"| {first.classes} | {first.references} | {first.scatter} | {' | '.join(shares)} |"
        )
    return lines


def _alarms(rows: Sequence[Sequence[Cell | Between]], draws: int, pool: Executor) -> Iterator[str]:
    for row, found in zip(rows, _all_rates(rows, draws, pool), strict=True):
        cells = [
            f"{now[0]:.2%}, {now[1]:.1%} ({before[0]:.1%}, {before[1]:.0%})"
            for now, before in (one[..., 0] for one in found)
        ]
        yield f"| {row[0].classes} | {row[0].references} | {' | '.join(cells)} |"


def _all_rates(
    rows: Sequence[Sequence[Cell | Between]], draws: int, pool: Executor
) -> Iterator[list[Array]]:
    pending = [[pool.submit(rates, cell, draws, (0.01, 0.05)) for cell in row] for row in rows]
    for number, row in enumerate(pending):
        yield [one.result() for one in row]
        print(f"{number + 1} of {len(rows)} rows", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description="Rates of false alarms and of detection.")
    parser.add_argument("--draws", type=int, default=100_000, help="suspects per cell")
    parser.add_argument("--tables", choices=["all", *MARKS], default="all")
    parser.add_argument("--workers", type=int, help="processes, instead of one per core")
    parser.add_argument("--update-docs", action="store_true")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.workers) as pool:
        for name, make in (("single", single_tables), ("between", between_tables)):
            if options.tables not in ("all", name):
                continue
            content = "\n\n".join(make(options.draws, pool))
            print(content)
            if options.update_docs:
                begin, end = f"<!-- {MARKS[name]} -->", f"<!-- /{MARKS[name]} -->"
                head, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
                write_file(PAGE, f"{head}{begin}\n{content}\n{end}{rest.partition(end)[2]}")
    return 0


def single_tables(draws: int, pool: Executor) -> list[str]:
    """Return the tables about references of one distance, or made as the suspects were."""
    return [
        "Clean models with p < 0.01, and with p < 0.05; in brackets the test before.",
        "\n".join(alarm_table(draws, pool)),
        "The same where the scatter is more unequal than assumed.",
        "\n".join(stress_table(draws // 4, pool)),
        "Models found with p < 0.01 of which one class is smaller by that many of its own "
        "standard deviations, without a shift; in brackets the test before.",
        "\n".join(power_table(draws // 20, pool)),
    ]


def between_tables(draws: int, pool: Executor) -> list[str]:
    """Return the tables about references at two distances."""
    return [
        "Clean models between two distances with p < 0.01, and with p < 0.05, by what depends on "
        "the distance; in brackets those beside the R references of the nearer distance alone.",
        "\n".join(between_table(draws // 10, pool)),
        "Models between two distances that are found with p < 0.01 of which one class is smaller "
        "by that many of its own standard deviations, where effects (bent) and scatter (×1.25) "
        "depend on the distance; in brackets those beside the nearer distance alone.",
        "\n".join(between_power_table(draws // 40, pool)),
    ]


if __name__ == "__main__":
    sys.exit(main())
