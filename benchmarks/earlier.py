"""Rows that earlier runs of a benchmark have measured, beside those of this run.

A benchmark that takes hours on one machine can be run in parts: other seeds, other attacks. Each
run writes its rows as JSON, and `--with FILE` adds those of earlier runs to the tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pydetox.errors import DataError

Row = Mapping[str, Any]


def earlier_option(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option `--with` of a benchmark, the argument `earlier`: a tuple of paths.

    what: The part of the benchmark and the file, for the help text.
    """
    return click.option(
        "--with",
        "earlier",
        multiple=True,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help=f"{what} of an earlier run; can be given several times.",
    )


def with_earlier(
    rows: Sequence[Row], earlier: Sequence[tuple[Path, Any]], kind: str, keys: Sequence[str]
) -> list[Row]:
    """Return rows, and those of earlier documents that nothing later has measured again.

    rows: What this run has measured. earlier: Files and what they hold, the oldest first. kind: The
    name of the list in a document, such as `rows`. keys: What tells one row from another. Raises
    DataError for a document without such rows.
    """
    found = dict[tuple[Any, ...], Row]()
    for path, document in earlier:
        try:
            found |= {tuple(row[key] for key in keys): row for row in document[kind]}
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}: has no {kind} with {', '.join(keys)}; expected what an earlier run of "
                "this benchmark wrote"
            ) from error
    found |= {tuple(row[key] for key in keys): row for row in rows}
    return list(found.values())


def read_earlier(paths: Sequence[Path], part: str | None = None) -> list[tuple[Path, Any]]:
    """Return files and the documents in them. part: The part of each document that counts."""
    found = []
    for path in paths:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            found.append((path, document if part is None else document[part]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: is no result of an earlier run ({error})") from error
    return found
