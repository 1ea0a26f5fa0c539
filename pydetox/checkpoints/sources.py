"""Opening and indexing the files of a checkpoint's weights: one, or several shards."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from pydetox.checkpoints.index import (
    FileIndex,
    Finding,
    Format,
    TensorEntry,
    WeightsFile,
    check_sharing,
    quote,
)
from pydetox.checkpoints.layout import find_weights
from pydetox.checkpoints.sandbox import index_in_sandbox
from pydetox.checkpoints.shards import (
    ShardIndex,
    is_shard_index,
    read_shard_index,
    shard_path,
)
from pydetox.checkpoints.weight_sets import strip_prefixes
from pydetox.errors import CheckpointError

__all__ = ["OpenWeights", "find_weights", "open_weights"]


@dataclass
class OpenWeights:
    """Weights that are open and indexed, and not read; a context manager that closes the files.

    Attributes:
        path: The file, or the index of the shards.
        files: Each file with its index, in the order of the shards' names.
        shards: What the index of the shards says; ``None`` for a single file.
    """

    path: Path
    files: list[tuple[WeightsFile, FileIndex]] = field(default_factory=list)
    shards: ShardIndex | None = None

    @property
    def format(self) -> Format:
        """The format of all files."""
        return self.files[0][1].format

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """All tensors; the storages that they name are those of their own file."""
        return {name: entry for _, index in self.files for name, entry in index.tensors.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """The text metadata; of shards, that of the first."""
        return self.files[0][1].metadata

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is odd; for shards, with the name of the shard."""
        if self.shards is None:
            return self.files[0][1].findings
        return tuple(
            Finding(finding.rule, f"shard {quote(Path(file.path).name)}: {finding.message}")
            for file, index in self.files
            for finding in index.findings
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all weights files."""
        return sum(file.size for file, _ in self.files)

    def sha256(self, digests: list[str]) -> str:
        """The checkpoint's hash from those of its files.

        Of shards it is the hash of what ``sha256sum`` prints for them and their index, in bytewise
        order of the names (``LC_ALL=C sha256sum NAMES | sha256sum``).
        """
        if self.shards is None:
            return digests[0]
        names = [Path(file.path).name for file, _ in self.files]
        return self.shards.sha256(dict(zip(names, digests, strict=True)))

    def __enter__(self) -> OpenWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file, _ in self.files:
            file.close()


def open_weights(path: str | os.PathLike[str], weights_key: str | None = None) -> OpenWeights:
    """Open a weights file, or all shards of a ``*.index.json``, and index them.

    ``weights_key``: as for :func:`pydetox.checkpoints.formats.index_file`.

    Raises:
        CheckpointError: A file is missing, damaged or of neither format, or shards and index do not
            fit each other.
        UnsafeCheckpointError: A file is built to do harm, or leads out of its folder.
    """
    path = Path(path)
    with ExitStack() as stack:
        if not is_shard_index(path):
            file = stack.enter_context(WeightsFile(path))
            result = OpenWeights(path, [(file, index_in_sandbox(file, weights_key))])
        else:
            result = OpenWeights(path, shards=read_shard_index(path))
            assert result.shards is not None
            expected_names = _without_prefixes(result.shards)
            for name, expected in expected_names.items():
                try:
                    file = stack.enter_context(WeightsFile(shard_path(path.parent, name)))
                    file.path = os.fspath(path.parent / name)  # not what a link led to
                    index = index_in_sandbox(file, weights_key)
                    if index.format != result.shards.format:
                        raise CheckpointError(
                            f"is a {index.format} file, expected {result.shards.format}"
                        )
                    if index.weights_key and weights_key is None:
                        raise CheckpointError(
                            f"its tensors are under the key {quote(index.weights_key)}, where no "
                            "loader of shards looks"
                        )
                    _compare(expected, index)
                except CheckpointError as error:
                    raise type(error)(f"shard {quote(name)}: {error}") from error
                result.files.append((file, index))
        stack.pop_all()
    return result


def _without_prefixes(shards: ShardIndex) -> dict[str, list[str]]:
    """The names of tensors that each shard has to hold, by shard.

    Of pickles, those without the prefixes of wrappers, if all tensors of all shards carry them.

    Raises:
        CheckpointError: All names of one shard carry a prefix that those of others lack.
    """
    if shards.format == "safetensors":
        return shards.files
    plain = iter(strip_prefixes([name for names in shards.files.values() for name in names]))
    found = {}
    for shard, names in shards.files.items():
        found[shard] = [next(plain) for _ in names]
        alone = strip_prefixes(names)
        if alone != found[shard]:
            prefix = found[shard][0].removesuffix(alone[0])
            raise CheckpointError(
                f"shard {quote(shard)}: the names of all its tensors begin with {prefix!r}, those "
                "of other shards do not; loaders remove that in different ways"
            )
    return found


def _compare(expected: list[str], index: FileIndex) -> None:
    """Check that a shard holds the tensors that the index of the shards says it holds."""
    check_sharing(index.tensors.values(), index.storages)
    wanted = set(expected)
    missing = [name for name in expected if name not in index.tensors]
    extra = [name for name in index.tensors if name not in wanted]
    for kind, names in (
        ("lacks {} that the index says it holds", missing),
        ("holds {} that the index does not say it holds", extra),
    ):
        if names:
            count = f"{len(names)} tensors" if len(names) > 1 else "a tensor"
            shown = ", ".join(map(quote, names[:3])) + (", …" if len(names) > 3 else "")
            raise CheckpointError(f"{kind.format(count)} ({shown})")
