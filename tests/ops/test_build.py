"""What the build knows before it compiles anything: cmake/locate.py and cmake/build_backend.py."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

CMAKE = Path(__file__).resolve().parents[2] / "cmake"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(CMAKE)
    import build_backend

    return build_backend


def test_locate_finds_torch_without_importing_it() -> None:
    program = f"import sys; sys.path.insert(0, {str(CMAKE)!r}); import locate; locate.main(); "
    program += "sys.exit('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    root, version, cuda, pybind11 = result.stdout.split(";")
    assert Path(root) == Path(torch.__file__).parent
    assert torch.__version__.split("+")[0] == version
    assert cuda == (torch.version.cuda or "none")
    assert (Path(pybind11) / "pybind11Config.cmake").is_file()


def test_torch_is_asked_for_only_where_it_is_missing_or_old(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backend.get_requires_for_build_wheel() == []
    for version, wanted in [(None, True), ("2.9.1", True), ("2.10.0", False), ("3.0", False)]:
        found = None if version is None else backend.find_torch()._replace(version=version)
        monkeypatch.setattr(backend, "find_torch", lambda found=found: found)
        assert backend.get_requires_for_build_editable() == (["torch>=2.10"] if wanted else [])
        monkeypatch.undo()
        monkeypatch.syspath_prepend(CMAKE)
