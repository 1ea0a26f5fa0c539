from __future__ import annotations

from pathlib import Path

import open_clip
import pytest

from pydetox.checkpoints import identify_checkpoint, parse_reference, resolve_model
from pydetox.errors import CheckpointError, UsageError


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("model.pt", "model.pt"),
        ("runs/demo/clean", "runs/demo/clean"),
        ("/a/b.safetensors", "/a/b.safetensors"),
        ("./a,b", "a,b"),
        ("epoch,3.pt", "epoch,3.pt"),
        ("dir/ViT-B-32,tag", "dir/ViT-B-32,tag"),
        ("ViT-B-32", "ViT-B-32"),
    ],
)
def test_paths(text: str, path: str) -> None:
    reference = parse_reference(text)
    assert (reference.kind, reference.path, reference.text) == ("path", Path(path), text)


def test_path_objects_are_always_paths() -> None:
    assert parse_reference(Path("ViT-B-32,openai")).kind == "path"


def test_home_directory() -> None:
    assert parse_reference("~/x.pt").path == Path.home() / "x.pt"


def test_local_dir() -> None:
    reference = parse_reference("local-dir:./runs/x")
    assert (reference.kind, reference.path) == ("local-dir", Path("runs/x"))


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("hf-hub:org/repo", "org/repo", None),
        (
            "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
            "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
            None,
        ),
        ("hf-hub:org/repo@v1.0", "org/repo", "v1.0"),
        ("hf-hub:org/repo@refs/pr/1", "org/repo", "refs/pr/1"),
        (f"hf-hub:o/r@{'a' * 40}", "o/r", "a" * 40),
    ],
)
def test_hub(text: str, repository: str, revision: str | None) -> None:
    reference = parse_reference(text)
    assert (reference.kind, reference.repository, reference.revision) == (
        "hf-hub",
        repository,
        revision,
    )


@pytest.mark.parametrize(
    "name",
    [
        "",
        "repo",
        "../repo",
        "org/..",
        "org/../../etc",
        "org/repo/file",
        "/etc/passwd",
        "org\\repo/x",
        "\\\\server/share",
        "org/repo@",
        "org/repo@../../x",
        "org/repo@/abs",
        "org/repo@a..b",
        "org/repo@a\nb",
        "org--x/repo",
        "org/repo\n",
        "org/répo",
        f"org/{'x' * 97}",
        f"org/repo@{'x' * 300}",
    ],
)
def test_hub_names_cannot_escape(name: str) -> None:
    with pytest.raises(UsageError, match="expected hf-hub:org/repo") as caught:
        parse_reference(f"hf-hub:{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "a\0b", "local-dir:"])
def test_meaningless(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


def test_every_open_clip_name() -> None:
    for model, tag in open_clip.list_pretrained():
        reference = parse_reference(f"{model},{tag}")
        assert (reference.kind, reference.model, reference.tag) == ("open_clip", model, tag)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("openai/clip-vit-base-patch32", "; a repository of the hub is written hf-hub:openai/clip"),
        ("org/repo@main", "; a repository of the hub is written hf-hub:org/repo@main"),
        ("ViT-B-32", "; open_clip writes ViT-B-32,TAG, such as ViT-B-32,openai"),
        ("ViT-B/32", "; open_clip writes ViT-B-32,TAG, such as ViT-B-32,openai"),
        ("ViT-S-16", "; open_clip writes ViT-S-16,TAG"),
        ("ViT-B/32,openai", "; open_clip writes ViT-B-32,openai"),
        ("ViT-L/14@336px", "; open_clip writes ViT-L-14-336,TAG, such as ViT-L-14-336,openai"),
        ("https://huggingface.co/org/repo/", "; a repository of the hub is written hf-hub:org/re"),
        ("https://x.org/model.pt", "; an address on the web is not read: download the file"),
        ("runs/model.pt", ""),
        ("a/b/c", ""),
        ("nothing", ""),
    ],
)
def test_a_name_that_is_no_file_gets_a_hint(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in (name, str(tmp_path / name)):
        with pytest.raises(CheckpointError) as caught:
            identify_checkpoint(text)
        message = str(caught.value)
        assert "no such file or folder" in message
        assert (hint in message) if hint else message.endswith("folder")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ViT-B/32", "open_clip calls it ViT-B-32 (ViT-B-32-quickgelu for OpenAI's weights)"),
        ("ViT-L/14@336px", "open_clip calls it ViT-L-14-336"),
        ("openai/clip-vit-base-patch32", "is a checkpoint, hf-hub:openai/clip-vit-base-patch32"),
        ("timm/resnet18", "as a classifier, it is written timm:resnet18"),
        ("resnet18", "is written timm:resnet18 or torchvision:resnet18"),
        ("preactresnet18", "is written backdoorbench:preactresnet18"),
        ("timm:resnet-18", "timm has no model 'resnet-18'; did you mean resnet18"),
        ("torchvision:resnet-18", "did you mean resnet18"),
        ("backdoorbench:preactresnet-18", "did you mean preactresnet18"),
        ("hf-hub:laion/x", "'hf-hub:laion/x': expected open_clip's name of one"),
        ("https://x.org/config.json", "expected open_clip's name of one"),
    ],
)
def test_an_architecture_of_another_spelling_gets_a_hint(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_model(name)
    assert hint in str(caught.value)
