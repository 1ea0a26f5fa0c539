"""Matching the class names that a data source brings with the class names that the caller wants."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence

from ..errors import DataError
from .named_lists import imagenet_ids, named_class_names

#: What tables hold where a row has no label: pandas, which open_clip reads them with, writes and
#: reads these.
MISSING = frozenset({"", "nan", "NaN", "<NA>", "NA", "N/A", "n/a", "null", "NULL", "None"})

#: What to do where some images have labels and some have none.
ALL_OR_NONE = (
    "give all of them one, or none (texts such as None, NA and null count as none, unless "
    "class_names= has them)"
)

_NUMBER = re.compile(r"[+-]?(\d{1,15}(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")


def labels_of_texts(
    values: Sequence[str], class_names: Sequence[str] | None, source: str
) -> list[int | str | None]:
    """Return the labels that a column of texts means: all numbers, or all names of classes.

    What is among the caller's names is a name. Otherwise missing labels become None, and whole
    numbers (also `2.0` and `-1`) become integers if all labels are numbers. Raises DataError, which
    names the source, where all are numbers and one is not whole.
    """
    known = set(class_names or ())
    given = {value for value in values if value in known or value not in MISSING}
    numbers = bool(given) and not given <= known and all(map(_NUMBER.fullmatch, given))
    read: dict[str, int | str] = {}
    for value in given:
        if numbers and not float(value).is_integer():
            raise DataError(
                f"{source}: label {value!r}; expected whole numbers, or this name "
                "among those of class_names="
            )
        read[value] = int(float(value)) if numbers else value
    return [read.get(value) for value in values]


def labels_mean_nothing(
    found: Sequence[str], wanted: Sequence[str] | None, *, labels_required: bool
) -> bool:
    """Return whether the data's classes are to be taken for no classes at all.

    That is so where nobody needs labels and no class of the data is among the wanted ones: a folder
    of photos that happens to have sub-folders. If some are among them the sub-folders are classes,
    and one that is not among them is more likely to be misspelt. The same holds for names that
    differ from a wanted one in case, spaces and underscores alone.
    """
    if labels_required or wanted is None or set(found) & set(wanted):
        return False
    if {_reads(name) for name in found} & {_reads(name) for name in wanted}:
        return False
    return imagenet_order(found, wanted) is None


def imagenet_order(found: Sequence[str], wanted: Sequence[str] | None) -> list[int] | None:
    """Return the labels of WordNet ids where the caller's names are those of ImageNet, or None."""
    ids = imagenet_ids()
    if wanted is None or len(wanted) != len(ids) or not set(found) <= set(ids):
        return None
    if tuple(wanted) != named_class_names("imagenet"):
        return None
    return [ids.index(name) for name in found]


def index_of_names(found: Sequence[str], wanted: Sequence[str] | None, source: str) -> list[int]:
    """Return the index in `wanted` of each name in `found`, or its own place when wanted is None.

    Names must match exactly, but WordNet ids fit ImageNet's class names. Raises DataError for a
    name that is not in `wanted`, and for one that is in it twice, because then its label is not
    defined.
    """
    if wanted is None:
        return list(range(len(found)))
    by_id = imagenet_order(found, wanted)
    if by_id is not None:
        return by_id
    positions: dict[str, int] = {}
    repeated = set()
    for position, name in enumerate(wanted):
        if name in positions:
            repeated.add(name)
        positions[name] = position
    for name in found:
        if name not in positions:
            shown = ", ".join(repr(known) for known in list(wanted)[:5]) + (
                ", ..." if len(wanted) > 5 else ""
            )
            raise DataError(
                f"{source}: class {name!r} is not one of the {len(wanted)} class names ({shown})"
                f"{_did_you_mean(name, wanted)}"
            )
        if name in repeated:
            raise DataError(
                f"{source}: class {name!r} stands more than once in the class names; "
                "its label is not defined"
            )
    return [positions[name] for name in found]


def _reads(name: str) -> str:
    """Return how a name reads, without case, underscores and hyphens."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(re.split(r"[\s_-]+", plain.strip()))


def _did_you_mean(name: str, wanted: Sequence[str]) -> str:
    """Return the end of a message that names the class that may be meant; empty for none."""
    forms = {_reads(one): one for one in wanted}
    close = difflib.get_close_matches(_reads(name), list(forms), n=1, cutoff=0.75)
    return f"; did you mean {forms[close[0]]!r}? names must be equal" if close else ""
