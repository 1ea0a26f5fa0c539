"""Engines run workers: in this process, in processes on this machine, or on a Ray cluster."""

from __future__ import annotations

from .open import open_engine, share_out

__all__ = ["open_engine", "share_out"]
