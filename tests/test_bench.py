"""The end-to-end benchmark runs as documented and its figures hang together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_e2e_on_the_tiny_size(tmp_path: Any) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "bench" / "e2e.py"), "--size", "tiny", "--frames", "4", "--rounds", "2"]
    subprocess.run([*command, "--no-static", "--no-starts", "--out", str(out)], check=True, cwd=tmp_path)
    result = json.loads(out.read_text())
    stock, *ours = result["variants"]
    assert [row["variant"] for row in ours] == ["accelerated, stock", "accelerated, int8"]
    assert ours[0]["tokens_equal_to_stock"] and ours[0]["mode"] == "compile" and not ours[0]["notes"]
    # A quarter, and what stays fp32: codebook 0's head and one scale per row, which count for much at this size.
    assert 0.25 < ours[1]["bytes_per_frame"] / ours[0]["bytes_per_frame"] < 0.33
    for row in ours:
        assert row["ratio_to_stock"] == pytest.approx(stock["ms_per_frame"] / row["ms_per_frame"])
        assert row["backbone_ms"] + row["depth_ms"] == pytest.approx(row["ms_per_frame"], rel=0.5)
