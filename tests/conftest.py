from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from csm_models import build

from csm_kernels._target import interpreting
from csm_runtime import accelerate

transformers.logging.set_verbosity_error()  # tiny configs name special tokens beyond their tiny vocabularies


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the package remembers between runs stays out of the home directory."""
    before = os.environ.get("CSM_KERNELS_CACHE")
    os.environ["CSM_KERNELS_CACHE"] = str(tmp_path_factory.mktemp("csm-kernels-cache"))
    yield
    if before is None:
        del os.environ["CSM_KERNELS_CACHE"]
    else:
        os.environ["CSM_KERNELS_CACHE"] = before


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="csm_runtime")


@pytest.fixture(scope="session")
def made() -> dict[tuple[str, str], Any]:
    """Accelerated models by mode and config, kept for the session."""
    return {}


def _lend(made: dict[tuple[str, str], Any], mode: str) -> Iterator[Callable[..., Any]]:
    """Lend models out for one test; their generation configs, which calls may write to, come back as they were."""
    lent: dict[int, tuple[Any, Any, Any]] = {}

    def model(name: str = "base") -> Any:
        key = (mode, name)
        if key not in made:
            made[key] = accelerate(build(name), mode=mode, batch_sizes=(1,), progress=False)
            assert made[key].acceleration.mode == mode, made[key].acceleration.notes
        one = made[key]
        configs = (one.generation_config, one.depth_decoder.generation_config)
        lent.setdefault(id(one), (one, *(copy.deepcopy(config) for config in configs)))
        return one

    yield model
    for one, backbone, depth in lent.values():
        one.generation_config, one.depth_decoder.generation_config = backbone, depth


@pytest.fixture
def shared(made: dict[tuple[str, str], Any]) -> Iterator[Callable[..., Any]]:
    """``shared(name)``: an eagerly accelerated model, one per config and session; leave its weights as they are."""
    yield from _lend(made, "eager")


@pytest.fixture
def compiled(made: dict[tuple[str, str], Any]) -> Iterator[Callable[..., Any]]:
    """``compiled(name)``: a compiled model, one per config and session; leave its weights as they are."""
    yield from _lend(made, "compile")


@pytest.fixture
def fast() -> Callable[..., Any]:
    """``fast(name, **options)``: a fresh model, eagerly accelerated unless the options say otherwise."""

    def model(name: str = "base", *, of: Any = None, **options: Any) -> Any:
        options.setdefault("mode", "eager")
        options.setdefault("batch_sizes", (1,))
        return accelerate(build(name) if of is None else of, progress=False, **options)

    return model


@pytest.fixture(autouse=True)
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test starts from the same generator state, and eager tests run on one thread.

    Models this small spend their time waking the second thread: ten times longer on a busy machine. Compiled tests
    keep all threads, for Inductor plans its loops by their number.
    """
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.manual_seed(1234)
    if "slow" not in request.keywords:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


_ran: dict[str, int] = {"interpreted": 0, "compiled ahead of time": 0, "checked for races": 0, "on a GPU": 0}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count how kernels were tested."""
    if report.when != "call" or not report.passed:
        return
    if "compiled_ahead" in report.keywords:
        _ran["compiled ahead of time"] += 1
    elif report.nodeid.startswith("tests/kernels/"):
        simulated = "ttsem" in sys.modules
        _ran["interpreted" if interpreting() else "checked for races" if simulated else "on a GPU"] += 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say it, so that a green run hides nothing."""
    counts = ", ".join(f"{count} {how}" for how, count in _ran.items())
    terminalreporter.write_line(f"kernel tests passed: {counts}")
