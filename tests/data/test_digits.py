"""The embedded digits: the same pictures that scikit-learn holds, drawn as RGB."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as load_uci_digits

from pydetox.data import DIGIT_NAMES, load_digits, load_images
from pydetox.errors import DataError


def test_digits_are_the_uci_digits() -> None:
    uci = load_uci_digits()
    digits = load_digits(8)  # at their own size nothing is interpolated
    expected = np.rint(uci.images * 255 / 16)
    for channel in range(3):
        assert np.abs(digits.images[:, channel].numpy() - expected).max() <= 0.5
    assert digits.labels is not None
    assert digits.labels.tolist() == uci.target.tolist()
    assert digits.class_names == DIGIT_NAMES
    assert DIGIT_NAMES[7] == "seven"


@pytest.mark.parametrize("size", [1, 13, 32])
def test_any_size(size: int) -> None:
    digits = load_digits(size)
    assert digits.images.shape == (1797, 3, size, size)
    assert digits.images.dtype == torch.uint8
    assert digits.images.is_contiguous()


def test_enlarging_keeps_the_pictures_apart() -> None:
    digits = load_digits(32)
    back = torch.nn.functional.interpolate(digits.images.float(), size=8, mode="area")
    original = load_digits(8).images.float()
    same = (back - original).flatten(1).norm(dim=1)
    other = (back - original.roll(1, 0)).flatten(1).norm(dim=1)
    assert torch.all(same < other)
    assert same.mean() < 0.3 * other.mean()


def test_load_images_digits() -> None:
    digits = load_images("digits", image_size=16, max_images=100, seed=4)
    assert len(digits) == 100
    assert digits.labels is not None
    assert digits.labels.bincount().tolist() == pytest.approx([10] * 10, abs=1)
    everything = load_images("digits", image_size=16, max_images=5000)
    assert len(everything) == 1797


def test_class_names_of_the_caller_define_the_labels() -> None:
    wanted = tuple(reversed(DIGIT_NAMES))
    turned = load_images("digits", image_size=8, class_names=wanted)
    plain = load_digits(8)
    assert turned.labels is not None
    assert plain.labels is not None
    assert turned.class_names == wanted
    assert torch.equal(turned.labels, 9 - plain.labels)
    with pytest.raises(DataError, match="class 'nine' is not one of the 9 class names"):
        load_images("digits", image_size=8, class_names=DIGIT_NAMES[:9])


def test_other_classes_than_digits_where_labels_are_not_required() -> None:
    with pytest.raises(DataError, match="class 'zero' is not one of the 2 class names"):
        load_images("digits", image_size=8, class_names=["cat", "dog"])
    image_set = load_images(
        "digits", image_size=8, class_names=["cat", "dog"], labels_required=False
    )
    assert image_set.labels is None
    assert image_set.class_names == ("cat", "dog")


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="image_size is 0"):
        load_digits(0)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r'pip install "pydetox\[digits\]"'):
        load_digits(8)
