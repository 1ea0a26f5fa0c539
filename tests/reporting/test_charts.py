"""Charts: well-formed SVG whose geometry says what the numbers say."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree as ET

import pytest

from pydetox.errors import UsageError
from pydetox.reporting.charts import (
    MAX_BARS,
    NARROW,
    WIDE,
    Bar,
    Series,
    bar_chart,
    percent_chart,
    ticks,
)


def drawings(chart: str) -> dict[int, ET.Element]:
    """The two drawings of a chart by width; fails unless the chart is well-formed XML."""
    root = ET.fromstring(chart)
    return {int(svg.attrib["width"]): svg for svg in root.iter("svg") if svg.get("role") == "img"}


def texts(element: ET.Element) -> list[str]:
    return ["".join(t.itertext()) for t in element.iter("text")]


def of_class(element: ET.Element, tag: str, name: str) -> list[ET.Element]:
    return [e for e in element.iter(tag) if name in e.attrib.get("class", "").split()]


def line_chart(**changes: object) -> str:
    arguments: dict[str, object] = {
        "x": [0.0, 1.0, 2.0],
        "series": [
            Series("CA: clean accuracy", [1.0, 0.9, 0.5], "CA"),
            Series("ASR", [1.0, 0.5, 0.0], "ASR"),
        ],
        "title": "CA and ASR",
        "x_label": "scaling coefficient α",
        "y_label": "share of images (%)",
        "marked": 1.0,
        "marked_label": "chosen: α = 1",
    }
    arguments.update(changes)
    return percent_chart(**arguments)  # type: ignore[arg-type]


def points(line: ET.Element) -> list[tuple[float, float]]:
    pairs = [point.split(",") for point in line.attrib["points"].split()]
    return [(float(x), float(y)) for x, y in pairs]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_lines_lie_where_the_axis_says(width: int) -> None:
    svg = drawings(line_chart())[width]
    ca, asr = (points(line) for line in of_class(svg, "polyline", "line"))
    labels = dict(zip(texts(svg), svg.iter("text"), strict=True))
    y0, y100 = (float(labels[name].attrib["y"]) - 4 for name in ("0%", "100%"))
    assert asr[0][1] == pytest.approx(y100, abs=0.1)
    assert asr[2][1] == pytest.approx(y0, abs=0.1)
    assert asr[1][1] == pytest.approx((y0 + y100) / 2, abs=0.1)
    assert ca[1][1] == pytest.approx(y0 + 0.9 * (y100 - y0), abs=0.1)
    assert y100 < y0
    mark = of_class(svg, "line", "marked")[0]
    assert float(mark.attrib["x1"]) == pytest.approx(ca[1][0], abs=0.1)
    assert {"scaling coefficient α", "share of images (%)", "chosen: α = 1"} <= set(labels)


def test_everything_stays_inside_the_drawing() -> None:
    series = [
        Series("a", [0.5, 0.3], "ASR recovered"),
        Series("b", [0.1, 0.0], "ASR true"),
        Series("c", [0.1, 0.0], "CA"),
        Series("d", [0.1, 0.0], "other"),
    ]
    chart = line_chart(x=[0, 3], series=series, marked=0.0, marked_label="chosen: α = 0.000")
    for width, svg in drawings(chart).items():
        height = float(svg.attrib["height"])
        for label in svg.iter("text"):
            if "x" not in label.attrib:
                continue
            x, y = float(label.attrib["x"]), float(label.attrib["y"])
            half = {"start": (0, 1), "middle": (0.5, 0.5), "end": (1, 0)}[
                label.attrib["text-anchor"]
            ]
            size = 6 * len("".join(label.itertext()))
            assert x - half[0] * size >= 0, (width, label.text)
            assert x + half[1] * size <= width, (width, label.text)
            assert 8 <= y <= height
        ends = sorted(float(e.attrib["y"]) for e in of_class(svg, "text", "end"))
        assert len(ends) == 4
        assert all(b - a >= 14.9 for a, b in itertools.pairwise(ends))


def test_series_differ_without_colour_and_are_named() -> None:
    chart = line_chart()
    svg = drawings(chart)[WIDE]
    dashes = {line.attrib["stroke-dasharray"] for line in of_class(svg, "polyline", "line")}
    assert len(dashes) == 2
    assert len(of_class(svg, "circle", "mark")) == 3
    assert len(of_class(svg, "polygon", "mark")) == 3
    assert {"CA 50.0%", "ASR 0.0%"} <= set(texts(svg))
    legend = ["".join(entry.itertext()) for entry in ET.fromstring(chart).iter("li")]
    assert legend == ["CA: clean accuracy", "ASR"]
    assert "ASR: 50.0% at 1" in ["".join(t.itertext()) for t in svg.iter("title")]


def test_gaps_break_the_line_and_order_does_not_matter() -> None:
    gap = Series("a", [None, 0.1, math.nan, 0.3, 0.4], "a")
    svg = drawings(line_chart(x=[4, 3, 2, 1, 0], series=[gap], marked=None))[WIDE]
    lines = of_class(svg, "polyline", "line")
    assert len(lines) == 1
    xs = [x for x, _ in points(lines[0])]
    assert xs == sorted(xs)
    assert len(xs) == 2
    assert len(of_class(svg, "circle", "mark")) == 3
    assert not of_class(svg, "line", "marked")


def test_one_point_and_many_points() -> None:
    svg = drawings(line_chart(x=[1.0], series=[Series("a", [0.5], "a")]))[WIDE]
    assert len(of_class(svg, "circle", "mark")) == 1
    many = [i / 100 for i in range(101)]
    svg = drawings(line_chart(x=many, series=[Series("a", many, "a")]))[WIDE]
    assert len(of_class(svg, "circle", "mark")) == 1
    assert len(points(of_class(svg, "polyline", "line")[0])) == 101


def test_wrong_lengths_are_refused() -> None:
    with pytest.raises(UsageError, match="3 positions, but 2 values of a"):
        line_chart(series=[Series("a", [0.1, 0.2], "a")])
    with pytest.raises(UsageError, match="no finite position"):
        line_chart(x=[math.nan], series=[Series("a", [0.1], "a")])


def bars_of(bars: list[Bar], **changes: object) -> dict[int, ET.Element]:
    arguments: dict[str, object] = {
        "title": "Mask norms",
        "x_label": "P-L1",
        "value_label": "this model",
        "reference_label": "clean reference",
    }
    arguments.update(changes)
    return drawings(bar_chart(bars, **arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_bars_are_proportional(width: int) -> None:
    bars = [Bar("one", 0.02, 0.1), Bar("two", 0.04, None, flagged=True), Bar("three", None, 0.05)]
    svg = bars_of(bars, threshold=0.06)[width]
    first, second = of_class(svg, "rect", "bar")
    unit = float(first.attrib["width"]) / 0.02
    left = float(first.attrib["x"])
    assert float(second.attrib["width"]) / 0.04 == pytest.approx(unit, rel=0.01)
    assert "flagged" in second.attrib["class"]
    assert "flagged" not in first.attrib["class"]
    marks = [float(line.attrib["x1"]) for line in of_class(svg, "line", "reference")]
    assert marks == pytest.approx([left + 0.1 * unit, left + 0.05 * unit], abs=0.5)
    threshold = float(of_class(svg, "line", "marked")[0].attrib["x1"])
    assert threshold == pytest.approx(left + 0.06 * unit, abs=0.5)
    shown = texts(svg)
    assert {"0.0200", "0.0400 flagged", "no result", "threshold 0.0600", "P-L1"} <= set(shown)


def test_a_bar_that_is_only_a_bound_says_so() -> None:
    bars = [Bar("one", 0.02, bound=True), Bar("two", 0.04), Bar("three", None, bound=True)]
    shown = texts(bars_of(bars)[WIDE])
    assert {"≤ 0.0200", "0.0400", "no result"} <= set(shown)


def test_charts_with_one_maximum_have_one_scale() -> None:
    small = bars_of([Bar("name", 0.01)], maximum=0.1)[WIDE]
    large = bars_of([Bar("name", 0.1, flagged=True)], maximum=0.1)[WIDE]
    widths = [float(of_class(svg, "rect", "bar")[0].attrib["width"]) for svg in (small, large)]
    assert widths[1] / widths[0] == pytest.approx(10, rel=0.01)
    assert "0.100" in texts(large), "no room for 'flagged' at the end of the longest bar"


def test_of_many_classes_the_smallest_are_shown() -> None:
    bars = [Bar(f"class {i}", None if i == 5 else 1000.0 - i) for i in range(200)]
    bars[3] = Bar("class 3", 997.0, flagged=True)
    chart = bar_chart(bars, title="many", x_label="P-L1", value_label="this model")
    assert f"The {MAX_BARS} smallest of 200, in order." in "".join(ET.fromstring(chart).itertext())
    svg = drawings(chart)[WIDE]
    names = [name for name in texts(svg) if name.startswith("class ")]
    widths = [float(bar.attrib["width"]) for bar in of_class(svg, "rect", "bar")]
    assert widths == sorted(widths)
    assert len(names) == MAX_BARS
    assert any(name.startswith("class 3") for name in names)
    assert any(name.startswith("class 199") for name in names)
    assert not any(name.startswith("class 100") for name in names)


def test_no_result_at_all_still_draws() -> None:
    svg = bars_of([Bar("a", None), Bar("b", math.nan), Bar("c", 0.0)])[NARROW]
    assert len(of_class(svg, "rect", "bar")) == 1


def test_long_and_hostile_names() -> None:
    name = 'x" onload="alert(1)<script>' + "y" * 200
    chart = bar_chart([Bar(name, 1.0)], title=name, x_label="x", value_label=name)
    assert "<script" not in chart
    for svg in drawings(chart).values():
        assert svg.attrib["aria-label"] == name
        assert [t for t in texts(svg) if t.startswith('x" onload="')]
        assert re.search("…", "".join(texts(svg)))


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 2, 4, [0, 0.5, 1, 1.5, 2]),
        (0, 0.104, 6, [0, 0.02, 0.04, 0.06, 0.08, 0.1]),
        (-0.5, 0.5, 4, [-0.4, -0.2, 0, 0.2, 0.4]),
        (0, 1000, 5, [0, 200, 400, 600, 800, 1000]),
        (3, 3, 4, [3]),
    ],
)
def test_ticks_are_round(low: float, high: float, count: int, expected: list[float]) -> None:
    found = ticks(low, high, count)
    if (low, high) == (-0.5, 0.5):
        assert all(low <= tick <= high for tick in found)
        assert 0 in found
    else:
        assert found == pytest.approx(expected)
