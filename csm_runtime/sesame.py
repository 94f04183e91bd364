"""Sesame's original stack under ``accelerate()``: what is put on a ``Model`` and on the ``Generator`` around it.

The model keeps its modules, its weights and its class; ``generate_frame``, ``reset_caches`` and ``setup_caches`` of this one
object are ours, so that ``Generator.generate`` and the streams of its forks become fast without being edited.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csm_runtime.adapters import sesame
from csm_runtime.adapters.hf_call import Request, Unsupported
from csm_runtime.adapters.sesame_call import cached_rows, fed, refill, request_of
from csm_runtime.frame_by_frame import FrameByFrame
from csm_runtime.generate import Seeds, plain_mode, seeded
from csm_runtime.voice_profile import fingerprint_of
from csm_runtime.weights import fingerprint

_METHODS = ("generate_frame", "reset_caches", "setup_caches")
_RECORDINGS = 64
"""Recordings whose codes a generator remembers: some 40 kB each, of 12 s."""
FRAME_MS = 80
_CALL: dict[str, Any] = {
    "text": None,
    "speaker": None,
    "context": (),
    "max_audio_length_ms": 90_000,
    "temperature": 0.9,
    "topk": 50,
    "tokens": None,
    "tokens_mask": None,
}
"""Arguments of a call and their defaults, those of ``Generator.generate``."""


def accelerate_sesame(target: Any, options: dict[str, Any]) -> Any:
    """What :func:`csm_runtime.accelerate` does with an object of Sesame's structure.

    Args:
        target: a ``Model``, or a ``Generator`` around one.
        options: keyword arguments of ``accelerate()``.

    Raises:
        ValueError: as ``accelerate()``, and ``drop_originals``, which would free nothing: the model holds its weights.
    """
    from csm_runtime.accelerate import Acceleration, accelerate

    if options.get("drop_originals"):
        raise ValueError(
            "drop_originals=True frees weights of transformers' model only; csm-accelerate convert makes one of a checkpoint "
            "of this stack"
        )
    generator = None if sesame.matches(target) else target
    model = target if generator is None else sesame.model_of(target)
    most, wanted = model.backbone.max_seq_len, options.get("max_positions")
    if type(wanted) is int and wanted > most:
        raise ValueError(
            f"max_positions must be at most the {most} positions of this model's rotary table, got {wanted}"
        )
    tokenizer = getattr(generator, "_audio_tokenizer", None)
    codec = None if tokenizer is None else GeneratorCodec(tokenizer)
    twin = sesame.Twin(model, codec).module
    accelerate(twin, **options)
    previous = model.__dict__.get("acceleration")
    if isinstance(previous, Acceleration):
        previous.restore()
    handle = twin.acceleration
    frames = FrameByFrame(model, handle)
    handle.calls = SesameCalls(model, generator, frames, handle)
    for name in _METHODS:
        model.__dict__[name] = Method(frames, name)
    model.__dict__["acceleration"] = handle

    def restore() -> None:
        frames.close()
        for name in (*_METHODS, "acceleration"):
            model.__dict__.pop(name, None)

    handle.on_restore.append(restore)
    if generator is not None:
        _install_on(generator, handle)
    return target


def _install_on(generator: Any, handle: Any) -> None:
    own = vars(generator)
    own["acceleration"] = handle
    handle.on_restore.append(lambda: own.pop("acceleration", None))
    if callable(getattr(generator, "_tokenize_audio", None)) and "_tokenize_audio" not in own:
        own["_tokenize_audio"] = RememberedRecordings(generator, handle.metrics)
        handle.on_restore.append(lambda: own.pop("_tokenize_audio", None))


class Method:
    """A method of one model that is ours; a copy of the model, or what is unpickled, has its class's own."""

    is_accelerated = True

    def __init__(self, frames: FrameByFrame, name: str) -> None:
        self._frames, self._name = frames, name
        self.__doc__ = getattr(frames._kind, name).__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        return getattr(self._frames, self._name)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self._frames._model)]
        return getattr(type(copied), self._name).__get__(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self._frames._model, self._name))


class RememberedRecordings:
    """``Generator._tokenize_audio``, which encodes a recording once: a reference comes back in every call.

    What is kept is told apart by the samples, their dtype and the codec's weights.

    Args:
        generator: whose method it stands in for.
        metrics: counts ``recordings.known`` and ``recordings.encoded``.
    """

    is_accelerated = True

    def __init__(self, generator: Any, metrics: Any) -> None:
        self._generator, self._metrics = generator, metrics
        self._kept: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, audio: Any, *args: Any, **kwargs: Any) -> Any:
        """As the generator's own."""
        encode = type(self._generator)._tokenize_audio
        if args or kwargs or not isinstance(audio, Tensor):
            return encode(self._generator, audio, *args, **kwargs)
        key = self._key(audio)
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
        if known is not None:
            self._metrics.count("recordings.known")
            return tuple(part.clone() for part in known)
        made = encode(self._generator, audio)
        self._metrics.count("recordings.encoded")
        if isinstance(made, tuple) and all(isinstance(part, Tensor) for part in made):
            with self._lock:
                self._kept[key] = tuple(part.clone() for part in made)
                while len(self._kept) > _RECORDINGS:
                    self._kept.popitem(last=False)
        return made

    def _key(self, audio: Tensor) -> str:
        tokenizer = self._generator._audio_tokenizer
        parts: dict[str, Any] = {"audio": audio.detach().cpu().contiguous(), "codebooks": _codebooks(tokenizer)}
        if isinstance(tokenizer, nn.Module):
            named = (*tokenizer.named_parameters(), *tokenizer.named_buffers())
            parts |= {name: fingerprint(x.detach()) for name, x in named if not name.startswith("decoder")}
        else:
            parts["tokenizer"] = id(tokenizer)
        return fingerprint_of(parts)


def _codebooks(tokenizer: Any) -> int:
    return int(getattr(tokenizer, "num_codebooks", 0))


class GeneratorCodec(nn.Module):
    """A generator's codec, moshi's ``MimiModel`` above all, as the runtime asks transformers' for sound.

    Args:
        tokenizer: ``Generator._audio_tokenizer``.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        rate, frames = getattr(tokenizer, "sample_rate", 24000), getattr(tokenizer, "frame_rate", 12.5)
        self.config = SimpleNamespace(
            sampling_rate=int(rate),
            frame_rate=float(frames),
            codebook_size=int(getattr(tokenizer, "cardinality", 2048)),
            use_causal_conv=False,  # of transformers' modules: this one streams by itself
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next((x.dtype for x in self.parameters() if x.is_floating_point()), torch.float32)

    def decode(self, codes: Tensor) -> Any:
        """``audio_values`` ``[N, 1, S]`` of codes ``[N, K, F]``."""
        return SimpleNamespace(audio_values=self.tokenizer.decode(codes))

    def stream(self) -> StreamedCodec | None:
        """A decoder of chunks, where the codec has one whose state can be taken out and put back."""
        whole = ("streaming", "get_streaming_state", "set_streaming_state")
        return StreamedCodec(self.tokenizer) if all(hasattr(self.tokenizer, name) for name in whole) else None


class StreamedCodec:
    """moshi's own streaming decoder, its state put in for each chunk: streams side by side share the codec.

    Args:
        codec: moshi's ``MimiModel``.
    """

    def __init__(self, codec: Any) -> None:
        self._codec = codec
        self._state: dict[str, Any] | None = None
        self.frames = 0

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """``[N, S]`` fp32 of the next frames ``[N, F, K]`` int64."""
        codec = self._codec
        size = codec.cardinality
        if bool(((codes < 0) | (codes >= size)).any()):
            raise IndexError(f"codes must be 0 to {size - 1}, got {int(codes.min())} to {int(codes.max())}")
        before = codec.get_streaming_state()
        try:
            if self._state is None:
                codec.set_streaming_state(dict.fromkeys(before))
                codec.streaming(len(codes))
                self._state = codec.get_streaming_state()
            else:
                codec.set_streaming_state(self._state)
            # On CUDA moshi captures a graph for one number of frames, and chunks have any.
            step = 1 if codes.device.type == "cuda" else codes.shape[1]
            made = torch.cat([codec.decode(part) for part in codes.transpose(1, 2).split(step, dim=2)], dim=-1)
        finally:
            codec.set_streaming_state(before)
        self.frames += codes.shape[1]
        return made[:, 0].float()


class Prompted(NamedTuple):
    """A call of a generator, ready for the decode loop."""

    request: Request
    tokens: Tensor
    """``[1, T, codebooks + 1]``"""
    mask: Tensor
    temperature: float
    topk: int


class SesameCalls:
    """Whole utterances for streams, batchers and voices, as :class:`csm_runtime.calls.HfCalls` has them of transformers.

    Arguments of a call are those of ``Generator.generate``: ``text``, ``speaker``, ``context``, ``max_audio_length_ms``,
    ``temperature`` and ``topk``; or, in place of the first three, the ``tokens`` and ``tokens_mask`` of ``generate_frame``.

    Args:
        model: of Sesame's structure.
        generator: around it, or None.
        frames: what stands in for its methods.
        handle: its acceleration.
    """

    def __init__(self, model: Any, generator: Any, frames: FrameByFrame, handle: Any) -> None:
        self._model, self._generator, self._frames, self._handle = model, generator, frames, handle

    def generate(
        self, *, seed: Any = None, utterance_ids: Any = None, streamer: Any = None, **arguments: Any
    ) -> Tensor:
        """``[1, F, codebooks]`` int64, the frame that ends speech included.

        Args:
            seed: of the noise; None draws one from torch's generator.
            utterance_ids: the other half of what the noise depends on.
            streamer: gets the prompt and then the codes of every frame.
            arguments: of a call, see above.
        """
        handle, seeds, start = self._handle, Seeds(seed, utterance_ids), time.perf_counter()
        with handle._lock, plain_mode():
            self.check(arguments)
            reason, call = handle._reason_for_stock({}), None
            if streamer is not None:
                streamer.put(torch.zeros(0))

            def put(frame: Tensor) -> None:
                if streamer is not None:
                    streamer.put(frame[None])

            def rest(made: Tensor, ended: Tensor) -> Tensor:
                assert call is not None
                whole = self.finish_on_stock(call, made, put, seeds)[None]
                if streamer is not None:
                    streamer.end()
                return whole

            if reason is None:
                call, handle._busy = self.prepared(arguments), True
                try:
                    made = handle._run(call, seeds, streamer, rest, whole=True)
                except Unsupported as error:
                    reason = str(error)
                finally:
                    handle._busy = False
            if reason is not None:
                handle._went_stock(reason)
                made = self.speak_on_stock(arguments, seeds, put)[None]
                if streamer is not None:
                    streamer.end()
            handle._spoken(made.shape[1], time.perf_counter() - start - getattr(streamer, "waited", 0.0))
            return made

    def check(self, arguments: dict[str, Any]) -> tuple[int, int] | None:
        """What can be said of a call without making its prompt.

        Returns:
            None: how many positions it needs is not known yet.

        Raises:
            TypeError: an argument that ``Generator.generate`` has not, or none of what is to be spoken.
            ValueError: a bad value, named.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        unknown = sorted(set(given) - set(_CALL))
        if unknown:
            raise TypeError(f"unexpected argument {unknown[0]!r}; a call takes {', '.join(_CALL)}")
        if "tokens" in given:
            mask, books = given.get("tokens_mask"), self._handle._spec.codebooks
            if mask is None or mask.shape != given["tokens"].shape or given["tokens"].shape[::2] != (1, books + 1):
                raise ValueError(
                    f"tokens and tokens_mask must both be [1, T, {books + 1}], got {tuple(given['tokens'].shape)} and "
                    f"{None if mask is None else tuple(mask.shape)}"
                )
        elif self._generator is None:
            raise TypeError("a Model alone takes tokens and tokens_mask; accelerate(generator) takes text and speaker")
        elif not isinstance(given.get("text"), str) or "speaker" not in given:
            raise TypeError(f"text and speaker are needed, got text={given.get('text')!r} and {sorted(given)}")
        frames, temperature, topk = self._drawing(given)
        if frames < 1:
            raise ValueError(f"max_audio_length_ms must be at least {FRAME_MS}, got {given['max_audio_length_ms']!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature!r}; topk=1 is greedy")
        if type(topk) is not int or not 1 <= topk <= self._handle._spec.vocab:
            raise ValueError(f"topk must be an integer from 1 to {self._handle._spec.vocab}, got {topk!r}")
        return None

    def prepared(self, arguments: dict[str, Any]) -> Prompted:
        """The prompt of a call, and how its codes are drawn.

        Raises:
            ValueError: prompt and frames need more positions than the model has.
        """
        tokens, mask = self._prompt(arguments)
        frames, temperature, topk = self._drawing(arguments)
        most = self._model.backbone.max_seq_len
        if tokens.shape[1] + frames > most:
            raise ValueError(
                f"Inputs too long: a prompt of {tokens.shape[1]} positions and {frames} frames need more than the {most} "
                "positions of this model; leave out context, or pass a smaller max_audio_length_ms"
            )
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        request = request_of(self._model, tokens, mask, positions, temperature, topk, frames)
        return Prompted(request, tokens, mask, temperature, topk)

    def voice(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A reference, of ``context`` or ``tokens`` alone, as :meth:`csm_runtime.prompts.Prompts.add` takes it."""
        if "tokens" in arguments:
            tokens, mask = arguments["tokens"], arguments["tokens_mask"]
        elif self._generator is None or not arguments.get("context") or set(arguments) != {"context"}:
            raise ValueError(
                "a voice is context=[Segment, ...] of a generator, or tokens and tokens_mask, and nothing else"
            )
        else:
            tokens, mask = _joined([self._generator._tokenize_segment(one) for one in arguments["context"]])
        request = request_of(self._model, tokens, mask, torch.arange(tokens.shape[1])[None], 1.0, 1, 1)
        return {"input_ids": request.input_ids, **request.prompt}

    def speak_on_stock(self, arguments: dict[str, Any], seeds: Seeds, put: Callable[[Tensor], None]) -> Tensor:
        """A whole utterance by the stock model, ``[F, codebooks]``; ``put`` gets each frame."""
        call = self.prepared(arguments)
        return self.finish_on_stock(call, call.tokens.new_zeros(1, 0, call.tokens.shape[2] - 1), put, seeds)

    def finish_on_stock(self, call: Prompted, made: Tensor, put: Callable[[Tensor], None], seeds: Seeds) -> Tensor:
        """The rest of an utterance whose frames ``made`` ``[1, n, codebooks]`` are there; all of it, ``[F, codebooks]``."""
        return seeded(seeds, lambda: self._on_stock(call, made, put), made.shape[1])

    @torch.no_grad()
    def _on_stock(self, call: Prompted, made: Tensor, put: Callable[[Tensor], None]) -> Tensor:
        model, kind = self._model, self._frames._kind
        self._frames.lend()
        if not model.backbone.caches_are_enabled():
            kind.setup_caches(model, 1)
        frames, rows = (
            list(made[0]),
            cached_rows(model),
        )  # its attention takes as many rows as its caches have, and no fewer
        tokens, mask = call.tokens, call.mask
        for frame in frames:
            later = fed(frame)
            tokens, mask = torch.cat([tokens, later[0]], dim=1), torch.cat([mask, later[1]], dim=1)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        tokens, mask, positions = (part.expand(rows, *part.shape[1:]) for part in (tokens, mask, positions))
        if frames:
            refill(model, kind, tokens[:, :-1], mask[:, :-1], positions[:, :-1])
            tokens, mask, positions = tokens[:, -1:], mask[:, -1:], positions[:, -1:]
        else:
            kind.reset_caches(model)
        while len(frames) < call.request.max_frames and (not frames or bool(frames[-1].any())):
            frame = kind.generate_frame(model, tokens, mask, positions, call.temperature, call.topk)[0].long()
            frames.append(frame)
            put(frame)
            tokens, mask = (part.expand(rows, -1, -1) for part in fed(frame))
            positions = positions[:, -1:] + 1
        return torch.stack(frames)

    def _prompt(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if arguments.get("tokens") is not None:
            return arguments["tokens"].long(), arguments["tokens_mask"].bool()
        generator = self._generator
        parts = [generator._tokenize_segment(segment) for segment in arguments.get("context") or ()]
        parts.append(generator._tokenize_text_segment(arguments["text"], arguments["speaker"]))
        return _joined(parts)

    @staticmethod
    def _drawing(arguments: dict[str, Any]) -> tuple[int, float, int]:
        """Most frames, temperature and topk; defaults are ``Generator.generate``'s."""
        values = {name: _CALL[name] if arguments.get(name) is None else arguments[name] for name in _CALL}
        return int(values["max_audio_length_ms"] / FRAME_MS), float(values["temperature"]), values["topk"]


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    tokens, masks = zip(*parts)
    return torch.cat(tokens)[None].long(), torch.cat(masks)[None].bool()
