"""Small depth decoders and backbones with seeded weights, packed, and inputs for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from csm_kernels._target import interpreting
from csm_kernels._tiles import override_tiles
from csm_kernels.depth import PackedDepth, PackedStack, StackShape, pack_depth, pack_stack
from csm_kernels.depth.reference import DepthReference
from csm_kernels.sampling import NoiseKey, SamplingParams

ZONES = ("attention", "mlp", "projection", "head")
TINY = StackShape(layers=2, width=32, ffn=48, heads=4, groups=2, dim=16, eps=1e-5)
ODD = StackShape(layers=1, width=36, ffn=50, heads=6, groups=2, dim=10, eps=1e-3)
ONE_GROUP = StackShape(layers=2, width=20, ffn=34, heads=3, groups=1, dim=6, eps=1e-6)
ALL_GROUPS = StackShape(layers=1, width=40, ffn=33, heads=3, groups=3, dim=12, eps=1e-5)


def same(fmt: str | None) -> dict[str, str]:
    """One format for every zone."""
    return {} if fmt is None else dict.fromkeys(ZONES, fmt)


def _layers(shape: StackShape, dtype: torch.dtype, bias: bool, generator: torch.Generator) -> tuple[list[Any], Any]:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def linear(height: int, width: int) -> SimpleNamespace:
        weight = (normal(height, width) / width**0.5).to(dtype)
        return SimpleNamespace(weight=weight, bias=(0.1 * normal(height)).to(dtype) if bias else None)

    def layer() -> SimpleNamespace:
        across, kept = shape.heads * shape.dim, shape.groups * shape.dim
        return SimpleNamespace(
            input_norm=(1 + 0.1 * normal(shape.width)).to(dtype),
            post_norm=(1 + 0.1 * normal(shape.width)).to(dtype),
            q=linear(across, shape.width),
            k=linear(kept, shape.width),
            v=linear(kept, shape.width),
            o=linear(shape.width, across),
            gate=linear(shape.ffn, shape.width),
            up=linear(shape.ffn, shape.width),
            down=linear(shape.width, shape.ffn),
        )

    return [layer() for _ in range(shape.layers)], linear


def rotary(positions: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, ``[positions, dim]``."""
    angles = torch.outer(torch.arange(positions).float(), 1 / 10000 ** (torch.arange(0, dim, 2).float() / dim))
    both = torch.cat([angles, angles], dim=1)
    return both.cos(), both.sin()


def depth_model(
    shape: StackShape = TINY,
    dtype: torch.dtype = torch.float32,
    formats: dict[str, str] | None = None,
    *,
    codebooks: int = 4,
    vocab: int = 35,
    width: int = 40,
    bias: bool = False,
    table: bool = True,
    group: int = 32,
    seed: int = 0,
) -> PackedDepth:
    """A packed depth decoder."""
    generator = torch.Generator().manual_seed(seed)
    layers, linear = _layers(shape, dtype, bias, generator)
    projection = linear(shape.width, width)
    heads = torch.randn(codebooks - 1, vocab, shape.width, generator=generator) * 3 / shape.width**0.5
    embedding = torch.randn(codebooks * vocab, width, generator=generator).to(dtype)
    norm = (1 + 0.1 * torch.randn(shape.width, generator=generator)).to(dtype)
    cos, sin = rotary(codebooks, shape.dim)
    return pack_depth(
        layers, norm, cos, sin, shape, projection, heads.to(dtype), embedding, formats, table=table, group=group
    )


def backbone_model(
    shape: StackShape, dtype: torch.dtype, formats: dict[str, str] | None = None, *, positions: int = 64, seed: int = 0
) -> PackedStack:
    """A packed backbone."""
    generator = torch.Generator().manual_seed(seed)
    layers, _ = _layers(shape, dtype, False, generator)
    cos, sin = rotary(positions, shape.dim)
    return pack_stack(layers, torch.ones(shape.width), cos, sin, shape, formats, group=32)


def inputs(
    packed: PackedDepth, batch: int, *, sample: bool = False, seed: int = 1
) -> tuple[Tensor, Tensor, SamplingParams, NoiseKey]:
    """Hidden state, codebook 0, sampling parameters and noise key; every row has its own."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, packed.embedding.shape[1], generator=generator)
    token = torch.randint(packed.vocab, (batch,), generator=generator)
    params = SamplingParams(
        torch.rand(batch, generator=generator) + 0.5,
        torch.randint(2, packed.vocab, (batch,), generator=generator),
        torch.ones(batch),
        torch.full((batch,), sample),
    )
    return hidden, token, params, NoiseKey(torch.arange(batch) + 5, torch.arange(batch), torch.full((batch,), 7))


def reference(
    packed: PackedDepth, given: tuple[Tensor, Tensor, SamplingParams, NoiseKey], dtype: torch.dtype = torch.float32
) -> DepthReference:
    """The reference on the same inputs, rounding what the kernels round."""
    return DepthReference(packed, *given, cache_dtype=packed.embedding.dtype, dtype=dtype)


@contextlib.contextmanager
def few_programs(rows: int = 32) -> Iterator[None]:
    """Tiles so tall that interpreting takes seconds; compiled they would be absurd."""
    if not interpreting():
        yield
        return
    names = ("projection", "qkv", "o", "gate_up", "down", "heads")
    heights = {f"BN_{name}": rows for name in names}
    with override_tiles("depth", **heights), override_tiles("backbone", **heights):
        yield
