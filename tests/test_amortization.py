"""bench/amortization.py: what is asserted is what holds at any speed of the machine."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def amortization(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench/amortization.py as a module."""
    spec = importlib.util.spec_from_file_location("amortization", ROOT / "bench" / "amortization.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "amortization", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_floor_is_the_chains_entropy(amortization: Any) -> None:
    """The likelihood of samples under the chain's own probabilities comes out at the floor."""
    _, codes = amortization.chain(400, 5)
    _, orders = amortization.tables()
    nll = 0.0
    for k in range(1, amortization.BOOKS):
        before = torch.nn.functional.pad(codes[:, :-1, 1], (1, 0))
        follows = orders[k, (before if k == 1 else codes[..., 0]) % 4, codes[..., k - 1]]
        other = amortization.NOISE[k] / amortization.VOCAB
        hit = codes[..., k] == follows
        nll -= float(torch.where(hit, math.log(1 - amortization.NOISE[k] + other), math.log(other)).mean())
    assert nll / (amortization.BOOKS - 1) == pytest.approx(amortization.floors()[1], rel=0.01)


@pytest.mark.slow
def test_quick_run(amortization: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert amortization.main(["--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "amortization-quick.json").read_text())
    anew, frozen = result["runs"]
    assert (anew["frozen"], frozen["frozen"]) == (False, True)
    start = anew["curve"][0]["depth_gap"]
    assert anew["depth_gap"] < 0.6 * start  # it learns
    assert frozen["depth_gap"] > 1.5 * anew["depth_gap"]  # and from the same frames every epoch, clearly less
    found = result["unbiasedness"]
    assert found["drawn anew"]["ratio"] < 2.0 and found["frozen"]["ratio"] > 20.0
    assert "| 1/16, frozen | 120 |" in (tmp_path / "amortization-quick.md").read_text()
    assert (tmp_path / "amortization-quick.png").read_bytes().startswith(b"\x89PNG")
    assert "unbiased draws would leave" in capsys.readouterr().out
