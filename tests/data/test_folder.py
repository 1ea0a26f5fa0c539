"""ImageFolder: pixels as torchvision makes them, order, labels, damaged and hostile files."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from pydetox.data import Resizing, load_images
from pydetox.errors import DataError


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def make_folder(root: Path, classes: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(40, 30, seed=100 * number + index).save(root / name / f"{index:03d}.png")
    return root


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
@pytest.mark.parametrize(
    "size", [(32, 32), (100, 61), (61, 100), (33, 32), (20, 17), (301, 32), (1, 1), (1, 9)]
)
def test_pixels_are_those_of_torchvision(
    tmp_path: Path, size: tuple[int, int], interpolation: str
) -> None:
    image = picture(*size)
    image.save(tmp_path / "a.png")
    ours = load_images(tmp_path, image_size=32, interpolation=interpolation).images[0]
    theirs = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(32),
            transforms.PILToTensor(),
        ]
    )(image)
    assert torch.equal(ours, theirs)


def test_labels_names_and_order(tmp_path: Path) -> None:
    make_folder(tmp_path, {"b": 2, "a": 3, "C": 1})
    (tmp_path / "a" / "deeper").mkdir()
    picture(40, 30, seed=999).save(tmp_path / "a" / "deeper" / "0.JPEG")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / ".hidden.png").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    image_set = load_images(str(tmp_path), image_size=8)
    assert image_set.class_names == ("C", "a", "b")
    assert image_set.labels is not None
    assert image_set.labels.tolist() == [0, 1, 1, 1, 1, 2, 2]
    assert image_set.name == tmp_path.name
    # "000.png" < "001.png" < "002.png" < "deeper/0.JPEG"
    lone = tmp_path.parent / "lone"
    lone.mkdir()
    (tmp_path / "a" / "deeper" / "0.JPEG").rename(lone / "0.jpeg")
    assert torch.equal(load_images(lone, image_size=8).images[0], image_set.images[4])


def test_class_names_of_the_caller(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 1, "dog": 2})
    image_set = load_images(tmp_path, image_size=8, class_names=["eel", "dog", "cat"])
    assert image_set.labels is not None
    assert image_set.labels.tolist() == [1, 1, 2]
    assert image_set.class_names == ("eel", "dog", "cat")
    with pytest.raises(
        DataError, match=r"class 'cat' is not one of the 2 class names \('dog', 'eel'\)"
    ):
        load_images(tmp_path, image_size=8, class_names=["dog", "eel"])
    with pytest.raises(DataError, match="'dog' stands more than once"):
        load_images(tmp_path, image_size=8, class_names=["dog", "cat", "dog"])


def test_folders_that_are_no_classes_are_unlabelled_where_labels_are_not_required(
    tmp_path: Path,
) -> None:
    make_folder(tmp_path / "photos", {"all": 3})
    names = [f"class {k}" for k in range(40)]
    with pytest.raises(DataError, match="class 'all' is not one of the 40 class names"):
        load_images(tmp_path / "photos", image_size=8, class_names=names)
    given = {"image_size": 8, "class_names": names, "labels_required": False}
    one = load_images(tmp_path / "photos", **given)
    assert one.labels is None
    assert one.class_names == tuple(names)
    assert torch.equal(one.images, load_images(tmp_path / "photos" / "all", image_size=8).images)
    make_folder(tmp_path / "photos", {"more": 2})
    assert len(load_images(tmp_path / "photos", **given)) == 5
    assert len(load_images(tmp_path / "photos", **given, max_images=4)) == 4
    # Folders of which some are classes are classes, all of them.
    with pytest.raises(DataError, match="class 'more' is not one of the 41 class names"):
        load_images(tmp_path / "photos", **given | {"class_names": ["all", *names]})
    labelled = load_images(tmp_path / "photos", **given | {"class_names": ["more", "all"]})
    assert labelled.labels is not None
    assert labelled.labels.tolist() == [0, 0, 1, 1, 1]
    for path in (tmp_path / "photos").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="zero images in its folders"):
        load_images(tmp_path / "photos", **given)


def test_unlabelled_folder(tmp_path: Path) -> None:
    for index in range(3):
        picture(9, 9, index).save(tmp_path / f"{index}.bmp")
    image_set = load_images(tmp_path, image_size=9)
    assert image_set.labels is None
    assert len(image_set) == 3


def test_result_does_not_depend_on_workers(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 9, "b": 8})
    one = load_images(tmp_path, image_size=12, workers=1)
    many = load_images(tmp_path, image_size=12, workers=7)
    assert torch.equal(one.images, many.images)


def test_max_images_is_a_stratified_sample_and_opens_nothing_else(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 10, "b": 20})
    everything = load_images(tmp_path, image_size=8)
    some = load_images(tmp_path, image_size=8, max_images=9, seed=2)
    expected = everything.sample(9, seed=2)
    assert torch.equal(some.images, expected.images)
    assert some.labels is not None
    assert expected.labels is not None
    assert torch.equal(some.labels, expected.labels)
    assert len(load_images(tmp_path, image_size=8, max_images=31)) == 30


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_image_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    make_folder(tmp_path, {"a": 5})
    bad = tmp_path / "a" / "002.png"
    content = bad.read_bytes()
    bad.write_bytes(
        {"truncated": content[: len(content) // 2], "garbage": b"x" * 500, "empty": b""}[damage]
    )
    (tmp_path / "a" / "004.png").write_bytes(b"also bad")
    with pytest.raises(DataError, match=r"002\.png: cannot be read as an image") as caught:
        load_images(tmp_path, image_size=8, workers=3, strict=True)
    assert "\n" not in str(caught.value)
    found = load_images(tmp_path, image_size=8, workers=3)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 0]
    assert found.report is not None
    assert found.report.line() == (
        f"{tmp_path}: 3 images of 1 class; left out: 2 that cannot be read as images "
        "(a/002.png, a/004.png)"
    )
    for path in (tmp_path / "a").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"000\.png: cannot be read as an image"):
        load_images(tmp_path, image_size=8)


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that announces any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 12_000, 60_000])
def test_decompression_bomb_is_refused(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    with pytest.raises(DataError, match=r"bomb\.png: .*pixels"):
        load_images(tmp_path, image_size=8)


def test_bomb_by_aspect_ratio_is_refused(tmp_path: Path) -> None:
    # One pixel high: harmless as stored, 224 x 22 million after scaling its shorter side.
    Image.new("RGB", (100_000, 1)).save(tmp_path / "thin.png")
    with pytest.raises(
        DataError, match=r"thin\.png, scaled to a shorter side of 224: 22400000x224 pixels"
    ):
        load_images(tmp_path, image_size=224)


def test_folders_that_make_no_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="zero images"):
        load_images(tmp_path, image_size=8)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=r"zero images in its folders \(left out: 1 without .* \(a"):
        load_images(tmp_path, image_size=8)
    picture(8, 8).save(tmp_path / "loose.png")
    with pytest.raises(DataError, match=r"both images \(loose.png\) and folders \(a\)"):
        load_images(tmp_path, image_size=8)


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match="cannot list the folder: Permission denied"):
        load_images(tmp_path, image_size=8)


def test_image_without_pixels() -> None:
    with pytest.raises(DataError, match="empty: 0x5 pixels; expected a size above 0"):
        Resizing(8)(Image.new("RGB", (0, 5)), "empty")


def test_wrong_arguments(tmp_path: Path) -> None:
    picture(8, 8).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="image_size is 0"):
        load_images(tmp_path, image_size=0)
    with pytest.raises(DataError, match="max_images is 0"):
        load_images(tmp_path, image_size=8, max_images=0)
    with pytest.raises(DataError, match="workers is 0"):
        load_images(tmp_path, image_size=8, workers=0)
    with pytest.raises(DataError, match="interpolation 'cubic' is not known"):
        load_images(tmp_path, image_size=8, interpolation="cubic")
    with pytest.raises(DataError, match="resize_mode 'crop' is not known"):
        load_images(tmp_path, image_size=8, resize_mode="crop")
    with pytest.raises(DataError, match="fill_color is 256"):
        load_images(tmp_path, image_size=8, fill_color=256)
    with pytest.raises(DataError, match="no such file or folder"):
        load_images(tmp_path / "missing", image_size=8)
    with pytest.raises(DataError, match=r"are not fetched by name: save images of cifar-10"):
        load_images("cifar-10", image_size=8)
    with pytest.raises(DataError, match=r"a\.png: not an image source"):
        load_images(tmp_path / "a.png", image_size=8)
