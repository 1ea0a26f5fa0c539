"""Localisation against closed forms, and against models built by hand from two task vectors."""

import math

import numpy as np
import pytest
import torch

from pydetox.analysis.localization import (
    disentanglement_error,
    effective_rank,
    layer_of,
    localize,
    module_of,
    ranks,
    removals,
    shares,
    singular_values,
)
from pydetox.errors import ArchitectureError, DataError, UsageError
from pydetox.evaluation import evaluate, predict
from pydetox.repair.configuration import UnlearnConfig
from pydetox.repair.subtraction import subtract
from pydetox.repair.task_vectors import TaskVector
from pydetox.repair.trigger_vector import trigger_vector
from pydetox.reporting.documents import localization_document
from pydetox.research.attacks import PatchTrigger, poison
from pydetox.training import TrainConfig, train_on_prompts
from tests.mini import CLASS_NAMES, mini_model
from tests.test_training import TEMPLATES, coloured

TRIGGER = PatchTrigger(torch.full((3, 6, 6), 255, dtype=torch.uint8), 8, 8)


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("visual.transformer.resblocks.3.attn.in_proj_weight", "visual.transformer.resblocks.3", 0),
        ("visual.transformer.resblocks.11.mlp.c_fc.bias", "visual.transformer.resblocks.11", 1),
        ("visual.transformer.resblocks.0.ln_1.weight", "visual.transformer.resblocks.0", 2),
        ("visual.ln_post.bias", "visual.ln_post", 2),
        ("visual.conv1.weight", "visual.conv1", 3),
        ("visual.proj", "visual.proj", 3),
        ("visual.layer2.1.conv1.weight", "visual.layer2.1", 3),
        ("visual.trunk.blocks.4.norm1.weight", "visual.trunk.blocks.4", 2),
    ],
)
def test_tensors_are_grouped_by_their_names(name, layer, module):
    if name != "visual.layer2.1.conv1.weight":  # a ResNet's stages are not numbered blocks
        assert layer_of(name) == layer
    assert module_of(name) == ("attention", "mlp", "norm", "embedding")[module]


def test_shares_are_those_of_the_squared_norm():
    block = "visual.transformer.resblocks.{}.mlp.c_fc.weight"
    vector = TaskVector({block.format(0): torch.full((2, 4), 3.0), "visual.proj": torch.ones(8)})
    whole = TaskVector(
        {block.format(0): torch.full((2, 4), -2.0), "visual.proj": torch.arange(8.0)}
    )
    one, two = shares(vector, whole)
    assert (one.group, two.group) == ("visual.transformer.resblocks.0", "visual.proj")
    assert one.energy == pytest.approx(72 / 80)
    assert two.energy == pytest.approx(8 / 80)
    assert one.density == pytest.approx(72 / 80 / 0.5)
    assert one.overlap == pytest.approx(-1)
    assert two.overlap == pytest.approx(28 / math.sqrt(8 * 140))
    assert [s.group for s in shares(vector, None, by_layer=False)] == ["mlp", "embedding"]
    assert all(s.overlap is None for s in shares(vector, None))
    zero = TaskVector({"visual.proj": torch.zeros(8)})
    assert shares(vector, zero)[1].overlap is None
    with pytest.raises(UsageError, match="zero"):
        shares(zero, None)


def test_the_effective_rank_of_known_spectra():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    p = np.array([3.0, 1.0]) / 4
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        float(np.exp(-(p * np.log(p)).sum()))
    )
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((7, 5)).astype(np.float32)
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    assert np.allclose(singular_values(torch.from_numpy(matrix)).numpy(), expected, rtol=1e-10)
    outer = torch.outer(torch.arange(1.0, 4), torch.arange(1.0, 6))
    kernel = torch.eye(4).reshape(4, 1, 2, 2)
    found = ranks(TaskVector({"a": outer, "b": torch.zeros(2, 2), "c": torch.ones(3), "k": kernel}))
    assert [(r.name, r.shape) for r in found] == [("a", (3, 5)), ("k", (4, 4))]
    assert found[0].effective_rank == pytest.approx(1, abs=1e-6)
    assert found[0].top_energy == pytest.approx(1)
    assert found[1].effective_rank == pytest.approx(4)
    assert found[1].top_energy == pytest.approx(0.25)


@pytest.fixture(scope="module")
def story():
    data = coloured(60)
    base = train_on_prompts(
        mini_model(), data, TEMPLATES, TrainConfig(epochs=40, learning_rate=3e-3, train_text=True)
    )
    poisoned, _ = poison(data, TRIGGER, 1, rate=0.25, seed=0)
    victim = train_on_prompts(base, poisoned, TEMPLATES, TrainConfig(epochs=80, learning_rate=3e-3))
    head = victim.zero_shot_head(CLASS_NAMES, TEMPLATES)
    config = UnlearnConfig(steps=60, learning_rate=1e-3)
    return base, victim, head, data, trigger_vector(victim, data.images, [TRIGGER], head, 1, config)


def test_removals_measure_what_subtracting_measures(story):
    _, victim, head, data, vector = story
    found = {
        one.layer: one
        for one in removals(victim, vector, 1.0, data.images, data.labels, TRIGGER, 1, head)
    }
    for name, alpha in (("none", 0.0), ("all", 1.0)):
        model = subtract(victim, vector, alpha)
        expected = evaluate(model, data, head, trigger=TRIGGER, target=1)
        assert found[name].clean_accuracy == pytest.approx(expected.clean_accuracy)
        assert found[name].attack_success_rate == pytest.approx(expected.attack_success_rate)
    assert found["none"].attack_success_rate > 0.9
    assert found["all"].attack_success_rate < 0.1
    assert set(found) - {"none", "all"} == {s.group for s in shares(vector, None)}
    with pytest.raises(DataError, match="all 60 images"):
        removals(victim, vector, 1.0, data.images, torch.ones(60).long(), TRIGGER, 1, head)


def test_the_disentanglement_error_is_the_definition(story):
    base, victim, head, data, vector = story
    whole = TaskVector.between(base.clip.state_dict(), victim.clip.state_dict())
    clean = whole - vector
    stamped = TRIGGER(data.images)
    first, second = (-1.0, 0.0, 0.5), (0.0, 2.0)
    found = disentanglement_error(
        base,
        clean,
        vector,
        data.images,
        stamped,
        head,
        first_coefficients=first,
        second_coefficients=second,
    )

    def model(a, b):
        moved = base.clone()
        (clean * a + vector * b).apply_to(moved.clip)
        return moved

    for i, a in enumerate(first):
        for j, b in enumerate(second):
            both = model(a, b)
            one = predict(both, data.images, head) != predict(model(a, 0), data.images, head)
            two = predict(both, stamped, head) != predict(model(0, b), stamped, head)
            assert found.error[i][j] == pytest.approx(
                float(one.double().mean() + two.double().mean()), abs=0.05
            )
    # At (0, 0) both are theta_pre; with the second coefficient 0, only the second term is left.
    assert found.error[1][0] == 0
    inside = [found.error[i][j] for i in (1, 2) for j in (0,)]
    assert found.mean == pytest.approx(sum(inside) / len(inside))


def test_vectors_that_touch_different_tasks_do_not_interfere(story):
    base, _, head, data, vector = story
    nothing = TaskVector({})
    found = disentanglement_error(
        base,
        nothing,
        vector,
        data.images,
        data.images,
        head,
        first_coefficients=(0.0, 1.0),
        second_coefficients=(0.0,),
    )
    assert found.error == ((0.0,), (0.0,))
    for wrong in ((), (1.0, 0.0)):
        with pytest.raises(UsageError, match="ascending"):
            disentanglement_error(
                base,
                nothing,
                vector,
                data.images,
                data.images,
                head,
                first_coefficients=wrong,
                second_coefficients=(0.0,),
            )
    with pytest.raises(ArchitectureError, match="ghost"):
        disentanglement_error(
            base,
            TaskVector({"ghost": torch.ones(1)}),
            vector,
            data.images,
            data.images,
            head,
            first_coefficients=(0.0,),
            second_coefficients=(0.0,),
        )


def test_all_parts_come_together_as_plain_data(story):
    base, victim, _, _, vector = story
    whole = TaskVector.between(base.clip.state_dict(), victim.clip.state_dict())
    found = localize(vector, whole=whole)
    assert sum(s.energy for s in found.layers) == pytest.approx(1)
    assert sum(s.energy for s in found.modules) == pytest.approx(1)
    assert found.overlap == pytest.approx(vector.cosine(whole))
    content = localization_document(found)
    assert content["layers"][0]["group"] == found.layers[0].group
    assert content["removals"] == ()
    assert content["disentanglement"] is None
