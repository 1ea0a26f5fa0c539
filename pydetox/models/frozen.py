"""An image tower for trigger inversion: the forward pass and the gradient of its input alone.

A step of the inversion spends over nine tenths of its time here. `freeze` takes the weights out of
vision transformers (open_clip's, and timm's of SigLIP) and does the same arithmetic in a form that
is fast on CPUs and GPUs: two-dimensional matrix products on contiguous activations, fused
attention, and patch rows straight from `pydetox.ops.stamp_triggers`. If the tower pools the class
token, its last block computes only what this token needs. Every other tower runs through its own
module, in a search in the form of `folded`.

`trainable` gives the same form of open_clip's transformers to a fine-tuning: their weights get
gradients, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from open_clip.transformer import (
    LayerNorm,
    LayerNormFp32,
    QuickGELU,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn

from ..errors import UsageError
from .blocks import Block, Norm, products_are_faster
from .folded import FoldedTower, is_convolutional
from .frozen_timm import FrozenSiglipTower, left_over, timm_obstacle

#: The precisions that a tower can run in.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: What a configuration may name; see `resolve_precision`.
PRECISION_CHOICES = ("auto", *PRECISIONS)


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


def freeze(
    tower: nn.Module,
    precision: str = "float32",
    *,
    name: str = "model",
    image_size: int | None = None,
) -> FrozenTower:
    """Return an image tower in evaluation mode, ready for inversion.

    In float32, the weights of a vision transformer are not copied, so later changes of the weights
    in place take effect. In bfloat16, and of a convolutional tower, the result holds a copy of the
    current weights.

    Args:
        tower: A float32 module that maps normalised images [N, 3, H, W] to embeddings [N, D].
        precision: One of PRECISIONS.
        name: The name of the model in messages.
        image_size: The side of its images. Other towers than vision transformers then get the form
            of `models.folded`, which takes two passes to make. Without it, they run as they are.

    Raises:
        UsageError: The precision is unknown, or it is bfloat16 and the tower must run through its
            own module and has no convolutions. (open_clip's transformers are slower in bfloat16
            than in float32.)
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    reason = obstacle(tower)
    if reason is None:
        if not isinstance(tower, VisionTransformer):
            return FrozenSiglipTower(tower, PRECISIONS[precision])
        return FrozenVisionTransformer(tower, PRECISIONS[precision])
    if precision != "float32" and (image_size is None or not is_convolutional(tower)):
        raise UsageError(
            f"{name}: precision {precision} needs a tower that can be frozen, but {reason}; "
            "expected precision float32"
        )
    if image_size is None:
        return ModuleTower(tower, reason)
    return FoldedTower(tower, image_size, PRECISIONS[precision], reason)


def trainable(tower: nn.Module) -> FrozenVisionTransformer | None:
    """Return a tower in the form of `freeze` whose weights get gradients, in float32.

    It equals the module up to rounding. None if the tower has to run through its own module. The
    result keeps references to the weights, so that a change of them in place takes effect.
    """
    if not isinstance(tower, VisionTransformer) or obstacle(tower) is not None:
        return None
    if any(one.dtype != torch.float32 for one in tower.parameters()):
        return None
    keeps_all = isinstance(tower.patch_dropout, nn.Identity) and not any(
        block.attn.dropout for block in tower.transformer.resblocks
    )
    if tower.training and not keeps_all:
        return None
    return FrozenVisionTransformer(tower, torch.float32, trainable=True)


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
    if hasattr(tower, "trunk"):
        return timm_obstacle(tower)
    if type(tower) is not VisionTransformer:
        return f"its image tower is a {type(tower).__name__}, not open_clip's VisionTransformer"
    if tower.attn_pool is not None or tower.pool_type not in ("tok", "avg"):
        return "it pools by attention"
    if tower.output_tokens:
        return "it returns its tokens too"
    if tower.patch_size[0] != tower.patch_size[1]:
        return f"its patches are {tower.patch_size[0]}x{tower.patch_size[1]}, not square"
    if any(side % tower.patch_size[0] for side in tower.image_size):
        return left_over(tower.image_size[0], tower.patch_size[0])
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
    the gradient of the input. Weights get a gradient only if they are `trainable`.
    """

    def __init__(
        self, tower: VisionTransformer, dtype: torch.dtype, *, trainable: bool = False
    ) -> None:
        def frozen(tensor: Tensor) -> Tensor:
            return (tensor if trainable else tensor.detach()).to(dtype)

        self.dtype = dtype
        self.patch_size: int | None = tower.patch_size[0]
        self._rows = frozen(tower.conv1.weight).flatten(1)  # [d, 3PP]
        self._class_token = frozen(tower.class_embedding)
        self._positions = frozen(tower.positional_embedding)
        self._first_norm = Norm.of(tower.ln_pre, dtype, trainable=trainable)
        self._last_norm = Norm.of(tower.ln_post, dtype, trainable=trainable)
        self._blocks = [
            Block.of(block, dtype, trainable=trainable) for block in tower.transformer.resblocks
        ]
        attention = "no attention"
        if self._blocks:
            by_products = products_are_faster(self._rows)
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
        if self._blocks and products_are_faster(self._positions):
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
