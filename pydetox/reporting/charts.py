"""Charts as inline SVG, whose colours are CSS variables of the page (light and dark mode).

Every chart is drawn twice, for a wide and for a narrow screen: scaling one drawing would make its
text unreadable on a phone. Series differ in colour (safe for colour-blind readers), dash and
marker, and are labelled in words both at the line and in a legend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from .html import Html, text
from .values import at_most, clean_text, finite, number, percent

WIDE, NARROW = 720, 350

# Mean width of a character at the charts' 12 px text, bold and in a wide font: there is none to
# ask.
_CHARACTER = 7.3

# At most this many bars: of a thousand classes, those with the smallest masks are the ones to look
# at.
MAX_BARS = 30

MAX_MARKERS = 25

# Height of one bar and the space below it.
_ROW = 26.0

_DASHES = ("", "7 4", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Series:
    """One line.

    values: shares in [0, 1], None or NaN for a gap; short: the label at the line's end.
    """

    label: str
    values: Sequence[float | None]
    short: str


@dataclass(frozen=True)
class Bar:
    """One bar. value, reference: at least 0, or None when there is no result.

    bound: value is only known to be at most that.
    """

    label: str
    value: float | None
    reference: float | None = None
    flagged: bool = False
    bound: bool = False

    @property
    def shown(self) -> str:
        """The value in words."""
        return at_most(self.value, self.bound)


def percent_chart(
    x: Sequence[float],
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marked: float | None = None,
    marked_label: str = "",
) -> Html:
    """Return a line chart of shares, on an axis from 0 to 100%, over `x`.

    x: positions, in any order; marked: a position drawn as a labelled vertical line.
    Raises UsageError when a series has another length than `x`, or `x` has no finite value.
    """
    for line in series:
        if len(line.values) != len(x):
            raise UsageError(
                f"{title}: {len(x)} positions, but {len(line.values)} values of {line.label}"
            )
    order = sorted((i for i in range(len(x)) if math.isfinite(x[i])), key=lambda i: x[i])
    if not order:
        raise UsageError(f"{title}: no finite position to draw")
    positions = [float(x[i]) for i in order]
    ordered = [Series(s.label, [finite(s.values[i]) for i in order], s.short) for s in series]

    def draw(width: int) -> str:
        return _draw_lines(
            width, positions, ordered, title, x_label, y_label, finite(marked), marked_label
        )

    entries = [(_line_swatch(slot), line.label) for slot, line in enumerate(series)]
    return _figure(draw, entries)


def bar_chart(
    bars: Sequence[Bar],
    *,
    title: str,
    x_label: str,
    value_label: str,
    reference_label: str = "",
    threshold: float | None = None,
    threshold_label: str = "threshold",
    maximum: float | None = None,
) -> Html:
    """Return horizontal bars from 0, one per row, with values at their ends.

    threshold: drawn as a labelled vertical line. maximum: a value the axis reaches at least, to
    make several charts comparable. Of more than MAX_BARS bars, the smallest are shown (a flagged
    one always), in order, and a caption says so.
    """
    shown, caption = list(bars), ""
    if len(bars) > MAX_BARS:
        ranked = sorted(bars, key=lambda bar: (not bar.flagged, _size(bar)))
        shown = sorted(ranked[:MAX_BARS], key=_size)
        caption = f"The {MAX_BARS} smallest of {len(bars)}, in order."

    def draw(width: int) -> str:
        return _draw_bars(
            width, shown, title, x_label, finite(threshold), threshold_label, finite(maximum)
        )

    entries = [(_box_swatch("bar"), value_label)]
    if any(bar.flagged for bar in shown):
        entries.append((_box_swatch("bar flagged"), f"{value_label}, flagged"))
    if any(finite(bar.reference) is not None for bar in shown):
        entries.append((_reference_swatch(), reference_label))
    return _figure(draw, entries, caption)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` numbers within [low, high], 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _size(bar: Bar) -> float:
    value = finite(bar.value)
    return math.inf if value is None else value


def _figure(
    draw: Callable[[int], str], legend: Sequence[tuple[str, str]], caption: str = ""
) -> Html:
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    entries = "".join(f"<li>{swatch}{text(label)}</li>" for swatch, label in legend)
    return Html(
        f'<figure class="chart">\n<ul class="legend">{entries}</ul>\n'
        f'<div class="wide">{draw(WIDE)}</div>\n<div class="narrow">{draw(NARROW)}</div>\n'
        f"{below}</figure>"
    )


def _svg(width: int, height: float, title: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}" role="img" '
        f'aria-label="{text(title)}">\n' + "\n".join(body) + "\n</svg>"
    )


def _label(x: float, y: float, content: object, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{text(content)}</text>"
    )


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _marked_line(
    x: float, top: float, bottom: float, label: str, left: float, width: int
) -> list[str]:
    """Return a vertical line across the plot with its label above, kept within the drawing."""
    half = _width_of(label) / 2
    centre = _clamp(x, left + half, max(left + half, width - half - 2))
    return [
        _rule(x, top - 8, x, bottom, "marked"),
        _label(centre, top - 14, label, "strong", "middle"),
    ]


def _width_of(content: object) -> float:
    return _CHARACTER * len(clean_text(content))


def _clamp(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def _tick_label(value: float) -> str:
    return f"{value:.10g}"


# --- lines ---------------------------------------------------------------------------------------


def _draw_lines(
    width: int,
    x: Sequence[float],
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    marked: float | None,
    marked_label: str,
) -> str:
    ends = []
    for slot, line in enumerate(series):
        last = next((v for v in reversed(line.values) if v is not None), None)
        if last is not None:
            # On a narrow screen the plot needs the room; the legend has the names.
            name = f"{line.short} " if width > 500 else ""
            ends.append((last, slot, name + percent(last)))
    height = 340 if width > 500 else 300
    left, top, bottom = 62.0, 34.0, height - 50.0
    right = width - 16 - max((_width_of(label) for _, _, label in ends), default=0)
    drawn = [x[0], x[-1], *([] if marked is None else [marked])]
    low, high = min(drawn), max(drawn)
    if low == high:
        low, high = low - 0.5, high + 0.5

    def at_x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    def at_y(share: float) -> float:
        return bottom - _clamp(share, 0, 1) * (bottom - top)

    body = []
    for share in (0, 0.25, 0.5, 0.75, 1) if width <= 500 else (0, 0.2, 0.4, 0.6, 0.8, 1):
        body.append(_rule(left, at_y(share), right, at_y(share), "grid" if share else "axis"))
        body.append(_label(left - 8, at_y(share) + 4, f"{100 * share:.0f}%", "tick", "end"))
    for value in ticks(low, high, 8 if width > 500 else 4):
        body.append(_rule(at_x(value), top, at_x(value), bottom, "grid"))
        body.append(_label(at_x(value), bottom + 18, _tick_label(value), "tick", "middle"))
    body.append(_label((left + right) / 2, height - 10, x_label, "name", "middle"))
    middle = (top + bottom) / 2
    body.append(
        f'<text class="name" transform="translate(14 {middle:.1f}) rotate(-90)" '
        f'text-anchor="middle">{text(y_label)}</text>'
    )
    if marked is not None:
        body += _marked_line(at_x(marked), top, bottom, marked_label, left, width)
    for slot, line in enumerate(series):
        body += _draw_line(slot, line, x, at_x, at_y)
    for y, (_, slot, label) in _spread([(at_y(v), (v, s, t)) for v, s, t in ends], 15, bottom):
        body.append(_label(right + 10, y + 4, label, f"end t{slot % 4}"))
    return _svg(width, height, title, body)


def _draw_line(
    slot: int,
    line: Series,
    x: Sequence[float],
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
) -> list[str]:
    body = []
    for run in _runs(x, line.values):
        path = " ".join(f"{at_x(position):.1f},{at_y(share):.1f}" for position, share in run)
        body.append(
            f'<polyline class="line s{slot % 4}" stroke-dasharray="{_DASHES[slot % 4]}" '
            f'points="{path}"/>'
        )
    points = [(p, v) for p, v in zip(x, line.values, strict=True) if v is not None]
    # More markers would hide the line; the last point keeps one for its label.
    for position, share in points if len(points) <= MAX_MARKERS else points[-1:]:
        hint = f"<title>{text(line.label)}: {percent(share)} at {_tick_label(position)}</title>"
        body.append(_marker(slot, at_x(position), at_y(share), hint))
    return body


def _runs(x: Sequence[float], values: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    """Cut a line at its gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for position, value in zip(x, values, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((position, value))
    return [run for run in runs if len(run) > 1]


def _spread(
    labels: list[tuple[float, tuple[float, int, str]]], gap: float, lowest: float
) -> list[tuple[float, tuple[float, int, str]]]:
    """Move labels apart vertically until none overlap, none below `lowest`."""
    placed: list[tuple[float, tuple[float, int, str]]] = []
    limit = lowest
    for y, item in sorted(labels, key=lambda entry: (-entry[0], entry[1][1])):
        y = min(y, limit)
        placed.append((y, item))
        limit = y - gap
    return placed


def _marker(slot: int, x: float, y: float, hint: str = "") -> str:
    kind = f'class="mark s{slot % 4}"'
    if slot % 4 == 0:
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="4">{hint}</circle>'
    shapes: dict[int, list[tuple[float, float]]] = {
        1: [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        2: [(0, -5), (5, 4), (-5, 4)],
        3: [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)],
    }
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[slot % 4])
    return f'<polygon {kind} points="{points}">{hint}</polygon>'


def _line_swatch(slot: int) -> str:
    return (
        '<svg width="34" height="14" aria-hidden="true">'
        f'<line class="line s{slot % 4}" stroke-dasharray="{_DASHES[slot % 4]}" '
        f'x1="1" y1="7" x2="33" y2="7"/>{_marker(slot, 17, 7)}</svg>'
    )


# --- bars ----------------------------------------------------------------------------------------


def _draw_bars(
    width: int,
    bars: Sequence[Bar],
    title: str,
    x_label: str,
    threshold: float | None,
    threshold_label: str,
    maximum: float | None,
) -> str:
    top = 30.0
    bottom = top + _ROW * len(bars) + 4
    height = bottom + 48
    left = 14 + min(max((_width_of(bar.label) for bar in bars), default=0), 0.34 * width)
    right = width - 66.0  # fixed, room for a number: charts with one `maximum` get one scale
    known = [v for bar in bars for v in (finite(bar.value), finite(bar.reference)) if v is not None]
    largest = 1.04 * max([*known, threshold or 0.0, maximum or 0.0]) or 1.0

    def at_x(value: float) -> float:
        return left + _clamp(value / largest, 0, 1) * (right - left)

    body = []
    for tick in ticks(0, largest, 6 if width > 500 else 3):
        body.append(_rule(at_x(tick), top, at_x(tick), bottom, "grid" if tick else "axis"))
        body.append(_label(at_x(tick), bottom + 16, _tick_label(tick), "tick", "middle"))
    rows = [_draw_bar(bar, left, top + _ROW * i + 4, width, at_x) for i, bar in enumerate(bars)]
    body += [shape for shapes, _ in rows for shape in shapes]
    if threshold is not None:
        label = f"{threshold_label} {number(threshold)}"
        body += _marked_line(at_x(threshold), top, bottom, label, left, width)
    body += [ending for _, ending in rows]  # above the threshold line, to stay readable
    # Under the whole drawing: on a phone the plot alone is too narrow for it.
    body.append(_label(width / 2, height - 8, x_label, "name", "middle"))
    return _svg(width, height, title, body)


def _draw_bar(
    bar: Bar, left: float, y: float, width: int, at_x: Callable[[float], float]
) -> tuple[list[str], str]:
    """Return the shapes of one row, and the text at the bar's end."""
    flagged = " flagged" if bar.flagged else ""
    name, room = clean_text(bar.label), int((left - 14) / _CHARACTER)
    short = name if len(name) <= room else name[: max(1, room - 1)] + "…"
    hint = f"<title>{text(bar.label)}: {_bar_text(bar)}</title>"
    body = [
        f'<text class="tick{flagged}" x="{left - 8:.1f}" y="{y + 14:.1f}" '
        f'text-anchor="end">{text(short)}{hint}</text>'
    ]
    value, reference = finite(bar.value), finite(bar.reference)
    end = left if value is None else at_x(value)
    if value is not None:
        body.append(
            f'<rect class="bar{flagged}" x="{left:.1f}" y="{y:.1f}" '
            f'width="{max(1.0, end - left):.1f}" height="{_ROW - 8:g}">{hint}</rect>'
        )
    ending = _bar_text(bar)
    if reference is not None:
        at = at_x(reference)
        body.append(_rule(at, y - 2, at, y + _ROW - 6, "reference"))
        # The text goes behind the bar, or behind the reference where they would collide.
        if end - 2 <= at <= end + 10 + _width_of(ending):
            end = at
    if end + 6 + _width_of(ending) > width:
        ending = bar.shown  # colour, bold name and legend still flag it
    return body, _label(end + 6, y + 14, ending, f"value{flagged}")


def _bar_text(bar: Bar) -> str:
    if finite(bar.value) is None:
        return "no result"
    return bar.shown + (" flagged" if bar.flagged else "")


def _box_swatch(kind: str) -> str:
    return (
        '<svg width="20" height="14" aria-hidden="true">'
        f'<rect class="{kind}" x="1" y="2" width="18" height="10"/></svg>'
    )


def _reference_swatch() -> str:
    return (
        '<svg width="12" height="14" aria-hidden="true">'
        '<line class="reference" x1="6" y1="0" x2="6" y2="14"/></svg>'
    )
