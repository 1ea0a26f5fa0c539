"""Which files of a folder are images, and of which class; nothing but folders is opened here."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .labels import index_of_names, labels_mean_nothing
from .parts import PARTS
from .report import ImageReport

#: Files with other endings are not read.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)

#: Endings of photographs and drawings that Pillow does not read, or only with what is not there.
_OTHER_IMAGES = re.compile(
    r"\.(heic|heif|hif|avif|jxl|jp2|j2k|svg|psd|dng|cr2|cr3|nef|arw|orf|rw2|raf|exr|hdr"
    r"|apng|dib|eps|icns|ico|jpc|jpf|jpx|mpo|pcx|pfm|sgi|tga|xbm|xpm)$"
)

#: Folders that systems and programs make beside people's images, in small letters.
_SYSTEM_FOLDERS = frozenset(
    {
        "@eadir",
        "#recycle",
        "@recycle",
        "@recently-snapshot",
        "__macosx",
        "__pycache__",
        "$recycle.bin",
        "lost+found",
        "system volume information",
    }
)


@dataclass
class Listing:
    """The images of a folder, in order.

    Attributes:
        paths: The files; by class, then by relative path.
        labels: int64 [N], or None for unlabelled ones.
        class_names: Label k means class_names[k]; None where nobody names any.
        report: What was left out so far.
    """

    paths: list[Path]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None
    report: ImageReport


def list_images(
    directory: Path, class_names: tuple[str, ...] | None, *, labels_required: bool
) -> Listing:
    """List the images of a folder; see `pydetox.data.load_images` for arguments and errors."""
    _refuse_saved(directory)
    report = ImageReport(str(directory))
    walk = _Walk(directory, report)
    folders, flat = walk.top()
    if not folders or (flat and len(flat) >= len(folders)):
        if folders:
            raise DataError(
                f"{directory}: holds both images ({flat[0].name}) and folders "
                f"({folders[0].name}); expected one folder per class, or images only"
            )
        if not flat:
            raise DataError(
                f"{directory}: zero images; expected one folder per class, or files ending in "
                + ", ".join(IMAGE_SUFFIXES)
                + _left_out_hint(report)
            )
        return Listing(flat, None, class_names, report)
    for path in flat:
        report.leave_out("beside the class folders", path.name)

    found = tuple(unicodedata.normalize("NFC", folder.name) for folder in folders)
    _refuse_other_numbers(directory, found, class_names, labels_required=labels_required)
    if labels_mean_nothing(found, class_names, labels_required=labels_required) and not _numbered(
        found, class_names
    ):
        inside = [(folder, walk.below(folder)) for folder in folders]
        filled = [folder for folder, paths in inside if paths]
        _refuse_wrapper(directory, filled, class_names, labels_required=labels_required)
        unlabelled = [path for _, paths in inside for path in paths]
        if not unlabelled:
            raise _without_images(directory, folders, report)
        return Listing(unlabelled, None, class_names, report)
    _refuse_parts(directory, found, class_names)
    _refuse_twins(directory, found, class_names)

    members = {name: walk.below(folder) for name, folder in zip(found, folders, strict=True)}
    for name, paths in members.items():
        if not paths:
            report.leave_out("without an image that is read, and no class here", name)
    kept = [name for name in found if members[name]]
    if not kept:
        raise _without_images(directory, folders, report)
    filled = [folder for folder, name in zip(folders, found, strict=True) if members[name]]
    _refuse_wrapper(directory, filled, class_names, labels_required=labels_required)
    if class_names is None and all(map(_is_number, kept)):
        kept.sort(key=int)  # "10" after "9": people number classes from 0 in the order of labels
    if _numbered(kept, class_names):
        index_of = [int(name) for name in kept]
    else:
        index_of = index_of_names(kept, class_names, str(directory))
    paths, labels = [], []
    # By label, not by folder name, so that a caller's order of classes also orders the images.
    for label, name in sorted(zip(index_of, kept, strict=True)):
        paths += members[name]
        labels += [label] * len(members[name])
    names = class_names if class_names is not None else tuple(kept)
    return Listing(paths, np.asarray(labels, dtype=np.int64), names, report)


def holds_images(folder: Path) -> bool:
    """Return whether a folder itself holds a file that is an image by its name."""
    return any(p.name.lower().endswith(IMAGE_SUFFIXES) for p in folder.iterdir())


class _Walk:
    """Looks through a folder and notes what is left out."""

    def __init__(self, root: Path, report: ImageReport) -> None:
        self._root = root
        self._real_root = os.path.realpath(root)
        self._report = report

    def top(self) -> tuple[list[Path], list[Path]]:
        """Return sub-folders and images of the folder itself, each by name."""
        try:
            entries = sorted(self._root.iterdir(), key=lambda path: path.name)
        except OSError as error:
            raise DataError(
                f"{self._root}: cannot list the folder: {error.strerror or error}"
            ) from error
        return self._sort(entries)

    def below(self, folder: Path) -> list[Path]:
        """Return the images of a folder and of all folders in it, by their relative paths."""
        found: list[Path] = []
        seen: set[str] = set()
        pending = [folder]
        while pending:
            current = pending.pop()
            # A folder that a link leads to is read once, whatever links lead there.
            real = os.path.realpath(current)
            if real in seen:
                self._leave_out("links in a circle", current)
                continue
            seen.add(real)
            try:
                entries = sorted(current.iterdir(), key=lambda path: path.name)
            except OSError as error:
                self._leave_out(f"folders that cannot be listed: {error.strerror}", current)
                continue
            inner, images = self._sort(entries)
            pending += inner
            found += images
        return sorted(found, key=lambda path: path.relative_to(folder).as_posix())

    def _sort(self, entries: Sequence[Path]) -> tuple[list[Path], list[Path]]:
        folders, images = [], []
        for path in entries:
            name = path.name
            small = name.lower()
            if name.startswith(".") or small in _SYSTEM_FOLDERS:
                self._leave_out("hidden or of the system", path)
            elif path.is_dir():
                if path.is_symlink() and self._leads_back(path):
                    self._leave_out("links back into the folder", path)
                else:
                    folders.append(path)
            elif path.is_symlink() and not path.exists():
                self._leave_out("links that lead nowhere", path)
            elif small.endswith(IMAGE_SUFFIXES) and path.is_file():
                images.append(path)
            elif _OTHER_IMAGES.search(small):
                self._leave_out("of a format that is not read", path)
            else:
                self._leave_out("no image by its name", path)
        return folders, images

    def _leads_back(self, link: Path) -> bool:
        """Return whether what a link leads to is read anyway, or holds what is being read."""
        real = os.path.realpath(link)
        common = os.path.commonpath([real, self._real_root])
        return common in (real, self._real_root)

    def _leave_out(self, reason: str, path: Path) -> None:
        self._report.leave_out(reason, path.relative_to(self._root).as_posix())


def _refuse_parts(directory: Path, found: Sequence[str], class_names: Sequence[str] | None) -> None:
    if class_names is None and all(name.lower() in PARTS for name in found):
        raise DataError(
            f"{directory}: its folders are the parts of a data set ({', '.join(found)}), not "
            f"classes; name one of them, such as {directory / found[-1]}"
        )


def _refuse_saved(directory: Path) -> None:
    """Raise DataError for what `save_to_disk` of Hugging Face's datasets writes."""
    if (directory / "dataset_dict.json").is_file() or (
        (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()
    ):
        raise DataError(
            f"{directory}: was written by save_to_disk of Hugging Face's datasets; expected "
            "parquet files or a folder of images: write one part of it with to_parquet"
        )


def _refuse_wrapper(
    directory: Path,
    folders: Sequence[Path],
    class_names: Sequence[str] | None,
    *,
    labels_required: bool,
) -> None:
    """Raise DataError for a single folder that holds the folders of classes, and no images."""
    if len(folders) != 1 or (
        class_names and unicodedata.normalize("NFC", folders[0].name) in class_names
    ):
        return
    place, seen = folders[0], set[str]()
    while os.path.realpath(place) not in seen:
        seen.add(os.path.realpath(place))
        try:
            entries = sorted(place.iterdir())
        except OSError:  # who reads it says so
            return
        inner = [p for p in entries if p.is_dir() and p.name[0] not in "._@$"]
        if any(p.name.lower().endswith(IMAGE_SUFFIXES) for p in entries) or not inner:
            return
        if len(inner) > 1:
            names = [p.name for p in inner]
            if class_names is None or labels_required or set(names) & set(class_names):
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                raise DataError(
                    f"{directory}: its only folder, {folders[0].name}, holds no images but the "
                    f"folders {shown}; if these are the classes, name {place}"
                )
            return
        place = inner[0]


def _refuse_other_numbers(
    directory: Path,
    found: Sequence[str],
    class_names: Sequence[str] | None,
    *,
    labels_required: bool,
) -> None:
    """Raise DataError for folders that number classes otherwise than from 0.

    Where nobody needs labels, numbers may as well be years or months. Then only those are refused
    that look like all of the classes, from 1 on, or begin with 0.
    """
    if class_names is None or set(found) & set(class_names) or _numbered(found, class_names):
        return
    if not all(map(_is_padded, found)) or len(set(map(int, found))) < len(found):
        return
    low, high, count = min(map(int, found)), max(map(int, found)), len(class_names)
    if (low <= 1 or high <= count) if labels_required else low == 0 or (low, high) == (1, count):
        raise DataError(
            f"{directory}: its folders are the numbers {low}..{high}, which count classes from 0; "
            f"expected a folder 0, and none above {count - 1} for the {count} class names: name "
            "the folders as the classes"
        )


def _refuse_twins(directory: Path, found: Sequence[str], class_names: Sequence[str] | None) -> None:
    """Raise DataError for class folders that a person would take for one and the same."""
    seen: dict[str, str] = {}
    for name in found:
        alike = unicodedata.normalize("NFKC", name).casefold()
        other = seen.setdefault(alike, name)
        if other is not name and not (class_names and {name, other} <= set(class_names)):
            what = "case" if other != name else "how Unicode writes them"
            raise DataError(
                f"{directory}: the class folders {other!r} and {name!r} differ in {what} alone; "
                "put their images into one folder, or name both with class_names="
            )


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and name == str(int(name))


def _is_padded(name: str) -> bool:
    """Return whether a name is a number, also with zeros before it."""
    return name.isascii() and name.isdigit() and len(name) < 16


def _numbered(found: Sequence[str], class_names: Sequence[str] | None) -> bool:
    """Return whether the folders are numbers of classes that the caller names: 0, 1, 2, ..."""
    return (
        class_names is not None
        and not set(found) & set(class_names)
        and all(_is_padded(name) and int(name) < len(class_names) for name in found)
        and len(set(map(int, found))) == len(found)
        and 0 in map(int, found)
    )


def _left_out_hint(report: ImageReport) -> str:
    line = report.line()
    return "" if line is None else f" ({line.partition('; ')[2]})"


def _without_images(directory: Path, folders: Sequence[Path], report: ImageReport) -> DataError:
    """Return the error for folders without images; it names shards or parquet files in them."""
    hint = ""
    for folder in folders:
        for suffix in (".parquet", ".tar"):
            if not hint and next(folder.glob(f"*{suffix}"), None) is not None:
                hint = f"; {folder.name} holds {suffix} files: name {folder}"
    return DataError(f"{directory}: zero images in its folders{_left_out_hint(report)}{hint}")
