"""A run folder: results that are finished stay on the disk, whatever happens next.

    runs/NAME/
      config.json            the configuration and its digest
      calibration.json       the clean references, if there is a base
      events.jsonl           the log, one JSON object per line; lines are only appended
      parts/KEY.json         one result, written once, whole or not at all
      triggers/KEY.*         its most suspect trigger: .safetensors and three pictures
      index.sqlite           a table of the last run, for queries; it is made from the rest
      lock                   locked while a driver is running

Only the driver writes, so workers need no agreement. KEY is a hash of the checkpoint's content, the
configuration and the code. A part is therefore valid for every scan that looks up its key.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from ..atomic import output_error, refuse_foreign_folder, write_file
from ..errors import DataError, UsageError
from ..reporting.serialize import to_json, to_plain
from .record import ScanRecord

CONFIG_SCHEMA = "pydetox.run/1"
PART_SCHEMA = "pydetox.part/1"
_EVENTS, _CONFIG, _CALIBRATION, _INDEX, _LOCK = (
    "events.jsonl",
    "config.json",
    "calibration.json",
    "index.sqlite",
    "lock",
)
_INDEX_SECONDS = 0.5  # how long to wait for somebody who reads the table
_COLUMNS = ("name", "verdict", "reason", "target", "p_l1", "score", "sha256", "duplicate_of", "key")


class RunStore:
    """A run folder that a driver writes to, as a context manager."""

    def __init__(
        self, folder: str | os.PathLike[str], warn: Callable[[str], None] | None = None
    ) -> None:
        """Open a run folder, and create it if it does not exist.

        warn: A function that is called with a line about a part that fails but is not needed, such
        as the index.

        Raises UsageError if another driver uses the folder, and OutputError if it cannot be
        written, or holds files of these names that are not of a run.
        """
        self.folder = Path(folder)
        refuse_foreign_folder(
            self.folder,
            (_EVENTS, _CONFIG, _CALIBRATION, _INDEX, "parts", "triggers"),
            {_LOCK: "$", _CONFIG: r'\{\s*"schema": "pydetox\.run/'},
        )
        self._warn = warn or (lambda message: None)
        try:
            for name in ("parts", "triggers"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise output_error(self.folder, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(self._lock)
                raise UsageError(
                    f"{self.folder}: another scan is at work in this run; "
                    "wait for it, or use another run folder"
                ) from error
            reason = error.strerror or error
            self._warn(
                f"{self.folder}: its drive cannot lock files ({reason}); see to it that no other "
                "scan works in this run"
            )
        self._events: FileIO | None = None
        self._index: sqlite3.Connection | None = None
        self._index_warned = False
        try:
            self.history = list(read_events(self.folder))
            self._events = self._open_events()
            self._index = self._open_index()
        except BaseException:
            self.close()
            raise

    def bind(
        self,
        configuration: Mapping[str, Any],
        digest: str,
        contents: Mapping[str, str] | None = None,
    ) -> None:
        """Write the configuration, or check that the run was made with the same one.

        configuration: Everything that decides the results. contents: The hashes of the files that
        it names, by attribute. Raises UsageError, which names the difference.
        """
        path = self.folder / _CONFIG
        contents = dict(contents or {})
        if not path.exists() or _is_blank(path):
            content = {
                "schema": CONFIG_SCHEMA,
                "digest": digest,
                "configuration": configuration,
                "contents": contents,
            }
            write_file(path, f"{to_json(content)}\n")
            return
        known = read_run_config(self.folder)
        if known["digest"] == digest:
            return
        old = known["configuration"]
        changed = [k for k, v in configuration.items() if k not in old or old[k] != v]
        then = known.get("contents") or {}
        files = [k for k in contents if k in then and then[k] != contents[k]]
        # A path may change as long as it leads to the same content.
        changed = [k for k in changed if k not in contents or k in files or k not in then]
        if files and files[0] not in configuration:
            what = f"the {files[0].replace('_', ' ')} has changed"
        elif files and (not changed or changed[0] in files):
            what = f"what {files[0]} names ({configuration.get(files[0])}) has changed"
        elif changed:
            what = f"{changed[0]} was {old.get(changed[0])!r} and is {configuration[changed[0]]!r}"
        else:
            what = "the files that it names have changed"
        raise UsageError(
            f"{self.folder}: the run was made with another configuration: {what}; give the new "
            "one a run of its own"
        )

    def event(self, event: str, **particulars: Any) -> None:
        """Append a line to the log."""
        assert self._events is not None
        size = os.fstat(self._events.fileno()).st_size
        line = {"time": round(time.time(), 3), "event": event, **particulars}
        try:
            data = memoryview(f"{to_json(line, indent=None)}\n".encode())
            while data:
                data = data[self._events.write(data) :]
        except OSError as error:
            # A partly written line must not become the beginning of the next one.
            with contextlib.suppress(OSError):
                os.ftruncate(self._events.fileno(), size)
            raise output_error(self.folder / _EVENTS, error) from error

    def surveys(self, code: str) -> dict[tuple[str, tuple[int, ...]], dict[str, Any]]:
        """Return the surveys that the same code made, by name and signature.

        Surveys by other code are left out, because it may have refused a file that this code reads,
        or the other way round. Skipped checkpoints are left out, too, because the limits are no
        part of a run's configuration.
        """
        return {
            (line["name"], tuple(line["signature"])): line["value"]
            for line in self.history
            if line["event"] == "surveyed"
            and line.get("code") == code
            and line.get("signature")
            and "skipped" not in line["value"].get("result", {})
        }

    def has_part(self, key: str) -> bool:
        """Whether a result exists."""
        return (self.folder / "parts" / f"{key}.json").exists()

    def read_part(self, key: str) -> dict[str, Any]:
        """Return a result; DataError if it is damaged."""
        return read_part(self.folder, key)

    def write_part(
        self, key: str, content: Mapping[str, Any], artifacts: Mapping[str, bytes]
    ) -> None:
        """Write a result. Triggers come first, so that an existing part is complete."""
        for name, data in artifacts.items():
            write_file(self.folder / "triggers" / f"{key}.{name}", data)
        part = {"schema": PART_SCHEMA, "key": key, **content}
        write_file(self.folder / "parts" / f"{key}.json", f"{to_json(part)}\n")

    def read_calibration(self, key: str) -> dict[str, Any] | None:
        """Return the calibration that was made under a key, or None."""
        try:
            content = json.loads((self.folder / _CALIBRATION).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or content.get("made_with") != key:
            return None
        content.pop("made_with")
        content.pop("schema", None)
        return content

    def write_calibration(self, key: str, calibration: Mapping[str, Any]) -> None:
        """Write a calibration, in the format of `detect.calibration_file`."""
        from ..detect.calibration_file import CALIBRATION_SCHEMA

        content = {"schema": CALIBRATION_SCHEMA, "made_with": key, **calibration}
        write_file(self.folder / _CALIBRATION, f"{to_json(content)}\n")

    def keep_record(self, record: ScanRecord) -> None:
        """Note in the log and the table that a record is there."""
        self.event(
            "record",
            name=record.name,
            key=record.key,
            verdict=record.verdict,
            duplicate_of=record.duplicate_of,
            resumed=record.resumed,
        )
        self.index_record(record.to_dict())

    def index_record(self, record: Mapping[str, Any]) -> None:
        """Add a record to the table.

        The table is derived from the parts. If it cannot be written, one warning says so, and the
        scan continues. While another program reads the table, records wait until it has finished.
        """
        if self._index is None:
            return
        row = [to_plain(record.get(column)) for column in _COLUMNS]
        marks = ", ".join("?" * len(row))
        try:
            self._index.execute(f"INSERT OR REPLACE INTO records VALUES ({marks})", row)
            self._index.commit()
        except sqlite3.Error as error:
            if not self._index_warned:
                self._warn(f"{self.folder / _INDEX}: cannot be written now: {error}")
                self._index_warned = True

    def close(self) -> None:
        """Close all files and unlock the folder. A second call does nothing."""
        if self._index is not None:
            with contextlib.suppress(sqlite3.Error):
                self._index.commit()
            with contextlib.suppress(sqlite3.Error):
                self._index.close()
            self._index = None
        if self._events is not None:
            with contextlib.suppress(OSError):  # nothing is buffered
                self._events.close()
            self._events = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_events(self) -> FileIO:
        path = self.folder / _EVENTS
        file = path.open("ab", buffering=0)
        # A driver was killed while it wrote a line. Remove the incomplete line.
        size = path.stat().st_size
        if size:
            with path.open("rb+") as old:
                keep = _whole_lines(old, size)
                if keep != size:
                    old.truncate(keep)
        return file

    def _open_index(self) -> sqlite3.Connection | None:
        """Make a new table every time, so that a damaged one cannot stop a scan.

        Return None, after a warning, if the drive does not support a database.
        """
        path = self.folder / _INDEX
        columns = ", ".join(f"{c} {'REAL' if c in ('p_l1', 'score') else 'TEXT'}" for c in _COLUMNS)
        index = None
        try:
            for suffix in ("", "-journal", "-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            index = sqlite3.connect(path, timeout=_INDEX_SECONDS)
            index.execute("PRAGMA synchronous = OFF")
            index.execute(f"CREATE TABLE records ({columns}, PRIMARY KEY (name))")
            index.commit()
        except (sqlite3.Error, OSError) as error:
            self._warn(f"{path}: there is no table of this scan: {error}")
            if index is not None:
                index.close()
            return None
        return index


def read_events(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the events of a run; DataError for a damaged line other than the last one."""
    path = Path(folder) / _EVENTS
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: half a line
        # A power cut may leave a block of NULs in place of a line. That line is lost, and the next
        # one may have begun within the block.
        whole = line.strip(b"\0")
        if whole != line and not whole:
            continue
        try:
            content = json.loads(whole)
        except (ValueError, RecursionError) as error:
            if b"\0" in line:
                continue
            raise DataError(f"{path}, line {number}: is damaged") from error
        if not isinstance(content, dict) or not isinstance(content.get("event"), str):
            raise DataError(f"{path}, line {number}: is damaged")
        yield content


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like one that `RunStore` made."""
    return (Path(folder) / _EVENTS).is_file() and (Path(folder) / "parts").is_dir()


def read_run_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a run's configuration; DataError if there is none."""
    path = Path(folder) / _CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != CONFIG_SCHEMA:
        raise DataError(f'{path}: no run of pydetox: expected "schema": "{CONFIG_SCHEMA}"')
    return content


def read_part(folder: str | os.PathLike[str], key: str) -> dict[str, Any]:
    """Return a result of a run; DataError if it is missing or damaged."""
    path = Path(folder) / "parts" / f"{key}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != PART_SCHEMA:
        raise DataError(f'{path}: no result: expected "schema": "{PART_SCHEMA}"')
    return content


def read_artifacts(folder: str | os.PathLike[str], key: str) -> dict[str, bytes]:
    """Return the trigger files of a result, by their name without the key; empty without any."""
    names = ("trigger.safetensors", "mask.png", "pattern.png", "stamped.png")
    found = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found[name] = (Path(folder) / "triggers" / f"{key}.{name}").read_bytes()
    return found


def _is_blank(path: Path) -> bool:
    """Whether a file is empty or all NULs, as a power cut may leave it."""
    try:
        return not path.read_bytes().strip(b"\0")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _whole_lines(file: BinaryIO, size: int) -> int:
    """Return the length of the longest prefix of the file that ends with a newline."""
    end = size
    while end:
        start = max(0, end - (1 << 16))
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
