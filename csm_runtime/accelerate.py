"""``accelerate(model)``: pick the adapter, plan, pack, warm up, self-test, patch, and undo it all again."""

from __future__ import annotations

import functools
import gc
import logging
import os
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from csm_kernels.quant import QuantWeight
from csm_runtime import compiling, hugepages, ladder, tuning
from csm_runtime.adapters import hf, hf_call, sesame
from csm_runtime.adapters.hf_passes import Passes
from csm_runtime.calls import Calls, HfCalls
from csm_runtime.checks import Checks
from csm_runtime.codec import CodecPath, cut_at_end
from csm_runtime.decode_loop import DecodeLoop, breach_of
from csm_runtime.engine import BUCKETS, Engine, bucket_for
from csm_runtime.events import GuardEvent
from csm_runtime.generate import FastGenerate, Prepared, Seeds, Turns, plain_mode
from csm_runtime.guard import FAST, STOCK, Breach, Finding, Guard, GuardConfig, Watch
from csm_runtime.ladder import Seat
from csm_runtime.many_rows import ManyRows
from csm_runtime.memory import CacheClearing, MemoryReading, cuda_probe, process_probe, source_of
from csm_runtime.metrics import Metrics
from csm_runtime.packed_store import PackedStore
from csm_runtime.precision import PrecisionPolicy, resolve_policy, zones_of
from csm_runtime.prompts import Prompts
from csm_runtime.report import Report
from csm_runtime.rounding import Rounding, calibrate_rounding
from csm_runtime.streaming import DEFAULT_AHEAD, DEFAULT_SCHEDULE, AsyncAudioStream, AudioStream, Channel, stream_of
from csm_runtime.training import CsmTrainingConfig, accelerate_training
from csm_runtime.voices import Profile, Voices, fingerprint_of
from csm_runtime.weights import DTYPES, PackedWeights, matrices, zone_table

if TYPE_CHECKING:
    from csm_runtime.batching import Batcher

logger = logging.getLogger("csm_runtime")

_SAFER = {"graph": "library", "native": "compile"}
"""Where to go from a mode that fails; from all others frames run eagerly."""

GPTQ = "gptq"
_UNROUNDED = (
    "int4 matrices that changed since their rounding was calibrated, or were not part of that, are rounded to nearest; "
    "calibrate again"
)

OPTIONAL = ("compiled prefill", "context trimming", "paired positions", "huge pages")
"""Optimisations that ``without`` can leave out. ``context trimming``: compiled backbone layers that look at the first 512
cached positions only, for contexts up to that. ``paired positions``: the first two positions of the depth decoder in one
pass, which the fused and the native kernels do in any case."""

DEFAULT_QUEUE = 64
"""Utterances that may wait for a slot of a batcher."""
DEFAULT_POSITIONS = 4096
"""Upper bound of the default KV capacity: a config may claim 131072 positions, which is 4 GB of cache per row."""


def accelerate(
    model: Any,
    *,
    precision: str | PrecisionPolicy = "stock",
    max_positions: int | None = None,
    batch_sizes: Sequence[int] = (1,),
    mode: str = "auto",
    drop_originals: bool = False,
    progress: bool = True,
    guard: bool | GuardConfig = True,
    training: bool | CsmTrainingConfig = False,
    calibration: Any = None,
    without: Sequence[str] = (),
    codec_batch_frames: int = 0,
    rounding: str | Rounding = "nearest",
    packed_cache: str | os.PathLike[str] | None = None,
    map_packed: bool = False,
    voices: bool | Voices = True,
) -> Any:
    """Make ``model.generate`` fast, in place; everything else of the model stays as it is.

    Args:
        model: transformers' ``CsmForConditionalGeneration``, in fp32, bf16 or fp16; or a ``Generator`` of Sesame's structure,
            or the ``Model`` in it, whose ``generate_frame`` becomes fast (docs/sesame.md).
        precision: ``"stock"`` (or ``"exact"``) keeps every weight in its own dtype; ``"balanced"`` stores the depth decoder
            in int8, ``"int8"`` (or ``"fast"``) the backbone as well, ``"smallest"`` the MLPs in int4 and the embeddings in
            int8 besides, ``"int4"`` all matrices in int4, codebook 0's head always excepted (docs/precision.md has what they
            cost);
            ``"auto"`` finds the smallest policy whose fidelity holds, by ``calibration``; or a
            :class:`~csm_runtime.PrecisionPolicy`.
        max_positions: positions (prompt and frames) the KV buffer holds per row. Default: what the model was made for,
            at most 4096. A call that needs more than a value given here is an error; one that needs more than the
            default goes to the stock path.
        batch_sizes: batch sizes to compile for now; others are compiled when first used. Sizes round up to
            1, 2, 4, 8 and 16; rows of a larger batch take turns in 16 slots.
        mode: ``"auto"`` (``"native"`` on a CPU, or ``"compile"`` where the native kernels were not built; ``"graph"`` on
            CUDA), ``"native"`` (native CPU kernels), ``"compile"`` (torch.compile), ``"graph"`` (the fused kernels, a CUDA
            graph per frame), ``"kernels"`` (the fused kernels, launched one by one), ``"library"`` (a CUDA graph of
            PyTorch's own ops) or ``"eager"``.
        drop_originals: free the stock copies of what is stored in int8, fp8 or int4.
            The stock modules then compute from the quantised copies; ``restore()`` and saving the model are no longer possible.
        progress: show progress bars on stderr.
        guard: True verifies one frame in 16 against the stock model within 3 % of the time and goes to a safer path where
            frames fail; False leaves only the checks of every frame and the fallback. A
            :class:`~csm_runtime.guard.GuardConfig` says more.
        training: True or a :class:`~csm_runtime.training.CsmTrainingConfig` makes ``model(labels=...).loss`` fast instead,
            and none of the other arguments applies: see :func:`csm_runtime.training.accelerate_training`.
        calibration: for ``precision="auto"`` and ``rounding="gptq"``: a :class:`~csm_runtime.calibration.Calibration`, a list
            of ``generate()`` inputs, or, for the former, the path of a saved result, for which nothing is measured. None
            measures on made-up text: real prompts, and recordings of what follows them, are better.
        without: optimisations to leave out, of :data:`OPTIONAL`.
        codec_batch_frames: most frames, padding included, that one call of the codec decodes together; 40 is quicker here for
            rows of less than a second and slower for long ones. Samples then differ from the stock loop's in the last bits.
            Default: row by row, as the stock model does.
        rounding: of the matrices stored in int4: ``"nearest"``; ``"gptq"``, which runs the stock model on ``calibration`` and
            rounds such that products with its activations err least (docs/precision.md has what that is worth, and
            takes); or what :func:`csm_runtime.rounding.calibrate_rounding` made. Weights that change later are
            rounded to nearest, and a note says so.
        packed_cache: a folder for the packed weights, made if absent, one for each checkpoint: a later start with the same
            policy reads them there instead of packing, those that are still true to the weights. A file that is damaged or
            not ours is packed anew and replaced, a folder that cannot be written is a warning; ``metrics`` counts both.
            The file is read into memory of the process's own, which can lie in huge pages: the backbone's products of a frame
            of CSM-1B at int4 take 46 ms there and 55 in the mapped file (native kernels, 1 thread; 50 and 59 with two).
        map_packed: leave the packed weights in the file of ``packed_cache`` and map it, on a CPU: processes then share
            them, and they can be evicted and come back; but no huge pages, for files have none. What is packed at this start
            lies in own memory until the next one. Nobody may change or truncate the file in place meanwhile.
        voices: True keeps what the backbone has made of the references of a prompt (one row, unpadded), so that the next call
            with the same references, or with more behind them, begins there: the same tokens, sooner. False keeps nothing; a
            :class:`~csm_runtime.voices.Voices` says how many bytes, and in which folder. docs/voices.md.

    Returns:
        The same object. ``model.acceleration`` is the handle: ``report()``, ``metrics``, ``restore()``.

    Raises:
        TypeError: the model is not a CSM.
        ValueError: a config the engine does not implement, modified modules, or a bad argument. The model is untouched.
        ImportError: ``packed_cache`` needs safetensors, which the extra ``hf`` brings.
        RuntimeError: the model's original weights were dropped by an earlier call.

    Example::

        model = accelerate(CsmForConditionalGeneration.from_pretrained("sesame/csm-1b"))
        audio = model.generate(**inputs, output_audio=True)
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "training")}
    if training is not False:
        return accelerate_training(model, training)
    if sesame.matches(model) or sesame.model_of(model) is not None:
        from csm_runtime.sesame import accelerate_sesame

        return accelerate_sesame(model, options)
    if not hf.matches(model):
        raise TypeError(
            "model must be transformers' CsmForConditionalGeneration, or a Model or Generator of Sesame's structure, got "
            f"{type(model).__module__}.{type(model).__qualname__}"
        )
    previous = model.__dict__.get("acceleration")
    if isinstance(previous, Acceleration) and previous.originals_dropped:
        raise RuntimeError(
            "the original weights were dropped (drop_originals=True), nothing is left to pack; load it again"
        )
    _check_arguments(codec_batch_frames, rounding, packed_cache, map_packed)
    tuned = None
    if precision == tuning.AUTO:
        _left_out(without)
        _check_plain(model)
        tuned = tuning.resolve(model, calibration, progress)
    elif calibration is not None and (rounding != GPTQ or isinstance(calibration, (str, Path))):
        raise ValueError(
            f"calibration is for precision='auto', or for rounding='gptq' if it is no path, got precision={precision!r} and "
            f"rounding={rounding!r}"
        )
    policy = resolve_policy(precision) if tuned is None else tuned.policy
    handle = Acceleration(
        model,
        policy,
        max_positions,
        mode,
        progress,
        _guard_config(guard),
        _left_out(without),
        _voices(voices),
        dropping=drop_originals,
    )
    handle.tuned, handle.codec_batch_frames = tuned, codec_batch_frames
    if rounding == GPTQ:
        calls = None if isinstance(calibration, (str, Path)) else calibration
        rounding = calibrate_rounding(model, policy, calls, progress=progress)
    if isinstance(rounding, Rounding):
        handle.round_with(rounding)
    handle.set_up(buckets(batch_sizes), packed_cache, map_packed)
    if isinstance(previous, Acceleration):
        previous.restore()
    if drop_originals:
        handle.drop_originals()
    handle.install()
    return model


def loading_handle(
    model: Any,
    policy: PrecisionPolicy,
    *,
    drop: bool | None,
    max_positions: int | None = None,
    batch_sizes: Sequence[int] = (1,),
    mode: str = "auto",
    progress: bool = True,
    guard: bool | GuardConfig = True,
    without: Sequence[str] = (),
    codec_batch_frames: int = 0,
    rounding: str | Rounding = "nearest",
    packed_cache: str | os.PathLike[str] | None = None,
    map_packed: bool = False,
    voices: bool | Voices = True,
) -> tuple[Acceleration, Callable[[], None]]:
    """The first half of :func:`accelerate` for a model whose matrices are still to be read, and the second half.

    Args:
        model: a stock model; its norms, biases and buffers are there, other weights may be on the meta device.
        policy: in force.
        drop: whether :meth:`Acceleration.take` frees what it has packed into int8, fp8 or int4; None where there is any.
        max_positions: this and all below as :func:`accelerate` has them; ``rounding`` not ``"gptq"``, which needs all weights.

    Returns:
        The handle, to whose :meth:`Acceleration.take` the matrices go as they arrive; and what packs the rest, warms up and
        tests once backbone and depth decoder are complete. :meth:`Acceleration.install` comes last.

    Raises:
        ValueError: as :func:`accelerate`.
    """
    _check_arguments(codec_batch_frames, rounding, packed_cache, map_packed)
    sizes = buckets(batch_sizes)
    handle = Acceleration(
        model,
        policy,
        max_positions,
        mode,
        progress,
        _guard_config(guard),
        _left_out(without),
        _voices(voices),
        loading=True,
        dropping=drop is not False,
    )
    handle.codec_batch_frames = codec_batch_frames
    if isinstance(rounding, Rounding):
        handle.round_with(rounding)
    frees = _frees(policy, handle._spec.codebooks)
    if drop and not frees:
        handle.note_nothing_to_drop()
    handle.expect(frees and drop is not False, packed_cache, map_packed)

    def finish() -> None:
        _check_plain(model)
        handle.set_up(sizes)

    return handle, finish


def _frees(policy: PrecisionPolicy, codebooks: int) -> bool:
    """Whether dropping originals would free anything: see :func:`csm_runtime.adapters.hf.drop_originals`."""
    quantised = {zone for zone in zones_of(codebooks) if policy.format_of(zone) not in ("keep", *DTYPES)}
    heads = {f"depth.head.{k}" for k in range(1, codebooks)}
    return heads <= quantised or bool(quantised - heads - {"kv", "codec"})


def _check_arguments(codec_batch_frames: Any, rounding: Any, packed_cache: Any, map_packed: bool) -> None:
    if type(codec_batch_frames) is not int or codec_batch_frames < 0:
        raise ValueError(f"codec_batch_frames must be an integer of at least 0, got {codec_batch_frames!r}")
    if rounding not in ("nearest", GPTQ) and not isinstance(rounding, Rounding):
        raise ValueError(f"rounding must be 'nearest', 'gptq' or a Rounding, got {rounding!r}")
    if packed_cache is not None and not isinstance(packed_cache, (str, os.PathLike)):
        raise ValueError(f"packed_cache must be the path of a folder or None, got {packed_cache!r}")
    if map_packed and packed_cache is None:
        raise ValueError("map_packed=True maps the file of packed_cache, and packed_cache is None; name a folder")


def _check_plain(model: Any) -> None:
    changed = hf.modification(model)
    if changed is not None:
        raise ValueError(
            f"model is not a plain CSM: {changed}. Merge adapters, remove hooks and undo quantisation first"
        )


def _left_out(without: Any) -> frozenset[str]:
    if isinstance(without, str) or not isinstance(without, Sequence) or not set(without) <= set(OPTIONAL):
        raise ValueError(f"without must be a sequence of names from {OPTIONAL}, got {without!r}")
    return frozenset(without)


def _voices(voices: Any) -> bool | Voices:
    if not isinstance(voices, (bool, Voices)):
        raise ValueError(f"voices must be True, False or a Voices, got {voices!r}")
    return voices


def _guard_config(guard: Any) -> GuardConfig:
    if isinstance(guard, GuardConfig):
        return guard
    if not isinstance(guard, bool):
        raise ValueError(f"guard must be True, False or a GuardConfig, got {guard!r}")
    return GuardConfig(verify=guard)


def buckets(batch_sizes: Any) -> tuple[int, ...]:
    """The buckets of some batch sizes. Raises ValueError for what is none."""
    if not isinstance(batch_sizes, Sequence) or not all(
        type(size) is int and size >= 1 and bucket_for(size) is not None for size in batch_sizes
    ):
        raise ValueError(f"batch_sizes must be a sequence of integers from 1 to {BUCKETS[-1]}, got {batch_sizes!r}")
    return tuple(dict.fromkeys(bucket_for(size) or 1 for size in batch_sizes))


class Acceleration:
    """What ``model.acceleration`` is: the report, the metrics and the way back.

    Attributes:
        metrics: counters and timings, see :class:`~csm_runtime.metrics.Metrics`.
        policy: the precision policy in force.
        guard: what verifies frames, what it found, and the rung that calls start on, see
            :class:`~csm_runtime.guard.Guard`.
        memory: what clears cached memory between frames, and makes room where it runs out, see
            :class:`~csm_runtime.memory.CacheClearing`.
        notes: what differs from the plan and why, for example that nothing could be compiled.
        tuned: how ``precision="auto"`` found the policy, :class:`~csm_runtime.tuning.TunedPolicy`, or None.
        without: optimisations that are left out.
        codec_batch_frames: most frames that one call of the codec decodes together, 0 for row by row.
        on_restore: called by :meth:`restore`, by whoever put something else on the model.
    """

    def __init__(
        self,
        model: Any,
        policy: PrecisionPolicy,
        max_positions: int | None,
        mode: str,
        progress: bool,
        guard: GuardConfig,
        without: frozenset[str] = frozenset(),
        voices: bool | Voices = True,
        loading: bool = False,
        dropping: bool = False,
    ) -> None:
        self._spec = hf.read_spec(model)
        if not loading:  # it would find weights on the meta device
            _check_plain(model)
        if max_positions is not None and not (isinstance(max_positions, int) and max_positions > 1):
            raise ValueError(f"max_positions must be an integer above 1, got {max_positions!r}")
        self._model = model
        self._wanted_positions = max_positions
        self._wanted_mode = mode
        self._progress = progress
        self._weights = PackedWeights(policy)
        self._lock = Turns()
        self._busy = False
        self._revision = 0
        self._warm: set[int] = set()
        self._dropped = False
        self._dropping = dropping and _frees(policy, self._spec.codebooks)
        self._store: PackedStore | None = None
        self._freed: list[str] = []
        self._huge_bytes = 0
        self.without = without
        self.codec_batch_frames = 0
        self.tuned: tuning.TunedPolicy | None = None
        self.policy = policy
        self.metrics = Metrics()
        self.guard = Guard(guard, self.metrics)
        self.memory = CacheClearing(None, self.metrics)
        self._seats: dict[str, Seat] = {}
        self._codec: CodecPath | None = None
        self._streamed: CodecPath | None = None
        self._codec_faults: list[str] = []
        self.notes: list[str] = []
        self.on_restore: list[Callable[[], None]] = []
        self.calls: Calls = HfCalls(model, self)
        self._engine = self._build_engine()
        if isinstance(voices, bool):
            voices_or_none = Voices(metrics=self.metrics, probe=self._voice_memory()) if voices else None
        else:
            voices_or_none = voices
        self.metrics.watch("guard", self._guard_figures)
        self.metrics.watch("memory", self.memory.status)
        self._prompts = Prompts(model, voices_or_none, self._prompt_mark, self.metrics)
        if voices_or_none is not None:
            self.metrics.watch("voices", voices_or_none.status)
            self.memory.shrinkers.append(voices_or_none.shrink)

    def set_up(
        self, sizes: tuple[int, ...], packed_cache: str | os.PathLike[str] | None = None, map_packed: bool = False
    ) -> None:
        """Pack the weights or read them, compile for these batch sizes and test the result on itself."""
        start = time.perf_counter()
        self._open_store(packed_cache, map_packed)
        bar = compiling.Progress(self._matrix_count(), "packing weights", self._progress and not self._freed)
        with plain_mode():
            self._refresh(bar.advance)
        bar.close()
        store, self._store = self._store, None
        if store is not None:
            store.save(self._weights)
        self._weights.release_sources(self._freed)
        assert self._engine.packed is not None
        if "huge pages" not in self.without:
            self._huge_bytes = hugepages.collapse(matrices(self._engine.packed))
        self.metrics.setup_seconds["pack"] = time.perf_counter() - start
        for size in sizes:
            self._warm_up(size)
        if self.guard.config.verify and sizes:
            with plain_mode():
                self._calibrate(FAST, self._fast_seat(), min(sizes))

    def _open_store(self, folder: str | os.PathLike[str] | None, mapped: bool) -> None:
        if folder is None:
            return
        start = time.perf_counter()
        with plain_mode():
            live, rounding = hf.live_weights(self._model), self._weights.rounding
            self._store = PackedStore(folder, self.policy, live, self.metrics, mapped, rounding)
            self._weights = self._store.load(self.policy)
        self.metrics.setup_seconds["load_packed"] = time.perf_counter() - start

    def expect(self, drop: bool, packed_cache: str | os.PathLike[str] | None, map_packed: bool) -> None:
        """Get ready for :meth:`take`; ``drop`` where it frees what it has packed."""
        if drop:
            self._dropped = True
            self._passes = Passes(self._model, False, self.metrics)
        self._open_store(packed_cache, map_packed)

    def take(self, names: Sequence[str]) -> None:
        """Pack matrices whose weights have just been read, and free the stock ones where :meth:`expect` was told to.

        Args:
            names: as :class:`~csm_runtime.weights.PackedWeights` calls them, ``depth.head`` for all heads. Threads may call
                this at once for different ones.

        Raises:
            ValueError: a weight cannot be stored in its zone's format.
        """
        with plain_mode():
            live = hf.live_weights(self._model)
            made = self._weights.pack(live, names)
            if self._dropped:
                bound = self._weights.depth_heads(live.depth_heads) if "depth.head" in names else None
                heads = None if bound is None else [bound.one(k) for k in range(1, self._spec.codebooks)]
                copies = {name: copy for name, copy in made.items() if isinstance(copy, QuantWeight)}
                self._freed.extend(hf.drop_originals(self._model, copies, heads))

    def warm_up_prefill(self, sizes: Sequence[int]) -> None:
        """Compile the backbone's prefill, which needs no weights but the backbone's, ahead of :meth:`set_up`."""
        with plain_mode(), compiling.remembered_isa_checks():
            for size in sizes:
                self._passes.warm_up(size)

    def prefill_ahead(self, x: Tensor, mask: Tensor | None, positions: Tensor) -> Callable[[], None]:
        """Run a prompt through the backbone now, for the call that comes with it; what is returned gives it up."""
        with plain_mode():
            self._passes.ahead(x, mask, positions)
        return self._passes.forget_ahead

    def wait(self, _: str | None = None) -> Acceleration:
        """Everything is there: what :meth:`csm_runtime.loading.Loading.wait` is afterwards."""
        return self

    def install(self) -> None:
        """Become ``model.acceleration``, and ``model.generate`` fast."""
        self._model.__dict__["acceleration"] = self
        self._model.__dict__["generate"] = FastGenerate(self._model, self)

    def round_with(self, rounding: Rounding) -> None:
        """Take calibrated codes for int4 matrices; :meth:`set_up` comes after."""
        self._weights.rounding = rounding
        if not rounding.matrices:
            self.notes.append(
                f"there is no rounding to choose: precision {self.policy.name!r} stores no matrix in int4"
            )

    @property
    def capacity(self) -> int:
        """Positions the KV buffer holds per row."""
        return self._engine.capacity

    @property
    def mode(self) -> str:
        """How frames are run: ``compile``, ``graph`` or ``eager``."""
        return self._engine.mode

    @property
    def originals_dropped(self) -> bool:
        """Whether stock weights were freed."""
        return self._dropped

    def report(self) -> Report:
        """What runs where, in which format, how many bytes it reads and holds, and what went to the stock path."""
        with self._lock, plain_mode():
            self._refresh()
        engine = self._engine
        packed = engine.packed
        assert packed is not None
        codec = (
            hf.codec_size(self._model)[0],
            CodecPath.bytes_in(self._model.codec_model, self.policy.format_of("codec")),
        )
        return Report(
            model=hf.class_name(self._model),
            device=str(engine.device),
            dtype=str(engine.dtype).removeprefix("torch."),
            mode=engine.mode,
            policy=self.policy.name,
            zones=zone_table(packed, self._weights, (engine.kv_dtype, engine.kv_bytes()), codec),
            copied_bytes=self._weights.copied_bytes()
            + engine.fused_bytes()
            + (self._codec.bytes() if self._codec else 0),
            kv_bytes=engine.kv_bytes() + sum(seat.engine.kv_bytes() for seat in self._seats.values()),
            capacity=engine.capacity,
            batch_sizes=sorted(self._warm),
            huge_page_bytes=self._huge_bytes,
            originals_dropped=self._dropped,
            notes=[*([] if self.tuned is None else [str(self.tuned)]), *self.notes],
            metrics=self.metrics.snapshot(),
            guard=self.guard.status(),
            compiled_prefill=self._passes.compiled,
            replaced=dict(self._passes.replaced),
        )

    def replay(self, event: GuardEvent) -> list[Finding]:
        """Run the checks of one of the guard's incidents again, with the weights as they are now.

        Args:
            event: from ``guard.events``, or loaded by :meth:`csm_runtime.events.GuardEvent.load`.

        Returns:
            Every measure beyond its limit, as at the incident if nothing has changed; nothing where all is well.

        Raises:
            ValueError: the event kept no frames, or is of a model of another shape or another policy, or this one cannot be
                verified.
        """
        if event.policy != self.policy.name:
            raise ValueError(
                f"event {event.id} happened under the policy {event.policy!r}, this model has {self.policy.name!r}: its limits "
                f"are others; accelerate(model, precision=...) as it was then"
            )
        if event.rung == STOCK:
            raise ValueError(f"event {event.id} happened on the stock path, which has no limits")
        with self._lock, plain_mode():
            self._refresh()
            size = min(self._warm, default=1)
            seat = self._seat(event.rung, size)
            if event.rung not in self.guard.floors:
                try:
                    self.guard.set_floors(event.rung, ladder.calibrate(self._model, seat, size, self._dropped))
                except ArithmeticError as error:
                    raise ValueError(
                        f"the guard has no limits for rung {event.rung!r} of this model: {error}"
                    ) from error
            return ladder.replay_event(self._model, seat, event, self.guard.floors[event.rung], self._dropped)

    def stream(
        self,
        *,
        chunk_frames: int | Sequence[int] = DEFAULT_SCHEDULE,
        ahead: int | None = DEFAULT_AHEAD,
        watermark: Callable[[Tensor, int], Tensor] | None = None,
        **inputs: Any,
    ) -> AudioStream:
        """Speak, and give the sound chunk by chunk while it is being made.

        Frames are made in a thread of the stream's own, from now on. The model makes one utterance at a time: other calls
        wait until this one has ended, been closed or, where the listener is slow, been made to its end.

        Args:
            chunk_frames: codec frames (80 ms) per chunk, or those of the first chunks, the last entry from then on.
            ahead: chunks that may wait for the listener before generation waits too, unless another call waits for the
                model; None for any number.
            watermark: called with the samples ``[S]`` fp32 of each chunk and their rate; what it returns is what is heard.
            inputs: of ``generate()``, ``seed`` included; not ``streamer`` or ``output_audio``.

        Returns:
            An iterator over :class:`~csm_runtime.streaming.AudioChunk`, fp32, of all rows of the batch as they come; its
            ``close()`` stops generation at the next frame.

        Raises:
            ValueError: a bad argument. What ``generate()`` raises, iterating raises.

        Example::

            with model.acceleration.stream(**inputs, chunk_frames=2) as stream:
                for chunk in stream:
                    device.write(chunk.samples.numpy())
        """
        channel, run = self._streaming(inputs, chunk_frames, ahead, watermark)
        return AudioStream(channel, run)

    def astream(
        self,
        *,
        chunk_frames: int | Sequence[int] = DEFAULT_SCHEDULE,
        ahead: int | None = DEFAULT_AHEAD,
        watermark: Callable[[Tensor, int], Tensor] | None = None,
        **inputs: Any,
    ) -> AsyncAudioStream:
        """:meth:`stream` for ``async for``; generation starts with the first chunk that is awaited."""
        channel, run = self._streaming(inputs, chunk_frames, ahead, watermark)
        return AsyncAudioStream(lambda: AudioStream(channel, run), channel)

    def _streaming(self, inputs: dict[str, Any], *how: Any) -> tuple[Channel, Callable[[], None]]:
        chunk_frames, ahead, watermark = how
        return stream_of(
            self.calls.generate,
            inputs,
            codec=self._stream_codec,
            end_code=self._model.config.codebook_eos_token_id,
            chunk_frames=chunk_frames,
            ahead=ahead,
            watermark=watermark,
            metrics=self.metrics,
            yields=lambda: self._lock.waiting > 0,
        )

    def batcher(
        self,
        *,
        slots: int | None = None,
        queue: int = DEFAULT_QUEUE,
        chunk_frames: int | Sequence[int] = DEFAULT_SCHEDULE,
    ) -> Batcher:
        """Several utterances at once, which join and leave between frames: see :class:`~csm_runtime.batching.Batcher`.

        Args:
            slots: utterances that speak at once, at most 16; None for what
                :func:`~csm_runtime.batch_size.tune_batch_size` found here, or 4.
            queue: utterances that may wait for a slot.
            chunk_frames: codec frames per chunk of those that are heard while they are made.

        Raises:
            ValueError: a bad argument.

        Example::

            with model.acceleration.batcher(slots=8) as batcher:
                utterances = [batcher.submit(**inputs, seed=n) for n, inputs in enumerate(many)]
                codes = [utterance.result() for utterance in utterances]
        """
        from csm_runtime.batching import Batcher

        return Batcher(self._model, slots=slots, queue=queue, chunk_frames=chunk_frames)

    def _stream_codec(self) -> Any:
        """The codec as streams decode with it: in fp32 unless the policy says otherwise."""
        codec, wanted = self._model.codec_model, self.policy.format_of("codec")
        if self._streamed is None or self._streamed.codec is not codec:
            try:
                self._streamed = CodecPath(codec, "fp32" if wanted == "keep" else wanted)
            except ValueError:  # no Mimi: as it is
                self._streamed = CodecPath(codec)
        return self._streamed.in_format()

    def restore(self) -> None:
        """Give the stock model back: same outputs as before, nothing of ours left on it.

        Raises:
            RuntimeError: its original weights were dropped.
        """
        if self._dropped:
            raise RuntimeError(
                "the original weights were dropped (drop_originals=True), so the stock model cannot be restored; load it "
                "again"
            )
        with self._lock:
            for name in ("generate", "acceleration"):
                self._model.__dict__.pop(name, None)
            for undo in self.on_restore:
                undo()

    def drop_originals(self) -> None:
        """Free the stock copies of quantised matrices; the stock modules compute from the packed copies from now on."""
        packed = self._engine.packed
        assert packed is not None
        heads = [packed.depth_heads.one(k) for k in range(1, self._spec.codebooks)]
        freed = hf.drop_originals(self._model, self._weights.quantized(), heads)
        if freed:
            self._weights.release_sources(freed)
            self._dropped = True
            self._revision += 1
            self._seats.clear()
            self._passes = Passes(self._model, False, self.metrics)
            gc.collect()  # compilers and tracebacks leave cycles: 2.9 GB of CSM-1B hung on one
            hugepages.give_back()
        else:
            self.note_nothing_to_drop()

    def note_nothing_to_drop(self) -> None:
        """Say in the report that ``drop_originals`` was asked for in vain."""
        self.notes.append(f"drop_originals had nothing to drop: precision {self.policy.name!r} quantises nothing")

    @property
    def voices(self) -> Voices | None:
        """Where what the backbone made of references is kept, or None."""
        return self._prompts.voices

    def add_voice(
        self, *, meta: dict[str, str | int | float] | None = None, pinned: bool = True, **inputs: Any
    ) -> Profile:
        """Let a reference through the backbone now, so that the first call that speaks in its voice begins behind it.

        Args:
            meta: whatever else is to be known of it, such as its transcript.
            pinned: keep it whatever other voices come.
            inputs: of ``generate()``, for the reference alone: one row that ends with the end of its sound.

        Raises:
            ValueError: another prompt than that, or voices are switched off.

        Example::

            reference = processor.apply_chat_template(reference_turns, tokenize=True, return_dict=True)
            model.acceleration.add_voice(**reference)
        """
        if self.voices is None:
            raise ValueError("voices are switched off; accelerate(model, voices=True) keeps them")
        with self._lock, plain_mode():
            reference = self.calls.voice(inputs)
            self._refresh()
            return self._prompts.add(self._passes, reference, meta or {}, pinned)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied model is a stock model

    def __reduce__(self) -> tuple[Any, ...]:
        return (types.NoneType, ())  # likewise a pickled one

    # ------------------------------------------------------------------------------------------------------ inside

    def _build_engine(self) -> Engine:
        device = self._model.backbone_model.norm.weight.device
        dtype = hf.read_dtype(self._model)
        capacity = self._wanted_positions or min(self._spec.backbone.positions, DEFAULT_POSITIONS)
        with plain_mode():
            rotary = hf.rotary_tables(self._model, capacity)
            kv_dtype = DTYPES.get(self.policy.format_of("kv"))
            engine = Engine(
                self._spec, rotary, dtype, device, capacity, self._wanted_mode, self.metrics, kv_dtype, self.without
            )
        self.memory.follow(source_of(device))
        # A stock layer whose weights were dropped computes from its copies in a way that is not worth compiling.
        compiled = engine.mode not in ("eager", "kernels") and not (self._dropped or self._dropping)
        compiled = compiled and "compiled prefill" not in self.without
        self._passes = Passes(self._model, compiled, self.metrics)
        self._note_unfused(engine)
        return engine

    def _note_unfused(self, engine: Engine) -> None:
        if engine.unfused is not None:
            kernels = "native CPU" if engine.mode == "compile" else "fused"
            note = f"frames run on PyTorch's own ops instead of the {kernels} kernels: {engine.unfused}"
            if note not in self.notes:
                self.notes.append(note)
                logger.warning(note)

    def _matrix_count(self) -> int:
        return 7 * (self._spec.backbone.layers + self._spec.depth.layers) + 5

    def _refresh(self, advance: Callable[[str], None] | None = None) -> None:
        """Follow the model: its device, its dtype, its weights."""
        model = self._model
        hf.follow(model)
        moved = model.backbone_model.norm.weight.device != self._engine.device
        if moved and self._dropped:
            raise RuntimeError(
                f"the model was moved from {self._engine.device} after its original weights were dropped; move it before "
                "accelerate(..., drop_originals=True)"
            )
        if moved or hf.read_dtype(model) != self._engine.dtype:
            self._engine = self._build_engine()
            if not self._dropped:
                self._weights = PackedWeights(self.policy, rounding=self._weights.rounding)
            self._forget_engine()
            self.metrics.count("engine.rebuilt")
        packed, stale = self._weights.refresh(hf.live_weights(model), advance)
        if stale:
            self.guard.forget_floors()
            self.metrics.count("weights.repacked", len(stale))
            logger.info("%d packed weights were stale and have been packed again", len(stale))
        if self._weights.unrounded and _UNROUNDED not in self.notes:
            self.notes.append(_UNROUNDED)
            self.metrics.fault(_UNROUNDED)
            logger.warning("%s (%s)", _UNROUNDED, ", ".join(sorted(self._weights.unrounded)))
        dropped = self._engine.bind(packed)
        if dropped:
            self._warm.clear()
        if stale or dropped:
            self._revision += 1
        self._note_unfused(self._engine)

    def _warm_up(self, size: int) -> None:
        """Compile for one bucket; where that fails, or fails its self-test, run in a safer mode and say so."""
        start = time.perf_counter()
        verb = "compiling" if self._engine.mode == "compile" else "preparing"
        with plain_mode():
            parts = self._engine.parts(size) + 2
        bar = compiling.Progress(parts, f"{verb} for batch {size}", self._progress)
        try:
            with plain_mode(), compiling.remembered_isa_checks():
                self._engine.warm_up(size, bar.advance)
                self._passes.warm_up(size)
                bar.advance("prefill")
                fault = self._engine.self_test(size, self._passes.codebook_logits)
                bar.advance("self-test")
        except Exception as error:  # no compiler, a broken toolchain, a bug in a backend: all mean eager
            fault = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        finally:
            bar.close()
        if fault is not None and self._engine.mode != "eager":
            safer = _SAFER.get(self._engine.mode, "eager")
            note = f"mode {self._engine.mode!r} does not work here ({fault}); frames run in mode {safer!r}"
            self.notes.append(note)
            logger.warning(note)
            self.metrics.fault(note)
            self._wanted_mode = safer
            packed = self._engine.packed
            self._engine = self._build_engine()
            if packed is not None:
                self._engine.bind(packed)
            self._forget_engine()
            if safer != "eager":
                self._warm_up(size)
                return
        elif fault is not None:
            raise RuntimeError(f"the eager decode step fails its self-test: {fault}")
        self._warm.add(size)
        name = f"warm_up.batch{size}"
        self.metrics.setup_seconds[name] = time.perf_counter() - start

    def _forget_engine(self) -> None:
        """What was made for an engine that is no more."""
        self._revision += 1
        self._warm.clear()
        self._seats.clear()
        self.guard.forget_floors()

    def _voice_memory(self) -> Callable[[], MemoryReading | None]:
        """Of what device: profiles lie where the model does."""
        device = self._engine.device
        return functools.partial(cuda_probe, device) if device.type == "cuda" else process_probe

    def _prompt_mark(self) -> str:
        """Of everything that the keys and values of a prompt depend on besides the prompt; behind a refresh of the weights."""
        model = self._model
        parts: dict[str, Any] = {"spec": repr(self._spec), "dtype": str(self._engine.dtype)}
        parts |= {f"backbone.{name}": x for name, x in model.backbone_model.named_parameters()}
        parts |= {"text": model.embed_text_tokens.weight}
        parts |= {f"codec.{name}": x for name, x in hf.encoding_tensors(model)}
        marks = {
            name: self._weights.mark_of(x) if isinstance(x, Tensor) and not x.is_meta else str(x)
            for name, x in parts.items()
        }
        copies = self._weights.checksums() if self._dropped else {}
        return fingerprint_of({**marks, **{f"copy.{name}": mark for name, mark in copies.items()}})

    def _fast_seat(self) -> Seat:
        return Seat(self._engine, self._passes, self._weights)

    def _seat(self, rung: str, size: int) -> Seat:
        """What frames are made with on a rung, ready for a batch size."""
        self._engine.plain = ladder.plain_parts(rung)
        if rung == FAST or self._engine.plain:
            if size not in self._warm:
                self._warm_up(size)
            return self._fast_seat()
        if rung not in self._seats:
            self._seats[rung] = ladder.build_seat(self._model, rung, self._fast_seat(), self._dropped, self.metrics)
        seat = self._seats[rung]
        seat.engine.bind(seat.weights.refresh(hf.live_weights(self._model))[0])
        return seat

    def _seat_in_force(self, size: int) -> Seat:
        """The seat of the guard's rung for a batch size, its limits known where frames are verified.

        Raises:
            ArithmeticError: the frames of its calibration were not sound; the guard's rung is a lower one by now.
        """
        rung = self.guard.rung
        seat = self._seat(rung, size)
        if self.guard.config.verify and rung not in self.guard.floors and rung not in self.guard.unverifiable:
            self._calibrate(rung, seat, size)
            if self.guard.rung != rung:
                raise ArithmeticError(self.guard.reason)
        return seat

    def _calibrate(self, rung: str, seat: Seat, size: int) -> None:
        """Find the guard's limits on a rung. Frames that are not sound are a breach; a check that fails is none."""
        start, metrics = time.perf_counter(), seat.engine.metrics
        seat.engine.metrics = Metrics()  # frames that nobody asked for
        try:
            self.guard.set_floors(rung, ladder.calibrate(self._model, seat, size, self._dropped))
        except ArithmeticError as error:
            if rung != FAST:
                raise
            self._distrust(Breach(f"calibration: {error}", "calibration", 0), 0, 0, {})
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).strip()[:200]}"
            note = f"the guard cannot verify frames on rung {rung!r}: {why}"
            if note not in self.notes:
                self.notes.append(note)
            logger.warning(note, exc_info=True)
            self.metrics.fault(note)
            self.guard.unverifiable[rung] = why
        finally:
            seat.engine.metrics = metrics
        self.metrics.setup_seconds[f"calibrate.{rung}"] = time.perf_counter() - start

    def _why_stock(self, arguments: dict[str, Any]) -> str | None:
        """A reason to take the stock path that is known before the stock ``generate`` has prepared anything."""
        if self._busy:
            return "a call from inside another call of the same model"
        for name in ("custom_generate", "assistant_model", "prefix_allowed_tokens_fn", "inputs_embeds", "inputs"):
            if arguments.get(name) is not None:
                return f"the argument {name}"
        if arguments.get("synced_gpus"):
            return "synced_gpus"
        if self.guard.rung == STOCK:
            return f"the guard trusts no faster one until rearm(): {self.guard.reason}"
        model = self._model
        changed = hf.modification(model)
        if changed is not None:
            return changed
        dropout = max(model.config.attention_dropout, model.config.depth_decoder_config.attention_dropout)
        if model.training and dropout:
            return "training mode with dropout"
        if torch.is_autocast_enabled(self._engine.device.type):
            return "autocast"
        return None

    def _reason_for_stock(self, arguments: dict[str, Any]) -> str | None:
        """Bring the engine up to date with the model for a call; a reason to take the stock path instead, or None."""
        reason = self._why_stock(arguments)
        if reason is None:
            try:
                with plain_mode():
                    self.memory.with_retry(self._refresh)
            except Exception as error:  # no room for a copy, a weight that its format cannot hold
                self._cannot_follow(error)
                reason = self._why_stock(arguments)
        return reason

    def _cannot_follow(self, error: Exception) -> None:
        """The weights could not be brought up to date: the stock path has them, and every later call until rearm()."""
        breach = breach_of(error, 0)
        self.metrics.fault(breach.reason)
        breach = replace(breach, reason=f"the weights could not be followed: {breach.reason}")
        if breach.kind == "memory":
            self._give_memory_back()
        self.guard.step_down(breach, STOCK, self._event(breach, 0, 0, STOCK, {}), error)

    def _went_stock(self, reason: str) -> None:
        if self.metrics.stock_path(reason):
            logger.warning("generate() takes the stock path: %s", reason)

    def _run(
        self, call: Prepared, seeds: Seeds, streamer: Any, rest: Callable[[Tensor, Tensor], Tensor], whole: bool
    ) -> Tensor:
        """Every frame of a call: ``[N, frames, codebooks]`` int64 on the model's device.

        What breaks, or fails verification, is made again on a lower rung, after a first lack of memory on the same one;
        ``rest`` finishes on the stock path. ``whole`` is for :class:`~csm_runtime.many_rows.ManyRows`.
        """
        request = call.request
        rows = request.input_ids.shape[0]
        self._check_room(request)
        many = bucket_for(rows) is None
        if many and streamer is not None:
            raise hf_call.Unsupported(f"a streamer for {rows} rows, more than {BUCKETS[-1]}, which take turns")
        seeds.fit(rows, request.backbone.do_sample or request.depth.do_sample)
        if many:
            self._note_context(request)
            return ManyRows(self, call, seeds, whole).run()
        loop, made_room = None, False
        self.memory.between_calls()
        while loop is None or self.guard.rung != STOCK:
            rung = self.guard.rung
            loop = DecodeLoop(
                request,
                functools.partial(self._begin, request, seeds, loop),
                streamer,
                self.metrics,
                loop,
                self.memory.between_frames,
                self.memory.frame,
            )
            try:
                loop.run()
                if loop.complete:
                    return self._delivered(loop, request, streamer)
            finally:
                loop.release()
            if self.guard.rung != rung:  # its calibration has gone down already
                continue
            breach = loop.breach
            if breach is not None and breach.kind == "memory" and not made_room:
                made_room = True
                loop.runner = loop.watch = None
                self.memory.make_room(breach.reason)
            else:
                self._step_down(loop)
        self._went_stock("a fault of the fast path")
        none = request.input_ids.new_zeros(rows, 0, self._spec.codebooks)
        return rest(torch.stack(loop.frames, dim=1) if loop.frames else none, loop.ended)

    def _delivered(self, loop: DecodeLoop, request: hf_call.Request, streamer: Any) -> Tensor:
        """The end of a call whose frames are all there."""
        if streamer is not None:
            streamer.end()
        count = len(loop.frames) * request.input_ids.shape[0]
        self.metrics.count("generate.fast" if self.guard.rung == FAST else "generate.rung")
        self.metrics.count("frames", count)
        self.guard.healthy(count)
        if request.return_dict:
            loop.fill_cache()
        return torch.stack(loop.frames, dim=1)

    def _step_down(self, loop: DecodeLoop) -> None:
        """After a loop that stopped early: tell the guard, and make room on the rung that it goes to."""
        breach, rows = loop.breach, len(loop.ended)
        assert breach is not None
        evidence = loop.evidence()
        if breach.kind == "memory":
            loop.runner = loop.watch = None
        self._lose_trust(breach, len(loop.frames), rows, evidence)

    def _lose_trust(self, breach: Breach, frame: int, rows: int, evidence: dict[str, Tensor]) -> None:
        """Tell the guard, once what the breach makes doubtful has been let go of; the frames before ``frame`` stay."""
        if any(finding.check == "copies" for finding in breach.findings):
            self._weights.forget([f.measure for f in breach.findings if f.check == "copies"])
            self._seats.clear()  # they may share them
        if breach.kind == "memory":
            self._give_memory_back()
        self._distrust(breach, frame, rows, evidence)

    def _give_memory_back(self) -> None:
        """The buffers of every rung; those who need them again make new ones."""
        for seat in (self._fast_seat(), *self._seats.values()):
            seat.engine.free()
        self._seats.clear()

    def _distrust(self, breach: Breach, frame: int, rows: int, evidence: dict[str, Tensor]) -> None:
        """Take the next rung; the frames before ``frame`` stay."""
        lower = ladder.below(self.guard.rung, breach, self._engine, self.policy, self._dropped)
        self.guard.step_down(breach, lower, self._event(breach, frame, rows, lower, evidence))

    def _event(self, breach: Breach, frame: int, rows: int, lower: str, evidence: dict[str, Tensor]) -> GuardEvent:
        engine = self._engine
        return GuardEvent(
            kind=breach.kind,
            reason=breach.reason,
            frame=frame,
            rung=self.guard.rung,
            next_rung=lower,
            suspect=breach.suspect,
            mode=engine.mode,
            policy=self.policy.name,
            dtype=str(engine.dtype).removeprefix("torch."),
            device=str(engine.device),
            rows=rows,
            findings=[asdict(finding) for finding in breach.findings],
            tensors=evidence,
        )

    def _spoken(self, frames: int, seconds: float) -> None:
        """Count what a call has said, for the real-time factor."""
        self.metrics.audio(frames / self._model.config.codec_config.frame_rate, seconds)

    def _guard_figures(self) -> dict[str, Any]:
        return {"rung": self.guard.rung, "trusted": self.guard.rung == FAST, "codec_trusted": self.guard.codec_trusted}

    def _sound(self, sequences: Tensor) -> list[Tensor]:
        """The samples of each row of ``[N, frames, codebooks]``, up to the end of its speech, as the stock loop makes them."""
        model = self._model
        rows = cut_at_end(sequences, model.config.codebook_eos_token_id)
        wanted = (self.policy.format_of("codec"), self.codec_batch_frames) if self.guard.codec_trusted else ("keep", 0)
        if self._codec is None or self._codec.codec is not model.codec_model:
            self._codec = CodecPath(model.codec_model, *wanted, on_fault=self._codec_faults.append)
        if (self._codec.format, self._codec.batch_frames) != wanted:
            self._codec.use(format=wanted[0], batch_frames=wanted[1])
        self._codec_faults.clear()
        start = time.perf_counter()
        try:
            return self._codec.decode(rows)
        finally:
            self.metrics.observe("codec", time.perf_counter() - start)
            for what in self._codec_faults:
                self._codec_fault(what, sequences)

    def _codec_fault(self, what: str, sequences: Tensor) -> None:
        """The codec's fast path failed: the stock codec has the next word, and every later one until rearm()."""
        if self.metrics.fault(what):
            logger.warning("the fast codec path failed, the stock codec goes on: %s", what)
        breach = Breach(what, "codec", 0)
        event = self._event(breach, 0, len(sequences), self.guard.rung, {"sequences": sequences.detach().cpu()})
        self.guard.distrust_codec(breach, event)

    def _check_room(self, request: hf_call.Request) -> None:
        """Whether prompt and frames fit. Raises ValueError or :class:`~csm_runtime.adapters.hf_call.Unsupported`."""
        self._check_positions(request.input_ids.shape[1], request.max_frames)

    def _check_positions(self, tokens: int, frames: int) -> None:
        """Likewise, of a prompt of so many positions."""
        capacity = self._engine.capacity
        needed = tokens + frames - 1
        if needed > capacity:
            if self._wanted_positions is not None:
                raise ValueError(
                    f"max_positions={capacity} is too small for a prompt of {tokens} positions and {frames} frames, which "
                    f"need {needed}; pass a larger max_positions to accelerate() or a smaller max_new_tokens"
                )
            raise hf_call.Unsupported(f"more than {capacity} positions of prompt and frames")

    def _begin(
        self, request: hf_call.Request, seeds: Seeds, loop: DecodeLoop | None
    ) -> tuple[Engine, Any, Watch | None]:
        """Prefill, and everything the frames of this call read set to this call's values.

        Args:
            request: the call.
            seeds: of its noise.
            loop: the loop on a higher rung whose frames are kept, or None.
        """
        rows = request.input_ids.shape[0]
        self._note_context(request)
        size = bucket_for(rows)
        assert size is not None
        seat = self._seat_in_force(size)
        made = request.input_ids.new_zeros(rows, 0, self._spec.codebooks)
        if loop is not None and loop.frames:
            made = torch.stack(loop.frames, dim=1)
        prompt = self._prompts.prefill(seat.passes, request, made, known=self.guard.rung == FAST)
        runner = seat.engine.prepare(rows)
        state, filled = runner.state, prompt.filled
        ended, last = None if loop is None else loop.ended, prompt.positions[:, -1].expand(rows)
        state.load_prompt(filled.layers, filled.hidden, prompt.mask, last, made.shape[1], ended)
        pad = request.pad_token if request.pads_finished_rows else None
        state.set_end(request.eos_token, request.judged, pad)
        state.seed.zero_()
        state.utterance.zero_()
        self._set_drawing(runner, slice(None), slice(rows), request, seeds)
        return seat.engine, runner, self._watch(seat, runner, request, made.shape[1])

    def _note_context(self, request: hf_call.Request) -> None:
        self.metrics.gauge("context.positions", request.input_ids.shape[1])
        self.metrics.gauge("context.share", request.input_ids.shape[1] / self._spec.backbone.positions)

    def _set_drawing(self, runner: Any, sampled: slice, seeded: slice, request: hf_call.Request, seeds: Seeds) -> None:
        """How some rows of a runner draw their codes, and the noise of those that are a call's."""
        for params, wanted, vocab in (
            (runner.params, request.backbone, self._spec.vocab),
            (runner.depth_params, request.depth, self._spec.depth_vocab),
        ):
            params.do_sample[sampled].fill_(wanted.do_sample)
            params.temperature[sampled].fill_(wanted.temperature)
            params.top_k[sampled].fill_(wanted.top_k or vocab)
            params.top_p[sampled].fill_(wanted.top_p)
        state = runner.state
        for target, values in ((state.seed, seeds.seed), (state.utterance, seeds.utterance_ids)):
            assert values is not None, "fit() comes first"
            target[seeded].copy_(values)

    def _watch(
        self, seat: Seat, runner: Any, request: hf_call.Request, first: int, row: int | None = None
    ) -> Watch | None:
        """The guard's eye on a call's frames from the ``first`` on: on the runner's first rows, or on the one given."""
        rung = self.guard.rung
        if not self.guard.config.verify or rung not in self.guard.floors:
            return None
        last = request.positions[:, -1].expand(request.input_ids.shape[0])
        length = request.input_ids.shape[1]
        scene = ladder.scene(self._model, seat, runner, length, last, self._dropped, first)
        if row is not None:
            scene = ladder.of_row(scene, row)
        checks = Checks(ladder.replay_of(seat.engine, runner), scene, self.guard.floors[rung].ties)
        return Watch(self.guard, rung, checks, self.metrics, first=first)
