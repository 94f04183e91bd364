"""One frame: codebook 0, the depth loop, the backbone step. The only caller of decode kernels."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from csm_kernels.attention import attention_step_ref
from csm_kernels.gemv import gemv_widened
from csm_kernels.norm import rms_norm_ref
from csm_kernels.sampling import NoiseKey, SamplingParams
from csm_runtime import compiling, fused, graphs, native
from csm_runtime.adapters.spec import ModelSpec, RotaryTables, StackSpec
from csm_runtime.kv import Fault, State
from csm_runtime.metrics import Metrics
from csm_runtime.steps import (
    COMPILED_OPS,
    LIBRARY_OPS,
    Heads,
    Ops,
    codebook0_step,
    depth_pair_step,
    depth_step,
    embed_step,
    layer_step,
)
from csm_runtime.weights import Packed, matrices

logger = logging.getLogger("csm_runtime")

BUCKETS = (1, 2, 4, 8, 16)
"""Batch sizes the steps are built for; a batch runs in the next larger one."""

_PAIRED_ROWS = 1
"""Largest compiled bucket whose first two depth positions run as one pass: two rows cost little more than one there."""

_SHORT_WINDOW = 512
"""Compiled backbone layers look at all cached positions, used or not: 0.5 ms of 5 at 2048 (2 cores, 2026-11-22). So there
are two of them, one for contexts up to this length."""

_FORCED_CODEBOOKS = 3
"""Codebooks whose logits the self-test compares with the stock model's."""
_LEAST_SQNR, _LEAST_SQNR_INT4 = 10.0, 4.0
"""In dB. On random weights bf16 has 36, int8 29, int4 9; a codebook taken for another has 0 or less."""

MODES = ("auto", "native", "compile", "graph", "kernels", "library", "eager")
_FUSED, _CAPTURED = ("graph", "kernels"), ("graph", "library")
"""Modes that run the fused kernels of a GPU, and modes that replay a CUDA graph."""


def bucket_for(rows: int) -> int | None:
    """The smallest bucket that holds a batch, None beyond the largest."""
    return next((size for size in BUCKETS if rows <= size), None)


def _eager_steps(banks: int) -> dict[str, Callable[..., Any]]:
    """The steps as they are, for eager execution; ``banks`` of depth heads."""
    depth = {f"depth bank {i}": depth_step for i in range(banks)}
    return {"embed": embed_step, "layer": layer_step, "codebook0": codebook0_step, **depth}


class _Window(NamedTuple):
    """The backbone's layer step for contexts up to a length, and the part of each layer's cache that it looks at."""

    size: int
    layer: Callable[..., Any]
    caches: list[tuple[Tensor, Tensor]]


class Trace(NamedTuple):
    """One frame as it was made: what a check needs to make it again. Rows as in the call, on the model's device."""

    hidden: Tensor
    """``[N, D]`` fp32, the backbone's normalised hidden state."""
    codes: Tensor
    """``[N, codebooks]`` int64, as delivered: rows that had ended before hold pads."""
    first_logits: Tensor
    """``[N, vocab]`` fp32, what codebook 0 was drawn from."""
    logits: Tensor
    """``[N, codebooks - 1, depth_vocab]`` fp32, what the others were drawn from."""


class _Runner:
    """The steps and the state of one batch bucket.

    Attributes:
        ready: whether it can run frames as it is: :meth:`Engine.make_ready` has been called since the weights were last moved.
        dropped: whether the engine has let go of it; whoever owns it has to get another one.
    """

    def __init__(self, steps: dict[str, Callable[..., Any]], ops: Ops, state: State, device: torch.device) -> None:
        self.embed = steps["embed"]
        sizes = {"short layer": _SHORT_WINDOW, "layer": state.capacity}
        self.windows = [
            _Window(size, steps[name], [(k[:, :, :size], v[:, :, :size]) for k, v in zip(state.keys, state.values)])
            for name, size in sizes.items()
            if name in steps
        ]
        self.codebook0 = steps["codebook0"]
        self.depth = [step for name, step in steps.items() if name.startswith("depth bank")]
        self.depth_pair = steps.get("depth pair")
        self.ops = ops
        self.state = state
        rows = state.rows

        def params() -> SamplingParams:
            return SamplingParams(
                torch.ones(rows, dtype=torch.float32, device=device),
                torch.ones(rows, dtype=torch.int64, device=device),
                torch.ones(rows, dtype=torch.float32, device=device),
                torch.zeros(rows, dtype=torch.bool, device=device),
            )

        self.params, self.depth_params = params(), params()
        self.key = NoiseKey(state.seed, state.utterance, state.frame)
        self.frame: fused.FusedFrame | native.NativeFrame | None = None
        self.graphs: tuple[graphs.FrameGraph, graphs.FrameGraph] | None = None
        self.released: torch.cuda.Event | None = None
        self.steps = steps
        self.ready = False
        self.dropped = False
        self._logits: list[Tensor] = []
        self._buffers: list[Tensor] | None = None
        self._plain: _Runner | None = None

    def keep(self, logits: list[Tensor], fixed: bool) -> None:
        """The logits of the frame just made, codebook by codebook; ``fixed`` where a CUDA graph is to write them."""
        if not fixed:
            self._logits = logits
            return
        if self._buffers is None:
            self._buffers = [torch.empty_like(value) for value in logits]
        for buffer, value in zip(self._buffers, logits):
            buffer.copy_(value)
        self._logits = self._buffers

    def logits(self) -> tuple[Tensor, Tensor]:
        """The latest frame's, ``[B, vocab]`` and ``[codebooks - 1, B, depth_vocab]`` fp32."""
        if self.frame is not None and not self._logits:
            return self.frame.logits()
        return self._logits[0], torch.stack(self._logits[1:])

    def plain(self, ops: Ops) -> _Runner:
        """The same state with the steps run eagerly on other ops."""
        if self._plain is None:
            steps = {**_eager_steps(len(self.depth)), "depth pair": depth_pair_step}
            self._plain = _Runner(steps, ops, self.state, self.state.hidden.device)
            self._plain.params, self._plain.depth_params, self._plain.key = self.params, self.depth_params, self.key
        return self._plain

    def forget(self) -> None:
        """Let go of weights that compiled steps have seen."""
        for step in (
            self.embed,
            self.codebook0,
            *self.depth,
            self.depth_pair,
            *(window.layer for window in self.windows),
        ):
            if isinstance(step, compiling.CompiledStep):
                step.forget()


class Engine:
    """Decodes frames of one model on one device.

    Args:
        spec: the model's shape.
        rotary: rotary tables of the backbone and the depth decoder, ``[positions, head_dim]`` fp32.
        dtype: the model's own.
        device: where the weights are.
        capacity: positions the backbone's KV buffer holds per row.
        mode: ``native`` (the CPU kernels, the default on a CPU that has them), ``compile`` (torch.compile, the default on
            other CPUs), ``graph`` (the fused kernels in one CUDA graph per frame, the default on CUDA), ``kernels`` (the
            same, launched one by one), ``library`` (a CUDA graph of PyTorch's own ops), ``eager``, or ``auto``.
        metrics: where timings go.
        kv_dtype: dtype of the KV buffers, the model's own where None.
        without: ``paired positions`` and ``context trimming`` where they are to be left out; neither is one of native
            frames.

    Attributes:
        lag: frames that may be launched ahead of what the host has read. A graph's launch returns at once, so the device
            would idle while the host looks at each frame; other modes are busy on the host anyway.
        unfused: why the fused or native kernels do not run although they were asked for, or None.
        plain: ``depth`` or ``backbone`` where the guard suspects the steps in use: eager ones run instead.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rotary: tuple[RotaryTables, RotaryTables],
        dtype: torch.dtype,
        device: torch.device,
        capacity: int,
        mode: str,
        metrics: Metrics,
        kv_dtype: torch.dtype | None = None,
        without: frozenset[str] = frozenset(),
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        self._asked = mode
        unable = native.why_not(spec, device)
        if mode == "native" and unable is not None:
            raise ValueError(f"mode 'native' runs the native CPU kernels, and {unable}; use 'auto'")
        if mode == "auto":
            on_cpu = "native" if unable is None else "compile"
            mode = {"cpu": on_cpu, "cuda": "graph"}.get(device.type, "eager")
        if mode in _CAPTURED and device.type != "cuda":
            raise ValueError(f"mode {mode!r} needs a CUDA device, the model is on {device}; use 'compile' or 'eager'")
        self.unfused = fused.why_not(spec, device) if mode in _FUSED else None
        if self._asked == "auto" and mode == "compile":
            self.unfused = unable
        if mode == "kernels" and self.unfused is not None:
            raise ValueError(f"mode 'kernels' runs the fused kernels, and {self.unfused}; use 'auto'")
        self.spec, self.dtype, self.device, self.capacity = spec, dtype, device, capacity
        self.kv_dtype = kv_dtype or dtype
        self.mode, self.without = mode, without
        self.lag = 2 if mode in _CAPTURED else 0
        self.metrics = metrics
        self.plain: frozenset[str] = frozenset()
        self.packed: Packed | None = None
        self.rotary, self.depth_rotary = rotary
        self._fused = fused.FusedModel(spec, rotary) if mode in _FUSED and self.unfused is None else None
        self._runners: dict[int, _Runner] = {}
        self._owned: list[_Runner] = []
        self._shape = _heads(spec.backbone)
        self._depth_shape = _heads(spec.depth)
        self._books = torch.tensor(list(range(spec.codebooks)), device=device)
        self._limits = torch.tensor([spec.vocab] + [spec.depth_vocab] * (spec.codebooks - 1), device=device)
        self._positions = range(spec.codebooks)
        self._numbers = [torch.tensor([p], device=device) for p in self._positions]

    def bind(self, packed: Packed) -> bool:
        """Use these weights from now on.

        A captured graph reads fixed addresses, so moved weights drop it; a compiled step has no guards, so weights of
        another shape or layout drop the steps: True then, and :meth:`warm_up` has to make new ones.
        """
        dropped = False
        if self.packed is not None:
            old, new = _leaves(self.packed), _leaves(packed)
            same_heads = self.packed.depth_heads.places == packed.depth_heads.places
            if not same_heads or [_layout(t) for t in old] != [_layout(t) for t in new]:
                self._drop_runners()
                dropped = True
            elif [t.data_ptr() for t in old] != [t.data_ptr() for t in new]:
                for runner in self._all():
                    runner.graphs = runner.frame = None
                    runner.ready = False
                    runner.forget()
        self.packed = packed
        self._wait_for_dropped_frames()
        if self.mode == "native":
            dropped = self._without_native(native.why_not_these(packed)) or dropped
        reason = fused.why_not_these(packed) if self._fused is not None else None
        if reason is not None and self.mode == "kernels":
            raise ValueError(f"mode 'kernels' runs the fused kernels, and {reason}; use 'auto'")
        if reason is not None:
            self._fused, self.unfused = None, reason
        if self._fused is not None and self._repacked(self._fused, packed):
            for runner in self._all():
                runner.graphs = runner.frame = None
                runner.ready = False
        return dropped

    def _without_native(self, reason: str | None) -> bool:
        """Compile instead where the native kernels cannot read the weights; True where steps have to be made."""
        if reason is None:
            return False
        if self._asked == "native":
            raise ValueError(f"mode 'native' runs the native CPU kernels, and {reason}; use 'auto'")
        self.mode, self.unfused = "compile", reason
        self._drop_runners()
        return True

    def _repacked(self, model: fused.FusedModel, packed: Packed) -> bool:
        """Follow the weights; True where what was captured is no longer valid. Without room for copies, no kernels."""
        try:
            return model.refresh(packed)
        except (RuntimeError, ValueError) as error:  # out of memory above all
            if self.mode != "graph":
                raise
            self._fused, self.unfused = None, f"packing the weights failed, {type(error).__name__}: {error}"
            return True

    def fused_bytes(self) -> int:
        """Bytes of the copies that the fused kernels read."""
        return 0 if self._fused is None else self._fused.bytes()

    def runner(self, rows: int) -> _Runner:
        """Steps and buffers for a batch of ``rows``, made at the first use of its bucket."""
        size = bucket_for(rows)
        if size is None:
            raise ValueError(f"batch of {rows} rows is larger than the largest bucket, {BUCKETS[-1]}")
        if size not in self._runners:
            like = next((runner for runner in self._owned if runner.state.rows == size), None)
            steps = self._steps(size) if like is None else like.steps
            ops = COMPILED_OPS if self.mode == "compile" else self._library_ops()
            state = State(self.spec, size, self.capacity, self.kv_dtype, self.device)
            self._runners[size] = _Runner(steps, ops, state, self.device)
        return self._runners[size]

    def _steps(self, size: int) -> dict[str, Callable[..., Any]]:
        """The steps of a bucket, compiled where they are to be; nothing of them belongs to one state."""
        steps = _eager_steps(len(self._bound().depth_heads.banks))
        if "paired positions" not in self.without and (self.mode != "compile" or size <= _PAIRED_ROWS):
            steps["depth pair"] = depth_pair_step
        trims = self.mode == "compile" and "context trimming" not in self.without
        if trims and self.capacity >= 2 * _SHORT_WINDOW:
            steps["short layer"] = layer_step
        if self.mode == "compile":
            steps = {name: compiling.compile_step(fn) for name, fn in steps.items()}
        return steps

    def own_runner(self, rows: int) -> _Runner:
        """The runner of a bucket for one owner, whose state nobody else writes, until :meth:`disown`.

        It is the one that was warmed up: a call that wants a runner of this bucket makes its own state, with the same steps.
        """
        runner = self.runner(rows)
        del self._runners[runner.state.rows]
        self._owned.append(runner)
        return runner

    def disown(self, runner: _Runner) -> None:
        """Its owner wants it no more: the bucket has it back where it has made no other one."""
        self.release(runner)
        if runner in self._owned:
            self._owned.remove(runner)
            self._runners.setdefault(runner.state.rows, runner)

    def drop(self, rows: int) -> None:
        """Let go of a bucket's steps and buffers, unless somebody owns them."""
        self._runners.pop(bucket_for(rows) or 0, None)

    def holds(self, rows: int) -> bool:
        """Whether there are buffers for a batch of ``rows`` that nobody owns."""
        return bucket_for(rows) in self._runners

    def _all(self) -> list[_Runner]:
        return [*self._runners.values(), *self._owned]

    def _drop_runners(self) -> None:
        for runner in self._owned:
            runner.dropped = True
        self._runners.clear()
        self._owned.clear()

    def _library_ops(self) -> Ops:
        """PyTorch's own ops, which round activations to the dtype of weights and cache where it is the model's own.

        A policy lowers what is stored: casts are widened again, as quantised weights are.
        """
        ops = LIBRARY_OPS
        if any(t.dtype in (torch.bfloat16, torch.float16) and t.dtype != self.dtype for t in matrices(self._bound())):
            ops = ops._replace(gemv=gemv_widened)
        return ops if self.kv_dtype == self.dtype else ops._replace(attention=attention_step_ref)

    def kv_bytes(self) -> int:
        """Bytes of all KV buffers made so far."""
        return sum(runner.state.bytes() for runner in self._all())

    def emit(self, runner: _Runner) -> None:
        """All codebooks of one frame, from ``state.hidden`` into ``state.codes``, and whether speech has ended."""
        keep = runner.keep
        if "depth" in self.plain:
            runner = runner.plain(self._library_ops())
        elif runner.frame is not None:
            keep([], fixed=False)
            runner.frame.emit()
            return
        packed, state = self._bound(), runner.state
        args = (state.hidden, packed.backbone_head, runner.params, runner.key, state.faults)
        token, logits = runner.codebook0(*args, runner.ops)
        tokens, made, rest = [token], [logits], self._positions[2:]
        if runner.depth_pair is None:
            rest = self._positions[1:]
            self.depth_position(runner, self._positions[0], token)
        else:
            token, logits = self.depth_pair(runner, token)
            tokens.append(token)
            made.append(logits)
        for position in rest:
            token, logits = self.depth_position(runner, position, token)
            tokens.append(token)
            made.append(logits)
        keep(made, fixed=self.mode in _CAPTURED)
        codes = torch.stack(tokens, dim=1)
        stray = ((codes < 0) | (codes >= self._limits)).any()
        state.faults.bitwise_or_(stray.to(torch.int32) * int(Fault.OUT_OF_RANGE))
        state.codes.copy_(torch.where((state.pads & state.ended)[:, None], state.pad_code, codes))
        other = (state.codes != state.end_code) & (self._books < state.judged)
        state.ended.logical_or_(~other.any(dim=1))

    def depth_position(self, runner: _Runner, position: int, token: Tensor) -> tuple[Tensor, Tensor]:
        """One position of the depth decoder: token in, next token and its logits out."""
        bank, row = self._bound().depth_heads.places[max(position, 1) - 1]
        step, numbers = runner.depth[bank], self._numbers
        return step(numbers[position], numbers[row], token, *self._depth_arguments(runner, bank))

    def _one_of_each_bank(self) -> list[int]:
        """The first position that reads each bank of heads."""
        heads = self._bound().depth_heads
        banks = [bank for bank, _ in heads.places]
        return [1 + banks.index(bank) for bank in range(len(heads.banks))]

    def depth_pair(self, runner: _Runner, token: Tensor) -> tuple[Tensor, Tensor]:
        """Positions 0 and 1 in one pass, where the runner has it: codebook 0 in, codebook 1 and its logits out."""
        assert runner.depth_pair is not None
        bank, row = self._bound().depth_heads.places[0]
        return runner.depth_pair(self._numbers[row], token, *self._depth_arguments(runner, bank))

    def _depth_arguments(self, runner: _Runner, bank: int) -> tuple[Any, ...]:
        """What every step of the depth decoder takes besides position, row and token."""
        packed, state = self._bound(), runner.state
        return (
            state.hidden,
            packed.depth_embedding,
            packed.depth_projection,
            packed.depth,
            packed.depth_heads.banks[bank],
            state.depth_keys,
            state.depth_values,
            self.depth_rotary.cos,
            self.depth_rotary.sin,
            runner.depth_params,
            runner.key,
            state.faults,
            self._depth_shape,
            runner.ops,
        )

    def advance(self, runner: _Runner) -> None:
        """Feed ``state.codes`` to the backbone: the next ``state.hidden``, one position further."""
        packed, state = self._bound(), runner.state
        if "backbone" in self.plain:
            runner = runner.plain(self._library_ops())
        elif runner.frame is not None:
            runner.frame.advance()
            state.filled += 1
            return
        x, cos, sin, bias = runner.embed(
            state.codes,
            packed.backbone_embedding,
            self.spec.vocab,
            state.allowed,
            state.length,
            state.position,
            self.rotary.cos,
            self.rotary.sin,
        )
        window = next((window for window in runner.windows if window.size > state.filled), runner.windows[-1])
        bias = bias[:, : window.size]
        for layer, (keys, values) in zip(packed.backbone.layers, window.caches):
            x = window.layer(x, layer, keys, values, state.length, cos, sin, bias, self._shape, runner.ops)
        state.hidden.copy_(rms_norm_ref(x, packed.backbone.norm, self._shape.eps))
        state.filled += 1
        state.length.add_(1)
        state.position.add_(1)
        state.frame.add_(1)

    def next_frame(self, runner: _Runner, first: bool, between: Callable[[], None] | None = None) -> Tensor:
        """Run one frame and return its codes, ``[B, codebooks]``, a buffer the next call overwrites.

        Args:
            runner: of the batch.
            first: whether ``state.hidden`` is that of prompts already, so that nothing is to be fed first.
            between: called once all rows are one position further, before their codes are drawn: it may load prompts into
                rows. Where frames are CUDA graphs, the first half is launched op by op then, and only the second half
                replayed (not yet run on a GPU).
        """
        captured = runner.graphs if not self.plain else None
        if captured is not None and between is None:
            captured[0 if first else 1].replay()
            return runner.state.codes
        start = time.perf_counter()
        if not first:
            self.advance(runner)
        if between is not None:
            between()
        middle = time.perf_counter()
        if captured is not None:
            captured[0].replay()
            return runner.state.codes
        self.emit(runner)
        end = time.perf_counter()
        if not first:
            self.metrics.observe("backbone", middle - start)
            self.metrics.observe("frame", end - start)
        self.metrics.observe("depth", end - middle)
        return runner.state.codes

    def trace(self, runner: _Runner, rows: int) -> Trace:
        """The frame just made, for the first ``rows`` rows; copies, which later frames leave alone. Nothing waits."""
        first, others = runner.logits()
        state = runner.state
        return Trace(
            state.hidden[:rows].clone(),
            state.codes[:rows].clone(),
            _copied(first[:rows]),
            _copied(others[:, :rows].transpose(0, 1)),
        )

    def prepare(self, rows: int) -> _Runner:
        """The runner of a batch, its CUDA graphs captured. Overwrites the runner's state: load the prompt afterwards."""
        runner = self.runner(rows)
        self.make_ready(runner)
        return runner

    def make_ready(self, runner: _Runner) -> None:
        """What :meth:`prepare` does, for a runner that somebody owns."""
        self._wait_for_dropped_frames()
        if self.mode == "native" and runner.frame is None:
            made = (self._bound(), runner.state, (runner.params, runner.depth_params), runner.key)
            runner.frame = native.NativeFrame(self.spec, (self.rotary, self.depth_rotary), *made)
        if self._fused is not None and runner.frame is None:
            params = (runner.params, runner.depth_params)
            runner.frame = fused.FusedFrame(
                self.spec, self._fused.weights, self._bound(), runner.state, params, runner.key
            )
        if runner.frame is not None:
            runner.frame.forget_faults()
        if self.mode in _CAPTURED and runner.graphs is None and not self.plain:
            runner.state.rewind()

            def later() -> None:
                self.advance(runner)
                self.emit(runner)

            pool = graphs.Pool(self.device)
            runner.graphs = (graphs.FrameGraph(lambda: self.emit(runner), pool), graphs.FrameGraph(later, pool))
            for failure in dict.fromkeys(graph.failure for graph in runner.graphs if graph.failure is not None):
                if self.metrics.fault(f"CUDA graph capture failed: {failure}"):
                    logger.warning("CUDA graph capture failed, running the frame as launches: %s", failure)
        runner.ready = True

    def free(self) -> None:
        """Let go of all buffers and graphs, after a lack of memory; the next :meth:`prepare` makes new ones."""
        self._wait_for_dropped_frames()
        self._drop_runners()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def release(self, runner: _Runner) -> None:
        """Let the next :meth:`prepare` have the runner, on whatever stream: it waits there for what is still running."""
        if self.device.type == "cuda":
            runner.released = torch.cuda.current_stream(self.device).record_event(runner.released)

    def _wait_for_dropped_frames(self) -> None:
        """Before their buffers or weights are written: the current stream waits for what a call has left running."""
        for runner in self._all():
            if runner.released is not None:
                torch.cuda.current_stream(self.device).wait_event(runner.released)

    def parts(self, rows: int) -> int:
        """How many parts :meth:`warm_up` reports for a batch of ``rows``."""
        if self.mode in _CAPTURED or self.mode == "native" or self._fused is not None:
            return 1
        runner = self.runner(rows)
        return 1 + len(runner.depth) + len(runner.windows) + (runner.depth_pair is not None)

    def warm_up(self, rows: int, advance: Callable[[str], None] | None = None) -> None:
        """Compile or capture every step for a batch of ``rows``, with made-up contents.

        Args:
            rows: batch size.
            advance: called with the name of each part as it is done, for a progress bar.
        """
        done = advance or (lambda _: None)
        runner = self.prepare(rows)
        state = runner.state
        if runner.graphs is None and runner.frame is not None:
            state.rewind()
            self.advance(runner)
            self.emit(runner)
        if runner.graphs is not None or runner.frame is not None:
            done("frame")
            return
        runner.codebook0(state.hidden, self._bound().backbone_head, runner.params, runner.key, state.faults, runner.ops)
        done("codebook 0")
        for position in self._one_of_each_bank():
            self.depth_position(runner, position, torch.zeros_like(state.seed))
            done("depth step")
        if runner.depth_pair is not None:
            self.depth_pair(runner, torch.zeros_like(state.seed))
            done("depth pair")
        for window in runner.windows:
            state.rewind(window.size - 1)
            self.advance(runner)
            done("backbone" if window.size == self.capacity else "backbone, short context")

    def self_test(self, rows: int, stock_logits: Callable[[Tensor, Tensor], Tensor]) -> str | None:
        """Compare the steps in use with eager references and with the stock model on random input.

        Runs one backbone layer and a few depth positions: it finds a compiler that makes wrong code, and weights that
        were read in another order than the stock model's.

        Args:
            rows: batch size.
            stock_logits: the stock model's teacher-forced depth logits, ``[N, n, V]``, from hidden states ``[N, D]`` and
                codes ``[N, n]``.

        Returns:
            What is wrong, or None.
        """
        packed, runner = self._bound(), self.runner(rows)
        if runner.frame is not None:
            return self._test_fused(runner, stock_logits)
        state, generator = runner.state, torch.Generator().manual_seed(0)
        state.hidden.copy_(torch.randn(state.hidden.shape, generator=generator, dtype=torch.float32))
        token = torch.zeros_like(state.seed)
        tried = self._one_of_each_bank()
        ours = [self.depth_position(runner, position, token)[1] for position in (0, *tried)]
        eager = _Runner(
            _eager_steps(len(runner.depth)),
            self._library_ops() if self.dtype == torch.float32 else COMPILED_OPS,
            state,
            self.device,
        )
        theirs = [self.depth_position(eager, position, token)[1] for position in (0, *tried)]
        checks = [("depth step", a, b) for a, b in list(zip(ours, theirs))[1:]]
        if runner.depth_pair is not None:
            written = state.depth_values[-1][:, :, :2].float()
            self.depth_pair(runner, token)
            checks.append(("depth pair", state.depth_values[-1][:, :, :2].float(), written))
        x = torch.randn(state.hidden.shape, generator=generator, dtype=torch.float32).to(self.device)
        slot = torch.zeros_like(state.seed)
        layer, cos, sin = packed.backbone.layers[0], self.rotary.cos[slot], self.rotary.sin[slot]
        whole = torch.full((state.rows, self.capacity), float("-inf"), dtype=torch.float32, device=self.device)
        whole[:, 0] = 0.0
        for window in runner.windows:
            bias = whole[:, : window.size]  # strides are what compiled steps take for granted
            args = (x, layer, *window.caches[0], slot, cos, sin, bias, self._shape)
            checks.append(("backbone layer", window.layer(*args, runner.ops), layer_step(*args, eager.ops)))
        # The values in the cache were rounded to its dtype: a rounding the other way is no fault.
        rounding = 4 * max(torch.finfo(self.dtype).eps, torch.finfo(self.kv_dtype).eps)
        tolerance = 1e-3 if self.mode == "compile" or self.dtype == torch.float32 else 5e-2
        for name, a, b in checks:
            if not torch.isfinite(a).all():
                return f"{name} returns NaN or infinity"
            error = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-12)
            if error > (max(tolerance, rounding) if name == "depth pair" else tolerance):
                return f"{name} differs from its reference by {error:.1e} of its largest value"
        return self._against_stock(runner, stock_logits)

    def _test_fused(self, runner: _Runner, stock_logits: Callable[[Tensor, Tensor], Tensor]) -> str | None:
        """A frame of the fused or native kernels: depth logits against the stock model's, the backbone against library ops."""
        state, frame, generator = runner.state, runner.frame, torch.Generator().manual_seed(0)
        assert frame is not None
        state.hidden.copy_(torch.randn(state.hidden.shape, generator=generator, dtype=torch.float32).to(self.dtype))
        hidden = state.hidden.clone()
        for params in (runner.params, runner.depth_params):
            params.do_sample.fill_(False)
        frame.emit()
        frame.decode_depth_again()
        codes, made = state.codes.clone(), frame.logits()[1][:_FORCED_CODEBOOKS]
        if state.faults.item():
            return str(Fault(int(state.faults)))
        wanted = stock_logits(hidden, codes[:, : len(made)])
        fault = self._too_far("depth logits", made.transpose(0, 1), wanted)
        results = []
        for other in (frame, None):
            state.rewind()
            state.allowed.zero_()
            state.codes.copy_(codes)
            runner.frame = other
            self.advance(runner)
            results.append(state.hidden.clone())
        runner.frame = frame
        state.rewind()
        return fault or self._too_far("the backbone's hidden state", *results)

    def _against_stock(self, runner: _Runner, stock_logits: Callable[[Tensor, Tensor], Tensor]) -> str | None:
        state, positions = runner.state, self._positions[: 1 + _FORCED_CODEBOOKS]
        state.hidden.copy_(state.hidden.to(self.dtype))  # as the stock depth decoder takes it
        shape = (len(positions) - 1, state.rows)
        codes = torch.randint(self.spec.depth_vocab, shape, generator=torch.Generator().manual_seed(1))
        tokens = codes.to(self.device).unbind()  # contiguous, as compiled steps take it for granted
        made = [self.depth_position(runner, *step)[1] for step in zip(positions, (tokens[0], *tokens))]
        ours, theirs = torch.stack(made[1:], dim=1), stock_logits(state.hidden, torch.stack(tokens, dim=1))
        return self._too_far("depth logits", ours, theirs)

    def _too_far(self, what: str, ours: Tensor, theirs: Tensor) -> str | None:
        least = _LEAST_SQNR_INT4 if any(t.dtype == torch.uint8 for t in _leaves(self._bound())) else _LEAST_SQNR
        noise, signal = (float(t.double().square().sum()) for t in (ours - theirs, theirs))
        if not noise * 10 ** (least / 10) <= signal:
            return f"{what} differ from the stock model's: signal {signal:.1e}, error {noise:.1e}"
        return None

    def _bound(self) -> Packed:
        assert self.packed is not None, "bind() comes before decoding"
        return self.packed


def _heads(stack: StackSpec) -> Heads:
    return Heads(stack.heads, stack.kv_heads, stack.head_dim, stack.eps)


def _leaves(packed: Packed) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(packed) if isinstance(leaf, Tensor)]


def _copied(tensor: Tensor) -> Tensor:
    """A contiguous copy that wakes no thread on a CPU.

    Copies of this size are made by several there, which then spin for some milliseconds, beside the next frame's own: CSM-1B
    at int4 took 55 ms per frame instead of 45 (2 cores, 2026-11-29).
    """
    if tensor.device.type == "cpu":
        return torch.from_numpy(tensor.numpy().copy(order="C"))
    return tensor.clone(memory_format=torch.contiguous_format)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
