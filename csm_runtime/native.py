"""A whole frame on the native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from csm_kernels import cpu
from csm_kernels.sampling import NoiseKey, SamplingParams
from csm_runtime.adapters.spec import ModelSpec, RotaryTables, StackSpec
from csm_runtime.kv import State
from csm_runtime.weights import Linear, Packed, Stack


def why_not(spec: ModelSpec, device: torch.device) -> str | None:
    """What keeps a model from the native kernels, or None."""
    if device.type != "cpu":
        return f"they need a CPU, the model is on {device}"
    if spec.codebooks < 2:
        return "the model has no codebook for a depth decoder"
    return cpu.why_not()


def why_not_these(packed: Packed) -> str | None:
    """What keeps weights in these formats or layouts from the native kernels, or None."""
    linears = {
        f"{name}.{i}.{part}": value
        for name, stack in (("backbone", packed.backbone), ("depth", packed.depth))
        for i, layer in enumerate(stack.layers)
        for part, value in layer._asdict().items()
        if isinstance(value, Linear)
    }
    linears |= {"backbone.head": packed.backbone_head, "depth.projection": packed.depth_projection}
    try:
        for name, linear in linears.items():
            cpu.matrix_of(linear.weight, linear.bias, name)
        for name, table in (("backbone", packed.backbone_embedding), ("depth", packed.depth_embedding)):
            cpu.matrix_of(table, name=f"{name}.embedding")
        for k in range(1, len(packed.depth_heads.places) + 1):
            cpu.matrix_of(packed.depth_heads.one(k), name=f"depth.head.{k}")
    except ValueError as error:
        return str(error)
    return None


class NativeFrame:
    """The frame of one batch bucket: as :class:`csm_runtime.fused.FusedFrame`, for a CPU.

    Args:
        spec: the model's shape.
        rotary: tables of the backbone and the depth decoder.
        packed: what the frame reads, where it lies.
        state: buffers of the batch.
        params: sampling parameters of codebook 0 and of the others.
        key: noise of each row.
        isa: the instruction set, None for the best.

    Raises:
        ValueError: something the kernels do not read.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rotary: tuple[RotaryTables, RotaryTables],
        packed: Packed,
        state: State,
        params: tuple[SamplingParams, SamplingParams],
        key: NoiseKey,
        isa: str | None = None,
    ) -> None:
        tables, depth_tables = rotary

        def stack(
            of: Stack, shape: StackSpec, turns: RotaryTables, keys: list[Tensor], values: list[Tensor]
        ) -> cpu.CpuStack:
            return cpu.CpuStack(of.layers, of.norm, turns.cos, turns.sin, keys, values, shape.heads, shape.eps)

        self._frame = cpu.CpuFrame(
            backbone=stack(packed.backbone, spec.backbone, tables, state.keys, state.values),
            depth=stack(packed.depth, spec.depth, depth_tables, state.depth_keys, state.depth_values),
            head=packed.backbone_head,
            projection=packed.depth_projection,
            heads=[packed.depth_heads.one(k) for k in range(1, spec.codebooks)],
            embedding=packed.backbone_embedding,
            depth_embedding=packed.depth_embedding,
            state=state,
            params=params,
            key=key,
            isa=isa,
        )

    def forget_faults(self) -> None:
        """Nothing is kept from call to call."""

    def emit(self) -> None:
        """All codebooks of one frame, from ``state.hidden`` into ``state.codes``."""
        self._frame.emit()

    def decode_depth_again(self) -> None:
        """The depth decode alone, from ``state.hidden`` and codebook 0 in ``state.codes``."""
        self._frame.decode_depth()

    def advance(self) -> None:
        """Feed ``state.codes`` to the backbone: the next ``state.hidden``, one position further."""
        self._frame.advance()

    def logits(self) -> tuple[Tensor, Tensor]:
        """What the latest frame was drawn from, fp32: codebook 0's ``[B, vocab]`` and ``[codebooks - 1, B, depth_vocab]``."""
        return self._frame.first_logits, self._frame.logits
