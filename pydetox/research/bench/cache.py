"""A cache of models and results by the content that decides them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

import pydetox

from ...atomic import write_file
from ...checkpoints.weights import read_safetensors
from ...data import ImageSet
from ...reporting import to_json, to_plain
from ..defenses import Defense

#: The sources that decide the weights of a base model or suspect, besides its configuration.
TRAINING_CODE = (
    "research/attacks",
    "data",
    "training.py",
    "models/open_clip_model.py",
    "research/bench/models.py",
)

#: The sources that decide CA and ASR of a model.
EVALUATION_CODE = (*TRAINING_CODE, "evaluation.py", "models", "research/bench/lab.py")

#: The sources that decide a trigger vector and its coefficient.
_VECTOR_CODE = ("repair", "session.py")

#: The sources that decide a scan.
SCAN_CODE = (*EVALUATION_CODE, "detect", "inversion", "ops", "api.py", "session.py")

#: The sources that decide a map of the disentanglement error.
XI_CODE = (*EVALUATION_CODE, "analysis/localization.py", "repair/task_vectors.py")


def defense_code(defense: Defense[Any]) -> tuple[str, ...]:
    """Return the sources that decide the result of a defence."""
    module = type(defense).__module__.rpartition(".")[2]
    folder = "research/defenses"
    own = (f"{folder}/{module}.py", f"{folder}/augmentation.py", f"{folder}/base.py")
    if module != "trigger_vectors":
        return (*EVALUATION_CODE, *own)
    scans = () if defense.needs_trigger else SCAN_CODE
    return tuple(dict.fromkeys((*EVALUATION_CODE, *own, *_VECTOR_CODE, *scans)))


@cache
def code_digest(parts: tuple[str, ...]) -> str:
    """Return a digest of the Python sources in those parts of the package, and of torch's version.

    parts: Files or folders, relative to the package. Raises FileNotFoundError for a missing one,
    because a cache without a part of the code would return outdated results.
    """
    root = Path(pydetox.__file__).parent
    absent = [part for part in parts if not (root / part).exists()]
    if absent:
        raise FileNotFoundError(f"no such source in pydetox: {', '.join(absent)}")
    digest = hashlib.sha256(torch.__version__.encode())
    files = {
        path
        for part in parts
        for path in ([root / part] if (root / part).is_file() else (root / part).rglob("*.py"))
    }
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def data_digest(images: ImageSet) -> str:
    """Return a digest of images, labels and class names."""
    digest = hashlib.sha256(images.images.numpy().tobytes())
    digest.update(b"" if images.labels is None else images.labels.numpy().tobytes())
    digest.update(json.dumps(images.class_names).encode())
    return digest.hexdigest()


def key_of(kind: str, content: Mapping[str, Any]) -> str:
    """Return a key of the content: the kind and 24 hexadecimal digits."""
    text = json.dumps(to_plain(content), sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


class Cache:
    """A folder of weights and JSON documents by key. Files appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def weights(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of a key, or None."""
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        return read_safetensors(path)[0]

    def keep_weights(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors."""
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_file(self.folder / f"{key}.safetensors", save(whole))

    def document(self, key: str) -> Any | None:
        """Return the JSON document of a key, or None."""
        path = self.folder / f"{key}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def keep_document(self, key: str, document: object) -> Any:
        """Write a JSON document and return it as it will be read."""
        text = to_json(document)
        write_file(self.folder / f"{key}.json", text + "\n")
        return json.loads(text)
