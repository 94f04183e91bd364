"""The GPU campaign's driver: resuming, time limits, failures, bars and the stored choice of driver; its rehearsal."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from csm_kernels import _tiles
from csm_kernels._target import Device, has_triton
from csm_kernels.depth import kernel, make_workspace

ROOT = Path(__file__).parent.parent

STAGE = """
import json, subprocess, sys, time
journal, source, what = sys.argv[1:]
def put(**pieces):
    with open(journal, "w") as file:
        json.dump({"pieces": pieces, "errors": {}, "source": source, "rehearsal": True}, file)
put(first=1)
if what == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    put(first=1, child=child.pid)
    time.sleep(60)
if what == "fail":
    raise SystemExit("the kernel is wrong")
put(first=1, second=2)
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench/campaign.py as a module, and bench/ where it can be imported from."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("bench_campaign", ROOT / "bench" / "campaign.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_campaign", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def staged(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """``staged("ok", "hang", ...)``: a campaign of such stages, run; gives code, result and the stages started."""

    def run(*kinds: str, options: tuple[str, ...] = (), limit: float = 30.0) -> tuple[int, dict[str, Any], list[int]]:
        specs = tuple(
            bench.Spec(number, kind, limit if kind != "hang" else 0.7, True) for number, kind in enumerate(kinds, 10)
        )
        started: list[int] = []

        def command(spec: Any, journal: Path, rehearse: bool, limit: float) -> list[str]:
            started.append(spec.number)
            return [sys.executable, "-c", STAGE, str(journal), bench.fingerprint(), spec.module]

        monkeypatch.setattr(bench, "STAGES", specs)
        monkeypatch.setattr(bench, "command", command)
        out = tmp_path / "result.json"
        code = bench.main(["--rehearse", "--out", str(out), "--state", str(tmp_path / "state"), *options])
        return code, json.loads(out.read_text()), started

    yield run


def statuses(result: dict[str, Any]) -> list[str]:
    return [stage["status"] for stage in result["stages"]]


def test_a_hang_costs_one_stage_and_not_what_it_had_found(staged: Callable[..., Any]) -> None:
    start = time.monotonic()
    code, result, _ = staged("ok", "hang", "ok")
    assert time.monotonic() - start < 30
    assert code == 1
    assert statuses(result) == ["done", "timed out", "done"]
    assert [stage["pieces"].get("second") for stage in result["stages"]] == [2, None, 2]
    assert result["stages"][1]["pieces"]["first"] == 1
    child = result["stages"][1]["pieces"]["child"]
    for _ in range(50):  # what the stage had started is stopped too; whoever inherits it may take a moment to reap it
        if not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process of the stopped stage still runs")


def test_a_stage_that_hangs_says_where(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hanging = "import sys, time, types\n"
    hanging += "def stuck(stage):\n    stage.put('first', 1)\n    time.sleep(60)\n"
    hanging += "sys.modules['stages.stuck'] = types.SimpleNamespace(run=stuck)\n"
    hanging += (
        "import campaign\ncampaign.STAGES = (campaign.Spec(10, 'stuck', 20),)\nraise SystemExit(campaign.main())\n"
    )

    def command(spec: Any, journal: Path, rehearse: bool, limit: float) -> list[str]:
        own = ["--stage", "10", "--journal", str(journal), "--limit", str(limit), "--rehearse"]
        return [sys.executable, "-c", hanging, *own]

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "bench"))
    monkeypatch.setattr(bench, "STAGES", (bench.Spec(10, "stuck", 8.0, True),))
    monkeypatch.setattr(bench, "command", command)
    out = tmp_path / "result.json"
    assert bench.main(["--rehearse", "--out", str(out), "--state", str(tmp_path / "state")]) == 1
    (stage,) = json.loads(out.read_text())["stages"]
    assert (stage["status"], stage["pieces"]) == ("timed out", {"first": 1})
    assert any(" in stuck" in line for line in stage["stacks"]), stage["stacks"]
    assert not any(str(ROOT) in line for line in stage["stacks"])


def test_a_failure_is_reported_and_the_others_run(
    staged: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, result, _ = staged("fail", "ok")
    assert code == 1 and statuses(result) == ["failed", "done"]
    assert "the kernel is wrong" in result["stages"][0]["message"]
    assert "the kernel is wrong" in capsys.readouterr().out


def test_a_second_run_does_only_what_is_left(
    staged: Callable[..., Any], bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert staged("ok", "fail", "ok")[2] == [10, 11, 12]
    code, result, started = staged("ok", "ok", "ok")
    assert code == 0 and started == [11] and statuses(result) == ["done"] * 3
    assert staged("ok", "ok", "ok")[2] == []
    assert staged("ok", "ok", "ok", options=("--fresh",))[2] == [10, 11, 12]
    assert staged("ok", "ok", "ok", options=("--stages", "11", "--fresh"))[2] == [11]
    monkeypatch.setattr(bench, "fingerprint", lambda: "other sources")
    assert staged("ok", "ok", "ok")[2] == [10, 11, 12]


def test_what_does_not_fit_into_the_budget_is_said(staged: Callable[..., Any]) -> None:
    code, result, started = staged("ok", "ok", options=("--budget", "1"))
    assert code == 1 and started == [] and statuses(result) == ["skipped for budget"] * 2


def test_the_result_says_what_it_was_made_with(staged: Callable[..., Any]) -> None:
    _, result, _ = staged("ok")
    assert result["torch"] == torch.__version__ and result["rehearsal"] is True
    assert {"triton", "driver", "commit", "date", "device", "source"} <= set(result)
    assert result["bars"] == [], "a rehearsal has nothing to hold against the bars"


def test_without_a_gpu_only_a_rehearsal_runs(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--rehearse"):
        bench.main([])


def test_pieces_are_on_disk_at_once_and_failures_among_them(bench: Any, tmp_path: Path) -> None:
    from stages.common import Stage

    def broken() -> None:
        raise ValueError("wrong by 3")

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    path = tmp_path / "stage-3.json"
    stage = Stage(path, rehearse=True, limit=60)
    assert stage.measure("one", lambda: {"ms": 1}) == {"ms": 1}
    assert json.loads(path.read_text())["pieces"] == {"one": {"ms": 1}}
    assert stage.measure("two", broken) is None
    assert json.loads(path.read_text())["errors"] == {"two": "ValueError: wrong by 3"}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        stage.measure("three", lost)
    again = Stage(path, rehearse=True, limit=60)
    assert again.measure("one", broken) == {"ms": 1}, "what is there is not measured again"
    assert again.measure("two", lambda: 5) == 5 and again.failed == {}
    assert 50 < again.left() <= 60


def frame(depth: float, backbone: float, how: str = "graph") -> dict[str, Any]:
    """A piece of stage 5."""
    found: dict[str, Any] = {"frame_ms": depth + backbone, "depth_ms": depth, "backbone_ms": backbone}
    return found | {f"{name}_how": how for name in ("frame", "depth", "backbone")}


def test_bars_are_held_against_what_was_measured(bench: Any) -> None:
    from stages.verdicts import bars

    pieces: dict[int, dict[str, Any]] = {
        5: {
            "bfloat16 batch 1 launches": frame(2.9, 1.0),
            "bfloat16 batch 1 persistent": frame(3.5, 1.0),
            "int8 batch 1 launches": frame(2.0, 0.8),
            "int8 batch 1 persistent": frame(0.1, 0.1, how="launches"),
            "bfloat16 batch 16 launches": frame(5.0, 3.0),
        },
        6: {"ours, bfloat16": {"ms_per_frame": 4.0}, "stock ops in a CUDA graph": {"ms_per_frame": 8.1}},
    }
    assert [bar.passed for bar in bars(pieces)] == [True, True, False, True, None, None, None]
    assert [bar.value for bar in bars(pieces)][:4] == pytest.approx([3.9, 8.1 / 4, 2.8, 160.0])
    pieces[7] = {"cold": {"cold_start_seconds": 10.5}}
    pieces[6]["ours, bfloat16"]["ms_per_frame"] = 4.1
    assert [bar.passed for bar in bars(pieces)] == [True, False, False, True, False, None, None]
    pieces[9] = {
        "loss": {"over_bound": 2.1},
        "step, ours at 1/16": {"ms": 30.0},
        "step, stock at all frames": {"ms": 96.0},
    }
    assert [bar.passed for bar in bars(pieces)][5:] == [True, False]
    assert bars(pieces)[5].value == pytest.approx(3.2)
    assert [bar.passed for bar in bars({})] == [None] * 7


def test_the_default_driver_comes_from_the_measurement(bench: Any) -> None:
    from stages.verdicts import choices

    pieces = {
        "bfloat16 batch 1 launches": frame(3.0, 1.00),
        "bfloat16 batch 1 persistent": frame(2.8, 0.96),  # the backbone wins by less than what is worth it
        "int8 batch 1 launches": frame(3.0, 1.0),  # the other driver was not measured
        "fp8 batch 4 launches": frame(3.0, 1.0),
        "fp8 batch 4 persistent": frame(1.0, 0.5, how="launches"),  # not captured: says nothing about a graph
    }
    found = choices(pieces, "a GPU", "today")
    assert [entry["tiles"] for entry in found["depth"]] == [{"PERSISTENT": 1}]
    assert [entry["tiles"] for entry in found["backbone"]] == [{"PERSISTENT": 0}]
    (entry,) = found["depth"]
    assert entry["gpu"] == "a GPU" and entry["shape"]["B"] == 1 and "3.000 ms" in entry["measured"]


def test_no_driver_is_stored_before_it_is_proved(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored: list[Any] = []
    table = ROOT / "csm_kernels" / "tiles" / "depth.json"
    before = table.read_text() if table.exists() else None
    assert bench.pick_drivers([], "rehearsal", tmp_path, True) == []
    assert (table.read_text() if table.exists() else None) == before, "a rehearsal stores nothing"
    monkeypatch.setattr(bench.verdicts, "store", lambda entries: stored.append(entries) or [])
    pieces = {"int8 batch 1 launches": frame(3.0, 1.0), "int8 batch 1 persistent": frame(2.0, 1.0)}
    stages = [{"stage": number, "status": "done", "pieces": {}} for number in (0, 1, 2, 3)]
    stages += [{"stage": 4, "status": "failed", "pieces": {}}, {"stage": 5, "status": "timed out", "pieces": pieces}]
    assert bench.pick_drivers(stages, "a GPU", tmp_path, False) == [] and not stored
    assert "stages [4] are not done" in capsys.readouterr().err
    stages[4]["status"] = "done"
    bench.pick_drivers(stages, "a GPU", tmp_path, False)
    assert [entry["tiles"] for entry in stored[0]["depth"]] == [{"PERSISTENT": 1}]


def test_the_tile_table_is_merged_and_read(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.verdicts import check_table, store

    folder = tmp_path / "tiles"
    folder.mkdir()
    shape = {"D": 1024, "L": 4, "B": 1, "qkv": "int8", "gate_up": "int8"}
    others = [
        {"gpu": "ours", "shape": shape, "tiles": {"BN_qkv": 16, "PERSISTENT": 0}, "measured": "before"},
        {"gpu": "another", "shape": shape, "tiles": {"PERSISTENT": 0}, "measured": "there"},
    ]
    (folder / "depth.json").write_text(json.dumps(others))
    new = {"gpu": "ours", "shape": shape, "tiles": {"PERSISTENT": 1}, "measured": "now"}
    wider = {**new, "shape": {**shape, "B": 4}}
    assert store({"depth": [new, wider], "backbone": []}, folder) == [folder / "depth.json"]
    assert store({"depth": [new, wider], "backbone": []}, folder) == [folder / "depth.json"], "twice is once"
    table = json.loads((folder / "depth.json").read_text())
    assert table == [{**new, "tiles": {"BN_qkv": 16, "PERSISTENT": 1}}, others[1], wider]

    monkeypatch.setattr(_tiles, "__file__", str(tmp_path / "_tiles.py"))
    monkeypatch.setattr(_tiles, "device_facts", lambda index: Device("ours", 90, 132, 50 << 20))
    _tiles._table.cache_clear()
    try:
        launch: Any = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=7))
        assert _tiles.tiles("depth", launch, {**shape, "B": 4}, {"PERSISTENT": 0}) == {"PERSISTENT": 1}
        assert _tiles.tiles("depth", launch, {**shape, "B": 2}, {"PERSISTENT": 0}) == {"PERSISTENT": 0}
    finally:
        _tiles._table.cache_clear()
        _tiles._measured.cache_clear()
    check_table(tmp_path / "elsewhere" / "tiles")


def test_drivers_are_stored_under_the_sizes_that_a_launch_asks_for(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages import models, speed

    asked: dict[str, dict[str, Any]] = {}

    def tiles(op: str, tensor: Any, shape: dict[str, Any], default: dict[str, int]) -> dict[str, int]:
        asked[op] = shape
        return default

    monkeypatch.setattr(kernel, "tiles", tiles)
    for fmt in models.FORMATS:
        model = models.build(models.TINY, fmt, torch.device("cpu"))
        depth, backbone = model.weights.depth, model.weights.backbone
        kernel.plan(depth, 3, make_workspace(depth.stack, 3, 1, torch.device("cpu"), depth=depth), 4)
        kernel.plan(backbone, 3, make_workspace(backbone, 3, 1, torch.device("cpu")), 64)
        for stack in ("depth", "backbone"):
            assert asked[stack] == speed.sizes_of(models.TINY, fmt, 3, stack)


@pytest.mark.parametrize("fmt", ["bfloat16", "int8", "int4"])
def test_bytes_of_a_frame_are_those_of_its_launches(bench: Any, fmt: str) -> None:
    from stages import models

    model = models.build(models.TINY, fmt, torch.device("cpu"))
    made = models.Frame(model, 1, "launches")
    sizes, per_launch = models.frame_bytes(model), models.phase_bytes(model.weights.depth)
    launches = kernel.depth_launches(made.depth_plan, made.depth_args, 1, 0)
    assert sizes["depth"] == sum(per_launch.get(launch[0], 0) for launch in launches)
    layers = [x for l in range(2) for x in kernel.layer_launches(made.stack_plan, made.stack_args, 1, 1, 2, l, 0)]
    per_launch = models.phase_bytes(model.weights.backbone)
    assert sizes["backbone"] == sum(per_launch.get(launch[0], 0) for launch in layers)
    stack = model.weights.backbone
    stored = sum(models.matrix_bytes(getattr(stack, name)) for name in ("qkv", "o", "gate_up", "down"))
    assert sizes["backbone"] == stored
    parameters = 2 * (48 * (64 + 64) + 64 * 48 + 3 * 48 * 64)
    assert fmt != "bfloat16" or stored == 2 * parameters


def test_the_plot_and_the_table_show_what_there_is(bench: Any, tmp_path: Path) -> None:
    from stages import show

    row = {"stack": "depth", "phase": "down", "ms": 0.5, "gb_per_s": 2000.0, "share_of_stream": 0.7}
    pieces = {
        "int8 batch 1 phases": {"format": "int8", "batch": 1, "rows": [{**row, "share_of_stream_in_frame": 0.8}]},
        "int8 batch 1 launches": frame(2.0, 0.5)
        | {"format": "int8", "batch": 1, "driver": "launches", "frame_share": 0.8, "times_real_time": 32.0},
    }
    assert show.plot(pieces, "a GPU", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not show.plot({}, "a GPU", tmp_path / "none.png")
    result: dict[str, Any] = dict.fromkeys(("torch", "triton", "date"), "1") | {"device": "a GPU", "rehearsal": False}
    stages = [
        {"stage": 1, "name": "constants", "status": "done", "seconds": 3.0, "errors": {}, "pieces": {"summary": {}}},
        {"stage": 5, "name": "speed", "status": "timed out", "errors": {"x": "ValueError: bad"}, "pieces": pieces},
        {"stage": 8, "name": "kernel_tests", "status": "skipped for budget", "errors": {}, "pieces": {}},
    ]
    bar = {"name": "cold start", "limit": "<= 10 s", "value": 11.0, "passed": False}
    shown = show.table({**result, "stages": stages, "bars": [bar], "drivers_stored": ["tiles/depth.json"]})
    for words in (
        "timed out",
        "ValueError: bad",
        "skipped for budget",
        "FAIL",
        "2000 GB/s",
        "2.50",
        "tiles/depth.json",
    ):
        assert words in shown


@pytest.mark.compiled_ahead
@pytest.mark.skipif(not has_triton() or os.environ.get("TRITON_INTERPRET") == "1", reason="compiles with Triton")
def test_the_kernels_of_stage_1_compile(bench: Any) -> None:
    from stages import constants

    from csm_kernels.depth.barrier import GRID, GRID_PTX, NO_SYNC, PDL
    from csm_kernels.testing import compile_only

    x, sync = torch.zeros(4096), torch.zeros(2, dtype=torch.int32)
    with compile_only(90) as reports:
        for block, warps in ((8192, 8), (4096, 8), (8192, 16)):
            constants.read_kernel[(4,)](x, x, x.numel(), 2, BLOCK=block, num_warps=warps)
        for way in (NO_SYNC, PDL):
            constants.count_kernel[(4,)](sync, SYNC=way, **({"launch_pdl": True} if way == PDL else {}))
        for way in (GRID, GRID_PTX):
            constants.barriers_kernel[(4,)](sync, 3, 9, SYNC=way, num_warps=16, launch_cooperative_grid=True)
    assert all(report.spills == 0 for report in reports)
    assert all(report.wide_loads >= 1 for report in reports[:3]), "stream bandwidth needs wide loads"


def figures(content: Any) -> Iterator[tuple[str, Any]]:
    """Every entry of nested results whose name says that it is a speed or a time."""
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, (dict, list)):
            yield from figures(value)
        elif str(name) == "ms" or str(name).endswith(
            ("_ms", "us_each", "gb_per_s", "share", "seconds", "real_time", "torch_sum")
        ):
            yield str(name), value


@pytest.mark.slow
@pytest.mark.skipif(not has_triton(), reason="the interpreter is Triton's")
def test_the_rehearsal_runs_and_times_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "bench" / "campaign.py"), "--rehearse", "--stages", "1", "2", "4"]
    command += ["--out", str(out), "--state", str(tmp_path / "state")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["rehearsal"] is True and statuses(result) == ["done"] * 3
    for stage in result["stages"]:
        assert stage["pieces"] and not stage["errors"]
        assert {value for _, value in figures(stage["pieces"])} <= {None}
    assert result["stages"][1]["pieces"]["oversized grid"]["checked"] is False
    assert "tiny int4 batch 1" in result["stages"][2]["pieces"]
    assert not (ROOT / "csm_kernels" / "tiles").exists() or not list((ROOT / "csm_kernels" / "tiles").glob("*.part"))
