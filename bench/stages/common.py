"""What every stage works with: its journal, its device, its clock."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from csm_kernels._target import interpreting
from csm_kernels._tiles import override_tiles
from csm_runtime.graphs import FrameGraph, Pool

ROOT = Path(__file__).parent.parent.parent
_MATRICES = ("projection", "qkv", "o", "gate_up", "down", "heads")
_LOST = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure")
"""What an error says after which nothing else runs in its process."""


def fingerprint() -> str:
    """What the results depend on besides the machine: a hash of the package's and the campaign's sources."""
    files = [*ROOT.glob("csm_kernels/**/*.py"), *ROOT.glob("csm_runtime/**/*.py"), *ROOT.glob("bench/**/*.py")]
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return total.hexdigest()[:16]


def write_json(path: Path, content: Any) -> None:
    """Write a whole file or none of it: a time-out may come at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


class Stage:
    """One stage while it runs. What it finds is on disk at once, piece by piece, so that a hang costs one piece.

    Args:
        path: the journal; pieces that an earlier, unfinished run has left there are not measured again.
        rehearse: small shapes and no times.
        limit: seconds the stage may take.
    """

    def __init__(self, path: Path, *, rehearse: bool, limit: float) -> None:
        self.path, self.rehearse = path, rehearse
        self._end = time.monotonic() + limit
        self._journal = {"pieces": {}, "errors": {}, **read_json(path), "source": fingerprint(), "rehearsal": rehearse}
        self._journal["errors"] = {}
        self.device = torch.device("cpu" if rehearse else "cuda")

    @property
    def failed(self) -> dict[str, str]:
        """Pieces that raised, and what."""
        return self._journal["errors"]

    def left(self) -> float:
        """Seconds until the stage is stopped."""
        return self._end - time.monotonic()

    def get(self, name: str) -> Any:
        """A piece, or None."""
        return self._journal["pieces"].get(name)

    def put(self, name: str, value: Any) -> None:
        """Keep a piece."""
        self._journal["pieces"][name] = value
        write_json(self.path, self._journal)

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        """Do a piece of work and keep what it gives, unless it is there already; its failure is kept and not raised.

        Raises:
            Exception: the device is lost, and with it all that would come.
        """
        if self.get(name) is not None:
            return self.get(name)
        try:
            self.put(name, work())
        except Exception as error:
            traceback.print_exc()
            self._journal["errors"][name] = f"{type(error).__name__}: {error}"[:2000]
            write_json(self.path, self._journal)
            if any(word in str(error) for word in _LOST):
                raise
        return self.get(name)

    def earlier(self, number: int) -> dict[str, Any]:
        """The pieces of another stage."""
        return read_json(self.path.parent / f"stage-{number}.json").get("pieces", {})

    def timed(self, work: Callable[[], None], seconds: float = 0.15) -> dict[str, Any]:
        """Milliseconds of ``work`` as a CUDA graph, the median of as many replays as fit into ``seconds``.

        Where it cannot be captured, of its plain launches; ``how`` says which. In a rehearsal it runs once, untimed.
        """
        if self.rehearse:
            work()
            return {"ms": None, "how": "rehearsed"}
        graph = FrameGraph(work, Pool(self.device))
        graph.replay()
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        count = int(min(max(seconds / (time.perf_counter() - start), 9), 300))
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for before, after in marks:
            before.record()
            graph.replay()
            after.record()
        torch.cuda.synchronize()
        found = {"ms": statistics.median(before.elapsed_time(after) for before, after in marks), "replays": count}
        return found | ({"how": "graph"} if graph.failure is None else {"how": "launches", "why": graph.failure})

    def prepared(self) -> contextlib.ExitStack:
        """In a rehearsal: the interpreter repaired, and tiles so tall that interpreting takes seconds."""
        stack = contextlib.ExitStack()
        if interpreting():
            spec = importlib.util.spec_from_file_location("repairs", ROOT / "tests" / "kernels" / "interpreter.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.repair()
            tall = {f"BN_{name}": 256 for name in _MATRICES}
            for op in ("depth", "backbone"):
                stack.enter_context(override_tiles(op, **tall))
        return stack


def gb_per_s(size: int, milliseconds: float | None) -> float | None:
    """Bytes read in a time."""
    return None if milliseconds is None else size / milliseconds / 1e6


def ratio(value: float | None, of: float | None) -> float | None:
    """A share, where both are known."""
    return None if value is None or not of else value / of
