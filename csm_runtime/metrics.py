"""Counters, latencies and use of the machine by one accelerated model: dict, JSON, Prometheus. Imports nothing of ours."""

from __future__ import annotations

import errno
import http.server
import inspect
import itertools
import json
import logging
import math
import os
import re
import socket
import socketserver
import sys
import threading
import time
import weakref
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("csm_runtime")

# Five bounds a decade, ratio 1.6; in this series the frame period, 0.08, is one of them.
BOUNDS = (
    *(0.0005, 0.0008, 0.00125, 0.002, 0.00315, 0.005, 0.008, 0.0125, 0.02, 0.0315, 0.05, 0.08, 0.125, 0.2),
    *(0.315, 0.5, 0.8, 1.25, 2.0, 3.15, 5.0, 8.0, 12.5, 20.0, 31.5, 50.0, 80.0, 120.0),
)
"""Upper bounds of the latency buckets in seconds, inclusive; what took longer is in ``+Inf``."""

WINDOW_SECONDS = 60.0
"""What the latest real-time factor looks back on."""

OTHER = "other"
"""Where names, reasons and labels are counted that came after their table was full."""

_KEPT_SAMPLES = 4096
_KEPT_CALLS = 4096
_QUANTILES = {"p50_seconds": 0.5, "p90_seconds": 0.9, "p99_seconds": 0.99}
_MOST_REASONS, _LONGEST_REASON = 256, 1000
_MOST_SERIES, _MOST_NAMES = 64, 256  # 64 series of 4096 samples hold 8 MB
_MOST_LABELS, _LONGEST_LABEL = 32, 120
_SHORTEST_USAGE = 0.1  # seconds; Linux counts processor time in steps of 0.01


class _Series:
    """Durations of one name: the latest for quantiles, and all of them in buckets."""

    __slots__ = ("count", "counts", "max", "samples", "sum")

    def __init__(self) -> None:
        self.samples: deque[float] = deque(maxlen=_KEPT_SAMPLES)
        self.counts = [0] * (len(BOUNDS) + 1)
        self.count, self.sum, self.max = 0, 0.0, 0.0


class Metrics:
    """Counts calls by path and reason, keeps latencies, and says what the process and its machine are using.

    Every method may be called from any thread. Times are in seconds, sizes in bytes. psutil, nvidia-ml-py and
    prometheus-client (the extra ``monitor``) are used where they are installed; what they would tell is None otherwise.
    """

    def __init__(self) -> None:
        # Reentrant: the collector may run in here, and a finalizer of somebody else's may count something.
        self._lock = threading.RLock()
        self.counters: Counter[str] = Counter()
        self.stock_reasons: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.setup_seconds: dict[str, float] = {}
        self._series: dict[str, _Series] = {}
        self._gauges: dict[str, float | None] = {}
        self._sources: dict[str, Callable[[], Any]] = {}
        self._audio_seconds, self._spent_seconds = 0.0, 0.0
        self._calls: deque[tuple[float, float, float]] = deque(maxlen=_KEPT_CALLS)
        self._start = time.monotonic()
        self._machine = _Machine()

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter. There are at most 256 of them; later names are counted as "other"."""
        with self._lock:
            self._add(name, amount)

    def stock_path(self, reason: str) -> bool:
        """Count a call that went to the stock path; True the first time this reason is seen.

        The first 256 reasons are told apart, later ones are all "other"; of a long one, 1000 characters are kept.
        """
        with self._lock:
            self._add("generate.stock", 1)
            return _tally(self.stock_reasons, reason)

    def fault(self, what: str) -> bool:
        """Count a fault of the fast path; True the first time this one is seen. Bounded as :meth:`stock_path` is."""
        with self._lock:
            self._add("faults", 1)
            return _tally(self.faults, what)

    def observe(self, name: str, seconds: float) -> None:
        """Add a duration to the histogram of its name, and keep the latest 4096 for quantiles.

        One that is negative or not finite is left out and counted as ``observe.refused``. There are at most 64 names; the
        durations of later ones are those of "other".
        """
        seconds = float(seconds)  # numpy's fp32 would not go into JSON
        with self._lock:
            if not 0.0 <= seconds < math.inf:
                self._add("observe.refused", 1)
                return
            series = self._series.get(name)
            if series is None:
                series = self._series.setdefault(name if len(self._series) < _MOST_SERIES else OTHER, _Series())
            series.samples.append(seconds)
            series.counts[bisect_left(BOUNDS, seconds)] += 1
            series.count += 1
            series.sum += seconds
            series.max = max(series.max, seconds)

    def audio(self, seconds: float, spent_seconds: float) -> None:
        """So much audio was made by one call, in so much time.

        Calls that run at the same time count each for itself: the real-time factor is that of a call. Values that are
        negative or not finite are left out and counted as ``audio.refused``.
        """
        seconds, spent_seconds = float(seconds), float(spent_seconds)
        with self._lock:
            if not (0.0 <= seconds < math.inf and 0.0 <= spent_seconds < math.inf):
                self._add("audio.refused", 1)
                return
            self._audio_seconds += seconds
            self._spent_seconds += spent_seconds
            self._calls.append((time.monotonic(), seconds, spent_seconds))

    def gauge(self, name: str, value: float) -> None:
        """Set a value that goes up and down; NaN and infinities become None. At most 256 names, later ones are left out.

        Raises:
            ValueError: not a number.
        """
        number = _number(name, value)
        with self._lock:
            if name in self._gauges or len(self._gauges) < _MOST_NAMES:
                self._gauges[name] = number
            else:
                self._add("gauges.refused", 1)

    def watch(self, name: str, source: Callable[[], Mapping[str, Any]]) -> None:
        """Ask a source at every snapshot; it replaces an earlier one of the same name.

        A bound method is held weakly: its object may go, and the source goes with it. Anything else is held.

        Args:
            name: what its values are listed under.
            source: returns a flat dict of numbers, None and short texts; 64 of its keys are looked at. One that raises is
                left out of the snapshot and counted as a fault. It is called without a lock, by any thread.

        Raises:
            ValueError: the 65th name.
        """
        with self._lock:
            if name not in self._sources and len(self._sources) >= _MOST_SERIES:
                raise ValueError(f"watch({name!r}) would be source {_MOST_SERIES + 1}; wanted at most {_MOST_SERIES}")
            self._sources[name] = weakref.WeakMethod(source) if inspect.ismethod(source) else lambda: source

    def times(self, name: str) -> list[float]:
        """The kept durations of one name, oldest first."""
        with self._lock:
            series = self._series.get(name)
            return list(series.samples) if series is not None else []

    def reset_times(self) -> None:
        """Forget the kept durations, which quantiles come from; counters and histograms stay."""
        with self._lock:
            for series in self._series.values():
                series.samples.clear()

    def snapshot(self) -> dict[str, Any]:
        """Everything as plain data without NaN, for JSON; docs/metrics.md lists the keys and their units.

        Processor shares are since the snapshot before, or since up to 0.1 s before that one.
        """
        watched = self._ask()
        with self._lock:
            found: dict[str, Any] = {
                "counters": dict(self.counters),
                "stock_reasons": dict(self.stock_reasons),
                "faults": dict(self.faults),
                "setup_seconds": dict(self.setup_seconds),
                "uptime_seconds": time.monotonic() - self._start,
                "gauges": dict(self._gauges),
            }
            audio, spent, calls = self._audio_seconds, self._spent_seconds, list(self._calls)
            series = {
                name: (kept.count, kept.sum, kept.max, list(kept.counts), list(kept.samples))
                for name, kept in list(self._series.items())
            }
        latencies = {name: _latency(*kept) for name, kept in series.items()}
        medians = {name: row["p50_seconds"] for name, row in latencies.items() if row["p50_seconds"] is not None}
        return found | {
            "audio": _spoken(audio, spent, calls),
            "median_seconds": medians,
            "latencies": latencies,
            "watched": watched,
            "process": self._machine.process(),
            "system": self._machine.system(),
            "cuda": _cuda(),
            "gpus": self._machine.gpus(),
        }

    def to_json(self, indent: int | None = None) -> str:
        """The snapshot as JSON."""
        return json.dumps(self.snapshot(), indent=indent, allow_nan=False)

    def to_prometheus(self) -> str:
        """The snapshot in Prometheus' text format, version 0.0.4.

        Each label of a family is at most 120 characters long, numbers in it are written "N", and after the first 31 they
        are counted as "other".

        Raises:
            ImportError: prometheus-client is not installed; says which extra brings it.
        """
        try:
            from prometheus_client import CollectorRegistry, generate_latest
        except ImportError as error:
            raise ImportError(
                f'prometheus_client cannot be imported ({error}); pip install "csm-kernels[monitor]"'
            ) from error
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(self.snapshot()))
        return generate_latest(registry).decode()

    def serve(self, port: int = 9464, host: str = "127.0.0.1") -> Server:
        """Answer HTTP in a daemon thread: ``/metrics`` for Prometheus, ``/metrics.json`` for ``csm-accelerate monitor``.

        There is no authentication: another host than the default shows reasons and faults to whoever can reach it.

        Args:
            port: 0 takes a free one.
            host: the address to listen on.

        Returns:
            The server; ``url`` says where, ``close()`` or leaving its ``with`` block ends it.

        Raises:
            ValueError: no such port.
            OSError: the address cannot be listened on, for example because the port is in use.
        """
        return Server(self, port, host)

    def _add(self, name: str, amount: int) -> None:
        full = name not in self.counters and len(self.counters) >= _MOST_NAMES
        self.counters[OTHER if full else name] += amount

    def _ask(self) -> dict[str, dict[str, Any]]:
        with self._lock:
            sources = dict(self._sources)
        answers = {}
        for name, held in sources.items():
            source = held()
            if source is None:
                with self._lock:
                    if self._sources.get(name) is held:  # and not one that has taken its place since
                        del self._sources[name]
                continue
            try:
                items = itertools.islice(source().items(), _MOST_SERIES)
                answers[name] = {str(key): _plain(str(key), value) for key, value in items}
            except Exception as error:  # whoever looks at the metrics cannot mend the source
                what = f"the metrics source {name!r} failed: {type(error).__name__}: {str(error).strip()[:200]}"
                if self.fault(what):
                    logger.warning(what, exc_info=True)
        return answers


def _tally(table: Counter[str], reason: str) -> bool:
    reason = reason[:_LONGEST_REASON]
    if reason not in table and len(table) >= _MOST_REASONS:
        reason = OTHER
    table[reason] += 1
    return table[reason] == 1


def _spoken(audio: float, spent: float, calls: list[tuple[float, float, float]]) -> dict[str, Any]:
    """Audio made over the whole life and lately; a real-time factor below 1 is faster than real time."""
    now = time.monotonic()
    latest = [call for call in calls if call[0] >= now - WINDOW_SECONDS]
    lately, spent_lately = sum(call[1] for call in latest), sum(call[2] for call in latest)
    return {
        "seconds": audio,
        "spent_seconds": spent,
        "real_time_factor": _ratio(spent, audio),
        "window": {
            "span_seconds": WINDOW_SECONDS,
            "calls": len(latest),
            "seconds": lately,
            "spent_seconds": spent_lately,
            "real_time_factor": _ratio(spent_lately, lately),
        },
    }


def _latency(count: int, total: float, most: float, counts: list[int], samples: list[float]) -> dict[str, Any]:
    samples.sort()
    row: dict[str, Any] = {"count": count, "sum_seconds": total, "max_seconds": most, "kept": len(samples)}
    row |= {name: _quantile(samples, share) for name, share in _QUANTILES.items()}
    return row | {"buckets": {_le(i): n for i, n in enumerate(counts) if n}}


def _quantile(ordered: list[float], share: float) -> float | None:
    """Linear between the two nearest samples, as numpy's default; None of none."""
    if not ordered:
        return None
    low = int(share * (len(ordered) - 1))
    part = share * (len(ordered) - 1) - low
    return (1 - part) * ordered[low] + part * ordered[min(low + 1, len(ordered) - 1)]


def _le(index: int) -> str:
    return str(BOUNDS[index]) if index < len(BOUNDS) else "+Inf"


def _ratio(value: float, whole: float) -> float | None:
    return value / whole if whole > 0 else None


def _number(name: str, value: Any) -> float | None:
    """A plain int or float, None where it is not finite."""
    try:
        if isinstance(value, str | bytes):  # float() would read them
            raise TypeError("text")
        number = int(value) if isinstance(value, int) else float(value)
        return number if math.isfinite(number) else None
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a number that a float can hold, got {type(value).__name__}") from error


def _plain(name: str, value: Any) -> float | str | None:
    if value is None or isinstance(value, str):
        return value if value is None else value[:_LONGEST_LABEL]
    return _number(name, value)


# ------------------------------------------------------------------------------------------------ the machine


class _Share:
    """Busy time over elapsed time since the reading before, in percent."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None
        self._percent: float | None = None

    def percent(self, busy: float, elapsed: float) -> float | None:
        """Take a reading of both totals; None as long as no two are 0.1 s apart."""
        if self._last is None:
            self._last = busy, elapsed
        elif elapsed - self._last[1] >= _SHORTEST_USAGE:
            self._percent = max(0.0, 100.0 * (busy - self._last[0]) / (elapsed - self._last[1]))
            self._last = busy, elapsed
        return self._percent


class _Machine:
    """What the process, the machine and its GPUs are using; what cannot be known is None.

    psutil's own ``cpu_percent`` remembers the reading before by thread: asked by a new one each time, as by the server,
    it would say 0 for ever. Hence the totals are read and the shares computed here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process, self._system = _Share(), _Share()
        self._process.percent(time.process_time(), time.monotonic())
        self._nvml: Any = None
        self._nvml_tried = False

    def process(self) -> dict[str, Any]:
        """Of this process; 100 % is one processor core."""
        with self._lock:
            busy = time.process_time()
            percent = self._process.percent(busy, time.monotonic())
        try:
            import psutil

            memory = psutil.Process().memory_info()
        except Exception:  # not installed, or a system that does not tell
            memory = None
        return {
            "rss_bytes": None if memory is None else int(memory.rss),
            "peak_rss_bytes": _peak_rss(memory),
            "cpu_percent": percent,
            "cpu_seconds": busy,
        }

    def system(self) -> dict[str, Any] | None:
        """Of the whole machine, whatever a container allows; 100 % is all its cores."""
        try:
            import psutil

            memory, times, cpus = psutil.virtual_memory(), psutil.cpu_times()._asdict(), psutil.cpu_count() or 1
        except Exception:  # not installed, or a system that does not tell
            return None
        # Linux counts the time of guests in user and nice as well.
        total = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
        idle = times["idle"] + times.get("iowait", 0.0)
        with self._lock:
            percent = self._system.percent((total - idle) / cpus, total / cpus)
        return {
            "memory_total_bytes": int(memory.total),
            "memory_available_bytes": int(memory.available),
            "cpu_percent": percent,
            "cpus": cpus,
        }

    def gpus(self) -> list[dict[str, Any]] | None:
        """Every GPU that NVML shows, whoever uses it: ``CUDA_VISIBLE_DEVICES`` does not matter to NVML."""
        with self._lock:
            if not self._nvml_tried:
                self._nvml_tried, self._nvml = True, _nvml()
            if self._nvml is None:
                return None
        try:
            return [_gpu(self._nvml, index) for index in range(self._nvml.nvmlDeviceGetCount())]
        except Exception as error:
            logger.debug("NVML no longer answers: %s", error)
            return None


def _peak_rss(memory: Any) -> int | None:
    try:
        # getrusage's figure comes with a fork and stays over an exec: a small child of a large parent would have its peak.
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    except OSError:
        pass
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cuda() -> list[dict[str, Any]] | None:
    """What torch's allocator holds on each device it has used; starts no CUDA context."""
    try:
        cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
        if cuda is None or not cuda.is_initialized():
            return None
        devices = []
        for index in range(cuda.device_count()):
            reserved, allocated = int(cuda.memory_reserved(index)), int(cuda.memory_allocated(index))
            peak = int(cuda.max_memory_allocated(index))
            if reserved or peak:
                devices.append(
                    {
                        "index": index,
                        "allocated_bytes": allocated,
                        "reserved_bytes": reserved,
                        "peak_allocated_bytes": peak,
                        "fragmentation": _ratio(reserved - allocated, reserved),
                    }
                )
        return devices
    except Exception as error:  # after an illegal access every call raises
        logger.debug("torch does not tell its CUDA memory: %s", error)
        return None


def _nvml() -> Any:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # not installed, or no driver
        logger.debug("no figures from NVML: %s", error)
        return None
    return pynvml


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    def tell(ask: Callable[[Any], Any]) -> Any:
        try:
            return ask(handle)
        except Exception:  # a partitioned GPU has no utilisation, and drivers differ in what they tell
            return None

    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name, memory = tell(nvml.nvmlDeviceGetName), tell(nvml.nvmlDeviceGetMemoryInfo)
    used = tell(nvml.nvmlDeviceGetUtilizationRates)
    return {
        "index": index,
        "name": name.decode(errors="replace") if isinstance(name, bytes) else name,
        "memory_used_bytes": None if memory is None else int(memory.used),
        "memory_total_bytes": None if memory is None else int(memory.total),
        "utilization_percent": None if used is None else int(used.gpu),
        "memory_utilization_percent": None if used is None else int(used.memory),
    }


# ------------------------------------------------------------------------------------------------ Prometheus


class _Collector:
    """A snapshot as metric families of prometheus-client."""

    def __init__(self, snapshot: dict[str, Any]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Any]:
        """The families; of two with one name, the first."""
        taken: set[str] = set()
        for family in itertools.chain(
            _call_families(self._snapshot), _latency_families(self._snapshot), _use_families(self._snapshot)
        ):
            if family.name in taken:
                logger.debug("a second metric would be called %s; it is left out", family.name)
                continue
            taken.add(family.name)
            yield family


def _call_families(snapshot: dict[str, Any]) -> Iterator[Any]:
    counters, audio = dict(snapshot["counters"]), snapshot["audio"]
    paths = {path: counters.pop(f"generate.{path}", 0) for path in ("fast", "rung", "stock")}
    yield _counter("calls", "calls of generate() by the path they took", paths, "path")
    yield _counter("stock_calls", "calls on the stock path by reason", snapshot["stock_reasons"], "reason")
    yield _counter("faults", "faults of the fast path by reason", snapshot["faults"], "reason")
    counters.pop("faults", None)
    groups: dict[str, dict[str, float]] = {}
    for name, count in counters.items():
        head, _, event = name.partition(".")
        groups.setdefault(head, {})[event] = count
    for head, events in groups.items():
        if events.keys() == {""}:
            yield _counter(head, f"the counter {head}", events[""])
        else:
            yield _counter(head, f"the counters {head}.*", events, "event")
    yield _counter("audio_seconds", "seconds of audio made", audio["seconds"])
    yield _counter("audio_spent_seconds", "seconds that making it took", audio["spent_seconds"])
    factors = {"life": audio["real_time_factor"], "window": audio["window"]["real_time_factor"]}
    yield _gauge(
        "real_time_factor", "seconds spent on a second of audio, over all and the last 60 seconds", factors, "over"
    )


def _latency_families(snapshot: dict[str, Any]) -> Iterator[Any]:
    from prometheus_client.core import HistogramMetricFamily

    for name, row in snapshot["latencies"].items():
        counts = [row["buckets"].get(_le(index), 0) for index in range(len(BOUNDS) + 1)]
        below = [[_le(index), count] for index, count in enumerate(itertools.accumulate(counts))]
        yield HistogramMetricFamily(_name(name, "seconds"), f"durations of {name}", below, row["sum_seconds"])
    yield _gauge("setup_seconds", "seconds that setting up took, by part", snapshot["setup_seconds"], "part")


def _use_families(snapshot: dict[str, Any]) -> Iterator[Any]:
    yield _gauge("uptime_seconds", "seconds since acceleration", snapshot["uptime_seconds"])
    process, system = snapshot["process"], snapshot["system"] or {}
    yield _gauge("process_resident_memory_bytes", "memory of the process", process["rss_bytes"])
    yield _gauge("process_peak_resident_memory_bytes", "the most it ever was", process["peak_rss_bytes"])
    yield _counter("process_cpu_seconds", "processor time of the process", process["cpu_seconds"])
    yield _gauge("system_memory_available_bytes", "memory of the machine", system.get("memory_available_bytes"))
    yield _gauge("system_memory_total_bytes", "memory of the machine", system.get("memory_total_bytes"))
    yield _gauge("system_cpu_ratio", "share of all processors in use", _hundredth(system.get("cpu_percent")))
    devices = {str(device["index"]): device for device in snapshot["cuda"] or ()}
    for key in ("allocated_bytes", "reserved_bytes", "peak_allocated_bytes"):
        values = {index: device[key] for index, device in devices.items()}
        yield _gauge(f"cuda_{key}", "memory of torch's CUDA allocator", values, "device")
    values = {index: device["fragmentation"] for index, device in devices.items()}
    yield _gauge("cuda_fragmentation_ratio", "share of the reserved memory not allocated", values, "device")
    gpus = {str(gpu["index"]): gpu for gpu in snapshot["gpus"] or ()}
    for key in ("memory_used_bytes", "memory_total_bytes"):
        yield _gauge(f"gpu_{key}", "memory of the GPU", {index: gpu[key] for index, gpu in gpus.items()}, "gpu")
    for key in ("utilization", "memory_utilization"):
        values = {index: _hundredth(gpu[f"{key}_percent"]) for index, gpu in gpus.items()}
        yield _gauge(f"gpu_{key}_ratio", "share of the time in which it was busy", values, "gpu")
    for name, value in snapshot["gauges"].items():
        yield _gauge(name, f"the gauge {name}", value)
    for source, values in snapshot["watched"].items():
        for key, value in values.items():
            if isinstance(value, str):
                yield _gauge(f"{source}_{key}_info", f"{key} of {source}", {value: 1}, "value")
            else:
                yield _gauge(f"{source}_{key}", f"{key} of {source}", value)


def _counter(name: str, text: str, values: Any, label: str | None = None) -> Any:
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(_name(name), text, labels=None if label is None else [label]), values)


def _gauge(name: str, text: str, values: Any, label: str | None = None) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(_name(name), text, labels=None if label is None else [label]), values)


def _filled(family: Any, values: Any) -> Any:
    """A family with one value, or with one for each label; those that are None are left out."""
    for label, value in _bounded(values).items() if isinstance(values, dict) else [(None, values)]:
        if value is not None:
            family.add_metric([] if label is None else [label], value)
    return family


def _bounded(values: dict[str, Any]) -> dict[str, Any]:
    """Values by label, those of equal labels added; by first appearance, so that a label that was there once stays."""
    merged: dict[str, Any] = {}
    for text, value in values.items():
        label = _label(text)
        if label not in merged and len(merged) >= _MOST_LABELS - 1:
            label = OTHER
        merged[label] = value if merged.get(label) is None else merged[label] + (value or 0)
    return merged


_NUMBER = re.compile(r"0x[0-9a-fA-F]+|(?<!\w)\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
"""Not those within a word: int8 and sm_90 are names."""


def _label(text: str) -> str:
    # A label that is a number alone, such as a device's index, means that number.
    text = text if text.isdecimal() else _NUMBER.sub("N", text)
    return text[:_LONGEST_LABEL].encode(errors="replace").decode()


def _name(*parts: str) -> str:
    return "_".join(["csm", *(re.sub(r"[^a-zA-Z0-9_]", "_", part) for part in parts)])


def _hundredth(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


# ------------------------------------------------------------------------------------------------ HTTP


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Answers ``/metrics`` and ``/metrics.json`` in a daemon thread until ``close()``; a context manager.

    Attributes:
        url: where it listens, ``http://127.0.0.1:9464``.
    """

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # where it would let two servers have one port

    def __init__(self, metrics: Metrics, port: int, host: str) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, got {port}")
        self.metrics = metrics
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            advice = "; port=0 takes a free one" if error.errno == errno.EADDRINUSE else ""
            why = f"metrics cannot be served on {host}, port {port}: {error.strerror or error}{advice}"
            raise OSError(error.errno, why) from error
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
        self.url = f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{self.server_port}"
        metrics._machine.system()  # the first snapshot's processor share is since now
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="csm-metrics", daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        """Bind without HTTPServer's search for the host's name, which can wait for a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nobody's error."""
        logger.debug("a metrics request failed", exc_info=True)

    def close(self) -> None:
        """Stop listening and end the thread; a second time, nothing."""
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
        self.server_close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = 10  # seconds for a client that says nothing
    server: Server

    def do_GET(self) -> None:
        """Answer one request."""
        status, kind = 200, "text/plain; version=0.0.4; charset=utf-8"
        path = self.path.partition("?")[0]
        try:
            if path == "/metrics":
                text = self.server.metrics.to_prometheus()
            elif path == "/metrics.json":
                text, kind = self.server.metrics.to_json(), "application/json"
            else:
                status, text = 404, "there are /metrics and /metrics.json\n"
        except ImportError as error:
            status, text = 501, f"{error}\n"
        except Exception as error:
            logger.debug("no snapshot", exc_info=True)
            status, text = 500, f"{type(error).__name__}: {error}\n"
        body = text.encode(errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", kind if status == 200 else "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""
