"""Two sides of a comparison, fed the same frames: the stock model, and an accelerated one by its own decode steps."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from csm_runtime import calibration as measuring
from csm_runtime.accelerate import Acceleration, accelerate
from csm_runtime.calibration import Calibration, Fidelity, Passage, Reference
from csm_runtime.compiling import Progress
from csm_runtime.demo import FrameClock
from csm_runtime.generate import plain_mode
from csm_runtime.speech import FRAME_RATE

FRAME, PROMPT, SOUND = "frame", "prompt", "sound"
"""What is timed: a frame; a prompt's prefill; a second of sound decoded."""

BATCH_FRAMES = 40
"""That the codec decodes together: up to 8 rows of 10 frames are quicker so than in turn, 4 rows of 25 or more are slower
(2 cores, 2026-11-23)."""


class Case:
    """What every side is measured on.

    Attributes:
        rows: prompts of one row each, with their codes.
        passages: the same, ready to be fed.
        timed: numbers of the passages whose frames are timed: of those with a frame after the first.
        reference: the stock weights' word on all of them.

    Raises:
        ValueError: prompts or codes that do not fit the model, or no frame to be timed.
    """

    def __init__(self, model: Any, calibration: Calibration, progress: bool) -> None:
        self.model, self.calibration = model, calibration
        self.rows = measuring.rows_of(calibration.prompts or measuring.made_up_prompts(model))
        silent = [row for row in self.rows if "codes" not in row]
        title = "speech of the stock model"
        with closing(Progress(len(silent) * calibration.frames, title, progress and bool(silent))) as bar:
            for row in silent:
                row["codes"] = measuring.speak(model, row, calibration.frames, calibration.seed, measuring.Ticker(bar))
        self.passages = [measuring.passage_of(model, row) for row in self.rows]
        self.timed = [i for i, passage in enumerate(self.passages) if len(passage.codes) > 1]
        if not self.timed:
            raise ValueError(
                "calibration: the stock model's answer to every prompt is one frame, and only frames after the first are "
                "timed; give prompts that it says more to, or their codes"
            )
        self.reference = Reference(model, self.passages)

    def compared(self, made: tuple[Tensor, Tensor], codes: Tensor | None = None) -> Fidelity:
        """Logits against the stock weights' in fp32, after the frames' own codes or, in the depth decoder, others."""
        reference = self.reference
        truth = reference.first, reference.rest
        if codes is not None:
            truth = reference.logits(reference.stock, reference.hidden, reference.dtype, codes)
        return measuring.compare(truth, made, self.calibration.thresholds.tie)

    def sequences(self) -> Tensor:
        """All passages' codes as one batch ``[N, F, codebooks]``, short enough for one call of the codec.

        Codes are limited to those that the codec can decode.
        """
        shortest = min(len(passage.codes) for passage in self.passages)
        length = max(1, min(shortest, BATCH_FRAMES // len(self.passages)))
        size = self.model.codec_model.config.codebook_size
        return torch.stack([passage.codes[:length].clamp(max=size - 1) for passage in self.passages])


class Stock:
    """The stock model as a side."""

    def __init__(self, case: Case) -> None:
        self._case = case
        words = [measuring.stock_logits(case.model, passage) for passage in case.passages]
        self.fidelity = case.compared((torch.cat([w[0] for w in words]), torch.cat([w[1] for w in words])))

    def times(self, timed: str, number: int) -> list[float]:
        """Seconds of each frame after the first that follows a prompt, as ``generate()`` delivers them; maybe of none."""
        assert timed == FRAME, timed
        case, clock = self._case, FrameClock()
        prompt = {name: value for name, value in case.rows[number].items() if name != "codes"}
        measuring.speak(case.model, prompt, case.calibration.frames, case.calibration.seed, clock)
        return [b - a for a, b in zip(clock.seconds, clock.seconds[1:])]


class Accelerated:
    """An accelerated model as a side; the model itself is left as it was.

    Attributes:
        handle: of the acceleration.
        fidelity: of its decode steps, fed with the frames.
    """

    def __init__(self, case: Case, options: dict[str, Any], sound: bool, progress: bool) -> None:
        self._case = case
        model = accelerate(case.model, **options, batch_sizes=(1,), guard=False, progress=progress)
        self.handle: Acceleration = model.acceleration
        self.handle.restore()
        if sound:
            self.sound()
        self.seconds: list[float] = []
        made = [self._forced(passage) for passage in case.passages]
        first, rest, codes = (torch.cat([one[i] for one in made]) for i in range(3))
        self.fidelity = case.compared((first, rest), codes)

    def times(self, timed: str, number: int) -> list[float]:
        """Seconds of each frame of a passage, of its prompt, or of each second of all passages' sound."""
        if timed == SOUND:
            sequences, start = self._case.sequences(), self._now()
            self.handle._sound(sequences)
            return [(self._now() - start) * FRAME_RATE / sequences[..., 0].numel()]
        passage = self._case.passages[number]
        if timed == PROMPT:
            return [self._prefilled(passage)]
        self.seconds = []
        self._forced(passage)
        return self.seconds

    def sound(self) -> list[Tensor]:
        """Of all passages' codes."""
        return self.handle._sound(self._case.sequences())

    def _now(self) -> float:
        if self.handle._engine.device.type == "cuda":
            torch.cuda.synchronize(self.handle._engine.device)
        return time.perf_counter()

    def _prefilled(self, passage: Passage) -> float:
        with plain_mode():
            start = self._now()
            self.handle._passes.prefill(passage.x, passage.mask, passage.positions)
            return self._now() - start

    def _forced(self, passage: Passage) -> tuple[Tensor, Tensor, Tensor]:
        """A passage through the decode steps in use: logits of every frame, and the tokens drawn from them, greedily.

        Each frame is made as in ``generate()``, tokens of its own included; then the passage's frame takes its place, so
        that the backbone is fed with that. Codebooks after a token that differs are judged in the context they had.
        """
        seat = self.handle._fast_seat()
        engine, traces = seat.engine, []
        with plain_mode():
            prompt = seat.passes.prefill(passage.x, passage.mask, passage.positions)
            runner = engine.prepare(1)
            state = runner.state
            state.load_prompt(prompt.layers, prompt.hidden, passage.mask, passage.positions[:, -1])
            state.set_end(-1, engine.spec.codebooks, None)
            for params in (runner.params, runner.depth_params):
                params.do_sample.fill_(False)
                params.temperature.fill_(1.0)
                params.top_k.fill_(1)
                params.top_p.fill_(1.0)
            for number, codes in enumerate(passage.codes):
                start = self._now()
                engine.next_frame(runner, first=number == 0)
                if number:  # the first frame has no backbone step
                    self.seconds.append(self._now() - start)
                traces.append(engine.trace(runner, 1))
                state.codes[:1].copy_(codes)
        first, rest, codes = (
            torch.cat([getattr(trace, name) for trace in traces]) for name in ("first_logits", "logits", "codes")
        )
        return first, rest, codes
