"""Packed layout of the decode steps' weights, and the map of their workspace. No other file knows either.

A stack's matrices of one kind stand behind one another, ``[L, N, K]`` row-major, so that the rows of a tile are one
contiguous run of bytes whatever the tile's height:

- ``qkv``: rows of q, then k, then v.
- ``o``: cut along K into ``segments``, ``[L, segments, N, K / segments]``: with one segment per KV head, the program that
  has computed a group's attention finds that group's columns of O in one run.
- ``gate_up``: gate and up rows in turn.
- ``down``, the heads ``[codebooks - 1, V, D]`` and the projection as they are.

int8 and fp8 keep one fp32 scale per row, int4 one bf16 scale (or step and offset) per group, in the order of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from csm_kernels.quant import FORMATS, QuantWeight, dequantize, format_of, quantize, take_rows

Matrix = Tensor | QuantWeight

ZONES = ("attention", "mlp", "projection", "head")
"""Zones of a stack and of what surrounds it, each of which has a format of its own."""


class Linear(Protocol):
    """A matrix and its bias as a model holds them: ``weight`` ``[N, K]``, quantised or not, ``bias`` ``[N]`` or None."""

    @property
    def weight(self) -> Matrix: ...  # noqa: D102

    @property
    def bias(self) -> Tensor | None: ...  # noqa: D102


class LayerTensors(Protocol):
    """One Llama layer as a model holds it: norms ``[D]`` and seven :class:`Linear`."""

    input_norm: Any
    q: Any
    k: Any
    v: Any
    o: Any
    post_norm: Any
    gate: Any
    up: Any
    down: Any


class StackShape(NamedTuple):
    """Shape of one Llama stack."""

    layers: int
    width: int
    ffn: int
    heads: int
    groups: int
    """KV heads."""
    dim: int
    """Width of a head."""
    eps: float


class PackedStack(NamedTuple):
    """All layers of one stack, packed; biases fp32 or None, norms fp32, ``cos`` and ``sin`` ``[positions, dim]`` fp32."""

    shape: StackShape
    segments: int
    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix
    qkv_bias: Tensor | None
    o_bias: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    input_norm: Tensor
    post_norm: Tensor
    norm: Tensor
    cos: Tensor
    sin: Tensor


class PackedDepth(NamedTuple):
    """The depth decoder, packed.

    ``embedding`` is the model's own table ``[codebooks * V, backbone D]``, or a quantised copy of it; ``table`` holds its rows
    after the projection, ``[(codebooks - 1) * V, D]``, so that a step reads one row where it would read the whole projection.
    Without it the kernels read ``embedding``, which then is no quantised one.
    """

    stack: PackedStack
    projection: Matrix
    projection_bias: Tensor | None
    heads: Matrix
    embedding: Matrix
    table: Tensor | None

    @property
    def codebooks(self) -> int:
        """Codebooks of a frame, codebook 0 among them."""
        return self.heads.data.shape[0] + 1

    @property
    def vocab(self) -> int:
        """Tokens per codebook."""
        return self.heads.data.shape[1]

    @property
    def width(self) -> int:
        """The backbone's."""
        return shape_of(self.embedding)[-1]

    @property
    def dtype(self) -> torch.dtype:
        """What activations are rounded to where something is rounded to the model's dtype."""
        if self.table is not None:
            return self.table.dtype
        return self.embedding.data.dtype


def _packed(stacked: Matrix, fmt: str, group: int) -> Matrix:
    """In the format wanted; what comes quantised stays as it is."""
    if isinstance(stacked, QuantWeight):
        return stacked
    if fmt == "keep":
        return stacked.contiguous()
    if fmt not in FORMATS:
        raise ValueError(f"format must be keep or one of {', '.join(FORMATS)}, got {fmt!r}")
    return quantize(stacked, fmt, group=group)


def _segmented(matrix: Matrix, segments: int) -> Matrix:
    """``[L, N, K]`` to ``[L, segments * N, K / segments]``; int8 and fp8 keep one scale per row of the whole matrix."""

    def cut(tensor: Tensor) -> Tensor:
        layers, rows, width = tensor.shape
        parts = tensor.view(layers, rows, segments, width // segments).transpose(1, 2)
        return parts.reshape(layers, segments * rows, width // segments)

    if segments == 1:
        return matrix
    if not isinstance(matrix, QuantWeight):
        return cut(matrix)
    int4 = matrix.data.dtype == torch.uint8
    return QuantWeight(cut(matrix.data), cut(matrix.scale) if int4 else matrix.scale, matrix.padding)


def _each(parts: Sequence[Matrix], change: Callable[[list[Tensor]], Tensor]) -> Matrix:
    """``change`` applied to matrices of one format, their codes and their scales alike.

    Raises:
        ValueError: some are quantised and others are not, or otherwise.
    """
    if len({format_of(part) for part in parts}) > 1:
        raise ValueError(f"matrices of one kind must share a format, got {sorted({format_of(part) for part in parts})}")
    first = parts[0]
    if not isinstance(first, QuantWeight):
        return change([part.detach() for part in parts if isinstance(part, Tensor)])
    data = change([part.data for part in parts])
    return QuantWeight(data, change([part.scale for part in parts if isinstance(part, QuantWeight)]), first.padding)


def _joined(parts: Sequence[Linear]) -> tuple[Matrix, Tensor | None]:
    """Matrices on top of one another, and their biases in fp32."""
    matrix = _each([part.weight for part in parts], torch.cat)
    if all(part.bias is None for part in parts):
        return matrix, None
    sizes = [(part.bias, len(part.weight.data)) for part in parts]
    device = matrix.data.device
    return matrix, torch.cat([
        torch.zeros(size, device=device) if bias is None else bias.detach().float() for bias, size in sizes
    ])  # fmt: skip


def _in_turn(gate: Linear, up: Linear) -> tuple[Matrix, Tensor | None]:
    """Rows of gate and of up in turn."""

    def turns(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts, dim=1).flatten(0, 1)

    (_, bias), matrix = _joined((gate, up)), _each([gate.weight, up.weight], turns)
    return matrix, None if bias is None else turns(list(bias.chunk(2)))


def _stacked(parts: Sequence[tuple[Matrix, Tensor | None]]) -> tuple[Matrix, Tensor | None]:
    """Layers behind one another."""
    matrix = _each([matrix for matrix, _ in parts], torch.stack)
    biases = [bias for _, bias in parts]
    if all(bias is None for bias in biases):
        return matrix, None
    rows = torch.zeros(matrix.data.shape[1], device=matrix.data.device)
    return matrix, torch.stack([rows if bias is None else bias for bias in biases])


def shape_of(matrix: Matrix) -> tuple[int, ...]:
    """``[..., N, K]`` of a matrix, quantised or not."""
    return (*matrix.data.shape[:-1], matrix.width) if isinstance(matrix, QuantWeight) else tuple(matrix.shape)


def _check_stack(
    layers: Sequence[LayerTensors], cos: Tensor, sin: Tensor, shape: StackShape, formats: Mapping[str, str]
) -> None:
    unknown = set(formats) - set(ZONES)
    if unknown:
        raise ValueError(f"formats must name zones of {ZONES}, got {sorted(unknown)}")
    if len(layers) != shape.layers:
        raise ValueError(f"layers must be {shape.layers} for this shape, got {len(layers)}")
    wanted = {
        "q": (shape.heads * shape.dim, shape.width),
        "k": (shape.groups * shape.dim, shape.width),
        "v": (shape.groups * shape.dim, shape.width),
        "o": (shape.width, shape.heads * shape.dim),
        "gate": (shape.ffn, shape.width),
        "up": (shape.ffn, shape.width),
        "down": (shape.width, shape.ffn),
    }
    for i, layer in enumerate(layers):
        for name, size in wanted.items():
            got = shape_of(getattr(layer, name).weight)
            if got != size:
                raise ValueError(f"layers[{i}].{name}.weight must be {size}, got {got}")
    if shape.dim % 2 or shape.heads % shape.groups:
        raise ValueError(f"shape must have an even head width and KV heads that divide the heads, got {shape}")
    if cos.shape != sin.shape or cos.shape[1] != shape.dim:
        raise ValueError(f"cos and sin must be [positions, {shape.dim}], got {tuple(cos.shape)} and {tuple(sin.shape)}")


def pack_stack(
    layers: Sequence[LayerTensors],
    norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    shape: StackShape,
    formats: Mapping[str, str] | None = None,
    *,
    segmented: bool = False,
    group: int = 128,
) -> PackedStack:
    """Pack a Llama stack for the decode kernels.

    Args:
        layers: the model's live layers.
        norm: ``[D]``, the final norm.
        cos: ``[positions, head_dim]`` fp32, both halves equal.
        sin: likewise.
        shape: what the tensors must fit.
        formats: ``"attention"`` and ``"mlp"`` to ``"keep"`` (the default), ``"int8"``, ``"fp8"`` or ``"int4"``.
        segmented: cut O by KV head, as the depth decoder's fused attention reads it; the backbone does not.
        group: columns per int4 scale.

    Raises:
        ValueError: an unknown zone or format, a shape that does not fit, or values a format cannot hold.
    """
    formats = dict(formats or {})
    _check_stack(layers, cos, sin, shape, formats)
    attention, mlp = formats.get("attention", "keep"), formats.get("mlp", "keep")
    qkv, qkv_bias = _stacked([_joined((l.q, l.k, l.v)) for l in layers])
    o, o_bias = _stacked([_joined((l.o,)) for l in layers])
    gate_up, gate_up_bias = _stacked([_in_turn(l.gate, l.up) for l in layers])
    down, down_bias = _stacked([_joined((l.down,)) for l in layers])
    slice_width = shape.heads // shape.groups * shape.dim
    if isinstance(o, QuantWeight):
        attention, group = format_of(o), o.group
    segments = shape.groups if segmented and (attention != "int4" or slice_width % group == 0) else 1
    return PackedStack(
        shape,
        segments,
        _packed(qkv, attention, group),
        _segmented(_packed(o, attention, group), segments),
        _packed(gate_up, mlp, group),
        _packed(down, mlp, group),
        qkv_bias,
        o_bias,
        gate_up_bias,
        down_bias,
        torch.stack([l.input_norm.detach() for l in layers]).float(),
        torch.stack([l.post_norm.detach() for l in layers]).float(),
        norm.detach().to(torch.float32, copy=True),
        cos.float().contiguous(),
        sin.float().contiguous(),
    )


def pack_depth(
    layers: Sequence[LayerTensors],
    norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    shape: StackShape,
    projection: Linear,
    heads: Matrix,
    embedding: Matrix,
    formats: Mapping[str, str] | None = None,
    *,
    table: bool = True,
    group: int = 128,
) -> PackedDepth:
    """Pack a depth decoder for :func:`csm_kernels.depth.depth_decode`.

    Args:
        layers: as :func:`pack_stack` takes them.
        norm: as there.
        cos: ``[codebooks or more, head_dim]`` fp32.
        sin: likewise.
        shape: the depth decoder's.
        projection: from the backbone's width to the depth decoder's.
        heads: ``[codebooks - 1, V, D]``, any strides.
        embedding: ``[codebooks * V, backbone D]``, fp32, bf16 or fp16, contiguous, or quantised where there is a ``table``,
            which then has the dtype of ``norm``; it is referred to, not copied.
        formats: as there, ``"projection"`` and ``"head"`` as well.
        table: keep the embeddings after the projection: ``(codebooks - 1) * V`` rows of the depth decoder's width in the
            model's dtype, 130 MB for CSM-1B in bf16, so that a step reads 2 kB instead of the projection's 4 MB.
        group: columns per int4 scale.

    Raises:
        ValueError: as there.
    """
    codebooks, vocab = heads.data.shape[0] + 1, heads.data.shape[1]
    width = shape_of(projection.weight)[1]
    if shape_of(heads) != (codebooks - 1, vocab, shape.width) or shape_of(projection.weight) != (shape.width, width):
        raise ValueError(
            f"heads must be [codebooks - 1, V, {shape.width}] and projection [{shape.width}, backbone D], got "
            f"{shape_of(heads)} and {shape_of(projection.weight)}"
        )
    if shape_of(embedding) != (codebooks * vocab, width) or not embedding.data.is_contiguous():
        raise ValueError(
            f"embedding must be contiguous [{codebooks * vocab}, {width}], got {shape_of(embedding)} with strides "
            f"{tuple(embedding.data.stride())}"
        )
    quantised = isinstance(embedding, QuantWeight)
    if quantised and not table:
        raise ValueError(f"embedding must be fp32, bf16 or fp16 without a table, got {format_of(embedding)}")
    if cos.shape[0] < codebooks:
        raise ValueError(f"cos and sin must have {codebooks} positions at least, got {cos.shape[0]}")
    chosen = dict(formats or {})
    stack = pack_stack(layers, norm, cos, sin, shape, chosen, segmented=True, group=group)
    single, bias = _joined((projection,))
    matrix = _packed(_each([single], torch.stack), chosen.get("projection", "keep"), group)
    return PackedDepth(
        stack,
        matrix,
        bias,
        _packed(heads if isinstance(heads, QuantWeight) else heads.detach(), chosen.get("head", "keep"), group),
        embedding if isinstance(embedding, QuantWeight) else embedding.detach(),
        projected_table(matrix, bias, embedding, codebooks, vocab, norm.dtype) if table else None,
    )


def projected_table(
    projection: Matrix, bias: Tensor | None, embedding: Matrix, codebooks: int, vocab: int, dtype: torch.dtype
) -> Tensor:
    """The embeddings of all codebooks but the last after the projection: in their own dtype, quantised ones in ``dtype``."""
    weight, height = dequantize(projection)[0].detach(), (codebooks - 1) * vocab
    if isinstance(embedding, Tensor):
        dtype = embedding.dtype
    out = torch.empty(height, len(weight), dtype=dtype, device=weight.device)
    for first in range(0, height, 4096):
        some = slice(first, min(first + 4096, height))
        rows = dequantize(take_rows(embedding, some)).detach()
        out[some] = torch.nn.functional.linear(rows, weight, bias)
    return out


def unpacked_o(stack: PackedStack, layer: int) -> Tensor:
    """The fp32 matrix O of one layer stands for, ``[D, heads * dim]``, its segments put together again."""
    matrix = stack.o
    if isinstance(matrix, QuantWeight):
        scale = matrix.scale[layer]
        if stack.segments > 1 and format_of(matrix) != "int4":
            scale = scale.repeat(stack.segments)
        parts = dequantize(QuantWeight(matrix.data[layer], scale, matrix.padding))
    else:
        parts = matrix[layer].float()
    parts = parts.view(stack.segments, stack.shape.width, -1)
    return parts.transpose(0, 1).reshape(stack.shape.width, -1)


def one(matrix: Matrix, index: int) -> Tensor:
    """One matrix of a stack as a plain tensor, dequantised to fp32 where it is quantised."""
    if isinstance(matrix, QuantWeight):
        return dequantize(QuantWeight(matrix.data[index], matrix.scale[index], matrix.padding))
    return matrix[index]


def tensors(packed: Any) -> list[Tensor]:
    """Every tensor of a packed stack or depth decoder, in a fixed order."""
    if isinstance(packed, Tensor):
        return [packed]
    return [leaf for part in packed for leaf in tensors(part)] if isinstance(packed, tuple) else []


def packed_bytes(packed: PackedStack | PackedDepth) -> int:
    """Bytes the packed copy holds, the table included; the embedding is the model's own."""
    own = sum(t.nbytes for t in tensors(packed))
    return own - _matrix_bytes(packed.embedding) if isinstance(packed, PackedDepth) else own


def evictions(packed: PackedDepth, cache_bytes: int) -> dict[str, str]:
    """What the second-level cache should do with each kind of weight: smallest first, layers stay as long as they fit.

    A layer's weights are read again 30 times a frame. What fits into seven tenths of the cache is asked to stay; what does
    not, and each head, which is read once a frame, is told to leave first, so that it does not push the others out.
    """
    left, out = int(0.7 * cache_bytes), {"heads": "evict_first", "projection": "evict_first"}
    kinds = {name: _matrix_bytes(getattr(packed.stack, name)) for name in ("qkv", "o", "gate_up", "down")}
    for name, size in sorted(kinds.items(), key=lambda item: item[1]):
        out[name] = "evict_last" if size <= left else "evict_first"
        left -= size if size <= left else 0
    return out


def _matrix_bytes(matrix: Matrix) -> int:
    return matrix.bytes if isinstance(matrix, QuantWeight) else matrix.nbytes


# ----------------------------------------------------------------------------------------------------------- workspace


class Buffers(NamedTuple):
    """What the phases of a step hand on to one another, views of one allocation.

    R rows: batch times the positions of a pass, two in the depth decoder's first. ``stream`` ``[R, D]`` is the residual
    stream, ``qkv`` ``[R, NQ]``, ``attended`` ``[R, H, splits, dim]`` with ``peak`` and ``mass`` ``[R, H, splits]``,
    ``parts`` ``[R, segments, D]`` the pieces of O's product, all fp32; ``act`` ``[R, F]`` fp32 or bf16. ``logits``
    ``[B, V]`` fp32, ``token`` ``[B]`` int64, ``flags`` ``[B]`` int32: 1 after a row's logits were broken. ``sync`` ``[2]``
    int32: arrivals at the grid barriers, and 1 after one of them timed out.
    """

    stream: Tensor
    qkv: Tensor
    attended: Tensor
    peak: Tensor
    mass: Tensor
    parts: Tensor
    act: Tensor
    logits: Tensor
    token: Tensor
    flags: Tensor
    sync: Tensor


class Workspace(NamedTuple):
    """The buffers and the allocation they are views of; for a depth decoder its KV cache ``[L, B, KV, codebooks, dim]``."""

    whole: Tensor
    buffers: Buffers
    keys: Tensor | None
    values: Tensor | None


def act_dtype(stack: PackedStack) -> torch.dtype:
    """What the SwiGLU's output is kept in: bf16, except between weights that hold more."""
    return torch.float32 if format_of(stack.gate_up) in ("float32", "float16") else torch.bfloat16


def make_workspace(
    stack: PackedStack,
    batch: int,
    splits: int,
    device: torch.device,
    *,
    depth: PackedDepth | None = None,
    cache_dtype: torch.dtype = torch.bfloat16,
) -> Workspace:
    """Allocate what one step needs, once. ``depth`` given: for a depth decoder, two positions in its first pass."""
    shape = stack.shape
    rows, vocab = batch * (1 if depth is None else 2), 1 if depth is None else depth.vocab
    act = act_dtype(stack)
    heads, f32, i32 = (rows, shape.heads, splits), torch.float32, torch.int32
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "stream": ((rows, shape.width), f32),
        "qkv": ((rows, (shape.heads + 2 * shape.groups) * shape.dim), f32),
        "attended": ((*heads, shape.dim), f32),
        "peak": (heads, f32),
        "mass": (heads, f32),
        "parts": ((rows, stack.segments, shape.width), f32),
        "act": ((rows, shape.ffn), act),
        "logits": ((batch, vocab), f32),
        "token": ((batch,), torch.int64),
        "flags": ((batch,), i32),
        "sync": ((2,), i32),
    }
    caches: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if depth is not None:
        cache = ((shape.layers, batch, shape.groups, depth.codebooks, shape.dim), cache_dtype)
        caches = {"keys": cache, "values": cache}
    offsets, end = {}, 0
    for name, (size, dtype) in {**sizes, **caches}.items():
        offsets[name] = end
        end += -(-torch.Size(size).numel() * dtype.itemsize // 256) * 256
    whole = torch.zeros(end, dtype=torch.uint8, device=device)

    def view(name: str, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(size).numel() * dtype.itemsize
        return whole[offsets[name] : offsets[name] + count].view(dtype).view(size)

    views = {name: view(name, *what) for name, what in {**sizes, **caches}.items()}
    return Workspace(whole, Buffers(*(views[name] for name in sizes)), views.get("keys"), views.get("values"))


def poison(workspace: Workspace) -> None:
    """Fill with NaN whatever a step must write before it reads; for tests."""
    kept = {name: getattr(workspace.buffers, name).clone() for name in ("token", "flags", "sync")}
    workspace.whole.fill_(0xFF)
    for name, value in kept.items():
        getattr(workspace.buffers, name).copy_(value)
