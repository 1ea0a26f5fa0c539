"""Classifiers of timm, torchvision and BackdoorBench: the last layer is the head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, linear, relu

import pydetox
from pydetox.checkpoints import Provenance, load_checkpoint, save_checkpoint
from pydetox.checkpoints.classifier_names import classifier_config
from pydetox.checkpoints.preprocessing import describe
from pydetox.data import ImageSet, Resizing, load_images
from pydetox.detect.configuration import ScanConfig
from pydetox.errors import ArchitectureError, DataError, UsageError
from pydetox.evaluation import predict
from pydetox.inversion import InversionConfig
from pydetox.models import OpenClipModel
from pydetox.models.classifiers import PreActResNet, build_classifier, last_layer
from pydetox.repair.configuration import UnlearnConfig
from tests.mini import MINI_CONFIG, mini_model
from tests.proportional import relative_error

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
    assert relative_error(ours, theirs) < 1e-4
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
    assert relative_error(ours, theirs) < 1e-4


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


@pytest.mark.parametrize(
    "name",
    [
        "timm:deit_tiny_distilled_patch16_224@32",
        "timm:levit_128s",
        "timm:crossvit_tiny_240",
        "timm:repvit_m0_9",
        "timm:efficientformer_l1",
        "timm:pit_ti_distilled_224",
        "timm:volo_d1_224",
        "torchvision:squeezenet1_1",
    ],
)
def test_answers_that_no_single_layer_gives_are_refused_in_one_line(files, name):
    some = files / "timm-test_resnet@32.pt"
    with pytest.raises(ArchitectureError, match="answers are not those of one linear") as caught:
        OpenClipModel.from_checkpoint(load_checkpoint(some, model=name))
    line = str(caught.value)
    assert line.startswith(f"{some}: {name.partition('@')[0]} cannot be read by its name")
    assert "pydetox.from_encoder" in line
    assert "\n" not in line


def test_a_size_that_a_classifier_does_not_take(files):
    some = files / "timm-test_resnet@32.pt"
    with pytest.raises(ArchitectureError, match="does not take images of 32 pixels") as caught:
        OpenClipModel.from_checkpoint(load_checkpoint(some, model="torchvision:inception_v3@32"))
    assert str(caught.value).startswith(str(some))
    with pytest.raises(UsageError, match="1024x768 pixels and 3 channels; expected square"):
        load_checkpoint(some, model="timm:vit_base_patch16_sapiens2")
    with pytest.raises(UsageError, match="torchvision has no model 'fasterrcnn_resnet50_fpn'"):
        load_checkpoint(some, model="torchvision:fasterrcnn_resnet50_fpn")


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("timm:mobilenetv3_small_050@32", "classifier"),  # a subclass of nn.Linear
        ("timm:ghostnet_050@32", "classifier"),
        ("timm:lcnet_050@32", "classifier"),
        ("timm:dla46_c@32", "fc"),  # a convolution of one pixel
        ("timm:resnetv2_18@32", "head.fc"),
        ("torchvision:regnet_y_400mf@32", "fc"),
    ],
)
def test_the_head_is_the_layer_that_gives_the_answers(tmp_path, name, last):
    library, _, rest = name.partition(":")
    known = {"timm": timm.create_model, "torchvision": torchvision.models.get_model}
    torch.manual_seed(0)
    network = shaken(known[library](rest.partition("@")[0], num_classes=5))
    torch.save(network.state_dict(), tmp_path / "some.pt")
    model = OpenClipModel.from_checkpoint(load_checkpoint(tmp_path / "some.pt", model=name))
    assert model.clip.last == last
    pixels = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = network(model.normalize(pixels))
        ours = model.encode_pixels(pixels) @ model.zero_shot_head(NAMES, ["{c}"]).T
    assert relative_error(ours, theirs) < 1e-4
    back = model.storage_state_dict()
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in network.state_dict().items())


class Pooled(nn.Module):
    """A network whose last layer gives one answer a place, of which the mean is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).flatten(2).transpose(1, 2)).mean(dim=1)


class Ahead(Pooled):
    """A network whose head is registered before a layer that it does not use."""

    def forward(self, x: Tensor) -> Tensor:
        return self.unused(self.body(x).mean(dim=(2, 3)))


class Softmax(Ahead):
    """A network that gives probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(dim=1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_last_layer_is_found_by_what_it_gives(device):
    images = torch.rand((2, 3, 8, 8), device=device)
    assert last_layer(Ahead().to(device), images) == "unused"
    for kind in (Pooled, Softmax):
        with pytest.raises(ArchitectureError, match="end in 'unused', 'fc'"):
            last_layer(kind().to(device), images)
    pixel = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Conv2d(4, 5, 1), nn.Flatten()).to(device)
    assert last_layer(pixel, images) == "1"
    wide = nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten()).to(device)
    with pytest.raises(ArchitectureError, match="it has none"):
        last_layer(wide, images)


def photographs() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = ((320, 240), (240, 321), (133, 200), (33, 34))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.mark.parametrize("size", [None, 32, 97])
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",  # bicubic, 0.95
        "vit_tiny_patch16_224",  # another mean
        "vit_tiny_patch16_384",  # another size, all of the image
        "tf_efficientnet_lite0",
        "dm_nfnet_f0",  # squashed, then cut
        "tiny_vit_21m_512",  # squashed
        "deepseek_vit_412m",  # padded
        "dla34",  # bilinear
        "swin_tiny_patch4_window7_224",
    ],
)
def test_pixels_are_those_of_timms_transform(name, size):
    text = f"timm:{name}" + ("" if size is None else f"@{size}")
    config, prepared = classifier_config(text)
    model = describe(prepared)
    given = {} if size is None else {"input_size": (3, size, size)}
    told = timm.data.resolve_data_config(given, timm.get_pretrained_cfg(name).to_dict())
    theirs = timm.data.create_transform(**told, is_training=False, normalize=False)
    assert config["vision_cfg"]["image_size"] == told["input_size"][1]
    assert (tuple(model["mean"]), tuple(model["std"])) == (told["mean"], told["std"])
    ours = resizing_of(config, prepared)
    for photograph in photographs():
        expected = theirs(photograph).permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(ours(photograph, "it")), expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit_l_16", "efficientnet_b3", "swin_t"])
def test_pixels_are_those_of_torchvisions_weights(name):
    config, prepared = classifier_config(f"torchvision:{name}")
    theirs = torchvision.models.get_model_weights(name)["DEFAULT"].transforms()
    ours = resizing_of(config, prepared)
    mean, std = (torch.tensor(prepared[key]).view(3, 1, 1) for key in ("mean", "std"))
    for photograph in photographs():
        pixels = torch.from_numpy(np.array(ours(photograph, "it"))).permute(2, 0, 1)
        torch.testing.assert_close((pixels / 255 - mean) / std, theirs(photograph))
    config, prepared = classifier_config(f"torchvision:{name}@64")
    assert resizing_of(config, prepared)(photographs()[0], "it").size == (64, 64)
    assert "resize_size" not in prepared


def resizing_of(config: dict, prepared: dict) -> Resizing:
    told = describe(prepared)
    return Resizing(
        config["vision_cfg"]["image_size"],
        told["interpolation"],
        told["resize_mode"],
        told["fill_color"],
        resize_size=told.get("resize_size"),
    )


def test_a_warning_lists_the_values_that_are_a_guess(files):
    path = files / "timm-test_resnet@32.pt"
    read = load_checkpoint(path, model="timm:test_resnet@32")
    told = timm.get_pretrained_cfg("test_resnet")
    (line,) = read.warnings
    assert "timm's way for its own weights" in line
    mean, std = (",".join(f"{x:.4g}" for x in values) for values in (told.mean, told.std))
    scaled = int(32 / told.crop_pct)
    assert (
        f": mean {mean}, std {std}, interpolation {told.interpolation}, resize_mode shortest "
        f"(scaled to {scaled} before the crop) are a guess; image_mean=" in line
    )
    model = OpenClipModel.from_checkpoint(read)
    assert model.resizing.resize_size == model.preprocessing["resize_size"] == scaled
    given = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    half = load_checkpoint(path, model="timm:test_resnet@32", preprocess=given)
    assert f": interpolation {told.interpolation} are a guess" in half.warnings[0]
    assert "resize_size" not in half.preprocess_config
    every = given | {"interpolation": "bilinear"}
    assert load_checkpoint(path, model="timm:test_resnet@32", preprocess=every).warnings == ()


def test_a_saved_classifier_keeps_the_cut(files, tmp_path):
    path = files / "timm-test_resnet@32.pt"
    model = OpenClipModel.from_checkpoint(load_checkpoint(path, model="timm:test_resnet@32"))
    save_checkpoint(
        tmp_path / "saved",
        model.storage_state_dict(),
        model_config=model.model_config,
        preprocess_config=model.preprocess_config,
        provenance=Provenance(method="test"),
    )
    again = OpenClipModel.from_checkpoint(load_checkpoint(tmp_path / "saved"))
    assert again.resizing == model.resizing
    assert again.warnings == ()
    config = tmp_path / "saved" / "open_clip_config.json"
    config.write_text(config.read_text().replace('"resize_size": 33', '"resize_size": 0'))
    with pytest.raises(ArchitectureError, match="resize_size = '0', expected a number of pixels"):
        load_checkpoint(tmp_path / "saved")


def test_open_clips_models_have_no_cut(tmp_path):
    """open_clip passes over what it does not know in a preprocess_cfg."""
    model = mini_model()
    save_checkpoint(
        tmp_path / "clip",
        model.storage_state_dict(),
        model_config=MINI_CONFIG,
        preprocess_config={"mean": [0.5] * 3, "std": [0.5] * 3, "resize_size": 20},
        provenance=Provenance(method="test"),
    )
    read = OpenClipModel.from_checkpoint(load_checkpoint(tmp_path / "clip"))
    assert read.mean == (0.5,) * 3
    assert read.resizing == model.resizing


def test_pictures_of_the_models_size_are_not_cut():
    config, prepared = classifier_config("timm:resnet18@32")
    ours = resizing_of(config, prepared)
    assert ours.resize_size == 33
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(ours(Image.fromarray(pixels), "it")), pixels)


def test_arrays_and_pictures_of_the_models_size_are_the_same(files):
    path = files / "timm-test_resnet@32.pt"
    resizing = OpenClipModel.from_checkpoint(
        load_checkpoint(path, model="timm:test_resnet@32")
    ).resizing
    ready = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = load_images(ready, resizing=resizing).images
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), ready)
    pictures = [Image.fromarray(one) for one in ready]
    assert torch.equal(load_images(pictures, resizing=resizing).images, found)


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
