"""An image tower for trigger inversion: the forward pass and the gradient of its input alone.

A step of the inversion spends over nine tenths of its time here. `freeze` takes the weights out of
open_clip's vision transformers and does the same arithmetic in a form that is fast on CPUs and
GPUs: two-dimensional matrix products on contiguous activations, fused attention, and patch rows
straight from `pydetox.ops.stamp_triggers`. If the tower pools the class token, its last block
computes only what this token needs. Every other tower runs through its own module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from open_clip.transformer import (
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    QuickGELU,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

from ..errors import UsageError
from .attention import Attention, choose_attention

#: The precisions that a tower can run in.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: What a configuration may name; see `resolve_precision`.
PRECISION_CHOICES = ("auto", *PRECISIONS)

# QuickGELU is x sigmoid(1.702 x) = silu(1.702 x) / 1.702; both factors go into the layers around it
# (see `_Linear`).
_QUICK_GELU = 1.702


class FrozenTower(Protocol):
    """An image tower that embeds its inputs and is differentiable in the inputs alone."""

    @property
    def description(self) -> str:
        """One line for a report: the tower, its precision, and why nothing faster is used."""
        ...

    @property
    def patch_size(self) -> int | None:
        """P for patch rows [N, (H/P)(W/P), 3PP] as input, None for images [N, 3, H, W]."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        ...

    @property
    def bytes_per_image(self) -> int:
        """The approximate memory of one image's activations until its gradient is computed."""
        ...

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return embeddings float32 [N, D], not normalised, of normalised images or their rows."""
        ...


def freeze(tower: nn.Module, precision: str = "float32", *, name: str = "model") -> FrozenTower:
    """Return an image tower in evaluation mode, ready for inversion.

    In float32, the weights are not copied, so later changes of the weights in place take effect. In
    bfloat16, the result holds a copy of the current weights.

    Args:
        tower: A float32 module that maps normalised images [N, 3, H, W] to embeddings [N, D].
        precision: One of PRECISIONS.
        name: The name of the model in messages.

    Raises:
        UsageError: The precision is unknown, or it is bfloat16 and the tower must run through its
            own module. (open_clip's modules are slower in bfloat16 than in float32.)
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    reason = obstacle(tower)
    if reason is None:
        assert isinstance(tower, VisionTransformer)
        return FrozenVisionTransformer(tower, PRECISIONS[precision])
    if precision != "float32":
        raise UsageError(
            f"{name}: precision {precision} needs a tower that can be frozen, but {reason}; "
            "expected precision float32"
        )
    return ModuleTower(tower, reason)


def resolve_precision(precision: str, device: torch.device, towers: Sequence[nn.Module]) -> str:
    """Return the precision that `auto` stands for; any other precision is returned as it is.

    `auto` is bfloat16 on a GPU with bfloat16 products (compute capability 8.0) if all towers can be
    frozen, and float32 otherwise. docs/performance.md shows what the precision does to verdicts.
    """
    if precision != "auto":
        return precision
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if able and not any(map(obstacle, towers)) else "float32"


def obstacle(tower: nn.Module) -> str | None:
    """Return why a tower must run through its own module; None if it need not."""
    if type(tower) is not VisionTransformer:
        return f"its image tower is a {type(tower).__name__}, not open_clip's VisionTransformer"
    if tower.attn_pool is not None or tower.pool_type not in ("tok", "avg"):
        return "it pools by attention"
    if tower.output_tokens:
        return "it returns its tokens too"
    if tower.patch_size[0] != tower.patch_size[1]:
        return f"its patches are {tower.patch_size[0]}x{tower.patch_size[1]}, not square"
    if type(tower.transformer) is not Transformer or not all(
        type(block) is ResidualAttentionBlock for block in tower.transformer.resblocks
    ):
        return "its blocks are not open_clip's plain ones"
    norms = (nn.Identity, nn.LayerNorm, LayerNorm, LayerNormFp32)
    for block in tower.transformer.resblocks:
        attention, activation = block.attn, block.mlp.gelu
        if type(activation) not in (nn.GELU, QuickGELU):
            return f"its activation is {type(activation).__name__}"
        if type(block.ln_1) not in norms or type(block.ln_2) not in norms:
            return f"its normalisation is {type(block.ln_1).__name__}"
        if attention.in_proj_weight is None or attention.in_proj_bias is None:
            return "its attention has separate or unbiased projections"
        if attention.bias_k is not None or attention.add_zero_attn:
            return "its attention adds a key of its own"
    if type(tower.ln_pre) not in norms or type(tower.ln_post) not in norms:
        return f"its normalisation is {type(tower.ln_post).__name__}"
    return None


class ModuleTower:
    """A tower that runs through its own module, in float32."""

    patch_size: int | None = None
    dtype = torch.float32
    #: An estimate for unknown towers: 64 images in 2 GiB.
    bytes_per_image = 32 << 20

    def __init__(self, tower: nn.Module, reason: str) -> None:
        self.description = f"its own module, float32 ({reason})"
        self._tower = tower

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return embeddings [N, D] of normalised images [N, 3, H, W]."""
        embeddings: Tensor = self._tower(inputs)
        return embeddings


class TowerPair:
    """Two towers on the same inputs. The embeddings [N, D1 + D2] begin with those of the first.

    Both towers must take the same inputs: patch rows of one patch size, or images.
    """

    def __init__(self, first: FrozenTower, second: FrozenTower) -> None:
        if (first.patch_size, first.dtype) != (second.patch_size, second.dtype):
            raise UsageError(
                f"towers with inputs {first.dtype} (patch size {first.patch_size}) and "
                f"{second.dtype} (patch size {second.patch_size}); expected the same"
            )
        self.patch_size, self.dtype = first.patch_size, first.dtype
        self.bytes_per_image = first.bytes_per_image + second.bytes_per_image
        self.description = f"{first.description}, beside one of another model"
        self._first, self._second = first, second

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return embeddings float32 [N, D1 + D2] of normalised images or their rows."""
        return torch.cat([self._first(inputs), self._second(inputs)], dim=1)


class FrozenVisionTransformer:
    """open_clip's `VisionTransformer` with one class token, learned or fixed positions.

    It equals the module up to rounding. It keeps activations for one backward pass, which computes
    the gradient of the input. Weights never get a gradient.
    """

    def __init__(self, tower: VisionTransformer, dtype: torch.dtype) -> None:
        def frozen(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype)

        self.dtype = dtype
        self.patch_size: int | None = tower.patch_size[0]
        self._rows = frozen(tower.conv1.weight).flatten(1)  # [d, 3PP]
        self._class_token = frozen(tower.class_embedding)
        self._positions = frozen(tower.positional_embedding)
        self._first_norm = _Norm.of(tower.ln_pre, dtype)
        self._last_norm = _Norm.of(tower.ln_post, dtype)
        self._blocks = [_Block.of(block, dtype) for block in tower.transformer.resblocks]
        attention = "no attention"
        if self._blocks:
            by_products = _products_are_faster(self._rows)
            attention = (
                "attention by products" if by_products else self._blocks[0].attention.description
            )
        self.description = (
            f"frozen vision transformer, {str(dtype).removeprefix('torch.')}, {attention}"
        )
        self._projection = None if tower.proj is None else frozen(tower.proj)
        self._pool_class_token = tower.pool_type == "tok"
        self._normalize_tokens = not tower.final_ln_after_pool
        tokens, width = self._positions.shape
        # Per token and block: two inputs of normalisations, projections, what attention gives, the
        # two sides of the activation; and the same once more at the deepest point of the backward.
        hidden = self._blocks[0].expand.weight.shape[0] if self._blocks else 0
        block = tokens * (7 * width + 2 * hidden) * self._positions.element_size()
        if self._blocks and _products_are_faster(self._positions):
            block += 2 * self._blocks[0].heads * tokens**2 * self._positions.element_size()
        self.bytes_per_image = (len(self._blocks) + 1) * block

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return embeddings float32 [N, D] of patch rows [N, (H/P)(W/P), 3PP] of dtype `dtype`."""
        count, patches, _ = inputs.shape
        tokens, width = patches + 1, self._rows.shape[0]
        x = (inputs.flatten(0, 1) @ self._rows.T).view(count, patches, width) + self._positions[1:]
        first = (self._class_token + self._positions[0]).expand(count, 1, width)
        x = self._first_norm(torch.cat([first, x], dim=1).flatten(0, 1))
        *blocks, last = self._blocks
        for block in blocks:
            x = block(x, count, tokens)
        # The last block mixes tokens once more; then nothing but the pooled token matters.
        x = last(x, count, tokens, queries=1 if self._pool_class_token else tokens)
        if not self._pool_class_token:
            if self._normalize_tokens:
                x = self._last_norm(x)
            x = x.view(count, tokens, width)[:, 1:].mean(dim=1)
        if self._pool_class_token or not self._normalize_tokens:
            x = self._last_norm(x)
        return (x if self._projection is None else x @ self._projection).float()


def _products_are_faster(x: Tensor) -> bool:
    """Whether attention in the dtype and on the device of x runs as `_Attention`.

    On CPUs, the backward pass of PyTorch's fused attention in bfloat16 takes several times as long
    as the same products one by one. In float32 there is no significant difference.
    """
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


class _Attention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v as matrix products; the softmax is kept for the backward pass.

    The input [N, tokens, 3, heads, d] holds the query, key and value of each token. The output is
    [N * tokens, heads * d].
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        count, tokens, _, heads, size = parts.shape
        together = parts.permute(2, 0, 3, 1, 4).reshape(3, count * heads, tokens, size)
        query, key, value = together.unbind(0)
        scores = torch.bmm(query, key.transpose(1, 2)).mul_(size**-0.5)
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(together, weights)
        mixed = torch.bmm(weights, value).view(count, heads, tokens, size)
        return mixed.transpose(1, 2).reshape(count * tokens, heads * size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        together, weights = ctx.saved_tensors
        query, key, value = together.unbind(0)
        heads, (batch, tokens, size) = gradient.shape[1] // query.shape[2], query.shape
        pull = gradient.reshape(-1, tokens, heads, size).transpose(1, 2).reshape(query.shape)
        result = torch.empty_like(together)
        torch.bmm(weights.transpose(1, 2), pull, out=result[2])
        # d softmax: w (g - <w, g>), with the scores' factor.
        slope = torch.bmm(pull, value.transpose(1, 2))
        slope = torch._softmax_backward_data(slope, weights, -1, weights.dtype).mul_(size**-0.5)
        torch.bmm(slope, key, out=result[0])
        torch.bmm(slope.transpose(1, 2), query, out=result[1])
        parts = result.view(3, batch // heads, heads, tokens, size)
        return parts.permute(1, 3, 0, 2, 4)


@dataclass(frozen=True)
class _Norm:
    """Layer normalisation over the last dimension, or, without `shape`, the identity."""

    shape: tuple[int, ...] | None
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> _Norm:
        if not isinstance(module, nn.LayerNorm):
            return cls(None, None, None, 0.0)
        weight, bias = (
            None if t is None else t.detach().to(dtype) for t in (module.weight, module.bias)
        )
        return cls(tuple(module.normalized_shape), weight, bias, module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        if self.shape is None:
            return x
        return layer_norm(x, self.shape, self.weight, self.bias, self.epsilon)


@dataclass(frozen=True)
class _Linear:
    """Rows: output_factor * (input_factor * x @ weight.T + bias) * scale, scale per column.

    The scale is LayerScale's. If weights are copied into another dtype anyway, both factors and the
    scale are multiplied into them before they are rounded. A library of matrix products then adds
    the bias while it writes the product. It does so only if neither of them has a factor.
    """

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    scale: Tensor | None = None  # [out]
    input_factor: float = 1.0
    output_factor: float = 1.0

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        scale: nn.Module | None = None,
        *,
        input_factor: float = 1.0,
        output_factor: float = 1.0,
    ) -> _Linear:
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
        gamma = scale.gamma.detach() if isinstance(scale, LayerScale) else None
        if weight.dtype == dtype:
            return cls(weight, bias, gamma, input_factor, output_factor)
        if input_factor * output_factor != 1:
            weight = weight * (input_factor * output_factor)
        if bias is not None and output_factor != 1:
            bias = bias * output_factor
        if gamma is not None:
            weight = weight * gamma[:, None]
            bias = None if bias is None else bias * gamma
        return cls(weight.to(dtype), None if bias is None else bias.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output [N, out] of rows x [N, in]."""
        alpha = self.input_factor * self.output_factor
        if self.bias is None:
            y = x @ self.weight.T
            y = y if alpha == 1 else y * alpha
        else:
            y = torch.addmm(self.bias, x, self.weight.T, beta=self.output_factor, alpha=alpha)
        return y if self.scale is None else y * self.scale


@dataclass(frozen=True)
class _Block:
    """open_clip's ResidualAttentionBlock, on rows [N * tokens, d]."""

    heads: int
    first_norm: _Norm
    project_in: _Linear
    project_out: _Linear
    second_norm: _Norm
    expand: _Linear
    contract: _Linear
    activation: str  # "none" or "tanh", gelu's approximations, or "quick"
    attention: Attention

    @classmethod
    def of(cls, block: ResidualAttentionBlock, dtype: torch.dtype) -> _Block:
        attention, mlp = block.attn, block.mlp
        quick = not isinstance(mlp.gelu, nn.GELU)
        factor = _QUICK_GELU if quick else 1.0
        return cls(
            heads=attention.num_heads,
            first_norm=_Norm.of(block.ln_1, dtype),
            project_in=_Linear.of(attention.in_proj_weight, attention.in_proj_bias, dtype),
            project_out=_Linear.of(
                attention.out_proj.weight, attention.out_proj.bias, dtype, block.ls_1
            ),
            second_norm=_Norm.of(block.ln_2, dtype),
            expand=_Linear.of(mlp.c_fc.weight, mlp.c_fc.bias, dtype, output_factor=factor),
            contract=_Linear.of(
                mlp.c_proj.weight, mlp.c_proj.bias, dtype, block.ls_2, input_factor=1 / factor
            ),
            activation="quick" if quick else mlp.gelu.approximate,
            attention=choose_attention(
                attention.in_proj_weight.device, dtype, attention.embed_dim // attention.num_heads
            ),
        )

    def __call__(self, x: Tensor, count: int, tokens: int, queries: int | None = None) -> Tensor:
        """Return [N * queries, d]: all tokens, or only the first `queries` of each image."""
        width = x.shape[1]
        hidden = self.first_norm(x)
        if queries in (None, tokens):
            mixed = self._attend(self.project_in(hidden), count, tokens)
        else:
            assert queries is not None
            mixed = self._attend_first(hidden, count, tokens, queries)
            x = x.view(count, tokens, width)[:, :queries].reshape(-1, width)
        x = x + self.project_out(mixed)
        return x + self._feed_forward(self.second_norm(x))

    def _attend(self, projected: Tensor, count: int, tokens: int) -> Tensor:
        """Return the values [N * tokens, d] that attention mixes, of projected [N * tokens, 3d]."""
        width = projected.shape[1] // 3
        parts = projected.view(count, tokens, 3, self.heads, width // self.heads)
        if _products_are_faster(projected):
            attended: Tensor = _Attention.apply(parts)
            return attended
        return self.attention(parts)

    def _attend_first(self, hidden: Tensor, count: int, tokens: int, queries: int) -> Tensor:
        """Return [N * queries, d]: what attention gives to the first tokens of each image."""
        width = hidden.shape[1]
        shape = (count, -1, self.heads, width // self.heads)
        weight, bias = self.project_in.weight, self.project_in.bias
        chosen = hidden.view(count, tokens, width)[:, :queries].reshape(-1, width)
        asking = _Linear(weight[:width], None if bias is None else bias[:width])
        answering = _Linear(weight[width:], None if bias is None else bias[width:])
        query = asking(chosen).view(shape)
        both = answering(hidden).view(count, tokens, 2, self.heads, width // self.heads)
        return self.attention(both, query)

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(x)
        if self.activation == "quick":
            return self.contract(silu(hidden))
        return self.contract(gelu(hidden, approximate=self.activation))
