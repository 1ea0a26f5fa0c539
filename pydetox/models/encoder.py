"""Models that are no CLIP of open_clip: image encoders with a head, and towers of other libraries.

Both become an `OpenClipModel` whose image tower is the given module and whose class head comes from
somewhere else: from the rows of a classifier's last layer, or from another text tower.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..data import Template, fill_templates
from ..data.names import given_names
from ..errors import ArchitectureError, DataError, UsageError
from ..numbers import require_number, require_whole
from ..rng import generator
from .identity import weights_digest
from .open_clip_model import OpenClipModel

#: The factor of cosines where nobody names one and the head has unit rows, as in CLIP.
_CLIP_SCALE = 100.0
#: The number of synthetic images that the length of features is measured on.
_MEASURED = 32


@runtime_checkable
class VisionLanguageModel(Protocol):
    """What pydetox needs of a pair of towers that it does not know: one attribute, three methods.

    Any object that has them can be scanned and repaired. The image tower does its own
    normalisation.

    Attributes:
        image_size: The height and width of an input image in pixels.
    """

    image_size: int

    def image_tower(self) -> nn.Module:
        """Return the module whose weights are judged and repaired.

        It maps float32 images [N, 3, H, W] with RGB values in [0, 1] to embeddings [N, D]. It is
        differentiable in the images. pydetox works on a copy of it.
        """
        ...

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of n prompts, float [n, D]; they need not have unit length."""
        ...

    def logit_scale(self) -> float:
        """Return the positive factor of cosines in the class logits, 100 for most of CLIP."""
        ...


class EncoderModel(OpenClipModel):
    """An image encoder with a class head of its own.

    It has all that a search and a repair need. It has no text tower of open_clip, and no layout of
    files that open_clip would read: take the repaired weights with `pydetox.copy_weights`.

    Args:
        tower: The image tower, float32; it becomes part of the model.
        name: The name in messages and reports.
        image_size: The height and width of an input image in pixels.
        mean: The mean of each channel that is subtracted from pixels in [0, 1].
        std: The deviation of each channel that the result is divided by.
        interpolation: As in `load_images`.
        resize_mode: As in `load_images`.
        resize_size: As in `Resizing`.
        logit_scale: The factor of cosines.
        embed_dim: D, the length of an embedding.
        head: The class head [C, D]; None if `texts` tells it, or if there is none.
        texts: Another text tower.
        class_names: The names of the rows of the head, if they are known.
        storage_dtypes: The dtypes of the given weights, by the names in `clip`.
    """

    layout_obstacle = (
        "it is no model of open_clip or transformers, so that no folder of theirs can hold it: "
        "leave output= out, and take the weights with pydetox.copy_weights"
    )

    def __init__(
        self,
        tower: nn.Module,
        *,
        name: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
        resize_mode: str,
        resize_size: int | None = None,
        logit_scale: float,
        embed_dim: int,
        head: Tensor | None,
        texts: VisionLanguageModel | None = None,
        class_names: Sequence[str] | None = None,
        storage_dtypes: dict[str, torch.dtype] | None = None,
    ) -> None:
        frame = _Frame(tower, logit_scale)
        super().__init__(
            frame,
            model_config={
                "embed_dim": embed_dim,
                "vision_cfg": {"image_size": image_size, "module": type(tower).__name__},
                "text_cfg": {},
            },
            preprocess_config={
                "mean": [float(x) for x in mean],
                "std": [float(x) for x in std],
                "interpolation": interpolation,
                "resize_mode": resize_mode,
                **({} if resize_size is None else {"resize_size": resize_size}),
            },
            name=name,
            storage_dtypes=storage_dtypes,
            sha256=weights_digest(frame.state_dict()),
            preprocess_source="given",
        )
        self._rows = None if head is None else head.detach().float()
        self._texts = texts
        self.class_names = given_names(class_names)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Raise ArchitectureError: there is no text tower of open_clip."""
        raise ArchitectureError(f"{self.name}: has no text tower of open_clip")

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Raise ArchitectureError: there is no text tower of open_clip."""
        raise ArchitectureError(f"{self.name}: has no text tower of open_clip")

    def zero_shot_head(self, class_names: Sequence[str], templates: Sequence[Template]) -> Tensor:
        """Return the head [C, D]: one unit row per class of a text tower, or the given rows.

        The given rows are those of the classes in order. Raises DataError if there are more or
        fewer class names, or none, and ArchitectureError for an encoder without a head.
        """
        class_names = given_names(class_names) or ()
        if self._texts is not None:
            return super().zero_shot_head(class_names, templates)
        if self._rows is None:
            raise ArchitectureError(
                f"{self.name}: has neither a head nor a text tower; give head=, or scan label-free "
                "(objective='label-free')"
            )
        if len(class_names) != len(self._rows):
            raise DataError(
                f"{self.name}: {len(class_names)} class names, but its head has "
                f"{len(self._rows)} classes; give the names of all in order (class_names=)"
            )
        own = self.class_names
        if own is not None and list(own) != list(class_names):
            if sorted(own) != sorted(class_names) or len(set(own)) < len(own):
                return self._rows.to(self.device)
            rows = self._rows[[own.index(name) for name in class_names]]
            return rows.to(self.device)
        return self._rows.to(self.device)

    def _head(self, class_names: Sequence[str], templates: Sequence[Template]) -> Tensor:
        assert self._texts is not None
        rows = []
        with torch.no_grad():
            for name in class_names:
                prompts = fill_templates(templates, name)
                units = nn.functional.normalize(self._texts.encode_text(prompts).float(), dim=-1)
                rows.append(nn.functional.normalize(units.mean(dim=0), dim=-1))
        head = torch.stack(rows).to(self.device)
        if head.shape[1] != self.embed_dim:
            raise ArchitectureError(
                f"{self.name}: encode_text gives {head.shape[1]} numbers a prompt, and its image "
                f"tower {self.embed_dim} an image; expected as many"
            )
        return head


class _Frame(nn.Module):
    """What stands for open_clip's module: an image tower and a temperature."""

    def __init__(self, tower: nn.Module, logit_scale: float) -> None:
        super().__init__()
        self.visual = tower
        self.logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))


class _Features(nn.Module):
    """The input of one layer of a module, with a constant 1 behind it if the layer has a bias.

    The scores of a linear layer, W f + b, are then inner products with the rows (w, b).
    """

    def __init__(self, module: nn.Module, layer: str | None, *, constant: bool) -> None:
        super().__init__()
        self.module = module
        self._layer, self._constant = layer, constant

    def forward(self, images: Tensor) -> Tensor:
        """Return the features [N, D] of normalised images [N, 3, H, W]."""
        if self._layer is None:
            features: Tensor = self.module(images)
        else:
            seen = list[Tensor]()
            layer = self.module.get_submodule(self._layer)
            handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            try:
                self.module(images)
            finally:
                handle.remove()
            if len(seen) != 1:
                raise ArchitectureError(
                    f"the layer {self._layer!r} ran {len(seen)} times for one batch; expected once"
                )
            features = seen[0]
        features = features.float()
        if self._constant:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        return features


def from_encoder(
    encoder: nn.Module,
    *,
    image_size: int,
    head: nn.Linear | Tensor | str | None = None,
    mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
    std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
    resize_size: int | None = None,
    class_names: Sequence[str] | None = None,
    logit_scale: float | None = None,
    name: str | None = None,
) -> EncoderModel:
    """Return an image encoder, or a whole classifier, as a model that can be scanned and repaired.

    The module is copied; `pydetox.copy_weights` writes repaired weights back into it.

    Args:
        encoder: Maps normalised images float32 [N, 3, H, W] to features [N, D] or, if the head is
            one of its layers, to anything.
        image_size: The height and width of an input image in pixels.
        head: The class head. One of

            - a linear layer of `encoder`, as the module or by its name ("fc" of torchvision's
              ResNet): its input is the embedding, and its bias counts;
            - another linear layer that takes the features;
            - a tensor [C, D], one direction per class;
            - None: there are no classes, and only a label-free scan is possible.
        mean: The mean of each channel, of pixels in [0, 1]; default: OpenAI's CLIP.
        std: The deviation of each channel; default: OpenAI's CLIP.
        interpolation: As in `load_images`.
        resize_mode: As in `load_images`.
        resize_size: The length that `resize_mode` scales to before image_size pixels are cut out,
            such as 256 for most of torchvision's weights; None: image_size.
        class_names: The names of the head's rows. With them, images whose classes have the same
            names in another order fit, too.
        logit_scale: The factor of the cosines of embeddings and rows. Default: 100 for unit rows.
            For other rows it is the mean length of the features of synthetic images, so that logits
            have about the size that they have in the classifier.
        name: The name in messages and reports; default: the class of the module.

    Raises:
        UsageError: The head is no layer of the module or no matrix, mean or std are not three
            finite numbers (std above 0), image_size is no whole number above 0, or logit_scale is
            no number above 0.
        ArchitectureError: The module does not take such images, or its features are no [N, D] or
            do not fit the head.
    """
    name = name or type(encoder).__name__
    if not isinstance(encoder, nn.Module):
        raise UsageError(f"the encoder is a {name}; expected a module of torch")
    _check_preparation(image_size, mean, std)
    if logit_scale is not None:
        require_number("logit_scale", logit_scale, above=0)
    layer, rows, bias = _rows_of(encoder, head)
    twin = copy.deepcopy(encoder).eval().float().requires_grad_(False)
    wrapped = layer is not None or bias is not None
    tower = _Features(twin, layer, constant=bias is not None) if wrapped else twin
    prefix = "visual.module." if wrapped else "visual."
    features = _features_of_synthetic(tower, image_size, mean, std, name)
    width = features.shape[1] - (bias is not None)
    if rows is not None and rows.shape[1] != width:
        raise ArchitectureError(
            f"{name}: gives {width} features an image, and the rows of its head have "
            f"{rows.shape[1]}; expected as many"
        )
    if bias is not None and rows is not None:
        rows = torch.cat([rows, bias[:, None]], dim=1)
    if class_names is not None and rows is not None and len(class_names) != len(rows):
        raise UsageError(f"{len(class_names)} class names for a head of {len(rows)} classes")
    if logit_scale is None:
        lengths = None if rows is None else rows.norm(dim=1)
        unit = lengths is None or bool(((lengths - 1).abs() < 1e-3).all())
        logit_scale = _CLIP_SCALE if unit else float(features.norm(dim=1).mean().clamp(min=1e-3))
    return EncoderModel(
        tower,
        name=name,
        image_size=image_size,
        mean=mean,
        std=std,
        interpolation=interpolation,
        resize_mode=resize_mode,
        resize_size=resize_size,
        logit_scale=logit_scale,
        embed_dim=features.shape[1],
        head=rows,
        class_names=class_names,
        storage_dtypes={f"{prefix}{k}": v.dtype for k, v in encoder.state_dict().items()},
    )


def from_towers(model: VisionLanguageModel, *, name: str | None = None) -> EncoderModel:
    """Return a pair of towers of another library as a model; see `VisionLanguageModel`.

    Raises ArchitectureError if the image tower does not give [N, D].
    """
    name = name or type(model).__name__
    given = model.image_tower()
    tower = copy.deepcopy(given).eval().float().requires_grad_(False)
    size, plain = model.image_size, ((0.0,) * 3, (1.0,) * 3)
    _check_preparation(size, *plain)
    features = _features_of_synthetic(tower, size, *plain, name)
    scale = model.logit_scale()
    require_number("logit_scale", scale, above=0)
    return EncoderModel(
        tower,
        name=name,
        image_size=size,
        mean=plain[0],
        std=plain[1],
        interpolation="bicubic",
        resize_mode="shortest",
        logit_scale=float(scale),
        embed_dim=features.shape[1],
        head=None,
        texts=model,
        storage_dtypes={f"visual.{k}": v.dtype for k, v in given.state_dict().items()},
    )


def _rows_of(
    encoder: nn.Module, head: nn.Linear | Tensor | str | None
) -> tuple[str | None, Tensor | None, Tensor | None]:
    """Return the layer of the encoder that is its head, the rows of the head and their biases."""
    if head is None:
        return None, None, None
    if isinstance(head, Tensor):
        if head.ndim != 2 or 0 in head.shape:
            raise UsageError(f"head is a tensor {list(head.shape)}; expected [C, D]")
        return None, head.detach().float().cpu(), None
    layer = None
    if isinstance(head, str):
        layer = head
        try:
            head = encoder.get_submodule(head)  # type: ignore[assignment]
        except AttributeError:
            linear = [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear)]
            raise UsageError(
                f"head is {layer!r}, and {type(encoder).__name__} has no such layer; its last "
                f"linear layers are {', '.join(map(repr, linear[-3:])) or 'none'}"
            ) from None
    else:
        layer = next((n for n, m in encoder.named_modules() if m is head), None)
    if not isinstance(head, nn.Linear):
        raise UsageError(
            f"head is a {type(head).__name__}; expected a linear layer, its name or a tensor [C, D]"
        )
    bias = None if head.bias is None else head.bias.detach().float().cpu()
    return layer, head.weight.detach().float().cpu(), bias


def _check_preparation(image_size: object, mean: object, std: object) -> None:
    """Raise UsageError unless a size is a whole number above 0, and the others three numbers."""
    require_whole("image_size", image_size, 1, ", the height and width in pixels")
    for what, given in (("mean", mean), ("std", std)):
        try:
            values = [float(x) for x in given]  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            values = []
        fit = all(math.isfinite(x) and (what == "mean" or x > 0) for x in values)
        if len(values) != 3 or not fit:
            raise UsageError(
                f"{what} is {given!r}; expected three finite numbers"
                f"{' above 0' if what == 'std' else ''}, one a channel"
            )


@torch.no_grad()
def _features_of_synthetic(
    tower: nn.Module, size: int, mean: Sequence[float], std: Sequence[float], name: str
) -> Tensor:
    """Return the features [n, D] of smooth random images; ArchitectureError for another shape."""
    colours = generator("models.synthetic", 0).random((_MEASURED, 3, 4, 4))
    weight = next(tower.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    small = torch.from_numpy(colours).float().to(device)
    pixels = interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    centre, spread = (pixels.new_tensor(list(x)).view(1, 3, 1, 1) for x in (mean, std))
    try:
        features = tower((pixels - centre) / spread)
    except (IndexError, RuntimeError, ValueError) as error:
        raise ArchitectureError(
            f"{name}: does not take images [N, 3, {size}, {size}]: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != _MEASURED:
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ArchitectureError(
            f"{name}: gives {shape} for {_MEASURED} images; expected embeddings "
            f"[{_MEASURED}, D] (if it is a classifier, name its last layer with head=)"
        )
    return features.float().cpu()
