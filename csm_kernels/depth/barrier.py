"""How one phase waits for the one before it: not at all, at a grid barrier, or by programmatic dependent launch.

A grid barrier is a counter that only grows: every program adds one when it has finished a phase, and goes on when the
counter has reached what all of them together add up to. Arriving and waiting are two calls, so that a program can ask for
its next weights in between. A wait is bounded: a program that has looked ``limit`` times in vain sets the error word and
lifts the counter above every target, which lets the whole grid run to its end. The counter is zeroed before every launch.

``debug_barrier`` is a barrier of one program's threads: without it only the stores of the thread that arrives would be
released. Polling a volatile load and acquiring afterwards does not work: the compiler deletes an acquire whose result
nobody reads.
"""

from __future__ import annotations

from csm_kernels._target import tl, triton

NO_SYNC = 0
"""One launch per phase in stream order."""
GRID = 1
"""Grid barrier on Triton's atomics; one thread of a program polls and tells the others after every look."""
GRID_PTX = 2
"""The same in inline PTX: the polling thread tells the others when it is done."""
PDL = 3
"""One launch per phase, each started before the one before it has ended."""

_ABORTED = tl.constexpr(1 << 30)

_ARRIVE = tl.constexpr("""{
    .reg .pred p;
    .reg .u32 t;
    mov.u32 t, %tid.x;
    setp.eq.u32 p, t, 0;
    @p red.release.gpu.global.add.s32 [$1], 1;
    mov.u32 $0, 0;
}""")

_WAIT = tl.constexpr("""{
    .reg .pred p, q;
    .reg .u32 t;
    .reg .s32 seen, polls;
    mov.u32 t, %tid.x;
    setp.ne.u32 p, t, 0;
    @p bra DONE${:uid};
    mov.s32 polls, 0;
    POLL${:uid}:
    ld.acquire.gpu.global.s32 seen, [$1];
    setp.ge.s32 q, seen, $2;
    @q bra DONE${:uid};
    add.s32 polls, polls, 1;
    setp.lt.s32 q, polls, $3;
    @q bra POLL${:uid};
    red.relaxed.gpu.global.max.s32 [$1+4], 1;
    red.release.gpu.global.max.s32 [$1], 1073741824;
    DONE${:uid}:
    mov.u32 $0, 0;
}""")


@triton.jit
def arrive(sync_ptr, SYNC: tl.constexpr):
    """This program's part of the phase is stored."""
    if SYNC == 1:
        tl.debug_barrier()
        tl.atomic_add(sync_ptr, 1, sem="release", scope="gpu")
    elif SYNC == 2:
        tl.debug_barrier()
        tl.inline_asm_elementwise(_ARRIVE, "=r,l,~{memory}", [sync_ptr], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait(sync_ptr, target, limit, SYNC: tl.constexpr):
    """What was stored in the phases before may be read from here on."""
    if SYNC == 1:
        polls = 1
        seen = tl.atomic_add(sync_ptr, 0, sem="acquire", scope="gpu")
        while (seen < target) & (polls < limit):
            seen = tl.atomic_add(sync_ptr, 0, sem="acquire", scope="gpu")
            polls += 1
        if seen < target:
            tl.atomic_max(sync_ptr + 1, 1, sem="relaxed", scope="gpu")
            tl.atomic_max(sync_ptr, _ABORTED, sem="release", scope="gpu")
        tl.debug_barrier()
    elif SYNC == 2:
        tl.inline_asm_elementwise(
            _WAIT, "=r,l,r,r,~{memory}", [sync_ptr, target, limit], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.debug_barrier()
    elif SYNC == 3:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def trigger(SYNC: tl.constexpr):
    """The next launch may start: it will ask for its weights and wait."""
    if SYNC == 3:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.u32 $0, 0;",
            "=r,~{memory}",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
