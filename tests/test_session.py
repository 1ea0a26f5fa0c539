"""A session: one model, its images in an order of their own, seeded samples of all classes."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from pydetox.errors import DataError, UsageError
from pydetox.session import Session, as_model
from tests.mini import CLASS_NAMES, mini_model
from tests.test_training import TEMPLATES, coloured


def test_images_come_in_content_order_and_a_forget_set_of_all_classes() -> None:
    data = coloured(60)
    sorted_ = data.subset(data.labels.argsort(stable=True))
    one, other = (Session.open(mini_model(), images) for images in (data, sorted_))
    assert torch.equal(one.images.images, other.images.images)
    forget = one.forget_set(0.5, seed=3)
    assert forget.labels.bincount().tolist() == [10, 10, 10]
    assert torch.equal(forget.images, other.forget_set(0.5, seed=3).images)
    assert not torch.equal(forget.images, one.forget_set(0.5, seed=4).images)
    assert one.forget_set(1.0, seed=3) is one.images


def test_a_repaired_model_keeps_the_head_of_its_text_tower() -> None:
    session = Session.open(mini_model(), coloured(6), templates=TEMPLATES)
    head = session.head
    twin = session.model.clone()
    after = session.with_image_tower_of(twin)
    assert after.model is twin
    assert after.head is head
    assert after.images is session.images


def test_classes_by_index_and_by_name() -> None:
    session = Session.open(mini_model(), coloured(6))
    assert [session.class_index(name) for name in CLASS_NAMES] == [0, 1, 2]
    assert session.class_index(2) == 2
    with pytest.raises(UsageError, match="target class 3"):
        session.class_index(3)
    with pytest.raises(UsageError, match="'fox' stands 0 times"):
        session.class_index("fox")
    bare = Session.open(mini_model(), replace(coloured(6), class_names=None))
    with pytest.raises(DataError, match="class_names="):
        _ = bare.head
    assert bare.evaluate() is None


def test_one_text_is_no_list_of_names_or_prompts() -> None:
    model, data = mini_model(), coloured(6)
    with pytest.raises(DataError, match=r"class_names is 'names\.txt'; expected a list"):
        Session.open(model, data, class_names="names.txt")
    with pytest.raises(DataError, match=r"templates is 'a \{\}'; expected a list"):
        Session.open(model, data, templates="a {}")
    with pytest.raises(DataError, match="class_names is 'cat'; expected a list"):
        model.zero_shot_head("cat", TEMPLATES)
    with pytest.raises(DataError, match=r"templates is 'a \{\}'; expected a list"):
        model.zero_shot_head(CLASS_NAMES, "a {}")


def test_shares_of_a_base_need_one_and_add_up() -> None:
    session = Session.open(mini_model(), coloured(30), templates=TEMPLATES)
    with pytest.raises(UsageError, match="give base="):
        session.base_shares(0)
    shares = replace(session, base=mini_model(1)).base_shares(0)
    assert shares.shape == (3,)
    assert float(shares.sum()) == pytest.approx(1)


def test_a_model_is_taken_as_it_is_and_a_copy_has_no_file() -> None:
    model = mini_model()
    assert as_model(model) is model
    assert model.sha256 is None
    model.sha256 = "0" * 64
    assert model.clone().sha256 is None


def test_images_that_were_scaled_in_another_way_than_the_model_s(tmp_path) -> None:
    import numpy as np
    from PIL import Image

    from pydetox.data import load_images
    from pydetox.errors import DataError, PydetoxWarning
    from pydetox.models import OpenClipModel
    from tests.mini import MINI_CONFIG

    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    (tmp_path / "cat").mkdir()
    Image.fromarray(pixels).save(tmp_path / "cat" / "a.png")
    squash = {"resize_mode": "squash"}
    model = OpenClipModel.from_config(MINI_CONFIG, seed=0, preprocess_config=squash)
    with pytest.warns(PydetoxWarning, match=r"resize_mode='shortest'.*resizing=model\.resizing"):
        Session.open(model, load_images(tmp_path, image_size=16)).warn()
    images = load_images(tmp_path, resizing=model.resizing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Session.open(model, images).warn()
    with pytest.raises(DataError, match="image_size is 15, and resizing= has 16"):
        load_images(tmp_path, image_size=15, resizing=model.resizing)
    with pytest.raises(DataError, match="no image_size"):
        load_images(tmp_path)
