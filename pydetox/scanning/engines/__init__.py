"""Where the work is done: in this process, in processes of this machine, on a Ray cluster."""

from __future__ import annotations

from .open import open_engine, share_out

__all__ = ["open_engine", "share_out"]
