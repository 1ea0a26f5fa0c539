"""Progress: a bar on a terminal, nothing in a pipe, never on stdout."""

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
