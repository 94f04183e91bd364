"""Which zone is stored in which format, and a report whose bytes are the real ones."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from csm_models import build, text_prompt
from torch import nn

from csm_runtime import PrecisionPolicy, accelerate
from csm_runtime.metrics import Metrics
from csm_runtime.precision import PRESETS, SAFE_ZONES, ZONES, resolve_policy

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}


def test_the_first_rule_that_matches_decides() -> None:
    policy = PrecisionPolicy((("depth.head", "keep"), ("depth.*", "int8")))
    lowered = {zone for zone in ZONES if policy.format_of(zone) == "int8"}
    assert lowered == {"depth.attention", "depth.mlp", "depth.projection"}
    assert PrecisionPolicy((("depth.*", "int8"), ("depth.head", "keep"))).format_of("depth.head") == "int8"
    assert all(PrecisionPolicy().format_of(zone) == "keep" for zone in ZONES)


def test_no_preset_lowers_a_safe_zone() -> None:
    assert SAFE_ZONES == ("backbone.head",)
    for policy in PRESETS.values():
        assert all(policy.format_of(zone) == "keep" for zone in SAFE_ZONES)
    assert {zone for zone in ZONES if PRESETS["int8"].format_of(zone) == "int8"} == set(ZONES) - set(SAFE_ZONES)


@pytest.mark.parametrize("pattern", ["*", "backbone.*", "*.head", "backbone.h*"])
def test_a_safe_zone_is_lowered_only_by_name(pattern: str) -> None:
    with pytest.raises(ValueError, match="safe zone"):
        PrecisionPolicy(((pattern, "int8"),))
    allowed = PrecisionPolicy((("backbone.head", "keep"), (pattern, "int8")))
    assert allowed.format_of("backbone.head") == "keep"
    assert PrecisionPolicy((("backbone.head", "int8"), (pattern, "int8"))).format_of("backbone.head") == "int8"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((("depth.*", "int4"),), ["int4", "depth.*", "int8"]),
        ((("norm", "int8"),), ["norm", "backbone.attention"]),
        ((("codec.*", "int8"),), ["codec.*"]),
    ],
)
def test_rules_that_mean_nothing(rules: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        PrecisionPolicy(rules)
    assert all(word in str(caught.value) for word in words)


def test_policies_are_frozen_and_equal_by_value() -> None:
    policy = PrecisionPolicy((("depth.*", "int8"),))
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.name = "other"  # type: ignore[misc]
    assert policy == PrecisionPolicy((("depth.*", "int8"),))
    assert hash(policy) == hash(PrecisionPolicy((("depth.*", "int8"),)))


def test_resolve() -> None:
    policy = PrecisionPolicy((("depth.*", "int8"),))
    assert resolve_policy(policy) is policy
    assert resolve_policy("int8") is PRESETS["int8"]


# ------------------------------------------------------------------------------------------------ the report


def matrices(model: Any) -> dict[str, list[nn.Parameter]]:
    """The stock matrices of each zone, found by walking the modules."""
    depth = model.depth_decoder
    out = {
        "backbone.head": [model.lm_head.weight],
        "depth.projection": [depth.model.inputs_embeds_projector.weight],
        "depth.head": [depth.codebooks_head.weight],
    }
    for stack, module in (("backbone", model.backbone_model), ("depth", depth.model)):
        for zone, part in (("attention", "self_attn"), ("mlp", "mlp")):
            linears = [
                child.weight
                for layer in module.layers
                for child in getattr(layer, part).modules()
                if isinstance(child, nn.Linear)
            ]
            out[f"{stack}.{zone}"] = linears
    return out


@pytest.mark.parametrize("name", ["base", "biases", "eight_codebooks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["stock", "int8"])
def test_bytes_are_those_of_the_tensors(name: str, dtype: torch.dtype, precision: str) -> None:
    model = accelerate(build(name, dtype=dtype), precision=precision, mode="eager", progress=False)
    report = model.acceleration.report()
    steps = model.config.num_codebooks - 1  # passes of the depth decoder, positions 0 and 1 in one
    rows = {row["zone"]: row for row in report.zones}
    assert set(rows) == set(ZONES)
    copied = 0
    for zone, weights in matrices(model).items():
        lowered = precision == "int8" and zone != "backbone.head"
        if lowered:
            transposed = zone == "depth.head"
            held = sum(w.numel() + 4 * (w.numel() // w.shape[-2 if transposed else -1]) for w in weights)
            copied += held
            assert rows[zone]["format"] == "int8"
        else:
            held = sum(w.numel() * w.element_size() for w in weights)
            copied += held if zone == "depth.head" else 0
            assert rows[zone]["format"] == f"keep ({str(dtype).removeprefix('torch.')})"
        assert rows[zone]["bytes"] == held, zone
        per_frame = held * {"backbone": 1, "depth": steps}[zone.partition(".")[0]]
        if zone == "depth.head":
            per_frame = held  # every head once
        assert rows[zone]["bytes_per_frame"] == int(per_frame), zone
    assert report.copied_bytes == copied
    assert report.bytes_per_frame == sum(row["bytes_per_frame"] for row in report.zones)


def test_bytes_of_the_buffers() -> None:
    model = accelerate(build(), max_positions=40, mode="eager", progress=False)
    backbone, depth = model.config, model.config.depth_decoder_config

    def cache(config: Any, positions: int) -> int:
        return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * positions

    one = cache(backbone, 40) + cache(depth, 4)
    assert model.acceleration.report().kv_bytes == one
    model.generate(**text_prompt((3, 4, 5)), **GREEDY, max_new_tokens=2)
    report = model.acceleration.report()
    assert report.kv_bytes == one * (1 + 4)
    assert report.batch_sizes == [1, 4]
    assert report.capacity == model.acceleration.capacity == 40


def test_counts_of_calls_and_frames() -> None:
    model = accelerate(build(), mode="eager", progress=False)
    model.generate(**text_prompt((3, 4)), **GREEDY, max_new_tokens=5)
    model.generate(**text_prompt((3,)), **GREEDY, max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
    report = model.acceleration.report()
    counters = report.metrics["counters"]
    assert counters["generate.fast"] == 1
    assert counters["generate.stock"] == 1
    assert counters["frames"] == 10
    assert report.metrics["stock_reasons"] == {"output_scores": 1}
    for name in ("prefill", "first_frame", "frame", "depth", "backbone"):
        assert report.metrics["median_seconds"][name] > 0
    assert len(model.acceleration.metrics.times("frame")) == 4
    assert len(model.acceleration.metrics.times("prefill")) == 1
    text = str(report)
    for word in ("1 fast, 1 stock", "10 frames", "0 faults", "output_scores", *ZONES):
        assert word in text


def test_report_is_data() -> None:
    model = accelerate(build(), precision="int8", mode="eager", progress=False)
    data = json.loads(json.dumps(model.acceleration.report().to_dict()))
    assert data["policy"] == "int8"
    assert data["model"] == "CsmForConditionalGeneration"
    assert data["device"] == "cpu"
    assert data["dtype"] == "float32"
    assert data["mode"] == "eager"
    assert data["originals_dropped"] is False
    assert data["bytes_per_frame"] == sum(row["bytes_per_frame"] for row in data["zones"])


def test_metrics() -> None:
    metrics = Metrics()
    assert metrics.stock_path("a") is True
    assert metrics.stock_path("a") is False
    assert metrics.fault("x") is True
    assert metrics.fault("x") is False
    metrics.count("frames", 3)
    for value in (3.0, 1.0, 2.0):
        metrics.observe("frame", value)
    snapshot = metrics.snapshot()
    assert snapshot["counters"] == {"generate.stock": 2, "faults": 2, "frames": 3}
    assert snapshot["stock_reasons"] == {"a": 2}
    assert snapshot["faults"] == {"x": 2}
    assert snapshot["median_seconds"] == {"frame": 2.0}
    for index in range(5000):
        metrics.observe("frame", float(index))
    assert len(metrics.times("frame")) == 4096
    assert metrics.times("frame")[-1] == 4999.0
    metrics.reset_times()
    assert metrics.times("frame") == []
    assert metrics.snapshot()["counters"]["frames"] == 3
