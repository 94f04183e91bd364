"""CUDA-graph capture and replay of one frame. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


class FrameGraph:
    """A function that works on fixed buffers, captured once and replayed.

    A capture that fails leaves the function itself: ``failure`` says why, and :meth:`replay` calls it.

    Args:
        work: reads and writes fixed buffers only, no host sync, no data-dependent shapes.
        device: a CUDA device.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work = work
        self._graph: torch.cuda.CUDAGraph | None = None
        self.failure: str | None = None
        try:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(2):  # lazy initialisation of libraries must not happen under capture
                    work()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
            self._graph = graph
        except Exception as error:  # whatever a capture may raise: the caller still gets frames
            self.failure = f"{type(error).__name__}: {error}"

    def replay(self) -> None:
        """Run the frame once more."""
        if self._graph is None:
            self._work()
        else:
            self._graph.replay()
