"""The quantisers: how much of the signal each format keeps, what its layout is, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from csm_kernels import quant
from csm_kernels.gemv import gemv, gemv_library, gemv_ref, gemv_streamed, gemv_swiglu, gemv_swiglu_ref, gemv_widened
from csm_kernels.quant import FORMATS, GROUPS, QuantWeight, dequantize, format_of, quantize, quantize_int8, take_rows
from csm_kernels.testing import assert_close, sqnr_db
from csm_runtime import compiling

ALL = ("int8", "fp8", *(("int4", group, symmetric) for group in GROUPS for symmetric in (True, False)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(weight: Tensor, form: Any) -> QuantWeight:
    return quantize(weight, form) if isinstance(form, str) else quantize(weight, *form)


def kept(weight: Tensor, form: Any) -> float:
    return sqnr_db(dequantize(packed(weight, form)), weight.float())


# ------------------------------------------------------------------------------------------------ error


@pytest.mark.parametrize(
    ("form", "least"),
    [
        ("int8", 41.0),
        ("fp8", 31.0),
        (("int4", 128, True), 19.8),
        (("int4", 64, True), 20.4),
        (("int4", 32, True), 21.2),
        (("int4", 128, False), 19.7),
        (("int4", 64, False), 20.6),
        (("int4", 32, False), 21.8),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normal_weights(form: Any, least: float, dtype: torch.dtype) -> None:
    assert kept(normal(256, 1024).to(dtype), form) > least


@pytest.mark.parametrize(
    ("form", "least"),
    [
        ("int8", 31.5),
        ("fp8", 31.0),
        (("int4", 128, True), 14.8),
        (("int4", 32, True), 18.7),
        (("int4", 128, False), 16.8),
    ],
    ids=str,
)
def test_weights_with_outliers(form: Any, least: float) -> None:
    """Two in a thousand ten times as large: a scale serves its whole row or group, a floating point format minds least."""
    weight = normal(256, 1024)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.002] *= 10
    assert kept(weight, form) > least


@pytest.mark.parametrize("group", GROUPS)
def test_offsets_pay_on_skewed_rows(group: int) -> None:
    """Log-normal rows and rows far from zero."""
    for weight, gain in ((normal(64, 512).mul(50).exp(), 4.5), (normal(64, 512) + 0.08, 6.5)):
        assert kept(weight, ("int4", group, False)) > kept(weight, ("int4", group, True)) + gain


def test_the_symmetric_step_beats_the_plain_one() -> None:
    """Level -8 at the signed maximum, or a tenth further in, against ``max / 7``: 1.5 dB."""
    groups = normal(256, 1024).unflatten(-1, (-1, 128))
    step = groups.abs().amax(-1, keepdim=True) / 7
    plain = (groups / step).round() * step
    assert kept(groups.flatten(-2), ("int4", 128, True)) > sqnr_db(plain, groups) + 1.3


@pytest.mark.parametrize("form", ALL, ids=str)
def test_no_weight_is_further_off_than_its_step(form: Any) -> None:
    weight = normal(16, 256)
    error = (dequantize(packed(weight, form)) - weight).abs()
    if form == "fp8":  # three bits behind the point, and the steps around zero are even
        scale = weight.abs().amax(-1, keepdim=True) / 448
        assert bool((error <= weight.abs() / 16 * 1.001 + scale * 2**-10).all())
        return
    groups = weight if form == "int8" else weight.unflatten(-1, (-1, form[1]))
    span = (
        groups.abs().amax(-1, keepdim=True) / 127
        if form == "int8"
        else (groups.amax(-1) - groups.amin(-1))[..., None] / 15
    )
    # Symmetric int4 may give up its last level on the other side of the largest value, or a tenth of that value.
    limit = 0.51 if form == "int8" or not form[2] else 1.9
    assert bool((error.view(groups.shape) <= limit * span).all())


# ------------------------------------------------------------------------------------------------ layout


def test_int8_is_what_it_was() -> None:
    weight = normal(33, 257)
    scale = weight.abs().amax(-1) / 127
    got = quantize_int8(weight)
    assert torch.equal(got.scale, scale) and torch.equal(got.data, (weight / scale[:, None]).round().to(torch.int8))
    assert torch.equal(got.data, quantize(weight, "int8").data) and got.padding == 0


def test_fp8_uses_the_whole_range() -> None:
    got = quantize(normal(33, 257), "fp8")
    assert got.data.dtype == torch.float8_e4m3fn and got.scale.dtype == torch.float32
    assert bool((got.data.float().abs().amax(-1) == 448).all())


def test_the_nibbles_of_a_group() -> None:
    """Byte j: column j low, column half + j high; each column's level is chosen to show its place."""
    levels = torch.arange(32) % 16 - 8.0
    weight = torch.stack([levels, levels.flip(0)]).repeat(1, 2)
    weight[:, 32:] *= 4
    got = quantize(weight, "int4", group=32)
    assert torch.equal(dequantize(got), weight)
    assert got.scale.abs().tolist() == [[1, 4]] * 2
    flipped = (got.scale < 0).repeat_interleave(32, 1)
    codes = torch.where(flipped, -weight, weight) / torch.tensor([1.0, 4.0]).repeat_interleave(32) + 8
    halves = codes.view(2, 2, 2, 16).to(torch.uint8)
    assert torch.equal(got.data.view(2, 2, 16), halves[:, :, 0] + 16 * halves[:, :, 1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("width", [1, 31, 127, 128, 257, 999])
def test_odd_widths_are_padded_and_remembered(width: int, group: int, symmetric: bool) -> None:
    weight = normal(5, width) + (0 if symmetric else 0.05)
    got = quantize(weight, "int4", group, symmetric)
    groups = -(-width // group)
    assert got.data.shape == (5, groups * group // 2) and got.data.is_contiguous()
    assert got.scale.shape == (5, groups) if symmetric else got.scale.shape == (5, groups, 2)
    assert (got.width, got.group, got.symmetric) == (width, group, symmetric)
    assert got.padding == groups * group - width
    assert dequantize(got).shape == weight.shape
    assert kept(weight, ("int4", group, symmetric)) > 17.0
    whole = quantize(weight[:, : width // group * group], "int4", group, symmetric) if width >= group else None
    if whole is not None:  # padding is nobody else's business
        assert torch.equal(got.data[:, : whole.data.shape[1]], whole.data)


@pytest.mark.parametrize("form", ALL, ids=str)
def test_stacks(form: Any) -> None:
    stack = normal(2, 3, 6, 100)
    got = packed(stack, form)
    assert dequantize(got).shape == stack.shape
    for i in range(2):
        for j in range(3):
            one = packed(stack[i, j], form)
            assert torch.equal(got.data[i, j].float(), one.data.float()) and torch.equal(got.scale[i, j], one.scale)
            assert torch.equal(dequantize(got)[i, j], dequantize(one))
    assert (got.width, got.group) == (one.width, one.group)
    assert got.symmetric == one.symmetric


@pytest.mark.parametrize("form", ALL, ids=str)
def test_it_goes_through_pytree(form: Any) -> None:
    got = packed(normal(4, 100), form)
    leaves, shape = tree_flatten(got)
    again = tree_unflatten(leaves, shape)
    assert isinstance(again, QuantWeight) and torch.equal(dequantize(again), dequantize(got))


def test_bytes() -> None:
    weight = normal(64, 1024)
    bits = {form: 8 * packed(weight, form).bytes / weight.numel() for form in ALL}
    assert bits["int8"] == bits["fp8"] == 8 + 32 / 1024
    assert (bits["int4", 128, True], bits["int4", 128, False]) == (4.125, 4.25)
    assert bits["int4", 32, True] == 4.5


def test_names() -> None:
    weight = normal(4, 64)
    assert [format_of(quantize(weight, form)) for form in FORMATS] == list(FORMATS)
    assert format_of(weight.bfloat16()) == "bfloat16"
    with pytest.raises(ValueError, match="int16"):
        format_of(QuantWeight(weight.to(torch.int16), weight))


# ------------------------------------------------------------------------------------------------ hard rows


@pytest.mark.parametrize("form", ALL, ids=str)
def test_zeros_constants_and_tiny_rows(form: Any) -> None:
    weight = normal(6, 256)
    weight[1] = 0.0
    weight[2, :128] = 0.0
    weight[3] = 0.25
    weight[4] = 0.0
    weight[4, 7] = -3.0
    got = dequantize(packed(weight, form))
    assert bool((got[1] == 0).all()) and bool((got[2, :128] == 0).all())
    torch.testing.assert_close(got[3:5], weight[3:5], rtol=2**-9, atol=0.01)
    assert sqnr_db(got[[0, 5]], weight[[0, 5]]) > 19.0
    for size in (1e-30, 1e-38, 2e-43, 1e-44):
        tiny = dequantize(packed(torch.linspace(-size, size, 256)[None], form))
        assert torch.isfinite(tiny).all() and float(tiny.abs().max()) <= 1.2 * size + 1e-40
    huge = torch.linspace(-3.0, 3.0, 256)[None] * 1e38
    assert sqnr_db(dequantize(packed(huge, form)) / 1e38, huge / 1e38) > 18.0


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("form", ALL, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(form: Any, bad: float) -> None:
    weight = normal(4, 100)
    weight[3, 99] = bad
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        packed(weight, form)


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (torch.ones(2, 2), ("int3",), "format must be one of int8, int4, fp8, got 'int3'"),
        (torch.ones(2, 2), ("int4", 48), "group must be one of 32, 64, 128, got 48"),
        (torch.ones(2, 2, dtype=torch.long), ("int4",), "int64"),
        (torch.ones(4), ("int8",), r"weight must be \[..., N, K\]"),
        (torch.ones(4, 0), ("fp8",), r"weight must be \[..., N, K\]"),
        (torch.ones(0, 4, 4), ("int4",), r"weight must be \[..., N, K\]"),
    ],
)
def test_bad_arguments(weight: Tensor, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight, *arguments)


# ------------------------------------------------------------------------------------------------ the products without Triton


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("form", ALL, ids=str)
def test_every_product_reads_every_format(form: Any, rows: int) -> None:
    x, weight = normal(rows, 200, seed=3), packed(normal(33, 200), form)
    bias, residual, norm_weight = normal(33, seed=4), normal(rows, 33, seed=5), normal(200, seed=6) + 1
    truth = x.double() @ dequantize(weight).double().t()
    eager = x @ dequantize(weight).t()
    for op in (gemv, gemv_ref, gemv_streamed, gemv_library, gemv_widened):
        assert_close(op(x, weight, bias), truth + bias, eager + bias, name=op.__name__, terms=200)
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm_weight
    wanted = unit.double() @ dequantize(weight).double().t() + bias + residual
    eager = unit @ dequantize(weight).t() + bias + residual
    for op in (gemv, gemv_ref):
        assert_close(op(x, weight, bias, residual, norm_weight, 1e-5), wanted, eager, terms=200)
    for op in (gemv_swiglu, gemv_swiglu_ref):
        gate = unit.double() @ dequantize(weight).double().t()
        eager = unit @ dequantize(weight).t()
        silu = torch.nn.functional.silu
        assert_close(op(x, weight, weight, norm_weight, 1e-5), silu(gate) * gate, silu(eager) * eager, terms=200)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widened_products_round_no_activation(dtype: torch.dtype) -> None:
    x, weight = 1e6 * normal(2, 200, seed=3), normal(33, 200).to(dtype)
    torch.testing.assert_close(gemv_widened(x, weight), x @ weight.float().t())
    assert not torch.allclose(gemv_library(x, weight), x @ weight.float().t(), rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("form", [form for form in ALL if not isinstance(form, str)], ids=str)
@pytest.mark.parametrize(("height", "width"), [(1, 31), (2, 128), (33, 200), (64, 999), (3, 4097)])
def test_streamed_int4_of_any_shape(form: Any, height: int, width: int, rows: int) -> None:
    x, weight = normal(rows, width, seed=3), packed(normal(height, width) + 0.01, form)
    truth = x.double() @ dequantize(weight).double().t()
    assert_close(gemv_streamed(x, weight), truth, x @ dequantize(weight).t(), name="gemv_streamed", terms=width)


@pytest.mark.slow
@pytest.mark.parametrize("form", ALL, ids=str)
@pytest.mark.parametrize("rows", [1, 4])
def test_compiled_streams_of_every_format(form: Any, rows: int) -> None:
    """A head taken out of a stack by a tensor, as the depth step does it."""
    x, stack, row = normal(rows, 200, seed=3), packed(normal(3, 33, 200), form), torch.tensor([2])

    def product(x: Tensor, stack: QuantWeight, row: Tensor) -> Tensor:
        return gemv_streamed(x, take_rows(take_rows(stack, row), 0))

    # Dynamo counts recompilations per code object, and the ninth of this one would fail.
    compiled = torch.compile(compiling._own_code(product), fullgraph=True, dynamic=False)
    wide = dequantize(stack)[2]
    assert_close(compiled(x, stack, row), x.double() @ wide.double().t(), x @ wide.t(), terms=200)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("format", "group", "symmetric"),
    [("int8", 128, True), ("fp8", 128, True), *(("int4", g, s) for g in GROUPS for s in (True, False))],
)
@pytest.mark.parametrize("shape", [(67, 130), (300, 3), (5, 999)])
def test_rows_in_blocks_are_as_the_whole(
    shape: tuple[int, int], format: str, group: int, symmetric: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(*(shape[::-1] if transposed else shape), generator=torch.Generator().manual_seed(0))
    weight = weight.t() if transposed else weight
    monkeypatch.setattr(quant, "_BLOCK", 1 << 40)
    whole, wide = quantize(weight, format, group, symmetric), weight.to(torch.bfloat16)
    for block in (1, 400, 2000):
        monkeypatch.setattr(quant, "_BLOCK", block)
        packed = quantize(weight, format, group, symmetric)
        assert packed.data.is_contiguous() and packed.scale.is_contiguous() and packed.padding == whole.padding
        assert torch.equal(packed.data.view(torch.uint8), whole.data.contiguous().view(torch.uint8))
        assert torch.equal(packed.scale, whole.scale)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(quant.widen(packed, dtype), dequantize(whole).to(dtype))
    assert torch.equal(quant.widen(wide), wide.float())
