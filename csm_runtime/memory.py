"""Cached memory goes back to the device: rarely while there is room, often while there is little, never within a frame.

An allocator keeps what was freed, which is right as long as nobody else needs it. :class:`CacheClearing` looks at the memory
between frames, at an interval that follows the pressure, and clears only what is worth clearing. After a lack of memory it
makes room for one more try. The CUDA half has not been run on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from csm_runtime import graphs, hugepages
from csm_runtime.metrics import Metrics

logger = logging.getLogger("csm_runtime")

T = TypeVar("T")

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_TRIED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_UNSAID = 256 << 20
"""Bytes to make room for where the error does not say how many were wanted: prompt and codec take about that."""
_AHEAD = 2
"""Before a call, pressure counts as if it took twice of what is cached, in sizes that the cache lacks. Of 0 to 3 this
was the least with no lack of memory that a fixed interval of 50 frames does not have (simulated, tests/test_memory.py)."""
_LONGEST_CAPTURE = 30.0
"""Seconds that someone who is out of memory waits for another thread's capture."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of whatever kind, has run out."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in _NO_MEMORY)


def wanted_bytes(said: str) -> int:
    """Bytes that an allocation failed for, by the text of its error; 256 MiB where that does not say."""
    found = _TRIED.search(said)
    return int(float(found[1]) * _UNITS[found[2].lower()]) if found else _UNSAID


@dataclass(frozen=True)
class MemoryReading:
    """Memory at one moment, all in bytes.

    Args:
        total: what there is, of the device or, for a process, of the machine or of the control group with the least.
        free: what anyone could still have of it.
        reserved: what this process has taken: by its caching allocator, or resident.
        allocated: the part of it that is in use.
    """

    total: int
    free: int
    reserved: int
    allocated: int

    @property
    def pressure(self) -> float:
        """The share of the memory that is taken, by whomever: 0 to 1."""
        return min(1.0, max(0.0, 1.0 - self.free / self.total)) if self.total > 0 else 0.0

    @property
    def reclaimable(self) -> int:
        """Bytes that clearing could give back at most."""
        return max(0, self.reserved - self.allocated)

    @property
    def fragmentation(self) -> float:
        """The share of the reserved bytes that is not in use: 0 to 1."""
        return self.reclaimable / self.reserved if self.reserved > 0 else 0.0


@dataclass(frozen=True)
class MemoryConfig:
    """When memory is looked at and cleared.

    Args:
        high: pressure from which on memory is cleared.
        low: pressure below which that ends.
        worth: share of the total that has to be reclaimable, or nothing is cleared.
        least: frames between two looks under high pressure.
        most: frames between two looks, at most, below ``low``.
        start: frames until the first look, and until what one clear could not free is tried again for the first time.
        enabled: False leaves only what follows a lack of memory.

    Raises:
        ValueError: a value out of range.
    """

    high: float = 0.85
    low: float = 0.70
    worth: float = 0.02
    least: int = 8
    most: int = 1600
    start: int = 50
    enabled: bool = True

    def __post_init__(self) -> None:
        for name in ("high", "low", "worth"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value <= 1:
                raise ValueError(f"{name} must be a number above 0 and at most 1, got {value!r}")
        if self.low >= self.high:
            raise ValueError(f"low must be below high, which is {self.high}, got {self.low!r}")
        for name in ("least", "most", "start"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not self.least <= self.start <= self.most:
            raise ValueError(f"start must be from least to most, {self.least} to {self.most}, got {self.start}")
        if type(self.enabled) is not bool:
            raise ValueError(f"enabled must be True or False, got {self.enabled!r}")

    def interval(self, pressure: float) -> int:
        """Frames between two looks, at most: ``most`` up to ``low``, ``least`` from ``high`` on, geometric between."""
        share = min(1.0, max(0.0, (self.high - pressure) / (self.high - self.low)))
        return round(self.least * (self.most / self.least) ** share)


# --------------------------------------------------------------------------------------------------- where memory is


class MemorySource(NamedTuple):
    """One kind of memory: how to look at it and how to clear it."""

    probe: Callable[[], MemoryReading | None]
    """None where nothing is known; nothing is cleared then."""
    clear: Callable[[], None]
    """Give back what is cached."""
    peak: Callable[[], int]
    """The most bytes that have been in use (CUDA) or resident (process) since the start."""
    quiet: Callable[[float], contextlib.AbstractContextManager[bool]]
    """Keeps captures away while its block runs; False where that takes more than the given seconds."""


def source_of(device: torch.device) -> MemorySource:
    """The memory that a model on this device computes in."""
    if device.type != "cuda":
        return MemorySource(process_probe, _trim, _peak_resident, lambda seconds: contextlib.nullcontext(True))
    return MemorySource(
        functools.partial(cuda_probe, device),
        torch.cuda.empty_cache,
        functools.partial(torch.cuda.max_memory_allocated, device),
        graphs.no_capture,
    )


def cuda_probe(device: torch.device) -> MemoryReading:
    """The device's memory, and what PyTorch's allocator holds of it.

    Raises:
        RuntimeError: CUDA is not initialised, and a look must not do that.
    """
    if not torch.cuda.is_initialized():
        raise RuntimeError(f"{device} cannot be looked at: CUDA is not initialised")
    free, total = torch.cuda.mem_get_info(device)
    return MemoryReading(total, free, torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device))


def process_probe(root: Path = Path("/")) -> MemoryReading | None:
    """The machine's memory, or less where a control group grants less, and what this process has of it.

    What malloc holds free includes pages that an earlier trim has given back already: ``reclaimable`` is an upper bound.

    Args:
        root: where ``proc`` and ``sys`` lie.

    Returns:
        None where neither psutil nor ``/proc`` says anything.
    """
    found = _psutil() or _proc(root)
    if found is None:
        return None
    resident, total, free = found
    for limit, left in _limits(root):
        if limit < found[1]:
            total, free = min(total, limit), min(free, left)
    return MemoryReading(total, max(0, free), resident, max(0, resident - _malloc_free()))


def _psutil() -> tuple[int, int, int] | None:
    """Resident bytes of this process; bytes of the machine, and those available."""
    try:
        import psutil
    except ImportError:
        return None
    memory = psutil.virtual_memory()
    return psutil.Process().memory_info().rss, memory.total, memory.available


def _proc(root: Path) -> tuple[int, int, int] | None:
    """The same by Linux's own files."""
    found = {}
    try:
        for file, keys in (("self/status", ("VmRSS",)), ("meminfo", ("MemTotal", "MemAvailable"))):
            for line in (root / "proc" / file).read_text().splitlines():
                key, _, value = line.partition(":")
                if key in keys:
                    found[key] = int(value.split()[0]) << 10
        return found["VmRSS"], found["MemTotal"], found["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Of each control group over this process that has a limit, in bytes: the limit, and what is left of it.

    Pages of files that nobody uses count as left: the kernel drops them before it refuses memory.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        if not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = base / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.strip("/")  # inside a container it need not be there: its root is
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit, and no number
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield limit, limit - used + int(stat.get(names[2], 0))
            if folder == base:
                break


class _Mallinfo2(ctypes.Structure):
    _fields_ = (("others", ctypes.c_size_t * 8), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t))


def _malloc_free() -> int:
    """Bytes that malloc holds and nobody uses; 0 where the C library does not say."""
    if not sys.platform.startswith("linux"):
        return 0
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc 2.33
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo2
    return int(mallinfo().fordblks)


def _trim() -> None:
    """Collect what is young and return free pages to the system.

    A full collection takes 215 ms beside transformers, a young one 0.02 (2 cores, 2026-11-29): that is for emergencies.
    """
    gc.collect(1)
    hugepages.give_back()


def _peak_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------- when to clear


class CacheClearing:
    """Looks at the memory of one model between its frames, and clears the cache when that is worth it.

    It never raises into generation: a look that fails is counted, and comes again at the next call or after
    ``config.most`` frames.
    Counters: ``memory.clears``, ``memory.freed_bytes``, ``memory.deferred``, ``memory.retries``,
    ``memory.shrunk_bytes``, ``memory.failed``; times: ``memory.clear``.

    Args:
        source: of the readings; None where nothing is to be looked at.
        metrics: where counts go.
        config: may be replaced at any time.

    Attributes:
        shrinkers: called with the bytes wanted after a lack of memory; each lets go of what can be made again and returns
            the bytes that this should free.
        interval: frames between two looks.
        clearing: whether pressure has been above ``config.high`` and not below ``config.low`` since.
        looks: so far, between frames and calls.
        clears: so far.
        freed_bytes: by them.
    """

    def __init__(self, source: MemorySource | None, metrics: Metrics, config: MemoryConfig | None = None) -> None:
        self.config = MemoryConfig() if config is None else config
        self.shrinkers: list[Callable[[int], int]] = []
        self._metrics = metrics
        self._lock = threading.RLock()
        self._frames = 0
        self._asked = False
        self.looks = self.clears = self.freed_bytes = 0
        self.follow(source)

    def follow(self, source: MemorySource | None) -> None:
        """Look at another memory from now on, after the model has moved."""
        with self._lock:
            self.source = source
            self.clearing = False
            self.interval = self._patience = self.config.start
            self._gap = self._left = self.interval
            self._quiet_frames = self._since_clear = self._idle = self._stuck = 0
            self._last: MemoryReading | None = None
            self._peak_reserved = 0

    # ------------------------------------------------------------------------------------------------ from the loop

    def between_frames(self) -> None:
        """Once for every frame, with nothing half launched: most calls count down and no more."""
        self._left -= 1
        if self._left <= 0:
            self._look()

    def between_calls(self) -> None:
        """Before a call, and by that after the sound of the last: look now, and again after the first frame.

        Prompts and the codec take most of what is cached; frames alone take nothing new.
        """
        self._look(ahead=True)
        self._gap = self._left = 1

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        """While its block runs, in whatever thread, nothing is cleared; what was to be is cleared at the end. Re-entrant."""
        with self._lock:  # a clear in progress is waited for
            self._frames += 1
        try:
            yield
        finally:
            with self._lock:
                self._frames -= 1
                if self._asked and not self._frames:
                    self.clear()

    def clear(self, wait: float = 0.0) -> int:
        """Clear now, whatever the pressure; within a frame or a capture: later.

        Args:
            wait: seconds to wait for a capture of another thread.

        Returns:
            Bytes that went back; 0 where it was put off.
        """
        with self._lock, self._trying():
            source = self.source
            if source is None:
                return 0
            with contextlib.nullcontext(False) if self._frames else source.quiet(wait) as quiet:
                if not quiet:
                    if not self._asked:
                        self._metrics.count("memory.deferred")
                    self._asked = True
                    self._gap, self._left = self._gap - self._left + 1, 1
                    return 0
                return self._cleared(source, source.probe())
        return 0

    # ---------------------------------------------------------------------------------------- after a lack of memory

    def with_retry(self, call: Callable[[], T]) -> T:
        """Call; where memory runs out, make room and call once more, whose exceptions are the caller's."""
        try:
            return call()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = f"{type(error).__name__}: {error}"
        self.make_room(said)  # out here nothing holds the traceback, whose frames hold tensors
        return call()

    def make_room(self, said: str) -> int:
        """After a lack of memory, for one more try: clear, let the shrinkers let go, and clear what they freed.

        Args:
            said: the error's text, which may say how many bytes were wanted.

        Returns:
            Bytes that went back to the device.
        """
        self._metrics.count("memory.retries")
        gc.collect()
        freed, wanted, shrunk = self.clear(_LONGEST_CAPTURE), wanted_bytes(said), 0
        for shrink in self.shrinkers:
            if shrunk < wanted:
                with self._trying("a shrinker failed"):
                    shrunk += shrink(wanted - shrunk)
        if shrunk:
            self._metrics.count("memory.shrunk_bytes", shrunk)
            freed += self.clear(_LONGEST_CAPTURE)
        logger.info("out of memory (%s): %d bytes cleared, %d shrunk, one more try", said, freed, shrunk)
        return freed

    def status(self) -> dict[str, float]:
        """Plain numbers: bytes, pressure and fragmentation from 0 to 1, frames between two looks, counts."""
        numbers: dict[str, float] = {
            "looks": self.looks,
            "clears": self.clears,
            "freed_bytes": self.freed_bytes,
            "interval_frames": self.interval,
            "clearing": int(self.clearing),
        }
        with self._lock, self._trying():
            if self.source is not None:
                with self.source.quiet(0.0) as quiet:
                    if quiet:
                        self._seen(self.source.probe())
                        numbers["peak_bytes"] = self.source.peak()
        reading = self._last
        if reading is not None:
            numbers.update(
                pressure=reading.pressure,
                fragmentation=reading.fragmentation,
                total_bytes=reading.total,
                free_bytes=reading.free,
                reserved_bytes=reading.reserved,
                allocated_bytes=reading.allocated,
                peak_reserved_bytes=self._peak_reserved,
            )
        return numbers

    # -------------------------------------------------------------------------------------------------------- inside

    @contextlib.contextmanager
    def _trying(self, what: str = "memory could not be looked at or cleared") -> Iterator[None]:
        """Whatever goes wrong with the memory's care must not cost the utterance."""
        try:
            yield
        except Exception as error:
            self._metrics.count("memory.failed")
            self._gap = self._left = self.config.most
            said = f"{what}: {type(error).__name__}: {error}"
            if self._metrics.fault(said):
                logger.warning(said, exc_info=True)

    def _look(self, ahead: bool = False) -> None:
        """Read, judge, perhaps clear, and say when the next look is due."""
        with self._lock, self._trying():
            source, config = self.source, self.config
            elapsed = self._gap - self._left
            self._quiet_frames += elapsed
            self._since_clear += elapsed
            if source is None or not (config.enabled or self._asked):
                self._gap = self._left = config.most
                return
            with contextlib.nullcontext(False) if self._frames else source.quiet(0.0) as quiet:
                if not quiet:
                    self._gap = self._left = 1
                    return
                reading = source.probe()
                self.looks += 1
                self._seen(reading)
                if reading is None:
                    self._gap = self._left = config.most
                    return
                if self._asked:
                    self._cleared(source, reading)
                elif self._due(reading, ahead):
                    self._judge(self._cleared(source, reading), reading)
            self._gap = self._left = self._next_interval()

    def _due(self, reading: MemoryReading, ahead: bool) -> bool:
        """Whether to clear, with hysteresis, and not for what the last clear could not free."""
        config, worth = self.config, self.config.worth * reading.total
        self._stuck = min(self._stuck, reading.reclaimable)
        fresh = reading.reclaimable - self._stuck
        pressure = reading.pressure + (_AHEAD * fresh / max(1, reading.total) if ahead else 0.0)
        if pressure >= config.high:
            if not self.clearing:
                self.clearing, self._idle = True, 0
        elif pressure < config.low:
            self.clearing = False
        late = reading.reclaimable >= worth and self._since_clear >= self._patience
        return self.clearing and (fresh >= worth or late)

    def _judge(self, freed: int, before: MemoryReading) -> None:
        """Back off from clears that free almost nothing."""
        config = self.config
        if freed >= config.worth * before.total / 2:
            self._patience, self._idle, self._quiet_frames = config.start, 0, 0
        else:
            self._patience = min(config.most, 2 * self._patience)

    def _next_interval(self) -> int:
        """By the last reading's pressure; no more than twice the last one, and that only after as many frames."""
        config, reading = self.config, self._last
        assert reading is not None
        ripe = self._quiet_frames >= self.interval
        if ripe:
            self._quiet_frames = 0
            self._idle = min(self._idle + 1, 16)
        limit = config.interval(reading.pressure) << (self._idle if self.clearing else 0)
        self.interval = max(config.least, min(config.most, self.interval * (2 if ripe else 1), limit))
        return self.interval

    def _cleared(self, source: MemorySource, before: MemoryReading | None) -> int:
        """Clear and count; bytes that went back."""
        self._asked = False
        start = time.perf_counter()
        source.clear()
        self._metrics.observe("memory.clear", time.perf_counter() - start)
        after = source.probe()
        freed = 0 if before is None or after is None else max(0, before.reserved - after.reserved)
        self._seen(after)
        self._stuck = 0 if after is None else after.reclaimable
        self._since_clear = 0
        self.clears += 1
        self.freed_bytes += freed
        self._metrics.count("memory.clears")
        self._metrics.count("memory.freed_bytes", freed)
        return freed

    def _seen(self, reading: MemoryReading | None) -> None:
        if reading is not None:
            self._last = reading
            self._peak_reserved = max(self._peak_reserved, reading.reserved)
