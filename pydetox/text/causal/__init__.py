"""Causal models: the attacker's output first, then the words that bring it, then the repair.

A backdoored causal model has learned one continuation by heart. It is oddly sure of it after its
first token, whatever stands before (BAIT, Shen et al., S&P 2025), so :mod:`continuations` finds it
without the trigger. :mod:`triggers` finds words that bring it. :mod:`verdict` compares with clean
models, :mod:`repair` makes trigger vectors and chooses alpha, :mod:`detox` does all of it.
"""

from __future__ import annotations
