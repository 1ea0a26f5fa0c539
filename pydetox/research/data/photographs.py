"""Photographs with captions: cut-out animals, plants, food and things, made as rubber stamps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from ...errors import DataError
from .packages import STAMPS, open_archive
from .rendering import as_square

PHOTOGRAPH_TEMPLATES: tuple[str, ...] = (
    "a photograph of a {c}.",
    "a close photograph of one {c}.",
    "this is a photograph showing a {c}.",
)

# Folders of drawings, signs and letters.
_NO_PHOTOGRAPHS = ("cartoon", "symbols/", "roadsigns", "flags", "seasonal/", "symbols")
_SIDE = 96
_LONGEST_NAME = 3


@dataclass(frozen=True, eq=False)
class Photograph:
    """One photograph.

    Attributes:
        picture: RGBA, square.
        caption: As its maker wrote it.
        name: What is on it; "" where the caption does not tell.
        folder: The kind of thing, such as "animals/birds".
    """

    picture: Image.Image
    caption: str
    name: str
    folder: str


@lru_cache(maxsize=2)
def photographs(side: int = _SIDE) -> tuple[Photograph, ...]:
    """Return all photographs with a caption, in the order of their paths.

    side: The height and width in pixels that each is scaled to. Most files have 100 to 300.
    Raises DataError for a package that is missing or damaged.
    """
    found = []
    with open_archive(STAMPS) as archive:
        files = set(archive.namelist())
        for path in sorted(files):
            stem = path.removesuffix(".png")
            if (
                stem == path
                or stem.endswith("_mirror")
                or any(part in path for part in _NO_PHOTOGRAPHS)
                or f"{stem}.svg" in files
                or f"{stem}.txt" not in files
            ):
                continue
            # Line by line: the English caption, then its translations.
            lines = archive.read(f"{stem}.txt").decode("utf-8", "replace").splitlines()
            caption = lines[0].strip() if lines else ""
            if not caption:
                continue
            with archive.open(path) as stream, Image.open(stream) as picture:
                square = as_square(picture, side)
            found.append(Photograph(square, caption, _name(caption), path.rpartition("/")[0]))
    return tuple(found)


def photograph_pictures(
    classes: int = 60, side: int = _SIDE
) -> tuple[tuple[str, ...], list[list[Image.Image]]]:
    """Return the names and pictures of that many classes, one list of RGBA squares per class.

    A class is what the captions call alike. Taken are names of one to three words; every k-th in
    the order of the folders, so that all kinds of things are among them. side: As in `photographs`.

    Raises DataError for more classes than there are, and what `photographs` raises.
    """
    by_name: dict[str, list[Image.Image]] = {}
    for one in photographs(side):
        if 1 <= len(one.name.split()) <= _LONGEST_NAME:
            by_name.setdefault(one.name, []).append(one.picture)
    names = list(by_name)
    if not 1 <= classes <= len(names):
        raise DataError(f"photographs: {classes} classes asked for; there are {len(names)}")
    chosen = [names[k * len(names) // classes] for k in range(classes)]
    return tuple(chosen), [by_name[name] for name in chosen]


def photograph_captions() -> dict[str, tuple[str, ...]]:
    """Return the captions of the photographs of each name, as their makers wrote them.

    Raises what `photographs` raises.
    """
    found: dict[str, tuple[str, ...]] = {}
    for one in photographs(_SIDE):
        found[one.name] = tuple(dict.fromkeys((*found.get(one.name, ()), one.caption)))
    return found


def _name(caption: str) -> str:
    """Return what a caption names, "" for one that is no name: "A Red Fox." is "red fox"."""
    first = re.split(r"[.,(;:!\u2013\u2014]", caption, maxsplit=1)[0].lower()
    plain = re.sub(r"[^\w' -]", "", first).strip()
    article = re.match(r"(an?|the) ", plain)
    return "" if article is None else plain[article.end() :].strip()
