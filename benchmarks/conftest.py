"""Prints and writes the figures when the benchmarks are through, whether or not all bounds held."""

from __future__ import annotations

import pytest

from benchmarks.recording import FOLDER, table, write_summary


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures = write_summary()
    if figures:
        terminalreporter.section("figures")
        for line in table(figures):
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"written to {FOLDER}/summary.json")
