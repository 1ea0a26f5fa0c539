"""The names that users give checkpoints, and what they mean.

* ``runs/model.safetensors``: a weights file, or a folder in open_clip's layout.
* ``local-dir:runs/model``: such a folder, named as open_clip does.
* ``hf-hub:org/repo@revision``: a repository on the Hugging Face hub. The revision is optional.
* ``ViT-B-32,laion2b_s34b_b79k``: an architecture and a pretrained tag of open_clip.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydetox.checkpoints.index import quote
from pydetox.checkpoints.layout import is_weights_name
from pydetox.errors import UsageError

Kind = Literal["path", "local-dir", "hf-hub", "open_clip"]

_LOCAL_DIR = "local-dir:"
_HUB = "hf-hub:"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w.+-]*(/[A-Za-z0-9][\w.+-]*)*", re.ASCII)
_HUB_PAGE = re.compile(
    rf"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/({_REPOSITORY.pattern})/?", re.ASCII
)
_OPEN_CLIP = re.compile(r"([A-Za-z0-9][\w.-]*),([A-Za-z0-9][\w.-]*)", re.ASCII)


@dataclass(frozen=True)
class CheckpointReference:
    """A parsed name. Which fields are set depends on ``kind``.

    Attributes:
        kind: ``path``, ``local-dir``, ``hf-hub`` or ``open_clip``.
        text: The name as it was given.
        path: For ``path`` and ``local-dir``.
        repository: ``org/repo``, for ``hf-hub``.
        revision: Branch, tag or commit, for ``hf-hub``; ``None`` is the default branch.
        model: open_clip's name of the architecture, for ``open_clip``.
        tag: open_clip's pretrained tag, for ``open_clip``.
    """

    kind: Kind
    text: str
    path: Path | None = None
    repository: str | None = None
    revision: str | None = None
    model: str | None = None
    tag: str | None = None


def parse_reference(text: str | os.PathLike[str]) -> CheckpointReference:
    """Tell what a checkpoint name means, without looking at the disk or the network.

    A name of the form ``A,B`` without a slash is an open_clip name; write ``./A,B`` for a file of
    that name.

    Raises:
        UsageError: The name is empty, or a hub name is not ``org/repo[@revision]`` (so that it
            cannot lead out of the cache directory).
    """
    if not isinstance(text, str):
        return CheckpointReference("path", os.fspath(text), path=Path(text))
    if not text or "\0" in text:
        raise UsageError(
            f"checkpoint name {quote(text)}: expected a path, local-dir:, hf-hub: or MODEL,TAG"
        )
    if text.startswith(_LOCAL_DIR):
        folder = text[len(_LOCAL_DIR) :]
        if not folder:
            raise UsageError("checkpoint name 'local-dir:': expected a folder after the colon")
        return CheckpointReference("local-dir", text, path=Path(folder).expanduser())
    if text.startswith(_HUB):
        return _parse_hub(text)
    match = _OPEN_CLIP.fullmatch(text)
    if match and not is_weights_name(text):
        return CheckpointReference("open_clip", text, model=match[1], tag=match[2])
    return CheckpointReference("path", text, path=Path(text).expanduser())


def _parse_hub(text: str) -> CheckpointReference:
    repository, at, revision = text[len(_HUB) :].partition("@")
    well_formed = (
        _REPOSITORY.fullmatch(repository)
        and (_REVISION.fullmatch(revision) if at else True)
        and ".." not in text
        and "--" not in repository  # the cache writes a slash so: "models--org--repo"
        and all(len(part) <= 96 for part in repository.split("/"))
        and len(revision) <= 255
    )
    if not well_formed:
        raise UsageError(
            f"checkpoint name {quote(text)}: expected hf-hub:org/repo or hf-hub:org/repo@revision"
        )
    return CheckpointReference("hf-hub", text, repository=repository, revision=revision or None)


def plain_name(text: str) -> str:
    """Return open_clip's spelling of a name that OpenAI writes ViT-B/32 or ViT-L/14@336px."""
    return text.replace("/", "-").replace("@", "-").removesuffix("px")


def hint_for_missing(text: str) -> str:
    """Return what a name that is no file may have meant, or an empty text."""
    path = Path(text)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        text = path.relative_to(Path.cwd()).as_posix()  # as it was typed
    if re.match(r"https?:/", text):
        page = _HUB_PAGE.fullmatch(text)
        if page is not None:
            return f"; a repository of the hub is written {_HUB}{page[1]}"
        return "; an address on the web is not read: download the file and give its path"
    if is_weights_name(text):
        return ""
    model, comma, tag = text.partition(",")
    name = plain_name(model)
    if model.count("/") <= 1 and name in _architectures():
        if comma:
            return f"; open_clip writes {name},{tag}"
        from open_clip import list_pretrained_tags_by_model

        tags = list_pretrained_tags_by_model(name)
        return f"; open_clip writes {name},TAG" + (f", such as {name},{tags[0]}" if tags else "")
    if _REPOSITORY.fullmatch(text.partition("@")[0]):
        return f"; a repository of the hub is written hf-hub:{text}"
    return ""


def _architectures() -> list[str]:
    import open_clip  # takes seconds, and is not needed for a name that is right

    return list(open_clip.list_models())
