"""The guard's arithmetic on made-up numbers: limits, judgements, Wald's test, purses, rungs; and its events."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from csm_models import TRAINED, build, held_out_speech, text_prompt, trained
from torch import Tensor

from csm_kernels.sampling import NoiseKey, SamplingParams
from csm_runtime import PrecisionPolicy, accelerate, ladder
from csm_runtime.checks import Checks, Measures, Sample, Scene, groups
from csm_runtime.cli import main
from csm_runtime.events import GuardEvent, load_events
from csm_runtime.guard import (
    BLOCK,
    CHECKS,
    Breach,
    Floors,
    Guard,
    GuardConfig,
    Purse,
    Wald,
    Watch,
    floors_of,
    judge,
    share_out,
)
from csm_runtime.metrics import Metrics
from csm_runtime.replay import noise_of, redraw

PRICES = dict.fromkeys(CHECKS, 0.0)


def floors(**changed: Any) -> Floors:
    made: dict[str, Any] = {
        "policy": "p",
        "mode": "eager",
        "dtype": "float32",
        "frames": 6,
        "least": {"logits of codebook 0": 30.0},
        "most": {"margin of codebook 0": 0.1},
        "ties": {"codebook 0": 0.1},
        "rates": {"codebook 0": 0.02},
        "seconds": PRICES,
    }
    return Floors(**{**made, **changed})


# ------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0}, ["budget", "0.03", "0"]),
        ({"budget": "3 %"}, ["budget", "3 %"]),
        ({"fallback": "stock"}, ["fallback", "ladder", "forbid", "stock"]),
        ({"healthy_frames": -1}, ["healthy_frames", "-1"]),
        ({"events": 2.5}, ["events", "2.5"]),
    ],
)
def test_bad_configuration(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        GuardConfig(**options)
    assert all(word in str(caught.value) for word in words)


def test_accelerate_takes_a_config_or_a_flag() -> None:
    with pytest.raises(ValueError, match="guard must be True, False or a GuardConfig, got 'on'"):
        accelerate(build(), mode="eager", progress=False, guard="on")
    off = accelerate(build(), mode="eager", progress=False, guard=False).acceleration
    assert (off.guard.config.verify, off.guard.floors) == (False, {})
    on = accelerate(build(), mode="eager", progress=False).acceleration
    assert on.guard.config == GuardConfig()
    assert set(on.guard.floors) == {"fast"}
    report = on.report()
    assert report.guard["rung"] == "fast"
    assert "guard: rung 'fast'" in str(report)
    json.dumps(report.to_dict())


# ------------------------------------------------------------------------------------------------ limits


def test_limits_stand_off_from_the_worst_healthy_frame() -> None:
    depth = Measures([0, 1], {"logits of codebook 0": [50.0, 44.0], "logits of codebooks from 8": [43.0, 60.0]})
    depth.most = {"error of codebook 0": [0.01, 0.02], "error of codebooks from 8": [0.01, 0.01]}
    depth.differing = {"codebook 0": (1, 96), "codebooks from 8": (0, 10_000)}
    formats = Measures([0, 1], {"formats of the backbone": [29.0, 27.0]}, {"divergence of codebook 0": [0.01, 0.002]})
    got = floors_of({"depth": [depth], "formats": [formats]}, PRICES, policy="p", mode="m", dtype="d")
    assert got.least == {
        "logits of codebook 0": 38.0,  # stricter: 6 dB below the worst
        "logits of codebooks from 8": 33.0,  # 10 dB
        "formats of the backbone": 17.0,
    }
    assert got.ties == {"codebook 0": pytest.approx(0.06), "codebooks from 8": pytest.approx(0.06)}
    assert got.most["margin of codebook 0"] == got.ties["codebook 0"]
    assert got.most["divergence of codebook 0"] == pytest.approx(0.0401)
    assert got.rates == {"codebook 0": pytest.approx(3 / 96), "codebooks from 8": 0.004}
    assert got.frames == 2


@pytest.mark.parametrize(("rounded", "limit"), [("float32", 60.0), ("float16", 50.0), ("bfloat16", 40.0)])
def test_limits_leave_room_for_what_rounds_the_other_way(rounded: str, limit: float) -> None:
    """A token that loses by less than the limit in dB lets pass is a tie, or the one would contradict the other."""
    depth = Measures([0], {"logits of codebook 0": [110.0], "logits of codebooks from 8": [110.0]})
    depth.most = {"error of codebook 0": [1e-6], "error of codebooks from 8": [1e-6]}
    depth.most |= {"size of codebook 0": [2.0], "size of codebooks from 8": [2.0]}
    got = floors_of({"depth": [depth]}, PRICES, policy="p", mode="m", dtype="d", rounded=rounded)
    assert set(got.least.values()) == {limit}
    allowed = 2.0 * 10 ** (-limit / 20)
    assert got.ties == {"codebook 0": pytest.approx(4 * allowed), "codebooks from 8": pytest.approx(8 * allowed)}
    assert got.most["margin of codebook 0"] == got.ties["codebook 0"]


def test_limits_of_exact_steps_leave_room_for_roundings() -> None:
    depth = Measures([0], {"logits of codebook 0": [math.inf]}, {"error of codebook 0": [0.0]})
    got = floors_of({"depth": [depth]}, PRICES, policy="p", mode="m", dtype="d")
    assert got.least["logits of codebook 0"] == 60.0
    assert got.ties["codebook 0"] > 0


def test_frames_that_are_not_sound_are_no_measure() -> None:
    for value in (12.0, -math.inf):
        with pytest.raises(ArithmeticError, match="codebook 0 at"):
            floors_of(
                {"depth": [Measures([0], {"logits of codebook 0": [value]})]}, PRICES, policy="", mode="", dtype=""
            )


def test_unsound_steps_are_never_trusted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What is wrong from the start would calibrate its own limits: it is refused where they are made."""
    from csm_runtime.replay import Replay

    stock = Replay.depth_logits
    monkeypatch.setattr(Replay, "depth_logits", lambda *args: stock(*args).roll(1, -1))
    model = accelerate(build(), mode="eager", progress=False)
    guard = model.acceleration.guard
    assert guard.rung == "stock"
    assert guard.events[0].kind == "calibration"
    model.generate(**text_prompt((4,)), max_new_tokens=2, do_sample=False, depth_decoder_do_sample=False)
    assert model.acceleration.metrics.counters["generate.stock"] == 1


def test_floors_survive_json(tmp_path: Path) -> None:
    made = floors()
    made.save(tmp_path / "floors.json")
    assert Floors.load(tmp_path / "floors.json") == made
    with pytest.raises(ValueError, match="must have the fields"):
        Floors.from_dict({"policy": "p"})


def test_judge() -> None:
    found = Measures(
        [3, 4, 5], {"logits of codebook 0": [40.0, 29.0, float("nan")]}, {"margin of codebook 0": [0.0, 0.2, 0.0]}
    )
    assert [(f.frame, f.measure) for f in judge("depth", found, floors())] == [
        (4, "logits of codebook 0"),
        (4, "margin of codebook 0"),
        (5, "logits of codebook 0"),
    ]
    assert judge("depth", Measures([1], {"unknown": [-100.0]}), floors()) == []
    assert (
        str(judge("copies", Measures(broken=["depth.0.q"]), floors())[0])
        == "packed copy depth.0.q has changed in memory"
    )


# ------------------------------------------------------------------------------------------------ Wald's test


def test_walds_test_tells_ten_percent_from_two() -> None:
    """In a median of 240 tokens or so, which 16 frames in 256 have; and not from two."""
    generator = random.Random(0)

    def tokens_until_alarm(rate: float, most: int) -> int | None:
        test = Wald({"g": 0.02})
        for n in range(1, most + 1):
            if test.add("g", int(generator.random() < rate), 1) is not None:
                return n
        return None

    found = [tokens_until_alarm(0.10, 5000) for _ in range(100)]
    assert None not in found
    assert 120 < sorted(filter(None, found))[50] < 400
    assert [tokens_until_alarm(0.02, 5000) for _ in range(100)] == [None] * 100


def test_an_alarm_ends_walds_test() -> None:
    """What a closer look has found to be chance must not be an alarm for ever."""
    test = Wald({"g": 0.02})
    alarms = [test.add("g", 8, 32) for _ in range(12)]
    assert alarms[0] is None
    assert [alarm for alarm in alarms if alarm is not None] == [0.25] * 6, "every second time: 10.8 each, from nothing"
    assert test.add("g", 0, 32) is None


def test_walds_test_ignores_what_it_was_not_calibrated_for() -> None:
    test = Wald({"g": 0.02})
    assert test.add("other", 100, 100) is None
    assert test.add("g", 0, 0) is None
    assert test.add("g", 30, 31) == pytest.approx(30 / 31)


# ------------------------------------------------------------------------------------------------ what is looked at


class Checker:
    """Checks that return what they are told, and note when they were asked."""

    def __init__(self, answer: Any = None) -> None:
        self.asked: list[tuple[str, list[int]]] = []
        self.answer = answer or (lambda name, samples: Measures())

    def __call__(self, name: str, samples: Sequence[Any], codes: Sequence[Tensor]) -> Measures:
        self.asked.append((name, [sample.frame for sample in samples]))
        return self.answer(name, samples)

    def evidence(self, samples: Sequence[Any], codes: Sequence[Tensor]) -> dict[str, Tensor]:
        return {}


def one(frame: int) -> Sample:
    nothing = torch.zeros(1, 1)
    return Sample(frame, nothing, nothing.long(), nothing, nothing[None], torch.ones(1, dtype=torch.bool))


def watch(
    checker: Checker, config: GuardConfig | None = None, prices: dict[str, float] | None = None, **changed: Any
) -> Watch:
    guard = Guard(config or GuardConfig(budget=1e9), Metrics())
    guard.set_floors("fast", floors(seconds=prices or PRICES, **changed))
    return Watch(guard, "fast", checker, guard._metrics)


def test_one_frame_of_each_block_is_looked_at() -> None:
    checker = Checker()
    eye = watch(checker)
    for frame in range(BLOCK * 400):
        assert eye.look(one(frame), []) is None
    frames = [asked[0] for name, asked in checker.asked if name == "depth"]
    assert [frame // BLOCK for frame in frames] == list(range(400))
    places = Counter(frame % BLOCK for frame in frames)
    assert len(places) == BLOCK
    assert max(places.values()) < 50, "25 each, by chance a few more"
    assert {name for name, _ in checker.asked} == set(CHECKS)


def test_the_budget_holds_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of 80 ms and checks of 150: three of a hundred of the time go to checks, and the rest is counted."""
    clock = [0.0]
    monkeypatch.setattr("csm_runtime.guard.time.perf_counter", lambda: clock[0])
    spent = [0.0]

    def costly(name: str, samples: Sequence[Any]) -> Measures:
        clock[0] += 0.15
        spent[0] += 0.15
        return Measures()

    eye = watch(Checker(costly), GuardConfig(budget=0.03), dict.fromkeys(CHECKS, 0.15))
    made = 20_000
    for frame in range(made):
        clock[0] += 0.08
        eye.look(one(frame), [])
    share = spent[0] / (made * 0.08)
    assert 0.025 < share <= 0.0301
    counters = eye.metrics.counters
    for name in CHECKS:
        assert counters[f"guard.checked.{name}"] + counters[f"guard.skipped.{name}"] == made / BLOCK
        assert counters[f"guard.checked.{name}"] > 50
    assert counters["guard.verified"] + counters["guard.skipped"] == made / BLOCK


def test_what_one_check_cannot_use_goes_to_the_others() -> None:
    cheap, dear, full = Purse(0.1), Purse(10.0), Purse(0.0)
    share_out([cheap, dear, full], 0.3)
    assert [cheap.credit, dear.credit, full.credit] == pytest.approx([0.15, 0.15, 0.0])
    share_out([cheap, dear, full], 3.0)
    assert [cheap.credit, dear.credit, full.credit] == pytest.approx([0.2, 3.1, 0.0])
    assert (cheap.affords(), full.affords(), dear.affords()) == (True, True, False)
    share_out([cheap, dear, full], 100.0)
    assert dear.credit == 20.0, "no more than two of them"
    dear.pay(12.0)
    assert (dear.credit, dear.price) == (8.0, pytest.approx(10.6))


def test_a_suspicion_is_looked_at_closely_before_anything_is_done() -> None:
    """A first look that does not repeat itself raises the sampling rate and leaves the utterance alone."""
    looks: list[list[int]] = []

    def once(name: str, samples: Sequence[Any]) -> Measures:
        if name != "depth":
            return Measures()
        looks.append([sample.frame for sample in samples])
        bad = len(looks) == 2
        return Measures(looks[-1], {"logits of codebook 0": [20.0 if bad else 40.0] * len(samples)})

    checker = Checker(once)
    eye = watch(checker)
    for frame in range(4 * BLOCK):
        assert eye.look(one(frame), []) is None
    assert eye.metrics.counters["guard.suspicions"] == 1
    first, second, again, *more = looks
    assert len(first) == len(second) == 1
    assert again == list(range(max(0, second[0] - 2 * BLOCK + 1), second[0] + 1)), "every frame that was kept"
    assert [frames[0] for frames in more[:BLOCK]] == list(range(second[0] + 1, second[0] + 1 + BLOCK))


def bad_from(first: int) -> Callable[[str, Sequence[Any]], Measures]:
    """A depth check whose logits are too far off from a frame on."""

    def check(name: str, samples: Sequence[Any]) -> Measures:
        frames = [sample.frame for sample in samples]
        if name != "depth":
            return Measures()
        return Measures(frames, {"logits of codebook 0": [20.0 if frame >= first else 40.0 for frame in frames]})

    return check


def test_a_breach_begins_with_the_first_bad_frame() -> None:
    eye = watch(Checker(bad_from(21)))
    breach = next(filter(None, (eye.look(one(frame), []) for frame in range(100))), None)
    assert breach is not None
    assert (breach.first_bad, breach.kind, breach.suspect, breach.formats) == (21, "verification", "depth", False)
    assert "logits of codebook 0 at 20 dB, below the limit of 30" in breach.reason


@pytest.mark.parametrize("passed", [None, 9])
def test_what_can_no_longer_be_looked_at_is_made_again(monkeypatch: pytest.MonkeyPatch, passed: int | None) -> None:
    """Checks that were not affordable for long: every kept frame is bad, and so may be all since the last that passed."""

    eye = watch(Checker(bad_from(10)))
    frame = 0
    monkeypatch.setattr(eye.guard, "affords", lambda name: frame >= 60 or (passed is not None and frame < 10))
    monkeypatch.setattr(eye.guard, "draw", lambda: 5)
    for frame in range(100):  # affords() reads it
        breach = eye.look(one(frame), [])
        if breach is not None:
            break
    assert breach is not None
    assert frame == 69
    assert breach.first_bad == (0 if passed is None else 6), "frame 5 was the last to be verified"


def test_too_many_differing_tokens_are_a_breach() -> None:
    """No single frame is out of its limits, but one token in four comes out differently."""

    def often(name: str, samples: Sequence[Any]) -> Measures:
        frames = [sample.frame for sample in samples]
        if name != "depth":
            return Measures()
        return Measures(frames, differing={"codebook 0": (8 * len(frames), 32 * len(frames))})

    eye = watch(Checker(often))
    breach = next(filter(None, (eye.look(one(frame), []) for frame in range(1000))), None)
    assert breach is not None
    assert "differing tokens of codebook 0: 25.0% of them, healthy is 2.0%" in breach.reason


# ------------------------------------------------------------------------------------------------ rungs


class FakeSpec:
    codebooks = 8


class FakeEngine:
    def __init__(self, mode: str) -> None:
        self.mode, self.spec = mode, FakeSpec()


INT8_DEPTH = PrecisionPolicy((("depth.mlp", "int8"),))


@pytest.mark.parametrize(
    ("rung", "mode", "policy", "breach", "wanted"),
    [
        ("fast", "compile", INT8_DEPTH, {"suspect": "depth"}, "plain depth"),
        ("plain depth", "compile", INT8_DEPTH, {"suspect": "depth"}, "kept depth"),
        ("kept depth", "compile", INT8_DEPTH, {"suspect": "depth"}, "eager"),
        ("eager", "compile", INT8_DEPTH, {"suspect": "depth"}, "stock"),
        ("fast", "graph", INT8_DEPTH, {"suspect": "backbone"}, "plain backbone"),
        ("plain backbone", "graph", INT8_DEPTH, {"suspect": "backbone"}, "eager"),
        ("fast", "compile", INT8_DEPTH, {"suspect": "depth", "formats": True}, "kept depth"),
        ("fast", "eager", INT8_DEPTH, {"suspect": "depth"}, "kept depth"),
        ("fast", "eager", PrecisionPolicy(), {"suspect": "depth"}, "stock"),
        ("fast", "compile", PrecisionPolicy(), {}, "eager"),
        ("fast", "eager", INT8_DEPTH, {}, "eager"),
        ("fast", "eager", PrecisionPolicy((("kv", "bf16"),)), {"suspect": "backbone"}, "kept backbone"),
        ("fast", "compile", INT8_DEPTH, {"kind": "memory"}, "stock"),
    ],
)
def test_the_way_down(rung: str, mode: str, policy: PrecisionPolicy, breach: dict[str, Any], wanted: str) -> None:
    made = Breach(**{"reason": "r", "kind": "verification", "first_bad": 0, **breach})
    engine: Any = FakeEngine(mode)
    assert ladder.below(rung, made, engine, policy, dropped=False) == wanted


def test_the_way_down_without_the_stock_weights() -> None:
    breach, engine = Breach("r", "verification", 0, "depth"), FakeEngine("compile")
    rungs = ["fast"]
    while rungs[-1] != "stock":
        rungs.append(ladder.below(rungs[-1], breach, engine, INT8_DEPTH, dropped=True))  # type: ignore[arg-type]
    assert rungs == ["fast", "plain depth", "eager", "stock"]


# ------------------------------------------------------------------------------------------------ no false alarm


class Logits:
    """Stands in for the replay: the truth of the simulated frames."""

    def __init__(self) -> None:
        self.first, self.others = torch.zeros(0), torch.zeros(0)

    def first_logits(self, packed: Any, hidden: Tensor) -> Tensor:
        return self.first

    def depth_logits(self, packed: Any, hidden: Tensor, codes: Tensor) -> Tensor:
        return self.others


class Simulated:
    """Healthy frames: logits off by Gaussian noise whose level itself varies by 2 dB from frame to frame."""

    BOOKS, VOCAB, LEVEL = 12, 64, 0.02

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.replay = Logits()
        ones = torch.ones(1)
        self.params = SamplingParams(0.9 * ones, torch.full((1,), 20), 0.95 * ones, torch.ones(1, dtype=torch.bool))
        scene: Any = Scene(
            packed=None, stock=lambda: None, stock_logits=None, corrupted=list, keys=[], values=[], allowed=ones,
            prompt=0, first=0, position=ones, params=(self.params, self.params), seed=torch.zeros(1, dtype=torch.int64),
            utterance=torch.zeros(1, dtype=torch.int64),
        )  # type: ignore[arg-type]  # fmt: skip
        self.scene = scene
        self.ties: dict[str, float] = {}

    def level(self) -> float:
        return self.LEVEL * math.exp(0.25 * float(torch.randn((), generator=self.generator)))

    def frames(self, numbers: Sequence[int]) -> list[Sample]:
        """Made from the truth the replay is left with."""
        count, level = len(numbers), self.level()
        truth = 3.0 * torch.randn(count, self.BOOKS, self.VOCAB, generator=self.generator)
        ours = truth + level * torch.randn(truth.shape, generator=self.generator)
        self.replay.first, self.replay.others = truth[:, 0], truth[:, 1:]
        params = SamplingParams(*(value.expand(count) for value in self.params))
        zeros = torch.zeros(count, dtype=torch.int64)
        key = NoiseKey(zeros, zeros, torch.tensor(numbers))
        nothing = torch.full((count, self.BOOKS), -1)
        codes = redraw(ours, nothing, params, noise_of(key, 0, self.BOOKS, self.VOCAB), torch.zeros(self.BOOKS)).drawn
        alive = torch.ones(1, dtype=torch.bool)
        hidden = torch.zeros(1, 4)
        return [
            Sample(number, hidden, codes[i : i + 1], ours[i : i + 1, 0], ours[i : i + 1, 1:], alive)
            for i, number in enumerate(numbers)
        ]

    def __call__(self, name: str, samples: Sequence[Any], codes: Sequence[Tensor]) -> Measures:
        numbers = [sample.frame for sample in samples]
        if name == "depth":
            return Checks(self.replay, self.scene, self.ties).depth(self.frames(numbers))  # type: ignore[arg-type]
        if name == "copies":
            return Measures()
        # Everything else is a signal-to-noise ratio over many values: its level varies as the logits' does.
        ratio = -20 * math.log10(self.level())
        return Measures(numbers, {name: [ratio] * len(numbers)})

    def evidence(self, samples: Sequence[Any], codes: Sequence[Tensor]) -> dict[str, Tensor]:
        return {}

    def floors(self) -> Floors:
        """Calibrated as the runtime does it, on six frames."""
        samples = self.frames(range(6))
        depth = Checks(self.replay, self.scene).depth(samples, noises=16)  # type: ignore[arg-type]
        others = {name: [self(name, samples, [])] for name in CHECKS if name != "depth"}
        return floors_of({"depth": [depth], **others}, PRICES, policy="p", mode="m", dtype="d")


@pytest.mark.slow
def test_no_false_alarm_in_a_hundred_thousand_healthy_frames() -> None:
    """Suspicions may come up; that is what the second look is for. No utterance may be interrupted."""
    torch.set_num_threads(1)  # tensors this small spend their time waking the second one
    simulated = Simulated()
    guard = Guard(GuardConfig(budget=1e9), Metrics())
    made = simulated.floors()
    simulated.ties = made.ties
    guard.set_floors("fast", made)
    assert set(made.ties) == set(groups(Simulated.BOOKS))
    for utterance in range(200):
        eye = Watch(guard, "fast", simulated, guard._metrics)
        for frame in range(500):
            breach = eye.look(one(frame), [])
            assert breach is None, (utterance, frame, breach.reason)
    counters = guard._metrics.counters
    assert counters["guard.verified"] >= 100_000 // BLOCK
    assert counters["guard.suspicions"] <= 20


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["exact", "balanced", "fast", "smallest"])
def test_no_false_alarm_while_a_trained_model_speaks(precision: str, dtype: torch.dtype) -> None:
    """Real logits have what simulated ones have not: in bf16 a key may round the other way and cost 50 dB."""
    torch.set_num_threads(1)
    model = accelerate(
        trained().to(dtype), precision=precision, mode="eager", progress=False, guard=GuardConfig(budget=1e9)
    )
    sentences, frames = [ids for ids, _ in held_out_speech()], 0
    for seed in range(8):
        ids = sentences[seed % len(sentences)][None]
        frames += model.generate(
            ids, max_new_tokens=120, do_sample=True, depth_decoder_do_sample=True, temperature=0.9, seed=seed
        ).shape[1]
    counters = model.acceleration.metrics.counters
    assert model.acceleration.guard.rung == "fast", model.acceleration.guard.reason
    assert counters["guard.verified"] >= 15
    assert counters["guard.suspicions"] == 0


def test_the_simulation_is_not_blind() -> None:
    """The same frames with eight times the noise are found."""
    simulated = Simulated()
    made = simulated.floors()
    simulated.ties = made.ties
    guard = Guard(GuardConfig(budget=1e9), Metrics())
    guard.set_floors("fast", made)
    simulated.LEVEL *= 8  # type: ignore[misc]
    eye = Watch(guard, "fast", simulated, guard._metrics)
    assert any(eye.look(one(frame), []) is not None for frame in range(2 * BLOCK))


# ------------------------------------------------------------------------------------------------ events


def broken_model(**options: Any) -> Any:
    """One that went wrong once: a few rows of a gate projection at zero from frame 5 on."""
    from test_guard_faults import Gemv, address, generate

    model = accelerate(trained(), mode="eager", progress=False, guard=GuardConfig(budget=1e9, **options))
    gate = model.acceleration._engine.packed.depth.layers[1].gate.weight

    def spoil(frame: int, out: Tensor, weight: Any) -> Tensor:
        if frame >= 5 and address(weight) == address(gate):
            out[:, 8:24] = 0.0
        return out

    Gemv(model, spoil)
    generate(model)
    return model


def test_an_event_can_be_run_again_elsewhere(tmp_path: Path) -> None:
    """From disk, in another process's model: the same frames fail by the same figures, and healthy ones do not."""
    model = broken_model(events_dir=tmp_path)
    (event,) = model.acceleration.guard.events
    (saved,) = load_events(tmp_path)
    assert {name: t.shape for name, t in saved.tensors.items()} == {name: t.shape for name, t in event.tensors.items()}
    assert saved.to_dict() == event.to_dict()
    other = accelerate(trained(), mode="eager", progress=False).acceleration
    again = other.replay(saved)
    wanted = {(f["measure"], f["frame"]): f["value"] for f in event.findings}
    found = {(f.measure, f.frame): f.value for f in again}
    assert wanted.keys() <= found.keys()
    assert all(found[key] == pytest.approx(value, rel=1e-3) for key, value in wanted.items())
    assert min(frame for _, frame in found) == event.frame == 5
    healthy = GuardEvent(
        **{
            **vars(saved),
            "tensors": {
                k: v[:5] if k in ("hidden", "codes", "first_logits", "logits", "alive", "frame") else v
                for k, v in saved.tensors.items()
            },
        }
    )
    assert other.replay(healthy) == []


def test_the_command_line_reports_and_runs_them_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (event,) = broken_model(events_dir=tmp_path).acceleration.guard.events
    assert main(["guard-report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for word in (": 1\n", event.id, "verification at frame 5", "'fast' to 'stock'", "below the limit"):
        assert word in said
    assert "again:" not in said
    assert (
        main(["guard-report", str(tmp_path), "--json", "--model", str(TRAINED), "--dtype", "float32", "--quiet"]) == 0
    )
    (data,) = json.loads(capsys.readouterr().out)
    assert data["id"] == event.id
    assert any("logits of codebooks 1 to 7" in line for line in data["again"])
    assert main(["guard-report", str(tmp_path), "--model", "small", "--quiet"]) == 0
    assert "not run again: event" in capsys.readouterr().out
    assert main(["guard-report", str(tmp_path / "none")]) == 2


def test_events_that_cannot_be_run_again(tmp_path: Path) -> None:
    model = broken_model()
    (event,) = model.acceleration.guard.events
    with pytest.raises(ValueError, match="8 codebooks and a hidden size of 128, the model 4 and 32"):
        accelerate(build(), mode="eager", progress=False).acceleration.replay(event)
    bare = GuardEvent(**{**vars(event), "tensors": {}})
    with pytest.raises(ValueError, match="kept no frames"):
        model.acceleration.replay(bare)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_events(tmp_path / "none")
    path = event.save(tmp_path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(ValueError, match="version 7"):
        GuardEvent.load(path)
    path.write_text("not json")
    with pytest.raises(ValueError, match="no incident"):
        GuardEvent.load(path)


def test_an_event_is_run_again_by_the_limits_of_its_own_rung() -> None:
    """Under int8 the stock weights' frames are not those of the packed ones: an incident on ``eager`` is judged as such."""
    from test_guard_faults import breaking, generate

    model = accelerate(trained(), mode="eager", precision="fast", progress=False, guard=GuardConfig(budget=1e9))
    breaking(model, lambda: RuntimeError("injected"))
    generate(model)
    handle = model.acceleration
    seat = handle._seat("eager", 1)
    (fast,) = handle.guard.events
    assert handle.replay(fast) == []
    emit = seat.engine.emit

    def broken(runner: Any) -> None:
        if int(runner.state.frame[0]) == 9:
            raise RuntimeError("again")
        emit(runner)

    seat.engine.emit = broken
    generate(model)
    event = handle.guard.events[-1]
    assert (event.rung, event.next_rung) == ("eager", "stock")
    assert handle.replay(event) == []
    other = accelerate(trained(), mode="eager", progress=False).acceleration
    with pytest.raises(ValueError, match="'fast', this model has 'stock'"):
        other.replay(event)


def test_replaying_moves_no_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    from csm_runtime import ladder

    model = broken_model()
    guard = model.acceleration.guard
    (event,) = guard.events
    rung = guard.rung
    guard.forget_floors()

    def unsound(*args: Any) -> Any:
        raise ArithmeticError("far off")

    monkeypatch.setattr(ladder, "calibrate", unsound)
    guard.fallback = "forbid"
    with pytest.raises(ValueError, match="no limits for rung 'fast'.*far off"):
        model.acceleration.replay(event)
    assert (guard.rung, len(guard.events)) == (rung, 1)


def test_a_check_that_cannot_be_run_again_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = broken_model()
    (event,) = model.acceleration.guard.events
    bare = {name: t for name, t in event.tensors.items() if name not in ("keys", "values", "allowed", "made")}
    finding = {"check": "backbone", "measure": "keys", "frame": 6, "value": 1.0, "limit": 60.0}
    about = GuardEvent(**{**vars(event), "tensors": bare, "findings": [finding]})
    with pytest.raises(ValueError, match="too large to be kept"):
        model.acceleration.replay(about)


def test_differing_tokens_are_counted_again() -> None:
    model = broken_model()
    (event,) = model.acceleration.guard.events
    what = "differing tokens of codebooks 1 to 7"
    finding = {"check": "depth", "measure": what, "frame": 5, "value": 0.5, "limit": 0.01}
    floors = model.acceleration.guard.floors["fast"]
    floors.least.clear()
    floors.most.clear()
    codes = event.tensors["codes"].clone()
    codes[..., 3] = (codes[..., 3] + 1) % 32
    other = {**vars(event), "tensors": {**event.tensors, "codes": codes}}
    assert model.acceleration.replay(GuardEvent(**{**other, "findings": []})) == []
    (again,) = model.acceleration.replay(GuardEvent(**{**other, "findings": [finding]}))
    assert again.measure == what
    assert again.value > again.limit


def test_figures_that_json_does_not_know(tmp_path: Path) -> None:
    finding = {"check": "depth", "measure": "m", "frame": 0, "value": float("-inf"), "limit": float("nan")}
    event = GuardEvent("frame", "r", 0, "fast", "eager", None, "eager", "p", "float32", "cpu", 1, findings=[finding])
    text = event.save(tmp_path).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (saved,) = load_events(tmp_path)
    assert (saved.findings[0]["value"], saved.findings[0]["limit"]) == ("-inf", "nan")


def test_events_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csm_runtime.guard._MOST_EVENT_BYTES", 1000)
    guard = Guard(GuardConfig(events=8), Metrics())
    for number in range(4):
        tensors = {"hidden": torch.zeros(100)}
        event = GuardEvent(
            "exception", str(number), 0, "fast", "eager", None, "eager", "p", "float32", "cpu", 1, tensors=tensors
        )
        guard.step_down(Breach(str(number), "exception", 0), "eager", event)
    assert [bool(event.tensors) for event in guard.events] == [False, False, True, True]
    monkeypatch.setattr("csm_runtime.guard._MOST_EVENT_BYTES", 10)
    guard.step_down(Breach("5", "exception", 0), "eager", event)
    assert [bool(event.tensors) for event in guard.events] == [False] * 4 + [True], "the latest keeps its own"


def test_codebook_0_is_drawn_often_enough_to_be_strict() -> None:
    """Its healthy rate rests on as many tokens as the next group's: 5 times a rate of 1 in 24 would find nothing."""
    model = accelerate(build("eight_codebooks"), mode="eager", progress=False)
    rates = model.acceleration.guard.floors["fast"].rates
    assert rates["codebook 0"] <= 1.2 * rates["codebooks 1 to 7"] < 0.02


def test_a_folder_that_cannot_be_written_costs_no_audio(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = broken_model(events_dir=tmp_path / "file")
    assert len(model.acceleration.guard.events) == 1
    assert any("could not be written" in what for what in model.acceleration.metrics.faults)


def test_only_so_many_events_are_kept() -> None:
    guard = Guard(GuardConfig(events=3), Metrics())
    for number in range(5):
        event = GuardEvent("exception", str(number), 0, "fast", "eager", None, "eager", "p", "float32", "cpu", 1)
        guard.step_down(Breach(str(number), "exception", 0), "eager", event)
    assert [event.reason for event in guard.events] == ["2", "3", "4"]
    assert guard._metrics.counters["guard.breaches"] == 5
    assert guard._metrics.counters["guard.rung.eager"] == 1, "the rung changed once"
