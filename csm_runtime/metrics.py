"""Counters and timings of one accelerated model. Imports nothing of ours."""

from __future__ import annotations

import statistics
import threading
from collections import Counter, deque
from typing import Any

_KEPT_SAMPLES = 4096


class Metrics:
    """Counts calls by path and reason, and keeps the latest frame, prefill and setup times.

    Every method may be called from any thread. Times are in seconds.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counters: Counter[str] = Counter()
        self.stock_reasons: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.setup_seconds: dict[str, float] = {}
        self._times: dict[str, deque[float]] = {}

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self.counters[name] += amount

    def stock_path(self, reason: str) -> bool:
        """Count a call that went to the stock path; True the first time this reason is seen."""
        with self._lock:
            self.counters["generate.stock"] += 1
            self.stock_reasons[reason] += 1
            return self.stock_reasons[reason] == 1

    def fault(self, what: str) -> bool:
        """Count a fault of the fast path; True the first time this one is seen."""
        with self._lock:
            self.counters["faults"] += 1
            self.faults[what] += 1
            return self.faults[what] == 1

    def observe(self, name: str, seconds: float) -> None:
        """Keep one duration; the latest 4096 of each name are kept."""
        with self._lock:
            self._times.setdefault(name, deque(maxlen=_KEPT_SAMPLES)).append(seconds)

    def times(self, name: str) -> list[float]:
        """The kept durations of one name, oldest first."""
        with self._lock:
            return list(self._times.get(name, ()))

    def reset_times(self) -> None:
        """Forget the kept durations, keep the counters."""
        with self._lock:
            self._times.clear()

    def snapshot(self) -> dict[str, Any]:
        """Everything as a plain dict, medians instead of samples."""
        with self._lock:
            medians = {name: statistics.median(values) for name, values in self._times.items() if values}
            return {
                "counters": dict(self.counters),
                "stock_reasons": dict(self.stock_reasons),
                "faults": dict(self.faults),
                "setup_seconds": dict(self.setup_seconds),
                "median_seconds": medians,
            }
