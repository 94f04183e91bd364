"""Frames made again: the replay against the stock modules, and tokens drawn again from other logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from csm_models import CONFIGS, build, teacher_forced, text_prompt
from torch import Tensor

from csm_kernels.quant import dequantize, quantize
from csm_kernels.sampling import NoiseKey, SamplingParams, gumbel_noise_ref, sample_ref
from csm_kernels.testing import sqnr_db
from csm_runtime import weights
from csm_runtime.adapters import hf
from csm_runtime.adapters.spec import LinearWeights
from csm_runtime.precision import PrecisionPolicy
from csm_runtime.replay import Replay, noise_of, redraw

PROMPT = text_prompt((5, 9, 3))
FRAMES = 6


def replay_of(model: Any, cache: torch.dtype = torch.float32) -> Replay:
    return Replay(hf.read_spec(model), hf.rotary_tables(model, 64), (cache, cache))


def frames_of(model: Any) -> Tensor:
    limit = min(model.config.vocab_size, model.config.depth_decoder_config.vocab_size)
    shape = (3, FRAMES, model.config.num_codebooks)
    return torch.randint(0, limit, shape, generator=torch.Generator().manual_seed(1))


def inputs(model: Any, replay: Replay, packed: Any, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, positions and mask of the prompt and all frames but the last."""
    with torch.no_grad():
        x = model._merge_input_ids_with_input_values(PROMPT["input_ids"])["inputs_embeds"]
    x = torch.cat([x.float(), replay.embed(packed, codes[:, :-1])], dim=1)
    mask = torch.cat([PROMPT["attention_mask"], torch.ones(3, FRAMES - 1, dtype=torch.long)], dim=1)
    return x, (mask.cumsum(-1) - 1).clamp(min=0), mask.bool()


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_stock_modules(name: str) -> None:
    model = build(name)
    codes, replay, packed = frames_of(model), replay_of(model), weights.unlowered(hf.live_weights(model))
    hidden, first, others = teacher_forced(model, PROMPT, codes)
    with torch.no_grad():
        made = replay.backbone(packed, *inputs(model, replay, packed, codes))
        ours = made.hidden[:, -FRAMES:]
        assert sqnr_db(ours, hidden) > 100
        assert sqnr_db(replay.first_logits(packed, ours), first) > 100
        flat = replay.depth_logits(packed, hidden.flatten(0, 1), codes.flatten(0, 1))
    assert sqnr_db(flat.view(others.shape), others) > 100


def test_in_chunks_behind_a_cache() -> None:
    """Three positions at a time on what the first ones left in the cache, with left padding."""
    model = build("biases")
    codes, replay, packed = frames_of(model), replay_of(model), weights.unlowered(hf.live_weights(model))
    x, positions, allowed = inputs(model, replay, packed, codes)
    with torch.no_grad():
        whole = replay.backbone(packed, x, positions, allowed)
        start = x.shape[1] - 3
        before = [k[:, :, :start] for k in whole.keys], [v[:, :, :start] for v in whole.values]
        part = replay.backbone(packed, x[:, start:], positions[:, start:], allowed, before)
    assert sqnr_db(part.hidden, whole.hidden[:, start:]) > 110
    assert all(sqnr_db(a, b[:, :, start:]) > 110 for a, b in zip(part.keys, whole.keys))
    assert all(sqnr_db(a, b[:, :, start:]) > 110 for a, b in zip(part.values, whole.values))


@pytest.mark.parametrize("fmt", ["bf16", "int8", "int4:32"])
def test_lowered_weights_are_those_they_stand_for(fmt: str) -> None:
    """On packed copies as on a stock model whose weights were rounded beforehand."""
    model, kind, group = build("eight_codebooks"), *(fmt.split(":") + ["128"])[:2]
    live = hf.live_weights(model)
    policy = PrecisionPolicy(
        (("backbone.head", "keep"), ("*.embedding", "keep"), ("kv", "keep"), ("codec", "keep"), ("*", fmt))
    )
    packed, _ = weights.PackedWeights(policy).refresh(live)

    def rounded(matrix: Tensor) -> Tensor:
        return matrix.bfloat16().float() if kind == "bf16" else dequantize(quantize(matrix, kind, int(group)))

    def lowered(layer: Any) -> Any:
        linears = {n: w for n, w in layer._asdict().items() if isinstance(w, LinearWeights)}
        return layer._replace(**{n: LinearWeights(rounded(w.weight), w.bias) for n, w in linears.items()})

    twin = live._replace(
        backbone=[lowered(layer) for layer in live.backbone],
        depth=[lowered(layer) for layer in live.depth],
        depth_projection=LinearWeights(rounded(live.depth_projection.weight), live.depth_projection.bias),
        depth_heads=rounded(live.depth_heads.transpose(-1, -2)).transpose(-1, -2),
    )
    codes, replay = frames_of(model), replay_of(model)
    both = []
    for one in (packed, weights.unlowered(twin)):
        with torch.no_grad():
            hidden = replay.backbone(one, *inputs(model, replay, one, codes)).hidden[:, -FRAMES:]
            both.append((hidden, replay.depth_logits(one, hidden.flatten(0, 1), codes.flatten(0, 1))))
    assert all(sqnr_db(a, b) > 100 for a, b in zip(*both))
    stock = weights.unlowered(live)
    with torch.no_grad():
        exact = replay.depth_logits(stock, both[0][0].flatten(0, 1), codes.flatten(0, 1))
    assert sqnr_db(both[0][1], exact) < 60, "the rounding is there"


def test_keys_and_values_are_rounded_to_the_cache() -> None:
    model = build()
    codes, packed = frames_of(model), weights.unlowered(hf.live_weights(model))
    exact, coarse = replay_of(model), replay_of(model, torch.bfloat16)
    with torch.no_grad():
        a, b = (r.backbone(packed, *inputs(model, r, packed, codes)) for r in (exact, coarse))
    assert b.keys[0].dtype == torch.bfloat16
    assert torch.equal(b.keys[0], a.keys[0].bfloat16()), "the first layer's are the same but for the cast"
    assert 30 < sqnr_db(b.hidden, a.hidden) < 80


# ------------------------------------------------------------------------------------------------ drawn again

ROWS, BOOKS, VOCAB = 200, 3, 40


def setting(do_sample: bool, **changed: float) -> tuple[Tensor, SamplingParams, NoiseKey]:
    generator = torch.Generator().manual_seed(0)
    values = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, **changed}
    params = SamplingParams(
        torch.full((ROWS,), values["temperature"]),
        torch.full((ROWS,), int(values["top_k"])),
        torch.full((ROWS,), values["top_p"]),
        torch.full((ROWS,), do_sample),
    )
    key = NoiseKey(torch.full((ROWS,), 5), torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS))
    return 2 * torch.randn(ROWS, BOOKS, VOCAB, generator=generator), params, key


def drawn_by_the_sampler(logits: Tensor, params: SamplingParams, key: NoiseKey) -> Tensor:
    books = [
        sample_ref(logits[:, k], params, gumbel_noise_ref(key, torch.tensor([4 + k]), VOCAB)) for k in range(BOOKS)
    ]
    return torch.stack(books, dim=1)


SETTINGS: list[tuple[bool, dict[str, float]]] = [
    (False, {}),
    (True, {}),
    (True, {"top_p": 1.0}),
    (True, {"top_k": VOCAB, "top_p": 0.5}),
    (True, {"top_k": 1}),
    (True, {"temperature": 3.0, "top_k": VOCAB, "top_p": 1.0}),
]


@pytest.mark.parametrize(("do_sample", "changed"), SETTINGS)
def test_the_same_logits_draw_the_same_tokens(do_sample: bool, changed: dict[str, float]) -> None:
    logits, params, key = setting(do_sample, **changed)
    codes = drawn_by_the_sampler(logits, params, key)
    again = redraw(logits, codes, params, noise_of(key, 4, BOOKS, VOCAB), torch.zeros(BOOKS))
    assert torch.equal(again.drawn, codes)
    assert again.same.all()
    assert not again.margin.any()


@pytest.mark.parametrize(("do_sample", "changed"), SETTINGS)
def test_logits_that_are_a_little_off_draw_ties(do_sample: bool, changed: dict[str, float]) -> None:
    """A token that another set of logits draws has lost by no more than both may be off."""
    logits, params, key = setting(do_sample, **changed)
    off = 0.01
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    codes = drawn_by_the_sampler(logits + off * noise, params, key)
    got = redraw(logits, codes, params, noise_of(key, 4, BOOKS, VOCAB), torch.full((BOOKS,), off))
    assert float(got.margin.max()) <= 2 * off * (1 + 1e-4)
    if "top_k" not in changed or changed["top_k"] > 1:
        assert not got.same.all(), "some token did come out differently"


@pytest.mark.parametrize(("do_sample", "changed"), SETTINGS[1:])
def test_other_noise_is_no_tie(do_sample: bool, changed: dict[str, float]) -> None:
    if changed.get("top_k") == 1:
        pytest.skip("the noise decides nothing")
    logits, params, key = setting(do_sample, **changed)
    codes = drawn_by_the_sampler(logits, params, key._replace(frame=key.frame + 1))
    got = redraw(logits, codes, params, noise_of(key, 4, BOOKS, VOCAB), torch.full((BOOKS,), 0.01))
    assert float((got.margin > 0.05).float().mean()) > 0.15


def test_codes_out_of_range_and_tokens_that_were_cut_off() -> None:
    logits, params, key = setting(True)
    codes = drawn_by_the_sampler(logits, params, key)
    codes[0, 0], codes[1, 1] = -1, VOCAB
    codes[2, 2] = logits[2, 2].argmin()
    margin = redraw(logits, codes, params, noise_of(key, 4, BOOKS, VOCAB), torch.full((BOOKS,), 0.01)).margin
    assert margin[0, 0] == margin[1, 1] == float("inf")
    assert 1.0 < float(margin[2, 2]) < float("inf")
    assert not margin[3:].any()
