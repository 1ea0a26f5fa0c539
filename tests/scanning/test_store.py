import json
import sqlite3
from pathlib import Path

import pytest

from pydetox.errors import DataError, OutputError, UsageError
from pydetox.scanning.store import RunStore, read_artifacts, read_events, read_part


def test_two_drivers_exclude_each_other(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run"), pytest.raises(UsageError, match="another scan"):
        RunStore(tmp_path / "run")
    RunStore(tmp_path / "run").close()


def test_half_a_line_is_forgotten_and_the_log_goes_on(tmp_path: Path) -> None:
    with RunStore(tmp_path) as store:
        store.event("one", name="a\nb\u2028\ud800")
        store.event("two")
    log = tmp_path / "events.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"event": "thr')
    assert [e["event"] for e in read_events(tmp_path)] == ["one", "two"]
    with RunStore(tmp_path) as store:
        assert [e["event"] for e in store.history] == ["one", "two"]
        store.event("four")
    assert [e["event"] for e in read_events(tmp_path)] == ["one", "two", "four"]
    assert log.read_bytes().startswith(whole)
    log.write_bytes(b'{"event": "half')
    with RunStore(tmp_path) as store:
        assert store.history == []
    assert log.read_bytes() == b""


@pytest.mark.parametrize("line", [b"garbage", b"[]", b'{"no": "event"}', b"\xff\xfe"])
def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path, line: bytes) -> None:
    RunStore(tmp_path).close()
    (tmp_path / "events.jsonl").write_bytes(line + b'\n{"event": "two"}\n')
    with pytest.raises(DataError, match="line 1"):
        RunStore(tmp_path)
    (tmp_path / "events.jsonl").unlink()
    RunStore(tmp_path).close()  # the lock has been given free


def test_a_run_keeps_its_configuration(tmp_path: Path) -> None:
    with RunStore(tmp_path) as store:
        store.bind({"steps": 3}, "digest")
        store.bind({"steps": 3}, "digest")
        with pytest.raises(UsageError, match="steps was 3 and is 4"):
            store.bind({"steps": 4}, "other")
        with pytest.raises(UsageError, match="files that it names"):
            store.bind({"steps": 3}, "other")
    (tmp_path / "config.json").write_text("{}")
    with RunStore(tmp_path) as store, pytest.raises(DataError, match="no run of pydetox"):
        store.bind({"steps": 3}, "digest")


def test_parts_and_triggers(tmp_path: Path) -> None:
    with RunStore(tmp_path) as store:
        assert not store.has_part("key")
        store.write_part("key", {"verdict": "clean", "p": float("inf")}, {"mask.png": b"png"})
        assert store.has_part("key")
        assert store.read_part("key")["p"] is None
    assert read_part(tmp_path, "key")["schema"] == "pydetox.part/1"
    assert read_artifacts(tmp_path, "key") == {"mask.png": b"png"}
    assert read_artifacts(tmp_path, "other") == {}
    for text in ("", "{}", "[]"):
        (tmp_path / "parts" / "key.json").write_text(text)
        with pytest.raises(DataError, match=r"key\.json"):
            read_part(tmp_path, "key")


def test_the_index_is_made_anew_even_from_rubbish(tmp_path: Path) -> None:
    RunStore(tmp_path).close()
    for content in (b"", b"rubbish" * 1000):
        (tmp_path / "index.sqlite").write_bytes(content)
        with RunStore(tmp_path) as store:
            store.index_record({"name": "a", "verdict": "clean", "p_l1": 0.25, "key": "k"})
        rows = sqlite3.connect(tmp_path / "index.sqlite").execute(
            "SELECT name, verdict, p_l1, reason FROM records"
        )
        assert list(rows) == [("a", "clean", 0.25, None)]


def test_a_calibration_is_only_used_with_its_key(tmp_path: Path) -> None:
    from pydetox.detect.calibration_file import read_calibration

    content = {"p_l1": [[0.5], [0.25]], "key": "search", "models": ["a", "b"]}
    content |= {
        "recorded_steps": [3],
        "history": [[[0.75], [0.5]]],
        "family": "patch",
        "others": [],
    }
    content["relative"] = False
    with RunStore(tmp_path) as store:
        assert store.read_calibration("key") is None
        store.write_calibration("key", content)
        assert store.read_calibration("key") == content
        assert store.read_calibration("other") is None
    assert json.loads((tmp_path / "calibration.json").read_text())["made_with"] == "key"
    read = read_calibration(tmp_path / "calibration.json").to_dict()
    assert {key: read[key] for key in content} == content


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        RunStore(tmp_path / "file" / "run")
