"""Faults put into the fast path: found within the frames predicted, and the caller gets a whole utterance."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from csm_models import Recorder, assert_same_puts, build, int8_twin, stock, teacher_forced, text_prompt, trained
from torch import Tensor

from csm_kernels.quant import QuantWeight
from csm_runtime import PrecisionPolicy, accelerate, weights
from csm_runtime.engine import Engine
from csm_runtime.guard import BLOCK, GuardConfig, Interrupted

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}
SAMPLED = {"do_sample": True, "depth_decoder_do_sample": True, "seed": 3}
FRAMES = 48
AT = 5
"""The frame from which on something is wrong."""
LATEST = AT + 2 * BLOCK - 1
"""A sample of one frame in each block of 16 has at most 30 frames between two of them."""
ALL = GuardConfig(budget=1e9)
"""Whatever verification costs: these models take less time than a check of them."""
PROMPT = text_prompt((6,))


def guarded(model: Any = None, *, guard: GuardConfig = ALL, **options: Any) -> Any:
    options.setdefault("mode", "eager")
    return accelerate(build("eight_codebooks") if model is None else model, guard=guard, progress=False, **options)


def generate(model: Any, **options: Any) -> Tensor:
    return model.generate(**PROMPT, max_new_tokens=FRAMES, **{**GREEDY, **options})


def frame_of(engine: Engine) -> int:
    """Number of the frame that is being made."""
    return int(next(iter(engine._runners.values())).state.frame[0])


class Gemv:
    """Stands in for the matrix-vector product of one engine's decode steps, and spoils some of them."""

    def __init__(self, model: Any, spoil: Callable[[int, Tensor, Any], Tensor]) -> None:
        self._engine = model.acceleration._engine
        runner = self._engine.runner(1)
        self._stock, self._spoil = runner.ops.gemv, spoil
        runner.ops = runner.ops._replace(gemv=self)

    def __call__(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        out = self._stock(x, weight, bias)
        return self._spoil(frame_of(self._engine), out, weight)


def address(weight: Any) -> int:
    return (weight.data if isinstance(weight, QuantWeight) else weight).data_ptr()


def only_event(model: Any) -> Any:
    guard = model.acceleration.guard
    assert len(guard.events) == 1, [event.reason for event in guard.events]
    return guard.events[0]


def assert_found(model: Any, kind: str, *, frame: int | None = AT, suspect: str | None = None) -> Any:
    """One incident of a kind, that names the frame it began with, within the frames predicted."""
    event = only_event(model)
    assert event.kind == kind
    assert event.suspect == suspect
    if frame is not None:
        assert event.frame == frame
    if kind == "verification":
        assert int(event.tensors["frame"][-1]) <= LATEST
    return event


def assert_greedy_from(model: Any, frames: Tensor, start: int) -> None:
    """Every token from a frame on is what the stock model says to the frames before it."""
    _, first, others = teacher_forced(model, PROMPT, frames)
    wanted = torch.cat([first.argmax(-1)[..., None], others.argmax(-1)], dim=-1)
    assert torch.equal(frames[:, start:], wanted[:, start:])


# ------------------------------------------------------------------------------------------- found in every frame


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite(value: float, caplog: pytest.LogCaptureFixture) -> None:
    model = guarded()
    wanted = stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES)
    head = model.acceleration._engine.packed.depth_heads.one(3)

    def spoil(frame: int, out: Tensor, weight: Any) -> Tensor:
        if frame == AT and weight.shape == head.shape and torch.equal(weight, head):
            out[0, 7] = value
        return out

    Gemv(model, spoil)
    assert torch.equal(generate(model), wanted)
    event = assert_found(model, "frame", suspect="depth")
    assert "NaN or infinite" in event.reason
    assert not torch.isfinite(event.tensors["logits"]).all()
    assert model.acceleration.metrics.counters["guard.breaches.frame"] == 1
    assert sum("rearm()" in record.getMessage() for record in caplog.records) == 1


def test_a_hidden_state_that_is_not_finite() -> None:
    model = guarded()
    wanted = stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES)
    down = model.acceleration._engine.packed.backbone.layers[0].down.weight

    def spoil(frame: int, out: Tensor, weight: Any) -> Tensor:
        return out * float("nan") if frame == AT and address(weight) == address(down) else out

    Gemv(model, spoil)
    assert torch.equal(generate(model), wanted)
    assert_found(model, "frame", frame=AT + 1, suspect="backbone")  # made at the end of frame 5, seen in frame 6


@pytest.mark.parametrize("code", [-1, 10**6])
def test_a_code_out_of_range(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    model = guarded()
    wanted = stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES)
    stock_step = Engine.depth_position

    def stray(engine: Engine, runner: Any, position: int, token: Tensor) -> tuple[Tensor, Tensor]:
        token, logits = stock_step(engine, runner, position, token)
        last = position == engine.spec.codebooks - 1
        return (torch.full_like(token, code) if last and frame_of(engine) == AT else token), logits

    monkeypatch.setattr(Engine, "depth_position", stray)
    assert torch.equal(generate(model), wanted)
    assert "a code out of range" in assert_found(model, "frame", suspect="depth").reason


def test_a_barrier_time_out_word() -> None:
    model = guarded()
    wanted = stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES)

    def spoil(frame: int, out: Tensor, weight: Any) -> Tensor:
        if frame == AT:
            model.acceleration._engine.runner(1).state.faults.bitwise_or_(1)
        return out

    Gemv(model, spoil)
    assert torch.equal(generate(model), wanted)
    assert "grid barrier" in assert_found(model, "frame").reason


# ------------------------------------------------------------------------------------------- found by verification


@pytest.mark.parametrize("part", ["depth", "backbone"])
def test_one_lost_tile(part: str) -> None:
    """A kernel that leaves a few rows of one gate projection at zero."""
    model = guarded(trained())
    wanted = stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES)
    gate = getattr(model.acceleration._engine.packed, part).layers[1].gate.weight

    def spoil(frame: int, out: Tensor, weight: Any) -> Tensor:
        if frame >= AT and address(weight) == address(gate):
            out[:, 8:24] = 0.0
        return out

    Gemv(model, spoil)
    got = generate(model)
    event = assert_found(model, "verification", frame=AT + (part == "backbone"), suspect=part)
    assert torch.equal(got, wanted[:, : got.shape[1]])
    assert got.shape == wanted.shape
    assert "dB, below the limit" in event.reason


def test_noise_from_the_wrong_counter() -> None:
    """Tokens that nobody's logits are wrong for, drawn with the noise of another frame."""
    healthy = generate(guarded(), **SAMPLED)
    model = guarded()
    state = model.acceleration._engine.runner(1).state
    emit = model.acceleration._engine.emit

    def shifted(runner: Any) -> None:
        late = int(int(state.frame[0]) >= AT)
        state.frame += late
        emit(runner)
        state.frame -= late

    model.acceleration._engine.emit = shifted
    got = generate(model, **SAMPLED)
    event = assert_found(model, "verification", suspect="depth")
    assert "margin of" in event.reason
    assert event.next_rung == "stock"
    assert got.shape == healthy.shape
    assert torch.equal(got[:, :AT], healthy[:, :AT])


def test_keys_written_one_position_off() -> None:
    model = guarded(trained())
    wanted = stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES)
    engine = model.acceleration._engine
    advance, state = engine.advance, engine.runner(1).state

    def shifted(runner: Any) -> None:
        advance(runner)
        if int(state.frame[0]) > AT:
            slot = state.filled - 1
            state.keys[1][:, :, slot] = state.keys[1][:, :, slot - 1]

    engine.advance = shifted
    got = generate(model)
    event = assert_found(model, "verification", frame=AT + 1, suspect="backbone")
    assert "keys at" in event.reason
    assert torch.equal(got, wanted)


def test_depth_keys_written_one_position_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = guarded(trained())
    wanted = stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES)
    stock_step = Engine.depth_position

    def shifted(engine: Engine, runner: Any, position: int, token: Tensor) -> tuple[Tensor, Tensor]:
        out = stock_step(engine, runner, position, token)
        if position == 3 and frame_of(engine) >= AT:
            for keys in runner.state.depth_keys:
                keys[:, :, 4], keys[:, :, 3] = keys[:, :, 3].clone(), 0.0
        return out

    monkeypatch.setattr(Engine, "depth_position", shifted)
    got = generate(model)
    assert_found(model, "verification", suspect="depth")
    assert torch.equal(got, wanted)


def test_scales_off_by_one_row() -> None:
    """A kernel that multiplies every row of an int8 matrix by its neighbour's scale."""
    model = guarded(trained(), precision="fast")
    healthy = generate(guarded(trained(), precision="fast"))
    up = model.acceleration._engine.packed.depth.layers[0].up.weight
    assert isinstance(up, QuantWeight)

    def spoil(frame: int, out: Tensor, weight: Any) -> Tensor:
        if frame >= AT and address(weight) == address(up):
            return out / weight.scale * weight.scale.roll(1)
        return out

    Gemv(model, spoil)
    got = generate(model)
    event = assert_found(model, "verification", suspect="depth")
    assert event.next_rung == "kept depth"
    assert torch.equal(got[:, :AT], healthy[:, :AT])
    assert got.shape[1] in (FRAMES, *range(AT, FRAMES))
    assert model.acceleration.metrics.counters["generate.rung"] == 1


def test_a_tile_of_a_packed_copy_zeroed() -> None:
    """Memory that changes under the copies: both the kernel and its reference read it, only its checksum tells."""
    model = guarded(trained(), precision="fast")
    healthy = generate(guarded(trained(), precision="fast"))
    down = model.acceleration._engine.packed.depth.layers[1].down.weight
    spoiled: list[int] = []

    def spoil(frame: int, out: Tensor, weight: Any) -> Tensor:
        if frame == AT and not spoiled:
            down.data[:16, :32] = 0
            spoiled.append(frame)
        return out

    Gemv(model, spoil)
    got = generate(model)
    event = assert_found(model, "verification", frame=None)
    assert event.reason == "packed copy depth.1.down has changed in memory"
    assert event.frame <= AT < int(event.tensors["frame"][-1]) + 1
    assert torch.equal(got[:, : event.frame], healthy[:, : event.frame])
    assert_greedy_from(model, got, event.frame)
    model.acceleration.guard.rearm()
    assert torch.equal(generate(model), healthy), "the copy was packed again"


def test_stale_copies_after_a_lora_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that change while the copies stay: fingerprints find that, and here they are blind."""
    model = guarded(trained(), precision="fast")
    monkeypatch.setattr(weights, "_same", lambda old, new: old is not None)
    monkeypatch.setattr(weights.PackedWeights, "corrupted", lambda self: [])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.depth_decoder.model.layers:
            weight = layer.mlp.down_proj.weight
            a, b = (torch.randn(n, 4, generator=generator) for n in weight.shape)
            weight += 0.3 * weight.std() * (a @ b.t())
    got = generate(model)
    event = only_event(model)
    assert event.kind == "verification"
    assert "formats of" in event.reason
    assert event.frame == 0, "the whole utterance was made from stale weights"
    assert int(event.tensors["frame"][-1]) < 2 * BLOCK
    assert_greedy_from(model, got, 0)


def test_a_slow_drift() -> None:
    """An error that grows by a tenth with every frame; health is 60 dB or more below the logits, by the limit."""
    model = guarded(trained())
    down = model.acceleration._engine.packed.depth.layers[0].down.weight
    wanted = stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES)
    generator = torch.Generator().manual_seed(0)
    levels: dict[int, float] = {}

    def spoil(frame: int, out: Tensor, weight: Any) -> Tensor:
        if frame >= AT and address(weight) == address(down):
            levels[frame] = 1e-5 * 1.6 ** (frame - AT)
            return out + levels[frame] * out.std() * torch.randn(out.shape, generator=generator)
        return out

    Gemv(model, spoil)
    got = generate(model)
    event = only_event(model)
    assert event.suspect == "depth"
    found = int(event.tensors["frame"][-1])
    # 60 dB are passed by an error of a thousandth of the logits, which takes ten of these frames, or less than twenty.
    assert AT < event.frame <= AT + 20
    assert found <= event.frame + 2 * BLOCK
    assert torch.equal(got, wanted), "what was below the limit changed no token"


# ------------------------------------------------------------------------------------------- exceptions


def breaking(model: Any, error: Callable[[], Exception], times: int = 1) -> None:
    engine = model.acceleration._engine
    emit, left = engine.emit, [times]

    def broken(runner: Any) -> None:
        if int(runner.state.frame[0]) == AT and left[0]:
            left[0] -= 1
            raise error()
        emit(runner)

    engine.emit = broken


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory"),
        lambda: RuntimeError("[enforce fail] can't allocate memory"),
    ],
)
def test_out_of_memory_at_a_frame(error: Callable[[], Exception]) -> None:
    """The second in one call: straight to the stock path, with the fast path's buffers given back."""
    model = guarded(precision="fast")
    healthy = generate(guarded(precision="fast"))
    breaking(model, error, times=2)
    got = generate(model)
    event = assert_found(model, "memory")
    assert event.next_rung == "stock"
    assert not model.acceleration._engine._runners
    assert model.acceleration.metrics.counters["memory.retries"] == 1
    assert torch.equal(got[:, :AT], healthy[:, :AT])
    assert_greedy_from(model, got, AT)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_exception_goes_on_eagerly_from_the_same_frame(streamed: bool) -> None:
    """int8 in the fast path, the stock model's own weights below it: no frame lost, none twice, and the noise goes on."""
    model = guarded(precision="fast")
    healthy = generate(guarded(precision="fast"), **SAMPLED)
    breaking(model, lambda: RuntimeError("injected"))
    streamer = Recorder() if streamed else None
    got = generate(model, **SAMPLED, streamer=streamer)
    event = assert_found(model, "exception")
    assert (event.rung, event.next_rung) == ("fast", "eager")
    assert torch.equal(got[:, :AT], healthy[:, :AT])
    exact = guarded()
    below = generate(exact, **SAMPLED)
    assert got.shape == below.shape == (1, FRAMES, 8)
    if streamer is not None:
        assert streamer.ends == 1
        assert torch.equal(torch.stack(streamer.puts[1:], dim=1), got)
    assert model.acceleration.guard.rung == "eager"
    assert torch.equal(generate(model, **SAMPLED), below), "later calls stay on the safe rung"
    model.acceleration.guard.rearm()
    assert torch.equal(generate(model, **SAMPLED), healthy)


def test_a_rung_that_breaks_as_well() -> None:
    """All the way down within one utterance."""
    model = guarded(int8_twin("eight_codebooks"), precision="fast")
    wanted = stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES)
    breaking(model, lambda: RuntimeError("first"))
    build_seat = model.acceleration._seat

    def seat(rung: str, size: int) -> Any:
        if rung == "eager":
            raise RuntimeError("second")
        return build_seat(rung, size)

    model.acceleration._seat = seat
    streamer, theirs = Recorder(), Recorder()
    stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES, streamer=theirs)
    assert torch.equal(generate(model, streamer=streamer), wanted)
    assert_same_puts(streamer, theirs)
    guard = model.acceleration.guard
    assert [(e.rung, e.next_rung) for e in guard.events] == [("fast", "eager"), ("eager", "stock")]
    assert guard.rung == "stock"
    assert model.acceleration.metrics.counters["generate.stock"] == 1


def test_a_batch_with_rows_that_have_ended() -> None:
    """What has ended stays ended on the next rung."""
    from csm_models import copy_first_codebook

    model = copy_first_codebook(build(seed=2))
    model.config.codebook_eos_token_id, model.generation_config.eos_token_id = 4, 5
    model = guarded(model, precision="int8", batch_sizes=(4,))
    prompt = text_prompt((5, 9, 3))
    healthy = model.generate(**prompt, **GREEDY, max_new_tokens=14)
    breaking(model, lambda: RuntimeError("injected"))
    got = model.generate(**prompt, **GREEDY, max_new_tokens=14)
    assert model.acceleration.guard.rung == "eager"
    ends = [int((row == 4).all(-1).nonzero()[0]) for row in healthy]
    assert min(ends) < AT < max(ends), "one row has ended before, others have not"
    row = ends.index(min(ends))
    assert torch.equal(got[row], healthy[row, : got.shape[1]])
    assert (got[row, ends[row] + 1 :] == model.config.codebook_pad_token_id).all()


@pytest.mark.parametrize("kind", ["exception", "NaN"])
def test_a_fault_in_the_codec(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The frames are made; their sound comes from the stock codec, row by row, in the precision asked for."""
    from csm_runtime import codec

    policy = PrecisionPolicy((("codec", "fp32"),), "fp32 sound")
    model = guarded(build(dtype=torch.bfloat16), precision=policy)
    codes = model.generate(**PROMPT, **GREEDY, max_new_tokens=8)
    wanted = model.codec_model.decode(codes.transpose(1, 2)).audio_values[0, 0]
    call = codec.decode_offline

    def broken(module: Any, codes: Tensor) -> Tensor:
        if module is model.codec_model:
            return call(module, codes)
        if kind == "exception":
            raise RuntimeError("injected")
        return call(module, codes) * float("nan")

    monkeypatch.setattr(codec, "decode_offline", broken)
    (sound,) = model.generate(**PROMPT, **GREEDY, max_new_tokens=8, output_audio=True)
    assert sound.dtype == torch.float32
    assert torch.equal(sound, wanted.float())
    event = only_event(model)
    assert event.kind == "codec"
    assert event.tensors["sequences"].shape == (1, 8, 4)
    guard = model.acceleration.guard
    assert (guard.rung, guard.codec_trusted) == ("fast", False)
    model.generate(**PROMPT, **GREEDY, max_new_tokens=8, output_audio=True)
    assert len(guard.events) == 1, "later calls take the stock codec"
    monkeypatch.undo()
    guard.rearm()
    (again,) = model.generate(**PROMPT, **GREEDY, max_new_tokens=8, output_audio=True)
    assert not torch.equal(again, sound), "fp32 throughout, not bf16 widened"
    assert torch.allclose(again, sound, atol=0.05 * float(sound.abs().max()))


# ------------------------------------------------------------------------------------------- the guard's own conduct


def test_a_resumed_utterance_is_not_suspected_of_its_prefill() -> None:
    """Frames of the rung above are prefilled by the stock layers, which an int8 backbone's own pass is not equal to."""
    model = trained()
    model.config.codebook_eos_token_id = 10**4
    model = guarded(model, precision="fast")
    up = model.acceleration._engine.packed.depth.layers[0].up.weight

    def spoil(frame: int, out: Tensor, weight: Any) -> Tensor:
        wrong = frame >= AT and address(weight) == address(up)
        return out / weight.scale * weight.scale.roll(1) if wrong else out

    Gemv(model, spoil)
    assert generate(model, **SAMPLED).shape[1] == FRAMES
    event = assert_found(model, "verification", suspect="depth")
    assert model.acceleration.guard.rung == event.next_rung == "kept depth"
    assert model.acceleration.metrics.counters["guard.checked.backbone"] > 1, "the rung below has been looked at"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room for the copy"), ValueError("beyond fp16")])
def test_weights_that_cannot_be_followed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """Packing again fails: the stock path has the weights as they are, until someone says rearm()."""
    model = guarded(precision="fast")
    with torch.no_grad():
        model.backbone_model.layers[0].mlp.up_proj.weight.mul_(1.5)
    convert = weights._converted

    def failing(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(weights, "_converted", failing)
    wanted = stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES)
    for _ in range(2):
        assert torch.equal(generate(model), wanted)
    event = only_event(model)
    assert (event.kind, event.next_rung) == ("memory" if "room" in str(error) else "exception", "stock")
    assert sum("rearm()" in r.getMessage() and str(error) in r.getMessage() for r in caplog.records) >= 1
    guard = model.acceleration.guard
    guard.rearm()
    guard.fallback = "forbid"
    with pytest.raises(Interrupted, match=str(error)):
        generate(model)
    monkeypatch.setattr(weights, "_converted", convert)
    guard.rearm()
    generate(model)
    assert guard.rung == "fast"
    assert model.acceleration.metrics.counters["generate.fast"] == 1


def test_a_seed_holds_when_the_stock_path_goes_on() -> None:
    made = []
    for number in (1, 2):
        model = guarded()
        breaking(model, lambda: torch.OutOfMemoryError("injected"), times=2)
        torch.manual_seed(number)
        made.append(generate(model, **SAMPLED))
        state = torch.get_rng_state()
        torch.manual_seed(number)
        assert torch.equal(state, torch.get_rng_state()), "the caller's generator is left alone"
    assert model.acceleration.guard.rung == "stock"
    assert torch.equal(*made)


def test_one_failed_calibration_is_forgotten_by_rearm(monkeypatch: pytest.MonkeyPatch) -> None:
    from csm_runtime import ladder

    model = guarded(precision="fast")
    guard, calibrate = model.acceleration.guard, ladder.calibrate

    def failing(*args: Any) -> Any:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(ladder, "calibrate", failing)
    breaking(model, lambda: RuntimeError("injected"))
    generate(model)
    assert guard.rung == "eager"
    assert list(guard.status()["unverifiable"]) == ["eager"]
    monkeypatch.setattr(ladder, "calibrate", calibrate)
    guard.rearm()
    before = model.acceleration.metrics.counters["guard.verified"]
    generate(model)
    assert model.acceleration.metrics.counters["guard.verified"] == before + FRAMES // BLOCK
    assert not guard.unverifiable


def test_every_incident_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A warning with its traceback the first time, the rungs and the reason each time."""
    caplog.set_level(logging.INFO, logger="csm_runtime")
    model = guarded()
    breaking(model, lambda: RuntimeError("injected"), times=2)
    for number in (1, 2):
        generate(model)
        said = [record for record in caplog.records if "injected" in record.getMessage()]
        assert sum("goes from rung 'fast'" in record.getMessage() for record in said) == number
        model.acceleration.guard.rearm()
    assert sum(bool(record.exc_info) for record in said) == 1


def test_frames_of_other_stock_calls_are_no_evidence() -> None:
    model = guarded(precision="fast")
    breaking(model, lambda: RuntimeError("injected"))
    generate(model)
    guard = model.acceleration.guard
    assert guard.rung == "eager"
    before = guard._healthy
    with torch.autocast("cpu", torch.bfloat16):
        generate(model)
    assert guard._healthy == before


def test_a_forbidden_calibration_is_one_incident(monkeypatch: pytest.MonkeyPatch) -> None:
    from csm_runtime import ladder

    model = guarded(precision="fast")
    model.acceleration.guard.fallback = "forbid"

    def unsound(*args: Any) -> Any:
        raise ArithmeticError("unsound")

    monkeypatch.setattr(ladder, "calibrate", unsound)
    with torch.no_grad():
        model.depth_decoder.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(Interrupted, match="^calibration: unsound"):
        generate(model)
    assert only_event(model).kind == "calibration"


def test_forbidden_fallback_raises() -> None:
    model = guarded()
    model.acceleration.guard.fallback = "forbid"
    breaking(model, lambda: RuntimeError("injected"))
    with pytest.raises(Interrupted, match=r'injected.*frame 5.*"forbid"'):
        generate(model)
    assert model.acceleration.guard.rung == "fast"
    with pytest.raises(ValueError, match="ladder"):
        model.acceleration.guard.fallback = "never"


def test_a_check_that_fails_says_nothing_of_the_frames(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from csm_runtime.replay import Replay

    model = guarded()
    wanted = stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES)

    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no replay")

    monkeypatch.setattr(Replay, "depth_logits", broken)
    assert torch.equal(generate(model), wanted)
    guard = model.acceleration.guard
    assert (guard.rung, len(guard.events)) == ("fast", 0)
    assert model.acceleration.metrics.counters["guard.failed"] > 0
    assert sum("check 'depth' failed" in record.getMessage() for record in caplog.records) == 1


def test_the_guard_changes_no_frame() -> None:
    for options in (GREEDY, SAMPLED):
        watched, alone = (guarded(guard=config) for config in (ALL, GuardConfig(verify=False)))
        assert torch.equal(generate(watched, **options), generate(alone, **options))
        counters = watched.acceleration.metrics.counters
        assert counters["guard.verified"] == FRAMES // BLOCK
        assert counters["guard.suspicions"] == 0
        assert not [name for name in alone.acceleration.metrics.counters if name.startswith("guard.")]


def test_what_exceeds_the_budget_is_skipped_and_counted() -> None:
    model = guarded(guard=GuardConfig(budget=1e-9))
    generate(model)
    counters = model.acceleration.metrics.counters
    assert counters["guard.skipped"] == FRAMES // BLOCK, "samples of which nothing was checked"
    assert counters["guard.skipped.depth"] == counters["guard.skipped.backbone"] == FRAMES // BLOCK
    assert counters["guard.checked.depth"] == 0


def test_a_long_healthy_time_leads_up_again_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = guarded(guard=GuardConfig(budget=1e9, healthy_frames=2 * FRAMES), precision="fast")
    guard = model.acceleration.guard
    breaking(model, lambda: RuntimeError("injected"), times=2)
    rungs = []
    for _ in range(6):
        generate(model)
        rungs.append(guard.rung)
    assert rungs == ["eager", "fast", "eager", "eager", "eager", "eager"]
    assert model.acceleration.metrics.counters["guard.climbed"] == 1


@pytest.mark.parametrize("as_audio", [False, True])
def test_so_does_a_long_time_on_the_stock_path(as_audio: bool) -> None:
    model = guarded(build(), guard=GuardConfig(healthy_frames=40))
    guard = model.acceleration.guard
    breaking(model, lambda: RuntimeError("injected"))
    rungs = []
    for _ in range(5):
        model.generate(**PROMPT, **GREEDY, max_new_tokens=20, output_audio=as_audio)
        rungs.append(guard.rung)
    assert rungs == ["stock", "stock", "fast", "fast", "fast"]
    assert model.acceleration.metrics.counters["generate.fast"] == 2


def test_a_guard_that_fails_is_asked_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from csm_runtime.guard import Watch

    model = guarded()
    wanted = stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES)

    def broken(self: Watch, sample: Any, codes: Any) -> None:
        raise RuntimeError("no eyes")

    monkeypatch.setattr(Watch, "look", broken)
    assert torch.equal(generate(model), wanted)
    assert dict(model.acceleration.metrics.faults) == {"the guard failed: RuntimeError: no eyes": 1}
    assert model.acceleration.metrics.counters["generate.fast"] == 1


def test_steps_that_become_unsound_are_left_before_they_make_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """New weights have limits of their own, and steps that are far off there are not used, whatever they were before."""
    from csm_runtime.replay import Replay

    model = guarded(precision="fast")
    stock_logits = Replay.depth_logits

    def rolled(self: Replay, packed: Any, *args: Any) -> Tensor:
        out = stock_logits(self, packed, *args)
        return out.roll(1, -1) if isinstance(packed.depth.layers[0].up.weight, QuantWeight) else out

    monkeypatch.setattr(Replay, "depth_logits", rolled)
    with torch.no_grad():
        model.depth_decoder.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    got = generate(model)
    event = assert_found(model, "calibration", frame=0)
    assert (event.rung, event.next_rung) == ("fast", "eager")
    assert_greedy_from(model, got, 0)
    assert model.acceleration.metrics.counters["generate.rung"] == 1
    with pytest.raises(ValueError, match="no limits"):
        model.acceleration.replay(event)


@pytest.mark.slow
def test_a_compiled_depth_step_gone_wrong_is_replaced_by_the_eager_one() -> None:
    """The first rung down keeps everything but the suspect's compiled steps."""
    model = guarded(build("base"), mode="compile")
    assert model.acceleration.mode == "compile", model.acceleration.notes
    wanted = stock(model, **PROMPT, **GREEDY, max_new_tokens=FRAMES)
    runner = model.acceleration._engine.runner(1)
    compiled = runner.depth[0]

    def spoiled(*args: Any) -> tuple[Tensor, Tensor]:
        token, logits = compiled(*args)
        if int(runner.state.frame[0]) >= AT:
            logits = logits.roll(1, dims=-1)
            token = logits.argmax(-1)
        return token, logits

    runner.depth[0] = spoiled
    got = generate(model)
    event = assert_found(model, "verification", suspect="depth")
    assert event.next_rung == "plain depth"
    assert torch.equal(got, wanted)
    assert model.acceleration.guard.rung == "plain depth"
    assert torch.equal(generate(model), wanted)
