"""Reading an ImageFolder: one sub-folder per class, or one folder of unlabelled images."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from ..progress import track
from .image_set import ImageSet
from .listing import Listing, list_images
from .resize import MAX_PIXELS, Resizing, refuse_too_large
from .sampling import sample_order

# The largest grey value of an image in RGB. Images of 16 and 32 bits may have larger ones.
_MOST_GREY = 255


def load_image_folder(
    directory: Path,
    *,
    resizing: Resizing,
    max_images: int | None,
    seed: int,
    class_names: tuple[str, ...] | None,
    labels_required: bool,
    strict: bool,
    workers: int | None,
) -> ImageSet:
    """Read `directory`; see `pydetox.data.load_images` for the arguments and the errors.

    Images are ordered by class and then by the code points of their relative path. The order
    depends neither on the file system nor on the number of workers.
    """
    chosen = choose_images(
        directory,
        max_images=max_images,
        seed=seed,
        class_names=class_names,
        labels_required=labels_required,
    )
    paths, labels, report = chosen.paths, chosen.labels, chosen.report
    if strict:
        report.refuse()
    size = resizing.image_size
    images = torch.empty((len(paths), 3, size, size), dtype=torch.uint8)
    pixels = images.numpy()

    clipped: NDArray[np.bool_] = np.zeros(len(paths), dtype=bool)

    def decode(index: int) -> DataError | None:
        try:
            pixels[index], clipped[index] = _decode(paths[index], resizing)
        except DataError as error:
            return error
        return None

    executor = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
    errors: list[DataError | None] = []
    try:
        with warnings.catch_warnings():
            # Pillow's, about transparency in palettes and sizes that are checked here.
            warnings.simplefilter("ignore")
            # map() yields results in order, so the error names the first bad file in that order.
            results = executor.map(decode, range(len(paths)))
            for error in track(results, "Decoding images", total=len(paths)):
                if error is not None and strict:
                    raise error
                errors.append(error)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    bad = [index for index, error in enumerate(errors) if error is not None]
    if len(bad) == len(paths):
        first = errors[0]
        assert first is not None
        raise first
    if bad:
        for index in bad:
            name = paths[index].relative_to(directory).as_posix()
            report.leave_out("that cannot be read as images", name)
        good = [index for index, error in enumerate(errors) if error is None]
        images = images[good]
        labels = None if labels is None else labels[good]
    if clipped.any():
        example = paths[int(clipped.argmax())].relative_to(directory).as_posix()
        report.notes.append(
            f"{int(clipped.sum())} with grey values above {_MOST_GREY}, which become white, as in "
            f"open_clip ({example}): save them with 8 bits"
        )
        if strict:
            report.refuse()
    report.images, report.resizing = len(images), resizing
    report.classes = None if labels is None else len(np.unique(labels))
    return ImageSet(
        images,
        None if labels is None else torch.from_numpy(labels),
        chosen.class_names,
        directory.name,
        report,
    )


def choose_images(
    directory: Path,
    *,
    max_images: int | None,
    seed: int,
    class_names: tuple[str, ...] | None,
    labels_required: bool,
) -> Listing:
    """Return the images that are read, with their labels, the class names and what is left out.

    This opens folders only, and no image. Raises DataError for a folder that is no image set.
    """
    found = list_images(directory, class_names, labels_required=labels_required)
    if max_images is not None and max_images < len(found.paths):
        # The sample is drawn before decoding, so the rest of the folder is never opened.
        chosen = sample_order(found.labels, len(found.paths), max_images, seed)
        found.paths = [found.paths[index] for index in chosen]
        found.labels = None if found.labels is None else found.labels[chosen]
    return found


def _decode(path: Path, resizing: Resizing) -> tuple[NDArray[np.uint8], bool]:
    """Return one image as uint8 [3, image_size, image_size], and whether values were clipped."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            refuse_too_large(width, height, str(path))
            clipped = image.mode[0] in "IF" and image.getextrema()[1] > _MOST_GREY
            square = resizing(image, str(path))
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{path}: more pixels than the {MAX_PIXELS:,} that are read (decompression bomb?)"
        ) from error
    except Exception as error:
        # Pillow's decoders raise many kinds of errors for damaged files (OSError, SyntaxError,
        # ValueError, struct.error, zlib.error, ...). Here, all of them mean a damaged file.
        raise DataError(f"{path}: cannot be read as an image: {error}") from error
    pixels: NDArray[np.uint8] = np.asarray(square).transpose(2, 0, 1)
    return pixels, bool(clipped)
