"""The native CPU kernels: products, sampling and whole frames against their references, on every instruction set.

Instruction sets this machine lacks are skipped; ``avx2`` and ``portable`` run everywhere that CI does.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from csm_models import CONFIGS, build, code_prompt, on_fast_path, on_stock_path, stock, text_prompt

from csm_kernels import cpu
from csm_kernels.cpu import library
from csm_kernels.quant import QuantWeight, dequantize, quantize
from csm_kernels.sampling import NoiseKey, SamplingParams, gumbel_noise_ref, sample_ref
from csm_runtime import accelerate
from csm_runtime.doctor import diagnose

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=f"native kernels: {cpu.why_not()}")

ISAS = ("portable", "avx2", "avx2vnni", "avx512")
GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}
FORMATS = ("fp32", "bf16", "fp16", "int8", "fp8", *(f"int4:{g}{a}" for g in (32, 64, 128) for a in ("", ":asymmetric")))
INTEGER_ERROR = 0.01
"""Of the largest output: activations are int8 there, a group's largest at 127."""


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in cpu.instruction_sets():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def stored(weight: torch.Tensor, fmt: str) -> torch.Tensor | QuantWeight:
    name, _, rest = fmt.partition(":")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name in dtypes:
        return weight.to(dtypes[name])
    group, _, kind = rest.partition(":")
    return quantize(weight, name, group=int(group or 128), symmetric=kind != "asymmetric")


def largest_error(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made.double() - wanted).abs().max() / wanted.abs().max())


# ---------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(64, 256), (37, 129), (5, 1), (1, 31), (130, 1000), (16, 2048), (3, 65)])
def test_product_equals_the_dequantised_one(isa: str, fmt: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[0] * 7 + shape[1])
    weight = stored(torch.randn(shape, generator=generator), fmt)
    bias = torch.randn(shape[0], generator=generator)
    for rows in (1, 2, 3, 5, 7, 8, 9, 16):
        x = torch.randn(rows, shape[1], generator=generator)
        wanted = x.double() @ dequantize(weight).double().T + bias
        made = cpu.gemv_cpu(x, weight, bias, isa=isa)
        limit = 2e-6 if fmt.partition(":")[0] not in ("int8", "int4") else INTEGER_ERROR
        # Rows that cancel to little have no more than the size of what was added to measure an error by.
        scale = (x.double().abs() @ dequantize(weight).double().abs().T + bias.abs()).max()
        assert float((made - wanted).abs().max() / scale) < limit, rows


@pytest.mark.parametrize("fmt", ["int8", "int4:32", "int4:128", "int4:64:asymmetric"])
def test_integer_products_are_exact_on_their_own_codes(isa: str, fmt: str) -> None:
    """Activations that are their own int8 codes lose nothing: every nibble, byte and group must be in its place."""
    generator = torch.Generator().manual_seed(3)
    weight = stored(torch.randn(40, 640, generator=generator), fmt)
    x = torch.randint(-127, 128, (4, 640), generator=generator).float()
    x[:, ::32] = 127.0  # so that each group's scale is 1
    wanted = x.double() @ dequantize(weight).double().T
    assert largest_error(cpu.gemv_cpu(x, weight, isa=isa), wanted) < 1e-6


@pytest.mark.parametrize("fmt", FORMATS)
def test_bits_do_not_depend_on_threads_or_neighbours(isa: str, fmt: str) -> None:
    weight = stored(torch.randn(147, 384), fmt)
    x = torch.randn(16, 384)
    alone = cpu.gemv_cpu(x[:1], weight, threads=1, isa=isa)
    for threads in (2, 3, 7):
        assert torch.equal(cpu.gemv_cpu(x[:1], weight, threads=threads, isa=isa), alone)
    for rows in range(2, 17):
        made = cpu.gemv_cpu(x[:rows], weight, isa=isa)[:1]
        # Sums run along a row in one order, whatever the number of rows; only what is left over may be contracted otherwise.
        assert torch.equal(made, alone), rows


@pytest.mark.parametrize("fmt", FORMATS)
def test_instruction_sets_agree(fmt: str) -> None:
    weight = stored(torch.randn(64, 1024), fmt)
    x = torch.randn(2, 1024)
    made = [cpu.gemv_cpu(x, weight, isa=isa).double() for isa in cpu.instruction_sets()]
    for other in made[1:]:
        # A rounding tie of an activation may fall either way: one code of 127 in a thousand terms.
        assert largest_error(other, made[0]) < (1e-6 if fmt.partition(":")[0] not in ("int8", "int4") else 1e-3)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_activations_are_not_hidden(isa: str, fmt: str, bad: float) -> None:
    x = torch.randn(2, 200)
    x[1, 150] = bad
    made = cpu.gemv_cpu(x, stored(torch.randn(24, 200), fmt), isa=isa)
    assert torch.isfinite(made[0]).all()
    assert not torch.isfinite(made[1]).any()


def test_fp8_has_every_value(isa: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = QuantWeight(codes[:, None].expand(256, 64).contiguous(), torch.ones(256))
    for column in (0, 63):  # in a vector, and in a row that has no whole one
        x = torch.zeros(1, 64)
        x[0, column] = 1.0
        finite = torch.isfinite(codes.float())
        made = cpu.gemv_cpu(x, weight, isa=isa)[0]
        assert torch.equal(made[finite], codes.float()[finite])
    tail = QuantWeight(codes[:, None].contiguous(), torch.ones(256))
    assert cpu.gemv_cpu(torch.ones(1, 1), tail, isa=isa)[0].isnan().sum() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x.double(), w), "x must be"),
        (lambda x, w: (x[0], w), "x must be"),
        (lambda x, w: (x[:, :-1], w), "x must be"),
        (lambda x, w: (x.repeat(9, 1), w), "1 to 16 rows"),
        (lambda x, w: (x[:0], w), "1 to 16 rows"),
        (lambda x, w: (x, w.double()), "weight must be float32"),
        (lambda x, w: (x, w[None]), r"weight must be \[N, K\]"),
        (lambda x, w: (x, w.T.contiguous().T), "contiguous rows"),
        (lambda x, w: (x, w.to("meta")), "on the CPU"),
    ],
)
def test_products_name_what_is_wrong(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.gemv_cpu(*change(torch.randn(2, 64), torch.randn(8, 64)))


def test_rows_of_a_wider_matrix(isa: str) -> None:
    wide = torch.randn(12, 300)
    x = torch.randn(1, 200)
    wanted = x.double() @ wide[:, 50:250].double().T
    assert largest_error(cpu.gemv_cpu(x, wide[:, 50:250], isa=isa), wanted) < 2e-6


def test_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="isa must be one of .*portable.* got 'sse'"):
        cpu.gemv_cpu(torch.randn(1, 8), torch.randn(8, 8), isa="sse")
    monkeypatch.setenv(library.ISA_VARIABLE, "mmx")
    with pytest.raises(ValueError, match="CSM_KERNELS_CPU_ISA must be one of"):
        cpu.gemv_cpu(torch.randn(1, 8), torch.randn(8, 8))


# ---------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("vocab", [2, 33, 2051])
@pytest.mark.parametrize("seed", range(4))
def test_sampling_draws_the_reference_tokens(vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = 64
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits[::5] = logits[::5].round()  # ties
    params = SamplingParams(
        torch.rand(rows, generator=generator) * 1.5 + 0.1,
        torch.randint(1, vocab + 9, (rows,), generator=generator),
        torch.where(torch.rand(rows, generator=generator) < 0.5, 1.0, torch.rand(rows, generator=generator)),
        torch.rand(rows, generator=generator) < 0.9,
    )
    key = NoiseKey(*(torch.randint(-(2**62), 2**62, (rows,), generator=generator) for _ in range(3)))
    tokens, flags = cpu.sample_cpu(logits, params, key, 5)
    noise = gumbel_noise_ref(key, torch.tensor([5]), vocab)
    wanted = sample_ref(logits, params, noise)
    assert not flags.any()
    assert (tokens == wanted).float().mean() > 0.98  # the last bit of a logarithm, and of a cumulative sum, is free
    assert torch.equal(tokens[~params.do_sample], wanted[~params.do_sample])
    plain = params.top_p == 1.0
    assert torch.equal(tokens[plain], wanted[plain])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sampling_flags_broken_rows(bad: float) -> None:
    logits = torch.randn(3, 20)
    logits[1, 7] = bad
    logits[2] = float("-inf")
    params = SamplingParams(torch.ones(3), torch.full((3,), 5), torch.ones(3), torch.ones(3, dtype=torch.bool))
    zeros = torch.zeros(3, dtype=torch.int64)
    tokens, flags = cpu.sample_cpu(logits, params, NoiseKey(zeros, zeros, zeros), 0)
    assert flags.tolist() == [0, 1, 1]
    assert tokens[1:].tolist() == [0, 0]


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 50), float("-inf"))
    logits[0, [3, 30]] = torch.tensor([0.0, 1.0])
    params = SamplingParams(torch.ones(1), torch.tensor([50]), torch.ones(1), torch.ones(1, dtype=torch.bool))
    drawn = set()
    for seed in range(200):
        key = NoiseKey(torch.tensor([seed]), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        drawn.add(int(cpu.sample_cpu(logits, params, key, 1)[0]))
    assert drawn == {3, 30}


# ------------------------------------------------------------------------------------------------------ whole frames


def native(model: Any, **options: Any) -> Any:
    return accelerate(model, mode="native", progress=False, **options)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_tokens_equal_the_stock_models(name: str) -> None:
    model = native(build(name))
    for rows in (1, 3):
        prompt = text_prompt((7, 12, 3)[:rows])
        wanted = stock(model, **prompt, **GREEDY, max_new_tokens=6)
        with on_fast_path(model):
            got = model.generate(**prompt, **GREEDY, max_new_tokens=6)
        assert torch.equal(got, wanted)
    assert model.acceleration.mode == "native"
    assert not model.acceleration.notes
