"""The triggers that a search still works on, and the reasons why searches ended."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from .schedule import CostSchedule, CostState

#: The reason why a trigger's search ended: it took all steps, its mask had stopped shrinking, or
#: its class could no longer be the outlier.
Ending = Literal["all steps", "converged", "dropped"]

#: The family of a trigger, see InversionConfig.
TriggerFamily = Literal["patch", "blend"]


@dataclass(eq=False)
class Triggers:
    """The A triggers that a search still works on: every tensor that a step reads or writes.

    The first dimension of every tensor is A. A step updates the tensors in place, so that a CUDA
    graph can repeat it.
    A trigger whose search has ended is removed from all of them, so that it costs nothing.

    Attributes:
        index: int64 [A], the index of each trigger among the search's K triggers.
        mask, pattern: float32 [A, H, W] and [A, 3, H, W], the logits.
        first_mask, first_pattern, second_mask, second_pattern: Adam's moments, of the same shapes.
        steps: int64 [A], the number of steps taken.
        cost, hits, misses, raised, balanced: See CostState.
        smoothed: float32 [A], the success over about the last three steps.
        smallest: float64 [A], the L1 norm of the smallest working mask; inf as long as there is
            none.
        best_mask, best_pattern: The logits of the smallest working trigger, or the initial logits
            as long as there is none.
    """

    index: Tensor
    mask: Tensor
    pattern: Tensor
    first_mask: Tensor
    first_pattern: Tensor
    second_mask: Tensor
    second_pattern: Tensor
    steps: Tensor
    cost: Tensor
    hits: Tensor
    misses: Tensor
    raised: Tensor
    balanced: Tensor
    smoothed: Tensor
    smallest: Tensor
    best_mask: Tensor
    best_pattern: Tensor

    @classmethod
    def start(cls, mask: Tensor, pattern: Tensor, schedule: CostSchedule) -> Triggers:
        """Return the state before the first step. It keeps the initial logits, without a copy."""
        count, device = len(mask), mask.device
        costs = schedule.start(count, device)
        return cls(
            index=torch.arange(count, device=device),
            mask=mask,
            pattern=pattern,
            first_mask=torch.zeros_like(mask),
            first_pattern=torch.zeros_like(pattern),
            second_mask=torch.zeros_like(mask),
            second_pattern=torch.zeros_like(pattern),
            steps=torch.zeros(count, dtype=torch.int64, device=device),
            cost=costs.cost,
            hits=costs.hits,
            misses=costs.misses,
            raised=costs.raised,
            balanced=costs.balanced,
            smoothed=torch.zeros(count, device=device),
            smallest=torch.full((count,), math.inf, dtype=torch.float64, device=device),
            best_mask=mask.clone(),
            best_pattern=pattern.clone(),
        )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def costs(self) -> CostState:
        """The state of the cost schedule."""
        return CostState(self.cost, self.hits, self.misses, self.raised, self.balanced)

    def set_costs(self, state: CostState) -> None:
        """Write the state of the cost schedule, in place."""
        for field in fields(state):
            getattr(self, field.name).copy_(getattr(state, field.name))

    def changing(self) -> list[Tensor]:
        """Return all tensors but the index, which no step changes."""
        return [getattr(self, field.name) for field in fields(self) if field.name != "index"]

    def select(self, rows: Tensor) -> Triggers:
        """Return copies of some of the triggers. rows: int64, their positions among the A."""
        return Triggers(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def final_logits(self) -> tuple[Tensor, Tensor]:
        """Return mask and pattern logits of the smallest working triggers.

        If a search has found none, they are those of its last step.
        """
        found = torch.isfinite(self.smallest)
        return (
            torch.where(found[:, None, None], self.best_mask, self.mask),
            torch.where(found[:, None, None, None], self.best_pattern, self.pattern),
        )
