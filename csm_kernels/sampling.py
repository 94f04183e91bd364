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

from csm_kernels import _ops
from csm_kernels._compiled import in_memory
from csm_kernels._target import runs_triton, tl, triton
from csm_kernels._tiles import tiles

_LARGEST_VOCAB = 65536
WHOLE_VOCAB = 4096
"""Up to this vocabulary a program keeps a row's scores and noise in registers."""
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


@triton.jit
def _scores(logits_row, columns, vocab, temperature):
    """Logits over temperature, rounded as torch divides: ties of the specification are ties here."""
    logits = tl.load(logits_row + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
    return tl.div_rn(logits, temperature)


@triton.jit
def _words(tokens, seed, utterance, frame, codebook):
    """The Philox words of :func:`gumbel_noise_ref`, bit for bit; seed and the others are int64."""
    nothing = tokens * 0
    word, _, _, _ = tl.philox(
        seed, tokens, nothing + codebook.to(tl.int32), nothing + frame.to(tl.int32), nothing + utterance.to(tl.int32)
    )
    return word


@triton.jit
def _noise(tokens, seed, utterance, frame, codebook):
    """As :func:`gumbel_noise_ref`; the logarithms may differ in their last bit."""
    word = _words(tokens, seed, utterance, frame, codebook)
    uniform = tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    # log1p by Kahan: what rounding 1 - uniform loses, the quotient gives back.
    rest = 1.0 - uniform
    return -tl.log(tl.where(rest == 1.0, uniform, tl.log(rest) * uniform / (rest - 1.0)))


@triton.jit
def _key(score):
    """An integer that orders as the score does."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _score_of(key):
    """The score of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _survey(logits_row, vocab, BLOCK_V: tl.constexpr):
    """The largest logit, where it first stands, and how many are NaN or plus infinity."""
    top = tl.full((), float("-inf"), tl.float32)
    token = tl.zeros((), tl.int32)
    broken = tl.zeros((), tl.int32)
    for first in range(0, vocab, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_row + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        value, index = tl.max(logits, 0, return_indices=True)
        token = tl.where(value > top, first + index, token)
        top = tl.maximum(top, value)
        broken += tl.sum(tl.where(logits < float("inf"), 0, 1), 0)
    return top, token, broken


@triton.jit
def _best_of(scores, noise, columns, floor, last, last_token):
    noisy = scores + noise
    free = (scores >= floor) & ((noisy < last) | ((noisy == last) & (columns > last_token)))
    return tl.max(tl.where(free, noisy, float("-inf")), 0, return_indices=True)


@triton.jit
def _best(
    logits_row,
    scores,
    noise,
    vocab,
    temperature,
    seed,
    utterance,
    frame,
    codebook,
    floor,
    last,
    last_token,
    WHOLE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The largest sum of score and noise, and its token, among scores of at least ``floor``, that comes after ``last``."""
    if WHOLE:
        best, token = _best_of(scores, noise, tl.arange(0, BLOCK_V), floor, last, last_token)
    else:
        best = tl.full((), float("-inf"), tl.float32)
        token = tl.zeros((), tl.int32)
        for first in range(0, vocab, BLOCK_V):
            columns = first + tl.arange(0, BLOCK_V)
            part = _scores(logits_row, columns, vocab, temperature)
            drawn = _noise(columns, seed, utterance, frame, codebook)
            value, index = _best_of(part, drawn, columns, floor, last, last_token)
            token = tl.where(value > best, first + index, token)
            best = tl.maximum(best, value)
    return best, token


@triton.jit
def _share_of(scores, floor, top, STRICT: tl.constexpr, MASS: tl.constexpr):
    taken = scores > floor if STRICT else scores >= floor
    return tl.sum(tl.where(taken, tl.exp(scores - top) if MASS else 1.0, 0.0), 0)


@triton.jit
def _share(
    logits_row,
    scores,
    vocab,
    temperature,
    floor,
    top,
    STRICT: tl.constexpr,
    MASS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """How many scores are at least ``floor``, larger if ``STRICT``; or their mass, that of ``top`` being 1."""
    if WHOLE:
        share = _share_of(scores, floor, top, STRICT, MASS)
    else:
        share = tl.zeros((), tl.float32)
        for first in range(0, vocab, BLOCK_V):
            part = _scores(logits_row, first + tl.arange(0, BLOCK_V), vocab, temperature)
            share += _share_of(part, floor, top, STRICT, MASS)
    return share


@triton.jit
def _lowest_kept(
    logits_row,
    scores,
    vocab,
    temperature,
    low,
    top,
    wanted,
    MASS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Key of the largest score from which on upwards there are ``wanted`` scores, or that mass; ``low`` is low enough.

    At most 32 halvings. A count hit exactly ends them: the scores kept are the same from there on.
    """
    high = _key(top)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)
        share = _share(logits_row, scores, vocab, temperature, _score_of(middle), top, False, MASS, WHOLE, BLOCK_V)
        low = tl.where(share >= wanted, middle, low)
        high = tl.where(share >= wanted, high, middle - 1)
        if not MASS:
            high = tl.where(share == wanted, middle, high)
    return low


@triton.jit
def draw(
    logits_row,
    noise,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    do_sample_ptr,
    seed_ptr,
    utterance_ptr,
    frame_ptr,
    codebook,
    vocab,
    ROUNDS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Token of one row, and whether its logits are healthy; the pointers stand at the row.

    ``WHOLE``: scores and ``noise`` stay in registers; else ``noise`` is not looked at, and every pass makes both again,
    block by block.

    Top-k alone needs no threshold: the winner of the race over all tokens is the draw if fewer than k scores are larger
    than its own, else it is struck out and the next best tried. A peaked row takes 1.4 rounds on average, a flat one up
    to a hundred, so after ``ROUNDS`` of them the threshold is searched for, as it is where top-p needs it.
    """
    largest, token, broken = _survey(logits_row, vocab, BLOCK_V)
    healthy = (broken == 0) & (largest > float("-inf"))
    if healthy & (tl.load(do_sample_ptr) != 0):
        temperature = tl.load(temperature_ptr)
        top_k = tl.minimum(tl.maximum(tl.load(top_k_ptr), 1), vocab).to(tl.float32)
        top_p = tl.load(top_p_ptr)
        seed, utterance, frame = tl.load(seed_ptr), tl.load(utterance_ptr), tl.load(frame_ptr)
        top = tl.div_rn(largest, temperature)
        scores = top
        if WHOLE:
            scores = _scores(logits_row, tl.arange(0, BLOCK_V), vocab, temperature)

        minimum = tl.full((), float("-inf"), tl.float32)
        low = _key(minimum)
        settled = False
        if (top_k > 1) & (top_p >= 1.0):
            best, token = _best(
                logits_row, scores, noise, vocab, temperature, seed, utterance, frame, codebook,
                minimum, float("inf"), -1, WHOLE, BLOCK_V,
            )  # fmt: skip
            score = tl.div_rn(tl.load(logits_row + token).to(tl.float32), temperature)
            larger = _share(logits_row, scores, vocab, temperature, score, top, True, False, WHOLE, BLOCK_V)
            rounds = 1
            while (larger >= top_k) & (rounds < ROUNDS):
                low = tl.maximum(low, _key(score) + 1)
                best, token = _best(
                    logits_row, scores, noise, vocab, temperature, seed, utterance, frame, codebook,
                    minimum, best, token, WHOLE, BLOCK_V,
                )  # fmt: skip
                score = tl.div_rn(tl.load(logits_row + token).to(tl.float32), temperature)
                larger = _share(logits_row, scores, vocab, temperature, score, top, True, False, WHOLE, BLOCK_V)
                rounds += 1
            settled = larger < top_k
        if not settled:
            if (top_k <= 1) | (top_p <= 0.0):
                low = _key(top)
            else:
                if top_k < vocab:
                    low = _lowest_kept(logits_row, scores, vocab, temperature, low, top, top_k, False, WHOLE, BLOCK_V)
                if top_p < 1.0:
                    floor = _score_of(low)
                    mass = _share(logits_row, scores, vocab, temperature, floor, top, False, True, WHOLE, BLOCK_V)
                    low = _lowest_kept(
                        logits_row, scores, vocab, temperature, low, top, top_p * mass, True, WHOLE, BLOCK_V
                    )
            _, token = _best(
                logits_row, scores, noise, vocab, temperature, seed, utterance, frame, codebook,
                _score_of(low), float("inf"), -1, WHOLE, BLOCK_V,
            )  # fmt: skip
    return tl.where(healthy, token, 0), healthy


@triton.jit
def noise_of(seed_ptr, utterance_ptr, frame_ptr, codebook, do_sample_ptr, WHOLE: tl.constexpr, BLOCK_V: tl.constexpr):
    """The noise :func:`draw` wants: it depends on no logits, so it can be made while they are."""
    noise = tl.zeros((BLOCK_V if WHOLE else 1,), tl.float32)
    if WHOLE:  # noqa: SIM102 one is a constant, the other a value
        if tl.load(do_sample_ptr) != 0:
            seed, utterance, frame = tl.load(seed_ptr), tl.load(utterance_ptr), tl.load(frame_ptr)
            noise = _noise(tl.arange(0, BLOCK_V), seed, utterance, frame, codebook)
    return noise


@triton.jit
def _sample_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    do_sample_ptr,
    seed_ptr,
    utterance_ptr,
    frame_ptr,
    codebook_ptr,
    tokens_ptr,
    flags_ptr,
    logits_stride,
    vocab,
    HAS_FLAGS: tl.constexpr,
    ROUNDS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    codebook = tl.load(codebook_ptr)
    noise = noise_of(
        seed_ptr + row, utterance_ptr + row, frame_ptr + row, codebook, do_sample_ptr + row, WHOLE, BLOCK_V
    )
    token, healthy = draw(
        logits_ptr + row * logits_stride,
        noise,
        temperature_ptr + row,
        top_k_ptr + row,
        top_p_ptr + row,
        do_sample_ptr + row,
        seed_ptr + row,
        utterance_ptr + row,
        frame_ptr + row,
        codebook,
        vocab,
        ROUNDS,
        WHOLE,
        BLOCK_V,
    )
    tl.store(tokens_ptr + row, token.to(tl.int64))
    if HAS_FLAGS:
        tl.store(flags_ptr + row, 1, mask=healthy == 0)


def launch_sample(
    logits: Tensor, params: SamplingParams, key: NoiseKey, codebook: Tensor, tokens: Tensor, flags: Tensor | None = None
) -> None:
    """Launch the kernel into ``tokens``, ``[B]`` int64; arguments as :func:`sample` takes them.

    ``flags``, ``[B]`` int32, is set to 1 for a broken row and left as it is for the others: zeroed once, it gathers what
    happened in a frame.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return
    # At 16 warps the 4096 columns of CSM's vocabulary take 61 registers on sm_90 and spill nothing; at 8 they spill.
    whole = vocab <= WHOLE_VOCAB
    block = triton.next_power_of_2(vocab) if whole else 2048
    sizes = tiles(
        "sampling",
        logits,
        {"V": vocab},
        {"BLOCK_V": block, "ROUNDS": 8, "num_warps": max(1, block // 256) if whole else 4},
    )
    _sample_kernel[(rows,)](
        logits,
        *params,
        *key,
        codebook,
        tokens,
        flags,
        logits.stride(0),
        vocab,
        HAS_FLAGS=flags is not None,
        WHOLE=sizes["BLOCK_V"] >= vocab,
        **sizes,
    )


def _checked(logits: Tensor, params: SamplingParams, key: NoiseKey, codebook: Tensor) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be [B, V], floating point, got {tuple(logits.shape)}, {logits.dtype}")
    rows, vocab = logits.shape
    if not 1 <= vocab <= _LARGEST_VOCAB:
        raise ValueError(f"logits must be of 1 to {_LARGEST_VOCAB} tokens, got {vocab}")
    if vocab > 1 and logits.stride(1) != 1:
        raise ValueError(
            f"logits must have unit stride in its last dimension, got strides {tuple(logits.stride())}: call "
            ".contiguous() on it"
        )
    dtypes = (torch.float32, torch.int64, torch.float32, torch.bool, torch.int64, torch.int64, torch.int64)
    for name, tensor, dtype in zip((*params._fields, *key._fields), (*params, *key), dtypes):
        if tensor.shape != (rows,) or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be [B] {dtype}, contiguous, B = {rows}, got {tuple(tensor.shape)}, {tensor.dtype}, "
                f"strides {tuple(tensor.stride())}"
            )
    if codebook.numel() != 1 or codebook.dtype != torch.int64:
        raise ValueError(f"codebook must be one int64, got {tuple(codebook.shape)}, {codebook.dtype}")


def _sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    do_sample: Tensor,
    seed: Tensor,
    utterance: Tensor,
    frame: Tensor,
    codebook: Tensor,
) -> tuple[Tensor, Tensor]:
    params = SamplingParams(temperature, top_k, top_p, do_sample)
    key = NoiseKey(seed, utterance, frame)
    _checked(logits, params, key, codebook)
    if not runs_triton(logits, *params, *key, codebook):
        broken = (logits.isnan() | logits.isposinf()).any(-1) | logits.isneginf().all(-1)
        noise = gumbel_noise_ref(key, codebook, logits.shape[1])
        tokens = sample_ref(logits.masked_fill(broken[:, None], 0.0), params, noise)
        return tokens.masked_fill(broken, 0), broken.to(torch.int32)
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    flags = torch.zeros(logits.shape[0], dtype=torch.int32, device=logits.device)
    launch_sample(logits, params, key, codebook, tokens, flags)
    return tokens, flags


_sample_op = _ops.register(
    "sample",
    _sample,
    lambda logits, temperature, top_k, top_p, do_sample, seed, utterance, frame, codebook: (
        logits.new_empty(logits.shape[0], dtype=torch.int64),
        logits.new_empty(logits.shape[0], dtype=torch.int32),
    ),
)


def sample(logits: Tensor, params: SamplingParams, key: NoiseKey, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row by temperature, top-k, top-p and Gumbel-max, or the argmax; the noise is made in the kernel.

    Args:
        logits: ``[B, V]`` fp32, bf16 or fp16, unit stride in the last dimension; V at most 65536. Minus infinity is never
            drawn.
        params: one entry per row, contiguous.
        key: one entry per row, contiguous.
        codebook: one int64, on the device as all the others.

    Returns:
        tokens: ``[B]`` int64, those of :func:`sample_ref` and :func:`gumbel_noise_ref` but where two sums of score and
            noise, or a mass and ``top_p``, are equal to the last bits of fp32. A row's token depends on no other row.
        flags: ``[B]`` int32, 1 where a row has a NaN, plus infinity or nothing finite; its token is 0.

    Raises:
        ValueError: shapes, dtypes or strides do not fit; the message names the argument.

    Example:
        >>> params = SamplingParams(*(torch.tensor([x] * 2) for x in (0.9, 50, 1.0, True)))
        >>> key = NoiseKey(*(torch.tensor([7, 7]) for _ in range(3)))
        >>> sample(torch.randn(2, 2051), params, key, torch.tensor(0))[0].shape
        torch.Size([2])

    Source: Gumbel-max by Gumbel (1954); Philox by Salmon et al. (SC 2011). Not yet run on a GPU.
    """
    return _sample_op(logits, *params, *key, codebook)


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
        codebook: ``[1]`` int64, or ``[B]`` with one for each row.
        vocab: number of tokens.

    Returns:
        ``[B, vocab]`` fp32, finite.
    """
    token = torch.arange(vocab, device=key.seed.device)[None, :]
    word = philox_ref(
        token,
        codebook.reshape(-1, 1),
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
