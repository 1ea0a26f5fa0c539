"""Class names and prompts by name: ImageNet's from open_clip, others from CLIP_benchmark."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, cast

from ..errors import DataError

#: The names under which open_clip's lists for ImageNet are known here.
IMAGENET = ("imagenet", "imagenet1k")
_SIMPLE = ("imagenet-simple",)
_PACKAGE = "clip_benchmark.datasets"
_MOST_NAMES = 20


@dataclass(frozen=True, eq=False)
class ClassPrompts:
    """The prompts of each class, as CuPL and CLIP_benchmark have them.

    Attributes:
        prompts: At least one prompt per class, by class name.
        source: The name of the file, for messages.
    """

    prompts: Mapping[str, tuple[str, ...]]
    source: str

    @property
    def longest(self) -> int:
        """The largest number of prompts of a class."""
        return max(map(len, self.prompts.values()))

    @property
    def digest(self) -> str:
        """A hash of all prompts."""
        text = json.dumps({k: list(v) for k, v in self.prompts.items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class ClassPrompt:
    """A prompt template: the k-th prompt of a class, counted in a circle.

    As many templates as the largest class has prompts thus give every class all of its own. A class
    with fewer gets some of them again; `fill_templates` drops these.
    """

    of: ClassPrompts
    index: int

    def __call__(self, class_name: str) -> str:
        """Return a prompt; DataError for a class without any."""
        return self._known(class_name)[self.place(class_name)]

    def place(self, class_name: str) -> int:
        """Return which of the prompts of a class this is; DataError for a class without any."""
        return self.index % len(self._known(class_name))

    def _known(self, class_name: str) -> tuple[str, ...]:
        known = self.of.prompts.get(class_name)
        if known is None:
            raise DataError(
                f"{self.of.source}: no prompts for the class {class_name!r}; it has those of "
                f"{len(self.of.prompts)} classes"
            )
        return known

    def __repr__(self) -> str:
        """Return a text that depends on the prompts alone, for digests."""
        return f"ClassPrompt({self.of.digest}, {self.index})"


def class_prompts(content: Mapping[str, Any], source: str) -> tuple[ClassPrompt, ...]:
    """Return the templates of per-class prompts: a mapping from class names to lists of prompts.

    Raises DataError for anything else.
    """
    prompts = {}
    for name, given in content.items():
        good = isinstance(given, list) and given and all(isinstance(p, str) and p for p in given)
        if not good:
            raise DataError(f"{source}: class {name!r} has no list of prompts")
        prompts[name] = tuple(given)
    if not prompts:
        raise DataError(f"{source}: no classes in it; expected an object of lists of prompts")
    together = ClassPrompts(prompts, source)
    return tuple(ClassPrompt(together, index) for index in range(together.longest))


def named_class_names(name: str) -> tuple[str, ...] | None:
    """Return the class names of a data set by its name; None if nobody knows it."""
    if name.lower() in IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    found = _of_clip_benchmark("en_classnames.json").get(_key(name))
    return tuple(map(str, found)) if isinstance(found, list) else None


def named_templates(name: str) -> tuple[str | ClassPrompt, ...] | None:
    """Return the prompt templates of a data set by its name; None if nobody knows it.

    `imagenet` are the 80 of OpenAI, `imagenet-simple` the 7 that do about as well. After `cupl:`
    the name means CLIP_benchmark's prompts of each class.
    """
    if name.lower().startswith("cupl:"):
        prompts = _of_clip_benchmark("cupl_prompts.json").get(_key(name[5:]))
        return class_prompts(prompts, name) if isinstance(prompts, dict) else None
    if name.lower() in (*IMAGENET, *_SIMPLE):
        import open_clip

        simple = name.lower() in _SIMPLE
        given = (
            open_clip.SIMPLE_IMAGENET_TEMPLATES if simple else open_clip.OPENAI_IMAGENET_TEMPLATES
        )
        functions = cast("tuple[Callable[[str], str], ...]", given)
        return tuple(template("{c}") for template in functions)
    found = _of_clip_benchmark("en_zeroshot_classification_templates.json").get(_key(name))
    return tuple(map(str, found)) if isinstance(found, list) else None


def other_lists() -> list[str]:
    """Return the names of CLIP_benchmark's lists; none where it is not installed."""
    return sorted(_of_clip_benchmark("en_classnames.json"))


def known_lists() -> str:
    """Return the names that are known, for messages."""
    others = other_lists()
    if not others:
        return 'imagenet (and those of CLIP_benchmark after pip install "pydetox[clip-benchmark]")'
    more = ", ..." if len(others) > _MOST_NAMES else ""
    return ", ".join(["imagenet", *others[:_MOST_NAMES]]) + more


@lru_cache(maxsize=1)
def imagenet_ids() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet's 1,000 classes, in the order of their labels."""
    try:
        text = (files("timm.data") / "_info" / "imagenet_synsets.txt").read_text(encoding="utf-8")
    except (ImportError, OSError):  # open_clip needs timm, but another one may lack this file
        return ()
    return tuple(text.split())


def _key(name: str) -> str:
    return name.lower().removeprefix("wds/").removeprefix("vtab/")


@lru_cache(maxsize=4)
def _of_clip_benchmark(file: str) -> Mapping[str, Any]:
    """Return one of the package's lists by data set; empty where it is not installed."""
    try:
        content = json.loads((files(_PACKAGE) / file).read_text(encoding="utf-8"))
    except (ImportError, OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
