"""The .npz source: every layout and dtype, and files that lie, are damaged or carry pickles."""

from __future__ import annotations

import io
import os
import pickle
import re
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
    assert load_images(path, image_size=8, class_names=list("xyz")).class_names == ("x", "y", "z")
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
        ({"images": COLOUR[:0]}, r"zero images or pixels, shape \[0, 8, 8, 3\]"),
        ({"images": COLOUR[0, 0]}, r"shape \[8, 3\]; expected \[N, H, W\]"),
        ({"images": COLOUR[..., :2]}, r"shape \[6, 8, 8, 2\]; expected"),
        ({"images": COLOUR[:, :3]}, r"\[6, 3, 8, 3\]; where the channels are is ambiguous"),
        ({"images": COLOUR.astype(np.int64) - 1}, r"values -1 to 25\d; expected 0\.\.255"),
        ({"images": COLOUR.astype(np.int64) + 1}, r"values \d to 256; expected 0\.\.255"),
        ({"images": COLOUR > 9}, "dtype bool; expected whole numbers"),
        ({"images": COLOUR * 0.999}, r"expected 0\.\.255, whole, or \[0, 1\]"),
        ({"images": COLOUR / 255 - 0.5}, r"expected 0\.\.255, whole, or \[0, 1\]"),
        ({"images": np.full((2, 8, 8), np.nan)}, "values nan to nan; expected"),
        ({"images": np.full((2, 8, 8), np.inf)}, "values inf to inf; expected"),
        ({"images": COLOUR, "labels": LABELS[:5]}, "6 images but 5 labels"),
        ({"images": COLOUR, "labels": LABELS[:, None, None]}, r"labels are int64 \[6, 1, 1\]"),
        ({"images": COLOUR, "labels": LABELS + 0.5}, "labels are float64 .* not whole"),
        ({"images": COLOUR, "labels": np.ones((6, 2))}, "a single 1 in each row"),
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


@pytest.mark.parametrize(
    "images",
    [
        COLOUR.astype(np.int64),
        COLOUR.astype(np.float32),
        COLOUR.astype(">u2"),
        np.concatenate([COLOUR, COLOUR[..., :1]], axis=-1),
        np.concatenate([COLOUR, COLOUR[..., :1]], axis=-1).transpose(0, 3, 1, 2),
    ],
    ids=["int64", "floats to 255", "big-endian", "RGBA", "RGBA, channels first"],
)
def test_what_other_tools_write_as_images(tmp_path: Path, images: np.ndarray) -> None:
    found = load_images(write(tmp_path, images=images), image_size=8).images
    assert np.array_equal(found.numpy().transpose(0, 2, 3, 1), COLOUR)
    grey = load_images(write(tmp_path, images=GREY[..., None]), image_size=8).images
    assert np.array_equal(grey[:, 1].numpy(), GREY)


@pytest.mark.parametrize(
    "labels",
    [
        LABELS[:, None],
        LABELS.astype(np.float32),
        np.eye(3)[LABELS],
        np.eye(3, dtype=bool)[LABELS] * 1,
    ],
    ids=["a column", "floats", "one-hot", "one-hot integers"],
)
def test_what_other_tools_write_as_labels_and_names(tmp_path: Path, labels: np.ndarray) -> None:
    path = write(tmp_path, images=COLOUR, labels=labels, class_names=np.array([b"a", b"b", b"c"]))
    found = load_images(path, image_size=8)
    assert found.labels is not None
    assert found.labels.tolist() == LABELS.tolist()
    assert found.class_names == ("a", "b", "c")
    assert found.report is not None
    assert found.report.line() is None


def test_the_arrays_of_keras_and_medmnist_and_others_that_are_not_read(tmp_path: Path) -> None:
    keras = {"x_train": COLOUR[:2], "y_train": LABELS[:2], "x_test": COLOUR, "y_test": LABELS}
    found = load_images(write(tmp_path, **keras), image_size=8)
    assert len(found) == 6
    assert found.report is not None
    assert found.report.line() == (
        f"{tmp_path / 'set.npz'}: 6 images of 3 classes; its arrays 'x_test' and 'y_test' are "
        "read; not read: 'x_train', 'y_train'"
    )
    medmnist = {
        "train_images": COLOUR[:1],
        "val_images": COLOUR[:4],
        "val_labels": LABELS[:4, None],
    }
    found = load_images(write(tmp_path, **medmnist), image_size=8)
    assert found.labels is not None
    assert found.labels.tolist() == LABELS[:4].tolist()
    path = write(tmp_path, images=COLOUR, labelz=LABELS)
    found = load_images(path, image_size=8)
    assert found.labels is None
    assert found.report is not None
    assert found.report.to_dict()["notes"] == ["not read: 'labelz'"]
    with pytest.raises(DataError, match=r"not read: 'labelz'; expected nothing else"):
        load_images(path, image_size=8, strict=True)


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


@pytest.mark.parametrize("kind", [str, bytes])
def test_labels_that_are_names(tmp_path: Path, kind: type) -> None:
    images = np.repeat(GREY[:1], 3, axis=0)

    def labels(*names: str) -> Any:
        return np.array([one.encode() if kind is bytes else one for one in names])

    path = write(tmp_path, images=images, labels=labels("owl", "cat", "owl"))
    for names, found in ((None, [1, 0, 1]), (("dog", "owl", "cat"), [1, 2, 1])):
        read = load_images(path, image_size=8, class_names=names)
        assert read.labels is not None
        assert read.labels.tolist() == found
        assert read.class_names == (names or ("cat", "owl"))
    stored = np.array(["owl", "dog", "cat"])
    path = write(tmp_path, images=images, labels=labels("owl", "cat", "owl"), class_names=stored)
    read = load_images(path, image_size=8)
    assert read.labels is not None
    assert read.labels.tolist() == [0, 2, 0]
    assert read.class_names == ("owl", "dog", "cat")
    path = write(tmp_path, images=images, labels=labels("1", "0", "2")[:, None])
    read = load_images(path, image_size=8)
    assert read.labels is not None
    assert read.labels.tolist() == [1, 0, 2]
    for given, message in (
        (labels("owl", "", "owl"), r"1 of 3 images have no label \(image 1\)"),
        (labels("owl", "cat"), "3 images but 2 labels"),
    ):
        with pytest.raises(DataError, match=message):
            load_images(write(tmp_path, images=images, labels=given), image_size=8)


def test_messages_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, images=COLOUR, labels=LABELS)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: label"):
        load_images(path, image_size=8, class_names=["only"])
    np.save(tmp_path / "a.npy", COLOUR)
    with pytest.raises(
        DataError, match=r"a\.npy: a \.npy file is not read; save the array as \.npz"
    ):
        load_images(tmp_path / "a.npy", image_size=8)
