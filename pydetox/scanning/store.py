"""A run on the disk: what is done stays done, whatever happens next.

    runs/NAME/
      config.json            the configuration and its digest
      calibration.json       the clean references, if there is a base
      events.jsonl           what happened, one JSON object per line, only ever appended to
      parts/KEY.json         one result, written once, whole or not at all
      triggers/KEY.*         its most suspect trigger: .safetensors and three pictures
      index.sqlite           a table over the last run, for queries; made again from the rest
      lock                   held while a driver is at work

Only the driver writes, so that nothing has to be agreed on between workers. KEY is a hash of the
checkpoint's content, the configuration and the code: a part is valid wherever its key is asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..atomic import output_error, write_file
from ..errors import DataError, UsageError
from ..reporting.serialize import to_json, to_plain

CONFIG_SCHEMA = "pydetox.run/1"
PART_SCHEMA = "pydetox.part/1"
_EVENTS, _CONFIG, _CALIBRATION, _INDEX, _LOCK = (
    "events.jsonl",
    "config.json",
    "calibration.json",
    "index.sqlite",
    "lock",
)
_COLUMNS = ("name", "verdict", "reason", "target", "p_l1", "score", "sha256", "duplicate_of", "key")


class RunStore:
    """A run folder that a driver works on. A context manager."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open a run folder, making it if it is not there.

        Raises UsageError when another driver is at work in it, OutputError when it cannot be
        written.
        """
        self.folder = Path(folder)
        try:
            for name in ("parts", "triggers"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise output_error(self.folder, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise UsageError(f"{self.folder}: another scan is at work in this run") from error
        self._events: BinaryIO | None = None
        self._index: sqlite3.Connection | None = None
        try:
            self.history = list(read_events(self.folder))
            self._events = self._open_events()
            self._index = self._open_index()
        except BaseException:
            self.close()
            raise

    def bind(self, configuration: Mapping[str, Any], digest: str) -> None:
        """Write the configuration, or check that the run was made with the same one.

        configuration: what decides the results. Raises UsageError, naming the difference.
        """
        path = self.folder / _CONFIG
        if not path.exists():
            content = {"schema": CONFIG_SCHEMA, "digest": digest, "configuration": configuration}
            write_file(path, f"{to_json(content)}\n")
            return
        known = read_run_config(self.folder)
        if known["digest"] == digest:
            return
        old = known["configuration"]
        changed = [k for k, v in configuration.items() if k not in old or old[k] != v]
        what = (
            f"{changed[0]} was {old.get(changed[0])!r} and is {configuration[changed[0]]!r}"
            if changed
            else "the files that it names have changed"
        )
        raise UsageError(
            f"{self.folder}: the run was made with another configuration: {what}; give the new "
            "one a run of its own"
        )

    def event(self, event: str, **particulars: Any) -> None:
        """Append a line to the log."""
        assert self._events is not None
        line = {"time": round(time.time(), 3), "event": event, **particulars}
        try:
            self._events.write(f"{to_json(line, indent=None)}\n".encode())
            self._events.flush()
        except OSError as error:
            raise output_error(self.folder / _EVENTS, error) from error

    def surveys(self, code: str) -> dict[tuple[str, tuple[int, ...]], dict[str, Any]]:
        """Return what surveys by the same code found, by name and signature.

        Surveys by other code are left out: it may have refused what this code reads, or read what
        this code refuses. A checkpoint that was skipped is left out, too, because the limits are no
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
        """Whether a result is there."""
        return (self.folder / "parts" / f"{key}.json").exists()

    def read_part(self, key: str) -> dict[str, Any]:
        """Return a result; DataError when it is damaged."""
        return read_part(self.folder, key)

    def write_part(
        self, key: str, content: Mapping[str, Any], artifacts: Mapping[str, bytes]
    ) -> None:
        """Write a result: triggers first, so that a part that is there is complete."""
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
        """Keep a calibration; the file is one that `--calibration` reads, too."""
        from ..detect.calibration_file import CALIBRATION_SCHEMA

        content = {"schema": CALIBRATION_SCHEMA, "made_with": key, **calibration}
        write_file(self.folder / _CALIBRATION, f"{to_json(content)}\n")

    def index_record(self, record: Mapping[str, Any]) -> None:
        """Put a record into the table."""
        assert self._index is not None
        row = [to_plain(record.get(column)) for column in _COLUMNS]
        marks = ", ".join("?" * len(row))
        self._index.execute(f"INSERT OR REPLACE INTO records VALUES ({marks})", row)
        self._index.commit()

    def close(self) -> None:
        """Close everything and give the folder free; may be called twice."""
        if self._index is not None:
            with contextlib.suppress(sqlite3.Error):
                self._index.commit()
            self._index.close()
            self._index = None
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_events(self) -> BinaryIO:
        path = self.folder / _EVENTS
        file = path.open("ab")
        # A driver that was killed in the middle of a line: the line says nothing, and goes.
        size = path.stat().st_size
        if size:
            with path.open("rb+") as old:
                keep = _whole_lines(old, size)
                if keep != size:
                    old.truncate(keep)
        return file

    def _open_index(self) -> sqlite3.Connection:
        """A new table every time: it is derived, and a damaged one must not stop a scan."""
        path = self.folder / _INDEX
        for suffix in ("", "-journal", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        index = sqlite3.connect(path)
        index.execute("PRAGMA synchronous = OFF")
        columns = ", ".join(f"{c} {'REAL' if c in ('p_l1', 'score') else 'TEXT'}" for c in _COLUMNS)
        index.execute(f"CREATE TABLE records ({columns}, PRIMARY KEY (name))")
        index.commit()
        return index


def read_events(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the events of a run; DataError for a damaged line that is not the last one."""
    path = Path(folder) / _EVENTS
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: half a line
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: is damaged") from error
        if not isinstance(content, dict) or not isinstance(content.get("event"), str):
            raise DataError(f"{path}, line {number}: is damaged")
        yield content


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like one that `RunStore` has made."""
    return (Path(folder) / _EVENTS).is_file() and (Path(folder) / "parts").is_dir()


def read_run_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a run's configuration; DataError when there is none."""
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
    """Return a result of a run; DataError when it is not there or damaged."""
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
    """Return the trigger files of a result, by name without the key; empty if there are none."""
    names = ("trigger.safetensors", "mask.png", "pattern.png", "stamped.png")
    found = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found[name] = (Path(folder) / "triggers" / f"{key}.{name}").read_bytes()
    return found


def _whole_lines(file: BinaryIO, size: int) -> int:
    """Return how many bytes from the start end with a newline."""
    end = size
    while end:
        start = max(0, end - (1 << 16))
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
