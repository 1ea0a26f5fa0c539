"""Reports: one HTML file, text tables for the terminal, and JSON for other programs."""

from __future__ import annotations

from .detox import detox_report, write_detox_report
from .serialize import to_json, to_plain
from .terminal import print_text, render_text

__all__ = [
    "detox_report",
    "print_text",
    "render_text",
    "to_json",
    "to_plain",
    "write_detox_report",
]
