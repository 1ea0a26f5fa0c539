"""Checkpoints in several files."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pydetox.checkpoints import inspect_checkpoint, load_checkpoint
from pydetox.checkpoints.mapped import MappedWeights
from pydetox.checkpoints.shards import read_shard_index
from pydetox.errors import ArchitectureError, CheckpointError

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3).bfloat16(), "ä": torch.zeros(0)}
SHARDS = {
    "model-00001-of-00002.safetensors": ["b", "a"],
    "model-00002-of-00002.safetensors": ["ä"],
}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, STATE)
    return folder


def write(folder: Path, state: dict[str, torch.Tensor]) -> None:
    for name, tensors in SHARDS.items():
        safetensors.torch.save_file({t: state[t] for t in tensors}, folder / name, {"format": "pt"})
    weight_map = {tensor: name for name, tensors in SHARDS.items() for tensor in tensors}
    content = {"metadata": {"total_size": 30}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize("form", ["{}", "local-dir:{}", "{}/" + INDEX])
def test_read(folder: Path, form: str) -> None:
    checkpoint = load_checkpoint(form.format(folder), model="ViT-B-32")
    assert checkpoint.path == folder / INDEX
    assert checkpoint.format == "safetensors"
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.findings == ()
    assert checkpoint.state_dict.keys() == STATE.keys()
    for name, tensor in STATE.items():
        found = checkpoint.state_dict[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_hash_is_that_of_sha256sum(folder: Path) -> None:
    names = sorted([*SHARDS, INDEX])
    listing = subprocess.run(["sha256sum", *names], cwd=folder, check=True, capture_output=True)
    expected = hashlib.sha256(listing.stdout).hexdigest()
    assert load_checkpoint(folder, model="ViT-B-32").sha256 == expected
    assert inspect_checkpoint(folder, hash_content=True).sha256 == expected
    path = folder / SHARDS.copy().popitem()[0]
    safetensors.torch.save_file({"ä": torch.ones(1)}, path)
    assert load_checkpoint(folder, model="ViT-B-32").sha256 != expected


def test_inspect(folder: Path) -> None:
    found = inspect_checkpoint(folder)
    assert found.files == tuple(SHARDS)
    assert found.nbytes == sum((folder / name).stat().st_size for name in SHARDS)
    assert found.parameters == 9
    assert found.sha256 is None
    shapes = {name: list(entry.shape) for name, entry in found.tensors.items()}
    assert shapes == {name: list(tensor.shape) for name, tensor in STATE.items()}


def test_findings_name_the_shard(folder: Path) -> None:
    name = "model-00002-of-00002.safetensors"
    header = b'{"\xc3\xa4":%b,"\xc3\xa4":%b}' % (
        (b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}',) * 2
    )
    (folder / name).write_bytes(len(header).to_bytes(8, "little") + header)
    (finding,) = load_checkpoint(folder, model="ViT-B-32").findings
    assert finding.rule == "duplicate-key"
    assert finding.message.startswith(f"shard '{name}': name '\\xe4'")


def test_links_of_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--repo"
    snapshot = repository / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in [*SHARDS, INDEX]:
        shutil.move(folder / name, repository / "blobs" / f"blob-{name[:12]}")
        (snapshot / name).symlink_to(f"../../blobs/blob-{name[:12]}")
    assert load_checkpoint(snapshot, model="ViT-B-32").state_dict.keys() == STATE.keys()


def test_link_inside_the_folder(folder: Path) -> None:
    first = folder / "model-00001-of-00002.safetensors"
    (folder / "sub").mkdir()
    first.rename(folder / "sub" / "x.safetensors")
    first.symlink_to("sub/x.safetensors")
    assert load_checkpoint(folder, model="ViT-B-32").state_dict.keys() == STATE.keys()


def test_two_shards_with_one_tensor(folder: Path) -> None:
    """Whoever loads all shards gets the last one's weights, whatever the index says."""
    path = folder / "model-00002-of-00002.safetensors"
    safetensors.torch.save_file({"ä": torch.zeros(0), "a": torch.ones(6)}, path)
    with pytest.raises(
        CheckpointError, match=r"shard 'model-00002.*holds a tensor that .* \('a'\)"
    ):
        load_checkpoint(folder, model="ViT-B-32")


def test_shard_of_another_format(folder: Path) -> None:
    torch.save({"ä": torch.zeros(0)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"shard 'model-00002.*holds a torch zip archive"):
        load_checkpoint(folder, model="ViT-B-32")


def test_a_shard_that_the_index_does_not_name_is_refused(folder: Path) -> None:
    # open_clip, which knows no index, would load the first file alone.
    shutil.copy(
        folder / "model-00001-of-00002.safetensors", folder / "model-00000-of-00002.safetensors"
    )
    with pytest.raises(CheckpointError, match="does not name 'model-00000"):
        load_checkpoint(folder, model="ViT-B-32")


def test_damage_is_said_with_the_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"shard 'model-00002.*truncated or damaged"):
        load_checkpoint(folder, model="ViT-B-32")


def test_all_files_are_closed(folder: Path) -> None:
    index = read_shard_index(folder / INDEX)
    assert index.files == SHARDS
    assert index.own_sha256 == hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
    load_checkpoint(folder, model="ViT-B-32")  # the sandbox is there from now on
    before = len(list(Path("/proc/self/fd").iterdir()))
    load_checkpoint(folder, model="ViT-B-32")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_checkpoint(folder, model="ViT-B-32")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_names_of_transformers(tmp_path: Path) -> None:
    state = {"vision_model.post_layernorm.weight": torch.ones(2), "logit_scale": torch.ones(())}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ArchitectureError, match=r"no config\.json beside it"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(ArchitectureError, match="describes a model of type 'blip'"):
        load_checkpoint(tmp_path)
    with pytest.raises(ArchitectureError, match="the weights are not those of its configuration"):
        load_checkpoint(tmp_path, model="ViT-B-32")
    with pytest.raises(ArchitectureError, match="only a plain CLIP"):
        load_checkpoint(tmp_path, model="ViT-B-16-SigLIP")
    assert len(inspect_checkpoint(tmp_path).tensors) == 2


def test_weights_of_open_clip_go_first(folder: Path) -> None:
    safetensors.torch.save_file({"own": torch.ones(1)}, folder / "open_clip_model.safetensors")
    assert list(load_checkpoint(folder, model="ViT-B-32").state_dict) == ["own"]


def test_shards_are_not_mapped(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json: is the index of several shards"):
        MappedWeights(folder)


def test_the_key_of_the_weights_is_that_of_every_shard(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for name, tensor in zip(names, "ab", strict=True):
        sets = {"state_dict": {tensor: torch.ones(2)}, "ema": {tensor: torch.zeros(2)}}
        torch.save(sets, tmp_path / name)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    with pytest.raises(CheckpointError, match="under the key 'state_dict', where no loader of sha"):
        load_checkpoint(index, model="ViT-B-32")  # transformers takes the root, without tensors
    chosen = load_checkpoint(index, model="ViT-B-32", weights_key="ema")
    assert not any(tensor.any() for tensor in chosen.state_dict.values())
    assert {finding.rule for finding in chosen.findings} == {"chosen-weights"}
    with pytest.raises(CheckpointError, match=r"shard 'pytorch_model-00001.*no tensors under 'x'"):
        load_checkpoint(index, model="ViT-B-32", weights_key="x")


def test_pickled_shards_whose_names_carry_the_prefix_of_a_wrapper(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    index = tmp_path / "pytorch_model.bin.index.json"

    def write_shards(*tensors: str) -> None:
        for name, tensor in zip(names, tensors, strict=True):
            torch.save({tensor: torch.ones(2)}, tmp_path / name)
        index.write_text(json.dumps({"weight_map": dict(zip(tensors, names, strict=True))}))

    for first, second in (("module.a", "module.b"), ("module._orig_mod.a", "module._orig_mod.b")):
        write_shards(first, second)
        found = load_checkpoint(index, model="ViT-B-32")
        assert list(found.state_dict) == ["a", "b"]
        assert found.findings == ()
    write_shards("module.a", "b")
    with pytest.raises(
        CheckpointError, match=r"shard 'pytorch_model-00001.*all its tensors begin with 'module\.'"
    ):
        load_checkpoint(index, model="ViT-B-32")
