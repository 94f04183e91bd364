"""Decode products: the kernels against fp64 on dequantised weights, by the one tolerance rule."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from csm_kernels import _gemv_tensor, _tiles, gemv_kernel
from csm_kernels._tiles import override_tiles
from csm_kernels.gemv import gemv, gemv_swiglu
from csm_kernels.gemv_kernel import launch_gemv, launch_gemv_swiglu, workspace_size
from csm_kernels.quant import GROUPS, QuantWeight, dequantize, quantize
from csm_kernels.testing import assert_close, assert_untouched, guarded, sqnr_db
from kernels.interpreter import large_tiles

EPS = 1e-5
PLAIN = ("float32", "bfloat16", "float16")
FORMATS = (*PLAIN, "int8", "fp8", "int4", "int4 asymmetric")
TAILS = ((1, 63), (63, 127), (127, 257), (257, 1), (33, 999))
Weight = Tensor | QuantWeight


@pytest.fixture(autouse=True)
def coarse() -> Iterator[None]:
    """The interpreter takes 2 to 5 ms for each program, whatever its size: few and large ones there."""
    with large_tiles("gemv_plain", BLOCK_N=64):
        yield


def stored(kind: str, weight: Tensor, group: int = 128) -> Weight:
    if kind in PLAIN:
        return weight.to(getattr(torch, kind))
    return quantize(weight, kind.removesuffix(" asymmetric"), group=group, symmetric=not kind.endswith("asymmetric"))


def matrix(kind: str, height: int, width: int, device: torch.device, group: int = 128) -> Weight:
    """Normal, and skewed in every other row."""
    weight = torch.randn(height, width) * width**-0.5
    weight[1::2] = weight[1::2].abs() + 0.02
    return moved(stored(kind, weight, group), device)


def moved(weight: Weight, device: torch.device) -> Weight:
    if isinstance(weight, QuantWeight):
        return QuantWeight(weight.data.to(device), weight.scale.to(device), weight.padding)
    return weight.to(device)


def normed(x: Tensor, norm_weight: Tensor | None) -> Tensor:
    if norm_weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm_weight.to(x.dtype)


def product(x: Tensor, weight: Weight, norm_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In one dtype throughout, but the norm, which stock models compute in fp32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return functional.linear(normed(x.to(wide), norm_weight).to(dtype), dequantize(weight).to(dtype)).to(wide)


def check(ours: Tensor, x: Tensor, weight: Weight, dtype: torch.dtype, norm_weight: Tensor | None = None) -> None:
    """Against what eager PyTorch makes of the same product in ``dtype``."""
    truth, eager = product(x, weight, norm_weight, torch.float64), product(x, weight, norm_weight, dtype)
    assert_close(ours, truth, eager.to(dtype), name="gemv", terms=x.shape[1])


def rounding(kind: str, rows: int) -> torch.dtype:
    """What the op says it rounds x to where x needs rounding."""
    if kind == "float32" or (rows <= 2 and not kind.startswith("int4")):
        return torch.float32
    return torch.float16 if kind == "float16" else torch.bfloat16


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(("height", "width"), TAILS)
@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("kind", FORMATS)
def test_tails(device: torch.device, kind: str, rows: int, height: int, width: int) -> None:
    """x is exact in 16 bits here, so every kernel answers for fp32 sums."""
    x = torch.randn(rows, width).to(torch.float16 if kind == "float16" else torch.bfloat16).to(device)
    weight = matrix(kind, height, width, device)
    out = gemv(x, weight)
    assert out.dtype == torch.float32 and out.is_contiguous()
    check(out, x, weight, torch.float32)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("kind", FORMATS)
def test_norm_bias_and_residual(device: torch.device, kind: str, rows: int) -> None:
    x, weight = 30 * torch.randn(rows, 384).to(device), matrix(kind, 70, 384, device)
    norm_weight = (torch.rand(384) + 0.5).to(torch.bfloat16).to(device)
    bias, residual = torch.randn(70, device=device), torch.randn(rows, 70, device=device)
    dtype = rounding(kind, rows)
    check(gemv(x, weight), x, weight, dtype)
    out = gemv(x, weight, bias, residual, norm_weight, EPS)
    check(out - bias - residual, x, weight, dtype, norm_weight)
    check(gemv(x, weight, bias) - bias, x, weight, dtype)
    check(gemv(x, weight, None, residual) - residual, x, weight, dtype)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", ["int4", "int4 asymmetric"])
@pytest.mark.parametrize("width", [1024, 999, 40])
def test_groups(device: torch.device, kind: str, group: int, width: int) -> None:
    x, weight = torch.randn(5, width).to(torch.bfloat16).to(device), matrix(kind, 40, width, device, group)
    check(gemv(x, weight), x, weight, torch.float32)


@pytest.mark.parametrize(("height", "width"), [(1, 63), (63, 2), (33, 128), (257, 130), (40, 999)])
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_transposed_weight_is_read_where_it_lies(
    device: torch.device, kind: str, rows: int, height: int, width: int
) -> None:
    """As the stock depth decoder stores its heads: ``[D, V]``, used as ``[V, D]``; a part of a wider one, too."""
    x, norm_weight = torch.randn(rows, width).to(device), (torch.rand(width) + 0.5).to(device)
    bias, residual = torch.randn(height).to(device), torch.randn(rows, height).to(device)
    wide = (torch.randn(width, height + 3) * width**-0.5).to(getattr(torch, kind)).to(device)
    wide[:, height:] = float("nan")
    weight = wide[:, :height].t()
    assert gemv_kernel.is_transposed(weight)
    check(gemv(x, weight), x, weight, torch.float32)
    out = gemv(x, weight, bias, residual, norm_weight, EPS)
    truth, eager = (
        product(x, weight, norm_weight, d) + bias.to(d) + residual.to(d) for d in (torch.float64, torch.float32)
    )
    assert_close(out, truth, eager, name="gemv", terms=width)


@pytest.mark.parametrize(("height", "width"), [(2051, 1024), (40, 8192), (256, 2048)])
@pytest.mark.parametrize(("kind", "rows"), [("bfloat16", 1), ("int8", 1), ("fp8", 2), ("int4", 1), ("bfloat16", 8)])
def test_the_models_sizes(device: torch.device, kind: str, rows: int, height: int, width: int) -> None:
    x, weight = torch.randn(rows, width).to(torch.bfloat16).to(device), matrix(kind, height, width, device)
    with large_tiles("gemv_plain", BLOCK_N=256), large_tiles("gemv_tensor", BLOCK_N=128):
        check(gemv(x, weight), x, weight, torch.float32)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("kind", FORMATS)
def test_swiglu(device: torch.device, kind: str, rows: int) -> None:
    x = torch.randn(rows, 200).to(device)
    gate, up = matrix(kind, 33, 200, device), matrix(kind, 33, 200, device)
    for norm_weight in (None, (torch.rand(200) + 0.5).to(device)):
        out = gemv_swiglu(x, gate, up, norm_weight, EPS)
        dtype = rounding(kind, rows)
        parts = [[product(x, matrix, norm_weight, d).to(d) for matrix in (gate, up)] for d in (torch.float64, dtype)]
        truth, eager = (functional.silu(a) * b for a, b in parts)
        assert_close(out, truth, eager, name="gemv_swiglu", terms=200)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_out_dtype(device: torch.device, kind: str, out_dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 96).to(torch.bfloat16).to(device), matrix(kind, 40, 96, device)
    out = gemv(x, weight, out_dtype=out_dtype)
    assert torch.equal(out, gemv(x, weight).to(out_dtype)), "rounded more than once"
    twice = gemv_swiglu(x, weight, weight, out_dtype=out_dtype)
    assert torch.equal(twice, gemv_swiglu(x, weight, weight).to(out_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_x(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(2, 127).to(dtype).to(device)
    weight = matrix("int8", 20, 127, device)
    check(gemv(x, weight), x, weight, torch.float32)


def test_int4_and_the_tensor_cores_say_what_they_round(device: torch.device) -> None:
    """An fp32 x is rounded once, to bf16, for int4; the plain kernel does not round it."""
    x = torch.randn(1, 512, device=device)
    for kind, rounded in (("int4", x.to(torch.bfloat16)), ("int8", x)):
        weight = matrix(kind, 64, 512, device)
        ours, same = gemv(x, weight), product(rounded, weight, None, torch.float64)
        assert sqnr_db(ours, same) > 110.0
    assert sqnr_db(gemv(x, matrix("int4", 64, 512, device)), product(x, weight, None, torch.float64)) < 60.0


# ------------------------------------------------------------------------------------------------ splits and tiles


@pytest.mark.parametrize("kind", ["int4", "bfloat16"])
@pytest.mark.parametrize("width", [8192, 4100])
def test_partial_sums(device: torch.device, kind: str, width: int) -> None:
    """A narrow matrix is split along K; the second kernel adds bias and residual once."""
    x, weight = torch.randn(3, width).to(torch.bfloat16).to(device), matrix(kind, 24, width, device)
    size = workspace_size(x, weight)
    assert size >= 2 * 3 * 24
    bias, residual = torch.randn(24, device=device), torch.randn(3, 24, device=device)
    out = torch.empty(3, 24, device=device)
    workspace, whole = guarded((size,), torch.float32, device)
    launch_gemv(x, weight, bias, residual, None, 0.0, out, workspace)
    assert workspace.isfinite().all()
    assert_untouched(whole)
    assert torch.equal(out, gemv(x, weight, bias, residual))
    check(out - bias - residual, x, weight, torch.float32)
    launch_gemv(x, weight, bias, residual, None, 0.0, out)
    check(out - bias - residual, x, weight, torch.float32)


def test_a_workspace_that_is_too_small(device: torch.device) -> None:
    x, weight = torch.zeros(1, 4096, device=device), matrix("int4", 16, 4096, device)
    out = torch.empty(1, 16, device=device)
    for workspace in (torch.empty(workspace_size(x, weight) - 1), torch.empty(4096, dtype=torch.float16)):
        with pytest.raises(ValueError, match="workspace must be"):
            launch_gemv(x, weight, None, None, None, 0.0, out, workspace.to(device))


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "fp8", "float32"])
def test_more_tiles_than_programs(device: torch.device, kind: str) -> None:
    """A program goes through several tiles, with x in registers or not."""
    for rows, width in ((1, 65), (2, 300)):
        x, weight = torch.randn(rows, width).to(device), matrix(kind, 45, width, device)
        norm_weight = torch.rand(width, device=device)
        for block in (64, 512):
            with override_tiles("gemv_plain", BLOCK_N=4, BLOCK_K=block, PROGRAMS=2, num_warps=1):
                check(gemv(x, weight, None, None, norm_weight, EPS), x, weight, torch.float32, norm_weight)
                out = gemv_swiglu(x, weight, weight, norm_weight, EPS)
                gate = product(x, weight, norm_weight, torch.float64)
                eager = product(x, weight, norm_weight, torch.float32)
                assert_close(out, functional.silu(gate) * gate, functional.silu(eager) * eager, terms=width)


def test_small_matrices_have_two_programs_for_each_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100's 132, with weights as the depth decoder's down projection and the small projections have them."""
    monkeypatch.setattr(_tiles, "_overrides", {})  # the heuristic itself
    for kind, height, width in (
        ("bfloat16", 1024, 8192),
        ("int8", 1024, 8192),
        ("int4", 1024, 8192),
        ("int8", 1024, 1024),
    ):
        data = torch.empty(height, width // 2 if kind == "int4" else width, dtype=torch.uint8)
        weight: Weight = data.to(torch.bfloat16)
        if kind == "int8":
            weight = QuantWeight(data.view(torch.int8), torch.ones(height))
        if kind == "int4":
            weight = QuantWeight(data, torch.ones(height, width // 128, dtype=torch.bfloat16))
        plan = gemv_kernel._plan(torch.empty(1, width), weight, False, 1)
        assert plan.programs * plan.splits * plan.sizes["num_warps"] >= 2 * 132, kind


# ------------------------------------------------------------------------------------------------ the house's checks


@pytest.mark.parametrize(("kind", "rows"), [("bfloat16", 2), ("bfloat16", 3), ("int8", 2), ("int4", 3)])
def test_strides_are_walked_and_not_copied(device: torch.device, kind: str, rows: int) -> None:
    x = torch.randn(2 * rows, 200, device=device).to(torch.bfloat16)[::2, 7:135]
    residual = torch.randn(rows, 90, device=device)[:, 20:60]
    bias = torch.randn(99, device=device)[3:43]
    packed = matrix(kind, 80, 128, device)
    weight: Weight = (
        packed[::2]
        if isinstance(packed, Tensor)
        else packed._replace(data=packed.data[::2], scale=packed.scale[::2].contiguous())
    )
    assert not x.is_contiguous() and not weight.data.is_contiguous()
    check(gemv(x, weight), x, weight, torch.float32)
    out = gemv(x, weight, bias, residual)
    assert torch.allclose(out, gemv(x, weight) + bias + residual, atol=1e-6)
    wide, whole = guarded((rows, 64), torch.float32, device)
    launch_gemv(x, weight, bias, residual, None, 0.0, wide[:, 8:48])
    assert torch.equal(wide[:, 8:48], out) and wide[:, :8].isnan().all() and wide[:, 48:].isnan().all()
    assert_untouched(whole)


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "fp8", "int4"])
def test_broken_rows_stay_alone(device: torch.device, kind: str, rows: int) -> None:
    """A NaN of x in its row, an infinite weight or scale in its column."""
    x, weight = torch.randn(rows, 130).to(torch.bfloat16).to(device), matrix(kind, 12, 130, device)
    norm_weight = torch.ones(130, device=device)
    clean = gemv(x, weight, None, None, norm_weight, EPS)
    broken = x.clone()
    broken[1, 129] = float("nan")
    out = gemv(broken, weight, None, None, norm_weight, EPS)
    keep = [m for m in range(rows) if m != 1]
    assert out[1].isnan().all() and torch.equal(out[keep], clean[keep])
    if isinstance(weight, QuantWeight):
        weight = weight._replace(scale=weight.scale.clone())
        weight.scale[5] = float("inf")
    else:
        weight = weight.clone()
        weight[5, 129] = float("inf")
    out = gemv(x, weight, None, None, norm_weight, EPS)
    assert not out[:, 5].isfinite().any()
    others = [n for n in range(12) if n != 5]
    assert torch.equal(out[:, others], clean[:, others])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_every_output_is_written_and_nothing_else(device: torch.device, kind: str, rows: int) -> None:
    x, weight = torch.randn(rows, 257).to(device), matrix(kind, 67, 257, device)
    out, whole = guarded((rows, 67), torch.bfloat16, device)
    launch_gemv(x, weight, None, None, torch.ones(257, device=device), EPS, out)
    gated, gated_whole = guarded((rows, 67), torch.bfloat16, device)
    launch_gemv_swiglu(x, weight, weight, None, 0.0, gated, evict_first=True)
    for buffer, zone in ((out, whole), (gated, gated_whole)):
        assert buffer.isfinite().all()
        assert_untouched(zone)


@pytest.mark.parametrize(("kind", "rows"), [("bfloat16", 1), ("bfloat16", 4), ("int4", 2)])
def test_the_same_every_time(device: torch.device, kind: str, rows: int) -> None:
    x, weight = torch.randn(rows, 4096).to(device), matrix(kind, 20, 4096, device)
    first = gemv(x, weight), gemv_swiglu(x, weight, weight)
    for _ in range(2):
        assert torch.equal(first[0], gemv(x, weight)) and torch.equal(first[1], gemv_swiglu(x, weight, weight))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.dispatcher
def test_the_ops_are_sound(device: torch.device, kind: str) -> None:
    x, weight = torch.randn(3, 40).to(device), matrix(kind, 9, 40, device)
    scale, padding = (weight.scale, weight.padding) if isinstance(weight, QuantWeight) else (None, 0)
    ops = torch.ops.csm_kernels
    bias, residual, norm_weight = (
        torch.randn(9, device=device),
        torch.randn(3, 9, device=device),
        torch.ones(40, device=device),
    )
    args = (x, weight.data, scale, padding, bias, residual, norm_weight, EPS, torch.bfloat16)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    utils = utils[1:] if kind == "fp8" else utils  # the schema test multiplies its inputs, which fp8 cannot do
    torch.library.opcheck(ops.gemv.default, args, test_utils=utils)
    gated = (
        x,
        weight.data,
        scale,
        weight.data.clone(),
        None if scale is None else scale.clone(),
        padding,
        None,
        0.0,
        torch.float32,
    )
    torch.library.opcheck(ops.gemv_swiglu.default, gated, test_utils=utils)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.dispatcher
def test_compiles_whole(device: torch.device, kind: str) -> None:
    x, weight = torch.randn(2, 70).to(device), matrix(kind, 9, 70, device)

    def step(x: Tensor, weight: Any) -> Tensor:
        return gemv(x * 2, weight, out_dtype=torch.bfloat16) + gemv_swiglu(x, weight, weight)

    assert torch.allclose(torch.compile(step, fullgraph=True)(x, weight), step(x, weight), atol=1e-6)


def test_empty(device: torch.device) -> None:
    weight = torch.ones(4, 8, device=device)
    assert gemv(torch.ones(0, 8, device=device), weight).shape == (0, 4)
    assert gemv(torch.ones(2, 8, device=device), weight[:0]).shape == (2, 0)


def test_a_stack_is_read_one_matrix_at_a_time(device: torch.device) -> None:
    stack = torch.randn(3, 12, 128)
    for kind in ("int8", "fp8", "int4", "int4 asymmetric"):
        packed = moved(stored(kind, stack), device)
        assert isinstance(packed, QuantWeight)
        one = QuantWeight(packed.data[1], packed.scale[1])
        x = torch.randn(1, 128).to(torch.bfloat16).to(device)
        check(gemv(x, one), x, one, torch.float32)
        assert torch.equal(dequantize(one), dequantize(packed)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(17, 8)}, r"x must be \[M, K\] with M up to 16"),
        ({"x": torch.ones(8)}, r"x must be \[M, K\]"),
        ({"x": torch.ones(2, 0), "weight": torch.ones(4, 0)}, r"x must be \[M, K\]"),
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, "x must be fp32, bf16 or fp16"),
        ({"x": torch.ones(8, 2).t()}, "x must have unit stride"),
        ({"weight": torch.ones(4, 9)}, r"weight must be \[N, 8\]"),
        ({"weight": torch.ones(2, 4, 8)}, r"weight must be \[N, 8\]"),
        ({"weight": torch.ones(4, 8, dtype=torch.float64)}, "weight must be fp32"),
        ({"weight": torch.ones(4, 8, dtype=torch.int8)}, "weight must be fp32"),
        ({"weight": torch.ones(4, 16)[:, ::2]}, "weight must have unit stride"),
        ({"weight": quantize(torch.ones(4, 9), "int4")}, r"weight must be \[N, 8\]"),
        ({"weight": QuantWeight(torch.ones(4, 8, dtype=torch.int8), torch.ones(5))}, "weight.scale must be"),
        ({"weight": QuantWeight(torch.ones(4, 8, dtype=torch.int16), torch.ones(4))}, "data of a QuantWeight"),
        ({"bias": torch.ones(3)}, r"bias must be \[4\]"),
        ({"bias": torch.ones(4, dtype=torch.int32)}, "bias must be fp32"),
        ({"residual": torch.ones(1, 4)}, r"residual must be \[2, 4\]"),
        ({"residual": torch.ones(4, 2).t()}, "residual must have unit stride"),
        ({"norm_weight": torch.ones(4)}, r"norm_weight must be \[8\]"),
        ({"out_dtype": torch.int32}, "out_dtype must be"),
    ],
)
def test_bad_arguments(device: torch.device, change: dict[str, Any], message: str) -> None:
    def there(value: Any) -> Any:
        return moved(value, device) if isinstance(value, Tensor | QuantWeight) else value

    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(4, 8), **change}
    with pytest.raises(ValueError, match=message):
        gemv(**{name: there(value) for name, value in arguments.items()})


def test_bad_pairs(device: torch.device) -> None:
    x, weight = torch.ones(2, 8, device=device), torch.ones(4, 8, device=device)
    int8 = moved(quantize(torch.ones(4, 8), "int8"), device)
    small, large = (moved(quantize(torch.ones(4, 8), "int4", group=group), device) for group in (32, 64))
    for gate, up in ((weight, weight[:3]), (weight, weight.bfloat16()), (weight, int8), (int8, weight), (small, large)):
        with pytest.raises(ValueError, match="up must have the"):
            gemv_swiglu(x, gate, up)


# ------------------------------------------------------------------------------------------------ the unpacking


def run_ptx(text: str, word: int) -> list[int]:
    """What the unpacking's instructions make of one 32-bit register: its four results."""

    def pair(value: int) -> Tensor:
        return torch.tensor([value & 0xFFFF, value >> 16]).to(torch.uint16).view(torch.bfloat16).float()

    registers = {"$4": word}

    def read(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in re.findall(r"^\s*(\w[\w.]*) ([^;]+);", text, re.M):
        name, (target, *operands) = line[0], line[1].replace(" ", "").split(",")
        if name == "and.b32":
            value = read(operands[0]) & read(operands[1])
        elif name == "shr.u32":
            value = read(operands[0]) >> read(operands[1])
        elif name == "mov.b32":
            value = read(operands[0])
        elif name == "prmt.b32":
            source = (read(operands[0]) | read(operands[1]) << 32).to_bytes(8, "little")
            value = int.from_bytes(bytes(source[read(operands[2]) >> 4 * i & 7] for i in range(4)), "little")
        else:
            assert name == "fma.rn.bf16x2"
            a, b, c = (pair(read(operand)).double() for operand in operands)
            low, high = (a * b + c).to(torch.bfloat16).view(torch.uint16).tolist()
            value = low | high << 16
        registers[target] = value
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize(("unpack", "zero"), [("_UNPACK_SIGNED", 8), ("_UNPACK_UNSIGNED", 0)])
def test_the_unpacking_instructions(unpack: str, zero: int) -> None:
    """The interpreter runs no inline assembly: its text is run here, on every byte in every place."""
    text = getattr(_gemv_tensor, unpack).value
    for first in range(256):
        packed = [first, (first + 77) % 256, (5 * first + 3) % 256, 255 - first]
        results = run_ptx(text, int.from_bytes(bytes(packed), "little"))
        halves = [half for result in results for half in (result & 0xFFFF, result >> 16)]
        values = torch.tensor(halves).to(torch.uint16).view(torch.bfloat16).tolist()
        assert values == [(b & 15) - zero for b in packed] + [(b >> 4) - zero for b in packed]
