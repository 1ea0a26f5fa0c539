"""Copies of a base that move as far as they are told, on the smallest CLIP."""

from __future__ import annotations

import math

import pytest
import torch

from pydetox.data import DEFAULT_TEMPLATES
from pydetox.detect.configuration import ScanConfig
from pydetox.detect.copies import (
    BATCH,
    STEPS,
    OutOfReachError,
    copy_at_distance,
    fine_tuned_copies,
    pilot_rate,
)
from pydetox.detect.distance import model_distance
from pydetox.session import Session
from pydetox.training import TrainConfig, train_on_prompts
from tests.mini import mini_images, mini_model


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydetox.detect.copies.STEPS", 20)


@pytest.fixture(scope="module")
def session() -> Session:
    return Session.open(mini_model(), mini_images())


@pytest.mark.parametrize("distance", [2.0**-8, 2.0**-5, 2.0**-2])
def test_copies_are_exactly_as_far_as_they_should_be(session: Session, distance: float) -> None:
    config = ScanConfig(references=3, seed=4)
    copies = list(fine_tuned_copies(session, config, distance))
    assert [model_distance(session.model, one) for one in copies] == pytest.approx(
        [distance] * 3, rel=1e-4
    )
    # They differ from each other by much of that.
    apart = [model_distance(copies[0], copies[1]), model_distance(copies[1], copies[2])]
    assert min(apart) > 0.2 * distance
    again = next(fine_tuned_copies(session, config, distance))
    for name, value in again.clip.state_dict().items():
        assert torch.equal(value, copies[0].clip.state_dict()[name])


def test_the_pilot_finds_a_rate_that_takes_about_the_steps(session: Session) -> None:
    distance = 2.0**-4
    rate = pilot_rate(session.model, session.images, DEFAULT_TEMPLATES, distance, seed=0)
    steps = list[int]()

    def watch(model: object, step: int) -> bool:
        steps.append(step)
        return model_distance(session.model, model) >= distance  # type: ignore[arg-type]

    config = TrainConfig(1000, rate, BATCH, seed=9)
    train_on_prompts(session.model, session.images, DEFAULT_TEMPLATES, config, stop=watch)
    assert 20 / 2 <= len(steps) <= 2 * 20


def test_labels_are_not_needed(session: Session) -> None:
    bare = Session.open(session.model, mini_images(labels=False))
    config = ScanConfig(references=2)
    assert len(list(fine_tuned_copies(bare, config, 2.0**-6))) == 2


def test_copies_as_told_begin_with_the_base(session: Session) -> None:
    config = ScanConfig(references=2, reference_training=TrainConfig(1, 1e-4))
    first, second = fine_tuned_copies(session, config, None)
    assert first is session.model
    assert 0 < model_distance(session.model, second) < 0.1


def test_what_cannot_be_reached_is_said(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutOfReachError, match=r"moved .* in 80 steps .* about 0.5: give refer"):
        copy_at_distance(
            session.model,
            session.images,
            DEFAULT_TEMPLATES,
            0.5,
            learning_rate=1e-9,
            seed=0,
        )
    monkeypatch.setattr("pydetox.detect.copies.LEAST_ACCURACY", math.inf)
    with pytest.raises(OutOfReachError, match=r"keep \d+% of its accuracy on 24 images"):
        next(fine_tuned_copies(session, ScanConfig(), 2.0**-5))


def test_the_steps_are_a_small_part_of_a_search() -> None:
    search = ScanConfig().inversion
    assert 20 * search.steps * search.batch_size >= STEPS * BATCH
