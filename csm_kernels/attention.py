"""Single-step grouped-query attention over a KV cache, split along the context."""

from __future__ import annotations

import torch
from torch import Tensor

from csm_kernels import _ops
from csm_kernels._target import device_facts, runs_triton, tl, triton
from csm_kernels._tiles import tiles

_WIDEST = 256
_H100_PROCESSORS = 132
"""What a launch that only compiles, or is interpreted, is split for."""


@triton.jit
def _window(lengths_ptr, starts_ptr, batch, capacity, HAS_STARTS: tl.constexpr):
    """First position a row looks at, and how many: none below 0, none past the cache."""
    start = tl.zeros((), tl.int64)
    if HAS_STARTS:
        start = tl.maximum(tl.load(starts_ptr + batch), 0)
    length = tl.minimum(tl.load(lengths_ptr + batch), capacity)
    return start, tl.maximum(length - start, 0)


@triton.jit
def _partial_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    lengths_ptr,
    starts_ptr,
    mask_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    q_stride_b,
    q_stride_h,
    k_stride_b,
    k_stride_h,
    k_stride_c,
    v_stride_b,
    v_stride_h,
    v_stride_c,
    k_scale_stride_b,
    k_scale_stride_h,
    v_scale_stride_b,
    v_scale_stride_h,
    mask_stride_b,
    group,
    width,
    capacity,
    scale,
    QUANTISED: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row, one KV head with its ``group`` query heads, one share of the window; all fp32.

    A share is a whole number of blocks counted from the window's first position: what a row gives depends on neither its
    padding nor the other rows. With one split the division happens here and no merge follows.
    """
    batch, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    heads, columns = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    tile_mask = (heads < group)[:, None] & (columns < width)[None, :]
    start, count = _window(lengths_ptr, starts_ptr, batch, capacity, HAS_STARTS)
    share = tl.cdiv(tl.cdiv(count, SPLITS), BLOCK_C) * BLOCK_C
    first = start + tl.minimum(split * share, count)
    last = start + tl.minimum(split * share + share, count)

    head = kv_head * group + heads
    q = tl.load(
        q_ptr + batch * q_stride_b + head[:, None, None] * q_stride_h + columns[None, None, :],
        mask=(heads < group)[:, None, None] & (columns < width)[None, None, :],
        other=0.0,
    ).to(tl.float32)
    q = q * scale
    k_head = k_ptr + batch * k_stride_b + kv_head * k_stride_h
    v_head = v_ptr + batch * v_stride_b + kv_head * v_stride_h
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    values = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for begin in range(first, last, BLOCK_C):
        positions = begin + tl.arange(0, BLOCK_C).to(tl.int64)
        seen = positions < last
        if HAS_MASK:
            allowed = tl.load(mask_ptr + batch * mask_stride_b + positions, mask=seen, other=0).to(tl.float32)
            seen = seen & (allowed != (float("-inf") if ADDED else 0.0))
        # Loaded with all three dimensions of the products: a tile widened later goes through shared memory first.
        mask = seen[None, :, None] & (columns < width)[None, None, :]
        k = k_head + positions[None, :, None] * k_stride_c + columns[None, None, :]
        v = v_head + positions[None, :, None] * v_stride_c + columns[None, None, :]
        k = tl.load(k, mask=mask, other=0).to(tl.float32)
        v = tl.load(v, mask=mask, other=0).to(tl.float32)
        scores = tl.sum(k * q, 2)
        if QUANTISED:
            k_scale = k_scale_ptr + batch * k_scale_stride_b + kv_head * k_scale_stride_h + positions
            scores = scores * tl.load(k_scale, mask=seen, other=0.0)[None, :]
        if ADDED:
            scores += allowed[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # Scores of minus infinity alone must not turn into infinity minus infinity while others may follow.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        if QUANTISED:
            v_scale = v_scale_ptr + batch * v_scale_stride_b + kv_head * v_scale_stride_h + positions
            weights = weights * tl.load(v_scale, mask=seen, other=0.0)[None, :]
        values = values * shrink[:, None] + tl.sum(v * weights[:, :, None], 1)
        top = higher

    row = batch * (group * tl.num_programs(1)) + head
    if SPLITS == 1:
        if HAS_MASK:
            out = tl.where(total[:, None] == 0.0, 0.0, values / total[:, None])
        else:
            out = tl.where(count > 0, values / total[:, None], 0.0)
        tl.store(out_ptr + row[:, None] * width + columns[None, :], out, mask=tile_mask)
    else:
        slot = row * SPLITS + split
        tl.store(partial_ptr + slot[:, None] * width + columns[None, :], values, mask=tile_mask)
        tl.store(stats_ptr + slot * 2, top, mask=heads < group)
        tl.store(stats_ptr + slot * 2 + 1, total, mask=heads < group)


@triton.jit
def _merge_kernel(
    partial_ptr,
    stats_ptr,
    lengths_ptr,
    starts_ptr,
    out_ptr,
    heads,
    width,
    capacity,
    HAS_STARTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query head of one row: the shares' sums, brought to one maximum and added in a fixed order."""
    row = tl.program_id(0).to(tl.int64)
    _, count = _window(lengths_ptr, starts_ptr, row // heads, capacity, HAS_STARTS)
    slots, columns = row * SPLITS + tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    top = tl.load(stats_ptr + slots * 2)
    highest = tl.max(top, 0)
    shrink = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(tl.load(stats_ptr + slots * 2 + 1) * shrink, 0)
    mask = (columns < width)[None, :] & (slots >= 0)[:, None]
    values = tl.load(partial_ptr + slots[:, None] * width + columns[None, :], mask=mask, other=0.0)
    merged = tl.sum(values * shrink[:, None], 0) / total
    out = tl.where(total == 0.0 if HAS_MASK else count == 0, 0.0, merged)
    tl.store(out_ptr + row * width + columns, out, mask=columns < width)


def _tiles(q: Tensor, k_cache: Tensor) -> dict[str, int]:
    """``SPLITS`` depends on the device and the cache, never on the batch: a row gives the same in any batch."""
    groups, capacity, dim = k_cache.shape[1:]
    group = q.shape[1] // groups
    block_g, block_d = triton.next_power_of_2(group), triton.next_power_of_2(dim)
    # 128 products a thread: 16 positions are the least worth a block, 64 fill one for CSM's backbone.
    block_c = max(16, min(64, triton.next_power_of_2(capacity), 16384 // (block_g * block_d)))
    processors = device_facts(q.device.index or 0).processors if q.is_cuda else _H100_PROCESSORS
    splits = min(triton.next_power_of_2(triton.cdiv(capacity, block_c)), max(1, processors // groups))
    return tiles(
        "attention",
        q,
        {"G": group, "D": dim, "C": capacity, "format": str(k_cache.dtype).removeprefix("torch.")},
        {"BLOCK_C": block_c, "SPLITS": 1 << (splits.bit_length() - 1), "num_warps": 4},
    )


def workspace_size(q: Tensor, k_cache: Tensor) -> int:
    """How many fp32 values :func:`launch_attention_step` needs for its partial sums; 0 where it does not split."""
    splits = _tiles(q, k_cache)["SPLITS"]
    return 0 if splits == 1 else q.shape[0] * q.shape[1] * splits * (q.shape[2] + 2)


def launch_attention_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    mask: Tensor | None,
    workspace: Tensor,
    out: Tensor,
) -> None:
    """Launch the kernels, one where nothing is split and else two, into ``out``, ``[B, H * D]`` fp32, contiguous.

    Tensors as :func:`attention_step` takes them; ``workspace`` is fp32, of :func:`workspace_size` values, whatever they
    are. The launch depends on shapes alone, never on lengths: it can be captured once and replayed.
    """
    batch, heads, dim = q.shape
    groups, capacity = k_cache.shape[1:3]
    sizes = _tiles(q, k_cache)
    splits = sizes["SPLITS"]
    partial = stats = out
    if splits > 1:
        partial, stats = workspace[: batch * heads * splits * dim], workspace[batch * heads * splits * dim :]
    block_d = triton.next_power_of_2(dim)
    _partial_kernel[(batch, groups, splits)](
        q,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        lengths,
        starts,
        mask,
        out,
        partial,
        stats,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *((0, 0) if k_scale is None else k_scale.stride()[:2]),
        *((0, 0) if v_scale is None else v_scale.stride()[:2]),
        0 if mask is None else mask.stride(0),
        heads // groups,
        dim,
        capacity,
        dim**-0.5,
        QUANTISED=k_scale is not None,
        HAS_STARTS=starts is not None,
        HAS_MASK=mask is not None,
        ADDED=mask is not None and mask.is_floating_point(),
        BLOCK_G=triton.next_power_of_2(heads // groups),
        BLOCK_D=block_d,
        **sizes,
    )
    if splits > 1:
        _merge_kernel[(batch * heads,)](
            partial,
            stats,
            lengths,
            starts,
            out,
            heads,
            dim,
            capacity,
            HAS_STARTS=starts is not None,
            HAS_MASK=mask is not None,
            SPLITS=splits,
            BLOCK_D=block_d,
            num_warps=max(1, min(4, splits * block_d // 512)),
        )


def _checked(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    mask: Tensor | None,
) -> None:
    if q.ndim != 3 or not q.is_floating_point():
        raise ValueError(f"q must be [B, H, D], floating point, got {tuple(q.shape)}, {q.dtype}")
    batch, heads, dim = q.shape
    if not 1 <= dim <= _WIDEST:
        raise ValueError(f"q must have heads of 1 to {_WIDEST}, got {dim}")
    if k_cache.ndim != 4 or k_cache.shape[0] != batch or k_cache.shape[3] != dim:
        raise ValueError(f"k_cache must be [B, KV, C, D] for q of {tuple(q.shape)}, got {tuple(k_cache.shape)}")
    if not k_cache.shape[1] or heads % k_cache.shape[1]:
        raise ValueError(f"k_cache's heads must divide q's {heads}, got {k_cache.shape[1]}")
    if v_cache.shape != k_cache.shape or v_cache.dtype != k_cache.dtype:
        raise ValueError(
            f"v_cache must be like k_cache, {tuple(k_cache.shape)}, {k_cache.dtype}, got {tuple(v_cache.shape)}, "
            f"{v_cache.dtype}"
        )
    quantised = k_cache.dtype == torch.int8
    if not quantised and not k_cache.is_floating_point():
        raise ValueError(f"k_cache must be floating point or int8, got {k_cache.dtype}")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if quantised != (scale is not None):
            raise ValueError(f"{name} belongs to an int8 cache and to no other, got {k_cache.dtype}")
        if scale is not None and (scale.shape != k_cache.shape[:3] or scale.dtype != torch.float32):
            raise ValueError(
                f"{name} must be [B, KV, C] fp32, {tuple(k_cache.shape[:3])}, got {tuple(scale.shape)}, {scale.dtype}"
            )
    for name, where in (("lengths", lengths), ("starts", starts)):
        if where is not None and (where.shape != (batch,) or where.dtype != torch.int64 or not where.is_contiguous()):
            raise ValueError(
                f"{name} must be [B] int64, contiguous, B = {batch}, got {tuple(where.shape)}, {where.dtype}, strides "
                f"{tuple(where.stride())}"
            )
    if mask is not None and (
        mask.shape != (batch, k_cache.shape[2]) or not (mask.dtype == torch.bool or mask.is_floating_point())
    ):
        raise ValueError(
            f"mask must be [B, C], bool or floating point, {(batch, k_cache.shape[2])}, got {tuple(mask.shape)}, "
            f"{mask.dtype}"
        )
    for name, tensor in (
        ("q", q),
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        ("k_scale", k_scale),
        ("v_scale", v_scale),
        ("mask", mask),
    ):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must have unit stride in its last dimension, got strides {tuple(tensor.stride())} for shape "
                f"{tuple(tensor.shape)}: call .contiguous() on it"
            )


def _attention_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    _checked(q, k_cache, v_cache, lengths, starts, k_scale, v_scale, mask)
    batch, heads, dim = q.shape
    if k_cache.numel() == 0 or heads == 0:
        return torch.zeros(batch, heads * dim, dtype=torch.float32, device=q.device)
    if not runs_triton(q, k_cache, v_cache, lengths, starts, k_scale, v_scale, mask):
        return attention_lengths_ref(q, k_cache, v_cache, lengths, starts, k_scale, v_scale, mask)
    out = torch.empty(batch, heads * dim, dtype=torch.float32, device=q.device)
    workspace = torch.empty(workspace_size(q, k_cache), dtype=torch.float32, device=q.device)
    launch_attention_step(q, k_cache, v_cache, lengths, starts, k_scale, v_scale, mask, workspace, out)
    return out


_attention_step_op = _ops.register(
    "attention_step",
    _attention_step,
    lambda q, k_cache, v_cache, lengths, starts, k_scale, v_scale, mask: q.new_empty(
        q.shape[0], q.shape[1] * q.shape[2], dtype=torch.float32
    ),
)


def attention_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One query position per row against the keys and values of ``starts[b] <= c < lengths[b]``, in fp32.

    Args:
        q: ``[B, H, D]`` fp32, bf16 or fp16, already rotated; D at most 256.
        k_cache: ``[B, KV, C, D]`` fp32, bf16, fp16 or int8; KV divides H, query head ``h`` reads KV head
            ``h // (H // KV)``.
        v_cache: shape and dtype of ``k_cache``.
        lengths: ``[B]`` int64: where a row's window ends; above C it counts as C.
        starts: ``[B]`` int64: where it begins, after the left padding; 0 where not given.
        k_scale: ``[B, KV, C]`` fp32: what a position's int8 keys are multiplied by; for int8 caches only.
        v_scale: the same for the values.
        mask: ``[B, C]``, what in the window a row looks at: bool, True where it does, or floating point, added to the
            scores. All of it where not given.

    All but ``lengths`` and ``starts`` may have any strides with unit stride in the last dimension. Nothing outside the
    window, or masked, is read. Not differentiable.

    Returns:
        ``[B, H * D]`` fp32, contiguous. A row with nothing to look at gives zeros.

    Raises:
        ValueError: shapes, dtypes or strides do not fit; the message names the argument.

    Example:
        >>> k = v = torch.randn(2, 8, 2048, 64)
        >>> attention_step(torch.randn(2, 32, 64), k, v, torch.tensor([100, 700])).shape
        torch.Size([2, 2048])

    Source: Dao et al., Flash-Decoding for long-context inference (2023). Not yet run on a GPU.
    """
    return _attention_step_op(q, k_cache, v_cache, lengths, starts, k_scale, v_scale, mask)


def attention_lengths_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The specification of :func:`attention_step`: its window and its mask as a bias for :func:`attention_step_ref`."""
    position = torch.arange(k_cache.shape[2], device=q.device)[None, :]
    seen = position < lengths[:, None]
    if starts is not None:
        seen = seen & (position >= starts[:, None])
    added = torch.zeros((), dtype=torch.float32, device=q.device)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        added = mask.float()
        seen = seen & (added != float("-inf"))
    # What lies outside the window may be NaN, which a weight of zero would let through.
    k, v = (
        torch.where(seen[:, None, :, None], cache.float() if scale is None else cache.float() * scale[..., None], 0.0)
        for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
    )
    some = seen.any(-1, keepdim=True)
    bias = torch.where(seen, added, torch.where(some, float("-inf"), 0.0))
    return torch.where(some, attention_step_ref(q.float(), k, v, bias), 0.0)


def attention_step_ref(q: Tensor, k_cache: Tensor, v_cache: Tensor, bias: Tensor) -> Tensor:
    """One query position per row against the cached keys and values, softmax and sums in fp32.

    Args:
        q: ``[B, H, D]`` fp32, already rotated.
        k_cache: ``[B, KV, C, D]``, any float dtype; KV divides H, query head ``h`` reads KV head ``h // (H // KV)``.
        v_cache: ``[B, KV, C, D]``.
        bias: ``[B, C]`` fp32, 0 where row ``b`` may look and ``-inf`` elsewhere: lengths, left padding and holes in a
            prompt's mask are all said here. Every row must be allowed at least one position.

    Returns:
        ``[B, H * D]`` fp32.
    """
    batch, heads, dim = q.shape
    groups = k_cache.shape[1]
    grouped = q.reshape(batch, groups, heads // groups, 1, dim)
    scores = (grouped * k_cache[:, :, None].float()).sum(-1) * dim**-0.5
    weights = torch.softmax(scores + bias[:, None, None, :], dim=-1)
    out = (weights[..., None] * v_cache[:, :, None].float()).sum(-2)
    return out.reshape(batch, heads * dim)


def attention_step_library(q: Tensor, k_cache: Tensor, v_cache: Tensor, bias: Tensor) -> Tensor:
    """The same by ``scaled_dot_product_attention``, queries rounded to the cache's dtype. Shapes as the reference."""
    batch, heads, dim = q.shape
    groups = k_cache.shape[1]
    # The queries that share a KV head stand as rows of one block: no copy of the cache is made for them.
    grouped = q.reshape(batch, groups, heads // groups, dim).to(k_cache.dtype)
    mask = bias[:, None, None, :].to(k_cache.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, k_cache, v_cache, attn_mask=mask)
    return out.reshape(batch, heads * dim).float()
