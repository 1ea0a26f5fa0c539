import itertools
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from pydetox.detect.configuration import ScanConfig
from pydetox.detect.statistics import Verdict
from pydetox.errors import DataError, UsageError
from pydetox.evaluation import evaluate, predict
from pydetox.inversion import InversionConfig, TargetObjective, WarpResult, WaveResult, invert
from pydetox.models import OpenClipModel
from pydetox.repair.alpha import (
    CoefficientSearch,
    certainty,
    choose_coefficient,
    find_compromise,
    search_coefficient,
)
from pydetox.repair.coarse_to_fine import Limits, Measured, measure_alphas
from pydetox.repair.configuration import AdvancedUnlearnConfig, UnlearnConfig
from pydetox.repair.passes import _may_be_last, looks_clean, subtract_passes
from pydetox.repair.recovery import triggers_of_scan
from pydetox.repair.retention import DriftProbe
from pydetox.repair.subtraction import subtract
from pydetox.repair.task_vectors import TaskVector
from pydetox.repair.trigger_vector import randomly_shifted, trigger_vector, without_target
from pydetox.research.attacks import PatchTrigger, poison
from pydetox.session import Session
from pydetox.training import TrainConfig, train_on_prompts
from tests.mini import CLASS_NAMES, mini_images, mini_model
from tests.test_training import TEMPLATES, coloured

TARGET = 1
TRIGGER = PatchTrigger(torch.full((3, 6, 6), 255, dtype=torch.uint8), 8, 8)


EVERY_ALPHA = AdvancedUnlearnConfig(alpha_stride=1)


@pytest.fixture(scope="module")
def victim():
    data = coloured(60)
    clean = train_on_prompts(
        mini_model(), data, TEMPLATES, TrainConfig(epochs=40, learning_rate=3e-3, train_text=True)
    )
    poisoned, _ = poison(data, TRIGGER, TARGET, rate=0.25, seed=0)
    model = train_on_prompts(clean, poisoned, TEMPLATES, TrainConfig(epochs=80, learning_rate=3e-3))
    head = model.zero_shot_head(CLASS_NAMES, TEMPLATES)
    before = evaluate(model, data, head, trigger=TRIGGER, target=TARGET)
    assert before.attack_success_rate > 0.9
    assert before.clean_accuracy > 0.9
    return model, head, data


@pytest.mark.parametrize("kind", ["forget", "paired", "strengthen"])
def test_every_vector_removes_a_known_backdoor_at_the_chosen_coefficient(victim, kind):
    model, head, data = victim
    config = UnlearnConfig(vector=kind, steps=60, learning_rate=1e-3, min_accuracy_kept=0.8)
    vector = trigger_vector(model, data.images, [TRIGGER], head, TARGET, config)
    assert all(name.startswith("visual.") for name in vector.tensors)
    found = search_coefficient(model, vector, data, [TRIGGER], head, TARGET, config)
    repaired = subtract(model, vector, found.coefficient)
    after = evaluate(repaired, data, head, trigger=TRIGGER, target=TARGET)
    # The search measured the model it chose.
    assert after.clean_accuracy == pytest.approx(found.clean_accuracy[found.chosen])
    own = predict(model, data.images, head)
    attacked = data.images[(data.labels != TARGET) & (own != TARGET)]
    sent = (predict(repaired, TRIGGER(attacked), head) == TARGET).float().mean()
    assert float(sent) == pytest.approx(found.attack_success_rate[found.chosen])
    assert found.attack_success_rate[0] > 0.9
    if kind == "forget":
        assert found.reached
        assert after.attack_success_rate <= 0.02
        assert after.clean_accuracy >= 0.8


def test_a_search_opens_no_file_and_predicts_once_for_each_alpha(victim, monkeypatch):
    model, head, data = victim
    config = UnlearnConfig(steps=2, advanced=EVERY_ALPHA)
    vector = trigger_vector(model, data.images, [TRIGGER], head, TARGET, config)
    sizes, opened = [], []

    def counted(model, images, head):
        sizes.append(len(images))
        return predict(model, images, head)

    monkeypatch.setattr("pydetox.repair.alpha.predict", counted)
    watching = True
    sys.addaudithook(
        lambda event, _: opened.append(event) if watching and event == "open" else None
    )
    found = search_coefficient(model, vector, data, [TRIGGER], head, TARGET, config)
    watching = False
    assert opened == []
    attacked = [size for size in sizes if size != len(data.images)]
    assert len(attacked) == len(found.coefficients) == 21
    # The model's own predictions, which are those at alpha = 0, and 20 more.
    assert sizes.count(len(data.images)) == 21


def test_at_zero_a_model_of_a_coarser_file_is_evaluated_as_the_file_holds_it(victim):
    model, head, data = victim
    half = OpenClipModel(
        model.clone().clip,
        model_config=model.model_config,
        storage_dtypes=dict.fromkeys(model.storage_dtypes, torch.float16),
    )
    vector = TaskVector({"visual.proj": torch.ones_like(model.visual.proj)})
    stored = subtract(half, vector, 0.0)
    assert torch.equal(stored.visual.proj, model.visual.proj.half().float())
    assert not torch.equal(stored.visual.proj, model.visual.proj)
    found = search_coefficient(
        half, vector, data, [TRIGGER], head, TARGET, UnlearnConfig(coefficients=(0.0,))
    )
    expected = (predict(stored, data.images, head) == data.labels).double().mean()
    assert found.clean_accuracy == (float(expected),)


def test_the_smallest_coefficient_within_both_limits_is_chosen(victim):
    model, head, data = victim
    config = UnlearnConfig(
        steps=60,
        learning_rate=1e-3,
        min_accuracy_kept=0.8,
        safety_factor=1.0,
        advanced=EVERY_ALPHA,
    )
    vector = trigger_vector(model, data.images, [TRIGGER], head, TARGET, config)
    found = search_coefficient(model, vector, data, [TRIGGER], head, TARGET, config)
    floor = 0.8 * found.clean_accuracy[0]
    good = [
        a
        for a, ca, asr in zip(
            found.coefficients, found.clean_accuracy, found.attack_success_rate, strict=True
        )
        if ca >= floor and asr <= config.max_attack_success
    ]
    assert found.coefficient == good[0]
    safer = replace(config, safety_factor=1.5)
    raised = search_coefficient(model, vector, data, [TRIGGER], head, TARGET, safer)
    assert raised.coefficient == max(a for a in good if a <= 1.5 * good[0] + 1e-9)
    # Out of reach: the accuracy is kept all the same, and the result says so.
    strict = UnlearnConfig(coefficients=(0.0, 0.1), max_attack_success=0.0)
    failed = search_coefficient(model, vector, data, [TRIGGER], head, TARGET, strict)
    assert not failed.reached
    assert failed.clean_accuracy[failed.chosen] >= 0.97 * found.clean_accuracy[0]
    # Where none keeps the accuracy, nothing is subtracted, whether 0 is a candidate or not.
    without = replace(config, coefficients=(1.5, 2.0))
    none = search_coefficient(
        model, vector, data, [TRIGGER], head, TARGET, without, accuracy_before=2.0
    )
    assert none.coefficients == (0.0, 1.5, 2.0)
    assert (none.reached, none.coefficient) == (False, 0.0)
    # Measured against a better model of an earlier round, nothing keeps the accuracy: leave it.
    hopeless = search_coefficient(
        model, vector, data, [TRIGGER], head, TARGET, config, accuracy_before=2.0
    )
    assert (hopeless.reached, hopeless.coefficient) == (False, 0.0)


def test_without_labels_accuracy_is_agreement_with_the_model(victim):
    model, head, data = victim
    config = UnlearnConfig(steps=5, coefficients=(0.0, 1.0))
    unlabelled = type(data)(data.images, None, data.class_names, "no labels")
    vector = trigger_vector(model, data.images, [TRIGGER], head, TARGET, config)
    found = search_coefficient(model, vector, unlabelled, [TRIGGER], head, TARGET, config)
    assert found.clean_accuracy[0] == 1.0


def test_nothing_is_subtracted_at_zero(victim):
    model, head, data = victim
    vector = trigger_vector(model, data.images, [TRIGGER], head, TARGET, UnlearnConfig(steps=2))
    same = subtract(model, vector, 0.0).clip.state_dict()
    for key, value in model.clip.state_dict().items():
        assert torch.equal(same[key], value)


def test_bad_input_is_refused(victim):
    model, head, data = victim
    with pytest.raises(DataError, match="at least 2"):
        trigger_vector(model, data.images[:1], [TRIGGER], head, TARGET)
    with pytest.raises(UsageError, match="no triggers"):
        trigger_vector(model, data.images, [], head, TARGET)
    vector = trigger_vector(model, data.images, [TRIGGER], head, TARGET, UnlearnConfig(steps=1))
    only_target = data.subset(torch.nonzero(data.labels == TARGET).flatten())
    with pytest.raises(DataError, match="outside the target class"):
        search_coefficient(model, vector, only_target, [TRIGGER], head, TARGET)
    for wrong in (
        {"vector": "sideways"},
        {"steps": 0},
        {"safety_factor": 0.5},
        {"coefficients": (1.0, 0.5)},
        {"coefficients": (-0.5, 0.0)},
        {"coefficients": (0.0, math.inf)},
    ):
        with pytest.raises(UsageError):
            UnlearnConfig(**wrong)


def test_triggered_images_are_pushed_away_from_the_target_unless_they_surely_are_of_it():
    probabilities = torch.tensor(
        [[0.2, 0.5, 0.3], [0.04, 0.95, 0.01], [0.9, 0.0, 0.1], [0.2, 0.5, 0.3]]
    )
    pushed = without_target(probabilities, torch.tensor([1, 1, 1, 0]), 0.9)
    expected = [[0.4, 0.0, 0.6], [0.04, 0.95, 0.01], [0.9, 0.0, 0.1], [0.0, 0.625, 0.375]]
    assert torch.allclose(pushed, torch.tensor(expected))
    # Nothing else is left: no division by zero.
    one = torch.tensor([1])
    assert without_target(torch.tensor([[0.0, 1.0]]), one, 1.0).tolist() == [[0.0, 1.0]]


def test_moved_images_are_shifts_and_mirrors_with_their_edges_repeated():
    images = torch.randint(0, 256, (40, 3, 33, 16), dtype=torch.uint8)
    moved = randomly_shifted(images, np.random.default_rng(3))
    assert moved.dtype == torch.uint8
    assert torch.equal(moved, randomly_shifted(images, np.random.default_rng(3)))
    seen = set()
    for before, after in zip(images, moved, strict=True):
        around = pad(before[None].float(), (1, 1, 2, 2), mode="replicate")[0].to(torch.uint8)
        fits = set()
        for top, left in itertools.product(range(5), range(3)):
            view = around[:, top : top + 33, left : left + 16]
            fits |= {
                (top, left, k)
                for k in (False, True)
                if torch.equal(after, view.flip(-1) if k else view)
            }
        assert len(fits) == 1
        seen |= fits
    assert {one[0] for one in seen} == set(range(5))
    assert {one[1:] for one in seen} == {(k, m) for k in range(3) for m in (False, True)}


def test_augmentation_can_be_left_out(victim):
    model, head, data = victim

    def vector(**options):
        advanced = AdvancedUnlearnConfig(**options)
        config = UnlearnConfig(steps=3, advanced=advanced)
        return trigger_vector(model, data.images, [TRIGGER], head, TARGET, config).tensors

    still, moving, again = vector(augment=False), vector(), vector()
    assert any(not torch.equal(still[n], moving[n]) for n in still)
    assert all(torch.equal(again[n], moving[n]) for n in still)


def test_triggers_into_different_classes_share_a_vector(victim):
    model, head, data = victim
    config = UnlearnConfig(steps=3)
    other = PatchTrigger(torch.zeros(3, 4, 4, dtype=torch.uint8), 0, 0)
    both = trigger_vector(model, data.images, [TRIGGER, other], head, [TARGET, 2], config)
    same = trigger_vector(model, data.images, [TRIGGER, other], head, TARGET, config)
    assert both.norm() > 0
    assert any(not torch.equal(both.tensors[n], same.tensors[n]) for n in both.tensors)
    with pytest.raises(UsageError, match="2 triggers, 1 target"):
        trigger_vector(model, data.images, [TRIGGER, other], head, [TARGET], config)


def test_alpha_is_chosen_by_the_worst_of_triggers_into_different_classes(victim):
    model, head, data = victim
    config = UnlearnConfig(steps=20, learning_rate=1e-3, advanced=EVERY_ALPHA)
    other = PatchTrigger(torch.zeros(3, 9, 9, dtype=torch.uint8), 0, 0)
    vector = trigger_vector(model, data.images, [TRIGGER, other], head, [TARGET, 2], config)
    both = search_coefficient(model, vector, data, [TRIGGER, other], head, [TARGET, 2], config)
    alone = [
        search_coefficient(model, vector, data, [one], head, target, config)
        for one, target in ((TRIGGER, TARGET), (other, 2))
    ]
    worst = [max(pair) for pair in zip(*(a.attack_success_rate for a in alone), strict=True)]
    assert both.attack_success_rate == pytest.approx(worst)
    assert alone[0].attack_success_rate != alone[1].attack_success_rate
    with pytest.raises(UsageError, match="2 triggers, 1 target"):
        search_coefficient(model, vector, data, [TRIGGER, other], head, [TARGET], config)
    with pytest.raises(UsageError, match="no triggers"):
        search_coefficient(model, vector, data, [], head, [], config)


def test_recovered_triggers_are_amplified_by_their_family_and_failed_ones_left_out():
    model, config = (
        mini_model(),
        UnlearnConfig(advanced=AdvancedUnlearnConfig(blend_amplifications=(1.0, 1.5, 2.0, 3.0))),
    )
    objective = TargetObjective(torch.eye(16)[:3], [0, 1], model.logit_scale)
    images = mini_images().images
    for family, factors in (("patch", (1.0, 2.0, 4.0)), ("blend", (1.0, 1.5, 2.0, 3.0))):
        search = InversionConfig(steps=2, batch_size=4, family=family)
        found = invert(model, images, objective, search)
        found = replace(found, p_l1=torch.tensor([math.inf, 0.1], dtype=torch.float64))
        stamps = config.amplified(found)
        expected = [found.trigger(1).amplified(f).mask for f in factors]
        assert all(torch.equal(s.mask, e) for s, e in zip(stamps, expected, strict=True))
        nothing = replace(found, p_l1=torch.full((2,), math.inf, dtype=torch.float64))
        assert len(config.amplified(nothing)) == 2 * len(factors)


def test_warps_are_amplified_and_those_that_do_not_work_left_out():
    config = UnlearnConfig(advanced=AdvancedUnlearnConfig(warp_amplifications=(1.0, 1.5)))
    sizes = torch.tensor([0.5, math.inf, 0.25, 0.9], dtype=torch.float64)
    found = WarpResult(torch.randn(4, 2, 16, 16), sizes, torch.ones(4), (0, 0, 0, 0))
    stamps = config.amplified(found)
    expected = [f * found.offsets[k] for k in (0, 2) for f in (1.0, 1.5)]
    assert all(torch.equal(s.offsets, e) for s, e in zip(stamps, expected, strict=True))
    # The last one is larger than a twentieth of the side, and makes another picture of the image.
    any_size = AdvancedUnlearnConfig(warp_amplifications=(1.0,), largest_warp=math.inf)
    assert len(UnlearnConfig(advanced=any_size).amplified(found)) == 3
    assert config.amplified(replace(found, sizes=torch.full((3,), math.inf))) == []


def test_waves_are_amplified_and_those_that_do_not_work_left_out():
    config = UnlearnConfig(advanced=AdvancedUnlearnConfig(wave_amplifications=(1.0, 1.5)))
    parameters = torch.tensor([[6.0, 0.0, 0.1], [1.0, 2.0, 0.2], [3.0, 0.0, 0.3]])
    sizes = torch.tensor([0.1, math.inf, 0.2], dtype=torch.float64)
    found = WaveResult(parameters, sizes, torch.ones(3), (4,) * 3)
    stamps = config.amplified(found)
    assert [one.amplitude for one in stamps] == pytest.approx([0.1, 0.15, 0.2, 0.3])
    assert [one.right for one in stamps] == [6, 6, 3, 3]
    assert config.amplified(replace(found, sizes=torch.full((3,), math.inf))) == []
    for wrong in ({"waves": -1}, {"warps": -1}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            UnlearnConfig(**wrong)
    with pytest.raises(UsageError, match="amplifications"):
        AdvancedUnlearnConfig(wave_amplifications=())


def test_a_pass_leaves_equal_parts_of_the_accuracy_to_those_that_follow():
    config = UnlearnConfig(passes=3)
    assert [config.reserve(k) for k in range(3)] == pytest.approx([2 / 3, 1 / 3, 0])
    assert UnlearnConfig(passes=1).reserve(0) == 0


def chosen(accuracy, *success, reserve=0.0, drift=None, **options):
    """The alpha chosen on CA and the ASR of some triggers at alpha 1, 2, ...; 0 does nothing."""
    coefficients = tuple(float(k) for k in range(len(accuracy) + 1))
    shares = [(1.0,) * len(success), *zip(*success, strict=True)]
    index, reached = choose_coefficient(
        coefficients,
        (1.0, *accuracy),
        shares,
        UnlearnConfig(**options),
        accuracy_before=1.0,
        reserve=reserve,
        drift=drift and (0.0, *drift),
    )
    return coefficients[index], reached


def test_alpha_stays_within_the_drift_that_is_allowed():
    accuracy, drift = (1.0,) * 5, (0.01, 0.02, 0.03, 0.04, 0.05)

    def at(*success, **options):
        return chosen(accuracy, *success, drift=drift, safety_factor=1.0, **options)

    falling = (0.5, 0.2, 0.0, 0.0, 0.0)
    assert at(falling, max_drift=0.03) == (3.0, True)
    # The limit comes before the success that is wanted, and the result says so.
    assert at(falling, max_drift=0.02) == (2.0, False)
    # What cannot finish leaves a part of the drift to the next pass, what finishes does not.
    assert at(falling, max_drift=0.02, reserve=0.5) == (1.0, False)
    assert at(falling, max_drift=0.03, reserve=0.5) == (3.0, True)
    assert at(falling, max_drift=0.005) == (0.0, False)
    assert chosen(accuracy, falling, max_drift=0.005, safety_factor=1.0) == (3.0, True)


def test_drift_is_measured_from_the_first_model_whatever_is_repaired(victim):
    model, head, data = victim
    config = UnlearnConfig(steps=10, learning_rate=1e-3, coefficients=(0.0, 1.0))
    probe = DriftProbe(model, data.images, seed=0)
    vector = trigger_vector(model, data.images, [TRIGGER], head, TARGET, config)
    first = search_coefficient(model, vector, data, [TRIGGER], head, TARGET, config, probe=probe)
    assert first.drift[0] == pytest.approx(0, abs=1e-6)
    once = subtract(model, vector, 1.0)
    assert first.drift[1] == pytest.approx(probe.of(once).mean_distance, abs=1e-7)
    again = search_coefficient(once, vector, data, [TRIGGER], head, TARGET, config, probe=probe)
    assert again.drift[0] == pytest.approx(first.drift[1], abs=1e-7)
    assert again.drift[1] > again.drift[0]
    unmeasured = search_coefficient(model, vector, data, [TRIGGER], head, TARGET, config)
    assert unmeasured.drift == ()


def test_alpha_may_spend_the_reserve_when_it_is_good_and_not_otherwise():
    accuracy = (0.99, 0.985, 0.975, 0.97, 0.9)

    def at(*success, reserve=0.5, **options):
        return chosen(accuracy, *success, reserve=reserve, **options)

    # Every trigger is silenced by the third alpha, so that its accuracy may be spent.
    first = at((0.9, 0.5, 0.01, 0.0, 0.0), (0.3, 0.1, 0.0, 0.0, 0.0))
    assert first == (3.0, True)
    # The worst one is not, but the mean of two is small enough: the least mean at 97%.
    mean = at((0.9, 0.5, 0.04, 0.03, 0.02), (0.3, 0.1, 0.0, 0.0, 0.0))
    assert mean == (4.0, False)
    # Neither: the least mean at 98.5% of the accuracy, or at 97% without a reserve.
    hard = (0.9, 0.5, 0.4, 0.06, 0.0), (0.3, 0.1, 0.1, 0.0, 0.0)
    assert at(*hard)[0] == 2.0
    assert at(*hard, reserve=0.0)[0] == 4.0
    assert at(*hard, reserve=0.0, min_accuracy_kept=0.98)[0] == 2.0
    # No alpha keeps the accuracy: nothing is subtracted.
    assert at(*hard, min_accuracy_kept=1.0) == (0.0, False)
    # The safety factor goes no further than the accuracy allows.
    safe = (0.5, 0.01, 0.01, 0.0, 0.0)
    assert at(safe, safe, safety_factor=3.0)[0] == 4.0


def test_where_no_alpha_reaches_the_limit_the_mean_of_all_triggers_decides(victim):
    model, head, data = victim
    config = UnlearnConfig(
        steps=40,
        learning_rate=1e-3,
        min_accuracy_kept=0.0,
        coefficients=tuple(k / 10 for k in range(16)),
        advanced=EVERY_ALPHA,
    )
    vector = trigger_vector(model, data.images, [TRIGGER], head, TARGET, config)

    def always(images):
        """Return an image that the model takes for the target, whatever it is given."""
        return example.expand(len(images), -1, -1, -1)

    example = data.images[data.labels == TARGET][:1]
    pair = [TRIGGER, always]
    found = search_coefficient(model, vector, data, pair, head, TARGET, config)
    alone = search_coefficient(model, vector, data, [TRIGGER], head, TARGET, config)
    assert min(found.attack_success_rate) == 1.0
    assert not found.reached
    least = min(alone.attack_success_rate)
    assert found.coefficient == alone.coefficients[alone.attack_success_rate.index(least)]


def test_a_compromise_names_limits_that_allow_it():
    accuracy, drift = (1.0, 0.98, 0.9123, 0.5), (0.0, 0.01, 0.0254, 0.3)
    success = ((1.0, 1.0), (0.3, 0.0), (0.01, 0.0), (0.0, 0.0))
    config = UnlearnConfig()
    found = find_compromise(accuracy, success, config, 1.0, drift)
    assert (found.index, found.min_accuracy_kept, found.max_drift) == (2, 0.912, 0.026)
    wider = replace(
        config,
        min_accuracy_kept=found.min_accuracy_kept,
        max_drift=found.max_drift,
        safety_factor=1.0,
    )
    coefficients = (0.0, 1.0, 2.0, 3.0)
    given = {"accuracy_before": 1.0, "drift": drift}
    assert choose_coefficient(coefficients, accuracy, success, config, **given) == (1, False)
    assert choose_coefficient(coefficients, accuracy, success, wider, **given) == (2, True)
    # A limit that is wide enough stays; what nothing removes is offered nothing.
    loose = replace(config, max_drift=0.5)
    assert find_compromise(accuracy, success, loose, 1.0, drift).max_drift == 0.5
    assert find_compromise(accuracy, [(1.0,)] * 4, config, 1.0, drift) is None


def test_the_pareto_front_is_what_no_other_alpha_beats():
    def front(accuracy, success, drift=()):
        alphas = tuple(float(k) for k in range(len(accuracy)))
        return CoefficientSearch(
            alphas, accuracy, success, 0, False, 1.0, drift=drift
        ).pareto_front()

    assert front((1.0, 0.9, 0.95, 0.95), (1.0, 0.5, 0.2, 0.2)) == (0, 2)
    assert front((1.0, 1.0, 1.0), (1.0, 0.5, 0.0), (0.0, 0.1, 0.2)) == (0, 1, 2)


def test_images_that_belong_to_no_name_hardly_count_without_labels(victim):
    model, head, data = victim
    sure = certainty(model, data.images, head)
    assert sure.shape == (len(data),)
    assert 0 <= float(sure.min()) <= float(sure.max()) <= 1
    pixels = model.normalize(data.images.float() / 255)
    features = torch.nn.functional.normalize(model.visual(pixels), dim=-1).double()
    ranked = (model.logit_scale * features @ head.double().T).softmax(dim=1).sort(dim=1).values
    assert torch.allclose(sure, ranked[:, -1] - ranked[:, -2], atol=1e-4)
    # Two names that mean the same: the model is sure of none, and all count alike.
    same = head[:1].repeat(2, 1)
    assert certainty(model, data.images, same).tolist() == [1.0] * len(data)
    config = UnlearnConfig(
        steps=20, learning_rate=1e-3, coefficients=(0.0, 1.0, 2.0), advanced=EVERY_ALPHA
    )
    vector = trigger_vector(model, data.images, [TRIGGER], head, TARGET, config)
    unlabelled = type(data)(data.images, None, data.class_names, "no labels")
    found = search_coefficient(model, vector, unlabelled, [TRIGGER], head, TARGET, config)
    own = predict(model, data.images, head)
    agrees = (predict(subtract(model, vector, 2.0), data.images, head) == own).double()
    expected = float((agrees * sure).sum() / sure.sum())
    assert found.clean_accuracy[2] == pytest.approx(expected)


def test_a_repair_that_cannot_work_stops_after_one_pass_and_says_so(victim, caplog):
    model, _, data = victim
    session = Session.open(model, data, templates=TEMPLATES)
    config = UnlearnConfig(
        steps=40,
        learning_rate=1e-3,
        coefficients=(1.0,),
        max_drift=1e-6,
        passes=2,
        warps=0,
        waves=0,
        advanced=AdvancedUnlearnConfig(amplifications=(1.0,), blend_amplifications=(1.0,)),
    )
    scan = ScanConfig(inversion=InversionConfig(steps=60, batch_size=16), families=("patch",))
    same, rounds = subtract_passes(session, [TARGET], scan, config, accuracy_before=1.0)
    assert len(rounds) == 1
    assert rounds[0].search.hopeless
    assert "max_drift 1e-06: nothing is subtracted" in caplog.text
    assert all(
        torch.equal(v, model.clip.state_dict()[k]) for k, v in same.clip.state_dict().items()
    )
    # With a reserve for the second pass, which may spend it, there is a second pass.
    assert len(subtract_passes(session, [TARGET], scan, config)[1]) == 2


def test_triggers_of_earlier_repairs_are_unlearned_again(victim, monkeypatch):
    model, _, data = victim
    session = Session.open(model, data, templates=TEMPLATES)
    calls = []

    def vector(model, images, stamps, head, targets, *given, **options):
        calls.append((list(stamps), list(targets)))
        return trigger_vector(model, images, stamps, head, targets, *given, **options)

    monkeypatch.setattr("pydetox.repair.passes.trigger_vector", vector)
    config = UnlearnConfig(steps=2, coefficients=(1.0,), passes=1, warps=0, waves=0)
    scan = ScanConfig(inversion=InversionConfig(steps=5, batch_size=8), families=("patch",))
    other = 1 - TARGET

    def earlier(images):
        return images

    _, (one,) = subtract_passes(session, [TARGET], scan, config, earlier=[(earlier, other)])
    (stamps, targets), *_ = calls
    assert stamps[0] is earlier
    assert len(stamps) > 1
    assert targets == [other] + [TARGET] * (len(stamps) - 1)
    assert one.unlearned == tuple(zip(stamps, targets, strict=True))
    # Beside known triggers as well. A direction is of no use to a repair of classes.
    directed = (lambda images: images, torch.ones(16))
    given = {"triggers": [TRIGGER], "earlier": [(earlier, other), directed]}
    _, (known,) = subtract_passes(session, [TARGET], scan, config, **given)
    assert known.unlearned == ((earlier, other), (TRIGGER, TARGET))


@pytest.mark.parametrize("stride", [2, 3, 4, 7, 30])
def test_coarse_to_fine_chooses_as_if_every_alpha_was_measured(stride):
    rng = np.random.default_rng(0)
    coefficients = tuple(round(0.1 * k, 1) for k in range(21))
    outcomes, measured = set(), []
    for _ in range(300):
        # ASR falls and drift grows along a vector, CA falls from somewhere on.
        falls = np.sort(rng.uniform(0, rng.choice([1.0, 3.0]), 3))
        success = [
            tuple(float(max(0.0, 1 - a / (f + 0.01)) ** 0.5) for f in falls) for a in coefficients
        ]
        drift = [0.012 * a**2 for a in coefficients]
        speed, start = rng.uniform(0, 0.05), rng.uniform(0, 2)
        accuracy = [float(0.97 - speed * max(0.0, a - start)) for a in coefficients]
        config = UnlearnConfig(max_drift=float(rng.uniform(0.001, 0.05)))
        reserve = float(rng.choice([0.0, 0.5]))
        before = float(rng.choice([0.97, 0.97, 2.0]))
        limits = Limits(config, before, reserve)

        def measure(k, accuracy=accuracy, success=success, drift=drift):
            return Measured(accuracy[k], success[k], drift[k])

        given = {"accuracy_before": before, "reserve": reserve}
        index, reached = choose_coefficient(
            coefficients, accuracy, success, config, drift=drift, **given
        )
        known = measure_alphas(measure, coefficients, limits, stride=stride)
        assert list(known) == sorted(known)
        assert 0 in known
        some = list(known.values())
        found, found_reached = choose_coefficient(
            [coefficients[k] for k in known],
            [one.accuracy for one in some],
            [one.success for one in some],
            config,
            drift=[one.drift for one in some],
            **given,
        )
        assert (list(known)[found], found_reached) == (index, reached)
        whole = find_compromise(accuracy, success, config, before, drift)
        if not reached and whole is not None:
            few = find_compromise(
                [one.accuracy for one in some],
                [one.success for one in some],
                config,
                before,
                [one.drift for one in some],
            )
            assert replace(few, index=list(known)[few.index]) == whole
        outcomes.add((reached, index > 0, whole is None))
        measured.append(len(known))
    # Repairs within the limits and beyond them, some with a compromise, some without any hope.
    assert len(outcomes) >= 4
    assert np.mean(measured) < (21 if stride == 30 else 14)


def scanned(p_l1, *, verdict=Verdict.CLEAN, scores=(0.0, 0.0, 0.0), family="patch", others=()):
    """What a repair looks at of a scan of three classes, one search each."""
    found = invert(
        mini_model(),
        mini_images().images,
        TargetObjective(torch.eye(16)[:3], [0, 1, 2], mini_model().logit_scale),
        InversionConfig(steps=2, batch_size=4, family=family),
    )
    found = replace(found, p_l1=torch.tensor(p_l1, dtype=torch.float64))
    detection = SimpleNamespace(verdict=verdict, class_scores=scores)
    return SimpleNamespace(
        verdict=verdict, detection=detection, family=family, inversion=found, others=others
    )


def test_triggers_of_a_scan_are_those_that_work_for_the_class_and_were_not_dropped():
    blend = scanned([0.5, math.inf, 0.4], family="blend")
    both = scanned([0.3, 0.1, 0.2], others=(blend,))
    patch = triggers_of_scan(both, 1, "patch")
    assert (patch.targets, patch.p_l1.tolist()) == ((1,), [0.1])
    assert torch.equal(patch.trigger(0).mask, both.inversion.trigger(1).mask)
    assert torch.equal(patch.trigger(0).pattern, both.inversion.trigger(1).pattern)
    assert (patch.seconds, patch.tower_passes, patch.history.shape[1]) == (0.0, 0, 1)
    assert triggers_of_scan(both, 1, "blend") is None  # the search found none
    assert triggers_of_scan(both, 2, "blend").p_l1.tolist() == [0.4]
    assert triggers_of_scan(scanned([0.3, 0.1, 0.2]), 1, "blend") is None
    both.inversion = replace(both.inversion, endings=("all steps", "dropped", "converged"))
    assert triggers_of_scan(both, 1, "patch") is None
    label_free = scanned([0.3, 0.1, 0.2])
    label_free.inversion = replace(label_free.inversion, targets=None)
    assert triggers_of_scan(label_free, 1, "patch") is None


def test_a_scan_shows_no_trace_if_no_family_makes_a_target_stand_out():
    def looks(targets, *scores, verdict=Verdict.CLEAN):
        first, *rest = [
            SimpleNamespace(
                detection=SimpleNamespace(class_scores=of_family), verdict=verdict, others=()
            )
            for of_family in scores
        ]
        first.others = tuple(rest)
        return looks_clean(first, targets)

    assert looks([1], (3.0, 1.9, 0.0), (0.0, -2.0, 0.0))
    assert not looks([0], (3.0, 1.9, 0.0), (0.0, -2.0, 0.0))
    assert not looks([1, 2], (0.0, 1.9, 0.0), (0.0, 0.0, 2.0))
    assert not looks([1], (0.0, 0.0, 0.0), verdict=Verdict.SUSPICIOUS)
    assert not looks([1], ())


def test_a_warp_that_is_small_asks_for_another_pass():
    def enough(*sizes, number=0, passes=2, reached=True, targets=(1,)):
        warps = WarpResult(torch.zeros(len(sizes), 2, 40, 40), torch.tensor(sizes), *[None] * 2)
        one = SimpleNamespace(
            warps=(warps,), search=SimpleNamespace(reached=reached), targets=targets
        )
        return _may_be_last(one, number, UnlearnConfig(passes=passes))

    assert enough(2.1, math.inf)
    assert enough(math.inf)
    assert not enough(2.1, 1.9)
    assert not enough(2.1, number=1)
    assert not enough(2.1, reached=False)
    assert not enough(2.1, targets=())
    assert enough(2.1, number=1, passes=3)


def test_a_pass_is_the_last_one_if_a_scan_after_it_shows_nothing(victim):
    model, _, data = victim
    session = Session.open(model, data, templates=TEMPLATES)
    config = UnlearnConfig(
        steps=40,
        learning_rate=1e-3,
        min_accuracy_kept=0.5,
        max_attack_success=1.0,  # every alpha that keeps enough is within the limits
        max_drift=2.0,
        passes=2,
        warps=0,
        waves=0,
        advanced=AdvancedUnlearnConfig(amplifications=(1.0,)),
    )
    scan = ScanConfig(inversion=InversionConfig(steps=10, batch_size=4), families=("patch",))
    asked = []

    def check(score):
        def run(model, number):
            asked.append(number)
            return scanned([0.3, 0.1, 0.2], scores=(0.0, score, 0.0))

        return run

    clean = check(0.0)
    _, rounds = subtract_passes(session, [TARGET], scan, config, restarts=2, check=clean)
    assert asked == [0]
    assert len(rounds) == 1
    assert rounds[0].rescan.detection.class_scores == (0.0, 0.0, 0.0)
    assert [len(found) for found in rounds[0].triggers] == [2]
    # Something is left: a second pass, which takes the scan's trigger, and one of its own.
    standing_out = check(2.1)
    _, rounds = subtract_passes(session, [TARGET], scan, config, restarts=2, check=standing_out)
    assert asked == [0, 0]  # the last pass is followed by a scan anyway
    assert [one.rescan for one in rounds] == [None, None]
    assert [len(found) for found in rounds[1].triggers] == [1, 1]
    assert rounds[1].triggers[0].p_l1.tolist() == [0.1]
    # A known trigger needs no second pass, and so no scan.
    subtract_passes(session, [TARGET], scan, config, triggers=[TRIGGER], check=clean)
    assert asked == [0, 0]
