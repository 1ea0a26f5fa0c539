"""What pydetox accepts is what torch, CPython's unpickler, open_clip and timm read.

Each check that this rests on is taken away once, and the fuzzer has to find that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from pydetox.checkpoints import (
    legacy_index,
    pickle_calls,
    pickle_index,
    pickle_literals,
    torch_index,
    weight_sets,
    zip_index,
)
from pydetox.checkpoints.index import Findings
from pydetox.checkpoints.pickle_calls import Caller
from pydetox.checkpoints.pickle_globals import Global
from pydetox.checkpoints.pickle_values import Opaque, PickledTensor, Storage
from pydetox.errors import CheckpointError
from tests.checkpoints.differential import case, run_range

Patch = Callable[[pytest.MonkeyPatch], None]
MOST = 20_000


@pytest.mark.slow
def test_accepted_files_are_the_same_to_every_reader() -> None:
    answers, odd = run_range(1, 0, 10_000)
    assert odd == []
    assert answers["accepted"] > 4000
    assert answers["refused"] > 3000


def test_cases_are_the_same_every_time() -> None:
    assert case(0, 7) == case(0, 7) != case(1, 7)


def nothing(*_: object, **__: object) -> None:
    """Stands for a check that is taken away."""


def without_bits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pickle_calls, "_bits", lambda *_: (False, False))


def without_build(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pickle_index, "_check_build", nothing)


def without_state(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pickle_calls, "check_state", nothing)


def without_strings_of_python_2(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pickle_literals, "_string", lambda raw: raw)


def _any_usual(entries: dict[str, object], candidates: dict[str, object]) -> str:
    for key in (*weight_sets._USUAL_KEYS, ""):
        if key in candidates:
            return key
    raise CheckpointError("none")


def without_other_dictionaries(patch: pytest.MonkeyPatch) -> None:
    def opaque(self: Caller, made_from: Global, arguments: tuple[object, ...]) -> object:
        return Opaque(made_from.name, known=False)

    patch.setattr(Caller, "create", opaque)
    patch.setattr(weight_sets, "_usual", _any_usual)
    without_weights_that_are_not_read(patch)


def without_weights_that_are_not_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_sets, "_unread", lambda *_: {})


def without_own_names(patch: pytest.MonkeyPatch) -> None:
    candidates = weight_sets._candidates

    def nested(root: weight_sets.Mapping, entries: dict[str, object]) -> object:
        if isinstance(entries.get(""), weight_sets.Mapping):
            return {"": entries[""]}
        return candidates(root, entries)

    patch.setattr(weight_sets, "_candidates", nested)


def without_one_description(patch: pytest.MonkeyPatch) -> None:
    def same(self: Caller, storage: Storage) -> Storage:
        self.storages.setdefault(storage.key, storage)
        return storage

    patch.setattr(Caller, "_same", same)


def without_case_of_records(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(zip_index, "_check_unlike", nothing)


def without_case_of_torchs_records(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch_index, "_check_names", nothing)


def without_rivals(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_sets, "_rivals", lambda *_, **__: False)


def without_made_texts(patch: pytest.MonkeyPatch) -> None:
    call = Caller.call

    def opaque(self: Caller, function: Global, arguments: tuple[object, ...]) -> object:
        if function.name == "builtins.str":
            return Opaque("builtins.str")
        return call(self, function, arguments)

    def entries(root: weight_sets.Mapping, _: object) -> dict[str, object]:
        return {key: value for key, value in root.pairs if type(key) is str}

    patch.setattr(Caller, "call", opaque)
    patch.setattr(weight_sets, "_entries", entries)
    patch.setattr(weight_sets, "_usual", _any_usual)


def without_prefixes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_sets, "_note_mixed_prefix", nothing)


def without_names_that_are_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_sets, "_CUT", 0)


def without_first_names_of_no_tensors(patch: pytest.MonkeyPatch) -> None:
    note = weight_sets._note_mixed_prefix

    def of_tensors(_: object, names: list[str], findings: Findings) -> None:
        first = weight_sets.Mapping()
        first.pairs = [(name, None) for name in names]
        note(first, names, findings)

    patch.setattr(weight_sets, "_note_mixed_prefix", of_tensors)


def without_values_that_take_the_place_of_weights(patch: pytest.MonkeyPatch) -> None:
    tensors = weight_sets._tensors

    def of_tensors(mapping: weight_sets.Mapping, *more: Any) -> object:
        only = weight_sets.Mapping()
        only.pairs = [pair for pair in mapping.pairs if isinstance(pair[1], PickledTensor)]
        return tensors(only, *more)

    patch.setattr(weight_sets, "_tensors", of_tensors)


def without_places(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pickle_calls, "_LOCATION", re.compile(".*"))


def without_views_of_storages(patch: pytest.MonkeyPatch) -> None:
    storage = Caller.storage

    def whole(self: Caller, identity: object) -> Storage:
        if isinstance(identity, tuple) and len(identity) == 6:
            identity = (*identity[:5], None)
        return storage(self, identity)

    patch.setattr(Caller, "storage", whole)


def without_the_order_of_storages(patch: pytest.MonkeyPatch) -> None:
    def in_order(keys: object, expected: set[str]) -> list[str]:
        return sorted(expected)

    patch.setattr(legacy_index, "_check_keys", in_order)


@pytest.mark.slow
@pytest.mark.parametrize(
    "take_away",
    [
        without_bits,
        without_build,
        without_state,
        without_strings_of_python_2,
        without_other_dictionaries,
        without_weights_that_are_not_read,
        without_own_names,
        without_one_description,
        without_case_of_records,
        without_case_of_torchs_records,
        without_rivals,
        without_made_texts,
        without_prefixes,
        without_names_that_are_cut,
        without_first_names_of_no_tensors,
        without_values_that_take_the_place_of_weights,
        without_places,
        without_views_of_storages,
        without_the_order_of_storages,
    ],
    ids=lambda function: function.__name__,
)
def test_the_fuzzer_finds_each_check_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, take_away: Patch
) -> None:
    take_away(monkeypatch)
    _, odd = run_range(0, 0, MOST, stop_at_first=True)
    assert odd
