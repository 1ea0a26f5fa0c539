"""WebDataset shards: tar files whose members are the parts of samples.

Nothing is extracted. The archive is only listed, and a picture's bytes are read from its place in
the file. Names of members are never paths here, so a hostile name leads nowhere.
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

from ..errors import DataError
from .labels import labels_of_texts
from .lines import lines_of
from .listing import holds_images
from .parts import refuse_parts_in_files
from .report import ImageReport
from .rows import MAX_PICTURE_BYTES, Rows

SHARD_SUFFIX = ".tar"
_IMAGES = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "tif", "tiff"),
    *("jpe", "jfif", "pgm", "pbm", "pnm"),
)
_LABELS = ("cls", "label")
_MOST_SAMPLES = 20_000_000
#: Labels and JSON are short; larger members are not read.
_MOST_TEXT = 1 << 20
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NAMES_FILE = "classnames.txt"


class _Limited:
    """A file of which no call reads more than a picture has: headers may announce anything."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_PICTURE_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def shards_of(spec: str) -> list[Path] | None:
    """Return the tar files that a name means, as `files_of`; None if it means none."""
    return files_of(spec, SHARD_SUFFIX)


def files_of(spec: str, suffix: str) -> list[Path] | None:
    """Return the files with an ending that a name means; None if it means none.

    A name is that of a file, of a folder with such files, or a pattern with `*` or `{000..012}`.
    Raises DataError for a pattern that fits no file, for a numbered file that is missing, and for
    the files of several parts of a data set.
    """
    found = _BRACES.search(spec)
    if found is not None and spec.endswith(suffix):
        first, last = found.groups()
        if int(last) - int(first) >= 100_000:
            raise DataError(f"{spec}: {int(last) - int(first) + 1:,} shards; expected fewer")
        numbers = range(int(first), int(last) + 1)
        paths = [
            Path(spec[: found.start()] + str(k).zfill(len(first)) + spec[found.end() :])
            for k in numbers
        ]
        missing = [path for path in paths if not path.is_file()]
        if missing or not paths:
            raise DataError(f"{missing[0] if missing else spec}: no such shard")
        return paths
    path = Path(spec)
    if path.is_dir():
        return _files_in(path, suffix) or None
    if path.suffix != suffix:
        return None
    if any(sign in spec for sign in "*?[") and not path.exists():
        matches = [Path(p) for p in sorted(glob.glob(spec))]  # noqa: PTH207 - takes absolute ones
        if not matches:
            raise DataError(f"{spec}: no file matches")
        refuse_parts_in_files(matches, spec)
        return matches
    return [path] if path.is_file() else None


def _files_in(folder: Path, suffix: str) -> list[Path]:
    """Return the files of a folder with an ending, in order; none where it cannot be listed.

    Raises DataError for the files of several parts, and where the folder is one of classes, too.
    """
    try:
        entries = sorted(folder.iterdir())
        files = [p for p in entries if p.suffix == suffix and p.is_file()]
        if not files:
            return []
        pictures = [p for p in entries if p.is_dir() and p.name[0] != "." and holds_images(p)]
    except OSError:  # who reads it as a folder of images says so
        return []
    if len(pictures) > 1:
        raise DataError(
            f"{folder}: holds both {files[0].name} and folders of images ({pictures[0].name}); "
            f"name the one that is meant, {files[0]}, or move the file away"
        )
    refuse_parts_in_files(files, str(folder))
    return files


def rows_of_shards(paths: Sequence[Path], class_names: Sequence[str] | None = None) -> Rows:
    """Return the samples of WebDataset shards.

    Members with one name up to its first dot are one sample: a picture (`.jpg`, `.png`, ...) and,
    if known, its class (`.cls` with a number or a name, or `.json` with `label`). Where the names
    come again later, members in a row are a sample, as in the webdataset package. Class names come
    from `classnames.txt` beside the shards or one folder above, as CLIP_benchmark has it. Samples
    without a picture, links and other special members are left out and counted.

    class_names: The caller's names; None if there are none.

    Raises DataError for a file that is no tar file, or a compressed one, and for a member that
    stands twice in a sample.
    """
    name = str(paths[0]) if len(paths) == 1 else str(paths[0].parent)
    report = ImageReport(name)
    samples: list[tuple[Path, int, int]] = []
    keys: list[str] = []
    labels: list[Any] = []
    texts: dict[int, str] = {}  # what `.cls` members hold, by the place of the sample
    for path in paths:
        for key, parts in _samples(path, report):
            picture = next((parts[kind] for kind in _IMAGES if kind in parts), None)
            if picture is None:
                report.leave_out("samples without a picture", key)
                continue
            if picture[1] > MAX_PICTURE_BYTES:
                report.leave_out(f"of more than {MAX_PICTURE_BYTES:,} bytes", key)
                continue
            if len(samples) >= _MOST_SAMPLES:
                raise DataError(f"{name}: more than {_MOST_SAMPLES:,} samples")
            text = _class_text(path, parts)
            if text is not None:
                texts[len(samples)] = text
            samples.append((path, *picture))
            keys.append(key)
            labels.append(None if text is not None else _json_label(path, parts))
    if not samples:
        raise DataError(f"{name}: no pictures; expected members such as 000123.jpg and 000123.cls")

    beside = _names_beside(paths[0])
    read = labels_of_texts(list(texts.values()), class_names or beside, name)
    for place, label in zip(texts, read, strict=True):
        labels[place] = label

    def fetch(index: int) -> tuple[bytes, Any]:
        path, offset, size = samples[index]
        return _read(path, offset, size), labels[index]

    known = None if all(label is None for label in labels) else labels
    folders = sorted({key.rpartition("/")[0] for key in keys})
    if known is None and len(folders) > 1:
        shown = ", ".join(_shown(one or ".") for one in folders[:3])
        report.notes.append(
            f"{len(folders)} folders in it ({shown}{', ...' if len(folders) > 3 else ''}) are no "
            "classes in a WebDataset: unpack it and name the folder, if they are meant as classes"
        )
    return Rows(
        name,
        len(samples),
        fetch,
        known,
        beside,
        call=lambda index: keys[index],
        report=report,
    )


def _samples(path: Path, report: ImageReport) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Return the samples of one shard in order: key, and place and size of each part."""
    # One sample for each run of members with one key, in order.
    runs: list[tuple[str, dict[str, tuple[int, int]]]] = []
    try:
        with path.open("rb") as file:
            limited = cast("IO[bytes]", _Limited(file))
            with tarfile.open(fileobj=limited, mode="r:", errorlevel=0) as archive:
                size = path.stat().st_size
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                    if not member.isreg() or member.issparse():
                        if not member.isdir():
                            report.leave_out("no plain files", _shown(member.name))
                        continue
                    if member.offset_data + member.size > size:
                        report.leave_out("cut off", _shown(member.name))
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, kind = base.partition(".")
                    if not kind or base.startswith("."):
                        continue
                    key = f"{folder}/{stem}" if folder else stem
                    if not runs or runs[-1][0] != key:
                        runs.append((key, {}))
                    parts = runs[-1][1]
                    if kind.lower() in parts:
                        raise DataError(
                            f"{path}: {_shown(member.name)} stands twice in one sample; expected "
                            "samples with names of their own"
                        )
                    parts[kind.lower()] = (member.offset_data, member.size)
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    report.leave_out("archives that are cut off", path.name)
    except tarfile.TarError as error:
        raise DataError(
            f"{path}: cannot be read as a tar file: {error} (is it compressed? then unpack it with "
            "gunzip first)"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return _joined(runs)


def _joined(
    runs: list[tuple[str, dict[str, tuple[int, int]]]],
) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Return samples of which the parts may lie apart, such as all pictures before all labels.

    Runs with one key are one sample if each has other kinds of parts, and otherwise several.
    """
    kinds: dict[str, list[str]] = {}
    for key, parts in runs:
        kinds.setdefault(key, []).extend(parts)
    repeated = {key for key, found in kinds.items() if len(set(found)) < len(found)}
    joined: dict[str, dict[str, tuple[int, int]]] = {}
    samples = []
    for key, parts in runs:
        if key in joined and key not in repeated:
            joined[key].update(parts)
        else:
            joined[key] = parts
            samples.append((key, parts))
    return samples


def _class_text(path: Path, parts: dict[str, tuple[int, int]]) -> str | None:
    """Return the text that a sample has for its class; None if it has none."""
    for kind in _LABELS:
        if kind in parts and parts[kind][1] <= _MOST_TEXT:
            return _read(path, *parts[kind]).decode("utf-8", "replace").strip()
    return None


def _json_label(path: Path, parts: dict[str, tuple[int, int]]) -> Any:
    """Return the class that the JSON of a sample holds, as it is; None if there is none."""
    if "json" in parts and parts["json"][1] <= _MOST_TEXT:
        try:
            content = json.loads(_read(path, *parts["json"]))
        except (ValueError, RecursionError):
            return None
        if isinstance(content, dict):
            return content.get("label", content.get("cls"))
    return None


def _read(path: Path, offset: int, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _names_beside(path: Path) -> tuple[str, ...] | None:
    for folder in (path.parent, path.parent.parent):
        try:
            text = (folder / _NAMES_FILE).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            continue
        return tuple(line.strip() for line in lines_of(text) if line.strip())
    return None


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in name)[:80]
