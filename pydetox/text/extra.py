"""Imports of what ``pydetox[text]`` brings."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import UsageError


def import_extra(package: str, name: str) -> Any:
    """Return a package of the extra `text`.

    name: The model that it is needed for. Raises UsageError if the package is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise UsageError(
            f"{name}: text models need transformers and tokenizers ({package} cannot be imported: "
            f'{error}); install them with: pip install "pydetox[text]"'
        ) from error
