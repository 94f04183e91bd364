"""Cache clearing that follows memory pressure, against the guide's fixed interval of 50 frames and against none.

    python bench/memory_pressure.py                   # leaves 5, 6 and 10 GiB of the device to each, and prints JSON
    python bench/memory_pressure.py --room 6 --calls 200 --json FILE

A made-up day of serving CSM-1B in bf16 runs through CUDA's real caching allocator: weights, prompts, voices that come and go,
sound, and another tenant of the device that does not use PyTorch's allocator, here the CUDA driver's. No model runs. It has
never been run on a GPU; tests/test_memory.py runs the same trace through a simulated allocator.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from csm_runtime.memory import CacheClearing, MemoryReading, cuda_probe, source_of
from csm_runtime.metrics import Metrics

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
FIXED = 50
"""Frames between two clears in the optimisation guide."""


class Event(NamedTuple):
    kind: str
    """``call``, ``frame``, ``hold`` and ``drop`` in the allocator, ``come`` and ``go`` of the other tenant."""
    name: str = ""
    bytes: int = 0


def trace(seed: int, calls: int = 60, tenant: int = 512 * MIB) -> Iterator[Event]:
    """CSM-1B's sizes: 2 KiB of cache per position and layer, MLPs of 16 KiB per position, sound of 480 KiB per frame."""
    rng = random.Random(seed)
    yield from (Event("hold", f"weights {i}", 66 * MIB) for i in range(48))
    voices: list[int] = []
    for call in range(calls):
        if rng.random() < 0.4:
            voices.append(call)
            size = rng.randint(100, 700) * KIB
            yield from (Event("hold", f"voice {call} {i}", size) for i in range(32))
            if len(voices) > 6:
                gone = voices.pop(rng.randrange(3))
                yield from (Event("drop", f"voice {gone} {i}") for i in range(32))
        yield Event("call")
        rows, tokens = rng.choice((1, 1, 1, 2, 4, 8)), min(2000, max(40, int(rng.lognormvariate(5.5, 0.8))))
        many = rows * tokens * KIB
        for layer in range(16):
            yield from (Event("hold", f"prompt {layer} {i}", many) for i in range(2))
            yield from (Event("hold", f"mlp {i}", 16 * many) for i in range(3))
            yield from (Event("drop", f"mlp {i}") for i in range(3))
        yield from (Event("drop", f"prompt {layer} {i}") for layer in range(16) for i in range(2))
        frames = rng.randint(12, 125)
        comes = rng.randrange(frames) if call % 5 == 4 else -1
        for frame in range(frames):
            yield Event("hold", f"frame {frame}", rows * 512)
            yield Event("frame")
            if frame == comes:
                yield Event("come", "tenant", rng.randint(tenant // 2, tenant))
        for row in range(rows):
            yield from (Event("hold", f"sound {i}", frames * 480 * KIB >> i % 3) for i in range(6))
            yield Event("hold", f"samples {row}", frames * 1920 * 4)
            yield from (Event("drop", f"sound {i}") for i in range(6))
        yield from (Event("drop", f"samples {row}") for row in range(rows))
        yield from (Event("drop", f"frame {frame}") for frame in range(frames))
        if comes >= 0:
            yield Event("go", "tenant")


def replay(
    events: Iterator[Event], memory: Any, between: Callable[[], None], calls: Callable[[], None]
) -> dict[str, int]:
    """Run a trace. ``memory`` has ``hold``, ``drop``, ``come``, ``go`` and ``reserved``."""
    seen = {"frames": 0, "out_of_memory": 0, "tenant_refused": 0, "peak_reserved": 0}
    for kind, name, size in events:
        if kind == "frame":
            seen["frames"] += 1
            between()
        elif kind == "call":
            calls()
        elif kind == "hold":
            try:
                memory.hold(name, size)
            except torch.OutOfMemoryError:
                seen["out_of_memory"] += 1
            seen["peak_reserved"] = max(seen["peak_reserved"], memory.reserved())
        elif kind == "come":
            seen["tenant_refused"] += not memory.come(name, size)
        else:
            getattr(memory, kind)(name)
    return seen


def every(frames: int, clear: Callable[[], None]) -> Callable[[], None]:
    """The guide's way."""
    left = [frames]

    def between() -> None:
        left[0] -= 1
        if not left[0]:
            left[0] = frames
            clear()

    return between


class Cuda:
    """The device: PyTorch's allocator, and the driver's for the tenant."""

    def __init__(self, device: torch.device, room: int) -> None:
        self._held: dict[str, Any] = {}
        self._device, self._driver = device, ctypes.CDLL("libcuda.so.1")
        torch.cuda.init()
        self._tenant = ctypes.c_uint64()
        self.hold("ballast", max(0, torch.cuda.mem_get_info(device)[0] - room))
        self.room, self.ballast = room, torch.cuda.memory_reserved(device)

    def hold(self, name: str, size: int) -> None:
        self._held[name] = torch.empty(size, dtype=torch.uint8, device=self._device)

    def drop(self, name: str) -> None:
        self._held.pop(name, None)

    def come(self, name: str, size: int) -> bool:
        return self._driver.cuMemAlloc_v2(ctypes.byref(self._tenant), ctypes.c_size_t(size)) == 0

    def go(self, name: str) -> None:
        if self._tenant.value:
            self._driver.cuMemFree_v2(self._tenant)
        self._tenant = ctypes.c_uint64()

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self._device) - self.ballast

    def probe(self) -> MemoryReading:
        """As if the device were no larger than what the ballast leaves of it."""
        whole = cuda_probe(self._device)
        return MemoryReading(self.room, whole.free, self.reserved(), whole.allocated - self.ballast)


def main() -> int:
    """Run every policy in every room; 2 where there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", type=float, nargs="+", default=[5.0, 6.0, 10.0], help="GiB left by a ballast")
    parser.add_argument("--calls", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 2
    device, rows = torch.device("cuda", torch.cuda.current_device()), []
    for room in args.room:
        for policy in ("fixed", "none", "pressure"):
            torch.cuda.empty_cache()
            memory, clears = Cuda(device, int(room * GIB)), [0]

            def clear(count: list[int] = clears) -> None:
                count[0] += 1
                torch.cuda.empty_cache()

            ours = CacheClearing(source_of(device)._replace(probe=memory.probe, clear=clear), Metrics())
            between = {"fixed": every(FIXED, clear), "none": int, "pressure": ours.between_frames}[policy]
            calls = ours.between_calls if policy == "pressure" else int
            rows.append(
                {"room_gib": room, "policy": policy, **replay(trace(args.seed, args.calls), memory, between, calls)}
            )
            rows[-1]["clears"] = clears[0]
            memory.go("tenant")
            del memory
    text = json.dumps({"gpu": torch.cuda.get_device_name(device), "seed": args.seed, "rows": rows}, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
