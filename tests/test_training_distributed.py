"""Two processes that average gradients train as one process with all the data does: DDP, FSDP2, checkpoints, resume."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Each case's worst relative error of a gradient, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "distributed_training.py"), str(rank), "2", port, str(folder)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    try:
        said = [process.communicate(timeout=400)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(process.returncode == 0 for process in ranks), "\n\n".join(text[-3000:] for text in said)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


SPREADS = [f"{spread}, {fraction}" for spread in ("uneven", "none on one") for fraction in (1.0, 0.25)]


@pytest.mark.parametrize("case", [*SPREADS, "tied", "accumulation"])
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_gradients_are_those_of_one_process(errors: list[dict[str, float]], kind: str, case: str) -> None:
    assert max(found[f"{kind}, {case}"] for found in errors) < 1e-5


def test_heads_and_embeddings_may_be_units_of_their_own(errors: list[dict[str, float]]) -> None:
    """The loss reads a head inside that head's own call, where its weight is whole."""
    assert max(found["FSDP2, to the heads"] for found in errors) < 1e-5


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_means_per_rank_would_not_do(errors: list[dict[str, float]], kind: str) -> None:
    """The control: without share_counts ranks of 30 and of 6 frames weigh the same."""
    assert min(found[f"{kind}, not shared"] for found in errors) > 0.05


@pytest.mark.parametrize("case", ["bf16", "bf16 to the heads"])
def test_mixed_precision_of_fsdp(errors: list[dict[str, float]], case: str) -> None:
    """FSDP casts what floats in the inputs of every unit; counts, draws and weights come through."""
    assert 0 < max(found[f"FSDP2, {case}"] for found in errors) < 0.1


def test_resume_from_a_distributed_checkpoint_is_exact(errors: list[dict[str, float]]) -> None:
    assert [found["resume"] for found in errors] == [0.0, 0.0]
