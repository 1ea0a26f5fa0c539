"""`eval` and `invert` for text models: one document per model, as for image models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..atomic import atomic_directory
from ..data.names import load_class_names
from ..errors import DataError, UsageError
from ..models.device import find_device
from ..reporting.documents import evaluation_document
from ..reporting.text_documents import words_row
from ..reporting.values import clean_text
from ..scanning.targets import Target
from ..text.configuration import TextScanConfig
from ..text.evaluation import evaluate_texts
from ..text.kinds import texts_for
from ..text.models import TextModel, load_text_model
from ..text.search import search_words
from ..text.texts import TextSet, load_texts
from ..text.trigger_file import WordsFile, read_words
from ..text.triggers import TokenTrigger
from . import exit_codes
from .causal_commands import evaluation_of_causal, rows_of_causal

#: What `invert` writes for a text model.
WORDS_NAME = "triggers.json"


class TextInputs:
    """Reads text models and the texts that fit them."""

    def __init__(self, given: Mapping[str, Any], texts: str) -> None:
        """Take the options; sets the number of threads.

        Raises UsageError for a device that is not there, and DataError for texts that cannot be
        read.
        """
        if given["threads"] is not None:
            torch.set_num_threads(given["threads"])
        find_device(given["device"])
        self._device, self._offline = given["device"], given["offline"]
        names = given["class_names"]
        self._names = None if names is None else load_class_names(Path(names))
        self._source = texts
        load_texts(texts)  # before any model is read

    def read(self, target: Target) -> tuple[TextModel, TextSet]:
        """Return a model and the texts with its classes. Raises CheckpointError or DataError."""
        model = load_text_model(target.reference, device=self._device, offline=self._offline)
        model.name = clean_text(model.name)
        return model, texts_for(model, self._source, self._names)


def evaluation_of_text(
    target: Target,
    inputs: TextInputs,
    *,
    texts: str,
    trigger: Path | None,
    target_name: str | None,
    seed: int,
) -> tuple[dict[str, Any], Any]:
    """Return the document of an evaluation, and the evaluation."""
    model, clean = inputs.read(target)
    document: dict[str, Any] = {
        "schema": "pydetox.eval/1",
        "exit_code": exit_codes.CLEAN,
        "kind": "text",
        "name": model.name,
        "sha256": model.sha256,
        "texts": texts,
        "trigger": trigger,
    }
    if model.kind == "causal":
        known, found = evaluation_of_causal(
            model, clean, trigger=trigger, target_name=target_name, seed=seed
        )
        return {**document, **known}, found
    if model.kind == "tower":
        raise UsageError(
            f"{model.name}: a text tower has no accuracy of its own; evaluate its whole CLIP"
        )
    index, words = None, None
    if trigger is not None:
        file = read_words(trigger)
        chosen = file.select(target_name)[0]
        name = target_name or file.targets[chosen]
        if name is None:
            raise UsageError(f"{trigger}: names no class; give target=")
        if name not in model.class_names:
            raise DataError(f"class {name!r} is not one of {model.name}'s: {model.class_names}")
        index, words = model.class_names.index(name), file.triggers[chosen]
    result = evaluate_texts(model, clean, trigger=words, target=index, seed=seed)
    document |= {
        "words": None if words is None else words.text,
        "target_name": None if index is None else model.class_names[index],
        "class_names": model.class_names,
        **evaluation_document(result),
    }
    return document, result


def words_of_text(
    target: Target,
    inputs: TextInputs,
    config: TextScanConfig,
    *,
    classes: Sequence[str],
    folder: Path,
    overwrite: bool,
) -> dict[str, Any]:
    """Search for words, write them to a folder, and return the document."""
    model, clean = inputs.read(target)
    if model.kind == "tower":
        raise UsageError(f"{model.name}: a text tower has no classes; scan shows its triggers")
    if model.kind == "causal":
        rows = rows_of_causal(model, clean, config, targets=classes)
    else:
        rows = _rows_of_classes(model, clean, config, classes)
    rows.sort(key=lambda row: row["loss"])  # the first into a class is the one that works best
    file = WordsFile(
        tuple(TokenTrigger(tuple(r["tokens"]), r["text"], r["place"]) for r in rows),
        tuple(r["target"] for r in rows),
        tuple({key: r[key] for key in ("loss", "success", "length")} for r in rows),
        {"checkpoint": model.name, "sha256": model.sha256, "seed": config.seed},
    )
    with atomic_directory(folder, overwrite=overwrite, replaceable={WORDS_NAME}) as temporary:
        (temporary / WORDS_NAME).write_text(file.to_json(), encoding="utf-8")
    works = any(row["success"] >= 0.5 for row in rows)
    return {
        "schema": "pydetox.invert/1",
        "exit_code": exit_codes.CLEAN if works else exit_codes.ERROR,
        "kind": "text",
        "name": model.name,
        "sha256": model.sha256,
        "seed": config.seed,
        "objective": "targeted",
        "triggers": rows,
        "path": folder / WORDS_NAME,
    }


def _rows_of_classes(
    model: TextModel, texts: TextSet, config: TextScanConfig, classes: Sequence[str]
) -> list[dict[str, Any]]:
    unknown = [name for name in classes if name not in model.class_names]
    if unknown:
        raise UsageError(f"class {unknown[0]!r} is not one of {model.name}'s: {model.class_names}")
    found = search_words(model, texts, config)
    return [
        {**words_row(one), "length": length, "target": model.class_names[c]}
        for c, row in enumerate(found.found)
        for length, one in enumerate(row, 1)
        if not classes or model.class_names[c] in classes
    ]
