"""The parts of a frozen transformer: blocks, normalisations and linear layers that need no module.

They compute a forward pass and the gradient of its input, and of the weights if they are made
`trainable`. `frozen` and `frozen_timm` build towers of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from open_clip.transformer import LayerScale, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

from .attention import Attention, choose_attention

# QuickGELU is x sigmoid(1.702 x) = silu(1.702 x) / 1.702; both factors go into the layers around it
# (see `Linear`).
_QUICK_GELU = 1.702


def products_are_faster(x: Tensor) -> bool:
    """Whether attention in the dtype and on the device of x runs as `_Attention`.

    On CPUs, the backward pass of PyTorch's fused attention in bfloat16 takes several times as long
    as the same products one by one. In float32 there is no significant difference.
    """
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _held(tensor: Tensor, trainable: bool) -> Tensor:
    """Return a weight that gets a gradient only if it is trainable."""
    return tensor if trainable else tensor.detach()


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
class Norm:
    """Layer normalisation over the last dimension, or, without `shape`, the identity."""

    shape: tuple[int, ...] | None
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype, *, trainable: bool = False) -> Norm:
        """Return the normalisation that a module computes, in a dtype."""
        if not isinstance(module, nn.LayerNorm):
            return cls(None, None, None, 0.0)
        weight, bias = (
            None if t is None else _held(t, trainable).to(dtype)
            for t in (module.weight, module.bias)
        )
        return cls(tuple(module.normalized_shape), weight, bias, module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalised rows [N, d]."""
        if self.shape is None:
            return x
        return layer_norm(x, self.shape, self.weight, self.bias, self.epsilon)


@dataclass(frozen=True)
class Linear:
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
        trainable: bool = False,
    ) -> Linear:
        """Return the layer of a weight [out, in] and a bias [out], in a dtype."""
        weight = _held(weight, trainable)
        bias = None if bias is None else _held(bias, trainable)
        gamma = _held(scale.gamma, trainable) if isinstance(scale, LayerScale) else None
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
class Block:
    """A block of a transformer that normalises first, on rows [N * tokens, d]."""

    heads: int
    first_norm: Norm
    project_in: Linear
    project_out: Linear
    second_norm: Norm
    expand: Linear
    contract: Linear
    activation: str  # "none" or "tanh", gelu's approximations, or "quick"
    attention: Attention

    @classmethod
    def of(
        cls, block: ResidualAttentionBlock, dtype: torch.dtype, *, trainable: bool = False
    ) -> Block:
        """Return open_clip's block in a dtype."""
        attention, mlp = block.attn, block.mlp
        quick = not isinstance(mlp.gelu, nn.GELU)
        factor = _QUICK_GELU if quick else 1.0
        linear = partial(Linear.of, dtype=dtype, trainable=trainable)
        return cls(
            heads=attention.num_heads,
            first_norm=Norm.of(block.ln_1, dtype, trainable=trainable),
            project_in=linear(attention.in_proj_weight, attention.in_proj_bias),
            project_out=linear(
                attention.out_proj.weight, attention.out_proj.bias, scale=block.ls_1
            ),
            second_norm=Norm.of(block.ln_2, dtype, trainable=trainable),
            expand=linear(mlp.c_fc.weight, mlp.c_fc.bias, output_factor=factor),
            contract=linear(
                mlp.c_proj.weight, mlp.c_proj.bias, scale=block.ls_2, input_factor=1 / factor
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
        if products_are_faster(projected):
            attended: Tensor = _Attention.apply(parts)
            return attended
        return self.attention(parts)

    def _attend_first(self, hidden: Tensor, count: int, tokens: int, queries: int) -> Tensor:
        """Return [N * queries, d]: what attention gives to the first tokens of each image."""
        width = hidden.shape[1]
        shape = (count, -1, self.heads, width // self.heads)
        weight, bias = self.project_in.weight, self.project_in.bias
        chosen = hidden.view(count, tokens, width)[:, :queries].reshape(-1, width)
        asking = Linear(weight[:width], None if bias is None else bias[:width])
        answering = Linear(weight[width:], None if bias is None else bias[width:])
        query = asking(chosen).view(shape)
        both = answering(hidden).view(count, tokens, 2, self.heads, width // self.heads)
        return self.attention(both, query)

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(x)
        if self.activation == "quick":
            return self.contract(silu(hidden))
        return self.contract(gelu(hidden, approximate=self.activation))
