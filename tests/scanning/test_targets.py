from pathlib import Path

import pytest

from pydetox.checkpoints import identify_checkpoint
from pydetox.checkpoints.layout import find_weights
from pydetox.errors import CheckpointError, UsageError
from pydetox.scanning import find_targets


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "one/open_clip_model.safetensors",
        "one/open_clip_pytorch_model.bin",
        "one/open_clip_config.json",
        "two/deep/model.pt",
        "two/README.md",
        "sharded/model-00001-of-00002.safetensors",
        "sharded/model-00002-of-00002.safetensors",
        "sharded/model.safetensors.index.json",
        "orphan-00001-of-00002.safetensors",
        ".cache/hidden.pt",
    ):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "tree" / "one")
    (tmp_path / "tree" / "file-link.pt").symlink_to(tmp_path / "tree" / "two" / "deep" / "model.pt")
    return tmp_path / "tree"


def names(specs: list, root: Path, **more) -> list[str]:
    found = find_targets(specs, **more)
    return [str(Path(t.name).relative_to(root)) for t in found.targets]


def test_a_folder_is_searched_and_nothing_in_it_is_lost(tree: Path) -> None:
    found = find_targets([tree])
    assert [str(Path(t.name).relative_to(tree)) for t in found.targets] == [
        "file-link.pt",
        "orphan-00001-of-00002.safetensors",
        "one",
        "one/open_clip_pytorch_model.bin",
        "sharded/model.safetensors.index.json",
        "two/deep/model.pt",
    ]
    passed = {str(Path(n).relative_to(tree)): reason for n, reason in found.ignored}
    assert passed == {
        ".cache": "is a hidden folder",
        "link": "is a symbolic link to a folder",
        "one/open_clip_config.json": "is no weights file by its name",
        "sharded/model-00001-of-00002.safetensors": "is a part of model.safetensors.index.json",
        "sharded/model-00002-of-00002.safetensors": "is a part of model.safetensors.index.json",
        "two/README.md": "is no weights file by its name",
    }


def test_the_main_file_goes_by_the_name_of_its_folder(tree: Path) -> None:
    main = find_targets([tree / "one"]).targets[0]
    assert main.name == str(tree / "one")
    assert main.path == str(tree / "one" / "open_clip_model.safetensors")
    assert identify_checkpoint(main.reference).weights == Path(main.path)


def test_globs(tree: Path) -> None:
    assert names([f"{tree}/**/*.pt"], tree) == ["file-link.pt", "two/deep/model.pt"]
    assert names([f"{tree}/o*"], tree)[1] == "one/open_clip_pytorch_model.bin"
    (none,) = find_targets([f"{tree}/*.nothing"]).targets
    assert "no file matches" in str(none.problem)


def test_a_glob_that_matches_shards_means_the_whole_checkpoint(tree: Path) -> None:
    found = names([f"{tree}/sharded/*.safetensors"], tree)
    assert found == ["sharded/model.safetensors.index.json"]


def test_a_file_whose_name_looks_like_a_glob_or_like_open_clip(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "a[1].pt").touch()
    (tree / "A,B").touch()
    monkeypatch.chdir(tree)
    targets = find_targets(["a[1].pt", "A,B"]).targets
    assert [t.path for t in targets] == ["a[1].pt", "A,B"]
    assert targets[1].reference == str(tree / "A,B")


def test_lists_are_relative_to_themselves(tree: Path) -> None:
    path = tree / "two" / "models.txt"
    path.write_text("# ours\ndeep/model.pt\n\nhf-hub:org/repo@main\nViT-B-32,openai\n../one\n")
    found = find_targets([path])
    assert [t.name for t in found.targets] == [
        str(tree / "two" / "deep" / "model.pt"),
        "hf-hub:org/repo@main",
        "ViT-B-32,openai",
        str(tree / "two" / ".." / "one"),
        str(tree / "two" / ".." / "one" / "open_clip_pytorch_model.bin"),
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "models.txt\n"])
def test_lists_that_make_no_sense(tmp_path: Path, text: str) -> None:
    path = tmp_path / "models.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"models\.txt"):
        find_targets([path])


@pytest.mark.parametrize("text", ["", "hf-hub:../x", "local-dir:"])
def test_names_without_a_meaning(text: str) -> None:
    with pytest.raises(UsageError):
        find_targets([text])


def test_a_name_counts_once_and_what_is_missing_stays(tree: Path) -> None:
    missing = tree / "missing.pt"
    assert names([tree / "two", tree, missing, missing], tree).count("two/deep/model.pt") == 1
    assert names([missing], tree) == ["missing.pt"]


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    found = find_targets([tmp_path])
    assert found.targets == []
    assert found.ignored == [(str(tmp_path), "holds no weights files")]


def test_shards_share_all_targets_and_keep_them_when_the_list_grows(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.pt").touch()
    parts = [set(names([tmp_path], tmp_path, shard=(i, 3))) for i in (1, 2, 3)]
    assert set.union(*parts) == set(names([tmp_path], tmp_path))
    assert sum(map(len, parts)) == 40
    assert min(map(len, parts)) >= 5
    (tmp_path / "new.pt").touch()
    again = [set(names([tmp_path], tmp_path, shard=(i, 3))) for i in (1, 2, 3)]
    assert all(new - old <= {"new.pt"} for old, new in zip(parts, again, strict=True))


def test_the_signature_changes_with_the_file_and_with_its_configuration(tree: Path) -> None:
    target = find_targets([tree / "one"]).targets[0]
    before = target.signature()
    (tree / "one" / "open_clip_config.json").write_text("{}")
    after = target.signature()
    assert before != after
    Path(str(target.path)).write_bytes(b"other")
    assert target.signature() not in (before, after, None)


def test_the_state_of_a_training_is_passed_over(tmp_path):
    """As DeepSpeed (ZeRO stages 1 and 2) and transformers' Trainer write it beside the weights."""
    step = tmp_path / "logs" / "global_step5"
    trainer = tmp_path / "logs" / "checkpoint-500"
    names = {
        step: ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        trainer: ["model.safetensors", "optimizer.pt", "scheduler.pt", "training_args.bin"],
    }
    for folder, files in names.items():
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).write_bytes(b"")
    found = find_targets([tmp_path / "logs"])
    assert [Path(t.name).name for t in found.targets] == [
        "model.safetensors",
        "mp_rank_00_model_states.pt",
    ]
    reasons = {reason for _, reason in found.ignored}
    assert reasons == {"is the state of a training, no weights"}
    assert find_weights(step).name == "mp_rank_00_model_states.pt"
    with pytest.raises(CheckpointError, match=r"in a folder such as global_step5"):
        find_weights(step.parent)
