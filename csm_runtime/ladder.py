"""The rungs below the fast path: what is switched off on each, in which order they come, and their engines.

From the top: ``fast``; ``plain depth`` and ``plain backbone``, where the suspect's steps run eagerly; ``kept depth`` and
``kept backbone``, where its weights are the stock model's own and everything runs eagerly; ``eager``, all weights as the
stock model has them; ``stock``, the untouched model.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm_kernels.sampling import SamplingParams
from csm_runtime.adapters import hf, hf_call
from csm_runtime.adapters.hf_passes import Passes
from csm_runtime.checks import Checks, Sample, Scene, scene_of
from csm_runtime.engine import Engine
from csm_runtime.events import GuardEvent
from csm_runtime.guard import CHECKS, FAST, STOCK, Breach, Finding, Floors, floors_of, judge, too_many
from csm_runtime.metrics import Metrics
from csm_runtime.precision import PrecisionPolicy, zones_of
from csm_runtime.replay import Replay
from csm_runtime.weights import Packed, PackedWeights, unlowered

CALIBRATION_FRAMES = 6
"""Frames that limits are taken from: the model's own, of a made-up prompt."""
_PROMPT = 12
_NOISES = 8
"""Noises with which each of those frames is drawn again, to count tokens that differ in health."""
_SAMPLING = (0.9, 50)

_ORDER = (FAST, "plain", "kept", "eager", STOCK)


class Seat(NamedTuple):
    """What frames are made with on one rung."""

    engine: Engine
    passes: Passes
    weights: PackedWeights


def plain_parts(rung: str) -> frozenset[str]:
    """The parts whose steps run eagerly although the engine has faster ones."""
    return frozenset({rung.removeprefix("plain ")} if rung.startswith("plain ") else ())


def below(rung: str, breach: Breach, engine: Engine, policy: PrecisionPolicy, dropped: bool) -> str:
    """The next rung after an incident.

    Args:
        rung: the present one.
        breach: what happened.
        engine: the fast one.
        policy: in force.
        dropped: whether the stock weights are gone, so that nothing can be kept as the stock model has it.
    """
    ladder, mode, codebooks = [], engine.mode, engine.spec.codebooks
    if breach.kind != "memory":
        if breach.suspect is not None and not breach.formats and mode != "eager":
            ladder.append(f"plain {breach.suspect}")
        if breach.suspect is not None and not dropped and _lowered(policy, breach.suspect, codebooks):
            ladder.append(f"kept {breach.suspect}")
        if mode != "eager" or (
            not dropped and any(_lowered(policy, part, codebooks) for part in ("backbone", "depth"))
        ):
            ladder.append("eager")
    present = _ORDER.index(rung.partition(" ")[0])
    return next((name for name in ladder if _ORDER.index(name.partition(" ")[0]) > present), STOCK)


def _lowered(policy: PrecisionPolicy, part: str, codebooks: int) -> bool:
    zones = [zone for zone in zones_of(codebooks) if zone.startswith(part) or zone == "kv"]
    return any(policy.format_of(zone) != "keep" for zone in zones)


def safer_policy(policy: PrecisionPolicy, rung: str) -> PrecisionPolicy:
    """The policy of a rung whose weights are, wholly or in part, the stock model's own."""
    if rung == "eager":
        return PrecisionPolicy((), "stock")
    part = rung.removeprefix("kept ")
    return policy.after(((f"{part}.*", "keep"), ("kv", "keep")), f"{policy.name}, {part} kept")


def build_seat(model: Any, rung: str, like: Seat, dropped: bool, metrics: Metrics) -> Seat:
    """Engine, passes and weights of a rung below the fast ones; nothing is compiled for it.

    Args:
        model: transformers' CSM.
        rung: ``eager`` or one that keeps weights.
        like: the fast path's.
        dropped: whether the stock weights are gone: the packed ones serve on.
        metrics: where timings go.
    """
    fast = like.engine
    with torch.no_grad():
        rotary = hf.rotary_tables(model, fast.capacity)
        engine = Engine(
            fast.spec,
            rotary,
            fast.dtype,
            fast.device,
            fast.capacity,
            "eager",
            metrics,
            fast.kv_dtype if dropped else None,
            fast.without,
        )
    weights = like.weights if dropped else like.weights.with_policy(safer_policy(like.weights.policy, rung))
    return Seat(engine, Passes(model, False, metrics), weights)


def replay_of(engine: Engine, runner: Any) -> Replay:
    """Teacher-forced passes that round as an engine does."""
    state = runner.state
    return Replay(engine.spec, (engine.rotary, engine.depth_rotary), (state.keys[0].dtype, state.depth_keys[0].dtype))


def scene(model: Any, seat: Seat, runner: Any, prompt: int, position: Tensor, dropped: bool, first: int = 0) -> Scene:
    """Where a call stands, for the guard's checks.

    Args:
        model: transformers' CSM.
        seat: what its frames are made with.
        runner: of the engine.
        prompt: positions of the prompt.
        position: ``[N]`` int64, rotary position of the last of them.
        dropped: whether the stock weights are gone.
        first: the first frame that the seat makes; those before it are prefilled.
    """
    state, stock = runner.state, Passes(model, False, seat.engine.metrics)
    packed = seat.engine.packed
    assert packed is not None
    live: list[Packed] = []

    def unlowered_once() -> Packed | None:
        if dropped:
            return None
        if not live:
            live.append(unlowered(hf.live_weights(model)))
        return live[0]

    def stock_logits(hidden: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        first = model.lm_head(hidden.to(model.lm_head.weight.dtype)).float()
        return first, stock.codebook_logits(hidden, codes[:, :-1])

    return Scene(
        packed=packed,
        stock=unlowered_once,
        stock_logits=stock_logits,
        corrupted=seat.weights.corrupted,
        keys=state.keys,
        values=state.values,
        allowed=state.allowed,
        prompt=prompt,
        first=first,
        position=position,
        params=(runner.params, runner.depth_params),
        seed=state.seed,
        utterance=state.utterance,
    )


def of_row(scene: Scene, row: int) -> Scene:
    """The scene of one row alone, whose prompt and position it holds already; views of the same tensors."""
    one = slice(row, row + 1)
    first, others = (SamplingParams(*(value[one] for value in params)) for params in scene.params)
    return replace(
        scene,
        keys=[layer[one] for layer in scene.keys],
        values=[layer[one] for layer in scene.values],
        allowed=scene.allowed[one],
        params=(first, others),
        seed=scene.seed[one],
        utterance=scene.utterance[one],
    )


def calibrate(model: Any, seat: Seat, size: int, dropped: bool) -> Floors:
    """Limits from a few frames of the model's own, and what each check costs here.

    Args:
        model: transformers' CSM.
        seat: what its frames are made with; its state is overwritten.
        size: batch size that the engine is ready for.
        dropped: whether the stock weights are gone.

    Raises:
        ArithmeticError: the decode steps are far off their reference.
    """
    engine = seat.engine
    vocab = model.config.text_vocab_size
    length = min(_PROMPT, engine.capacity // 2)
    ids = (torch.arange(length, device=engine.device) * 37 % vocab)[None]
    x = hf_call.text_embeddings(model, ids)
    positions = torch.arange(length, device=engine.device)[None]
    prompt = seat.passes.prefill(x, None, positions)
    runner = engine.prepare(size)
    state = runner.state
    state.load_prompt(prompt.layers, prompt.hidden, None, positions[:, -1])
    state.set_end(-1, engine.spec.codebooks, None)
    for params in (runner.params, runner.depth_params):
        params.do_sample.fill_(True)
        params.temperature.fill_(_SAMPLING[0])
        params.top_k.fill_(_SAMPLING[1])
        params.top_p.fill_(1.0)
    state.seed.zero_()
    state.utterance.zero_()
    samples: list[Sample] = []
    alive = torch.ones(1, dtype=torch.bool, device=engine.device)
    for number in range(min(CALIBRATION_FRAMES, engine.capacity - length)):
        engine.next_frame(runner, first=number == 0)
        samples.append(Sample(number, *engine.trace(runner, 1), alive))
    if int(state.faults):
        raise ArithmeticError(f"the frames made for calibration have faults, bits {int(state.faults)}")
    codes = [sample.codes for sample in samples]
    checks = Checks(replay_of(engine, runner), scene(model, seat, runner, length, positions[:, -1], dropped))
    measured, seconds = {}, {}
    for name in CHECKS:
        start = time.perf_counter()
        found = checks(name, samples[-1:] if name == "depth" else samples, codes)
        if not found.frames and name != "copies":
            continue  # there is nothing to check
        seconds[name] = time.perf_counter() - start
        measured[name] = [checks.depth(samples, _NOISES) if name == "depth" else found]
    dtype = str(engine.dtype).removeprefix("torch.")
    rounded = min((engine.dtype, engine.kv_dtype), key=lambda one: -torch.finfo(one).eps)
    return floors_of(
        measured,
        seconds,
        policy=seat.weights.policy.name,
        mode=engine.mode,
        dtype=dtype,
        rounded=str(rounded).removeprefix("torch."),
    )


def replay_event(model: Any, seat: Seat, event: GuardEvent, floors: Floors, dropped: bool) -> list[Finding]:
    """Run the checks of an incident again on the frames it kept, with the weights as they are now.

    Args:
        model: transformers' CSM, of the shape the event came from.
        seat: engine and weights.
        event: the incident.
        floors: limits.
        dropped: whether the stock weights are gone.

    Returns:
        Every measure beyond its limit; nothing where the frames are within them.

    Raises:
        ValueError: the event kept no frames, or they are of a model of another shape, or what they would be checked for
            needs more than was kept.
    """
    spec = seat.engine.spec
    if "codes" not in event.tensors:
        raise ValueError(
            f"event {event.id} kept no frames ({event.kind}: {event.reason}); there is nothing to run again"
        )
    wanted = (spec.codebooks, spec.backbone.hidden)
    came = (event.tensors["codes"].shape[-1], event.tensors["hidden"].shape[-1])
    if came != wanted:
        raise ValueError(
            f"event {event.id} has {came[0]} codebooks and a hidden size of {came[1]}, the model {wanted[0]} and {wanted[1]}"
        )
    runner = seat.engine.runner(1)
    nowhere = torch.zeros(1, dtype=torch.int64, device=seat.engine.device)
    there, samples, codes = scene_of(event.tensors, scene(model, seat, runner, 0, nowhere, dropped))
    checks = Checks(replay_of(seat.engine, runner), there, floors.ties)
    found: list[Finding] = []
    wanted_again = {finding["check"] for finding in event.findings}
    measures = {finding["measure"] for finding in event.findings}
    for name in CHECKS:
        if "backbone" in name and not there.keys:
            if name in wanted_again:
                raise ValueError(
                    f"event {event.id} is about the backbone, and its cached keys and values were too large to be kept; it "
                    "cannot be run again"
                )
            continue
        measured = checks(name, samples, codes)
        found += judge(name, measured, floors) or too_many(name, measured, floors, samples[0].frame, measures)
    return found
