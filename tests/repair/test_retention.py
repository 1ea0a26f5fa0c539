"""What is held beside the names: surrogates, the drift of features, and vectors that keep them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch.nn.functional import normalize

from pydetox.api import calibrate, unlearn
from pydetox.data import ImageSet
from pydetox.detect.configuration import ScanConfig
from pydetox.detect.references import ReferencePlan
from pydetox.errors import DataError, UsageError
from pydetox.inversion import InversionConfig
from pydetox.models import OpenClipModel
from pydetox.prototypes import image_features
from pydetox.repair.configuration import AdvancedUnlearnConfig, UnlearnConfig
from pydetox.repair.retention import DriftProbe, feature_drift, nearest_between
from pydetox.repair.subtraction import subtract
from pydetox.repair.surrogates import surrogate_images
from pydetox.repair.task_vectors import TaskVector
from pydetox.repair.trigger_vector import trigger_vector
from pydetox.research.attacks import badnets
from pydetox.session import Session
from pydetox.training import TrainConfig

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


def pictures(count: int, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("side", [8, 15, 32])
def test_surrogates_are_images_drawn_by_seed(side: int) -> None:
    images = pictures(5, side)
    made = surrogate_images(images, 25, seed=1)
    assert made.dtype == torch.uint8
    assert made.shape == (25, 3, side, side)
    assert torch.equal(made, surrogate_images(images, 25, seed=1))
    assert not torch.equal(made, surrogate_images(images, 25, seed=2))
    # None is flat, and no two are alike.
    assert len({bytes(one.numpy().tobytes()) for one in made}) == 25
    assert bool((made.float().std(dim=(1, 2, 3)) > 1).all())
    assert len(surrogate_images(images, 1, seed=0)) == 1
    with pytest.raises(DataError, match="0 images"):
        surrogate_images(images[:0], 3, seed=0)


def test_drift_is_zero_for_equal_features_and_counts_changed_neighbours() -> None:
    anchors = torch.eye(3)
    before = normalize(torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.1]]), dim=1)
    still = feature_drift(before, before, anchors)
    assert still.mean_distance == pytest.approx(0, abs=1e-6)
    assert still.changed_neighbours == 0
    after = before.clone()
    after[0] = torch.tensor([0.0, 0.0, 1.0])
    moved = feature_drift(before, after, anchors)
    assert moved.changed_neighbours == 0.5
    assert moved.mean_distance == pytest.approx(0.5, abs=1e-6)
    assert moved.images == 2
    # A rotation of everything, anchors too, changes no neighbour.
    turned = feature_drift(before, before.flip(1), anchors, anchors.flip(1))
    assert turned.changed_neighbours == 0
    with pytest.raises(DataError, match="anchor"):
        feature_drift(before, after, anchors[:0])


def test_features_are_those_of_the_module() -> None:
    model = OpenClipModel.from_config(TINY, seed=0)
    images = pictures(7)
    plain = normalize(model.visual(model.normalize(images.float() / 255)), dim=-1)
    torch.testing.assert_close(image_features(model, images, 3), plain, atol=1e-5, rtol=1e-5)


def test_held_features_move_less() -> None:
    model = OpenClipModel.from_config(TINY, seed=0)
    images = pictures(24)
    head = normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    trigger = badnets(16, seed=0)
    config = UnlearnConfig(
        steps=30,
        batch_size=12,
        learning_rate=2e-3,
        advanced=AdvancedUnlearnConfig(surrogates=48),
    )
    free = trigger_vector(model, images, [trigger], head, 1, replace(config, retention=0))
    held = trigger_vector(model, images, [trigger], head, 1, config)
    again = trigger_vector(model, images, [trigger], head, 1, config)
    assert all(torch.equal(held.tensors[k], again.tensors[k]) for k in held.tensors)
    assert all(name.startswith("visual.") for name in held.tensors)
    probe = DriftProbe(model, images, seed=0)
    drift = [probe.of(subtract(model, v, 1.0)).mean_distance for v in (free, held)]
    assert drift[1] < drift[0]
    assert probe.of(model).mean_distance == pytest.approx(0, abs=1e-6)
    assert probe.of(model).changed_neighbours == 0


@pytest.mark.parametrize("vector", ["paired", "strengthen"])
def test_other_vectors_hold_no_features(vector: Literal["paired", "strengthen"]) -> None:
    model = OpenClipModel.from_config(TINY, seed=0)
    config = UnlearnConfig(vector=vector, steps=3, batch_size=8)
    vectors = [
        trigger_vector(model, pictures(12), [badnets(16, seed=0)], torch.eye(4, 16), 1, one)
        for one in (config, replace(config, retention=0.0))
    ]
    assert all(
        torch.equal(vectors[0].tensors[k], vectors[1].tensors[k]) for k in vectors[0].tensors
    )


@pytest.mark.parametrize(
    "wrong", [{"retention": -1.0}, {"retention": math.inf}, {"max_drift": 0.0}]
)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="retention"):
        UnlearnConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="surrogates"):
        AdvancedUnlearnConfig(surrogates=1)


@pytest.mark.parametrize("dimension", [2, 3, 16])
def test_the_nearest_point_is_that_of_a_fine_sweep_of_the_arc(dimension: int) -> None:
    generator = torch.Generator().manual_seed(dimension)
    rows = torch.randn(3, 40, dimension, generator=generator, dtype=torch.float64)
    features, first, second = normalize(rows, dim=-1)
    first[0] = second[0]  # an arc of one point
    features[1] = normalize(0.3 * first[1] + 0.7 * second[1], dim=0)  # on the arc
    features[2] = -features[1]  # far from it
    features[3] = second[3]
    found = nearest_between(features, first, second)
    share = torch.linspace(0, 1, 5001, dtype=torch.float64)[:, None, None]
    angle = torch.acos((first * second).sum(dim=1, keepdim=True).clamp(-1, 1))
    sine = angle.sin().clamp(min=1e-9)
    arc = ((1 - share) * angle).sin() / sine * first + (share * angle).sin() / sine * second
    arc[:, 0] = first[0]
    best = (arc * features).sum(dim=-1).max(dim=0).values
    assert torch.allclose((found * features).sum(dim=1), best, atol=1e-6)
    assert torch.allclose(found.norm(dim=1), torch.ones(40, dtype=torch.float64))
    assert torch.allclose(found[1], features[1])
    assert torch.allclose(found[3], second[3])
    # Between both: the ends see the point under no larger angle than each other.
    whole = (first * second).sum(dim=1)
    assert bool(((found * first).sum(dim=1) >= whole - 1e-9).all())


def test_a_model_between_suspect_and_base_has_not_drifted() -> None:
    base, model = (OpenClipModel.from_config(TINY, seed=seed) for seed in (1, 0))
    images = pictures(24)
    probe = DriftProbe(model, images, seed=0, base=base)
    between = model.clone()

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        both = [normalize(one.encode_pixels(pixels), dim=1) for one in (model, base)]
        return both[0] + 0.5 * both[1]

    between.encode_pixels = encode  # type: ignore[method-assign]
    found, alone = probe.of(between), probe.from_start(between)
    assert found.mean_distance == pytest.approx(0, abs=1e-6)
    assert alone.mean_distance > 0.01


def test_a_vector_toward_the_base_stays_between_both_models() -> None:
    base, model = (OpenClipModel.from_config(TINY, seed=seed) for seed in (1, 0))
    images = pictures(24)
    config = UnlearnConfig(steps=10, batch_size=12, advanced=AdvancedUnlearnConfig(surrogates=48))
    head = normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    tau = trigger_vector(model, images, [badnets(16, seed=0)], head, 1, config, base=base)
    own, there = model.clip.state_dict(), base.clip.state_dict()
    assert tau.tensors
    for name, change in tau.tensors.items():
        way = own[name] - there[name]
        share = change[way != 0] / way[way != 0]
        assert bool((share >= -1e-4).all() & (share <= 1 + 1e-4).all())
        assert float(change[way == 0].abs().sum()) == 0
    probe, alone = (DriftProbe(model, images, seed=0, base=one) for one in (base, None))
    assert probe.of(base).mean_distance == pytest.approx(0, abs=1e-6)
    assert probe.of(model).mean_distance == pytest.approx(0, abs=1e-6)
    assert alone.of(base).mean_distance > 0.01
    assert probe.from_start(base).mean_distance == pytest.approx(
        alone.of(base).mean_distance, abs=1e-6
    )
    with pytest.raises(UsageError, match="expected forget"):
        trigger_vector(
            model,
            images,
            [badnets(16, seed=0)],
            head,
            1,
            replace(config, vector="paired"),
            base=base,
        )
    wide = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "width": 48}}
    wider = OpenClipModel.from_config(wide, seed=2)
    with pytest.raises(UsageError, match="other tensors"):
        trigger_vector(model, images, [badnets(16, seed=0)], head, 1, config, base=wider)


def test_repairs_lead_to_the_base_that_is_given_if_it_fits() -> None:
    base, model = (OpenClipModel.from_config(TINY, seed=seed) for seed in (1, 0))
    images = ImageSet(pictures(24), torch.arange(24) % 4, ("a", "b", "c", "d"), "pictures")
    config = UnlearnConfig(
        steps=8, batch_size=12, attacked_images=20, advanced=AdvancedUnlearnConfig(surrogates=48)
    )
    trigger = badnets(16, seed=0)

    def vector(end: OpenClipModel | None, config: UnlearnConfig = config) -> TaskVector:
        _, (one,) = unlearn(model, images, 1, triggers=[trigger], base=end, unlearning=config)
        return one.vector

    def leads_there(tau: TaskVector) -> bool:
        own, there = model.clip.state_dict(), base.clip.state_dict()
        inside = []
        for name, change in tau.tensors.items():
            way = own[name] - there[name]
            inside.append((change * way.sign() >= -1e-6) & (change.abs() <= way.abs() + 1e-6))
        return all(bool(one.all()) for one in inside)

    assert leads_there(vector(base))
    free = vector(None)
    assert not leads_there(free)
    assert not leads_there(vector(base, replace(config, toward_base=False)))
    # A base that says nothing, because it is the suspect itself, leaves vectors free.
    itself = vector(model.clone())
    assert all(torch.equal(itself.tensors[k], free.tensors[k]) for k in free.tensors)


def test_a_plain_scan_keeps_its_base_for_repairs() -> None:
    base, model = (OpenClipModel.from_config(TINY, seed=seed) for seed in (1, 0))
    images = ImageSet(pictures(24), torch.arange(24) % 4, ("a", "b", "c", "d"), "pictures")
    training = TrainConfig(epochs=1, learning_rate=1e-4)
    config = ScanConfig(
        inversion=InversionConfig(steps=2, batch_size=8), reference_training=training, references=2
    )
    plan = ReferencePlan.decide(config, base=base)
    comparison = plan.prepare(images, suspect=model)
    assert comparison.base is None  # the search is not in contrast to it
    assert comparison.start is base
    session = Session.open(model, images).with_base(None, start=comparison.start)
    assert UnlearnConfig().end_of(session) is base
    for other in ({"toward_base": False}, {"vector": "paired"}, {"learning_rate": 1e-3}):
        assert replace(UnlearnConfig(), **other).end_of(session) is None  # type: ignore[arg-type]
    assert UnlearnConfig().end_of(session.with_base(None, start=model)) is None


def test_a_repair_has_its_base_where_a_calibration_needs_none() -> None:
    base, model = (OpenClipModel.from_config(TINY, seed=seed) for seed in (1, 0))
    images = ImageSet(pictures(24), torch.arange(24) % 4, ("a", "b", "c", "d"), "pictures")
    references = [OpenClipModel.from_config(TINY, seed=seed) for seed in (2, 3)]
    config = ScanConfig(inversion=InversionConfig(steps=2, batch_size=8), contrast=False)
    calibration = calibrate(None, images, references=references, config=config)
    for given in ({"calibration": calibration}, {"references": references}):
        plan = ReferencePlan.decide(config, base=base, **given)
        assert plan.base is None  # nothing is compared with it
        assert plan.prepare(images, suspect=model).start is None
        comparison = plan.prepare(images, suspect=model, repair=True)
        assert (comparison.base, comparison.start) == (None, base)
        session = Session.open(model, images).with_base(None, start=comparison.start)
        assert UnlearnConfig().end_of(session) is base
    wide = {**TINY, "embed_dim": 2 * TINY["embed_dim"]}
    other = OpenClipModel.from_config(wide, seed=1)
    plan = ReferencePlan.decide(config, base=other, calibration=calibration)
    with pytest.raises(UsageError, match="embed_dim"):
        plan.prepare(images, suspect=model, repair=True)
