"""Teacher-forced pass: the logits of all codebooks of N frames in one call, from the packed weights.

Codes are known, so every position of every frame is one row of a few large products. They run in the model's
dtype by library matmuls, one layer dequantised at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from csm_kernels.depth.pack import PackedDepth, PackedStack, act_dtype, one, unpacked_o
from csm_kernels.quant import dequantize, take_rows


def depth_logits(hidden: Tensor, codes: Tensor, packed: PackedDepth, codebooks: int | None = None) -> Tensor:
    """Logits of codebooks 1 to ``codebooks - 1``, each given the true codes before it.

    Args:
        hidden: ``[N, W]``, the backbone's hidden state of N frames, any float dtype.
        codes: ``[N, codebooks]`` int64, or one column less: the last codebook is never read.
        packed: the depth decoder's weights.
        codebooks: how many codebooks to go through; all of them where None.

    Returns:
        ``[N, codebooks - 1, V]`` fp32.

    Raises:
        ValueError: shapes that do not fit.
    """
    count = packed.codebooks if codebooks is None else codebooks
    if not 2 <= count <= packed.codebooks:
        raise ValueError(f"codebooks must be 2 to {packed.codebooks}, got {codebooks}")
    width = packed.width
    if hidden.ndim != 2 or hidden.shape[1] != width:
        raise ValueError(f"hidden must be [N, {width}], got {list(hidden.shape)}")
    if codes.ndim != 2 or codes.shape[0] != hidden.shape[0] or codes.shape[1] < count - 1:
        raise ValueError(f"codes must be [{len(hidden)}, {count - 1} or more], got {list(codes.shape)}")
    dtype = packed.dtype
    places = codes[:, : count - 1] + torch.arange(count - 1, device=codes.device) * packed.vocab
    if places.numel() and not bool(((places >= 0) & (places < len(packed.embedding.data))).all()):
        raise ValueError(f"codes must be 0 to {packed.vocab - 1}")
    if packed.table is not None:
        weight, bias = one(packed.projection, 0).to(torch.float32), packed.projection_bias
        x = torch.cat([linear(hidden.float(), weight, bias)[:, None], packed.table[places].float()], dim=1)
    else:
        rows = torch.cat([hidden[:, None].float(), dequantize(take_rows(packed.embedding, places))], dim=1)
        x = linear(rows, one(packed.projection, 0).to(torch.float32), packed.projection_bias)
    for l in range(packed.stack.shape.layers):
        x = _layer(x, packed.stack, l, dtype)
    x = _norm(x[:, 1:], packed.stack.norm, packed.stack.shape.eps).to(dtype)
    heads = [linear(x[:, i], one(packed.heads, i).to(dtype)).float() for i in range(count - 1)]
    return torch.stack(heads, dim=1)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _layer(x: Tensor, stack: PackedStack, l: int, dtype: torch.dtype) -> Tensor:
    shape = stack.shape
    frames, positions = x.shape[:2]

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = linear(x.to(dtype), weight.to(dtype)).float()
        return out if bias is None else out + bias[l]

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * stack.cos[:positions] + torch.cat([-high, low], dim=-1) * stack.sin[:positions]

    qkv = product(_norm(x, stack.input_norm[l], shape.eps), one(stack.qkv, l), stack.qkv_bias)
    heads = qkv.view(frames, positions, -1, shape.dim).transpose(1, 2)
    q, k, v = heads.split([shape.heads, shape.groups, shape.groups], dim=1)
    attended = scaled_dot_product_attention(
        turned(q).to(dtype), turned(k).to(dtype), v.to(dtype), is_causal=True, enable_gqa=True
    )
    merged = attended.transpose(1, 2).reshape(frames, positions, -1)
    x = x + product(merged, unpacked_o(stack, l), stack.o_bias)
    both = product(_norm(x, stack.post_norm[l], shape.eps), one(stack.gate_up, l), stack.gate_up_bias)
    act = (silu(both[..., 0::2]) * both[..., 1::2]).to(act_dtype(stack))
    return x + product(act, one(stack.down, l), stack.down_bias)
