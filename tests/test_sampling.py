"""Sampling has the stock distribution, and its noise belongs to (seed, utterance, frame, codebook, token)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from csm_models import build, on_fast_path, stock, teacher_forced, text_prompt
from scipy import stats
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from csm_kernels.sampling import NoiseKey, SamplingParams, gumbel_noise_ref, philox_ref, sample_ref

ALPHA = 1e-4
"""A correct sampler fails one of these tests once in ten thousand seeds, and the seeds are fixed."""

SETTINGS = [
    {},
    {"temperature": 0.4},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.6},
    {"top_p": 0.0},
    {"temperature": 0.6, "top_k": 9},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 6, "top_p": 0.7},
]


def stock_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """``[..., V]``: what transformers would draw from, in its own order of warpers."""
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    flat = logits.float().reshape(-1, logits.shape[-1])
    return warpers(None, flat).softmax(-1).reshape(logits.shape).double()


def params(rows: int, vocab: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> SamplingParams:
    return SamplingParams(
        torch.full((rows,), temperature),
        torch.full((rows,), top_k or vocab),
        torch.full((rows,), top_p),
        torch.ones(rows, dtype=torch.bool),
    )


def keys(rows: int, seed: int = 0, frame: int = 0) -> NoiseKey:
    return NoiseKey(torch.full((rows,), seed), torch.arange(rows), torch.full((rows,), frame))


def assert_drawn_from(tokens: Tensor, probabilities: Tensor) -> None:
    """Chi-square on the counts; tokens of probability zero must not occur at all."""
    counts = torch.bincount(tokens.flatten(), minlength=len(probabilities)).double()
    assert int(counts[probabilities == 0].sum()) == 0
    expected = probabilities * counts.sum()
    rare = expected < 8
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 8:  # too few to say anything: joined to the likeliest
        observed[0] += observed[-1]
        expected[0] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    if len(expected) < 2:
        return
    p = stats.chisquare(observed.numpy(), expected.numpy() * float(observed.sum() / expected.sum())).pvalue
    assert p > ALPHA, (p, observed.tolist(), expected.tolist())


# ------------------------------------------------------------------------------------------------ the noise


@pytest.mark.parametrize(
    ("counter", "key", "word"),
    [
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], word: int) -> None:
    """The vectors that come with Random123 for philox4x32 of 10 rounds."""
    assert int(philox_ref(*(torch.tensor([value]) for value in (*counter, *key)))) == word


def test_philox_agrees_with_python_integers() -> None:
    """Against Python's own integers, for counters and keys of all sizes."""

    def philox(c: list[int], k: list[int]) -> int:
        mask = 0xFFFFFFFF
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
            k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
        return c[0]

    words = torch.randint(0, 2**32, (200, 6), generator=torch.Generator().manual_seed(0))
    ours = philox_ref(*words.unbind(1))
    assert ours.tolist() == [philox(row[:4], row[4:]) for row in words.tolist()]


def test_noise_counts_every_index() -> None:
    """Each of seed (both halves), utterance, frame, codebook and token moves the noise; nothing else does."""
    base = {"seed": 7, "utterance": 3, "frame": 5, "codebook": 2}

    def noise(**changes: int) -> Tensor:
        at = {**base, **changes}
        key = NoiseKey(*(torch.tensor([at[name]]) for name in ("seed", "utterance", "frame")))
        return gumbel_noise_ref(key, torch.tensor([at["codebook"]]), 50)[0]

    first = noise()
    assert torch.equal(first, noise())
    assert first.unique().numel() == 50
    for changes in (
        {"seed": 8},
        {"seed": 7 + 2**32},
        {"seed": 7 - 2**63},
        {"seed": -7},
        {"utterance": 4},
        {"frame": 6},
        {"codebook": 3},
        {"utterance": 5, "frame": 3},
        {"frame": 2, "codebook": 5},
    ):
        other = noise(**changes)
        assert not torch.isin(other, first).any(), changes
    assert torch.equal(
        noise(seed=7)[:20],
        gumbel_noise_ref(NoiseKey(torch.tensor([7]), torch.tensor([3]), torch.tensor([5])), torch.tensor([2]), 20)[0],
    ), "a token's noise depends on the size of the vocabulary"


def test_noise_depends_on_neither_slot_nor_batch() -> None:
    key = NoiseKey(torch.tensor([5, 6, 5, 9]), torch.tensor([0, 1, 2, 3]), torch.tensor([4, 4, 8, 8]))
    together = gumbel_noise_ref(key, torch.tensor([1]), 31)
    for row in range(4):
        alone = NoiseKey(*(part[row : row + 1] for part in key))
        assert torch.equal(gumbel_noise_ref(alone, torch.tensor([1]), 31)[0], together[row])


def test_noise_is_gumbel_and_finite() -> None:
    noise = gumbel_noise_ref(keys(400), torch.tensor([3]), 1000).flatten()
    assert torch.isfinite(noise).all()
    assert stats.kstest(noise.double().numpy(), "gumbel_r").pvalue > ALPHA
    rows = noise.view(400, 1000).double()
    for left, right in ((rows[:, :-1], rows[:, 1:]), (rows[:-1], rows[1:])):
        assert abs(float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])) < 0.008


def test_noise_at_the_ends_of_the_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    from csm_kernels import sampling

    for word in (0, 0xFFFFFFFF):
        monkeypatch.setattr(sampling, "philox_ref", lambda *args, word=word: torch.full((1, 4), word))
        assert torch.isfinite(gumbel_noise_ref(keys(1), torch.tensor([0]), 4)).all()


# ------------------------------------------------------------------------------------------------ sample_ref


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [7, 63])
def test_distribution(setting: dict[str, Any], vocab: int) -> None:
    logits = 2.0 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    rows = 20000
    noise = gumbel_noise_ref(keys(rows, seed=11), torch.tensor([1]), vocab)
    tokens = sample_ref(logits.expand(rows, -1), params(rows, vocab, **setting), noise)
    assert tokens.dtype == torch.int64
    assert_drawn_from(tokens, stock_probabilities(logits, **setting))


def test_rows_have_settings_of_their_own() -> None:
    vocab, rows = 17, 6000
    logits = 2.0 * torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    settings = [SETTINGS[1], SETTINGS[4], SETTINGS[9]]
    parts = [params(rows, vocab, **setting) for setting in settings]
    mixed = SamplingParams(*(torch.stack(fields, dim=1).flatten() for fields in zip(*parts)))
    mixed.do_sample[::7] = False
    noise = gumbel_noise_ref(keys(3 * rows, seed=2), torch.tensor([4]), vocab)
    tokens = sample_ref(logits.expand(3 * rows, -1), mixed, noise)
    assert bool((tokens[::7] == logits.argmax()).all())
    sampled = mixed.do_sample.view(rows, 3)
    for index, setting in enumerate(settings):
        drawn = tokens.view(rows, 3)[:, index][sampled[:, index]]
        assert_drawn_from(drawn, stock_probabilities(logits, **setting))


def test_greedy_takes_the_largest_whatever_the_noise() -> None:
    logits = torch.randn(64, 33, generator=torch.Generator().manual_seed(2))
    greedy = params(64, 33, temperature=50.0)._replace(do_sample=torch.zeros(64, dtype=torch.bool))
    noise = 100.0 * torch.randn(64, 33)
    assert torch.equal(sample_ref(logits, greedy, noise), logits.argmax(-1))


def test_greedy_ties_go_to_the_first_as_in_stock() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    greedy = params(1, 4)._replace(do_sample=torch.zeros(1, dtype=torch.bool))
    assert int(sample_ref(logits, greedy, torch.zeros(1, 4))) == int(logits.argmax(-1)) == 1


def test_ties_at_the_top_k_threshold_stay() -> None:
    logits = torch.tensor([3.0, 1.0, 1.0, 0.0, 1.0])
    rows = 20000
    noise = gumbel_noise_ref(keys(rows), torch.tensor([0]), 5)
    tokens = sample_ref(logits.expand(rows, -1), params(rows, 5, top_k=2), noise)
    assert_drawn_from(tokens, stock_probabilities(logits, top_k=2))
    assert set(tokens.tolist()) == {0, 1, 2, 4}


def test_top_p_of_one_keeps_the_tail() -> None:
    """The cumulative sum of a peaked distribution rounds to 1 long before its end."""
    logits = torch.full((50,), -14.0)
    logits[7] = 14.0
    noise = torch.zeros(1, 50)
    noise[0, 33] = 40.0
    assert int(sample_ref(logits[None], params(1, 50), noise)) == 33
    assert int(sample_ref(logits[None], params(1, 50, top_p=0.9999), noise)) == 7


def test_top_k_larger_than_the_vocabulary() -> None:
    logits = torch.randn(200, 9, generator=torch.Generator().manual_seed(2))
    noise = gumbel_noise_ref(keys(200), torch.tensor([0]), 9)
    assert torch.equal(sample_ref(logits, params(200, 9, top_k=50), noise), sample_ref(logits, params(200, 9), noise))


# ------------------------------------------------------------------------------------------------ end to end

ROWS = 16
CALLS = 150


def draws(model: Any, prompt: dict[str, Tensor], **options: Any) -> Tensor:
    """First frames of ``ROWS * CALLS`` utterances, ``[n, codebooks]``."""
    batch = {key: value.expand(ROWS, -1) for key, value in prompt.items()}
    made = []
    with on_fast_path(model, calls=CALLS):
        for call in range(CALLS):
            utterances = torch.arange(ROWS) + ROWS * call
            made.append(model.generate(**batch, max_new_tokens=1, seed=99, utterance_ids=utterances, **options)[:, 0])
    return torch.cat(made)


@pytest.mark.parametrize(
    "setting", [{}, {"temperature": 0.7, "top_k": 12}, {"temperature": 1.4, "top_p": 0.75}], ids=str
)
def test_codebook_0_has_stocks_distribution(fast: Any, setting: dict[str, Any]) -> None:
    model, prompt = fast(), text_prompt((6,))
    first = torch.zeros(1, 1, 4, dtype=torch.long)
    _, logits, _ = teacher_forced(model, prompt, first)
    tokens = draws(model, prompt, do_sample=True, depth_decoder_do_sample=False, **{"top_k": 0, **setting})
    assert_drawn_from(tokens[:, 0], stock_probabilities(logits[0, 0], **setting))


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}], ids=str)
def test_later_codebooks_have_stocks_distribution(fast: Any, setting: dict[str, Any]) -> None:
    """Codebook 1 given the greedy codebook 0, and codebook 2 over all ways to get there."""
    model, prompt = fast(), text_prompt((6,))
    vocab = model.config.vocab_size
    options = {f"depth_decoder_{key}": value for key, value in {"top_k": 0, **setting}.items()}
    tokens = draws(model, prompt, do_sample=False, depth_decoder_do_sample=True, **options)
    assert tokens[:, 0].unique().numel() == 1
    frames = torch.zeros(vocab, 1, 4, dtype=torch.long)
    frames[:, 0, 0], frames[:, 0, 1] = tokens[0, 0], torch.arange(vocab)
    batch = {key: value.expand(vocab, -1) for key, value in prompt.items()}
    _, _, depth = teacher_forced(model, batch, frames)
    one = stock_probabilities(depth[0, 0, 0], **setting)
    two = one @ stock_probabilities(depth[:, 0, 1], **setting)
    assert_drawn_from(tokens[:, 1], one)
    assert_drawn_from(tokens[:, 2], two)


def test_stocks_own_draws_pass_the_same_test(fast: Any) -> None:
    """The test itself is sound: stock's multinomial passes it, a wrong temperature does not."""
    model, prompt = fast(), {key: value.expand(500, -1) for key, value in text_prompt((6,)).items()}
    _, logits, _ = teacher_forced(model, text_prompt((6,)), torch.zeros(1, 1, 4, dtype=torch.long))
    options = {"do_sample": True, "depth_decoder_do_sample": False, "max_new_tokens": 1}
    tokens = torch.cat([stock(model, **prompt, top_k=0, **options)[:, 0, 0] for _ in range(8)])
    assert_drawn_from(tokens, stock_probabilities(logits[0, 0]))
    with pytest.raises(AssertionError):
        assert_drawn_from(tokens, stock_probabilities(logits[0, 0], temperature=1.4))


def test_tokens_are_the_argmax_of_logits_and_noise(fast: Any) -> None:
    """The noise contract as a whole: every token of every frame, from stock's logits and the documented counters."""
    model, prompt = fast("biases"), text_prompt((5, 8, 3))
    seed, utterances = 2**40 + 17, torch.tensor([4, 1000, 2])
    options = {"do_sample": True, "top_k": 0, "temperature": 0.9, "max_new_tokens": 5, "seed": seed}
    depth_options = {"depth_decoder_do_sample": True, "depth_decoder_top_k": 0, "depth_decoder_temperature": 1.3}
    tokens = model.generate(**prompt, **options, **depth_options, utterance_ids=utterances)
    _, first, depth = teacher_forced(model, prompt, tokens)
    vocab = model.config.vocab_size
    for frame in range(5):
        key = NoiseKey(torch.full((3,), seed), utterances, torch.full((3,), frame))
        noise = gumbel_noise_ref(key, torch.tensor([0]), vocab)
        assert torch.equal((first[:, frame] / 0.9 + noise).argmax(-1), tokens[:, frame, 0])
        for codebook in range(1, 4):
            noise = gumbel_noise_ref(key, torch.tensor([codebook]), vocab)
            wanted = (depth[:, frame, codebook - 1] / 1.3 + noise).argmax(-1)
            assert torch.equal(wanted, tokens[:, frame, codebook]), (frame, codebook)


SAMPLED = {
    "do_sample": True,
    "top_k": 20,
    "temperature": 0.9,
    "depth_decoder_do_sample": True,
    "depth_decoder_top_k": 25,
    "max_new_tokens": 5,
}


def test_same_seed_same_tokens_whatever_the_batch(shared: Any) -> None:
    model = shared("llama3")
    lengths = [5, 9, 3, 7, 4]
    prompt = text_prompt(lengths)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    together = model.generate(**prompt, **SAMPLED, seed=7)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, -length:], **SAMPLED, seed=7, utterance_ids=[row])
        assert torch.equal(alone[0], together[row]), row
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = model.generate(input_ids=ids[order], attention_mask=mask[order], **SAMPLED, seed=7, utterance_ids=order)
    assert torch.equal(shuffled, together[order])
    seeds = torch.tensor([7, 8, 7, 8, 7])
    mixed = model.generate(**prompt, **SAMPLED, seed=seeds)
    assert torch.equal(mixed[::2], together[::2])
    assert not torch.equal(mixed[1], together[1])


def test_rows_with_equal_prompts_speak_differently(shared: Any) -> None:
    prompt = {key: value.expand(4, -1) for key, value in text_prompt((5,)).items()}
    tokens = shared("llama3").generate(**prompt, **SAMPLED, seed=3)
    assert len({tuple(row.flatten().tolist()) for row in tokens}) == 4
    same = shared("llama3").generate(**prompt, **SAMPLED, seed=3, utterance_ids=[6] * 4)
    assert bool((same == same[:1]).all())


def test_frames_have_noise_of_their_own(shared: Any) -> None:
    """A flat distribution is noise alone: a frame that repeats the one before means noise that repeats."""
    tokens = shared("llama3").generate(
        **text_prompt((5,)), **{**SAMPLED, "temperature": 1e4, "top_k": 0, "max_new_tokens": 30}, seed=5
    )
    assert tokens[0, :, 0].unique().numel() > 12


def test_torchs_seed_decides_without_a_seed(shared: Any) -> None:
    model, prompt = shared("llama3"), text_prompt((5, 8))
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(model.generate(**prompt, **SAMPLED))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert not torch.equal(model.generate(**prompt, **SAMPLED), made[2]), "a second call repeats the first"


def test_seeds_differ(shared: Any) -> None:
    model, prompt = shared("llama3"), text_prompt((5,))
    made = {
        tuple(model.generate(**prompt, **SAMPLED, seed=seed).flatten().tolist())
        for seed in (0, 1, -1, 2**31, 2**32, 2**32 + 1, 2**62)
    }
    assert len(made) == 7


def test_a_seed_does_not_touch_torchs_generator(shared: Any) -> None:
    state = torch.get_rng_state()
    shared("llama3").generate(**text_prompt((5,)), **SAMPLED, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_does_not_touch_torchs_generator(shared: Any) -> None:
    state = torch.get_rng_state()
    shared("llama3").generate(**text_prompt((5,)), do_sample=False, depth_decoder_do_sample=False, max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_of_two_decoders_samples(fast: Any) -> None:
    model, prompt = fast(), text_prompt((5,))
    greedy = model.generate(**prompt, do_sample=False, depth_decoder_do_sample=False, max_new_tokens=1)
    first = {
        tuple(
            model.generate(**prompt, do_sample=False, depth_decoder_do_sample=True, max_new_tokens=1, seed=s)[
                0, 0
            ].tolist()
        )
        for s in range(8)
    }
    assert {row[0] for row in first} == {int(greedy[0, 0, 0])}
    assert len(first) == 8


@pytest.mark.slow
def test_compiled_sampling_equals_eager(compiled: Any) -> None:
    """The same seed gives the same speech however frames are run."""
    from csm_runtime import accelerate

    model, eager = compiled(), accelerate(build(), mode="eager", progress=False)
    for prompt in (text_prompt((5,)), text_prompt((4, 9, 6))):
        ours = model.generate(**prompt, **SAMPLED, seed=12)
        assert torch.equal(ours, eager.generate(**prompt, **SAMPLED, seed=12))
