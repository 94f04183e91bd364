"""The small CSM that `make train-demo` trains: the stock class, sizes for a laptop, one text token per byte."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from speech_clips import Clip, repository_clips
from speech_tokens import CODEBOOKS, END_OF_SPEECH, PAD, VOCAB, SpeechTokens
from torch import Tensor
from torch.nn import functional

from csm_runtime.small_model import AUDIO, AUDIO_EOS, BEGIN_OF_TEXT, END_OF_TEXT
from csm_runtime.small_model import PAD as TEXT_PAD

POSITIONS = 2048
"""Positions, text and frames together; the longest recording has 1100."""

SHIFTS = (0, 320, 640, 960)
"""Samples cut off a recording's beginning, each for tokens of their own: four times as much to learn from."""

Example = dict[str, Tensor]


def build_model(seed: int, *, layers: int = 4, hidden: int = 128, depth_layers: int = 2, depth_hidden: int = 96) -> Any:
    """A ``CsmForConditionalGeneration`` of about 1.5 M parameters with fresh weights.

    The codec is as small as its class allows and stays random: the tokens are those of :class:`SpeechTokens`, which also
    turns them back into sound.
    """
    from transformers import CsmConfig, CsmDepthDecoderConfig, CsmForConditionalGeneration, MimiConfig

    codec = MimiConfig(
        codebook_size=1 << VOCAB.bit_length(),  # a power of two, as the class wants it
        num_quantizers=CODEBOOKS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_filters=2,
        codebook_dim=8,
        vector_quantization_hidden_dimension=8,
        upsample_groups=16,
    )
    depth = CsmDepthDecoderConfig(
        num_codebooks=CODEBOOKS,
        vocab_size=VOCAB,
        backbone_hidden_size=hidden,
        hidden_size=depth_hidden,
        intermediate_size=4 * depth_hidden,
        num_hidden_layers=depth_layers,
        num_attention_heads=depth_hidden // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CODEBOOKS + 1,
        initializer_range=0.05,
    )
    config = CsmConfig(
        num_codebooks=CODEBOOKS,
        vocab_size=VOCAB,
        text_vocab_size=TEXT_PAD + 1,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        codebook_eos_token_id=END_OF_SPEECH,
        codebook_pad_token_id=PAD,
        bos_token_id=BEGIN_OF_TEXT,
        pad_token_id=TEXT_PAD,
        audio_token_id=AUDIO,
        audio_eos_token_id=AUDIO_EOS,
        initializer_range=0.05,
        tie_codebooks_embeddings=False,  # transformers 5.17 loads a tied pair untied
        depth_decoder_config=depth,
        codec_config=codec,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CsmForConditionalGeneration(config).eval()


def text_ids(speaker: int, text: str) -> Tensor:
    """A prompt ``[n]`` int64 in the form of ``SmallProcessor``."""
    return torch.tensor([BEGIN_OF_TEXT, *f"[{speaker}]{text}".encode(), END_OF_TEXT])


def split(clips: Sequence[Clip]) -> tuple[list[Clip], list[Clip]]:
    """Recordings to train on and recordings held out, by file: no prompt is in both, in whichever language.

    Held out are every tenth prompt and those in the repository, or, where there are no others, a quarter of these.
    """
    own = {_prompt(clip) for clip in repository_clips()}
    numbers = {prompt: zlib.crc32(prompt.encode()) for prompt in map(_prompt, clips)}
    if numbers.keys() <= own:
        out = set(sorted(numbers, key=lambda prompt: numbers[prompt])[: max(1, len(numbers) // 4)])
    else:
        out = own | {prompt for prompt, number in numbers.items() if number % 10 == 0}
    return [clip for clip in clips if _prompt(clip) not in out], [clip for clip in clips if _prompt(clip) in out]


def _prompt(clip: Clip) -> str:
    return clip.name.partition("/")[2]


def examples(clips: Sequence[Clip], tokens: SpeechTokens, shifts: Sequence[int] = (0,)) -> list[Example]:
    """What the collator takes: ``text_ids`` ``[n]`` and ``codes`` ``[F, 8]`` of every recording, once per shift."""
    return [
        {"text_ids": text_ids(clip.speaker, clip.text), "codes": tokens.encode(clip.samples[shift:])}
        for clip in clips
        for shift in shifts
    ]


@torch.no_grad()
def codebook_nll(model: Any, example: Example) -> Tensor:
    """Negative log-likelihood ``[F, 8]`` fp32 in nats of a recording's tokens, each given all before it; ends excluded."""
    codes, prompt = example["codes"][None], example["text_ids"][None]
    embeds = torch.cat([model.embed_text_tokens(prompt), model.backbone_model.embed_tokens(codes)], dim=1)
    states = model.backbone_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    states = states[0, prompt.shape[1] - 1 : -1]  # a frame is predicted from the position before it
    fed = functional.pad(codes[0, :, :-1], (1, 0))
    rest = model.depth_decoder(
        input_ids=fed,
        backbone_last_hidden_state=states,
        attention_mask=torch.ones_like(fed),  # without it transformers 5.17 fails on a single frame
        use_cache=False,
    ).logits
    logits = torch.cat([model.lm_head(states)[:, None], rest], dim=1).float()
    return functional.cross_entropy(logits.transpose(1, 2), codes[0], reduction="none")


def mean_nll(model: Any, data: Sequence[Example]) -> Tensor:
    """The mean of :func:`codebook_nll` over all frames, ``[8]``."""
    return torch.cat([codebook_nll(model, example) for example in data]).mean(0)


def unigram_nll(train: Sequence[Example], data: Sequence[Example], ends: bool = False) -> Tensor:
    """What ``data`` costs per codebook, ``[8]`` nats, when every token has its frequency in ``train``; add-one smoothed.

    ``ends`` counts every recording's end-of-speech frame too, as the training loss does.
    """
    costs = []
    for seen, column in zip(_codes(train, ends).T, _codes(data, ends).T):
        count = torch.bincount(seen, minlength=VOCAB).float() + 1
        costs.append((count.sum() / count).log()[column].mean())
    return torch.stack(costs)


def _codes(data: Sequence[Example], ends: bool) -> Tensor:
    codes = torch.cat([example["codes"] for example in data])
    return functional.pad(codes, (0, 0, 0, len(data)), value=END_OF_SPEECH) if ends else codes


@torch.no_grad()
def speak(model: Any, prompt: Tensor, frames: int, seed: int, temperature: float = 0.8) -> Tensor:
    """Frames ``[F, 8]`` of a text ``[n]`` by the model's own ``generate``, at most so many."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = model.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=frames,
            do_sample=True,
            temperature=temperature,
            depth_decoder_do_sample=True,
            depth_decoder_temperature=temperature,
        )
    return made[0]
