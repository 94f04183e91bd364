"""Codebook embeddings of one frame and its text embedding, summed in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from csm_kernels import _ops
from csm_kernels._rows import row_start, rows_of
from csm_kernels._target import runs_triton, tl, triton
from csm_kernels._tiles import tiles
from csm_kernels.quant import QuantWeight, dequantize, take_rows


@triton.jit
def _embed_kernel(
    codes_ptr,
    table_ptr,
    scale_ptr,
    text_ids_ptr,
    text_table_ptr,
    mask_ptr,
    out_ptr,
    codes_inner,
    codes_outer_stride,
    codes_inner_stride,
    codes_stride,
    text_inner,
    text_outer_stride,
    text_inner_stride,
    mask_inner,
    mask_outer_stride,
    mask_inner_stride,
    mask_stride,
    table_stride,
    text_table_stride,
    vocab,
    text_vocab,
    width,
    K: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASKS_TEXT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A piece of one frame's sum, in fp32: ``BLOCK_K`` embeddings at a time, all of their loads in flight together."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    codes_row = codes_ptr + row_start(row, codes_inner, codes_outer_stride, codes_inner_stride)
    if HAS_MASK:
        mask_row = mask_ptr + row_start(row, mask_inner, mask_outer_stride, mask_inner_stride)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        codebook = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        counts = codebook < K
        code = tl.load(codes_row + codebook * codes_stride, mask=counts, other=0)
        if HAS_MASK:
            counts = counts & (tl.load(mask_row + codebook * mask_stride, mask=counts, other=0) != 0)
        known = (code >= 0) & (code < vocab)
        place = codebook * vocab + code
        places = table_ptr + (place * table_stride)[:, None] + column[None, :]
        vectors = tl.load(places, mask=(counts & known)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if HAS_SCALE:
            vectors *= tl.load(scale_ptr + place, mask=counts & known, other=0.0)[:, None]
        total += tl.sum(tl.where((counts & ~known)[:, None], float("nan"), vectors), 0)
    if HAS_TEXT:
        text = tl.load(text_ids_ptr + row_start(row, text_inner, text_outer_stride, text_inner_stride))
        known = (text >= 0) & (text < text_vocab)
        broken = (text < 0) | (text >= text_vocab)
        if MASKS_TEXT:
            counts = tl.load(mask_row + K * mask_stride) != 0
            known, broken = known & counts, broken & counts
        vector = tl.load(text_table_ptr + text * text_table_stride + column, mask=inside & known, other=0.0)
        total += tl.where(broken, float("nan"), vector.to(tl.float32))
    tl.store(out_ptr + row * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def launch_embed(
    codes: Tensor,
    table: Tensor | QuantWeight,
    vocab: int,
    text_ids: Tensor | None,
    text_table: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
) -> None:
    """Launch the kernel into ``out``, contiguous; shapes as :func:`embed_frame`, ``text_table`` only with ``text_ids``.

    ``table`` may also be quantised, in int8 or fp8.
    """
    if out.numel() == 0:
        return
    books, width = codes.shape[-1], table.data.shape[1]
    scale = table.scale if isinstance(table, QuantWeight) else None
    rows = rows_of(codes[..., :1], "codes")
    texts = rows if text_ids is None else rows_of(text_ids[..., None], "text_ids")
    masks = rows if mask is None else rows_of(mask[..., :1], "mask")
    # Two 16-byte loads of bf16 a thread, 16 programs for a frame of 2048: with eight loads a thread ptxas 12.8 (sm_90)
    # stays at 34 registers and issues them one after the other.
    default = {
        "BLOCK_K": min(32, triton.next_power_of_2(books)),
        "BLOCK_D": min(128, triton.next_power_of_2(width)),
        "num_warps": 8,
    }
    meta = tiles("embed", codes, {"K": books, "D": width}, default)
    _embed_kernel[(rows.total, triton.cdiv(width, meta["BLOCK_D"]))](
        codes,
        table.data,
        scale,
        text_ids,
        text_table,
        mask,
        out,
        *rows.walk,
        codes.stride(-1),
        *texts.walk,
        *masks.walk,
        0 if mask is None else mask.stride(-1),
        table.data.stride(0),
        0 if text_table is None else text_table.stride(0),
        vocab,
        0 if text_table is None else text_table.shape[0],
        width,
        K=books,
        HAS_SCALE=scale is not None,
        HAS_TEXT=text_ids is not None,
        HAS_MASK=mask is not None,
        MASKS_TEXT=mask is not None and mask.shape[-1] == books + 1,
        **meta,
    )


def _checked(
    codes: Tensor,
    table: Tensor,
    vocab: int,
    text_ids: Tensor | None,
    text_table: Tensor | None,
    mask: Tensor | None,
) -> None:
    if codes.dtype != torch.int64 or codes.ndim == 0 or codes.shape[-1] == 0:
        raise ValueError(f"codes must be [..., K] int64 with K of at least 1, got {tuple(codes.shape)} {codes.dtype}")
    frames, books = tuple(codes.shape[:-1]), codes.shape[-1]
    if vocab < 1:
        raise ValueError(f"vocab must be positive, got {vocab}")
    for name, rows in (("table", table), ("text_table", text_table)):
        if rows is None:
            continue
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ValueError(f"{name} must be two-dimensional and floating point, got {tuple(rows.shape)} {rows.dtype}")
        if rows.shape[1] > 1 and rows.stride(1) != 1:
            raise ValueError(f"{name} must have unit stride in its last dimension, got strides {tuple(rows.stride())}")
    if table.shape[0] < books * vocab:
        raise ValueError(
            f"table must have {books} x {vocab} rows for codes of {tuple(codes.shape)}, got {table.shape[0]}"
        )
    if (text_ids is None) != (text_table is None):
        raise ValueError("text_ids and text_table come together, got one of them")
    if text_ids is not None and text_table is not None:
        if text_ids.dtype != torch.int64 or text_ids.shape != codes.shape[:-1]:
            raise ValueError(f"text_ids must be {frames} int64, got {tuple(text_ids.shape)} {text_ids.dtype}")
        if text_table.shape[1] != table.shape[1]:
            raise ValueError(f"text_table must be as wide as table, {table.shape[1]}, got {text_table.shape[1]}")
    if mask is not None:
        widths = (books,) if text_ids is None else (books, books + 1)
        if mask.dtype != torch.bool or tuple(mask.shape[:-1]) != frames or mask.shape[-1] not in widths:
            wanted = " or ".join(str((*frames, width)) for width in widths)
            raise ValueError(f"mask must be {wanted} bool, got {tuple(mask.shape)} {mask.dtype}")


def _embed(
    codes: Tensor,
    table: Tensor,
    vocab: int,
    text_ids: Tensor | None,
    text_table: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    _checked(codes, table, vocab, text_ids, text_table, mask)
    if not runs_triton(codes, table, text_ids, text_table, mask):
        return embed_tokens_ref(codes, table, vocab, text_ids, text_table, mask).to(table.dtype).contiguous()
    out = torch.empty((*codes.shape[:-1], table.shape[1]), dtype=table.dtype, device=table.device)
    launch_embed(codes, table, vocab, text_ids, text_table, mask, out)
    return out


_op = _ops.register(
    "embed_frame",
    _embed,
    lambda codes, table, vocab, text_ids, text_table, mask: table.new_empty((*codes.shape[:-1], table.shape[1])),
)


def embed_frame(
    codes: Tensor,
    table: Tensor,
    vocab: int,
    text_ids: Tensor | None = None,
    text_table: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The backbone's input: a frame's codebook embeddings and its text embedding, summed in fp32 in one pass.

    Args:
        codes: ``[B, K]``, or ``[B, T, K]`` for a prefill, int64, each in ``[0, vocab)``, any stride between codebooks.
        table: ``[K * vocab, D]`` fp32, bf16 or fp16; codebook ``k`` owns rows ``k * vocab`` to ``(k + 1) * vocab - 1``.
        vocab: rows per codebook.
        text_ids: ``[B]`` or ``[B, T]`` int64, or None for a sum without text.
        text_table: ``[text_vocab, D]``, any float dtype, with ``text_ids``.
        mask: ``[..., K]`` bool, or ``[..., K + 1]`` with the text last, as Sesame's ``tokens_mask``: False adds nothing
            and its id is not used, so it may be anything. None, transformers' way, counts every id.

    Returns:
        ``[B, D]`` or ``[B, T, D]`` in the dtype of ``table``, contiguous. Nothing is read out of bounds: a row with an
        id that counts and is out of range is NaN throughout, for the caller to check. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or strides do not fit; the message names the argument.

    Example:
        >>> embed_frame(torch.zeros(1, 32, dtype=torch.int64), torch.ones(32 * 2051, 2048), 2051)[0, 0]
        tensor(32.)

    Source: ``CsmBackboneModelEmbeddings`` of transformers, ``_embed_tokens`` of Sesame's csm. Not yet run on a GPU.
    """
    return _op(codes, table, vocab, text_ids, text_table, mask)


def embed_tokens_ref(
    codes: Tensor,
    table: Tensor,
    vocab: int,
    text_ids: Tensor | None = None,
    text_table: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The specification of :func:`embed_frame`, before its last rounding: fp32 out. Shapes as there.

    One codebook at a time: all embeddings of a prefill of 2048 frames would be half a gigabyte.
    """

    def one(ids: Tensor, rows: Tensor, first: int, size: int, counts: Tensor | None) -> Tensor:
        known = (ids >= 0) & (ids < size)
        vectors = rows[torch.where(known, ids, 0) + first].float()
        vectors = torch.where(known[..., None], vectors, torch.nan)
        return vectors if counts is None else torch.where(counts[..., None], vectors, 0.0)

    books = codes.shape[-1]
    total = torch.zeros((*codes.shape[:-1], table.shape[1]), dtype=torch.float32, device=table.device)
    for k in range(books):
        total = total + one(codes[..., k], table, k * vocab, vocab, None if mask is None else mask[..., k])
    if text_ids is not None and text_table is not None:
        counts = mask[..., books] if mask is not None and mask.shape[-1] > books else None
        total = total + one(text_ids, text_table, 0, text_table.shape[0], counts)
    return total


def embed_frame_ref(codes: Tensor, table: Tensor | QuantWeight, vocab: int) -> Tensor:
    """The backbone's input for the next position: the sum of a frame's codebook embeddings, in fp32.

    :func:`embed_tokens_ref` for codes that are known to be in range, in the form that compiles to one loop.

    Args:
        codes: ``[B, K]`` int64, each in ``[0, vocab)``.
        table: ``[K * vocab, D]``, quantised or not; codebook ``k`` owns rows ``k * vocab`` to ``(k + 1) * vocab - 1``.
        vocab: rows per codebook.

    Returns:
        ``[B, D]`` fp32.
    """
    offsets = torch.arange(codes.shape[1], device=codes.device) * vocab
    return dequantize(take_rows(table, codes + offsets)).sum(dim=1)
