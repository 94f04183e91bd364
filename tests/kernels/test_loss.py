"""The codebook loss: op and kernels against fp64, by the one tolerance rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from csm_kernels import loss
from csm_kernels._target import interpreting
from csm_kernels._tiles import override_tiles
from csm_kernels.loss import fused_codebook_linear_cross_entropy, fused_codebook_linear_cross_entropy_ref
from csm_kernels.testing import assert_close, assert_untouched, guarded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORE = -100


class Case(NamedTuple):
    """Arguments of the op."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    row_weight: Tensor | None = None


def inputs(
    device: torch.device,
    rows: int = 5,
    books: int = 3,
    width: int = 16,
    vocab: int = 67,
    dtype: torch.dtype = torch.float32,
    weighted: bool = True,
) -> Case:
    """Logits of order one, some targets ignored, one row of weight 0 where there are five."""
    hidden = torch.randn(rows, books, width).to(dtype).to(device)
    weight = (torch.randn(books, width, vocab) / width**0.5).to(dtype).to(device)
    targets = torch.randint(0, vocab, (rows, books), device=device)
    targets.view(-1)[3::7] = IGNORE
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = torch.rand(rows, device=device, dtype=wide) * 16 if weighted else None
    if factors is not None:
        factors[4::5] = 0
    return Case(hidden, weight, targets, factors)


def stock(case: Case, vocab: int | None = None, z_loss: float = 0.0) -> list[Tensor]:
    """Loss, its parts and both gradients as a stock head computes them: a product per codebook in the dtype of the inputs.

    Independent of the reference in csm_kernels. In fp64 it is the truth.
    """
    wide = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    hidden, weight = (t.detach().clone().requires_grad_() for t in case[:2])
    parts = []
    for book in range(hidden.shape[1]):
        logits = (hidden[:, book] @ weight[book]).to(wide)[:, :vocab]
        target = case.targets[:, book].long()
        if case.row_weight is not None:
            target = torch.where(case.row_weight == 0, IGNORE, target)
        terms = functional.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
        squares = torch.where(target == IGNORE, 0.0, logits.logsumexp(-1).square())
        factor = torch.ones_like(terms) if case.row_weight is None else case.row_weight.to(wide)
        parts.append(torch.stack([(terms * factor).sum(), (squares * factor).sum()]))
    nll, squares = torch.stack(parts).unbind(1)
    total = nll.sum() + z_loss * squares.sum()
    return [total.detach(), nll.detach(), *torch.autograd.grad(total, (hidden, weight))]


def double(case: Case) -> Case:
    return Case(*(t.double() if t is not None and t.is_floating_point() else t for t in case))


def ours(case: Case, **options: Any) -> list[Tensor]:
    """What :func:`stock` gives, of the op."""
    hidden, weight = (t.detach().requires_grad_() for t in case[:2])
    out = fused_codebook_linear_cross_entropy(hidden, weight, case.targets, row_weight=case.row_weight, **options)
    assert not out.nll_per_codebook.requires_grad
    assert out.num_targets.dtype == torch.int64
    assert int(out.num_targets) == int((case.targets != IGNORE).sum())
    return [out.loss.detach(), out.nll_per_codebook, *torch.autograd.grad(out.loss, (hidden, weight))]


def check(case: Case, vocab: int | None = None, z_loss: float = 0.0) -> list[Tensor]:
    """Loss, parts and gradients as near the truth as a stock head in the same dtype."""
    got = ours(case, vocab_size=vocab, z_loss=z_loss)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert [g.dtype for g in got[2:]] == [t.dtype for t in case[:2]]
    rows, books, width = case.hidden.shape
    sums = (rows * books, rows, case.weight.shape[2], rows)  # terms of a value
    truth, eager = stock(double(case), vocab, z_loss), stock(case, vocab, z_loss)
    for name, a, b, c, terms in zip(("loss", "parts", "hidden", "weight"), got, truth, eager, sums):
        assert_close(a, b, c, name=name, terms=max(1, terms if c.dtype == torch.float32 else 2))
    return got


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("vocab", [2051, 67, 64, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_truth(device: torch.device, dtype: torch.dtype, vocab: int, weighted: bool) -> None:
    check(inputs(device, vocab=vocab, dtype=dtype, weighted=weighted))


@pytest.mark.parametrize("rows", [0, 1, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(device: torch.device, dtype: torch.dtype, rows: int) -> None:
    got = check(inputs(device, rows=rows, dtype=dtype, vocab=99))
    if not rows:
        assert got[0] == 0 and not got[1].any() and not got[3].any()


@pytest.mark.parametrize("block", [1, 16, 32, 128])
def test_blocks_of_a_row(device: torch.device, block: int) -> None:
    """67 columns in several blocks, the last of them not full; one block that is wider."""
    with override_tiles("codebook_loss", BLOCK_V=block):
        check(inputs(device, books=2))
        check(inputs(device, books=2, dtype=torch.bfloat16), z_loss=0.01)


@pytest.mark.parametrize("block", [8, 128])
def test_padded_vocabulary(device: torch.device, block: int) -> None:
    """Padding is no token, whatever its columns hold, and gets a gradient of exactly zero."""
    case = inputs(device, vocab=72)
    case.weight[..., 61:] = 50.0
    case.targets.clamp_(max=60)[0, 0] = 60
    with override_tiles("codebook_loss", BLOCK_V=block):
        got = check(case, vocab=61)
    assert not got[3][..., 61:].any() and got[3][..., :61].any()
    case.targets[0, 0] = 61
    assert ours(case, vocab_size=61)[0].isnan()


def test_strides_are_walked(device: torch.device) -> None:
    """Views, transposed and expanded tensors give the bits of contiguous ones."""
    plain = inputs(device, rows=6, books=4)
    rows, books, width = plain.hidden.shape
    states = torch.randn(rows, books + 1, width, device=device)
    across = torch.randn(books, plain.weight.shape[2], width, device=device)
    wide = torch.randint(0, 67, (books, 2 * rows), device=device)
    factors = torch.rand(3 * rows, device=device)
    one_row, one_book = torch.randn(1, books, width, device=device), torch.randn(1, width, 67, device=device)
    for hidden, weight, targets, row_weight in (
        (states[:, 1:], plain.weight, plain.targets, plain.row_weight),
        (states.transpose(0, 1).contiguous().transpose(0, 1)[:, 1:], plain.weight, plain.targets, None),
        (plain.hidden, across.transpose(1, 2), plain.targets, plain.row_weight),
        (plain.hidden, plain.weight, wide[:, ::2].t(), plain.row_weight),
        (one_row.expand(rows, -1, -1), one_book.expand(books, -1, -1), wide[:1, :1].expand(rows, books), None),
        (plain.hidden, plain.weight, plain.targets, factors[::3]),
        (plain.hidden, plain.weight, plain.targets, factors[5:6].expand(rows)),
    ):
        case = Case(hidden, weight, targets, row_weight)
        assert not all(t is None or t.is_contiguous() for t in case)
        flat = Case(*(None if t is None else t.contiguous() for t in case))
        check(case)
        for a, b in zip(ours(case), ours(flat)):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_expanded_inputs_collect_their_gradients(device: torch.device) -> None:
    case = inputs(device)
    row = case.hidden[:1].clone().requires_grad_()
    expanded = fused_codebook_linear_cross_entropy(row.expand_as(case.hidden), *case[1:3], row_weight=case.row_weight)
    (got,) = torch.autograd.grad(expanded.loss, row)
    wanted = stock(double(case._replace(hidden=row.expand_as(case.hidden))))[2].sum(0, keepdim=True)
    assert torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_int32_targets(device: torch.device, impl: str) -> None:
    case = inputs(device)
    for a, b in zip(ours(case, impl=impl), ours(case._replace(targets=case.targets.int()), impl=impl)):
        assert torch.equal(a, b)


def test_another_ignored_target(device: torch.device) -> None:
    case = inputs(device)
    moved = case._replace(targets=torch.where(case.targets == IGNORE, 0, case.targets))
    zeros = int((moved.targets == 0).sum())
    out = fused_codebook_linear_cross_entropy(*moved[:3], row_weight=case.row_weight, ignore_index=0)
    assert zeros and int(out.num_targets) == moved.targets.numel() - zeros
    wanted = stock(double(moved._replace(targets=torch.where(moved.targets == 0, IGNORE, moved.targets))))
    assert torch.allclose(out.nll_per_codebook.double(), wanted[1], rtol=1e-5)


# ------------------------------------------------------------------------------------------------- rows that count not


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("how", ["ignored", "weightless"])
def test_rows_that_do_not_count_add_exactly_nothing(device: torch.device, how: str, impl: str) -> None:
    """The bits are those without the rows: states far off the others and, where the weight is 0, targets out of range."""
    case = inputs(device, rows=6, weighted=True)
    others = torch.tensor([0, 2, 3], device=device)
    case.row_weight.fill_(2.0)  # type: ignore[union-attr]
    case.hidden[[1, 4, 5]] *= 1e3
    if how == "ignored":
        case.targets[[1, 4, 5]] = IGNORE
    else:
        case.targets[1], case.targets[4], case.targets[5] = 67, -1, 1 << 40
        case.row_weight[[1, 4, 5]] = 0  # type: ignore[index]
    loss_, parts, hidden, weight = ours(case, impl=impl, z_loss=0.1)
    assert not hidden[[1, 4, 5]].any()
    fewer = Case(case.hidden[others], case.weight, case.targets[others], case.row_weight[others])  # type: ignore[index]
    wanted = ours(fewer, impl=impl, z_loss=0.1)
    for a, b in zip((loss_, parts, hidden[others], weight), wanted):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
    calm = case._replace(hidden=case.hidden.clone())
    calm.hidden[[1, 4, 5]] = 0.5
    for a, b in zip((loss_, parts, hidden, weight), ours(calm, impl=impl, z_loss=0.1)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_no_row_counts(device: torch.device, impl: str) -> None:
    case = inputs(device)
    for empty in (
        case._replace(targets=torch.full_like(case.targets, IGNORE)),
        case._replace(row_weight=torch.zeros_like(case.row_weight)),  # type: ignore[arg-type]
    ):
        assert all(torch.equal(value, torch.zeros_like(value)) for value in ours(empty, impl=impl, z_loss=0.1))


# -------------------------------------------------------------------------------------------------------- the numerics


def confident(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Rows whose target has a probability of about 0.999, where a softmax of 8 bits is one."""
    books, width, vocab = 3, 64, 257
    weight = (torch.randn(books, width, vocab) / width**0.5).to(dtype)
    weight = (weight / weight.float().norm(dim=1, keepdim=True)).to(dtype)
    targets = torch.randint(0, vocab, (32, books))
    chosen = torch.stack([weight[book][:, targets[:, book]].t() for book in range(books)], 1)
    return Case((14 * chosen).to(dtype).to(device), weight.to(device), targets.to(device))


def rounded_too_early(logits: Tensor, targets: Tensor, row_weight: Any, lse: Tensor, grad_loss: Tensor, *rest: Any):
    """The backward with the softmax rounded before the one-hot is taken off it; every target counts."""
    grad = rest[-1]
    share = (logits - lse.t()[..., None]).exp().to(grad.dtype)
    grad.copy_((share - functional.one_hot(targets.t(), logits.shape[-1])) * grad_loss)


def test_confident_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = confident(device)
    got = check(case)
    nll = float(got[0]) / case.targets.numel()
    assert 2e-4 < nll < 5e-3, nll
    wanted = stock(double(case))
    for name, a, b in zip(("hidden", "weight"), got[2:], wanted[2:]):
        error = float((a.double() - b).norm() / b.norm())
        assert error < 5e-3, f"gradient of {name}: {error:.1e}"  # measured 2e-3; a stock head: 2e-2
    monkeypatch.setattr(loss, "launch_backward", rounded_too_early)
    ordinary = inputs(device, dtype=torch.bfloat16, weighted=False)
    check(ordinary._replace(targets=ordinary.targets.clamp(min=0)))  # nobody would notice
    with pytest.raises(AssertionError, match="hidden: max error"):
        check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_not_rounded(device: torch.device, dtype: torch.dtype) -> None:
    """The loss of low-precision inputs has the error of fp32, not that of their dtype."""
    case = inputs(device, rows=16, width=64, dtype=dtype)
    got, truth = ours(case)[1].double(), stock(double(case))[1]
    assert float(((got - truth) / truth).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_z_loss_against_autograd(device: torch.device, dtype: torch.dtype) -> None:
    case = inputs(device, dtype=dtype)
    got = check(case, z_loss=0.05)
    assert float((got[0] - ours(case)[0]).abs()) > 0.1  # it does something


def test_scaled_loss(device: torch.device) -> None:
    """The gradient that comes in is a factor, and no part of what is kept."""
    case = inputs(device)
    hidden, weight = (t.detach().requires_grad_() for t in case[:2])
    out = fused_codebook_linear_cross_entropy(hidden, weight, case.targets, row_weight=case.row_weight)
    got = torch.autograd.grad(out.loss * -8, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(out.loss, (hidden, weight))
    assert all(torch.equal(a, -8 * b) for a, b in zip(got, again))


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("backward_dtype", [torch.float32, torch.bfloat16])
def test_logits_of_minus_infinity(device: torch.device, block: int, backward_dtype: torch.dtype) -> None:
    """Tokens that cannot be, a whole block of them first: no NaN, and no gradient."""
    logits = torch.randn(2, 3, 67, device=device)
    logits[..., :20] = logits[..., 40] = -torch.inf
    logits[0, 0, :66] = -torch.inf  # one token is left
    targets = torch.tensor([[66, 30], [50, 31], [66, 25]], device=device)
    nll, lse = torch.empty(2, 3, 2, device=device)
    grad = torch.empty(logits.shape, dtype=backward_dtype, device=device)
    with override_tiles("codebook_loss", BLOCK_V=block):
        loss.launch_forward(logits, targets, None, 67, IGNORE, nll, lse)
        loss.launch_backward(logits, targets, None, lse, torch.ones((), device=device), 67, IGNORE, 0.0, grad)
    wide = logits.double().requires_grad_()
    truth = functional.cross_entropy(wide.flatten(0, 1), targets.t().flatten(), reduction="none")
    assert torch.allclose(nll.t().flatten().double(), truth.detach(), atol=1e-5)
    assert torch.allclose(lse.t().double(), wide.detach().logsumexp(-1), atol=1e-5)
    (wanted,) = torch.autograd.grad(truth.sum(), wide)
    assert torch.allclose(grad.double(), wanted, atol=1e-6 if backward_dtype == torch.float32 else 4e-3)
    assert not grad[logits == -torch.inf].any()


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_an_impossible_target_costs_infinitely_much(device: torch.device, impl: str) -> None:
    case = inputs(device, weighted=False)
    case.hidden.abs_()
    case.weight[0, :, 5], case.targets[1, 0] = -torch.inf, 5
    parts = fused_codebook_linear_cross_entropy(*case[:3], impl=impl).nll_per_codebook
    assert parts.tolist()[0] == float("inf") and parts[1:].isfinite().all()


def test_the_same_every_time(device: torch.device) -> None:
    case = inputs(device, rows=33, books=4, vocab=999, dtype=torch.bfloat16)
    first = ours(case, z_loss=0.01)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(case, z_loss=0.01)))


# ------------------------------------------------------------------------------------------------ broken targets, memory


@pytest.mark.parametrize("bad", [67, -1, 1 << 31, -(1 << 40)])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_a_target_out_of_range_is_nan(device: torch.device, bad: int, impl: str) -> None:
    case = inputs(device)
    case.targets[2, 1], case.row_weight[2] = bad, 1.0  # type: ignore[index]
    out = fused_codebook_linear_cross_entropy(*case[:3], row_weight=case.row_weight, impl=impl)
    assert out.loss.isnan() and out.nll_per_codebook.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output_is_written_and_nothing_else(device: torch.device, dtype: torch.dtype, block: int) -> None:
    """Also with targets out of bounds, which read nothing of what surrounds the logits."""
    books, rows, width, vocab = 2, 4, 37, 35
    logits, logits_whole = guarded((books, rows, width), torch.float32, device)
    logits.copy_(torch.randn(logits.shape))
    logits[..., vocab:] = torch.nan  # padding
    targets = torch.tensor([[0, 34], [IGNORE, 1], [35, 2], [3, -1]], device=device)
    nll, nll_whole = guarded((rows, books), torch.float32, device)
    lse, lse_whole = guarded((rows, books), torch.float32, device)
    grad, grad_whole = guarded(logits.shape, dtype, device)
    one = torch.ones((), device=device)
    with override_tiles("codebook_loss", BLOCK_V=block):
        loss.launch_forward(logits, targets, None, vocab, IGNORE, nll, lse)
        loss.launch_backward(logits, targets, None, lse, one, vocab, IGNORE, 0.0, grad)
        broken = torch.zeros(rows, books, dtype=torch.bool, device=device)
        broken[2, 0] = broken[3, 1] = True
        assert torch.equal(nll.isnan(), broken) and lse.isfinite().all()
        assert torch.equal(grad[..., :vocab].isnan().all(-1).t(), broken)
        assert grad[~broken.t()].isfinite().all()
        assert not grad[..., vocab:].any()
        # In place, and in a part of wider tensors.
        loss.launch_backward(logits, targets, None, lse, one, vocab, IGNORE, 0.0, logits)
        assert torch.equal(logits[~broken.t()].to(dtype), grad[~broken.t()])
        wide, wide_whole = guarded((rows, 5), torch.float32, device)
        loss.launch_forward(logits, targets, None, vocab, IGNORE, wide[:, 2:4], wide[:, 3:5])
    assert wide[:, :2].isnan().all() and wide[0, 2:].isfinite().all()
    for whole in (logits_whole, nll_whole, lse_whole, grad_whole, wide_whole):
        assert_untouched(whole)


def test_targets_are_checked_on_request(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = inputs(device)
    case.targets[3, 2] = 67
    call: Callable[[], Any] = lambda: fused_codebook_linear_cross_entropy(*case[:3])  # noqa: E731
    assert call().loss.isnan()
    monkeypatch.setenv("CSM_KERNELS_CHECK", "1")
    with pytest.raises(IndexError, match=r"targets\[3, 2\] is 67, outside of 0 to 66 .* \(-100\)"):
        call()
    case.targets[3, 2] = 61
    with pytest.raises(IndexError, match=r"targets\[3, 2\] is 61, outside of 0 to 59"):
        case.targets.clamp_(max=59)[3, 2] = 61
        fused_codebook_linear_cross_entropy(*case[:3], vocab_size=60)
    case.targets[3, 2] = 59
    assert call().loss.isfinite()
    case.targets[4, 1], case.targets[0, 0] = -1, IGNORE
    assert case.row_weight is not None and case.row_weight[4] == 0  # a row that adds nothing may hold anything
    assert fused_codebook_linear_cross_entropy(*case[:3], row_weight=case.row_weight).loss.isfinite()
    with pytest.raises(IndexError, match=r"targets\[4, 1\] is -1"):
        call()


@pytest.mark.parametrize("name", ["hidden", "weight", "targets", "row_weight"])
def test_bad_tensors(device: torch.device, name: str) -> None:
    case = inputs(device)
    good = case._asdict()

    def call(value: Any) -> Any:
        given = {**good, name: value}
        return fused_codebook_linear_cross_entropy(
            given["hidden"], given["weight"], given["targets"], row_weight=given["row_weight"]
        )

    other = good[name]
    with pytest.raises(ValueError, match=rf"^{name} must be [(\[]"):
        call(other[None])
    with pytest.raises(ValueError, match=rf"^{'weight' if name == 'hidden' else name} must be [(\[]"):
        call(torch.cat([other, other], 1 if other.ndim > 1 else 0))
    with pytest.raises(TypeError, match=rf"^{name} must be .*bool"):
        call(other.bool())
    with pytest.raises(TypeError, match=f"^{name} must be a tensor, got list"):
        call(other.tolist())
    if name != "row_weight":
        with pytest.raises(TypeError, match=f"^{name} must be a tensor, got NoneType"):
            call(None)
    if name != "hidden":
        with pytest.raises(ValueError, match=f"^{name} must be on the device of hidden"):
            call(other.to("meta"))


def test_bad_options(device: torch.device) -> None:
    case = inputs(device)
    low = case._replace(weight=case.weight.bfloat16())
    with pytest.raises(TypeError, match=r"^weight must have the dtype of hidden, torch.float32, got torch.bfloat16"):
        fused_codebook_linear_cross_entropy(*low[:3])
    with pytest.raises(TypeError, match=r"^row_weight must be torch.float32, got torch.float64"):
        fused_codebook_linear_cross_entropy(*case[:3], row_weight=torch.ones(5, device=device).double())
    for size in (0, 68):
        with pytest.raises(ValueError, match=f"^vocab_size must be from 1 to 67, .* got {size}"):
            fused_codebook_linear_cross_entropy(*case[:3], vocab_size=size)
    with pytest.raises(ValueError, match="^impl must be 'auto', 'triton' or 'torch', got 'cuda'"):
        fused_codebook_linear_cross_entropy(*case[:3], impl="cuda")
    with pytest.raises(ValueError, match=r"^impl='triton' needs CUDA tensors .* got torch.float64"):
        fused_codebook_linear_cross_entropy(*double(case)[:3], impl="triton")
    assert torch.equal(ours(case, impl="triton")[3], ours(case)[3])


@pytest.fixture
def mesh() -> Iterator[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.dispatcher
@pytest.mark.parametrize("name", ["hidden", "weight", "targets", "row_weight"])
def test_a_shard_is_refused(mesh: Any, name: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    given: dict[str, Any] = inputs(torch.device("cpu"))._asdict()
    given[name] = distribute_tensor(given[name], mesh, [Shard(0)])
    with pytest.raises(TypeError, match=f"^{name} is a DTensor, a shard; .*register_fsdp_forward_method"):
        fused_codebook_linear_cross_entropy(**given)


# ----------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.dispatcher
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_gradients_are_those_of_the_loss(device: torch.device, impl: str, z_loss: float) -> None:
    """Op and reference in fp64, by finite differences."""
    case = inputs(device, rows=3, books=2, width=4, vocab=5, dtype=torch.float64)
    case.targets[2, 1] = IGNORE

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_codebook_linear_cross_entropy(
            hidden, weight, case.targets, row_weight=case.row_weight, vocab_size=4, z_loss=z_loss, impl=impl
        ).loss

    case.targets.clamp_(max=3)
    assert torch.autograd.gradcheck(call, [t.detach().requires_grad_() for t in case[:2]])


def test_fp64(device: torch.device) -> None:
    """Through PyTorch, for Triton's kernels are fp32; as exact as fp64."""
    case = inputs(device, vocab=99, dtype=torch.float64)
    for a, b in zip(ours(case, z_loss=0.1), stock(case, z_loss=0.1)):
        assert a.dtype == torch.float64 and torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_the_stock_head(device: torch.device, dtype: torch.dtype) -> None:
    case = inputs(device, dtype=dtype, vocab=70)
    case.targets.clamp_(max=65)
    wanted = stock(double(case), 66, 0.02)
    for a, b in zip(ours(case, impl="torch", vocab_size=66, z_loss=0.02), wanted):
        assert torch.allclose(a.double(), b, rtol=2 * torch.finfo(a.dtype).eps, atol=5e-6)
    # No rounding of its own where autocast would round.
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = fused_codebook_linear_cross_entropy_ref(
            *case[:3], row_weight=case.row_weight, vocab_size=66, z_loss=0.02
        )
    assert cast.loss.dtype == torch.float32
    assert torch.allclose(cast.nll_per_codebook.double(), wanted[1], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_runs_where_triton_does_not(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op's own code in PyTorch, not the specification."""
    case = inputs(device, dtype=dtype, vocab=70)
    case.targets.clamp_(max=65)
    kernels = ours(case, vocab_size=66, z_loss=0.02)
    monkeypatch.setattr(loss, "runs_triton", lambda *tensors: False)
    monkeypatch.setattr(loss, "launch_forward", None)
    got = check(case, vocab=66, z_loss=0.02)
    for a, b in zip(got, kernels):
        assert torch.allclose(a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=8 * torch.finfo(a.dtype).eps)
    everything = case._replace(targets=case.targets.clamp(min=0), row_weight=None)
    check(everything)


@pytest.mark.dispatcher
@pytest.mark.usefixtures("unseen_launches")
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_costs_nothing(device: torch.device, frozen: str) -> None:
    """No gradient of it is computed: no product, no tensor of its size."""
    case = inputs(device, rows=7)
    wanted = dict(zip(("hidden", "weight"), ours(case)[2:]))
    leaves = {name: getattr(case, name).detach().clone() for name in wanted}
    (kept,) = {"hidden", "weight"} - {frozen}
    leaves[kept].requires_grad_()
    with Recorder() as seen:
        fused_codebook_linear_cross_entropy(**leaves, targets=case.targets, row_weight=case.row_weight).loss.backward()
    assert leaves[frozen].grad is None
    assert torch.equal(leaves[kept].grad, wanted[kept])
    backward = [made for name, made in seen.made if name == "csm_kernels::codebook_loss_backward"]
    assert sorted(numel for numel, _ in backward) == sorted([0, leaves[kept].numel()])
    assert sum(name == "aten::bmm" for name, _ in seen.made) == 3  # logits twice, one gradient


@pytest.mark.dispatcher
def test_double_backward_is_refused(device: torch.device) -> None:
    case = inputs(device)
    hidden = case.hidden.requires_grad_()
    (first,) = torch.autograd.grad(
        fused_codebook_linear_cross_entropy(hidden, *case[1:3]).loss, hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="codebook_loss_backward"):
        first.square().sum().backward()


@pytest.mark.dispatcher
def test_autocast_keeps_the_weights_gradient_whole(device: torch.device) -> None:
    """Products in bf16; the weight is read, and its gradient written, in fp32."""
    case = inputs(device, rows=32, width=64)
    hidden, weight = (t.detach().requires_grad_() for t in case[:2])
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = fused_codebook_linear_cross_entropy(hidden, weight, case.targets, row_weight=case.row_weight)
    got = torch.autograd.grad(out.loss, (hidden, weight))
    assert out.loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in got)
    low = Case(case.hidden.bfloat16(), case.weight.bfloat16(), *case[2:])
    truth, eager = stock(double(low)), stock(low)
    assert_close(out.loss.detach(), truth[0], eager[0], terms=96)
    errors = []
    for a, b, c in zip(got, truth[2:], ours(low)[2:]):
        assert not torch.equal(a, a.bfloat16().float())  # it is not rounded
        errors.append([float((x.double() - b).norm() / b.norm()) for x in (a, c)])
        assert errors[-1][0] < 0.8 * errors[-1][1], errors
    # The rounding that is left is that of the logits' gradient.
    assert errors[1][0] < 2e-3


@pytest.mark.dispatcher
@pytest.mark.parametrize("stored", [torch.float16, torch.float64])
def test_autocast_in_another_dtype_than_the_weight(device: torch.device, stored: torch.dtype) -> None:
    case = inputs(device)
    hidden, weight = case.hidden.requires_grad_(), case.weight.to(stored).requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = fused_codebook_linear_cross_entropy(hidden, weight, case.targets, row_weight=case.row_weight)
    out.loss.backward()
    wanted = stock(double(case))
    assert hidden.grad is not None and weight.grad is not None and weight.grad.dtype == stored
    assert torch.allclose(weight.grad.double(), wanted[3], rtol=0.05, atol=0.2)


# -------------------------------------------------------------------------------------------------------- torch's machinery


@pytest.mark.dispatcher
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_is_sound(device: torch.device, dtype: torch.dtype, weighted: bool) -> None:
    case = inputs(device, dtype=dtype, weighted=weighted, vocab=19)
    states = torch.randn(5, 4, 16, device=device).to(dtype).requires_grad_()
    across = torch.randn(3, 19, 16, device=device).to(dtype).requires_grad_()
    for pair in ((case.hidden, case.weight), (states[:, 1:], across.transpose(1, 2))):
        leaves = [t.detach().requires_grad_() for t in pair]
        args = (*leaves, case.targets, case.row_weight, 19, IGNORE, 0.1, dtype)
        torch.library.opcheck(torch.ops.csm_kernels.codebook_loss.default, args)


@pytest.mark.slow
@pytest.mark.dispatcher
def test_compiles_whole_and_once(device: torch.device) -> None:
    """However many rows count: masks are values, and no shape depends on them."""
    from torch._dynamo.testing import CompileCounterWithBackend

    case = inputs(device, rows=8, books=2, vocab=19)
    counter = CompileCounterWithBackend("inductor")

    def step(hidden: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor) -> Any:
        return fused_codebook_linear_cross_entropy(hidden * 2, weight, targets, row_weight=row_weight)

    torch._dynamo.reset()
    whole = torch.compile(step, backend=counter, fullgraph=True)
    for valid in (8, 0, 1, 5):
        targets, factors = case.targets.clone(), torch.ones(8, device=device)
        targets[valid:], factors[: valid // 2] = IGNORE, 0
        got, wanted = [], []
        for call, results in ((whole, got), (step, wanted)):
            leaves = [t.detach().requires_grad_() for t in case[:2]]
            out = call(*leaves, targets, factors)
            assert int(out.num_targets) == int((targets != IGNORE).sum())
            results += [out.loss.detach(), out.nll_per_codebook, *torch.autograd.grad(out.loss, leaves)]
        for a, b in zip(got, wanted):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


class Recorder(TorchDispatchMode):
    """What every op made: its name and numel and bytes of each output; an op of ours is looked into as well."""

    inside = {"codebook_loss": loss._loss, "codebook_loss_backward": loss._loss_backward}

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("csm_kernels::"):
            with self:
                out = self.inside[name.partition("::")[2]](*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    self.made.append((name, (tensor.numel(), tensor.untyped_storage().nbytes())))
        return out


@pytest.fixture
def unseen_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's interpreter does with tensors is no work of the op."""

    def hidden(launch: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            with _disable_current_modes():
                launch(*args)

        return call

    for name in ("launch_forward", "launch_backward"):
        monkeypatch.setattr(loss, name, hidden(getattr(loss, name)))


def workspace(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(loss, "_WORKSPACE", size)
    monkeypatch.setattr(loss, "_WORKSPACE_CPU", size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("together", [1, 2, 3])
def test_groups_of_codebooks_change_nothing(
    device: torch.device, dtype: torch.dtype, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = inputs(device, rows=6, books=5, width=32, dtype=dtype)
    workspace(monkeypatch, 1 << 30)
    whole = ours(case, z_loss=0.1)
    launches = []
    stock_launch = loss.launch_forward
    monkeypatch.setattr(loss, "launch_forward", lambda x, *rest: (launches.append(len(x)), stock_launch(x, *rest)))
    workspace(monkeypatch, together * 6 * 67 * 4 + 3)
    parts = ours(case, z_loss=0.1)
    assert launches == [together] * (5 // together) + [5 % together] * (5 % together > 0)
    for a, b in zip(parts, whole):
        if interpreting():
            assert torch.equal(a, b)
        else:  # a library may choose by the number of matrices
            assert torch.allclose(a, b, rtol=torch.finfo(a.dtype).eps * 4, atol=torch.finfo(a.dtype).eps * 16)


@pytest.mark.dispatcher
@pytest.mark.usefixtures("unseen_launches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_all_logits(device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of both directions is a group's logits; stock it is those of all codebooks."""
    case = inputs(device, rows=128, books=6, width=8, vocab=50, dtype=dtype)
    everything, together = 6 * 128 * 50, 2
    workspace(monkeypatch, together * 128 * 50 * 4)
    with Recorder() as seen:
        ours(case)
    biggest = max(numel for _, (numel, _) in seen.made)
    assert biggest == together * 128 * 50
    assert max(size for _, (_, size) in seen.made) == biggest * 4
    with Recorder() as seen:
        ours(case, impl="torch")
    assert max(numel for _, (numel, _) in seen.made) >= everything


def written(case: Case, compute: Callable[[Case], object]) -> int:
    """Elements all ops of both directions wrote."""
    with Recorder() as seen:
        compute(case)
    assert compute is stock or not [n for n, _ in seen.made if n in ("aten::select_backward", "aten::slice_backward")]
    allocations = ("aten::empty", "aten::new_empty", "aten::empty_like")
    return sum(made[0] for name, made in seen.made if name not in allocations and not name.startswith("csm_kernels::"))


@pytest.mark.dispatcher
@pytest.mark.usefixtures("unseen_launches")
@pytest.mark.parametrize("together", [1, 1000])
def test_the_backward_is_linear_in_the_codebooks(
    device: torch.device, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the codebooks write four times as much. Stock fills a tensor as large as all weights for every codebook."""
    few, many = (inputs(device, rows=2, books=books, width=64, vocab=64, weighted=False) for books in (4, 16))
    workspace(monkeypatch, together * 2 * 64 * 4)
    assert written(many, ours) < 4.3 * written(few, ours)
    assert written(many, stock) > 8 * written(few, stock)  # the measure sees it
    # Each group's gradient of the weights is made and written to its place: two passes, however many codebooks.
    assert written(many, ours) < 2.5 * many.weight.numel()


def test_nothing_but_the_inputs_is_kept(device: torch.device) -> None:
    case = inputs(device, rows=16)
    hidden, weight = (t.requires_grad_() for t in case[:2])
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = fused_codebook_linear_cross_entropy(hidden, weight, case.targets, row_weight=case.row_weight)
    assert "options" in vars(out.loss.grad_fn)
    assert not [v for v in tree_leaves(vars(out.loss.grad_fn)) if isinstance(v, Tensor)]
    known = {t.data_ptr() for t in case if t is not None}
    assert sum(t.numel() for t in kept if t.data_ptr() not in known) == case.targets.numel()  # log-sum-exps
    assert {hidden.data_ptr(), weight.data_ptr()} <= {t.data_ptr() for t in kept}
