"""Single-step attention over a KV cache: the kernels against fp64, by the one tolerance rule."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from csm_kernels import attention
from csm_kernels._tiles import override_tiles
from csm_kernels.attention import attention_lengths_ref, attention_step, attention_step_library
from csm_kernels.testing import assert_close, assert_untouched, guarded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
# heads, KV heads, head dimension, capacity: one to eight heads share a KV head, head dimensions no power of two
SHAPES = [(32, 8, 64, 127), (8, 2, 128, 32), (3, 1, 6, 63), (6, 2, 10, 257), (2, 2, 80, 40), (8, 1, 16, 1)]


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    starts: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    mask: Tensor | None = None


def inputs(
    device: torch.device,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    windows: list[tuple[int, int]],
    q_dtype: torch.dtype = torch.float32,
) -> Case:
    """What lies outside the windows is NaN, or the largest there is."""
    heads, groups, dim, capacity = shape
    batch = len(windows)
    starts, lengths = (torch.tensor(side, device=device) for side in zip(*windows))
    position = torch.arange(capacity, device=device)
    outside = ((position < starts[:, None]) | (position >= lengths[:, None]))[:, None, :]
    q = torch.randn(batch, heads, dim, device=device).to(q_dtype)
    caches, scales = [], []
    for _ in "kv":
        values = torch.randn(batch, groups, capacity, dim, device=device)
        if dtype == torch.int8:
            scale = values.abs().amax(-1) / 127
            cache = (values / scale[..., None]).round().to(torch.int8)
            caches.append(cache.masked_fill(outside[..., None], 127))
            scales.append(scale.masked_fill(outside, float("nan")))
        else:
            caches.append(values.to(dtype).masked_fill(outside[..., None], float("nan")))
    k_scale, v_scale = scales if scales else (None, None)
    return Case(q, caches[0], caches[1], lengths, starts, k_scale, v_scale)


def widened(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, keys and values, mask, and which rows look at anything."""
    position = torch.arange(case.k.shape[2], device=case.q.device)
    seen = position < case.lengths[:, None]
    if case.starts is not None:
        seen &= position >= case.starts[:, None]
    if case.mask is not None:
        seen &= case.mask if case.mask.dtype == torch.bool else case.mask > float("-inf")
    keys, values = (
        (cache.to(dtype) if scale is None else cache.to(dtype) * scale[..., None].to(dtype)).masked_fill(
            ~seen[:, None, :, None], 0.0
        )
        for cache, scale in ((case.k, case.k_scale), (case.v, case.v_scale))
    )
    return case.q.to(dtype), keys, values, seen, seen.any(-1)


def added(case: Case) -> Tensor:
    """What the mask adds to the scores of positions that are seen, ``[B, C]`` fp32."""
    if case.mask is None or case.mask.dtype == torch.bool:
        return torch.zeros(case.k.shape[0], case.k.shape[2], device=case.q.device)
    return case.mask.float().masked_fill(case.mask == float("-inf"), 0.0)


def truth(case: Case) -> Tensor:
    """In fp64, every KV head copied to its query heads."""
    q, k, v, seen, some = widened(case, torch.float64)
    share = q.shape[1] // k.shape[1]
    k, v = (cache.repeat_interleave(share, 1) for cache in (k, v))
    scores = torch.einsum("bhd,bhcd->bhc", q, k) / q.shape[2] ** 0.5 + added(case)[:, None]
    weights = torch.softmax(scores.masked_fill(~seen[:, None], float("-inf")), -1).nan_to_num(0.0)
    return torch.einsum("bhc,bhcd->bhd", weights, v).flatten(1)


def eager(case: Case) -> Tensor:
    """``scaled_dot_product_attention`` in fp32 whatever the cache: the kernel rounds neither queries nor weights."""
    q, k, v, seen, some = widened(case, torch.float32)
    bias = torch.where(seen | ~some[:, None], 0.0, float("-inf")) + added(case)
    return attention_step_library(q, k, v, bias) * some[:, None]


def check(case: Case, ours: Tensor | None = None) -> None:
    ours = attention_step(*case) if ours is None else ours
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    # a sum over the window of sums over the head
    assert_close(ours, truth(case), eager(case), name="attention_step", terms=case.q.shape[2] + case.k.shape[2])


def windows_for(capacity: int) -> list[tuple[int, int]]:
    """The whole cache, one position, an inner window."""
    return [(0, capacity), (capacity - 1, capacity), (capacity // 3, capacity - capacity // 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 4])
def test_step(device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype, splits: int) -> None:
    case = inputs(device, shape, dtype, windows_for(shape[3])[: 2 if shape[0] == 32 else 3])
    with override_tiles("attention", BLOCK_C=16, SPLITS=splits):
        check(case)


@pytest.mark.parametrize("shape", [(8, 2, 128, 32), (6, 2, 10, 257)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_with_the_tiles_it_picks(
    device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    check(inputs(device, shape, dtype, windows_for(shape[3])))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.int8))
def test_backbone_at_its_real_size(device: torch.device, dtype: torch.dtype) -> None:
    check(inputs(device, (32, 8, 64, 2048), dtype, [(3, 999)]))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_queries(device: torch.device, dtype: torch.dtype) -> None:
    check(inputs(device, (4, 2, 16, 40), torch.bfloat16, windows_for(40), q_dtype=dtype))


def masks(case: Case, kind: torch.dtype) -> Tensor:
    """Holes in the windows, one row of nothing but holes; a row of the table stands a stride apart."""
    batch, capacity = case.k.shape[0], case.k.shape[2]
    seen = torch.rand(batch, capacity, device=case.q.device) < 0.6
    seen[-1] = False
    if kind == torch.bool:
        wide = torch.zeros(batch, 2 * capacity, dtype=kind, device=case.q.device)
        wide[:, :capacity] = seen
        return wide[:, :capacity]
    return torch.randn(batch, capacity, device=case.q.device).to(kind).masked_fill(~seen, float("-inf"))


@pytest.mark.parametrize("kind", (torch.bool, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int8))
@pytest.mark.parametrize("splits", [1, 4])
def test_masks(device: torch.device, dtype: torch.dtype, kind: torch.dtype, splits: int) -> None:
    """What is masked is never read: it is NaN here, or the largest there is."""
    case = inputs(device, (6, 2, 10, 57), dtype, [(0, 57), (5, 40), (0, 57)])
    case = case._replace(mask=masks(case, kind))
    hidden = ~widened(case, torch.float32)[3][:, None]
    for cache, scale in ((case.k, case.k_scale), (case.v, case.v_scale)):
        cache.masked_fill_(hidden[..., None], 127 if dtype == torch.int8 else float("nan"))
        if scale is not None:
            scale.masked_fill_(hidden, float("nan"))
    with override_tiles("attention", BLOCK_C=4, SPLITS=splits):
        out = attention_step(*case)
        check(case, out)
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    check(case, attention_lengths_ref(*case))


def test_one_mask_for_all_rows(device: torch.device) -> None:
    case = inputs(device, (4, 2, 8, 40), torch.float32, [(0, 40), (0, 40)])
    mask = (torch.arange(40, device=device) % 3 > 0).expand(2, -1)
    assert mask.stride(0) == 0
    check(case._replace(mask=mask))


@pytest.mark.parametrize("dtype", (torch.float32, torch.int8))
def test_every_length(device: torch.device, dtype: torch.dtype) -> None:
    """Blocks and shares that end anywhere, and shares without a position."""
    with override_tiles("attention", BLOCK_C=4, SPLITS=4):
        check(inputs(device, (2, 1, 8, 21), dtype, [(0, length) for length in range(1, 22)]))
        check(inputs(device, (2, 1, 8, 21), dtype, [(start, 21) for start in range(21)]))


@pytest.mark.parametrize("splits", [1, 4])
def test_nothing_to_look_at_gives_zeros(device: torch.device, splits: int) -> None:
    case = inputs(device, (4, 2, 8, 20), torch.float32, [(0, 0), (0, 7), (7, 7), (9, 3), (20, 20), (30, 40), (0, -5)])
    with override_tiles("attention", BLOCK_C=4, SPLITS=splits):
        out = attention_step(*case)
        assert torch.equal(out[[0, 2, 3, 4, 5, 6]], torch.zeros(6, 32, device=device))
        check(case, out)


def test_lengths_past_the_cache_and_starts_before_it(device: torch.device) -> None:
    case = inputs(device, (4, 2, 8, 20), torch.float32, [(0, 20), (0, 20), (5, 20)])
    wild = case._replace(
        lengths=torch.tensor([21, 2**40, 20], device=device), starts=torch.tensor([0, -(2**40), 5], device=device)
    )
    assert torch.equal(attention_step(*wild), attention_step(*case))


def test_starts_default_to_zero(device: torch.device) -> None:
    case = inputs(device, (4, 2, 8, 20), torch.float32, [(0, 20), (0, 3)])
    assert torch.equal(attention_step(*case[:4]), attention_step(*case))
    check(case._replace(starts=None))


def test_padding_moves_nothing(device: torch.device) -> None:
    """A padded row gives the bits of the same row without padding: blocks are counted from the window's start."""
    case = inputs(device, (4, 2, 8, 64), torch.float32, [(0, 41)])
    padded = case._replace(
        k=case.k.roll(13, 2), v=case.v.roll(13, 2), lengths=case.lengths + 13, starts=torch.tensor([13], device=device)
    )
    with override_tiles("attention", BLOCK_C=4, SPLITS=4):
        assert torch.equal(attention_step(*padded), attention_step(*case))


def test_a_row_is_the_same_in_any_batch(device: torch.device) -> None:
    case = inputs(device, (8, 2, 16, 70), torch.bfloat16, [(0, 70), (3, 50), (9, 10)])
    together = attention_step(*case)
    for row in range(3):
        alone = Case(*(None if part is None else part[row : row + 1].clone() for part in case))
        assert torch.equal(attention_step(*alone)[0], together[row])


def test_strides_are_walked_and_not_copied(device: torch.device) -> None:
    case = inputs(device, (6, 3, 8, 40), torch.int8, [(2, 33), (0, 40)])
    wide = torch.randn(2, 9, 3, 21, device=device)
    strided = Case(
        wide[:, 1:7, 1, 5:13],
        case.k.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([case.v, case.v], -1)[..., 8:],
        case.lengths,
        case.starts,
        torch.stack([case.k_scale, case.k_scale], 1)[:, 1],  # type: ignore[list-item]
        case.v_scale.transpose(0, 1).contiguous().transpose(0, 1),  # type: ignore[union-attr]
    )
    assert not any(part.is_contiguous() for part in (*strided[:3], *strided[5:]) if part is not None)
    check(strided)


def test_broken_rows_stay_alone(device: torch.device) -> None:
    case = inputs(device, (4, 2, 8, 40), torch.float32, [(0, 40)] * 4)
    healthy = attention_step(*case)
    case.k[1, 0, 3, 2] = float("nan")
    case.v[2, 1, 39, 0] = float("inf")
    with override_tiles("attention", BLOCK_C=16, SPLITS=1):
        whole = attention_step(*case)
    for out in (attention_step(*case), whole):
        heads = out.view(4, 4, 8)
        assert heads[1, :2].isnan().all() and heads[1, 2:].isfinite().all()
        assert (heads[2, 2:, 0] == float("inf")).all() and heads[2, 2:, 1:].isfinite().all()
        assert heads[2, :2].isfinite().all()
    assert torch.equal(attention_step(*case)[[0, 3]], healthy[[0, 3]])


@pytest.mark.parametrize("splits", [1, 4])
def test_keys_of_infinity(device: torch.device, splits: int) -> None:
    """A score of minus infinity weighs nothing, even where it fills a block; nothing but those is NaN, as in eager."""
    case = inputs(device, (1, 1, 1, 16), torch.float32, [(0, 16), (0, 16)])
    case.q.fill_(1.0)
    case.k[0, 0, :8] = float("-inf")
    case.k[1] = float("-inf")
    with override_tiles("attention", BLOCK_C=4, SPLITS=splits):
        out = attention_step(*case)
    assert out[1].isnan().all()
    rest = case._replace(starts=torch.tensor([8, 0], device=device))
    assert torch.allclose(out[0], attention_step(*rest)[0], rtol=1e-6)


def test_scores_far_apart(device: torch.device) -> None:
    """The running maximum: exp of neither side may overflow."""
    case = inputs(device, (2, 1, 4, 48), torch.float32, [(0, 48), (0, 48)])
    case.k.mul_(100 * torch.linspace(-1, 1, 48, device=device)[:, None])
    case.k[1] = case.k[1].flip(1)
    with override_tiles("attention", BLOCK_C=4, SPLITS=4):
        check(case)


@pytest.mark.parametrize("shape", [(8, 2, 128, 32), (6, 2, 10, 70)], ids=str)
def test_every_output_is_written_and_nothing_else(device: torch.device, shape: tuple[int, int, int, int]) -> None:
    case = inputs(device, shape, torch.bfloat16, [(0, 5), (4, shape[3]), (3, 3)])
    for splits in (1, 8):
        with override_tiles("attention", SPLITS=splits):
            size = attention.workspace_size(case.q, case.k)
            assert (size > 0) == (splits > 1)
            workspace, workspace_whole = guarded((size,), torch.float32, device)
            out, out_whole = guarded((3, shape[0] * shape[2]), torch.float32, device)
            attention.launch_attention_step(*case, workspace, out)
        assert out.isfinite().all()
        assert not workspace.isnan().any()
        assert_untouched(workspace_whole), assert_untouched(out_whole)
        check(case, out)


def test_the_same_every_time(device: torch.device) -> None:
    case = inputs(device, (6, 2, 10, 200), torch.bfloat16, [(0, 200), (7, 150)])
    first = attention_step(*case)
    assert all(torch.equal(attention_step(*case), first) for _ in range(3))


def test_the_reference_is_the_specification(device: torch.device) -> None:
    for dtype in DTYPES:
        case = inputs(device, (6, 2, 10, 50), dtype, [(0, 50), (7, 30), (9, 9), (4, 99)])
        check(case, attention_lengths_ref(*case))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.int8))
@pytest.mark.dispatcher
def test_the_op_is_sound(device: torch.device, dtype: torch.dtype) -> None:
    case = inputs(device, (4, 2, 6, 20), dtype, [(0, 20), (3, 9)])
    for mask in (None, masks(case, torch.bool)):
        torch.library.opcheck(torch.ops.csm_kernels.attention_step.default, (*case[:7], mask))


@pytest.mark.slow
@pytest.mark.dispatcher
def test_compiles_whole(device: torch.device) -> None:
    case = inputs(device, (4, 2, 8, 20), torch.float32, [(0, 20), (3, 9)])

    def step(q: Tensor, *rest: Tensor) -> Tensor:
        return attention_step(q * 2, *rest) + 1

    got = torch.compile(step, fullgraph=True)(*case)
    assert torch.allclose(got, step(*case), atol=1e-6)


def test_empty(device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    empty = torch.zeros(0, 2, 5, 8, device=device)
    assert attention_step(torch.zeros(0, 4, 8, device=device), empty, empty, none).shape == (0, 32)
    cache = torch.zeros(2, 2, 0, 8, device=device)
    lengths = torch.ones(2, dtype=torch.int64, device=device)
    out = attention_step(torch.zeros(2, 4, 8, device=device), cache, cache, lengths)
    assert torch.equal(out, torch.zeros(2, 32, device=device))


GOOD = Case(
    torch.ones(2, 4, 8),
    torch.ones(2, 2, 5, 8),
    torch.ones(2, 2, 5, 8),
    torch.ones(2, dtype=torch.int64),
    torch.zeros(2, dtype=torch.int64),
    None,
    None,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(2, 32)}, "q must be"),
        ({"q": torch.ones(2, 4, 8, dtype=torch.int32)}, "q must be"),
        ({"q": torch.ones(2, 8, 4).transpose(1, 2)}, "q must have unit stride"),
        ({"q": torch.ones(2, 4, 300)}, "heads of 1 to 256"),
        ({"q": torch.ones(2, 5, 8)}, "heads must divide"),
        ({"k": torch.ones(3, 2, 5, 8)}, "k_cache must be"),
        ({"k": torch.ones(2, 2, 5, 7)}, "k_cache must be"),
        ({"v": torch.ones(2, 2, 6, 8)}, "v_cache must be like"),
        ({"v": torch.ones(2, 2, 5, 8).half()}, "v_cache must be like"),
        ({"k": torch.ones(2, 2, 8, 5).transpose(2, 3)}, "k_cache must have unit stride"),
        ({"k": torch.ones(2, 2, 5, 8).int(), "v": torch.ones(2, 2, 5, 8).int()}, "floating point or int8"),
        ({"k": torch.ones(2, 2, 5, 8).char(), "v": torch.ones(2, 2, 5, 8).char()}, "k_scale belongs"),
        ({"v_scale": torch.ones(2, 2, 5)}, "v_scale belongs"),
        (
            {
                "k": torch.ones(2, 2, 5, 8).char(),
                "v": torch.ones(2, 2, 5, 8).char(),
                "k_scale": torch.ones(2, 2, 5).half(),
                "v_scale": torch.ones(2, 2, 5),
            },
            "k_scale must be",
        ),
        ({"lengths": torch.ones(2, dtype=torch.int32)}, "lengths must be"),
        ({"lengths": torch.ones(3, dtype=torch.int64)}, "lengths must be"),
        ({"starts": torch.ones(4, dtype=torch.int64)[::2]}, "starts must be"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask must be"),
        ({"mask": torch.ones(2, 5, dtype=torch.int64)}, "mask must be"),
        ({"mask": torch.ones(5, 2).t()}, "mask must have unit stride"),
    ],
)
def test_bad_arguments(device: torch.device, changes: dict[str, Tensor], message: str) -> None:
    case = GOOD._replace(**changes)
    with pytest.raises(ValueError, match=message):
        attention_step(*(None if part is None else part.to(device) for part in case))  # type: ignore[arg-type]
