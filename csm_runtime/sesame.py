"""Sesame's original stack under ``accelerate()``: what is put on a ``Model`` and on the ``Generator`` around it.

The model keeps its modules, its weights and its class; ``generate_frame``, ``reset_caches`` and ``setup_caches`` of this one
object are ours, so that ``Generator.generate`` and the streams of its forks become fast without being edited.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from csm_runtime.adapters import sesame
from csm_runtime.frame_by_frame import FrameByFrame
from csm_runtime.voice_profile import fingerprint_of
from csm_runtime.weights import fingerprint

logger = logging.getLogger("csm_runtime")

_METHODS = ("generate_frame", "reset_caches", "setup_caches")
_RECORDINGS = 64
"""Recordings whose codes a generator remembers: some 40 kB each, of 12 s."""


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
            "drop_originals=True frees weights of transformers' model only; csm-accelerate convert makes one of a checkpoint of "
            "this stack"
        )
    generator = None if sesame.matches(target) else target
    model = target if generator is None else sesame.model_of(target)
    tokenizer = getattr(generator, "_audio_tokenizer", None)
    codec = None if tokenizer is None else GeneratorCodec(tokenizer)
    twin = sesame.Twin(model, codec).module
    accelerate(twin, **options)
    previous = model.__dict__.get("acceleration")
    if isinstance(previous, Acceleration):
        previous.restore()
    handle = twin.acceleration
    frames = FrameByFrame(model, handle)
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
            made = codec.decode(codes.transpose(1, 2))
        finally:
            codec.set_streaming_state(before)
        self.frames += codes.shape[1]
        return made[:, 0].float()
