"""Research on causal models: a small one to start from, attacks, victims, and the benchmark."""

from __future__ import annotations
