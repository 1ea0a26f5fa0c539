"""`ImageSource`: an image set that is decoded when the first model of a size needs it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from .digits import DIGIT_NAMES
from .fashion_mnist import FASHION_NAMES, fashion_mnist_files
from .folder import choose_images
from .image_set import ImageSet
from .listing import list_images
from .load import FASHION_PARTS, default_templates, load_images, locate_images, parquet_files
from .names import Template, load_class_names, load_templates
from .resize import Resizing
from .shards import shards_of
from .tables import TABLE_SUFFIXES, files_of_table


@dataclass
class ImageSource:
    """Images that `load_images` reads, with class names and prompts. Each size is decoded once.

    Attributes:
        spec: The source, as in `load_images`: a folder, a .npz file, `digits`, `fashion-mnist`, ...
        class_names: A file or the name of a list, as in `load_class_names`; None for the names in
            the data.
        templates: A file or the name of a list, as in `load_templates`; None for built-in prompts.
        max_images: The size of the random sample; None for all images.
        resize: Whether .npz images of another size are scaled.
        seed: The seed of the sample.
        labels_required: Whether labels are needed, as in `load_images`.
        strict: Whether left-out files are an error, as in `load_images`.
        prompts: The prompt templates.

    Raises:
        DataError: A file cannot be read.
    """

    spec: str
    class_names: str | Path | None = None
    templates: str | Path | None = None
    max_images: int | None = None
    resize: bool = False
    seed: int = 0
    labels_required: bool = True
    strict: bool = False
    prompts: tuple[Template, ...] = field(init=False)
    _names: tuple[str, ...] | None = field(init=False, repr=False)
    _decoded: dict[Resizing, ImageSet] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._names = None if self.class_names is None else load_class_names(self.class_names)
        if self.templates is not None:
            self.prompts = load_templates(self.templates)
        else:
            self.prompts = default_templates(self.spec)

    def read(self, resizing: Resizing) -> ImageSet:
        """Return the images, uint8 [N, 3, image_size, image_size]; raises as `load_images`."""
        if resizing not in self._decoded:
            self._decoded[resizing] = load_images(
                self.spec,
                resizing=resizing,
                max_images=self.max_images,
                seed=self.seed,
                class_names=self._names,
                resize=self.resize,
                labels_required=self.labels_required,
                strict=self.strict,
            )
        return self._decoded[resizing]

    def known_names(self) -> tuple[str, ...] | None:
        """Return the class names that the images will have; None where only reading them tells.

        Raises DataError as `load_images` does for what is no image set.
        """
        if self._names is not None:
            return self._names
        source, root = locate_images(self.spec)
        if source == "digits":
            return DIGIT_NAMES
        if source in FASHION_PARTS:
            return FASHION_NAMES
        if root is not None and root.is_dir() and not self._files():
            return list_images(root, None, labels_required=self.labels_required).class_names
        return None

    def is_unnamed(self) -> bool:
        """Return whether nothing names classes: it is a folder of images without sub-folders.

        Raises DataError as `load_images` does for what is no image set.
        """
        if self._names is not None or self.known_names() is not None:
            return False
        source, root = locate_images(self.spec)
        return not source and root is not None and root.is_dir() and not self._files()

    def _files(self) -> list[Path]:
        """Return the files of shards, of a parquet set or of a table; empty for other sources."""
        if locate_images(self.spec)[0]:
            return []
        path = Path(self.spec)
        found = shards_of(self.spec) or parquet_files(self.spec)
        if found is None and path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
            found = [path, *files_of_table(path)]
        return found or []

    def digest(self) -> str:
        """Return a SHA-256 of the images that are read, with their order, labels and class names.

        It does not depend on files that are not read, such as a README among the images or images
        outside the sample, nor on the path of the folder. Of a data set of torchvision, the names
        and sizes of its files count.

        Raises DataError if `load_images` does.
        """
        hasher = hashlib.sha256()

        def add(*items: object) -> None:
            hasher.update(repr(items).encode(errors="surrogateescape"))

        source, root = locate_images(self.spec)
        add(source, self._names, self.prompts)
        if root is None:
            return hasher.hexdigest()
        files = self._files()
        if files:
            for path in files:
                add(path.name, _digest_or_reason(path))
            return hasher.hexdigest()
        if not root.exists():
            raise DataError(f"{self.spec}: no such file or folder")
        try:
            if source in FASHION_PARTS:
                for path in fashion_mnist_files(FASHION_PARTS[source], root):
                    add(path.name, _file_digest(path))
            elif source:  # of torchvision, of which only the code knows which files it reads
                for path in sorted(p for p in root.rglob("*") if p.is_file()):
                    add(path.relative_to(root).as_posix(), path.stat().st_size)
            elif root.is_dir():
                found = choose_images(
                    root,
                    max_images=self.max_images,
                    seed=self.seed,
                    class_names=self._names,
                    labels_required=self.labels_required,
                )
                add(found.class_names, None if found.labels is None else found.labels.tolist())
                for path in found.paths:
                    add(path.relative_to(root).as_posix(), _digest_or_reason(path))
            else:
                add(_file_digest(root))
        except OSError as error:
            raise DataError(f"{self.spec}: cannot be read: {error.strerror or error}") from error
        return hasher.hexdigest()


def _digest_or_reason(path: Path) -> str:
    """Return a digest of a file, or why it cannot be read: it is left out then."""
    try:
        return _file_digest(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _file_digest(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()
