"""Rotary embedding: the kernel against fp64, the tables against transformers' own module."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from csm_kernels import rope
from csm_kernels.rope import apply_rope, apply_rope_ref, llama3_frequencies, rope_tables
from csm_kernels.testing import assert_close, assert_untouched, guarded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# CSM-1B's published parameters; CsmConfig() alone has no scaling.
BACKBONE = {"factor": 32.0, "low_freq_factor": 0.125, "high_freq_factor": 0.5}
DEPTH = {"factor": 32.0, "low_freq_factor": 0.001953125, "high_freq_factor": 0.0078125}


def tables(width: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables(llama3_frequencies(width, 5e5, **BACKBONE, original_positions=1024), rows)
    return cos.to(device), sin.to(device)


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """By complex multiplication in fp64, or by the stock formula in ``dtype``."""
    half = x.shape[-1] // 2
    cos, sin = cos[positions][..., None, :].to(dtype), sin[positions][..., None, :].to(dtype)
    x = x.to(dtype)
    if dtype == torch.float64:
        angle = torch.complex(cos[..., :half], sin[..., :half])
        if interleaved:
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * angle).flatten(
                -2
            )
        value = torch.complex(x[..., :half], x[..., half:]) * angle
        return torch.cat([value.real, value.imag], dim=-1)
    if interleaved:  # torchtune
        pairs = x.unflatten(-1, (half, 2))
        cos, sin = cos[..., :half], sin[..., :half]
        first, second = pairs[..., 0], pairs[..., 1]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    out = apply_rope(x, cos, sin, positions, interleaved)
    assert out.dtype == x.dtype and out.is_contiguous()
    truth = turned(x, cos, sin, positions, interleaved, torch.float64)
    assert_close(out, truth, turned(x, cos, sin, positions, interleaved, x.dtype), name="apply_rope", terms=2)
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "width"), [(32, 64), (8, 64), (40, 64), (8, 128), (3, 128), (1, 64), (5, 2), (7, 6), (33, 126), (2, 1000)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(device: torch.device, heads: int, width: int, dtype: torch.dtype, interleaved: bool) -> None:
    x = torch.randn(2, 3, heads, width, device=device).to(dtype)
    cos, sin = tables(width, 2048, device)
    check(x, cos, sin, torch.tensor([[0, 1, 2047], [77, 5, 5]], device=device), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(8, 64), (3, 128), (33, 6)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_backward(device: torch.device, heads: int, width: int, dtype: torch.dtype, interleaved: bool) -> None:
    x = torch.randn(5, heads, width, device=device).to(dtype).requires_grad_()
    grad = torch.randn(5, heads, width, device=device).to(dtype)
    cos, sin = tables(width, 64, device)
    positions = torch.tensor([3, 0, 63, 17, 18], device=device)
    (ours,) = torch.autograd.grad(apply_rope(x, cos, sin, positions, interleaved), x, grad)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(turned(wide, cos, sin, positions, interleaved, torch.float64), wide, grad.double())
    (eager,) = torch.autograd.grad(turned(x, cos, sin, positions, interleaved, dtype), x, grad)
    assert ours.dtype == dtype
    assert_close(ours, truth, eager, name="gradient of x", terms=2)


def test_gradients_autograd_hands_out(device: torch.device) -> None:
    """An expanded scalar cannot be walked, a transposed gradient is."""
    x = torch.randn(2, 5, 3, 8, device=device, requires_grad=True)
    cos, sin = tables(8, 8, device)
    positions = torch.arange(5, device=device).expand(2, 5)
    other = torch.randn(2, 3, 8, 5, device=device)
    for use in (lambda y: y.sum(), lambda y: (y.transpose(1, 2) * other.transpose(2, 3)).sum()):
        (ours,) = torch.autograd.grad(use(apply_rope(x, cos, sin, positions)), x)
        (wanted,) = torch.autograd.grad(use(apply_rope_ref(x, cos, sin, positions)), x)
        assert torch.allclose(ours, wanted, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_strides_are_walked_and_not_copied(device: torch.device, interleaved: bool) -> None:
    cos, sin = tables(64, 32, device)
    wide_cos = torch.randn(32, 96, device=device)
    wide_cos[:, :64] = cos
    positions = torch.randint(0, 32, (4, 2 * 6), device=device)
    base = torch.randn(4, 7, 6, 96, device=device)
    for x, where in (
        (base[..., 5:69].transpose(1, 2), positions[:, ::2]),  # [B, T, H, D] of [B, H, T, D]
        (base[:, ::2, 1:4, :64], positions[:, :4]),
        (base[:, 0, :, 32:], positions[:, 3]),
        (base[1, 2:3, :, :64], positions.t()[:1, 1]),
        (base[0, 0, :, :64], positions[2, 5]),
        (base[:, :1, :1, :64].expand(4, 5, 3, 64), positions[:1, 4:9].expand(4, 5)),
    ):
        assert where.shape == x.shape[:-2]
        check(x, wide_cos[:, :64], sin, where, interleaved)


def test_positions_outside_the_table_are_clamped(device: torch.device) -> None:
    x = torch.randn(5, 2, 64, device=device)
    cos, sin = tables(64, 16, device)
    # Rows beside the table's own would show.
    cos, sin = (torch.cat([torch.full_like(t, 7.0), t, torch.full_like(t, 9.0)])[16:32] for t in (cos, sin))
    wild = torch.tensor([-1, 16, -(2**62), 2**62, 3], device=device)
    near = torch.tensor([0, 15, 0, 15, 3], device=device)
    for interleaved in (False, True):
        assert torch.equal(apply_rope(x, cos, sin, wild, interleaved), apply_rope(x, cos, sin, near, interleaved))


def test_broken_heads_stay_alone(device: torch.device) -> None:
    x = torch.randn(3, 5, 64, device=device)
    cos, sin = tables(64, 8, device)
    positions = torch.tensor([1, 2, 3], device=device)
    clean = apply_rope(x, cos, sin, positions)
    x[1, 2, 3], x[2, 4, 40] = float("nan"), float("inf")
    out = apply_rope(x, cos, sin, positions)
    broken = [(1, 2, 3), (1, 2, 35), (2, 4, 8), (2, 4, 40)]
    for place in broken:
        assert not out[place].isfinite()
        out[place] = clean[place]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(8, 128), (3, 126)])
def test_every_output_is_written_and_nothing_else(
    device: torch.device, heads: int, width: int, interleaved: bool
) -> None:
    x = torch.randn(4, heads, width, device=device)
    cos, sin = tables(width, 8, device)
    for inverse in (False, True):
        out, whole = guarded(x.shape, torch.bfloat16, device)
        rope.launch_rope(x, cos, sin, torch.arange(4, device=device), out, interleaved, inverse)
        assert out.isfinite().all()
        assert_untouched(whole)


def test_the_same_every_time(device: torch.device) -> None:
    x = torch.randn(7, 5, 128, device=device).bfloat16()
    cos, sin = tables(128, 8, device)
    positions = torch.arange(7, device=device)
    first = apply_rope(x, cos, sin, positions)
    assert all(torch.equal(first, apply_rope(x, cos, sin, positions)) for _ in range(3))


@pytest.mark.dispatcher
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_reference_runs_where_triton_does_not(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, interleaved: bool
) -> None:
    x = torch.randn(2, 3, 5, 64, device=device).bfloat16().transpose(0, 1).requires_grad_()
    cos, sin = tables(64, 8, device)
    positions = torch.tensor([[1, 2], [-3, 4], [5, 99]], device=device)
    ours = apply_rope(x, cos, sin, positions, interleaved)
    (ours_grad,) = torch.autograd.grad(ours, x, x.detach())
    monkeypatch.setattr(rope, "runs_triton", lambda *tensors: False)
    theirs = apply_rope(x, cos, sin, positions, interleaved)
    (theirs_grad,) = torch.autograd.grad(theirs, x, x.detach())
    assert theirs.is_contiguous() and theirs.dtype == torch.bfloat16
    assert torch.allclose(ours, theirs, atol=1e-2) and torch.allclose(ours_grad, theirs_grad, atol=1e-2)
    torch.library.opcheck(torch.ops.csm_kernels.apply_rope.default, (x, cos, sin, positions, interleaved))


def test_the_reference_without_positions(device: torch.device) -> None:
    """As the frame loop calls it, with the rows of the tables."""
    x = torch.randn(4, 3, 64, device=device)
    cos, sin = tables(64, 8, device)
    positions = torch.tensor([1, 0, 7, 2], device=device)
    assert torch.equal(apply_rope_ref(x, cos[positions], sin[positions]), apply_rope_ref(x, cos, sin, positions))


@pytest.mark.dispatcher
def test_the_ops_are_sound(device: torch.device) -> None:
    cos, sin = tables(8, 8, device)
    positions = torch.tensor([1, 2], device=device)
    for interleaved in (False, True):
        x = torch.randn(2, 3, 8, device=device, requires_grad=True)
        torch.library.opcheck(torch.ops.csm_kernels.apply_rope.default, (x, cos, sin, positions, interleaved))


@pytest.mark.slow
@pytest.mark.dispatcher
def test_compiles_whole(device: torch.device) -> None:
    x = torch.randn(2, 3, 5, 64, device=device, requires_grad=True)
    cos, sin = tables(64, 8, device)
    positions = torch.tensor([[1, 2, 3], [0, 7, 7]], device=device)

    def step(x: Tensor, positions: Tensor) -> Tensor:
        return apply_rope(x * 2, cos, sin, positions) + apply_rope(x, cos, sin, positions + 1, interleaved=True)

    got, wanted = torch.compile(step, fullgraph=True)(x, positions), step(x, positions)
    assert torch.allclose(got, wanted, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value.square().sum(), x)[0] for value in (got, wanted))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_empty(device: torch.device) -> None:
    cos, sin = tables(8, 8, device)
    for shape in ((0, 3, 8), (2, 0, 8)):
        positions = torch.zeros(shape[0], dtype=torch.int64, device=device)
        assert apply_rope(torch.zeros(shape, device=device), cos, sin, positions).shape == shape


TABLE = torch.ones(4, 8)
X = torch.ones(2, 3, 8)
AT = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("x", "cos", "sin", "positions", "message"),
    [
        (torch.ones(2, 3, 7), torch.ones(4, 7), torch.ones(4, 7), AT, "x must have an even last dimension"),
        (torch.ones(2, 3, 2048), torch.ones(4, 2048), torch.ones(4, 2048), AT, "from 2 to 1024"),
        (torch.ones(8), TABLE, TABLE, AT[0], "x must be"),
        (X.int(), TABLE, TABLE, AT, "x must be floating point"),
        (X, TABLE[:, :4], TABLE, AT, "cos_table must be"),
        (X, TABLE, TABLE[:, :4], AT, "sin_table must be"),
        (X, TABLE, TABLE[:2], AT, "sin_table must have the shape of cos_table"),
        (X, TABLE[:0], TABLE[:0], AT, "P of at least 1"),
        (X, TABLE.half(), TABLE, AT, "cos_table must be float32"),
        (X, TABLE, torch.ones(8, 4).t(), AT, "sin_table must have unit stride"),
        (X, TABLE, TABLE, AT.int(), "positions must be int64"),
        (X, TABLE, TABLE, AT[:1], "positions must be"),
        (torch.ones(2, 8, 3).transpose(1, 2), TABLE, TABLE, AT, "x must have unit stride"),
    ],
)
def test_bad_arguments(
    device: torch.device, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        apply_rope(x.to(device), cos.to(device), sin.to(device), positions.to(device))


def test_bad_table_arguments() -> None:
    with pytest.raises(ValueError, match="head_dim must be"):
        llama3_frequencies(63, 5e5, **BACKBONE, original_positions=1024)
    with pytest.raises(ValueError, match="low_freq_factor must be"):
        llama3_frequencies(64, 5e5, 32.0, 0.5, 0.125, 1024)
    with pytest.raises(ValueError, match="frequencies must be"):
        rope_tables(torch.ones(32, dtype=torch.float64), 8)
    with pytest.raises(ValueError, match="positions must be"):
        rope_tables(torch.ones(32), 0)


def stock_rotary(scaling: dict[str, float], original: int, depth: bool) -> Any:
    csm = pytest.importorskip("transformers.models.csm.modeling_csm")
    from transformers import CsmConfig, CsmDepthDecoderConfig

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "original_max_position_embeddings": original,
        **scaling,
    }
    config = (CsmDepthDecoderConfig if depth else CsmConfig)(rope_parameters=parameters)
    return csm.CsmRotaryEmbedding(config), config.head_dim


@pytest.mark.parametrize(
    ("scaling", "original", "depth", "positions"), [(BACKBONE, 1024, False, 2048), (DEPTH, 16, True, 33)]
)
def test_tables_are_the_stock_models(scaling: dict[str, float], original: int, depth: bool, positions: int) -> None:
    module, width = stock_rotary(scaling, original, depth)
    frequencies = llama3_frequencies(width, 500000.0, **scaling, original_positions=original)
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, module.inv_freq)
    cos, sin = rope_tables(frequencies, positions)
    stock_cos, stock_sin = module(torch.zeros(1), torch.arange(positions)[None])
    assert torch.equal(cos, stock_cos[0]) and torch.equal(sin, stock_sin[0])
    # Two spellings of Sesame's own, 8192 positions with 1 and 4.
    assert torch.equal(frequencies, llama3_frequencies(width, 500000.0, 32.0, 1.0, 4.0, 8192))


def test_frequencies_are_torchtunes() -> None:
    """``Llama3ScaledRoPE.apply_scaling``, one frequency at a time; the three zones all occur."""
    plain = 1.0 / (500000.0 ** (torch.arange(0, 128, 2)[:64].float() / 128))
    wanted, zones = [], set()
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            wanted.append(frequency)
            zones.add("kept")
        elif wavelength > 8192 / 1:
            wanted.append(frequency / 32)
            zones.add("scaled")
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            wanted.append((1 - smooth) * frequency / 32 + smooth * frequency)
            zones.add("between")
    assert zones == {"kept", "scaled", "between"}
    assert torch.equal(llama3_frequencies(128, 500000.0, 32.0, 1.0, 4.0, 8192), torch.stack(wanted))


def test_stock_attention_gets_the_same_queries(device: torch.device) -> None:
    csm = pytest.importorskip("transformers.models.csm.modeling_csm")
    module, width = stock_rotary(BACKBONE, 1024, False)
    q = torch.randn(2, 32, 5, width)
    positions = torch.tensor([[0, 1, 2, 3, 4], [900, 901, 902, 903, 904]])
    stock, _ = csm.apply_rotary_pos_emb(q, q, *module(q, positions))
    cos, sin = tables(width, 1024, device)
    ours = apply_rope(q.to(device).transpose(1, 2), cos, sin, positions.to(device)).transpose(1, 2)
    assert torch.allclose(ours.cpu(), stock, atol=1e-6)
