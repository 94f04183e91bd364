"""Models and generators of the structure of Sesame's ``csm`` repository, at sizes for tests, with seeded weights.

People copy those files into projects of their own, so what stands for them here has their names, attributes and numerics
and depends on no path. torchtune and moshi are imported inside functions; nothing needs a network. The generator takes
its tokenizer, codec and watermarker as arguments, where the original fetches them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F

FRAME_MS = 80
WATERMARK_KEY = [212, 211, 146, 56, 201]

FLAVORS: dict[str, dict[str, Any]] = {
    "llama-1B": dict(num_layers=16, num_heads=32, num_kv_heads=8, embed_dim=2048, intermediate_dim=8192),
    "llama-100M": dict(num_layers=4, num_heads=8, num_kv_heads=2, embed_dim=1024, intermediate_dim=8192),
    "llama-1B-4096": dict(
        num_layers=16, num_heads=32, num_kv_heads=8, embed_dim=2048, intermediate_dim=8192, max_seq_len=4096
    ),
    "tiny": dict(num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=64, intermediate_dim=96),
    "tiny-depth": dict(num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=32, intermediate_dim=56),
    "tiny-unscaled": dict(num_layers=2, num_heads=4, num_kv_heads=1, embed_dim=64, intermediate_dim=96, scale_factor=1),
    "tiny-4096": dict(num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=64, intermediate_dim=96, max_seq_len=4096),
    "tiny-10000": dict(
        num_layers=1, num_heads=2, num_kv_heads=1, embed_dim=32, intermediate_dim=48, max_seq_len=10_000
    ),
    "wide": dict(num_layers=3, num_heads=8, num_kv_heads=4, embed_dim=128, intermediate_dim=200),
    "wide-depth": dict(num_layers=1, num_heads=4, num_kv_heads=4, embed_dim=48, intermediate_dim=64, norm_eps=1e-3),
}
"""Arguments of torchtune's ``llama3_2`` by flavor, beside those of :data:`_COMMON`."""
_COMMON: dict[str, Any] = dict(max_seq_len=2048, attn_dropout=0.0, norm_eps=1e-5, rope_base=500_000, scale_factor=32)


@dataclass
class ModelArgs:
    backbone_flavor: str
    decoder_flavor: str
    text_vocab_size: int
    audio_vocab_size: int
    audio_num_codebooks: int


PRESETS: dict[str, ModelArgs] = {
    "tiny": ModelArgs("tiny", "tiny-depth", 300, 35, 4),
    "unscaled": ModelArgs("tiny-unscaled", "tiny-depth", 300, 35, 5),
    "wide": ModelArgs("wide", "wide-depth", 300, 67, 8),
    "codebooks": ModelArgs("tiny", "tiny-depth", 300, 35, 32),
    "long": ModelArgs("tiny-10000", "tiny-depth", 300, 35, 4),
    "fork": ModelArgs("tiny-4096", "tiny-depth", 300, 35, 4),
    "1b": ModelArgs("llama-1B", "llama-100M", 128_256, 2051, 32),
    "1b-fork": ModelArgs("llama-1B-4096", "llama-100M", 128_256, 2051, 32),
}
"""``fork`` has the room of the streaming forks, ``long`` positions beyond Llama's original 8192."""


def build(
    preset: str | ModelArgs = "tiny", *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Model:
    """A model in eval mode, without KV caches, whose greedy codes vary.

    Weights are drawn in fp32 and then rounded, so that a seed means the same model in every dtype. As in the original,
    ``.to(dtype)`` has rounded the rotary table too.
    """
    args = PRESETS[preset] if isinstance(preset, str) else preset
    with torch.device("meta"):  # torchtune's own initialisation takes half a minute at 1B
        model = Model(dataclasses.replace(args))
    model = model.to(dtype).to_empty(device=device)
    with torch.device(device):
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    _fill(model, seed)
    return model.to(dtype).eval()


@torch.no_grad()
def _fill(model: Model, seed: int) -> None:
    """Linear layers keep the size of what goes through them; a head's logits have deviation 1.5."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.empty(parameter.shape)
        if name.endswith("scale"):
            drawn.uniform_(0.5, 1.5, generator=generator)
        elif "embeddings" in name:
            drawn.normal_(0.0, 0.6, generator=generator)
        elif name == "audio_head":
            drawn.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5, generator=generator)
        else:
            gain = 1.5 if name == "codebook0_head.weight" else 1.0
            drawn.normal_(0.0, gain * parameter.shape[-1] ** -0.5, generator=generator)
        parameter.copy_(drawn)


# ------------------------------------------------------------------------------------------------------------- models


def _stack(flavor: str) -> tuple[Any, int]:
    """A Llama of torchtune's without embedding and head, and its width."""
    from torchtune.models import llama3_2

    options = {**_COMMON, **FLAVORS[flavor]}
    stack = llama3_2.llama3_2(vocab_size=1, **options)
    stack.tok_embeddings = nn.Identity()
    stack.output = nn.Identity()
    return stack, options["embed_dim"]


def _causal(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


def sample_topk(logits: Tensor, topk: int, temperature: float) -> Tensor:
    """``[N, V]`` to ``[N, 1]`` int32: the first of exponential clocks that run at the speed of the probabilities."""
    scaled = logits / temperature
    last = torch.topk(scaled, topk).values[..., -1:]
    kept = scaled.masked_fill(scaled < last, -float("inf"))
    probabilities = F.softmax(F.log_softmax(kept, dim=-1), dim=-1)
    clocks = torch.empty_like(probabilities).exponential_(1)
    return (probabilities / clocks).argmax(dim=-1, keepdim=True).to(torch.int)


class Model(nn.Module):
    """Backbone, depth decoder, embeddings and heads; one call makes one frame."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        self.config = config
        vocab, codebooks = config.audio_vocab_size, config.audio_num_codebooks
        self.backbone, outer = _stack(config.backbone_flavor)
        self.decoder, inner = _stack(config.decoder_flavor)
        self.text_embeddings = nn.Embedding(config.text_vocab_size, outer)
        self.audio_embeddings = nn.Embedding(vocab * codebooks, outer)
        self.projection = nn.Linear(outer, inner, bias=False)
        self.codebook0_head = nn.Linear(outer, vocab, bias=False)
        self.audio_head = nn.Parameter(torch.empty(codebooks - 1, inner, vocab))

    def setup_caches(self, max_batch_size: int) -> None:
        first = next(self.parameters())
        with first.device:
            self.backbone.setup_caches(max_batch_size, first.dtype)
            self.decoder.setup_caches(max_batch_size, first.dtype, decoder_max_seq_len=self.config.audio_num_codebooks)
        self.register_buffer("backbone_causal_mask", _causal(self.backbone.max_seq_len, first.device))
        self.register_buffer("decoder_causal_mask", _causal(self.config.audio_num_codebooks, first.device))

    def reset_caches(self) -> None:
        self.backbone.reset_caches()
        self.decoder.reset_caches()

    def generate_frame(
        self, tokens: Tensor, tokens_mask: Tensor, input_pos: Tensor, temperature: float, topk: int
    ) -> Tensor:
        """Codes ``[B, C]`` int32 from ``[B, S, C + 1]`` tokens, the text's last, their mask, and positions ``[B, S]``."""
        dtype = next(self.parameters()).dtype
        assert self.backbone.caches_are_enabled(), "backbone caches are not enabled"

        mask = self.backbone_causal_mask[input_pos, :]
        h = (self._embed_tokens(tokens) * tokens_mask.unsqueeze(-1)).sum(dim=2)
        hidden = self.backbone(h, input_pos=input_pos, mask=mask).to(dtype=dtype)[:, -1, :]
        code = sample_topk(self.codebook0_head(hidden), topk, temperature)
        codes = [code]

        self.decoder.reset_caches()
        fed = torch.cat([hidden.unsqueeze(1), self._embed_audio(0, code)], dim=1)
        positions = torch.arange(2, device=fed.device).unsqueeze(0).repeat(fed.size(0), 1)
        for book in range(1, self.config.audio_num_codebooks):
            mask = self.decoder_causal_mask[positions, :]
            inner = self.decoder(self.projection(fed), input_pos=positions, mask=mask).to(dtype=dtype)
            code = sample_topk(torch.mm(inner[:, -1, :], self.audio_head[book - 1]), topk, temperature)
            codes.append(code)
            fed = self._embed_audio(book, code)
            positions = positions[:, -1:] + 1
        return torch.cat(codes, dim=1)

    def _embed_audio(self, codebook: int, tokens: Tensor) -> Tensor:
        return self.audio_embeddings(tokens + codebook * self.config.audio_vocab_size)

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        books = torch.arange(self.config.audio_num_codebooks, device=tokens.device)
        audio = self.audio_embeddings(tokens[..., :-1] + self.config.audio_vocab_size * books)
        return torch.cat([audio, self.text_embeddings(tokens[..., -1]).unsqueeze(-2)], dim=-2)


# --------------------------------------------------------------------------------------------------------- generators


@dataclass
class Segment:
    """One turn: ``audio`` is ``[samples]`` at the generator's sample rate."""

    speaker: int
    text: str
    audio: Tensor


class Generator:
    """Text and earlier turns to a waveform, in one piece.

    Args:
        model: its caches are set up here, for one row.
        text_tokenizer: ``encode(text)`` gives ids; a :class:`StubTokenizer` by default.
        audio_tokenizer: a :class:`StubCodec` by default; :func:`small_mimi` is moshi's.
        watermarker: what :func:`watermark` is called with; None is a :class:`StubWatermarker`.
    """

    max_seq_len = 2048

    def __init__(
        self, model: Model, text_tokenizer: Any = None, audio_tokenizer: Any = None, watermarker: Any = None
    ) -> None:
        self._model = model
        self._model.setup_caches(1)
        config = model.config
        self.device = next(model.parameters()).device
        self._text_tokenizer = StubTokenizer(config.text_vocab_size) if text_tokenizer is None else text_tokenizer
        if audio_tokenizer is None:
            audio_tokenizer = StubCodec(config.audio_num_codebooks, config.audio_vocab_size).to(self.device)
        audio_tokenizer.set_num_codebooks(config.audio_num_codebooks)
        self._audio_tokenizer = audio_tokenizer
        self._watermarker = StubWatermarker() if watermarker is None else watermarker
        self.sample_rate = audio_tokenizer.sample_rate

    def _frames(self, count: int) -> tuple[Tensor, Tensor]:
        shape = (count, self._model.config.audio_num_codebooks + 1)
        return (
            torch.zeros(shape, dtype=torch.long, device=self.device),
            torch.zeros(shape, dtype=torch.bool, device=self.device),
        )

    def _tokenize_text_segment(self, text: str, speaker: int) -> tuple[Tensor, Tensor]:
        ids = self._text_tokenizer.encode(f"[{speaker}]{text}")
        frames, mask = self._frames(len(ids))
        frames[:, -1] = torch.tensor(ids, device=self.device)
        mask[:, -1] = True
        return frames, mask

    def _tokenize_audio(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        assert audio.ndim == 1, "Audio must be single channel"
        codes = self._audio_tokenizer.encode(audio.to(self.device)[None, None])[0]  # [C, F]
        codes = F.pad(codes, (0, 1))  # the frame that ends speech
        frames, mask = self._frames(codes.size(1))
        frames[:, :-1] = codes.transpose(0, 1)
        mask[:, :-1] = True
        return frames, mask

    def _tokenize_segment(self, segment: Segment) -> tuple[Tensor, Tensor]:
        text, audio = self._tokenize_text_segment(segment.text, segment.speaker), self._tokenize_audio(segment.audio)
        return torch.cat([text[0], audio[0]]), torch.cat([text[1], audio[1]])

    def _prompt(self, text: str, speaker: int, context: Sequence[Segment]) -> tuple[Tensor, Tensor]:
        parts = [self._tokenize_segment(segment) for segment in context]
        parts.append(self._tokenize_text_segment(text, speaker))
        tokens, masks = zip(*parts)
        return torch.cat(tokens).long(), torch.cat(masks).bool()

    def _speak(self, prompt: Tensor, mask: Tensor, most: int, temperature: float, topk: int) -> Iterator[Tensor]:
        """Frames ``[1, C]``, at most ``most``, until one is all zeros, which is not among them."""
        tokens, tokens_mask = prompt.unsqueeze(0), mask.unsqueeze(0)
        positions = torch.arange(len(prompt), device=self.device).unsqueeze(0)
        nothing = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        for _ in range(most):
            frame = self._frame(tokens, tokens_mask, positions, temperature, topk)
            if torch.all(frame == 0):
                return
            yield frame
            tokens = torch.cat([frame, nothing], dim=1).unsqueeze(1)
            tokens_mask = torch.cat([torch.ones_like(frame).bool(), nothing.bool()], dim=1).unsqueeze(1)
            positions = positions[:, -1:] + 1

    def _frame(self, *args: Any) -> Tensor:
        return self._model.generate_frame(*args)

    def _decode(self, frames: Sequence[Tensor]) -> Tensor:
        return self._audio_tokenizer.decode(torch.stack(list(frames)).permute(1, 2, 0)).squeeze(0).squeeze(0)

    @torch.inference_mode()
    def generate(
        self,
        text: str,
        speaker: int,
        context: list[Segment],
        max_audio_length_ms: float = 90_000,
        temperature: float = 0.9,
        topk: int = 50,
    ) -> Tensor:
        self._model.reset_caches()
        most = int(max_audio_length_ms / FRAME_MS)
        prompt, mask = self._prompt(text, speaker, context)
        room = self.max_seq_len - most
        if len(prompt) >= room:
            raise ValueError(f"Inputs too long, must be below max_seq_len - max_generation_len: {room}")
        audio = self._decode(list(self._speak(prompt, mask, most, temperature, topk)))
        audio, rate = watermark(self._watermarker, audio, self.sample_rate, WATERMARK_KEY)
        return torchaudio.functional.resample(audio, orig_freq=rate, new_freq=self.sample_rate)


class StreamingGenerator(Generator):
    """In the manner of the streaming forks: chunks of frames through the codec's streaming state, no watermark.

    Too long a prompt loses its beginning instead of being refused, every chunk has one of two sizes (the last is padded with
    zeros and cut), and a fork may call the model under autocast.

    Args:
        model: one of the presets with room for 4096 positions, or any other.
        chunk_frames: of the first chunk and of those that follow.
        autocast: dtype, or None for the model's own.
        others: of :class:`Generator`.
    """

    max_seq_len = 4096

    def __init__(
        self,
        model: Model,
        *others: Any,
        chunk_frames: tuple[int, int] = (2, 4),
        autocast: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, *others, **options)
        self.max_seq_len = min(self.max_seq_len, model.backbone.max_seq_len)
        self._chunk_frames = chunk_frames
        self._autocast = autocast

    def _frame(self, *args: Any) -> Tensor:
        if self._autocast is None:
            return super()._frame(*args)
        with torch.autocast(device_type=self.device.type, dtype=self._autocast):
            return super()._frame(*args)

    @torch.inference_mode()
    def generate_stream(
        self,
        text: str,
        speaker: int,
        context: list[Segment],
        max_audio_length_ms: float = 90_000,
        temperature: float = 0.7,
        topk: int = 30,
        on_chunk_generated: Callable[[Tensor], None] | None = None,
    ) -> Iterator[Tensor]:
        self._model.reset_caches()
        most = int(max_audio_length_ms / FRAME_MS)
        prompt, mask = (part[-self.max_seq_len :] for part in self._prompt(text, speaker, context))
        waiting: list[Tensor] = []
        size, later = self._chunk_frames
        with self._audio_tokenizer.streaming(1):
            for frame in self._speak(prompt, mask, most, temperature, topk):
                waiting.append(frame)
                if len(waiting) == size:
                    yield self._chunk(waiting, size, on_chunk_generated)
                    waiting, size = [], later
            if waiting:
                yield self._chunk(waiting, size, on_chunk_generated)

    def _chunk(self, frames: list[Tensor], size: int, tell: Callable[[Tensor], None] | None) -> Tensor:
        padded = frames + [torch.zeros_like(frames[0])] * (size - len(frames))
        audio = self._decode(padded)
        chunk = audio[: len(audio) * len(frames) // size].cpu()
        if tell is not None:
            tell(chunk)
        return chunk

    def generate(self, *args: Any, stream: bool = False, **options: Any) -> Tensor:
        """One piece, of chunks with ``stream=True``."""
        if not stream:
            return super().generate(*args, **options)
        chunks = list(self.generate_stream(*args, **options))
        return torch.cat(chunks) if chunks else torch.tensor([])


def watermark(watermarker: Any, audio: Tensor, sample_rate: int, key: list[int]) -> tuple[Tensor, int]:
    """Marked sound and its sample rate; a module's function, not the generator's, as in the original."""
    fast = torchaudio.functional.resample(audio, orig_freq=sample_rate, new_freq=44_100)
    marked, _ = watermarker.encode_wav(fast, 44_100, key, calc_sdr=False, message_sdr=36)
    rate = min(44_100, sample_rate)
    return torchaudio.functional.resample(marked, orig_freq=44_100, new_freq=rate), rate


# -------------------------------------------------------------------------------------- what the original would fetch


class StubTokenizer:
    """Bytes as ids, with a beginning and an end; the two highest ids of the vocabulary."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab

    def encode(self, text: str) -> list[int]:
        ids = [byte % (self._vocab - 2) for byte in text.encode()]
        return [self._vocab - 2, *ids, self._vocab - 1]


class StubWatermarker:
    """Adds a faint square wave, and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, list[int]]] = []

    def encode_wav(
        self, audio: Tensor, rate: int, key: list[int], calc_sdr: bool = True, message_sdr: float | None = None
    ) -> tuple[Tensor, None]:
        self.calls.append((audio.numel(), rate, list(key)))
        wave = torch.arange(audio.numel(), device=audio.device) % (2 * len(key)) < len(key)
        return audio + 1e-3 * (wave.to(audio.dtype) - 0.5), None


class StubCodec(nn.Module):
    """The interface of moshi's ``MimiModel``; a frame's sound depends on the frames before it.

    Args:
        codebooks: how many there are; :meth:`set_num_codebooks` may take fewer.
        bins: codes per codebook.
        seed: of its tables.
    """

    sample_rate = 24_000
    frame_rate = 12.5
    frame_size = 1920
    channels = 1

    def __init__(self, codebooks: int, bins: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.tables = nn.Parameter(torch.randn(codebooks, bins, 8, generator=generator), requires_grad=False)
        self.basis = nn.Parameter(torch.randn(8, self.frame_size, generator=generator), requires_grad=False)
        self.num_codebooks = self.total_codebooks = codebooks
        self.cardinality = bins
        self._streaming_state: Tensor | None = None

    def set_num_codebooks(self, n: int) -> None:
        assert 1 <= n <= self.total_codebooks
        self.num_codebooks = n

    @property
    def is_streaming(self) -> bool:
        return self._streaming_state is not None

    def streaming(self, batch_size: int) -> contextlib.ExitStack:
        """Streams from this call on, not from entering what it returns; leaving that ends it. So does moshi."""
        assert self._streaming_state is None, "is already streaming!"
        self._streaming_state = torch.zeros(batch_size, 8, device=self.tables.device)
        stack = contextlib.ExitStack()
        stack.callback(setattr, self, "_streaming_state", None)
        return stack

    def reset_streaming(self) -> None:
        assert self._streaming_state is not None
        self._streaming_state.zero_()

    def encode(self, x: Tensor) -> Tensor:
        """Sound ``[B, 1, T]`` to codes ``[B, C, F]`` int64."""
        assert x.dim() == 3
        x = F.pad(x, (0, -x.shape[-1] % self.frame_size))
        rest = x.view(x.shape[0], -1, self.frame_size).to(self.basis.dtype) @ self.basis.t() / 40
        codes = []
        for table in self.tables[: self.num_codebooks]:
            codes.append(torch.cdist(rest, table.expand(len(rest), -1, -1)).argmin(dim=-1))
            rest = rest - table[codes[-1]]
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[B, C, F]`` to sound ``[B, 1, 1920 F]``."""
        state = self._streaming_state
        state = self.tables.new_zeros(codes.shape[0], 8) if state is None else state
        books = torch.arange(codes.shape[1], device=codes.device)[:, None]
        latents, sound = self.tables[books, codes.long()].sum(dim=1), []  # [B, F, 8]
        for latent in latents.unbind(dim=1):
            state = latent + 0.6 * state
            sound.append(torch.tanh(state @ self.basis / 20))
        if self._streaming_state is not None:
            self._streaming_state = state
        return torch.cat(sound, dim=-1).unsqueeze(1)


def small_mimi(codebooks: int, bins: int = 32, *, seed: int = 0, device: str = "cpu") -> Any:
    """moshi's ``MimiModel`` with 24 kHz and 12.5 frames per second as the real one, a few thousand seeded weights, fp32.

    moshi compiles some of its functions when they are first called; this keeps it from doing so if it is the first to
    import it.
    """
    os.environ.setdefault("NO_TORCH_COMPILE", "1")
    from moshi.models import loaders

    width = 16
    config = {
        **loaders._mimi_config,
        "seanet": {**loaders._seanet_kwargs, "dimension": width, "n_filters": 2},
        "quantizer": {
            "n_q": codebooks, "bins": bins, "dimension": 8, "input_dimension": width, "output_dimension": width
        },
        "transformer": {
            **loaders._transformer_kwargs, "d_model": width, "num_heads": 2, "num_layers": 1, "dim_feedforward": 32,
            "input_dimension": width, "output_dimensions": [width], "context": 25,
        },
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = loaders.get_mimi(None, config, device="cpu", num_codebooks=codebooks)
        for name, parameter in codec.named_parameters():
            if name.endswith(".bias"):  # with those of a fresh codec every sound gets the same codes
                parameter.data.zero_()
            elif parameter.ndim > 1:
                parameter.data.normal_(0.0, 1.4 * parameter[0].numel() ** -0.5)
        for name, buffer in codec.named_buffers():
            if name.endswith("embedding_sum"):
                buffer.normal_(0.0, 0.5)
            elif name.endswith("_initialized"):
                buffer.fill_(1.0)
    return codec.to(device)
