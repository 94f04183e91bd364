"""Samples of frames: fixed size, unbiased, a pure function of their four numbers, and nothing that waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from csm_kernels.frames import FrameSample, frame_weights, sample_frames


def some(*shape: int, share: float = 0.6, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def filled(sample: FrameSample) -> Tensor:
    return sample.weight > 0


def check(sample: FrameSample, mask: Tensor, num_frames: int) -> None:
    """What every sample is."""
    index, weight = sample
    assert index.shape == weight.shape == (num_frames,)
    assert index.dtype == torch.int64 and weight.dtype == torch.float32
    taken = index[filled(sample)]
    assert mask.flatten()[taken].all(), "a frame that is none"
    assert len(taken.unique()) == len(taken) == min(num_frames, int(mask.sum()))
    assert not index[~filled(sample)].any() and not weight[~filled(sample)].any()
    # The number of frames is estimated without error, whatever is drawn.
    assert torch.allclose(weight.sum(), mask.sum().float())


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 17, 40, 100])
@pytest.mark.parametrize("shape", [(4, 25), (1, 1), (40,), (2, 3, 5)])
def test_samples(shape: tuple[int, ...], num_frames: int, kept: bool) -> None:
    for seed in range(8):
        mask = some(*shape, seed=seed)
        keep = some(*shape, share=0.3, seed=seed + 99) if kept else None
        check(sample_frames(mask, num_frames, seed=seed, keep=keep), mask, num_frames)


def test_strides_of_the_mask() -> None:
    mask, keep = some(9, 4), some(9, 4, share=0.2, seed=1)
    got = sample_frames(mask.t(), 5, seed=1, keep=keep.t())
    wanted = sample_frames(mask.t().contiguous(), 5, seed=1, keep=keep.t().contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_fewer_frames_than_rows() -> None:
    mask = some(3, 7)
    count = int(mask.sum())
    for keep in (None, some(3, 7, seed=5)):
        sample = sample_frames(mask, 30, seed=3, keep=keep)
        assert sample.index[:count].sort().values.tolist() == mask.flatten().nonzero().flatten().tolist()
        assert sample.weight.tolist() == [1.0] * count + [0.0] * (30 - count)


@pytest.mark.parametrize("mask", [torch.zeros(2, 5, dtype=torch.bool), torch.zeros(0, 5, dtype=torch.bool)])
def test_no_frame_at_all(mask: Tensor) -> None:
    for keep in (None, torch.ones_like(mask)):
        sample = sample_frames(mask, 4, seed=0, keep=keep)
        assert sample.index.tolist() == [0] * 4 and sample.weight.tolist() == [0.0] * 4
        assert sample.index.dtype == torch.int64 and sample.weight.dtype == torch.float32
        assert frame_weights(torch.full((4,), -1), mask, keep).tolist() == [0.0] * 4


# ------------------------------------------------------------------------------------------------------- frames to keep


def test_kept_frames_are_there_with_weight_one() -> None:
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[2, 3:] = False
    keep = torch.zeros_like(mask)
    keep[0, 15] = keep[1, 7] = keep[2, 2] = keep[2, 9] = True  # the last is no frame
    for seed in range(30):
        sample = sample_frames(mask, 6, seed=seed, keep=keep)
        check(sample, mask, 6)
        weights = dict(zip(sample.index.tolist(), sample.weight.tolist()))
        assert [weights.get(i) for i in (15, 23, 34)] == [1.0] * 3
        others = (int(mask.sum()) - 3) / 3
        assert sorted(weights.values()) == pytest.approx([1.0] * 3 + [others] * 3)


@pytest.mark.parametrize(("others", "of_kept", "of_others"), [(30, 4, 4), (3, 5, 3), (0, 8, 0)])
def test_more_kept_frames_than_half_the_rows(others: int, of_kept: int, of_others: int) -> None:
    """Eight rows and ten frames to keep: they get half, and what the others leave."""
    mask = torch.zeros(50, dtype=torch.bool)
    mask[: 10 + others] = True
    keep = torch.zeros_like(mask)
    keep[:10] = True
    drawn = set()
    for seed in range(40):
        sample = sample_frames(mask, 8, seed=seed, keep=keep)
        check(sample, mask, 8)
        from_kept = sample.index < 10
        assert int((from_kept & filled(sample)).sum()) == of_kept
        assert torch.allclose(sample.weight[from_kept], torch.tensor(10 / of_kept))
        assert torch.allclose(sample.weight[~from_kept], torch.tensor(others / max(1, of_others)))
        drawn |= set(sample.index[from_kept].tolist())
    assert drawn == set(range(10))  # they take turns


def test_kept_frames_leave_their_rows_to_others() -> None:
    mask, keep = torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.bool)
    keep[3] = True
    sample = sample_frames(mask, 8, seed=0, keep=keep)
    assert sorted(sample.weight.tolist()) == pytest.approx([1.0] + [19 / 7] * 7)


# -------------------------------------------------------------------------------------------------------------- unbiased


@pytest.mark.parametrize(("num_frames", "kept"), [(7, 0), (7, 2), (7, 6), (1, 0), (1, 3), (2, 6)])
def test_unbiased(num_frames: int, kept: int) -> None:
    """Every frame's mean weight is one, and so is a pair's: draws of a frame tell nothing of another's beyond the size."""
    mask, draws = some(3, 10), 4000
    keep = torch.zeros_like(mask)
    keep.view(-1)[mask.flatten().nonzero().flatten()[:kept]] = True
    weights = torch.zeros(draws, mask.numel(), dtype=torch.float64)
    for draw in range(draws):
        index, weight = sample_frames(mask, num_frames, seed=7, step=draw, keep=keep if kept else None)
        weights[draw].index_add_(0, index, weight.double())
    assert not weights[:, ~mask.flatten()].any()
    weights = weights[:, mask.flatten()]
    mean, spread = weights.mean(0), weights.std(0)
    sure = spread < 1e-6
    assert torch.allclose(mean[sure], torch.ones(int(sure.sum()), dtype=torch.float64))
    z = ((mean - 1) / (spread / math.sqrt(draws)))[~sure]
    assert float(z.abs().max()) < 4.2, z  # of about 20 numbers, one in a few thousand runs
    # Inclusion together: n (n - 1) of N (N - 1) pairs within the frames that are not kept.
    if kept == 0 and num_frames > 1:
        there = (weights > 0).double()
        count = there.shape[1]
        together = there.t() @ there / draws
        chance = num_frames * (num_frames - 1) / (count * (count - 1))
        pairs = together[~torch.eye(count, dtype=torch.bool)]
        z = (pairs - chance) / math.sqrt(chance * (1 - chance) / draws)
        assert float(z.abs().max()) < 4.7, z.abs().max()


# ------------------------------------------------------------------------------------------------------- the four numbers


NUMBERS = ("seed", "step", "micro_step", "rank")


def draw(**numbers: Any) -> list[int]:
    return sample_frames(torch.ones(64, dtype=torch.bool), 16, **{"seed": 0, **numbers}).index.tolist()


def test_the_same_numbers_draw_the_same() -> None:
    torch.manual_seed(0)
    first = draw(seed=3, step=5, micro_step=1, rank=2)
    torch.manual_seed(1)
    assert draw(seed=3, step=5, micro_step=1, rank=2) == first


def test_every_number_changes_the_draw() -> None:
    """Neither are they interchangeable, nor do runs of neighbouring seeds meet at another step."""
    draws = {}
    for name in NUMBERS:
        for value in range(0 if name == "seed" else 1, 12):
            draws[name, value] = tuple(draw(**{name: value}))
    assert len(set(draws.values())) == len(draws)
    grid = {
        tuple(draw(seed=a, step=b, micro_step=c, rank=d))
        for a, b, c, d in torch.cartesian_prod(*[torch.arange(4)] * 4).tolist()
    }
    assert len(grid) == 4**4


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_64_bits(name: str) -> None:
    values = [0, 1, -1, 1 << 32, -(1 << 32), (1 << 32) + 1, 1 << 62, (1 << 63) - 1, -(1 << 63)]
    assert len({tuple(draw(**{name: value})) for value in values}) == len(values)
    for value in values:
        assert draw(**{name: torch.tensor(value)}) == draw(**{name: value})
    assert draw(**{name: (1 << 64) - 1}) == draw(**{name: -1})  # an unsigned seed has the bits of a signed one
    assert draw(**{name: torch.tensor(7, dtype=torch.int32)}) == draw(**{name: 7})


def test_a_draw_is_what_it_was() -> None:
    """A run is resumed from its seed and step alone: the draw of a release is that of the next."""
    mask = torch.arange(100) % 5 < 3
    assert sample_frames(mask, 6, seed=1, step=2, micro_step=3, rank=4).index.tolist() == [91, 81, 40, 11, 5, 1]


# ---------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("num_frames", [1, 2, 6, 16, 100])
def test_weights_of_an_index_alone(num_frames: int) -> None:
    for seed in range(20):
        mask = some(4, 25, seed=seed)
        for keep in (None, some(4, 25, share=0.1, seed=seed + 50), some(4, 25, share=0.9, seed=seed + 70)):
            sample = sample_frames(mask, num_frames, seed=seed, keep=keep)
            index = torch.where(filled(sample), sample.index, -1)
            assert torch.equal(frame_weights(index, mask, keep), sample.weight)
            order = torch.randperm(num_frames)
            assert torch.equal(frame_weights(index[order], mask, keep), sample.weight[order])


def test_an_index_that_is_no_frame_weighs_nothing() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert frame_weights(torch.tensor([2, 0, 6, -1, -7, 5]), mask).tolist() == [0, 2.5, 0, 0, 0, 2.5]


@pytest.mark.parametrize("call", [lambda *a: sample_frames(a[0], a[2], seed=0, keep=a[1]), None])
def test_bad_arguments(call: Callable[..., Any] | None) -> None:
    mask, index = torch.ones(2, 3, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
    if call is None:
        call = lambda mask, keep, _: frame_weights(index, mask, keep)  # noqa: E731
    else:
        for number in (0, -1, 2.0, True, torch.tensor(3)):
            with pytest.raises(ValueError, match="num_frames must be a positive integer, got"):
                call(mask, None, number)
    with pytest.raises(ValueError, match="mask must be bool, got torch.int64"):
        call(mask.long(), None, 4)
    with pytest.raises(ValueError, match=r"keep must be bool of shape \(2, 3\), got torch.float32 of \(2, 3\)"):
        call(mask, mask.float(), 4)
    with pytest.raises(ValueError, match=r"keep must be bool of shape \(2, 3\), got torch.bool of \(6,\)"):
        call(mask, mask.flatten(), 4)


# ------------------------------------------------------------------------------------------------- device and torch.compile


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for the device, or for memory to be copied to it."""

    waiting = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "masked_select",
        "_unique2",
        "is_nonzero",
        "equal",
        "lift_fresh",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        assert name not in self.waiting, name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as index is a nonzero"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "waits",
    [
        lambda mask: int(mask.sum()),
        lambda mask: mask.nonzero(),
        lambda mask: mask[mask],
        lambda mask: 1 if mask.any() else 0,
        lambda mask: torch.tensor(3),
    ],
)
def test_waiting_is_seen(waits: Callable[[Tensor], Any]) -> None:
    with NoWaiting(), pytest.raises(AssertionError):
        waits(some(4, 5))


def test_nothing_waits_for_the_device() -> None:
    mask, keep, index, step = some(4, 25), some(4, 25, share=0.2, seed=9), torch.arange(-2, 6), torch.tensor(5)
    with NoWaiting():
        for kept in (None, keep):
            for number in (step, 5):
                sample_frames(mask, 8, seed=number, step=number, micro_step=number, rank=number, keep=kept)
            frame_weights(index, mask, kept)


@pytest.mark.slow
def test_compiled_once_and_the_same_draw() -> None:
    """Whatever the mask, and whatever the numbers where they are tensors."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")

    def step(mask: Tensor, keep: Tensor, seed: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        sample = sample_frames(mask, 7, seed=seed, step=number, micro_step=number * 3, rank=2, keep=keep)
        index = torch.where(sample.weight > 0, sample.index, -1)
        return *sample, frame_weights(index, mask, keep)

    torch._dynamo.reset()
    whole = torch.compile(step, backend=counter, fullgraph=True)
    for share in (0.0, 0.05, 0.5, 1.0):
        for seed in (0, -5, (1 << 63) - 1):
            args = some(3, 40, share=share), some(3, 40, share=share / 4, seed=2), *torch.tensor([seed, 11]).unbind()
            got, wanted = whole(*args), step(*args)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted))
            assert torch.equal(got[1], got[2])
    assert counter.frame_count == 1
