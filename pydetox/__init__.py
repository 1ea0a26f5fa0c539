"""Find backdoors in CLIP checkpoints, subtract them in weight space, prove the repair."""

from __future__ import annotations
