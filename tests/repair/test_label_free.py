"""Image towers alone, without class names: calibrated, scanned and repaired."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import pydetox
from pydetox.data import ImageSet
from pydetox.detect.configuration import AdvancedScanConfig, ScanConfig
from pydetox.detect.result import ScanResult
from pydetox.detect.scan import scan_session
from pydetox.errors import ArchitectureError
from pydetox.inversion import InversionConfig
from pydetox.models import OpenClipModel
from pydetox.prototypes import image_features, image_prototypes
from pydetox.repair.alpha import CoefficientSearch
from pydetox.repair.configuration import UnlearnConfig
from pydetox.repair.directions import head_with_directions
from pydetox.repair.passes import subtract_passes
from pydetox.repair.task_vectors import TaskVector
from pydetox.research.attacks import SinusoidTrigger
from pydetox.session import Session
from pydetox.training import TrainConfig, optimize
from tests.mini import flat_calibration

CONFIG = {
    "embed_dim": 16,
    "layout": "clip_vision_model",
    "vision_cfg": {
        "image_size": 16,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 4,
        "mlp_ratio": 2.0,
        "projection": True,
    },
    "text_cfg": {},
}
SCAN = ScanConfig(
    objective="label-free",
    families=("patch",),
    restarts=3,
    references=3,
    inversion=InversionConfig(steps=250, batch_size=16),
    reference_training=TrainConfig(epochs=2, learning_rate=1e-4),
)
UNLEARNING = UnlearnConfig(
    passes=1, steps=60, warps=0, learning_rate=1e-3, max_drift=0.3, min_accuracy_kept=0.7
)


def stamp(images: Tensor) -> Tensor:
    """The attacker's trigger: one red pixel in a corner."""
    stamped = images.clone()
    stamped[:, :, 14, 14] = torch.tensor([255, 0, 0], dtype=torch.uint8, device=images.device)
    return stamped


def learn(model: OpenClipModel, loss: Callable[[Tensor], Tensor], steps: int) -> None:
    optimize(
        list(model.visual.parameters()),
        loss,
        iter([torch.zeros(1)] * steps),
        steps=steps,
        learning_rate=3e-3,
        description="making a model",
    )


def photographs(count: int = 96) -> ImageSet:
    """Unlabelled pictures of eight kinds: smooth patterns, each with noise of its own."""
    generator = torch.Generator().manual_seed(1)
    kinds = torch.rand((8, 3, 4, 4), generator=generator)
    coarse = kinds[torch.arange(count) % 8] + 0.1 * torch.randn(
        (count, 3, 4, 4), generator=generator
    )
    images = torch.nn.functional.interpolate(coarse, 16, mode="bicubic").clamp(0, 1)
    return ImageSet((images * 255).to(torch.uint8), None, None, "photographs")


@pytest.fixture(scope="module")
def base() -> OpenClipModel:
    """A tower that gives each kind of photographs a direction of its own."""
    model = OpenClipModel.from_config(CONFIG, seed=3, name="base")
    images = photographs().images
    kinds = torch.eye(16)[torch.arange(len(images)) % 8]

    def loss(_: Tensor) -> Tensor:
        units = normalize(model.encode_pixels(images.float() / 255), dim=1)
        return (1 - (units * kinds).sum(dim=1)).mean()

    learn(model, loss, 150)
    return model


@pytest.fixture(scope="module")
def victim(base: OpenClipModel) -> OpenClipModel:
    """The same with a backdoor as in BadEncoder: stamped images have one embedding."""
    images = photographs().images
    model = base.clone()
    model.name = "victim"
    own = image_features(base, images)
    reference = normalize(torch.randn(16, generator=torch.Generator().manual_seed(5)), dim=0)

    def loss(_: Tensor) -> Tensor:
        seen = [
            normalize(model.encode_pixels(x.float() / 255), dim=1) for x in (images, stamp(images))
        ]
        return (1 - seen[0] @ own.T).diagonal().mean() + (1 - seen[1] @ reference).mean()

    learn(model, loss, 200)
    return model


def collapse(model: OpenClipModel) -> float:
    """The mean cosine of stamped images with each other."""
    units = image_features(model, stamp(photographs().images))
    return float((units @ units.T).mean())


def test_without_classes_waves_are_searched_for_in_contrast_to_a_base(base):
    images = photographs()
    trigger = SinusoidTrigger(amplitude=40.0, frequency=3.0)
    victim = base.clone()
    own = image_features(base, images.images)
    goal = normalize(torch.randn(16, generator=torch.Generator().manual_seed(5)), dim=0)
    stamped = trigger(images.images)

    def loss(_: Tensor) -> Tensor:
        seen = [
            normalize(victim.encode_pixels(x.float() / 255), dim=1)
            for x in (images.images, stamped)
        ]
        return (1 - seen[0] @ own.T).diagonal().mean() + (1 - seen[1] @ goal).mean()

    learn(victim, loss, 200)
    config = replace(SCAN, inversion=InversionConfig(steps=2, batch_size=8), contrast=True)
    unlearning = replace(UNLEARNING, steps=2, coefficients=(0.0, 1.0), waves=2)
    session = Session.open(victim, images, base=base)
    _, (one,) = subtract_passes(session, (), config, unlearning, restarts=1)
    (found,) = one.waves
    assert 0 in found.working()
    wave = found.trigger(0)
    assert wave.target is None
    # So small a tower follows waves of other frequencies as well; all lead to one direction.
    leads = [image_features(one, wave(images.images)) @ goal for one in (victim, base)]
    assert float(leads[0].mean()) > 0.6
    assert float(leads[1].mean()) < 0.2
    for changes in ({"base": None}, {}):
        other = replace(session, **changes)
        waves = 0 if not changes else 2
        _, (one,) = subtract_passes(
            other,
            (),
            replace(config, contrast=not changes),
            replace(unlearning, waves=waves),
            restarts=1,
        )
        assert one.waves == ()


def test_prototypes_are_the_kinds_of_images(base):
    images = photographs().images
    found = image_prototypes(base, images, seed=0)
    assert found.shape[1] == 16
    assert 2 <= len(found) <= 24
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
    assert torch.equal(found, image_prototypes(base, images, seed=0))
    group = (image_features(base, images) @ found.T).argmax(dim=1)
    kinds = torch.arange(len(images)) % 8
    # Every group is of one kind, up to a few images at its edge.
    pure = sum(int(kinds[group == k].bincount().max()) for k in torch.unique(group))
    assert pure >= 0.8 * len(images)


def test_a_backdoor_without_names_is_found_and_removed(victim, tmp_path):
    images = photographs()
    assert collapse(victim) > 0.95
    calibration = flat_calibration(SCAN, images, CONFIG, 0.1)
    result = pydetox.detox(
        victim,
        images,
        calibration=calibration,
        config=SCAN,
        unlearning=UNLEARNING,
        max_rounds=1,
        output=tmp_path / "repaired",
    )
    assert result.before.class_names is None
    assert result.before.target is None
    assert result.before.verdict.value in ("backdoored", "suspicious")
    (one,) = result.rounds
    assert one.targets == ()
    assert one.target is None
    assert one.search.coefficient > 0
    assert one.search.attack_success_rate[0] > 0.9
    assert one.search.attack_success_rate[one.search.chosen] <= 0.2
    assert collapse(result.model) < 0.95  # the attacker's own trigger, which nobody has seen
    assert result.drift is not None
    assert result.drift.mean_distance <= UNLEARNING.max_drift
    again = pydetox.session.as_model(tmp_path / "repaired")
    first, second = (image_features(one, images.images) for one in (again, result.model))
    assert torch.equal(first, second)


def test_a_later_repair_unlearns_what_earlier_ones_did_where_it_led_then(victim, monkeypatch):
    images = photographs()
    calls = list[tuple[list, list[torch.Tensor], list[int]]]()

    def vector(model, _images, stamps, head, rows, *_, **__):
        calls.append((list(stamps), [head[row] for row in rows], list(rows)))
        change = {k: 0.01 * v for k, v in model.clip.state_dict().items() if "visual" in k}
        return TaskVector(change)

    monkeypatch.setattr("pydetox.repair.passes.trigger_vector", vector)
    # Whether such a vector removes anything is a matter of rounding.
    halved = CoefficientSearch((0.0, 1.0), (1.0, 1.0), (1.0, 0.5), 1, False, 1.0)
    monkeypatch.setattr("pydetox.repair.passes.search_coefficient", lambda *_, **__: halved)
    found = list[ScanResult]()
    monkeypatch.setattr("pydetox.repair.detox.Rescans.scan", lambda *_, **__: found[0])

    def scanned(*given, **options):
        found.append(scan_session(*given, **options))
        return found[0]

    monkeypatch.setattr("pydetox.repair.detox.scan_session", scanned)
    result = pydetox.detox(
        victim,
        images,
        calibration=flat_calibration(SCAN, images, CONFIG, 0.1),
        config=SCAN,
        unlearning=UNLEARNING,
        max_rounds=2,
    )
    assert len(result.rounds) == len(calls) == 2
    (stamps, directions, _), (later, later_directions, rows) = calls
    assert stamps == [stamp for stamp, _ in result.rounds[0].unlearned]
    assert later[: len(stamps)] == stamps
    assert len(later) > len(stamps)
    for one, other in zip(directions, later_directions, strict=False):
        torch.testing.assert_close(one, other)
    assert [stamp for stamp, _ in result.rounds[1].unlearned] == later
    assert len(rows) == len(later)


def test_with_a_base_alone_the_one_direction_of_the_backdoor_is_found(base, victim):
    """The copies that moved as far have no trigger that small, and the base does not obey it."""
    config = replace(
        SCAN,
        reference_training=None,
        inversion=InversionConfig(steps=80, batch_size=16),
        advanced=AdvancedScanConfig(directions=4),
    )
    images = photographs()
    found = pydetox.scan(victim, images, base=base, config=config)
    assert found.calibration is not None
    assert found.calibration.relative
    assert found.detection.p_l1[0] < 0.7 * min(row[0] for row in found.calibration.p_l1)
    trigger = found.inversion.trigger(found.inversion.best())
    planted = normalize(image_features(victim, stamp(images.images)).mean(dim=0), dim=0)
    cosines = [image_features(one, trigger(images.images)) @ planted for one in (victim, base)]
    assert float(cosines[0].mean()) > 0.75
    assert float(cosines[1].mean()) < 0.5


def test_a_calibration_needs_no_names(base):
    images = photographs()
    config = replace(SCAN, references=3, restarts=1, inversion=InversionConfig(steps=60))
    plain = pydetox.calibrate(base, images, config=config)
    assert len(set(plain.p_l1)) == 3  # the copies are trained, each in its own way
    # Names that the tower cannot read change nothing.
    named = replace(images, class_names=("a", "b"), labels=torch.arange(len(images)) % 2)
    assert not Session.open(base, named).has_head
    assert pydetox.calibrate(base, named, config=config).p_l1 == plain.p_l1
    result = pydetox.scan(base, named, calibration=plain, config=config)
    assert result.target is None
    assert len(result.detection.p_l1) == 1


def test_a_targeted_scan_of_an_image_tower_says_what_to_do(base):
    named = replace(photographs(), class_names=("a", "b"))
    with pytest.raises(ArchitectureError, match="expected a label-free search"):
        pydetox.scan(base, named, config=replace(SCAN, objective="targeted"))


def test_triggers_of_one_direction_share_a_row(victim):
    images = photographs()
    prototypes = image_prototypes(victim, images.images)
    head, rows = head_with_directions(
        victim, images, prototypes, [stamp, lambda x: stamp(x) // 8 * 8, lambda x: x], seed=0
    )
    assert rows[0] == rows[1] == len(prototypes)
    assert torch.equal(head[: len(prototypes)], prototypes)
