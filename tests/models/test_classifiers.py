"""Classifiers of timm, torchvision and BackdoorBench: the last layer is the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, linear, relu

import pydetox
from pydetox.checkpoints import load_checkpoint
from pydetox.checkpoints.classifier_names import classifier_config
from pydetox.data import ImageSet
from pydetox.detect.configuration import ScanConfig
from pydetox.errors import ArchitectureError, DataError, UsageError
from pydetox.evaluation import predict
from pydetox.inversion import InversionConfig
from pydetox.models import OpenClipModel
from pydetox.models.classifiers import PreActResNet, build_classifier
from pydetox.repair.configuration import UnlearnConfig

NAMES = tuple("abcde")


def shaken(network: nn.Module) -> nn.Module:
    """The network with statistics and biases that are not those of a beginning."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.add_(noise * 0.1 if "var" in name else (noise - 0.5) * 0.1)
    return network.eval()


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "timm:test_vit@160": timm.create_model("test_vit", num_classes=5),
        "timm:test_resnet@32": timm.create_model("test_resnet", num_classes=5),
        "timm:test_convnext@64": timm.create_model("test_convnext", num_classes=5),
        "torchvision:shufflenet_v2_x0_5@32": torchvision.models.shufflenet_v2_x0_5(num_classes=5),
        "torchvision:mobilenet_v3_small@32": torchvision.models.mobilenet_v3_small(num_classes=5),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classifiers")
    for name, network in networks().items():
        torch.save(shaken(network).state_dict(), folder / f"{name.replace(':', '-')}.pt")
    return folder


@pytest.mark.parametrize("name", networks())
def test_a_classifier_gives_its_own_classes(files, name):
    network = networks()[name]
    path = files / f"{name.replace(':', '-')}.pt"
    network.load_state_dict(torch.load(path, weights_only=True))
    network.eval()
    checkpoint = load_checkpoint(path, model=name)
    assert any("a guess" in line for line in checkpoint.warnings)
    model = OpenClipModel.from_checkpoint(checkpoint)
    assert not model.has_texts
    size = model.image_size
    images = torch.randint(0, 256, (6, 3, size, size), generator=torch.Generator().manual_seed(1))
    images = images.to(torch.uint8)
    head = model.zero_shot_head(NAMES, ["{c}"])
    with torch.no_grad():
        theirs = network(model.normalize(images.float() / 255))
        ours = model.encode_pixels(images.float() / 255) @ head.T
    ratio = theirs / ours
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-3, atol=0)
    assert torch.equal(predict(model, images, head), theirs.argmax(dim=1))
    back = model.storage_state_dict()
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in network.state_dict().items())
    with pytest.raises(DataError, match="a classifier of 5 classes, and there are 2"):
        model.zero_shot_head(NAMES[:2], ["{c}"])


def preact_logits(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """A pre-activation ResNet-18, written out as functions."""

    def norm(x: Tensor, name: str) -> Tensor:
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var"))
        return relu(batch_norm(x, *parts, state[f"{name}.weight"], state[f"{name}.bias"]))

    x = conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = norm(x, f"{name}.bn1")
            if f"{name}.shortcut.0.weight" in state:
                x = conv2d(out, state[f"{name}.shortcut.0.weight"], stride=stride)
            out = conv2d(out, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = conv2d(norm(out, f"{name}.bn2"), state[f"{name}.conv2.weight"], padding=1)
            x = x + out
    return linear(x.mean(dim=(2, 3)), state["linear.weight"], state["linear.bias"])


def test_backdoorbenchs_attack_result(tmp_path):
    torch.manual_seed(0)
    state = shaken(PreActResNet("18", 5)).state_dict()
    result = {
        "model_name": "preactresnet18",
        "num_classes": 5,
        "model": state,
        "data_path": "../data",
        "img_size": (32, 32, 3),
        "clean_data": "cifar10",
        "bd_train": None,
        "bd_test": {"bd_data_container": {"save_folder_path": "x"}, "getitem_all": True},
    }
    torch.save(result, tmp_path / "attack_result.pt")
    model = OpenClipModel.from_checkpoint(
        load_checkpoint(tmp_path / "attack_result.pt", model="backdoorbench:preactresnet18")
    )
    assert model.image_size == 32
    assert model.mean == (0.4914, 0.4822, 0.4465)
    pixels = torch.rand((3, 3, 32, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = preact_logits(state, model.normalize(pixels))
        ours = model.encode_pixels(pixels) @ model.zero_shot_head(NAMES, ["{c}"]).T
    ratio = theirs / ours
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-3, atol=0)


def test_a_classifier_is_scanned_and_repaired_without_texts(files, tmp_path):
    name = "timm:test_resnet@32"
    read = load_checkpoint(files / f"{name.replace(':', '-')}.pt", model=name)
    model = OpenClipModel.from_checkpoint(read)
    images = torch.randint(0, 256, (24, 3, 32, 32), generator=torch.Generator().manual_seed(3))
    sets = ImageSet(images.to(torch.uint8), torch.arange(24) % 5, NAMES, "noise")
    config = ScanConfig(families=("patch",), inversion=InversionConfig(steps=2, batch_size=4))
    found = pydetox.scan(model, sets, config=config)
    assert len(found.detection.p_l1) == 5
    start = {k: v.clone() for k, v in model.storage_state_dict().items()}
    unlearning = UnlearnConfig(passes=1, steps=2, warps=0, waves=0)
    result = pydetox.detox(
        model,
        sets,
        target=0,
        triggers=[lambda x: x // 2],
        config=config,
        unlearning=unlearning,
        output=tmp_path / "repaired",
    )
    if result.path is not None:
        again = OpenClipModel.from_checkpoint(load_checkpoint(tmp_path / "repaired"))
        assert again.storage_state_dict().keys() == start.keys()
    assert result.evaluation_before is not None


def test_names_without_a_meaning(files):
    some = files / "timm-test_resnet@32.pt"
    for name, words in (
        ("timm:nothing", "timm has no model 'nothing'"),
        ("torchvision:nothing", "torchvision has no model"),
        ("backdoorbench:nothing", "backdoorbench has no model"),
        ("backdoorbench:vgg16:mars", "no data set 'mars' of BackdoorBench"),
        ("timm:test_resnet@x", "expected LIBRARY:NAME or LIBRARY:NAME@SIZE"),
    ):
        with pytest.raises(UsageError, match=words):
            load_checkpoint(some, model=name)
    with pytest.raises(ArchitectureError, match="no last layer 'head'"):
        OpenClipModel.from_checkpoint(load_checkpoint(some, model="timm:test_vit"))
    with pytest.raises(ArchitectureError, match="no linear layer"):
        OpenClipModel.from_checkpoint(load_checkpoint(some, model="torchvision:squeezenet1_0"))


@pytest.mark.parametrize("name", ["vgg16", "vgg19_bn", "vit_b_16", "convnext_tiny", "resnet18"])
def test_backdoorbenchs_names(name):
    """BackdoorBench's modules, as its generate_cls_model writes them, on no memory."""
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None, num_classes=5)
        if name == "vit_b_16":
            theirs = nn.Sequential(torchvision.transforms.Resize((224, 224)), theirs)
        config, _ = classifier_config(f"backdoorbench:{name}")
        config = {**config, "vision_cfg": {**config["vision_cfg"], "classes": 5}}
        ours = build_classifier(config)
    names = ours.to_file(ours.state_dict())
    expected = theirs.state_dict()
    assert names.keys() == expected.keys()
    assert all(names[k].shape == v.shape for k, v in expected.items())


def test_backdoorbenchs_vit_enlarges_its_images(tmp_path, monkeypatch):
    def small(name: str, **given: object) -> nn.Module:
        assert name == "vit_b_16"
        return torchvision.models.VisionTransformer(224, 56, 1, 2, 32, 48, num_classes=5)

    monkeypatch.setattr(torchvision.models, "get_model", small)
    torch.manual_seed(0)
    theirs = nn.Sequential(torchvision.transforms.Resize((224, 224)), small("vit_b_16"))
    shaken(theirs)
    torch.save(
        {"model_name": "vit_b_16", "clean_data": "cifar10", "model": theirs.state_dict()},
        tmp_path / "attack_result.pt",
    )
    model = OpenClipModel.from_checkpoint(load_checkpoint(tmp_path / "attack_result.pt"))
    pixels = torch.rand((3, 3, 32, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(model.normalize(pixels))
        ours = model.encode_pixels(pixels) @ model.zero_shot_head(NAMES, ["{c}"]).T
    ratio = expected / ours
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-3, atol=0)
