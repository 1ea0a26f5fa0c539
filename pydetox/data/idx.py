"""Reading the IDX files of the MNIST family, plain or gzipped, with their sizes checked first.

Layout: two zero bytes, a type byte (8: uint8), the number of dimensions, one big-endian uint32 per
dimension, then the values. Source: LeCun, Cortes, Burges, "The MNIST database" (file formats).
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

# Data sets like MNIST have 70,000 images. A header that announces far more is forged.
_MAX_ITEMS = 1_000_000


def read_idx(path: Path, item_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the array of an IDX file of uint8 items, [N, *item_shape], N at least 1.

    A file whose name ends in .gz is read as gzip. Never more is unpacked than the header announces.
    Raises DataError, which names the file, if the type or the shape is another one, if the file is
    longer or shorter than its header says, or if it cannot be read.
    """
    expected = "x".join(["N", *map(str, item_shape)])
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            dimensions = 1 + len(item_shape)
            header = stream.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
                raise DataError(
                    f"{path}: begins with {header[:4].hex(' ') or 'nothing'}; expected the header "
                    f"of an IDX file of bytes, {expected}"
                )
            shape = struct.unpack(f">{dimensions}I", header[4:])
            if shape[1:] != item_shape or not 1 <= shape[0] <= _MAX_ITEMS:
                raise DataError(
                    f"{path}: announces {'x'.join(map(str, shape))} values; expected {expected} "
                    f"with N in 1..{_MAX_ITEMS:,}"
                )
            size = int(np.prod(shape))
            content = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(content) != size:
        found = f"{len(content):,}" if len(content) < size else f"more than {size:,}"
        raise DataError(f"{path}: {found} bytes of values; its header announces {size:,}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
