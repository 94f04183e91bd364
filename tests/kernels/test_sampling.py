"""Sampling in one kernel: the specification's tokens, its noise bit for bit, the exact distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from csm_kernels import sampling
from csm_kernels._target import interpreting, tl, triton
from csm_kernels._tiles import override_tiles
from csm_kernels.sampling import NoiseKey, SamplingParams, gumbel_noise_ref, philox_ref, sample, sample_ref
from csm_kernels.testing import assert_untouched, guarded

ALPHA = 1e-4
"""A correct sampler fails one of these tests once in ten thousand seeds, and the seeds are fixed."""
DRAWS = 600 if interpreting() else 50000
"""A row takes 12 ms in the interpreter, 60 with top-p."""


def keys(rows: int, device: torch.device, seed: int = 0) -> NoiseKey:
    """Seeds, utterances and frames of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    small = torch.randint(0, 2**33, (2, rows), generator=generator)
    return NoiseKey(*(part.to(device) for part in (wide, small[0], small[1])))


def params_of(
    rows: int,
    device: torch.device,
    temperature: float = 1.0,
    top_k: int = 65536,
    top_p: float = 1.0,
    do_sample: bool = True,
) -> SamplingParams:
    parts = (temperature, top_k, top_p, do_sample)
    return SamplingParams(*(torch.full((rows,), part, device=device) for part in parts))


def codebook_of(index: int, device: torch.device) -> Tensor:
    return torch.tensor([index], device=device)


def is_near_tie(logits: Tensor, params: SamplingParams, noise: Tensor, row: int, ours: int, wanted: int) -> bool:
    """Whether fp32 cannot tell two tokens apart: sums of score and noise within 1e-5, or the mass that top-p cuts at."""
    scores = logits[row].double() / params.temperature[row].double()
    sums = scores + noise[row].double()
    a, b = float(sums[ours]), float(sums[wanted])
    if abs(a - b) <= 1e-5 * max(abs(a), abs(b)):
        return True
    kept = scores >= scores.sort(descending=True).values[int(params.top_k[row].clamp(1, len(scores))) - 1]
    mass = torch.softmax(scores.masked_fill(~kept, float("-inf")), -1)
    before = float(mass[scores > scores[ours if a > b else wanted]].sum())
    top_p = float(params.top_p[row])
    return top_p < 1 and abs(before - top_p) <= 1e-5 * top_p


def check(logits: Tensor, params: SamplingParams, key: NoiseKey, codebook: int = 3) -> Tensor:
    """The specification's tokens; at most one in a thousand differs, by a near tie. Returns ours."""
    where = codebook_of(codebook, logits.device)
    ours, flags = sample(logits, params, key, where)
    assert ours.dtype == torch.int64 and flags.dtype == torch.int32 and not flags.any()
    noise = gumbel_noise_ref(key, where, logits.shape[1])
    wanted = sample_ref(logits, params, noise)
    differ = (ours != wanted).nonzero().flatten().tolist()
    for row in differ:
        assert is_near_tie(logits, params, noise, row, int(ours[row]), int(wanted[row])), (
            f"row {row}: token {int(ours[row])}, the specification draws {int(wanted[row])}"
        )
    assert len(differ) <= 1 + len(ours) // 1000, f"{len(differ)} near ties in {len(ours)} rows"
    return ours


# ------------------------------------------------------------------------------------------------ the noise


@triton.jit
def _noise_kernel(
    words_ptr, noise_ptr, first_ptr, seed_ptr, utterance_ptr, frame_ptr, codebook_ptr, BLOCK: tl.constexpr
):
    tokens = tl.load(first_ptr).to(tl.int32) + tl.arange(0, BLOCK)
    seed, utterance, frame = tl.load(seed_ptr), tl.load(utterance_ptr), tl.load(frame_ptr)
    codebook = tl.load(codebook_ptr)
    words = sampling._words(tokens, seed, utterance, frame, codebook)
    tl.store(words_ptr + tl.arange(0, BLOCK), words.to(tl.int64))
    tl.store(noise_ptr + tl.arange(0, BLOCK), sampling._noise(tokens, seed, utterance, frame, codebook))


def noise_of(device: torch.device, first: int, key: NoiseKey, codebook: int, count: int = 16) -> tuple[Tensor, Tensor]:
    words = torch.zeros(count, dtype=torch.int64, device=device)
    noise = torch.zeros(count, device=device)
    start = torch.tensor([first], device=device)
    _noise_kernel[(1,)](words, noise, start, *key, codebook_of(codebook, device), BLOCK=count)
    return words, noise


@pytest.mark.parametrize(
    ("counter", "key", "word"),
    [
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
    ],
)
def test_words_have_the_known_answers(
    device: torch.device, counter: tuple[int, ...], key: tuple[int, ...], word: int
) -> None:
    """The vectors that come with Random123: counter (token, codebook, frame, utterance), key the seed's halves."""
    seed = key[0] + (key[1] << 32)
    parts = (seed - 2**64 if seed >= 2**63 else seed, counter[3], counter[2])
    where = NoiseKey(*(torch.tensor([part], device=device) for part in parts))
    assert int(noise_of(device, counter[0], where, counter[1])[0][0]) == word


def test_words_and_noise_are_the_references(device: torch.device) -> None:
    many = keys(20, device)
    for row in range(20):
        key = NoiseKey(*(part[row : row + 1] for part in many))
        words, noise = noise_of(device, 0, key, row, count=256)
        seed, utterance, frame = (part.cpu() for part in key)
        wanted = philox_ref(
            torch.arange(256),
            torch.tensor([row]),
            frame & 0xFFFFFFFF,
            utterance & 0xFFFFFFFF,
            seed & 0xFFFFFFFF,
            (seed >> 32) & 0xFFFFFFFF,
        )
        assert torch.equal(words.cpu(), wanted)
        reference = gumbel_noise_ref(key, codebook_of(row, device), 256)[0]
        assert torch.allclose(noise, reference, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ the specification


@pytest.mark.slow
@pytest.mark.parametrize(("vocab", "rows"), [(2051, 120), (51, 900), (257, 300)])
def test_tokens_of_the_specification(device: torch.device, vocab: int, rows: int) -> None:
    """Random logits, peaked and flat, random settings; a sixth of the rows greedy."""
    generator = torch.Generator().manual_seed(vocab)
    spread = torch.rand(rows, 1, generator=generator) * 4
    logits = (torch.randn(rows, vocab, generator=generator) * spread).to(device)
    uniform = torch.rand(4, rows, generator=generator)
    params = SamplingParams(
        (uniform[0] * 1.9 + 0.1).to(device),
        torch.randint(1, vocab + 2, (rows,), generator=generator).to(device),
        torch.where(uniform[1] < 0.9, 1.0, uniform[2]).to(device),
        (uniform[3] > 1 / 6).to(device),
    )
    check(logits, params, keys(rows, device))


@pytest.mark.parametrize(("vocab", "temperature"), [(2051, 0.9), (63, 0.1), (63, 2.0)])
def test_settings(device: torch.device, vocab: int, temperature: float) -> None:
    """Every top-k with every top-p, a row each."""
    grid = [(k, p) for k in (1, 2, 50, vocab - 1, vocab) for p in (0.0, 0.1, 0.5, 0.9, 1.0)]
    rows = len(grid)
    params = params_of(rows, device, temperature)._replace(
        top_k=torch.tensor([k for k, _ in grid], device=device),
        top_p=torch.tensor([p for _, p in grid], device=device),
    )
    logits = torch.randn(rows, vocab, device=device) * 2.5 - 4.0
    tokens = check(logits, params, keys(rows, device))
    peaks = logits.argmax(-1)
    alone = torch.tensor([k == 1 or p == 0.0 for k, p in grid], device=device)
    assert torch.equal(tokens[alone], peaks[alone])


@pytest.mark.parametrize("vocab", [1, 2, 127, 999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vocabularies_and_dtypes(device: torch.device, vocab: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(8, vocab, device=device) * 2).to(dtype)
    params = params_of(8, device, 0.9)._replace(
        top_k=torch.tensor([1, 1, 2, 5, 50, 50, vocab, 2**40], device=device),
        top_p=torch.tensor([1.0, 0.5] * 4, device=device),
    )
    check(logits, params, keys(8, device))


def test_a_vocabulary_beyond_the_registers(device: torch.device) -> None:
    logits = torch.randn(3, 65536, device=device)
    params = params_of(3, device)._replace(
        top_k=torch.tensor([1, 1000, 65536], device=device),
        do_sample=torch.tensor([False, True, True], device=device),
    )
    check(logits, params, keys(3, device))


def mixed(rows: int, device: torch.device) -> SamplingParams:
    """Every way through the kernel, row after row."""
    return params_of(rows, device)._replace(
        top_k=torch.tensor([300, 5, 40, 1, 40, 7], device=device)[torch.arange(rows, device=device) % 6],
        top_p=torch.tensor([1.0, 1.0, 0.7, 1.0, 1.0, 0.9], device=device)[torch.arange(rows, device=device) % 6],
        do_sample=torch.arange(rows, device=device) % 6 != 4,
    )


@pytest.mark.parametrize("block", [64, 256, 512])
def test_block_by_block_or_whole(device: torch.device, block: int) -> None:
    logits = torch.randn(12, 257, device=device)
    with override_tiles("sampling", BLOCK_V=block):
        check(logits, mixed(12, device), keys(12, device))


@pytest.mark.parametrize("block", [64, 128])
def test_ties(device: torch.device, block: int) -> None:
    """Logits of few values, so that thresholds fall into ties; zeros of both signs are one value."""
    rows, vocab = 24, 90
    logits = torch.randint(-2, 3, (rows, vocab), device=device).float()
    logits = torch.where(torch.rand(rows, vocab, device=device) < 0.5, logits, -logits)
    assert bool((torch.signbit(logits) & (logits == 0)).any())
    params = mixed(rows, device)._replace(temperature=torch.rand(rows, device=device) + 0.5)
    with override_tiles("sampling", BLOCK_V=block):
        tokens = check(logits, params, keys(rows, device))
    greedy = ~params.do_sample
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(tokens[greedy], first[greedy])


def test_ties_with_the_last_kept_token_stay(device: torch.device) -> None:
    rows = DRAWS // 8
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]], device=device).expand(rows, -1).contiguous()
    assert set(check(logits, params_of(rows, device, top_k=2), keys(rows, device)).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("block", [16, 64])
def test_sums_that_tie(device: torch.device, block: int) -> None:
    """Scores so large that rounding makes sums equal: the first token wins, and the next is tried when it is struck."""
    logits = (2e7 + 2.0 * torch.randint(0, 4, (24, 40), device=device).float()).sort(-1).values
    params = params_of(24, device)._replace(top_k=torch.tensor([2, 5, 9, 40] * 6, device=device))
    key, where = keys(24, device), codebook_of(3, device)
    with override_tiles("sampling", BLOCK_V=block):
        tokens, _ = sample(logits, params, key, where)
    assert torch.equal(tokens, sample_ref(logits, params, gumbel_noise_ref(key, where, 40)))


def rounds_needed(logits: Tensor, params: SamplingParams, noise: Tensor) -> Tensor:
    """How many winners of the race over all tokens are struck before one is among the top k, and one."""
    scores = logits / params.temperature[:, None]
    kth = scores.sort(-1, descending=True).values.gather(1, params.top_k[:, None] - 1)
    sums = scores + noise
    best = sums.masked_fill(scores < kth, float("-inf")).amax(-1, keepdim=True)
    return (sums > best).sum(-1) + 1


@pytest.mark.parametrize("block", [256, 512])
@pytest.mark.parametrize("rounds", [1, 8, 32])
def test_flat_logits(device: torch.device, rounds: int, block: int) -> None:
    """Where the k best hold little of the mass, the race is given up after ``rounds`` and the threshold searched for."""
    logits = torch.randn(12, 300, device=device) * 0.05
    params = params_of(12, device)._replace(top_k=torch.tensor([2, 5, 20, 150] * 3, device=device))
    key = keys(12, device)
    needed = rounds_needed(logits, params, gumbel_noise_ref(key, codebook_of(3, device), 300))
    assert int((needed > 8).sum()) >= 3 and int((needed <= 8).sum()) >= 3
    with override_tiles("sampling", ROUNDS=rounds, BLOCK_V=block):
        check(logits, params, key)


def test_flat_logits_at_csms_vocabulary(device: torch.device) -> None:
    logits = torch.randn(8, 2051, device=device) * 0.05
    params, key = params_of(8, device, 0.9, top_k=50), keys(8, device)
    needed = rounds_needed(logits, params, gumbel_noise_ref(key, codebook_of(3, device), 2051))
    assert int((needed > 8).sum()) >= 2
    check(logits, params, key)


def test_all_logits_equal(device: torch.device) -> None:
    logits = torch.full((12, 130), -7.5, device=device)
    tokens = check(logits, mixed(12, device), keys(12, device))
    assert (tokens[~mixed(12, device).do_sample] == 0).all()


def test_greedy_needs_no_settings(device: torch.device) -> None:
    logits = torch.randn(3, 33, device=device)
    params = SamplingParams(
        torch.tensor([0.0, -1.0, float("nan")], device=device),
        torch.tensor([0, -5, 2**60], device=device),
        torch.tensor([float("nan"), -1.0, 2.0], device=device),
        torch.zeros(3, dtype=torch.bool, device=device),
    )
    tokens, flags = sample(logits, params, keys(3, device), codebook_of(0, device))
    assert torch.equal(tokens, logits.argmax(-1)) and not flags.any()


# ------------------------------------------------------------------------------------------------ the distribution


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [{}, {"temperature": 0.6, "top_k": 4}, {"temperature": 1.5, "top_p": 0.8}, {"top_k": 6, "top_p": 0.7}],
    ids=str,
)
def test_distribution(device: torch.device, setting: dict[str, Any]) -> None:
    """Chi-square over frames of one seed; tokens of probability zero never occur."""
    vocab = 9
    logits = torch.linspace(-1.0, 1.0, vocab, device=device)[torch.tensor([3, 7, 0, 8, 1, 5, 6, 2, 4])]
    logits[2] = float("-inf")
    draws = DRAWS // 3 if "top_p" in setting else DRAWS  # the searches take five times as long
    key = NoiseKey(*(torch.full((draws,), part, device=device) for part in (77, 3)), torch.arange(draws, device=device))
    rows = logits.expand(draws, -1).contiguous()
    tokens, flags = sample(rows, params_of(draws, device, **setting), key, codebook_of(1, device))
    assert not flags.any()
    scores = logits.double().cpu() / setting.get("temperature", 1.0)
    kth = scores.sort(descending=True).values[min(setting.get("top_k", vocab), vocab) - 1]
    wanted = torch.softmax(scores.masked_fill(scores < kth, float("-inf")), -1)
    ranked, order = wanted.sort(descending=True)
    dropped = order[ranked.cumsum(-1) - ranked >= setting.get("top_p", 1.0)] if "top_p" in setting else []
    wanted[dropped] = 0.0
    wanted = wanted / wanted.sum()
    counts = torch.bincount(tokens.cpu(), minlength=vocab).double()
    assert counts[wanted == 0].sum() == 0
    possible = wanted * draws >= 5
    observed, expected = counts[possible], wanted[possible]
    assert len(expected) >= 3
    expected = expected * (observed.sum() / expected.sum())
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > ALPHA


def test_a_minus_infinity_is_never_drawn(device: torch.device) -> None:
    rows = 32
    logits = torch.tensor([[0.0, float("-inf"), 0.0]], device=device).expand(rows, -1).contiguous()
    params = params_of(rows, device)._replace(
        top_k=torch.tensor([2, 3], device=device).repeat(rows // 2),
        top_p=torch.tensor([1.0, 1.0, 0.999, 0.5], device=device).repeat(rows // 4),
    )
    tokens, flags = sample(logits, params, keys(rows, device), codebook_of(0, device))
    assert set(tokens.tolist()) == {0, 2} and not flags.any()


def test_the_same_in_any_slot_and_batch(device: torch.device) -> None:
    logits, params, key = torch.randn(12, 200, device=device), mixed(12, device), keys(12, device)
    together = check(logits, params, key)
    order = torch.randperm(12)[:5].to(device)
    some = sample(
        logits[order],
        SamplingParams(*(part[order] for part in params)),
        NoiseKey(*(part[order] for part in key)),
        codebook_of(3, device),
    )[0]
    assert torch.equal(some, together[order])


def test_noise_belongs_to_the_token(device: torch.device) -> None:
    """Logits moved about leave each token its noise, as does a larger vocabulary."""
    rows, vocab = 12, 60
    logits, params, key = torch.randn(rows, vocab, device=device), mixed(rows, device), keys(rows, device)
    noise = gumbel_noise_ref(key, codebook_of(3, device), vocab)
    order = torch.stack([torch.randperm(vocab) for _ in range(rows)]).to(device)
    moved = logits.gather(1, order)
    assert not torch.equal(check(moved, params, key), check(logits, params, key))
    plain = params_of(rows, device)
    assert torch.equal(check(moved, plain, key), (moved + noise).argmax(-1))
    larger = torch.cat([logits, torch.full((rows, 300), float("-inf"), device=device)], 1)
    assert torch.equal(check(larger, params, key), check(logits, params, key))


def test_codebooks_have_noise_of_their_own(device: torch.device) -> None:
    logits, params, key = torch.zeros(20, 500, device=device), params_of(20, device), keys(20, device)
    assert (check(logits, params, key, codebook=0) != check(logits, params, key, codebook=1)).sum() > 15


# ------------------------------------------------------------------------------------------------ broken rows


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("triton_runs", [True, False])
def test_broken_rows_are_flagged_and_alone(
    device: torch.device, block: int, triton_runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan, inf = float("nan"), float("inf")
    logits, params, key = torch.randn(14, 99, device=device), mixed(14, device), keys(14, device)
    where = codebook_of(3, device)
    healthy, _ = sample(logits, params, key, where)
    bad = [0, 1, 2, 4, 7, 9, 10]
    for row, value in zip(bad, (nan, nan, inf, nan, nan, inf, inf)):
        logits[row, [98, 0, 50, 17, 3, 98, 0][bad.index(row)]] = value
    logits[12], logits[13] = -inf, nan
    logits[5, 3:70] = -inf
    monkeypatch.setattr(sampling, "runs_triton", lambda *_: triton_runs)
    with override_tiles("sampling", BLOCK_V=block):
        tokens, flags = sample(logits, params, key, where)
    bad += [12, 13]
    assert flags.nonzero().flatten().tolist() == sorted(bad) and int(flags.max()) == 1
    assert (tokens[bad] == 0).all()
    unchanged = [3, 6, 8, 11]
    assert torch.equal(tokens[unchanged], healthy[unchanged])
    assert 0 <= int(tokens[5]) < 3 or int(tokens[5]) >= 70


def test_without_triton_the_specification_runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, params, key = torch.randn(12, 200, device=device), mixed(12, device), keys(12, device)
    tokens, _ = sample(logits, params, key, codebook_of(3, device))
    monkeypatch.setattr(sampling, "runs_triton", lambda *_: False)
    assert torch.equal(sample(logits, params, key, codebook_of(3, device))[0], tokens)


# ------------------------------------------------------------------------------------------------ the rest


def test_strides_are_walked_and_not_copied(device: torch.device) -> None:
    base = torch.randn(24, 3, 130, device=device)
    logits = base[::2, 1, 7:107]
    assert logits.stride() == (780, 1)
    check(logits, mixed(12, device), keys(12, device))
    check(base[0, 0, :100].expand(12, -1), mixed(12, device), keys(12, device))


@pytest.mark.parametrize("vocab", [63, 1024])
def test_every_output_is_written_and_nothing_else(device: torch.device, vocab: int) -> None:
    logits = torch.randn(6, vocab, device=device)
    logits[3, vocab - 1] = float("nan")
    tokens, tokens_whole = guarded((6,), torch.int64, device)
    flags, flags_whole = guarded((6,), torch.int32, device)
    flags.fill_(5)
    where = codebook_of(3, device)
    sampling.launch_sample(logits, mixed(6, device), keys(6, device), where, tokens, flags)
    assert ((tokens >= 0) & (tokens < vocab)).all()
    assert flags.tolist() == [5, 5, 5, 1, 5, 5], "a flag gathers: what is healthy leaves it as it was"
    sampling.launch_sample(logits, mixed(6, device), keys(6, device), where, tokens)
    assert_untouched(tokens_whole), assert_untouched(flags_whole)


def test_the_same_every_time(device: torch.device) -> None:
    logits, params, key = torch.randn(6, 999, device=device), mixed(6, device), keys(6, device)
    first = check(logits, params, key)
    assert all(torch.equal(sample(logits, params, key, codebook_of(3, device))[0], first) for _ in range(3))


@pytest.mark.dispatcher
def test_the_op_is_sound(device: torch.device) -> None:
    arguments = (torch.randn(3, 63, device=device), *mixed(3, device), *keys(3, device), codebook_of(1, device))
    torch.library.opcheck(torch.ops.csm_kernels.sample.default, arguments)


@pytest.mark.slow
@pytest.mark.dispatcher
def test_compiles_whole(device: torch.device) -> None:
    logits, params, key = torch.randn(6, 64, device=device), mixed(6, device), keys(6, device)
    where = codebook_of(1, device)

    def step(logits: Tensor) -> Tensor:
        tokens, flags = sample(logits * 2, params, key, where)
        return tokens + flags

    assert torch.equal(torch.compile(step, fullgraph=True)(logits), step(logits))


def test_empty(device: torch.device) -> None:
    tokens, flags = sample(
        torch.zeros(0, 9, device=device), params_of(0, device), keys(0, device), codebook_of(0, device)
    )
    assert tokens.shape == flags.shape == (0,)


@pytest.mark.parametrize(
    ("logits", "changes", "message"),
    [
        (torch.ones(8), {}, "logits must be"),
        (torch.ones(2, 8, dtype=torch.int64), {}, "logits must be"),
        (torch.ones(2, 0), {}, "logits must be of 1"),
        (torch.ones(2, 65537), {}, "logits must be of 1"),
        (torch.ones(8, 2).t(), {}, "logits must have unit stride"),
        (torch.ones(3, 8), {}, "temperature must be"),
        (torch.ones(2, 8), {"temperature": torch.ones(2).double()}, "temperature must be"),
        (torch.ones(2, 8), {"top_k": torch.ones(2, dtype=torch.int32)}, "top_k must be"),
        (torch.ones(2, 8), {"top_p": torch.ones(1).expand(2)}, "top_p must be"),
        (torch.ones(2, 8), {"do_sample": torch.ones(2)}, "do_sample must be"),
        (torch.ones(2, 8), {"frame": torch.ones(2)}, "frame must be"),
        (torch.ones(2, 8), {"seed": torch.ones(3, dtype=torch.int64)}, "seed must be"),
        (torch.ones(2, 8), {"codebook": torch.ones(2, dtype=torch.int64)}, "codebook must be"),
    ],
)
def test_bad_arguments(device: torch.device, logits: Tensor, changes: dict[str, Tensor], message: str) -> None:
    params, key, codebook = params_of(2, device), keys(2, device), changes.get("codebook", codebook_of(0, device))
    moved = {name: tensor.to(device) for name, tensor in changes.items()}
    params = params._replace(**{name: tensor for name, tensor in moved.items() if name in params._fields})
    key = key._replace(**{name: tensor for name, tensor in moved.items() if name in key._fields})
    with pytest.raises(ValueError, match=message):
        sample(logits.to(device), params, key, codebook.to(device))
