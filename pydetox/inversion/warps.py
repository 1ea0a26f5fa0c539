"""The search for smooth warps that work as triggers. K warps are optimised together.

Some triggers add nothing to an image and only move its pixels a little (WaNet, Nguyen and Tran,
ICLR 2021). A patch or a blend cannot imitate them. Here, each trigger is a field of offsets that is
enlarged smoothly from a coarse grid of control points. The mean size of the offsets replaces that
of the mask.

Unlearning uses these searches, because a trigger vector needs triggers that resemble the
attacker's. A scan does not: the patches and blends that work in a model with a warp backdoor reveal
it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from ..errors import ArchitectureError, UsageError
from ..models import OpenClipModel
from ..models.frozen import PRECISION_CHOICES
from ..progress import Progress
from ..rng import generator
from .objectives import Objective
from .schedule import CostSchedule
from .tower import batching_of, check_images, check_sample, chunks, pixel_embedder, tower_of


@dataclass(frozen=True)
class WarpConfig:
    """How to search for warps.

    Attributes:
        steps: The number of Adam's steps.
        batch_size: The number of clean images per step. All warps share them.
        control_points: G, the side of the G x G grid that a field is enlarged from bicubically.
        learning_rate: Adam's rate on the control points, in pixels.
        betas: Adam's decay rates.
        initial_offset: The standard deviation of the initial control points, in pixels.
        schedule: The schedule of the weight of the field's size. The size is half the sum of the
            absolute offsets in pixels, over both coordinates of all pixels.
        success_threshold: The success, smoothed over about three steps, at which a warp works. An
            attacker's own warp hardly ever works on all images.
        precision: The precision of the image tower, as in InversionConfig.
        max_batch: The number of warped images that pass through the tower at once; None as in
            InversionConfig.
        check_images: The size of the random sample of images for the check after the search.
        seed: The seed of the initial control points and the order of the images.
    """

    steps: int = 150
    batch_size: int = 16
    control_points: int = 4
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.5, 0.9)
    initial_offset: float = 0.3
    schedule: CostSchedule = field(default_factory=CostSchedule)
    success_threshold: float = 0.8
    precision: str = "auto"
    max_batch: int | None = None
    check_images: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size, self.check_images, self.max_batch or 1)
        if min(counts) < 1 or self.max_batch == 0 or self.control_points < 2:
            raise UsageError(
                f"steps {self.steps}, batch_size {self.batch_size}, max_batch {self.max_batch}, "
                f"check_images {self.check_images}, control_points {self.control_points}; expected "
                "at least 1 each and 2 control points"
            )
        if not self.learning_rate > 0 or not self.initial_offset >= 0:
            raise UsageError(
                f"learning_rate {self.learning_rate}, initial_offset {self.initial_offset}; "
                "expected a rate above 0 and an offset of at least 0"
            )
        if not 0 < self.success_threshold <= 1:
            raise UsageError(f"success_threshold {self.success_threshold}; expected (0, 1]")
        if self.precision not in PRECISION_CHOICES:
            raise UsageError(
                f"precision {self.precision!r}; expected one of {', '.join(PRECISION_CHOICES)}"
            )


@dataclass(frozen=True, eq=False)
class RecoveredWarp:
    """One recovered warp. A call warps images with it.

    Attributes:
        offsets: float32 [2, H, W] in pixels: how far to the right and how far below each pixel is
            read. Reading is bilinear. Outside the image, its edge is read.
        target: The index of the target class; None without a target.
    """

    offsets: Tensor
    target: int | None = None

    def amplified(self, factor: float) -> RecoveredWarp:
        """Return the warp with all its offsets multiplied by `factor`."""
        if not factor > 0:
            raise UsageError(f"amplification {factor}; expected a number above 0")
        return replace(self, offsets=factor * self.offsets)

    def __call__(self, images: Tensor) -> Tensor:
        """Return warped copies of uint8 images [n, 3, H, W], rounded to uint8."""
        if images.dtype != torch.uint8 or images.shape[2:] != self.offsets.shape[1:]:
            raise UsageError(
                f"images are {images.dtype} {list(images.shape)}; the warp expects torch.uint8 "
                f"[n, 3, {', '.join(map(str, self.offsets.shape[1:]))}]"
            )
        warped = _warp(images.to(torch.float32), self.offsets.to(images.device)[None])[0]
        return warped.round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class WarpResult:
    """The smallest working warp of each of K searches.

    Attributes:
        offsets: float32 [K, 2, H, W] on the CPU, in pixels (see RecoveredWarp).
        sizes: float64 [K] on the CPU: the mean absolute offset in pixels. It is infinite for a
            search that never succeeded, whose offsets are those of the last step.
        success: float32 [K] on the CPU, in [0, 1]: the success on the images of the check after the
            search (see Objective).
        targets: The target class of each warp.
    """

    offsets: Tensor
    sizes: Tensor
    success: Tensor
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.offsets)

    def trigger(self, index: int) -> RecoveredWarp:
        """Return warp `index`, 0..K-1."""
        return RecoveredWarp(self.offsets[index], self.targets[index])

    def working(self) -> list[int]:
        """Return the indices of the warps that reached the required success."""
        return torch.isfinite(self.sizes).nonzero().flatten().tolist()


def invert_warps(
    model: OpenClipModel,
    images: Tensor,
    objective: Objective,
    config: WarpConfig | None = None,
    *,
    contrast: OpenClipModel | None = None,
    labels: Tensor | None = None,
    description: str = "inversion (warp)",
) -> WarpResult:
    """Find small warps that make the objective hold on clean images.

    Args:
        model: The model. Its weights are not changed.
        images: uint8 [N, 3, H, W] of the model's size, at least two.
        objective: An objective with K targets, one per search.
        config: How to search; default: WarpConfig().
        contrast: As in `invert`.
        labels: As in `invert`.
        description: A text that is shown with the progress bar.

    Raises:
        DataError: The images have another dtype or size, or there are fewer than two.
        UsageError: The objective has no targets.
        ArchitectureError: The model's embeddings are not finite, or `contrast` takes other inputs.
    """
    config = config or WarpConfig()
    size, targets, device = model.image_size, objective.targets, model.device
    if not targets:
        raise UsageError("a search for warps needs an objective with target classes")
    check_images(model, images)
    count, side = len(targets), config.control_points
    rng = generator("warps.start", config.seed)
    first = rng.standard_normal((count, 2, side, side), dtype=np.float32)
    control = torch.from_numpy(first).mul_(config.initial_offset).to(device).requires_grad_()
    batch = min(config.batch_size, len(images))
    passes = -(-config.steps * batch // len(images))
    order = np.concatenate([rng.permutation(len(images)) for _ in range(passes)])
    batches = torch.from_numpy(order[: config.steps * batch].reshape(config.steps, batch))

    tower = tower_of(model, contrast, config.precision)
    batching = batching_of(model, tower, config.max_batch, device)
    embed_pixels = pixel_embedder(tower, model)

    def embed(clean: Tensor, fields: Tensor) -> Tensor:
        """Return embeddings [K, B, D]."""
        pixels = _warp(clean.to(torch.float32), fields).flatten(0, 1)
        return embed_pixels(pixels / 255).view(len(fields), len(clean), -1)

    optimizer = torch.optim.Adam([control], lr=config.learning_rate, betas=config.betas)
    costs = config.schedule.start(count, device)
    index = torch.arange(count, device=device)
    smoothed = torch.zeros(count, device=device)
    smallest = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
    best = control.detach().clone()

    def pull_on(
        clean: Tensor, fields: Tensor, which: Tensor, at_once: int
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of the objective's loss for fields [K, 2, H, W], and the success."""
        fields = fields.detach().requires_grad_()
        if len(clean) <= at_once:
            loss, success = objective(embed(clean, fields), which)
            return torch.autograd.grad(loss.sum(), fields)[0], success
        # More images than fit: the loss needs all embeddings, so they are computed once without
        # activations, and again, part by part, to carry its gradient back.
        parts = chunks(len(clean), at_once)
        with torch.no_grad():
            embeddings = torch.cat([embed(clean[part], fields) for part in parts], dim=1)
        loss, success = objective(embeddings.requires_grad_(), which)
        (pull,) = torch.autograd.grad(loss.sum(), embeddings)
        total = torch.zeros_like(fields)
        for part in parts:
            again = embed(clean[part], fields)
            total += torch.autograd.grad(again, fields, pull[:, part])[0]
        return total, success

    def gradients(clean: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
        """Return the gradient of all control points, and the success [K]."""
        gradient, successes = torch.empty_like(control), []
        # Warps do not see each other: a chunk's activations are freed before the next one's.
        for which in torch.split(index, max(1, at_once // batch)):
            part = control[which]
            fields = _fields(part, size)
            pull, success = pull_on(clean, fields, which, at_once)
            amount = costs.cost[which] * fields.abs().sum(dim=(1, 2, 3)) / 2
            (gradient[which],) = torch.autograd.grad((fields, amount.sum()), part, (pull, None))
            successes.append(success)
        return gradient, torch.cat(successes)

    pictures, batches = images.to(device), batches.to(device)
    with Progress(description, config.steps) as progress:
        for step in range(config.steps):
            clean = pictures[batches[step]]
            gradient, success = batching.run(functools.partial(gradients, clean))
            smoothed = success if step == 0 else 0.7 * smoothed + 0.3 * success
            with torch.no_grad():
                sizes = _sizes(_fields(control, size))
                better = (smoothed >= config.success_threshold) & (sizes < smallest)
                smallest = torch.where(better, sizes, smallest)
                best = torch.where(better[:, None, None, None], control, best)
            costs = config.schedule.update(costs, success >= config.success_threshold)
            control.grad = gradient
            optimizer.step()
            progress.update(1)
    found = torch.isfinite(smallest)[:, None, None, None]
    fields = _fields(torch.where(found, best, control.detach()), size)
    checked = check_sample(
        labels, len(images), config.check_images, generator("warps.check", config.seed)
    )
    check, rates = pictures[checked.to(device)], []

    def embed_all(k: int, at_once: int) -> Tensor:
        """Return embeddings [1, n, D] of all images of the check under one warp."""
        return torch.cat([embed(p, fields[k : k + 1]) for p in torch.split(check, at_once)], dim=1)

    with torch.no_grad():
        for k in range(count):
            embeddings = batching.run(functools.partial(embed_all, k))
            if not bool(torch.isfinite(embeddings).all()):
                raise ArchitectureError(
                    f"{model.name}: its embeddings are not finite; expected weights without NaN"
                )
            rates.append(objective(embeddings, torch.tensor([k], device=device))[1])
    return WarpResult(fields.cpu(), smallest.cpu(), torch.cat(rates).cpu(), targets)


def _fields(control: Tensor, size: int) -> Tensor:
    """Return offsets [K, 2, size, size] of control points [K, 2, G, G], both in pixels."""
    return interpolate(control, size=size, mode="bicubic", align_corners=True)


def _sizes(fields: Tensor) -> Tensor:
    """Return the mean absolute offset of each field, float64 [K]."""
    return fields.abs().double().mean(dim=(1, 2, 3))


def _warp(images: Tensor, fields: Tensor) -> Tensor:
    """Return float32 images [B, 3, H, W] read at offsets [K, 2, H, W]: [K, B, 3, H, W]."""
    count, (height, width) = len(fields), images.shape[2:]
    rows = torch.linspace(-1, 1, height, dtype=fields.dtype, device=fields.device)
    columns = torch.linspace(-1, 1, width, dtype=fields.dtype, device=fields.device)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    # From edge pixel to edge pixel is 2; one pixel has no neighbour to be read from.
    right, down = 2 / max(1, width - 1), 2 / max(1, height - 1)
    grid = torch.stack([x + fields[:, 0] * right, y + fields[:, 1] * down], dim=-1)
    # To a warp all channels of all images are alike: one picture of 3 B channels.
    picture = images.reshape(1, -1, height, width).expand(count, -1, -1, -1)
    warped = grid_sample(picture, grid, padding_mode="border", align_corners=True)
    return warped.view(count, *images.shape)
