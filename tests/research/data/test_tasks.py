"""Tasks: disjoint parts by seed, in one form. Those of packages are tested where they are there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pydetox.errors import DataError, UsageError
from pydetox.research.data import PACKAGES, TaskSizes, is_fetched, load_task, render_all
from pydetox.research.data.photographs import _name
from pydetox.research.data.rendering import as_square

FEW = TaskSizes(80, 40, 40, 40)
needs_packages = pytest.mark.skipif(
    not all(is_fetched(one) for one in PACKAGES), reason="image sets not fetched: make data"
)


def test_digits_are_split_into_disjoint_parts() -> None:
    task = load_task("digits", seed=3)
    parts = task.splits
    sizes = [len(p) for p in (parts.attacker, parts.defender, parts.validation, parts.test)]
    assert sizes == [700, 500, 200, 397]
    assert task.class_names[3] == "three"
    again = load_task("digits", seed=3).splits
    assert torch.equal(again.test.images, parts.test.images)
    assert not torch.equal(load_task("digits", seed=4).splits.test.images, parts.test.images)


def test_renderings_are_of_their_class_and_follow_the_generator() -> None:
    red = Image.new("RGBA", (20, 20), (255, 0, 0, 255))
    blue = Image.new("RGBA", (20, 20), (0, 0, 255, 255))
    images, labels = render_all([[red], [blue]], 5, 16, np.random.default_rng(0))
    assert images.shape == (10, 3, 16, 16)
    assert labels.tolist() == [0] * 5 + [1] * 5
    centre = images[:, :, 8, 8].int()
    assert bool((centre[:5, 0] > centre[:5, 2] + 100).all())
    assert bool((centre[5:, 2] > centre[5:, 0] + 100).all())
    again, _ = render_all([[red], [blue]], 5, 16, np.random.default_rng(0))
    assert torch.equal(images, again)


def test_squares_keep_the_shape_of_what_is_seen() -> None:
    picture = Image.new("RGBA", (40, 40))
    picture.paste((255, 255, 255, 255), (10, 15, 30, 25))
    square = as_square(picture, 16)
    assert square.size == (16, 16)
    assert square.getchannel("A").getbbox() == (0, 4, 16, 12)


def test_names_of_captions() -> None:
    assert _name("A Red Fox.") == "red fox"
    assert _name("An albino peahen (a female peafowl, or peacock).") == "albino peahen"
    assert _name("Eat your broccoli!") == ""


def test_wrong_tasks_are_refused() -> None:
    with pytest.raises(UsageError, match="expected one of digits, fashion, emoji, photographs"):
        load_task("cars", seed=0)
    with pytest.raises(UsageError, match="digits: 12 classes asked for; it has ten"):
        load_task("digits", seed=0, classes=12)
    with pytest.raises(DataError, match="2,000 images wanted"):
        load_task("digits", seed=0, sizes=TaskSizes(1700, 100, 100, 100))


@needs_packages
@pytest.mark.parametrize(("name", "classes"), [("emoji", 5), ("photographs", 7)])
def test_rendered_tasks(name: str, classes: int) -> None:
    task = load_task(name, seed=1, sizes=FEW, classes=classes)
    assert len(set(task.class_names)) == classes
    assert len(task.splits.attacker) >= 80
    labels = task.splits.attacker.labels
    assert labels is not None
    assert len(labels.bincount().unique()) == 1
    first = {bytes(i.numpy().tobytes()) for i in task.splits.attacker.images}
    assert not first & {bytes(i.numpy().tobytes()) for i in task.splits.test.images}
    again = load_task(name, seed=1, sizes=FEW, classes=classes)
    assert torch.equal(task.splits.defender.images, again.splits.defender.images)


@needs_packages
def test_fashion_comes_from_the_archive() -> None:
    task = load_task("fashion", seed=1, sizes=FEW)
    assert [len(task.splits.attacker), len(task.splits.test)] == [80, 40]


@needs_packages
def test_there_are_a_thousand_emoji_and_no_more_than_there_are_photographs() -> None:
    from pydetox.research.data import emoji_pictures, photograph_pictures

    names, pictures = emoji_pictures(1000)
    assert len(set(names)) == len(pictures) == 1000
    with pytest.raises(DataError, match="5000 classes"):
        photograph_pictures(5000)
