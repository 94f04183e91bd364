"""What the figures mean: the bars, and the driver that becomes the default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from stages import models, speed
from stages.common import ROOT

WORTH = 0.95
"""The persistent kernel becomes the default below this share of the other driver's time: it waits at grid barriers."""


class Bar(NamedTuple):
    """A promise and what was measured. ``passed`` None: not measured."""

    name: str
    limit: str
    value: float | None
    passed: bool | None


def bars(stages: dict[int, dict[str, Any]]) -> list[Bar]:
    """The bars of an H100 at the real shapes, from the stages' pieces.

    Args:
        stages: number to the stage's pieces; a stage that has not run may be missing.
    """
    timed, whole, started, trained = (stages.get(number, {}) for number in (5, 6, 7, 9))

    def frame(fmt: str, batch: int) -> float | None:
        """The faster driver's frame; only graphs count."""
        found = (timed.get(f"{fmt} batch {batch} {driver}") or {} for driver in models.DRIVERS)
        times = [one["frame_ms"] for one in found if one.get("frame_ms") and one.get("frame_how") == "graph"]
        return min(times) if times else None

    def at_most(name: str, limit: float, value: float | None, unit: str) -> Bar:
        return Bar(name, f"<= {limit:g} {unit}", value, None if value is None else value <= limit)

    def at_least(name: str, limit: float, value: float | None) -> Bar:
        return Bar(name, f">= {limit:g}x", value, None if value is None else value >= limit)

    ours, port = (
        (whole.get(name) or {}).get("ms_per_frame") for name in ("ours, bfloat16", "stock ops in a CUDA graph")
    )
    many = frame("bfloat16", 16)
    step, all_frames = (
        (trained.get(f"step, {name}") or {}).get("ms") for name in ("ours at 1/16", "stock at all frames")
    )
    return [
        at_most("bf16, batch 1, ms per frame", 4.0, frame("bfloat16", 1), "ms"),
        at_least("bf16, batch 1, over stock ops in a CUDA graph", 2.0, port / ours if port and ours else None),
        at_most("int8, batch 1, ms per frame", 2.7, frame("int8", 1), "ms"),
        at_least("bf16, batch 16, times real time together", 150.0, None if many is None else 16 * 80.0 / many),
        at_most("cold start of the decode path", 10.0, (started.get("cold") or {}).get("cold_start_seconds"), "s"),
        at_least(
            "training step at 1/16 over stock at all frames", 3.0, all_frames / step if step and all_frames else None
        ),
        at_most("loss op over its traffic bound", 2.0, (trained.get("loss") or {}).get("over_bound"), "times"),
    ]


def choices(pieces: dict[str, Any], gpu: str, when: str) -> dict[str, list[dict[str, Any]]]:
    """Entries of the tile tables ``depth`` and ``backbone``: the driver to take where both were measured as graphs."""
    found: dict[str, list[dict[str, Any]]] = {"depth": [], "backbone": []}
    for fmt, batch, both in speed.compared(pieces):
        for stack, entries in found.items():
            times = {driver: one.get(f"{stack}_ms") for driver, one in both.items()}
            if not all(times.values()) or any(one.get(f"{stack}_how") != "graph" for one in both.values()):
                continue
            wins = times["persistent"] < WORTH * times["launches"]
            measured = f"{times['launches']:.3f} ms in launches, {times['persistent']:.3f} ms persistent, {when}"
            entries.append(
                {
                    "gpu": gpu,
                    "shape": speed.sizes_of(models.REAL, fmt, batch, stack),
                    "tiles": {"PERSISTENT": int(wins)},
                    "measured": measured,
                }
            )
    return found


def store(entries: dict[str, list[dict[str, Any]]], folder: Path = ROOT / "csm_kernels" / "tiles") -> list[Path]:
    """Merge entries into the tile tables: the same GPU and shape keeps its other sizes, everything else stays."""
    written = []
    for op, new in entries.items():
        if not new:
            continue
        path = folder / f"{op}.json"
        table: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        for entry in new:
            old = next((e for e in table if (e["gpu"], e["shape"]) == (entry["gpu"], entry["shape"])), None)
            if old is None:
                table.append(entry)
            else:
                old |= {"tiles": {**old["tiles"], **entry["tiles"]}, "measured": entry["measured"]}
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("[\n" + ",\n".join(f" {json.dumps(entry)}" for entry in table) + "\n]\n")
        written.append(path)
    return written


def check_table(folder: Path) -> None:
    """In a rehearsal: what :func:`store` writes is what ``csm_kernels`` reads.

    Raises:
        AssertionError: it is not.
    """
    from csm_kernels import _tiles
    from csm_kernels._target import Device

    sizes = speed.sizes_of(models.REAL, "int8", 4, "depth")
    entry = {"gpu": "a rehearsal", "shape": sizes, "tiles": {"PERSISTENT": 1}, "measured": "never: a rehearsal"}
    store({"depth": [entry], "backbone": []}, folder)
    own, facts = _tiles.__file__, _tiles.device_facts
    try:
        _tiles.__file__ = str(folder.parent / "_tiles.py")
        _tiles.device_facts = lambda index: Device("a rehearsal", 90, 132, 50 << 20)
        _tiles._table.cache_clear()
        launch = tuple(sorted({**sizes, "another size": 1}.items()))
        assert _tiles._measured.__wrapped__("depth", 0, launch) == {"PERSISTENT": 1}
    finally:
        _tiles.__file__, _tiles.device_facts = own, facts
        _tiles._table.cache_clear()
