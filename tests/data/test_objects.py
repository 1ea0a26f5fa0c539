"""Arrays, lists of pictures, and data sets of torch and Hugging Face, as image sets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from pydetox.data import ImageSet, load_images
from pydetox.errors import DataError

SIZE = 8


def pixels(count: int = 6, side: int = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def expected(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


class Pictures(Dataset):
    """As torchvision's: rows of (picture, label), `classes` and `targets`."""

    def __init__(self, images: np.ndarray, transform: Any = None) -> None:
        self.images, self.transform = images, transform
        self.targets = [k % 3 for k in range(len(images))]
        self.classes = ["cat", ("dog", "hound"), "owl"]
        self.read = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.read += 1
        image = Image.fromarray(self.images[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]


class ClassLabel:
    names = ("cat", "dog", "owl")


class Table:
    """As Hugging Face's: columns, features, rows as mappings."""

    def __init__(self, images: np.ndarray, labels: list[int], decoded: bool = True) -> None:
        self.images, self.labels, self.decoded = images, labels, decoded
        self.column_names = ["id", "img", "fine"]
        self.features = {"fine": ClassLabel()}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return self.labels
        image = self.images[key]
        picture = Image.fromarray(image) if self.decoded else {"bytes": png(image), "path": None}
        return {"id": key, "img": picture, "fine": self.labels[key]}


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: torch.from_numpy(x),
        lambda x: torch.from_numpy(x).permute(0, 3, 1, 2),
        lambda x: x.astype(np.float32) / 255,
        lambda x: [Image.fromarray(one) for one in x],
        lambda x: [torch.from_numpy(one).permute(2, 0, 1) / 255 for one in x],
        lambda x: [png(one) for one in x],
        lambda x: tuple(Image.fromarray(one) for one in x),
        lambda x: {"images": x},
        lambda x: TensorDataset(torch.from_numpy(x).permute(0, 3, 1, 2)),
    ],
    ids=["array", "tensor", "first", "floats", "pil", "to_tensor", "bytes", "tuple", "map", "set"],
)
def test_unlabelled_images_of_every_kind_have_the_same_pixels(make: Any) -> None:
    found = load_images(make(pixels()), image_size=SIZE)
    assert torch.equal(found.images, expected(pixels()))
    assert found.labels is None
    assert found.class_names is None


def test_labels_come_with_arrays_pairs_and_lists() -> None:
    labels = np.arange(6) % 3
    for data in (
        (pixels(), labels),
        (pixels(), labels[:, None].astype(np.float64)),
        (pixels(), np.eye(3)[labels]),
        {"image": pixels(), "label": labels.tolist()},
        [(Image.fromarray(x), int(y)) for x, y in zip(pixels(), labels, strict=True)],
        [{"image": x, "label": torch.tensor(y)} for x, y in zip(pixels(), labels, strict=True)],
        TensorDataset(torch.from_numpy(pixels()).permute(0, 3, 1, 2), torch.from_numpy(labels)),
    ):
        found = load_images(data, image_size=SIZE, class_names=("a", "b", "c"))
        assert found.labels is not None
        assert found.labels.tolist() == labels.tolist()
        assert found.class_names == ("a", "b", "c")


def test_labels_that_are_names_are_matched_by_name() -> None:
    data = [(x, name) for x, name in zip(pixels(3), ("owl", "cat", "owl"), strict=True)]
    found = load_images(data, image_size=SIZE)
    assert found.class_names == ("cat", "owl")
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0, 1]
    found = load_images(data, image_size=SIZE, class_names=("owl", "dog", "cat"))
    assert found.labels is not None
    assert found.labels.tolist() == [0, 2, 0]


def test_a_data_set_of_torchvision_its_part_and_its_loader() -> None:
    data = Pictures(pixels(9))
    found = load_images(data, image_size=SIZE)
    assert found.class_names == ("cat", "dog", "owl")
    assert torch.equal(found.images, expected(pixels(9)))
    part = Subset(data, [4, 0])
    assert torch.equal(load_images(part, image_size=SIZE).images, found.images[[4, 0]])
    assert load_images(part, image_size=SIZE).class_names == ("cat", "dog", "owl")
    loader = DataLoader(data, batch_size=2, shuffle=True)
    assert torch.equal(load_images(loader, image_size=SIZE).images, found.images)
    data.read = 0
    few = load_images(data, image_size=SIZE, max_images=3, seed=1)
    assert data.read == 3  # no other picture is decoded
    assert few.labels is not None
    assert sorted(few.labels.tolist()) == [0, 1, 2]


def test_names_of_the_caller_for_numbers_of_a_data_set() -> None:
    data = Pictures(pixels(6))
    # The same names in another order are matched by name, others by their place.
    found = load_images(data, image_size=SIZE, class_names=("owl", "dog", "cat"))
    assert found.labels is not None
    assert found.labels.tolist() == [2, 1, 0, 2, 1, 0]
    found = load_images(data, image_size=SIZE, class_names=("cat", "a hound", "owl"))
    assert found.labels is not None
    assert found.labels.tolist() == data.targets
    with pytest.raises(DataError, match="class 'cat' is not one of the 3 class names"):
        load_images(data, image_size=SIZE, class_names=("owl", "hound", "bird"))


@pytest.mark.parametrize("decoded", [True, False])
def test_a_data_set_of_hugging_face(decoded: bool) -> None:
    found = load_images(Table(pixels(), [0, 1, 2, 0, 1, 2], decoded), image_size=SIZE)
    assert torch.equal(found.images, expected(pixels()))
    assert found.class_names == ClassLabel.names
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert load_images(Table(pixels(), [-1] * 6), image_size=SIZE).labels is None


def test_a_data_set_of_hugging_face_with_a_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    # Its hash of a function does not work with all releases of pyarrow.
    hasher = datasets.fingerprint.Hasher
    monkeypatch.setattr(hasher, "hash", classmethod(lambda cls, value: str(id(value))))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])}
    )
    content = {"image": [Image.fromarray(x) for x in pixels()], "label": [0, 1, 2, 0, 1, 2]}
    data = datasets.Dataset.from_dict(content, features=features)
    prepared = data.with_transform(
        lambda rows: {
            "pixel_values": [np.asarray(x) / 127.5 - 1 for x in rows["image"]],
            "label": rows["label"],
        }
    )
    line = r"has pixel_values, label, and not 'image', .* give .*: data.with_format\(None\)"
    with pytest.raises(DataError, match=line):
        load_images(prepared, image_size=SIZE)
    found = load_images(prepared.with_format(None), image_size=SIZE)
    assert torch.equal(found.images, expected(pixels()))
    turned = data.with_transform(
        lambda rows: {"image": [x.rotate(180) for x in rows["image"]], "label": rows["label"]}
    )
    found = load_images(turned, image_size=SIZE)
    assert torch.equal(found.images, expected(pixels()[:, ::-1, ::-1]))
    assert found.labels is not None
    assert found.labels.tolist() == content["label"]


class Transformed(Table):
    """As `Table` with a transform that wants whole rows and renames the pictures."""

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            raise KeyError("img")
        return {"pixel_values": torch.zeros(3, SIZE, SIZE), "fine": self.labels[key]}


def test_a_transform_that_renames_the_pictures() -> None:
    line = r"row 0: has pixel_values, fine, and not 'img', .*: data.with_format\(None\)"
    with pytest.raises(DataError, match=line):
        load_images(Transformed(pixels(), [0] * 6), image_size=SIZE)


def test_images_of_any_size_are_scaled_as_the_model_says() -> None:
    large = pixels(2, side=13)
    found = load_images(large, image_size=SIZE)
    by_hand = [Image.fromarray(x).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for x in large]
    assert torch.equal(found.images, expected(np.stack([np.asarray(x) for x in by_hand])))
    assert found.report is not None
    assert found.report.resizing is not None


def test_a_broken_picture_is_left_out_and_counted() -> None:
    data = [png(x) for x in pixels(3)]
    data[1] = data[1][:40]
    found = load_images(data, image_size=SIZE)
    assert torch.equal(found.images, expected(pixels(3))[[0, 2]])
    assert found.report is not None
    assert "1 cannot be read (row 1)" in str(found.report.line())
    with pytest.raises(DataError, match="row 1: cannot be read as an image"):
        load_images(data, image_size=SIZE, strict=True)
    with pytest.raises(DataError, match="none of 1 images can be read"):
        load_images([b"no picture"], image_size=SIZE)


def dark_first() -> np.ndarray:
    """Pictures of floats 0..255, the first of which has values 0 and 1 alone."""
    images = pixels().astype(np.float32)
    images[0] = images[0] % 2
    return images


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        torch.from_numpy,
        lambda x: torch.from_numpy(x).permute(0, 3, 1, 2),
        lambda x: torch.from_numpy(x).bfloat16(),
        lambda x: {"images": x},
        list,
        lambda x: [torch.from_numpy(one).permute(2, 0, 1) for one in x],
        lambda x: TensorDataset(torch.from_numpy(x)),
    ],
    ids=["array", "tensor", "first", "bfloat16", "map", "list", "tensors", "set"],
)
def test_the_scale_of_floats_is_that_of_all_pictures(tmp_path: Path, make: Any) -> None:
    np.savez(tmp_path / "a.npz", images=dark_first())
    truth = load_images(tmp_path / "a.npz", image_size=SIZE)
    assert int(truth.images[0].max()) == 1
    assert torch.equal(load_images(make(dark_first()), image_size=SIZE).images, truth.images)
    # Where all are black and white, 1 is white, as in a file.
    plain = (dark_first() > 127).astype(np.float32)
    np.savez(tmp_path / "b.npz", images=plain)
    truth = load_images(tmp_path / "b.npz", image_size=SIZE)
    assert int(truth.images.max()) == 255
    assert torch.equal(load_images(make(plain), image_size=SIZE).images, truth.images)


def test_the_scale_of_alpha_does_not_count(tmp_path: Path) -> None:
    alpha = np.full((6, SIZE, SIZE, 1), 0.5, np.float32)
    images = np.concatenate([dark_first(), alpha], axis=3)
    np.savez(tmp_path / "a.npz", images=images)
    truth = load_images(tmp_path / "a.npz", image_size=SIZE)
    for data in (images, images.transpose(0, 3, 1, 2), torch.from_numpy(images)):
        assert torch.equal(load_images(data, image_size=SIZE).images, truth.images)


def test_pictures_of_both_scales_are_refused() -> None:
    mixed = dark_first()
    mixed[2] /= 255
    with pytest.raises(DataError, match=r"values 0 to 255; expected 0\.\.255, whole"):
        load_images(mixed, image_size=SIZE)
    with pytest.raises(DataError, match=r"row 1 has floats up to 255, and row 2 floats in"):
        load_images(list(mixed), image_size=SIZE)


@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8, 4), (3, 8, 8), (4, 8, 8)])
def test_one_picture_is_no_set_of_grey_ones(tmp_path: Path, shape: tuple[int, ...]) -> None:
    one = np.zeros(shape, np.uint8)
    np.savez(tmp_path / "a.npz", images=one)
    for data in (one, torch.from_numpy(one), {"images": one}, tmp_path / "a.npz"):
        with pytest.raises(DataError, match=r"one colour picture or \d grey ones; .*\[None\]"):
            load_images(data, image_size=SIZE)
    assert len(load_images(one[None], image_size=SIZE)) == 1
    if shape[0] < 5:  # grey ones, as their labels say
        labels = np.arange(shape[0])
        assert len(load_images((one, labels), image_size=SIZE)) == shape[0]
        assert len(load_images(one[..., None], image_size=SIZE)) == shape[0]


class Relabelled(Pictures):
    """A wrapper that keeps the attribute of what it wraps and returns labels of its own."""

    def __init__(self, images: np.ndarray, own: list[Any], attribute: list[Any]) -> None:
        super().__init__(images)
        self.own, self.targets = own, attribute

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = Image.fromarray(self.images[index])
        return (image, self.own[index]) if self.own else image


def test_labels_of_the_rows_win_over_an_attribute() -> None:
    own, stale = [1, 1, 1, 0, 0, 2], [0, 1, 2, 0, 1, 2]
    for attribute in (stale, ["a", "b", "c", "a", "b", "c"], [[0, 1]] * 6, np.array(stale)):
        data = Relabelled(pixels(), own, attribute)
        for one, order in ((data, range(6)), (Subset(data, [5, 0, 1]), (5, 0, 1))):
            found = load_images(one, image_size=SIZE)
            assert found.labels is not None
            assert found.labels.tolist() == [own[k] for k in order]
        few = load_images(data, image_size=SIZE, max_images=4, seed=2)
        assert few.labels is not None
        for image, label in zip(few.images, few.labels.tolist(), strict=True):
            place = next(k for k in range(6) if torch.equal(image, expected(pixels())[k]))
            assert label == own[place]
    found = load_images(Relabelled(pixels(), own, stale), image_size=SIZE)
    assert found.report is not None
    assert "not those of an attribute beside them (row 0: 1, not 0)" in str(found.report.line())
    # Names of the rows make the classes, and none of the attribute's.
    named = load_images(Relabelled(pixels(), ["x", "y"] * 3, ["x", "z"] * 3), image_size=SIZE)
    assert named.class_names == ("x", "y")


def test_an_attribute_serves_where_rows_have_no_label() -> None:
    found = load_images(Relabelled(pixels(), [], [0, 1, 2, 0, 1, 2]), image_size=SIZE)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert found.report is not None
    assert found.report.line() is None
    with pytest.raises(DataError, match="expected the index or the name"):
        load_images(Relabelled(pixels(), [], [[0, 1]] * 6), image_size=SIZE)


def test_a_list_with_labels_beside_it() -> None:
    pictures = [Image.fromarray(one) for one in pixels()]
    for labels in ([0, 1, 2, 0, 1, 2], np.arange(6) % 3, ["a", "b", "c"] * 2):
        for data in ((pictures, labels), {"image": pictures, "label": labels}):
            found = load_images(data, image_size=SIZE)
            assert found.labels is not None
            assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    rows = load_images(([pictures[0], 1], [pictures[1], 0]), image_size=SIZE)  # two rows
    assert rows.labels is not None
    assert rows.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match="6 images, but labels: 2; expected one for each"):
        load_images((pictures, [0, 1]), image_size=SIZE)


@pytest.mark.parametrize("names", ["names.txt", Path("names.txt")])
def test_one_text_is_no_list_of_class_names(names: Any) -> None:
    message = "class_names is 'names.txt'; expected a list of names: read a file with load_class"
    with pytest.raises(DataError, match=message):
        load_images(pixels(), image_size=SIZE, class_names=names)
    with pytest.raises(DataError, match="class_names holds 3; expected texts"):
        load_images(pixels(), image_size=SIZE, class_names=["a", 3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="expected a tuple of names"):
        ImageSet(expected(pixels()), None, "names.txt")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "zero images"),
        (pixels().astype(np.float32) / 127 - 1, "as if they were normalised"),
        (np.zeros((3, 4)), r"shape \[3, 4\]"),
        ((pixels(3), np.zeros(2)), "3 images but 2 labels"),
        ({"train": [1], "test": [2]}, r"mapping of 'train', 'test'; .*data\['test'\]"),
        (iter([pixels()]), "islice"),
        (42, "images are a int"),
        ([(pixels(1)[0], 0), (pixels(1)[0], None)], r"1 of 2 images have no label \(row 1\)"),
        ([(pixels(1)[0], 0), (pixels(1)[0], float("nan"))], "1 of 2 images have no label"),
        ([(pixels(1)[0], "a"), (pixels(1)[0], "")], "1 of 2 images have no label"),
        ([(pixels(1)[0], 0), (pixels(1)[0], -1)], "list of images: label -1; expected class"),
        ([pixels(3), np.zeros(3)], "for all images and their labels, give a tuple of both"),
        ((pixels(3), 2), "labels are 2; expected one for each image"),
        ([(pixels(1)[0], [1, 2])], "expected the index or the name"),
        ([{"photo": 1}], "has photo; expected an image under one of"),
    ],
)
def test_what_is_no_image_set_is_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_images(data, image_size=SIZE)
