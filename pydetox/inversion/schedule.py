"""The weight of the mask's size, which adapts to each trigger while the search runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CostSchedule:
    """A schedule that raises a trigger's cost while it works and lowers it while it does not.

    After `patience` successful steps in a row, the cost is multiplied by `up`. After as many
    failures in a row, it is divided by `down`. Neural Cleanse uses 1.5 and 1.5^1.5 (the default
    here). DECREE uses 5 and 5 with a patience of 6. The schedule is tensor arithmetic, so no step
    waits for the device.
    """

    initial: float = 1e-3
    patience: int = 5
    up: float = 1.5
    down: float = 1.5**1.5

    def start(self, count: int, device: torch.device) -> CostState:
        """Return the state of `count` triggers before the first step."""
        cost = torch.full((count,), self.initial, dtype=torch.float32, device=device)
        zeros = torch.zeros(count, dtype=torch.int64, device=device)
        never = torch.zeros(count, dtype=torch.bool, device=device)
        return CostState(cost, zeros, zeros.clone(), never, never.clone())

    def update(self, state: CostState, succeeded: Tensor) -> CostState:
        """Return the state after a step. succeeded: bool [K]."""
        hits = torch.where(succeeded, state.hits + 1, 0)
        misses = torch.where(succeeded, 0, state.misses + 1)
        raise_now, lower_now = hits >= self.patience, misses >= self.patience
        cost = torch.where(raise_now, state.cost * self.up, state.cost)
        cost = torch.where(lower_now, cost / self.down, cost)
        return CostState(
            cost,
            torch.where(raise_now, 0, hits),
            torch.where(lower_now, 0, misses),
            state.raised | raise_now,
            state.balanced | (state.raised & lower_now),
        )


@dataclass(frozen=True)
class CostState:
    """The state of the schedule for K triggers.

    Attributes:
        cost: float32 [K], the factor of the L1 norm.
        hits, misses: int64 [K], the number of successful and of failed steps in a row.
        raised: bool [K], whether the cost was ever raised.
        balanced: bool [K], whether it was lowered after that. Only then has the size been reduced
            until the trigger failed.
    """

    cost: Tensor
    hits: Tensor
    misses: Tensor
    raised: Tensor
    balanced: Tensor
