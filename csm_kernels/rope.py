"""Rotary position embedding, forward and backward, and the Llama-3 tables of both stock models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from csm_kernels import _ops
from csm_kernels._rows import row_start, rows_of
from csm_kernels._target import runs_triton, tl, triton
from csm_kernels._tiles import tiles

_WIDEST = 1024


@triton.jit
def _rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    out_ptr,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    x_head_stride,
    p_inner,
    p_outer_stride,
    p_inner_stride,
    cos_stride,
    sin_stride,
    last_position,
    heads,
    half,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One token, ``BLOCK_H`` of its heads: both halves of every pair, in fp32."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_HALF)
    position = tl.load(position_ptr + row_start(token, p_inner, p_outer_stride, p_inner_stride))
    # A position outside the table turns as its nearest row does: a wrong angle, never a read out of bounds.
    position = tl.minimum(tl.maximum(position, 0), last_position)
    cos = tl.load(cos_ptr + position * cos_stride + pair, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * sin_stride + pair, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    x_head = x_ptr + row_start(token, x_inner, x_outer_stride, x_inner_stride) + head[:, None] * x_head_stride
    out_head = out_ptr + (token * heads + head[:, None]) * (2 * half)
    kind = out_ptr.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        mask = (head < heads)[:, None] & (column < 2 * half)
        x = tl.load(x_head + column, mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_HALF, 2)))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        tl.store(out_head + column, tl.reshape(turned, (BLOCK_H, 2 * BLOCK_HALF)).to(kind), mask=mask)
    else:
        column = pair[None, :]
        mask = (head < heads)[:, None] & (column < half)
        first = tl.load(x_head + column, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_head + half + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_head + column, (first * cos - second * sin).to(kind), mask=mask)
        tl.store(out_head + half + column, (second * cos + first * sin).to(kind), mask=mask)


def launch_rope(
    x: Tensor, cos_table: Tensor, sin_table: Tensor, positions: Tensor, out: Tensor, interleaved: bool, inverse: bool
) -> None:
    """Launch the kernel into ``out``, contiguous; shapes as :func:`apply_rope`, ``inverse`` rotates back.

    A frame loop that projects queries, keys and values into one buffer rotates queries and keys in one launch: they are
    neighbouring heads at the same positions.
    """
    heads, width = x.shape[-2:]
    if x.numel() == 0:
        return
    tokens = rows_of(x.select(-2, 0), "x")
    half = triton.next_power_of_2(width // 2)
    # 2048 elements in 4 warps: one 16-byte load of bf16 per thread and half.
    default = {"BLOCK_H": max(1, min(triton.next_power_of_2(heads), 1024 // half)), "num_warps": 4}
    meta = tiles("rope", x, {"D": width, "H": heads}, default)
    _rope_kernel[(tokens.total, triton.cdiv(heads, meta["BLOCK_H"]))](
        x,
        cos_table,
        sin_table,
        positions,
        out,
        *tokens.walk,
        x.stride(-2),
        *rows_of(positions[..., None], "positions").walk,
        cos_table.stride(0),
        sin_table.stride(0),
        cos_table.shape[0] - 1,
        heads,
        width // 2,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        BLOCK_HALF=half,
        **meta,
    )


def _checked(x: Tensor, cos_table: Tensor, sin_table: Tensor, positions: Tensor) -> None:
    for name, tensor in (("x", x), ("cos_table", cos_table), ("sin_table", sin_table)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must be [..., H, D], got {tuple(x.shape)}")
    width = x.shape[-1]
    if width % 2 or not 2 <= width <= _WIDEST:
        raise ValueError(f"x must have an even last dimension from 2 to {_WIDEST}, got {width}")
    for name, table in (("cos_table", cos_table), ("sin_table", sin_table)):
        if table.ndim != 2 or table.shape[0] == 0 or table.shape[1] != width:
            raise ValueError(f"{name} must be [P, {width}] with P of at least 1, got {tuple(table.shape)}")
        if table.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {table.dtype}")
        if table.stride(1) != 1:
            raise ValueError(f"{name} must have unit stride in its last dimension, got strides {tuple(table.stride())}")
    if cos_table.shape != sin_table.shape:
        raise ValueError(
            f"sin_table must have the shape of cos_table, {tuple(cos_table.shape)}, got {tuple(sin_table.shape)}"
        )
    if positions.dtype != torch.int64:
        raise ValueError(f"positions must be int64, got {positions.dtype}")
    if positions.shape != x.shape[:-2]:
        raise ValueError(
            f"positions must be {tuple(x.shape[:-2])} for x of {tuple(x.shape)}, got {tuple(positions.shape)}"
        )


def _rope(x: Tensor, cos_table: Tensor, sin_table: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    _checked(x, cos_table, sin_table, positions)
    if not runs_triton(x, cos_table, sin_table, positions):
        return apply_rope_ref(x, cos_table, sin_table, positions, interleaved).to(x.dtype).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_rope(x, cos_table, sin_table, positions, out, interleaved, False)
    return out


def _rope_backward(grad: Tensor, cos_table: Tensor, sin_table: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    if not runs_triton(grad, cos_table, sin_table, positions):
        return apply_rope_ref(grad, cos_table, -sin_table, positions, interleaved).to(grad.dtype).contiguous()
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    if grad.numel():
        try:
            rows_of(grad.select(-2, 0), "grad")
        except ValueError:  # autograd hands out expanded scalars and the like
            grad = grad.contiguous()
    launch_rope(grad, cos_table, sin_table, positions, out, interleaved, True)
    return out


def _fake(x: Tensor, cos_table: Tensor, sin_table: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos_table, sin_table, positions, ctx.interleaved = inputs
    ctx.save_for_backward(cos_table, sin_table, positions)


_backward_op = _ops.register("apply_rope_backward", _rope_backward, _fake)
_op = _ops.register(
    "apply_rope",
    _rope,
    _fake,
    backward=lambda ctx, grad: (_backward_op(grad, *ctx.saved_tensors, ctx.interleaved), None, None, None, None),
    setup_context=_save,
)


def apply_rope(x: Tensor, cos_table: Tensor, sin_table: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate every token's heads by the angles of its position, computed in fp32, differentiable in ``x``.

    Args:
        x: ``[..., H, D]``, fp32, bf16 or fp16, D even, unit stride in the last dimension, any stride between heads, and
            leading strides that two numbers can walk: ``[B, H, T, D].transpose(1, 2)`` is read where it is.
        cos_table: ``[P, D]`` fp32, unit stride in the last dimension; both halves equal, the first is what is read.
        sin_table: likewise.
        positions: ``[...]`` int64 on the device of ``x``, one per token, read by the kernel without a host sync. A
            position below 0 or from P on is clamped to the table's first or last row.
        interleaved: False rotates pairs ``(i, i + D/2)``, transformers' layout; True rotates ``(2i, 2i + 1)``,
            torchtune's. Column ``i`` of the tables belongs to pair ``i`` in both.

    Returns:
        ``[..., H, D]`` in the dtype of ``x``, contiguous. The gradient is rotated by the negative angle; no gradient
        reaches the tables.

    Raises:
        ValueError: shapes, dtypes or strides do not fit; the message names the argument.

    Example:
        >>> cos, sin = rope_tables(llama3_frequencies(64, 5e5, 32.0, 0.125, 0.5, 1024), 2048)
        >>> apply_rope(torch.randn(2, 7, 32, 64), cos, sin, torch.arange(7).expand(2, 7)).shape
        torch.Size([2, 7, 32, 64])

    Source: Su et al., RoFormer (2021). Not yet run on a GPU.
    """
    return _op(x, cos_table, sin_table, positions, interleaved)


def llama3_frequencies(
    head_dim: int,
    theta: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_positions: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Inverse frequencies with Llama-3 scaling, as both stock models compute them, operation by operation.

    Args:
        head_dim: D, even.
        theta: base of the frequencies, 500000 for CSM-1B.
        factor: what frequencies below the low limit are divided by, 32 for CSM-1B.
        low_freq_factor: wavelengths above ``original_positions / low_freq_factor`` are scaled whole.
        high_freq_factor: wavelengths below ``original_positions / high_freq_factor`` stay; larger than the low one.
        original_positions: positions the unscaled frequencies were trained on.
        device: where the result lives.

    Returns:
        ``[head_dim / 2]`` fp32, radians per position. CSM-1B's three spellings (1024 positions with 0.125 and 0.5,
        16 with 0.001953125 and 0.0078125, torchtune's 8192 with 1 and 4) scale alike.

    Raises:
        ValueError: ``head_dim`` is odd or not positive, or the factors are not in order.

    Example:
        >>> llama3_frequencies(64, 5e5, 32.0, 0.125, 0.5, 1024)[0]
        tensor(1.)

    Source: ``_compute_llama3_parameters`` of transformers, ``Llama3ScaledRoPE`` of torchtune.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be positive and even, got {head_dim}")
    if not 0 < low_freq_factor < high_freq_factor:
        raise ValueError(
            f"low_freq_factor must be positive and below high_freq_factor, got {low_freq_factor} and {high_freq_factor}"
        )
    steps = torch.arange(0, head_dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float32)
    plain = 1.0 / (theta ** (steps / head_dim))
    wavelength = 2 * math.pi / plain
    smooth = (original_positions / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (1 - smooth) * plain / factor + smooth * plain
    scaled = torch.where(wavelength > original_positions / low_freq_factor, plain / factor, between)
    return torch.where(wavelength < original_positions / high_freq_factor, plain, scaled)


def rope_tables(frequencies: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 to ``positions - 1``.

    Args:
        frequencies: ``[head_dim / 2]`` fp32, radians per position.
        positions: rows of the tables, at least 1.

    Returns:
        ``cos`` and ``sin``, ``[positions, head_dim]`` fp32 on the device of ``frequencies``, both halves equal.

    Raises:
        ValueError: ``frequencies`` is not a vector of fp32, or ``positions`` is not positive.

    Example:
        >>> rope_tables(torch.ones(32), 2048)[0].shape
        torch.Size([2048, 64])
    """
    if frequencies.ndim != 1 or frequencies.dtype != torch.float32:
        raise ValueError(f"frequencies must be [D/2] float32, got {tuple(frequencies.shape)} {frequencies.dtype}")
    if positions < 1:
        raise ValueError(f"positions must be at least 1, got {positions}")
    angles = torch.arange(positions, device=frequencies.device).float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope_ref(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """The specification of :func:`apply_rope`, before its last rounding.

    Args:
        x: ``[..., H, D]``, queries or keys.
        cos: ``[..., D]`` fp32, the cosines at each token's position, both halves equal; with ``positions`` the table,
            ``[P, D]``.
        sin: likewise.
        positions: ``[...]`` int64, clamped to the table, or None.
        interleaved: False rotates pairs ``(i, i + D/2)``, True ``(2i, 2i + 1)``.

    Returns:
        ``[..., H, D]`` fp32.

    Source: Su et al., RoFormer (2021); ``apply_rotary_pos_emb`` of transformers, ``Llama3ScaledRoPE`` of torchtune. The
    tables may come from the stock model's own rotary module, so that every static scaling is the stock one's.
    """
    x = x.float()
    if positions is not None:
        index = positions.clamp(0, cos.shape[0] - 1)
        cos, sin = cos[index], sin[index]
    cos, sin = cos[..., None, :], sin[..., None, :]
    if interleaved:
        cos, sin = cos[..., : x.shape[-1] // 2], sin[..., : x.shape[-1] // 2]
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
