"""A whole frame on the fused kernels: packed copies of both stacks, their workspaces, and the launches in order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from csm_kernels._target import device_facts, has_triton, interpreting
from csm_kernels.depth import (
    PackedDepth,
    PackedStack,
    Plan,
    StackShape,
    make_workspace,
    pack_depth,
    pack_stack,
    plan,
)
from csm_kernels.depth.frame import launch_advance, launch_finish
from csm_kernels.depth.kernel import depth_pointers, launch_depth, launch_stack, stack_pointers
from csm_kernels.depth.pack import packed_bytes, tensors
from csm_kernels.embed import launch_embed
from csm_kernels.gemv_kernel import launch_gemv, workspace_size
from csm_kernels.norm import launch_forward
from csm_kernels.quant import QuantWeight, format_of
from csm_kernels.sampling import NoiseKey, SamplingParams, launch_sample
from csm_runtime.adapters.spec import ModelSpec, RotaryTables, StackSpec
from csm_runtime.kv import State
from csm_runtime.weights import Packed, Stack, fingerprints

_MOST_SPLITS = 16
_WIDEST_HEAD, _MOST_HEADS = 256, 64
"""What the attention of one KV head holds in registers."""
_H100_PROCESSORS = 132


class FusedWeights(NamedTuple):
    """Both stacks, packed for the kernels."""

    backbone: PackedStack
    depth: PackedDepth


def why_not(spec: ModelSpec, device: torch.device) -> str | None:
    """What keeps a model from the fused kernels, or None."""
    if not has_triton():
        return "Triton is not installed"
    if device.type != "cuda" and not interpreting():
        return f"they need CUDA, the model is on {device}"
    if spec.codebooks < 2:
        return "the model has no codebook for a depth decoder"
    for name, stack in (("backbone", spec.backbone), ("depth decoder", spec.depth)):
        group = stack.heads // stack.kv_heads
        if stack.head_dim > _WIDEST_HEAD or group > _MOST_HEADS:
            wanted = f"at most {_WIDEST_HEAD} and {_MOST_HEADS}"
            return f"the {name} has heads of {stack.head_dim} and {group} of them to a KV head, not {wanted}"
        if max(2 * stack.ffn, stack.heads * stack.head_dim) * stack.hidden >= 2**31:
            return f"the {name} has a matrix of 2^31 elements or more"
    return None


def why_not_these(packed: Packed) -> str | None:
    """What keeps weights in these formats from the fused kernels, or None."""
    banks = len(packed.depth_heads.banks)
    if banks > 1:
        return f"the depth decoder's heads are in {banks} formats, and they read one"
    if format_of(packed.backbone_embedding) == "int4":
        return "zone 'backbone.embedding' is stored in int4, and they read fp32, bf16, fp16, int8 and fp8"
    weights = [leaf for leaf in tree_leaves(packed, is_leaf=_is_quantised) if _is_quantised(leaf)]
    if not all(weight.symmetric for weight in weights):
        return "some zones are stored in asymmetric int4, and they read symmetric groups"
    return None


def _is_quantised(value: Any) -> bool:
    return isinstance(value, QuantWeight)


def _shape(stack: StackSpec) -> StackShape:
    return StackShape(stack.layers, stack.hidden, stack.ffn, stack.heads, stack.kv_heads, stack.head_dim, stack.eps)


class FusedModel:
    """Packed copies for the fused kernels, kept true to the weights the engine is bound to.

    Args:
        spec: the model's shape.
        rotary: tables of the backbone and the depth decoder.
        table: keep the depth decoder's embeddings after their projection, see :func:`csm_kernels.depth.pack_depth`.
    """

    def __init__(self, spec: ModelSpec, rotary: tuple[RotaryTables, RotaryTables], table: bool = True) -> None:
        self._spec, self._rotary, self._table = spec, rotary, table
        self._marks: Tensor | None = None
        self._weights: FusedWeights | None = None

    @property
    def weights(self) -> FusedWeights:
        """What the kernels read; :meth:`refresh` comes first."""
        assert self._weights is not None, "refresh() comes first"
        return self._weights

    def bytes(self) -> int:
        """Bytes of the packed copies."""
        return 0 if self._weights is None else packed_bytes(self._weights.backbone) + packed_bytes(self._weights.depth)

    def refresh(self, packed: Packed) -> bool:
        """Pack what has changed, in place where nothing has moved; True where captured graphs must be dropped."""
        marks = fingerprints(packed)
        same = self._marks is not None and marks.shape == self._marks.shape and torch.equal(marks, self._marks)
        if same and self._weights is not None and self._embedding_stayed(packed):
            return False
        made = self._pack(packed)
        self._marks = marks
        if self._weights is None:
            self._weights = made
            return True
        old, new = tensors(self._weights), tensors(made)
        if self._embedding_stayed(packed) and [_layout(t) for t in old] == [_layout(t) for t in new]:
            for target, source in zip(old, new):
                if target.data_ptr() != source.data_ptr():
                    target.copy_(source)
            return False
        self._weights = made
        return True

    def _embedding_stayed(self, packed: Packed) -> bool:
        return (
            self._weights is None
            or self._weights.depth.embedding.data.data_ptr() == packed.depth_embedding.data.data_ptr()
        )

    def _pack(self, packed: Packed) -> FusedWeights:
        spec, (rotary, depth_rotary) = self._spec, self._rotary

        def args(stack: Stack, tables: RotaryTables, of: StackSpec) -> dict[str, Any]:
            return dict(layers=stack.layers, norm=stack.norm, cos=tables.cos, sin=tables.sin, shape=_shape(of))

        return FusedWeights(
            pack_stack(**args(packed.backbone, rotary, spec.backbone)),
            pack_depth(
                **args(packed.depth, depth_rotary, spec.depth),
                projection=packed.depth_projection,
                heads=packed.depth_heads.banks[0],
                embedding=packed.depth_embedding,
                table=self._table,
            ),
        )


class FusedFrame:
    """The launches of one frame for one batch bucket, on fixed buffers: nothing is allocated, nothing waits.

    Args:
        spec: the model's shape.
        weights: packed copies.
        packed: what else the frame reads: embedding, codebook-0 head, final norm.
        state: buffers of the batch.
        params: sampling parameters of codebook 0 and of the others.
        key: noise of each row.
        persistent: the driver of both stacks; None for what the tile table holds.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: FusedWeights,
        packed: Packed,
        state: State,
        params: tuple[SamplingParams, SamplingParams],
        key: NoiseKey,
        persistent: bool | None = None,
    ) -> None:
        device, rows = state.hidden.device, state.rows
        self._spec, self._weights, self._packed, self._state = spec, weights, packed, state
        self._params, self._key = params, key
        splits = _splits(device, rows, spec.backbone, state.capacity)
        self._backbone = make_workspace(weights.backbone, rows, splits, device)
        self.depth = make_workspace(
            weights.depth.stack, rows, 1, device, depth=weights.depth, cache_dtype=state.keys[0].dtype
        )
        self._stack_plan = plan(weights.backbone, rows, self._backbone, state.capacity, persistent=persistent)
        self.depth_plan: Plan = plan(weights.depth, rows, self.depth, spec.codebooks, persistent=persistent)
        self._stack_args = stack_pointers(weights.backbone, self._backbone, state.all_keys, state.all_values)._replace(
            allowed=state.allowed, length=state.length, position=state.position
        )
        depth_args = depth_pointers(weights.depth, self.depth, state.hidden, state.codes, params[1], key)
        head = packed.backbone_head.weight
        self._logits = torch.zeros(rows, spec.vocab, dtype=torch.float32, device=device)
        # Kept for the guard: 254 KB of writes a frame, where its weights are 10 GB of reads.
        shape = (spec.codebooks - 1, rows, spec.depth_vocab)
        self._depth_logits = torch.zeros(shape, dtype=torch.float32, device=device)
        self._depth_args = depth_args._replace(logits=self._depth_logits)
        size = workspace_size(state.hidden, head)
        self._partial = torch.zeros(size, dtype=torch.float32, device=device) if size else None
        self._rstd = torch.zeros(rows, dtype=torch.float32, device=device)
        self._codebook = torch.zeros(1, dtype=torch.int64, device=device)

    def forget_faults(self) -> None:
        """Before a call: its first frame runs no backbone, whose error word would still be that of an earlier call."""
        for workspace in (self._backbone, self.depth):
            workspace.buffers.sync.zero_()
        self.depth.buffers.flags.zero_()

    def emit(self) -> None:
        """All codebooks of one frame, from ``state.hidden`` into ``state.codes``."""
        head, buffers = self._packed.backbone_head, self.depth.buffers
        launch_gemv(
            self._state.hidden, head.weight, head.bias, None, None, 0.0, self._logits, self._partial, evict_first=True
        )
        launch_sample(self._logits, self._params[0], self._key, self._codebook, buffers.token, buffers.flags)
        self.decode_depth()
        state = self._state
        syncs = (self._backbone.buffers.sync, buffers.sync)
        launch_finish(
            state.codes,
            state.ended,
            state.end_code,
            state.judged,
            state.pad_code,
            state.pads,
            syncs,
            buffers.flags,
            state.faults,
            (self._spec.vocab, self._spec.depth_vocab),
        )

    def decode_depth(self) -> None:
        """The depth decode alone, from ``state.hidden`` and codebook 0 as it was drawn."""
        stride = self._state.rows * self._spec.depth_vocab
        launch_depth(self.depth_plan, self._depth_args, self._state.rows, stride)

    def decode_depth_again(self) -> None:
        """The same from codebook 0 in ``state.codes``."""
        self.depth.buffers.token.copy_(self._state.codes[:, 0])
        self.decode_depth()

    def logits(self) -> tuple[Tensor, Tensor]:
        """What the latest frame was drawn from, fp32: codebook 0's ``[B, vocab]`` and ``[codebooks - 1, B, depth_vocab]``."""
        return self._logits, self._depth_logits

    def advance(self) -> None:
        """Feed ``state.codes`` to the backbone: the next ``state.hidden``, one position further."""
        state, packed, stream = self._state, self._packed, self._backbone.buffers.stream
        launch_embed(state.codes, packed.backbone_embedding, self._spec.vocab, None, None, None, stream)
        launch_stack(self._stack_plan, self._stack_args, state.rows)
        launch_forward(stream, None, packed.backbone.norm, self._spec.backbone.eps, state.hidden, None, self._rstd)
        launch_advance(state.allowed, state.length, state.position, state.frame)


def _splits(device: torch.device, rows: int, stack: StackSpec, capacity: int) -> int:
    """Shares of the context: as many as keep all processors busy, of 64 positions at least."""
    processors = device_facts(device.index or 0).processors if device.type == "cuda" else _H100_PROCESSORS
    wanted = max(1, min(processors // (rows * stack.kv_heads), _MOST_SPLITS, capacity // 64))
    return 1 << (wanted.bit_length() - 1)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
