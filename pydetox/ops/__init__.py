"""Fused operators with native kernels, typed, differentiable and known to torch.compile.

Importing this package loads the native libraries; `NativeLibraryError` if they are missing or do
not fit this torch.
"""

from __future__ import annotations

from pydetox.ops._library import cpu_capability, cuda_library_loaded
from pydetox.ops.objectives import embedding_collapse, zero_shot_loss
from pydetox.ops.stamp import TriggerGradients, stamp_triggers, stamp_triggers_gradients
from pydetox.ops.tokens import (
    TokenMixture,
    mix_tokens,
    mix_tokens_forward,
    mix_tokens_update,
    top_swaps,
)
from pydetox.ops.update import BestTriggers, trigger_update
from pydetox.ops.weights import (
    apply_task_vectors,
    weight_diff_gram,
    weight_diff_matmul,
    weight_diff_project,
    weight_diff_sketch,
)

__all__ = [
    "BestTriggers",
    "TokenMixture",
    "TriggerGradients",
    "apply_task_vectors",
    "cpu_capability",
    "cuda_library_loaded",
    "embedding_collapse",
    "mix_tokens",
    "mix_tokens_forward",
    "mix_tokens_update",
    "stamp_triggers",
    "stamp_triggers_gradients",
    "top_swaps",
    "trigger_update",
    "weight_diff_gram",
    "weight_diff_matmul",
    "weight_diff_project",
    "weight_diff_sketch",
    "zero_shot_loss",
]
