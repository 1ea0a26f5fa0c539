"""Image-tower adapters: what the scanner needs of a model, and nothing else."""

from __future__ import annotations

from .open_clip_model import OpenClipModel

__all__ = ["OpenClipModel"]
