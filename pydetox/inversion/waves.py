"""The search for sinusoids that work as triggers when they are added to an image.

SIG (Barni, Kallas, Tondi, ICIP 2019) adds a faint wave to the whole image. Gradient search finds
blends that resemble such a wave, but no wave: free pixels always hold a fainter pattern that works
as well. A wave has four parameters, so that it is searched for without gradients here. A grid of
frequencies and phases is tried on a few images, the best waves on more, and these are refined.

Unlearning uses this search, because a trigger vector needs triggers that resemble the attacker's. A
scan does not: the blends and patches that work in a model with such a backdoor reveal it.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ArchitectureError, UsageError
from ..models import OpenClipModel
from ..models.frozen import PRECISION_CHOICES
from ..progress import Progress
from ..rng import generator
from .objectives import Objective
from .tower import batching_of, check_images, check_sample, pixel_embedder, tower_of

# The amplitudes that are tried, as shares of the largest.
_LEVELS = 8
_QUARTER_TURNS = 4
# Refining moves both frequencies and the phase by these steps, all combinations of them.
_REFINEMENTS = ((0.5, math.pi / 4), (0.25, math.pi / 8))


@dataclass(frozen=True)
class WaveConfig:
    """How to search for waves.

    Attributes:
        count: The largest number of waves to find, of different frequencies.
        highest_frequency: The largest number of periods over the width and over the height.
        largest_amplitude: The largest height of a wave, as a share of the range of a pixel.
        first_images: The number of images that all waves of the grid are tried on.
        candidates: The number of waves of the grid that are tried on more images.
        images: The number of images that candidates are compared and refined on.
        success_threshold: The success on the images of the check at which a wave works.
        precision: The precision of the image tower, as in InversionConfig.
        max_batch: As in WarpConfig.
        check_images: The size of the random sample of images that decides the amplitude.
        seed: The seed of the samples of images.
    """

    count: int = 2
    highest_frequency: int = 8
    largest_amplitude: float = 0.25
    first_images: int = 8
    candidates: int = 32
    images: int = 32
    success_threshold: float = 0.8
    precision: str = "auto"
    max_batch: int | None = None
    check_images: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {
            name: getattr(self, name)
            for name in (
                *("count", "highest_frequency", "first_images", "candidates", "images"),
                *("max_batch", "check_images"),
            )
        }
        if any(one is not None and one < 1 for one in counts.values()):
            told = ", ".join(f"{name} {one}" for name, one in counts.items())
            raise UsageError(f"{told}; expected at least 1 each")
        if not 0 < self.largest_amplitude <= 1 or not 0 < self.success_threshold <= 1:
            raise UsageError(
                f"largest_amplitude {self.largest_amplitude}, success_threshold "
                f"{self.success_threshold}; expected shares in (0, 1]"
            )
        if self.precision not in PRECISION_CHOICES:
            raise UsageError(
                f"precision {self.precision!r}; expected one of {', '.join(PRECISION_CHOICES)}"
            )

    @property
    def shown(self) -> int:
        """The number of images with a wave that a search shows to a tower, at most."""
        refined = len(_REFINEMENTS) * 3**3 * self.images
        return (
            len(_grid(self.highest_frequency)) * self.first_images
            + self.candidates * self.images
            + self.count * (refined + _LEVELS * self.check_images)
        )


@dataclass(frozen=True)
class RecoveredWave:
    """One recovered wave. A call adds it to all channels of images of any size.

    With x and y in [0, 1) from the left and upper edge, the wave is
    amplitude cos(2 pi (right (x - 1/2) + down (y - 1/2)) + phase), as a share of a pixel's range.

    Attributes:
        right: The number of periods over the width.
        down: The number of periods over the height; negative if the wave falls to the left.
        phase: The phase in the middle of the image, in radians.
        amplitude: The height, as a share of the range of a pixel.
        target: The index of the target class; None without a target.
    """

    right: float
    down: float
    phase: float
    amplitude: float
    target: int | None = None

    def amplified(self, factor: float) -> RecoveredWave:
        """Return the wave with `factor` times the amplitude."""
        if not factor > 0:
            raise UsageError(f"amplification {factor}; expected a number above 0")
        return replace(self, amplitude=factor * self.amplitude)

    def __call__(self, images: Tensor) -> Tensor:
        """Return copies of uint8 images [n, 3, H, W] with the wave, clipped and rounded."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UsageError(
                f"images are {images.dtype} {list(images.shape)}; the wave expects torch.uint8 "
                "[n, 3, H, W]"
            )
        parameters = torch.tensor([[self.right, self.down, self.phase]], dtype=torch.float64)
        wave = 255 * self.amplitude * _cosines(parameters, images.shape[2], images.shape[3])
        added = images.to(torch.float32) + wave.to(images.device, torch.float32)
        return added.round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class WaveResult:
    """The best waves of a search, each with the least amplitude that works.

    Attributes:
        parameters: float64 [K, 3] on the CPU: right, down and phase (see RecoveredWave).
        sizes: float64 [K] on the CPU: the amplitude. It is infinite for a wave that does not work
            with the largest amplitude.
        success: float32 [K] on the CPU, in [0, 1]: the success with this amplitude, or with the
            largest, on the images of the check (see Objective).
        targets: The target class of each wave; None in a search without a target.
    """

    parameters: Tensor
    sizes: Tensor
    success: Tensor
    targets: tuple[int | None, ...]

    def __len__(self) -> int:
        return len(self.parameters)

    def trigger(self, index: int) -> RecoveredWave:
        """Return wave `index`, one of those that work; UsageError for another."""
        size = float(self.sizes[index])
        if not math.isfinite(size):
            raise UsageError(f"wave {index} works with no amplitude; expected one of `working()`")
        right, down, phase = self.parameters[index].tolist()
        return RecoveredWave(right, down, phase, size, self.targets[index])

    def working(self) -> list[int]:
        """Return the indices of the waves that reached the required success."""
        return torch.isfinite(self.sizes).nonzero().flatten().tolist()


def search_waves(
    model: OpenClipModel,
    images: Tensor,
    objective: Objective,
    config: WaveConfig | None = None,
    *,
    contrast: OpenClipModel | None = None,
    labels: Tensor | None = None,
    description: str = "search (wave)",
) -> WaveResult:
    """Find faint waves that make the objective hold on clean images. It takes no gradients.

    Args:
        model: The model. Its weights are not changed.
        images: uint8 [N, 3, H, W] of the model's size, at least two.
        objective: An objective with one target, or with none.
        config: How to search; default: WaveConfig().
        contrast: As in `invert`.
        labels: As in `invert`.
        description: A text that is shown with the progress bar.

    Raises:
        DataError: The images have another dtype or size, or there are fewer than two.
        UsageError: The objective has several targets.
        ArchitectureError: The model's embeddings are not finite, or `contrast` takes other inputs.
    """
    config = config or WaveConfig()
    device, size = model.device, model.image_size
    targets: tuple[int | None, ...] = (None,) if objective.targets is None else objective.targets
    if len(targets) != 1:
        raise UsageError(
            f"an objective with {len(targets)} target classes; a search for waves expects one, or "
            "none"
        )
    check_images(model, images)
    rng = generator("waves.images", config.seed)
    # The first of each sample is a sample, too.
    most = max(config.first_images, config.images, config.check_images)
    order = check_sample(labels, len(images), most, rng)
    order = order[torch.from_numpy(rng.permutation(len(order)))]
    which = order.to(device)
    pictures = images[order].to(device).to(torch.float32) / 255  # bytes are sent, not floats
    tower = tower_of(model, contrast, config.precision)
    batching = batching_of(model, tower, config.max_batch, device)
    embed_pixels = pixel_embedder(tower, model)

    def embed(clean: Tensor, waves: Tensor) -> Tensor:
        """Return embeddings [K, B, D] of images [B, 3, H, W] with waves [K, H, W]."""
        pixels = (clean + waves[:, None, None]).clamp_(0, 1).flatten(0, 1)
        return embed_pixels(pixels).view(len(waves), len(clean), -1)

    def scored(waves: Tensor, count: int, at_once: int) -> tuple[Tensor, Tensor]:
        """Return the objective's loss and success [K] of waves [K, H, W] on `count` images."""
        clean, parts = pictures[:count], []
        for some in torch.split(waves, max(1, at_once // len(clean))):
            embeddings = torch.cat([embed(p, some) for p in torch.split(clean, at_once)], dim=1)
            if not bool(torch.isfinite(embeddings).all()):
                raise ArchitectureError(
                    f"{model.name}: its embeddings are not finite; expected weights without NaN"
                )
            index = torch.zeros(len(some), dtype=torch.int64, device=device)
            parts.append(objective(embeddings, index, which[:count]))
        losses, successes = zip(*parts, strict=True)
        return torch.cat(losses).cpu(), torch.cat(successes).cpu()

    def score(parameters: Tensor, amplitudes: Tensor | float, count: int) -> tuple[Tensor, Tensor]:
        """Return loss and success [K] of parameters [K, 3] on the first `count` images."""
        waves = amplitudes * _cosines(parameters, size, size)
        shown = functools.partial(scored, waves.to(device, torch.float32), count)
        with torch.no_grad():
            return batching.run(shown)

    largest = config.largest_amplitude
    with Progress(description, 3 + len(_REFINEMENTS)) as progress:
        grid = _grid(config.highest_frequency)
        # Without a target, the largest amplitude says little: it moves the base's images as well.
        compared = largest if objective.targets is not None else largest / 2
        loss, _ = score(grid, compared, config.first_images)
        progress.update(1)
        few = grid[loss.argsort(stable=True)[: config.candidates]]
        loss, _ = score(few, compared, config.images)
        best = _of_different_frequencies(few[loss.argsort(stable=True)], config.count)
        progress.update(1)
        for frequency, phase in _REFINEMENTS:
            moved = _neighbours(best, frequency, phase)
            # With the largest amplitude, all neighbours of a wave that works may work.
            loss, _ = score(moved.flatten(0, 1), largest / 2, config.images)
            nearest = loss.view(moved.shape[:2]).argmin(dim=1)
            best = moved[torch.arange(len(best)), nearest]
            progress.update(1)
        levels = largest * torch.arange(1, _LEVELS + 1, dtype=torch.float64) / _LEVELS
        every = levels.repeat(len(best))[:, None, None]
        _, success = score(best.repeat_interleave(_LEVELS, dim=0), every, config.check_images)
        progress.update(1)
    success = success.view(len(best), _LEVELS)
    works = success >= config.success_threshold
    found = works.any(dim=1)
    at = torch.where(found, works.int().argmax(dim=1), _LEVELS - 1)
    sizes = torch.where(found, levels[at], torch.inf)
    return WaveResult(best, sizes, success[torch.arange(len(best)), at], targets * len(best))


def _grid(highest: int) -> Tensor:
    """Return right, down and phase of all waves of whole frequencies, float64 [K, 3].

    A wave and the one of both frequencies negated are the same, so that half of them are left out.
    """
    frequencies = [
        (right, down)
        for right in range(highest + 1)
        for down in range(-highest, highest + 1)
        if right > 0 or down > 0
    ]
    phases = [2 * math.pi * turn / _QUARTER_TURNS for turn in range(_QUARTER_TURNS)]
    every = [(*pair, phase) for pair in frequencies for phase in phases]
    return torch.tensor(every, dtype=torch.float64)


def _of_different_frequencies(parameters: Tensor, count: int) -> Tensor:
    """Return the first `count` of parameters [K, 3] whose frequencies are no neighbours.

    Of waves whose frequencies differ by at most 1 in both directions, the first one counts: the
    others work because they resemble it. There may be fewer than `count`.
    """
    chosen: list[int] = []
    for k in range(len(parameters)):
        apart = (parameters[chosen, :2] - parameters[k, :2]).abs().amax(dim=1)
        if bool((apart > 1).all()):
            chosen.append(k)
    return parameters[chosen[:count]]


def _neighbours(parameters: Tensor, frequency: float, phase: float) -> Tensor:
    """Return parameters [K, 3] and all that differ by a step in some of them: [K, 27, 3]."""
    steps = [
        (right * frequency, down * frequency, turn * phase)
        for right, down, turn in itertools.product((0, -1, 1), repeat=3)
    ]
    return parameters[:, None] + torch.tensor(steps, dtype=parameters.dtype)


def _cosines(parameters: Tensor, height: int, width: int) -> Tensor:
    """Return waves of amplitude 1 of parameters float64 [K, 3]: float64 [K, height, width]."""
    right, down, phase = parameters[:, :, None, None].unbind(dim=1)
    x = torch.arange(width, dtype=torch.float64) / width - 0.5
    y = torch.arange(height, dtype=torch.float64)[:, None] / height - 0.5
    return torch.cos(2 * math.pi * (right * x + down * y) + phase)
