"""Every defence on one small backdoored model, and the parts of each against closed forms."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pydetox.detect.configuration import ScanConfig
from pydetox.errors import ArchitectureError, DataError, UsageError
from pydetox.evaluation import evaluate
from pydetox.inversion import InversionConfig
from pydetox.repair.configuration import UnlearnConfig
from pydetox.research.attacks import Backdoor, PatchTrigger, plant
from pydetox.research.defenses import (
    DEFENSES,
    TUNING_EFFORT,
    CleanClip,
    DefenderData,
    FinePruning,
    ForgettingConfig,
    GradientAscent,
    KnownTrigger,
    Par,
    PlainTbar,
    PruningConfig,
    PydetoxKnown,
    PydetoxUnknown,
    RelabelledTrigger,
    TowersConfig,
)
from pydetox.research.defenses.augmentation import random_views
from pydetox.research.defenses.fine_pruning import prune_hidden_units
from pydetox.research.defenses.fine_tuning import info_nce
from pydetox.training import TrainConfig, train_on_prompts
from tests.mini import CLASS_NAMES, flat_calibration, judge_one_class, mini_model
from tests.test_training import TEMPLATES, coloured

TRIGGER = PatchTrigger(torch.full((3, 6, 6), 255, dtype=torch.uint8), 8, 8)
OTHER = PatchTrigger(torch.zeros((3, 5, 5), dtype=torch.uint8), 1, 1)
DATA = coloured(60)
# A tower of one layer forgets nothing within the drift that is right for deeper ones.
CONFIG = UnlearnConfig("forget", 60, 1e-3, min_accuracy_kept=0.8, max_drift=0.1)

#: Settings for this small model, by class.
SETTINGS = {
    PydetoxKnown: CONFIG,
    PydetoxUnknown: CONFIG,
    PlainTbar: replace(CONFIG, vector="strengthen"),
    GradientAscent: ForgettingConfig(1e-3, 30, retain=1.0),
    RelabelledTrigger: ForgettingConfig(3e-3, 60, triggered_share=0.5),
    CleanClip: TowersConfig(1e-3, epochs=3, batch_size=20),
    Par: TowersConfig(1e-3, epochs=3, batch_size=20, threshold=0.5),
    FinePruning: PruningConfig(0.25, TrainConfig(epochs=3, learning_rate=1e-3)),
}


def train(backdoors):
    base = train_on_prompts(
        mini_model(), DATA, TEMPLATES, TrainConfig(epochs=40, learning_rate=3e-3, train_text=True)
    )
    poisoned, _ = plant(DATA, backdoors, seed=0)
    return train_on_prompts(base, poisoned, TEMPLATES, TrainConfig(epochs=80, learning_rate=3e-3))


@pytest.fixture(scope="module")
def victim():
    return train([Backdoor(TRIGGER, 1, 0.25)])


def measured(model, trigger=TRIGGER, target=1):
    head = model.zero_shot_head(CLASS_NAMES, TEMPLATES)
    return evaluate(model, DATA, head, trigger=trigger, target=target)


def data_for(defense, **changes):
    known = (KnownTrigger(TRIGGER, 1),) if defense.needs_trigger else ()
    scanned = {}
    if isinstance(defense, PydetoxUnknown):
        search = ScanConfig(inversion=InversionConfig(steps=40, batch_size=8))
        config = mini_model().model_config
        scanned = {
            "scan": search,
            "calibration": flat_calibration(search, DATA, config, 0.9, templates=TEMPLATES),
        }
    given = {"images": DATA, "templates": TEMPLATES, "triggers": known}
    return DefenderData(**{**given, **scanned, **changes})


def test_every_method_gets_the_same_tuning_effort_and_a_name_of_its_own():
    assert len({one.name for one in DEFENSES}) == len(DEFENSES) == 9
    for one in DEFENSES:
        assert len(one.grid) == TUNING_EFFORT
        assert len({repr(setting) for setting in one.grid}) == TUNING_EFFORT


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda one: one.name)
def test_a_defence_repairs_a_copy_and_says_what_it_used(victim, defense, monkeypatch):
    judge_one_class(monkeypatch)
    before = {k: v.clone() for k, v in victim.clip.state_dict().items()}
    config = SETTINGS.get(type(defense), TrainConfig(epochs=3, learning_rate=1e-3))
    outcome = defense.defend(victim, data_for(defense), config)
    for key, value in victim.clip.state_dict().items():
        assert torch.equal(value, before[key])
    assert outcome.model is not victim
    assert any(
        not torch.equal(value, before[key])
        for key, value in outcome.model.clip.state_dict().items()
    )
    assert not outcome.model.clip.training
    assert not any(p.requires_grad for p in outcome.model.clip.parameters())
    assert (outcome.cost.images, outcome.cost.labels) == (60, 60)
    assert outcome.cost.seconds > 0
    again = defense.defend(victim, data_for(defense), config)
    for key, value in outcome.model.clip.state_dict().items():
        assert torch.equal(value, again.model.clip.state_dict()[key])
    start, end = measured(victim), measured(outcome.model)
    assert start.attack_success_rate > 0.9
    assert end.clean_accuracy > 0.6
    if isinstance(defense, PydetoxKnown | GradientAscent | RelabelledTrigger):
        assert end.attack_success_rate < 0.1
    if defense.needs_trigger:
        with pytest.raises(UsageError, match="needs the trigger"):
            defense.defend(victim, data_for(defense, triggers=()), config)
    if not isinstance(defense, PydetoxKnown | PydetoxUnknown | PlainTbar):
        with pytest.raises(DataError, match="no labels"):
            defense.defend(victim, data_for(defense, images=replace(DATA, labels=None)), config)


def test_two_known_backdoors_are_both_removed():
    model = train([Backdoor(TRIGGER, 1, 0.2), Backdoor(OTHER, 2, 0.2)])
    pair = (KnownTrigger(TRIGGER, 1), KnownTrigger(OTHER, 2))
    for defense, config in (
        (PydetoxKnown(), CONFIG),
        (RelabelledTrigger(), SETTINGS[RelabelledTrigger]),
    ):
        outcome = defense.defend(model, DefenderData(DATA, TEMPLATES, pair), config)
        for one in pair:
            assert measured(model, one.trigger, one.target).attack_success_rate > 0.8
            end = measured(outcome.model, one.trigger, one.target)
            assert end.attack_success_rate < 0.15


def test_info_nce_is_the_symmetric_cross_entropy_over_pairs():
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((5, 7)) for _ in range(2))
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second /= np.linalg.norm(second, axis=1, keepdims=True)
    logits = 3.0 * first @ second.T
    expected = 0.0
    for table in (logits, logits.T):
        shares = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
        expected -= np.log(np.diag(shares)).mean() / 2
    found = info_nce(torch.tensor(first), torch.tensor(second), torch.tensor(3.0).double())
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_par_without_its_term_is_the_cross_modal_fine_tuning_and_with_it_moves_further():
    model = mini_model(3)
    data = DefenderData(DATA, TEMPLATES)

    def moved(config):
        tuned = Par().defend(model, data, config).model
        pixels = DATA.images.float() / 255
        now, start = (
            torch.nn.functional.normalize(m.encode_pixels(pixels), dim=-1) for m in (tuned, model)
        )
        return float((now - start).square().sum(dim=-1).mean())

    config = TowersConfig(1e-3, epochs=2, batch_size=20)
    still = moved(replace(config, weight=0.0))
    assert moved(replace(config, weight=4.0)) > still + 0.01
    # Beyond the threshold the term is zero, from the first step on.
    assert moved(replace(config, weight=4.0, threshold=-1.0)) == pytest.approx(still)


def test_random_views_stay_in_range_and_depend_on_the_generator_alone():
    pixels = DATA.images[:6].float() / 255
    one, two = (random_views(pixels, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == pixels.shape
    assert 0 <= float(one.min()) <= float(one.max()) <= 1
    assert not torch.equal(one, random_views(pixels, np.random.default_rng(6)))
    # A grey image stays grey outside the square, up to brightness.
    grey = torch.full((4, 3, 16, 16), 0.4)
    for view in random_views(grey, np.random.default_rng(0)):
        values = view.flatten().unique()
        assert len(values) <= 2
        assert abs(float(values[values != 0.5].mean()) - 0.4) <= 0.2 + 1e-6


def test_the_least_active_units_are_removed_and_stay_removed(victim):
    model = victim.clone()
    mlp = next(m for n, m in model.visual.named_modules() if n.endswith("mlp"))
    hidden = {}
    mlp.c_proj.register_forward_pre_hook(lambda _, inputs: hidden.update(x=inputs[0].clone()))
    model.visual(model.normalize(DATA.images.float() / 255))
    activity = hidden["x"].abs().double().reshape(-1, hidden["x"].shape[-1]).mean(dim=0)
    units = prune_hidden_units(model, DATA.images, 0.25, 1)
    (removed,) = units.values()
    assert len(removed) == len(activity) // 4
    kept = torch.ones(len(activity), dtype=torch.bool)
    kept[removed] = False
    assert activity[~kept].max() <= activity[kept].min()
    for weight in (mlp.c_fc.weight[removed], mlp.c_fc.bias[removed], mlp.c_proj.weight[:, removed]):
        assert not weight.any()
    tuned = FinePruning().defend(victim, data_for(FinePruning()), SETTINGS[FinePruning])
    assert list(tuned.details["pruned"].values()) == [removed]
    after = next(m for n, m in tuned.model.visual.named_modules() if n.endswith("mlp"))
    for weight in (after.c_fc.weight[removed], after.c_proj.weight[:, removed]):
        assert not weight.any()


def test_pruning_goes_on_with_fewer_images_where_memory_runs_out(victim, monkeypatch):
    expected = prune_hidden_units(victim.clone(), DATA.images, 0.25, 2)
    model = victim.clone()
    forward = model.visual.forward

    def small(images):
        found = forward(images)  # the hooks have seen the images when memory runs out
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return found

    monkeypatch.setattr(model.visual, "forward", small)
    assert prune_hidden_units(model, DATA.images, 0.25, 2) == expected


def test_bad_settings_are_refused():
    for make in (
        lambda: TowersConfig(0.0),
        lambda: TowersConfig(1e-3, batch_size=1),
        lambda: ForgettingConfig(1e-3, steps=0),
        lambda: ForgettingConfig(1e-3, triggered_share=0.0),
        lambda: ForgettingConfig(1e-3, retain=-1.0),
        lambda: PruningConfig(1.0, TrainConfig(1, 1e-3)),
    ):
        with pytest.raises(UsageError):
            make()
    model = mini_model()
    for block in model.visual.transformer.resblocks:
        block.mlp = torch.nn.Identity()
    with pytest.raises(ArchitectureError, match="no transformer blocks"):
        prune_hidden_units(model, DATA.images, 0.5, 1)
    with pytest.raises(DataError, match="no class names"):
        DefenderData(replace(DATA, class_names=None), TEMPLATES).head(mini_model())
