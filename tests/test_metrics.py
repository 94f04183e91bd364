"""Metrics: what is counted is what was done, whatever is installed and whoever asks, and it does not grow without end."""

from __future__ import annotations

import copy
import errno
import functools
import gc
import io
import json
import math
import socket
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from csm_runtime import cli
from csm_runtime import monitor as view_of
from csm_runtime.metrics import BOUNDS, OTHER, Metrics, Server


def read(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    """The Prometheus text parsed back: values by sample name and label values."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(metrics.to_prometheus()):
        for sample in family.samples:
            values = found.setdefault(sample.name, {})
            key = tuple(sample.labels.values())
            assert key not in values, f"{sample.name}{sample.labels} comes twice"
            values[key] = sample.value
    return found


# ------------------------------------------------------------------------------------------------ latencies


def test_bounds_are_spaced_evenly_and_hold_the_frame_period() -> None:
    assert BOUNDS[0] == 0.0005 and BOUNDS[-1] == 120.0 and 0.08 in BOUNDS
    ratios = np.array(BOUNDS[1:]) / np.array(BOUNDS[:-1])
    assert ratios.min() > 1.49 and ratios.max() < 1.61


def test_histogram_counts_as_numpy_does() -> None:
    metrics, rng = Metrics(), np.random.default_rng(0)
    values = np.concatenate([rng.lognormal(-4, 3, 6000), BOUNDS, [0.0, 500.0]])
    rng.shuffle(values)
    for value in values.tolist():
        metrics.observe("frame", value)
    row = metrics.snapshot()["latencies"]["frame"]
    # numpy's bins are closed below, Prometheus' above: mirrored, they are the same.
    edges = -np.array([math.inf, *reversed(BOUNDS), -1e-9])
    wanted = np.histogram(-values, np.sort(edges))[0][::-1]
    names = [*map(str, BOUNDS), "+Inf"]
    assert row["buckets"] == {name: int(n) for name, n in zip(names, wanted, strict=True) if n}
    assert row["count"] == len(values) and row["max_seconds"] == 500.0
    assert row["sum_seconds"] == pytest.approx(values.sum(), rel=1e-12)
    cumulative = read(metrics)["csm_frame_seconds_bucket"]
    assert [cumulative[(name,)] for name in names] == np.cumsum(wanted).tolist()


def test_a_frame_in_time_is_in_the_bucket_of_the_frame_period() -> None:
    metrics = Metrics()
    metrics.observe("frame", 0.08)
    metrics.observe("frame", math.nextafter(0.08, 1))
    assert metrics.snapshot()["latencies"]["frame"]["buckets"] == {"0.08": 1, "0.125": 1}


@pytest.mark.parametrize("count", [1, 2, 3, 100, 5000])
def test_quantiles_are_those_of_the_kept_samples(count: int) -> None:
    metrics, values = Metrics(), np.random.default_rng(count).exponential(size=count)
    for value in values.tolist():
        metrics.observe("frame", value)
    row, kept = metrics.snapshot()["latencies"]["frame"], values[-4096:]
    assert row["kept"] == len(kept) and row["count"] == count
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert row[f"{name}_seconds"] == pytest.approx(np.quantile(kept, share), rel=1e-12)


def test_durations_of_other_kinds_of_float_are_floats() -> None:
    metrics = Metrics()
    metrics.observe("frame", np.float32(0.25))  # type: ignore[arg-type]
    metrics.audio(np.float32(2.0), np.float32(1.0))  # type: ignore[arg-type]
    found = json.loads(metrics.to_json())
    assert found["latencies"]["frame"]["sum_seconds"] == 0.25 and found["audio"]["real_time_factor"] == 0.5


def test_forgetting_samples_keeps_the_histogram() -> None:
    metrics = Metrics()
    metrics.observe("frame", 0.01)
    metrics.reset_times()
    snapshot = metrics.snapshot()
    assert snapshot["median_seconds"] == {} and metrics.times("frame") == []
    row = snapshot["latencies"]["frame"]
    assert (row["count"], row["kept"], row["p50_seconds"]) == (1, 0, None)
    assert row["buckets"] == {"0.0125": 1}


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, -math.inf])
def test_what_is_no_duration_is_refused_and_counted(bad: float) -> None:
    metrics = Metrics()
    metrics.observe("frame", bad)
    metrics.audio(bad, 1.0)
    metrics.audio(1.0, bad)
    snapshot = metrics.snapshot()
    assert snapshot["counters"] == {"observe.refused": 1, "audio.refused": 2}
    assert snapshot["latencies"] == {} and snapshot["audio"]["seconds"] == 0.0


def test_observing_is_cheap() -> None:
    """0.44 us where it was written; the limit is wide, for a busy machine, but not for a search through the samples."""
    metrics, best = Metrics(), math.inf
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(2000):
            metrics.observe("frame", 0.004)
        best = min(best, (time.perf_counter() - start) / 2000)
    assert best < 3e-6


# ------------------------------------------------------------------------------------------------ what is bounded


@pytest.mark.parametrize("kind", ["fault", "stock_path"])
def test_ten_thousand_reasons_are_bounded_and_none_is_lost(kind: str) -> None:
    metrics = Metrics()
    note: Callable[[str], bool] = getattr(metrics, kind)
    table, total = (metrics.faults, "faults") if kind == "fault" else (metrics.stock_reasons, "generate.stock")
    reasons = [
        f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)} broke{'x' * 300}" for i in range(10_000)
    ]
    assert len(set(reasons)) == 10_000
    new = sum(note(reason) for reason in reasons for _ in range(2))
    assert new == 257, "256 reasons and the first that was one too many, each said once"
    assert len(table) == 257 and table[OTHER] == 2 * (10_000 - 256)
    assert sum(table.values()) == metrics.counters[total] == 20_000
    family = "csm_faults_total" if kind == "fault" else "csm_stock_calls_total"
    labels = read(metrics)[family]
    assert len(labels) == 32 and max(len(label) for (label,) in labels) <= 120
    assert sum(labels.values()) == 20_000 and labels[(reasons[0][:120],)] == 2


def test_a_long_reason_is_cut() -> None:
    metrics = Metrics()
    metrics.fault("x" * 5000)
    assert metrics.fault("x" * 6000) is False
    assert list(metrics.faults) == ["x" * 1000]


def test_a_label_that_was_there_stays_and_never_falls() -> None:
    """Prometheus takes a counter that falls for a restart."""
    metrics, before = Metrics(), {}
    for i in range(400):
        metrics.fault(f"{chr(200 + i)} failed")
        after = read(metrics)["csm_faults_total"] if i % 20 == 19 else before
        assert all(after[label] >= count for label, count in before.items())
        before = after
    assert len(before) == 32


def test_numbers_in_reasons_are_one_label_but_two_entries() -> None:
    metrics = Metrics()
    for what in ("frame 17: 1.5e-02 at 0x7f3a", "frame 18: 2.25 at 0x7f3b", "int8 on sm_90", "int4 on sm_90"):
        metrics.fault(what)
    assert len(metrics.faults) == 4
    assert read(metrics)["csm_faults_total"] == {("frame N: N at N",): 2, ("int8 on sm_90",): 1, ("int4 on sm_90",): 1}


def test_names_are_bounded() -> None:
    metrics = Metrics()
    for i in range(1000):
        metrics.count(f"n{i}", 2)
        metrics.observe(f"s{i}", 0.01)
        metrics.gauge(f"g{i}", i)
    snapshot = metrics.snapshot()
    assert len(snapshot["latencies"]) == 65 and snapshot["latencies"][OTHER]["count"] == 1000 - 64
    assert len(snapshot["gauges"]) == 256
    assert len(snapshot["counters"]) == 257
    assert sum(snapshot["counters"].values()) == 1000 * 2 + (1000 - 256), "and the gauges that were refused"
    read(metrics)


def test_any_text_can_be_a_reason() -> None:
    metrics = Metrics()
    ugly = ['a "quoted" \\ line\nand another', "\ud800 alone", "\x1b[redm", "", "{}", "größer"]
    for what in ugly:
        metrics.fault(what)
    assert read(metrics)["csm_faults_total"] == {(what.replace("\ud800", "?"),): 1 for what in ugly}
    assert json.loads(metrics.to_json())["faults"] == dict.fromkeys(ugly, 1)


# ------------------------------------------------------------------------------------------------ Prometheus


def test_prometheus_says_what_the_counters_say() -> None:
    metrics = Metrics()
    for name, amount in (("generate.fast", 5), ("generate.rung", 1), ("frames", 70), ("guard.verified", 4)):
        metrics.count(name, amount)
    metrics.count("guard.checked.copies", 2)
    metrics.count("packed_cache.loaded", 3)
    metrics.stock_path("output_scores")
    metrics.fault("a NaN")
    metrics.setup_seconds["pack"] = 1.5
    metrics.gauge("queue", 3)
    metrics.gauge("unknown", math.nan)
    metrics.watch("guard", lambda: {"rung": "fast", "events": 2, "healthy": True, "last": None})
    metrics.audio(4.0, 1.0)
    metrics.audio(2.0, 2.0)
    found = read(metrics)
    assert found["csm_calls_total"] == {("fast",): 5, ("rung",): 1, ("stock",): 1}
    assert found["csm_stock_calls_total"] == {("output_scores",): 1}
    assert found["csm_faults_total"] == {("a NaN",): 1}
    assert found["csm_frames_total"] == {(): 70}
    assert found["csm_guard_total"] == {("verified",): 4, ("checked.copies",): 2}
    assert found["csm_packed_cache_total"] == {("loaded",): 3}
    assert found["csm_setup_seconds"] == {("pack",): 1.5}
    assert found["csm_queue"] == {(): 3} and "csm_unknown" not in found
    assert found["csm_guard_events"] == {(): 2} and found["csm_guard_healthy"] == {(): 1}
    assert found["csm_guard_rung_info"] == {("fast",): 1} and "csm_guard_last" not in found
    assert found["csm_audio_seconds_total"] == {(): 6.0} and found["csm_audio_spent_seconds_total"] == {(): 3.0}
    assert found["csm_real_time_factor"] == {("life",): 0.5, ("window",): 0.5}
    assert found["csm_process_cpu_seconds_total"][()] > 0
    assert found["csm_process_resident_memory_bytes"][()] > 1e6


def test_a_name_that_is_taken_does_not_come_twice() -> None:
    metrics = Metrics()
    metrics.observe("frame", 0.01)
    metrics.gauge("frame_seconds", 7)
    metrics.gauge("a.b", 1)
    metrics.gauge("a_b", 2)
    found = read(metrics)
    assert found["csm_a_b"] == {(): 1} and "csm_frame_seconds" not in found


# ------------------------------------------------------------------------------------------------ audio


def test_real_time_factor_over_all_and_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, clock = Metrics(), [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert metrics.snapshot()["audio"]["real_time_factor"] is None
    metrics.audio(10.0, 20.0)
    clock[0] += 50
    metrics.audio(10.0, 5.0)
    assert metrics.snapshot()["audio"]["window"] == {
        "span_seconds": 60.0,
        "calls": 2,
        "seconds": 20.0,
        "spent_seconds": 25.0,
        "real_time_factor": 1.25,
    }
    clock[0] += 20
    audio = metrics.snapshot()["audio"]
    assert audio["real_time_factor"] == 1.25 and audio["window"]["real_time_factor"] == 0.5
    clock[0] += 60
    audio = metrics.snapshot()["audio"]
    assert audio["real_time_factor"] == 1.25 and audio["window"]["real_time_factor"] is None


def test_a_call_without_audio_costs_time_all_the_same() -> None:
    metrics = Metrics()
    metrics.audio(0.0, 1.0)
    assert metrics.snapshot()["audio"]["real_time_factor"] is None
    metrics.audio(2.0, 1.0)
    assert metrics.snapshot()["audio"]["real_time_factor"] == 1.0


# ------------------------------------------------------------------------------------------------ gauges and sources


def test_gauges_hold_numbers() -> None:
    metrics = Metrics()
    values = {"a": 1, "b": 2.5, "c": np.float32(0.5), "d": True, "e": math.inf, "f": math.nan}
    for name, value in values.items():
        metrics.gauge(name, value)
    got = metrics.snapshot()["gauges"]
    assert got == {"a": 1, "b": 2.5, "c": 0.5, "d": 1, "e": None, "f": None}
    assert {type(value) for value in got.values()} == {int, float, type(None)}
    for bad in ("1", None, [1], 10**400):
        with pytest.raises(ValueError, match="x must be a number that a float can hold, got"):
            metrics.gauge("x", bad)  # type: ignore[arg-type]


class Owner:
    """Something with a state, as a guard or a cache of voices."""

    def __init__(self, hits: int) -> None:
        self.hits = hits

    def status(self) -> dict[str, int]:
        return {"hits": self.hits}


def test_a_source_is_asked_anew_and_can_be_replaced() -> None:
    metrics, owner = Metrics(), Owner(1)
    metrics.watch("voices", owner.status)
    assert metrics.snapshot()["watched"] == {"voices": {"hits": 1}}
    owner.hits = 2
    assert metrics.snapshot()["watched"] == {"voices": {"hits": 2}}
    metrics.watch("voices", lambda: {"hits": 9})
    assert metrics.snapshot()["watched"] == {"voices": {"hits": 9}}


def test_a_source_does_not_keep_its_object() -> None:
    metrics, owner = Metrics(), Owner(1)
    metrics.watch("voices", owner.status)
    metrics.watch("other", functools.partial(dict, hits=3))  # held: nobody else does
    gone = threading.Event()
    owner.__dict__["at_end"] = type("AtEnd", (), {"__del__": lambda self: gone.set()})()
    del owner
    gc.collect()
    assert gone.is_set()
    assert metrics.snapshot()["watched"] == {"other": {"hits": 3}}
    assert list(metrics._sources) == ["other"]
    assert metrics.faults == {}


@pytest.mark.parametrize(
    "answer", [None, 3, {"a": [1]}, {"a": {"b": 1}}, {"a": 10**400}, ZeroDivisionError("by nothing")], ids=repr
)
def test_a_source_that_fails_is_a_fault_and_no_more(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    def source() -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    metrics = Metrics()
    metrics.watch("bad", source)
    metrics.watch("good", lambda: {"a": 1})
    for count in (1, 2):
        snapshot = metrics.snapshot()
        assert snapshot["watched"] == {"good": {"a": 1}}
        assert list(snapshot["faults"].values()) == [count] and "'bad' failed" in next(iter(snapshot["faults"]))
    assert len([record for record in caplog.records if "'bad' failed" in record.message]) == 1, "said once"


def test_a_source_may_use_the_metrics() -> None:
    metrics = Metrics()

    def source() -> dict[str, int]:
        metrics.count("asked")
        return {"asked": metrics.counters["asked"]}

    metrics.watch("itself", source)
    assert metrics.snapshot()["watched"] == {"itself": {"asked": 1}}


def test_what_a_source_says_is_bounded() -> None:
    metrics = Metrics()
    metrics.watch("wide", lambda: {f"k{i}": "x" * 1000 for i in range(1000)})
    said = metrics.snapshot()["watched"]["wide"]
    assert len(said) == 64 and {len(value) for value in said.values()} == {120}
    for i in range(63):
        metrics.watch(f"s{i}", dict)
    with pytest.raises(ValueError, match="wanted at most 64"):
        metrics.watch("one too many", dict)
    metrics.watch("wide", dict)


# ------------------------------------------------------------------------------------------------ the machine


def test_process_and_system_figures() -> None:
    metrics = Metrics()
    block = np.ones(16_000_000 // 8)
    first = metrics.snapshot()
    end = time.process_time() + 0.25
    while time.process_time() < end:
        block.sum()
    second = metrics.snapshot()
    process, system = second["process"], second["system"]
    assert process["peak_rss_bytes"] >= 0.9 * process["rss_bytes"] > 16e6
    assert 0 < process["cpu_percent"] < 110 * system["cpus"]
    assert process["cpu_seconds"] - first["process"]["cpu_seconds"] >= 0.25
    assert 0 < system["memory_available_bytes"] <= system["memory_total_bytes"]
    assert system["cpu_percent"] is None or 0 <= system["cpu_percent"] <= 101
    assert metrics.snapshot()["process"]["cpu_percent"] == process["cpu_percent"], "0 s are too short to tell"


def test_processor_shares_do_not_depend_on_the_thread_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil's own do: a server with a thread for each request would say 0 for ever."""
    import psutil

    busy, clock = [0.0], [0.0]
    times = type("Times", (), {"_asdict": lambda self: {"user": busy[0], "idle": 4 * clock[0] - busy[0], "guest": 0.0}})
    monkeypatch.setattr(psutil, "cpu_times", times)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    metrics, seen = Metrics(), []
    for _ in range(3):
        one = threading.Thread(target=lambda: seen.append(metrics.snapshot()["system"]["cpu_percent"]))
        one.start()
        one.join()
        busy[0], clock[0] = busy[0] + 3.0, clock[0] + 1.0
    assert seen == [None, 75.0, 75.0]


ABSENT = ("psutil", "pynvml", "prometheus_client", "rich")


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ABSENT:
        monkeypatch.setitem(sys.modules, name, None)


def test_without_the_extra_the_rest_works(absent: None, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics()
    metrics.observe("frame", 0.01)
    metrics.count("frames")
    metrics.audio(1.0, 0.5)
    metrics.watch("voices", lambda: {"hits": 1})
    for _ in range(2):
        snapshot = json.loads(metrics.to_json())
        assert snapshot["system"] is None and snapshot["gpus"] is None
        assert snapshot["process"]["rss_bytes"] is None
        assert snapshot["process"]["cpu_seconds"] > 0
        assert snapshot["latencies"]["frame"]["count"] == snapshot["counters"]["frames"] == 1
        assert snapshot["watched"] == {"voices": {"hits": 1}} and snapshot["faults"] == {}
    with pytest.raises(ImportError, match=r"prometheus_client cannot be imported .*csm-kernels\[monitor\]"):
        metrics.to_prometheus()
    with metrics.serve(port=0) as server:
        status, text = get(f"{server.url}/metrics")
        assert status == 501 and "csm-kernels[monitor]" in text
        assert get(f"{server.url}/metrics.json")[0] == 200
        assert cli.main(["monitor", server.url, "--once"]) == 0
    assert "voices" in capsys.readouterr().out


def fake_nvml(**changed: Any) -> types.ModuleType:
    def at(index: int) -> int:
        if index > 1:
            raise LookupError(index)
        return index

    module = types.ModuleType("pynvml")
    functions: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": at,
        "nvmlDeviceGetName": lambda handle: b"A card" if handle else "Another card",
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(used=(handle + 1) * 10**9, total=8 * 10**9),
        "nvmlDeviceGetUtilizationRates": lambda handle: types.SimpleNamespace(gpu=60 + handle, memory=30),
    }
    for name, function in (functions | changed).items():
        setattr(module, name, function)
    return module


def test_gpu_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    metrics = Metrics()
    gpus = metrics.snapshot()["gpus"]
    assert gpus[1] == {
        "index": 1,
        "name": "A card",
        "memory_used_bytes": 2 * 10**9,
        "memory_total_bytes": 8 * 10**9,
        "utilization_percent": 61,
        "memory_utilization_percent": 30,
    }
    assert [gpu["name"] for gpu in gpus] == ["Another card", "A card"]
    found = read(metrics)
    assert found["csm_gpu_utilization_ratio"] == {("0",): 0.6, ("1",): 0.61}
    assert found["csm_gpu_memory_used_bytes"] == {("0",): 1e9, ("1",): 2e9}


def fails(*_: Any) -> Any:
    raise RuntimeError("not supported")


def test_gpus_that_tell_little_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetUtilizationRates=fails))
    metrics = Metrics()
    gpu = metrics.snapshot()["gpus"][0]
    assert gpu["utilization_percent"] is None and gpu["memory_used_bytes"] == 10**9
    assert "csm_gpu_utilization_ratio" not in read(metrics)
    for name in ("nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"):
        monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**{name: fails}))
        assert Metrics().snapshot()["gpus"] is None


def fake_torch(initialised: bool, **changed: Any) -> Any:
    cuda = types.SimpleNamespace(
        is_initialized=lambda: initialised,
        device_count=lambda: 2 if initialised else pytest.fail("asked before CUDA was initialised"),
        memory_reserved=lambda index: 0 if index == 0 else 1000,
        memory_allocated=lambda index: 0 if index == 0 else 750,
        max_memory_allocated=lambda index: 0 if index == 0 else 900,
    )
    cuda.__dict__.update(changed)
    return types.SimpleNamespace(cuda=cuda)


def test_cuda_figures_only_where_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    monkeypatch.setitem(sys.modules, "torch", fake_torch(True))
    assert metrics.snapshot()["cuda"] == [
        {
            "index": 1,
            "allocated_bytes": 750,
            "reserved_bytes": 1000,
            "peak_allocated_bytes": 900,
            "fragmentation": 0.25,
        }
    ]
    assert read(metrics)["csm_cuda_fragmentation_ratio"] == {("1",): 0.25}
    for torch in (fake_torch(False), fake_torch(True, memory_reserved=fails), types.ModuleType("torch")):
        monkeypatch.setitem(sys.modules, "torch", torch)
        assert metrics.snapshot()["cuda"] is None
    monkeypatch.delitem(sys.modules, "torch")
    assert metrics.snapshot()["cuda"] is None and "torch" not in sys.modules


# ------------------------------------------------------------------------------------------------ threads


def test_threads_lose_nothing() -> None:
    metrics, each, writers, stop = Metrics(), 5000, 6, threading.Event()
    together, snapshots, failed = threading.Barrier(writers + 2), [], []

    def write(number: int) -> None:
        together.wait()
        for i in range(each):
            metrics.observe(f"name{i % 3}", 0.001 * (i % 50))
            metrics.count("frames", 2)
            metrics.fault(f"fault {number}")
            metrics.audio(1.0, 0.5)
            metrics.gauge("last", i)

    def look() -> None:
        together.wait()
        try:
            while not stop.is_set():
                snapshots.append(metrics.snapshot())
                json.dumps(snapshots[-1], allow_nan=False)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(writers)]
    lookers = [threading.Thread(target=look) for _ in range(2)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads + lookers:
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        for thread in lookers:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not failed and len(snapshots) > 2
    for snapshot in snapshots:
        for row in snapshot["latencies"].values():
            assert sum(row["buckets"].values()) == row["count"], "a snapshot is of one moment"
        assert sum(snapshot["faults"].values()) == snapshot["counters"].get("faults", 0)
    last = metrics.snapshot()
    assert sum(row["count"] for row in last["latencies"].values()) == each * writers
    assert last["counters"] == {"frames": 2 * each * writers, "faults": each * writers}
    assert last["faults"] == {f"fault {i}": each for i in range(writers)}
    assert last["audio"]["seconds"] == each * writers


def test_a_finalizer_that_counts_does_not_wait_for_itself() -> None:
    """The garbage collector runs wherever memory is taken, also under the lock."""
    metrics = Metrics()

    def count() -> None:
        with metrics._lock:
            metrics.fault("found in the garbage")

    one = threading.Thread(target=count, daemon=True)
    one.start()
    one.join(20)
    assert not one.is_alive() and metrics.counters["faults"] == 1


# ------------------------------------------------------------------------------------------------ HTTP


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_http_round_trip() -> None:
    metrics = Metrics()
    metrics.count("frames", 7)
    with metrics.serve(port=0) as server:
        assert server.url == f"http://127.0.0.1:{server.server_port}"
        status, text = get(f"{server.url}/metrics")
        assert status == 200 and "csm_frames_total 7.0" in text.splitlines()
        status, text = get(f"{server.url}/metrics.json?x=1")
        assert status == 200 and json.loads(text)["counters"] == {"frames": 7}
        metrics.count("frames")
        assert json.loads(get(f"{server.url}/metrics.json")[1])["counters"] == {"frames": 8}
        for path in ("", "/", "/metrics/", "/etc/passwd"):
            assert get(server.url + path)[0] == 404
    with pytest.raises(OSError):
        get(f"{server.url}/metrics")
    server.close()
    assert not [thread for thread in threading.enumerate() if thread is server._thread]


def test_a_client_that_goes_away_stops_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Metrics().serve(port=0) as server:
        for message in (b"", b"GET /metrics.json HTTP/1.0\r\n\r\n", b"nonsense\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as client:
                client.sendall(message)
        assert get(f"{server.url}/metrics.json")[0] == 200
    assert capfd.readouterr().err == ""


def test_a_port_in_use_is_a_clear_error() -> None:
    metrics = Metrics()
    with metrics.serve(port=0) as server:
        with pytest.raises(
            OSError, match=rf"127.0.0.1, port {server.server_port}: .*port=0 takes a free one"
        ) as caught:
            metrics.serve(port=server.server_port)
        assert caught.value.errno == errno.EADDRINUSE
    metrics.serve(port=server.server_port).close()
    for port in (-1, 65536):
        with pytest.raises(ValueError, match="port must be between 0 and 65535"):
            metrics.serve(port=port)


def test_a_snapshot_that_fails_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    with metrics.serve(port=0) as server:
        monkeypatch.setattr(metrics, "to_json", fails)
        assert get(f"{server.url}/metrics.json") == (500, "RuntimeError: not supported\n")


# ------------------------------------------------------------------------------------------------ csm-accelerate monitor


@pytest.fixture
def served() -> Any:
    metrics = Metrics()
    metrics.count("frames", 125)
    metrics.count("generate.fast", 4)
    metrics.count("guard.verified", 8)
    metrics.audio(10.0, 4.0)
    for i in range(100):
        metrics.observe("frame", 0.004 if i else 0.1)
    metrics.watch("guard", lambda: {"rung": "fast"})
    metrics.watch("voices", lambda: {"hits": 3, "held_bytes": 2 * 10**6, "used_share": 0.25})
    metrics.gauge("waiting", 2)
    metrics.fault("a [bold]fault[/bold] \x1b[31m\nof the 2nd frame")
    metrics.stock_path("output_scores")
    with metrics.serve(port=0) as server:
        yield server


def line(out: str, start: str) -> str:
    found = [line for line in out.splitlines() if line.strip().startswith(start)]
    assert len(found) == 1, out
    return " ".join(found[0].split())


def test_monitor_once(served: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["monitor", served.url, "--once"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    assert out.startswith(f"{served.url}, up 0:00:0")
    assert "frames/s over its life, 125 frames made" in line(out, "throughput")
    assert line(out, "calls") == "calls 4 fast, 0 rung, 1 stock"
    assert "factor 0.400 in the last 60 s, 0.400 in all; 10.0 s of audio" in line(out, "real time")
    assert line(out, "guard") == "guard rung fast, verified 8, skipped 0, suspicions 0, breaches 0"
    assert line(out, "voices") == "voices hits 3, held_bytes 2.0 MB, used_share 25.0%"
    assert line(out, "gauges") == "gauges waiting 2"
    assert line(out, "faults") == "faults 1: 1x a [bold]fault[/bold] [31m of the 2nd frame"
    assert line(out, "stock path") == "stock path 1: 1x output_scores"
    assert line(out, "frame") == "frame 100 4.00 4.00 4.96 100.0 3.15 █▁▁▁▁▁▁▂ 125.0"


def test_monitor_json(served: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["monitor", f"{served.url}/metrics.json", "--once", "--json"]) == 0
    (one,) = capsys.readouterr().out.splitlines()
    assert json.loads(one)["counters"]["frames"] == 125


def test_monitor_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics().serve(port=0) as server:
        pass
    assert cli.main(["monitor", server.url, "--once"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert server.url in err and "model.acceleration.metrics.serve()" in err


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1", "http://", "", "http://127.0.0.1:x", "a b:1"])
def test_monitor_of_no_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["monitor", url, "--once"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1


def test_monitor_of_another_service(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    with metrics.serve(port=0) as server:
        for answer in ("{}", "[]", "none", '{"latencies": {}}'):
            monkeypatch.setattr(metrics, "to_json", lambda answer=answer: answer)
            assert cli.main(["monitor", server.url, "--once"]) == 2
            assert "answers, but not with metrics" in capsys.readouterr().err


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "1e9"])
def test_monitor_interval(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["monitor", "--interval", interval]) == 2
    assert "--interval must be between" in capsys.readouterr().err


def steps(monkeypatch: pytest.MonkeyPatch, *between: Callable[[], None]) -> None:
    """Do this between readings, then interrupt."""
    todo = iter(between)

    def sleep(seconds: float) -> None:
        assert seconds == 0.5
        step = next(todo, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(view_of, "time", types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic))


def test_monitor_follows(served: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rates are since the reading before; a server may go, and Ctrl-C is no error."""
    made = functools.partial(served.metrics.count, "frames", 1000)
    steps(monkeypatch, made, served.close)
    assert cli.main(["monitor", served.url, "--interval", "0.5"]) == 0
    first, second, third = capsys.readouterr().out.split(served.url)[1:]
    assert "over its life, 125 frames" in first and "since the last reading, 1125 frames" in second
    assert "no answer for" in third and "1125 frames" in third


def test_monitor_follows_in_json(
    served: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps(monkeypatch, functools.partial(served.metrics.count, "frames", 5), served.close)
    assert cli.main(["monitor", served.url, "--interval", "0.5", "--json"]) == 0
    frames = [json.loads(one)["counters"]["frames"] for one in capsys.readouterr().out.splitlines()]
    assert frames == [125, 130], "what it said last is not said again"


@pytest.mark.parametrize("once", [True, False])
def test_monitor_in_a_terminal(served: Server, monkeypatch: pytest.MonkeyPatch, once: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160, height=60, legacy_windows=False)
    monkeypatch.setattr(view_of, "_console", lambda: console)
    steps(monkeypatch, functools.partial(served.metrics.count, "frames", 1000))
    assert cli.main(["monitor", served.url, "--interval", "0.5", *(["--once"] if once else [])]) == 0
    out = screen.getvalue()
    assert "a [bold]fault[/bold]" in out, "a reason is text, not markup"
    assert ("1125 frames made" in out) is not once
    assert "█▁▁▁▁▁▁▂" in out


def test_monitor_shows_gpus_and_what_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetUtilizationRates=fails))
    monkeypatch.setitem(sys.modules, "torch", fake_torch(True))
    now = json.loads(Metrics().to_json())
    shown = dict(view_of.view(now).state)
    assert shown["GPU 1"] == "- busy, memory -; 2.00 GB of 8.00 GB; A card"
    assert shown["cuda:1"] == "0.0 MB allocated, peak 0.0 MB; 0.0 MB reserved, 25% of it unused"
    assert shown["real time"] == "-" and view_of.view(now).latencies == []


def test_a_process_that_took_over_the_address_has_no_rate() -> None:
    metrics = Metrics()
    metrics.count("frames", 10)
    before = metrics.snapshot()
    now = copy.deepcopy(before)
    now["counters"]["frames"], now["uptime_seconds"] = 3, before["uptime_seconds"] + 1
    assert dict(view_of.view(now, before).state)["throughput"] == "-"


def test_bars_where_blocks_cannot_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert view_of.spark({"0.005": 100, "0.0125": 1, "+Inf": 50}).split()[1][:3] == "#_."
    assert view_of._clean("größer") == "gr??er"


def test_the_extra_names_what_is_imported() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = {one.partition(">")[0] for one in extras["monitor"]}
    assert named == {"csm-kernels[cli]", "prometheus-client", "nvidia-ml-py"}
    assert "monitor" in extras["test"][0]
