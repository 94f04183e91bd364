"""Importing is quick and quiet, and the layers of the package import only what they may."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import csm_kernels
import csm_runtime

KERNELS, RUNTIME = Path(csm_kernels.__file__).parent, Path(csm_runtime.__file__).parent
HEAVY = ("transformers", "torchtune", "torchaudio", "tqdm", "matplotlib", "scipy", "soundfile", "rich", "psutil")
HEAVY += ("pynvml", "prometheus_client")

OP_FILES = {"attention", "embed", "gemv", "gemv_kernel", "loss", "norm", "rope", "rvq", "sampling", "swiglu"}
NO_OPS = {"NoiseKey", "SamplingParams"}
"""What those files hold besides ops."""

TRAINING_FILES = {"frames", "loss", "norm", "rope", "swiglu"}
"""Files of csm_kernels with what a training step computes: the ops among them are differentiable."""


def run(code: str) -> dict[str, object]:
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.parametrize("package", ["csm_kernels", "csm_runtime"])
def test_import_is_quick_and_starts_nothing(package: str) -> None:
    got = run(
        "import time, sys, json, torch, torch.nn, torch.utils._pytree\n"
        "before = set(sys.modules)\n"
        f"start = time.perf_counter(); import {package}; took = time.perf_counter() - start\n"
        "new, cuda = sorted(set(sys.modules) - before), torch.cuda.is_initialized()\n"
        "print(json.dumps({'took': took, 'cuda': cuda, 'new': new}))"
    )
    new = got["new"]
    assert isinstance(new, list)
    assert package in new
    assert got["cuda"] is False
    loaded = {name.partition(".")[0] for name in new}
    assert not loaded & set(HEAVY)
    assert not [name for name in new if name.startswith(("torch._dynamo", "torch._inductor"))]
    if package == "csm_kernels":
        assert "csm_runtime" not in loaded
    assert float(str(got["took"])) < 1.0


def test_importing_writes_nothing_and_says_nothing(tmp_path: Path) -> None:
    code = "import csm_kernels, csm_runtime"
    out = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:csm_", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert out.stdout == ""
    assert out.stderr == ""
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ who imports whom


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules and names a file imports, as dotted names; a relative import is resolved."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if top_level_only:
        inside = {id(n) for f in nodes if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
        nodes = [node for node in nodes if id(node) not in inside]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py"))


def test_there_is_something_to_check() -> None:
    assert len(files(KERNELS)) > 8
    assert len(files(RUNTIME)) > 10


@pytest.mark.parametrize("path", files(KERNELS), ids=lambda p: p.name)
def test_kernels_import_torch_triton_and_the_standard_library(path: Path) -> None:
    allowed = {"csm_kernels", "torch", "triton"} | set(sys.stdlib_module_names)
    assert roots(imports(path)) <= allowed


@pytest.mark.parametrize("path", files(RUNTIME), ids=lambda p: str(p.relative_to(RUNTIME)))
def test_transformers_is_imported_inside_functions(path: Path) -> None:
    assert not roots(imports(path, top_level_only=True)) & {"transformers", "torchtune"}


def test_only_adapters_and_what_stands_on_accelerate_know_transformers() -> None:
    on_top = {"checkpoints.py", "cli.py", "demo.py", "small_model.py"}
    for path in files(RUNTIME):
        if roots(imports(path)) & {"transformers", "torchtune"}:
            assert path.parent.name == "adapters" or path.name in on_top, path


@pytest.mark.parametrize(
    "name", ["metrics.py", "report.py", "precision.py", "fidelity.py", "intervals.py", "adapters/spec.py"]
)
def test_leaves_import_nothing_of_ours(name: str) -> None:
    assert not roots(imports(RUNTIME / name)) & {"csm_runtime", "csm_kernels"}


@pytest.mark.parametrize("name", ["intervals.py", "comparison.py", "experiment.py"])
def test_experiments_need_the_standard_library_alone(name: str) -> None:
    """They are read where no model runs."""
    assert roots(imports(RUNTIME / name)) <= {"csm_runtime", *sys.stdlib_module_names}
    ours = {part for part in imports(RUNTIME / name) if part.startswith("csm_runtime.")}
    assert all(part.startswith(("csm_runtime.intervals", "csm_runtime.comparison")) for part in ours)


def ops_used(path: Path) -> set[tuple[str, str]]:
    """Ops and references a file takes from csm_kernels, each with the file of csm_kernels it is from."""
    parts = [name.split(".") for name in imports(path) if name.startswith("csm_kernels.")]
    used = {(part[1], part[2]) for part in parts if part[1] in OP_FILES and len(part) == 3}
    exported = {name: getattr(csm_kernels, name) for name in csm_kernels.__all__}
    for _, name in (part for part in parts if len(part) == 2 and part[1] in exported):
        used.add((getattr(exported[name], "__module__", "csm_kernels").rpartition(".")[2], name))
    return {(file, name) for file, name in used if name not in NO_OPS}


def test_only_the_engine_and_the_backend_call_decode_ops() -> None:
    """Decoding: the engine, its steps, the fused kernels' launches and the torch.compile backend. Training: one adapter.

    The guard's replay takes the noise, which it must have in common with what it judges.
    """
    callers = ("engine.py", "steps.py", "fused.py", "backend.py", "replay.py")
    free = {"__version__", "QuantWeight", "dequantize", "quantize", "take_rows", "FrameSample", "sample_frames"}
    seen = set()
    for path in files(RUNTIME):
        if path.name == "hf_training.py":
            continue
        used = {name for _, name in ops_used(path)}
        assert not used - free or path.name in callers, (path.name, used)
        seen |= used
    assert {"gemv_streamed", "rms_norm_ref"} <= seen  # the test looks where the ops are


def test_only_the_training_adapter_calls_training_ops() -> None:
    """It takes differentiable ops and their references, and no decode op: no file does both."""
    path = RUNTIME / "adapters" / "hf_training.py"
    used = ops_used(path)
    assert {("loss", "fused_codebook_linear_cross_entropy"), ("norm", "rms_norm")} <= used
    assert {file for file, _ in used} <= TRAINING_FILES
    for other in files(RUNTIME):
        assert other == path or "loss" not in {file for file, _ in ops_used(other)}, other


def test_only_training_and_the_guard_draw_frames() -> None:
    """The collator, the noise meter, the training adapter, and who verifies frames; what makes them knows nothing of it."""
    drawing = set()
    for path in files(RUNTIME):
        names = imports(path)
        if {"csm_kernels.FrameSample", "csm_kernels.sample_frames"} & names or "csm_kernels.frames" in names:
            drawing.add(str(path.relative_to(RUNTIME)))
    assert drawing == {"adapters/hf_training.py", "guard.py", "training/collate.py", "training/noise.py"}


def test_op_files_are_all_listed() -> None:
    """A file of csm_kernels that registers an op or holds a reference is an op's file."""
    holding = {path.stem for path in files(KERNELS) if "_ref(" in path.read_text() and not path.stem.startswith("_")}
    assert holding - {"quant", "testing", "reference"} <= OP_FILES


def test_only_the_engine_runs_the_fused_kernels() -> None:
    for path in files(RUNTIME):
        taken = {n for n in imports(path) if n.startswith(("csm_kernels.depth", "csm_runtime.fused"))}
        assert not taken or path.name in ("engine.py", "fused.py"), (path.name, taken)


def test_only_accelerate_and_what_stands_on_it_import_the_engine_or_the_adapter() -> None:
    """And training's handle, which is to training what accelerate.py is to generation: adapters, but no engine.

    ``training/__init__.py`` may hand the trainer's adapter on.
    """
    allowed = {
        "accelerate.py",
        "batch_size.py",
        "batching.py",
        "calibration.py",
        "calls.py",
        "decode_loop.py",
        "frame_by_frame.py",
        "generate.py",
        "ladder.py",
        "loading.py",
        "many_rows.py",
        "prompts.py",
        "rollout.py",
        "rounding.py",
        "sesame.py",
        "slots.py",
        "tuning.py",
        "cli.py",
        "demo.py",
    }
    for path in files(RUNTIME):
        if path.parent.name == "adapters" or path.name == "engine.py":
            continue
        taken = {n for n in imports(path) if n.startswith(("csm_runtime.engine", "csm_runtime.adapters.hf"))}
        if path.parent.name == "training" and path.name in ("handle.py", "__init__.py"):
            taken = {n for n in taken if n.startswith("csm_runtime.engine")}
        assert not taken or path.name in allowed, (path.name, taken)


def test_the_guard_gets_its_checks_as_callables() -> None:
    """It judges numbers: no kernels, no engine, no adapter, so that it can be tested with made-up ones."""
    ours = {name for name in imports(RUNTIME / "guard.py") if name.startswith(("csm_runtime.", "csm_kernels."))}
    assert {name.rpartition(".")[0] for name in ours if name.count(".") == 2} <= {
        "csm_runtime.events",
        "csm_runtime.metrics",
    }
    assert {name for name in ours if name.startswith("csm_kernels.")} == {"csm_kernels.sample_frames"}


def test_training_knows_nothing_of_generation() -> None:
    """Of csm_runtime, training takes itself and the adapters, whatever generates may change."""
    for path in files(RUNTIME / "training"):
        ours = {name for name in imports(path) if name.startswith("csm_runtime.")}
        assert all(name.startswith(("csm_runtime.training", "csm_runtime.adapters")) for name in ours), (
            path.name,
            ours,
        )


def test_public_names() -> None:
    ops = [name for name in csm_kernels.__all__ if not isinstance(getattr(csm_kernels, name), (str, type))]
    assert 10 < len(ops) <= 15
    assert len([name for name in csm_runtime.__all__ if not name.startswith("_")]) <= 12
    for package in (csm_kernels, csm_runtime):
        assert all(hasattr(package, name) for name in package.__all__)
    assert csm_kernels.__version__ == csm_runtime.__version__


def test_typed() -> None:
    assert (KERNELS / "py.typed").is_file()
    assert (RUNTIME / "py.typed").is_file()
