"""The report on an image source: the images that were taken, and everything that was left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError
from .resize import Resizing

#: Reasons that are not mentioned, because nobody takes such files and folders for images.
EXPECTED = ("hidden or of the system", "no image by its name")
_NAMED = 3


@dataclass
class ImageReport:
    """A count of images, and of everything beside them that was not taken.

    Attributes:
        name: The folder or file that was read.
        images: The number of images that were taken.
        classes: The number of classes with at least one image; None for unlabelled images.
        left_out: The names of files and folders that were left out, in order, by reason.
        notes: Other lines about the images that were taken.
        resizing: The transform that made the pixels; None if the images had the right size.
    """

    name: str
    images: int = 0
    classes: int | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    resizing: Resizing | None = None

    def leave_out(self, reason: str, name: str) -> None:
        """Note one file or folder."""
        self.left_out.setdefault(reason, []).append(name)

    @property
    def problems(self) -> Mapping[str, list[str]]:
        """The names that were left out and could have been meant, by reason."""
        return {why: names for why, names in self.left_out.items() if why not in EXPECTED}

    def refuse(self) -> None:
        """Raise DataError if something was left out that could have been meant, or noted."""
        found = _listed(self.problems.items()) + self.notes
        if found:
            raise DataError(f"{self.name}: {'; '.join(found)}; expected nothing else (strict)")

    def line(self) -> str | None:
        """Return one line for a warning; None if there is nothing to warn about."""
        problems = _listed(self.problems.items())
        if not problems and not self.notes:
            return None
        taken = f"{self.images} images"
        if self.classes is not None:
            taken += f" of {self.classes} {'class' if self.classes == 1 else 'classes'}"
        parts = [f"left out: {', '.join(problems)}"] if problems else []
        return "; ".join([f"{self.name}: {taken}", *parts, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "images": self.images,
            "classes": self.classes,
            "left_out": [
                {"reason": why, "count": len(names), "first": names[:10]}
                for why, names in self.left_out.items()
            ],
            "notes": list(self.notes),
        }


def _listed(items: Iterable[tuple[str, list[str]]]) -> list[str]:
    return [
        f"{len(names)} {reason} ({', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''})"
        for reason, names in items
    ]
