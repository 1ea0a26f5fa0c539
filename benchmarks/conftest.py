"""The option `--device`, and the figures when all is done, whether or not all bounds held."""

from __future__ import annotations

import pytest
import torch

from benchmarks.recording import folder, measure_on, table, write_summary
from pydetox.models.device import find_device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="what is measured: cpu, cuda or cuda:1")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of `--device`. The figures of a GPU are kept apart, and have no bounds here."""
    found = find_device(str(request.config.getoption("--device")))
    measure_on(found)
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures = write_summary()
    if figures:
        terminalreporter.section("figures")
        for line in table(figures):
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"written to {folder()}/summary.json")
