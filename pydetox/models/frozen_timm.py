"""The frozen tower of timm's vision transformer that pools by attention: SigLIP's image tower.

It is built of the same blocks as `frozen.FrozenVisionTransformer`. There is no class token. A
learned query attends to all tokens at the end (Zhai et al., "Scaling Vision Transformers", CVPR
2022, "multihead attention pooling").
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from .attention import choose_attention
from .blocks import Block, Linear, Norm, products_are_faster


def trunk_of(tower: nn.Module) -> Any | None:
    """Return timm's vision transformer inside an image tower, or None if there is none."""
    from timm.models.vision_transformer import VisionTransformer

    trunk = getattr(tower, "trunk", None)
    return trunk if type(trunk) is VisionTransformer else None


def left_over(side: int, patch: int) -> str:
    """Return the obstacle of images of which a convolution leaves the last pixels out."""
    return f"its images of {side} pixels are no whole number of patches of {patch}"


def timm_obstacle(tower: nn.Module) -> str | None:
    """Return why a tower of timm must run through its own module; None if it need not."""
    from timm.layers.attention import Attention
    from timm.layers.attention_pool import AttentionPoolLatent
    from timm.models.vision_transformer import Block as TimmBlock

    trunk = trunk_of(tower)
    if trunk is None:
        return f"its image tower is a {type(tower).__name__}, not a vision transformer"
    if len(getattr(tower, "head", nn.Sequential())) or not isinstance(trunk.head, nn.Identity):
        return "it has layers after its pooling"
    pool = trunk.attn_pool
    if type(pool) is not AttentionPoolLatent or trunk.global_pool != "map":
        return "it does not pool by attention, as SigLIP does"
    plain = (trunk.norm_pre, trunk.fc_norm, trunk.patch_embed.norm, pool.q_norm, pool.k_norm)
    if any(not isinstance(one, nn.Identity) for one in plain) or trunk.num_prefix_tokens:
        return "it has other tokens or normalisations than SigLIP"
    if trunk.dynamic_img_size or trunk.pos_embed is None or pool.pos_embed is not None:
        return "its positions are not those of SigLIP"
    if pool.latent_len != 1 or pool.pool != "token" or pool.mlp is None:
        return "its pooling is not SigLIP's"
    height, width = trunk.patch_embed.patch_size
    if height != width:
        return f"its patches are {height}x{width}, not square"
    if any(side % height for side in trunk.patch_embed.img_size):
        return left_over(trunk.patch_embed.img_size[0], height)
    for block in trunk.blocks:
        if type(block) is not TimmBlock or type(block.attn) is not Attention:
            return "its blocks are not timm's plain ones"
        inner = (block.ls1, block.ls2, block.attn.q_norm, block.attn.k_norm, block.attn.norm)
        if any(not isinstance(one, nn.Identity) for one in (*inner, block.mlp.norm)):
            return "its blocks have other normalisations than SigLIP's"
        if _activation(block.mlp) is None or not isinstance(block.norm1, nn.LayerNorm):
            return f"its activation is {type(block.mlp.act).__name__}"
    return None if _activation(pool.mlp) else f"its activation is {type(pool.mlp.act).__name__}"


class FrozenSiglipTower:
    """timm's `VisionTransformer` of SigLIP: patch rows in, embeddings out.

    It equals the module up to rounding. Weights never get a gradient.
    """

    def __init__(self, tower: nn.Module, dtype: torch.dtype) -> None:
        def frozen(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype)

        trunk: Any = trunk_of(tower)
        pool = trunk.attn_pool
        self.dtype = dtype
        self.patch_size: int | None = trunk.patch_embed.patch_size[0]
        linear = partial(_linear, dtype=dtype)
        self._rows = frozen(trunk.patch_embed.proj.weight).flatten(1)  # [d, 3PP]
        bias = trunk.patch_embed.proj.bias
        places = trunk.pos_embed[0] if bias is None else trunk.pos_embed[0] + bias
        self._positions = frozen(places)  # [tokens, d]
        self._blocks = [_block(block, dtype) for block in trunk.blocks]
        self._norm = Norm.of(trunk.norm, dtype)
        self._heads: int = pool.num_heads
        query = frozen(pool.q(pool.latent.detach()))  # [1, 1, d]
        self._query = query.view(1, 1, self._heads, -1)
        self._attend = choose_attention(query.device, dtype, self._query.shape[-1])
        self._keys_and_values, self._project = linear(pool.kv), linear(pool.proj)
        self._pool_norm = Norm.of(pool.norm, dtype)
        self._expand, self._contract = linear(pool.mlp.fc1), linear(pool.mlp.fc2)
        self._approximate = _activation(pool.mlp) or "none"
        attention = self._attend.description
        if self._blocks:
            by_products = products_are_faster(self._rows)
            attention = (
                "attention by products" if by_products else self._blocks[0].attention.description
            )
        kind = str(dtype).removeprefix("torch.")
        self.description = f"frozen vision transformer of SigLIP, {kind}, {attention}"
        tokens, width = self._positions.shape
        hidden = self._expand.weight.shape[0]
        block = tokens * (7 * width + 2 * hidden) * self._positions.element_size()
        self.bytes_per_image = (len(self._blocks) + 1) * block

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return embeddings float32 [N, D] of patch rows [N, (H/P)(W/P), 3PP] of dtype `dtype`."""
        count, tokens, _ = inputs.shape
        width = self._rows.shape[0]
        x = (inputs.flatten(0, 1) @ self._rows.T).view(count, tokens, width) + self._positions
        x = x.flatten(0, 1)
        for block in self._blocks:
            x = block(x, count, tokens)
        both = self._keys_and_values(self._norm(x)).view(count, tokens, 2, self._heads, -1)
        # Kernels may want queries of their own for each image, not one that is seen N times.
        query = self._query.expand(count, -1, -1, -1).contiguous()
        x = self._project(self._attend(both, query))  # one query per image: rows [N, d]
        hidden = self._expand(self._pool_norm(x))
        return (x + self._contract(gelu(hidden, approximate=self._approximate))).float()


def _activation(mlp: Any) -> str | None:
    """Return the approximation of a network's GELU, or None for another activation."""
    from timm.layers.activations import GELU, GELUTanh

    if type(mlp.act) is nn.GELU:
        return str(mlp.act.approximate)
    if type(mlp.act) is GELU:
        return "none"
    return "tanh" if type(mlp.act) is GELUTanh else None


def _linear(layer: nn.Linear, dtype: torch.dtype) -> Linear:
    return Linear.of(layer.weight, layer.bias, dtype)


def _block(block: Any, dtype: torch.dtype) -> Block:
    attention = block.attn
    return Block(
        heads=attention.num_heads,
        first_norm=Norm.of(block.norm1, dtype),
        project_in=_linear(attention.qkv, dtype),
        project_out=_linear(attention.proj, dtype),
        second_norm=Norm.of(block.norm2, dtype),
        expand=_linear(block.mlp.fc1, dtype),
        contract=_linear(block.mlp.fc2, dtype),
        activation=_activation(block.mlp) or "none",
        attention=choose_attention(attention.qkv.weight.device, dtype, attention.head_dim),
    )
