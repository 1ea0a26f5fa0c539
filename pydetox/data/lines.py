"""Lines of text files."""

from __future__ import annotations


def lines_of(content: str) -> list[str]:
    """Return the lines of a file, which end with a newline, with or without a carriage return.

    `str.splitlines` also ends lines at characters that names, texts, JSON and vocabularies have
    inside of them, such as U+2028 and U+0085.
    """
    lines = [line.removesuffix("\r") for line in content.split("\n")]
    return lines if lines[-1] else lines[:-1]
