"""Fine-pruning: remove the hidden units that clean images do not use, then fine-tune."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...errors import ArchitectureError, UsageError
from ...models import OpenClipModel
from ...models.memory import Batching
from ...training import TrainConfig, train_on_prompts
from .base import DefenderData, Outcome, Stopwatch


@dataclass(frozen=True)
class PruningConfig:
    """How to prune.

    Attributes:
        share: The share of the hidden units of a block's MLP to remove, in [0, 1).
        blocks: The number of blocks to prune, counted from the end.
        training: The fine-tuning afterwards.
    """

    share: float
    training: TrainConfig
    blocks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1 or self.blocks < 1:
            raise UsageError(
                f"share {self.share}, blocks {self.blocks}; expected [0, 1) and at least 1"
            )


def _settings() -> tuple[PruningConfig, ...]:
    return tuple(
        PruningConfig(share, TrainConfig(epochs=10, learning_rate=rate, batch_size=64))
        for share in (0.5, 0.8)
        for rate in (3e-4, 1e-3)
    )


@dataclass(frozen=True)
class FinePruning:
    """Fine-pruning on the MLPs of a vision transformer.

    The units with the smallest mean absolute activation on clean images are removed from the last
    blocks, then the image tower is fine-tuned on the labelled images. Source: Liu, Dolan-Gavitt,
    Garg, "Fine-Pruning" (RAID 2018), which prunes channels of the last convolution.
    """

    name: str = "fine-pruning"
    needs_trigger: bool = False
    grid: tuple[PruningConfig, ...] = _settings()

    def defend(self, model: OpenClipModel, data: DefenderData, config: PruningConfig) -> Outcome:
        """Return the pruned and fine-tuned model; details["pruned"]: units removed per block."""
        watch = Stopwatch(len(data.images), len(data.labels()))
        pruned = model.clone()
        removed = prune_hidden_units(pruned, data.images.images, config.share, config.blocks)
        tuned = train_on_prompts(
            pruned, data.images, data.templates, config.training, description=self.name
        )
        return Outcome(tuned, watch.stop(), {"pruned": removed})


@torch.no_grad()
def prune_hidden_units(
    model: OpenClipModel, images: Tensor, share: float, blocks: int
) -> dict[str, list[int]]:
    """Set the weights of the least active hidden units to zero, in place.

    images: clean ones, uint8 [N, 3, H, W]. A removed unit has no input and no output weights, so
    that no gradient reaches it either: it stays removed. Returns the units by block.
    Raises ArchitectureError for an image tower without transformer blocks.
    """
    found = {
        name: module
        for name, module in model.visual.named_modules()
        if isinstance(getattr(module, "c_fc", None), nn.Linear)
        and isinstance(getattr(module, "c_proj", None), nn.Linear)
    }
    if not found:
        raise ArchitectureError(
            f"{model.name}: its image tower has no transformer blocks with an MLP; "
            "fine-pruning needs them"
        )
    chosen = dict(list(found.items())[-blocks:])
    activity: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0].abs().double().flatten(0, -2).sum(dim=0)

        last = chosen[name].c_proj
        assert isinstance(last, nn.Linear)
        return last.register_forward_pre_hook(hook)

    def look_at(part: slice) -> dict[str, Tensor]:
        # The module itself: the frozen tower would pass the hooks by.
        model.visual(model.normalize(model.pixels(images[part])))
        return dict(seen)

    hooks = [watch(name) for name in chosen]
    try:
        for sums in Batching(256, model.device, model.name).over(len(images), look_at):
            for name, hidden in sums.items():
                activity[name] = activity.get(name, torch.zeros_like(hidden)) + hidden
    finally:
        for handle in hooks:
            handle.remove()
    removed = {}
    for name, mlp in chosen.items():
        count = int(share * len(activity[name]))
        units = activity[name].argsort(stable=True)[:count]
        first, last = mlp.c_fc, mlp.c_proj
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        first.weight[units] = 0
        if first.bias is not None:
            first.bias[units] = 0
        last.weight[:, units] = 0
        removed[name] = sorted(int(u) for u in units)
    return removed
