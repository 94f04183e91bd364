"""The fused decode where there is no Triton: packing, the reference, the teacher-forced pass, all against the stock model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from csm_models import CONFIGS, build
from torch import Tensor

from csm_kernels.depth import PackedDepth, StackShape, depth_decode, depth_logits, pack_depth
from csm_kernels.depth.pack import evictions, packed_bytes
from csm_kernels.quant import QuantWeight, quantize
from csm_kernels.sampling import NoiseKey, SamplingParams
from csm_kernels.testing import assert_close, sqnr_db
from csm_runtime.adapters import hf
from csm_runtime.adapters.hf_passes import Passes
from csm_runtime.metrics import Metrics


def packed_of(model: Any, formats: dict[str, str] | None = None, table: bool = True) -> PackedDepth:
    """The depth decoder of a stock model, packed."""
    spec, weights = hf.read_spec(model), hf.live_weights(model)
    d = spec.depth
    _, (cos, sin) = hf.rotary_tables(model, 64)
    return pack_depth(
        weights.depth,
        weights.depth_norm,
        cos,
        sin,
        StackShape(d.layers, d.hidden, d.ffn, d.heads, d.kv_heads, d.head_dim, d.eps),
        weights.depth_projection,
        weights.depth_heads.transpose(-1, -2),
        weights.depth_embedding,
        formats,
        table=table,
        group=32,
    )


def stock_logits(model: Any, hidden: Tensor, codes: Tensor) -> Tensor:
    """The stock depth decoder, teacher-forced: ``[N, codebooks - 1, V]``."""
    return Passes(model, False, Metrics()).codebook_logits(hidden, codes[:, :-1]).detach()


def greedy(batch: int) -> tuple[SamplingParams, NoiseKey]:
    ones = torch.ones(batch)
    params = SamplingParams(ones, torch.ones(batch, dtype=torch.int64), ones, torch.zeros(batch, dtype=torch.bool))
    return params, NoiseKey(*torch.zeros(3, batch, dtype=torch.int64))


@pytest.mark.parametrize("table", [True, False], ids=["table", "projection"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_codes_are_the_stock_depth_decoders(name: str, table: bool) -> None:
    model = build(name)
    packed = packed_of(model, table=table)
    hidden = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    token = torch.randint(packed.vocab, (5,), generator=torch.Generator().manual_seed(2))
    codes = depth_decode(hidden, token, packed, *greedy(5))
    logits = stock_logits(model, hidden, codes)
    assert torch.equal(logits.argmax(-1), codes[:, 1:]), "each token is the stock model's choice after those before it"
    assert torch.equal(codes[:, 0], token)
    assert torch.allclose(depth_logits(hidden, codes, packed), logits, atol=2e-5)


@pytest.mark.parametrize("fmt", ["int8", "fp8", "int4"])
def test_a_packed_format_is_the_stock_model_on_its_dequantised_weights(fmt: str) -> None:
    model = build("base")
    zones = dict.fromkeys(("attention", "mlp", "projection", "head"), fmt)
    packed = packed_of(model, zones)
    hidden, codes = torch.randn(4, model.config.hidden_size), torch.randint(packed.vocab, (4, packed.codebooks))
    ours, plain = depth_logits(hidden, codes, packed), depth_logits(hidden, codes, packed_of(model))
    least = {"int8": 30.0, "fp8": 18.0, "int4": 8.0}[fmt]
    assert least < sqnr_db(ours, plain) < least + 25, "near the plain weights, and not them"


def test_bf16_obeys_the_tolerance_rule() -> None:
    model, twin = build("base").to(torch.bfloat16), build("base").to(torch.bfloat16).float()
    packed = packed_of(model)
    hidden = torch.randn(6, model.config.hidden_size).to(torch.bfloat16)
    codes = torch.randint(packed.vocab, (6, packed.codebooks))
    truth = stock_logits(twin.double(), hidden.double(), codes)
    assert_close(
        depth_logits(hidden, codes, packed), truth, stock_logits(model, hidden, codes), name="logits", terms=64
    )


def test_what_is_quantised_already_is_taken_as_it_is() -> None:
    model = build("base")
    weights = hf.live_weights(model)
    layers = [
        layer._replace(
            **{
                name: getattr(layer, name)._replace(weight=quantize(getattr(layer, name).weight, "int8"))
                for name in "qkvo"
            }
        )
        for layer in weights.depth
    ]
    packed = packed_of(model)
    spec = packed.stack.shape
    heads = weights.depth_heads.transpose(-1, -2)
    args = (weights.depth_norm, packed.stack.cos, packed.stack.sin, spec, weights.depth_projection, heads)
    mixed = pack_depth(layers, *args, weights.depth_embedding)
    wanted = packed_of(model, {"attention": "int8"})
    assert isinstance(mixed.stack.qkv, QuantWeight)
    assert isinstance(wanted.stack.qkv, QuantWeight)
    assert torch.equal(mixed.stack.qkv.data, wanted.stack.qkv.data)
    assert torch.equal(mixed.stack.o.data, wanted.stack.o.data)
    half = [layer._replace(q=weights.depth[0].q) for layer in layers]
    with pytest.raises(ValueError, match="must share a format"):
        pack_depth(half, *args, weights.depth_embedding)


def test_the_tables_memory_is_what_it_says() -> None:
    model = build("base")
    with_table, without = packed_of(model), packed_of(model, table=False)
    rows = (with_table.codebooks - 1) * with_table.vocab
    assert packed_bytes(with_table) - packed_bytes(without) == rows * with_table.stack.shape.width * 4


def test_layers_stay_in_the_cache_as_long_as_they_fit() -> None:
    packed = packed_of(build("base"))
    sizes = {name: getattr(packed.stack, name).nbytes for name in ("qkv", "o", "gate_up", "down")}
    everything = evictions(packed, 10 * sum(sizes.values()))
    assert {everything[name] for name in sizes} == {"evict_last"}
    assert everything["heads"] == "evict_first", "read once a frame"
    nothing = evictions(packed, 0)
    assert {nothing[name] for name in sizes} == {"evict_first"}
    some = evictions(packed, int((sizes["qkv"] + sizes["o"]) / 0.69))
    assert {name for name in sizes if some[name] == "evict_last"} == set(sorted(sizes, key=lambda n: sizes[n])[:2])


def test_bad_shapes_are_named() -> None:
    model = build("base")
    packed, weights = packed_of(model), hf.live_weights(model)
    spec, heads = packed.stack.shape, weights.depth_heads.transpose(-1, -2)
    good: dict[str, Any] = dict(
        layers=weights.depth,
        norm=weights.depth_norm,
        cos=packed.stack.cos,
        sin=packed.stack.sin,
        shape=spec,
        projection=weights.depth_projection,
        heads=heads,
        embedding=weights.depth_embedding,
    )
    pack_depth(**good)
    for change, message in (
        ({"layers": weights.depth[:-1]}, "layers must be"),
        ({"shape": spec._replace(ffn=spec.ffn + 1)}, r"layers\[0\].gate.weight must be"),
        ({"heads": weights.depth_heads}, "heads must be"),
        ({"embedding": weights.depth_embedding[:-1]}, "embedding must be"),
        (
            {"embedding": quantize(weights.depth_embedding, "int8"), "table": False},
            "embedding must be fp32, bf16 or fp16 without a table, got int8",
        ),
        ({"cos": packed.stack.cos[:1], "sin": packed.stack.sin[:1]}, "cos and sin must have"),
        ({"cos": packed.stack.cos[:, :-2]}, "cos and sin must be"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_depth(**{**good, **change})


def test_the_example_runs() -> None:
    example = Path(__file__).parent.parent / "examples" / "depth_decode.py"
    out = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=True, timeout=300).stdout
    assert "codes [2, 32] on" in out
    assert -7.6 < float(out.split()[-1]) < -3.0, "better than one of 2051 by chance, by what top-k leaves"
