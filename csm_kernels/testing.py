"""The one tolerance rule, for kernels, for the runtime's guard and for users' own checks; tools for testing kernels.

Guarded output buffers show what a kernel forgot or wrote too much; ``compile_only`` compiles launches for a GPU target
on a machine without one.
"""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


def _errors(value: Tensor, truth: Tensor) -> tuple[float, float, int]:
    error = (value.double() - truth.double()).abs().flatten()
    if error.numel() == 0:
        return 0.0, 0.0, -1
    worst = int(error.argmax())
    return float(error[worst]), math.sqrt(float((error * error).mean())), worst


def assert_close(ours: Tensor, truth: Tensor, eager: Tensor, *, name: str = "value", terms: int = 1) -> None:
    """Assert that an implementation is as near the truth as eager PyTorch in the same dtype.

    ``err(ours, truth) <= 2 * err(eager, truth) + rounding``, on both maximum and root mean square; the rounding term is
    one unit in the last place of the eager dtype at the truth's largest magnitude for the maximum, at its root mean
    square for the RMS, each times ``sqrt(terms)``, the number of rounded terms a value sums.

    Args:
        ours: the result under test, any dtype.
        truth: the same quantity from fp64 or fp32 arithmetic on the same inputs.
        eager: the same quantity from eager PyTorch in the dtype the stock model would use.
        name: what the message calls it.
        terms: how many rounded products enter one value.

    Raises:
        AssertionError: with both errors, both limits and the worst index.
        ValueError: shapes differ.
    """
    if not ours.shape == truth.shape == eager.shape:
        raise ValueError(
            f"shapes differ: ours {tuple(ours.shape)}, truth {tuple(truth.shape)}, eager {tuple(eager.shape)}"
        )
    if not torch.equal(torch.isfinite(ours), torch.isfinite(truth)):
        where = (torch.isfinite(ours) != torch.isfinite(truth)).flatten().nonzero()[0].item()
        raise AssertionError(f"{name}: finite and non-finite values differ from the truth, first at flat index {where}")
    finite = torch.isfinite(truth)
    ours, truth, eager = ours[finite], truth[finite], eager[finite]
    if truth.numel() == 0:
        return
    step = torch.finfo(eager.dtype).eps * math.sqrt(terms)
    ours_max, ours_rms, worst = _errors(ours, truth)
    eager_max, eager_rms, _ = _errors(eager, truth)
    limit_max = 2 * eager_max + step * float(truth.abs().max())
    limit_rms = 2 * eager_rms + step * float(truth.double().square().mean().sqrt())
    if ours_max > limit_max or ours_rms > limit_rms:
        raise AssertionError(
            f"{name}: max error {ours_max:.3e} (limit {limit_max:.3e}, eager {eager_max:.3e}), rms {ours_rms:.3e} "
            f"(limit {limit_rms:.3e}, eager {eager_rms:.3e}), worst at flat index {worst}: "
            f"ours {ours.flatten()[worst].item():.6g}, truth {truth.flatten()[worst].item():.6g}"
        )


def sqnr_db(value: Tensor, truth: Tensor) -> float:
    """Signal to quantisation noise ratio in dB; infinite when equal, minus infinite for a zero signal."""
    noise = float((value.double() - truth.double()).square().sum())
    signal = float(truth.double().square().sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0 else -math.inf


def guarded(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """An output buffer full of NaN (of the lowest value for integers) inside a larger one full of sentinels.

    Returns:
        The buffer of ``shape``, contiguous, and the whole allocation for :func:`assert_untouched`. An element a kernel
        forgot stays NaN; an element it wrote too much shows in the guard zones. Both zones hold 1024 elements.
    """
    size = math.prod(shape)
    whole = torch.full((size + 2 * _GUARD,), _SENTINEL, dtype=torch.float32, device=device).to(dtype)
    inner = whole[_GUARD : _GUARD + size]
    inner.fill_(math.nan if dtype.is_floating_point else torch.iinfo(dtype).min)
    return inner.view(tuple(shape)), whole


def assert_untouched(whole: Tensor) -> None:
    """Assert that nothing was written outside the buffer :func:`guarded` gave.

    Raises:
        AssertionError: with how many elements were written and where the first is.
    """
    sentinel = torch.tensor(_SENTINEL).to(whole.dtype).float()
    for name, zone, offset in (("before", whole[:_GUARD], -_GUARD), ("after", whole[-_GUARD:], 0)):
        touched = (zone.float() != sentinel).nonzero().flatten()
        if touched.numel():
            first = int(touched[0]) + offset
            raise AssertionError(f"{touched.numel()} elements written {name} the buffer, the first at {first:+d}")


_GUARD = 1024
_SENTINEL = 77.0


class CompileReport(NamedTuple):
    """What a kernel needs on one GPU target, from its cubin. ``stack`` and ``shared`` in bytes, ``spills`` in stores."""

    kernel: str
    target: str
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    wide_loads: int
    """Global loads of 16 bytes."""
    loads: int


@contextlib.contextmanager
def compile_only(capability: int) -> Iterator[list[CompileReport]]:
    """Inside this block launches compile for a GPU target and do not run: no GPU is needed.

    Launchers are called as always, with CPU tensors, so that the specialisation is the real one; outputs stay
    unwritten. Not for Triton's interpreter, and not for threads beside this one.

    Args:
        capability: 80, 89, 90, 100 or 120.

    Yields:
        A list that fills with one report per launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class Offline:
        """As much of a driver as compiling asks for."""

        target = GPUTarget("cuda", capability, 32)

        def get_current_target(self) -> Any:
            return self.target

        def get_current_device(self) -> int:
            return capability  # one cache per target

        def get_current_stream(self, device: Any = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def is_active(self) -> bool:
            return True

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

    reports: list[CompileReport] = []
    stock = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = stock(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        reports.append(_report(kernel, self.fn.__name__, capability))
        return kernel

    before = driver._active
    driver.set_active(Offline())
    JITFunction.run = run
    try:
        yield reports
    finally:
        JITFunction.run = stock
        driver._active = before


def _report(kernel: Any, name: str, capability: int) -> CompileReport:
    from triton.backends import nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def tool(*command: str) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK):(\d+)", tool(str(tools / "cuobjdump"), "-res-usage")))
        code = tool(str(tools / "nvdisasm"), "-c")
    return CompileReport(
        kernel=name,
        target=f"sm_{capability}",
        warps=kernel.metadata.num_warps,
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        spills=len(re.findall(r"\bSTL\b", code)),
        shared=kernel.metadata.shared,
        wide_loads=len(re.findall(r"\bLDG\S*\.128", code)),
        loads=len(re.findall(r"\bLDG", code)),
    )
