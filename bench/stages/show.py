"""The campaign's results for people: a table on the terminal, and a plot of every phase's share of the bandwidth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages import models


def table(result: dict[str, Any]) -> str:
    """Stages, what they found in short, and the bars."""
    lines = [f"{result['device']}, torch {result['torch']}, triton {result['triton']}, {result['date']}"]
    if result["rehearsal"]:
        lines.append("rehearsal: small shapes, interpreted; nothing here is a measurement")
    for stage in result["stages"]:
        seconds = f"{stage['seconds']:.0f} s" if stage.get("seconds") is not None else ""
        lines.append(f"stage {stage['stage']} {stage['name']:<12} {stage['status']:<20} {seconds:>6}  {_short(stage)}")
    pieces = {stage["stage"]: stage["pieces"] for stage in result["stages"]}
    lines += [*_constants(pieces.get(1, {})), *_frames(pieces.get(5, {})), *_whole(pieces.get(6, {}))]
    if result["bars"] and not any(name in result["device"] for name in ("H100", "H200")):
        lines.append("the bars are meant for an H100")
    for bar in result["bars"]:
        verdict = {True: "PASS", False: "FAIL", None: "not measured"}[bar["passed"]]
        value = "" if bar["value"] is None else f"{bar['value']:.2f}"
        lines.append(f"{verdict:<12} {bar['name']:<48} {value:>8}  {bar['limit']}")
    if result.get("drivers_stored"):
        lines.append(f"default drivers stored in {', '.join(result['drivers_stored'])}")
    return "\n".join(lines)


def _short(stage: dict[str, Any]) -> str:
    wrong = [f"{name}: {message.splitlines()[0][:100]}" for name, message in stage["errors"].items()]
    return "; ".join([stage.get("message", "")[:120], *wrong[:3]]).strip("; ")


def _figure(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _constants(pieces: dict[str, Any]) -> list[str]:
    found = pieces.get("summary") or {}
    if not found.get("stream_gb_per_s"):
        return []
    lines = [
        f"memory {found['stream_gb_per_s']:.0f} GB/s, second-level cache {_figure(found.get('l2_gb_per_s'), 0)} GB/s"
    ]
    lines += [
        f"{name}: {_figure(one['us_each'])} us"
        for name, one in pieces.items()
        if isinstance(one, dict) and "us_each" in one
    ]
    return lines


def _frames(pieces: dict[str, Any]) -> list[str]:
    rows = [one for one in pieces.values() if isinstance(one, dict) and one.get("frame_ms")]
    if not rows:
        return []
    lines = [f"{'frame':<36} {'ms':>7} {'of floor':>8} {'depth':>7} {'backbone':>8} {'x real time':>11}"]
    for one in rows:
        name = f"{one['format']}, batch {one['batch']}, {one['driver']}"
        lines.append(
            f"{name:<36} {one['frame_ms']:>7.2f} {_share(one['frame_share']):>8} {_figure(one['depth_ms']):>7} "
            f"{_figure(one['backbone_ms']):>8} {one['times_real_time']:>11.0f}"
        )
    for one in pieces.values():
        for row in one.get("rows", []) if isinstance(one, dict) else []:
            if row["ms"] is not None:
                name = f"{one['format']}, batch {one['batch']}, {row['stack']} {row['phase']}"
                share = _share(row["share_of_stream"])
                lines.append(
                    f"{name:<44} {row['ms']:>7.3f} ms {_figure(row['gb_per_s'], 0):>6} GB/s {share:>5} of stream"
                )
    return lines


def _whole(pieces: dict[str, Any]) -> list[str]:
    return [
        f"{name:<32} {one['ms_per_frame']:>8.2f} ms per frame, first after {one['first_frame_ms']:.1f} ms"
        for name, one in pieces.items()
        if isinstance(one, dict) and one.get("ms_per_frame")
    ]


def plot(pieces: dict[str, Any], device: str, path: Path) -> bool:
    """Bars of each phase's share of stream bandwidth, a panel per format at one row; False where nothing can be drawn."""
    panels = [(fmt, (pieces.get(f"{fmt} batch 1 phases") or {}).get("rows", [])) for fmt in models.FORMATS]
    panels = [(fmt, [row for row in rows if row.get("share_of_stream")]) for fmt, rows in panels]
    panels = [(fmt, rows) for fmt, rows in panels if rows]
    if not panels:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (fmt, rows) in zip(axes[0], panels):
        names = [f"{row['stack']} {row['phase']}" for row in rows]
        axis.barh(names, [100 * row["share_of_stream"] for row in rows], color="C0", label="alone")
        within = [100 * (row.get("share_of_stream_in_frame") or 0) for row in rows]
        axis.barh(names, within, color="C1", height=0.3, label="in the frame")
        axis.axvline(100, color="black")
        axis.invert_yaxis()
        axis.set(title=fmt, xlabel="% of the bandwidth measured")
        axis.legend(fontsize=8)
    figure.suptitle(f"{device}: GB/s of each phase, batch 1")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
