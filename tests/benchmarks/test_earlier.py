"""Tests of adding rows of earlier runs to a benchmark's tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.earlier import read_earlier, with_earlier
from pydetox.errors import DataError


def test_what_was_measured_last_counts(tmp_path: Path) -> None:
    rows = [{"name": "a", "asr": 0.5}, {"name": "b", "asr": 0.25}]
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    paths[0].write_text(json.dumps({"verdicts": {"rows": rows}}))
    paths[1].write_text(json.dumps({"verdicts": {"rows": [{"name": "b", "asr": 0.1}]}}))
    known = read_earlier(paths, "verdicts")
    found = with_earlier([{"name": "c", "asr": 0.0}], known, "rows", ("name",))
    assert [(row["name"], row["asr"]) for row in found] == [("a", 0.5), ("b", 0.1), ("c", 0.0)]
    assert with_earlier([{"name": "a", "asr": 1.0}], known, "rows", ("name",))[0]["asr"] == 1.0
    assert with_earlier(rows, [], "rows", ("name",)) == rows


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("{", "[]", '{"verdicts": 3}', '{"other": {"rows": []}}'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"a\.json"):
            with_earlier([], read_earlier([path], "verdicts"), "rows", ("name",))
