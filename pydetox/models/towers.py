"""Models that open_clip does not build: SigLIP's of any size, BERT's text towers, images alone.

Their modules are open_clip's, timm's and torch's own. `Towers` puts an image tower and a text tower
together as open_clip's `CustomTextCLIP` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from open_clip.model import QuickGELU, _build_text_tower, _build_vision_tower
from torch import Tensor, nn

#: The factor of cosines for a model without texts, which has learned none: CLIP's own limit of it.
_SCALE = 100.0


class Towers(nn.Module):
    """An image tower, and a text tower if there is one.

    visual: Maps normalised images float [N, 3, H, W] to embeddings [N, D]. text: Maps token ids
    int64 [n, length] to embeddings [n, D]; None for images alone. scale_shape: The shape of
    `logit_scale`. has_bias: Whether there is a `logit_bias`, as in SigLIP.
    """

    def __init__(
        self,
        visual: nn.Module,
        text: nn.Module | None,
        *,
        scale_shape: tuple[int, ...] = (),
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        self.visual, self.text = visual, text
        if text is None:
            self.register_buffer("logit_scale", torch.tensor(math.log(_SCALE)), persistent=False)
        else:
            self.logit_scale = nn.Parameter(torch.full(scale_shape, math.log(1 / 0.07)))
        if has_bias:
            self.logit_bias = nn.Parameter(torch.full(scale_shape, -10.0))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return text embeddings [n, D], not normalised."""
        assert self.text is not None
        embeddings: Tensor = self.text(tokens)
        return embeddings


class TimmTower(nn.Module):
    """A model of timm as an image tower; `trunk` is open_clip's name of it."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings [N, D] of normalised images float [N, 3, H, W]."""
        embeddings: Tensor = self.trunk(images)
        return embeddings


class BertTextTower(nn.Module):
    """An encoder of BERT's kind, whose first token is the text.

    config: The ``text_cfg`` of `checkpoints.transformers_bert`. embed_dim: D.
    """

    def __init__(self, config: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        width, epsilon = int(config["width"]), float(config["epsilon"])
        self.pad_id = int(config["pad_id"])
        transformed = config.get("transformed_width")
        # RoBERTa counts positions from its padding on, and BERT from 0.
        self.first_position = None if transformed is None else self.pad_id
        self.tokens = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(config["positions"], width)
        self.types = nn.Embedding(config["types"], width)
        self.norm = nn.LayerNorm(width, epsilon)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                config["heads"],
                config["mlp_width"],
                dropout=0.0,
                activation="gelu",
                layer_norm_eps=epsilon,
                batch_first=True,
            )
            for _ in range(config["layers"])
        )
        if transformed is not None:
            self.last_norm = nn.LayerNorm(width, epsilon)
            self.transformation = nn.Linear(width, transformed)
        self.projection = nn.Linear(transformed or width, embed_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return embeddings [n, D] of token ids int64 [n, length], padded at the end."""
        shown = tokens != self.pad_id
        if self.first_position is None:
            places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        else:
            places = shown.cumsum(dim=1) * shown + self.first_position
        x = self.norm(self.tokens(tokens) + self.positions(places) + self.types.weight[0])
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~shown)
        first = x[:, 0]
        if self.first_position is not None:
            first = self.transformation(self.last_norm(first))
        embeddings: Tensor = self.projection(first)
        return embeddings


def build_towers(config: Mapping[str, Any]) -> Towers:
    """Build the model of a ``model_cfg`` with `layout`, with random weights.

    Raises KeyError, TypeError, ValueError, RuntimeError or AssertionError for one that is damaged.
    """
    layout, embed_dim = config["layout"], config["embed_dim"]
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    quick = bool(config.get("quick_gelu"))
    if layout in ("siglip", "siglip2"):
        tower = _build_text_tower(embed_dim, text, quick)
        return Towers(_siglip_tower(vision, embed_dim), tower, scale_shape=(1,), has_bias=True)
    if layout in ("siglip_vision_model", "siglip2_vision_model"):
        return Towers(_siglip_tower(vision, embed_dim), None)
    has_projection = vision.pop("projection", True)
    visual = _build_vision_tower(embed_dim, vision, quick)
    if not has_projection:
        visual.proj = None
    if layout in ("clip_vision_model", "image_tower"):  # CLIP's own and those that equal it
        return Towers(visual, None)
    if layout in ("altclip", "chinese_clip"):
        return Towers(visual, BertTextTower(text, embed_dim))
    raise ValueError(f"layout {layout!r} is not known")


def _siglip_tower(vision: Mapping[str, Any], embed_dim: int) -> TimmTower:
    from timm.layers.norm import LayerNorm
    from timm.models.vision_transformer import VisionTransformer

    activations = {
        "gelu": nn.GELU,
        "quick_gelu": QuickGELU,
        "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
        "gelu_new": partial(nn.GELU, approximate="tanh"),
    }
    trunk = VisionTransformer(
        img_size=vision["image_size"],
        patch_size=vision["patch_size"],
        embed_dim=embed_dim,
        depth=vision["layers"],
        num_heads=vision["heads"],
        mlp_ratio=vision["mlp_ratio"],
        class_token=False,
        global_pool="map",
        num_classes=0,
        act_layer=activations[vision["activation"]],
        norm_layer=partial(LayerNorm, eps=vision["epsilon"]),
    )
    return TimmTower(trunk)
