"""What a training noted about the architecture of its weights: BackdoorBench and open_clip.

BackdoorBench's results have the name beside the weights, in the same pickle. open_clip's training
writes `logs/RUN/params.txt` beside `logs/RUN/checkpoints`.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydetox.checkpoints.index import WeightsFile
from pydetox.checkpoints.layout import TRANSFORMERS_CONFIG_NAME
from pydetox.checkpoints.sandbox import index_in_sandbox
from pydetox.errors import CheckpointError

_BACKDOORBENCH = ("attack_result.pt", "defense_result.pt")
_CHECKPOINTS, _PARAMETERS = "checkpoints", "params.txt"
_LARGEST = 1 << 20
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)
#: Parameters of open_clip's training that change the architecture, with what changes nothing.
_CHANGES = {
    "force_quick_gelu": ("False",),
    "force_custom_text": ("False", "True"),  # other names, which readers know
    "force_image_size": ("None",),
    "force_context_length": ("None",),
}


def told_architecture(weights: Path) -> str | None:
    """Return the architecture that a training noted for a weights file, or None.

    The result is a name that the argument ``model=`` takes. A note that is damaged, or that names
    nothing known, counts as none; nothing is executed.
    """
    if weights.name in _BACKDOORBENCH:
        from pydetox.checkpoints.classifier_names import noted_name

        try:
            with WeightsFile(weights) as file:
                return noted_name(index_in_sandbox(file).metadata)
        except CheckpointError:
            return None  # reading the weights raises this error, with its reason
    if weights.parent.name == _CHECKPOINTS:
        return _of_parameters(weights.parent.with_name(_PARAMETERS))
    return None


def told_base(folder: Path) -> str | None:
    """Return the repository that a folder of transformers says its model was made from, or None.

    It is a hint and no more: whoever made the folder wrote it.
    """
    from pydetox.checkpoints.transformers_files import read_object

    try:
        config = read_object(folder / TRANSFORMERS_CONFIG_NAME)
    except CheckpointError:
        return None
    name = config.get("_name_or_path")
    known = isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None
    return str(name) if known and not (folder / str(name)).exists() else None


def _of_parameters(path: Path) -> str | None:
    """Return the architecture in a `params.txt`, whose lines are `name: value`."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None  # also for a pipe, which nothing may ever be written into
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    told = {}
    for line in lines:
        key, colon, value = line.partition(": ")
        if colon:
            told[key.strip()] = value.strip()
    name = told.get("model")
    quick = told.get("force_quick_gelu") == "True"
    plain = all(
        told.get(k, v[0]) in v for k, v in _CHANGES.items() if k != "force_quick_gelu" or not quick
    )
    if not name or not plain:
        return None
    import open_clip

    name = f"{name}-quickgelu" if quick and not name.endswith("-quickgelu") else name
    return name if name in open_clip.list_models() else None
