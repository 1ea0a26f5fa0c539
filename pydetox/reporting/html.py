"""The pieces of an HTML report: each escapes the text it is given and returns finished HTML.

A page is one file. Its styles are inline, its images are data URIs, its charts inline SVG, and a
content security policy forbids the browser to load anything else.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import NewType

from .values import clean_text

#: A piece of finished HTML. Plain text becomes one only through `text`.
Html = NewType("Html", str)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def text(value: object) -> Html:
    """Return `value` escaped, for use as content or within a quoted attribute."""
    return Html(html.escape(clean_text(value), quote=True))


def join(parts: Iterable[Html], separator: str = "\n") -> Html:
    """Return the parts one after the other."""
    return Html(separator.join(parts))


def page(title: str, subtitle: str, sections: Iterable[Html]) -> Html:
    """Return a whole document; empty sections are left out."""
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    lead = f'<p class="subtitle">{text(subtitle)}</p>' if subtitle else ""
    return Html(f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
{lead}
</header>
<main>
{join(part for part in sections if part)}
</main>
</body>
</html>
""")


def section(heading: str, *parts: Html, note: str = "") -> Html:
    """Return a section with a heading and, under it, an explaining note."""
    explained = Html(f'<p class="note">{text(note)}</p>') if note else Html("")
    body = join(part for part in (explained, *parts) if part)
    return Html(f"<section>\n<h2>{text(heading)}</h2>\n{body}\n</section>")


def subsection(heading: Html, *parts: Html) -> Html:
    """Return a part of a section with a smaller heading (already HTML: it may hold a badge)."""
    return Html(f'<div class="part">\n<h3>{heading}</h3>\n{join(p for p in parts if p)}\n</div>')


def badge(label: object, tone: str) -> Html:
    """Return a short coloured label. tone: "good", "bad", "warn" or "neutral"."""
    return Html(f'<span class="badge {_tone(tone)}">{text(label)}</span>')


def cards(items: Iterable[Mapping[str, object]]) -> Html:
    """Return key figures side by side. Each item: "label", "value" and "tone"."""
    shown = [
        f'<div class="card {_tone(str(item.get("tone", "neutral")))}">'
        f"<dt>{text(item.get('label', ''))}</dt><dd>{text(item.get('value', ''))}</dd></div>"
        for item in items
    ]
    return Html('<dl class="cards">\n' + "\n".join(shown) + "\n</dl>") if shown else Html("")


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[Html]],
    *,
    numeric: int = 1,
    stack: bool = False,
) -> Html:
    """Return a table; columns from index `numeric` on hold numbers and are aligned to the right.

    The first column names the row. With `stack`, a narrow screen shows each row as a block of lines
    "header: value" instead of scrolling sideways.
    """

    def kind(column: int) -> str:
        return ' class="number"' if column >= numeric else ""

    head = "".join(f'<th scope="col"{kind(i)}>{text(name)}</th>' for i, name in enumerate(headers))
    lines = []
    for row in rows:
        first = f'<th scope="row"{kind(0)}>{row[0]}</th>'
        rest = "".join(
            f'<td{kind(i)} data-label="{text(headers[i])}">{cell}</td>'
            for i, cell in enumerate(row[1:], start=1)
        )
        lines.append(f"<tr>{first}{rest}</tr>")
    body = "\n".join(lines)
    layout = "stack" if stack else "plain"
    return Html(
        f'<div class="scroll"><table class="{layout}">\n'
        f"<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def pairs(items: Mapping[str, object]) -> Html:
    """Return names and values in two columns; long values (hashes) wrap anywhere."""
    rows = "\n".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in items.items()
    )
    return Html(f'<dl class="pairs">\n{rows}\n</dl>') if rows else Html("")


def image_strip(images: Iterable[tuple[str, str]]) -> Html:
    """Return images side by side, each a (data URI, caption)."""
    shown = "\n".join(
        f'<figure><img src="{text(uri)}" alt="{text(caption)}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
        for uri, caption in images
    )
    return Html(f'<div class="strip">\n{shown}\n</div>') if shown else Html("")


def details(summary: str, content: Html) -> Html:
    """Return content that is folded away until asked for."""
    return Html(f"<details><summary>{text(summary)}</summary>\n{content}\n</details>")


def _tone(tone: str) -> str:
    return tone if tone in ("good", "bad", "warn") else "neutral"
