"""The provenance of a written checkpoint: everything that is needed to make it again."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pydetox.errors import CheckpointError, UsageError

#: The key in a safetensors file's metadata that holds a :class:`Provenance` as JSON.
METADATA_KEY = "pydetox"


def package_version() -> str:
    """Return the installed version of pydetox, or ``"0+source"`` when it is not installed."""
    try:
        return importlib.metadata.version("pydetox")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"


@dataclass(frozen=True)
class Provenance:
    """How a checkpoint was made.

    Attributes:
        method: The method, such as ``"TBAR, unknown trigger"``.
        source_name: The name of the source checkpoint, as it was given.
        source_sha256: The SHA-256 of the source's weights, as hex digits.
        scaling_coefficient: α, the factor of the trigger vector that was subtracted.
        seeds: Every seed that was used, by its purpose.
        before: The metrics of the source by name, in [0, 1] unless the name has a unit.
        after: The metrics of this checkpoint, with the names of ``before``.
        extra: Further values that JSON can hold.
        pydetox_version: The version of pydetox that wrote the checkpoint.
    """

    method: str
    source_name: str | None = None
    source_sha256: str | None = None
    scaling_coefficient: float | None = None
    seeds: Mapping[str, int] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    pydetox_version: str = field(default_factory=package_version)

    def to_json(self) -> str:
        """Return one line of JSON with sorted keys. Equal provenances give equal bytes.

        Raises:
            UsageError: A value is NaN, infinite or nothing that JSON can hold.
        """
        try:
            return json.dumps(asdict(self), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(f"provenance cannot be written as JSON: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """Read back what :meth:`to_json` wrote.

        Raises:
            CheckpointError: ``text`` is something else; it comes from a file and is not trusted.
        """
        try:
            content = json.loads(text)
            return cls(**_checked(content))
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"its provenance is damaged: {error}") from error


def _checked(content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise TypeError("not a JSON object")
    texts = ("method", "source_name", "source_sha256", "pydetox_version")
    for name in (f.name for f in fields(Provenance)):
        value = content.get(name)
        if name in texts:
            fits = isinstance(value, str) or (value is None and name.startswith("source"))
        elif name == "scaling_coefficient":
            fits = value is None or (
                isinstance(value, (int, float)) and not isinstance(value, bool)
            )
        else:
            fits = isinstance(value, dict)
        if not fits:
            raise TypeError(f"{name} is of type {type(value).__name__}")
    return content
