"""Sampling one token per row: temperature, top-k, top-p, greedy, and noise that belongs to the token.

The noise contract: the Gumbel noise of a token is a pure function of (seed, utterance, frame, codebook, token id),
computed with Philox-4x32-10 from the counter ``(token, codebook, frame, utterance)`` and the 64-bit seed as key. So the
same seed gives the same speech on any batch slot and batch size, and a changed rank order of the logits never moves
the noise of another token. The generator is the one Triton ships (``tl.philox``), so kernels can repeat it bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from csm_kernels._compiled import in_memory

_MULT_A, _MULT_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


class SamplingParams(NamedTuple):
    """Sampling parameters as device tensors, one entry per row, so that changing them never recompiles.

    ``temperature`` ``[B]`` fp32 > 0; ``top_k`` ``[B]`` int64 >= 1 (the vocabulary size switches it off); ``top_p``
    ``[B]`` fp32 in [0, 1] (1 switches it off); ``do_sample`` ``[B]`` bool, False means argmax.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    do_sample: Tensor


class NoiseKey(NamedTuple):
    """What the noise of a row depends on besides codebook and token: ``seed``, ``utterance``, ``frame``, ``[B]`` int64.

    Only the low 32 bits of ``utterance`` and ``frame`` count; all 64 of ``seed`` do.
    """

    seed: Tensor
    utterance: Tensor
    frame: Tensor


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * b`` for 32-bit values held in int64, without a signed overflow."""
    low_part, high_part = a * (b & 0xFFFF), a * (b >> 16)
    high = (high_part + (low_part >> 16)) >> 16
    low = (low_part + ((high_part & 0xFFFF) << 16)) & _MASK
    return high, low


def philox_ref(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """The first output word of Philox-4x32-10, as int64 in ``[0, 2**32)``; arguments broadcast.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
    """
    for _ in range(10):
        high_b, low_b = _mul_hi_lo(_MULT_B, c2)
        high_a, low_a = _mul_hi_lo(_MULT_A, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _WEYL_A) & _MASK, (k1 + _WEYL_B) & _MASK
    return c0


def gumbel_noise_ref(key: NoiseKey, codebook: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise for every token of one codebook.

    Args:
        key: the rows' seeds, utterances and frames, ``[B]`` each.
        codebook: one-element int64 tensor.
        vocab: number of tokens.

    Returns:
        ``[B, vocab]`` fp32, finite.
    """
    token = torch.arange(vocab, device=key.seed.device)[None, :]
    word = philox_ref(
        token,
        codebook.reshape(1, 1),
        (key.frame & _MASK)[:, None],
        (key.utterance & _MASK)[:, None],
        (key.seed & _MASK)[:, None],
        ((key.seed >> 32) & _MASK)[:, None],
    )
    # The winner of a Gumbel race has a small exponential, so the uniform is kept precise near 0 and clipped near 1.
    uniform = ((word.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def sample_ref(logits: Tensor, params: SamplingParams, noise: Tensor) -> Tensor:
    """One token per row.

    As the stock generators do it: divide by the temperature, keep the ``top_k`` largest (ties with the last one stay),
    then the smallest set of the largest whose mass reaches ``top_p``, then draw from what is left, here by
    Gumbel-max. Rows with ``do_sample`` False take the argmax of the raw logits.

    Args:
        logits: ``[B, V]`` fp32, finite.
        params: one entry per row.
        noise: ``[B, V]`` fp32 from :func:`gumbel_noise_ref`.

    Returns:
        ``[B]`` int64.
    """
    scores = logits.float() / params.temperature[:, None]
    ranked = torch.sort(scores, dim=-1, descending=True).values
    last = params.top_k.clamp(1, scores.shape[-1])[:, None] - 1
    k_threshold = ranked.gather(-1, last)
    ranked = ranked.masked_fill(ranked < k_threshold, float("-inf"))
    mass = torch.softmax(ranked, dim=-1)
    kept = ((mass.cumsum(-1) - mass) < params.top_p[:, None]).sum(-1, keepdim=True).clamp(min=1)
    # top_p = 1 must keep everything top_k kept: the cumulative sum may round to 1 before its last terms.
    p_threshold = torch.where(params.top_p[:, None] < 1.0, ranked.gather(-1, kept - 1), k_threshold)
    threshold = torch.maximum(k_threshold, p_threshold)
    drawn = torch.where(scores < threshold, float("-inf"), scores + noise).argmax(-1)
    return torch.where(params.do_sample, drawn, logits.argmax(-1))


def sample_bisected(logits: Tensor, params: SamplingParams, noise: Tensor) -> Tensor:
    """The same draw without a sort, written for ``torch.compile`` on a CPU. Arguments as :func:`sample_ref`.

    Both thresholds are found digit by digit in an order-preserving integer key: 8 counting rounds for top-k and 8 summing
    rounds for top-p over a row that stays in the L1 cache, where a sort of 2051 logits takes 0.27 ms, 8 ms a frame.
    Rows without ``do_sample`` take the argmax. Ties with the last kept token stay, for top-p too.
    """
    scores = logits.float() / params.temperature[:, None]
    bits = scores.view(torch.int32)
    key = in_memory(torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    vocab = scores.shape[-1]
    wanted = params.top_k.clamp(1, vocab).float()[:, None]
    k_key = _largest_key(key, torch.ones_like(scores), wanted)
    kept = key >= k_key
    weight = in_memory(torch.where(kept, torch.exp(scores - scores.amax(-1, keepdim=True)), 0.0))
    mass = params.top_p[:, None] * weight.sum(-1, keepdim=True)
    p_key = torch.where(params.top_p[:, None] < 1.0, _largest_key(key, weight, mass), k_key)
    # A mass of 0 is reached by nothing at all: the top token always stays.
    threshold = torch.minimum(torch.maximum(k_key, p_key), key.amax(-1, keepdim=True))
    drawn = torch.where(key < threshold, float("-inf"), scores + noise).argmax(-1)
    return torch.where(params.do_sample, drawn, logits.argmax(-1))


def _largest_key(key: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
    """The largest ``t`` for which the weights of all keys ``>= t`` sum to ``wanted`` at least; ``[B, 1]`` int32.

    Four bits a round: 16 candidates are weighed at once, and as many of the lowest reach the sum as the digit says.
    """
    digits = torch.arange(16, dtype=torch.int32, device=key.device)
    found = torch.full_like(key[:, :1], -(2**31))
    for shift in range(28, -1, -4):
        candidates = found + (digits << shift)
        sums = torch.where(key[:, None, :] >= candidates[:, :, None], weight[:, None, :], 0.0).sum(-1)
        reached = (sums >= wanted).sum(-1, keepdim=True)
        found = found + ((reached - 1).clamp(min=0).to(torch.int32) << shift)
    return found
