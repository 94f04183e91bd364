"""Which zone is stored in which format, and a report whose bytes are the real ones."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from csm_models import build, lowered, text_prompt
from torch import nn

from csm_runtime import PrecisionPolicy, accelerate
from csm_runtime.adapters.hf import read_spec
from csm_runtime.adapters.spec import ModelSpec, StackSpec
from csm_runtime.ladder import safer_policy
from csm_runtime.metrics import Metrics
from csm_runtime.precision import PRESETS, SAFE_ZONES, ZONES, resolve_policy, zones_of
from csm_runtime.weights import _converted, planned_table

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}


HEADS = zones_of(32)[zones_of(32).index("depth.head.1") :][:31]


def test_zones_name_every_head() -> None:
    assert HEADS[0] == "depth.head.1" and HEADS[-1] == "depth.head.31"
    assert [zone for zone in zones_of(32) if not zone.startswith("depth.head")] == [
        z for z in ZONES if z != "depth.head"
    ]


def test_the_first_rule_that_matches_decides() -> None:
    policy = PrecisionPolicy((("depth.head", "keep"), ("depth.embedding", "bf16"), ("depth.*", "int8")))
    lowered = {zone for zone in zones_of(32) if policy.format_of(zone) == "int8"}
    assert lowered == {"depth.attention", "depth.mlp", "depth.projection"}
    assert policy.format_of("depth.embedding") == "bf16"
    later = PrecisionPolicy((("depth.*", "int8"), ("*.head", "fp32")))
    assert later.format_of("depth.head.3") == "int8" and later.format_of("backbone.head") == "fp32"
    assert all(PrecisionPolicy().format_of(zone) == "keep" for zone in zones_of(32))


@pytest.mark.parametrize(
    ("pattern", "heads"),
    [
        ("depth.head", range(1, 32)),
        ("depth.head.*", range(1, 32)),
        ("depth.*", range(1, 32)),
        ("depth.h*", range(1, 32)),
        ("depth.head.1", [1]),
        ("depth.head.[1-3]", [1, 2, 3]),
        ("depth.head.3?", [30, 31]),
        ("depth.head.8-12", range(8, 13)),
        ("depth.head.1-31", range(1, 32)),
        ("depth.head.1-3,7,30-99", [1, 2, 3, 7, 30, 31]),
        ("*.head.2,11", [2, 11]),
    ],
)
def test_heads_by_index(pattern: str, heads: Any) -> None:
    policy = PrecisionPolicy(((pattern, "int4:64"),))
    assert [zone for zone in HEADS if policy.format_of(zone) == "int4:64"] == [f"depth.head.{k}" for k in heads]


@pytest.mark.parametrize("brackets", ["[1-31]", "[8-12]", "[10-20]", "[10,11]", "[!1-31]"])
def test_a_number_in_brackets_is_refused(brackets: str) -> None:
    """``fnmatch`` would take one character of it: heads 1 and 2 for ``[10-20]``."""
    with pytest.raises(ValueError, match=r"one character.*'depth.head.8-12'"):
        PrecisionPolicy(((f"depth.head.{brackets}", "int8"),))


@pytest.mark.parametrize("numbers", ["12-8", "0-3", "1-", "-3", "1,,3", "256-300"])
def test_numbers_of_no_head(numbers: str) -> None:
    with pytest.raises(ValueError, match="matches no zone"):
        PrecisionPolicy(((f"depth.head.{numbers}", "int8"),))


@pytest.mark.parametrize(
    ("rules", "taker"),
    [
        ((("depth.*", "int8"), ("depth.head.[1-3]", "keep")), "rule 1, ('depth.*', 'int8'), takes"),
        ((("depth.mlp", "int4"), ("depth.mlp", "int4")), "rule 1, ('depth.mlp', 'int4'), takes"),
        (
            (("backbone.mlp", "int8"), ("depth.mlp", "int4"), ("*.mlp", "keep")),
            "rule 1, ('backbone.mlp', 'int8'), and rule 2, ('depth.mlp', 'int4'), take",
        ),
        ((("*", "keep"), ("*", "bf16")), "rule 1, ('*', 'keep'), takes"),
    ],
)
def test_a_rule_that_can_never_apply(rules: Any, taker: str) -> None:
    """A ``keep`` after what it was to protect from would silently do nothing."""
    with pytest.raises(ValueError, match=re.escape(f"rule {len(rules)}, {rules[-1]}, decides no zone: {taker} all")):
        PrecisionPolicy(rules)


@pytest.mark.parametrize("policy", PRESETS.values(), ids=lambda policy: policy.name)
def test_a_rung_can_be_made_of_every_preset(policy: PrecisionPolicy) -> None:
    """Keeping a part of the model leaves some of a policy's rules without a zone: they are dropped, not refused."""
    for part in ("backbone", "depth"):
        safer = safer_policy(policy, f"kept {part}")
        assert safer.format_of(f"{part}.mlp") == "keep"
    mixed = PrecisionPolicy((("depth.mlp", "int4"), ("*.mlp", "int8")))
    assert safer_policy(mixed, "kept backbone").format_of("backbone.mlp") == "keep"
    assert safer_policy(mixed, "kept depth").rules == (("depth.*", "keep"), ("kv", "keep"), ("*.mlp", "int8"))


def test_a_rule_about_a_head_the_model_does_not_have() -> None:
    policy = PrecisionPolicy((("depth.head.7", "int8"), ("depth.head.9", "keep")))
    policy.check_codebooks(10)
    with pytest.raises(ValueError, match=r"'depth.head.9' .* depth.head.1 to depth.head.8"):
        policy.check_codebooks(9)
    model = build("eight_codebooks")
    with pytest.raises(ValueError, match=r"'depth.head.9' .* depth.head.1 to depth.head.7"):
        accelerate(model, precision=policy, mode="eager", progress=False)
    assert "acceleration" not in model.__dict__


@pytest.mark.parametrize("zone", ["depth.head", "depth.head.0", "norm", "", "backbone"])
def test_format_of_what_is_no_zone(zone: str) -> None:
    with pytest.raises(ValueError, match="zone must be one of"):
        PrecisionPolicy().format_of(zone)


def test_no_preset_lowers_a_safe_zone() -> None:
    assert SAFE_ZONES == ("backbone.head", "codec")
    for policy in PRESETS.values():
        assert all(policy.format_of(zone) == "keep" for zone in SAFE_ZONES)
    matrices = {
        zone for zone in zones_of(32) if zone not in SAFE_ZONES and zone.split(".")[-1] not in ("kv", "embedding")
    }
    assert {zone for zone in zones_of(32) if PRESETS["int8"].format_of(zone) == "int8"} == matrices
    assert PRESETS["exact"].rules == PRESETS["stock"].rules == ()
    assert PRESETS["fast"].rules == PRESETS["int8"].rules
    balanced = {zone for zone in matrices if zone.startswith("depth.")}
    assert {zone for zone in zones_of(32) if PRESETS["balanced"].format_of(zone) == "int8"} == balanced
    smallest = {zone: PRESETS["smallest"].format_of(zone) for zone in zones_of(32)}
    assert {zone for zone, fmt in smallest.items() if fmt == "int4"} == {"backbone.mlp", "depth.mlp"}
    assert {zone for zone, fmt in smallest.items() if fmt == "keep"} == {*SAFE_ZONES, "kv"}


def test_what_presets_read_of_csm_1b() -> None:
    """Bytes a frame reads, in MB: the figures of docs/precision.md."""
    stacks = (StackSpec(16, 2048, 8192, 32, 8, 64, 1e-5, 2048), StackSpec(4, 1024, 8192, 8, 2, 128, 1e-5, 33))
    spec = ModelSpec(*stacks, codebooks=32, vocab=2051, depth_vocab=2051)
    read = {
        name: sum(row["bytes_per_frame"] for row in planned_table(spec, policy, torch.bfloat16)) / 1e6
        for name, policy in PRESETS.items()
    }
    assert read["exact"] == pytest.approx(9106, abs=1)
    assert read["exact"] > read["balanced"] > read["fast"] > read["smallest"]
    table = (Path(__file__).parents[1] / "docs" / "precision.md").read_text()
    for name in ("exact", "balanced", "fast", "smallest"):
        assert f"| `{name}` | {read[name]:,.0f} |" in table


@pytest.mark.parametrize("pattern", ["*", "backbone.*", "*.head", "*.h*"])
@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_a_safe_zone_is_lowered_only_by_name(pattern: str, fmt: str) -> None:
    with pytest.raises(ValueError, match="safe zone 'backbone.head'"):
        PrecisionPolicy(((pattern, fmt),))
    codec = ("codec", "keep")
    allowed = PrecisionPolicy((("backbone.head", "keep"), codec, (pattern, fmt)))
    assert allowed.format_of("backbone.head") == "keep"
    assert PrecisionPolicy((("backbone.head", "int8"), codec, (pattern, fmt))).format_of("backbone.head") == "int8"
    assert PrecisionPolicy(((pattern, "fp32"),)).format_of("backbone.head") == "fp32", "which is not lower"


@pytest.mark.parametrize("pattern", ["*", "c*", "cod?c"])
def test_the_codec_is_lowered_only_by_name(pattern: str) -> None:
    with pytest.raises(ValueError, match="safe zone 'codec'"):
        PrecisionPolicy((("backbone.head", "keep"), (pattern, "bf16")))
    assert PrecisionPolicy((("codec", "bf16"),)).format_of("codec") == "bf16"


@pytest.mark.parametrize("zone", ["kv", "codec"])
@pytest.mark.parametrize("fmt", ["int8", "fp8", "int4", "int4:32"])
def test_formats_a_zone_cannot_have(zone: str, fmt: str) -> None:
    for pattern in (zone, f"{zone[0]}*"):
        with pytest.raises(ValueError) as caught:
            PrecisionPolicy(((pattern, fmt),))
        assert all(word in str(caught.value) for word in (repr(pattern), repr(zone), repr(fmt), "'bf16'", "'fp16'"))
    PrecisionPolicy((("kv", "keep"), ("codec", "keep"), ("backbone.head", "keep"), ("*", fmt)))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((("depth.*", "int3"),), ["int3", "depth.*", "int8"]),
        ((("depth.*", "int4:16"),), ["int4:16", "depth.*", "int4:32"]),
        ((("codec.*", "int8"),), ["codec.*", "matches no zone", "backbone.attention"]),
        ((("depth.head.0", "int8"),), ["depth.head.0", "matches no zone"]),
        (("depth.*", "int8"), ["pairs"]),
        ((("depth.*", 8),), ["pairs"]),
        ((("depth.*",),), ["pairs"]),
        ("int8", ["pairs"]),
    ],
)
def test_rules_that_mean_nothing(rules: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        PrecisionPolicy(rules)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "pattern", ["norm", "*norm*", "softmax", "rotary", "residual", "sampling", "logits", "backbone.logits", "audio"]
)
@pytest.mark.parametrize("fmt", ["bf16", "fp32"])
def test_what_is_always_fp32(pattern: str, fmt: str) -> None:
    with pytest.raises(ValueError, match="always fp32 and cannot be lowered"):
        PrecisionPolicy(((pattern, fmt),))


def test_policies_are_frozen_and_equal_by_value() -> None:
    policy = PrecisionPolicy((("depth.*", "int8"),))
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.name = "other"  # type: ignore[misc]
    assert policy == PrecisionPolicy((("depth.*", "int8"),))
    assert hash(policy) == hash(PrecisionPolicy((("depth.*", "int8"),)))
    assert PrecisionPolicy((("depth.mlp", "int4:128"),)) == PrecisionPolicy((("depth.mlp", "int4"),))
    listed: Any = [["depth.*", "int8"]]
    assert PrecisionPolicy(listed) == policy and hash(PrecisionPolicy(listed)) == hash(policy)


def test_resolve() -> None:
    policy = PrecisionPolicy((("depth.*", "int8"),))
    assert resolve_policy(policy) is policy
    assert resolve_policy("int8") is PRESETS["int8"]


def test_policies_as_files(tmp_path: Any) -> None:
    policy = PrecisionPolicy((("depth.head.[1-3]", "keep"), ("depth.mlp", "int4:64")), "mine")
    path = tmp_path / "policy.json"
    policy.save(path)
    assert PrecisionPolicy.load(path) == policy == PrecisionPolicy.load(str(path))
    for preset in PRESETS.values():
        assert PrecisionPolicy.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, ["schema must be 1, got 2"]),
        ({"schema": None}, ["schema must be 1"]),
        ({"schema": True}, ["schema must be 1, got True"]),
        ({"extra": 1}, ["extra", "no others"]),
        ({"rules": {"depth.mlp": "int8"}}, ["rules must be a list"]),
        ({"rules": [{"zone": "depth.mlp"}]}, ["a rule must have the fields ('zone', 'format')"]),
        ({"rules": [{"zone": "depth.mlp", "format": "int8", "why": ""}]}, ["why"]),
        ({"rules": [{"zone": "depth.mlp", "format": 8}]}, ["pairs"]),
        ({"rules": [{"zone": "depth.mlp", "format": "int9"}]}, ["int9"]),
        ({"rules": [{"zone": "*", "format": "int8"}]}, ["safe zone"]),
        ({"name": 3}, ["name must be a string"]),
    ],
)
def test_files_that_are_no_policy(tmp_path: Any, change: dict[str, Any], words: list[str]) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({**PRESETS["int8"].to_dict(), **change}))
    with pytest.raises(ValueError) as caught:
        PrecisionPolicy.load(path)
    assert all(word in str(caught.value) for word in (str(path), *words))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"schema": 1}', "\xff", "[" * 100_000),
        '{"schema": 1, "name": "a", "rules": [], "rules": [{"zone": "kv", "format": "bf16"}]}',
        '{"schema": 1, "name": "a", "rules": NaN}',
    ],
    ids=lambda text: text[:20],
)
def test_files_that_are_no_json(tmp_path: Any, text: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"policy\.json"):
        PrecisionPolicy.load(path)
    with pytest.raises(FileNotFoundError):
        PrecisionPolicy.load(tmp_path / "none.json")


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
        assert (rows[zone]["sqnr_db"] is not None) == lowered
    assert report.copied_bytes == copied
    for zone, table, reads in (
        ("backbone.embedding", model.backbone_model.embed_tokens.embed_audio_tokens.weight, steps + 1),
        ("depth.embedding", model.depth_decoder.model.embed_tokens.weight, steps),
    ):
        assert (rows[zone]["bytes"], rows[zone]["bytes_per_frame"]) == (table.nbytes, reads * table[0].nbytes)
    assert (rows["kv"]["bytes"], rows["kv"]["bytes_per_frame"]) == (report.kv_bytes, None)
    assert rows["codec"]["bytes"] == sum(p.nbytes for p in model.codec_model.parameters())
    assert report.bytes_per_frame == sum(row["bytes_per_frame"] or 0 for row in report.zones)


MIXED = PrecisionPolicy((
    ("depth.head.[1-2]", "keep"),
    ("depth.head.3", "int4:32"),
    ("depth.head", "fp8"),
    ("*.mlp", "int4"),
    ("depth.attention", "fp16"),
    ("backbone.attention", "bf16"),
    ("depth.projection", "int4:64"),
    ("backbone.embedding", "int8"),
    ("depth.embedding", "int4:32"),
))  # fmt: skip


@pytest.mark.parametrize("name", ["base", "eight_codebooks"])
@pytest.mark.parametrize("policy", [*PRESETS.values(), MIXED], ids=lambda policy: policy.name)
def test_bytes_are_known_before_there_is_a_model(name: str, policy: PrecisionPolicy) -> None:
    model = accelerate(build(name), precision=policy, mode="eager", progress=False)
    spec, report = read_spec(model), model.acceleration.report()
    planned = planned_table(spec, policy, torch.float32)
    assert [row["zone"] for row in planned] == [row["zone"] for row in report.zones[:-2]]
    for row, real in zip(planned, report.zones):
        assert all(row[key] == real[key] for key in ("bytes", "bytes_per_frame")), row
        assert real["format"] == ("keep (float32)" if row["format"] == "keep" else row["format"])


def test_neighbouring_heads_share_a_row() -> None:
    report = accelerate(build("eight_codebooks"), precision=MIXED, mode="eager", progress=False).acceleration.report()
    rows = {row["zone"]: row for row in report.zones if row["zone"].startswith("depth.head")}
    assert {zone: row["format"] for zone, row in rows.items()} == {
        "depth.head.1-2": "keep (float32)",
        "depth.head.3": "int4:32",
        "depth.head.4-7": "fp8",
    }
    text = str(report)
    assert all(zone in text for zone in rows)
    for line in text.splitlines():
        if line.startswith("depth.head.1-2"):
            assert line.endswith("exact")


def test_the_signal_that_a_format_leaves() -> None:
    """Per zone over all its matrices, energies summed, against the errors taken from the stock weights."""
    model = build("eight_codebooks", std=0.1, dtype=torch.bfloat16)
    model.backbone_model.layers[0].mlp.gate_proj.weight.data.mul_(3)
    wanted = {}
    groups = matrices(model)
    heads = [head.t() for head in groups.pop("depth.head")[0]]
    groups |= {"depth.head.1-2": heads[:2], "depth.head.3": heads[2:3], "depth.head.4-7": heads[3:]}
    groups["backbone.embedding"] = [model.backbone_model.embed_tokens.embed_audio_tokens.weight]
    groups["depth.embedding"] = [model.depth_decoder.model.embed_tokens.weight]
    for zone, weights in groups.items():
        first = zone.partition("-")[0]
        pairs = [(w.detach().float(), lowered(w.detach(), MIXED.format_of(first))) for w in weights]
        noise = sum(float((a - b).square().sum()) for a, b in pairs)
        wanted[zone] = 10 * math.log10(sum(float(a.square().sum()) for a, _ in pairs) / noise) if noise else None
    report = accelerate(model, precision=MIXED, mode="eager", progress=False).acceleration.report()
    got = {row["zone"]: row["sqnr_db"] for row in report.zones}
    assert got == pytest.approx({**wanted, "kv": None, "codec": None}, abs=1e-3)
    assert got["backbone.attention"] is None, "bf16 is what it was"
    assert 15 < got["backbone.mlp"] < 25 < got["depth.head.4-7"] < 35 < got["backbone.embedding"] < 50
    assert f"{got['backbone.mlp']:.1f} dB" in str(report)


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "fp32", "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_codec_in_another_format(fmt: str, dtype: torch.dtype) -> None:
    """Before the copy has been made they are what it will hold."""
    model = build(dtype=dtype)
    accelerate(model, precision=PrecisionPolicy((("codec", fmt),)), mode="eager", progress=False)
    before = model.acceleration.report()
    model.acceleration._sound(torch.ones(1, 2, model.config.num_codebooks, dtype=torch.long))
    after = model.acceleration.report()
    row = before.zones[-1]
    assert row == after.zones[-1] and row["format"].startswith(fmt)
    held = sum(p.nbytes for p in model.codec_model.parameters())
    copied = after.copied_bytes - before.copied_bytes
    if fmt == "keep" or {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[fmt] == dtype:
        assert (row["bytes"], copied) == (held, 0)
    else:
        assert row["bytes"] == copied > 0


def test_tied_embeddings_count_once() -> None:
    policy = PrecisionPolicy((("*.embedding", "int8"),))
    for precision in (PRESETS["exact"], policy):
        report = accelerate(build("tied"), precision=precision, mode="eager", progress=False).acceleration.report()
        rows = {row["zone"]: row for row in report.zones}
        assert rows["depth.embedding"]["bytes"] == rows["backbone.embedding"]["bytes"] > 0
        assert {zone for zone, row in rows.items() if row["shared_with"]} == {"depth.embedding"}
        assert report.bytes == sum(row["bytes"] for row in report.zones) - rows["depth.embedding"]["bytes"]
        assert report.to_dict()["bytes"] == report.bytes
        line = next(line for line in str(report).splitlines() if line.startswith("sum"))
        assert f"{report.bytes / 1e6:.1f} MB" in line and "depth.embedding is backbone.embedding" in line
    apart = PrecisionPolicy((("backbone.embedding", "int8"), ("depth.embedding", "int4:32")))
    report = accelerate(build("tied"), precision=apart, mode="eager", progress=False).acceleration.report()
    assert report.bytes == sum(row["bytes"] for row in report.zones)
    assert (
        report.bytes
        > accelerate(build("tied"), precision=policy, mode="eager", progress=False).acceleration.report().bytes
    )


@pytest.mark.parametrize("size", [3.2e38, 1e-25, 1.0])
def test_the_signal_of_weights_whose_squares_do_not_fit_fp32(size: float) -> None:
    """int8 keeps the same signal of a matrix at any scale."""
    matrix = torch.linspace(-1, 1, 40 * 24).view(40, 24)
    _, wanted = _converted("matrix", matrix, "int8")
    _, got = _converted("matrix", matrix * size, "int8")
    assert got.signal / got.noise == pytest.approx(wanted.signal / wanted.noise, rel=1e-3)
    assert got.signal == pytest.approx(wanted.signal * size**2)


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
    assert data["bytes_per_frame"] == sum(row["bytes_per_frame"] or 0 for row in data["zones"])


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
