"""Kernel tests run on a GPU where there is one, and under Triton's interpreter with ``TRITON_INTERPRET=1``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from csm_kernels._target import interpreting
from kernels import interpreter

if interpreting():
    interpreter.repair()

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if interpreting() or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU here: run with TRITON_INTERPRET=1, as make test does")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernel tests put their tensors."""
    return torch.device("cpu" if interpreting() else "cuda")


@pytest.fixture(autouse=True)
def quiet_numpy() -> None:
    """The interpreter computes masked lanes too: their overflows mean nothing."""
    np.seterr(all="ignore")
