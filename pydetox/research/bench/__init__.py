"""The benchmark of defences: victims of every attack, every method, one table.

`plan` configures a run. `lab` makes models and results, and caches them by content. `runner`
distributes the work over processes. `summary` and `outputs` present the results.
"""

from __future__ import annotations

from .outputs import markdown, write_outputs
from .plan import Plan, quick_plan
from .runner import run
from .summary import summarize

__all__ = ["Plan", "markdown", "quick_plan", "run", "summarize", "write_outputs"]
