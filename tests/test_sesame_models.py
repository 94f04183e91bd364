"""What stands for Sesame's repository in tests does what the original does, so that tests against it mean something."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import sesame_models
import torch
from sesame_models import PRESETS, Generator, Segment, StreamingGenerator, StubCodec, StubWatermarker, build

needs_torchtune = pytest.mark.skipif(
    importlib.util.find_spec("torchtune") is None, reason="needs torchtune, Sesame's stack"
)
SECONDS = [Segment(0, "Hello there.", torch.randn(9_000, generator=torch.Generator().manual_seed(0)) * 0.1)]


def frames_of(generator: Generator, **options: Any) -> torch.Tensor:
    """``[F, C]`` codes of a greedy ``generate``."""
    made = []
    decode = generator._audio_tokenizer.decode
    generator._audio_tokenizer.decode = lambda codes: made.append(codes) or decode(codes)
    try:
        generator.generate("Say this.", 1, SECONDS, topk=1, **options)
    finally:
        del generator._audio_tokenizer.decode
    return made[0][0].t()


@needs_torchtune
@pytest.mark.parametrize("preset", ["tiny", "unscaled", "wide", "codebooks", "fork"])
def test_greedy_codes_vary(preset: str) -> None:
    frames = frames_of(Generator(build(preset)), max_audio_length_ms=12 * 80)
    assert frames.shape == (12, PRESETS[preset].audio_num_codebooks)
    assert all(len(codes.unique()) > 3 for codes in frames.t())
    assert torch.equal(frames_of(Generator(build(preset)), max_audio_length_ms=12 * 80), frames)
    assert not torch.equal(frames_of(Generator(build(preset, seed=1)), max_audio_length_ms=12 * 80), frames)


@needs_torchtune
def test_bfloat16_rounds_the_rotary_table_as_the_original_does() -> None:
    full, half = build(), build(dtype=torch.bfloat16)
    for ours, rounded in zip(full.parameters(), half.parameters()):
        assert torch.equal(ours.to(torch.bfloat16), rounded)
    table = half.backbone.layers[0].attn.pos_embeddings.cache
    assert table.dtype == torch.bfloat16
    assert table is half.backbone.layers[1].attn.pos_embeddings.cache  # one module in all layers of a stack
    half.setup_caches(1)
    assert half.backbone.layers[0].attn.kv_cache.k_cache.dtype == torch.bfloat16
    frames = frames_of(Generator(half), max_audio_length_ms=6 * 80)
    assert frames.shape == (6, 4)


@needs_torchtune
def test_a_prompt_that_is_too_long_is_refused_and_by_the_streaming_fork_cut() -> None:
    model = build("fork")
    long = "word " * 1000
    with pytest.raises(ValueError, match="Inputs too long, must be below max_seq_len - max_generation_len: 1998"):
        Generator(model).generate(long, 0, [], max_audio_length_ms=50 * 80)
    fork = StreamingGenerator(model)
    made = []
    model.generate_frame = lambda tokens, *_: made.append(tokens.shape[1]) or torch.zeros(1, 4)
    assert list(fork.generate_stream(long, 0, [])) == []
    assert made == [4096]


@needs_torchtune
def test_speech_ends_with_a_frame_of_zeros_which_is_not_spoken() -> None:
    model = build()
    generator = Generator(model)
    made = iter([1, 2, 3, 0, 4])
    model.generate_frame = lambda *_: torch.full((1, 4), next(made), dtype=torch.int)
    assert len(generator.generate("Say this.", 0, [])) == 3 * 1920


@needs_torchtune
def test_the_watermark_is_on_the_sound() -> None:
    marker = StubWatermarker()
    generator = Generator(build(), watermarker=marker)
    audio = generator.generate("Say this.", 0, [], max_audio_length_ms=400, topk=1)
    assert audio.shape == (5 * 1920,)
    assert [rate for _, rate, _ in marker.calls] == [44_100]


CODECS = [
    "stub",
    pytest.param(
        "mimi",
        marks=pytest.mark.skipif(importlib.util.find_spec("moshi") is None, reason="needs moshi, Sesame's codec"),
    ),
]


def codec(kind: str, codebooks: int = 4, bins: int = 35) -> Any:
    return StubCodec(codebooks, bins) if kind == "stub" else sesame_models.small_mimi(codebooks, bins)


@pytest.mark.parametrize("kind", CODECS)
def test_a_codec_streams_what_it_decodes_in_one_piece(kind: str) -> None:
    one = codec(kind)
    generator = torch.Generator().manual_seed(3)
    sound = torch.randn(1, 1, 9 * 1920 - 40, generator=generator) * torch.linspace(0.02, 1, 9 * 1920 - 40)
    with torch.inference_mode():
        codes = one.encode(sound)
        assert codes.shape == (1, 4, 9) and codes.dtype == torch.long
        assert len(codes.unique()) > 6
        whole = one.decode(codes)
        with one.streaming(1):
            assert one.is_streaming
            chunks = [one.decode(part) for part in codes.split([2, 4, 1, 2], dim=-1)]
        assert not one.is_streaming
        apart = torch.cat([one.decode(part) for part in codes.split(1, dim=-1)], dim=-1)
    assert whole.shape == (1, 1, 9 * 1920)
    torch.testing.assert_close(torch.cat(chunks, dim=-1), whole, rtol=1e-4, atol=1e-4)
    assert (apart - whole).abs().max() > 0.01  # a frame's sound depends on those before it
    stack = one.streaming(1)  # from here on, entered or not
    with pytest.raises(AssertionError, match="already streaming"):
        one.streaming(1)
    stack.close()


@needs_torchtune
@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "autocast"])
def test_chunks_are_the_whole(kind: str, autocast: torch.dtype | None) -> None:
    """Of the same frames; the last chunk is padded for the codec and cut."""
    model = build("fork", dtype=autocast or torch.float32)  # torchtune's caches want a model of autocast's dtype
    fork = StreamingGenerator(model, audio_tokenizer=codec(kind), autocast=autocast)
    told: list[torch.Tensor] = []
    options: dict[str, Any] = dict(max_audio_length_ms=9 * 80, topk=1)
    torch.manual_seed(0)  # in bf16 the best logit has equals, and top-k 1 draws among them
    chunks = list(fork.generate_stream("Say this.", 1, SECONDS, on_chunk_generated=told.append, **options))
    assert [len(chunk) for chunk in chunks] == [2 * 1920, 4 * 1920, 3 * 1920]
    assert all(a is b for a, b in zip(chunks, told, strict=True))
    assert not fork._audio_tokenizer.is_streaming
    torch.manual_seed(0)
    frames = frames_of(fork, max_audio_length_ms=9 * 80)
    with torch.inference_mode():
        whole = fork._audio_tokenizer.decode(frames.t()[None])[0, 0]
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    assert torch.equal(fork.generate("Say this.", 1, SECONDS, stream=True, **options), torch.cat(chunks))


@needs_torchtune
def test_greedy_is_a_draw_among_equal_logits() -> None:
    """As in the original: in bf16, where logits of a real vocabulary have equals, top-k 1 does not always say the same."""
    torch.manual_seed(0)
    drawn = sesame_models.sample_topk(torch.tensor([1.0, 3.0, 3.0, 2.0]).expand(1000, -1), 1, 0.9)
    assert drawn.unique().tolist() == [1, 2]


@needs_torchtune
def test_sampling_has_the_distribution_of_the_kept_logits() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5]])
    torch.manual_seed(0)
    drawn = sesame_models.sample_topk(logits.expand(40_000, -1), 3, 0.8)
    assert drawn.dtype == torch.int and drawn.shape == (40_000, 1)
    shares = torch.bincount(drawn[:, 0], minlength=5) / 40_000
    wanted = torch.softmax(logits[0].masked_fill(logits[0] < 1.0, -torch.inf) / 0.8, dim=-1)
    assert not shares[wanted == 0].any()
    torch.testing.assert_close(shares, wanted, rtol=0, atol=0.01)
