"""Stage 1: what the device can do. Bandwidth of memory and second-level cache, cost of a graph node and of a barrier."""

from __future__ import annotations

from typing import Any

import torch

from csm_kernels._target import tl, triton
from csm_kernels.depth.barrier import GRID, GRID_PTX, NO_SYNC, PDL, arrive, trigger, wait
from stages.common import Stage, gb_per_s

WARPS = (4, 8, 16)
_POLLS = 20_000_000
_ROUNDS = 10_000
"""Grid barriers of one launch."""


@triton.jit
def read_kernel(x_ptr, out_ptr, n, rounds, BLOCK: tl.constexpr):
    """Reads ``n`` floats ``rounds`` times, around the first-level cache and from another place in every round."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(0, rounds):
        for start in range((pid + turn) % programs * BLOCK, n, programs * BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(x_ptr + at, mask=at < n, other=0.0, cache_modifier=".cg")
    tl.store(out_ptr + pid, tl.sum(total, 0))


@triton.jit
def count_kernel(x_ptr, SYNC: tl.constexpr):
    """A phase without work: program 0 adds one to a counter, which shows that the order was kept."""
    trigger(SYNC)
    wait(x_ptr, 0, 0, SYNC)
    if tl.program_id(0) == 0:
        tl.store(x_ptr, tl.load(x_ptr) + 1)


@triton.jit(do_not_specialize=["rounds", "limit"])
def barriers_kernel(sync_ptr, rounds, limit, SYNC: tl.constexpr):
    """Grid barriers and nothing between them."""
    programs = tl.num_programs(0)
    target = 0
    for _ in range(0, rounds):
        arrive(sync_ptr, SYNC)
        target += programs
        wait(sync_ptr, target, limit, SYNC)


def run(stage: Stage) -> None:
    """Measure all of them."""
    device = stage.device
    processors = 1 if stage.rehearse else torch.cuda.get_device_properties(device).multi_processor_count
    stage.measure("stream", lambda: _read(stage, 4096 if stage.rehearse else 2 << 30, 1, processors))
    for size in (8, 16, 25, 40, 55):
        count = 2048 if stage.rehearse else size << 20
        stage.measure(f"l2 {size} MB", lambda n=count: _read(stage, n, 2 if stage.rehearse else 50, processors))
    for name, sync in (("stream order", NO_SYNC), ("pdl", PDL)):
        if sync == PDL and not stage.rehearse and torch.cuda.get_device_capability(device) < (9, 0):
            continue
        stage.measure(f"graph node {name}", lambda s=sync: _node(stage, NO_SYNC if stage.rehearse else s, processors))
    for name, sync in (("triton atomics", GRID), ("ptx", GRID_PTX)):
        for warps in WARPS:
            # Inline PTX cannot be interpreted.
            way = GRID if stage.rehearse else sync
            stage.measure(f"barrier {name} {warps} warps", lambda w=warps, s=way: _barrier(stage, s, w, processors))
    stage.put("summary", _summary(stage))


def _summary(stage: Stage) -> dict[str, Any]:
    """What the other stages take their shares of."""
    stream = (stage.get("stream") or {}).get("gb_per_s")
    cached = [(stage.get(f"l2 {size} MB") or {}).get("gb_per_s") for size in (8, 16, 25)]
    found = [speed for speed in cached if speed]
    return {"stream_gb_per_s": stream, "l2_gb_per_s": max(found) if found else None}


def _read(stage: Stage, size: int, rounds: int, processors: int) -> dict[str, Any]:
    """The best of several block sizes, and what torch's own sum reaches on the same buffer."""
    buffer = torch.ones(size // 4, device=stage.device)
    tries = []
    for block, warps, per in ((8192, 8, 2), (4096, 8, 4), (8192, 16, 1)):
        programs = processors * per
        out = torch.zeros(programs, device=stage.device)

        def work(out=out, programs=programs, block=block, warps=warps) -> None:
            read_kernel[(programs,)](buffer, out, buffer.numel(), rounds, BLOCK=block, num_warps=warps)

        found = stage.timed(work)
        total = float(out.double().sum())
        assert total == rounds * buffer.numel(), f"read {total} ones, not {rounds * buffer.numel()}"
        speed = gb_per_s(buffer.nbytes * rounds, found["ms"])
        tries.append({"block": block, "warps": warps, "programs": programs, "gb_per_s": speed, **found})
    total = torch.empty((), device=stage.device)
    library = (
        gb_per_s(buffer.nbytes, stage.timed(lambda: torch.sum(buffer, 0, out=total))["ms"]) if rounds == 1 else None
    )
    speeds = [one["gb_per_s"] for one in tries if one["gb_per_s"]] + ([library] if library else [])
    return {"bytes": buffer.nbytes, "gb_per_s": max(speeds) if speeds else None, "torch_sum": library, "tries": tries}


def _node(stage: Stage, sync: int, processors: int, nodes: int = 500) -> dict[str, Any]:
    """Microseconds of a kernel that does nothing, in a chain of them, one program per processor."""
    nodes = 3 if stage.rehearse else nodes
    counter = torch.zeros(1, dtype=torch.int32, device=stage.device)
    options = {"launch_pdl": True} if sync == PDL else {}

    def chain() -> None:
        for i in range(nodes):
            first = i == 0  # behind what is not ours: in stream order
            count_kernel[(processors,)](counter, SYNC=NO_SYNC if first else sync, **({} if first else options))

    found = stage.timed(chain)
    counter.zero_()
    chain()
    assert int(counter) == nodes, f"{int(counter)} of {nodes} kernels saw the one before"
    return {"nodes": nodes, "us_each": None if found["ms"] is None else found["ms"] * 1e3 / nodes, **found}


def _barrier(stage: Stage, sync: int, warps: int, processors: int) -> dict[str, Any]:
    """Microseconds of a grid barrier, one program per processor."""
    rounds = 3 if stage.rehearse else _ROUNDS
    counters = torch.zeros(2, dtype=torch.int32, device=stage.device)
    options = {} if stage.rehearse else {"launch_cooperative_grid": True}

    def work() -> None:
        counters.zero_()
        barriers_kernel[(processors,)](counters, rounds, _POLLS, SYNC=sync, num_warps=warps, **options)

    found = stage.timed(work)
    assert counters.tolist() == [processors * rounds, 0], f"counter and error word are {counters.tolist()}"
    each = None if found["ms"] is None else found["ms"] * 1e3 / rounds
    return {"programs": processors, "us_each": each, **found}
