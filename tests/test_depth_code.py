"""The persistent kernel in machine code: weights are asked for while a program waits at a barrier."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from kernels.cases_depth import CASES

from csm_kernels import testing
from csm_kernels._target import has_triton, interpreting

pytestmark = [
    pytest.mark.slow,
    pytest.mark.compiled_ahead,
    pytest.mark.skipif(
        interpreting() or not has_triton(), reason="compiles with Triton's compiler, not its interpreter"
    ),
]

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")


def sass(monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    """Machine code of one case for sm_90."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "nvdisasm"

    def disassembled(kernel: Any, *_: Any) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            return subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout

    texts: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(testing, "_report", lambda *given: texts.append(disassembled(*given)))
        with testing.compile_only(90):
            CASES[name]()
    (text,) = texts
    return text


def waits_of(code: str) -> list[tuple[int, int]]:
    """For every wait: weight loads between the arrival before it and its poll, and instructions there that need them.

    Weights are what is loaded with a word on how long it should stay in the cache, nothing else is.
    """
    waits: list[tuple[int, int]] = []
    registers: set[int] = set()
    loads = needing = 0
    for op, operands in _INSTRUCTION.findall(code):
        if op.startswith("LDG") and "STRONG.GPU" in op:
            waits.append((loads, needing))
        if ("STRONG.GPU" in op) and (op.startswith("LDG") or (op.startswith("RED") and ".ADD" in op)):
            loads = needing = 0
            registers = set()
            continue
        named = [int(r) for r in re.findall(r"\bR(\d+)\b", operands)]
        if op.startswith("LDG") and re.search(r"\.E[FL]\b", op):
            loads += 1
            width = 4 if ".128" in op else 2 if ".64" in op else 1
            registers |= set(range(named[0], named[0] + width))
        elif registers & set(named):
            needing += 1
    return waits


# Of each wait in the order of the code, the weight loads a thread at least has on their way (triton 3.6, sm_90).
ON_THEIR_WAY = {
    # start, qkv with the draw, attention with O, gate and up, down, head, the last draw (which has no weights)
    "depth persistent bf16 x1": [8, 2, 4, 8, 8, 8, 0],
    "depth persistent int8 x1": [4, 1, 2, 4, 4, 4, 0],
    # start, draws, qkv, attention, O, gate and up, down, head, the last draw
    "depth persistent bf16 x4": [4, 0, 4, 0, 4, 4, 4, 4, 0],
    # start, qkv with the draw, attention, O, gate and up, down, head, the last draw
    "depth persistent int4 x1": [2, 2, 0, 2, 2, 2, 2, 0],
}


@pytest.mark.parametrize("name", list(ON_THEIR_WAY))
def test_weights_are_on_their_way_during_the_wait(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The point of arriving and waiting in two calls: a compiler that moves these loads behind the wait undoes it."""
    waits = waits_of(sass(monkeypatch, name))
    expected = ON_THEIR_WAY[name]
    assert len(waits) == len(expected), waits
    assert all(loads >= least for (loads, _), least in zip(waits, expected)), waits
    assert not any(needing for _, needing in waits), "and nothing waits for them before the poll"
