"""A small CSM with seeded weights and a processor for it: what the demo, the tests and the benchmarks run offline.

The architecture is CSM's own (32 codebooks of 2051, llama3-scaled rotary positions, a Mimi codec of 24 kHz and 12.5
frames per second), only narrow and untrained: it speaks noise, at the cost and through the code paths of speech.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BEGIN_OF_TEXT, END_OF_TEXT, AUDIO, AUDIO_EOS, PAD = range(256, 261)
"""Token ids above the 256 byte values, in the order of the real vocabulary."""

MARKER = "small_processor.json"
"""File by which a saved model's folder says that :class:`SmallProcessor` prepares its inputs."""

_SPECIAL = {BEGIN_OF_TEXT: "<|begin_of_text|>", END_OF_TEXT: "<|end_of_text|>", AUDIO: "<|AUDIO|>"}
_SPECIAL |= {AUDIO_EOS: "<|audio_eos|>", PAD: "<|pad|>"}
_LOGIT_STD = 2.5
_LEVEL = 0.1


def build_small_csm(
    seed: int = 0,
    *,
    layers: int = 6,
    hidden: int = 512,
    depth_layers: int = 4,
    depth_hidden: int = 256,
    codebooks: int = 32,
    positions: int = 2048,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Build a small ``CsmForConditionalGeneration`` in eval mode on the CPU; 112 M parameters at the default sizes.

    The same arguments give the same weights, and torch's own random state is left alone. The logits spread enough for
    tokens to vary from frame to frame, greedy or sampled, and the three tokens the codec has no vector for never win.

    Args:
        seed: of the weights.
        layers: layers of the backbone.
        hidden: width of the backbone, a multiple of 256 (heads of 64, four to a key-value head); its FFN is 4 times
            that.
        depth_layers: layers of the depth decoder.
        depth_hidden: width of the depth decoder, a multiple of 64 (8 heads and 2 key-value heads); its FFN is 4 times
            that.
        codebooks: codebooks per frame, at least 3.
        positions: positions (prompt and frames) the backbone is made for.
        dtype: of backbone and depth decoder; the codec stays fp32.

    Raises:
        ValueError: a size that does not fit; names it.
    """
    for name, value, unit in (("hidden", hidden, 256), ("depth_hidden", depth_hidden, 64)):
        if value < unit or value % unit:
            raise ValueError(f"{name} must be a positive multiple of {unit}, got {value}")
    for name, value, least in (("layers", layers, 1), ("depth_layers", depth_layers, 1), ("codebooks", codebooks, 3)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    from transformers import CsmForConditionalGeneration

    config = _config(
        layers=layers,
        hidden=hidden,
        depth_layers=depth_layers,
        depth_hidden=depth_hidden,
        codebooks=codebooks,
        positions=positions,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = CsmForConditionalGeneration(config).eval()
        _fill_decoders(model)
        _silence_tokens(model, range(config.codec_config.codebook_size, config.vocab_size))
        _fill_codec(model.codec_model)
    model.to(dtype)
    model.codec_model.float()
    return model


def _config(*, layers: int, hidden: int, depth_layers: int, depth_hidden: int, codebooks: int, positions: int) -> Any:
    from transformers import CsmConfig, CsmDepthDecoderConfig, MimiConfig

    def rope(high: float, low: float, original: int) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "high_freq_factor": high,
            "low_freq_factor": low,
            "original_max_position_embeddings": original,
        }

    codec = MimiConfig(
        hidden_size=64,
        num_filters=8,
        codebook_dim=32,
        vector_quantization_hidden_dimension=32,
        num_quantizers=codebooks,
        num_hidden_layers=2,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        upsample_groups=64,
    )
    depth = CsmDepthDecoderConfig(
        num_codebooks=codebooks,
        backbone_hidden_size=hidden,
        hidden_size=depth_hidden,
        intermediate_size=4 * depth_hidden,
        num_hidden_layers=depth_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=codebooks + 1,
        rope_parameters=rope(0.0078125, 0.001953125, 16),
    )
    return CsmConfig(
        num_codebooks=codebooks,
        text_vocab_size=256 + len(_SPECIAL),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        max_position_embeddings=positions,
        bos_token_id=BEGIN_OF_TEXT,
        pad_token_id=AUDIO,
        audio_token_id=AUDIO,
        audio_eos_token_id=AUDIO_EOS,
        rope_parameters=rope(0.5, 0.125, 1024),
        tie_codebooks_embeddings=False,  # equal values in two tensors: transformers 5.17 loads a tied pair untied
        depth_decoder_config=depth,
        codec_config=codec,
    )


def _fill_decoders(model: Any) -> None:
    """Weights under which activations keep their size and logits have a standard deviation of ``_LOGIT_STD``."""
    depth, backbone = model.depth_decoder, model.backbone_model
    for module in (*backbone.modules(), *depth.modules()):
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
    model.lm_head.weight.normal_(std=_LOGIT_STD * model.config.hidden_size**-0.5)
    depth.codebooks_head.weight.normal_(std=_LOGIT_STD * depth.config.hidden_size**-0.5)
    model.embed_text_tokens.weight.normal_()
    depth.model.embed_tokens.weight.normal_(std=model.config.num_codebooks**-0.5)  # a frame sums one per codebook
    backbone.embed_tokens.embed_audio_tokens.weight.copy_(depth.model.embed_tokens.weight)


def _silence_tokens(model: Any, tokens: Iterable[int]) -> None:
    """Give tokens a logit no sampler picks, without a bias, which CSM's heads do not have.

    Channel 0 of both residual streams becomes a positive constant that no layer writes to; the heads read it for these
    tokens only, and negatively.
    """
    depth, silent = model.depth_decoder, list(tokens)
    embeddings = (model.backbone_model.embed_tokens.embed_audio_tokens, depth.model.embed_tokens)
    for embedding in embeddings:
        embedding.weight[:, 0] = model.config.num_codebooks**-0.5
    model.embed_text_tokens.weight[:, 0] = 2.0
    for layer in (*model.backbone_model.layers, *depth.model.layers):
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    depth.model.inputs_embeds_projector.weight[0] = 0.0
    depth.model.inputs_embeds_projector.weight[0, 0] = 4.0
    for head in (model.lm_head.weight.T, *depth.codebooks_head.weight):  # each [width, vocabulary]
        head[0] = 0.0
        head[:, silent] = 0.0
        head[0, silent] = -200.0


def _fill_codec(codec: Any) -> None:
    """Codebook vectors, which transformers leaves at zero, and an audible output level."""
    quantizer = codec.quantizer
    for part in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
        for depth, layer in enumerate(part.layers):
            layer.codebook.embed_sum.normal_(std=0.9**depth)
    codes = torch.randint(codec.config.codebook_size, (1, codec.config.num_quantizers, 25))
    last = codec.decoder.layers[-1].conv
    gain = _LEVEL / float(codec.decode(codes).audio_values.std())
    last.weight.mul_(gain)
    last.bias.zero_()


class SmallProcessor:
    """What ``CsmProcessor`` is to CSM-1B, for a model of :func:`build_small_csm`: one token per byte of text.

    Args:
        model: the model; its codec tells how many frames a recording becomes.

    Example::

        model = build_small_csm()
        inputs = SmallProcessor(model).apply_chat_template(conversation, tokenize=True, return_dict=True)
        audio = model.generate(**inputs, output_audio=True)
    """

    def __init__(self, model: Any) -> None:
        self._codec = model.codec_model
        self.sampling_rate: int = model.config.codec_config.sampling_rate

    def apply_chat_template(
        self, conversation: Sequence[Any], *, tokenize: bool = False, return_dict: bool = False
    ) -> Any:
        """Turn one conversation, or a list of them, into what ``generate`` takes.

        Args:
            conversation: messages ``{"role": "0", "content": [{"type": "text", "text": str}, {"type": "audio", "path":
                samples}]}``, role the speaker as digits, samples ``[S]`` mono at 24 kHz. Every message but the last
                has one text and one audio; the last one has a text and may have an audio.
            tokenize: False returns the rendered text, a string or a list of strings.
            return_dict: False returns ``input_ids`` alone.

        Returns:
            A ``BatchFeature``: ``input_ids`` and ``attention_mask`` ``[N, T]`` int64, padded on the left; where there
            is audio, ``input_values`` ``[N, 1, S]`` fp32, each row its recordings joined, and ``input_values_cutoffs``
            ``[N, segments]`` int64, where each recording ends in samples, padded with -1.

        Raises:
            ValueError: a conversation of another form; says what came and what was wanted.
        """
        if not conversation:
            raise ValueError("conversation is empty; at least one message is needed")
        batched = isinstance(conversation[0], (list, tuple))
        rows = [self._read(row) for row in (conversation if batched else [conversation])]
        if not tokenize:
            texts = [_render(turns) for turns in rows]
            return texts if batched else texts[0]
        from transformers import BatchFeature

        data = _pad_left([self._tokens(turns) for turns in rows])
        recordings = [[audio for _, _, audio in turns if audio is not None] for turns in rows]
        if any(recordings):
            data |= _join(recordings)
        return BatchFeature(data) if return_dict else data["input_ids"]

    def save_audio(self, audio: Tensor | Sequence[Tensor], saving_path: str | Path | Sequence[str | Path]) -> None:
        """Write audio ``[S]`` in -1..1, or a list of such, to as many WAV files of 16 bit."""
        import soundfile

        waves = [audio] if isinstance(audio, Tensor) else list(audio)
        paths = [saving_path] if isinstance(saving_path, (str, Path)) else list(saving_path)
        if len(waves) != len(paths):
            raise ValueError(f"saving_path names {len(paths)} files for {len(waves)} recordings")
        for wave, path in zip(waves, paths):
            soundfile.write(path, wave.detach().float().cpu().numpy(), self.sampling_rate, subtype="PCM_16")

    def save_pretrained(self, folder: str | Path) -> None:
        """Mark a folder that ``model.save_pretrained`` has written, so that the processor is found again."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        content = {"processor": "csm_runtime.small_model.SmallProcessor", "tokens": {v: k for k, v in _SPECIAL.items()}}
        (path / MARKER).write_text(json.dumps(content, indent=2) + "\n")

    def _read(self, messages: Sequence[Any]) -> list[tuple[str, str, Tensor | None]]:
        """Speaker, text and samples of each message."""
        turns = []
        for index, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if not (isinstance(role, str) and role.isdigit()):
                raise ValueError(f"role must be the speaker as a string of digits, got {role!r}")
            kinds = [item["type"] for item in content]
            wanted = [["audio", "text"]] if index + 1 < len(messages) else [["audio", "text"], ["text"]]
            if sorted(kinds) not in wanted:
                raise ValueError(
                    f"message {index} has content of types {kinds}; every message needs one 'text' and, unless it is "
                    "the last, one 'audio'"
                )
            parts = {item["type"]: item for item in content}
            samples = _samples(parts["audio"], index) if "audio" in parts else None
            turns.append((role, parts["text"]["text"], samples))
        return turns

    def _tokens(self, turns: Sequence[tuple[str, str, Tensor | None]]) -> list[int]:
        tokens: list[int] = []
        for role, text, audio in turns:
            tokens += [BEGIN_OF_TEXT, *f"[{role}]{text}".encode(), END_OF_TEXT]
            if audio is not None:
                frames = int(self._codec.get_encoded_length(torch.tensor(len(audio))))
                tokens += [AUDIO] * frames + [AUDIO_EOS]
        return tokens


def _samples(item: dict[str, Any], index: int) -> Tensor:
    value = item.get("path", item.get("audio"))
    if value is None or isinstance(value, (str, Path)):
        raise ValueError(f"the audio of message {index} must be given as samples under 'path', got {value!r}")
    samples = torch.as_tensor(value).detach().to("cpu", torch.float32)
    if samples.ndim != 1 or not len(samples):
        raise ValueError(f"the audio of message {index} must be mono samples [S], got shape {tuple(samples.shape)}")
    return samples


def _render(turns: Sequence[tuple[str, str, Tensor | None]]) -> str:
    begin, end, audio = _SPECIAL[BEGIN_OF_TEXT], _SPECIAL[END_OF_TEXT], _SPECIAL[AUDIO] + _SPECIAL[AUDIO_EOS]
    return "".join(f"{begin}[{role}]{text}{end}{'' if samples is None else audio}" for role, text, samples in turns)


def _pad_left(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def _join(recordings: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Each row's recordings one after another, rows padded on the right with silence."""
    waves = [torch.cat(list(row)) if row else torch.zeros(0) for row in recordings]
    ends = [torch.tensor([len(wave) for wave in row], dtype=torch.long).cumsum(0) for row in recordings]
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_values": pad(waves, batch_first=True)[:, None],
        "input_values_cutoffs": pad(ends, batch_first=True, padding_value=-1),
    }
