"""The identity of a model that came from no file: a hash of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """Return a SHA-256, as 64 hex digits, of the names, dtypes, shapes and values of weights.

    It depends neither on the order of the tensors nor on their device or layout in memory.
    """
    hasher = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        hasher.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        hasher.update(flat.view(torch.uint8).numpy().data)
    return hasher.hexdigest()
