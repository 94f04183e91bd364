"""What stands in for ``model.generate``: the stock call with our decode loop in it, and the seeds it takes besides."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm_runtime.adapters import hf_call, hf_checks
from csm_runtime.guard import STOCK


class Seeds:
    """Seed and utterance number of each row of one call, as given and, once the batch is known, as tensors.

    Raises:
        ValueError: something that is neither an integer of at most 64 bits nor a row of them.
    """

    def __init__(self, seed: Any, utterance_ids: Any) -> None:
        self.given = seed is not None
        self.seed = None if seed is None else _integers("seed", seed)
        self.utterance_ids = None if utterance_ids is None else _integers("utterance_ids", utterance_ids)

    def fit(self, rows: int, sampled: bool) -> None:
        """Make both ``[rows]`` int64. Without a given seed one is drawn from torch's generator: ``manual_seed`` holds."""
        if self.seed is None:
            self.seed = torch.randint(0, 2**62, ()) if sampled else torch.zeros((), dtype=torch.int64)
        if self.utterance_ids is None:
            self.utterance_ids = torch.arange(rows)
        self.seed = _per_row("seed", self.seed, rows)
        self.utterance_ids = _per_row("utterance_ids", self.utterance_ids, rows)

    def of_row(self, row: int) -> Seeds:
        """One row's, once the batch is known."""
        assert self.seed is not None and self.utterance_ids is not None, "fit() comes first"
        one = Seeds(self.seed[row : row + 1], self.utterance_ids[row : row + 1])
        one.given = self.given
        return one


def _integers(name: str, value: Any) -> Tensor:
    wanted = f"{name} must be an integer of at most 64 bits, or one per row of the batch"
    try:
        tensor = torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{wanted}, got {value!r}") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tensor.ndim > 1:
        raise ValueError(f"{wanted}, got {value!r}")
    return tensor.long()


def _per_row(name: str, values: Tensor, rows: int) -> Tensor:
    if values.ndim == 1 and len(values) != rows:
        raise ValueError(f"{name} must be one integer or {rows} of them, one per row, got {len(values)}")
    return values.expand(rows)


class Turns:
    """The lock under which a model's calls take turns; reentrant.

    Attributes:
        waiting: how many threads wait for it.
    """

    def __init__(self) -> None:
        self._lock, self._count = threading.RLock(), threading.Lock()
        self.waiting = 0

    def give_way(self, seconds: float) -> None:
        """Between two turns: let those who wait take theirs first, for so long at most.

        Whoever lets go of a lock and asks for it again at once mostly gets it back before a thread that waits has woken up.
        """
        until = time.perf_counter() + seconds
        while self.waiting and time.perf_counter() < until:
            time.sleep(0.0002)

    def __enter__(self) -> None:
        if self._lock.acquire(blocking=False):
            return
        with self._count:
            self.waiting += 1
        try:
            self._lock.acquire()
        finally:
            with self._count:
                self.waiting -= 1

    def __exit__(self, *error: Any) -> None:
        self._lock.release()


class FastGenerate:
    """The callable that stands in for ``model.generate``, with the stock signature and two optional extras.

    ``seed`` (an int, or one per row) and ``utterance_ids`` (one int per row, default 0, 1, ...) pin the noise: a row's
    tokens depend on its seed and utterance number and on neither its place in the batch nor the other rows.
    """

    is_accelerated = True

    def __init__(self, model: Any, handle: Any) -> None:
        self._model, self._handle = model, handle
        functools.update_wrapper(self, type(model).generate.__get__(model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The stock ``generate``, and ``seed`` and ``utterance_ids``."""
        model, handle = self._model, self._handle
        seeds = Seeds(kwargs.pop("seed", None), kwargs.pop("utterance_ids", None))
        if kwargs.get("custom_generate", 0) is None:
            del kwargs["custom_generate"]
        stock = type(model).generate
        arguments = by_name(stock, model, args, kwargs)
        with handle._lock:
            hf_checks.check_arguments(model, handle._spec, arguments)
            reason = handle._reason_for_stock(arguments)
            if reason is not None:
                handle._went_stock(reason)
                made = seeded(seeds, lambda: stock(model, *args, **kwargs))
                if handle.guard.rung == STOCK:
                    handle.guard.healthy(hf_call.frames_in(model, made))
                return made
            depth_config = model.depth_decoder.generation_config
            before = dict(vars(depth_config))
            handle._busy, start = True, time.perf_counter()
            streamer = arguments.get("streamer")
            loop = self._loop(seeds, streamer, bool(arguments.get("output_audio")))
            try:
                if arguments.get("output_audio"):
                    made = stock(model, **{**arguments, "output_audio": False}, custom_generate=loop)
                    out = hf_call.with_audio(made, handle._sound)
                else:
                    out = made = stock(model, *args, custom_generate=loop, **kwargs)
                seconds = time.perf_counter() - start - getattr(streamer, "waited", 0.0)
                handle._spoken(hf_call.spoken_frames(model, made, arguments.get("input_ids")), seconds)
                return out
            except ValueError:
                # The stock generate writes depth_decoder_* arguments into the model's own config before it checks them.
                vars(depth_config).clear()
                vars(depth_config).update(before)
                raise
            finally:
                handle._busy = False

    def _loop(self, seeds: Seeds, streamer: Any, audio: bool) -> Callable[..., Any]:
        """A decode loop for stock's ``custom_generate``, which hands over neither the streamer nor the seeds.

        ``audio``: whether the codec gets what it makes.
        """
        handle = self._handle

        def loop(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **model_kwargs: Any,
        ) -> Any:
            def rest(made: Tensor, ended: Tensor) -> Tensor:
                return seeded(
                    seeds,
                    lambda: hf_call.continue_on_stock(
                        model, request, made, ended, logits_processor, generation_config, streamer
                    ),
                    made.shape[1],
                )

            try:
                with plain_mode():
                    request = hf_call.read_request(
                        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
                    )
                    depth_config = dict(vars(model.depth_decoder.generation_config))
                    call = Prepared(request, logits_processor, generation_config, depth_config)
                    whole = request.return_dict or not audio
                    return hf_call.output(request, handle._run(call, seeds, streamer, rest, whole))
            except hf_call.Unsupported as reason:
                handle._went_stock(str(reason))
                return seeded(
                    seeds,
                    lambda: type(model)._sample(
                        model,
                        input_ids,
                        logits_processor=logits_processor,
                        stopping_criteria=stopping_criteria,
                        generation_config=generation_config,
                        streamer=streamer,
                        **model_kwargs,
                    ),
                )

        return loop

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The copy of the model is being built and already in the memo: its generate is its own class's.
        copied = memo[id(self._model)]
        return type(copied).generate.__get__(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self._model, "generate"))


class Prepared(NamedTuple):
    """A call as the stock ``generate`` has prepared it, up to its decode loop."""

    request: hf_call.Request
    processors: Any
    config: Any
    depth_config: dict[str, Any]
    """The attributes that the depth decoder's generation config has in this call."""


def prepared(model: Any, arguments: dict[str, Any]) -> Prepared:
    """Have the stock ``generate`` prepare a call and make nothing of it; the model's configs are as before.

    Args:
        model: the stock model.
        arguments: of ``generate``, without streamer and sound.

    Raises:
        Unsupported: :class:`~csm_runtime.adapters.hf_call.Unsupported`, the fast path does not do this.
        Exception: what the stock ``generate`` refuses.
    """
    found: list[Prepared] = []
    depth_config = model.depth_decoder.generation_config

    def capture(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        args = (model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        request = hf_call.read_request(*args)
        found.append(Prepared(request, logits_processor, generation_config, dict(vars(depth_config))))
        return input_ids

    with as_it_was(depth_config):
        type(model).generate(model, **arguments, custom_generate=capture)
    return found[0]


@contextlib.contextmanager
def as_it_was(config: Any) -> Iterator[None]:
    """Take back what a block writes into a config: the stock ``generate`` leaves depth_decoder_* arguments in the model's."""
    before = dict(vars(config))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)


def by_name(function: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those behind ``**kwargs`` included; what cannot be bound is left to the stock."""
    try:
        bound = inspect.signature(inspect.unwrap(function)).bind_partial(model, *args, **kwargs).arguments
    except TypeError:
        return dict(kwargs)
    named = {name: value for name, value in bound.items() if name not in ("self", "kwargs")}
    return {**named, **bound.get("kwargs", {})}


def seeded(seeds: Seeds, call: Callable[[], Any], made: int = 0) -> Any:
    """Run a stock call; an explicit seed seeds torch's generators for it, and only for it.

    ``made`` frames of the utterance are there already: what is drawn for the next ones depends on the seed and on that.
    """
    if not seeds.given or seeds.seed is None:
        return call()
    seed = int(seeds.seed.reshape(-1)[0])
    with torch.random.fork_rng():
        torch.manual_seed((seed + made) % 2**63 if made else seed)
        return call()


class plain_mode:
    """No gradients and no inference mode, whatever the caller is in: the steps are guarded on both."""

    def __enter__(self) -> None:
        self._inference = torch.inference_mode(False)
        self._no_grad = torch.no_grad()
        self._inference.__enter__()
        self._no_grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._no_grad.__exit__(*error)
        self._inference.__exit__(*error)
