"""One identity over all files of a checkpoint, whatever layout they come in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pydetox.checkpoints import (
    CheckpointIdentity,
    identify_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_weights,
)
from pydetox.checkpoints.layout import find_weights
from pydetox.errors import ArchitectureError, CheckpointError, UnsafeCheckpointError

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3).bfloat16()}
COMMIT = "a" * 40


@dataclass
class Layout:
    """A checkpoint on the disk. files: all that it consists of. read: how it is named."""

    reference: str
    files: list[Path]
    cache: Path | None = None

    def identify(self, **more: Any) -> CheckpointIdentity:
        return identify_checkpoint(self.reference, cache_dir=self.cache, offline=True, **more)


def single(folder: Path, config: dict[str, Any]) -> Layout:
    path = save_weights(folder / "any.pt", STATE)
    return Layout(str(path), [path, write_config(folder, config)])


def open_clip_folder(folder: Path, config: dict[str, Any]) -> Layout:
    path = save_weights(folder / "open_clip_model.safetensors", STATE)
    save_weights(folder / "another.pt", STATE)
    return Layout(f"local-dir:{folder}", [path, write_config(folder, config)])


def transformers_folder(folder: Path, config: dict[str, Any]) -> Layout:
    return Layout(str(folder), [*shards(folder), write_config(folder, config)])


def pickled_shards(folder: Path, config: dict[str, Any]) -> Layout:
    return Layout(str(folder), [*shards(folder, "bin"), write_config(folder, config)])


def hub_cache(folder: Path, config: dict[str, Any]) -> Layout:
    names = cached(folder, "org/repo", {"open_clip_model.safetensors": STATE}, config)
    return Layout("hf-hub:org/repo", names, folder)


def pretrained_tag(folder: Path, config: dict[str, Any]) -> Layout:
    del config  # open_clip tells it
    repository = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    names = cached(folder, repository, {"open_clip_model.safetensors": STATE}, None)
    return Layout("ViT-B-32,laion2b_s34b_b79k", names, folder)


def shards_in_the_hubs_cache(folder: Path, config: dict[str, Any]) -> Layout:
    plain = folder / "plain"
    plain.mkdir()
    files = [*shards(plain), write_config(plain, config)]
    snapshot = folder / "models--org--repo" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return Layout(str(snapshot), [link_into_blobs(snapshot, path) for path in files])


LAYOUTS = [
    single,
    open_clip_folder,
    transformers_folder,
    pickled_shards,
    hub_cache,
    pretrained_tag,
    shards_in_the_hubs_cache,
]


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": config}))
    return path


def shards(folder: Path, suffix: str = "safetensors") -> list[Path]:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = {tensor: f"{stem}-0000{k}-of-00002.{suffix}" for k, tensor in enumerate(STATE, 1)}
    for tensor, name in names.items():
        if suffix == "safetensors":
            safetensors.torch.save_file({tensor: STATE[tensor]}, folder / name)
        else:
            torch.save({tensor: STATE[tensor]}, folder / name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    return [index, *(folder / name for name in names.values())]


def cached(
    folder: Path, repository: str, files: dict[str, Any], config: dict[str, Any] | None
) -> list[Path]:
    root = folder / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    snapshot.mkdir(parents=True)
    made = [save_weights(folder / name, state) for name, state in files.items()]
    if config is not None:
        made.append(write_config(folder, config))
    return [link_into_blobs(snapshot, path) for path in made]


def link_into_blobs(snapshot: Path, path: Path) -> Path:
    """Put a file where the hub's cache keeps it: a blob, and a link to it in the snapshot."""
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(exist_ok=True)
    shutil.move(path, blobs / f"blob-of-{path.name}")
    (snapshot / path.name).symlink_to(f"../../blobs/blob-of-{path.name}")
    return snapshot / path.name


@pytest.fixture(params=LAYOUTS, ids=lambda make: make.__name__)
def layout(request: pytest.FixtureRequest, tmp_path: Path, mini_config: dict[str, Any]) -> Layout:
    make: Callable[..., Layout] = request.param
    folder = tmp_path / "layout"
    folder.mkdir()
    return make(folder, mini_config)


def test_hash_and_digest_are_those_of_what_is_read(layout: Layout) -> None:
    identity = layout.identify()
    read = load_checkpoint(layout.reference, cache_dir=layout.cache, offline=True)
    again = read_checkpoint(identity)
    assert identity.sha256() == read.sha256 == again.sha256
    assert identity.digest() == read.digest == again.digest
    assert read.path == identity.weights
    assert all(torch.equal(read.state_dict[name], STATE[name]) for name in STATE)
    if layout.cache is None:
        name = layout.reference
        assert inspect_checkpoint(name, hash_content=True).sha256 == identity.sha256()


def test_size_is_that_of_all_weight_files(layout: Layout) -> None:
    identity = layout.identify()
    weights = [path for path in layout.files if path.name != "open_clip_config.json"]
    assert sorted(identity.weight_files) == sorted(weights)
    assert identity.nbytes == sum(path.stat().st_size for path in weights)


def test_signature_changes_with_every_file_and_with_nothing_else(layout: Layout) -> None:
    before = layout.identify().signature()
    beside = layout.files[0].parent / "notes.md"
    beside.write_text("unrelated")
    assert layout.identify().signature() == before
    seen: set[tuple[int, ...] | None] = {before}

    def look() -> None:
        """Take the signature, which nothing had before; None where there is no checkpoint."""
        try:
            signature = layout.identify().signature()
        except CheckpointError:
            return
        assert signature not in seen
        seen.add(signature)

    for path in layout.files:
        content = path.read_bytes()
        path.write_bytes(content)  # the same bytes, written again
        look()
        other = path.with_name("other")
        other.write_bytes(content)
        times = path.stat()
        os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
        other.replace(path)  # a link in the hub's cache becomes a file
        look()
        path.rename(path.with_name("gone"))
        look()
        path.with_name("gone").rename(path)
    assert len(seen) > 2 * len(layout.files)


def test_digest_changes_with_the_configuration(layout: Layout, mini_config: dict) -> None:
    before = layout.identify().digest()
    config = layout.files[0].parent / "open_clip_config.json"
    told_beside = config in layout.files
    content = {"model_cfg": mini_config, "preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}
    config.unlink(missing_ok=True)
    config.write_text(json.dumps(content))
    assert (layout.identify().digest() != before) == told_beside
    # A name that the user gives is for what does not tell its architecture.
    given = layout.identify(model="ViT-B-32")
    assert (given.digest() == layout.identify().digest()) == (
        told_beside or layout.reference.startswith("ViT")
    )
    config.write_text("{}")
    stood_in = layout.identify(model="ViT-B-32")
    if told_beside:
        assert stood_in.configuration()[0]["embed_dim"] == 512
        assert "that was named, ViT-B-32, is taken" in stood_in.configured().warnings[0]
        with pytest.raises(ArchitectureError):
            layout.identify().digest()


def test_a_tokenizer_beside_the_weights_counts_where_it_is_used(
    tmp_path: Path, mini_config: dict
) -> None:
    """With other tokens, the same weights embed other texts: nothing is known of them."""
    layout = single(tmp_path, mini_config)
    tokenizer = tmp_path / "tokenizer.json"

    def hashes(text: str) -> tuple[object, str]:
        tokenizer.write_text(text)
        identity = layout.identify()
        digest = identity.digest()
        assert digest == load_checkpoint(layout.reference, offline=True).digest
        return identity.signature(), digest

    (first, own), (second, still_own) = hashes("{}"), hashes('{"a": 1}')
    assert first != second
    assert own == still_own  # CLIP's own tokenizer is used
    text = {**mini_config["text_cfg"], "hf_tokenizer_name": "bert-base"}
    write_config(tmp_path, {**mini_config, "text_cfg": text})
    (_, one), (_, other) = hashes("{}"), hashes('{"a": 1}')
    assert one != other
    tokenizer.unlink()
    assert layout.identify().digest() not in (one, other)


def test_a_tokenizer_in_the_hubs_cache_counts_where_it_is_used(
    tmp_path: Path, mini_config: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--org--words" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    folder = tmp_path / "model"
    folder.mkdir()
    text = {**mini_config["text_cfg"], "hf_tokenizer_name": "org/words"}
    layout = single(folder, {**mini_config, "text_cfg": text})

    def hashes() -> tuple[object, str]:
        digest = layout.identify().digest()
        assert digest == load_checkpoint(layout.reference, offline=True).digest
        return layout.identify().signature(), digest

    seen = [hashes()]
    for name, content in (
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"a": 1}'),
        ("config.json", "{}"),  # tells transformers the class of the tokenizer
    ):
        (snapshot / name).write_text(content)
        seen.append(hashes())
    (folder / "tokenizer.json").write_text("[1]")  # goes first
    seen.append(hashes())
    assert len({signature for signature, _ in seen}) == len({d for _, d in seen}) == len(seen) == 5
    (snapshot / "tokenizer.json").write_text("[]")
    assert hashes() == seen[-1]


def test_a_missing_shard_is_named_and_has_no_size(tmp_path: Path) -> None:
    index, first, _ = shards(tmp_path)
    first.unlink()
    identity = identify_checkpoint(index)
    with pytest.raises(CheckpointError, match=first.name):
        _ = identity.nbytes
    with pytest.raises(CheckpointError, match=r"index\.json: is missing"):
        identity.sha256()
    assert -1 in identity.signature()


def test_shards_that_lead_out_are_not_hashed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    index, first, _ = shards(tmp_path / "model")
    first.rename(tmp_path / "secret")
    first.symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeCheckpointError, match="leads out of its folder"):
        identify_checkpoint(index).sha256()


def test_an_index_that_changes_after_it_was_found_is_noticed(
    tmp_path: Path, mini_config: dict
) -> None:
    index, first, _ = shards(tmp_path)
    write_config(tmp_path, mini_config)
    identity = identify_checkpoint(index)
    first.rename(tmp_path / "x.safetensors")
    text = index.read_text().replace(first.name, "x.safetensors")
    index.write_text(text)
    for use in (identity.sha256, lambda: read_checkpoint(identity)):
        with pytest.raises(CheckpointError, match="changed while it was read"):
            use()
    assert identify_checkpoint(index).sha256() != ""


def test_pickled_shards_are_read_and_safetensors_ones_lead_to_no_pickles(
    tmp_path: Path, mini_config: dict
) -> None:
    index, first, _ = shards(tmp_path, "bin")
    write_config(tmp_path, mini_config)
    assert load_checkpoint(tmp_path).format == "torch"
    safetensors.torch.save_file({"a": STATE["a"]}, first)
    with pytest.raises(CheckpointError, match=first.name):
        load_checkpoint(tmp_path)
    renamed = index.rename(tmp_path / "model.safetensors.index.json")
    with pytest.raises(UnsafeCheckpointError, match=r"plain name of a \.safetensors file"):
        identify_checkpoint(renamed)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("aaa.pt model.safetensors", "model.safetensors"),
        ("open_clip_model.safetensors model.safetensors.index.json", "open_clip_model.safetensors"),
        ("model.safetensors model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin model.safetensors", "model.safetensors"),
        ("open_clip_pytorch_model.pt", "open_clip_pytorch_model.pt"),
        ("open_clip_pytorch_model.pt epoch_1.pt", "open_clip_pytorch_model.pt"),
        ("x.pth.tar README.md", "x.pth.tar"),
        ("x.ckpt", "x.ckpt"),
        ("x.safetensors.index.json x-1.safetensors x-2.safetensors", "x.safetensors.index.json"),
        ("open_clip_config.json model.safetensors.index.json a.pt", "model.safetensors.index.json"),
        ("model.safetensors.index.json training_args.bin", "model.safetensors.index.json"),
        # open_clip knows no index of shards and takes whatever else is there.
        ("open_clip_model.safetensors.index.json model.safetensors", None),
        ("open_clip_model.safetensors.index.json aaa.bin", None),
        ("open_clip_config.json model.safetensors.index.json aaa.safetensors", None),
        ("open_clip_config.json x.safetensors.index.json aaa.safetensors", None),
        # open_clip takes what has no name of its own over a .pt that has one.
        ("open_clip_pytorch_model.pt x.safetensors", None),
        # Here open_clip and transformers load different files.
        ("pytorch_model.bin model.safetensors.index.json", None),
        ("a.pt b.pt", None),
        ("README.md", None),
    ],
)
def test_the_file_that_a_folder_means(tmp_path: Path, names: str, expected: str | None) -> None:
    for name in names.split():
        (tmp_path / name).touch()
    if expected is None:
        with pytest.raises(CheckpointError, match=r"name the one you mean|holds no weights"):
            find_weights(tmp_path)
    else:
        assert find_weights(tmp_path) == tmp_path / expected


def test_the_file_that_open_clip_takes_from_a_folder(tmp_path: Path) -> None:
    """Every pair of names that open_clip knows: what is scanned is what it would load."""
    from open_clip import factory

    names = ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"]
    names += ["open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "model.safetensors"]
    names += ["pytorch_model.bin", "pytorch_model.pth", "model.pth", "zzz.bin", "aaa.pt"]
    for k, first in enumerate(names):
        for second in names[k + 1 :]:
            folder = tmp_path / f"{first} {second}"
            folder.mkdir()
            (folder / first).touch()
            (folder / second).touch()
            try:
                found = find_weights(folder)
            except CheckpointError:
                assert {first, second} == {"zzz.bin", "aaa.pt"} or "transformers" in str(folder)
                continue
            assert str(found) == factory._find_checkpoint_in_dir(folder)
