"""Emoji by name: each class is one emoji, drawn by Google, Twitter and Twemoji's successors."""

from __future__ import annotations

import json
import zipfile
from functools import lru_cache

from PIL import Image

from ...errors import DataError
from .packages import EMOJI_GOOGLE, EMOJI_TWITTER, TWEMOJI, open_archive
from .rendering import as_square

EMOJI_TEMPLATES: tuple[str, ...] = (
    "an emoji of a {c}.",
    "a small drawing of a {c}.",
    "a {c} emoji.",
)

# The first forty: things that look different at 32 pixels, from all over.
_FIRST = (
    *("penguin", "snake", "elephant", "octopus", "ladybug", "tropical_fish", "turtle"),
    *("owl", "fox_face", "butterfly", "crab", "frog", "cactus", "sunflower"),
    *("rose", "mushroom", "banana", "strawberry", "pineapple", "grapes", "watermelon"),
    *("hamburger", "pizza", "doughnut", "birthday", "gift", "balloon", "guitar"),
    *("basketball", "trophy", "house", "rocket", "helicopter", "fire_engine", "tractor"),
    *("bike", "umbrella", "crown", "key", "scissors"),
)

# Many of them differ in nothing but a colour, a pose or a letter.
_LEFT_OUT = frozenset({"Flags", "Component", "People & Body", "Symbols"})

_SIDE = 64


@lru_cache(maxsize=4)
def emoji_pictures(classes: int = 40) -> tuple[tuple[str, ...], list[list[Image.Image]]]:
    """Return the names and the drawings of that many emoji, one list of RGBA squares per emoji.

    The first forty are a choice of things that look different; the rest follows in the order of the
    Unicode standard, without flags, people and symbols at first and with them at last.

    Raises DataError for more classes than there are and for packages that are missing or damaged.
    """
    with (
        open_archive(EMOJI_GOOGLE) as google,
        open_archive(EMOJI_TWITTER) as twitter,
        open_archive(TWEMOJI) as twemoji,
    ):
        files = [set(archive.namelist()) for archive in (google, twitter, twemoji)]
        entries = [
            entry
            for entry in json.loads(google.read("emoji.json"))
            if entry["image"] in files[0] and entry["image"] in files[1]
        ]
        rank = {name: k for k, name in enumerate(_FIRST)}
        entries.sort(
            key=lambda entry: (
                rank.get(entry["short_name"], len(rank)),
                entry["category"] in _LEFT_OUT,
                entry["sort_order"],
            )
        )
        names, pictures = list[str](), list[list[Image.Image]]()
        seen = set[str]()
        for entry in entries:
            name = _name(entry["name"] or entry["short_name"])
            if name in seen:
                continue
            seen.add(name)
            names.append(name)
            drawn = [_picture(google, entry["image"]), _picture(twitter, entry["image"])]
            # Twemoji writes no leading zeros, and no variation selector where it has a choice.
            stem = entry["image"].removesuffix(".png").lstrip("0")
            for other in (f"{stem}.png", f"{stem.replace('-fe0f', '')}.png"):
                if other in files[2]:
                    drawn.append(_picture(twemoji, other))
                    break
            pictures.append(drawn)
            if len(names) == classes:
                return tuple(names), pictures
    raise DataError(f"emoji: {classes} classes asked for; there are {len(names)}")


def _name(official: str) -> str:
    return official.lower().replace("_", " ").replace("-", " ").strip()


def _picture(archive: zipfile.ZipFile, name: str) -> Image.Image:
    with archive.open(name) as stream, Image.open(stream) as picture:
        return as_square(picture, _SIDE)
