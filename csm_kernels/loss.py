"""Cross-entropy of many codebook heads, each with its own matrix, without the logits of all of them in memory.

Per group of codebooks: product to fp32 logits, one Triton kernel over their rows, and in the backward the same once more
(the logits are computed again), a kernel that turns them into gradients, and the two products with those. The library's
products are at their bound; what the stock head loses is elsewhere: it copies its matrices, keeps the logits four times,
and its backward fills and adds a tensor as large as all matrices for every codebook.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm_kernels import _ops
from csm_kernels._target import runs_triton, tl, triton
from csm_kernels._tiles import tiles

_WORKSPACE = 64 << 20
"""Bytes of logits at a time on a GPU."""

_WORKSPACE_CPU = 2 << 20
"""On a CPU: what a core's own cache holds."""


class CodebookLoss(NamedTuple):
    """What :func:`fused_codebook_linear_cross_entropy` returns."""

    loss: Tensor
    """Scalar fp32, differentiable: the weighted sum of the negative log-likelihoods, in nats, and of ``z_loss``."""
    nll_per_codebook: Tensor
    """``[C]`` fp32, detached: the weighted sum of negative log-likelihoods of each codebook."""
    num_targets: Tensor
    """Scalar int64: how many targets were not ignored, whatever their weights."""


# ---------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _forward_kernel(
    logits_ptr,
    targets_ptr,
    row_weight_ptr,
    nll_ptr,
    lse_ptr,
    rows,
    codebooks,
    width,
    vocab,
    ignore_index,
    targets_row_stride,
    targets_codebook_stride,
    row_weight_stride,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row of logits ``[g, rows, width]``: its log-sum-exp and negative log-likelihood, to ``[rows, codebooks]``."""
    row = tl.program_id(0).to(tl.int64)
    codebook = tl.program_id(1).to(tl.int64)
    start = logits_ptr + (codebook * rows + row) * width
    columns = tl.arange(0, BLOCK_V)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, vocab, BLOCK_V):
        x = tl.load(start + first + columns, mask=first + columns < vocab, other=float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        # All logits so far may be minus infinity, whose difference to itself is no number.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = higher
    lse = top + tl.log(total)
    target = tl.load(targets_ptr + row * targets_row_stride + codebook * targets_codebook_stride).to(tl.int64)
    known = (target >= 0) & (target < vocab)
    chosen = tl.load(start + tl.where(known, target, 0), mask=known, other=float("nan"))
    counts = target != ignore_index
    if HAS_WEIGHT:
        counts = counts & (tl.load(row_weight_ptr + row * row_weight_stride) != 0.0)
    tl.store(nll_ptr + row * codebooks + codebook, tl.where(counts, lse - chosen, 0.0))
    tl.store(lse_ptr + row * codebooks + codebook, lse)


@triton.jit
def _backward_kernel(
    logits_ptr,
    targets_ptr,
    row_weight_ptr,
    lse_ptr,
    grad_loss_ptr,
    grad_ptr,
    rows,
    codebooks,
    width,
    vocab,
    ignore_index,
    z_loss,
    targets_row_stride,
    targets_codebook_stride,
    row_weight_stride,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A piece of a row of logits turned into its gradient; the one-hot is subtracted before the only rounding."""
    row = tl.program_id(0).to(tl.int64)
    codebook = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    place = (codebook * rows + row) * width + column
    target = tl.load(targets_ptr + row * targets_row_stride + codebook * targets_codebook_stride).to(tl.int64)
    scale = tl.load(grad_loss_ptr).to(tl.float32)
    counts = target != ignore_index
    if HAS_WEIGHT:
        weight = tl.load(row_weight_ptr + row * row_weight_stride)
        counts = counts & (weight != 0.0)
        scale *= weight
    if (target < 0) | (target >= vocab):
        scale = float("nan")
    lse = tl.load(lse_ptr + row * codebooks + codebook)
    x = tl.load(logits_ptr + place, mask=column < vocab, other=float("-inf"))
    share = tl.exp(x - lse) * (1.0 + 2.0 * z_loss * lse) - tl.where(column == target, 1.0, 0.0)
    # Not a product with zero: a row that does not count may hold anything.
    share = tl.where(counts & (column < vocab), share * scale, 0.0)
    tl.store(grad_ptr + place, share.to(grad_ptr.dtype.element_ty), mask=column < width)


def _blocks(logits: Tensor, vocab: int) -> dict[str, int]:
    block = min(4096, triton.next_power_of_2(vocab))
    return tiles("codebook_loss", logits, {"V": vocab}, {"BLOCK_V": block, "num_warps": max(1, min(8, block // 256))})


def launch_forward(
    logits: Tensor,
    targets: Tensor,
    row_weight: Tensor | None,
    vocab: int,
    ignore_index: int,
    nll: Tensor,
    lse: Tensor,
) -> None:
    """Launch over ``logits`` ``[g, M, V]``, contiguous fp32; ``targets``, ``nll`` and ``lse`` are columns ``[M, g]``.

    ``nll`` and ``lse`` are parts of contiguous ``[M, C]`` tensors.
    """
    group, rows, width = logits.shape
    _forward_kernel[(rows, group)](
        logits,
        targets,
        row_weight,
        nll,
        lse,
        rows,
        nll.stride(0),
        width,
        vocab,
        ignore_index,
        *targets.stride(),
        0 if row_weight is None else row_weight.stride(0),
        HAS_WEIGHT=row_weight is not None,
        **_blocks(logits, vocab),
    )


def launch_backward(
    logits: Tensor,
    targets: Tensor,
    row_weight: Tensor | None,
    lse: Tensor,
    grad_loss: Tensor,
    vocab: int,
    ignore_index: int,
    z_loss: float,
    grad: Tensor,
) -> None:
    """Launch over ``logits`` into ``grad``, contiguous like it; it may be ``logits`` itself."""
    group, rows, width = logits.shape
    meta = _blocks(logits, vocab)
    _backward_kernel[(rows, group, triton.cdiv(width, meta["BLOCK_V"]))](
        logits,
        targets,
        row_weight,
        lse,
        grad_loss,
        grad,
        rows,
        lse.stride(0),
        width,
        vocab,
        ignore_index,
        z_loss,
        *targets.stride(),
        0 if row_weight is None else row_weight.stride(0),
        HAS_WEIGHT=row_weight is not None,
        **meta,
    )


# --------------------------------------------------------------------------------------- the same rows in PyTorch


def _counted(targets: Tensor, row_weight: Tensor | None, ignore_index: int) -> Tensor:
    counts = targets != ignore_index
    return counts if row_weight is None else counts & (row_weight != 0)[:, None]


def _rows_forward(
    logits: Tensor, targets: Tensor, row_weight: Tensor | None, vocab: int, ignore_index: int, nll: Tensor, lse: Tensor
) -> None:
    sums = logits[..., :vocab].logsumexp(-1).t()
    known = (targets >= 0) & (targets < vocab)
    chosen = logits.gather(-1, torch.where(known, targets, 0).long().t()[..., None])[..., 0].t()
    chosen = torch.where(known, chosen, torch.nan)
    nll.copy_(torch.where(_counted(targets, row_weight, ignore_index), sums - chosen, 0.0))
    lse.copy_(sums)


def _rows_backward(
    logits: Tensor,
    targets: Tensor,
    row_weight: Tensor | None,
    lse: Tensor,
    grad_loss: Tensor,
    vocab: int,
    ignore_index: int,
    z_loss: float,
) -> Tensor:
    """The gradient, in place of the logits."""
    known = (targets >= 0) & (targets < vocab)
    scale = grad_loss.to(logits.dtype).expand(targets.shape)
    if row_weight is not None:
        scale = scale * row_weight[:, None]
    scale = torch.where(known, scale, torch.nan)
    counts = _counted(targets, row_weight, ignore_index)
    grad = logits.sub_(lse.t()[..., None]).exp_()
    if z_loss:
        grad.mul_((1.0 + 2.0 * z_loss * lse).t()[..., None])
    grad.scatter_add_(-1, torch.where(known, targets, 0).long().t()[..., None], -torch.ones_like(lse.t()[..., None]))
    grad.mul_(scale.t()[..., None])
    grad[..., vocab:] = 0.0
    if grad.is_cuda or not bool(counts.all()):
        grad.masked_fill_(~counts.t()[..., None], 0.0)
    return grad


# ---------------------------------------------------------------------------------------------------------- the op


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _group(rows: int, width: int, codebooks: int, dtype: torch.dtype, cuda: bool) -> int:
    """Codebooks at a time."""
    budget = _WORKSPACE if cuda else _WORKSPACE_CPU
    return max(1, min(codebooks, budget // max(1, rows * width * _accumulator(dtype).itemsize)))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """``a @ b``, both ``[g, ., .]`` rounded to ``dtype``, summed in fp32 or wider and rounded once, to ``out_dtype``."""
    a, b = a.to(dtype), b.to(dtype)
    if dtype == out_dtype and (a.is_cuda or dtype.itemsize >= torch.float32.itemsize):
        return torch.bmm(a, b)
    wide = _accumulator(dtype)
    if a.is_cuda and dtype != wide:
        # Beside its inputs' own dtype the library knows no output but fp32.
        return torch.bmm(a, b, out_dtype=wide).to(out_dtype)
    return torch.bmm(a.to(wide), b.to(wide)).to(out_dtype)


def _loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor | None,
    vocab: int,
    ignore_index: int,
    z_loss: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, codebooks, _ = hidden.shape
    wide = _accumulator(dtype)
    nll = torch.empty(rows, codebooks, dtype=wide, device=hidden.device)
    lse = torch.empty_like(nll)
    use_triton = runs_triton(hidden, weight) and wide == torch.float32
    step = _group(rows, weight.shape[2], codebooks, dtype, hidden.is_cuda)
    with torch.autocast(hidden.device.type, enabled=False):
        for first in range(0, codebooks if rows else 0, step):
            part = slice(first, first + step)
            logits = _product(hidden[:, part].transpose(0, 1), weight[part], dtype, wide)
            if use_triton:
                launch_forward(logits, targets[:, part], row_weight, vocab, ignore_index, nll[:, part], lse[:, part])
            else:
                _rows_forward(logits, targets[:, part], row_weight, vocab, ignore_index, nll[:, part], lse[:, part])
        weighted = nll if row_weight is None else nll * row_weight[:, None]
        per_codebook = weighted.sum(0)
        loss = per_codebook.sum()
        if z_loss:
            squares = lse.square() if row_weight is None else lse.square() * row_weight[:, None]
            loss = loss + z_loss * torch.where(_counted(targets, row_weight, ignore_index), squares, 0.0).sum()
    return loss, per_codebook, (targets != ignore_index).sum(), lse


def _loss_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor | None,
    vocab: int,
    ignore_index: int,
    z_loss: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = _accumulator(dtype)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[1], dtype=wide),
        targets.new_empty((), dtype=torch.int64),
        hidden.new_empty(hidden.shape[:2], dtype=wide),
    )


def _loss_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor | None,
    lse: Tensor,
    grad_loss: Tensor,
    vocab: int,
    ignore_index: int,
    z_loss: float,
    dtype: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    rows, codebooks, _ = hidden.shape
    wide = _accumulator(dtype)
    hidden_grad, weight_grad = _grads_fake(hidden, weight, wants_hidden, wants_weight)
    if not rows:
        weight_grad.zero_()
    use_triton = runs_triton(hidden, weight) and wide == torch.float32
    step = _group(rows, weight.shape[2], codebooks, dtype, hidden.is_cuda)
    with torch.autocast(hidden.device.type, enabled=False):
        for first in range(0, codebooks if rows else 0, step):
            part = slice(first, first + step)
            x = hidden[:, part].transpose(0, 1)
            logits = _product(x, weight[part], dtype, wide)
            if use_triton:
                grad = logits if dtype == wide else torch.empty(logits.shape, dtype=dtype, device=logits.device)
                launch_backward(
                    logits,
                    targets[:, part],
                    row_weight,
                    lse[:, part],
                    grad_loss,
                    vocab,
                    ignore_index,
                    z_loss,
                    grad,
                )
            else:
                grad = _rows_backward(
                    logits, targets[:, part], row_weight, lse[:, part], grad_loss, vocab, ignore_index, z_loss
                ).to(dtype)
            if wants_hidden:
                hidden_grad[:, part] = _product(grad, weight[part].transpose(1, 2), dtype, hidden.dtype).transpose(0, 1)
            if wants_weight:
                weight_grad[part] = _product(x.transpose(1, 2), grad, dtype, weight.dtype)
    return hidden_grad, weight_grad


def _grads_fake(hidden: Tensor, weight: Tensor, wants_hidden: bool, wants_weight: bool) -> tuple[Tensor, Tensor]:
    """Both gradients, not yet written; one that nobody wants is empty."""
    hidden_grad = hidden.new_empty(hidden.shape if wants_hidden else (0,))
    return hidden_grad, torch.empty_like(weight) if wants_weight else weight.new_empty(0)


_backward_op = _ops.register(
    "codebook_loss_backward",
    _loss_backward,
    lambda hidden, weight, *rest: _grads_fake(hidden, weight, *rest[-2:]),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, row_weight, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets, row_weight, output[3])


def _grads(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    grads = _backward_op(*ctx.saved_tensors, grad, *ctx.options, *wanted)
    return (*(g if want else None for g, want in zip(grads, wanted)), None, None, None, None, None, None)


_op = _ops.register("codebook_loss", _loss, _loss_fake, backward=_grads, setup_context=_save)


# ----------------------------------------------------------------------------------------------------- what is called


def fused_codebook_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_weight: Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> CodebookLoss:
    """Weighted sum of the cross-entropies of C heads, each with its own matrix, without the logits of all of them.

    Logits are fp32 whatever the inputs are, the gradient of a logit is rounded once, after the one-hot has been taken
    off, and results are the same bits every time. The backward computes the logits again instead of keeping them: three
    passes over ``weight`` and one over its gradient in all. Under autocast the products are in autocast's dtype while
    ``weight`` is read, and its gradient written, in its own.

    Args:
        hidden: ``[M, C, D]``, fp32, bf16, fp16 or fp64, any strides: ``states[:, 1:]`` is read where it is.
        weight: ``[C, D, V]`` in the dtype of ``hidden``, any strides; V may be padded, see ``vocab_size``.
        targets: ``[M, C]`` int64 or int32, below the vocabulary, or ``ignore_index``. Any other target makes the loss
            NaN and reads nothing out of bounds; with ``CSM_KERNELS_CHECK=1`` it raises IndexError, at the price of a
            wait for the device.
        row_weight: ``[M]`` fp32, the Horvitz-Thompson weights of :func:`csm_kernels.frames.sample_frames`, divided or
            not; None is one for every row. A row of weight 0 adds exactly nothing, whatever its targets and finite states.
            No gradient.
        vocab_size: columns of ``weight`` that are tokens; the others are padding. Default: all.
        ignore_index: the target that adds nothing.
        z_loss: factor of the squared log-partition, added per target with the row's weight.
        impl: ``"auto"``, or ``"torch"``, the reference, which keeps the logits; ``"triton"`` fails where ``"auto"`` would
            not launch Triton kernels.

    Returns:
        A :class:`CodebookLoss`: a sum, not a mean, for what it is divided by is a matter of the whole optimizer step.
        With M = 0 it is 0, and so are the gradients.

    Raises:
        TypeError: dtypes that do not fit, or a DTensor.
        ValueError: shapes that do not fit; the message names the argument.

    Example:
        >>> hidden, weight = torch.randn(128, 31, 1024), torch.randn(31, 1024, 2051) / 32
        >>> out = fused_codebook_linear_cross_entropy(hidden, weight, torch.randint(2051, (128, 31)))
        >>> out.nll_per_codebook.shape
        torch.Size([31])

    Source: the head of ``CsmDepthDecoderForCausalLM`` of transformers and ``audio_head`` of Sesame's model, with
    ``F.cross_entropy``; Liger-Kernel's fused linear cross-entropy for the order of roundings. Not yet run on a GPU.
    """
    vocab = _checked(hidden, weight, targets, row_weight, vocab_size, impl)
    if os.environ.get("CSM_KERNELS_CHECK") == "1" and not torch.compiler.is_compiling():
        _check_targets(targets, row_weight, vocab, ignore_index)
    if impl == "torch":
        return fused_codebook_linear_cross_entropy_ref(
            hidden,
            weight,
            targets,
            row_weight=row_weight,
            vocab_size=vocab,
            ignore_index=ignore_index,
            z_loss=z_loss,
        )
    dtype, kind = hidden.dtype, hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif weight.dtype != dtype:
        raise TypeError(
            f"weight must have the dtype of hidden, {dtype}, got {weight.dtype}; cast one of them or use torch.autocast"
        )
    loss, per_codebook, count, _ = _op(hidden, weight, targets, row_weight, vocab, ignore_index, float(z_loss), dtype)
    return CodebookLoss(loss, per_codebook.detach(), count)


def fused_codebook_linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_weight: Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> CodebookLoss:
    """The specification of :func:`fused_codebook_linear_cross_entropy`: all logits, and PyTorch's own derivatives.

    Shapes as there; fp64 stays fp64, all else is computed in fp32.
    """
    wide = _accumulator(torch.promote_types(hidden.dtype, weight.dtype))
    vocab = weight.shape[2] if vocab_size is None else vocab_size
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.einsum("mcd,cdv->mcv", hidden.to(wide), weight.to(wide))[..., :vocab]
    lse = logits.logsumexp(-1)
    known = (targets >= 0) & (targets < vocab)
    chosen = logits.gather(-1, torch.where(known, targets, 0).long()[..., None])[..., 0]
    nll = lse - torch.where(known, chosen, torch.nan)
    counts = _counted(targets, row_weight, ignore_index)
    scale = torch.ones_like(nll) if row_weight is None else row_weight.to(wide)[:, None].expand_as(nll)
    per_codebook = torch.where(counts, nll, 0.0).mul(torch.where(counts, scale, 0.0)).sum(0)
    squares = torch.where(counts, lse.square() * scale, 0.0)
    return CodebookLoss(
        per_codebook.sum() + z_loss * squares.sum(), per_codebook.detach(), (targets != ignore_index).sum()
    )


def _checked(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor | None, vocab_size: int | None, impl: str
) -> int:
    """Raise on what does not fit; the size of the vocabulary. Looks at shapes and dtypes alone."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets), ("row_weight", row_weight)):
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name} is a DTensor, a shard; the loss needs whole tensors. Call it inside the forward of the module that "
                "fully_shard wrapped, where parameters are gathered (see register_fsdp_forward_method), or pass "
                ".full_tensor()"
            )
        if tensor is None and name == "row_weight":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, got {targets.dtype}")
    if hidden.ndim != 3:
        raise ValueError(f"hidden must be [M, C, D], got {tuple(hidden.shape)}")
    if weight.ndim != 3 or weight.shape[:2] != hidden.shape[1:] or weight.shape[2] < 1:
        raise ValueError(f"weight must be [{hidden.shape[1]}, {hidden.shape[2]}, V], got {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:2]:
        raise ValueError(f"targets must be {tuple(hidden.shape[:2])}, got {tuple(targets.shape)}")
    if row_weight is not None:
        if row_weight.shape != hidden.shape[:1]:
            raise ValueError(f"row_weight must be [{hidden.shape[0]}], got {tuple(row_weight.shape)}")
        if row_weight.dtype != _accumulator(hidden.dtype):
            raise TypeError(f"row_weight must be {_accumulator(hidden.dtype)}, got {row_weight.dtype}")
    if vocab_size is not None and not 1 <= vocab_size <= weight.shape[2]:
        raise ValueError(f"vocab_size must be from 1 to {weight.shape[2]}, the columns of weight, got {vocab_size}")
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    if impl == "triton" and not (runs_triton(hidden, weight) and hidden.dtype != torch.float64):
        raise ValueError(f"impl='triton' needs CUDA tensors of at most 32 bits, got {hidden.dtype} on {hidden.device}")
    return weight.shape[2] if vocab_size is None else vocab_size


def _check_targets(targets: Tensor, row_weight: Tensor | None, vocab: int, ignore_index: int) -> None:
    wrong = ((targets < 0) | (targets >= vocab)) & _counted(targets, row_weight, ignore_index)
    if bool(wrong.any()):
        row, codebook = wrong.nonzero()[0].tolist()
        raise IndexError(
            f"targets[{row}, {codebook}] is {int(targets[row, codebook])}, outside of 0 to {vocab - 1} and not "
            f"ignore_index ({ignore_index})"
        )
