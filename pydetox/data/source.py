"""An image set by its description: decoded when the first model of a size asks for it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from .image_set import ImageSet
from .load import default_templates, load_images, locate_images
from .names import load_class_names, load_templates


@dataclass
class ImageSource:
    """What `load_images` reads, with class names and prompts; each size is decoded once.

    Attributes:
        spec: As `load_images` takes it: a folder, a .npz file, `digits`, `fashion-mnist`, ...
        class_names: File with one class name per line; None for the names the images bring.
        templates: File with one prompt per line; None for built-in prompts.
        max_images: Size of the random sample; None for all images.
        resize: Whether .npz images of another size are scaled.
        seed: Of the sample.
        labels_required: As `load_images` takes it.
        prompts: The prompt templates.

    Raises DataError for files that cannot be read.
    """

    spec: str
    class_names: Path | None = None
    templates: Path | None = None
    max_images: int | None = None
    resize: bool = False
    seed: int = 0
    labels_required: bool = True
    prompts: tuple[str, ...] = field(init=False)
    _names: tuple[str, ...] | None = field(init=False, repr=False)
    _decoded: dict[tuple[int, str], ImageSet] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._names = None if self.class_names is None else load_class_names(self.class_names)
        if self.templates is not None:
            self.prompts = load_templates(self.templates)
        else:
            self.prompts = default_templates(self.spec)

    def read(self, image_size: int, interpolation: str) -> ImageSet:
        """Return the images, uint8 [N, 3, image_size, image_size]; raises as `load_images`."""
        key = (image_size, interpolation)
        if key not in self._decoded:
            self._decoded[key] = load_images(
                self.spec,
                image_size=image_size,
                max_images=self.max_images,
                seed=self.seed,
                class_names=self._names,
                interpolation=interpolation,
                resize=self.resize,
                labels_required=self.labels_required,
            )
        return self._decoded[key]

    def digest(self) -> str:
        """Return a SHA-256 of what is read: images (by path below the folder), names, prompts."""
        hasher = hashlib.sha256(repr((self._names, self.prompts)).encode())
        source, root = locate_images(self.spec)
        hasher.update(source.encode())
        if root is None:
            return hasher.hexdigest()
        if not root.exists():
            raise DataError(f"{self.spec}: no such file or folder")
        try:
            for path in _files(root):
                name = b"" if path == root else os.fsencode(path.relative_to(root))
                hasher.update(b"%d:%b" % (len(name), name))
                hasher.update(_file_digest(path))
        except OSError as error:
            raise DataError(f"{self.spec}: cannot be read: {error.strerror or error}") from error
        return hasher.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        yield root
        return
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield path


def _file_digest(path: Path) -> bytes:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.digest()
