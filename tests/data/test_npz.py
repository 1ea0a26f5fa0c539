"""The .npz source: every layout and dtype, and files that lie, are damaged or carry pickles."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pydetox.data.npz
from pydetox.data import load_images
from pydetox.errors import DataError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 8, 8), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def write(tmp_path: Path, **arrays: Any) -> Path:
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_layouts(tmp_path: Path, compressed: bool) -> None:
    save = np.savez_compressed if compressed else np.savez
    expected = torch.from_numpy(COLOUR.transpose(0, 3, 1, 2).copy())
    path = tmp_path / "set.NPZ.npz"
    save(path, images=COLOUR)
    assert torch.equal(load_images(path, image_size=8).images, expected)
    save(path, images=COLOUR.transpose(0, 3, 1, 2))
    assert torch.equal(load_images(path, image_size=8).images, expected)
    save(path, images=np.asfortranarray(COLOUR))
    assert torch.equal(load_images(path, image_size=8).images, expected)
    save(path, images=GREY)
    grey = load_images(path, image_size=8)
    assert torch.equal(grey.images, torch.from_numpy(GREY)[:, None].repeat(1, 3, 1, 1))
    assert grey.labels is None
    assert grey.class_names is None
    assert grey.name == "set.NPZ"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_are_rounded(tmp_path: Path, dtype: Any) -> None:
    path = write(tmp_path, images=(COLOUR / 255).astype(dtype))
    ours = load_images(path, image_size=8).images.numpy().transpose(0, 2, 3, 1)
    assert np.array_equal(ours, COLOUR)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.uint64, ">i2"])
def test_labels_and_names(tmp_path: Path, dtype: Any) -> None:
    names = np.array(["ape", "bee", "cat"])
    path = write(tmp_path, images=COLOUR, labels=LABELS.astype(dtype), class_names=names)
    image_set = load_images(path, image_size=8)
    assert image_set.labels is not None
    assert image_set.labels.tolist() == LABELS.tolist()
    assert image_set.class_names == ("ape", "bee", "cat")
    turned = load_images(path, image_size=8, class_names=("cat", "bee", "eel", "ape"))
    assert turned.labels is not None
    assert turned.labels.tolist() == [3, 1, 0, 3, 1, 0]
    with pytest.raises(DataError, match="class 'cat' is not one of the 2 class names"):
        load_images(path, image_size=8, class_names=("ape", "bee"))


def test_names_without_labels_and_labels_without_names(tmp_path: Path) -> None:
    path = write(tmp_path, images=COLOUR, class_names=np.array(["ape", "bee"]))
    assert load_images(path, image_size=8).class_names == ("ape", "bee")
    path = write(tmp_path, images=COLOUR, labels=LABELS)
    assert load_images(path, image_size=8, class_names="xyz").class_names == ("x", "y", "z")
    with pytest.raises(DataError, match="label 2, but there are only 2 class names"):
        load_images(path, image_size=8, class_names=("x", "y"))


def test_labels_that_mean_nothing_are_dropped_where_none_are_required(tmp_path: Path) -> None:
    path = write(tmp_path, images=COLOUR, labels=LABELS, class_names=np.array(["a", "b", "c"]))
    given = {"image_size": 8, "class_names": ["cat", "dog"], "labels_required": False}
    image_set = load_images(path, **given)
    assert image_set.labels is None
    assert image_set.class_names == ("cat", "dog")
    with pytest.raises(DataError, match="class 'b' is not one of the 2 class names"):
        load_images(path, **given | {"class_names": ["a", "dog"]})


def test_other_size(tmp_path: Path) -> None:
    tall = RNG.integers(0, 256, (2, 12, 10, 3), dtype=np.uint8)
    path = write(tmp_path, images=tall)
    with pytest.raises(DataError, match=r"images are 12x10 pixels; expected 8x8"):
        load_images(path, image_size=8)
    ours = load_images(path, image_size=8, resize=True).images
    for index in range(2):
        scaled = Image.fromarray(tall[index]).resize((8, 9), Image.Resampling.BICUBIC)
        assert np.array_equal(ours[index].numpy().transpose(1, 2, 0), np.asarray(scaled)[:8])
    grey = write(tmp_path, images=tall[..., 0] / 255)
    assert load_images(grey, image_size=8, resize=True).images.shape == (2, 3, 8, 8)


def test_max_images(tmp_path: Path) -> None:
    path = write(tmp_path, images=COLOUR, labels=LABELS)
    some = load_images(path, image_size=8, max_images=3, seed=1)
    assert some.labels is not None
    assert sorted(some.labels.tolist()) == [0, 1, 2]
    expected = load_images(path, image_size=8).sample(3, seed=1)
    assert torch.equal(some.images, expected.images)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": LABELS}, "no array 'images'; found labels"),
        ({}, "no array 'images'; found nothing"),
        (
            {"images": COLOUR, "label": LABELS},
            "array 'label' is not known; expected images, labels",
        ),
        ({"images": COLOUR[:0]}, r"zero images or pixels, shape \[0, 8, 8, 3\]"),
        ({"images": COLOUR[0, 0]}, r"shape \[8, 3\]; expected \[N, H, W\]"),
        ({"images": COLOUR[..., :2]}, r"shape \[6, 8, 8, 2\]; expected"),
        ({"images": COLOUR[:, :3]}, r"\[6, 3, 8, 3\]; where the channels are is ambiguous"),
        ({"images": COLOUR.astype(np.int64)}, "dtype int64; expected uint8, or float"),
        ({"images": COLOUR.astype(np.float32)}, r"values 0 to 255; expected \[0, 1\]"),
        ({"images": COLOUR - 0.5}, r"expected \[0, 1\]"),
        ({"images": np.full((2, 8, 8), np.nan)}, r"values nan to nan; expected \[0, 1\]"),
        ({"images": np.full((2, 8, 8), np.inf)}, r"values inf to inf; expected \[0, 1\]"),
        ({"images": COLOUR, "labels": LABELS[:5]}, "6 images but 5 labels"),
        ({"images": COLOUR, "labels": LABELS[:, None]}, r"labels are int64 \[6, 1\]"),
        ({"images": COLOUR, "labels": LABELS * 1.0}, "labels are float64"),
        ({"images": COLOUR, "labels": LABELS - 1}, "label -1"),
        (
            {"images": COLOUR, "labels": LABELS.astype(np.uint64) + 2**63},
            "label 9223372036854775810",
        ),
        ({"images": COLOUR, "class_names": LABELS}, "class_names are int64"),
        (
            {"images": COLOUR, "labels": LABELS, "class_names": np.array(["a", "b"])},
            "label 2, but there are only 2 class names",
        ),
    ],
)
def test_contents_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_images(path, image_size=8)
    assert "set" in str(caught.value)


def test_labels_outside_stored_names_with_a_caller_s_names(tmp_path: Path) -> None:
    path = write(tmp_path, images=COLOUR, labels=LABELS, class_names=np.array(["a", "b"]))
    with pytest.raises(DataError, match=r"labels 0\.\.2, but 2 class names"):
        load_images(path, image_size=8, class_names=("a", "b", "c"))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    path = write(tmp_path, images=COLOUR, class_names=np.array([Payload(mark)], dtype=object))
    with pytest.raises(DataError, match="holds pickled Python objects"):
        load_images(path, image_size=8)
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(DataError, match=r"not a readable \.npz file"):
        load_images(path, image_size=8)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", pickle.dumps(Payload(mark)))
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_images(path, image_size=8)
    assert not mark.exists()


def forge(path: Path, header: str, body: bytes = b"") -> None:
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + body
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", member)


def test_forged_sizes_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 8, 8, 3)}\n"
    forge(path, header % 10**18, b"\0" * 192)
    with pytest.raises(DataError, match=r"announces uint8 .* bytes, but 192 are stored"):
        load_images(path, image_size=8)
    forge(path, header % 1, b"\0" * 191)
    with pytest.raises(DataError, match="192 bytes, but 191 are stored"):
        load_images(path, image_size=8)
    forge(path, "{'descr': '|u1', 'shape': 3", b"")
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_images(path, image_size=8)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydetox.data.npz, "BOMB_BYTES", 100_000)  # a small bomb will do
    path = tmp_path / "set.npz"
    np.savez_compressed(path, images=np.zeros((1000, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"decompression bomb"):
        load_images(path, image_size=8)
    np.savez(path, images=np.zeros((1000, 8, 8, 3), dtype=np.uint8))
    assert len(load_images(path, image_size=8)) == 1000


def test_member_stored_twice(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    member = io.BytesIO()
    np.save(member, COLOUR)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", member.getvalue())
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("images.npy", member.getvalue())
    with pytest.raises(DataError, match="stored twice"):
        load_images(path, image_size=8)


def test_any_damage_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez_compressed(path, images=COLOUR, labels=LABELS)
    content = path.read_bytes()
    rng = np.random.default_rng(1)
    messages = []
    for _ in range(150):
        damaged = bytearray(content)
        if rng.random() < 0.3:
            del damaged[int(rng.integers(0, len(content))) :]
        for position in rng.integers(0, len(damaged) or 1, 3):
            if damaged:
                damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            load_images(path, image_size=8)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all("set.npz" in message or "set:" in message for message in messages)
