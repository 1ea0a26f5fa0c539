"""Models that a program already holds: open_clip's, other encoders, and other towers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import set_model_preprocess_cfg
from PIL import Image
from torch import Tensor, nn

import pydetox
from pydetox import ScanConfig, copy_weights, evaluate, from_encoder
from pydetox.data import DEFAULT_TEMPLATES, ImageSet
from pydetox.detect.key import require_alike
from pydetox.detect.statistics import Verdict
from pydetox.errors import ArchitectureError, DataError, OutputError, UsageError
from pydetox.evaluation import predict
from pydetox.inversion import InversionConfig
from pydetox.repair.configuration import UnlearnConfig
from pydetox.session import Session, as_model
from tests.mini import CLASS_NAMES, MINI_CONFIG, mini_images, mini_model

FAST = ScanConfig(inversion=InversionConfig(steps=3, batch_size=4))


def module(**changes: Any) -> open_clip.CLIP:
    torch.manual_seed(3)
    return open_clip.CLIP(**copy.deepcopy(MINI_CONFIG), **changes)


class Net(nn.Module):
    """A small classifier whose last layer has a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 4, stride=4)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)
        nn.init.normal_(self.fc.weight, std=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean(dim=(2, 3)))


def test_a_model_of_open_clip_is_copied_with_what_it_says_of_itself(tmp_path) -> None:
    given = module(quick_gelu=True).train().half().float()
    prepared = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "resize_mode": "squash"}
    set_model_preprocess_cfg(given, {"size": 16, "mode": "RGB", "fill_color": 0, **prepared})
    before = copy.deepcopy(given.state_dict())
    model = as_model(given)
    assert given.training
    assert next(given.parameters()).requires_grad
    assert all(torch.equal(before[key], value) for key, value in given.state_dict().items())
    assert model.mean == (0.5, 0.5, 0.5)
    assert model.resizing.resize_mode == "squash"
    assert model.model_config["quick_gelu"] is True
    pixels = torch.rand(2, 3, 16, 16)
    given.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_normalized(pixels), given.encode_image(pixels), atol=1e-5, rtol=0
        )
    assert as_model(torch.compile(given)).sha256 == model.sha256
    assert as_model(nn.DataParallel(given)).sha256 == model.sha256
    given.visual.proj.data[0, 0] += 1
    assert as_model(given).sha256 != model.sha256


def test_a_configuration_that_is_not_known_is_asked_for_when_it_is_needed(tmp_path) -> None:
    given = module()
    given.visual.transformer.resblocks[0].mlp.gelu = nn.ReLU()  # no configuration says so
    model = as_model(given)
    assert model.layout_obstacle is not None
    pixels = torch.rand(2, 3, 16, 16)
    given.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_normalized(pixels), given.encode_image(pixels), atol=1e-5, rtol=0
        )
    with pytest.raises(OutputError, match="architecture="):
        pydetox.detox(given, mini_images(), output=tmp_path / "out", config=FAST)
    with pytest.raises(ArchitectureError, match="ViT-B-32"):
        as_model(given, architecture="ViT-B-32")


def test_a_scan_and_a_repair_take_objects_and_give_objects_back(tmp_path) -> None:
    given = mini_model().clip
    images = mini_images()
    data = (images.images.permute(0, 2, 3, 1).numpy(), images.labels)
    found = pydetox.scan(given, data, class_names=CLASS_NAMES, config=FAST)
    same = pydetox.scan(mini_model(), images, config=FAST)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.detection.p_l1 == same.detection.p_l1
    assert found.sha256 is not None
    unlearning = UnlearnConfig(
        steps=2, warps=0, waves=0, passes=1, max_drift=2.0, min_accuracy_kept=0.0
    )
    corner = lambda x: x.clone().index_fill_(2, torch.tensor([0]), 255)  # noqa: E731
    result = pydetox.detox(
        given,
        data,
        class_names=CLASS_NAMES,
        config=FAST,
        unlearning=unlearning,
        target="dog",
        triggers=[corner],
        output=tmp_path / "out",
    )
    target = module()
    copy_weights(result.model, target)
    for key, value in result.model.clip.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)
    if result.path is not None:
        again = as_model(result.path)
        assert all(
            torch.equal(value, again.clip.state_dict()[key])
            for key, value in result.model.clip.state_dict().items()
        )
    with pytest.raises(ArchitectureError, match="do not fit a Net"):
        copy_weights(result.model, Net())


def test_an_object_is_compared_with_a_base_of_its_architecture_that_a_file_names(tmp_path) -> None:
    # The file leaves defaults of the configuration out, which an object shows.
    base, given = mini_model(), as_model(mini_model(1).clip)
    assert base.model_config != given.model_config
    require_alike("base", (base.model_config, None), "object", (given.model_config, None))
    other = {**base.model_config, "quick_gelu": True}
    with pytest.raises(UsageError, match="quick_gelu is true there and false here"):
        require_alike("base", (other, None), "object", (given.model_config, None))


def test_the_last_layer_of_a_classifier_is_its_head() -> None:
    net = Net().eval()
    plain = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 16}
    images = mini_images(60)
    pixels = (images.images.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        scores = net(pixels)
    for head in ("fc", net.fc):
        model = from_encoder(net, head=head, **plain)
        rows = model.zero_shot_head(CLASS_NAMES, DEFAULT_TEMPLATES)
        with torch.no_grad():
            ours = model.encode_pixels(images.images.float() / 255) @ rows.T
        torch.testing.assert_close(ours, scores, atol=1e-5, rtol=1e-5)
        assert torch.equal(predict(model, images.images, rows), scores.argmax(dim=1))
        norm = model.encode_pixels(images.images.float() / 255).norm(dim=1).mean()
        assert 0.5 < model.logit_scale / float(norm) < 2
    named = from_encoder(net, head="fc", class_names=("owl", "cat", "dog"), **plain)
    head = named.zero_shot_head(CLASS_NAMES, DEFAULT_TEMPLATES)
    assert torch.equal(head, rows[[1, 2, 0]])
    with pytest.raises(DataError, match="2 class names, but its head has 3 classes"):
        named.zero_shot_head(("a", "b"), DEFAULT_TEMPLATES)
    found = pydetox.scan(named, images.images, config=FAST)
    assert found.class_names == ("owl", "cat", "dog")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": 0.5}, "mean is 0.5; expected three finite numbers, one a channel"),
        ({"mean": (0.5, 0.5)}, r"mean is \(0.5, 0.5\)"),
        ({"mean": (0.5, 0.5, math.nan)}, "mean is"),
        ({"std": (0, 0.2, 0.2)}, r"std is \(0, 0.2, 0.2\); expected three finite .* above 0"),
        ({"std": "abc"}, "std is 'abc'"),
        ({"image_size": (16, 16)}, r"image_size is \(16, 16\); expected a whole number"),
        ({"image_size": 16.0}, "image_size is 16.0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"logit_scale": 0}, "logit_scale is 0; expected a finite number above 0"),
        ({"logit_scale": math.nan}, "logit_scale is nan"),
        ({"encoder": "resnet18"}, "the encoder is a str; expected a module"),
    ],
)
def test_what_images_cannot_be_prepared_with(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_encoder(**({"encoder": Net(), "head": "fc", "image_size": 16} | change))


def test_an_encoder_that_does_not_take_such_images() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 8))
    with pytest.raises(ArchitectureError, match=r"does not take images \[N, 3, 32, 32\]: mat1"):
        from_encoder(flat, image_size=32)


def test_an_encoder_with_a_cut() -> None:
    model = from_encoder(Net(), head="fc", image_size=16, resize_size=20)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    cut = picture.resize((25, 20), Image.Resampling.BICUBIC).crop((4, 2, 20, 18))
    assert np.array_equal(np.asarray(model.resizing(picture, "it")), np.asarray(cut))
    assert from_encoder(Net(), head="fc", image_size=16).resizing.resize_size is None
    with pytest.raises(DataError, match="resize_size is 0"):
        from_encoder(Net(), head="fc", image_size=16, resize_size=0)


def test_a_head_that_does_not_fit_is_counted_without_the_bias() -> None:
    with pytest.raises(ArchitectureError, match=r"gives 3 features an image, .* its head have 8;"):
        from_encoder(Net(), head=nn.Linear(8, 3), image_size=16)
    with pytest.raises(ArchitectureError, match=r"gives 3 features an image, .* its head have 8;"):
        from_encoder(Net(), head=torch.ones(3, 8), image_size=16)


def test_a_classifier_is_scanned_repaired_and_gets_its_weights_back() -> None:
    net = Net().eval()
    model = from_encoder(net, head="fc", image_size=16, class_names=CLASS_NAMES)
    images = mini_images()
    answers = predict(model, images.images, model.zero_shot_head(CLASS_NAMES, ()))
    result = pydetox.detox(
        model,
        images,
        config=FAST,
        target=int(answers.bincount(minlength=3).argmin()),
        triggers=[lambda x: x.clone().index_fill_(2, torch.tensor([0, 1]), 255)],
        unlearning=UnlearnConfig(
            steps=8,
            warps=0,
            waves=0,
            passes=1,
            max_drift=2.0,
            min_accuracy_kept=0.0,
            learning_rate=0.01,
        ),
    )
    before = copy.deepcopy(net.state_dict())
    copy_weights(result.model, net)
    names = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(name.startswith("fc") for name in names)
    assert evaluate(result.model, images).n_clean == len(images)
    with pytest.raises(OutputError, match="copy_weights"):
        pydetox.detox(model, images, config=FAST, output="never")


def test_encoders_without_classes_can_be_scanned_label_free() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 8))  # it has a length, as lists do
    model = from_encoder(encoder, image_size=16)
    found = pydetox.scan(
        model, mini_images(), config=ScanConfig("label-free", inversion=FAST.inversion)
    )
    assert len(found.detection.p_l1) == 1
    with pytest.raises(ArchitectureError, match="neither a head nor a text tower"):
        pydetox.scan(model, mini_images(), config=FAST)


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        ("fcc", UsageError, r"no such layer; its last linear layers are 'fc'"),
        ("conv", UsageError, "head is a Conv2d"),
        (torch.ones(3), UsageError, r"expected \[C, D\]"),
        (torch.ones(3, 5), ArchitectureError, "gives 3 features an image, and the rows .* 5"),
    ],
)
def test_heads_that_are_none(head: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_encoder(Net(), head=head, image_size=16)


class OtherTowers:
    """What docs/how-to/python-objects.md shows: a pair of towers that pydetox does not know."""

    image_size = 16

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.tower = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 5))
        self.words = {name: torch.randn(5) for name in CLASS_NAMES}

    def image_tower(self) -> nn.Module:
        return self.tower

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack(
            [next(v for name, v in self.words.items() if name in p) for p in prompts]
        )

    def logit_scale(self) -> float:
        return 20.0


def test_any_pair_of_towers_with_the_protocol() -> None:
    towers = OtherTowers()
    assert isinstance(towers, pydetox.VisionLanguageModel)
    session = Session.open(towers, np.zeros((4, 20, 20, 3), np.uint8), class_names=CLASS_NAMES)
    units = torch.stack([v / v.norm() for v in towers.words.values()])
    torch.testing.assert_close(session.head, units)
    assert session.model.logit_scale == pytest.approx(20)
    pixels = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(session.model.encode_pixels(pixels), towers.tower(pixels))
    found = pydetox.scan(towers, mini_images(), config=FAST)
    assert len(found.detection.p_l1) == 3


def test_what_is_no_model_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"from_encoder\(module, image_size=\.\.\., head="):
        as_model(Net())
    with pytest.raises(UsageError, match="a dict is no model"):
        as_model({"state_dict": {}})  # type: ignore[arg-type]


def test_accuracy_of_objects_and_its_errors() -> None:
    given, images = mini_model().clip, mini_images()
    own = mini_model().zero_shot_head(CLASS_NAMES, DEFAULT_TEMPLATES)
    assert evaluate(given, images) == evaluate(mini_model(), images, own)
    assert evaluate(given, images, target="dog", trigger=lambda x: x).target == 1
    with pytest.raises(DataError, match="no labels"):
        evaluate(given, ImageSet(images.images, None, CLASS_NAMES))
    with pytest.raises(UsageError, match="go together"):
        evaluate(given, images, trigger=lambda x: x)
