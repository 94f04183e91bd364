"""How many utterances to speak at once on this machine: measured once for a model, remembered for later starts."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from csm_kernels import __version__
from csm_runtime import compiling
from csm_runtime.accelerate import Acceleration
from csm_runtime.engine import BUCKETS, bucket_for
from csm_runtime.generate import plain_mode
from csm_runtime.guard import FAST

logger = logging.getLogger("csm_runtime")

DEFAULT_SLOTS = 4
"""Where nothing was measured."""
FRAME_MS = 80.0
"""What a frame lasts: utterances whose frames take longer than this are not heard in real time."""
_CONTEXT = 384
"""Cached positions that the frames look at: a reference of ten seconds, its text, and as much speech again."""
_ROUNDS, _FRAMES = 5, 2
"""Interleaved rounds, and frames of each batch size in each: the speed of a shared machine moves from second to second."""
_WORTH = 1.05
"""By so much a larger batch has to make more frames per second: below it would only answer later."""


@dataclass(frozen=True)
class BatchTuning:
    """What :func:`tune_batch_size` found.

    Args:
        slots: the batch size to use.
        latency_ms: the bound that a frame of the whole batch was to keep.
        fits: whether it does; ``slots`` is the smallest size measured where none does.
        frame_ms: median milliseconds of a frame, by batch size.
        context: cached positions that the frames looked at.
    """

    slots: int
    latency_ms: float
    fits: bool
    frame_ms: dict[int, float]
    context: int

    @property
    def frames_per_second(self) -> dict[int, float]:
        """Of all rows together, by batch size."""
        return {size: 1e3 * size / ms for size, ms in self.frame_ms.items()}

    def __str__(self) -> str:
        rows = ", ".join(f"{size}: {ms:.1f} ms ({1e3 * size / ms:.0f} frames/s)" for size, ms in self.frame_ms.items())
        bound = "within" if self.fits else "none is within"
        return f"{self.slots} slots, {bound} {self.latency_ms:g} ms per frame; {rows}"


def tune_batch_size(
    model: Any,
    latency_ms: float = FRAME_MS,
    sizes: Sequence[int] = BUCKETS,
    *,
    progress: bool = True,
) -> BatchTuning:
    """Measure frames of several batch sizes, and remember which is best for a bound on what one may take.

    Of the sizes whose frame keeps the bound it is the one that makes the most frames per second, and the smaller one of two
    that make about as many. Frames are made-up, with 384 cached positions or half of what the buffer holds; no codec, no
    guard, no prompts. The model's other calls wait meanwhile.

    Args:
        model: an accelerated model.
        latency_ms: what a frame may take, 80 for real time.
        sizes: batch sizes to measure, from 1, 2, 4, 8 and 16. Buffers of all of them are there while it measures.
        progress: show a progress bar on stderr.

    Returns:
        What was found. It is also written into the package's cache folder, for this machine, model shape, precision and
        mode: a :class:`~csm_runtime.batching.Batcher` without ``slots`` uses it from then on.

    Raises:
        TypeError: the model is not accelerated.
        ValueError: a bad argument.
        RuntimeError: the guard trusts no fast path at the moment.
    """
    handle = model.__dict__.get("acceleration")
    if not isinstance(handle, Acceleration):
        raise TypeError("model must be accelerated: accelerate(model) first")
    if not isinstance(latency_ms, (int, float)) or not 0 < latency_ms < math.inf:
        raise ValueError(f"latency_ms must be a number of milliseconds above 0, got {latency_ms!r}")
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes or not set(sizes) <= set(BUCKETS):
        raise ValueError(f"sizes must be some of {BUCKETS}, got {sizes!r}")
    wanted = sorted(set(sizes))
    with handle._lock, plain_mode():
        if handle.guard.rung != FAST:
            raise RuntimeError(f"frames run on rung {handle.guard.rung!r}, {handle.guard.reason}; guard.rearm() first")
        handle._refresh()
        context, ready = min(_CONTEXT, handle.capacity // 2), set(handle._warm)
        try:
            times = _measured(handle, wanted, context, progress)
        finally:
            for size in handle._warm - ready:  # all sizes together hold more memory than a batch ever will
                handle._engine.drop(size)
            handle._warm &= ready
    frame_ms = {size: 1e3 * statistics.median(values) for size, values in times.items()}
    fitting = [size for size in wanted if frame_ms[size] <= latency_ms]
    best = wanted[0]
    for size in fitting:
        if size / frame_ms[size] > _WORTH * best / frame_ms[best]:
            best = size
    found = BatchTuning(best, float(latency_ms), bool(fitting), frame_ms, context)
    path = compiling.cache_dir() / _FILE
    compiling.write_json(path, compiling.read_json(path) | {_key(handle): asdict(found)})
    return found


def _measured(handle: Acceleration, sizes: list[int], context: int, progress: bool) -> dict[int, list[float]]:
    """Seconds of frames, by batch size."""
    for size in sizes:
        handle._seat(FAST, size)  # which may end in another, safer mode, and then for all of them
    engine = handle._engine
    runners = {size: engine.prepare(size) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    bar = compiling.Progress(_ROUNDS, "measuring batch sizes", progress)
    metrics, engine.metrics = engine.metrics, type(engine.metrics)()  # frames that nobody asked for
    try:
        for _ in range(_ROUNDS):
            for size, runner in runners.items():
                state = runner.state
                state.clear()
                state.rewind(context)
                state.allowed[:, :context] = True
                state.ended.fill_(False)
                state.set_end(-1, engine.spec.codebooks, None)
                for params in (runner.params, runner.depth_params):
                    params.do_sample.fill_(True)
                    params.temperature.fill_(0.9)
                    params.top_k.fill_(50)
                    params.top_p.fill_(1.0)
                for _ in range(_FRAMES):
                    start = time.perf_counter()
                    engine.next_frame(runner, first=False)
                    state.faults.item()  # waits for the device
                    times[size].append(time.perf_counter() - start)
            bar.advance("round")
    finally:
        bar.close()
        engine.metrics = metrics
    return times


_FILE = "batch-sizes.json"


def stored_slots(model: Any) -> int | None:
    """The batch size that was found here for a model like this one, or None."""
    found = compiling.read_json(compiling.cache_dir() / _FILE).get(_key(model.acceleration))
    slots = found.get("slots") if isinstance(found, dict) else None
    return slots if type(slots) is int and bucket_for(slots) is not None and slots >= 1 else None


def _key(handle: Acceleration) -> str:
    """What a measurement is of: another machine, shape, format or mode has another speed."""
    engine = handle._engine
    cuda = engine.device.type == "cuda"
    about = {
        "machine": torch.cuda.get_device_name(engine.device) if cuda else compiling.processor(),
        "threads": torch.get_num_threads(),
        "versions": [__version__, torch.__version__],
        "model": asdict(handle._spec),
        "capacity": engine.capacity,
        "dtype": [str(engine.dtype), str(engine.kv_dtype)],
        "policy": [handle.policy.name, repr(handle.policy)],
        "mode": engine.mode,
        "without": sorted(handle.without),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
