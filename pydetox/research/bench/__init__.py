"""The benchmark of defences: victims of every attack, every method, one table.

`plan` says what a run consists of, `lab` makes models and results and remembers them by content,
`runner` shares the work out over processes, `summary` and `outputs` say what came out.
"""

from __future__ import annotations

from .outputs import markdown, write_outputs
from .plan import Plan, quick_plan
from .runner import run
from .summary import summarize

__all__ = ["Plan", "markdown", "quick_plan", "run", "summarize", "write_outputs"]
