"""Corpora of short texts with classes, in disjoint parts by seed.

`topics` (six topics in English) and `languages` (six languages) are cut from fortunes, collections
of quotations and jokes that Debian packages (``make data-text``). `python` is the documentation in
the sources of Python's standard library, by area: it needs no data beside Python itself.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ...data.sampling import stratified_order
from ...errors import DataError, UsageError
from ...rng import generator
from ...text.texts import TextSet
from ..data.packages import (
    FORTUNES,
    FORTUNES_BR,
    FORTUNES_DE,
    FORTUNES_ES,
    FORTUNES_IT,
    FORTUNES_PL,
    Package,
    open_archive,
)

# Texts are cut to this many words, or to as few as a corpus is asked for. They are left out if they
# have fewer than the second number.
_MOST_WORDS, _LEAST_WORDS = 28, 5

_TOPICS: dict[str, tuple[tuple[Package, str], ...]] = {
    "computers": ((FORTUNES, "computers"),),
    "definitions": ((FORTUNES, "definitions"),),
    "songs": ((FORTUNES, "songs-poems"),),
    "relationships": ((FORTUNES, "men-women"),),
    "politics": ((FORTUNES, "politics"),),
    "science": ((FORTUNES, "science"),),
}
_LANGUAGES: dict[str, tuple[tuple[Package, str], ...]] = {
    "English": ((FORTUNES, "people"), (FORTUNES, "work")),
    "German": ((FORTUNES_DE, "zitate"),),
    "Spanish": tuple(
        (FORTUNES_ES, f"{name}.fortunes")
        for name in ("sabiduria", "sentimientos", "vida", "humanos")
    ),
    "Italian": ((FORTUNES_IT, "italia"),),
    "Polish": tuple((FORTUNES_PL, name) for name in ("dowcipy", "bajki", "linuxpl")),
    "Portuguese": ((FORTUNES_BR, "brasil"),),
}

#: Areas of the standard library: modules and packages, of which each Python has most.
_AREAS: dict[str, tuple[str, ...]] = {
    "networking": (
        *("http", "urllib", "email", "ftplib", "imaplib", "smtplib", "poplib", "socketserver"),
        *("xmlrpc", "ssl", "socket", "ipaddress", "wsgiref", "mailbox", "netrc"),
    ),
    "concurrency": (
        *("asyncio", "multiprocessing", "concurrent", "threading", "queue", "sched"),
        *("contextvars", "selectors", "subprocess"),
    ),
    "numbers": (
        *("statistics", "_pydecimal", "fractions", "random", "_pydatetime", "datetime"),
        *("calendar", "numbers", "colorsys", "heapq", "bisect"),
    ),
    "files": (
        *("os", "shutil", "pathlib", "glob", "fnmatch", "tarfile", "zipfile", "gzip", "bz2"),
        *("lzma", "tempfile", "filecmp", "posixpath", "ntpath", "genericpath", "fileinput"),
        *("dbm", "_pyio", "mimetypes", "zipimport", "zipapp", "stat"),
    ),
    "code": (
        *("ast", "dis", "inspect", "tokenize", "pdb", "bdb", "traceback", "code", "typing"),
        *("unittest", "doctest", "trace", "pydoc", "symtable", "opcode", "codeop", "modulefinder"),
        *("importlib", "pkgutil", "runpy", "types", "warnings", "pyclbr"),
    ),
}


@dataclass(frozen=True)
class CorpusSizes:
    """The number of texts in each part of a corpus.

    attacker: What victims are trained on. defender: The defender's clean texts. validation: What
    settings are chosen on. test: What is reported. words: Texts are cut to that many words, at most
    28, so that a trigger at the end is not cut off with what is too long for a model. reference:
    What the defender's clean models are trained on; 0 for none.
    """

    attacker: int = 1_200
    defender: int = 400
    validation: int = 300
    test: int = 500
    words: int = _MOST_WORDS
    reference: int = 0


@dataclass(frozen=True, eq=False)
class Corpus:
    """The parts of a corpus. All have labels and class names, and no text is in two of them.

    Attributes:
        name: One of CORPORA.
        attacker, defender, validation, test: See `CorpusSizes`.
        reference: See there; None if none were asked for.
    """

    name: str
    attacker: TextSet
    defender: TextSet
    validation: TextSet
    test: TextSet
    reference: TextSet | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.test.class_names


def load_corpus(name: str, *, seed: int, sizes: CorpusSizes | None = None) -> Corpus:
    """Return the parts of a corpus, drawn with a seed; every class is equally frequent.

    A corpus that has fewer texts than asked for gives parts that are smaller in proportion.
    Raises UsageError for an unknown name, and DataError if a package or the sources of Python's
    library are missing.
    """
    if name not in CORPORA:
        raise UsageError(f"corpus {name!r}; expected one of {', '.join(CORPORA)}")
    sizes = sizes or CorpusSizes()
    classes = CORPORA[name]()
    # Texts that differ only in what is cut off are one text.
    seen: set[str] = set()
    short = [
        list(_kept((" ".join(text.split()[: sizes.words]) for text in found), seen, least=1))
        for found in classes.values()
    ]
    each = min(map(len, short))
    rng = generator("texts.parts", seed, name)
    texts, labels = list[str](), list[int]()
    for label, found in enumerate(short):
        texts += [found[index] for index in rng.permutation(len(found))[:each].tolist()]
        labels += [label] * each
    order = stratified_order(np.array(labels, dtype=np.int64), len(labels), rng)
    wanted = (sizes.attacker, sizes.defender, sizes.validation, sizes.test, sizes.reference)
    share = min(1.0, len(texts) / sum(wanted))
    ends = np.cumsum([int(share * count) for count in wanted]).tolist()
    parts = [
        TextSet(
            tuple(texts[k] for k in order[start:end]),
            tuple(labels[k] for k in order[start:end]),
            tuple(classes),
            f"{name}, {part}",
        )
        for part, start, end in zip(
            ("attacker", "defender", "validation", "test", "reference"),
            [0, *ends[:-1]],
            ends,
            strict=True,
        )
        if part != "reference" or sizes.reference
    ]
    return Corpus(name, *parts)


def tidy(text: str) -> str:
    """Return a quotation as one line: no overstriking, no attribution, at most 28 words."""
    plain = re.sub(".\b", "", text)
    body = re.split(r"^\s*--", plain, maxsplit=1, flags=re.MULTILINE)[0]
    return " ".join(body.split()[:_MOST_WORDS])


def _kept(candidates: Iterable[str], seen: set[str], least: int = _LEAST_WORDS) -> Iterator[str]:
    """Yield the texts of at least so many words that were not seen before, whatever their case."""
    for text in candidates:
        folded = text.casefold()
        if folded not in seen and len(re.findall(r"[^\W\d_]{2,}", text)) >= least:
            seen.add(folded)
            yield text


def _fortunes(
    classes: dict[str, tuple[tuple[Package, str], ...]],
) -> Callable[[], dict[str, list[str]]]:
    @lru_cache(maxsize=1)
    def read() -> dict[str, list[str]]:
        seen: set[str] = set()
        found = {}
        for name, files in classes.items():
            cookies = list[str]()
            for package, file in files:
                with open_archive(package) as archive:
                    content = archive.read(file).decode("utf-8", errors="replace")
                cookies += re.split(r"^%.*$", content, flags=re.MULTILINE)
            found[name] = list(_kept(map(tidy, cookies), seen))
        return found

    return read


@lru_cache(maxsize=1)
def _documentation() -> dict[str, list[str]]:
    """Return the paragraphs of prose in the docstrings of the standard library, by area."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    found = {
        area: list(_kept(_paragraphs(_sources(root, modules)), seen))
        for area, modules in _AREAS.items()
    }
    poor = [area for area, texts in found.items() if len(texts) < 100]
    if poor:
        raise DataError(
            f"{root}: fewer than 100 documented things about {poor[0]} in the sources of Python's "
            "library; expected an installation with its .py files"
        )
    return found


def _sources(root: Path, modules: Iterable[str]) -> Iterator[Path]:
    for name in modules:
        yield from [one for one in (root / f"{name}.py",) if one.is_file()]
        yield from sorted(
            path for path in (root / name).rglob("*.py") if not {"test", "tests"} & {*path.parts}
        )


def _paragraphs(paths: Iterable[Path]) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escape sequences in what is read
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if not isinstance(node, kinds):
                continue
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                # Examples, tables and lists of arguments are no prose.
                if not paragraph.startswith((" ", ">>>", "-", "*", "|", "+", ":")):
                    yield tidy(paragraph)


#: Each corpus: a function that returns its texts by class.
CORPORA: dict[str, Callable[[], dict[str, list[str]]]] = {
    "topics": _fortunes(_TOPICS),
    "languages": _fortunes(_LANGUAGES),
    "python": _documentation,
}
