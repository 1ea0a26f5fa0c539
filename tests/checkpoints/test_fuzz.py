"""Mutated files: an error of ours, or the tensors that torch or safetensors reads; nothing else.

Nothing else means: no other exception, no import, no weights that another reader would not see.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pydetox.checkpoints.formats import index_file
from pydetox.checkpoints.index import FileIndex, WeightsFile
from pydetox.checkpoints.index_json import from_json, to_json
from pydetox.checkpoints.pickle_index import read_pickle
from pydetox.checkpoints.shards import read_shard_index
from pydetox.checkpoints.weights import read_weights
from pydetox.errors import CheckpointError
from tests.checkpoints.zip_writer import torch_members, zip_bytes

CASES = 10_000
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

Mutation = tuple[str, int, int, int]
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "flip", "delete", "repeat", "insert", "cut"]),
        st.integers(0, 1 << 16),
        st.integers(0, 255),
        st.sampled_from([1, 1, 2, 4, 16]),
    ),
    min_size=1,
    max_size=4,
)


def mutate(raw: bytes, mutations: list[Mutation]) -> bytes:
    """Change, delete, repeat or insert a few bytes, or cut the file."""
    mutated = bytearray(raw)
    for action, position, byte, length in mutations:
        at = position % max(1, len(mutated))
        if action == "set":
            mutated[at : at + 1] = [byte]
        elif action == "flip" and mutated:
            mutated[at] ^= 1 << byte % 8
        elif action == "delete":
            del mutated[at : at + length]
        elif action == "repeat":
            mutated[at:at] = mutated[at : at + length]
        elif action == "insert":
            mutated[at:at] = bytes([byte]) * length
        elif action == "cut" and byte < 32:
            del mutated[at:]
    return bytes(mutated)


def check_message(error: CheckpointError) -> None:
    assert str(error).isprintable()


@contextmanager
def file_of(raw: bytes, name: str) -> Iterator[WeightsFile]:
    """A file in memory."""
    descriptor = os.memfd_create(name)
    os.write(descriptor, raw)
    with WeightsFile(name, descriptor) as file:
        yield file


def read(raw: bytes, name: str) -> tuple[FileIndex, dict[str, torch.Tensor]] | None:
    """Index and tensors, or None when the file is refused."""
    modules = len(sys.modules)
    try:
        with file_of(raw, name) as file:
            index = index_file(file)
            assert from_json(to_json(index), len(raw)) == index  # the sandbox would let it through
            return index, read_weights(file, index)[0]
    except CheckpointError as error:
        check_message(error)
        return None
    finally:
        assert len(sys.modules) == modules


def example() -> dict[str, object]:
    base = torch.arange(6.0).reshape(2, 3)
    state = {
        "module.a": base,
        "module.b": base.t(),
        "module.c": torch.tensor([1, 2], dtype=torch.int16),
    }
    return {"epoch": 3, "state_dict": state, "lr": 0.1, "list": [1, None, (True, 2**40)]}


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


PT = saved(example())
STATE = {"a": torch.ones(3), "bb": torch.arange(4.0).reshape(2, 2).half(), "c": torch.tensor(5)}
SAFETENSORS = safetensors.torch.save(STATE, metadata={"x": "y"})


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(as_bytes(other), as_bytes(tensor))  # NaN equals NaN


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    # contiguous() keeps a stride of 0 where there is one element, which view() refuses.
    dense = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return dense.reshape(-1).view(torch.uint8)


@pytest.mark.slow
def test_mutated_files_agree_with_torch() -> None:
    """What is accepted, torch accepts: checksums, byte order and versions included."""
    accepted = 0

    @fuzz
    @given(MUTATIONS)
    def run(mutations: list[Mutation]) -> None:
        nonlocal accepted
        raw = mutate(PT, mutations)
        found = read(raw, "a.pt")
        if found is None or any(f.rule == "unknown-global" for f in found[0].findings):
            return
        accepted += 1
        expected = torch.load(io.BytesIO(raw), weights_only=True)["state_dict"]
        assert_same(found[1], {name.removeprefix("module."): t for name, t in expected.items()})

    assert read(PT, "a.pt") is not None
    run()
    assert CASES / 50 < accepted < CASES * 0.9  # both branches were taken


@pytest.mark.slow
def test_mutated_pickles() -> None:
    """Mutations inside the pickle, with checksums that fit: the checks behind them are tested."""
    accepted = 0
    with zipfile.ZipFile(io.BytesIO(PT)) as archive:
        root = archive.namelist()[0].split("/")[0]
        pickled = archive.read(f"{root}/data.pkl")
        storages = {key: archive.read(f"{root}/data/{key}") for key in ("0", "1")}

    @fuzz
    @given(MUTATIONS)
    def run(mutations: list[Mutation]) -> None:
        nonlocal accepted
        raw = zip_bytes(torch_members(mutate(pickled, mutations), storages))
        found = read(raw, "a.pt")
        if found is None:
            return
        accepted += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = torch.load(io.BytesIO(raw), weights_only=True)
            except Exception:  # noqa: BLE001
                return  # torch builds the rest of the checkpoint too; we only look at the weights
        # A single set of weights is taken under any key, but where loaders look for it comes first.
        key = found[0].weights_key
        assert key == "state_dict" or "state_dict" not in expected
        weights = expected[key] if key else expected
        prefixed = all(name.startswith("module.") for name in weights)
        theirs = {n.removeprefix("module.") if prefixed else n: t for n, t in weights.items()}
        assert_same(found[1], theirs)

    run()
    assert accepted > CASES / 50


@pytest.mark.slow
def test_mutated_safetensors_agree_with_the_library() -> None:
    accepted = 0

    @fuzz
    @given(MUTATIONS)
    def run(mutations: list[Mutation]) -> None:
        nonlocal accepted
        raw = mutate(SAFETENSORS, mutations)
        found = read(raw, "a.safetensors")
        if found is not None:
            accepted += 1
            assert_same(found[1], safetensors.torch.load(raw))

    assert read(SAFETENSORS, "a.safetensors") is not None
    run()
    assert accepted > CASES / 50  # mutations of weights are no damage that the format can show


NAMES = [
    b"ccollections\nOrderedDict\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"csomeproject\nOptions\n",
]
CODES = [bytes([code]) for code in b"()]}Nu\x85\x86\x87taesbR\x81Qq\0h\0K\1X\1\0\0\0ac"]


@pytest.mark.slow
def test_random_instructions() -> None:
    """Random programs of valid instructions: an inert result or an error of ours."""

    @settings(fuzz, max_examples=5000)
    @given(st.lists(st.sampled_from(CODES + NAMES * 3), max_size=40))
    def run(parts: list[bytes]) -> None:
        try:
            read_pickle(b"\x80\x02" + b"".join(parts) + b".")
        except CheckpointError as error:
            check_message(error)

    run()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["weight_map", "a", "__metadata__"]), inner, max_size=3)
    ),
    max_leaves=8,
)
TENSORS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "__metadata__", "", "\u00e4", "\ud800"]),
        st.sampled_from([("F32", 4), ("F16", 2), ("BOOL", 1), ("I64", 8), ("F4", 1)]),
        st.lists(st.integers(0, 3), max_size=3),
    ),
    min_size=1,
    max_size=3,
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["dtype", "shape", "data_offsets", "more"]), JSON),
    max_size=1,
)


@pytest.mark.slow
def test_random_headers_agree_with_the_library() -> None:
    """Headers that are right or nearly so, in ways that flipped bytes do not find."""
    accepted = 0

    @settings(fuzz, max_examples=4000)
    @given(TENSORS, CHANGES, st.sampled_from(["", "", '"__metadata__":{"a":"b","a":"c"},']))
    def run(
        tensors: list[tuple[str, tuple[str, int], list[int]]],
        changes: list[tuple[int, str, object]],
        metadata: str,
    ) -> None:
        nonlocal accepted
        entries, end = [], 0
        places: dict[str, tuple[int, int]] = {}
        for number, (name, (dtype, size), shape) in enumerate(tensors):
            count = size * math.prod(shape)
            begin = places.get(name, (end, count))[0]  # a second one of the name in its place
            places[name] = begin, count
            end = max(end, begin + count)
            entry: dict[str, object] = {"dtype": dtype, "shape": shape}
            entry["data_offsets"] = [begin, begin + count]
            entry.update({field: value for at, field, value in changes if at == number})
            entries.append(f"{json.dumps(name)}:{json.dumps(entry)}")
        text = ("{" + metadata + ",".join(entries) + "}").encode()
        raw = len(text).to_bytes(8, "little") + text + bytes(end)
        found = read(raw, "a.safetensors")
        if found is not None:
            accepted += 1
            assert_same(found[1], safetensors.torch.load(raw))

    run()
    assert accepted > 400


@pytest.mark.slow
def test_random_indexes_of_shards(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("shards") / "model.safetensors.index.json"

    @settings(fuzz, max_examples=2000)
    @given(JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(), st.text())}))
    def run(content: object) -> None:
        path.write_text(json.dumps(content))
        try:
            for name in read_shard_index(path).files:
                assert os.path.basename(name) == name  # noqa: PTH119 - what a path is made of
                assert name.endswith(".safetensors")
        except CheckpointError as error:
            check_message(error)

    run()


@pytest.mark.parametrize(("offset", "value"), [(4, 1), (16, 0), (16, 2)])
def test_an_archive_of_several_disks_or_of_none_is_refused(offset: int, value: int) -> None:
    """Found by the test above: torch refuses a zip64 locator that counts 0 disks."""
    raw = bytearray(PT)
    raw[PT.rfind(b"PK\x06\x07") + offset] = value
    assert read(bytes(raw), "a.pt") is None
