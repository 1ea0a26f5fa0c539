"""Progress: a bar on a terminal, a line now and then elsewhere, never on stdout."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pydetox.progress import Progress, track


def terminal() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=100), stream


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_draws_on_stderr_when_that_is_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    assert list(track([1, 2, 3], "Counting")) == [1, 2, 3]
    assert "Counting" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("force_color", [None, "1"])
def test_quiet_in_a_pipe(
    force_color: str | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if force_color:
        monkeypatch.setenv("FORCE_COLOR", force_color)
    assert list(track(range(5), "Counting")) == [0, 1, 2, 3, 4]
    with Progress("Working", total=3) as progress:
        progress.update(3)
        progress.set_description("Still working")
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_a_line_every_thirty_seconds_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr("pydetox.progress.time.monotonic", lambda: now)
    with Progress("Inverting\x1b[31m", total=200) as progress:
        for _ in range(10):
            now += 10
            progress.update(5)
        progress.set_description("Second stage")
        now += 10
        progress.update(5)
        now += 10
        progress.update(5)
    with Progress("No total") as progress:
        now += 31
        progress.update(2)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "Inverting\ufffd[31m: 15 of 200 after 30 s, 0.5/s, about 370 s left",
        "Inverting\ufffd[31m: 30 of 200 after 60 s, 0.5/s, about 340 s left",
        "Inverting\ufffd[31m: 45 of 200 after 90 s, 0.5/s, about 310 s left",
        "Second stage: 60 of 200 after 120 s, 0.5/s, about 280 s left",
        "No total: 2 after 31 s, 0.065/s",
    ]


def test_bar_shows_description_count_rate_and_time_left() -> None:
    console, stream = terminal()
    with Progress("Inverting [b]", total=200, console=console) as progress:
        progress.update(50)
        progress.update()
        progress.set_description("Second stage")
    drawn = stream.getvalue()
    assert "Second stage" in drawn
    assert "51/200" in drawn
    assert "/s" in drawn


def test_description_is_not_markup() -> None:
    console, stream = terminal()
    with Progress("a [red]file[/red] name", console=console):
        pass
    assert "[red]" in stream.getvalue()


def test_two_bars_at_once_and_one_after_the_other() -> None:
    console, stream = terminal()
    with (
        Progress("outer", total=2, console=console) as outer,
        Progress("inner", total=5, console=console) as inner,
    ):
        inner.update(5)
        outer.update()
    with Progress("again", console=console) as again:
        again.update()
    assert "1/2" in stream.getvalue()
    assert "1/?" in stream.getvalue()


def test_the_bar_is_taken_down_after_an_error() -> None:
    console, stream = terminal()
    with pytest.raises(RuntimeError, match="stop"), Progress("failing", console=console):
        raise RuntimeError("stop")
    assert stream.getvalue().endswith("\x1b[2K") or "\x1b[?25h" in stream.getvalue()


def test_track_takes_generators_and_stops_early() -> None:
    taken = []
    for item in track((i for i in range(10)), "Generator", total=10):
        taken.append(item)
        if item == 2:
            break
    assert taken == [0, 1, 2]
    assert list(track([], "Nothing")) == []
