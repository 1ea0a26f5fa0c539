"""Index of a file of torch before 1.6: five pickles one behind the other, then the weights.

The pickles are a magic number, a format version, facts about the machine, the content, and the keys
of the storages in their order; behind them lies each storage with the number of its elements
(``torch/serialization.py``, ``_legacy_load``).
"""

from __future__ import annotations

from pydetox.checkpoints.index import FileIndex, Findings, Span, WeightsFile, quote
from pydetox.checkpoints.pickle_index import MAX_PICKLE_BYTES, read_pickle
from pydetox.checkpoints.pickle_values import Mapping
from pydetox.checkpoints.torch_index import lay_out
from pydetox.checkpoints.weight_sets import choose_weights
from pydetox.errors import CheckpointError, UnsafeCheckpointError

LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001


def index_legacy(file: WeightsFile, weights_key: str | None = None) -> FileIndex:
    """Index a file of torch before 1.6.

    Args:
        file: The file.
        weights_key: Which dictionary holds the weights (see :func:`choose_weights`).

    Raises:
        CheckpointError: It is damaged, or holds no dictionary of tensors.
        UnsafeCheckpointError: It would run code elsewhere, or holds bytes that nothing describes.
    """
    findings = Findings()
    head = file.read_at(0, min(file.size, MAX_PICKLE_BYTES), "the pickles")
    _refuse_tar(head)
    magic = read_pickle(head, findings, legacy=True)
    version = read_pickle(head, findings, start=magic.end, legacy=True)
    machine = read_pickle(head, findings, start=version.end, legacy=True)
    content = read_pickle(head, findings, start=machine.end, legacy=True)
    keys = read_pickle(head, findings, start=content.end, legacy=True)
    if type(magic.root) is not int or magic.root != _MAGIC:
        raise CheckpointError("is damaged: its magic number is wrong")
    if type(version.root) is not int or version.root != _VERSION:
        raise CheckpointError(f"has format version {quote(version.root)}, expected {_VERSION}")
    if not isinstance(machine.root, Mapping) or machine.root.get("little_endian") is not True:
        raise CheckpointError("was written on a machine of another byte order")
    if any(part.storages for part in (magic, version, machine, keys)):
        raise CheckpointError("is damaged: storages where none belong")
    parsed = {0: head[: keys.end]}
    spans: dict[str, Span] = {}
    position = keys.end
    for key in _check_keys(keys.root, set(content.storages)):
        storage = content.storages[key]
        prefix = file.read_at(position, 8, f"storage {quote(key)}")
        if int.from_bytes(prefix, "little") != storage.count:
            raise CheckpointError(f"storage {quote(key)}: says another size than the pickle")
        parsed[position] = prefix
        spans[key] = Span(position + 8, storage.nbytes)
        position += 8 + storage.nbytes
        if position > file.size:
            raise CheckpointError(f"is truncated or damaged: storage {quote(key)} is not all there")
    if position != file.size:
        raise UnsafeCheckpointError(f"ends with {file.size - position} hidden bytes")
    key, tensors = choose_weights(content.root, findings, weights_key)
    used = {tensor.storage.key for tensor in tensors.values()}
    others = tuple(span for name, span in spans.items() if name not in used)
    storages = {name: span for name, span in spans.items() if name in used}
    return lay_out(key, tensors, storages, others, findings, parsed)


def _check_keys(keys: object, expected: set[str]) -> list[str]:
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise CheckpointError("is damaged: expected a list of the storages behind the content")
    if len(set(keys)) != len(keys) or set(keys) != expected:
        raise CheckpointError("is damaged: its list of storages is not that of its tensors")
    return keys


def _refuse_tar(head: bytes) -> None:
    """Refuse a file that is a tar archive as well: torch tries to read it as one first."""
    block = head[:512]
    if len(block) < 512:
        return
    field = block[148:156]
    if field[0] in (0o200, 0o377):
        claimed = int.from_bytes(field[1:], "big")
    else:
        digits = field.partition(b"\0")[0].strip()
        try:
            claimed = int(digits or b"0", 8)
        except ValueError:
            return
    rest = block[:148] + b" " * 8 + block[156:]
    signed = sum(byte - 256 if byte > 127 else byte for byte in rest)
    if claimed in (sum(rest), signed):
        raise UnsafeCheckpointError("is a tar archive and a file of torch before 1.6 at once")
