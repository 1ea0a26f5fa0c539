"""What the README shows runs."""

import re
from pathlib import Path

import torch

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_operators_alone() -> None:
    section = README.read_text(encoding="utf-8").split("## The operators alone")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    names: dict[str, torch.Tensor] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["rows"].shape == (8, 16, 49, 3072)
    assert names["masks"].grad is not None
    assert bool(names["masks"].grad.any())
    assert names["gram"].shape == (3, 3)
    assert names["sketch"].shape == (4096,)
