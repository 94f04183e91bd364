"""precision="auto": the thresholds hold, what is harmless stays lowered, and an interruption costs nothing twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from csm_models import audio_prompt, build, code_prompt, held_out_speech, teacher_forced, text_prompt, trained
from torch import Tensor, nn

from csm_runtime import PrecisionPolicy, accelerate, tuning
from csm_runtime.adapters import hf
from csm_runtime.calibration import Calibration, Reference, Thresholds, compare, passage_of, rows_of
from csm_runtime.precision import PRESETS
from csm_runtime.tuning import TunedPolicy, tune
from csm_runtime.weights import PackedWeights

FREE = Thresholds(max_kl0=1e9, max_kl=1e9, min_top1_0=0, min_top1=0, min_near=0)
"""Anything goes: only what a test replaces counts."""


def speech(count: int = 3) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids[None], "codes": codes} for ids, codes in held_out_speech()[1 : 1 + count]]


def tuned(model: Any, thresholds: Thresholds, **options: Any) -> TunedPolicy:
    return tune(model, Calibration(speech(), thresholds=thresholds, **options), progress=False)


def spoil(norm: nn.Parameter, *readers: nn.Parameter) -> None:
    """The same function, but an outlier in every row of the matrices that read the norm: rounding destroys the rest."""
    with torch.no_grad():
        norm[0] /= 1000
        for weight in readers:
            weight[:, 0] *= 1000


# ------------------------------------------------------------------------------------------------------- the reference


def test_the_reference_is_the_stock_model() -> None:
    model, rows = trained(), speech()
    reference = Reference(model, [passage_of(model, row) for row in rows])
    at = 0
    for row in rows:
        prompt = {"input_ids": row["input_ids"], "attention_mask": torch.ones_like(row["input_ids"])}
        hidden, first, rest = teacher_forced(model, prompt, row["codes"][None])
        part = slice(at, at := at + len(row["codes"]))
        for ours, theirs in ((reference.hidden, hidden), (reference.first, first), (reference.rest, rest)):
            assert (ours[part] - theirs[0]).abs().max() < 1e-4 * theirs.abs().max()
    assert at == len(reference.codes)


def test_rows_of_a_padded_batch_with_sound_are_what_they_are_alone() -> None:
    model = build()
    batch = audio_prompt(model, [[4000, 1920], []])
    codes = code_prompt(model, 2, 5)
    rows = rows_of([{**batch, "codes": codes}])
    reference = Reference(model, [passage_of(model, row) for row in rows])
    with torch.no_grad():
        merged = model._merge_input_ids_with_input_values(
            batch["input_ids"], batch["input_values"], batch["input_values_cutoffs"]
        )
        x = torch.cat([merged["inputs_embeds"], model.backbone_model.embed_tokens(codes[:, :-1])], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = model.backbone_model(inputs_embeds=x, attention_mask=mask, position_ids=positions).last_hidden_state
    assert torch.allclose(reference.hidden, hidden[:, -5:].flatten(0, 1), atol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [
        PRESETS["smallest"],
        PrecisionPolicy((("kv", "bf16"), ("depth.head", "int4:32"), ("backbone.embedding", "fp8"))),
    ],
)
def test_a_trial_measures_what_the_packed_weights_of_the_whole_policy_measure(policy: PrecisionPolicy) -> None:
    """Zones are packed one by one and put together: nothing may be missing or in the wrong place."""
    model = trained()
    reference = Reference(model, [passage_of(model, row) for row in speech()])
    state = tuning._State(model, Calibration(), [])
    trial = tuning._Trial(model, reference, 0.5, state)
    formats = tuning.formats_of(policy, 8)
    packed, _ = PackedWeights(policy).refresh(hf.live_weights(model))
    cache = torch.bfloat16 if formats.get("kv") == "bf16" else torch.float32
    made = reference.logits(packed, reference.backbone(packed, cache), cache)
    wanted = compare((reference.first, reference.rest), made, 0.5)
    for group, figures in trial(formats).items():
        assert figures.kl_nats == pytest.approx(wanted[group].kl_nats, rel=1e-3)
        assert figures.kl_nats > 0
    assert tuning.policy_of(formats, policy.name).rules
    for zone, fmt in formats.items():
        assert policy.format_of("depth.head.1" if zone == "depth.head" else zone) == fmt


# ------------------------------------------------------------------------------------------------------- the search


def test_the_thresholds_hold_and_the_first_step_would_not_do() -> None:
    model, thresholds = trained(), Thresholds(max_kl0=2e-4, max_kl=1e-3)
    result = tuned(model, thresholds)
    assert not thresholds.excess(result.fidelity)
    assert thresholds.excess(result.evaluations[max(result.evaluations, key=lambda key: key.count("int4"))])
    assert result.raised and result.policy.name == "auto"
    assert result.bytes_per_frame["start"] < result.bytes_per_frame["auto"] < result.bytes_per_frame["stock"]
    assert result.policy.format_of("backbone.head") == result.policy.format_of("codec") == "keep"
    # What was measured is what the policy gives, measured again from nothing.
    reference = Reference(model, [passage_of(model, row) for row in speech()])
    packed, _ = PackedWeights(result.policy).refresh(hf.live_weights(model))
    made = reference.logits(packed, reference.backbone(packed, torch.float32), torch.float32)
    again = compare((reference.first, reference.rest), made, thresholds.tie)
    assert again["codebook 0"].kl_nats == pytest.approx(result.fidelity["codebook 0"].kl_nats, rel=1e-3)


def test_loose_thresholds_keep_the_start_and_impossible_ones_end_at_exact() -> None:
    model = trained()
    loose = tuned(model, FREE)
    assert loose.raised == [] and dict(loose.policy.rules)["depth.mlp"] == "int4"
    strict = tuned(model, Thresholds(max_kl0=0, max_kl=0, min_top1_0=1, min_top1=1, min_near=1))
    assert strict.policy.rules == () and strict.reverted == []
    assert all(figures.kl_nats == 0 for figures in strict.fidelity.values())


def test_it_is_deterministic() -> None:
    one, other = (tuned(trained(), Thresholds(max_kl0=1e-5, max_kl=5e-4)) for _ in range(2))
    assert one == other and len(one.raised) > 2


def test_a_sabotaged_zone_is_raised_to_the_top_and_the_others_are_not() -> None:
    model = trained()
    for layer in model.backbone_model.layers:
        attention = layer.self_attn
        spoil(layer.input_layernorm.weight, *(getattr(attention, f"{part}_proj").weight for part in "qkv"))
    result = tuned(model, Thresholds(max_kl0=5e-3, max_kl=5e-3))
    assert result.sensitivity["backbone.attention"]["int8"]["codebook 0"].kl_nats > 5e-3
    assert result.policy.format_of("backbone.attention") == "keep"
    assert result.policy.format_of("depth.attention") == "int8"
    assert result.raised[0][0] == "backbone.attention"


def test_a_raise_that_was_not_needed_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding costs most per byte and goes first; the MLPs cost most, and once they are raised nothing else need be."""
    costs = {"backbone.embedding": {"int8": 0.4}, "backbone.mlp": {"int4": 1.0, "int8": 0.9}}

    def measure(self: Any, formats: dict[str, str]) -> Any:
        cost = sum(costs.get(zone, {}).get(fmt, 0.0) for zone, fmt in formats.items())
        return {group: tuning.Figures(cost, 1.0, 1.0, 20.0) for group in ("codebook 0", "codebooks 1 to 7")}

    monkeypatch.setattr(tuning._Trial, "measure", measure)
    result = tuned(trained(), dataclasses.replace(FREE, max_kl0=0.5))
    assert result.raised == [
        ("backbone.embedding", "int8", "keep"),
        ("backbone.mlp", "int4", "int8"),
        ("backbone.mlp", "int8", "keep"),
    ]
    assert result.reverted == [("backbone.embedding", "keep", "int8")]
    assert result.policy.format_of("backbone.mlp") == "keep"
    assert result.fidelity["codebook 0"].kl_nats == 0.4


def test_only_the_groups_that_fail_decide_what_is_raised() -> None:
    """Codebook 0 does not hear the depth decoder."""
    result = tuned(trained(), dataclasses.replace(FREE, max_kl0=1e-5))
    assert {zone.partition(".")[0] for zone, _, _ in result.raised} == {"backbone"}


# ------------------------------------------------------------------------------------------------- resuming, saving


def test_an_interrupted_run_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, calls, measure = trained(), [], tuning._Trial.measure
    options = {"thresholds": Thresholds(max_kl0=1e-5, max_kl=5e-4), "state": tmp_path / "deep" / "state.json"}
    whole = tuned(model, options["thresholds"])

    def interrupted(self: Any, formats: dict[str, str]) -> Any:
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(dict(formats))
        return measure(self, formats)

    monkeypatch.setattr(tuning._Trial, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(model, **options)
    assert len(json.loads(options["state"].read_text())["evaluations"]) == 5
    calls.append({})  # the sixth does not interrupt again
    resumed = tuned(model, **options)
    assert resumed == whole
    assert len(calls) - 1 == len(whole.evaluations), "and none was made twice"
    assert len({str(sorted(one.items())) for one in calls[:5] + calls[6:]}) == len(whole.evaluations)
    assert not list(tmp_path.rglob("*.tmp"))


def test_speech_of_the_stock_model_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = []
    speak = tuning.measuring.speak
    monkeypatch.setattr(tuning.measuring, "speak", lambda *args: made.append(1) or speak(*args))
    prompts = [text_prompt([7, 4]), text_prompt([5], seed=1)]
    calibration = Calibration(prompts, frames=6, thresholds=FREE, state=tmp_path / "state.json")
    model = build("eight_codebooks")
    one, other = (tune(model, calibration, progress=False) for _ in range(2))
    assert len(made) == 3 and one == other and one.frames == 18
    greedy = tune(model, dataclasses.replace(calibration, seed=None, state=None), progress=False)
    assert greedy.evaluations != one.evaluations


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    tuned(trained(), FREE, state=path)
    changed = trained()
    with torch.no_grad():
        changed.depth_decoder.model.layers[0].mlp.up_proj.weight[3, 3] += 0.5
    with pytest.raises(ValueError, match="state.json: a tuning of another model"):
        tuned(changed, FREE, state=path)
    with torch.no_grad():
        changed = trained()
        changed.backbone_model.embed_tokens.embed_audio_tokens.weight[5, 3] += 0.5
    with pytest.raises(ValueError, match="a tuning of another model"):
        tuned(changed, FREE, state=path)
    with pytest.raises(ValueError, match="other prompts"):
        tune(trained(), Calibration(speech(2), thresholds=FREE, state=path), progress=False)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not the state of a tuning"):
        tuned(trained(), FREE, state=path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Calibration, str]:
    """A state whose evaluations cost nothing to make: the trained model's, with codes of one row."""
    good = {group: tuning.Figures(0.0, 1.0, 1.0, 20.0) for group in ("codebook 0", "codebooks 1 to 7")}
    state = tmp_path_factory.mktemp("tuning") / "state.json"
    calibration = Calibration([text_prompt([5]), *speech(1)], frames=3, thresholds=FREE, state=state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning._Trial, "measure", lambda self, formats: good)
        tune(trained(), calibration, progress=False)
    return calibration, state.read_text()


FIRST = "backbone.attention=int8"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data["evaluations"].update({FIRST: {}}), rf"'{FIRST}' must have figures of"),
        (lambda data: data["evaluations"][FIRST].pop("codebooks 1 to 7"), "must have figures of"),
        (lambda data: data["evaluations"][FIRST]["codebook 0"].update(kl_nats="-inf"), "kl_nats must be from 0"),
        (lambda data: data["evaluations"][FIRST]["codebook 0"].update(kl_nats=-0.1), "kl_nats must be from 0"),
        (lambda data: data["evaluations"][FIRST]["codebook 0"].update(kl_nats="nan"), "kl_nats must be from 0"),
        (lambda data: data["evaluations"][FIRST]["codebook 0"].update(kl_nats=10**400), "kl_nats must be from 0"),
        (lambda data: data["evaluations"][FIRST]["codebook 0"].update(top1=1.5), "top1 must be from 0 to 1"),
        (lambda data: data["evaluations"][FIRST]["codebook 0"].update(near=True), "near must be from 0 to 1"),
        (lambda data: data["evaluations"][FIRST]["codebook 0"].pop("near"), "figures must be"),
        (lambda data: data["evaluations"].update({"codec=int8": {}}), "'codec=int8' is no policy"),
        (lambda data: data["evaluations"].update({"depth.mlp=int8, backbone.mlp=int8": {}}), "is no policy"),
        (lambda data: data["evaluations"].update({"depth.mlp=keep": {}}), "is no policy"),
        (lambda data: data.update(evaluations=[]), "evaluations must be an object"),
        (lambda data: data.pop("codes"), "must have the fields"),
        (lambda data: data.update(more=1), "must have the fields"),
        (lambda data: data.update(codes=[]), "codes must be by the number of a prompt without codes"),
        (lambda data: data["codes"].update({"1": data["codes"]["0"]}), r"prompt without codes, \['0'\]"),
        (lambda data: data["codes"].update({"0": []}), "1 to 3 frames of 8 codes"),
        (lambda data: data["codes"].update({"0": [[0] * 8] * 4}), "1 to 3 frames of 8 codes"),
        (lambda data: data["codes"].update({"0": [[0] * 7]}), "1 to 3 frames of 8 codes"),
        (lambda data: data["codes"].update({"0": [[0.5] * 8]}), "1 to 3 frames of 8 codes"),
        (lambda data: data["codes"].update({"0": [[-1] * 8]}), "1 to 3 frames of 8 codes"),
        (lambda data: data["codes"].update({"0": [[10**30] * 8]}), "1 to 3 frames of 8 codes"),
        (lambda data: data["versions"].update(csm_kernels="0.0.1"), "a tuning of other versions"),
        (lambda data: data["versions"].update(torch="1.0"), "a tuning of other versions"),
        (lambda data: data.update(device="H100"), "a tuning of another device"),
        (lambda data: data.update(schema=True), "not the state of a tuning"),
    ],
)
def test_a_damaged_state_is_refused(measured: tuple[Calibration, str], tmp_path: Path, change: Any, words: str) -> None:
    """An evaluation without figures would hold, and the most aggressive policy with it."""
    path = tmp_path / "state.json"
    data = json.loads(measured[1])
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"state.json: .*{words}"):
        tune(trained(), dataclasses.replace(measured[0], state=path), progress=False)


def test_what_was_not_measured_does_not_hold() -> None:
    good = tuning.Figures(0.0, 1.0, 1.0, 20.0)
    assert set(FREE.excess({})) == {"codebook 0", "codebooks 1 to 7"}
    both = {"codebook 0": good, "codebooks 1 to 7": good}
    assert FREE.excess(both) == FREE.excess(both, 8) == {}
    assert FREE.excess(both, 9) == {"codebooks from 8": "nothing was measured of codebooks from 8"}


def test_a_format_that_saves_nothing_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 24 to 48 columns: int4 pads them to 128, so int8 is smaller, and the stock dtype where that is narrower."""
    tried = []

    def measure(self: Any, formats: dict[str, str]) -> Any:
        tried.extend(formats.items())
        fine = formats.get("depth.mlp", "keep") == "keep"
        return {
            group: tuning.Figures(0.0 if fine else 1.0, 1.0, 1.0, 20.0) for group in ("codebook 0", "codebooks 1 to 7")
        }

    monkeypatch.setattr(tuning._Trial, "measure", measure)
    start = PrecisionPolicy((("depth.mlp", "int4"), ("backbone.mlp", "int4"), ("depth.head", "fp32"), ("kv", "bf16")))
    calibration = Calibration(
        [text_prompt([5])], frames=3, start=start, thresholds=dataclasses.replace(FREE, max_kl=0.5)
    )
    result = tune(build(dtype=torch.bfloat16), calibration, progress=False)
    assert ("depth.mlp", "int4") not in tried and ("backbone.mlp", "int4") not in tried
    assert ("kv", "bf16") not in tried, "the model is in bf16"
    assert result.raised == [("depth.mlp", "int8", "keep")] and result.policy.rules == (("backbone.mlp", "int8"),)
    assert result.bytes_per_frame["auto"] < result.bytes_per_frame["stock"]


def a_result(**changes: Any) -> TunedPolicy:
    good = {group: tuning.Figures(0.0, 1.0, 1.0, 20.0) for group in ("codebook 0", "codebooks 1 to 7")}
    result = TunedPolicy(
        policy=PrecisionPolicy((("depth.mlp", "int8"),), "auto"),
        thresholds=FREE,
        fidelity=good,
        frames=3,
        start="smallest",
        sensitivity={"depth.mlp": {"int4": good}},
        raised=[("depth.mlp", "int4", "int8")],
        reverted=[],
        bytes_per_frame={"stock": 3, "start": 1, "auto": 2},
        evaluations={"depth.mlp=int4": good, "exact": good},
        spec=dataclasses.asdict(hf.read_spec(trained())),
        weights=tuning._digest_of_weights(trained()),
    )
    return dataclasses.replace(result, **changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(bytes_per_frame={}), "bytes_per_frame must be the bytes of"),
        (lambda data: data["bytes_per_frame"].update(stock=0), "bytes_per_frame must be the bytes of"),
        (lambda data: data.update(fidelity={}), "fidelity must have figures of"),
        (lambda data: data.update(fidelity=[]), "fidelity must be an object"),
        (lambda data: data.update(frames=True), "frames must be int"),
        (lambda data: data.update(start=""), "start must be str"),
        (lambda data: data.update(weights=None), "weights must be str"),
        (lambda data: data["thresholds"].pop("tie"), "thresholds must be"),
        (lambda data: data["thresholds"].update(max_kl="x"), "max_kl must be a finite number"),
        (lambda data: data.update(raised=[["depth.mlp", "int4"]]), "raised must be a list of"),
        (lambda data: data.update(raised="abc"), "raised must be a list of"),
        (lambda data: data.update(reverted=[["codec", "keep", "bf16"]]), "reverted must be a list of"),
        (lambda data: data["sensitivity"].update(kv={"int8": {}}), "'kv' cannot be tried in 'int8'"),
        (lambda data: data.update(evaluations={"exact": {}}), "'exact' must have figures of"),
        (lambda data: data["spec"].pop("vocab"), "spec must have the fields"),
        (lambda data: data["spec"]["depth"].update(layers="2"), "spec depth: layers must be a number"),
        (lambda data: data.update(schema=True), "not a tuned policy"),
        (lambda data: data.update(extra=1), "must have the fields"),
    ],
)
def test_a_damaged_result_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    data = a_result().to_dict()
    assert TunedPolicy.from_dict(json.loads(json.dumps(data))) == a_result()
    change(data)
    (tmp_path / "auto.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"auto.json: .*{words}"):
        TunedPolicy.load(tmp_path / "auto.json")


def test_a_result_for_other_weights_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a_result().save(tmp_path / "auto.json")
    model = trained()
    assert tuning.resolve(model, tmp_path / "auto.json") == a_result() and not caplog.records
    with torch.no_grad():
        model.depth_decoder.model.layers[0].mlp.up_proj.weight[3, 3] += 0.5
    assert tuning.resolve(model, tmp_path / "auto.json") == a_result()
    assert "auto.json: tuned for other weights" in caplog.text


def test_a_result_is_saved_loaded_and_used(tmp_path: Path) -> None:
    result = tuned(trained(), Thresholds(max_kl0=0, max_kl=5e-4, min_top1_0=0))
    assert any(figures.sqnr_db == float("inf") for figures in result.fidelity.values()), "infinity survives JSON"
    result.save(tmp_path / "auto.json")
    json.loads((tmp_path / "auto.json").read_text(), parse_constant=pytest.fail)
    assert TunedPolicy.load(tmp_path / "auto.json") == result
    model = accelerate(
        trained(), precision="auto", calibration=tmp_path / "auto.json", mode="eager", batch_sizes=(), progress=False
    )
    assert model.acceleration.policy == result.policy
    assert model.acceleration.tuned == result
    with pytest.raises(ValueError, match=r"another shape, backbone: layers is 2, there \d"):
        accelerate(build(), precision="auto", calibration=str(tmp_path / "auto.json"), mode="eager", progress=False)
    (tmp_path / "policy.json").write_text(json.dumps(result.policy.to_dict()))
    with pytest.raises(ValueError, match="policy.json: not a tuned policy"):
        TunedPolicy.load(tmp_path / "policy.json")


def test_accelerate_tunes_reports_and_speaks() -> None:
    model = accelerate(
        trained(),
        precision="auto",
        calibration=Calibration(speech(), thresholds=Thresholds(max_kl0=2e-4)),
        mode="eager",
        progress=False,
    )
    handle = model.acceleration
    assert handle.policy.name == "auto" and handle.tuned.raised
    report = handle.report()
    zones = {row["zone"]: row["format"] for row in report.zones}
    assert (
        zones["depth.mlp"] == "int4" and zones["backbone.mlp"] == "int8" and zones["backbone.head"].startswith("keep")
    )
    assert "precision 'auto' reads" in str(report)
    before = accelerate(trained(), precision=handle.policy, mode="eager", progress=False)
    ids = speech()[0]["input_ids"]
    how = {"do_sample": False, "depth_decoder_do_sample": False, "max_new_tokens": 8}
    assert torch.equal(model.generate(input_ids=ids, **how), before.generate(input_ids=ids, **how))


def test_without_a_calibration_text_is_made_up() -> None:
    model = build("eight_codebooks")
    before = dict(vars(model.depth_decoder.generation_config))
    state = torch.get_rng_state()
    result = tuning.resolve(model, None, progress=False)
    assert result.frames > 20
    assert vars(model.depth_decoder.generation_config) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert tuning.resolve(model, [text_prompt([6])], progress=False).frames <= 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "auto", "calibration": 3}, "calibration must be"),
        ({"precision": "auto", "calibration": {"input_ids": torch.zeros(1, 3)}}, "calibration must be"),
        ({"precision": "auto", "calibration": ["hello"]}, "a prompt must be a dict"),
        ({"precision": "auto", "calibration": []}, "got an empty list; None takes made-up text"),
        ({"precision": "auto", "calibration": [{"input_ids": torch.ones(5)}]}, r"must be \[N, T\].*, got \(5,\)"),
        ({"precision": "auto", "calibration": [{"input_ids": torch.ones(0, 5)}]}, r"at least one row .*, got \(0, 5\)"),
        ({"precision": "auto", "calibration": [{"input_ids": torch.ones(1, 0)}]}, r"at least one row .*, got \(1, 0\)"),
        (
            {"precision": "auto", "calibration": [{"input_ids": [[1, 2]]}]},
            "input_ids of a prompt must be a tensor, got list",
        ),
        (
            {"precision": "auto", "calibration": [{"input_ids": torch.ones(1, 3), "codes": [[1, 2]]}]},
            "codes of a prompt must be a tensor, got list",
        ),
        (
            {"precision": "auto", "calibration": [{"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(1, 3)}]},
            r"attention_mask of a prompt must begin with \(2, 3\)",
        ),
        ({"precision": "auto", "calibration": [{"input_ids": torch.ones(1, 3), "labels": 1}]}, "'labels'"),
        ({"precision": "int8", "calibration": [{}]}, "calibration is for precision='auto'"),
    ],
)
def test_what_calibration_cannot_be(options: dict[str, Any], words: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=words):
        accelerate(model, mode="eager", progress=False, **options)
    assert "acceleration" not in model.__dict__


def test_codes_that_do_not_fit() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"each of the 2 rows of the prompt, got \(5, 4\)"):
        rows_of([{"input_ids": ids, "codes": torch.zeros(5, 4)}])
    model, ids = build(), ids[:1]
    with pytest.raises(ValueError, match="codes must have 4 codebooks, got 3"):
        passage_of(model, {"input_ids": ids, "codes": torch.zeros(5, 3)})
    with pytest.raises(ValueError, match="from 0 to 31 in codebook 0 and to 31 in the others, got 0 to 32"):
        passage_of(model, {"input_ids": ids, "codes": torch.full((5, 4), 32).tril()})
    row = {"input_ids": ids, "codes": torch.zeros(70, 4)}
    with pytest.raises(ValueError, match="take 73 positions, the model has 64"):
        Reference(model, [passage_of(model, row)])
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        Reference(model, [passage_of(model, {"input_ids": ids, "codes": torch.zeros(5, 4)})])


def test_heads_of_several_formats_cannot_be_a_start() -> None:
    mixed = PrecisionPolicy((("depth.head.1", "keep"), ("depth.head", "int8")), "mixed")
    with pytest.raises(ValueError, match="'mixed' gives the depth decoder's heads"):
        tuned(trained(), FREE, start=mixed)


@pytest.mark.parametrize(
    "options", [{"max_kl": -1.0}, {"min_near": 1.5}, {"tie": float("nan")}, {"max_kl": float("inf")}, {"max_kl0": True}]
)
def test_thresholds_that_mean_nothing(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Thresholds(**options)


def test_thresholds_from_text() -> None:
    assert Thresholds.parse(["max_kl0=0.01", "min_near=0.5, tie=1"]) == Thresholds(max_kl0=0.01, min_near=0.5, tie=1)
    for text in ("max_kl0", "kl=1", "tie=x", "max_kl=inf"):
        with pytest.raises(ValueError, match="thresholds"):
            Thresholds.parse([text])
