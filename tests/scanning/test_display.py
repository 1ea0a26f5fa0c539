import io

import pytest

from pydetox.scanning import ScanRecord
from pydetox.scanning.display import Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(display: Display) -> None:
    display("stage", name="survey", total=2)
    display("worker-started", worker=0, pid=1)
    display("started", worker=0, name="evil\x1b]0;title\x07\nname", kind="survey")
    display("surveyed", name="a")
    display("stage", name="scan", total=2)
    display("started", worker=0, name="b.pt", kind="scan")
    display("record", record=ScanRecord("a", "clean", "because"))
    display("idle", worker=0)
    display("worker-died", worker=0, how="signal SIGKILL")
    display("something-new", what=1)
    display.log("first line\nsecond \x1b[31mline")


def test_a_pipe_gets_errors_only(capsys: pytest.CaptureFixture) -> None:
    with Display() as display:
        play(display)
    assert capsys.readouterr().err == "error: first line second \ufffd[31mline\n"


def test_a_terminal_sees_workers_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Display() as display:
        display("worker-started", worker=0, pid=1)
        display("started", worker=0, name="evil\x1b]0;title\x07\nname", kind="scan")
        display("record", record=ScanRecord("a", "backdoored", "because"))
        assert display._live is not None
        display._live.refresh()
        display.log("broken.pt: \x1b[31mbroken")
    text = terminal.getvalue()
    assert "worker 0: evil" in text
    assert "1 backdoored" in text
    assert "error: broken.pt" in text
    assert "\x1b]0;" not in text
    assert "\x1b[31m" not in text


def test_a_log_gets_a_line_while_no_task_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PYDETOX_PROGRESS_SECONDS", "1e-9")
    with Display() as display:
        display("waited")  # nothing has begun
        display("worker-started", worker=0, pid=1)
        display("stage", name="scan", total=2)
        for worker in range(5):
            display("started", worker=worker, name=f"{worker}\x1b[31m.pt", kind="scan")
        display("idle", worker=1)
        display("waited")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("scan (0\ufffd[31m.pt, ")
    assert "1\ufffd" not in lines[0]
    assert "; 1 more): 0 of 2 after " in lines[0]
