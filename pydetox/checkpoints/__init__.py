"""Reading and writing checkpoints.

A checkpoint is hostile until it is read: nothing in it is ever executed. A name (:mod:`naming`)
leads to files, on the disk or from the hub (:mod:`hub`). A file is indexed without torch and
without unpickling (:mod:`safetensors_index`, :mod:`torch_index`), then its weights are read in one
pass that also hashes it (:mod:`weights`), or stay in the file and are mapped (:mod:`mapped`).
:mod:`writing` writes open_clip's layout atomically.
"""

from __future__ import annotations

from pydetox.checkpoints.architecture import (
    check_finite,
    check_model_config,
    describe_mismatch,
    read_config,
    resolve_model,
)
from pydetox.checkpoints.loading import Checkpoint, load_checkpoint, locate_weights
from pydetox.checkpoints.naming import CheckpointReference, parse_reference
from pydetox.checkpoints.provenance import Provenance
from pydetox.checkpoints.writing import CHECKPOINT_FILES, save_checkpoint, save_weights

__all__ = [
    "CHECKPOINT_FILES",
    "Checkpoint",
    "CheckpointReference",
    "Provenance",
    "check_finite",
    "check_model_config",
    "describe_mismatch",
    "load_checkpoint",
    "locate_weights",
    "parse_reference",
    "read_config",
    "resolve_model",
    "save_checkpoint",
    "save_weights",
]
