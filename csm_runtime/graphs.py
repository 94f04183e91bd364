"""CUDA-graph capture and replay of one frame. Not yet run on a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

_CAPTURING = threading.Lock()
"""torch allows one capture at a time in a process."""

_FAILED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. torch's allocators keep a bare pointer to a graph whose capture could not be ended, and
follow it at the next capture: these live as long as the process."""


@contextlib.contextmanager
def no_capture(wait: float = 0.0) -> Iterator[bool]:
    """Keep captures of this process waiting while the block runs, for what would break them in whatever thread it is done.

    Yields:
        False where one is under way and takes longer than ``wait`` seconds, or the caller's own stream is being captured.
    """
    mine = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    got = not mine and _CAPTURING.acquire(timeout=wait)
    try:
        yield got
    finally:
        if got:
            _CAPTURING.release()


class Pool:
    """What the graphs of one runner share: the stream they are captured on, and their private memory.

    They may be replayed in any order, but never two at a time: what a graph allocates is dead when its replay ends, for
    results lie in fixed buffers.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream(device)
            self.handle = torch.cuda.graph_pool_handle()


class FrameGraph:
    """A function that works on fixed buffers, captured once and replayed. Not yet run on a GPU.

    A capture that fails leaves the function itself: ``failure`` says why, and :meth:`replay` calls it.

    Args:
        work: reads and writes fixed buffers only, no host sync, no data-dependent shapes.
        pool: where it is captured and where its memory lies, shared by the graphs of one runner.
    """

    def __init__(self, work: Callable[[], None], pool: Pool) -> None:
        self._work, self._pool = work, pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self.failure: str | None = None
        with _CAPTURING, torch.cuda.device(pool.device):
            try:
                self._graph = self._captured()
            except Exception as error:  # whatever a capture may raise: the caller still gets frames
                self.failure = self.failure or f"{type(error).__name__}: {error}"
                with contextlib.suppress(Exception):  # the next launch meets a device that is lost
                    torch.cuda.synchronize(pool.device)

    def replay(self) -> None:
        """Run the frame once more, on the caller's current stream of the graph's device."""
        with torch.cuda.device(self._pool.device):
            if self._graph is None:
                _plainly(self._work)
            else:
                self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The function as a graph; what it wrote before and while it was tried is seen by the caller's stream."""
        side, callers = self._pool.stream, torch.cuda.current_stream(self._pool.device)
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(callers)
        try:
            with torch.cuda.stream(side):  # torch.cuda.graph leaves it current when the end of the capture fails
                for _ in range(2):  # lazy initialisation of libraries must not happen under capture
                    _plainly(self._work)
                mode = "thread_local"  # other threads may allocate and wait as they like
                with torch.cuda.graph(graph, pool=self._pool.handle, stream=side, capture_error_mode=mode):
                    self._under_capture()
        except BaseException:
            self._abandon(graph)
            raise
        callers.wait_stream(side)
        return graph

    def _under_capture(self) -> None:
        try:
            _plainly(self._work)
        except Exception as error:  # the end of a capture that it broke raises an error that says nothing
            self.failure = f"{type(error).__name__}: {error}"
            raise

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed, whatever state it is in; none of its steps may hide why it failed."""
        _FAILED.append(graph)
        with contextlib.suppress(Exception), torch.cuda.stream(self._pool.stream):
            if torch.cuda.is_current_stream_capturing():
                graph.capture_end()
        with contextlib.suppress(Exception):
            # An end that fails leaves the allocator recording into the pool; one that did not makes this raise.
            index = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(index, self._pool.handle)
            torch._C._cuda_releasePool(index, self._pool.handle)
        with contextlib.suppress(Exception):
            graph.reset()


def _plainly(work: Callable[[], None]) -> None:
    """Call it outside the caller's inference mode, whose tensors could not be written to outside of it again."""
    with torch.inference_mode(False), torch.no_grad():
        work()
