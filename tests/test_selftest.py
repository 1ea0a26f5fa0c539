"""The self-test: complete, passing here, and able to fail."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from pydetox import selftest as module
from pydetox.cli import cli
from pydetox.selftest import selftest
from pydetox.selftest.operators import Case, cases


def test_every_operator_is_in_it() -> None:
    names = torch._C._dispatch_get_all_op_names()
    operators = {name.removeprefix("pydetox::") for name in names if name.startswith("pydetox::")}
    assert {case.operator for case in cases()} == {*operators, "attention"}


def test_passes_here() -> None:
    outcomes = list(selftest([torch.device("cpu")]))
    assert [o for o in outcomes if not o.passed] == []
    assert all(o.bytes > 0 and o.gigabytes_per_second > 0 for o in outcomes)
    notes = {o.note for o in outcomes if o.operator == "attention"}
    assert notes == {"FlashAttention for CPUs"}  # bfloat16, too, though a search takes products
    assert {o.dtype for o in outcomes} == {"float16", "bfloat16", "float32", "float64"}


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_wrong_result_does_not_pass(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    x = torch.linspace(0.1, 1, 7)
    case = Case(
        "stamp_triggers",
        "7",
        torch.float32,
        (x,),
        lambda t: (t + wrong,),
        lambda t: (t,),
        x.nbytes,
    )
    monkeypatch.setattr(module, "cases", lambda: iter([case]))
    (outcome,) = selftest([torch.device("cpu")])
    assert not outcome.passed
    result = CliRunner().invoke(cli, ["doctor", "--selftest"])
    assert result.exit_code == 2
    assert "WRONG" in result.stdout
    assert "1 cases on 1 device, 1 wrong" in result.stdout
    document = json.loads(
        CliRunner().invoke(cli, ["doctor", "--selftest", "--format", "json"]).stdout
    )
    assert document["exit_code"] == 2
    assert document["selftest"][0]["passed"] is False
