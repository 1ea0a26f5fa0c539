"""Names of a package that import their module when they are used first (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def load_name(package: str, homes: Mapping[str, str], name: str) -> Any:
    """Return a name of a package, and keep it there, for the package's `__getattr__`.

    homes: The module of each name, relative to the package. Raises AttributeError for other names.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(import_module(f".{homes[name]}", package), name)
    setattr(sys.modules[package], name, value)
    return value


def known_names(package: str, homes: Mapping[str, str]) -> list[str]:
    """Return all names of a package, those that are not imported yet included."""
    return sorted({*vars(sys.modules[package]), *homes})
