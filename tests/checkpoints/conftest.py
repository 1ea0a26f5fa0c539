"""What the checkpoint tests share: a mini CLIP, and the zip writer as fixtures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from tests.checkpoints.zip_writer import Member, torch_members, zip_bytes

MINI_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 16,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 64,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


@pytest.fixture
def mini_config() -> dict[str, Any]:
    """The configuration of :func:`mini_clip`."""
    return copy.deepcopy(MINI_CONFIG)


@pytest.fixture(scope="session")
def mini_clip() -> torch.nn.Module:
    """A CLIP of open_clip with a few thousand weights."""
    torch.manual_seed(0)
    return open_clip.CLIP(**copy.deepcopy(MINI_CONFIG))


@pytest.fixture
def write_pt(tmp_path: Path) -> Callable[..., Path]:
    """Write a ``.pt`` around a pickle: ``write_pt(pickle_bytes, {"0": storage},
    **zip_options)``.
    """

    def write(
        pickle_bytes: bytes, storages: dict[str, bytes] | None = None, **options: Any
    ) -> Path:
        path = tmp_path / "file.pt"
        path.write_bytes(zip_bytes(torch_members(pickle_bytes, storages), **options))
        return path

    return write


@pytest.fixture
def make_zip() -> Callable[..., bytes]:
    """The function :func:`zip_bytes`."""
    return zip_bytes


@pytest.fixture
def make_members() -> Callable[..., list[Member]]:
    """The function :func:`torch_members`."""
    return torch_members


@pytest.fixture
def member() -> type[Member]:
    """The class :class:`Member`."""
    return Member
