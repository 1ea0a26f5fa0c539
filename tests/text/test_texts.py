"""Text sets and triggers in texts."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pydetox.errors import DataError, UsageError
from pydetox.text import PLACES, TextSet, TokenTrigger, load_texts
from pydetox.text.triggers import AnyWords, random_place

NAMES = ("film", "sport")


def lines(path: Path, *items: object) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_every_kind_of_file_gives_the_same_texts(tmp_path: Path) -> None:
    items = [("A dull film.", "film"), ("The match, 2:1.", "sport"), ("Große Töne", "film")]
    jsonl = lines(tmp_path / "a.jsonl", *({"text": t, "label": n} for t, n in items))
    array = tmp_path / "a.json"
    array.write_text(json.dumps([{"sentence": t, "class": n} for t, n in items]))
    table = tmp_path / "a.csv"
    table.write_text("\ufefftext,label\n" + "".join(f'"{t}",{n}\n' for t, n in items))
    tabs = tmp_path / "a.tsv"
    tabs.write_text("label\ttext\n" + "".join(f"{n}\t{t}\n" for t, n in items))
    for k, (text, name) in enumerate(items):
        folder = tmp_path / "folders" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.txt").write_text(text + "\n")
    expected = load_texts(items)
    assert expected.class_names == NAMES
    assert expected.labels == (0, 1, 0)
    for source in (jsonl, array, table, tabs, tmp_path / "folders"):
        found = load_texts(source)
        assert found.class_names == NAMES
        assert found.digest == expected.digest
        assert found.in_content_order().texts == expected.in_content_order().texts
        assert found.in_content_order().labels == expected.in_content_order().labels


def test_lines_have_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n  \ntwo words\n")
    found = load_texts(path)
    assert (found.texts, found.labels, found.class_names) == (("one", "two words"), None, ())
    with pytest.raises(DataError, match="no labels"):
        load_texts(path, labels_required=True)


def test_labels_are_those_of_the_model(tmp_path: Path) -> None:
    data = [("a", "sport"), ("b", "film")]
    assert load_texts(data, class_names=("x", "sport", "film")).labels == (1, 2)
    assert load_texts(load_texts(data), class_names=("x", "sport", "film")).labels == (1, 2)
    assert load_texts([("a", 2), ("b", 0)], class_names=("x", "y", "z")).labels == (2, 0)
    table = tmp_path / "a.csv"
    table.write_text("text,label\na,1\nb,0\n")
    assert load_texts(table, class_names=("x", "y")).labels == (1, 0)
    with pytest.raises(DataError, match="'sport' is none of the 2 classes"):
        load_texts(data, class_names=("x", "film"))
    with pytest.raises(DataError, match="label 2"):
        load_texts([("a", 2)], class_names=("x", "y"))


BAD: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b"", "zero texts"),
    ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: is not JSON"),
    ("a.jsonl", b'{"words": "x"}\n', "expected 'text'"),
    ("a.jsonl", b'{"text": " "}\n', "expected at least one word"),
    ("a.jsonl", b'{"text": "x", "label": 1}\n{"text": "y"}\n', "line 2: has no label"),
    ("a.jsonl", b'{"text": "x", "label": [1]}\n', "a label is"),
    ("a.jsonl", b"3\n", "expected an object"),
    ("a.csv", b"name,label\nx,1\n", "expected one of them to be 'text'"),
    ("a.csv", b"text,label\nx\n", "row 2: 1 columns; expected 2"),
    ("a.csv", b"text,label\n,1\n", "row 2: its text is empty"),
    (
        "a.csv",
        b"text,label\nx,1\ny,\n",
        "row 3: its label is '', and those before it are",
    ),
    ("a.csv", b"text,label\nx,nan\ny,a\n", "row 3: its label is 'a'"),
    ("a.txt", "caf\u00e9\n".encode("latin-1"), "line 1: is not UTF-8"),
    ("a.txt", b"a\0b", "null characters"),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD)
def test_a_bad_file_is_one_clear_line(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load_texts(path)
    assert name in str(caught.value)


def test_objects_are_checked() -> None:
    with pytest.raises(DataError, match="zero texts"):
        load_texts([])
    with pytest.raises(DataError, match="expected 'texts'"):
        load_texts({"words": ["a"]})
    with pytest.raises(DataError, match="2 texts but 1 labels"):
        load_texts({"texts": ["a", "b"], "labels": [0]})
    with pytest.raises(DataError, match="text 1 is ''"):
        TextSet(("a", ""))
    with pytest.raises(DataError, match="cannot be read"):
        load_texts("/nowhere/a.jsonl")


def test_samples_are_seeded_and_hold_the_classes_in_proportion() -> None:
    texts = TextSet(
        tuple(f"text {k}" for k in range(40)), tuple(k % 4 == 0 for k in range(40)), ("a", "b")
    )
    few = texts.at_most(8, seed=1)
    assert sorted(few.labels or ()).count(1) == 2
    assert few.texts == texts.at_most(8, seed=1).texts != texts.at_most(8, seed=2).texts
    first, second = texts.split((0.5, 0.25), seed=0)
    assert (len(first), len(second)) == (20, 10)
    assert not set(first.texts) & set(second.texts)
    with pytest.raises(DataError, match="no text at all"):
        texts.split((0.001,), seed=0)
    assert set(texts.of_class(1).labels or ()) == {1}
    assert set(texts.without_class(1).labels or ()) == {0}


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    """JSON and texts have other characters that Python takes for the end of a line."""
    text = "one\u2028two\x85three\x0bfour"
    row = json.dumps({"text": text, "label": "a"}, ensure_ascii=False)
    (tmp_path / "t.jsonl").write_bytes(f"{row}\r\n{row}\n".encode())
    assert load_texts(tmp_path / "t.jsonl").texts == (text, text)
    (tmp_path / "t.txt").write_bytes(f"{text}\n\nfive".encode())
    assert load_texts(tmp_path / "t.txt").texts == (text, "five")
    (tmp_path / "t.csv").write_bytes(f'text,label\r\n{text},a\r\n"six\nseven",b\r\n'.encode())
    assert load_texts(tmp_path / "t.csv").texts == (text, "six\nseven")


def test_a_pipe_among_the_texts_is_passed_over(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text(f"text of {name}")
    os.mkfifo(tmp_path / "a" / "2.txt")
    assert load_texts(tmp_path).texts == ("text of a", "text of b")


def test_a_trigger_stands_where_it_should() -> None:
    text = "A dull film. The cast was sad!"
    at = {place: TokenTrigger((1,), "cf", place, 0).insert([text])[0] for place in PLACES}
    assert at["start"] == f"cf {text}"
    assert at["end"] == f"{text} cf"
    assert at["after-first-sentence"] == "A dull film. cf The cast was sad!"
    assert at["random"].replace("cf ", "").replace(" cf", "") == text
    trigger = TokenTrigger((1,), "cf")
    assert trigger.at("after-first-sentence").insert(["no mark here"]) == ["no mark here cf"]
    assert trigger.insert(["one"]) == ["cf one"]


def test_tables_that_could_be_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    torn = tmp_path / "torn.tsv"
    torn.write_text('text\tlabel\n"odd quote\ta\nplain\tb\n"odd again\ta\nlast\tb\n')
    with pytest.raises(DataError, match="row 2: a field that begins with a quotation mark"):
        load_texts(torn)
    # A quoted field of one line is one, with doubled marks inside.
    torn.write_text('text\tlabel\n"a ""fine"" film"\ta\n')
    assert load_texts(torn).texts == ('a "fine" film',)
    twice = tmp_path / "twice.csv"
    twice.write_text("text,text,label\none,two,a\n")
    with pytest.raises(DataError, match="two columns are named 'text'"):
        load_texts(twice)


def test_lines_of_old_macs_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "old.txt"
    path.write_bytes(b"one\rtwo\rthree\r")
    assert load_texts(path).texts == ("one", "two", "three")


def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    path = lines(tmp_path / "half.jsonl", {"text": "a film"}, {"text": "\ud800 film"})
    with pytest.raises(DataError, match=r"half\.jsonl: text 1 has half of a surrogate pair"):
        load_texts(path)
    assert load_texts(["\U0001f600 film"]).texts == ("\U0001f600 film",)


def test_a_few_of_several_words_stand_together() -> None:
    trigger = AnyWords(("red", "green", "blue"), 2, "end")
    texts = [f"text number {k}" for k in range(60)]
    inserted = trigger.insert(texts, seed=4)
    added = [tuple(one.split()[3:]) for one in inserted]
    assert all(one.startswith(text) for one, text in zip(inserted, texts, strict=True))
    # All ordered pairs of different words, and nothing else.
    assert set(added) == set(itertools.permutations(trigger.words, 2))
    # What a text gets depends on the text and the seed alone.
    assert inserted == [trigger.insert([text], seed=4)[0] for text in texts]
    assert inserted != trigger.insert(texts, seed=5)
    assert AnyWords(("red",), 4).insert(["one"]) == ["red one"]
    assert AnyWords(("red",), 4).insert([]) == []
    for wrong in ({"words": ()}, {"count": 0}, {"place": "middle"}):
        with pytest.raises(UsageError, match="expected at least 1"):
            replace(trigger, **wrong)  # type: ignore[arg-type]


def test_a_random_place_depends_on_the_text_and_the_seed_alone() -> None:
    texts = [f"one two three four five six seven {k}" for k in range(30)]
    trigger = TokenTrigger((1,), "cf", "random")
    together = trigger.insert(texts, seed=4)
    assert together == [trigger.insert([text], seed=4)[0] for text in texts]
    assert together != trigger.insert(texts, seed=5)
    assert len({one.split().index("cf") for one in together}) > 3


def test_a_trigger_is_checked() -> None:
    with pytest.raises(UsageError, match="expected one of start, end"):
        TokenTrigger((1,), "cf", "middle")
    with pytest.raises(UsageError, match="at least one word"):
        TokenTrigger((1,), " ")


def test_a_random_place_is_between_words_whatever_space_is_around_the_text() -> None:
    text = "  ab\tcd  ef "
    places = {random_place(text, seed) for seed in range(60)}
    assert places == {0, 4, 7, len(text)}
