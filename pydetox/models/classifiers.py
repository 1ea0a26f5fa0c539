"""Image classifiers, whose last layer is the head: models of timm, torchvision and BackdoorBench.

A classifier gives an image the logits W x + b of its features x. With the embedding [x, 1] and the
rows [w, b] they are inner products, as those of a zero-shot head are. Dividing by the norm of the
embedding, as searches do, changes no image's class; it makes the temperature that of typical images
(`Classifier.settle`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from ..errors import ArchitectureError

#: What building or running a network of a library raises for a size that it does not take.
_REFUSALS = (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
#: BackdoorBench gives these small images that they enlarge themselves.
_ENLARGED = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32")


class ClassifierTower(nn.Module):
    """A classifier without its last layer. trunk: Maps images to features [N, F]."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        """Return [x, 1], float32 [N, F + 1], of normalised images float [N, 3, H, W]."""
        features: Tensor = self.trunk(images)
        if features.ndim != 2:
            raise ArchitectureError(
                f"its features have the shape {list(features.shape)}; expected [N, F]"
            )
        return torch.cat([features, features.new_ones(len(features), 1)], dim=1)


class Classifier(nn.Module):
    """A classifier as an image tower and a head.

    network: Maps normalised images to logits [N, C]. last: The name of its last layer, which gives
    these logits and becomes the head (`last_layer`).
    """

    def __init__(self, network: nn.Module, last: str) -> None:
        super().__init__()
        self.last = last
        head = network.get_submodule(last)
        assert isinstance(head, nn.Linear | nn.Conv2d)
        network.set_submodule(last, nn.Identity())
        self.visual = ClassifierTower(network)
        self.head = head
        self.register_buffer("logit_scale", torch.zeros(()), persistent=False)

    def rows(self) -> Tensor:
        """Return the head, float32 [C, F + 1], divided by its largest row's norm."""
        rows = self._rows()
        scaled: Tensor = rows / self._largest(rows)
        return scaled

    def _rows(self) -> Tensor:
        weight, bias = self.head.weight.detach().flatten(1), self.head.bias
        column = weight.new_zeros(len(weight)) if bias is None else bias.detach()
        return torch.cat([weight, column[:, None]], dim=1)

    def settle(self, image_size: int) -> None:
        """Set `logit_scale` to what the network's own logits have on plain shades of grey."""
        ramp = torch.linspace(-1, 1, image_size)
        shades = [ramp[:, None] * a + ramp[None, :] * b for a in (-1, 0, 1) for b in (-1, 0, 1)]
        images = torch.stack(shades)[:, None].expand(-1, 3, -1, -1)
        rows = self._rows()
        with torch.no_grad():
            norm = self.visual(images.to(rows)).norm(dim=1).mean()
            scale = norm * self._largest(rows)
        self.logit_scale = scale.clamp(min=1.0).log().cpu().to(rows.device)

    def to_file(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights under the names that the network itself has."""
        return {self._name_in_file(name): value for name, value in state.items()}

    def from_file(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the network's own weights under the names of this module.

        A prefix that all names have, such as `module.`, is removed.
        """
        names = {self._name_in_file(name): name for name in self.state_dict()}
        own = dict(state)
        while own and not set(own) & set(names):
            first = next(iter(own)).partition(".")[0]
            if not all(name.startswith(f"{first}.") for name in own):
                break
            own = {name.removeprefix(f"{first}."): value for name, value in own.items()}
        return {names.get(name, name): value for name, value in own.items()}

    def _name_in_file(self, name: str) -> str:
        if name.startswith("head."):
            return f"{self.last}.{name.removeprefix('head.')}"
        return name.removeprefix("visual.trunk.")

    @staticmethod
    def _largest(rows: Tensor) -> Tensor:
        largest: Tensor = rows.norm(dim=1).max().clamp(min=1e-12)
        return largest


def last_layer(network: nn.Module, images: Tensor) -> str:
    """Return the name of the layer whose answers are those of a classifier.

    The network runs once, and the layer is seen by what it gives: it is linear (subclasses of
    `nn.Linear` count) or a convolution of one pixel, runs once, and its output is the network's,
    with no other numbers.

    Args:
        network: The classifier in evaluation mode. The meta device will do.
        images: One normalised image or more, float [N, 3, H, W], on its device.

    Raises:
        ArchitectureError: There is none, as where the answers are a mean of two layers.
    """
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, part in network.named_modules():
        if isinstance(part, nn.Linear) or _is_of_one_pixel(part):
            seen[name] = []
            handles.append(
                part.register_forward_hook(lambda _, __, out, key=name: seen[key].append(out))
            )
    try:
        with torch.no_grad():
            answers = network(images)
    finally:
        for handle in handles:
            handle.remove()
    found = [k for k, outs in seen.items() if len(outs) == 1 and _is_reshaped(outs[0], answers)]
    if found:
        return found[-1]
    linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    raise ArchitectureError(
        "its answers are not those of one linear layer: they are computed from several, or changed "
        f"after the last one (its linear layers end in {', '.join(map(repr, linear[-2:]))})"
        if linear
        else "its answers are not those of one linear layer, and it has none"
    )


def _is_of_one_pixel(part: nn.Module) -> bool:
    plain = isinstance(part, nn.Conv2d) and part.groups == 1 and part.stride == (1, 1)
    return plain and part.kernel_size == (1, 1) and part.padding in ((0, 0), "valid")


def _is_reshaped(output: Tensor, answers: object) -> bool:
    """Return whether the answers [N, C] of a network are a layer's output, with no other values."""
    if not isinstance(answers, Tensor) or answers.ndim != 2 or output.numel() != answers.numel():
        return False
    if output.ndim not in (2, 4) or tuple(output.shape[:2]) != tuple(answers.shape):
        return False
    if answers is output:
        return True
    base = output._base if output._is_view() else output
    return answers._is_view() and answers._base is base


def build_classifier(config: Mapping[str, Any]) -> Classifier:
    """Build the model of a ``model_cfg`` with the layout `classifier`, with random weights.

    Raises ArchitectureError if its answers are not those of one last layer.
    """
    vision = config["vision_cfg"]
    last = _last_of(vision["library"], vision["architecture"], int(vision["image_size"]))
    return Classifier(_network(vision, vision.get("classes", 1000)), last)


def with_classes(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a classifier's ``model_cfg`` with the number of classes and features of its weights.

    Raises ArchitectureError if the weights have no last layer of that name, or the classifier
    none at all.
    """
    vision = dict(config["vision_cfg"])
    name = _last_of(vision["library"], vision["architecture"], int(vision["image_size"]))
    found = [v for k, v in state.items() if f".{k}".endswith(f".{name}.weight")]
    if len(found) != 1 or found[0].shape[2:].numel() != 1 or found[0].ndim < 2:
        raise ArchitectureError(
            f"its weights have no last layer {name!r}, as {vision['library']}:"
            f"{vision['architecture']} has; expected those of that classifier"
        )
    classes, width = found[0].shape[:2]
    return {**config, "embed_dim": width + 1, "vision_cfg": {**vision, "classes": classes}}


@lru_cache
def _last_of(library: str, name: str, size: int) -> str:
    """Return the name of a classifier's last layer, found without memory for its weights."""
    vision = {"library": library, "architecture": name, "image_size": size}
    who = f"{library}:{name}"
    try:
        with torch.device("meta"):
            network = _network(vision, 10).eval()
            return last_layer(network, torch.zeros(1, 3, size, size))
    except ArchitectureError as error:
        raise ArchitectureError(
            f"{who} cannot be read by its name: {error}; expected a classifier that ends in one "
            "(pydetox.from_encoder scans its features, with a head of yours or label-free)"
        ) from None
    except _REFUSALS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArchitectureError(
            f"{who} does not take images of {size} pixels: {reason[:300]}; name the size that its "
            f"weights were trained with as {who}@SIZE"
        ) from error


def _network(vision: Mapping[str, Any], classes: int) -> nn.Module:
    library, name, size = vision["library"], vision["architecture"], int(vision["image_size"])
    if library == "timm":
        import timm

        network: nn.Module
        try:
            network = timm.create_model(name, num_classes=classes, img_size=size)
        except TypeError:  # a network of convolutions takes any size
            network = timm.create_model(name, num_classes=classes)
        return network
    if library == "backdoorbench" and name.startswith("preactresnet"):
        return PreActResNet(name.removeprefix("preactresnet"), classes)
    from torchvision.models import get_model

    if library == "backdoorbench" and name in _ENLARGED:
        inner = get_model(name, weights=None, num_classes=classes)
        return nn.Sequential(_Enlarge(), inner)
    options: dict[str, Any] = {"image_size": size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False}  # or a warning is shown about random ones
    if not name.startswith("regnet_"):
        network = get_model(name, weights=None, num_classes=classes, **options)
        return network
    wanted = torch.get_default_device()
    with torch.device("cpu"):  # its constructor computes widths with tensors
        network = get_model(name, weights=None, num_classes=classes)
    return network.to(wanted)


class _Enlarge(nn.Module):
    """torchvision's Resize((224, 224)) on a batch."""

    def forward(self, images: Tensor) -> Tensor:
        """Return images float [N, 3, 224, 224]."""
        from torchvision.transforms.functional import resize

        result: Tensor = resize(images, [224, 224], antialias=True)
        return result


class _PreActBlock(nn.Module):
    """Convolutions, each after a normalisation and ReLU, beside a shortcut."""

    def __init__(self, before: int, kernels: list[tuple[int, int, int]], stride: int) -> None:
        super().__init__()
        self.depth, width = len(kernels), before
        for place, (kernel, after, step) in enumerate(kernels, start=1):
            setattr(self, f"bn{place}", nn.BatchNorm2d(width))
            conv = nn.Conv2d(width, after, kernel, step, kernel // 2, bias=False)
            setattr(self, f"conv{place}", conv)
            width = after
        self.shortcut: nn.Module | None = None
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        beside = x
        for place in range(1, self.depth + 1):
            x = relu(self.get_submodule(f"bn{place}")(x))
            if place == 1 and self.shortcut is not None:
                beside = self.shortcut(x)
            x = self.get_submodule(f"conv{place}")(x)
        return x + beside


class PreActResNet(nn.Module):
    """A ResNet with pre-activation, for small images, under the names that BackdoorBench has.

    Source: He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks" (ECCV 2016). As in
    BackdoorBench, no normalisation follows the last block.

    depth: "18", "34" or "50". classes: C.
    """

    _BLOCKS: Mapping[str, tuple[int, ...]] = {
        "18": (2, 2, 2, 2),
        "34": (3, 4, 6, 3),
        "50": (3, 4, 6, 3),
    }

    def __init__(self, depth: str, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        width = 64
        for place, count in enumerate(self._BLOCKS[depth]):
            planes, blocks = 64 << place, list[nn.Module]()
            for index in range(count):
                stride = 2 if place > 0 and index == 0 else 1
                kernels = [(3, planes, stride), (3, planes, 1)]
                if depth == "50":
                    kernels = [(1, planes, 1), (3, planes, stride), (1, 4 * planes, 1)]
                blocks.append(_PreActBlock(width, kernels, stride))
                width = kernels[-1][1]
            setattr(self, f"layer{place + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, C]."""
        x = self.conv1(images)
        for place in range(1, 5):
            x = self.get_submodule(f"layer{place}")(x)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits
