"""A heat map as inline SVG: one hue, the value as its strength, so that it is safe for all eyes."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError
from .charts import NARROW, WIDE
from .html import Html, text
from .values import finite, number

_LEFT, _TOP, _BOTTOM = 62.0, 12.0, 50.0


def heat_map(
    rows: Sequence[float],
    columns: Sequence[float],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    row_label: str,
    column_label: str,
    maximum: float,
    caption: str = "",
) -> Html:
    """Return a heat map: one line of cells per entry of `rows`, the first at the bottom.

    values: one sequence per row, in [0, maximum]; None and NaN are left blank. maximum: the value
    of the full colour, above 0. Each cell tells its value when pointed at.
    Raises UsageError when the sizes do not fit each other.
    """
    shape = [len(row) for row in values]
    if not rows or not columns or shape != [len(columns)] * len(rows) or not maximum > 0:
        raise UsageError(
            f"{title}: {len(rows)} rows and {len(columns)} columns, but values of shape {shape}"
        )

    def draw(width: int) -> str:
        plot = min(float(width) - _LEFT - 16, 420.0)
        across, high = plot / len(columns), plot / len(rows)
        height = _TOP + plot + _BOTTOM
        body = []
        for i, row in enumerate(values):
            y = _TOP + plot - (i + 1) * high
            for j, raw in enumerate(row):
                value = finite(raw)
                if value is None:
                    continue
                strength = min(1.0, max(0.0, value / maximum))
                hint = (
                    f"{row_label} {number(rows[i])}, {column_label} {number(columns[j])}: "
                    f"{number(value)}"
                )
                body.append(
                    f'<rect class="bar" fill-opacity="{strength:.3f}" x="{_LEFT + j * across:.1f}" '
                    f'y="{y:.1f}" width="{across:.2f}" height="{high:.2f}">'
                    f"<title>{text(hint)}</title></rect>"
                )
        body.append(
            f'<rect x="{_LEFT:.1f}" y="{_TOP:.1f}" width="{plot:.1f}" height="{plot:.1f}" '
            'fill="none" class="axis"/>'
        )
        for i in _few(len(rows)):
            y = _TOP + plot - (i + 0.5) * high + 4
            body.append(_label(_LEFT - 8, y, number(rows[i]), "tick", "end"))
        for j in _few(len(columns)):
            x = _LEFT + (j + 0.5) * across
            body.append(_label(x, _TOP + plot + 18, number(columns[j]), "tick", "middle"))
        body.append(_label(_LEFT + plot / 2, height - 10, column_label, "name", "middle"))
        middle = _TOP + plot / 2
        body.append(
            f'<text class="name" transform="translate(14 {middle:.1f}) rotate(-90)" '
            f'text-anchor="middle">{text(row_label)}</text>'
        )
        return (
            f'<svg viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}" role="img" '
            f'aria-label="{text(title)}">\n' + "\n".join(body) + "\n</svg>"
        )

    shown = f"{caption} Full colour: {number(maximum)}.".strip()
    return Html(
        f'<figure class="chart">\n<div class="wide">{draw(WIDE)}</div>\n'
        f'<div class="narrow">{draw(NARROW)}</div>\n<figcaption>{text(shown)}</figcaption></figure>'
    )


def _few(count: int) -> list[int]:
    """Return at most five indices, first and last among them."""
    if count <= 5:
        return list(range(count))
    return sorted({round(k * (count - 1) / 4) for k in range(5)})


def _label(x: float, y: float, content: object, kind: str, anchor: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{text(content)}</text>"
    )
