"""Image sets and names written by the libraries that made the formats."""

from __future__ import annotations

import json

import pytest

NEEDED = ("datasets", "pyarrow", "webdataset", "medmnist", "clip_benchmark", "pandas")


@pytest.fixture(scope="module")
def found(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return json.loads(peer("sets_of_others.py", folder, needs=NEEDED).splitlines()[-1])


@pytest.mark.parametrize("library", ["datasets", "webdataset", "medmnist"])
def test_a_set_is_read_as_its_own_library_reads_it(found, library):
    sets = {name: one for name, one in found[library].items() if isinstance(one, dict)}
    assert len(sets) >= 2
    for name, one in sets.items():
        assert one["pixels"], name
        assert one["labels"], name
        assert len(one["names"]) == (8 if library == "medmnist" else 3), name
        assert library == "medmnist" or one["report"] is None, name


def test_the_lists_of_clip_benchmark(found):
    lists = found["clip-benchmark"]
    assert min(lists["lists"], lists["templates"], lists["cupl"]) > 0
    assert lists["wrong"] == []
