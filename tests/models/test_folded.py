"""Convolutional towers in a search: equal to their module, with its gradient, and lighter."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
import torchvision
from open_clip.modified_resnet import ModifiedResNet
from torch import nn

from pydetox.errors import UsageError
from pydetox.inversion.tower import tower_of
from pydetox.models.folded import FoldedTower, fold_normalisations
from pydetox.models.frozen import freeze
from tests.mini import mini_model


def settled(tower: nn.Module, seed: int = 0) -> nn.Module:
    """Give a tower weights, means and variances that are none of a beginning's."""
    generator = torch.Generator().manual_seed(seed)
    for module in tower.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                value.data.uniform_(low, high, generator=generator)
    return tower.eval().requires_grad_(False)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return settled(ModifiedResNet([1, 1, 1, 1], 24, heads=8, image_size=64, width=16))


def of_timm(name: str) -> nn.Module:
    torch.manual_seed(0)
    return settled(timm.create_model(name, num_classes=0))


TOWERS = {
    "RN50": (resnet, 64, 19),
    "timm resnet": (lambda: of_timm("test_resnet"), 64, None),
    "efficientnet": (lambda: of_timm("test_efficientnet"), 64, None),
    "torchvision": (lambda: settled(torchvision.models.resnet18(num_classes=8)), 64, 20),
    "no normalisation": (lambda: of_timm("test_convnext"), 64, 0),
}


def pulled(tower, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    images = images.clone().requires_grad_()
    found = tower(images)
    (gradient,) = torch.autograd.grad(found.square().sum(), images)
    return found.detach(), gradient


@pytest.mark.parametrize("name", TOWERS)
def test_a_folded_tower_equals_its_module_with_its_gradient(name: str) -> None:
    make, size, count = TOWERS[name]
    tower = make()
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    folded = FoldedTower(tower, size, torch.float32, "why")
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    theirs, ours = pulled(tower, images), pulled(folded, images)
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-4
    normalisations = sum(isinstance(m, nn.BatchNorm2d) for m in tower.modules())
    assert count in (None, normalisations)
    text = f"{normalisations} normalisations folded, " if normalisations else ""
    assert folded.description == f"its own module, float32, {text}channels last (why)"
    assert folded.patch_size is None
    assert all(torch.equal(value, before[key]) for key, value in tower.state_dict().items())


def test_nothing_is_folded_where_the_result_would_differ() -> None:
    class Twice(nn.Module):
        """The same convolution before a normalisation and, by itself, beside it."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.second = nn.Conv2d(4, 4, 1)

        def forward(self, images):
            made = self.first(images)
            return (self.second(self.norm(made)) + made.relu()).mean((2, 3))

    tower = settled(Twice())
    images = torch.randn(2, 3, 16, 16)
    assert fold_normalisations(tower, images) == (tower, 0)

    class Shared(nn.Module):
        """One convolution that two normalisations follow in turn."""

        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Conv2d(3, 3, 3)
            self.one, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, images):
            return self.other(self.same(self.one(self.same(images)))).mean((2, 3))

    tower = settled(Shared())
    assert fold_normalisations(tower, images) == (tower, 0)
    untracked = settled_without_statistics()
    assert fold_normalisations(untracked, images) == (untracked, 0)


def settled_without_statistics() -> nn.Module:
    tower = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()
    )
    return tower.eval()


def test_bfloat16_is_for_convolutions_in_a_search() -> None:
    tower = resnet()
    half = freeze(tower, "bfloat16", image_size=64)
    assert "bfloat16, 19 normalisations folded, channels last" in half.description
    images = torch.randn(2, 3, 64, 64)
    cosine = torch.cosine_similarity(half(images.bfloat16()), tower(images))
    assert float(cosine.min()) > 0.99
    assert next(tower.parameters()).dtype == torch.float32
    with pytest.raises(UsageError, match="expected precision float32"):
        freeze(tower, "bfloat16")
    eva = timm.create_model("test_vit", num_classes=0).eval()
    with pytest.raises(UsageError, match="expected precision float32"):
        freeze(eva, "bfloat16", image_size=160)


def test_the_memory_of_an_image_is_counted() -> None:
    class Square(nn.Module):
        def forward(self, images):
            return (images * images).flatten(1)  # keeps its input, 3 x 8 x 8 floats

    tower = FoldedTower(Square(), 8, torch.float32, "why")
    assert tower.bytes_per_image == 3 * 3 * 64 * 4
    small, large = (FoldedTower(resnet_of(size), size, torch.float32, "why") for size in (32, 64))
    assert 3 < large.bytes_per_image / small.bytes_per_image < 5


def resnet_of(size: int) -> nn.Module:
    return settled(ModifiedResNet([1, 1, 1, 1], 24, heads=8, image_size=size, width=16))


def test_a_search_runs_on_the_folded_tower() -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 8, "vocab_size": 60, "width": 16, "heads": 1, "layers": 1},
    }
    from pydetox.models import OpenClipModel

    model = OpenClipModel.from_config(config, seed=0)
    assert isinstance(model.visual, open_clip.modified_resnet.ModifiedResNet)
    found = tower_of(model, None, "auto")
    assert "normalisations folded" in found.description
    assert isinstance(tower_of(mini_model(), None, "auto"), type(freeze(mini_model().visual)))
