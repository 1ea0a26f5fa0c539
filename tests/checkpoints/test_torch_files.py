"""Reading ``.pt`` files, compared with ``torch.load(weights_only=True)``."""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import pickle
import re
import struct
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pydetox.checkpoints import load_checkpoint
from pydetox.checkpoints.index import ITEM_SIZES, WeightsFile
from pydetox.checkpoints.torch_index import strip_prefixes
from pydetox.checkpoints.weights import index_file, read_weights
from pydetox.errors import CheckpointError, UnsafeCheckpointError
from pydetox.models import OpenClipModel

DTYPES = [getattr(torch, name) for name in ITEM_SIZES]


def read(path: Path) -> dict[str, torch.Tensor]:
    with WeightsFile(path) as file:
        tensors, digest = read_weights(file, index_file(file))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    return tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        other = found[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        if tensor.dtype != torch.bool:  # made anew, from bytes that may be anything
            assert other.stride() == tensor.stride(), name
        # Bytes, so that NaN equals NaN and -0 differs from 0.
        left, right = (
            t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (other, tensor)
        )
        assert torch.equal(left, right), name


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = int(np.prod(shape)) * ITEM_SIZES[str(dtype).removeprefix("torch.")]
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0, 3)], ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state = {"a": random_tensor(dtype, shape, 0), "b": random_tensor(dtype, (7,), 1)}
    torch.save(state, tmp_path / "a.pt")
    assert_same(read(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=True))


def test_views_and_shared_storage(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "base": base,
        "tied": base,
        "transposed": base.t(),
        "rows": base[1:3],
        "every other": base[:, ::2],
        "flat": torch.arange(10)[3:],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(state, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert_same(found, torch.load(tmp_path / "a.pt", weights_only=True))
    pointers = {
        found[name].untyped_storage().data_ptr() for name in ("base", "tied", "transposed", "rows")
    }
    assert len(pointers) == 1
    assert not any(tensor.requires_grad for tensor in found.values())


def test_module_state_dict(tmp_path: Path, mini_clip: torch.nn.Module) -> None:
    # A state dict is an OrderedDict with an attribute `_metadata`.
    torch.save(mini_clip.state_dict(), tmp_path / "a.pt")
    assert_same(read(tmp_path / "a.pt"), dict(mini_clip.state_dict()))


def test_training_checkpoint(tmp_path: Path, mini_clip: torch.nn.Module) -> None:
    """The layout of open_clip's training, with everything that it and others put beside the
    weights.
    """
    optimizer = torch.optim.AdamW(mini_clip.parameters())
    for parameter in mini_clip.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in mini_clip.state_dict().items()}
    optimizer.step()
    mini_clip.load_state_dict(before)
    checkpoint = {
        "epoch": 7,
        "name": "run-ä",
        "state_dict": {f"module.{name}": tensor for name, tensor in before.items()},
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "growth_interval": 2000},
        "best": np.float64(0.5),
        "rng": np.arange(3),
        "args": argparse.Namespace(lr=1e-3),
        "sizes": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "set": {1, 2},
        "default": defaultdict(list, a=[1]),
        "big": 2**70,
        "bytes": b"\xff",
        "none": [None, True, False, (1, 2, 3, 4), 300, 70000, -1],
    }
    torch.save(checkpoint, tmp_path / "a.pt")
    assert_same(read(tmp_path / "a.pt"), before)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_where_the_weights_are(tmp_path: Path, key: str) -> None:
    torch.save({"epoch": 1, key: {"a": torch.ones(2)}}, tmp_path / "a.pt")
    assert_same(read(tmp_path / "a.pt"), {"a": torch.ones(2)})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    state = {
        "state_dict": OrderedDict([("a", torch.ones(2)), ("b", torch.zeros(300, 1))]),
        "x": {1},
    }
    torch.save(state, tmp_path / "a.pt", pickle_protocol=protocol)
    assert_same(read(tmp_path / "a.pt"), dict(state["state_dict"]))


def test_saved_to_a_stream(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    (tmp_path / "a.bin").write_bytes(buffer.getvalue())
    assert_same(read(tmp_path / "a.bin"), {"a": torch.ones(2)})


def test_bool_bytes_become_zero_or_one(tmp_path: Path, write_pt: Callable[..., Path]) -> None:
    torch.save({"a": torch.zeros(3, dtype=torch.bool)}, tmp_path / "a.pt")
    pickle_bytes = _record(tmp_path / "a.pt", "data.pkl")
    found = read(write_pt(pickle_bytes, {"0": b"\x00\x02\xff"}))["a"]
    assert found.dtype == torch.bool
    assert found.view(torch.uint8).tolist() == [0, 1, 1]


def _record(path: Path, name: str) -> bytes:
    import zipfile

    with zipfile.ZipFile(path) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith(name)))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["module.a", "module.b"], ["a", "b"]),
        (["module._orig_mod.a"], ["a"]),
        (["_orig_mod.module.a"], ["a"]),
        (["module.a", "b"], ["module.a", "b"]),
        (["modules.a"], ["modules.a"]),
        (["module.module.module.a"], ["module.module.a"]),
        ([], []),
    ],
)
def test_strip_prefixes(names: list[str], expected: list[str]) -> None:
    assert strip_prefixes(names) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, expected a dictionary"),
        (torch.ones(1), "holds a tensor, expected a dictionary"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"a": torch.ones(1), "b": np.ones(2)}, "entry 'b' is an object of .*Keep the tensors"),
        ({"state_dict": {1: torch.ones(1)}}, "name is an integer, expected text"),
        ({1: torch.ones(1)}, "holds no tensors"),
        (
            {"a": torch.ones(3).to_sparse()},
            "entry 'a' is an object of 'torch._utils._rebuild_sparse",
        ),
        ({"a": np.float32(1)}, "entry 'a' is an object of"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_no_dictionary_of_tensors(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "a.pt")


def test_whole_module_is_refused_by_name(tmp_path: Path, mini_clip: torch.nn.Module) -> None:
    torch.save(mini_clip, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"whole object.*weights_only=False") as caught:
        read(tmp_path / "a.pt")
    assert not isinstance(caught.value, UnsafeCheckpointError)


def test_files_of_torch_before_1_6(tmp_path: Path, mini_clip: torch.nn.Module) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    for number, state in enumerate(
        [
            {"a": torch.ones(1)},
            {"base": base, "tied": base, "t": base.t(), "h": torch.ones(3).half()},
            {"epoch": 3, "state_dict": dict(mini_clip.state_dict()), "optimizer": {0: base + 1}},
            {"a": torch.ones(0), "b": torch.arange(5)},
        ]
    ):
        path = tmp_path / f"{number}.pt"
        torch.save(state, path, _use_new_zipfile_serialization=False)
        theirs = torch.load(path, weights_only=True)
        assert_same(read(path), theirs.get("state_dict", theirs))
        raw = path.read_bytes()
        for changed in (raw + b"x", raw[:-1]):
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match=r"hidden bytes|truncated"):
                read(path)


def test_torchscript(tmp_path: Path, member: type, make_zip: Callable[..., bytes]) -> None:
    names = ["m/data.pkl", "m/code/__torch__.py", "m/constants.pkl", "m/version"]
    (tmp_path / "a.pt").write_bytes(make_zip([member(name, b"x") for name in names]))
    with pytest.raises(CheckpointError, match=r"TorchScript.*torch\.jit\.load"):
        read(tmp_path / "a.pt")


def follow(advice: str, source: Path, target: Path) -> None:
    """Run the command that a message gives."""
    command = re.search(r"torch\.save\(.*, NEW_FILE\)", advice)
    assert command is not None, advice
    code = command[0].replace("NEW_FILE", repr(str(target))).replace("FILE", repr(str(source)))
    exec(code, {"torch": torch})


@pytest.mark.filterwarnings("ignore")
def test_the_advice_for_an_archive_of_torchscript(
    tmp_path: Path, mini_clip: torch.nn.Module, mini_config: dict[str, Any]
) -> None:
    """As in OpenAI's files: code that torch compresses, and sizes among the weights."""
    tower = copy.deepcopy(mini_clip).eval()
    tower.attn_mask = tower._buffers.pop("attn_mask")  # a constant there
    for name, size in {"input_resolution": 32, "context_length": 16, "vocab_size": 64}.items():
        tower.__dict__.pop(name, None)
        tower.register_buffer(name, torch.tensor(size))
    images, tokens = torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.int64)
    torch.jit.trace(tower, (images, tokens), check_trace=False).save(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert any(one.compress_type for one in archive.infolist())
    with pytest.raises(CheckpointError, match="TorchScript") as caught:
        read(tmp_path / "a.pt")
    assert not isinstance(caught.value, UnsafeCheckpointError)
    follow(str(caught.value), tmp_path / "a.pt", tmp_path / "b.pt")
    (tmp_path / "config.json").write_text(json.dumps(mini_config | {"quick_gelu": True}))
    found = load_checkpoint(tmp_path / "b.pt", model=str(tmp_path / "config.json"))
    model = OpenClipModel.from_checkpoint(found)
    assert_same(model.clip.state_dict(), mini_clip.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_the_advice_for_a_tar_of_torch_before_0_1_10(tmp_path: Path) -> None:
    """Storages, tensors and the pickle, one file each, as torch/serialization.py reads them."""
    number = lambda value: pickle.dumps(value, protocol=2)  # noqa: E731
    storages = number(1) + number((1, "cpu", torch.FloatStorage))
    storages += (6).to_bytes(8, "little") + torch.arange(6.0).numpy().tobytes() + number([])
    tensors = number(1) + number((2, 1, torch.FloatTensor))
    tensors += struct.pack("<i4x2q2qq", 2, 2, 3, 3, 1, 0)
    weights = b"\x80\x02}X\x01\0\0\0aK\x02Qs."
    with tarfile.open(tmp_path / "a.pt", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in {"storages": storages, "tensors": tensors, "pickle": weights}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(CheckpointError, match=r"tar archive, as torch before 0\.1\.10") as caught:
        read(tmp_path / "a.pt")
    follow(str(caught.value), tmp_path / "a.pt", tmp_path / "b.pt")
    assert_same(read(tmp_path / "b.pt"), {"a": torch.arange(6.0).reshape(2, 3)})


@pytest.mark.parametrize(
    ("record", "content", "message"),
    [
        ("byteorder", b"big", "has byte order .*big"),
        ("byteorder", b"x" * 100, "has 100 bytes, at most 64"),
        ("version", b"11", "has format version .*11"),
        ("version", b"0", "has format version"),
        ("version", b"three", "has format version"),
        ("version", None, "record 'archive/.data/version' is missing"),
        ("data.pkl", None, "not one of torch"),
        ("data/0", None, r"record data/'0' is missing"),
    ],
)
def test_other_records(
    tmp_path: Path,
    make_zip: Callable[..., bytes],
    make_members: Callable[..., list[Any]],
    record: str,
    content: bytes | None,
    message: str,
) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    pickle_bytes = _record(tmp_path / "a.pt", "data.pkl")
    members = make_members(pickle_bytes, {"0": bytes(4)})
    changed = []
    for entry in members:
        if entry.name != f"archive/{record}":
            changed.append(entry)
        elif content is not None:
            changed.append(type(entry)(entry.name, content))
    path = tmp_path / "b.pt"
    path.write_bytes(make_zip(changed))
    with pytest.raises(CheckpointError, match=message):
        read(path)
    path.write_bytes(make_zip(members))
    assert_same(read(path), {"a": torch.zeros(1)})


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=5))
def test_round_trip(tmp_path: Path, spec: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    state = {
        name: random_tensor(dtype, shape, seed).permute(tuple(reversed(range(len(shape)))))
        for seed, (name, (dtype, shape)) in enumerate(spec.items())
    }
    path = tmp_path / "a.pt"
    torch.save({"state_dict": state}, path)
    assert_same(read(path), torch.load(path, weights_only=True)["state_dict"])
