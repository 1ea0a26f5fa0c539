"""Loading from the Hugging Face hub, against a stand-in for its HTTP interface on this machine."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pydetox.checkpoints import load_checkpoint, save_weights
from pydetox.errors import CheckpointError, UnsafeCheckpointError, UsageError
from tests.hub import Hub, served_hub, use_endpoint

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served_hub(monkeypatch) as state:
        yield state


@pytest.fixture
def files(tmp_path: Path, mini_config: dict[str, Any]) -> dict[str, bytes]:
    """A configuration, weights in both formats with different values, under open_clip's names."""
    safe = save_weights(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    unsafe = save_weights(tmp_path / "a.pt", {"a": torch.zeros(1)})
    return {
        "open_clip_config.json": json.dumps({"model_cfg": mini_config}).encode(),
        "open_clip_model.safetensors": safe.read_bytes(),
        "open_clip_pytorch_model.bin": unsafe.read_bytes(),
    }


def load(reference: str, tmp_path: Path, **options: Any) -> Any:
    return load_checkpoint(reference, cache_dir=tmp_path / "cache", **options)


def test_safetensors_are_preferred(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, mini_config: dict[str, Any]
) -> None:
    hub.add("org/repo", FIRST, files)
    checkpoint = load("hf-hub:org/repo", tmp_path)
    assert checkpoint.state_dict["a"].item() == 1
    assert checkpoint.model_config == mini_config
    assert checkpoint.path.name == "open_clip_model.safetensors"
    assert checkpoint.name == "hf-hub:org/repo"
    assert checkpoint.sha256 == hashlib.sha256(files["open_clip_model.safetensors"]).hexdigest()
    assert not any(".bin" in request for request in hub.requests)


def test_pickle_when_there_is_nothing_else(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    del files["open_clip_model.safetensors"]
    hub.add("org/repo", FIRST, files)
    assert load("hf-hub:org/repo", tmp_path).state_dict["a"].item() == 0


def test_hostile_pickle(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "evil", "w") as archive:
        archive.writestr("a/version", "3\n")
        archive.writestr("a/data.pkl", b"cos\nsystem\n(Vid\ntR.")
    files = {
        "open_clip_config.json": files["open_clip_config.json"],
        "open_clip_pytorch_model.bin": (tmp_path / "evil").read_bytes(),
    }
    hub.add("org/repo", FIRST, files)
    with pytest.raises(UnsafeCheckpointError, match=r"'os\.system'"):
        load("hf-hub:org/repo", tmp_path)


def test_revisions(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("org/repo", FIRST, files)
    newer = {**files, "open_clip_model.safetensors": _weights(tmp_path, 2)}
    hub.add("org/repo", SECOND, newer, branch="v2")
    assert load("hf-hub:org/repo", tmp_path).state_dict["a"].item() == 1
    assert load("hf-hub:org/repo@v2", tmp_path).state_dict["a"].item() == 2
    assert load(f"hf-hub:org/repo@{FIRST}", tmp_path).state_dict["a"].item() == 1


def _weights(tmp_path: Path, value: float) -> bytes:
    path = tmp_path / "other.safetensors"
    save_weights(path, {"a": torch.full((1,), float(value))}, overwrite=True)
    return path.read_bytes()


def test_configuration_and_weights_are_of_one_commit(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch moves between the two downloads."""
    hub.add("org/repo", FIRST, files)
    newer = {**files, "open_clip_model.safetensors": _weights(tmp_path, 2)}
    answer = hub.answer

    def moving(path: str) -> tuple[int, dict[str, str], bytes]:
        result = answer(path)
        if path.endswith("open_clip_config.json") and len(hub.requests) >= 2:
            hub.add("org/repo", SECOND, newer)
        return result

    monkeypatch.setattr(hub, "answer", moving)
    # A commit that no branch points to any more is still there.
    hub.revisions["org/repo"]["old"] = FIRST
    assert load("hf-hub:org/repo", tmp_path).state_dict["a"].item() == 1


def test_offline_opens_no_socket(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/repo", FIRST, files)
    online = load("hf-hub:org/repo@main", tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    class Guarded(socket.socket):
        """Lets only the sandbox's socket pair pass, which leads nowhere outside this process."""

        def __init__(self, family: int = -1, *arguments: Any, **options: Any) -> None:
            assert family == socket.AF_UNIX, "a socket was opened"
            super().__init__(family, *arguments, **options)

    count = len(hub.requests)
    monkeypatch.setattr(socket, "socket", Guarded)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    offline = load("hf-hub:org/repo@main", tmp_path, offline=True)
    assert offline.sha256 == online.sha256
    assert offline.model_config == online.model_config
    with pytest.raises(
        CheckpointError, match=r"org/other: none of .* is in the local cache, and offline"
    ):
        load("hf-hub:org/other", tmp_path, offline=True)
    with pytest.raises(CheckpointError, match="is in the local cache, and offline was asked for"):
        load("ViT-B-32,laion2b_s34b_b79k", tmp_path, offline=True)
    assert len(hub.requests) == count


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf-hub:org/none", "hf-hub:org/none: no such repository, or it is private"),
        ("hf-hub:org/repo@none", "hf-hub:org/repo: has no revision 'none'"),
        ("hf-hub:org/empty", r"none of open_clip_model\.safetensors, .* is in the repository"),
        ("hf-hub:org/gated", "hf-hub:org/gated: is gated"),
    ],
)
def test_what_is_not_there(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, reference: str, message: str
) -> None:
    hub.add("org/repo", FIRST, files)
    hub.add("org/empty", FIRST, {"open_clip_config.json": files["open_clip_config.json"]})
    hub.gated.add("org/gated")
    with pytest.raises(CheckpointError, match=message) as caught:
        load(reference, tmp_path)
    assert "\n" not in str(caught.value)


def test_no_configuration(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    del files["open_clip_config.json"]
    hub.add("org/repo", FIRST, files)
    with pytest.raises(CheckpointError, match="nothing tells its architecture"):
        load("hf-hub:org/repo", tmp_path)
    assert load("hf-hub:org/repo", tmp_path, model="ViT-B-32").model_config["embed_dim"] == 512


def test_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    use_endpoint(monkeypatch, f"http://127.0.0.1:{port}")
    with pytest.raises(CheckpointError, match="hf-hub:org/repo: the hub cannot be reached"):
        load("hf-hub:org/repo", tmp_path)


def test_open_clip_tag(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", FIRST, files)
    checkpoint = load("ViT-B-32,laion2b_s34b_b79k", tmp_path)
    assert checkpoint.state_dict["a"].item() == 1
    assert checkpoint.model_config["vision_cfg"]["patch_size"] == 32
    assert "quick_gelu" not in checkpoint.model_config
    assert checkpoint.preprocess_config["mean"] == pytest.approx(
        [0.48145466, 0.4578275, 0.40821073]
    )
    assert checkpoint.preprocess_config["resize_mode"] == "shortest"
    assert checkpoint.name == "ViT-B-32,laion2b_s34b_b79k"


def test_open_clip_tag_that_needs_quick_gelu(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("timm/vit_base_patch32_clip_224.openai", FIRST, files)
    assert load("ViT-B-32,openai", tmp_path).model_config["quick_gelu"] is True


def test_open_clip_tag_with_a_file_of_its_own(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(
        "jienengchen/ViTamin-S", FIRST, {"pytorch_model.bin": files["open_clip_pytorch_model.bin"]}
    )
    assert load("ViTamin-S,datacomp1b", tmp_path).path.name == "pytorch_model.bin"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "ViT-B-33,openai",
            "architecture 'ViT-B-33': not known to open_clip; did you mean .*ViT-B-32",
        ),
        (
            "ViT-B-32,laion2b_s34b_b79",
            "tag .*: not known to open_clip for ViT-B-32; did you mean laion2b_s34b_b79k",
        ),
        ("ViT-B-32,zzzzzzz", "not known to open_clip for ViT-B-32; it has openai, laion400m_e31"),
        ("ViT-M-16,openai", "not known to open_clip for ViT-M-16; it has no pretrained weights"),
    ],
)
def test_unknown_open_clip_names(tmp_path: Path, reference: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(reference, tmp_path)
