"""Fashion-MNIST from IDX files: tiny ones made here, and the real ones where they are."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pydetox.data import (
    FASHION_NAMES,
    FASHION_TEMPLATES,
    default_templates,
    load_fashion_mnist,
    load_images,
    split_fashion_mnist,
)
from pydetox.data.fashion_mnist import DEBIAN_FOLDER
from pydetox.errors import DataError


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder: Path, count: int = 40, *, zipped: bool = True) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for offset, stem in enumerate(("train", "t10k")):
        rng = np.random.default_rng(offset)
        arrays[f"{stem}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{stem}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in arrays.items():
        content = idx(array)
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return arrays


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_the_files_are_read_from_a_folder_or_a_torchvision_root(tmp_path, zipped, below) -> None:
    arrays = write(tmp_path / below, zipped=zipped)
    for part, stem in (("train", "train"), ("test", "t10k")):
        found = load_fashion_mnist(28, part=part, folder=tmp_path)  # at its size: no interpolation
        for channel in range(3):
            expected = arrays[f"{stem}-images-idx3-ubyte"]
            assert np.array_equal(found.images[:, channel].numpy(), expected)
        assert found.labels is not None
        assert found.labels.tolist() == arrays[f"{stem}-labels-idx1-ubyte"].tolist()
        assert found.class_names == FASHION_NAMES


def test_images_are_enlarged_and_sampled(tmp_path) -> None:
    write(tmp_path)
    spec = f"fashion-mnist={tmp_path}"
    found = load_images(spec, image_size=32, max_images=20, seed=1)
    assert found.images.shape == (20, 3, 32, 32)
    assert found.labels is not None
    assert found.labels.bincount().tolist() == [2] * 10
    again = load_images(spec, image_size=32, max_images=20, seed=1)
    assert torch.equal(found.images, again.images)
    other = load_images(f"fashion-mnist-test={tmp_path}", image_size=32)
    assert len(other) == 40
    assert default_templates(spec) == FASHION_TEMPLATES
    names = FASHION_NAMES[::-1]
    turned = load_images(spec, image_size=32, max_images=20, seed=1, class_names=names)
    assert turned.labels is not None
    assert torch.equal(turned.labels, 9 - found.labels)
    with pytest.raises(DataError, match="name it as fashion-mnist="):
        load_images(tmp_path, image_size=32)


def test_the_parts_of_a_split_share_no_image(tmp_path) -> None:
    arrays = write(tmp_path)
    split = split_fashion_mnist(
        28, attacker=20, defender=10, validation=10, test=30, seed=3, folder=tmp_path
    )
    parts = (split.attacker, split.defender, split.validation)
    assert [len(p) for p in (*parts, split.test)] == [20, 10, 10, 30]
    seen = {bytes(x[0].numpy().tobytes()) for p in parts for x in p.images}
    known = {x.tobytes() for x in arrays["train-images-idx3-ubyte"]}
    assert seen == known  # every image once: 40 of 40
    tested = {x.tobytes() for x in arrays["t10k-images-idx3-ubyte"]}
    assert {bytes(x[0].numpy().tobytes()) for x in split.test.images} <= tested
    other = split_fashion_mnist(
        28, attacker=20, defender=10, validation=10, test=30, seed=4, folder=tmp_path
    )
    assert not torch.equal(split.attacker.images, other.attacker.images)
    with pytest.raises(DataError, match="50 images wanted, but there are 40"):
        split_fashion_mnist(
            28, attacker=30, defender=10, validation=10, test=1, seed=0, folder=tmp_path
        )


def test_missing_data_says_how_to_get_it(tmp_path) -> None:
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load_fashion_mnist(folder=tmp_path)
    write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte is missing"):
        load_fashion_mnist(folder=tmp_path, part="test")
    load_fashion_mnist(folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images-idx3", b"", "begins with nothing"),
        ("images-idx3", b"\x00\x00\x0d\x03" + bytes(12), "begins with 00 00 0d 03"),
        ("images-idx3", idx(np.zeros((4, 28, 27), np.uint8)), "announces 4x28x27"),
        ("images-idx3", idx(np.zeros((0, 28, 28), np.uint8)), "announces 0x28x28"),
        ("images-idx3", idx(np.zeros((4, 28, 28), np.uint8))[:-1], "3,135 bytes of values"),
        ("images-idx3", idx(np.zeros((4, 28, 28), np.uint8)) + b"x", "more than 3,136"),
        ("images-idx3", struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 28, 28), "1,000,000"),
        ("labels-idx1", idx(np.zeros(39, np.uint8)), "39 labels for 40 images"),
        ("labels-idx1", idx(np.full(40, 10, np.uint8)), "label 10; expected 0..9"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_refused(tmp_path, name, content, message, zipped) -> None:
    write(tmp_path, zipped=zipped)
    path = tmp_path / f"train-{name}-ubyte{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(DataError, match=message) as caught:
        load_fashion_mnist(folder=tmp_path)
    assert path.name in str(caught.value)


def test_a_broken_gzip_is_refused(tmp_path) -> None:
    write(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match="cannot be read"):
        load_fashion_mnist(folder=tmp_path)
    path.write_bytes(b"not gzip at all, but long enough")
    with pytest.raises(DataError, match="cannot be read"):
        load_fashion_mnist(folder=tmp_path)


def test_wrong_arguments_are_refused(tmp_path) -> None:
    write(tmp_path)
    for wrong in ({"image_size": 0}, {"part": "both"}, {"max_images": 0}):
        with pytest.raises(DataError):
            load_fashion_mnist(folder=tmp_path, **wrong)
    with pytest.raises(DataError, match="at least one image"):
        split_fashion_mnist(attacker=1, defender=0, validation=1, test=1, seed=0, folder=tmp_path)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_data_is_what_its_paper_says() -> None:
    test = load_images("fashion-mnist-test", image_size=28)
    assert test.images.shape == (10_000, 3, 28, 28)
    assert test.labels is not None
    assert test.labels.bincount().tolist() == [1000] * 10
    # The mean over the training images, as published, is 0.2860; that of the test images is close.
    assert abs(float(test.images.double().mean()) / 255 - 0.2868) < 0.001
    assert len(load_images("fashion-mnist", image_size=8)) == 60_000
