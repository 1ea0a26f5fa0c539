from collections.abc import Iterator

import pytest
import torch

from pydetox.ops import _library


@pytest.fixture(params=_library.native.supported_cpu_capabilities())
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once with every instruction set that this machine has."""
    before = _library.native.cpu_capability()
    _library.native.set_cpu_capability(request.param)
    yield request.param
    _library.native.set_cpu_capability(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
