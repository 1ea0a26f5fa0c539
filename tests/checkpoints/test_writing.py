from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from open_clip.factory import load_state_dict
from safetensors import safe_open

from pydetox.checkpoints import Provenance, load_checkpoint, save_checkpoint, save_weights
from pydetox.errors import ArchitectureError, OutputError, UsageError

PREPROCESS = {
    "mean": [0.5, 0.4, 0.3],
    "std": [0.25, 0.26, 0.27],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
PROVENANCE = Provenance(
    "TBAR, unknown trigger",
    source_name="hf-hub:org/repo@main",
    source_sha256="ab" * 32,
    scaling_coefficient=0.75,
    seeds={"inversion": 1, "forget set": 2},
    before={"attack success rate": 0.99},
    after={"attack success rate": 0.01},
    extra={"target": "seven"},
)


def save(
    directory: Path,
    state: Any,
    config: dict[str, Any],
    preprocess: dict[str, Any] | None = PREPROCESS,
    provenance: Provenance = PROVENANCE,
    overwrite: bool = False,
) -> Path:
    return save_checkpoint(
        directory,
        state,
        model_config=config,
        preprocess_config=preprocess,
        provenance=provenance,
        overwrite=overwrite,
    )


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def state(mini_clip: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(mini_clip.state_dict())


def test_open_clip_reads_it_back(tmp_path: Path, state: Any, mini_config: dict[str, Any]) -> None:
    folder = save(tmp_path / "new" / "model", state, mini_config)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert preprocess.transforms[-1].mean == PREPROCESS["mean"]
    assert preprocess.transforms[-1].std == PREPROCESS["std"]
    assert preprocess.transforms[0].size == 32


def test_open_clip_reads_both_kinds_of_weights(tmp_path: Path, mini_clip: torch.nn.Module) -> None:
    for name in ("a.pt", "a.safetensors"):
        path = save_weights(tmp_path / name, mini_clip.state_dict())
        read = load_state_dict(str(path))
        assert read.keys() == mini_clip.state_dict().keys()
        assert all(torch.equal(read[key], value) for key, value in mini_clip.state_dict().items())


def test_we_read_it_back(tmp_path: Path, state: Any, mini_config: dict[str, Any]) -> None:
    folder = save(tmp_path / "model", state, mini_config)
    assert sorted(contents(folder)) == [
        "README.md",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    checkpoint = load_checkpoint(folder)
    assert checkpoint.model_config == mini_config
    assert checkpoint.preprocess_config == PREPROCESS
    assert checkpoint.provenance == PROVENANCE
    assert checkpoint.sha256 == contents(folder)["open_clip_model.safetensors"]
    assert all(torch.equal(checkpoint.state_dict[key], value) for key, value in state.items())


def test_metadata(tmp_path: Path, state: Any, mini_config: dict[str, Any]) -> None:
    folder = save(tmp_path / "model", state, mini_config)
    with safe_open(folder / "open_clip_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["pydetox"])["scaling_coefficient"] == 0.75


def test_without_preprocessing(tmp_path: Path, state: Any, mini_config: dict[str, Any]) -> None:
    folder = save(tmp_path / "model", state, mini_config, preprocess=None)
    assert load_checkpoint(folder).preprocess_config is None
    open_clip.create_model_from_pretrained(f"local-dir:{folder}")


def test_equal_arguments_give_equal_bytes(
    tmp_path: Path, state: Any, mini_config: dict[str, Any]
) -> None:
    first = contents(save(tmp_path / "a" / "model", state, mini_config))
    second = contents(save(tmp_path / "b" / "model", dict(reversed(state.items())), mini_config))
    assert first == second


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_layouts_in_memory(tmp_path: Path, name: str) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "base": base,
        "tied": base,
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "half": base.half(),
        "bfloat16": base.t().bfloat16(),
        "bool": base > 3,
        "grad": torch.nn.Parameter(torch.ones(2)),
        "small view of much": torch.zeros(1_000_000)[:2],
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "negated": torch.tensor([1 + 2j]).conj().imag,
    }
    path = save_weights(tmp_path / name, state)
    assert path.stat().st_size < 20_000
    found = load_checkpoint(path, model="ViT-B-32").state_dict
    for key, value in state.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key
    pointers = [tensor.data_ptr() for tensor in found.values() if tensor.numel()]
    assert len(set(pointers)) == len(pointers)
    if name == "a.safetensors":
        assert all(torch.equal(v, state[k]) for k, v in safetensors.torch.load_file(path).items())


def test_unusual_names(tmp_path: Path) -> None:
    state = {name: torch.ones(1) for name in ("ä\n", "../../etc/passwd", "", "a" * 300)}
    path = save_weights(tmp_path / "a.safetensors", state)
    assert set(safetensors.torch.load_file(path)) == set(state)
    assert set(load_checkpoint(path, model="ViT-B-32").state_dict) == set(state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "holds no tensors"),
        ({"a": [1.0]}, "entry 'a' is a list"),
        ({"a": torch.ones(2).to_sparse()}, "tensor 'a': expected a dense tensor"),
        ({"a": torch.ones(2, device="meta")}, "tensor 'a': expected a dense tensor"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "dtype torch.complex128 cannot be stored"),
        ({"__metadata__": torch.ones(2)}, "its name"),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path, mini_config: dict[str, Any], state: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        save(tmp_path / "model", state, mini_config)
    for name in ("a.pt", "a.safetensors"):
        with pytest.raises(UsageError, match=message):
            save_weights(tmp_path / name, state)
    assert not any(tmp_path.iterdir())


def test_nan_weights_and_bad_configurations(
    tmp_path: Path, state: Any, mini_config: dict[str, Any]
) -> None:
    with pytest.raises(ArchitectureError, match="NaN or infinite"):
        save(tmp_path / "model", {"a": torch.tensor(float("nan"))}, mini_config)
    with pytest.raises(ArchitectureError, match="embed_dim"):
        save(tmp_path / "model", state, {})
    with pytest.raises(ArchitectureError, match="std"):
        save(tmp_path / "model", state, mini_config, preprocess={"std": [0, 0, 0]})
    with pytest.raises(ArchitectureError, match="cannot be written as JSON"):
        save(tmp_path / "model", state, {**mini_config, "x": object()})
    with pytest.raises(UsageError, match="provenance cannot be written as JSON"):
        save(
            tmp_path / "model",
            state,
            mini_config,
            provenance=Provenance("x", after={"a": float("nan")}),
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "a.bin", "a.onnx"])
def test_extension(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"ending in \.safetensors or \.pt"):
        save_weights(tmp_path / name, {"a": torch.ones(1)})


def test_pt_has_no_metadata(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no metadata"):
        save_weights(tmp_path / "a.pt", {"a": torch.ones(1)}, metadata={"a": "b"})


def test_overwriting(tmp_path: Path, state: Any, mini_config: dict[str, Any]) -> None:
    folder = save(tmp_path / "model", state, mini_config)
    before = contents(folder)
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with pytest.raises(OutputError, match="exists already"):
        save(folder, other, mini_config)
    assert contents(folder) == before
    save(folder, other, mini_config, overwrite=True)
    assert contents(folder) != before
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"also holds 'notes\.txt'"):
        save(folder, state, mini_config, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    path = save_weights(tmp_path / "a.pt", {"a": torch.ones(1)})
    with pytest.raises(OutputError, match="exists already"):
        save_weights(path, {"a": torch.zeros(1)})


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["fsync", "write"])
def test_full_disk_and_interrupt(
    tmp_path: Path,
    state: Any,
    mini_config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    at: str,
) -> None:
    folder = save(tmp_path / "model", state, mini_config)
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise error

    if at == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr("pydetox.checkpoints.writing.write_safetensors", fail)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save(folder, state, mini_config, overwrite=True)
    if expected is OutputError:
        assert str(caught.value) == f"{folder}: cannot be written: no space left on the disk"
    with pytest.raises(expected):
        save_weights(tmp_path / "a.safetensors", state)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folder_cannot_be_made(tmp_path: Path, state: Any, mini_config: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file, not a directory"):
        save(tmp_path / "file" / "model", state, mini_config)
    with pytest.raises(OutputError, match="is a file, expected the name of a directory"):
        save(tmp_path / "file", state, mini_config, overwrite=True)
    assert (tmp_path / "file").read_text() == "x"
