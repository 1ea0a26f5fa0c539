"""Harmless files as people have them, each with what has to become of it.

`HONEST` maps a name to a function that writes the file's content: values that stand beside the
weights, layouts of training scripts, formats of other versions.
"""

from __future__ import annotations

import argparse
import array
import collections
import datetime
import decimal
import fractions
import http
import io
import ipaddress
import json
import pathlib
import random
import re
import time
import types
import typing
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0])}


@dataclass(frozen=True)
class Honest:
    """A harmless file.

    Attributes:
        name: What is in it.
        make: Its content.
        rules: Of the findings that it is read with.
        refused: Part of the message, for the few that are not read.
        suffix: Of its name.
    """

    name: str
    make: Callable[[], bytes]
    rules: frozenset[str] = frozenset()
    refused: str | None = None
    suffix: str = ".pt"

    def build(self, folder: Path) -> Path:
        """Write the file into a folder."""
        path = folder / f"a{self.suffix}"
        path.write_bytes(self.make())
        return path


def saved(content: object, **options: Any) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _recursive() -> tuple[object, ...]:
    inner: list[object] = []
    made = (inner,)
    inner.append(made)
    return made


def _with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.partition_dim = 0  # type: ignore[attr-defined]
    return tensor


VALUES: dict[str, Callable[[], object]] = {
    "torch version": lambda: torch.__version__,
    "defaultdict": lambda: collections.defaultdict(int, a=1),
    "types": lambda: [int, str, float, bool, list, dict, tuple],
    "range": lambda: range(3),
    "typing.Any": lambda: typing.Any,
    "SimpleNamespace": lambda: types.SimpleNamespace(lr=1),
    "PurePosixPath": lambda: pathlib.PurePosixPath("a/b"),
    "PureWindowsPath": lambda: pathlib.PureWindowsPath("a\\b"),
    "path": lambda: pathlib.Path("runs"),
    "time with zone": lambda: datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
    "date": lambda: datetime.date(2024, 1, 2),
    "time": lambda: datetime.time(1, 2),
    "uuid": uuid.uuid4,
    "Decimal": lambda: decimal.Decimal("1.5"),
    "Fraction": lambda: fractions.Fraction(1, 3),
    "numpy generator": lambda: np.random.default_rng(0),
    "numpy RandomState": lambda: np.random.RandomState(0),
    "numpy MT19937": lambda: np.random.MT19937(0),
    "numpy state": lambda: np.random.RandomState(0).get_state(),
    "numpy dtype": lambda: np.dtype("float32"),
    "numpy scalar types": lambda: [np.float32, np.int64, np.bool_],
    "numpy dtype class": lambda: type(np.dtype("float32")),
    "numpy array": lambda: np.arange(3),
    "numpy scalar": lambda: np.float64(0.5),
    "numpy text": lambda: np.array(["a"]),
    "large integer": lambda: 1 << 3000,
    "recursive tuple": _recursive,
    "frozenset": lambda: frozenset([1]),
    "set": lambda: {1, 2},
    "bytearray": lambda: bytearray(b"x"),
    "bytes": lambda: b"\xff\x00",
    "complex": lambda: 1 + 2j,
    "Namespace": lambda: argparse.Namespace(lr=1e-3),
    "OrderedDict": lambda: collections.OrderedDict(a=1),
    "Counter": lambda: collections.Counter("ab"),
    "deque": lambda: collections.deque([1], 3),
    "Size": lambda: torch.Size([1, 2]),
    "device": lambda: torch.device("cpu"),
    "dtype": lambda: torch.float32,
    "layout": lambda: torch.sparse_coo,
    "quantised tensor": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "sparse tensor": lambda: torch.eye(3).to_sparse(),
    "generator state": lambda: torch.Generator().get_state(),
    "optimizer": lambda: {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1}]},
    "Ellipsis": lambda: ...,
    "compiled pattern": lambda: re.compile("a+", re.IGNORECASE),
    "HTTP status": lambda: http.HTTPStatus(200),
    "bytes in memory": lambda: io.BytesIO(b"x"),
    "text in memory": lambda: io.StringIO("x"),
    "array of the library": lambda: array.array("f", [1]),
    "address": lambda: ipaddress.ip_network("10.0.0.0/8"),
    "local time": lambda: time.gmtime(0),
    "random numbers": lambda: random.Random(0),
    "error": lambda: ValueError("too large"),
    "masked array": lambda: np.ma.array([1, 2], mask=[0, 1]),
    "list of integers as a type": lambda: list[int],
    "best accuracy as a tensor": lambda: torch.tensor(0.9),
    "class weights as a tensor": lambda: torch.ones(10),
    "metrics as tensors": lambda: {"loss": torch.tensor(0.1), "val.acc": torch.tensor(0.9)},
}
LAYOUTS = [
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "ema",
    "params",
    "params_ema",
    "weights",
    "generator",
    "student",
    "teacher",
    "backbone",
    "clip",
]

HONEST: list[Honest] = []


def _add(name: str, make: Callable[[], bytes], *rules: str, refused: str | None = None) -> None:
    HONEST.append(Honest(name, make, frozenset(rules), refused))


for _name, _make in VALUES.items():
    for _protocol in (2, 4, 5):
        _add(
            f"{_name} beside the weights, protocol {_protocol}",
            lambda m=_make, p=_protocol: saved(  # type: ignore[misc]
                {"state_dict": WEIGHTS, "x": m()}, pickle_protocol=p
            ),
        )
for _key in LAYOUTS:
    _add(f"weights under {_key}", lambda k=_key: saved({k: WEIGHTS, "epoch": 3}))  # type: ignore[misc]
    _add(
        f"weights under {_key} before 1.6",
        lambda k=_key: saved(  # type: ignore[misc]
            {k: WEIGHTS, "epoch": 3}, _use_new_zipfile_serialization=False
        ),
    )
_add("weights alone", lambda: saved(WEIGHTS))
_add("weights under a nested key", lambda: saved({"trainer": {"model": WEIGHTS}, "epoch": 1}))
_add("negative view", lambda: saved({"a": torch._neg_view(torch.ones(3))}))
_add("conjugate view", lambda: saved({"a": torch.tensor([1 + 1j, 2]).conj()}))
_add("tensor with an attribute", lambda: saved({"a": _with_attribute(torch.ones(2))}))
_add(
    "parameter with an attribute",
    lambda: saved({"a": _with_attribute(torch.nn.Parameter(torch.ones(2)))}),
)
_add("OrderedDict with metadata", lambda: saved(torch.nn.Linear(2, 3).state_dict()))
_add("Counter of weights", lambda: saved(collections.Counter(WEIGHTS)))
_add("defaultdict of weights", lambda: saved(collections.defaultdict(list, WEIGHTS)))
_add("protocol 1", lambda: saved({"state_dict": WEIGHTS, "epoch": 3}, pickle_protocol=1))
_add(
    "averaged weights beside the others",
    lambda: saved({"model": WEIGHTS, "model_ema": {k: v + 1 for k, v in WEIGHTS.items()}}),
    "several-weights",
)
_add(
    "state_dict_ema beside state_dict",
    lambda: saved({"state_dict": WEIGHTS, "state_dict_ema": {k: -v for k, v in WEIGHTS.items()}}),
    "several-weights",
)
for _key in ("model", "net", "model_state_dict", "module"):
    _add(
        f"the best accuracy as a tensor beside {_key}",
        lambda k=_key: saved({k: WEIGHTS, "best": torch.tensor(0.9), "val.acc": torch.tensor(0.9)}),  # type: ignore[misc]
    )
_add(
    "numbers of an average beside the weights",
    lambda: saved({"state_dict": WEIGHTS, "ema": {"decay": torch.tensor(0.99), "updates": 3}}),
)
_add(
    "prototypes beside the weights",
    lambda: saved({"net": {"conv.weight": torch.ones(2, 3)}, "prototypes": torch.ones(4, 5)}),
)
_add(
    "averaged model of torch",
    lambda: saved(torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 3)).state_dict()),
)
_add(
    "averaged model of torch under model_ema alone",
    lambda: saved(
        {"model_ema": torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 3)).state_dict()}
    ),
)
_add(
    "a state of modules among the weights",
    lambda: saved({**WEIGHTS, "_extra_state": None, "x._extra_state": io.BytesIO(b"x")}),
)
_add("an epoch among the weights", lambda: saved({"epoch": 3, "lr": 0.1, "arch": "x", **WEIGHTS}))
_add(
    "an optimizer among the weights",
    lambda: saved({**WEIGHTS, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}),
)
_add(
    "a number of an average among the weights of state_dict",
    lambda: saved({"state_dict": {**WEIGHTS, "step": 3, "none": None}, "epoch": 2}),
)
_add(
    "an expanded number as a weight",
    lambda: saved({"a": torch.zeros(1).expand(50), "b": torch.ones(3, 1).expand(3, 9)}),
)
_add("the same weights twice", lambda: saved({"state_dict": WEIGHTS, "model": WEIGHTS}))
_add(
    "a whole module",
    lambda: saved(torch.nn.Linear(2, 3)),
    refused="holds a whole object, of the class 'torch.nn.modules.linear.Linear'",
)
_add(
    "an activation beside the weights",
    lambda: saved({"state_dict": WEIGHTS, "act": torch.nn.functional.relu}),
    refused="holds 'torch.nn.functional.relu', which is not understood here",
)
_add(
    "a type hint beside the weights",
    lambda: saved({"state_dict": WEIGHTS, "kind": typing.Optional[int]}),  # noqa: UP045
    refused="holds '_operator.getitem', which is not understood here",
)


def safetensors(prefix: bytes = b"", metadata: object = ...) -> bytes:
    """A safetensors file with one tensor."""
    header: dict[str, object] = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    if metadata is not ...:
        header["__metadata__"] = metadata
    raw = prefix + json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(4)


HONEST += [
    Honest("safetensors", safetensors, suffix=".safetensors"),
    Honest("null metadata", lambda: safetensors(metadata=None), suffix=".safetensors"),
    Honest("leading blanks", lambda: safetensors(b" \n\t "), suffix=".safetensors"),
    Honest("empty metadata", lambda: safetensors(metadata={}), suffix=".safetensors"),
]
