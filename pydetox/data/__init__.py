"""Images, class names and prompt templates: all that enters pydetox besides the checkpoint."""

from __future__ import annotations

from .digits import DIGIT_NAMES, load_digits
from .image_set import ImageSet
from .load import load_images
from .names import (
    DEFAULT_TEMPLATES,
    DIGIT_TEMPLATES,
    Template,
    fill_template,
    load_class_names,
    load_templates,
)
from .source import ImageSource

__all__ = [
    "DEFAULT_TEMPLATES",
    "DIGIT_NAMES",
    "DIGIT_TEMPLATES",
    "ImageSet",
    "ImageSource",
    "Template",
    "fill_template",
    "load_class_names",
    "load_digits",
    "load_images",
    "load_templates",
]
