"""GPTQ: its codes against the algorithm done the long way, what it gains, and how calibrated codes reach the frames."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from csm_models import build, held_out_speech, lowered_twin, on_fast_path, stock, text_prompt, trained
from torch import Tensor

from csm_kernels.quant import GROUPS, QuantWeight, dequantize, int4_codes, int4_levels, quantize
from csm_kernels.rounding import factor, quantize_gptq
from csm_kernels.testing import sqnr_db
from csm_runtime import PrecisionPolicy, accelerate, fused, rounding, tuning
from csm_runtime.adapters import hf
from csm_runtime.calibration import Calibration, Reference, passage_of, stock_hidden
from csm_runtime.precision import FORMATS, int4_layout, zones_of
from csm_runtime.rounding import Rounding, calibrate_rounding
from csm_runtime.weights import PackedWeights, planned_table, storage_bytes

EVERY_GROUP = [(group, symmetric) for group in GROUPS for symmetric in (True, False)]
POLICY = PrecisionPolicy(
    (
        ("*.mlp", "int4"),
        ("*.attention", "int4:32:asymmetric"),
        ("depth.projection", "int4:64"),
        ("depth.head.1-2", "int4:32"),
        ("depth.head", "int4:asymmetric"),
        ("backbone.head", "int4:32"),
    ),
    "four bits",
)
QUICK: dict[str, Any] = {"without": ("compiled prefill",), "progress": False, "guard": False}
GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(count: int, width: int, seed: int) -> Tensor:
    """Correlated: an eighth as many causes as columns, and some noise."""
    return normal(count, width // 8, seed=seed) @ normal(width // 8, width, seed=9) + 0.3 * normal(
        count, width, seed=-seed
    )


def moments(width: int) -> Tensor:
    x = inputs(2000, width, 1)
    return x.t() @ x


def output_error(weight: Tensor, packed: QuantWeight) -> float:
    """Of products with inputs that no Hessian has seen."""
    return float((inputs(500, weight.shape[1], 2) @ (dequantize(packed) - weight).t()).square().mean().sqrt())


def the_long_way(weight: Tensor, hessian: Tensor, group: int, symmetric: bool, damp: float) -> Tensor:
    """The matrix, rounded column by column in fp64, with a fresh inverse for the columns that are left each time."""
    left, hessian = weight.double().clone(), hessian.double()
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    out = torch.zeros_like(left)
    for i in range(left.shape[1]):
        if i % group == 0:
            _, scale = int4_codes(left[:, i : i + group].float()[:, None], symmetric)
            step, offset, lowest = (
                part if isinstance(part, int) else part[:, 0].double() for part in int4_levels(scale, symmetric)
            )
        code = ((left[:, i] - offset) / step).round().clamp(lowest, lowest + 15)
        out[:, i] = code * step + offset
        inverse = torch.linalg.inv(hessian[i:, i:])
        left[:, i:] -= ((left[:, i] - out[:, i]) / inverse[0, 0])[:, None] * inverse[0]
    return out


# ------------------------------------------------------------------------------------------------ one matrix


@pytest.mark.parametrize(("group", "symmetric"), EVERY_GROUP)
def test_it_is_the_algorithm(group: int, symmetric: bool) -> None:
    weight, hessian = 0.02 * normal(12, 256), moments(256)
    packed = quantize_gptq(weight, hessian, group, symmetric)
    got, wanted = dequantize(packed).double(), the_long_way(weight, hessian, group, symmetric, 0.01)
    same = (got - wanted).abs() < 1e-9
    assert int(same.all(1).sum()) >= 9
    # A value that fp32 and fp64 round to either side of a tie, by one step, changes all that come after it in its row.
    for row in (~same.all(1)).nonzero()[:, 0].tolist():
        first = int((~same[row]).int().argmax())
        step = float(packed.scale[row, first // group].flatten()[0])
        assert float((got - wanted)[row, first].abs()) == pytest.approx(abs(step), rel=1e-3)


@pytest.mark.parametrize(("group", "symmetric"), EVERY_GROUP)
@pytest.mark.parametrize("width", [256, 300])
def test_outputs_err_by_a_third_of_what_nearest_does(group: int, symmetric: bool, width: int) -> None:
    weight = 0.02 * normal(64, width)
    nearest, got = quantize(weight, "int4", group, symmetric), quantize_gptq(weight, moments(width), group, symmetric)
    assert output_error(weight, got) < 0.36 * output_error(weight, nearest)
    assert float((dequantize(got) - weight).norm()) > float((dequantize(nearest) - weight).norm())
    for ours, theirs in ((got.data, nearest.data), (got.scale, nearest.scale)):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
    assert (got.width, got.group, got.symmetric, got.padding) == (width, group, symmetric, nearest.padding)


@pytest.mark.parametrize(("group", "symmetric"), EVERY_GROUP)
@pytest.mark.parametrize(("width", "dtype"), [(1, torch.float32), (31, torch.float64), (257, torch.float32)])
def test_independent_inputs_are_rounded_to_nearest(group: int, symmetric: bool, width: int, dtype: torch.dtype) -> None:
    weight, hessian = normal(9, width).bfloat16(), torch.diag(normal(width).abs() + 0.1).to(dtype)
    got, nearest = quantize_gptq(weight, hessian, group, symmetric), quantize(weight, "int4", group, symmetric)
    assert torch.equal(got.data, nearest.data) and torch.equal(got.scale, nearest.scale)


def test_fewer_inputs_than_columns() -> None:
    """Less is gained, nothing lost."""
    weight, x = 0.02 * normal(64, 256), inputs(40, 256, 1)
    got = quantize_gptq(weight, x.t() @ x)
    assert output_error(weight, got) < 0.9 * output_error(weight, quantize(weight, "int4"))


def test_inputs_that_were_always_zero() -> None:
    """Their columns are rounded to nearest: what calibration has not seen may come yet."""
    weight, hessian = 0.02 * normal(64, 256), moments(256)
    dead = torch.zeros(256, dtype=torch.bool)
    dead[[0, 5, 200, 255]] = True
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    got = quantize_gptq(weight, hessian)
    step = got.scale.float().abs().repeat_interleave(128, 1)
    error = (dequantize(got) - weight).abs()
    # Level 7 ends half a step short of the largest magnitude on the other side, and 0.9 of it may be the last level.
    inside = weight.abs() < 6.5 * step
    assert bool((error <= 0.501 * step)[:, dead][inside[:, dead]].all()) and float(inside[:, dead].float().mean()) > 0.9
    assert float(error[:, ~dead].norm()) > 1.2 * float((dequantize(quantize(weight, "int4")) - weight)[:, ~dead].norm())
    zeros = quantize_gptq(weight, torch.zeros(256, 256))
    assert torch.equal(zeros.data, quantize(weight, "int4").data)


def test_more_damping_where_it_is_not_positive_definite() -> None:
    hessian = moments(64)
    lowest = float(torch.linalg.eigvalsh(hessian)[0])
    hessian -= (lowest + 0.05 * float(hessian.diagonal().mean())) * torch.eye(64)
    made = factor(hessian, 0.01)
    assert made is not None and made.damp == pytest.approx(0.1)
    weight = 0.02 * normal(8, 64)
    assert torch.equal(quantize_gptq(weight, hessian).data, quantize_gptq(weight, made).data)
    assert factor(-moments(64)) is None
    assert torch.equal(quantize_gptq(weight, -moments(64)).data, quantize(weight, "int4").data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(2, 4, 8)}, r"weight must be \[N, K\], got \(2, 4, 8\)"),
        (
            {"weight": torch.ones(4, 8, dtype=torch.long)},
            "weight must be floating point to be quantised, got torch.int64",
        ),
        ({"weight": torch.full((4, 8), float("nan"))}, "weight holds NaN or infinity"),
        ({"group": 48}, "group must be one of 32, 64, 128, got 48"),
        ({"hessian": torch.eye(7)}, r"hessian must be \[8, 8\] on cpu as the weight has columns, got \(7, 7\)"),
        ({"hessian": torch.ones(8)}, r"hessian must be \[K, K\], got \(8,\)"),
        ({"hessian": torch.eye(8).bfloat16()}, "hessian must be fp32 or fp64, got torch.bfloat16"),
        ({"hessian": torch.eye(8) * float("inf")}, "hessian holds NaN or infinity"),
        ({"damp": 0.0}, "damp must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_gptq(**{"weight": torch.ones(4, 8), "hessian": torch.eye(8), **arguments})


# ------------------------------------------------------------------------------------------------ asymmetric groups in a policy


def test_asymmetric_formats() -> None:
    for group in GROUPS:
        assert int4_layout(f"int4:{group}:asymmetric") == (group, False)
    assert (int4_layout("int4"), int4_layout("int4:128")) == ((128, True), (128, True))
    assert int4_layout("int4:asymmetric") == (128, False)
    assert [fmt for fmt in FORMATS if int4_layout(fmt) is None] == ["keep", "fp32", "bf16", "fp16", "fp8", "int8"]
    one, other = (PrecisionPolicy((("*.mlp", fmt),)) for fmt in ("int4:asymmetric", "int4:128:asymmetric"))
    assert one == other and one.format_of("depth.mlp") == "int4:128:asymmetric"
    assert PrecisionPolicy.from_dict(one.to_dict()) == one
    with pytest.raises(ValueError, match="unknown format 'int4:symmetric'"):
        PrecisionPolicy((("*.mlp", "int4:symmetric"),))
    assert tuning._is_lowered("depth.mlp", "int4:64:asymmetric") and not tuning._is_lowered(
        "depth.mlp", "int4:asymmetric"
    )
    assert tuning._safer("int4:64:asymmetric") == ["int4:64:asymmetric", "int8", "keep"]


def test_planned_bytes_are_those_held() -> None:
    model = build("eight_codebooks")
    policy = PrecisionPolicy(
        (("*.mlp", "int4:asymmetric"), ("*.attention", "int4:32:asymmetric"), ("depth.head", "int4:64"))
    )
    packed, _ = PackedWeights(policy).refresh(hf.live_weights(model))
    planned = {row["zone"]: row["bytes"] for row in planned_table(hf.read_spec(model), policy, torch.float32)}
    layers = packed.depth.layers
    mlp, attention = [
        [getattr(l, n).weight for l in layers for n in names] for names in (("gate", "up", "down"), "qkvo")
    ]
    assert planned["depth.mlp"] == sum(map(storage_bytes, mlp))
    assert planned["depth.attention"] == sum(map(storage_bytes, attention))
    assert all(one.group == 32 and not one.symmetric for one in attention)
    why = fused.why_not_these(packed)
    assert why is not None and "asymmetric" in why


def test_asymmetric_frames_are_those_of_the_same_weights() -> None:
    policy = PrecisionPolicy(
        (
            ("depth.mlp", "int4:asymmetric"),
            ("depth.attention", "int4:32:asymmetric"),
            ("depth.head", "int4:64:asymmetric"),
        )
    )
    model, twin = build(), lowered_twin(policy, of=build())
    accelerate(model, precision=policy, mode="eager", **QUICK)
    prompt = text_prompt((6, 4))
    with on_fast_path(model):
        made = model.generate(**prompt, **GREEDY, max_new_tokens=6)
    assert torch.equal(made, stock(twin, **prompt, **GREEDY, max_new_tokens=6))


# ------------------------------------------------------------------------------------------------ a whole model


def calls_of(model: Any, frames: int = 12) -> list[dict[str, Tensor]]:
    """Two calls with speech that the model could have made."""
    limit, books = model.config.vocab_size, model.config.num_codebooks
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, limit, (2, frames, books), generator=generator)
    return [{"input_ids": torch.arange(4 + k)[None], "codes": codes[k]} for k in range(2)]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Rounding]:
    model = build()
    return model, calibrate_rounding(model, POLICY, calls_of(model), progress=False)


def test_what_is_rounded(tiny: tuple[Any, Rounding]) -> None:
    model, made = tiny
    spec = hf.read_spec(model)
    parts = [
        f"{name}.{i}.{p}"
        for name in ("backbone", "depth")
        for i in range(2)
        for p in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    assert set(made.matrices) == {
        *parts,
        "backbone.head",
        "depth.projection",
        *(f"depth.head.{k}" for k in range(1, 4)),
    }
    assert made.frames == 24 and hf.modification(model) is None
    assert {zone: POLICY.format_of(zone) for zone in zones_of(spec.codebooks) if zone in made.matrices} == {
        name: one.format for name, one in made.matrices.items() if name in zones_of(spec.codebooks)
    }


def test_the_inputs_are_those_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no prompt: those run through the stock weights. Heads get their own codebook's hidden states."""
    model, found = build(), {}
    rounded = rounding._rounded

    def spy(unit: Any, moments: Any) -> Any:
        found.update(dict.fromkeys(unit.names, moments))
        return rounded(unit, moments)

    monkeypatch.setattr(rounding, "_rounded", spy)
    calibrate_rounding(model, POLICY, calls_of(model), progress=False)
    depth = model.depth_decoder
    wanted: dict[str, list[Tensor]] = {name: [] for name in ("backbone.0.k", "backbone.head", "depth.projection")}
    wanted |= {f"depth.head.{k}": [] for k in (1, 2, 3)}
    for passage in (passage_of(model, row) for row in calls_of(model)):
        with torch.no_grad():
            hidden, codes = stock_hidden(model, passage), passage.codes
            fed = model.backbone_model.embed_tokens(codes[None, :-1])[0]
            wanted["backbone.0.k"].append(model.backbone_model.layers[0].input_layernorm(fed))
            wanted["backbone.head"].append(hidden)
            offsets = torch.arange(3) * depth.model.vocab_size
            x = torch.cat([hidden[:, None], depth.model.embed_tokens(codes[:, :-1] + offsets)], dim=1)
            wanted["depth.projection"].append(x.flatten(0, 1))
            out = depth.model(inputs_embeds=x).last_hidden_state
            for k in (1, 2, 3):
                wanted[f"depth.head.{k}"].append(out[:, k])
    for name, parts in wanted.items():
        x = torch.cat(parts)
        assert found[name].count == len(x), name
        torch.testing.assert_close(found[name].sums, x.t() @ x, rtol=1e-4, atol=1e-4)


def test_few_sums_at_once_are_the_same(tiny: tuple[Any, Rounding], monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny
    monkeypatch.setattr(rounding, "_LIMIT", 1)
    again = calibrate_rounding(model, POLICY, calls_of(model), progress=False)
    for name, one in made.matrices.items():
        assert torch.equal(one.codes.data, again.matrices[name].codes.data), name


def test_accelerate_calibrates(caplog: pytest.LogCaptureFixture) -> None:
    """On the fast path, with the codes that were calibrated; then a weight changes, and comes back."""
    model = build()
    calls = Calibration(calls_of(model))
    accelerate(model, precision=POLICY, rounding="gptq", calibration=calls, **QUICK)
    handle, prompt = model.acceleration, text_prompt((5, 3))
    made = handle._weights.rounding
    assert isinstance(made, Rounding) and handle.notes == []

    def packed() -> dict[str, Tensor]:
        return {name: one.data for name, one in handle._weights.quantized().items()}

    up = "backbone.0.up"
    assert all(
        torch.equal(packed()[name], made.matrices[name].codes.data)
        for name in made.matrices
        if name in packed() and "head." not in name
    )
    heads = torch.stack([made.matrices[f"depth.head.{k}"].codes.data for k in (1, 2)])
    assert torch.equal(packed()["depth.head.1-2"], heads)
    with on_fast_path(model):
        before = model.generate(**prompt, **GREEDY, max_new_tokens=5)
    weight = model.backbone_model.layers[0].mlp.up_proj.weight
    old = weight.detach().clone()
    with caplog.at_level(logging.WARNING, "csm_runtime"):
        for factor_ in (1.5, 1.2):
            with torch.no_grad():
                weight.mul_(factor_)
            model.generate(**prompt, **GREEDY, max_new_tokens=2)
    assert [record.getMessage().count(f"({up})") for record in caplog.records] == [1]
    assert handle.metrics.counters["faults"] == 1 and len(handle.notes) == 1 and "nearest" in handle.notes[0]
    assert torch.equal(packed()[up], quantize(weight.detach(), "int4").data)
    assert torch.equal(packed()["backbone.0.gate"], made.matrices["backbone.0.gate"].codes.data)
    with torch.no_grad():
        weight.copy_(old)
    assert torch.equal(model.generate(**prompt, **GREEDY, max_new_tokens=5), before)
    assert torch.equal(packed()[up], made.matrices[up].codes.data) and handle._weights.unrounded == set()


def test_codes_of_other_weights_or_damaged_ones_are_not_taken(tiny: tuple[Any, Rounding]) -> None:
    model, _ = tiny
    made = calibrate_rounding(model, POLICY, calls_of(model), progress=False)
    name = "depth.1.down"
    one = made.matrices[name]
    assert made.codes((name,), "int4", one.fingerprint) is one.codes or torch.equal(
        made.codes((name,), "int4", one.fingerprint).data, one.codes.data
    )
    assert made.codes((name,), "int4:64", one.fingerprint) is None
    assert made.codes((name,), "int4", one.fingerprint + 1) is None
    one.codes.data[0, 0] ^= 1
    assert made.codes((name,), "int4", one.fingerprint) is None
    weights = PackedWeights(POLICY, rounding=made)
    packed, _ = weights.refresh(hf.live_weights(build()))
    assert weights.unrounded == {name}
    other, _ = PackedWeights(POLICY).refresh(hf.live_weights(build(seed=1)))
    weights = PackedWeights(POLICY, rounding=made)
    mine, _ = weights.refresh(hf.live_weights(build(seed=1)))
    assert "backbone.head" in weights.unrounded and str(mine) == str(other)


def test_embeddings_and_int8_zones_are_left_alone() -> None:
    model = build()
    policy = PrecisionPolicy((("*.embedding", "int4:32"), ("depth.mlp", "int8")))
    none = calibrate_rounding(model, policy, progress=False)
    assert none == Rounding({}, 0)
    accelerate(model, precision=policy, rounding="gptq", mode="eager", **QUICK)
    handle = model.acceleration
    assert handle._weights.unrounded == set() and len(handle.notes) == 1 and "no matrix in int4" in handle.notes[0]


def test_made_up_calls_and_dropped_originals() -> None:
    model = build("two_codebooks")
    policy = PrecisionPolicy((("*.mlp", "int4:32"), ("depth.head", "int4:32")))
    made = calibrate_rounding(model, policy, Calibration(frames=3), max_frames=5, progress=False)
    assert 4 <= made.frames <= 5
    accelerate(model, precision=policy, rounding=made, drop_originals=True, mode="eager", **QUICK)
    with on_fast_path(model):
        model.generate(**text_prompt((5,)), max_new_tokens=3)
    with pytest.raises(ValueError, match=r"the original of backbone\.0\.gate was dropped"):
        calibrate_rounding(model, policy, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "best"}, "rounding must be 'nearest', 'gptq' or a Rounding, got 'best'"),
        ({"rounding": None}, "rounding must be 'nearest', 'gptq' or a Rounding, got None"),
        (
            {"rounding": "gptq", "calibration": "auto.json"},
            r"calibration is for precision='auto', or for rounding='gptq'",
        ),
        ({"rounding": "gptq", "precision": "smallest", "calibration": []}, "calibration must hold prompts"),
    ],
)
def test_bad_options(tiny: tuple[Any, Rounding], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accelerate(tiny[0], **options, **QUICK)
    assert "acceleration" not in tiny[0].__dict__


def test_bad_calibrations(tiny: tuple[Any, Rounding]) -> None:
    model, _ = tiny
    with pytest.raises(ValueError, match="max_frames must be an integer of at least 2, got 1"):
        calibrate_rounding(model, POLICY, max_frames=1)
    with pytest.raises(ValueError, match=r"depth\.head\.9"):
        calibrate_rounding(model, PrecisionPolicy((("depth.head.9", "int4"),)))
    with pytest.raises(ValueError, match="take 204 positions, the model has 64"):
        calibrate_rounding(model, POLICY, calls_of(model, 200)[:1], progress=False)
    with torch.no_grad():
        broken = build()
        broken.backbone_model.layers[1].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"activations before backbone\.1\.q cannot be used: hessian holds NaN"):
        calibrate_rounding(broken, POLICY, calls_of(broken), progress=False)


def test_recordings_it_has_not_heard() -> None:
    """On the trained model: at least 2 dB in the logits of codebook 0, and of the others, over nearest rounding."""
    model, speech = trained(), held_out_speech()
    rows = [{"input_ids": text[None], "codes": codes} for text, codes in speech]
    policy = PrecisionPolicy(
        (("*.mlp", "int4"), ("*.attention", "int4"), ("depth.projection", "int4"), ("depth.head", "int4"))
    )
    made = calibrate_rounding(model, policy, rows[::2], progress=False)
    reference = Reference(model, [passage_of(model, row) for row in rows[1::2]])
    signal = {}
    for how, one in (("nearest", None), ("gptq", made)):
        packed, _ = PackedWeights(policy, rounding=one).refresh(hf.live_weights(model))
        first, rest = reference.logits(packed, reference.backbone(packed, torch.float32), torch.float32)
        signal[how] = sqnr_db(first, reference.first), sqnr_db(rest, reference.rest)
    assert signal["gptq"][0] > signal["nearest"][0] + 2.0 and signal["gptq"][1] > signal["nearest"][1] + 2.0, signal
