"""Reading ``.safetensors`` files, compared with the safetensors library."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from pydetox.checkpoints import load_checkpoint, save_weights
from pydetox.checkpoints.index import ITEM_SIZES, WeightsFile
from pydetox.checkpoints.safetensors_index import MAX_HEADER_BYTES
from pydetox.checkpoints.weights import index_file, read_weights
from pydetox.errors import CheckpointError, UnsafeCheckpointError

DTYPES = [getattr(torch, name) for name in ITEM_SIZES if name != "complex128"]


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with WeightsFile(path) as file:
        index = index_file(file)
        return read_weights(file, index)[0], index.metadata


def as_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].is_contiguous(), name
        assert as_bytes(found[name]) == as_bytes(tensor), name


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * ITEM_SIZES[str(dtype).removeprefix("torch.")]
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def raw_file(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(begin: int = 0, end: int = 4, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


def refuse(
    path: Path, content: bytes, message: str, error: type[CheckpointError] = CheckpointError
) -> None:
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(error, match=message) as caught:
        load_checkpoint(path, model="ViT-B-32")
    assert time.process_time() - start < 2
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_of_the_library(path: Path, dtype: torch.dtype) -> None:
    shapes = [(), (1,), (3, 5), (2, 0, 3)]
    state = {str(shape): random_tensor(dtype, shape, 0) for shape in shapes}
    safetensors.torch.save_file(state, path, metadata={"format": "pt", "ä": "ö"})
    tensors, metadata = read(path)
    assert_same(tensors, state)
    assert metadata == {"format": "pt", "ä": "ö"}


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda t: t != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4).map(tuple)),
        min_size=1,
        max_size=5,
    )
)
def test_round_trip_with_both_writers(path: Path, spec: dict[str, Any]) -> None:
    state = {
        name: random_tensor(dtype, shape, seed).permute(tuple(reversed(range(len(shape)))))
        for seed, (name, (dtype, shape)) in enumerate(spec.items())
    }
    save_weights(path, state, metadata={"a": "b"}, overwrite=True)
    expected = {name: tensor.contiguous() for name, tensor in state.items()}
    assert_same(safetensors.torch.load_file(path), expected)
    assert_same(read(path)[0], expected)
    safetensors.torch.save_file(expected, path)
    assert_same(read(path)[0], expected)


def test_bool_bytes_become_zero_or_one(path: Path) -> None:
    path.write_bytes(raw_file({"a": entry(0, 3, [3], "BOOL")}, b"\x00\x02\xff"))
    assert as_bytes(read(path)[0]["a"]) == [0, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"{", "truncated or damaged: the header length"),
        (raw_file(b"{}")[:-1], "truncated or damaged: the header should be"),
        (raw_file(b"{}"), "holds no tensors"),
        (raw_file({"__metadata__": {}}), "holds no tensors"),
        (raw_file(b"{]"), "header is not valid JSON"),
        (raw_file(b"{\xff}"), "header is not valid JSON"),
        (raw_file(b'{"a":NaN}'), "header is not valid JSON"),
        (raw_file(b'{"a":' * 100_000), "header is not valid JSON"),
        (raw_file(b'{"a":' + b"9" * 5000 + b"}"), "header is not valid JSON"),
        (raw_file(b"[]"), "not a JSON object"),
        (raw_file(b' {"a":1}'), "tensor 'a': expected dtype, shape and data_offsets"),
        (raw_file(b'{"\\ud800":1}'), "is not text"),
        (raw_file({"a": 1}), "tensor 'a': expected dtype, shape and data_offsets"),
        (raw_file({"a": {**entry(), "x": 1}}), "expected dtype, shape and data_offsets"),
        (raw_file({"a": entry(dtype="F4")}, bytes(4)), "unsupported dtype 'F4'"),
        (raw_file({"a": entry(dtype=["F32"])}, bytes(4)), "unsupported dtype"),
        (raw_file({"a": entry(shape=[-1])}, bytes(4)), "its shape holds something"),
        (raw_file({"a": entry(shape=[True])}, bytes(4)), "its shape holds something"),
        (raw_file({"a": entry(shape=[1.0])}, bytes(4)), "its shape holds something"),
        (raw_file({"a": entry(shape=[1 << 50])}, bytes(4)), "its shape holds something"),
        (raw_file({"a": entry(shape=[1 << 32] * 64)}, bytes(4)), "its data_offsets are"),
        (raw_file({"a": entry(0, 8)}, bytes(8)), "needs 4 bytes"),
        (raw_file({"a": entry(4, 0)}, bytes(4)), "needs 4 bytes"),
        (raw_file({"a": {**entry(), "data_offsets": [4]}}, bytes(4)), "needs 4 bytes"),
        (raw_file({"a": {**entry(), "shape": 1}}, bytes(4)), "is not a list"),
        (raw_file({"a": entry(4, 8)}, bytes(8)), "begins at byte 4 of the data, expected 0"),
        (raw_file({"a": entry(), "b": entry()}, bytes(4)), "no gaps, no overlap"),
        (raw_file({"a": entry()}, bytes(3)), "describes 73 bytes, but the file has 72"),
        (raw_file({"a": entry()}, bytes(5)), "describes 73 bytes, but the file has 74"),
        (raw_file({"a": entry(), "__metadata__": []}, bytes(4)), "metadata is not a JSON object"),
        (raw_file({"a": entry(), "__metadata__": {"k": 1}}, bytes(4)), "metadata 'k' is not text"),
        (raw_file({"\x1b[31m\n": 1}), r"tensor '\\x1b\[31m\\n'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_damaged(path: Path, content: bytes, message: str) -> None:
    refuse(path, content, message)
    path.write_bytes(content)
    # The library agrees, or finds no tensors.
    assert not library_reads(path)


def library_reads(path: Path) -> bool:
    try:
        return bool(safetensors.torch.load_file(path))
    except (SafetensorError, UnicodeDecodeError, OSError, AttributeError):
        return False


def test_more_dimensions_than_torch_has(path: Path) -> None:
    refuse(path, raw_file({"a": entry(shape=[1] * 65)}, bytes(4)), "has 65 dimensions, at most 64")


def test_huge_header(path: Path) -> None:
    claimed = (MAX_HEADER_BYTES + 1).to_bytes(8, "little")
    refuse(
        path,
        claimed + b"{",
        "claims a header of 4194305 bytes, at most 4194304",
        UnsafeCheckpointError,
    )
    refuse(path, b"\xff" * 8 + b"{", "claims a header of", UnsafeCheckpointError)


def test_header_of_the_largest_size(path: Path) -> None:
    count = MAX_HEADER_BYTES // 90
    header = {f"tensor.{i:06d}": entry(4 * i, 4 * i + 4) for i in range(count)}
    path.write_bytes(raw_file(header, bytes(4 * count)))
    with WeightsFile(path) as file:
        assert len(index_file(file).tensors) == count


def test_duplicate_keys(path: Path) -> None:
    header = b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)
    path.write_bytes(raw_file(header, bytes(4)))
    checkpoint = load_checkpoint(path, model="ViT-B-32")
    assert [finding.rule for finding in checkpoint.findings] == ["duplicate-key"]
    assert_same(checkpoint.state_dict, safetensors.torch.load_file(path))
    header = b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}'
    refuse(path, raw_file(header, bytes(4)), "data_offsets in the header, each once")
    assert not library_reads(path)
    header = b'{"__metadata__":{},"a":%b,"__metadata__":{}}' % json.dumps(entry()).encode()
    refuse(path, raw_file(header, bytes(4)), "its metadata is there twice")
    assert not library_reads(path)


def test_the_last_of_two_entries_counts(path: Path) -> None:
    """As in the library; another reader may take the first."""
    first, last = entry(0, 4, [1], "F32"), entry(0, 4, [2], "F16")
    header = b'{"a":%b,"a":%b}' % (json.dumps(first).encode(), json.dumps(last).encode())
    path.write_bytes(raw_file(header, bytes(range(4))))
    assert_same(read(path)[0], safetensors.torch.load_file(path))
    assert read(path)[0]["a"].shape == (2,)


def test_mutations_agree_with_the_library(tmp_path: Path) -> None:
    """Whatever we accept, the library accepts too, and reads the same weights from it."""
    path = tmp_path / "a.safetensors"
    state = {"a": torch.ones(3), "bb": torch.arange(4.0).reshape(2, 2).half(), "c": torch.tensor(5)}
    safetensors.torch.save_file(state, path, metadata={"x": "y"})
    raw = path.read_bytes()
    generator = random.Random(0)
    accepted = 0
    for _ in range(1500):
        mutated = bytearray(raw)
        for _ in range(generator.choice((1, 1, 2, 4))):
            at = generator.randrange(len(mutated))
            action = generator.randrange(3)
            if action == 0:
                mutated[at] = generator.randrange(256)
            elif action == 1:
                del mutated[at : at + generator.randrange(1, 5)]
            else:
                mutated[at:at] = mutated[at : at + generator.randrange(1, 5)]
        path.write_bytes(mutated)
        try:
            found, _ = read(path)
        except CheckpointError:
            continue
        accepted += 1
        assert_same(found, safetensors.torch.load_file(path))
    assert accepted > 20  # mutations of weights are no damage that the format can show
