"""A stranger's tokenizer.json: what would fill the memory is refused, and panics are errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pydetox.checkpoints.tokenizer_files import check_tokenizer_json, guarded
from pydetox.errors import ArchitectureError


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        {"type": "BertNormalizer", "lowercase": True},
        # ALBERT's, CLIP's and Llama's.
        sequence(replace('"', String="``"), replace('"', String="''"), {"type": "NFKD"}),
        sequence({"type": "NFC"}, replace(" ", Regex="\\s+"), {"type": "Lowercase"}),
        sequence({"type": "Prepend", "prepend": "▁"}, replace("▁", String=" ")),
    ],
)
def test_what_real_tokenizers_have_is_read(normalizer: Any) -> None:
    check_tokenizer_json(json.dumps({"normalizer": normalizer, "decoder": None}).encode())


@pytest.mark.parametrize("key", ["normalizer", "decoder"])
@pytest.mark.parametrize(
    ("node", "message"),
    [
        (sequence(*[replace("a" * 30, String="a")] * 8), "more than 1,024 times as long"),
        (sequence(sequence(*[replace("aa", Regex="a|")] * 9)), "more than 1,024 times"),
        (replace("x" * 65, String=""), "inserts 65 characters"),
        ({"type": "Prepend", "prepend": "a" * 10**6}, "inserts 1,000,000 characters"),
    ],
)
def test_texts_that_grow_beyond_bounds_are_refused(key: str, node: Any, message: str) -> None:
    with pytest.raises(ArchitectureError, match=f"its tokenizer.json has a {key} .*{message}"):
        check_tokenizer_json(json.dumps({key: node}).encode())


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"[" * 100_000, b'{"normalizer": 3}'])
def test_what_is_no_tokenizer_is_left_to_the_library(content: bytes) -> None:
    check_tokenizer_json(content)


class PanicException(BaseException):
    """As PyO3 has it: no Exception."""


@pytest.mark.parametrize(
    ("raised", "caught"),
    [
        (PanicException("no entry\nfound"), ArchitectureError),
        (ValueError("missing"), ArchitectureError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
)
def test_failures_of_the_library_are_errors(
    raised: BaseException, caught: type[BaseException]
) -> None:
    def fail() -> None:
        raise raised

    with pytest.raises(caught) as found:
        guarded(fail, "it")()
    if caught is ArchitectureError:
        assert str(found.value).startswith("it: its tokenizer fails: ")
        assert "\n" not in str(found.value)
    assert guarded(len, "it")("abc") == 3
