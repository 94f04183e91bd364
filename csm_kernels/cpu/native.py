"""Native kernels on tensors: products, sampling, and the frame of a whole model.

All of them read the tensors they are given where they lie, quantised weights as :mod:`csm_kernels.quant` stores them;
nothing is packed a second time. Activations are fp32, and int8 within products with int8 and int4 weights: quantised per
64 columns or per group of the weights, some 40 dB. Sums are fp32. Bits depend on the instruction set, not on the number
of threads or rows.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm_kernels.cpu.library import CLayer, CMatrix, CModel, CSampling, CStack, CState, chosen, library
from csm_kernels.quant import GROUPS, QuantWeight, format_of
from csm_kernels.sampling import NoiseKey, SamplingParams

MOST_ROWS = 16
"""Rows of x in a product, and of a batch."""
_MOST_HEAD_DIM = 1024
_FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4, "fp8": 5}
_FP32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Of what the library writes, whatever the caller's default dtype and device are."""
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def matrix_of(weight: Tensor | QuantWeight, bias: Tensor | None = None, name: str = "weight") -> CMatrix:
    """The library's view of a matrix ``[N, K]``; the caller keeps its tensors alive.

    Args:
        weight: fp32, bf16, fp16, or quantised; on the CPU, rows contiguous.
        bias: ``[N]`` fp32, bf16 or fp16, or None.
        name: what errors call it.

    Raises:
        ValueError: another format, device, shape or layout.
    """
    data = weight.data if isinstance(weight, QuantWeight) else weight
    fmt = format_of(weight)
    if fmt not in _FORMATS:
        raise ValueError(f"{name} must be {', '.join(_FORMATS)}, got {fmt}")
    if data.device.type != "cpu" or data.ndim != 2 or 0 in data.shape:
        raise ValueError(f"{name} must be [N, K] on the CPU, got {tuple(data.shape)} on {data.device}")
    if data.stride(1) != 1 and data.shape[1] > 1:
        raise ValueError(f"{name} must have contiguous rows, got strides {data.stride()}")
    out = CMatrix(
        data=data.data_ptr(),
        row_bytes=data.stride(0) * data.element_size(),
        rows=data.shape[0],
        cols=data.shape[1],
        format=_FORMATS[fmt],
    )
    if isinstance(weight, QuantWeight):
        wanted = torch.bfloat16 if fmt == "int4" else torch.float32
        if weight.scale.dtype != wanted or not weight.scale.is_contiguous() or weight.scale.device != data.device:
            raise ValueError(f"{name} must have contiguous {wanted} scales beside it, got {weight.scale.dtype}")
        out.scale, out.cols, out.symmetric = weight.scale.data_ptr(), weight.width, int(weight.symmetric)
        if fmt == "int4":
            out.group = weight.group
            if out.group not in GROUPS:
                raise ValueError(f"{name} must have groups of {', '.join(map(str, GROUPS))} columns, got {out.group}")
            if data.stride(0) != data.shape[1]:
                raise ValueError(f"{name} must be contiguous in int4, got strides {data.stride()}")
    if bias is not None:
        if bias.dtype not in _FLOATS or bias.shape != data.shape[:1] or not bias.is_contiguous():
            raise ValueError(f"bias of {name} must be contiguous [{data.shape[0]}] float, got {tuple(bias.shape)}")
        out.bias, out.bias_format = bias.data_ptr(), _FLOATS[bias.dtype]
    return out


def gemv_cpu(
    x: Tensor, weight: Tensor | QuantWeight, bias: Tensor | None = None, threads: int = 0, isa: str | None = None
) -> Tensor:
    """``x @ weight.T + bias`` for few rows.

    Args:
        x: ``[M, K]`` fp32, M from 1 to 16.
        weight: ``[N, K]``, see :func:`matrix_of`.
        bias: ``[N]`` or None.
        threads: how many; 0 for as many as PyTorch uses.
        isa: one of :func:`instruction_sets`; None for the best.

    Returns:
        ``[M, N]`` fp32.

    Raises:
        ValueError: an argument is not of that kind.
        RuntimeError: there is no library.

    Example:
        >>> gemv_cpu(torch.randn(1, 1024), quantize(torch.randn(2051, 1024), "int4")).shape
        torch.Size([1, 2051])
    """
    matrix = matrix_of(weight, bias)
    if x.ndim != 2 or x.dtype != torch.float32 or x.device.type != "cpu" or x.shape[1] != matrix.cols:
        raise ValueError(f"x must be [M, {matrix.cols}] fp32 on the CPU, got {tuple(x.shape)} {x.dtype} on {x.device}")
    if not 1 <= x.shape[0] <= MOST_ROWS:
        raise ValueError(f"x must have 1 to {MOST_ROWS} rows, got {x.shape[0]}")
    x = x.contiguous()
    out = torch.empty(x.shape[0], matrix.rows, **_FP32)
    library().csm_gemv(byref(matrix), x.data_ptr(), out.data_ptr(), x.shape[0], _threads(threads), chosen(isa))
    return out


def sample_cpu(logits: Tensor, params: SamplingParams, key: NoiseKey, codebook: int) -> tuple[Tensor, Tensor]:
    """One token per row, as :func:`csm_kernels.sampling.sample_ref` with the noise of ``key`` draws it.

    Args:
        logits: ``[B, V]`` fp32 on the CPU.
        params: one entry per row.
        key: noise of each row.
        codebook: which is drawn.

    Returns:
        Tokens ``[B]`` int64, and ``[B]`` int32, 1 where a row holds NaN, plus infinity or nothing but minus infinity.

    Raises:
        ValueError: logits of another shape, dtype or device, or parameters of another dtype or length.
        RuntimeError: there is no library.
    """
    if logits.ndim != 2 or logits.dtype != torch.float32 or logits.device.type != "cpu" or 0 in logits.shape:
        raise ValueError(f"logits must be [B, V] fp32 on the CPU, got {tuple(logits.shape)} {logits.dtype}")
    logits, rows = logits.contiguous(), logits.shape[0]
    sampling = _sampling(params, rows)
    _check_vectors(key._asdict(), rows, torch.int64)
    tokens, flags = (torch.zeros(rows, dtype=dtype, device="cpu") for dtype in (torch.int64, torch.int32))
    library().csm_sample(
        *(logits.data_ptr(), rows, logits.shape[1], byref(sampling)),
        *(key.seed.data_ptr(), key.utterance.data_ptr(), key.frame.data_ptr()),
        *(codebook, tokens.data_ptr(), flags.data_ptr()),
    )
    return tokens, flags


def streaming_bandwidth(size: int = 1 << 30, threads: int = 0, rounds: int = 5) -> float:
    """GB/s at which the threads read memory in huge pages and add it up: the limit of every product here.

    Args:
        size: bytes to read, more than the caches hold.
        threads: how many; 0 for as many as PyTorch uses.
        rounds: the best of so many.

    Raises:
        MemoryError: there are no ``size`` bytes.
        RuntimeError: there is no library.
    """
    speed = library().csm_stream(size, _threads(threads), rounds)
    if speed == 0.0:
        raise MemoryError(f"size must leave room in memory, got {size} bytes")
    return speed


class CpuStack(NamedTuple):
    """One stack: layers of ``(input_norm, q, k, v, o, post_norm, gate, up, down)`` whose matrices have ``weight`` and
    ``bias``, norm ``[D]``, rotary tables ``[positions, head_dim]`` fp32, caches ``[B, KV, C, head_dim]`` of each layer,
    heads, epsilon."""

    layers: list[Any]
    norm: Tensor
    cos: Tensor
    sin: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    heads: int
    eps: float


class CpuFrame:
    """A frame of one model for one batch, on fixed tensors: two calls into the library, nothing allocated.

    Args:
        backbone: its layers and caches.
        depth: the depth decoder's.
        head: codebook 0's head, with ``weight`` ``[vocab, D]`` and ``bias``.
        projection: backbone width to depth width, likewise.
        heads: of codebooks 1 and on, ``[depth_vocab, depth D]`` each.
        embedding: ``[codebooks * vocab, D]``.
        depth_embedding: ``[codebooks * depth_vocab, D]``.
        state: has the tensors of :class:`csm_runtime.kv.State`.
        params: sampling parameters of codebook 0 and of the others.
        key: noise of each row.
        threads: how many; 0 for as many as PyTorch uses.
        isa: one of :func:`instruction_sets`; None for the best.

    Raises:
        ValueError: something the kernels do not read.
        RuntimeError: there is no library, or no memory or threads.

    Attributes:
        first_logits: ``[B, vocab]`` fp32 of the latest frame.
        logits: ``[codebooks - 1, B, depth_vocab]`` likewise.
    """

    def __init__(
        self,
        backbone: CpuStack,
        depth: CpuStack,
        head: Any,
        projection: Any,
        heads: list[Tensor | QuantWeight],
        embedding: Tensor | QuantWeight,
        depth_embedding: Tensor | QuantWeight,
        state: Any,
        params: tuple[SamplingParams, SamplingParams],
        key: NoiseKey,
        threads: int = 0,
        isa: str | None = None,
    ) -> None:
        self._session: int | None = None
        self._library = library()
        rows, codebooks = state.codes.shape
        if not 1 <= rows <= MOST_ROWS or codebooks != len(heads) + 1 or codebooks < 2:
            wanted = f"1 to {MOST_ROWS} rows and {len(heads) + 1} codebooks, at least 2"
            raise ValueError(f"state must be of {wanted}, got {rows} and {codebooks}")
        # Kept: what the library points to.
        self._kept = (backbone, depth, head, projection, heads, embedding, depth_embedding, state, params, key)
        c_heads = (CMatrix * len(heads))(
            *(matrix_of(weight, name=f"depth.head.{k}") for k, weight in enumerate(heads, 1))
        )
        vocab, depth_vocab = head.weight.data.shape[0], c_heads[0].rows
        model = CModel(
            backbone=_stack(backbone, rows, "backbone"),
            depth=_stack(depth, rows, "depth"),
            head=matrix_of(head.weight, head.bias, "backbone.head"),
            projection=matrix_of(projection.weight, projection.bias, "depth.projection"),
            embedding=matrix_of(embedding, name="backbone.embedding"),
            depth_embedding=matrix_of(depth_embedding, name="depth.embedding"),
            heads=c_heads,
            codebooks=codebooks,
            vocab=vocab,
            depth_vocab=depth_vocab,
        )
        width, depth_width = model.backbone.hidden, model.depth.hidden
        for name, matrix, shape in (
            ("backbone.head", model.head, (vocab, width)),
            ("depth.projection", model.projection, (depth_width, width)),
            ("backbone.embedding", model.embedding, (codebooks * vocab, width)),
            *((f"depth.head.{k}", matrix, (depth_vocab, depth_width)) for k, matrix in enumerate(c_heads, 1)),
        ):
            if (matrix.rows, matrix.cols) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {[matrix.rows, matrix.cols]}")
        table = model.depth_embedding
        if table.cols != width or table.rows < (codebooks - 1) * depth_vocab:
            least = [(codebooks - 1) * depth_vocab, width]
            raise ValueError(f"depth.embedding must be at least {least}, got {[table.rows, table.cols]}")
        if model.depth.positions < codebooks or model.depth.capacity < codebooks:
            raise ValueError(f"depth must have positions and a cache for {codebooks} codebooks")
        self.first_logits = torch.zeros(rows, vocab, **_FP32)
        self.logits = torch.zeros(codebooks - 1, rows, depth_vocab, **_FP32)
        c_state = CState(
            **{name: getattr(state, name).data_ptr() for name in _checked_state(state, rows, codebooks, model)},
            first_logits=self.first_logits.data_ptr(),
            logits=self.logits.data_ptr(),
            first=_sampling(params[0], rows),
            others=_sampling(params[1], rows),
            rows=rows,
        )
        _check_vectors(key._asdict(), rows, torch.int64)
        c_state.seed, c_state.utterance, c_state.frame = (t.data_ptr() for t in key)
        self._session = self._library.csm_new(byref(model), byref(c_state), _threads(threads), chosen(isa))
        if not self._session:
            raise RuntimeError("the native CPU kernels could not be set up: no memory or no threads")

    def emit(self) -> None:
        """All codebooks of one frame, from ``state.hidden`` into ``state.codes``; whether speech has ended; faults."""
        self._library.csm_emit(self._session)

    def decode_depth(self) -> None:
        """The depth decode alone, from ``state.hidden`` and ``state.codes[:, 0]``."""
        self._library.csm_depth(self._session)

    def advance(self) -> None:
        """Feed ``state.codes`` to the backbone: the next ``state.hidden``, one position further.

        A row without room in its cache sets the fault *out of range* and nothing moves.
        """
        self._library.csm_advance(self._session)

    def __del__(self) -> None:
        if getattr(self, "_session", None):
            self._library.csm_free(self._session)


def _threads(threads: int) -> int:
    if threads < 0:
        raise ValueError(f"threads must be at least 0, got {threads}")
    return threads or torch.get_num_threads()


def _check_vectors(tensors: dict[str, Tensor], rows: int, dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if (
            tensor.shape != (rows,)
            or tensor.dtype != dtype
            or not tensor.is_contiguous()
            or tensor.device.type != "cpu"
        ):
            raise ValueError(
                f"{name} must be contiguous [{rows}] {dtype} on the CPU, got {tuple(tensor.shape)} {tensor.dtype}"
            )


def _sampling(params: SamplingParams, rows: int) -> CSampling:
    dtypes = {
        "temperature": torch.float32,
        "top_k": torch.int64,
        "top_p": torch.float32,
        "do_sample": torch.bool,
    }
    for name, dtype in dtypes.items():
        _check_vectors({name: getattr(params, name)}, rows, dtype)
    return CSampling(**{name: getattr(params, name).data_ptr() for name in dtypes})


def _checked_state(state: Any, rows: int, codebooks: int, model: CModel) -> list[str]:
    """Names of the state's tensors that the library takes, once they are what it takes them for."""
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "hidden": ((rows, model.backbone.hidden), torch.float32),
        "codes": ((rows, codebooks), torch.int64),
        "allowed": ((rows, model.backbone.capacity), torch.bool),
        **{name: ((rows,), torch.int64) for name in ("length", "position")},
        "ended": ((rows,), torch.bool),
        **{name: ((1,), torch.int64) for name in ("end_code", "judged", "pad_code")},
        "pads": ((1,), torch.bool),
        "faults": ((1,), torch.int32),
    }
    for name, (shape, dtype) in wanted.items():
        tensor = getattr(state, name)
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"state.{name} must be contiguous {shape} {dtype} on the CPU, got {got}")
    return list(wanted)


def _stack(stack: CpuStack, rows: int, name: str) -> CStack:
    dim = stack.cos.shape[-1]
    if not stack.layers or dim % 2 or dim > _MOST_HEAD_DIM:
        raise ValueError(f"{name} must have layers and heads of an even width up to {_MOST_HEAD_DIM}, got {dim}")
    norms = [stack.norm, *(norm for layer in stack.layers for norm in (layer.input_norm, layer.post_norm))]
    hidden = stack.norm.shape[0]
    for norm in norms:
        if norm.dtype not in _FLOATS or norm.dtype != norms[0].dtype or norm.shape != (hidden,):
            raise ValueError(
                f"{name} must have norms of one float dtype, [{hidden}], got {tuple(norm.shape)} {norm.dtype}"
            )
        if not norm.is_contiguous() or norm.device.type != "cpu":
            raise ValueError(f"{name} must have contiguous norms on the CPU, got {norm.device}")
    caches = [*stack.keys, *stack.values]
    shape = caches[0].shape
    if len(caches) != 2 * len(stack.layers) or len(shape) != 4 or shape[0] != rows or shape[3] != dim:
        wanted = f"two caches [{rows}, KV, C, {dim}] per layer"
        raise ValueError(f"{name} must have {wanted}, got {len(caches)} of {tuple(shape)}")
    for cache in caches:
        if cache.shape != shape or cache.dtype not in _FLOATS or cache.dtype != caches[0].dtype:
            raise ValueError(
                f"{name} must have caches of one shape and float dtype, got {tuple(cache.shape)} {cache.dtype}"
            )
        if not cache.is_contiguous() or cache.device.type != "cpu":
            raise ValueError(f"{name} must have contiguous caches on the CPU, got {cache.device}")
    for table in (stack.cos, stack.sin):
        if (
            table.dtype != torch.float32
            or not table.is_contiguous()
            or table.device.type != "cpu"
            or table.shape != stack.cos.shape
        ):
            raise ValueError(f"{name} must have contiguous fp32 rotary tables, got {tuple(table.shape)} {table.dtype}")
    kv_heads = shape[1]
    if stack.heads % kv_heads:
        raise ValueError(f"{name} must have whole groups of heads, got {stack.heads} for {kv_heads} KV heads")
    layers = (CLayer * len(stack.layers))()
    for i, (layer, keys, values) in enumerate(zip(stack.layers, stack.keys, stack.values)):
        for part in ("q", "k", "v", "o", "gate", "up", "down"):
            linear = getattr(layer, part)
            setattr(layers[i], part, matrix_of(linear.weight, linear.bias, f"{name}.{i}.{part}"))
        layers[i].input_norm, layers[i].post_norm = layer.input_norm.data_ptr(), layer.post_norm.data_ptr()
        layers[i].keys, layers[i].values = keys.data_ptr(), values.data_ptr()
        query, ffn = stack.heads * dim, layers[i].gate.rows
        sizes = {"q": (query, hidden), "k": (kv_heads * dim, hidden), "v": (kv_heads * dim, hidden)}
        sizes |= {"o": (hidden, query), "gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
        for part, size in sizes.items():
            matrix = getattr(layers[i], part)
            if (matrix.rows, matrix.cols) != size or layers[i].gate.rows != layers[0].gate.rows:
                raise ValueError(f"{name}.{i}.{part} must be {list(size)}, got {[matrix.rows, matrix.cols]}")
    out = CStack(
        layers=layers,
        norm=stack.norm.data_ptr(),
        cos=stack.cos.data_ptr(),
        sin=stack.sin.data_ptr(),
        capacity=shape[2],
        positions=stack.cos.shape[0],
        count=len(stack.layers),
        hidden=hidden,
        ffn=layers[0].gate.rows,
        heads=stack.heads,
        kv_heads=kv_heads,
        head_dim=dim,
        norm_format=_FLOATS[stack.norm.dtype],
        cache_format=_FLOATS[caches[0].dtype],
        eps=stack.eps,
    )
    return out
