"""Tiny CSMs of many shapes with seeded weights, their prompts, and small helpers the tests share."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm_kernels.quant import dequantize, quantize
from csm_runtime.precision import PRESETS, PrecisionPolicy, int4_layout

TEXT_VOCAB = 96
TEXT_IDS = 80
"""Text ids below this are ordinary; special tokens lie above."""
PAD, BOS, AUDIO, AUDIO_EOS = 90, 91, 92, 93
POSITIONS = 64
FRAME_SAMPLES = 1920
"""Audio samples per codec frame: 24 kHz at 12.5 frames per second."""
TRAINED = Path(__file__).parent / "data" / "trained_csm"
"""A small CSM trained on real speech, by `make train-demo`."""

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {}),
    "two_codebooks": (dict(num_codebooks=2, vocab_size=51, num_hidden_layers=5), dict(num_hidden_layers=3)),
    "eight_codebooks": (
        dict(num_codebooks=8, vocab_size=19, head_dim=16, num_key_value_heads=4),
        dict(hidden_size=20, num_attention_heads=4, num_key_value_heads=1, head_dim=6, num_hidden_layers=1),
    ),
    "thirty_two_codebooks": (
        dict(num_codebooks=32, vocab_size=23, num_hidden_layers=1),
        dict(num_hidden_layers=1, hidden_size=16),
    ),
    "tied": (dict(vocab_size=41), {}),
    "untied": (dict(vocab_size=43, tie_codebooks_embeddings=False), {}),
    "depth_vocabulary": (dict(vocab_size=41, tie_codebooks_embeddings=False), dict(vocab_size=29)),
    "biases": (
        dict(attention_bias=True, mlp_bias=True, num_attention_heads=6, num_key_value_heads=3, head_dim=10),
        dict(attention_bias=True, mlp_bias=True),
    ),
    "llama3": (dict(rope_parameters=_LLAMA3), dict(rope_parameters=_LLAMA3)),
    "norms": (
        dict(rms_norm_eps=0.3, rope_parameters=_LINEAR, num_key_value_heads=1),
        dict(rms_norm_eps=0.05, rope_parameters=_YARN),
    ),
}


def config_of(name: str = "base", backbone: dict[str, Any] | None = None, depth: dict[str, Any] | None = None) -> Any:
    """A ``CsmConfig`` of the list above, with further overrides for either stack."""
    from transformers import CsmConfig

    named_backbone, named_depth = CONFIGS[name]
    top = dict(
        num_codebooks=4,
        vocab_size=32,
        text_vocab_size=TEXT_VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        audio_token_id=AUDIO,
        audio_eos_token_id=AUDIO_EOS,
    )
    top.update(named_backbone)
    top.update(backbone or {})
    top.setdefault("codebook_pad_token_id", top["vocab_size"] - 1)
    low = dict(
        num_codebooks=top["num_codebooks"],
        backbone_hidden_size=top["hidden_size"],
        vocab_size=top["vocab_size"],
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    low.update(named_depth)
    low.update(depth or {})
    codec = dict(
        model_type="mimi",
        num_quantizers=top["num_codebooks"],
        codebook_size=1 << (min(top["vocab_size"], low["vocab_size"]).bit_length() - 1),
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
    return CsmConfig(**top, depth_decoder_config=low, codec_config=codec)


def build(
    name: str = "base",
    *,
    seed: int = 0,
    std: float = 0.15,
    dtype: torch.dtype = torch.float32,
    backbone: dict[str, Any] | None = None,
    depth: dict[str, Any] | None = None,
) -> Any:
    """A stock model in eval mode whose weights are normal with deviation ``std``, so that tokens vary."""
    from transformers import CsmForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CsmForConditionalGeneration(config_of(name, backbone, depth)).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim > 1 or key.endswith(".bias"):
                    parameter.normal_(0.0, std)
                elif "norm" in key and "codec" not in key:
                    parameter.uniform_(0.5, 1.5)
            for key, buffer in model.codec_model.named_buffers():
                if key.endswith("embed_sum"):  # zeros in a fresh codec: every sound would get code 0
                    buffer.normal_()
    if name == "tied":  # transformers 5.17 has the config flag and leaves the tables apart
        model.backbone_model.embed_tokens.embed_audio_tokens.weight = model.depth_decoder.model.embed_tokens.weight
    return model.to(dtype)


def trained() -> Any:
    """A small stock model that was really trained, fp32 in eval mode; a copy of its own for every call."""
    return copy.deepcopy(_trained())


@functools.cache
def _trained() -> Any:
    from transformers import CsmForConditionalGeneration

    return CsmForConditionalGeneration.from_pretrained(TRAINED, dtype=torch.float32).eval()


def held_out_speech() -> list[tuple[Tensor, Tensor]]:
    """Text ids ``[n]`` and codes ``[F, 8]`` of recordings that :func:`trained` never heard, a few hundred frames."""
    from safetensors.torch import load_file

    tensors = {key: value.long() for key, value in load_file(TRAINED / "held_out.safetensors").items()}
    return [(tensors[f"text_ids.{k}"], tensors[f"codes.{k}"]) for k in range(len(tensors) // 2)]


def copy_first_codebook(model: Any, sharpness: float = 4.0) -> Any:
    """Rewire the depth decoder so that every codebook repeats codebook 0's token.

    A random model never speaks the end-of-speech frame, whose codebooks are all equal; this one does as soon as its
    backbone says the token.
    """
    depth, config = model.depth_decoder, model.config.depth_decoder_config
    with torch.no_grad():
        for layer in depth.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.02)
            layer.mlp.down_proj.weight.mul_(0.02)
        depth.model.norm.weight.fill_(1.0)
        table = depth.model.embed_tokens.weight.view(config.num_codebooks, config.vocab_size, -1)
        projected = torch.nn.functional.normalize(table @ depth.model.inputs_embeds_projector.weight.t(), dim=-1)
        depth.codebooks_head.weight.copy_(sharpness * projected[:-1].transpose(-1, -2))
    return model


def text_prompt(lengths: tuple[int, ...] | list[int], seed: int = 0) -> dict[str, Tensor]:
    """Text ids of uneven length, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(0, TEXT_IDS, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def code_prompt(model: Any, rows: int, frames: int, seed: int = 0) -> Tensor:
    """Codes ``[rows, frames, codebooks]`` as a three-dimensional prompt."""
    generator = torch.Generator().manual_seed(seed)
    limit = min(model.config.vocab_size, model.config.depth_decoder_config.vocab_size)
    return torch.randint(0, limit, (rows, frames, model.config.num_codebooks), generator=generator)


def audio_prompt(model: Any, segments: list[list[int]], seed: int = 0) -> dict[str, Tensor]:
    """A conversation per row: for each segment some text and its audio tokens, then the text to speak.

    Args:
        model: whose codec says how many frames a segment has.
        segments: per row the lengths in samples of its audio segments; an empty list is a row without audio.
        seed: of text and sound.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    for lengths in segments:
        ids: list[int] = []
        for samples in lengths:
            frames = int(model.codec_model.get_encoded_length(torch.tensor([samples])))
            ids += torch.randint(0, TEXT_IDS, (3,), generator=generator).tolist() + [AUDIO] * frames + [AUDIO_EOS]
        rows.append(ids + torch.randint(0, TEXT_IDS, (4,), generator=generator).tolist())
    width = max(map(len, rows))
    most = max(1, *map(len, segments))
    cutoffs = torch.full((len(rows), most), -1)
    for row, lengths in enumerate(segments):
        if lengths:
            cutoffs[row, : len(lengths)] = torch.tensor(lengths).cumsum(0)
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(ids)) + ids for ids in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]),
        "input_values": torch.randn(len(rows), 1, int(cutoffs.max()), generator=generator).to(model.dtype),
        "input_values_cutoffs": cutoffs,
    }


def stock(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The class's own ``generate``, whatever stands in for it on the instance."""
    return type(model).generate(model, *args, **kwargs)


def lowered(weight: Tensor, fmt: str) -> Tensor:
    """What ``[..., N, K]`` stands for in a format of the policy, fp32."""
    casts = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if fmt == "keep":
        return weight.float()
    if fmt in casts:
        return weight.to(casts[fmt]).float()
    layout = int4_layout(fmt)
    return dequantize(quantize(weight, fmt) if layout is None else quantize(weight, "int4", *layout))


def lowered_twin(policy: Any, *, of: Any) -> Any:
    """The stock model ``of``, changed to fp32 weights that are what its copies under a policy stand for.

    A tied embedding must have one format. The KV cache stays the stock model's.
    """
    model = of.float()

    def lower(zone: str, weight: Tensor) -> None:
        weight.copy_(lowered(weight, policy.format_of(zone)))

    depth = model.depth_decoder
    with torch.no_grad():
        for stack, layers in (("backbone", model.backbone_model.layers), ("depth", depth.model.layers)):
            for layer in layers:
                for part in "qkvo":
                    lower(f"{stack}.attention", getattr(layer.self_attn, f"{part}_proj").weight)
                for part in ("gate", "up", "down"):
                    lower(f"{stack}.mlp", getattr(layer.mlp, f"{part}_proj").weight)
        lower("backbone.head", model.lm_head.weight)
        lower("depth.projection", depth.model.inputs_embeds_projector.weight)
        for k, head in enumerate(depth.codebooks_head.weight, start=1):
            lower(f"depth.head.{k}", head.transpose(-1, -2))
        lower("backbone.embedding", model.backbone_model.embed_tokens.embed_audio_tokens.weight)
        if depth.model.embed_tokens.weight is not model.backbone_model.embed_tokens.embed_audio_tokens.weight:
            lower("depth.embedding", depth.model.embed_tokens.weight)
    return model


def int8_twin(name: str = "base", zones: tuple[str, ...] | None = None, *, of: Any = None, **options: Any) -> Any:
    """A stock fp32 model whose weights are what the int8 copies of ``build(name, **options)`` stand for.

    ``zones`` limits it to some zones of the policy; None means those of the preset. ``of`` is a stock model to change
    instead.
    """
    policy = PRESETS["int8"] if zones is None else PrecisionPolicy(tuple((zone, "int8") for zone in zones))
    return lowered_twin(policy, of=build(name, **options) if of is None else of)


def teacher_forced(model: Any, prompt: dict[str, Tensor], frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the stock modules say of frames already made, all of them in one pass.

    Args:
        model: a stock or accelerated model.
        prompt: text ids and mask.
        frames: ``[N, F, codebooks]``.

    Returns:
        The backbone's normalised hidden states ``[N, F, D]``, codebook 0's logits ``[N, F, V]`` and the depth decoder's
        logits ``[N, F, codebooks - 1, V]``.
    """
    count, made, codebooks = frames.shape
    with torch.no_grad():
        x = model._merge_input_ids_with_input_values(prompt["input_ids"])["inputs_embeds"]
        tokens = x.shape[1]
        x = torch.cat([x, model.backbone_model.embed_tokens(frames[:, :-1])], dim=1)
        mask = torch.cat([prompt["attention_mask"], torch.ones(count, made - 1, dtype=torch.long)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = model.backbone_model(inputs_embeds=x, attention_mask=mask, position_ids=positions).last_hidden_state
        hidden = hidden[:, tokens - 1 :]
        fed = torch.nn.functional.pad(frames[..., :-1].flatten(0, 1), (1, 0))
        depth = model.depth_decoder(input_ids=fed, backbone_last_hidden_state=hidden.flatten(0, 1)).logits
        return hidden, model.lm_head(hidden), depth.view(count, made, codebooks - 1, -1)


@contextlib.contextmanager
def on_fast_path(model: Any, calls: int = 1) -> Iterator[None]:
    """Fail unless the block makes ``calls`` fast calls, none on the stock path and no fault."""
    metrics = model.acceleration.metrics
    before = dict(metrics.counters)
    yield
    made = {key: metrics.counters[key] - before.get(key, 0) for key in ("generate.fast", "generate.stock", "faults")}
    assert made == {"generate.fast": calls, "generate.stock": 0, "faults": 0}, (made, dict(metrics.stock_reasons))


@contextlib.contextmanager
def on_stock_path(model: Any, reason: str, calls: int = 1) -> Iterator[None]:
    """Fail unless the block makes ``calls`` calls on the stock path with a reason that contains ``reason``."""
    metrics = model.acceleration.metrics
    before, reasons = dict(metrics.counters), dict(metrics.stock_reasons)
    yield
    made = {key: metrics.counters[key] - before.get(key, 0) for key in ("generate.fast", "generate.stock", "faults")}
    assert made == {"generate.fast": 0, "generate.stock": calls, "faults": 0}, made
    named = [key for key, count in metrics.stock_reasons.items() if count > reasons.get(key, 0)]
    assert any(reason in key for key in named), (reason, named)


class Recorder:
    """A streamer that keeps what it was given."""

    def __init__(self) -> None:
        self.puts: list[Tensor] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert self.ends == 0, "put after end"
        self.puts.append(value.clone())

    def end(self) -> None:
        self.ends += 1


def assert_same_puts(ours: Recorder, theirs: Recorder) -> None:
    assert ours.ends == theirs.ends == 1
    assert len(ours.puts) == len(theirs.puts)
    for mine, other in zip(ours.puts, theirs.puts):
        assert mine.dtype == other.dtype
        assert mine.device == other.device
        assert torch.equal(mine, other)
