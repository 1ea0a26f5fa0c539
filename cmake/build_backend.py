"""The build backend: setuptools', which asks for torch only where the environment has none.

An isolated build would otherwise install a second torch, gigabytes of it, only to read its headers,
and not necessarily the one that pydetox is going to run with.
"""

from __future__ import annotations

from locate import find_torch
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH = (2, 10)


def _torch() -> list[str]:
    found = find_torch()
    if found is not None and tuple(map(int, found.version.split(".")[:2])) >= TORCH:
        return []
    return [f"torch>={'.'.join(map(str, TORCH))}"]


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]
