"""Drop-in replacements: other projects' interfaces, with pydetox behind them.

`TaskVector` has the interface of github.com/mlfoundations/task_vectors, `merge` runs recipes as
mergekit has them, and `ScanCallback` scans a model during a training with transformers' Trainer.
`neural_cleanse` is that of BackdoorBench, `decree` the `main` of DECREE, and `NeuralCleanse` that
of ART, for PyTorch. docs/compat.md compares them with the originals.
"""

from __future__ import annotations

from .art import CleansedClassifier, NeuralCleanse
from .backdoorbench import NeuralCleanseResult, neural_cleanse
from .encoders import DecreeResult, decree
from .mergekit import merge
from .task_vectors import TaskVector
from .trainer import ScanCallback

__all__ = [
    "CleansedClassifier",
    "DecreeResult",
    "NeuralCleanse",
    "NeuralCleanseResult",
    "ScanCallback",
    "TaskVector",
    "decree",
    "merge",
    "neural_cleanse",
]
