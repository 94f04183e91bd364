"""What ``model.acceleration.report()`` returns: data first, a table when printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """The state of an accelerated model. Bytes are bytes; ``zones`` has one dict per zone of the model.

    ``copied_bytes`` is what packed copies hold beside the stock model, ``kv_bytes`` what the preallocated KV buffers
    hold. ``guard`` is the guard's ``status()``. ``replaced`` counts what the backend "csm" put in place of stock code in
    the layers that prompts run through, if ``compiled_prefill``. Per zone, ``bytes`` is its size, ``bytes_per_frame`` what
    one frame at batch 1 reads of it (None for the KV cache and the codec), ``sqnr_db`` the signal to rounding noise of its
    weights (None where none were rounded) and ``shared_with`` the zone that it shares its bytes with (None where it has its
    own). A codec in another format is the decoding half in that format, a copy made with the first sound.
    """

    model: str
    device: str
    dtype: str
    mode: str
    policy: str
    zones: list[dict[str, Any]]
    copied_bytes: int
    kv_bytes: int
    capacity: int
    batch_sizes: list[int]
    huge_page_bytes: int
    originals_dropped: bool
    notes: list[str]
    metrics: dict[str, Any]
    guard: dict[str, Any]
    compiled_prefill: bool
    replaced: dict[str, int]

    @property
    def bytes(self) -> int:
        """Bytes of all zones; what two of them share counts once."""
        return sum(row["bytes"] for row in self.zones if row["shared_with"] is None)

    @property
    def bytes_per_frame(self) -> int:
        """Weight bytes one frame reads at batch 1."""
        return sum(row["bytes_per_frame"] or 0 for row in self.zones)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {**asdict(self), "bytes": self.bytes, "bytes_per_frame": self.bytes_per_frame}

    def __str__(self) -> str:
        lines = [
            f"{self.model} on {self.device}, {self.dtype}, precision {self.policy!r}, frames run in mode {self.mode!r}",
            f"{'zone':<18} {'format':<18} {'held':>10} {'read/frame':>11} {'SQNR':>8}",
        ]
        for row in self.zones:
            read, sqnr = row["bytes_per_frame"], row["sqnr_db"]
            unknown = sqnr is None and read is None and not row["format"].startswith("keep")
            lines.append(
                f"{row['zone']:<18} {row['format']:<18} {_mb(row['bytes']):>10} {'-' if read is None else _mb(read):>11} "
                f"{'-' if unknown else 'exact' if sqnr is None else f'{sqnr:.1f} dB':>8}"
            )
        lines.append(
            f"{'sum':<18} {'':<18} {_mb(self.bytes):>10} {_mb(self.bytes_per_frame):>11}"
            + "".join(f"; {r['zone']} is {r['shared_with']}" for r in self.zones if r["shared_with"])
        )
        beside = "in their place" if self.originals_dropped else "beside the stock weights"
        lines.append(
            f"packed copies {_mb(self.copied_bytes)} {beside}; KV buffers {_mb(self.kv_bytes)} for {self.capacity} "
            f"positions; {_mb(self.huge_page_bytes)} of weights in huge pages; ready for batch "
            f"{', '.join(map(str, self.batch_sizes)) or 'none yet'}"
        )
        counters = self.metrics["counters"]
        lines.append(
            f"calls: {counters.get('generate.fast', 0)} fast, {counters.get('generate.stock', 0)} stock; "
            f"{counters.get('frames', 0)} frames; {counters.get('faults', 0)} faults"
        )
        lines.append(_guarded(self.guard))
        lines += [f"  stock path {count}x: {reason}" for reason, count in self.metrics["stock_reasons"].items()]
        lines += [f"  fault {count}x: {what}" for what, count in self.metrics["faults"].items()]
        lines += [f"note: {note}" for note in self.notes]
        sites = ", ".join(f"{count} {name}" for name, count in sorted(self.replaced.items()))
        if self.compiled_prefill:
            lines.append(f"prompts run through stock layers compiled with the backend csm, which replaced {sites}")
        alone = "text embedding, codec, forward() and training run the stock modules"
        lines.append(f"left alone: {'' if self.compiled_prefill else 'prefill, '}{alone}")
        return "\n".join(lines)


def _guarded(guard: dict[str, Any]) -> str:
    """The guard's state in one line."""
    counters = guard["counters"]
    if guard["rung"] != "fast":
        state = f"rung {guard['rung']!r} until rearm(): {guard['reason']}"
    else:
        state = "rung 'fast'"
    verified = f"{counters.get('guard.verified', 0)} frames verified, {counters.get('guard.skipped', 0)} skipped for the budget"
    if not guard["verify"]:
        verified = "frames are not verified"
    return f"guard: {state}; {verified}; {counters.get('guard.breaches', 0)} incidents"


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
