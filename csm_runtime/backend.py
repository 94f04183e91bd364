"""The torch.compile backend "csm": a stock CSM graph with our ops in place of the stock ones, the rest left to Inductor.

    compiled = torch.compile(model.backbone_model, backend="csm")

It finds norms, rotations, SwiGLUs, single-step attention and few-row products by what they compute, not by module names,
so a vendored copy of the stock code is rewritten too. On CUDA tensors they become Triton kernels, elsewhere the
references, written into the graph for Inductor to fuse. What has no backward is left alone where gradients are wanted.
:func:`replaced` counts.
"""

from __future__ import annotations

import inspect
import logging
import math
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from csm_kernels.attention import attention_lengths_ref, attention_step
from csm_kernels.gemv import gemv, gemv_streamed
from csm_kernels.norm import rms_norm, rms_norm_ref
from csm_kernels.rope import apply_rope, apply_rope_ref
from csm_kernels.swiglu import swiglu, swiglu_ref

logger = logging.getLogger("csm_runtime")

_MAX_GEMV_ROWS = 16
_MIN_ROTARY_DIM = 2
_counts: Counter[str] = Counter()


def csm(
    graph: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    counts: Counter[str] | None = None,
) -> Callable[..., Any]:
    """Compile a graph Dynamo captured; ``torch.compile(..., backend="csm")`` calls this.

    Args:
        graph: the captured graph; rewritten in place.
        example_inputs: its inputs, fake tensors.
        mode: ``mode=...`` of torch.compile, with Inductor's meaning.
        options: ``options={...}`` of torch.compile, handed to Inductor.
        counts: the numbers of sites by op are added to it, for a caller that wants its own.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    found = rewrite(graph)
    patches = {**list_mode_options(mode or "default"), **(options or {})}
    compiled = compile_fx(graph, example_inputs, config_patches=patches)
    # Not before: where Inductor finds out that a number must be a constant, Dynamo calls this once more.
    _counts.update(found)
    if counts is not None:
        counts.update(found)
    logger.info("backend csm replaced %s", dict(found) or "nothing")
    return compiled


def replaced() -> dict[str, int]:
    """How many sites were replaced in this process, by op: ``rms_norm``, ``rope``, ``swiglu``, ``attention``, ``gemv``."""
    return dict(_counts)


def rewrite(graph: fx.GraphModule) -> Counter[str]:
    """Replace what is recognised, in place; returns the number of sites by op.

    What the replaced nodes alone had used is left in the graph, for Inductor to drop: it knows which of it writes in
    place, as cache updates do, and :mod:`torch.fx` does not.
    """
    counts: Counter[str] = Counter()
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    training = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in map(_value, graph.graph.nodes)
    )
    rules: list[tuple[str, Callable[[fx.Node], Replacement | None]]] = [
        ("rms_norm", _match_norm),
        ("rope", _match_rope),
        ("swiglu", _match_swiglu),
    ]
    if not training:
        rules += [("attention", _match_attention), ("gemv", _match_linear)]
    for name, match in rules:
        writes = [(order[node], base) for node in graph.graph.nodes if _writes_in_place(node) for base in _bases(node)]
        for node in list(graph.graph.nodes):
            # What is itself written in place may be another tensor's memory, which a new node would not be.
            found = None if _writes_in_place(node) else match(node)
            if found is None or not all(map(_kept, (node, *found[1]))):
                continue
            function, args = found
            # Attention and products are one node and read where it stands; the others read earlier than the new node.
            read = [arg for arg in args if isinstance(arg, fx.Node) and name not in ("attention", "gemv")]
            if any(order[arg] < place < order[node] and base in _bases(arg) for place, base in writes for arg in read):
                continue
            with graph.graph.inserting_before(node):
                new = graph.graph.call_function(function, args)
            new.meta.update({key: value for key, value in node.meta.items() if key in ("example_value", "val")})
            node.replace_all_uses_with(new)
            order[new] = order[node]
            counts[name] += 1
    graph.recompile()
    return counts


Replacement = tuple[Callable[..., Any], tuple[Any, ...]]


# ------------------------------------------------------------------------------------------- what a graph calls by


def _value(node: Any) -> Any:
    """The fake tensor of a node."""
    if not isinstance(node, fx.Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


def _kept(node: Any) -> bool:
    """Whether our ops, which compute in fp32, keep what a tensor holds."""
    value = _value(node)
    return not isinstance(value, Tensor) or value.dtype not in (torch.float64, torch.complex64, torch.complex128)


def _argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by its place or its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _writes_in_place(node: fx.Node) -> bool:
    """Whether a node writes to an argument."""
    if node.op not in ("call_function", "call_method"):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.is_mutable
    name = node.target if isinstance(node.target, str) else node.target.__name__
    if (name.endswith("_") and not name.endswith("__")) or "out" in node.kwargs or node.target in _WRITERS:
        return True
    if isinstance(node.target, str) or getattr(node.target, "__module__", None) != functional.__name__:
        return False
    try:
        return bool(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace"))
    except (TypeError, ValueError):
        return bool(node.kwargs.get("inplace"))


def _bases(node: fx.Node) -> set[fx.Node]:
    """Where the memory of a node's value may come from: tensors that share memory share one of these.

    Views and writes have their tensor as the first argument or as ``out``; of other calls that is not known, and what
    they are given counts too. New nodes of ours share memory with nothing.
    """
    found: set[fx.Node] = set()
    left = [node]
    while left:
        node = left.pop()
        sources: Any = None
        if node.op in ("call_function", "call_method") and node.target not in _REPLACEMENTS:
            sources = node.kwargs.get("out", _argument(node, 0, "input"))
        nodes = [s for s in (sources if isinstance(sources, (list, tuple)) else [sources]) if isinstance(s, fx.Node)]
        left += nodes
        if not nodes:
            found.add(node)
    return found


def _is(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of these functions, or a method of this name."""
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def _two(node: Any, *targets: Any) -> tuple[Any, Any] | None:
    """Both operands of a binary call without options such as ``alpha``."""
    return (node.args[0], node.args[1]) if _is(node, *targets) and len(node.args) == 2 and not node.kwargs else None


_MUL = (operator.mul, operator.imul, torch.mul, "mul")
_ADD = (operator.add, operator.iadd, torch.add, "add")
_WRITERS = {operator.setitem, *(getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "pow"))}
_CASTS = ("to", "float", "type_as", "type")


def _uncast(node: Any, widening: bool = False) -> Any:
    """What a chain of casts between floating point dtypes started from; with ``widening`` only casts that lose nothing."""
    while _is(node, *_CASTS):
        value, source = _value(node), _value(node.args[0])
        if not isinstance(source, Tensor) or not isinstance(value, Tensor) or source.device != value.device:
            break
        if not source.is_floating_point() or not value.is_floating_point():
            break
        if widening and torch.promote_types(source.dtype, value.dtype) != value.dtype:
            break
        node = node.args[0]
    return node


def _either(pair: tuple[Any, Any], test: Callable[[Any], Any]) -> tuple[Any, Any] | None:
    """``(test(one), other)`` for the operand that passes, in either order."""
    for one, other in (pair, pair[::-1]):
        found = test(one)
        if found is not None:
            return found, other
    return None


# --------------------------------------------------------------------------------------------------------- the rules


def _match_norm(node: fx.Node) -> Replacement | None:
    """``weight * cast(x * rsqrt(mean(x ** 2) + eps))``."""
    pair = _two(node, *_MUL)
    if pair is None:
        return None
    found = _either(pair, lambda operand: _normalised(_uncast(operand)))
    if found is None:
        return None
    (x, eps), weight = found
    value, weights = _value(x), _value(weight)
    if not isinstance(weights, Tensor) or not isinstance(value, Tensor):
        return None
    result = _value(node)
    if weights.ndim != 1 or weights.shape[0] != value.shape[-1] or result is None:
        return None
    return _rms_norm, (x, weight, eps, result.dtype)


def _normalised(node: Any) -> tuple[Any, Any] | None:
    """``x`` and ``eps`` of ``x * rsqrt(mean(x ** 2, -1, keepdim=True) + eps)``."""
    pair = _two(node, *_MUL)
    found = pair and _either(
        pair, lambda operand: _mean_square(operand) if _is(operand, torch.rsqrt, "rsqrt") else None
    )
    if not found:
        return None
    (squared, eps), x = found
    x = _uncast(x, widening=True)
    return (x, eps) if x is _uncast(squared, widening=True) else None


def _mean_square(rsqrt: fx.Node) -> tuple[Any, Any] | None:
    pair = _two(_argument(rsqrt, 0, "input"), *_ADD)
    # With dynamic=True Dynamo makes even a module's epsilon an input.
    if pair is None or not isinstance(_value(pair[1]), (float, torch.SymFloat)):
        return None
    mean, eps = pair
    if not _is(mean, torch.mean, "mean") or not set(mean.kwargs) <= {"input", "dim", "keepdim"}:
        return None
    if _argument(mean, 1, "dim") not in (-1, [-1], (-1,)) or _argument(mean, 2, "keepdim") is not True:
        return None
    square = _argument(mean, 0, "input")
    if _is(square, torch.pow, "pow", operator.pow) and _argument(square, 1, "exponent") == 2:
        return _argument(square, 0, "input"), eps
    if _is(square, torch.square, "square"):
        return _argument(square, 0, "input"), eps
    product = _two(square, *_MUL)
    return (product[0], eps) if product and product[0] is product[1] else None


def _match_rope(node: fx.Node) -> Replacement | None:
    """``x * cos + rotate_half(x) * sin`` with ``cos`` and ``sin`` per token, ``[B, 1, T, D]``."""
    sides = _two(node, *_ADD)
    if sides is None:
        return None
    for left, right in (sides, sides[::-1]):
        plain, rotated = _two(left, *_MUL), _two(right, *_MUL)
        if plain is None or rotated is None:
            continue
        for half, sin in (rotated, rotated[::-1]):
            x = _rotated_half(half)
            if x is None or x not in plain:
                continue
            cos = plain[1] if plain[0] is x else plain[0]
            value, table, other = _value(x), _value(cos), _value(sin)
            if not all(isinstance(t, Tensor) and t.ndim == 4 for t in (value, table, other)):
                continue
            # One angle per token, for all heads: [B or 1, 1, T, D].
            if table.shape != other.shape or table.shape[1] != 1 or table.shape[2:] != value.shape[2:]:
                continue
            return _apply_rope, (x, cos, sin, _value(node).dtype)
    return None


def _rotated_half(node: Any) -> Any:
    """``x`` of ``cat((-x[..., D/2:], x[..., :D/2]), -1)``."""
    if not _is(node, torch.cat) or _argument(node, 1, "dim") != -1 or "out" in node.kwargs:
        return None
    parts = _argument(node, 0, "tensors")
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not _is(parts[0], operator.neg, torch.neg, "neg"):
        return None
    second, first = _argument(parts[0], 0, "input"), parts[1]
    if not (_is(first, operator.getitem) and _is(second, operator.getitem) and first.args[0] is second.args[0]):
        return None
    x = first.args[0]
    value = _value(x)
    if not isinstance(value, Tensor) or value.shape[-1] < _MIN_ROTARY_DIM or value.shape[-1] % 2:
        return None
    half = value.shape[-1] // 2
    wanted = (Ellipsis, slice(None, half, None)), (Ellipsis, slice(half, None, None))
    return x if (first.args[1], second.args[1]) == wanted else None


def _match_swiglu(node: fx.Node) -> Replacement | None:
    """``silu(gate) * up``."""
    pair = _two(node, *_MUL)
    found = pair and _either(pair, lambda operand: operand if _is(operand, functional.silu) else None)
    if not found:
        return None
    silu, up = found
    gate = _argument(silu, 0, "input")
    if (
        _writes_in_place(silu)
        or not all(isinstance(_value(t), Tensor) for t in (gate, up))
        or _value(gate).shape != _value(up).shape
    ):
        return None
    return _swiglu, (gate, up, _value(node).dtype)


def _match_attention(node: fx.Node) -> Replacement | None:
    """``scaled_dot_product_attention`` of one query position over everything it is given."""
    if not _is(node, functional.scaled_dot_product_attention):
        return None
    q, k, v, mask, dropout, causal = (
        _argument(node, place, name)
        for place, name in enumerate(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"))
    )
    shown = [_value(t) for t in (q, k, v)]
    if not all(isinstance(t, Tensor) and t.ndim == 4 for t in shown) or shown[0].shape[-2] != 1:
        return None
    if dropout or causal or (mask is not None and not _one_mask(_value(mask))):
        return None
    scale, usual = node.kwargs.get("scale"), shown[0].shape[-1] ** -0.5
    if scale is not None and (not isinstance(scale, float) or abs(scale - usual) > 1e-6 * usual):
        return None
    # Heads broadcast in other ways than by groups are left alone, and so are values of another width than the keys'.
    (batch, heads, _, dim), keys, values = (t.shape for t in shown)
    if keys != values or keys[0] != batch or keys[3] != dim:
        return None
    if heads % keys[1] if node.kwargs.get("enable_gqa") else keys[1] != heads:
        return None
    few_k, few_v = _ungrouped(k), _ungrouped(v)
    if _value(few_k).shape == _value(few_v).shape:
        k, v = few_k, few_v
    return _attention, (q, k, v, mask, _value(node).dtype)


def _one_mask(mask: Any) -> bool:
    """Whether a mask says the same for every head, ``[B or 1, 1, 1, C]``."""
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == 1


def _ungrouped(node: Any) -> Any:
    """Keys or values before ``repeat_kv`` copied them for every query head of their group."""
    if not _is(node, "reshape") or not _is(node.args[0], "expand"):
        return node
    source = node.args[0].args[0]
    wanted = (slice(None), slice(None), None, slice(None), slice(None))
    if _is(source, operator.getitem) and source.args[1] == wanted and _value(source).ndim == 5:
        return source.args[0]
    return node


def _match_linear(node: fx.Node) -> Replacement | None:
    """``linear`` of so few rows that its weights' bytes are all that counts: heads and decode steps."""
    if not _is(node, functional.linear):
        return None
    x, weight, bias = (_argument(node, place, name) for place, name in enumerate(("input", "weight", "bias")))
    value, matrix = _value(x), _value(weight)
    if not isinstance(value, Tensor) or not isinstance(matrix, Tensor) or matrix.ndim != 2:
        return None
    # The stock depth decoder's heads are transposed views. On a CPU the library reads them faster than a compiled sum:
    # 9 GB/s against 6 at 1024 x 2051 (2 cores, 2026-11-22).
    if matrix.stride(-1) != 1 and not (matrix.is_cuda and matrix.stride(0) == 1):
        return None
    # Not Size.numel(): it would turn a symbolic length into the number it has just now.
    rows = math.prod(value.shape[:-1])
    if not isinstance(rows, int) or not 1 <= rows <= _MAX_GEMV_ROWS or not value.dtype.is_floating_point:
        return None
    if 0 in matrix.shape:
        return None
    return _linear, (x, weight, bias, _value(node).dtype)


# --------------------------------------------------------------------------------------- what is put in their place


def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if x.is_cuda:
        return rms_norm(x, weight, eps).to(dtype)
    return rms_norm_ref(x, weight, eps).to(dtype)


def _apply_rope(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    batch, heads, tokens, dim = x.shape
    x = x.to(dtype)
    if not x.is_cuda:
        return apply_rope_ref(x.transpose(1, 2), cos[:, 0].float(), sin[:, 0].float()).transpose(1, 2).to(x.dtype)
    cos, sin = (t.expand(batch, 1, tokens, dim).reshape(batch * tokens, dim).float() for t in (cos, sin))
    positions = torch.arange(batch * tokens, device=x.device).view(batch, tokens)
    return apply_rope(x.transpose(1, 2), cos, sin, positions).transpose(1, 2)


def _swiglu(gate: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    if gate.is_cuda:
        return swiglu(gate.to(dtype), up)
    return swiglu_ref(gate, up).to(dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    batch, heads, _, dim = q.shape
    lengths = torch.full((batch,), k.shape[2], dtype=torch.int64, device=q.device)
    plain = None if mask is None else mask[:, 0, 0].expand(batch, -1)
    step = attention_step if q.is_cuda else attention_lengths_ref
    out = step(q[:, :, 0], k, v, lengths, mask=plain)
    return out.view(batch, heads, 1, dim).to(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda:
        out = gemv(rows, weight, bias)
    else:
        out = gemv_streamed(rows.float(), weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0]).to(dtype)


_REPLACEMENTS = (_rms_norm, _apply_rope, _swiglu, _attention, _linear)
