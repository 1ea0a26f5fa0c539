"""A convolutional image tower for trigger inversion: its own module, in a faster form.

A search needs the gradient of the input alone, of a tower that no longer changes. Three things
follow. Batch normalisation has become a scale and a shift per channel, which are multiplied into
the convolution before it (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, section 3.2). The channels of a pixel lie side by
side in memory, as the libraries of convolutions want them. And the memory of one image is counted,
not guessed.

Which convolution a normalisation follows is seen in a forward pass. The folded tower is then
compared with the module; if they differ, nothing is folded.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..rng import generator

#: The largest distance of the folded tower's embeddings from the module's, relative to their norm.
TOLERANCE = 1e-4

_TRIED = 2  # images of the comparison

# torch's own, and timm's, which only pads in its own way. Others may compute their weights.
_CONVOLUTIONS = ("Conv2d", "Conv2dSame")


class FoldedTower:
    """A tower's module with folded normalisations, channels last, in float32 or bfloat16.

    It equals the module up to rounding. It has a copy of the weights, and they never get a
    gradient. A module without convolutions beyond its stem is used as it is.
    """

    patch_size: int | None = None

    def __init__(self, tower: nn.Module, image_size: int, dtype: torch.dtype, reason: str) -> None:
        """Take over a module in eval mode that maps [N, 3, S, S] to [N, D].

        image_size: S. dtype: torch.float32 or torch.bfloat16. reason: Why there is no faster form,
        for the description.
        """
        self.dtype = dtype
        weight = next(tower.parameters(), None)
        images = _noise(image_size).to("cpu" if weight is None else weight.device)
        self._convolutional = is_convolutional(tower)
        self._tower, folded = tower, 0
        if self._convolutional:
            self._tower, folded = fold_normalisations(tower, images)
        if dtype != torch.float32:
            self._tower = _own(self._tower, tower).to(dtype)
        if self._convolutional:
            self._tower = _own(self._tower, tower).to(memory_format=torch.channels_last)
        self.bytes_per_image = max(1, _kept_bytes(self, images.to(dtype)) // len(images))
        form = [f"{folded} normalisations folded"] if folded else []
        form += ["channels last"] if self._convolutional else []
        kind = str(dtype).removeprefix("torch.")
        self.description = ", ".join(["its own module", kind, *form]) + f" ({reason})"

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return embeddings float32 [N, D] of normalised images [N, 3, S, S] of dtype `dtype`."""
        if self._convolutional:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        embeddings: Tensor = self._tower(inputs)
        return embeddings.float()


def fold_normalisations(tower: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """Return a tower whose batch normalisations are part of its convolutions, and their number.

    tower: A float32 module in eval mode. images: Normalised, float32 [n, 3, S, S], for the passes
    that see what follows what, and that compare. The tower itself is returned, with 0, if there is
    nothing to fold or the result would not equal it.
    """
    with torch.no_grad():
        expected = tower(images)
        pairs = _pairs(tower, images)
        if not pairs:
            return tower, 0
        folded = copy.deepcopy(tower)
        modules = dict(folded.named_modules())
        for convolution, normalisation in pairs:
            _fold(modules[convolution], modules[normalisation])
            parent, _, name = normalisation.rpartition(".")
            setattr(modules[parent], name, _rest(modules[normalisation]))
        found = folded(images)
        off = (found - expected).double().norm() / expected.double().norm().clamp(min=1e-30)
        return (folded, len(pairs)) if float(off) <= TOLERANCE else (tower, 0)


def _pairs(tower: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Return the names of the convolutions and normalisations that follow each other directly."""
    names = {module: name for name, module in tower.named_modules()}
    made: dict[int, nn.Module] = {}
    kept: list[Tensor] = []  # so that no other tensor gets an address that was seen
    follows: dict[nn.Module, nn.Module] = {}
    calls, readers = Counter[nn.Module](), Counter[int]()

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[module] += 1
        # Modules with others inside only pass tensors on, but for timm's normalisations.
        if isinstance(module, _BatchNorm) or not list(module.children()):
            readers.update(id(one) for one in inputs if isinstance(one, Tensor))
        if isinstance(module, _BatchNorm) and inputs and id(inputs[0]) in made:
            follows[module] = made[id(inputs[0])]
        if isinstance(output, Tensor):
            kept.append(output)
            if type(module).__name__ in _CONVOLUTIONS:
                made[id(output)] = module

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        tower(images)
    finally:
        for hook in hooks:
            hook.remove()
    outputs = {module: number for number, module in made.items()}
    return [
        (names[convolution], names[normalisation])
        for normalisation, convolution in follows.items()
        if calls[convolution] == calls[normalisation] == 1
        and readers[outputs[convolution]] == 1
        and normalisation.running_mean is not None
        and names[normalisation]
    ]


def _fold(convolution: nn.Module, normalisation: nn.Module) -> None:
    """Multiply a normalisation into the convolution before it, in place."""
    conv: Any = convolution
    norm: Any = normalisation
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    weight = conv.weight.double() * scale.view(-1, *[1] * (conv.weight.ndim - 1))
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)


def _rest(normalisation: nn.Module) -> nn.Module:
    """Return what a normalisation does beside it: timm's have an activation."""
    after = [getattr(normalisation, name, None) for name in ("drop", "act")]
    layers = [one for one in after if isinstance(one, nn.Module)]
    return nn.Sequential(*(one for one in layers if not isinstance(one, nn.Identity)))


def is_convolutional(tower: nn.Module) -> bool:
    """Whether a tower has more convolutions than the one that makes its patches."""
    return sum(isinstance(module, nn.Conv2d) for module in tower.modules()) > 1


def _own(tower: nn.Module, original: nn.Module) -> nn.Module:
    return copy.deepcopy(tower) if tower is original else tower


def _noise(size: int) -> Tensor:
    """Return normalised images of noise, float32 [n, 3, size, size]; always the same."""
    rng = generator("models.folding", 0)
    return torch.from_numpy(rng.standard_normal((_TRIED, 3, size, size)).astype("float32"))


def _kept_bytes(tower: FoldedTower, images: Tensor) -> int:
    """Return the bytes that a forward pass of images keeps for the backward pass."""
    weights = {one.untyped_storage().data_ptr() for one in tower._tower.parameters()}
    kept: dict[int, int] = {}

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.inference_mode(False), torch.enable_grad():
        inputs = images.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
            tower(inputs)
    # The pass back needs about as much again at its deepest point as the largest of them.
    return sum(kept.values()) + 2 * max(kept.values(), default=0)
