"""The litmus test of the depth decoder's grid barrier: neighbours exchange values, and the answer is known exactly.

    python bench/litmus.py                            every kind of synchronisation on the GPU there is
    python bench/litmus.py --rounds 100000 --warps 8  a longer one

A value read a round too early or too late changes the outcome, for every later value depends on it.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import torch
from torch import Tensor

from csm_kernels._target import interpreting, tl, triton
from csm_kernels.depth.barrier import GRID, GRID_PTX, NO_SYNC, PDL, arrive, trigger, wait

LANES = 128
"""Values of a program per warp: four in each thread."""
LIMIT = 1 << 22
"""Looks at the counter before a wait gives up; a second or so on a GPU."""
_KEPT = tl.constexpr((1 << 16) - 1)


@triton.jit(do_not_specialize=["first", "last", "limit"])
def _exchange_kernel(
    values_ptr,  # [2, programs, BLOCK] int32: what round r reads is in half r % 2, what it writes in the other
    sync_ptr,  # [2] int32: the barrier's counter and its error word
    first,
    last,
    limit,
    SYNC: tl.constexpr,
    BLOCK: tl.constexpr,
    SHORT: tl.constexpr = 0,  # how many arrivals a wait is short of the right number
    ABSENT: tl.constexpr = -1,  # the program that never arrives
):
    pid, programs = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    trigger(SYNC)
    for turn in range(first, last):
        wait(sync_ptr, turn * programs - SHORT, limit, SYNC)
        source_ptr = values_ptr + turn % 2 * programs * BLOCK + lane
        own = tl.load(source_ptr + pid * BLOCK)
        left = tl.load(source_ptr + (pid + programs - 1) % programs * BLOCK)
        right = tl.load(source_ptr + (pid + 1) % programs * BLOCK)
        target_ptr = values_ptr + (turn + 1) % 2 * programs * BLOCK + lane
        tl.store(target_ptr + pid * BLOCK, (3 * own + 5 * left + 7 * right + turn) & _KEPT)
        if ABSENT < 0:  # noqa: SIM114
            arrive(sync_ptr, SYNC)
        elif pid != ABSENT:
            arrive(sync_ptr, SYNC)


class Exchange(NamedTuple):
    """What an exchange works on; :func:`prepare` makes one."""

    values: Tensor
    sync: Tensor


def prepare(programs: int, warps: int, device: torch.device | str) -> Exchange:
    """Start values, the same every time, a second half that nobody has written, and a barrier at zero."""
    generator = torch.Generator().manual_seed(programs)
    values = torch.full((2, programs, LANES * warps), -1, dtype=torch.int32)
    values[0] = torch.randint(1 << 16, values[0].shape, generator=generator)
    return Exchange(values.to(device), torch.zeros(2, dtype=torch.int32, device=device))


def exchange(
    state: Exchange, rounds: int, sync: int, *, limit: int = LIMIT, warps: int = 4, short: int = 0, absent: int = -1
) -> Tensor:
    """Run ``rounds`` rounds: in one launch with a grid barrier, in a launch each without one and with PDL.

    Args:
        state: from :func:`prepare` and used once; its ``sync`` holds the counter and the error word afterwards.
        rounds: how many.
        sync: one of the constants of ``csm_kernels.depth.barrier``.
        limit: looks at the counter before a wait gives up.
        warps: as ``state`` was made for.
        short: a broken barrier, whose waits are satisfied by so many arrivals less.
        absent: a broken barrier, at which this program never arrives.

    Returns:
        The values after the last round, ``[programs, 128 * warps]``.
    """
    _, programs, block = state.values.shape
    together = sync in (GRID, GRID_PTX)
    options = {"launch_cooperative_grid": True} if together else {"launch_pdl": True} if sync == PDL else {}
    for first, last in [(0, rounds)] if together else [(turn, turn + 1) for turn in range(rounds)]:
        _exchange_kernel[(programs,)](
            state.values, state.sync, first, last, limit, sync, block, short, absent, num_warps=warps, **options
        )
    return state.values[rounds % 2]


def expected(state: Exchange, rounds: int) -> Tensor:
    """The values after ``rounds`` rounds, from the start values of an exchange that has not run."""
    values = state.values[0].cpu()
    for turn in range(rounds):
        values = (3 * values + 5 * values.roll(1, 0) + 7 * values.roll(-1, 0) + turn) & 0xFFFF
    return values


def measure(programs: int, rounds: int, sync: int, warps: int, device: torch.device) -> tuple[bool, float]:
    """Whether an exchange was right, and its microseconds per round."""
    exchange(prepare(programs, warps, device), 2, sync, warps=warps)  # compiles
    state = prepare(programs, warps, device)
    truth = expected(state, rounds)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    values = exchange(state, rounds, sync, warps=warps)
    torch.cuda.synchronize(device)
    took = time.perf_counter() - start
    arrived = [programs * rounds if sync in (GRID, GRID_PTX) else 0, 0]
    return torch.equal(values.cpu(), truth) and state.sync.tolist() == arrived, 1e6 * took / rounds


def main() -> None:
    """Run every kind of synchronisation and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=0, help="default: one per processor")
    parser.add_argument("--rounds", type=int, default=5000)
    parser.add_argument("--warps", type=int, nargs="+", default=[4, 8, 16])
    args = parser.parse_args()
    if interpreting() or not torch.cuda.is_available():
        raise SystemExit("needs a GPU; tests/kernels/test_barrier.py runs the exchange interpreted")
    device = torch.device("cuda")
    programs = args.programs or torch.cuda.get_device_properties(device).multi_processor_count
    kinds = {"grid barrier": GRID, "grid barrier in PTX": GRID_PTX, "launch per round": NO_SYNC}
    if torch.cuda.get_device_capability(device) >= (9, 0):
        kinds["programmatic dependent launch"] = PDL
    for name, sync in kinds.items():
        for warps in args.warps:
            right, microseconds = measure(programs, args.rounds, sync, warps, device)
            verdict = "exact" if right else "WRONG"
            print(f"{name}, {programs} programs of {warps} warps: {verdict}, {microseconds:.2f} us a round", flush=True)


if __name__ == "__main__":
    main()
