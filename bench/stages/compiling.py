"""Stage 0: compile the kernels of all other stages, in as many processes as there are cores, into one cache.

In a rehearsal one tiny frame is compiled for sm_90, which needs no GPU, to see that the machinery works.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from stages import models
from stages.common import Stage

_MOST_WORKERS = 12
"""Each holds a context and a model, 4 GB together at the most."""
Case = tuple[str, str, int, str]
"""Size, format, batch and driver of a frame."""


def cases() -> list[Case]:
    """Every frame of the stages 3 to 5, the most important first."""
    found: list[Case] = []
    for batch in models.BATCHES:
        for fmt in models.FORMATS:
            found += [("real", fmt, batch, driver) for driver in (*models.DRIVERS, "matched")]
    for fmt in ("float32", "bfloat16", "int8"):
        found += [("tiny", fmt, 2, driver) for driver in (*models.DRIVERS, "matched")]
    return found


@functools.lru_cache(maxsize=1)
def _model(size: str, fmt: str, device: str) -> models.Model:
    if device == "cuda":
        torch.cuda.empty_cache()  # of the model before, which the cache has dropped: all workers share the device
    return models.build(models.REAL if size == "real" else models.TINY, fmt, torch.device(device), alike=True)


@contextlib.contextmanager
def _only_compiled() -> Iterator[None]:
    """Launches compile for the device there is and do not run."""
    from triton.runtime.jit import JITFunction

    stock = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = stock(self, *args, grid=grid, warmup=True, **options)
        return kernel.result() if hasattr(kernel, "result") else kernel

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = stock


def compile_case(case: Case, offline: bool) -> float:
    """Compile one frame in this process; seconds."""
    size, fmt, batch, driver = case
    model = _model(size, fmt, "cpu" if offline else "cuda")
    frame = models.Frame(model, batch, driver)
    start = time.perf_counter()
    if offline:
        from csm_kernels.testing import compile_only

        with compile_only(90) as reports:
            frame.depth()
            frame.stack()
        assert reports, "nothing was compiled"
    else:
        with _only_compiled():
            frame.depth()
            frame.stack()
            if driver != "matched":
                frame.frame()
    return time.perf_counter() - start


def run(stage: Stage) -> None:
    """Compile all of them; what is not done in time is compiled where it is first launched."""
    wanted = [("tiny", "bfloat16", 1, "launches")] if stage.rehearse else cases()
    left = [case for case in wanted if stage.get(" ".join(map(str, case))) is None]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    count = max(1, min(len(left), cores, _MOST_WORKERS))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, context) as pool:
        waiting = {pool.submit(compile_case, case, stage.rehearse): " ".join(map(str, case)) for case in left}
        for done in concurrent.futures.as_completed(waiting):

            def seconds(done: Any = done) -> dict[str, Any]:
                took = done.result()
                return {"seconds": None if stage.rehearse else took}

            stage.measure(waiting[done], seconds)
    stage.put("processes", count)
