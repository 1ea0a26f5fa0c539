from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pydetox.checkpoints import Provenance, load_checkpoint, save_checkpoint, save_weights
from pydetox.checkpoints.index import WeightsFile
from pydetox.checkpoints.weights import index_file, read_weights
from pydetox.errors import ArchitectureError, CheckpointError, UnsafeCheckpointError, UsageError

PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


@pytest.fixture
def folder(tmp_path: Path, mini_clip: torch.nn.Module, mini_config: dict[str, Any]) -> Path:
    return save_checkpoint(
        tmp_path / "model",
        mini_clip.state_dict(),
        model_config=mini_config,
        preprocess_config=PREPROCESS,
        provenance=Provenance("test"),
    )


@pytest.mark.parametrize("form", ["{}", "local-dir:{}", "{}/open_clip_model.safetensors"])
def test_forms_of_a_folder(
    folder: Path, form: str, mini_config: dict[str, Any], mini_clip: torch.nn.Module
) -> None:
    checkpoint = load_checkpoint(form.format(folder))
    assert checkpoint.model_config == mini_config
    assert checkpoint.preprocess_config == PREPROCESS
    assert checkpoint.name == form.format(folder)
    assert checkpoint.path == folder / "open_clip_model.safetensors"
    assert checkpoint.format == "safetensors"
    assert checkpoint.shapes == {k: tuple(v.shape) for k, v in mini_clip.state_dict().items()}
    assert checkpoint.provenance == Provenance("test")


def test_path_object(folder: Path) -> None:
    assert load_checkpoint(folder).sha256 == load_checkpoint(str(folder)).sha256


def test_model_stands_in_for_a_configuration_that_is_damaged(folder: Path) -> None:
    (folder / "open_clip_config.json").write_text("damaged")
    with pytest.raises(ArchitectureError, match=r"open_clip_config\.json: is not a JSON file"):
        load_checkpoint(folder)
    checkpoint = load_checkpoint(folder, model="ViT-B-32")
    assert checkpoint.model_config is not None
    assert checkpoint.model_config["embed_dim"] == 512
    assert checkpoint.preprocess_config is not None
    assert checkpoint.preprocess_config["resize_mode"] == "shortest"
    assert checkpoint.preprocess_source == "open_clip's pretrained tags of ViT-B-32"
    (warning,) = checkpoint.warnings
    assert "is not a JSON file" in warning
    assert "that was named, ViT-B-32, is taken instead" in warning


def test_nothing_tells_the_architecture(folder: Path) -> None:
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(ArchitectureError, match=r"nothing tells its architecture.* with model=, "):
        load_checkpoint(folder)
    with pytest.raises(UsageError, match="did you mean"):
        load_checkpoint(folder, model="ViT-B-33")


def test_damage_is_reported_before_a_missing_architecture(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"garbage, nothing else")
    with pytest.raises(CheckpointError, match="neither a safetensors file nor a torch zip archive"):
        load_checkpoint(tmp_path / "a.pt")


def test_best_weights_in_a_folder(folder: Path) -> None:
    save_weights(folder / "open_clip_pytorch_model.pt", {"old": torch.ones(1)})
    (folder / "open_clip_pytorch_model.pt").rename(folder / "open_clip_pytorch_model.bin")
    assert load_checkpoint(folder).path.name == "open_clip_model.safetensors"
    (folder / "open_clip_model.safetensors").unlink()
    checkpoint = load_checkpoint(folder)
    assert checkpoint.path.name == "open_clip_pytorch_model.bin"
    assert list(checkpoint.state_dict) == ["old"]
    assert checkpoint.format == "torch"
    assert checkpoint.provenance is None


def test_only_weights_in_a_folder(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").rename(folder / "epoch_3.safetensors")
    assert load_checkpoint(folder).path.name == "epoch_3.safetensors"
    shutil.copy(folder / "epoch_3.safetensors", folder / "epoch_4.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2 weights files .*name the one you mean"):
        load_checkpoint(folder)


def test_not_there(tmp_path: Path) -> None:
    for name in ("none.pt", "none/at/all"):
        with pytest.raises(CheckpointError, match="no such file or folder"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be opened: File name too long"):
        load_checkpoint("x" * 5000)


def test_local_dir_takes_a_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="local-dir: takes a folder"):
        load_checkpoint(f"local-dir:{folder}/open_clip_model.safetensors")


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    for path in (tmp_path / "a.pt", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="is not a regular file"):
            load_checkpoint(path)


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(tmp_path / "a.pt", {"a": torch.ones(1)})

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match="cannot be opened: Permission denied"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"x", "neither"),
        (b"\0" * 1000, "neither"),
        (b"<!DOCTYPE html><html>", r"is text, such as a web page .*fetch the weights again"),
        (b'{"error": "Repository not found"}', "is text, such as"),
        (b"\x1f\x8b\x08\0" + b"x" * 40, "compressed with gzip; unpack it first"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 40, "compressed with zstd"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"\x80\x04\x95abc", "bare pickle"),
        (b"PK\3\4", "truncated or damaged"),
        (b"PK\3\4" + b"x" * 100, "without its end record"),
    ],
)
def test_garbage(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, model="ViT-B-32")
    assert str(caught.value).startswith(f"{path}: ")


def test_weights_in_a_common_zip_archive_are_to_be_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.pt", bytes(1000))
    with pytest.raises(CheckpointError, match=r"not one of torch.*unpack that") as caught:
        load_checkpoint(path, model="ViT-B-32")
    assert not isinstance(caught.value, UnsafeCheckpointError)


def test_extension_that_lies(tmp_path: Path) -> None:
    pt = save_weights(tmp_path / "a.pt", {"a": torch.ones(1)})
    st = save_weights(tmp_path / "b.safetensors", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"is named \.safetensors, but holds a torch zip"):
        load_checkpoint(pt.rename(tmp_path / "c.safetensors"), model="ViT-B-32")
    with pytest.raises(CheckpointError, match=r"is named \.pt, but holds safetensors"):
        load_checkpoint(st.rename(tmp_path / "d.pt"), model="ViT-B-32")


def test_no_extension(tmp_path: Path) -> None:
    """The hub's cache names files by their hash."""
    for name in ("a.pt", "b.safetensors"):
        path = save_weights(tmp_path / name, {"a": torch.ones(1)}).rename(tmp_path / name[0])
        assert load_checkpoint(path, model="ViT-B-32").state_dict["a"].item() == 1


def test_symbolic_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert load_checkpoint(tmp_path / "link").sha256 == load_checkpoint(folder).sha256


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_nonfinite_weights(tmp_path: Path, name: str) -> None:
    path = save_weights(
        tmp_path / name, {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}
    )
    with pytest.raises(ArchitectureError, match=rf"{name}: tensor 'b': 1 of its 2 weights"):
        load_checkpoint(path, model="ViT-B-32")
    checkpoint = load_checkpoint(path, model="ViT-B-32", allow_nonfinite=True)
    assert checkpoint.state_dict["b"].isnan().tolist() == [False, True]
    (finding,) = checkpoint.findings
    assert finding.rule == "non-finite"
    assert finding.message == "tensor 'b': 1 of its 2 weights are NaN or infinite"


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1], "shrank"),
        (lambda raw: raw + b"x", "grew"),
        (lambda raw: raw.replace(b"weight_a", b"weight_b"), "changed"),
    ],
    ids=["shrank", "grew", "changed"],
)
def test_file_that_changes_while_it_is_read(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    path = save_weights(tmp_path / name, {"weight_a": torch.ones(1000)})
    with WeightsFile(path) as file:
        index = index_file(file)
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(CheckpointError, match=f"{message} while it was read"):
            read_weights(file, index)


def test_exchanged_file_does_not_matter(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "a.pt", {"a": torch.ones(1)})
    with WeightsFile(path) as file:
        index = index_file(file)
        save_weights(path, {"a": torch.zeros(1)}, overwrite=True)  # a rename: another file
        assert read_weights(file, index)[0]["a"].item() == 1


def test_damaged_provenance(tmp_path: Path) -> None:
    for text in ("{", "[]", "{}", json.dumps({"method": 1})):
        path = save_weights(
            tmp_path / "a.safetensors",
            {"a": torch.ones(1)},
            metadata={"pydetox": text},
            overwrite=True,
        )
        checkpoint = load_checkpoint(path, model="ViT-B-32")
        with pytest.raises(CheckpointError, match="its provenance is damaged"):
            checkpoint.provenance  # noqa: B018


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_is_read_once_and_hashed_meanwhile(
    tmp_path: Path,
    mini_clip: torch.nn.Module,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / f"model.{suffix}"
    if suffix == "pt":
        torch.save(mini_clip.state_dict(), path)
    else:
        save_weights(path, mini_clip.state_dict())
    counted = {"bytes": 0}
    preadv, pread = os.preadv, os.pread

    def count(got: int) -> int:
        counted["bytes"] += got
        return got

    def read_into(descriptor: int, buffers: Any, offset: int) -> int:
        return count(preadv(descriptor, buffers, offset))

    def read(descriptor: int, size: int, offset: int) -> bytes:
        data = pread(descriptor, size, offset)
        count(len(data))
        return data

    with WeightsFile(path) as file:
        index = index_file(file)
        monkeypatch.setattr(os, "preadv", read_into)
        monkeypatch.setattr(os, "pread", read)
        _, digest = read_weights(file, index)
    assert counted["bytes"] == path.stat().st_size
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_part_of_divided_weights_says_how_to_join_them(tmp_path: Path, mini_config: dict) -> None:
    """As DeepSpeed writes it with ZeRO stage 3: the tensors of the module are empty."""
    path = tmp_path / "global_step1" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    path.parent.mkdir()
    torch.save({"module": {"logit_scale": torch.empty(0)}}, path)
    (tmp_path / "mini.json").write_text(json.dumps(mini_config))
    with pytest.raises(CheckpointError, match=r"stage 3.*zero_to_fp32\.py \. joined"):
        load_checkpoint(path, model=tmp_path / "mini.json")
