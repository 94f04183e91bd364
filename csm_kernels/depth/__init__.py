"""The fused codebook decode: all codebooks of one frame in one call.

Example:
    >>> packed = pack_depth(layers, norm, cos, sin, shape, projection, heads, embedding, {"mlp": "int8"})
    >>> codes = depth_decode(hidden, token, packed, params, key)  # [B, codebooks]
"""

from __future__ import annotations

import torch
from torch import Tensor

from csm_kernels._target import runs_triton
from csm_kernels.depth.forced import depth_logits
from csm_kernels.depth.kernel import Plan, depth_pointers, launch_depth, plan
from csm_kernels.depth.pack import (
    PackedDepth,
    PackedStack,
    StackShape,
    Workspace,
    make_workspace,
    pack_depth,
    pack_stack,
)
from csm_kernels.depth.reference import DepthReference
from csm_kernels.sampling import NoiseKey, SamplingParams

__all__ = [
    "PackedDepth",
    "PackedStack",
    "Plan",
    "StackShape",
    "Workspace",
    "depth_decode",
    "depth_logits",
    "make_workspace",
    "pack_depth",
    "pack_stack",
    "plan",
]

MAX_BATCH = 16


def depth_decode(
    hidden: Tensor,
    token: Tensor,
    packed: PackedDepth,
    params: SamplingParams,
    key: NoiseKey,
    *,
    workspace: Workspace | None = None,
    persistent: bool | None = None,
    logits: Tensor | None = None,
) -> Tensor:
    """Codebooks 1 to the last of one frame, sampled one after another in one call.

    Args:
        hidden: ``[B, W]`` fp32, contiguous: the backbone's normalised last hidden state. B at most 16.
        token: ``[B]`` int64, codebook 0.
        packed: the depth decoder's weights, see :func:`pack_depth`.
        params: temperature, top-k, top-p and do_sample of each row, device tensors as
            :func:`csm_kernels.sampling.sample` takes them.
        key: seed, utterance and frame of each row: the noise of codebook ``k`` and token ``v`` is a function of them.
        workspace: buffers to reuse, from :func:`make_workspace`; made for this call where None.
        persistent: one persistent kernel (True) or one launch per phase (False); None for what the tile table holds.
        logits: ``[codebooks - 1, B, V]`` fp32 to keep every codebook's logits in, or None.

    Returns:
        ``[B, codebooks]`` int64, ``token`` first. A row whose logits hold NaN or no finite value gets token 0 there and
        ``workspace.buffers.flags[b] = 1``.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or layout.

    Source: the model of `Sesame's CSM <https://github.com/SesameAILabs/csm>`_; phases, barriers and drivers are ours.
    """
    _check(hidden, token, packed, params, key, logits)
    batch = len(token)
    if not runs_triton(hidden, token):
        reference = DepthReference(packed, hidden, token, params, key, packed.dtype)
        codes, made = reference.run()
        if logits is not None:
            logits.copy_(made.transpose(0, 1))
        return codes
    if workspace is None:
        workspace = make_workspace(packed.stack, batch, 1, hidden.device, depth=packed, cache_dtype=packed.dtype)
    codes = torch.empty(batch, packed.codebooks, dtype=torch.int64, device=hidden.device)
    workspace.buffers.token.copy_(token)
    pointers = depth_pointers(packed, workspace, hidden, codes, params, key)
    if logits is not None:
        pointers = pointers._replace(logits=logits)
    chosen = plan(packed, batch, workspace, packed.codebooks, persistent=persistent)
    launch_depth(chosen, pointers, batch, 0 if logits is None else batch * packed.vocab)
    return codes


def _check(
    hidden: Tensor, token: Tensor, packed: PackedDepth, params: SamplingParams, key: NoiseKey, logits: Tensor | None
) -> None:
    batch, width = token.numel(), packed.width
    if token.ndim != 1 or not 1 <= batch <= MAX_BATCH:
        raise ValueError(f"token must be [B] with B from 1 to {MAX_BATCH}, got {tuple(token.shape)}")
    wanted: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("hidden", hidden, (batch, width), torch.float32),
        ("token", token, (batch,), torch.int64),
        ("params.temperature", params.temperature, (batch,), torch.float32),
        ("params.top_k", params.top_k, (batch,), torch.int64),
        ("params.top_p", params.top_p, (batch,), torch.float32),
        ("params.do_sample", params.do_sample, (batch,), torch.bool),
        ("key.seed", key.seed, (batch,), torch.int64),
        ("key.utterance", key.utterance, (batch,), torch.int64),
        ("key.frame", key.frame, (batch,), torch.int64),
        ("logits", logits, (packed.codebooks - 1, batch, packed.vocab), torch.float32),
    ]
    for name, tensor, shape, dtype in wanted:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {list(shape)} {dtype}, got {list(tensor.shape)} {tensor.dtype} with strides "
                f"{tensor.stride()}"
            )
        if tensor.device != packed.embedding.data.device:
            raise ValueError(
                f"{name} must be on {packed.embedding.data.device}, where the weights are, got {tensor.device}"
            )
