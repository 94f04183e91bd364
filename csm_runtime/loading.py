"""``load(folder)``: a CSM straight from its safetensors files to the accelerated model.

The stock model is built without weights. Threads then read them matrix by matrix, first the text embedding and the
backbone, then the depth decoder, then the codec; what the policy lowers is packed as it arrives and its original freed
before the thread takes the next, so that the model never exists in full precision. Prefill is compiled, and with
``background=True`` a first prompt prefilled, while the rest is still being read.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csm_runtime import hugepages
from csm_runtime.accelerate import GPTQ, Acceleration, accelerate, buckets, loading_handle
from csm_runtime.adapters import hf_call, hf_checks, hf_loading
from csm_runtime.adapters.hf_loading import BACKBONE_TABLE, DEPTH_TABLE
from csm_runtime.checkpoints import DTYPES, check_name, first_line, usable_device
from csm_runtime.compiling import Progress
from csm_runtime.extras import need
from csm_runtime.generate import by_name, plain_mode, prepared
from csm_runtime.precision import PrecisionPolicy, resolve_policy
from csm_runtime.tensor_files import stored_tensors
from csm_runtime.tuning import AUTO
from csm_runtime.weights import single_threaded_pool

logger = logging.getLogger("csm_runtime")

STAGES = ("backbone", "depth", "codec")
"""In the order of reading. The first includes the text embedding and the head of codebook 0."""
_MOST_THREADS = 4
_CODEC_BYTES = 1 << 25
"""Tensors of the codec are read in jobs of about this size."""


def load(
    path_or_id: str | os.PathLike[str],
    *,
    precision: str | PrecisionPolicy = "stock",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    packed_cache: str | os.PathLike[str] | None = None,
    drop_originals: bool | None = None,
    background: bool = False,
    **accelerate_options: Any,
) -> Any:
    """Load a CSM and make it fast: ``accelerate(from_pretrained(...))`` in less time and memory, with the same weights.

    Args:
        path_or_id: a folder that ``save_pretrained`` wrote, or a hub id; one safetensors file or shards.
        precision: as :func:`~csm_runtime.accelerate` has it. ``"auto"``, ``rounding="gptq"`` and ``training`` need the whole
            model in its own dtype first.
        dtype: of backbone and depth decoder, None or ``"auto"`` for that of the checkpoint. The codec is fp32 in any case,
            its values those that ``from_pretrained`` gives it in that dtype.
        device: None is the CPU, ``"auto"`` CUDA where there is one.
        progress: show progress bars on stderr.
        packed_cache: as :func:`~csm_runtime.accelerate` has it. The checkpoint is read in any case: what was packed before
            is only used if it is still true to it.
        drop_originals: free the stock weights of what is stored in int8, fp8 or int4, each as soon as it is packed. Default:
            yes, where the policy does that to any. ``restore()`` and saving the model are not possible then; False keeps
            them, at the cost of the memory.
        background: return as soon as text embedding and backbone are usable. ``model.acceleration.wait()`` waits for the
            rest, and so does whatever else is asked of ``model.acceleration``; the first ``generate()`` prefills its prompt
            before it waits. Do nothing else with the model before that.
        accelerate_options: all others of :func:`~csm_runtime.accelerate`.

    Returns:
        transformers' ``CsmForConditionalGeneration`` in eval mode, accelerated.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        OSError: a file cannot be read, or became shorter meanwhile. With ``background=True`` this may come out of whoever
            waits.
        ValueError: a damaged file, a tensor that is missing or has another shape or dtype, not a CSM, a bad argument. All
            headers are checked before any tensor is read.

    Example::

        model = load("sesame/csm-1b", precision="int4")
        audio = model.generate(**inputs, output_audio=True)
    """
    need("transformers", "hf")
    unknown = sorted(set(accelerate_options) - set(inspect.signature(accelerate).parameters))
    if unknown:
        raise TypeError(f"load() got an unexpected keyword argument {unknown[0]!r}")
    name = os.fspath(path_or_id)
    check_name(name)
    wanted = _dtype(dtype)
    where = usable_device("cpu" if device is None else str(device))
    whole = (
        precision == AUTO
        or accelerate_options.get("rounding") == GPTQ
        or accelerate_options.get("training", False) is not False
    )
    if whole and background:
        raise ValueError("background=True reads while it accelerates; 'auto', 'gptq' and training need the whole model")
    policy = None if whole else resolve_policy(precision)
    if policy is not None:
        accelerate_options.pop("training", None)
        if accelerate_options.pop("calibration", None) is not None:
            raise ValueError("calibration is for precision='auto' and rounding='gptq'")
    sizes = buckets(accelerate_options.get("batch_sizes", (1,)))
    plan = _Plan(name, _empty(name, wanted), where)
    plan.read_small()
    model = plan.model
    if policy is None:
        parts = Parts(plan, None, progress)
        try:
            for stage in STAGES:
                parts.wait(stage)
        except BaseException:
            parts.cancel()
            raise
        return accelerate(
            model,
            precision=precision,
            progress=progress,
            packed_cache=packed_cache,
            drop_originals=drop_originals is not False,
            **accelerate_options,
        )
    options = {"progress": progress, "packed_cache": packed_cache, **accelerate_options}
    handle, finish = loading_handle(model, policy, drop=drop_originals, **options)
    loading = Loading(model, handle, Parts(plan, handle, progress), finish, sizes)
    loading.wait("backbone" if background else None)
    if background:
        loading.install()
    return model


class Loading:
    """What ``model.acceleration`` is until the whole model is there. Whatever else is asked of it is asked of the handle.

    Args:
        model: the stock model, of which only the first stage may be there.
        handle: what it is accelerated with.
        parts: what is being read.
        finish: packs, compiles and tests the rest once backbone and depth decoder are there.
        sizes: buckets to compile prefill for.
    """

    def __init__(
        self, model: Any, handle: Acceleration, parts: Parts, finish: Callable[[], None], sizes: Sequence[int]
    ) -> None:
        self._model, self._handle, self._parts, self._finish = model, handle, parts, finish
        self._sizes = sizes
        self._lock = threading.RLock()
        self._prefill_compiled = self._done = False
        self._error: BaseException | None = None

    def wait(self, stage: str | None = None) -> Acceleration:
        """Wait for a stage of :data:`STAGES` to be read; with None for all of them, and make the model ready to speak.

        Returns:
            The handle, which with None is ``model.acceleration`` from now on.

        Raises:
            OSError, ValueError: what went wrong, again for everyone who waits: the model cannot be used.
        """
        if stage is not None and stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES} or None, got {stage!r}")
        with self._lock:
            if self._error is not None:
                raise self._error
            try:
                if stage is not None:
                    self._parts.wait(stage)
                elif not self._done:
                    self._complete()
            except BaseException as error:
                self._parts.cancel()
                stopped = RuntimeError("loading was interrupted; load the model again")
                self._error = error if isinstance(error, Exception) else stopped
                raise
            return self._handle

    def _complete(self) -> None:
        self._compile_prefill()
        self._parts.wait("depth")
        if self._handle.originals_dropped:
            hugepages.give_back()  # what the threads' heaps still hold, before more is needed
        self._finish()
        self._parts.wait("codec")
        self._handle.install()
        self._done = True

    def _compile_prefill(self) -> None:
        self._parts.wait("backbone")
        if not self._prefill_compiled:
            self._handle.warm_up_prefill(self._sizes)
            self._prefill_compiled = True

    def install(self) -> None:
        """Become ``model.acceleration`` for the time being."""
        self._model.__dict__["acceleration"] = self
        self._model.__dict__["generate"] = _FirstGenerate(self._model, self)

    def prefill_ahead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Prefill the prompt of a ``generate`` call while other stages are still read; what is returned gives that up.

        It is only ahead of what the call itself does: what is wrong with its arguments is for that to say.
        """
        ahead = None
        try:
            with self._lock:
                if not self._done:
                    self._compile_prefill()
                    ahead = self._look_ahead(args, kwargs)
        except Exception as error:
            logger.debug("the first prompt is not prefilled ahead: %s: %s", type(error).__name__, error)
        return ahead or (lambda: None)

    def _look_ahead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None] | None:
        """Prefill a call's prompt; None where it has recordings, which want the codec, which comes last."""
        model, handle = self._model, self._handle
        rest = {name: value for name, value in kwargs.items() if name not in ("seed", "utterance_ids")}
        arguments = by_name(type(model).generate, model, args, rest)
        if arguments.get("custom_generate") is not None or arguments.get("input_values") is not None:
            return None
        hf_checks.check_arguments(model, handle._spec, arguments)
        for name in ("custom_generate", "streamer", "output_audio"):  # a streamer would get the prompt twice
            arguments.pop(name, None)
        with plain_mode():
            request = prepared(model, arguments).request
            none = request.input_ids.new_zeros(len(request.input_ids), 0, handle._spec.codebooks)
            return handle.prefill_ahead(*hf_call.prompt_with_frames(model, request, none))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself asks for
            raise AttributeError(name)
        return getattr(self.wait(), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RuntimeError(
            "the model is still being loaded: model.acceleration.wait() comes before copying or pickling it"
        )

    def __reduce__(self) -> Any:
        raise RuntimeError(
            "the model is still being loaded: model.acceleration.wait() comes before copying or pickling it"
        )


class _FirstGenerate:
    """``model.generate`` until the whole model is there: prefills while it waits."""

    is_accelerated = True

    def __init__(self, model: Any, loading: Loading) -> None:
        self._model, self._loading = model, loading
        functools.update_wrapper(self, type(model).generate.__get__(model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As :class:`~csm_runtime.generate.FastGenerate`, which does it."""
        give_up = self._loading.prefill_ahead(args, kwargs)
        try:
            self._loading.wait()
            return self._model.generate(*args, **kwargs)
        finally:
            give_up()


class _Job(NamedTuple):
    """Tensors that are read by one thread, one after another, and what is then packed."""

    stage: str
    keys: tuple[str, ...]
    matrices: tuple[str, ...] = ()


class _Plan:
    """What to read from where, checked against the model before anything is read.

    Raises:
        ValueError: a tensor is missing or has another shape or dtype.
    """

    def __init__(self, name: str, empty: hf_loading.Empty, device: torch.device) -> None:
        self.model, self.device = empty.model, device
        other = next((file for file in empty.files if file.suffix != ".safetensors"), None)
        if other is not None:
            raise ValueError(
                f"{other} is no safetensors file; from_pretrained({name!r}).save_pretrained(folder) makes one of it"
            )
        stored = stored_tensors(empty.files)
        self.stored = {empty.rename(key): tensor for key, tensor in stored.items()}
        self.wanted: dict[str, Tensor] = dict(empty.model.state_dict())
        empty.model.codec_model.float()  # what it will be is known before it is there; values are those of the dtype above
        missing = [key for key in self.wanted if key not in self.stored]
        # As csm_runtime.checkpoints does: transformers 5.17 leaves the other one at random.
        self.tied = BACKBONE_TABLE in missing and bool(empty.model.config.tie_codebooks_embeddings)
        if self.tied:
            missing.remove(BACKBONE_TABLE)
            del self.wanted[BACKBONE_TABLE]
        where = ", ".join(map(str, empty.files))
        if missing:
            raise ValueError(
                f"model {name!r} lacks weights of a CSM: {min(missing)}, {len(missing)} in all, are not in {where}; "
                "download it again"
            )
        for key, meta in self.wanted.items():
            self._check(key, meta)
        spare = sorted(set(self.stored) - set(self.wanted) - {BACKBONE_TABLE})
        if spare:
            logger.warning("%s: %d tensors are not of a CSM and are left out, such as %r", where, len(spare), spare[0])
        self.small, self.jobs = self._divide()

    def _check(self, key: str, meta: Tensor) -> None:
        tensor = self.stored[key]
        fits = tensor.dtype == meta.dtype or (tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1)
        if not fits or meta.is_floating_point() != tensor.dtype.is_floating_point:
            wanted = "fp32, bf16 or fp16" if meta.is_floating_point() else str(meta.dtype)
            raise ValueError(
                f"{tensor.path}: tensor {tensor.name!r} is stored as {tensor.dtype}, wanted {wanted}: not this model's file"
            )
        if tensor.shape != tuple(meta.shape):
            raise ValueError(
                f"{tensor.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, wanted {list(meta.shape)} by the "
                "config beside it: they do not belong together; download both again"
            )

    def _divide(self) -> tuple[list[str], list[_Job]]:
        """Norms and biases, which the handle needs at once; and the rest in the order in which it is needed."""
        packed = {key: name for name, key in hf_loading.matrices(self.model).items() if key in self.wanted}
        small: list[str] = []
        codec: list[str] = []
        jobs: list[_Job] = []
        for key, meta in self.wanted.items():
            if key.startswith("codec_model."):
                codec.append(key)
            elif key in packed or meta.ndim > 1:
                jobs.append(self._job(key, packed.get(key)))
            else:
                small.append(key)
        # The largest first: a thread that ends with one keeps the others waiting.
        jobs.sort(key=lambda job: (STAGES.index(job.stage), -self.nbytes(job)))
        while codec:
            some: list[str] = []
            size = 0
            while codec and size < _CODEC_BYTES:
                some.append(codec.pop())
                size += self.stored[some[-1]].nbytes
            jobs.append(_Job("codec", tuple(some)))
        return small, jobs

    def _job(self, key: str, matrix: str | None) -> _Job:
        tied = self.tied and key == DEPTH_TABLE
        stage = "depth" if key.startswith("depth_decoder.") and not tied else "backbone"
        names = () if matrix is None else (matrix,)
        return _Job(stage, (key,), ("backbone.embedding", "depth.embedding") if tied else names)

    def nbytes(self, job: _Job) -> int:
        """What a job reads."""
        return sum(self.stored[key].nbytes for key in job.keys)

    def read_small(self) -> None:
        """What the handle looks at before anything else is there: norms, biases, and buffers that no file holds."""
        hf_loading.make_buffers(self.model, self.device)
        for key in self.small:
            self.read(key)

    def read(self, key: str) -> None:
        """Put one tensor where it belongs, on the device. Raises OSError."""
        value = self.stored[key].read(self.wanted[key].dtype)
        if key.startswith("codec_model.") and value.is_floating_point():
            value = value.float()
        parameter = hf_loading.put(self.model, key, value.to(self.device))
        if self.tied and key == DEPTH_TABLE:
            assert isinstance(parameter, nn.Parameter)
            hf_loading.put(self.model, BACKBONE_TABLE, parameter)


class Parts:
    """Threads that read a model stage by stage, and have what has to be packed packed.

    Args:
        plan: what to read.
        handle: what packs, or None.
        progress: show a progress bar.
    """

    def __init__(self, plan: _Plan, handle: Acceleration | None, progress: bool) -> None:
        self._plan, self._handle = plan, handle
        self._bar = Progress(sum(map(plan.nbytes, plan.jobs)), "loading", progress, in_bytes=True)
        self._error: Exception | None = None
        self._over, self._lock, self._left = threading.Event(), threading.Lock(), len(plan.jobs)
        # Two at least: one waits for the disk while another packs.
        pool = single_threaded_pool(max(2, min(_MOST_THREADS, torch.get_num_threads())))
        self._futures: dict[str, list[Future[None]]] = {stage: [] for stage in STAGES}
        for job in plan.jobs:
            self._futures[job.stage].append(pool.submit(self._run, job))
        pool.shutdown(wait=False)

    def _run(self, job: _Job) -> None:
        if self._over.is_set():
            return
        try:
            for key in job.keys:
                self._plan.read(key)
            if self._handle is not None and job.matrices:
                self._handle.take(job.matrices)
        except Exception as error:
            with self._lock:
                self._error = self._error or error
            self._over.set()
            return
        with self._lock:
            self._left -= 1
            self._bar.advance(job.stage, self._plan.nbytes(job))
            if not self._left:
                self._bar.close()

    def wait(self, stage: str) -> None:
        """Until a stage is there. Raises what went wrong with it, or with any other one so far."""
        wait(self._futures[stage])
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Begin no more jobs, and wait for those that run."""
        self._over.set()
        wait([future for futures in self._futures.values() for future in futures])
        if self._left:
            self._bar.close()


def _empty(name: str, dtype: torch.dtype | None) -> hf_loading.Empty:
    try:
        return hf_loading.empty_model(name, dtype)
    except ImportError:
        raise
    except Exception as error:  # whatever a damaged file makes of its readers
        _blame(name)
        kind = type(error) if type(error) in (FileNotFoundError, OSError, RuntimeError) else ValueError
        raise kind(f"model {name!r} cannot be loaded: {first_line(error)}") from error


def _blame(folder: str) -> None:
    """Raise an error that names the file of a folder that cannot be read; those of a hub id are not looked for."""
    for path in sorted(Path(folder).glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({first_line(error)}); download or copy it again") from error
    for path in sorted(Path(folder).glob("*.safetensors")):
        stored_tensors([path])


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    raise ValueError(f"dtype must be one of {tuple(DTYPES)}, such a torch.dtype or None, got {dtype!r}")
