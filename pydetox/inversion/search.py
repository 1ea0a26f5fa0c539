"""The search itself: K triggers optimised together against one frozen image tower."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import ArchitectureError, DataError, UsageError
from ..models import OpenClipModel
from ..ops import stamp_triggers
from ..progress import Progress
from .adam import Adam
from .objectives import Objective
from .result import InversionResult
from .schedule import CostSchedule


@dataclass(frozen=True)
class InversionConfig:
    """How to search.

    Attributes:
        steps: Steps of Adam.
        batch_size: Clean images per step, shared by all triggers.
        learning_rate: Adam's rate on the logits, or one per equal third of the steps.
        betas: Adam's decay rates (DECREE's).
        schedule: The weight of the mask's size.
        success_threshold: A trigger works when its success, smoothed over about three steps,
            reaches this.
        initial_mask: Centre of the initial mask logits; -2 is a mask of 1.8%.
        max_batch: Stamped images that go through the tower at once; bounds memory.
        check_images: Images for the check after the search.
        seed: Of initial triggers and the order of the images.
    """

    steps: int = 200
    batch_size: int = 16
    learning_rate: float | tuple[float, float, float] = 0.1
    betas: tuple[float, float] = (0.5, 0.9)
    schedule: CostSchedule = field(default_factory=CostSchedule)
    success_threshold: float = 0.97
    initial_mask: float = -2.0
    max_batch: int = 512
    check_images: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.max_batch < 1:
            raise UsageError(
                f"steps {self.steps}, batch_size {self.batch_size}, max_batch {self.max_batch}; "
                "expected at least 1 each"
            )
        if not 0 < self.success_threshold <= 1:
            raise UsageError(f"success_threshold {self.success_threshold}; expected (0, 1]")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, 0..steps-1."""
        if isinstance(self.learning_rate, tuple):
            return self.learning_rate[min(2, 3 * step // self.steps)]
        return self.learning_rate


def invert(
    model: OpenClipModel,
    images: Tensor,
    objective: Objective,
    config: InversionConfig | None = None,
    *,
    restarts: int = 1,
    description: str = "inversion",
) -> InversionResult:
    """Find small triggers that make the objective hold on clean images.

    Minimises objective + cost * |mask|_1 for K triggers at once (METHOD of DECREE and Neural
    Cleanse; see `objectives`). The tower is frozen: no weight gets a gradient. Nothing in a step
    waits for the device.

    Args:
        model: Its weights are not changed.
        images: uint8 [N, 3, H, W] of the model's size, at least two.
        objective: Decides K if it has targets.
        config: Default InversionConfig().
        restarts: K for an objective without targets.
        description: Shown with the progress bar.

    Raises:
        DataError: Images of another type, size or number.
        ArchitectureError: The model's embeddings are not finite.
    """
    config = config or InversionConfig()
    size = model.image_size
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, size, size):
        raise DataError(
            f"images are {images.dtype} {list(images.shape)}; {model.name} expects torch.uint8 "
            f"[N, 3, {size}, {size}]"
        )
    if len(images) < 2:
        raise DataError(f"{len(images)} image; trigger inversion needs at least 2")
    count = restarts if objective.targets is None else len(objective.targets)
    if count < 1:
        raise UsageError(f"restarts is {restarts}; expected at least 1")
    start = time.perf_counter()
    device = model.device
    images = images.to(device)
    rng = np.random.Generator(np.random.PCG64([config.seed, 5]))
    mask = _normal(rng, (count, size, size), config.initial_mask, device).requires_grad_()
    pattern = _normal(rng, (count, 3, size, size), 0.0, device).requires_grad_()
    adam = Adam([mask, pattern], config.betas)
    cost = config.schedule.start(count, device)
    smoothed = torch.zeros(count, device=device)
    smallest = torch.full((count,), float("inf"), dtype=torch.float64, device=device)
    best_mask, best_pattern = mask.detach().clone(), pattern.detach().clone()
    batch = min(config.batch_size, len(images))
    batches = _batches(rng, len(images), batch, config.steps).to(device)
    chunks = _chunks(count, max(1, config.max_batch // batch))

    with Progress(description, config.steps) as progress:
        for step in range(config.steps):
            clean = images[batches[step]]
            parts = [
                _loss_and_gradients(model, clean, mask, pattern, cost.cost, objective, chunk)
                for chunk in chunks
            ]
            success, norms, *gradients = (torch.cat(part) for part in zip(*parts, strict=True))
            with torch.no_grad():
                smoothed = success if step == 0 else 0.7 * smoothed + 0.3 * success
                better = (smoothed >= config.success_threshold) & (norms < smallest)
                smallest = torch.where(better, norms, smallest)
                best_mask = torch.where(better[:, None, None], mask, best_mask)
                best_pattern = torch.where(better[:, None, None, None], pattern, best_pattern)
                cost = config.schedule.update(cost, success >= config.success_threshold)
            adam.step(gradients, config.rate(step))
            progress.update(1)

    found = torch.isfinite(smallest)
    best_mask = torch.where(found[:, None, None], best_mask, mask.detach())
    best_pattern = torch.where(found[:, None, None, None], best_pattern, pattern.detach())
    check = images[: config.check_images]
    rows = []
    with torch.no_grad():
        for chunk in _chunks(count, max(1, config.max_batch // len(check))):
            embeddings = _embed(model, check, best_mask[chunk], best_pattern[chunk])
            if not bool(torch.isfinite(embeddings).all()):
                raise ArchitectureError(
                    f"{model.name}: its embeddings are not finite; expected weights without NaN"
                )
            rows.append(objective(embeddings, chunk)[1])
    return InversionResult(
        mask_logits=best_mask,
        pattern_logits=best_pattern,
        p_l1=(smallest / (size * size)).cpu(),
        success=torch.cat(rows).cpu(),
        targets=objective.targets,
        cost=cost.cost.cpu(),
        steps=config.steps,
        seconds=time.perf_counter() - start,
        tower="open_clip module, float32",
    )


def _normal(
    rng: np.random.Generator, shape: tuple[int, ...], centre: float, device: torch.device
) -> Tensor:
    # numpy's generator: the same numbers on every platform and device.
    values = rng.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).mul_(0.5).add_(centre).to(device)


def _batches(rng: np.random.Generator, n: int, batch: int, steps: int) -> Tensor:
    """Return image indices int64 [steps, batch]: whole passes, reshuffled, no image left out."""
    passes = -(-steps * batch // n)
    order = np.concatenate([rng.permutation(n) for _ in range(passes)])
    return torch.from_numpy(order[: steps * batch].reshape(steps, batch))


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _embed(model: OpenClipModel, images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Return embeddings [K, B, D] of every trigger on every image."""
    stamped = stamp_triggers(images, mask, pattern, mean=model.mean, std=model.std)
    embeddings = model.encode_normalized(stamped.flatten(0, 1))
    return embeddings.view(*stamped.shape[:2], -1)


def _loss_and_gradients(
    model: OpenClipModel,
    images: Tensor,
    mask: Tensor,
    pattern: Tensor,
    cost: Tensor,
    objective: Objective,
    chunk: slice,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return success, |mask|_1 and the gradients of both logits for a chunk of the triggers.

    Triggers do not see each other, so a chunk's activations are freed before the next one starts:
    the memory of a step does not grow with the number of triggers.
    """
    part_mask, part_pattern = mask[chunk], pattern[chunk]
    loss, success = objective(_embed(model, images, part_mask, part_pattern), chunk)
    norms = (torch.tanh(part_mask) / 2 + 0.5).sum(dim=(1, 2), dtype=torch.float64)
    total = (loss + cost[chunk] * norms).sum()
    gradients = torch.autograd.grad(total, [part_mask, part_pattern])
    return success, norms.detach(), gradients[0], gradients[1]
