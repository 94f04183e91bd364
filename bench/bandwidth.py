"""The memory bandwidth of this machine as it is now: what the shares in the benchmarks are shares of."""

from __future__ import annotations

import functools
import statistics
import time

import torch
from torch import Tensor

from csm_kernels import cpu


def now(device: torch.device) -> float:
    """Seconds, after everything queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def streaming_bandwidth(device: torch.device) -> float:
    """GB/s at which the device reads a buffer larger than every cache, median of 7; on a CPU by the native kernels' threads."""
    if device.type == "cpu" and cpu.why_not() is None:
        return cpu.streaming_bandwidth(rounds=3)
    buffer = _buffer(device)
    times = []
    for _ in range(7):
        start = now(device)
        buffer.sum()
        times.append(now(device) - start)
    return buffer.nbytes / statistics.median(times) / 1e9


@functools.cache
def _buffer(device: torch.device) -> Tensor:
    return torch.ones((2 << 30 if device.type == "cuda" else 1 << 30) // 4, device=device)
