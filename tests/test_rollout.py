"""Optimisations one at a time: each can be left out, each is judged by itself, and what is wrong or slow is rolled back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from csm_models import build, held_out_speech, stock, trained
from torch import Tensor

from csm_runtime import PrecisionPolicy, accelerate, checkpoints, cli, optimisations, rollout, sides, tuning
from csm_runtime.accelerate import Acceleration
from csm_runtime.calibration import Calibration, Thresholds
from csm_runtime.codec import CodecPath
from csm_runtime.engine import Engine
from csm_runtime.optimisations import COMPILED, NATIVE, STATIC
from csm_runtime.rollout import Limits, Outcome, Rollout, verify
from csm_runtime.small_model import SmallProcessor, build_small_csm

ANY_SPEED = Limits(min_speed=0.0)
PLAIN = {"mode": "eager", "guard": False, "progress": False}
INT8 = PrecisionPolicy((("depth.mlp", "int8"), ("depth.head", "int8")), "two zones")


def speech(count: int = 2, frames: int = 12) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids[None], "codes": codes[:frames]} for ids, codes in held_out_speech()[1 : 1 + count]]


def walked(model: Any, **options: Any) -> Rollout:
    options = {"limits": ANY_SPEED, "repeats": 1, "skip": [COMPILED, NATIVE], "policy": INT8, **options}
    return verify(model, speech(), progress=False, **options)


def by_name(result: Rollout) -> dict[str, Outcome]:
    return {one.name: one for one in result.outcomes}


# -------------------------------------------------------------------------------------------------------- switches


def long_model() -> Any:
    return build("eight_codebooks", backbone={"max_position_embeddings": 1100})


def steps_of(model: Any) -> set[str]:
    handle = model.acceleration
    runner = handle._engine.runner(1)
    found = {"paired positions"} if runner.depth_pair is not None else set()
    found |= {"context trimming"} if len(runner.windows) > 1 else set()
    return found | ({"compiled prefill"} if handle._passes.compiled else set())


def test_eager_steps_without_pairs() -> None:
    model = accelerate(build("eight_codebooks"), **PLAIN)
    assert steps_of(model) == {"paired positions"}
    ids = torch.arange(5)[None]
    how = {"do_sample": False, "depth_decoder_do_sample": False, "max_new_tokens": 6}
    wanted = stock(model, ids, **how)
    assert torch.equal(model.generate(ids, **how), wanted)
    model = accelerate(model, **PLAIN, without=("paired positions",))
    assert steps_of(model) == set() and model.acceleration.without == {"paired positions"}
    assert torch.equal(model.generate(ids, **how), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["compiled prefill", "context trimming", "paired positions", None])
def test_compiled_steps_without_each(left_out: str | None) -> None:
    without = () if left_out is None else (left_out,)
    model = accelerate(long_model(), mode="compile", guard=False, progress=False, without=without)
    assert model.acceleration.mode == "compile", model.acceleration.notes
    assert steps_of(model) == {"compiled prefill", "context trimming", "paired positions"} - set(without)


def test_huge_pages_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("csm_runtime.hugepages.collapse", lambda tensors: asked.append(1) or 7)
    assert accelerate(build(), **PLAIN).acceleration.report().huge_page_bytes == 7
    assert accelerate(build(), **PLAIN, without=["huge pages"]).acceleration.report().huge_page_bytes == 0
    assert len(asked) == 1


@pytest.mark.parametrize("without", ["huge pages", ("huge pages", "guard"), 3])
def test_without_what_cannot_be_left_out(without: Any) -> None:
    model = build()
    with pytest.raises(ValueError, match=r"without must be a sequence of names from \('compiled prefill'"):
        accelerate(model, **PLAIN, without=without)
    assert "acceleration" not in model.__dict__


# ------------------------------------------------------------------------------------------------------------ walk


def test_every_step_alone_is_kept_and_the_options_are_those_of_all() -> None:
    model = trained()
    result = walked(model)
    outcomes = by_name(result)
    kept = [name for name, one in outcomes.items() if one.kept]
    assert kept == [STATIC, "paired positions", "codec batching", "depth.mlp in int8", "depth.head in int8"]
    assert result.failed == [] and result.together is not None and result.together.kept
    assert "acceleration" not in model.__dict__ and "generate" not in model.__dict__
    assert result.options is not None
    again = accelerate(model, **result.options, guard=False, progress=False)
    assert again.acceleration.mode == "eager" and steps_of(again) == {"paired positions"}
    assert (
        again.acceleration.policy.format_of("depth.mlp")
        == again.acceleration.policy.format_of("depth.head.3")
        == "int8"
    )
    assert again.acceleration.policy.format_of("depth.attention") == "keep"
    # Only formats cost anything, and each adds to what came before it.
    exact = outcomes["paired positions"].after
    assert exact is not None and all(figures.kl_nats < 1e-9 and figures.top1 == 1 for figures in exact.values())
    first, second = (outcomes[f"depth.{zone} in int8"] for zone in ("mlp", "head"))
    assert first.before == exact and second.before == first.after
    assert second.after["codebooks 1 to 7"].kl_nats > first.after["codebooks 1 to 7"].kl_nats > 1e-8
    assert second.after["codebook 0"].kl_nats < 1e-9
    assert all(one.ms_before > 0 and one.ms_after > 0 for one in outcomes.values() if one.kept)


def test_steps_that_do_not_apply_say_why() -> None:
    outcomes = by_name(walked(trained()))
    reasons = {name: one.reason for name, one in outcomes.items() if not one.kept}
    assert reasons["graph"] == reasons["fused depth"] == "CUDA only, and the model is on cpu"
    assert reasons[COMPILED] == "left out by request"
    for name in ("compiled prefill", "context trimming"):
        assert reasons[name] == "means nothing without 'compiled step', which was not kept"
    assert "no huge pages" in reasons["huge pages"]
    assert not any(outcomes[name].failed for name in reasons)


def test_the_decode_steps_themselves_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair step that draws codebook 1 from wrong logits is rolled back, and the steps after it are kept without it."""
    pair = Engine.depth_pair

    def wrong(self: Engine, runner: Any, token: Tensor) -> tuple[Tensor, Tensor]:
        token, logits = pair(self, runner, token)
        return token, logits.roll(1, -1)

    monkeypatch.setattr(Engine, "depth_pair", wrong)
    monkeypatch.setattr(Engine, "self_test", lambda *args: None)
    result = walked(trained())
    outcomes = by_name(result)
    bad = outcomes["paired positions"]
    assert not bad.kept and not bad.failed and "codebooks 1 to 7" in bad.reason
    assert outcomes["depth.head in int8"].kept
    assert result.options is not None and "paired positions" in result.options["without"]
    assert result.together is not None and result.together.kept


def test_a_small_error_that_the_thresholds_would_bear_is_none_of_an_exact_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = Engine.depth_pair

    def slightly_off(self: Engine, runner: Any, token: Tensor) -> tuple[Tensor, Tensor]:
        token, logits = pair(self, runner, token)
        return token, logits * 1.1

    monkeypatch.setattr(Engine, "depth_pair", slightly_off)
    monkeypatch.setattr(Engine, "self_test", lambda *args: None)
    reason = by_name(walked(trained(), skip=[COMPILED, NATIVE]))["paired positions"].reason
    assert "nats to the KL of codebooks 1 to 7, the limit 0.0001" in reason and ";" not in reason


def test_a_backbone_that_drifts_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is fed the stock model's frames, so what it makes of them is compared, not what it would have said."""
    advance = Engine.advance

    def drifting(self: Engine, runner: Any) -> None:
        advance(self, runner)
        runner.state.hidden.mul_(1.3)

    monkeypatch.setattr(Engine, "advance", drifting)
    result = walked(trained())
    assert not by_name(result)[STATIC].kept and "codebook 0" in by_name(result)[STATIC].reason
    assert result.options is None and result.together is None
    assert by_name(result)["paired positions"].reason == "means nothing without 'static buffers', which was not kept"


def test_what_is_slower_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(self: Any, timed: str, number: int) -> list[float]:
        return [2.0 if self.handle.policy.format_of("depth.mlp") == "int8" else 1.0]

    monkeypatch.setattr(rollout.Accelerated, "times", times)
    monkeypatch.setattr(rollout.Stock, "times", lambda self, timed, number: [1.5])
    result = walked(trained(), limits=Limits())
    outcomes = by_name(result)
    assert outcomes["depth.mlp in int8"].reason == "0.50 times as fast as before, the limit 0.98"
    assert outcomes["depth.mlp in int8"].speed == 0.5
    assert outcomes["depth.head in int8"].kept and result.options is not None
    assert result.options["precision"].rules == (("depth.head", "int8"),)
    assert result.together is not None and result.together.speed == 1.5


def test_a_machine_that_slows_down_is_no_fault_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run takes a third longer than the one before it, and the sides take turns at being first."""
    now = [1.0]

    def times(self: Any, timed: str, number: int) -> list[float]:
        now[0] *= 4 / 3
        return [now[0]]

    monkeypatch.setattr(rollout.Accelerated, "times", times)
    monkeypatch.setattr(rollout.Stock, "times", times)
    one = by_name(walked(trained()))["depth.mlp in int8"]
    assert one.speed == pytest.approx((3 / 4 + 4 / 3) / 2)


def test_what_is_slower_than_stock_altogether_is_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static buffers are what the others stand on, so they may be slow, but not all of it together."""
    monkeypatch.setattr(rollout.Accelerated, "times", lambda self, timed, number: [1.0])
    monkeypatch.setattr(rollout.Stock, "times", lambda self, timed, number: [0.5])
    result = walked(trained(), limits=Limits())
    assert by_name(result)[STATIC].kept and by_name(result)[STATIC].speed == 0.5
    assert result.together is not None and not result.together.kept and result.options is None


def test_a_zone_that_costs_too_much_is_rolled_back() -> None:
    policy = PrecisionPolicy((("backbone.mlp", "int4"), ("depth.mlp", "int8")), "mixed")
    result = walked(trained(), policy=policy, limits=Limits(Thresholds(max_kl0=1e-4), min_speed=0))
    outcomes = by_name(result)
    assert "KL of codebook 0 is" in outcomes["backbone.mlp in int4"].reason
    assert outcomes["depth.mlp in int8"].kept
    assert outcomes["depth.mlp in int8"].before == outcomes["paired positions"].after


def test_a_step_that_raises_is_rolled_back_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sides.accelerate

    def failing(model: Any, **options: Any) -> Any:
        if "paired positions" not in options["without"]:
            raise RuntimeError("no such\nluck")
        return real(model, **options)

    monkeypatch.setattr(sides, "accelerate", failing)
    result = walked(trained())
    one = by_name(result)["paired positions"]
    assert one.failed and not one.kept and one.reason == "RuntimeError: no such luck"
    assert result.failed == ["paired positions"]
    assert by_name(result)["depth.head in int8"].kept


def test_a_mode_that_falls_back_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate() goes on eagerly where nothing can be compiled; the rollout does not take that for the compiled step."""

    def broken(*args: Any) -> Any:
        raise OSError("no compiler")

    monkeypatch.setattr("csm_runtime.compiling.CompiledStep.__call__", broken)
    outcome = by_name(walked(trained(), skip=()))[COMPILED]
    assert not outcome.kept and not outcome.failed and "no compiler" in outcome.reason


def test_one_prompt_with_a_short_answer_is_no_fault_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock model says one frame to the second prompt: there is no later frame to be timed."""
    real, short = sides.measuring.speak, speech()[1]["input_ids"]

    def speak(model: Any, row: Any, frames: int, *args: Any) -> Tensor:
        return real(model, row, 1 if torch.equal(row["input_ids"], short) else frames, *args)

    monkeypatch.setattr(sides.measuring, "speak", speak)
    prompts = [{"input_ids": one["input_ids"]} for one in speech()]
    options = {"policy": "exact", "limits": ANY_SPEED, "repeats": 1, "skip": [COMPILED, NATIVE], "progress": False}
    result = verify(trained(), Calibration(prompts, frames=4), **options)
    assert result.frames == 5 and by_name(result)[STATIC].kept and by_name(result)["codec batching"].kept
    assert result.together is not None and result.together.kept
    # With codes of its own it is fed more, and the stock model is timed on what it says.
    given = verify(trained(), Calibration([prompts[0], {**speech()[1]}], frames=4), **options)
    assert given.frames == 16 and by_name(given)[STATIC].kept
    with pytest.raises(ValueError, match="answer to every prompt is one frame"):
        verify(trained(), Calibration(prompts[1:], frames=4), **options)


def test_a_last_measurement_that_raises_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(rollout._Walk, "_side", broken)
    result = walked(
        trained(), policy="exact", skip=[COMPILED, NATIVE, "paired positions", "huge pages", "codec batching"]
    )
    assert by_name(result)[STATIC].kept and result.options is None
    together = result.together
    assert together is not None and together.failed and together.reason == "RuntimeError: out of memory"
    assert result.failed == [together.name]
    assert rollout.rows(result)[-1][-1] == "failed: RuntimeError: out of memory"
    rollout.show(result)
    result.save(tmp_path / "rollout.json")
    assert json.loads((tmp_path / "rollout.json").read_text())["together"]["failed"]


SOME_ZONES = PrecisionPolicy((
    ("backbone.head", "int8"),
    ("codec", "bf16"),
    ("depth.head.1-3,7", "int8"),
    ("depth.head.5", "fp32"),
    ("depth.mlp", "int8"),
    ("depth.embedding", "keep"),
))  # fmt: skip


def test_every_zone_that_is_not_kept_is_a_step() -> None:
    walk = optimisations.steps(SOME_ZONES, 8)
    zones = {step.name: step for step in walk if step.lowers}
    assert list(zones) == [
        "backbone.head in int8",
        "depth.mlp in int8",
        "depth.head.1-3,7 in int8",
        "depth.head.5 in fp32",
        "codec in bf16",
    ]
    assert zones["codec in bf16"].timed == "sound"
    options = optimisations.base_options()
    for step in zones.values():
        options = step.change(options)
    got, wanted = options["precision"], SOME_ZONES
    for zone in [*tuning.zones_of(8)]:
        assert got.format_of(zone) == wanted.format_of(zone)
    with pytest.raises(ValueError, match="whose depth decoder has heads"):
        optimisations.steps(PrecisionPolicy((("depth.head.9", "int8"),)), 8)


def test_safe_zones_that_are_named_and_banks_of_heads_are_walked() -> None:
    loose = Limits(min_speed=0.0, min_sound_db=10.0)
    skip = [COMPILED, NATIVE, "paired positions", "codec batching", "huge pages"]
    result = walked(trained(), policy=SOME_ZONES, skip=skip, limits=loose)
    outcomes = by_name(result)
    assert result.failed == [] and result.options is not None
    for name in ("backbone.head in int8", "depth.head.1-3,7 in int8", "depth.mlp in int8", "codec in bf16"):
        assert outcomes[name].kept, outcomes[name].reason
    assert outcomes["depth.head.5 in fp32"].kept
    assert 10 < outcomes["codec in bf16"].sound_db < 60
    assert outcomes["backbone.head in int8"].after["codebook 0"].kl_nats > 1e-9
    assert result.options["precision"].rules == tuple(
        (name.partition(" in ")[0], name.partition(" in ")[2]) for name in outcomes if " in " in name
    )


def test_a_codec_is_judged_by_its_sound_and_not_by_that_of_the_stock_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, skip = (
        PrecisionPolicy((("codec", "bf16"),)),
        [COMPILED, NATIVE, "paired positions", "codec batching", "huge pages"],
    )
    strict = by_name(walked(trained(), policy=policy, skip=skip))["codec in bf16"]
    assert not strict.kept and "dB from that before, the limit 60" in strict.reason
    same = by_name(walked(trained(), policy=PrecisionPolicy((("codec", "fp32"),)), skip=skip))["codec in fp32"]
    assert not same.kept and same.reason == "the codec is in fp32 already"

    def broken(self: CodecPath) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(CodecPath, "_refreshed", broken)
    fallen = by_name(walked(trained(), policy=policy, skip=skip))["codec in bf16"]
    assert not fallen.kept and not fallen.failed and "the stock codec took over" in fallen.reason
    assert "no room" in fallen.reason


def test_alone_each_step_is_measured_against_the_bare_engine() -> None:
    result = walked(trained(), alone=True)
    outcomes = by_name(result)
    bare = outcomes[STATIC].after
    for name in ("paired positions", "depth.mlp in int8", "depth.head in int8"):
        assert outcomes[name].kept and outcomes[name].before == bare
    assert result.options is not None and "paired positions" not in result.options["without"]
    assert dict(result.options["precision"].rules) == {"depth.mlp": "int8", "depth.head": "int8"}
    assert result.together is not None
    alone = [outcomes[f"depth.{zone} in int8"].after["codebooks 1 to 7"].kl_nats for zone in ("mlp", "head")]
    assert result.together.after["codebooks 1 to 7"].kl_nats > max(alone)


@pytest.mark.parametrize("gain", [1.0, 1.01])
def test_a_codec_that_decodes_rows_together(monkeypatch: pytest.MonkeyPatch, gain: float, tmp_path: Path) -> None:
    """Its sound is compared with the row-by-row loop's; the frames are none of its business."""

    def sound(self: Any, sequences: Tensor) -> list[Tensor]:
        made = stock_sound(self, sequences)
        return [wave * gain if self.codec_batch_frames else wave for wave in made]

    def together(self: CodecPath, rows: list[Tensor]) -> list[Tensor] | None:
        calls.append(len(rows))
        return stock_fast(self, rows)

    stock_sound, stock_fast, calls = Acceleration._sound, CodecPath._fast, list[int]()
    monkeypatch.setattr(Acceleration, "_sound", sound)
    monkeypatch.setattr(CodecPath, "_fast", together)
    result = walked(trained(), policy="exact")
    one = by_name(result)["codec batching"]
    assert one.timed == "sound" and one.ms_before > 0 and one.ms_after > 0
    assert calls and min(calls) > 1, "rows were decoded together"
    if gain == 1.0:
        assert one.kept and one.sound_db > 80
        result.save(tmp_path / "rollout.json")
        assert rollout.load_options(tmp_path / "rollout.json") == result.options
        assert result.options["codec_batch_frames"] == 40
    else:
        assert not one.kept and one.reason == "its sound is 40.0 dB from that before, the limit 60"


def test_frames_are_the_stock_models_own_where_none_are_given() -> None:
    model = build("eight_codebooks")
    result = verify(
        model,
        Calibration(frames=5),
        policy="exact",
        limits=ANY_SPEED,
        repeats=1,
        skip=[COMPILED, NATIVE],
        progress=False,
    )
    assert result.frames == 10 and result.together is not None and result.together.kept


def test_a_model_in_bf16_is_held_against_its_own_weights_in_fp32() -> None:
    result = walked(trained().bfloat16(), policy="exact")
    ours, theirs = by_name(result)[STATIC].after, by_name(result)[STATIC].before
    assert by_name(result)[STATIC].kept
    assert 0 < ours["codebook 0"].kl_nats < theirs["codebook 0"].kl_nats, "the stock modules round at every step"


@pytest.mark.slow
def test_compiled_steps_in_the_walk() -> None:
    result = verify(long_model(), Calibration(frames=6), policy="exact", limits=ANY_SPEED, repeats=1, progress=False)
    outcomes = by_name(result)
    kept = {name for name, one in outcomes.items() if one.kept}
    assert kept - {"codec batching"} == {
        STATIC,
        COMPILED,
        "compiled prefill",
        "paired positions",
        "context trimming",
        "native kernels",
    }
    assert outcomes["compiled prefill"].timed == "prompt"
    assert result.options is not None and result.options["mode"] == "native"


# ------------------------------------------------------------------------------------------------- arguments, files


DAMAGE: list[tuple[Callable[[Any], Any], str]] = [
    (lambda data: data.update(options={}), "options must be mode, precision, without"),
    (lambda data: data.update(options=5), "options must be mode, precision, without"),
    (lambda data: data["options"].update(guard=False), "options must be mode, precision, without"),
    (lambda data: data["options"].update(without="abc"), "without must be a list of names"),
    (lambda data: data["options"].update(without=["abc"]), "without must be a list of names"),
    (lambda data: data["options"].update(mode=["eager"]), "mode must be one of"),
    (lambda data: data["options"].update(codec_batch_frames=True), "codec_batch_frames must be an integer"),
    (lambda data: data["options"].update(precision="fast"), "a precision policy must have the fields"),
    (lambda data: data.update(more=1), "a rollout must have the fields"),
    (lambda data: data.pop("steps"), "a rollout must have the fields"),
    (lambda data: data.update(schema=True), "not a rollout of schema 1"),
    (lambda data: data.update(options=None), "nothing was kept"),
]


def test_the_record_is_plain_data_and_its_options_come_back(tmp_path: Path) -> None:
    result = walked(trained())
    result.save(tmp_path / "deep" / "rollout.json")
    data = json.loads((tmp_path / "deep" / "rollout.json").read_text(), parse_constant=pytest.fail)
    assert [one["name"] for one in data["steps"]] == [one.name for one in result.outcomes]
    assert data["machine"]["torch_threads"] and data["versions"]["torch"] == torch.__version__
    assert data["limits"]["min_speed"] == 0 and data["limits"]["fidelity"]["max_kl0"] == 1e-3
    pair = next(one for one in data["steps"] if one["name"] == "paired positions")
    assert pair["kept"] and pair["speed"] > 0 and pair["after"]["codebook 0"]["top1"] == 1
    assert rollout.load_options(tmp_path / "deep" / "rollout.json") == result.options
    for change, words in DAMAGE:
        text = json.loads((tmp_path / "deep" / "rollout.json").read_text())
        change(text)
        (tmp_path / "damaged.json").write_text(json.dumps(text))
        with pytest.raises(ValueError, match=f"damaged.json: .*{words}"):
            rollout.load_options(tmp_path / "damaged.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json: not a rollout"):
        rollout.load_options(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"skip": ["graphs"]}, "no step is called 'graphs'"),
        ({"repeats": 0}, "repeats must be"),
        ({"policy": "tiny"}, "precision must be one of"),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        walked(trained(), **options)
    with pytest.raises(ValueError, match="got an empty list; None takes made-up text"):
        verify(trained(), [], progress=False)


def test_limits_from_text() -> None:
    got = Limits.parse(["max_kl0=0.5,min_speed=0.9", "min_sound_db=30"])
    assert got == Limits(Thresholds(max_kl0=0.5), min_speed=0.9, min_sound_db=30.0)
    assert Limits.parse([]) == Limits()
    for text in ("min_speed=fast", "speed=1", "min_speed", "max_kl_added=-1", "max_kl=inf", "min_speed=inf"):
        with pytest.raises(ValueError, match="limits|thresholds"):
            Limits.parse([text])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    def load(name: str, **options: Any) -> tuple[Any, Any]:
        model = build_small_csm(0, layers=1, hidden=256, depth_layers=1, depth_hidden=64, codebooks=4, positions=128)
        return model, SmallProcessor(model)

    monkeypatch.setattr(checkpoints, "load", load)
    return lambda: load("small")[0]


def run(*options: str) -> int:
    common = ["verify", "--quiet", "--frames", "4", "--repeats", "1", "--skip", COMPILED, "--skip", NATIVE]
    return cli.main([*common, *options])


def test_the_command(small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("One.\n\nTwo, and three.\n")
    PrecisionPolicy((("depth.mlp", "int8"),), "mine").save(tmp_path / "policy.json")
    files = ["--prompts", str(tmp_path / "prompts.txt"), "--policy", str(tmp_path / "policy.json")]
    loose = ["--thresholds", "min_speed=0,max_kl=1", "--thresholds", "min_near=0,min_top1=0,min_top1_0=0"]
    assert run(*files, *loose, "--json", str(tmp_path / "out.json")) == cli.OK
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "static buffers",
        "paired positions",
        "depth.mlp in int8",
        "CUDA only",
        "accelerate(model, mode='eager'",
    ):
        assert words in printed
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["frames"] == 8 and data["limits"]["fidelity"]["max_kl"] == 1
    options = rollout.load_options(tmp_path / "out.json")
    assert options["precision"].rules == (("depth.mlp", "int8"),)
    accelerate(small(), **options, guard=False, progress=False)


def test_the_command_says_when_a_step_failed(
    small: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sides, "accelerate", lambda *args, **options: 1 / 0)
    assert run("--policy", "exact") == cli.FAILED
    printed = " ".join(capsys.readouterr().out.split())
    assert "failed: ZeroDivisionError" in printed and "nothing was kept" in printed


def test_bad_input_to_the_command(small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    assert run("--prompts", str(tmp_path / "empty.txt")) == cli.BAD_INPUT
    assert run("--policy", str(tmp_path / "none.json")) == cli.BAD_INPUT
    assert run("--thresholds", "max_kl=little") == cli.BAD_INPUT
    assert "max_kl must be a number" in capsys.readouterr().err


def test_a_tuned_policy_is_a_policy_to_the_command(tmp_path: Path) -> None:
    result = tuning.tune(trained(), Calibration(speech()), progress=False)
    result.save(tmp_path / "auto.json")
    assert tuning.load_policy(tmp_path / "auto.json") == result.policy


def test_precision_auto_on_the_command_line(small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("soundfile")
    out = tmp_path / "out.wav"
    options = ["generate", "--text", "Hi.", "--precision", "auto", "--max-frames", "3", "--quiet", "--out", str(out)]
    seen = []
    real = cli.accelerate

    def eager(model: Any, **options: Any) -> Any:
        seen.append(real(model, **options, mode="eager"))
        return seen[0]

    patched = pytest.MonkeyPatch()
    patched.setattr(cli, "accelerate", eager)
    try:
        assert cli.main(options) == cli.OK
    finally:
        patched.undo()
    assert seen[0].acceleration.policy.name == "auto" and out.is_file()
    assert "precision 'auto' reads" in str(seen[0].acceleration.report())
