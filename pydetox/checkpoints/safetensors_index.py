"""Index of a ``.safetensors`` file: length of the header, JSON header, bytes of the tensors.

Format: https://github.com/huggingface/safetensors (README, "Format"). Of a name that occurs twice
the last entry counts, as in the library; other readers may see another model, so that it is noted.
"""

from __future__ import annotations

import json
from typing import NoReturn, cast

from pydetox.checkpoints.index import (
    ITEM_SIZES,
    FileIndex,
    Findings,
    Span,
    TensorEntry,
    WeightsFile,
    check_extents,
    check_name,
    fingerprint,
    quote,
)
from pydetox.errors import CheckpointError, UnsafeCheckpointError

#: A ViT-B/32 has 40 KB. Python needs about 50 times the size of a header to parse it.
MAX_HEADER_BYTES = 4 << 20

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
#: Codes to write, by torch's name of the dtype.
DTYPE_CODES = {name: code for code, name in _DTYPES.items()}


def index_safetensors(file: WeightsFile) -> FileIndex:
    """Index a ``.safetensors`` file.

    Raises:
        CheckpointError: The file is truncated or damaged.
        UnsafeCheckpointError: Its header is oversized.
    """
    prefix = file.read_at(0, 8, "the header length")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        start = file.read_at(0, min(file.size, 32), "the start of the file")
        if start[8:9] != b"{":
            raise CheckpointError(f"is not a safetensors file (it begins with {start[:16]!r})")
        raise UnsafeCheckpointError(
            f"claims a header of {length} bytes, at most {MAX_HEADER_BYTES} are accepted"
        )
    raw = file.read_at(8, length, "the header")
    findings = Findings()
    header = _parse(raw)
    metadata = _metadata(_unique(header, findings).get("__metadata__"), findings)
    data = 8 + length
    entries: dict[str, TensorEntry] = {}
    places: dict[str, tuple[int, int]] = {}
    # All of them, in the library's way: an entry that does not count has to be right as well.
    for name, value in header.pairs:
        if name != "__metadata__":
            check_name(name, findings)
            entries[name], begin, end = _tensor(name, value)
            places[name] = begin, end
    spans = [(begin, end, name) for name, (begin, end) in places.items()]
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise CheckpointError(
                f"tensor {quote(name)}: begins at byte {begin} of the data, expected {position} "
                "(no gaps, no overlap)"
            )
        position = end
    if data + position != file.size:
        raise CheckpointError(
            f"is truncated or damaged: its header describes {data + position} bytes, but the file "
            f"has {file.size}"
        )
    if not entries:
        raise CheckpointError("holds no tensors")
    parsed, digest = fingerprint({0: prefix + raw})
    return FileIndex(
        format="safetensors",
        tensors=entries,
        storages={name: Span(data + begin, end - begin) for begin, end, name in spans},
        metadata=metadata,
        findings=findings.result(),
        parsed=parsed,
        parsed_sha256=digest,
    )


class _Object:
    """A JSON object as it stands in the file, with whatever occurs twice."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        self.pairs = pairs


def _parse(raw: bytes) -> _Object:
    try:
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_Object, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is damaged: its header is not valid JSON ({error})") from None
    if not isinstance(header, _Object):
        raise CheckpointError("is damaged: its header is not a JSON object")
    return header


def _unique(content: _Object, findings: Findings) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in content.pairs:
        _check_text(key, f"the name {quote(key)} in its header")
        if key in result:
            if key == "__metadata__":
                raise CheckpointError("is damaged: its metadata is there twice")
            findings.add("duplicate-key", f"name {quote(key)}: is there twice; the last one counts")
        result[key] = value
    return result


def _check_text(text: str, what: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise CheckpointError(f"is damaged: {what} is not text")


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _metadata(value: object, findings: Findings) -> dict[str, str]:
    if value is None:  # missing, or null: the same to the library
        return {}
    if not isinstance(value, _Object):
        raise CheckpointError("is damaged: its metadata is not a JSON object")
    metadata = _unique(value, findings)
    for key, text in value.pairs:
        if not isinstance(text, str):
            raise CheckpointError(f"is damaged: its metadata {quote(key)} is not text")
        _check_text(text, f"its metadata {quote(key)}")
    return cast("dict[str, str]", metadata)


def _tensor(name: str, value: object) -> tuple[TensorEntry, int, int]:
    """Entry and data offsets (first byte, byte after the last) of one tensor of the header."""
    pairs = value.pairs if isinstance(value, _Object) else []
    fields = dict(pairs)
    if set(fields) != {"dtype", "shape", "data_offsets"} or len(fields) != len(pairs):
        raise CheckpointError(
            f"tensor {quote(name)}: expected dtype, shape and data_offsets in the header, each once"
        )
    code = fields["dtype"]
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise CheckpointError(f"tensor {quote(name)}: has the unsupported dtype {quote(code)}")
    label = f"tensor {quote(name)}"
    shape = check_extents(label, fields["shape"], "shape")
    offsets = check_extents(label, fields["data_offsets"], "data_offsets")
    strides = []
    count = 1
    for extent in reversed(shape):
        strides.append(max(count, 1))
        count *= extent
    nbytes = count * ITEM_SIZES[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"tensor {quote(name)}: {dtype}{list(shape)} needs {nbytes} bytes, its data_offsets "
            f"are {list(offsets)}"
        )
    return TensorEntry(dtype, shape, tuple(reversed(strides)), name), offsets[0], offsets[1]
