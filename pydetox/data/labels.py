"""Matching the class names that a data source brings with the class names that the caller wants."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import DataError
from .named_lists import imagenet_ids, named_class_names


def labels_mean_nothing(
    found: Sequence[str], wanted: Sequence[str] | None, *, labels_required: bool
) -> bool:
    """Return whether the data's classes are to be taken for no classes at all.

    That is so where nobody needs labels and no class of the data is among the wanted ones: a folder
    of photos that happens to have sub-folders. If some are among them the sub-folders are classes,
    and one that is not among them is more likely to be misspelt.
    """
    if labels_required or wanted is None or set(found) & set(wanted):
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
            )
        if name in repeated:
            raise DataError(
                f"{source}: class {name!r} stands more than once in the class names; "
                "its label is not defined"
            )
    return [positions[name] for name in found]
