"""Sections of reports about text models: words by class, and words in example sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .charts import Bar, bar_chart
from .html import Html, details, section, subsection, table, text
from .result import is_flagged
from .values import number, percent

_WORDS_NOTE = (
    "For every class, the words that lead texts of other classes there are searched. The loss is "
    "that of the best words: near 0, nearly every text follows them. A backdoor is a class whose "
    "words work better than those of the other classes, and better than those of clean models."
)


def words_section(scans: Sequence[Mapping[str, Any]]) -> Html:
    """Return the losses of all classes as charts, and the words as tables.

    scans: [{"name", "class_names": [C], "class_loss": [C], "reference_loss": [C] or None, "words":
    [C], "success": [C], "target": class name or None, "verdict"}].
    """
    if not scans:
        return Html("")
    largest = max(
        float(value)
        for scan in scans
        for value in [*scan["class_loss"], *(scan.get("reference_loss") or [])]
    )
    return section("Words", *(_scan(scan, largest) for scan in scans), note=_WORDS_NOTE)


def _scan(scan: Mapping[str, Any], largest: float) -> Html:
    names = scan["class_names"]
    references = scan.get("reference_loss") or [None] * len(names)
    bars = [
        Bar(str(name), loss, reference, is_flagged(scan, index))
        for index, (name, loss, reference) in enumerate(
            zip(names, scan["class_loss"], references, strict=True)
        )
    ]
    chart = bar_chart(
        bars,
        title=f"Loss of the best words of each class, {scan['name']}",
        x_label="mean loss in texts of other classes",
        value_label="this model",
        reference_label="clean reference",
        threshold=None,
        maximum=largest,
    )
    cells = [
        [text(str(cell)) for cell in row]
        for row in zip(
            names,
            scan["words"],
            map(percent, scan["success"]),
            map(number, scan["class_loss"]),
            strict=True,
        )
    ]
    numbers = table(["Class", "Best words", "Success", "Loss"], cells)
    return subsection(text(str(scan["name"])), chart, details("The words", numbers))


def examples_section(examples: Sequence[Mapping[str, Any]]) -> Html:
    """Return example sentences with the words of a trigger marked.

    examples: [{"caption", "text", "words": the text to mark, or "", "before": class name of the
    unrepaired model, "after": that of the repaired one, or None}].
    """
    if not examples:
        return Html("")
    columns = [
        (name, key)
        for name, key in (("Backdoored", "before"), ("Repaired", "after"))
        if any(one.get(key) is not None for one in examples)
    ]
    cells = [
        [
            text(str(one["caption"])),
            _marked(str(one["text"]), str(one.get("words") or "")),
            *(text(str(one.get(key) or "–")) for _, key in columns),
        ]
        for one in examples
    ]
    shown = table(["", "Text", *(name for name, _ in columns)], cells, stack=True)
    return section("Examples", shown, note="Test texts, and the class that each model gives them.")


def _marked(sentence: str, words: str) -> Html:
    """Return a sentence, escaped, with the first occurrence of some words marked."""
    at = sentence.find(words) if words else -1
    if at < 0:
        return text(sentence)
    end = at + len(words)
    return Html(
        f"<span>{text(sentence[:at])}<mark>{text(sentence[at:end])}</mark>"
        f"{text(sentence[end:])}</span>"
    )
