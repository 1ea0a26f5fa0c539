"""Neural Cleanse as BackdoorBench and ART run it, for all classes at once.

Source: Wang et al., "Neural Cleanse" (S&P 2019). pydetox's own search (`inversion`) adapts the cost
after single steps and ends searches early. These interfaces promise the peers' schedule, which
judges whole epochs; it stands here. All classes share the batches of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import UsageError
from ..numbers import require_number, require_whole
from ..progress import Progress

#: Images that go through the network at once.
_AT_ONCE = 512
#: The factor that makes the median of absolute deviations a deviation, for a normal distribution.
_CONSISTENCY = 1.4826
#: Anomaly indices above this are outliers (Wang et al., section IV).
_OUTLIER = 2.0


@dataclass(frozen=True)
class CleanseRules:
    """How triggers are searched for.

    Attributes:
        epochs: The largest number of epochs.
        learning_rate: Adam's rate.
        initial_cost: The weight of the mask's norm at first.
        success: The accuracy of an epoch, in [0, 1], from which a trigger works.
        patience: The number of epochs in a row that change the cost.
        cost_multiplier: The cost is multiplied by it, or divided by its power 1.5.
        early_stop: Whether a search may end before the last epoch.
        early_stop_threshold: A search makes progress if the norm falls below this share.
        early_stop_patience: The number of epochs without progress after which a search ends.
        norm: 1 or 2, the norm of the mask that is pressed.
        resets: When the cost goes back to its first value: after `patience` successful epochs in a
            row with a cost of zero (BackdoorBench), or with any cost (ART).
        keeps: The mask that stands for an epoch: after its last step (BackdoorBench), or that of
            which this step computed the loss (ART).
        without: The epoch whose mask stands if no trigger works: the first (BackdoorBench) or the
            last (ART).
    """

    epochs: int = 80
    learning_rate: float = 0.1
    initial_cost: float = 1e-3
    success: float = 0.98
    patience: int = 5
    cost_multiplier: float = 2.0
    early_stop: bool = True
    early_stop_threshold: float = 0.99
    early_stop_patience: int = 25
    norm: int = 1
    resets: Literal["zero cost", "any cost"] = "zero cost"
    keeps: Literal["after", "before"] = "after"
    without: Literal["first", "last"] = "first"

    def __post_init__(self) -> None:
        for what in ("epochs", "patience", "early_stop_patience"):
            require_whole(what, getattr(self, what), 1)
        for what in (
            *("learning_rate", "initial_cost", "success"),
            *("cost_multiplier", "early_stop_threshold"),
        ):
            require_number(what, getattr(self, what))
        if self.norm not in (1, 2):
            raise UsageError(f"norm is {self.norm}; expected 1 or 2")
        if not 0 < self.success <= 1:
            raise UsageError(f"success is {self.success}; expected a share in (0, 1]")


@dataclass(eq=False)
class FoundMask:
    """The smallest working trigger into one class, and the state of its search.

    Attributes:
        target: The index of the class.
        mask: float32 [M, H, W] in [0, 1]; M is 1, or the number of channels.
        pattern: float32 [C, H, W] in [0, 1].
        smallest: The mean norm during the epoch that gave this mask; infinite if no trigger worked.
            The mask is then that of the first or of the last epoch (`CleanseRules.without`).
        epochs: The number of epochs that the search took.
        cost: The weight of the mask's norm.
        ended: Whether the search ended before the last epoch.
    """

    target: int
    mask: Tensor
    pattern: Tensor
    smallest: float = math.inf
    epochs: int = 0
    cost: float = 0.0
    ended: bool = False
    _raised: bool = False
    _lowered: bool = False
    _up: int = 0
    _down: int = 0
    _at_reset: int = 0
    _still: int = 0
    _before: float = math.inf

    def norm(self, rules: CleanseRules) -> float:
        """Return the norm of the mask."""
        return float(norm_of(self.mask[None], rules.norm))

    def judge(
        self, accuracy: float, norm: float, mask: Tensor, pattern: Tensor, rules: CleanseRules
    ) -> None:
        """Take over what an epoch found, and set the cost of the next one."""
        self.epochs += 1
        works = accuracy >= rules.success
        if works and norm < self.smallest:
            self.mask, self.pattern, self.smallest = mask, pattern, norm
        elif self.epochs == 1 or (rules.without == "last" and math.isinf(self.smallest)):
            self.mask, self.pattern = mask, pattern
        if rules.early_stop:
            if math.isfinite(self.smallest):
                stuck = self.smallest >= rules.early_stop_threshold * self._before
                self._still = self._still + 1 if stuck else 0
            self._before = min(self._before, self.smallest)
            if self._raised and self._lowered and self._still >= rules.early_stop_patience:
                self.ended = True
                return
        if works and (rules.resets == "any cost" or self.cost == 0):
            self._at_reset += 1
            if self._at_reset >= rules.patience:
                self.cost = rules.initial_cost
                self._up = self._down = 0
                self._raised = self._lowered = False
        else:
            self._at_reset = 0
        self._up, self._down = (self._up + 1, 0) if works else (0, self._down + 1)
        if self._up >= rules.patience:
            self._up, self._raised = 0, True
            self.cost *= rules.cost_multiplier
        elif self._down >= rules.patience:
            self._down, self._lowered = 0, True
            self.cost /= rules.cost_multiplier**1.5


@dataclass(frozen=True)
class Outliers:
    """Which classes have unusually small masks.

    Attributes:
        norms: |mask| of each class.
        median: Their median.
        mad: 1.4826 times the median of the absolute deviations from it.
        anomaly_index: |smallest norm - median| / mad.
        flagged: The classes with norms of at most the median and an index above 2, smallest first.
    """

    norms: tuple[float, ...]
    median: float
    mad: float
    anomaly_index: float
    flagged: tuple[int, ...]

    @property
    def backdoored(self) -> bool:
        """Whether a class is flagged."""
        return bool(self.flagged)


def cleanse(
    logits: Callable[[Tensor], Tensor],
    epoch: Callable[[int], Iterable[Tensor]],
    masks: Tensor,
    patterns: Tensor,
    rules: CleanseRules,
    *,
    targets: Sequence[int] | None = None,
    at_once: int = _AT_ONCE,
    description: str = "Neural Cleanse",
) -> list[FoundMask]:
    """Search for the smallest mask into each class.

    Args:
        logits: Maps images float32 [N, C, H, W] in [0, 1] to logits [N, K].
        epoch: Returns the batches of an epoch, float32 [B, C, H, W] in [0, 1].
        masks: The first mask logits, float32 [T, M, H, W], one per target; the mask is
            tanh(.)/2 + 1/2. M is 1, or C for a mask of its own in each channel.
        patterns: The first pattern logits, float32 [T, C, H, W].
        rules: The schedule.
        targets: The T classes; default: 0..T-1.
        at_once: The number of images that go through the network at once.
        description: A text that is shown with the progress bar.
    """
    classes = list(range(len(masks)) if targets is None else targets)
    first = [torch.tanh(x) / 2 + 0.5 for x in (masks, patterns)]
    found = [FoundMask(c, first[0][k], first[1][k]) for k, c in enumerate(classes)]
    pairs = [
        [x[k].clone().requires_grad_() for x in (masks, patterns)] for k in range(len(classes))
    ]
    for one in found:
        one.cost = rules.initial_cost
    optimizer = torch.optim.Adam(
        [x for pair in pairs for x in pair], lr=rules.learning_rate, betas=(0.5, 0.9)
    )
    with Progress(description, rules.epochs) as progress:
        for number in range(rules.epochs):
            running = [k for k, one in enumerate(found) if not one.ended]
            if not running:
                break
            seen: list[tuple[Tensor, Tensor]] = []
            before = list[tuple[Tensor, Tensor]]()
            for batch in epoch(number):
                if rules.keeps == "before":
                    before = [_shown(pairs[k]) for k in running]
                optimizer.zero_grad(set_to_none=True)
                size = max(1, at_once // len(batch))
                parts = [running[i : i + size] for i in range(0, len(running), size)]
                seen.append(_step(logits, batch, parts, pairs, found, rules))
                optimizer.step()
            accuracy, norm = (torch.stack(x).mean(dim=0).tolist() for x in zip(*seen, strict=True))
            for place, k in enumerate(running):
                mask, pattern = before[place] if before else _shown(pairs[k])
                found[k].judge(accuracy[place], norm[place], mask, pattern, rules)
            progress.update(1)
    return found


def _shown(pair: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mask and pattern in [0, 1] of their logits."""
    mask, pattern = (torch.tanh(x.detach()) / 2 + 0.5 for x in pair)
    return mask, pattern


def _step(
    logits: Callable[[Tensor], Tensor],
    batch: Tensor,
    parts: list[list[int]],
    pairs: list[list[Tensor]],
    found: list[FoundMask],
    rules: CleanseRules,
) -> tuple[Tensor, Tensor]:
    """Add up the gradients of one batch; return accuracy and norm [T] of the running searches."""
    accuracies, norms = [], []
    for part in parts:
        mask = torch.tanh(torch.stack([pairs[k][0] for k in part])) / 2 + 0.5
        pattern = torch.tanh(torch.stack([pairs[k][1] for k in part])) / 2 + 0.5
        stamped = torch.lerp(batch[None], pattern[:, None], mask[:, None])
        answers = logits(stamped.flatten(0, 1))
        wanted = torch.tensor([found[k].target for k in part], device=batch.device)
        wanted = wanted.repeat_interleave(len(batch))
        loss = cross_entropy(answers, wanted, reduction="sum") / len(batch)
        norm = norm_of(mask, rules.norm)
        cost = norm.new_tensor([found[k].cost for k in part])
        (loss + (cost * norm).sum()).backward()  # type: ignore[no-untyped-call]
        right = (answers.argmax(dim=1) == wanted).float().view(len(part), -1)
        accuracies.append(right.mean(dim=1))
        norms.append(norm.detach())
    return torch.cat(accuracies), torch.cat(norms)


def norm_of(masks: Tensor, norm: int) -> Tensor:
    """Return the norms [T] of masks [T, M, H, W], as mean over the M channels of sums (or root)."""
    channels = masks.shape[1]
    if norm == 1:
        return masks.sum(dim=(1, 2, 3)) / channels
    return (masks.square().sum(dim=(1, 2, 3)) / channels).sqrt()


def outliers(norms: Sequence[float], *, lower_middle: bool = False) -> Outliers:
    """Return which norms are unusually small (Wang et al., section IV-B).

    The median of an even number of norms is the mean of the two in the middle, or the lower one of
    them, as torch has it. Raises UsageError for fewer than three classes, among which there is no
    outlier.
    """
    if len(norms) < 3:
        raise UsageError(f"{len(norms)} classes; an outlier needs at least 3")
    values = torch.tensor(list(norms), dtype=torch.float64)

    def middle(x: Tensor) -> float:
        return float(x.quantile(0.5, interpolation="lower" if lower_middle else "midpoint"))

    median = middle(values)
    mad = _CONSISTENCY * middle((values - median).abs())
    if mad > 0:
        index = ((values - median).abs() / mad).tolist()
    else:  # more than half of all norms are equal
        index = [0.0 if v == median else math.inf for v in values.tolist()]
    order = values.argsort(stable=True).tolist()
    flagged = tuple(k for k in order if norms[k] <= median and index[k] > _OUTLIER)
    return Outliers(tuple(norms), median, mad, index[order[0]], flagged)
