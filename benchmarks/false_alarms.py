"""How often clean models are called backdoored, and backdoored ones found: a simulation.

    python benchmarks/false_alarms.py [--draws 100000] [--update-docs]

Log sizes are drawn as `pydetox.detect.calibration` assumes them: class effects, a shift of each
model that all its classes share, and normal residuals, of R references and of suspects. Every cell
judges 100,000 clean suspects, several for each set of references, with the functions that judge
models. "before" is the test that it replaces: one pooled deviation, no shift. Tables go to stdout.
"""

from __future__ import annotations

import argparse
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
BEGIN, END = "<!-- false alarms -->", "<!-- /false alarms -->"

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
    references, classes = known.shape[1:]
    squares = contrasts(known).var(axis=1, ddof=1)
    scatter = fit_scatter(squares, references - 1)
    margins = known.mean(axis=1, dtype=np.float64)[:, None].astype(np.float32) - new
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
    factor = distance_factor(references, classes, classes - 1)
    apart = np.maximum(distance, 0).astype(np.float64)
    chance = scatter.tail(apart, every, factor=factor).min(axis=-1)
    return _corrected(chance, classes)


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


def rates(cell: Cell, draws: int, levels: tuple[float, ...], seed: int = 0) -> Array:
    """Return the shares of p-values below each level, with their standard errors: [2, levels, 2].

    First those of the test, then those of the one before. Suspects of the same references are not
    independent; the errors are those of independent sets.
    """
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
    lines = [
        f"| C | R | scatter | {' | '.join(f'{effect:g} SD' for effect in effects)} |",
        f"|---:|---:|---|{'---|' * len(effects)}",
    ]
    rows = [
        [Cell(classes, references, scatter, effect=effect) for effect in effects]
        for classes in CLASSES
        for references in REFERENCES
        for scatter in ("equal", "unequal")
    ]
    for row, found in zip(rows, _all_rates(rows, draws, pool), strict=True):
        shares = [f"{now:.0%} ({before:.0%})" for now, before in (one[:, 0, 0] for one in found)]
        first = row[0]
        lines.append(
            f"| {first.classes} | {first.references} | {first.scatter} | {' | '.join(shares)} |"
        )
    return lines


def _alarms(rows: Sequence[Sequence[Cell]], draws: int, pool: Executor) -> Iterator[str]:
    for row, found in zip(rows, _all_rates(rows, draws, pool), strict=True):
        cells = [
            f"{now[0]:.2%}, {now[1]:.1%} ({before[0]:.1%}, {before[1]:.0%})"
            for now, before in (one[..., 0] for one in found)
        ]
        yield f"| {row[0].classes} | {row[0].references} | {' | '.join(cells)} |"


def _all_rates(rows: Sequence[Sequence[Cell]], draws: int, pool: Executor) -> Iterator[list[Array]]:
    pending = [[pool.submit(rates, cell, draws, (0.01, 0.05)) for cell in row] for row in rows]
    for number, row in enumerate(pending):
        yield [one.result() for one in row]
        print(f"{number + 1} of {len(rows)} rows", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description="Rates of false alarms and of detection.")
    parser.add_argument("--draws", type=int, default=100_000, help="suspects per cell")
    parser.add_argument("--update-docs", action="store_true")
    options = parser.parse_args()
    draws = options.draws
    with ProcessPoolExecutor() as pool:
        tables = [
            "Clean models with p < 0.01, and with p < 0.05; in brackets the test before.",
            "\n".join(alarm_table(draws, pool)),
            "The same where the scatter is more unequal than assumed.",
            "\n".join(stress_table(draws // 4, pool)),
            "Models found with p < 0.01 of which one class is smaller by that many of its own "
            "standard deviations, without a shift; in brackets the test before.",
            "\n".join(power_table(draws // 20, pool)),
        ]
    content = "\n\n".join(tables)
    print(content)
    if options.update_docs:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        write_file(PAGE, f"{head}{BEGIN}\n{content}\n{END}{rest.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
