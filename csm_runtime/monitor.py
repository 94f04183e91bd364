"""``csm-accelerate monitor``: what a served Metrics says, as tables in the terminal, once or again and again."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from csm_runtime.metrics import BOUNDS

DEFAULT_URL = "http://127.0.0.1:9464"
_TIMEOUT = 5.0  # seconds
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
_CUT = 100  # characters of a reason
_SHOWN = {"counters", "stock_reasons", "faults", "uptime_seconds", "audio", "gauges", "latencies", "watched", "process"}
_SHOWN |= {"system", "cuda", "gpus"}

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class View:
    """One reading, ready to be drawn: a title, rows of what and value, and rows of latencies in milliseconds."""

    title: str
    state: Rows
    latencies: Rows


HEADER = ("latency, ms", "count", "p50", "p90", "p99", "max", "all, fastest to slowest")


def fetch(url: str) -> dict[str, Any]:
    """The snapshot behind a URL.

    Args:
        url: of the server, or of its ``/metrics`` or ``/metrics.json``; ``http://`` may be left out.

    Raises:
        ValueError: not a URL, or something else answers there.
        ConnectionError: nothing answers there; says what to do.
    """
    base = base_of(url)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy's localhost is another one
    try:
        with opener.open(f"{base}/metrics.json", timeout=_TIMEOUT) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{base} answers, but not with metrics: HTTP status {error.code}") from error
    except OSError as error:
        why = getattr(error, "reason", error)
        raise ConnectionError(
            f"no metrics at {base} ({why}); call model.acceleration.metrics.serve() in the process that speaks"
        ) from error
    except Exception as error:  # not HTTP, or not JSON
        raise ValueError(f"{base} answers, but not with metrics: {type(error).__name__}") from error
    if not (isinstance(found, dict) and found.keys() >= _SHOWN):
        raise ValueError(f"{base} answers, but not with metrics of this version")
    return found


def base_of(url: str) -> str:
    """The server's URL without a path of ours.

    Raises:
        ValueError: not an http or https URL.
    """
    full = url if "://" in url else f"http://{url}"
    if not full.startswith(("http://", "https://")) or not full.partition("://")[2].strip("/"):
        raise ValueError(f"URL must be like {DEFAULT_URL}, got {url!r}")
    return full.rstrip("/").removesuffix("/metrics.json").removesuffix("/metrics").rstrip("/")


def monitor(url: str = DEFAULT_URL, interval: float = 1.0, once: bool = False, as_json: bool = False) -> None:
    """Print what a served Metrics says until interrupted; live where stdout is a terminal, else one table after another.

    Ends quietly as well where nobody reads on, as under ``| head``.

    Args:
        url: see :func:`fetch`.
        interval: seconds from one reading to the next.
        once: print one and return.
        as_json: a line of JSON instead of tables.

    Raises:
        ValueError, ConnectionError: see :func:`fetch`, for the first reading. Later a server may go and come back.
    """
    if not 0.1 <= interval <= 3600:
        raise ValueError(f"--interval must be between 0.1 and 3600 seconds, got {interval:g}")
    base, now, before, then = base_of(url), fetch(url), None, time.monotonic()
    title, fresh = base, True
    with _screen(once or as_json) as draw, contextlib.suppress(KeyboardInterrupt), _unread():
        while True:
            if not as_json:
                draw(view(now, before, title))
            elif fresh:
                print(json.dumps(now), flush=True)
            if once:
                return
            time.sleep(interval)
            try:
                now, before, then = fetch(url), now, time.monotonic()
                title, fresh = base, True
            except (ValueError, ConnectionError):
                title, fresh = f"{base}: no answer for {time.monotonic() - then:.0f} s, what it said last", False


@contextlib.contextmanager
def _unread() -> Iterator[None]:
    """Nobody reads stdout any more: no error, also not of the interpreter's when it flushes at its end."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _screen(still: bool) -> Iterator[Any]:
    """A function that draws a view: in place where rich has a terminal, below the last one where not."""
    console = _console()
    if console is None or not console.is_terminal:
        yield lambda shown: print(text(shown), flush=True)
        return
    if still:
        yield lambda shown: console.print(_tables(shown))
        return
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        yield lambda shown: live.update(_tables(shown), refresh=True)


def _console() -> Any:
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console()


def _tables(shown: View) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    state = Table(title=Text(shown.title), show_header=False)
    state.add_column(no_wrap=True)
    state.add_column(overflow="fold")
    latencies = Table()
    for index, name in enumerate(HEADER):
        latencies.add_column(name, justify="right" if 0 < index < len(HEADER) - 1 else "left", no_wrap=True)
    for table, rows in ((state, shown.state), (latencies, shown.latencies)):
        for row in rows:
            table.add_row(*map(Text, row))  # and not markup: reasons have brackets
    return Group(state, latencies) if shown.latencies else state


def text(shown: View) -> str:
    """A view as plain lines."""
    lines = [shown.title, *(f"  {what:<12} {value}" for what, value in shown.state)]
    if shown.latencies:
        rows = [HEADER, *shown.latencies]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
        for name, *numbers, bar in rows:
            cells = " ".join(f"{number:>{width}}" for number, width in zip(numbers, widths[1:]))
            lines.append(f"  {name:<{widths[0]}} {cells}  {bar}".rstrip())
    return "\n".join(lines)


def view(now: dict[str, Any], before: dict[str, Any] | None = None, title: str = "") -> View:
    """What a snapshot says, with rates since an earlier one, or over its life without."""
    state: Rows = [("throughput", _throughput(now, before)), ("calls", _calls(now)), ("real time", _real_time(now))]
    state += [("memory", _memory(now)), ("processor", _processor(now)), *_gpus(now), ("guard", _guard(now))]
    watched = {name: values for name, values in now["watched"].items() if name != "guard" and values}
    state += [(name, _pairs(values)) for name, values in watched.items()]
    if now["gauges"]:
        state.append(("gauges", _pairs(now["gauges"])))
    state.append(("faults", _reasons(now["counters"].get("faults", 0), now["faults"])))
    state.append(("stock path", _reasons(now["counters"].get("generate.stock", 0), now["stock_reasons"])))
    shown = [(_clean(what), _clean(value)) for what, value in state]
    rows: Rows = [_latency(_clean(name), row) for name, row in sorted(now["latencies"].items())]
    return View(_clean(f"{title}, up {_duration(now['uptime_seconds'])}"), list(shown), rows)


def _throughput(now: dict[str, Any], before: dict[str, Any] | None) -> str:
    seconds = now["uptime_seconds"] - (before["uptime_seconds"] if before else 0.0)
    made = now["counters"].get("frames", 0) - (before["counters"].get("frames", 0) if before else 0)
    if seconds <= 0 or made < 0:  # not asked anew, or another process has taken the address
        return "-"
    since = "since the last reading" if before else "over its life"
    return f"{made / seconds:.1f} frames/s {since}, {now['counters'].get('frames', 0)} frames made"


def _calls(now: dict[str, Any]) -> str:
    counters = now["counters"]
    return ", ".join(f"{counters.get(f'generate.{path}', 0)} {path}" for path in ("fast", "rung", "stock"))


def _real_time(now: dict[str, Any]) -> str:
    audio, latest = now["audio"], now["audio"]["window"]
    if audio["real_time_factor"] is None:
        return "-"
    factor = latest["real_time_factor"]
    lately = "-" if factor is None else f"{factor:.3f}"
    return (
        f"factor {lately} in the last {latest['span_seconds']:.0f} s, {audio['real_time_factor']:.3f} in all; "
        f"{audio['seconds']:.1f} s of audio"
    )


def _memory(now: dict[str, Any]) -> str:
    process, system = now["process"], now["system"]
    said = f"{_size(process['rss_bytes'])}, peak {_size(process['peak_rss_bytes'])}"
    if system is not None:
        said += f"; {_size(system['memory_available_bytes'])} of {_size(system['memory_total_bytes'])} available"
    return said


def _processor(now: dict[str, Any]) -> str:
    process, system = now["process"], now["system"]
    said = f"process {_percent(process['cpu_percent'])} of a core"
    return said if system is None else f"{said}; machine {_percent(system['cpu_percent'])} of {system['cpus']} cores"


def _gpus(now: dict[str, Any]) -> Rows:
    rows: Rows = []
    for gpu in now["gpus"] or ():
        memory = f"{_size(gpu['memory_used_bytes'])} of {_size(gpu['memory_total_bytes'])}"
        used = f"{_percent(gpu['utilization_percent'])} busy, memory {_percent(gpu['memory_utilization_percent'])}"
        rows.append((f"GPU {gpu['index']}", f"{used}; {memory}; {gpu['name'] or ''}"))
    for device in now["cuda"] or ():
        share = device["fragmentation"]
        unused = "-" if share is None else f"{share:.0%}"
        rows.append(
            (
                f"cuda:{device['index']}",
                f"{_size(device['allocated_bytes'])} allocated, peak {_size(device['peak_allocated_bytes'])}; "
                f"{_size(device['reserved_bytes'])} reserved, {unused} of it unused",
            )
        )
    return rows


def _guard(now: dict[str, Any]) -> str:
    counters = now["counters"]
    counted = {name: counters.get(f"guard.{name}", 0) for name in ("verified", "skipped", "suspicions", "breaches")}
    return _pairs(now["watched"].get("guard", {}) | counted)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_value(name, value)}" for name, value in values.items())


def _value(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if name.endswith("bytes"):
        return _size(value)
    if name.endswith(("share", "ratio")):
        return f"{value:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reasons(total: int, reasons: dict[str, int]) -> str:
    latest = list(reasons.items())[-3:]
    named = "; ".join(f"{count}x {reason[:_CUT]}" for reason, count in latest)
    return f"{total}: {named}" if named else str(total)


def _latency(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    times = (_ms(row[key]) for key in ("p50_seconds", "p90_seconds", "p99_seconds", "max_seconds"))
    return (name, str(row["count"]), *times, spark(row["buckets"]))


def spark(buckets: dict[str, int]) -> str:
    """A histogram as one character for each bucket from the first that is not empty to the last."""
    counts = [buckets.get(le, 0) for le in (*map(str, BOUNDS), "+Inf")]
    full = [index for index, count in enumerate(counts) if count]
    if not full:
        return ""
    bars = _BARS if _can_print(_BARS) else _ASCII_BARS
    most = max(counts)
    # The lowest bar is for "none", so that one slow frame among thousands is seen.
    heights = [-(-count * (len(bars) - 1) // most) for count in counts[full[0] : full[-1] + 1]]
    lowest, highest = _bound(full[0] - 1), _bound(full[-1])
    return f"{lowest} {''.join(bars[height] for height in heights)} {highest}"


def _bound(index: int) -> str:
    if index < 0:
        return "0"
    return _ms(BOUNDS[index]) if index < len(BOUNDS) else "inf"


def _can_print(characters: str) -> bool:
    try:
        characters.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _clean(said: str) -> str:
    """One line without what a terminal would obey or cannot print."""
    line = "".join(c if c.isprintable() else " " for c in said)
    encoding = sys.stdout.encoding or "utf-8"
    return line.encode(encoding, errors="replace").decode(encoding)


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    ms = 1000 * seconds
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 1000 else f"{ms:.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"


def _size(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
