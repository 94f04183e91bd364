"""Capture and replay of a frame, on a CPU: what is asked of CUDA and in which order, and what a failed capture leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from csm_models import build, on_fast_path, stock, text_prompt

from csm_runtime import accelerate, fused, graphs

DEVICE = torch.device("cuda", 1)
GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}


class FakeCuda:
    """Stands in for the calls of ``torch.cuda`` that captures make: writes them down, and keeps the state they change."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.stream, self.device = "caller", 0
        self.capturing: Any = None
        self.pools = self.streams = 0
        self.fails: dict[str, Exception] = {}
        """Which of the calls raise."""
        self.on: dict[str, Callable[[], None]] = {}
        """What else happens at a call."""
        fake = self

        class Stream:
            def __init__(self, device: Any) -> None:
                fake.streams += 1
                self.name = f"side{fake.streams}"
                fake.call(f"Stream on {fake.device}")

            def wait_stream(self, other: Any) -> None:
                fake.call(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def capture_end(self) -> None:
                fake.capturing = None
                fake.call("capture_end")

            def reset(self) -> None:
                fake.call("reset")

            def replay(self) -> None:
                fake.call(f"replay on {fake.stream} of {fake.device}")

        @contextlib.contextmanager
        def capture(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            """As torch's: an end that fails leaves the side stream current."""
            before, fake.stream = fake.stream, stream.name
            fake.call(f"capture_begin in {pool} on {stream.name}, {capture_error_mode}")
            fake.capturing = graph
            try:
                yield
            finally:
                fake.call("graph exit")
                fake.capturing = None
                fake.stream = before

        self.Caller = Stream
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(torch.cuda, "stream", lambda stream: self.during("stream", stream.name))
        patch.setattr(torch.cuda, "device", lambda device: self.during("device", torch.device(device).index))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.named(self.stream))
        patch.setattr(torch.cuda, "current_device", lambda: self.device)
        patch.setattr(torch.cuda, "graph_pool_handle", self.pool)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: self.call(f"synchronize {device}"))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing is not None)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", lambda i, pool: self.call(f"end allocating {pool} on {i}"))
        patch.setattr(torch._C, "_cuda_releasePool", lambda i, pool: self.call(f"release {pool} on {i}"))
        patch.setattr(graphs, "_FAILED", [])

    def call(self, what: str) -> None:
        self.log.append(what)
        for name, action in self.on.items():
            if what.startswith(name):
                action()
        for name, error in self.fails.items():
            if what.startswith(name):
                raise error

    def named(self, name: str) -> Any:
        def wait(other: Any) -> None:
            self.call(f"{name} waits for {other.name}")

        return types.SimpleNamespace(name=name, wait_stream=wait)

    def pool(self) -> str:
        self.pools += 1
        return f"pool{self.pools}"

    @contextlib.contextmanager
    def during(self, what: str, value: Any) -> Iterator[None]:
        before = getattr(self, what)
        setattr(self, what, value)
        try:
            yield
        finally:
            setattr(self, what, before)

    def work(self) -> None:
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        self.call(f"work on {self.stream} of {self.device}" + (", captured" if self.capturing else ""))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


CAPTURE = [
    "side1 waits for caller",
    "work on side1 of 1",
    "work on side1 of 1",
    "capture_begin in pool1 on side1, thread_local",
    "work on side1 of 1, captured",
    "graph exit",
    "caller waits for side1",
]


def assert_as_before(cuda: FakeCuda) -> None:
    """Neither the caller's stream nor its device has changed, and the next capture may begin."""
    assert (cuda.stream, cuda.device, cuda.capturing) == ("caller", 0, None)
    assert graphs._CAPTURING.acquire(blocking=False)
    graphs._CAPTURING.release()


# ------------------------------------------------------------------------------------------------ a capture that works


@pytest.mark.parametrize("caller", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_what_a_capture_asks_for(cuda: FakeCuda, caller: Any) -> None:
    with caller():
        graph = graphs.FrameGraph(cuda.work, graphs.Pool(DEVICE))
    assert cuda.log == ["Stream on 1", *CAPTURE]
    assert graph.failure is None
    assert not graphs._FAILED
    assert_as_before(cuda)
    with caller():
        graph.replay()
    assert cuda.log[len(CAPTURE) + 1 :] == ["replay on caller of 1"]
    assert_as_before(cuda)


def test_a_replay_runs_where_its_caller_stands(cuda: FakeCuda) -> None:
    graph = graphs.FrameGraph(cuda.work, graphs.Pool(DEVICE))
    with cuda.during("stream", "another"):
        graph.replay()
    assert cuda.log[-1] == "replay on another of 1"


def test_a_capture_from_another_stream_waits_for_it(cuda: FakeCuda) -> None:
    with cuda.during("stream", "another"):
        graphs.FrameGraph(cuda.work, graphs.Pool(DEVICE))
        assert cuda.stream == "another"
    assert "side1 waits for another" in cuda.log
    assert cuda.log[-1] == "another waits for side1"


def test_graphs_of_one_runner_share_stream_and_pool(cuda: FakeCuda) -> None:
    pool = graphs.Pool(DEVICE)
    for _ in range(2):
        graphs.FrameGraph(cuda.work, pool)
    graphs.FrameGraph(cuda.work, graphs.Pool(DEVICE))
    begun = [line for line in cuda.log if line.startswith("capture_begin")]
    assert begun == [f"capture_begin in pool{n} on side{n}, thread_local" for n in (1, 1, 2)]


def test_one_capture_at_a_time(cuda: FakeCuda) -> None:
    """A second thread captures on another device only when the first one is through, warm-up included."""
    began, go_on, order = threading.Event(), threading.Event(), []

    def slow() -> None:
        order.append("slow")
        began.set()
        assert go_on.wait(30)

    first = threading.Thread(target=graphs.FrameGraph, args=(slow, graphs.Pool(DEVICE)))
    other = graphs.Pool(torch.device("cuda", 0))
    second = threading.Thread(target=graphs.FrameGraph, args=(lambda: order.append("quick"), other))
    first.start()
    assert began.wait(30)
    second.start()
    second.join(0.3)
    waited = second.is_alive() and "quick" not in order
    go_on.set()
    first.join(30)
    second.join(30)
    assert waited
    assert order == ["slow"] * 3 + ["quick"] * 3


# ------------------------------------------------------------------------------------------------ one that fails


def broken() -> Exception:
    return RuntimeError("an op that may not be captured")


@pytest.mark.parametrize("at", ["work on side1 of 1, captured", "work on side1", "capture_begin", "graph exit"])
def test_a_failed_capture_leaves_the_device_usable(cuda: FakeCuda, at: str) -> None:
    cuda.fails[at] = broken()
    graph = graphs.FrameGraph(cuda.work, graphs.Pool(DEVICE))
    assert graph.failure == "RuntimeError: an op that may not be captured"
    assert cuda.log[-1] == "synchronize cuda:1"
    assert "reset" in cuda.log
    assert_as_before(cuda)
    cuda.fails.clear()
    graph.replay()
    assert cuda.log[-1] == "work on caller of 1", "without a graph the frame runs as launches, where the caller stands"
    assert graphs.FrameGraph(cuda.work, graphs.Pool(DEVICE)).failure is None


def test_the_first_error_is_the_one_that_is_said(cuda: FakeCuda) -> None:
    """Ending a broken capture raises an error of its own."""
    cuda.fails = {
        "work on side1 of 1, captured": broken(),
        "graph exit": RuntimeError("capture was invalidated"),
        "synchronize": RuntimeError("still invalidated"),
        "reset": RuntimeError("nothing to reset"),
    }
    graph = graphs.FrameGraph(cuda.work, graphs.Pool(DEVICE))
    assert graph.failure == "RuntimeError: an op that may not be captured"
    assert_after_a_broken_end(cuda)


def assert_after_a_broken_end(cuda: FakeCuda) -> None:
    """torch has not ended the capture itself: it is ended, and the allocator is told, in this order."""
    wanted = ["graph exit", "capture_end", "end allocating pool1 on 1", "release pool1 on 1", "reset"]
    assert [line for line in cuda.log if line in wanted] == wanted
    assert len(graphs._FAILED) == 1, "the allocators may still point at the graph"
    assert (cuda.stream, cuda.device) == ("caller", 0)
    assert not graphs._CAPTURING.locked()


def test_a_capture_that_was_ended_is_not_ended_again(cuda: FakeCuda) -> None:
    cuda.fails = {
        "work on side1 of 1, captured": broken(),
        "end allocating": RuntimeError("not currently recording to this pool"),
    }
    graphs.FrameGraph(cuda.work, graphs.Pool(DEVICE))
    assert "capture_end" not in cuda.log
    assert "release pool1 on 1" not in cuda.log, "the graph releases the pool itself, once"


def test_an_interrupt_ends_the_capture_and_goes_on(cuda: FakeCuda) -> None:
    def interrupt() -> None:
        if cuda.capturing:
            raise KeyboardInterrupt
        cuda.work()

    with pytest.raises(KeyboardInterrupt):
        graphs.FrameGraph(interrupt, graphs.Pool(DEVICE))
    assert "reset" in cuda.log
    assert_as_before(cuda)


# ------------------------------------------------------------------------------------------------ in the engine


def as_on_cuda(model: Any, patch: pytest.MonkeyPatch) -> Any:
    """Let a model on a CPU take the engine's way for CUDA graphs."""
    engine = model.acceleration._engine
    patch.setattr(engine, "mode", "graph")
    patch.setattr(engine, "lag", 2)
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return engine


def test_a_failed_capture_is_said_once(
    fast: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, prompt = fast(), text_prompt((4, 6))
    as_on_cuda(model, monkeypatch)
    cuda.fails["capture_begin"] = broken()
    metrics = model.acceleration.metrics
    for _ in range(2):
        tokens = model.generate(**prompt, **GREEDY, max_new_tokens=4)
        assert torch.equal(tokens, stock(model, **prompt, **GREEDY, max_new_tokens=4))
    failure = "CUDA graph capture failed: RuntimeError: an op that may not be captured"
    assert dict(metrics.faults) == {failure: 1}
    assert sum("CUDA graph capture failed" in record.getMessage() for record in caplog.records) == 1
    assert metrics.counters["generate.stock"] == 0
    with on_fast_path(model):
        model.generate(**prompt, **GREEDY, max_new_tokens=4)


def test_the_engine_replays_the_first_frame_and_the_later_ones(
    fast: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both graphs are captured in one pool, and a replay that does what was captured gives stock's tokens."""
    model, prompt = fast(), text_prompt((4, 6))
    engine = as_on_cuda(model, monkeypatch)
    works: list[Callable[[], None]] = []
    made = graphs.FrameGraph.__init__

    def capture(graph: graphs.FrameGraph, work: Callable[[], None], pool: graphs.Pool) -> None:
        made(graph, work, pool)
        works.append(work)
        assert graph._graph is not None
        graph._graph.replay = work  # type: ignore[method-assign]

    monkeypatch.setattr(graphs.FrameGraph, "__init__", capture)
    with on_fast_path(model):
        tokens = model.generate(**prompt, **GREEDY, max_new_tokens=5)
    assert torch.equal(tokens, stock(model, **prompt, **GREEDY, max_new_tokens=5))
    assert len(works) == 2
    assert [line for line in cuda.log if "begin" in line] == ["capture_begin in pool1 on side1, thread_local"] * 2
    model.generate(**prompt, **GREEDY, max_new_tokens=5)
    assert len(works) == 2, "captured again"
    assert engine.runner(2).released is None


def test_a_runner_is_waited_for_on_another_stream(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that nobody waits for may still be running when the next call comes, on a stream of its own."""
    engine, log = fast().acceleration._engine, []

    class FakeStream:
        def record_event(self, event: Any) -> str:
            log.append(("record", event))
            return "event"

        def wait_event(self, event: Any) -> None:
            log.append(("wait", event))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(engine, "device", DEVICE)
    runner = engine.runner(1)
    engine.prepare(1)
    engine.release(runner)
    engine.prepare(1)
    engine.release(runner)
    assert log == [("record", None), ("wait", "event"), ("record", "event")]


class Full:
    """Stands in for the packed copies on a device without room for them."""

    def refresh(self, packed: Any) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def bytes(self) -> int:
        return 0


def test_without_room_for_copies_frames_run_on_library_ops(
    fast: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = fast(), text_prompt((4, 6))
    engine = as_on_cuda(model, monkeypatch)
    cuda.fails["capture_begin"] = broken()  # the stand-in's replays do nothing
    monkeypatch.setattr(engine, "_fused", Full())
    monkeypatch.setattr(engine, "unfused", None)
    tokens = model.generate(**prompt, **GREEDY, max_new_tokens=4)
    assert torch.equal(tokens, stock(model, **prompt, **GREEDY, max_new_tokens=4))
    assert model.acceleration.metrics.counters["generate.stock"] == 0
    notes = [note for note in model.acceleration.notes if "CUDA out of memory" in note]
    assert len(notes) == 1
    model.generate(**prompt, **GREEDY, max_new_tokens=2)
    assert len([note for note in model.acceleration.notes if "CUDA out of memory" in note]) == 1


def test_who_asks_for_kernels_is_told(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fast().acceleration._engine
    monkeypatch.setattr(engine, "mode", "kernels")
    monkeypatch.setattr(engine, "_fused", Full())
    with pytest.raises(torch.OutOfMemoryError):
        engine.bind(engine.packed)


def test_kernels_need_what_they_need(fast: Any) -> None:
    spec, cpu, gpu = fast().acceleration._engine.spec, torch.device("cpu"), torch.device("cuda")
    assert fused.why_not(spec, gpu) is None
    assert "the model is on cpu" in str(fused.why_not(spec, cpu))
    wide = dataclasses.replace(spec, depth=dataclasses.replace(spec.depth, head_dim=320))
    assert "the depth decoder has heads of 320" in str(fused.why_not(wide, gpu))
    huge = dataclasses.replace(spec, backbone=dataclasses.replace(spec.backbone, ffn=2**20, hidden=2**11))
    assert "the backbone has a matrix of 2^31" in str(fused.why_not(huge, gpu))
    assert "no codebook" in str(fused.why_not(dataclasses.replace(spec, codebooks=1), gpu))
    with pytest.raises(ValueError, match="mode 'kernels' runs the fused kernels, and they need CUDA"):
        accelerate(build("base"), mode="kernels", progress=False)
    with pytest.raises(ValueError, match="mode 'library' needs a CUDA device"):
        accelerate(build("base"), mode="library", progress=False)
