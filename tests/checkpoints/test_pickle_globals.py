"""Which names in a pickle are harmless, unknown, or refused."""

from __future__ import annotations

import argparse
import inspect
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from pydetox.checkpoints import load_checkpoint
from pydetox.checkpoints.index import Finding, Findings
from pydetox.checkpoints.pickle_calls import TENSOR_FIELDS
from pydetox.checkpoints.pickle_globals import check_global, resolve_global
from pydetox.errors import CheckpointError, UnsafeCheckpointError


def check(full: str) -> tuple[Finding, ...]:
    findings = Findings()
    module, _, name = full.rpartition(".")
    assert check_global(module, name, findings) == full
    return findings.result()


@pytest.mark.parametrize(
    "name",
    [
        "collections.OrderedDict",
        "builtins.set",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "argparse.Namespace",
        "torch.FloatStorage",
        "torch.float8_e4m3fn",
        "torch._utils._rebuild_tensor_v2",
        "pathlib.PosixPath",
    ],
)
def test_harmless(name: str) -> None:
    assert check(name) == ()


@pytest.mark.parametrize(
    "name", ["someproject.options.TrainArgs", "omegaconf.dictconfig.DictConfig", "größe.Maß"]
)
def test_unknown(name: str) -> None:
    (finding,) = check(name)
    assert finding.rule == "unknown-global"
    assert finding.message.isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "posix.system",
        "collections.namedtuple",
        "torch.load",
        "torch._C._something",
        "numpy.testing._private.utils.runstring",
        "_io.FileIO",
        "six.moves.builtins.eval",
        "someproject.util.os.system",
        "someproject.Options.__init__.__globals__",
        "someproject..Options",
        "someproject.a b",
        "someproject.\x1b[31m",
        ".x",
        "x" * 300 + ".y",
    ],
)
def test_refused(name: str) -> None:
    with pytest.raises(UnsafeCheckpointError, match="not on the list of harmless names") as caught:
        check(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("urllib2", "urlopen"),
        ("httplib", "HTTPConnection"),
        ("thread", "start_new_thread"),
        ("anydbm", "open"),
        ("Tkinter", "Tk"),
        ("commands", "getoutput"),
        ("popen2", "popen2"),
        ("UserDict", "UserDict"),
        ("__builtin__", "unichr"),
        ("annotationlib", "call_evaluate_function"),
        ("compression.zstd", "open"),
        ("pipes", "Template"),
        ("telnetlib", "Telnet"),
        ("concurrent.interpreters", "create"),
    ],
)
def test_libraries_of_other_pythons_are_refused(module: str, name: str) -> None:
    for protocol in (2, 4):
        with pytest.raises(UnsafeCheckpointError, match="not on the list of harmless names"):
            resolve_global(module, name, protocol, Findings())


def test_names_that_readers_translate_differently() -> None:
    assert resolve_global("__builtin__", "set", 2, Findings()).name == "builtins.set"
    assert resolve_global("__builtin__", "xrange", 2, Findings()).name == "builtins.range"
    with pytest.raises(CheckpointError, match=r"some readers take it for 'builtins\.set'"):
        resolve_global("__builtin__", "set", 4, Findings())


def test_every_settable_field_of_a_tensor_is_known() -> None:
    settable = {
        name
        for name in dir(torch.Tensor)
        if hasattr(type(inspect.getattr_static(torch.Tensor, name)), "__set__")
    }
    assert {name for name in settable if not name.startswith("__")} <= TENSOR_FIELDS


def test_many_unknown_names_do_not_flood_a_report() -> None:
    findings = Findings()
    for number in range(1000):
        check_global("someproject", f"Class{number}", findings)
        check_global("someproject", f"Class{number}", findings)
    result = findings.result()
    assert len(result) == 11
    assert result[-1] == Finding("unknown-global", "and more of this kind")


class Options:
    """Stands for a class of a project that is not installed here."""


Options.__module__ = "someproject.options"


def test_harmless_values_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    module = types.ModuleType("someproject.options")
    module.Options = Options  # type: ignore[attr-defined]
    package = types.ModuleType("someproject")
    package.options = module  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    options = Options()
    options.depth = 3  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "someproject", package)
        patch.setitem(sys.modules, "someproject.options", module)
        torch.save(
            {
                "state_dict": {"a": torch.ones(2)},
                "best": np.float64(0.5),
                "args": argparse.Namespace(lr=1e-3),
                "options": options,
            },
            buffer,
        )
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    checkpoint = load_checkpoint(tmp_path / "a.pt", model="ViT-B-32")
    assert checkpoint.state_dict["a"].tolist() == [1, 1]
    (finding,) = checkpoint.findings
    assert finding.rule == "unknown-global"
    assert "'someproject.options.Options'" in finding.message
    assert "someproject" not in sys.modules
