"""Mimi's split residual vector quantizer, decode side: codes to the codec's latent frames."""

from __future__ import annotations

import torch
from torch import Tensor

from csm_kernels import _ops
from csm_kernels._rows import rows_of
from csm_kernels._target import runs_triton, tl, triton
from csm_kernels._tiles import tiles


@triton.jit
def _summed(
    codes_row,
    codebooks_ptr,
    column,
    present,
    inside,
    codes_stride_k,
    books_stride_k,
    books_stride_bin,
    bins,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``[BLOCK_R, BLOCK_D]`` fp32: codebooks ``FIRST`` to ``LAST - 1`` summed in that order, NaN where a code is not one."""
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for k in tl.static_range(FIRST, LAST):
        code = tl.load(codes_row + k * codes_stride_k, mask=present, other=0)
        known = (code >= 0) & (code < bins)
        vectors = codebooks_ptr + k * books_stride_k + (code * books_stride_bin)[:, None] + column[None, :]
        value = tl.load(vectors, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.where(known[:, None], value, float("nan"))
    return total


@triton.jit
def _rvq_kernel(
    codes_ptr,
    codebooks_ptr,
    semantic_ptr,
    acoustic_ptr,
    out_ptr,
    rows,
    frames,
    codes_stride_b,
    codes_stride_k,
    codes_stride_t,
    books_stride_k,
    books_stride_bin,
    semantic_stride,
    acoustic_stride,
    bins,
    width,
    outputs,
    SEMANTIC: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``BLOCK_R`` frames by ``BLOCK_N`` outputs, in fp32; every tile of outputs gathers its frames' codes anew."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    present = row < rows
    batch, frame = row // frames, row % frames
    output = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    codes_row = codes_ptr + batch * codes_stride_b + frame * codes_stride_t
    # One frame: products in registers, reduced once at the end. Several: a matrix product, in fp32 without TF32.
    out = tl.zeros((BLOCK_N, BLOCK_D) if BLOCK_R == 1 else (BLOCK_R, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < width
        mask = (output < outputs)[:, None] & inside[None, :]
        for acoustic in tl.static_range(0, 2 if SEMANTIC < K else 1):
            weight_ptr = acoustic_ptr if acoustic else semantic_ptr
            weight_stride = acoustic_stride if acoustic else semantic_stride
            weight = tl.load(weight_ptr + output[:, None] * weight_stride + column[None, :], mask=mask, other=0.0)
            weight = weight.to(tl.float32)
            sums = _summed(
                codes_row,
                codebooks_ptr,
                column,
                present,
                inside,
                codes_stride_k,
                books_stride_k,
                books_stride_bin,
                bins,
                SEMANTIC if acoustic else 0,
                K if acoustic else SEMANTIC,
                BLOCK_R,
                BLOCK_D,
            )
            if BLOCK_R == 1:
                out += weight * sums
            else:
                out += tl.dot(sums, tl.trans(weight), input_precision="ieee")
    if BLOCK_R == 1:
        out = tl.sum(out, 1)[None, :]
    place = out_ptr + ((batch * outputs)[:, None] + output[None, :]) * frames + frame[:, None]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=present[:, None] & (output < outputs)[None, :])


def launch_decode(
    codes: Tensor,
    codebooks: Tensor,
    semantic_projection: Tensor,
    acoustic_projection: Tensor,
    semantic: int,
    out: Tensor,
) -> None:
    """Launch the kernel into ``out``, ``[B, out, T]`` contiguous; shapes as :func:`rvq_decode`."""
    if out.numel() == 0:
        return
    batch, books, frames = codes.shape
    outputs, width = semantic_projection.shape
    rows = batch * frames
    if rows <= 8:
        # Streaming: a frame has 1 MB of projections and 32 KB of codebook rows; 64 programs share the former.
        default = {"BLOCK_R": 1, "BLOCK_N": 8, "BLOCK_D": min(256, triton.next_power_of_2(width)), "num_warps": 4}
    else:
        default = {"BLOCK_R": 16, "BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 1}
    meta = tiles("rvq", codebooks, {"K": books, "D": width, "N": outputs, "R": rows}, default)
    _rvq_kernel[(triton.cdiv(rows, meta["BLOCK_R"]), triton.cdiv(outputs, meta["BLOCK_N"]))](
        codes,
        codebooks,
        semantic_projection,
        acoustic_projection,
        out,
        rows,
        frames,
        *codes.stride(),
        codebooks.stride(0),
        codebooks.stride(1),
        semantic_projection.stride(0),
        acoustic_projection.stride(0),
        codebooks.shape[1],
        width,
        outputs,
        SEMANTIC=min(semantic, books),
        K=books,
        **meta,
    )


def _checked(
    codes: Tensor, codebooks: Tensor, semantic_projection: Tensor, acoustic_projection: Tensor, semantic: int
) -> None:
    if codes.dtype != torch.int64 or codes.ndim != 3 or codes.shape[1] == 0:
        raise ValueError(f"codes must be [B, K, T] int64 with K of at least 1, got {tuple(codes.shape)} {codes.dtype}")
    if codebooks.ndim != 3 or not codebooks.is_floating_point() or codebooks.shape[1] == 0:
        raise ValueError(
            f"codebooks must be [K, bins, dim], floating point, with bins of at least 1, got {tuple(codebooks.shape)} "
            f"{codebooks.dtype}"
        )
    if codes.shape[1] > codebooks.shape[0]:
        raise ValueError(f"codes must have at most {codebooks.shape[0]} codebooks, got {codes.shape[1]}")
    if semantic < 1:
        raise ValueError(f"semantic must be at least 1, got {semantic}")
    width = codebooks.shape[2]
    for name, weight in (("semantic_projection", semantic_projection), ("acoustic_projection", acoustic_projection)):
        if weight.ndim != 2 or weight.shape[1] != width or not weight.is_floating_point():
            raise ValueError(f"{name} must be [out, {width}], floating point, got {tuple(weight.shape)} {weight.dtype}")
        rows_of(weight, name)
    if semantic_projection.shape != acoustic_projection.shape:
        raise ValueError(
            f"acoustic_projection must have the shape of semantic_projection, {tuple(semantic_projection.shape)}, got "
            f"{tuple(acoustic_projection.shape)}"
        )
    rows_of(codebooks, "codebooks")


def _decode(
    codes: Tensor, codebooks: Tensor, semantic_projection: Tensor, acoustic_projection: Tensor, semantic: int
) -> Tensor:
    _checked(codes, codebooks, semantic_projection, acoustic_projection, semantic)
    if not runs_triton(codes, codebooks, semantic_projection, acoustic_projection):
        out = rvq_decode_ref(codes, codebooks, semantic_projection, acoustic_projection, semantic)
        return out.to(codebooks.dtype).contiguous()
    shape = codes.shape[0], semantic_projection.shape[0], codes.shape[2]
    out = torch.empty(shape, dtype=codebooks.dtype, device=codebooks.device)
    launch_decode(codes, codebooks, semantic_projection, acoustic_projection, semantic, out)
    return out


_op = _ops.register(
    "rvq_decode",
    _decode,
    lambda codes, codebooks, semantic_projection, acoustic_projection, semantic: codebooks.new_empty(
        (codes.shape[0], semantic_projection.shape[0], codes.shape[2])
    ),
)


def rvq_decode(
    codes: Tensor,
    codebooks: Tensor,
    semantic_projection: Tensor,
    acoustic_projection: Tensor,
    semantic: int = 1,
) -> Tensor:
    """Codebook vectors summed and projected, the semantic and the acoustic ones each by its own matrix, in fp32.

    ``semantic_projection @ sum_{k < semantic} codebooks[k][codes[:, k]] + acoustic_projection @ sum_{k >= semantic} ...``

    Args:
        codes: ``[B, K, T]`` int64, each in ``[0, bins)``, any strides; K may be less than the codebooks' and even less
            than ``semantic``, as stock allows.
        codebooks: ``[K, bins, dim]`` fp32, bf16 or fp16, unit stride in the last dimension: the embeddings, sums divided
            by clamped usage.
        semantic_projection: ``[out, dim]``, any float dtype, unit stride in the last dimension: Mimi's 1x1 convolution.
        acoustic_projection: likewise.
        semantic: how many codebooks are semantic, at least 1.

    Returns:
        ``[B, out, T]`` in the dtype of ``codebooks``, contiguous. Nothing is read out of bounds: a frame with a code out
        of range is NaN throughout, the frames beside it are not. Calls of at most 8 frames add in another order than
        larger ones: the last bits may differ. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or strides do not fit; the message names the argument.

    Example:
        >>> weight = torch.randn(512, 256)
        >>> rvq_decode(torch.zeros(1, 32, 3, dtype=torch.int64), torch.randn(32, 2048, 256), weight, weight).shape
        torch.Size([1, 512, 3])

    Source: ``MimiSplitResidualVectorQuantizer.decode`` of transformers; Defossez et al., Moshi (2024). Not yet run on a
    GPU.
    """
    return _op(codes, codebooks, semantic_projection, acoustic_projection, semantic)


def rvq_decode_ref(
    codes: Tensor, codebooks: Tensor, semantic_projection: Tensor, acoustic_projection: Tensor, semantic: int = 1
) -> Tensor:
    """The specification of :func:`rvq_decode`, before its last rounding: fp32 out. Shapes as there."""

    def summed(first: int, last: int) -> Tensor:
        shape = codes.shape[0], codes.shape[2], codebooks.shape[2]
        total = torch.zeros(shape, dtype=torch.float32, device=codebooks.device)
        for k in range(first, last):
            known = (codes[:, k] >= 0) & (codes[:, k] < codebooks.shape[1])
            vectors = codebooks[k][torch.where(known, codes[:, k], 0)].float()
            total = total + torch.where(known[..., None], vectors, torch.nan)
        return total

    split = min(semantic, codes.shape[1])
    out = summed(0, split) @ semantic_projection.float().t()
    if split < codes.shape[1]:
        out = out + summed(split, codes.shape[1]) @ acoustic_projection.float().t()
    return out.transpose(1, 2)
