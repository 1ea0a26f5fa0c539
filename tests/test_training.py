from dataclasses import replace

import pytest
import torch

from pydetox.data import ImageSet
from pydetox.errors import DataError, DeviceMemoryError, UsageError
from pydetox.evaluation import predict
from pydetox.models import OpenClipModel
from pydetox.models.classifiers import build_classifier
from pydetox.training import TrainConfig, optimize, train_on_prompts
from tests.mini import CLASS_NAMES, mini_images, mini_model

TEMPLATES = ["a {c}", "the {c}"]


def coloured(n=30):
    """Images whose colour is their class."""
    labels = torch.arange(n) % 3
    images = torch.randint(0, 60, (n, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images[torch.arange(n), labels] += 150
    return ImageSet(images.to(torch.uint8), labels, CLASS_NAMES, "colours")


@pytest.mark.parametrize("train_text", [True, False])
def test_training_learns_the_classes_and_leaves_the_given_model_alone(train_text):
    model, data = mini_model(), coloured()
    weights = {k: v.clone() for k, v in model.clip.state_dict().items()}
    config = TrainConfig(epochs=40, learning_rate=3e-3, batch_size=10, train_text=train_text)
    trained = train_on_prompts(model, data, TEMPLATES, config)
    head = trained.zero_shot_head(CLASS_NAMES, TEMPLATES)
    assert (predict(trained, data.images, head) == data.labels).float().mean() > 0.95
    for key, value in model.clip.state_dict().items():
        assert torch.equal(value, weights[key])
    after = trained.clip.state_dict()
    assert torch.equal(after["token_embedding.weight"], weights["token_embedding.weight"])
    assert torch.equal(after["text_projection"], weights["text_projection"]) != train_text
    assert not any(p.requires_grad for p in trained.clip.parameters())
    assert not trained.clip.training


def test_the_seed_decides_the_result():
    model, data = mini_model(), coloured()
    config = TrainConfig(epochs=1, learning_rate=1e-3, batch_size=7, seed=3)
    one, two = (train_on_prompts(model, data, TEMPLATES, config) for _ in range(2))
    other = train_on_prompts(model, data, TEMPLATES, replace(config, seed=4))
    key = "visual.proj"
    assert torch.equal(one.clip.state_dict()[key], two.clip.state_dict()[key])
    assert not torch.equal(one.clip.state_dict()[key], other.clip.state_dict()[key])


def test_batch_normalisation_keeps_its_statistics_and_learns_its_gains():
    torch.manual_seed(0)
    vision = {"image_size": 16, "library": "timm", "architecture": "test_resnet", "classes": 3}
    config = {"embed_dim": 1, "layout": "classifier", "vision_cfg": vision, "text_cfg": {}}
    network = build_classifier(config).eval()
    network.settle(16)
    config["embed_dim"] = network.rows().shape[1]
    model = OpenClipModel(network, model_config=config, name="small")
    trained = train_on_prompts(
        model, coloured(), ["{c}"], TrainConfig(epochs=1, learning_rate=1e-3, batch_size=10)
    )
    before, after = model.visual.state_dict(), trained.visual.state_dict()
    statistics = [name for name in before if "running_" in name]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    gains = [name.replace("running_mean", "weight") for name in statistics if "mean" in name]
    assert all(not torch.equal(before[name], after[name]) for name in gains)
    assert not any(module.training for module in trained.clip.modules())


def test_optimize_finds_the_minimum_of_a_parabola_and_lets_go_of_the_parameters():
    parameter = torch.nn.Parameter(torch.tensor([3.0]), requires_grad=False)
    optimize(
        [parameter],
        lambda batch: (parameter - batch).square().sum(),
        (torch.ones(1) for _ in range(400)),
        steps=400,
        learning_rate=0.1,
        description="parabola",
    )
    assert float(parameter) == pytest.approx(1.0, abs=1e-2)
    assert not parameter.requires_grad
    assert parameter.grad is None


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="labels"):
        train_on_prompts(mini_model(), mini_images(labels=False), TEMPLATES, TrainConfig(1, 1e-3))
    with pytest.raises(UsageError, match="above 0"):
        TrainConfig(epochs=0, learning_rate=1e-3)


def _fit(most: int, *, separable: bool = True) -> tuple[torch.Tensor, list[int]]:
    """Train a linear map on a device that holds `most` items; return it and the parts' sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, dtype=torch.float64, generator=generator)
    y = torch.randn(24, 2, dtype=torch.float64, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(5, 2, dtype=torch.float64))
    sizes = []

    def loss(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(batch.shape[-1])
        if batch.shape[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return (x[batch[0]] @ weight - y[batch[0]]).square().mean()

    batches = (torch.stack([b, b]) for b in torch.split(torch.arange(24), 10))
    optimize(
        [weight],
        loss,
        batches,
        steps=3,
        learning_rate=0.1,
        separable=separable,
        description="fitting",
    )
    return weight.detach(), sizes


def test_a_batch_that_does_not_fit_is_split_and_the_gradient_is_the_same() -> None:
    expected, _ = _fit(99)
    found, sizes = _fit(3)
    assert sizes == [10, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_training_that_does_not_fit_ends_with_one_clear_line() -> None:
    with pytest.raises(DeviceMemoryError, match="fitting: out of memory on cpu even with one"):
        _fit(0)
    with pytest.raises(DeviceMemoryError, match="with a batch of 10, which cannot be split"):
        _fit(3, separable=False)
