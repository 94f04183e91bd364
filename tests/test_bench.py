"""The benchmarks run as documented and their figures hang together."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_e2e_on_the_tiny_size(tmp_path: Any) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "bench" / "e2e.py"), "--size", "tiny", "--frames", "4", "--rounds", "2"]
    command += ["--no-static", "--no-starts", "--reference", "2", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    result = json.loads(out.read_text())
    stock, *ours = result["variants"]
    names = ["accelerated, stock", "accelerated, int8"]
    assert [row["variant"] for row in ours] == [name + off for name in names for off in ("", ", guard off")]
    for watched, alone in (ours[:2], ours[2:]):
        assert watched["guard"]["verify"] and not alone["guard"]["verify"]
        assert set(watched["guard"]["check_ms"]) >= {"copies", "depth", "backbone", "formats"}
        assert watched["guard"]["rung"] == "fast" and 0 <= watched["guard"]["share_of_time"] < 0.1
        assert alone["guard"]["share_of_time"] == 0
    assert ours[0]["share_of_codes_equal_to_stock"] == 1.0 and ours[0]["mode"] == "native" and not ours[0]["notes"]
    # A quarter, and what stays fp32: codebook 0's head and one scale per row, which count for much at this size.
    assert 0.25 < ours[2]["bytes_per_frame"] / ours[0]["bytes_per_frame"] < 0.33
    for row in ours:
        assert row["ratio_to_stock"] == pytest.approx(stock["ms_per_frame"] / row["ms_per_frame"])
        # A native frame of this size takes a third of what the host does around it.
        assert row["ms_per_frame"] / 10 < row["backbone_ms"] + row["depth_ms"] < 1.5 * row["ms_per_frame"]
    assert stock["backbone_ms"] + stock["depth_ms"] == pytest.approx(stock["ms_per_frame"], rel=0.5)
    heard = {f"{name}, voice {known}" for name in names for known in ("known", "unknown")}
    assert set(result["first_audio"]) == {"stock eager", *heard}
    assert all(value["ms"] > 0 for value in result["first_audio"].values())


@pytest.mark.slow
def test_streaming_on_the_tiny_size(tmp_path: Any) -> None:
    out = tmp_path / "result.json"
    command = [
        sys.executable,
        str(ROOT / "bench" / "streaming.py"),
        "--size",
        "tiny",
        "--frames",
        "8",
        "--prompt",
        "20",
    ]
    subprocess.run([*command, "--rounds", "1", "--chunks", "1", "4", "--json", str(out)], check=True, cwd=tmp_path)
    rows = json.loads(out.read_text())["chunks"]
    assert set(rows) == {"1", "4"}
    for row in rows.values():
        assert 0 < row["codec_ms_per_frame"] < row["ms_per_frame"]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench/kernels.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "bench" / "kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_microbenchmark_of_one_op(tmp_path: Any) -> None:
    command = [sys.executable, str(ROOT / "bench" / "kernels.py"), "--ops", "swiglu", "--out", str(tmp_path)]
    # pytest-benchmark measures nothing in a worker of xdist, and would take itself for one.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    subprocess.run(command, check=True, cwd=tmp_path, env=alone)
    (path,) = tmp_path.glob("kernels-*.json")
    result = json.loads(path.read_text())
    assert not result["red"] and result["bandwidth_gb_per_s"] > 0.5
    for row in result["rows"]:
        assert row["op"] == "swiglu" and row["bytes"] > 0
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert {"eager", "compile"} <= set(row["speed_up_over"])
        assert row["speed_up_over"]["eager"] == pytest.approx(row["us_of"]["eager"] / row["us"])
        assert row["case"] in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_an_op_whose_tests_fail_gets_no_speed(
    kernels: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "green", lambda op: False)
    assert kernels.main(["--ops", "norm", "rvq", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "norm: tests fail, no speed given" in shown and "rvq: tests fail, no speed given" in shown
    (path,) = tmp_path.glob("kernels-*.json")
    assert json.loads(path.read_text())["rows"] == []


def test_an_ops_own_tests_decide(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a speed is given hangs on the exit code of that op's test file, run where its kernels can run."""
    seen: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        seen.append((command, env))
        return subprocess.CompletedProcess(command, len(seen) - 1)

    monkeypatch.setattr(kernels.subprocess, "run", run)
    assert kernels.green("gemv") and not kernels.green("gemv")
    command, env = seen[0]
    assert command[-1].endswith("tests/kernels/test_gemv.py") and "pytest" in command
    assert kernels.ON_GPU or env["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("fmt", ["int8", "fp8", "int4"])
def test_bytes_of_a_matrix(kernels: Any, fmt: str) -> None:
    from csm_kernels.quant import quantize

    assert kernels._stored(6, 300, fmt) == quantize(torch.randn(6, 300), fmt).bytes
    assert kernels._stored(6, 300, "bf16") == torch.randn(6, 300).bfloat16().nbytes


@pytest.mark.slow
def test_training_step(tmp_path: Any) -> None:
    command = [sys.executable, str(ROOT / "bench" / "train.py"), "--shapes", "1x48", "--rounds", "1", "--no-peak"]
    done = subprocess.run(
        [*command, "--profile", "--out", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    (path,) = tmp_path.glob("train-*.json")
    result = json.loads(path.read_text())
    (shape,) = result["shapes"]
    # 47 frames have a state before them; the fraction is rounded up.
    assert shape["depth_rows"] == 3 and all(value < 1e-5 for value in shape["relative_loss_difference"].values())
    rows = {row["variant"]: row for row in shape["variants"]}
    assert rows.keys() | result["skipped"].keys() >= {
        "stock, all frames",
        "stock, 1/16",
        "ours, 1/16",
        "ours, all frames",
    }
    assert (
        rows["ours, 1/16"]["saved_bytes"]
        < rows["ours, all frames"]["saved_bytes"]
        < rows["stock, all frames"]["saved_bytes"]
    )
    for row in rows.values():
        assert row["seconds"] <= row["median_seconds"]
        assert 0.5 < sum(op["share"] for op in row["top"]) <= 1.0
    assert done.returncode == (0 if all(bar["holds"] for bar in result["bars"]) else 1)
    for bar in result["bars"]:
        ratio = rows[bar["over"]][bar["of"]] / rows["ours, 1/16"][bar["of"]]
        assert bar["measured"] == pytest.approx(ratio) and bar["holds"] == (ratio >= bar["least"])
    assert "DOES NOT HOLD" in done.stdout or done.returncode == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def training() -> Any:
    """bench/train.py as a module."""
    spec = importlib.util.spec_from_file_location("bench_train", ROOT / "bench" / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_peak_memory(training: Any) -> None:
    """All of what is saved is in memory at once; the gradients of the weights come on top."""
    steps = training.Steps(training.build(), 1, 48, "codes")
    peak = training.peak_bytes("stock, all frames", "1x48", "codes")
    assert steps.saved_bytes("stock, all frames") < peak < 2 << 30


def test_the_rivals_loss_is_stocks(training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What liger-kernel is given, whose kernels need a GPU: with the plain loss in its place the result is stock's."""
    import types

    class Plain(torch.nn.Module):
        def forward(self, weight: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(hidden @ weight.t(), targets)

    stub = types.ModuleType("liger_kernel.transformers")
    stub.LigerFusedLinearCrossEntropyLoss = Plain
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stub)
    steps = training.Steps(training.build(), 1, 40, "codes")
    losses = {variant: steps.run(variant)[1] for variant in ("stock, 1/16", "liger per head, 1/16", "ours, 1/16")}
    assert losses["liger per head, 1/16"] == pytest.approx(losses["stock, 1/16"], rel=1e-5)
    assert losses["ours, 1/16"] == pytest.approx(losses["stock, 1/16"], rel=1e-5)


def test_precision_of_the_presets(tmp_path: Any) -> None:
    command = [
        sys.executable,
        str(ROOT / "bench" / "precision.py"),
        "--frames",
        "6",
        "--no-zones",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "precision.json").read_text())
    presets = found["presets"]
    assert list(presets) == ["exact", "balanced", "fast", "smallest"]
    assert (tmp_path / "precision.md").read_text() in done.stdout
    kl = [[row["trained"][group]["kl_nats"] for row in presets.values()] for group in ("0", "1")]
    assert max(kl[0][:2]) < 1e-9 < kl[0][2] < kl[0][3]
    assert kl[1][0] < 1e-9 < kl[1][2] < kl[1][3]
    assert all(0 <= part["top1"] <= 1 for row in presets.values() for part in row["trained"].values())
    shares = [row["share_of_bf16"] for row in presets.values()]
    assert shares[0] == 1.0 and shares == sorted(shares, reverse=True)
