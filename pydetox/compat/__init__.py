"""Drop-in replacements: other projects' interfaces, with pydetox behind them.

`TaskVector` has the interface of github.com/mlfoundations/task_vectors, `merge` runs recipes as
mergekit has them, and `ScanCallback` scans a model during a training with transformers' Trainer.
docs/compat.md compares them with the originals.
"""

from __future__ import annotations

from .mergekit import merge
from .task_vectors import TaskVector
from .trainer import ScanCallback

__all__ = ["ScanCallback", "TaskVector", "merge"]
