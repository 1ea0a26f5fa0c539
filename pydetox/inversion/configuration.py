"""Configuration of the search for patches and blends."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import UsageError
from ..models.frozen import PRECISION_CHOICES
from .schedule import CostSchedule
from .state import TriggerFamily

#: The kinds of triggers that a search can look for, each with the centre of its initial mask
#: logits. These give masks of 1.8% and of 20%.
FAMILIES: dict[TriggerFamily, float] = {"patch": -2.0, "blend": -0.7}

#: The success that a trigger needs if the configuration names none. docs/method.md has the
#: measurements; those for the second value are in its section "In contrast to the base".
SUCCESS_THRESHOLD, CONTRAST_SUCCESS_THRESHOLD = 0.97, 0.9


@dataclass(frozen=True)
class AdvancedInversionConfig:
    """Constants of the search that you hardly ever need to change.

    Attributes:
        betas: Adam's decay rates; those of DECREE (Feng et al., CVPR 2023).
        schedule: The schedule of the weight of the mask's size.
        interval: The number of steps after which the sizes are recorded, each time. Only then does
            a search wait for the device, and only then can it end. `python
            benchmarks/bench_targeted.py` measures what this costs.
        least_progress: A search makes progress if the smallest working mask shrinks by more than
            this share (docs/method.md, "When a search ends").
        initial_mask: The centre of the initial mask logits; None for that of the family, see
            FAMILIES.
        shared_start: Whether all triggers of a search start from the same mask and pattern. What
            the start does to a trigger is then much the same for all classes of a model.
        check_images: The size of the random sample of images for the check after the search. This
            check decides no verdict.
        cuda_graph: Whether steps on a GPU become CUDA graphs (`inversion.graph`). If one cannot be
            recorded or is wrong, the search goes on without, and its result says so. It changes no
            size but by the rounding of kernels that add up in no fixed order.
    """

    betas: tuple[float, float] = (0.5, 0.9)
    schedule: CostSchedule = field(default_factory=CostSchedule)
    interval: int = 10
    least_progress: float = 0.02
    initial_mask: float | None = None
    shared_start: bool = False
    check_images: int = 128
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        if min(self.interval, self.check_images) < 1 or not 0 <= self.least_progress < 1:
            raise UsageError(
                f"interval {self.interval}, check_images {self.check_images}, least_progress "
                f"{self.least_progress}; expected at least 1 each and a share in [0, 1)"
            )


@dataclass(frozen=True)
class InversionConfig:
    """How to search for triggers.

    Attributes:
        steps: Steps of Adam, at most; see patience.
        batch_size: Clean images per step, shared by all triggers.
        learning_rate: Adam's rate on the logits, or one per equal third of the steps.
        success_threshold: A trigger works when its success, smoothed over about three steps,
            reaches this; None for 0.97, and 0.9 in a scan in contrast to a base.
        patience: Steps without progress after which a search has converged and ends, once its cost
            has been raised until the trigger failed: before that, the size is not yet pressed.
        family: What a mask may be. `patch`: any, so that small ones win. `blend`: the same value
            for all pixels, so that the faintest overlay over the whole image wins; it finds
            triggers that a small patch does not resemble (Blended, SIG, warps).
        precision: Of the image tower, `float32` or `bfloat16` (see `models.frozen`), or `auto`:
            bfloat16 on a GPU that has it, float32 on a CPU.
        max_batch: Stamped images that go through the tower at once, which bounds memory; None for
            as many as 512 MiB of activations hold, on a GPU six tenths of its free memory. Where
            memory runs out all the same, it is halved.
        seed: Of initial triggers and the order of the images.
        advanced: Constants of the search.
    """

    steps: int = 200
    batch_size: int = 16
    learning_rate: float | tuple[float, float, float] = 0.1
    success_threshold: float | None = None
    patience: int = 50
    family: TriggerFamily = "patch"
    precision: str = "auto"
    max_batch: int | None = None
    seed: int = 0
    advanced: AdvancedInversionConfig = field(default_factory=AdvancedInversionConfig)

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, 1 if self.max_batch is None else self.max_batch) < 1:
            raise UsageError(
                f"steps {self.steps}, batch_size {self.batch_size}, max_batch {self.max_batch}; "
                "expected at least 1 each"
            )
        if self.precision not in PRECISION_CHOICES:
            raise UsageError(
                f"precision {self.precision!r}; expected one of {', '.join(PRECISION_CHOICES)}"
            )
        if self.family not in FAMILIES:
            raise UsageError(f"family {self.family!r}; expected one of {', '.join(FAMILIES)}")
        if self.success_threshold is not None and not 0 < self.success_threshold <= 1:
            raise UsageError(f"success_threshold {self.success_threshold}; expected (0, 1]")
        if self.patience < 1:
            raise UsageError(f"patience {self.patience}; expected at least 1")

    @property
    def needed_success(self) -> float:
        """The success that a trigger needs to work."""
        return SUCCESS_THRESHOLD if self.success_threshold is None else self.success_threshold

    @property
    def recorded_steps(self) -> tuple[int, ...]:
        """The steps after which sizes are recorded, ascending; the last one is `steps`."""
        interval = self.advanced.interval
        return (*range(interval, self.steps, interval), self.steps)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, 0..steps-1."""
        if isinstance(self.learning_rate, tuple):
            return self.learning_rate[min(2, 3 * step // self.steps)]
        return self.learning_rate
