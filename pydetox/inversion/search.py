"""The search itself: K triggers optimised together against one frozen image tower."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import ArchitectureError, DataError, UsageError
from ..models import OpenClipModel
from ..models.frozen import PRECISIONS, freeze
from ..ops import stamp_triggers, stamp_triggers_gradients
from ..progress import Progress
from .adam import Adam
from .objectives import Objective
from .result import InversionResult
from .schedule import CostSchedule

# Bytes that the activations of one pass through the tower may take.
_ACTIVATIONS = 2 << 30


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
        precision: Of the image tower, `float32` or `bfloat16` (see `models.frozen`).
        max_batch: Stamped images that go through the tower at once, which bounds memory; None for
            as many as 2 GiB of activations hold.
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
    precision: str = "float32"
    max_batch: int | None = None
    check_images: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, 1 if self.max_batch is None else self.max_batch) < 1:
            raise UsageError(
                f"steps {self.steps}, batch_size {self.batch_size}, max_batch {self.max_batch}; "
                "expected at least 1 each"
            )
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"precision {self.precision!r}; expected one of {', '.join(PRECISIONS)}"
            )
        if not 0 < self.success_threshold <= 1:
            raise UsageError(f"success_threshold {self.success_threshold}; expected (0, 1]")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, 0..steps-1."""
        if isinstance(self.learning_rate, tuple):
            return self.learning_rate[min(2, 3 * step // self.steps)]
        return self.learning_rate


class InversionSearch:
    """The state of K searches, advanced step by step; `invert` is the loop around it.

    Minimises objective + cost * |mask|_1 for K triggers at once (DECREE and Neural Cleanse; see
    `objectives`). The tower is frozen: no weight gets a gradient. Nothing in a step waits for the
    device.
    """

    def __init__(
        self,
        model: OpenClipModel,
        images: Tensor,
        objective: Objective,
        config: InversionConfig,
        *,
        restarts: int = 1,
    ) -> None:
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
        self._start = time.perf_counter()
        self._model, self._objective, self._config = model, objective, config
        device = model.device
        self._images = images.to(device)
        rng = np.random.Generator(np.random.PCG64([config.seed, 5]))
        shape = (count, size, size)
        self._mask = _normal(rng, shape, config.initial_mask, device)
        self._pattern = _normal(rng, (count, 3, size, size), 0.0, device)
        self._adam = Adam([self._mask, self._pattern], config.betas)
        self._cost = config.schedule.start(count, device)
        self._smoothed = torch.zeros(count, device=device)
        self._smallest = torch.full((count,), math.inf, dtype=torch.float64, device=device)
        self._best_mask = self._mask.clone()
        self._best_pattern = self._pattern.clone()
        # What every step writes anew: a search of a thousand steps allocates these once.
        self._mask_gradient = torch.empty_like(self._mask)
        self._pattern_gradient = torch.empty_like(self._pattern)
        self._rows = torch.empty(0, device=device)
        batch = min(config.batch_size, len(images))
        self._batches = _batches(rng, len(images), batch, config.steps).to(device)
        self._tower = freeze(model.visual, config.precision, name=model.name)
        self._max_batch = config.max_batch or max(1, _ACTIVATIONS // self._tower.bytes_per_image)
        self._chunks = _chunks(count, max(1, self._max_batch // batch))
        self._steps = 0

    def step(self) -> None:
        """Take one step; at most config.steps of them."""
        config, step = self._config, self._steps
        clean = self._images[self._batches[step]]
        success = torch.cat([self._differentiate(clean, chunk) for chunk in self._chunks])
        share = torch.tanh(self._mask).div_(2).add_(0.5)
        norms = share.sum(dim=(1, 2), dtype=torch.float64)
        self._smoothed = success if step == 0 else 0.7 * self._smoothed + 0.3 * success
        better = (self._smoothed >= config.success_threshold) & (norms < self._smallest)
        self._smallest = torch.where(better, norms, self._smallest)
        self._best_mask = torch.where(better[:, None, None], self._mask, self._best_mask)
        self._best_pattern = torch.where(
            better[:, None, None, None], self._pattern, self._best_pattern
        )
        # d |mask|_1 / d logit = 2 m (1 - m)
        slope = share.mul_(1 - share).mul_(2 * self._cost.cost[:, None, None])
        self._mask_gradient += slope
        self._cost = config.schedule.update(self._cost, success >= config.success_threshold)
        self._adam.step([self._mask_gradient, self._pattern_gradient], config.rate(step))
        self._steps += 1

    def result(self) -> InversionResult:
        """Check the best triggers on more images and return them.

        Raises ArchitectureError when the model's embeddings are not finite.
        """
        found = torch.isfinite(self._smallest)
        mask = torch.where(found[:, None, None], self._best_mask, self._mask)
        pattern = torch.where(found[:, None, None, None], self._best_pattern, self._pattern)
        check = self._images[: self._config.check_images]
        success = []
        for chunk in _chunks(len(mask), max(1, self._max_batch // len(check))):
            embeddings = self._embed(check, mask[chunk], pattern[chunk])
            if not bool(torch.isfinite(embeddings).all()):
                raise ArchitectureError(
                    f"{self._model.name}: its embeddings are not finite; "
                    "expected weights without NaN"
                )
            success.append(self._objective(embeddings, chunk)[1])
        return InversionResult(
            mask_logits=mask,
            pattern_logits=pattern,
            p_l1=(self._smallest / self._model.image_size**2).cpu(),
            success=torch.cat(success).cpu(),
            targets=self._objective.targets,
            cost=self._cost.cost.cpu(),
            steps=self._steps,
            seconds=time.perf_counter() - self._start,
            tower=self._tower.description,
        )

    def _stamp(self, images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
        """Return the tower's input [K * B, ...] for every trigger on every image.

        It lies in a buffer that the next call overwrites.
        """
        tower, size = self._tower, self._model.image_size
        count, patch = len(mask) * len(images), tower.patch_size
        shape = (3, size, size) if patch is None else ((size // patch) ** 2, 3 * patch * patch)
        if len(self._rows) < count:
            self._rows = images.new_empty((count, *shape), dtype=tower.dtype)
        rows = self._rows[:count]
        model = self._model
        stamp_triggers(
            images,
            mask,
            pattern,
            mean=model.mean,
            std=model.std,
            patch_size=patch,
            out=rows.view(len(mask), len(images), *rows.shape[1:]),
        )
        return rows

    def _embed(self, images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
        """Return embeddings [K, B, D] of every trigger on every image, without gradients."""
        with torch.no_grad():
            parts = [
                self._tower(self._stamp(part, mask, pattern)).view(len(mask), len(part), -1)
                for part in torch.split(images, max(1, self._max_batch // len(mask)))
            ]
            return torch.cat(parts, dim=1)

    def _pull(
        self,
        images: Tensor,
        mask: Tensor,
        pattern: Tensor,
        rows_gradient: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of both logits, given that of the stamped images."""
        return stamp_triggers_gradients(
            rows_gradient.view(len(mask), len(images), *rows_gradient.shape[1:]),
            images,
            mask,
            pattern,
            mean=self._model.mean,
            std=self._model.std,
            patch_size=self._tower.patch_size,
            out=out,
        )

    def _differentiate(self, images: Tensor, chunk: slice) -> Tensor:
        """Write the objective's gradients for a chunk of the triggers; return their success.

        Triggers do not see each other, so a chunk's activations are freed before the next one
        starts: the memory of a step does not grow with the number of triggers.
        """
        mask, pattern = self._mask[chunk], self._pattern[chunk]
        gradients = self._mask_gradient[chunk], self._pattern_gradient[chunk]
        if len(images) <= self._max_batch:
            rows = self._stamp(images, mask, pattern).requires_grad_()
            embeddings = self._tower(rows).view(len(mask), len(images), -1)
            loss, success = self._objective(embeddings, chunk)
            (rows_gradient,) = torch.autograd.grad(loss.sum(), rows)
            self._pull(images, mask, pattern, rows_gradient, gradients)
            return success
        # More images than fit: the loss needs all embeddings, so they are computed once without
        # activations, and again, part by part, to carry its gradient back.
        embeddings = self._embed(images, mask, pattern).requires_grad_()
        loss, success = self._objective(embeddings, chunk)
        (pull,) = torch.autograd.grad(loss.sum(), embeddings)
        for total in gradients:
            total.zero_()
        for part in _chunks(len(images), self._max_batch):
            rows = self._stamp(images[part], mask, pattern).requires_grad_()
            again = self._tower(rows).view(len(mask), -1, pull.shape[-1])
            (rows_gradient,) = torch.autograd.grad(again, rows, pull[:, part])
            parts = self._pull(images[part], mask, pattern, rows_gradient)
            for total, one in zip(gradients, parts, strict=True):
                total += one
        return success


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
    search = InversionSearch(model, images, objective, config, restarts=restarts)
    with Progress(description, config.steps) as progress:
        for _ in range(config.steps):
            search.step()
            progress.update(1)
    return search.result()


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
