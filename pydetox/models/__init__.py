"""CLIP models as the scanner uses them: both towers, and a fast image tower for searches."""

from __future__ import annotations

from .open_clip_model import OpenClipModel

__all__ = ["OpenClipModel"]
