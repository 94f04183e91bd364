"""Calls of transformers' CSM for whoever makes their frames otherwise than ``generate`` itself: streams, batchers, voices.

:class:`csm_runtime.sesame.SesameCalls` is the same of Sesame's stack; an acceleration has one of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from csm_runtime.adapters import hf_call, hf_checks
from csm_runtime.generate import Prepared, Seeds, as_it_was, prepared, seeded

Put = Callable[[Tensor], None]
"""Takes a frame ``[codebooks]`` as it comes; what it raises ends the speech."""
_OWN = ("streamer", "output_audio", "return_dict_in_generate", "utterance_ids", "custom_generate")
"""Arguments of ``generate`` that say what becomes of its frames."""


class Call(Protocol):
    """A call that is ready for the decode loop."""

    @property
    def request(self) -> hf_call.Request:
        """What it asks for."""
        ...


class Calls(Protocol):
    """What streams, batchers and voices ask of a stack's calls."""

    def generate(self, **arguments: Any) -> Any:
        """A whole call, with a streamer."""
        ...

    def check(self, arguments: dict[str, Any]) -> tuple[int, int] | None:
        """Look at a call of one row before its turn; its positions and frames, or None where they are not known yet.

        Raises:
            TypeError: no such argument.
            ValueError: a bad value, named.
        """
        ...

    def prepared(self, arguments: dict[str, Any]) -> Any:
        """The call, ready for the decode loop. Raises :class:`~csm_runtime.adapters.hf_call.Unsupported`."""
        ...

    def voice(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A reference as :meth:`csm_runtime.prompts.Prompts.add` takes it. Raises ValueError."""
        ...

    def speak_on_stock(self, arguments: dict[str, Any], seeds: Seeds, put: Put) -> Tensor:
        """A whole utterance by the stock model, ``[F, codebooks]``."""
        ...

    def finish_on_stock(self, call: Any, made: Tensor, put: Put, seeds: Seeds) -> Tensor:
        """An utterance whose frames ``made`` ``[1, n, codebooks]`` are there, and the rest by the stock model."""
        ...


class _Feed:
    """A streamer that passes frames on, and not the prompt."""

    def __init__(self, put: Put, with_prompt: bool) -> None:
        self._put, self._is_prompt = put, with_prompt

    def put(self, value: Tensor) -> None:
        """The prompt, or a frame ``[1, codebooks]``."""
        if not self._is_prompt:
            self._put(value[0])
        self._is_prompt = False

    def end(self) -> None:
        """Whoever asked for the frames knows."""


class HfCalls:
    """Calls of transformers' model: their arguments are those of its ``generate``.

    Args:
        model: the stock model.
        handle: its acceleration.
    """

    def __init__(self, model: Any, handle: Any) -> None:
        self._model, self._handle = model, handle

    def generate(self, **arguments: Any) -> Any:
        """The model's own."""
        return self._model.generate(**arguments)

    def check(self, arguments: dict[str, Any]) -> tuple[int, int] | None:
        """See :meth:`Calls.check`; arguments that are the batcher's own business must not be there."""
        for name in _OWN:
            if arguments.get(name) not in (None, False):
                raise ValueError(f"{name} is the batcher's own business, got {arguments[name]!r}; leave it out")
            arguments.pop(name, None)
        hf_checks.check_arguments(self._model, self._handle._spec, arguments)
        ids = arguments.get("input_ids")
        if ids is None:
            raise ValueError("input_ids is missing: the prompt of one utterance, [1, T] or [1, T, codebooks]")
        if ids.shape[0] != 1:
            raise ValueError(f"input_ids has {ids.shape[0]} rows, an utterance has one; submit each row by itself")
        frames = arguments.get("max_new_tokens")
        return (ids.shape[1], frames) if type(frames) is int else None

    def prepared(self, arguments: dict[str, Any]) -> Prepared:
        """By the stock ``generate``, up to its decode loop."""
        return prepared(self._model, arguments)

    def voice(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of ``generate`` as they are."""
        hf_checks.check_arguments(self._model, self._handle._spec, arguments)
        return arguments

    def speak_on_stock(self, arguments: dict[str, Any], seeds: Seeds, put: Put) -> Tensor:
        """By the stock ``generate``."""
        model, ids = self._model, arguments["input_ids"]

        def speak() -> Any:
            return type(model).generate(model, **arguments, streamer=_Feed(put, with_prompt=True))

        with as_it_was(model.depth_decoder.generation_config):
            made = seeded(seeds, speak)
        sequences = made if isinstance(made, Tensor) else made.sequences
        return sequences[0, ids.shape[1] if ids.ndim == 3 else 0 :]

    def finish_on_stock(self, call: Prepared, made: Tensor, put: Put, seeds: Seeds) -> Tensor:
        """By the stock loop, with the configs of the call."""
        model = self._model
        config = model.depth_decoder.generation_config
        ended = torch.zeros(1, dtype=torch.bool, device=made.device)

        def go_on() -> Tensor:
            args = (made, ended, call.processors, call.config, _Feed(put, with_prompt=False))
            return hf_call.continue_on_stock(model, call.request, *args)

        with as_it_was(config):
            vars(config).clear()
            vars(config).update(call.depth_config)
            return seeded(seeds, go_on, made.shape[1])[0]
