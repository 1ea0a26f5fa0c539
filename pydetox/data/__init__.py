"""Images, class names and prompt templates: all that enters pydetox besides the checkpoint."""

from __future__ import annotations

from .digits import DIGIT_NAMES, load_digits
from .fashion_mnist import (
    FASHION_NAMES,
    FASHION_TEMPLATES,
    load_fashion_mnist,
    split_fashion_mnist,
)
from .image_set import ImageSet
from .load import default_templates, load_images, locate_images
from .names import (
    DEFAULT_TEMPLATES,
    DIGIT_TEMPLATES,
    Template,
    fill_template,
    fill_templates,
    load_class_names,
    load_templates,
)
from .objects import ImageData
from .report import ImageReport
from .resize import Resizing
from .source import ImageSource
from .splits import Splits, split_in_four

__all__ = [
    "DEFAULT_TEMPLATES",
    "DIGIT_NAMES",
    "DIGIT_TEMPLATES",
    "FASHION_NAMES",
    "FASHION_TEMPLATES",
    "ImageData",
    "ImageReport",
    "ImageSet",
    "ImageSource",
    "Resizing",
    "Splits",
    "Template",
    "default_templates",
    "fill_template",
    "fill_templates",
    "load_class_names",
    "load_digits",
    "load_fashion_mnist",
    "load_images",
    "load_templates",
    "locate_images",
    "split_fashion_mnist",
    "split_in_four",
]
