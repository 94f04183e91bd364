"""What stands in for ``Model.generate_frame`` of Sesame's stack: one frame per call, by the engine.

The caller owns the loop, so an utterance is what happens between two calls of ``reset_caches()``. All that has been fed is
remembered: another rung of the guard, another runner or the stock model goes on from it, and no frame is lost.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor

from csm_runtime import ladder
from csm_runtime.adapters import sesame_call
from csm_runtime.adapters.hf_passes import Prefilled
from csm_runtime.checks import Sample
from csm_runtime.decode_loop import FrameFault, breach_of, evidence_of, looked
from csm_runtime.engine import bucket_for
from csm_runtime.generate import Seeds, plain_mode
from csm_runtime.guard import FAST, STOCK, Breach, Interrupted, Watch
from csm_runtime.kv import Fault
from csm_runtime.ladder import Seat

logger = logging.getLogger("csm_runtime")


class FrameByFrame:
    """``generate_frame``, ``reset_caches`` and ``setup_caches`` of one accelerated model.

    Args:
        model: of Sesame's structure.
        handle: its acceleration.
    """

    def __init__(self, model: Any, handle: Any) -> None:
        self._model, self._handle = model, handle
        self._kind = type(model)
        self._seat: Seat | None = None
        self._runner: Any = None
        self._forget()

    def _forget(self) -> None:
        """Begin another utterance."""
        self._fed: list[tuple[Tensor, Tensor, Tensor]] = []
        self._frames: list[Tensor] = []
        self._length = 0
        self._seeds: Seeds | None = None
        self._drawing: Any = None
        self._loaded = self._on_stock = self._made_room = self._lent = False
        self._under: tuple[str, int] | None = None
        self._watch: Watch | None = None

    # -------------------------------------------------------------------------------------------- the model's methods

    def generate_frame(
        self, tokens: Tensor, tokens_mask: Tensor, input_pos: Tensor, temperature: float, topk: int
    ) -> Tensor:
        """As the model's own: ``[B, codebooks]`` int32, drawn behind what has been fed since ``reset_caches()``.

        Args:
            tokens: ``[B, S, codebooks + 1]``.
            tokens_mask: likewise, bool.
            input_pos: ``[B, S]``.
            temperature: of every codebook's softmax.
            topk: the most likely codes that are drawn from.
        """
        handle, start = self._handle, time.perf_counter()
        with handle._lock:
            if not self._on_stock:
                # The forks call under autocast to the model's own dtype.
                with plain_mode(), torch.autocast(tokens.device.type, enabled=False):
                    reason = self._reason_for_stock(tokens, tokens_mask, input_pos, temperature, topk)
                    made = None
                    if reason is None:
                        reason = "a fault of the fast path"
                        made = self._frame(tokens, tokens_mask, input_pos, float(temperature), topk)
                if made is not None:
                    self._remember(tokens, tokens_mask, input_pos)
                    handle._spoken(len(made), time.perf_counter() - start)
                    return made
                handle._went_stock(reason)
                self._hand_over()
            if self._lent:
                self._hand_over()
            self._remember(tokens, tokens_mask, input_pos)
            made = self._kind.generate_frame(self._model, tokens, tokens_mask, input_pos, temperature, topk)
            if handle.guard.rung == STOCK:
                handle.guard.healthy(len(made))
            return made

    def reset_caches(self) -> None:
        """As the model's own; the next frame begins another utterance."""
        with self._handle._lock:
            self._kind.reset_caches(self._model)
            self._forget()

    def setup_caches(self, *args: Any, **kwargs: Any) -> Any:
        """Likewise."""
        with self._handle._lock:
            made = self._kind.setup_caches(self._model, *args, **kwargs)
            self._forget()
            return made

    def lend(self) -> None:
        """Somebody else is about to use the stock model's caches."""
        self._lent = True

    def close(self) -> None:
        """Let go of the engine's buffers."""
        self._forget()
        self._disown()

    # ---------------------------------------------------------------------------------------------------- the stock path

    def _reason_for_stock(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, temperature: float, topk: int
    ) -> str | None:
        """What the fast path cannot do of a call; the weights are looked at once per utterance."""
        handle, model = self._handle, self._model
        books = handle._spec.codebooks
        caches_on = model.backbone.caches_are_enabled()
        shaped = tokens.ndim == 3 and tokens.shape[2] == books + 1 and tokens.shape[1] > 0 and len(tokens) > 0
        if not (caches_on and shaped and mask.shape == tokens.shape and positions.shape == tokens.shape[:2]):
            return "arguments that the model's own generate_frame has a word on"
        if not (type(topk) is int and 1 <= topk <= handle._spec.vocab and temperature > 0):
            return f"topk={topk!r} and temperature={temperature!r}"
        if tokens.shape[0] > sesame_call.cached_rows(model) or tokens.device != model.audio_head.device:
            return "arguments that the model's own generate_frame has a word on"
        if self._fed and len(self._fed[0][0]) != len(tokens):
            return "a batch whose size changes within an utterance"
        if bucket_for(len(tokens)) is None:
            return f"a batch of {len(tokens)} rows"
        if self._length + tokens.shape[1] > handle.capacity:
            return f"more than {handle.capacity} positions"
        if not self._fed:
            if self._in_order(positions, 0) is False:
                return "positions that do not count from 0"
            return handle._reason_for_stock({})
        return None if self._in_order(positions, self._length) else "positions that do not follow one another"

    @staticmethod
    def _in_order(positions: Tensor, first: int) -> bool:
        wanted = torch.arange(first, first + positions.shape[1], device=positions.device)
        return bool((positions == wanted).all())

    def _hand_over(self) -> None:
        """Fill the stock model's caches with what has been fed; it speaks the rest of the utterance."""
        lent, self._on_stock, self._lent = self._lent, True, False
        self._unload()
        if not self._fed:
            if lent:
                self._kind.reset_caches(self._model)
            return
        tokens, mask, positions = (torch.cat(part, dim=1) for part in zip(*self._fed))
        with torch.no_grad():
            sesame_call.refill(self._model, self._kind, tokens, mask, positions)

    def _remember(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> None:
        self._fed.append((tokens.clone(), mask.clone(), positions.clone()))
        self._length += tokens.shape[1]

    # ----------------------------------------------------------------------------------------------------- the fast path

    def _frame(self, tokens: Tensor, mask: Tensor, positions: Tensor, temperature: float, topk: int) -> Tensor | None:
        """The frame behind these tokens, on whatever rung makes it; None where only the stock path is left."""
        handle = self._handle
        if not self._fed:
            handle.metrics.count("generate.fast" if handle.guard.rung == FAST else "generate.rung")
            handle.memory.between_calls()
        while handle.guard.rung != STOCK:
            rung, breach, evidence = handle.guard.rung, None, {}
            try:
                with handle.memory.frame():
                    made, breach = self._attempt(tokens, mask, positions, temperature, topk)
                if breach is None:
                    handle.memory.between_frames()
                    handle.metrics.count("frames", len(made))
                    handle.guard.healthy(len(made))
                    return made.to(torch.int32)
                evidence = evidence_of(self._watch, breach, self._frames)
                self._frames.pop()
            except Interrupted:
                raise
            except Exception as error:
                breach = breach_of(error, len(self._frames), self._watch)
                evidence = evidence_of(self._watch, breach, self._frames)
                what = f"{type(error).__name__}: {error}"
                if handle.metrics.fault(what):
                    logger.warning("a frame failed, a safer path goes on: %s", what, exc_info=error)
            self._unload()
            if handle.guard.rung != rung:  # its calibration has gone down already
                continue
            if breach.kind == "memory":
                self._disown()
            if breach.kind == "memory" and not self._made_room:
                self._made_room = True
                handle.memory.make_room(breach.reason)
            else:
                handle._lose_trust(breach, len(self._frames), len(tokens), evidence)
        return None

    def _attempt(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, temperature: float, topk: int
    ) -> tuple[Tensor, Breach | None]:
        handle, rows = self._handle, len(tokens)
        seat, runner = self._seated(rows)
        engine, state = seat.engine, runner.state
        spoken = tokens.shape[1] == 1 and bool(mask[..., :-1].all() & ~mask[..., -1].any())  # one wait for the device
        start = time.perf_counter()
        first = not (self._loaded and spoken)
        if first or self._drawing != (temperature, topk):
            fed = self._all(tokens, mask, positions, first)
            request = sesame_call.request_of(self._model, *fed, temperature, topk, 1)
            if first:
                self._load(seat, runner, request, rows)
                handle.metrics.observe("prefill", time.perf_counter() - start)
            assert self._seeds is not None
            handle._set_drawing(runner, slice(None), slice(rows), request, self._seeds)
            self._drawing = temperature, topk
        if not first:
            state.codes[:rows].copy_(tokens[:, 0, :-1])
        codes = engine.next_frame(runner, first=first)[:rows].clone()
        if not self._frames:
            handle.metrics.observe("first_frame", time.perf_counter() - start)
        trace = None if self._watch is None else engine.trace(runner, rows)
        alive = torch.ones(rows, dtype=torch.bool, device=codes.device)
        sample = None
        if trace is not None:
            parts = (trace.hidden, trace.codes, trace.first_logits, trace.logits)
            sample = Sample(len(self._frames), *parts, alive)
        if int(state.faults):
            if self._watch is not None and sample is not None:
                self._watch.kept.append(sample)
            raise FrameFault(Fault(int(state.faults)))
        self._frames.append(codes)
        breach = None
        if self._watch is not None:
            breach, self._watch = looked(self._watch, sample, self._frames, handle.metrics)
        return codes, breach

    def _all(self, tokens: Tensor, mask: Tensor, positions: Tensor, first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What the backbone has to see for this frame: these tokens, and all before them where nothing is loaded."""
        if not first or self._loaded or not self._fed:
            return tokens, mask, positions
        parts = zip(*self._fed, (tokens, mask, positions))
        tokens, mask, positions = (torch.cat(part, dim=1) for part in parts)
        return tokens, mask, positions

    def _load(self, seat: Seat, runner: Any, request: Any, rows: int) -> None:
        """Run tokens through the backbone, behind what it has seen, and have the runner stand behind them."""
        handle, state = self._handle, runner.state
        none = request.input_ids.new_zeros(rows, 0, handle._spec.codebooks)
        if self._loaded:
            length = self._length
            past = Prefilled(
                [(k[:rows, :, :length].to(seat.engine.dtype), v[:rows, :, :length].to(seat.engine.dtype))
                 for k, v in zip(state.keys, state.values)],
                state.hidden[:rows],
            )  # fmt: skip
            filled = seat.passes.prefill(request.prompt["embeds"], None, request.positions, past)
        else:
            known = handle.guard.rung == FAST and not self._fed
            filled = handle._prompts.prefill(seat.passes, request, none, known).filled
        total = filled.layers[0][0].shape[2]
        state.load_prompt(filled.layers, filled.hidden, None, request.positions[:, -1], len(self._frames))
        state.set_end(-1, handle._spec.codebooks, None)  # the caller says when speech ends
        state.seed.zero_()
        state.utterance.zero_()
        if self._seeds is None:
            self._seeds = Seeds(None, None)
            self._seeds.fit(rows, True)
        whole = request if total == request.input_ids.shape[1] else sesame_call.lengthened(request, total)
        self._watch = handle._watch(seat, runner, whole, len(self._frames))
        self._loaded = True

    def _seated(self, rows: int) -> tuple[Seat, Any]:
        """What this batch is made with, and a runner of its own; neither another rung nor other weights find it loaded."""
        handle, size = self._handle, bucket_for(rows)
        runner, seat = self._runner, self._seat
        under = handle.guard.rung, handle._revision
        valid = runner is not None and runner.ready and not runner.dropped and runner.state.rows == size
        if seat is not None and valid and self._under == under:
            seat.engine.plain = ladder.plain_parts(handle.guard.rung)  # a replay of an incident sets it to its own
            return seat, runner
        self._unload()
        seat = handle._seat_in_force(size)
        if not valid or self._seat is None or seat.engine is not self._seat.engine:
            self._disown()
            runner = seat.engine.own_runner(size)
        self._seat, self._runner = seat, runner
        seat.engine.make_ready(runner)
        self._under = handle.guard.rung, handle._revision
        return seat, runner

    def _unload(self) -> None:
        """Before the next frame everything that has been fed goes through the backbone again."""
        self._loaded, self._under, self._watch = False, None, None

    def _disown(self) -> None:
        if self._seat is not None and self._runner is not None:
            self._seat.engine.disown(self._runner)
        self._seat = self._runner = None
