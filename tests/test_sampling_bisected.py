"""The compiled form of sampling draws what the reference draws."""

from __future__ import annotations

import pytest
import torch

from csm_kernels.sampling import NoiseKey, SamplingParams, gumbel_noise_ref, sample_bisected, sample_ref


def noise(rows: int, vocab: int, codebook: int = 3) -> torch.Tensor:
    key = NoiseKey(torch.arange(rows) + 11, torch.arange(rows), torch.full((rows,), 5))
    return gumbel_noise_ref(key, torch.tensor([codebook]), vocab)


@pytest.mark.parametrize("vocab", [1, 2, 17, 63, 257, 2051])
@pytest.mark.parametrize("spread", [0.01, 3.0, 40.0])
def test_same_tokens_as_the_reference(vocab: int, spread: float) -> None:
    rows = 64
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator) * spread - 5.0
    for round_number in range(6):
        uniform = torch.rand(4, rows, generator=generator)
        params = SamplingParams(
            uniform[0] * 2 + 0.1,
            torch.randint(1, vocab + 2, (rows,), generator=generator),
            torch.where(uniform[1] < 0.3, 1.0, uniform[2]),
            uniform[3] < 0.8,
        )
        drawn = noise(rows, vocab, round_number)
        assert torch.equal(sample_bisected(logits, params, drawn), sample_ref(logits, params, drawn))


def test_top_p_of_zero_and_top_k_of_one_are_greedy() -> None:
    logits = torch.randn(32, 99, generator=torch.Generator().manual_seed(0))
    drawn = noise(32, 99)
    on, ones, all_tokens = torch.ones(32, dtype=torch.bool), torch.ones(32), torch.full((32,), 99)
    for params in (
        SamplingParams(ones, all_tokens, torch.zeros(32), on),
        SamplingParams(ones, torch.ones(32, dtype=torch.int64), ones, on),
    ):
        assert torch.equal(sample_bisected(logits, params, drawn), logits.argmax(-1))


def test_ties_with_the_last_kept_token_stay() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]]).expand(400, -1).contiguous()
    params = SamplingParams(torch.ones(400), torch.full((400,), 2), torch.ones(400), torch.ones(400, dtype=torch.bool))
    seen = set(sample_bisected(logits, params, noise(400, 5)).tolist())
    assert seen == {0, 1, 2, 3}


def test_a_minus_infinity_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 0.0]]).expand(300, -1).contiguous()
    params = SamplingParams(
        torch.ones(300), torch.full((300,), 3), torch.full((300,), 0.999), torch.ones(300, dtype=torch.bool)
    )
    assert 1 not in sample_bisected(logits, params, noise(300, 3)).tolist()
