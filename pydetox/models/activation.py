"""A check for weights that were trained with another activation than the named architecture has.

OpenAI's CLIP and some others compute x sigmoid(1.702 x), "QuickGELU", in place of GELU. The names
and shapes of the weights are the same. The weights therefore load under either architecture, and
under the wrong one the model computes something else.
"""

from __future__ import annotations

import re
from functools import lru_cache

from ..checkpoints import Checkpoint
from ..errors import ArchitectureError

#: Entries of OpenAI's own archives that describe the model and are no weights.
OPENAI_ENTRIES = frozenset({"input_resolution", "context_length", "vocab_size"})


def require_right_activation(checkpoint: Checkpoint) -> None:
    """Refuse OpenAI's weights under an architecture with GELU that the user named.

    They are recognised by the SHA-256 of the files that open_clip lists, and by entries that
    OpenAI's archives have beside the weights. A checkpoint that names its own architecture is not
    refused.

    Raises:
        ArchitectureError: They are such weights. The message has the architecture to name instead.
    """
    config = checkpoint.model_config or {}
    if checkpoint.named is None or config.get("quick_gelu"):
        return
    known = checkpoint.sha256 in _openai_files()
    if known or checkpoint.state_dict.keys() >= OPENAI_ENTRIES:
        how = "by the hash of the file" if known else "by the entries beside the weights"
        raise ArchitectureError(
            f"{checkpoint.name}: these are weights of OpenAI ({how}), which were trained with "
            f"QuickGELU, and {checkpoint.named} has GELU: they would compute something else; name "
            f"{_quick_name(checkpoint.named)}"
        )


def _quick_name(name: str) -> str:
    from open_clip import list_models

    quick = f"{name}-quickgelu"
    if quick in list_models():
        return f"{quick} with model="
    return 'a JSON configuration with "quick_gelu": true with model='


@lru_cache(maxsize=1)
def _openai_files() -> frozenset[str]:
    """Return the SHA-256 of OpenAI's files, which their addresses hold."""
    from open_clip.pretrained import get_pretrained_url, list_pretrained_models_by_tag

    urls = (get_pretrained_url(m, "openai") for m in list_pretrained_models_by_tag("openai"))
    found = (re.search(r"/([0-9a-f]{64})/", url or "") for url in urls)
    return frozenset(match[1] for match in found if match is not None)
