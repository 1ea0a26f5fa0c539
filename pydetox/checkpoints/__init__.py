"""Reading and writing checkpoints.

A checkpoint counts as hostile, and nothing in it is ever executed. A name (:mod:`naming`) leads to
files (:mod:`identity`), on the disk or from the hub (:mod:`hub`). A separate process
(:mod:`sandbox`) indexes each file without torch and without unpickling (:mod:`safetensors_index`,
:mod:`torch_index`). Then the weights are either read in one pass that also hashes the file
(:mod:`weights`), or stay in the file and are mapped (:mod:`mapped`). :mod:`writing` writes
checkpoints atomically.

Names are imported on first use, because the sandbox and ``pydetox inspect`` run without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydetox.lazy import known_names, load_name

if TYPE_CHECKING:
    from pydetox.checkpoints.architecture import (
        check_finite,
        check_model_config,
        describe_mismatch,
        read_config,
        resolve_model,
    )
    from pydetox.checkpoints.conversion import convert_checkpoint
    from pydetox.checkpoints.identity import CheckpointIdentity, identify_checkpoint
    from pydetox.checkpoints.index import Finding
    from pydetox.checkpoints.inspection import Inspection, inspect_checkpoint
    from pydetox.checkpoints.loading import (
        Checkpoint,
        load_checkpoint,
        locate_weights,
        read_checkpoint,
    )
    from pydetox.checkpoints.naming import CheckpointReference, parse_reference
    from pydetox.checkpoints.provenance import Provenance
    from pydetox.checkpoints.writing import CHECKPOINT_FILES, save_checkpoint, save_weights

_HOME = {
    "CHECKPOINT_FILES": "writing",
    "Checkpoint": "loading",
    "CheckpointIdentity": "identity",
    "CheckpointReference": "naming",
    "Finding": "index",
    "Inspection": "inspection",
    "Provenance": "provenance",
    "check_finite": "architecture",
    "check_model_config": "architecture",
    "convert_checkpoint": "conversion",
    "describe_mismatch": "architecture",
    "identify_checkpoint": "identity",
    "inspect_checkpoint": "inspection",
    "load_checkpoint": "loading",
    "locate_weights": "loading",
    "parse_reference": "naming",
    "read_checkpoint": "loading",
    "read_config": "architecture",
    "resolve_model": "architecture",
    "save_checkpoint": "writing",
    "save_weights": "writing",
}

__all__ = [
    "CHECKPOINT_FILES",
    "Checkpoint",
    "CheckpointIdentity",
    "CheckpointReference",
    "Finding",
    "Inspection",
    "Provenance",
    "check_finite",
    "check_model_config",
    "convert_checkpoint",
    "describe_mismatch",
    "identify_checkpoint",
    "inspect_checkpoint",
    "load_checkpoint",
    "locate_weights",
    "parse_reference",
    "read_checkpoint",
    "read_config",
    "resolve_model",
    "save_checkpoint",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    return load_name(__name__, _HOME, name)


def __dir__() -> list[str]:
    return known_names(__name__, _HOME)
