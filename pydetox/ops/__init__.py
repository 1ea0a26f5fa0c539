"""Fused operators with native kernels, typed, differentiable and known to torch.compile.

Importing this package loads the native libraries; `NativeLibraryError` if they are missing or do
not fit this torch.
"""

from __future__ import annotations

from pydetox.ops._library import cpu_capability, cuda_library_loaded
from pydetox.ops.stamp import TriggerGradients, stamp_triggers, stamp_triggers_gradients
from pydetox.ops.weights import (
    apply_task_vectors,
    weight_diff_gram,
    weight_diff_project,
    weight_diff_sketch,
)

__all__ = [
    "TriggerGradients",
    "apply_task_vectors",
    "cpu_capability",
    "cuda_library_loaded",
    "stamp_triggers",
    "stamp_triggers_gradients",
    "weight_diff_gram",
    "weight_diff_project",
    "weight_diff_sketch",
]
