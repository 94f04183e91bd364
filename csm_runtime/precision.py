"""Which zone of the model is stored in which format.

A policy is an ordered list of (pattern, format) over named zones; the first match wins. Formats so far: ``keep`` (the
stock tensor itself, no copy) and ``int8`` (weight only, one scale per row). Norms, softmax, rotary, the residual
stream, sampling and the codec are not zones: they cannot be lowered.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

ZONES = (
    "backbone.attention",
    "backbone.mlp",
    "backbone.head",
    "depth.attention",
    "depth.mlp",
    "depth.projection",
    "depth.head",
)
"""Every matrix the decode step reads whole. ``backbone.head`` is the codebook-0 head."""

FORMATS = ("keep", "int8")
SAFE_ZONES = ("backbone.head",)
"""Zones no preset lowers: a wrong codebook 0 is a wrong word."""


@dataclass(frozen=True)
class PrecisionPolicy:
    """Ordered ``(zone pattern, format)`` rules; the first that matches a zone decides, ``keep`` if none does.

    Example: ``PrecisionPolicy((("depth.*", "int8"),))`` stores the depth decoder in int8 and leaves the backbone.
    """

    rules: tuple[tuple[str, str], ...] = ()
    name: str = "custom"

    def __post_init__(self) -> None:
        for pattern, fmt in self.rules:
            if fmt not in FORMATS:
                raise ValueError(
                    f"precision: unknown format {fmt!r} for zone pattern {pattern!r}; choose from {FORMATS}"
                )
            hit = [zone for zone in ZONES if fnmatchcase(zone, pattern)]
            if not hit:
                raise ValueError(f"precision: zone pattern {pattern!r} matches no zone; zones are {ZONES}")
            lowered = [
                zone for zone in hit if zone in SAFE_ZONES and fmt != "keep" and self._decider(zone) == pattern != zone
            ]
            if lowered:
                raise ValueError(
                    f"precision: pattern {pattern!r} would lower the safe zone {lowered[0]!r} to {fmt}; name the zone "
                    f"itself to insist, or put ({lowered[0]!r}, 'keep') before it"
                )

    def _decider(self, zone: str) -> str | None:
        return next((pattern for pattern, _ in self.rules if fnmatchcase(zone, pattern)), None)

    def format_of(self, zone: str) -> str:
        """The format of one zone."""
        for pattern, fmt in self.rules:
            if fnmatchcase(zone, pattern):
                return fmt
        return "keep"


PRESETS = {
    "stock": PrecisionPolicy((), "stock"),
    "int8": PrecisionPolicy((("backbone.head", "keep"), ("*", "int8")), "int8"),
}


def resolve_policy(precision: str | PrecisionPolicy) -> PrecisionPolicy:
    """The policy a user named.

    Raises:
        ValueError: an unknown preset name, or something that is neither a name nor a policy.
    """
    if isinstance(precision, PrecisionPolicy):
        return precision
    if isinstance(precision, str) and precision in PRESETS:
        return PRESETS[precision]
    raise ValueError(f"precision must be one of {tuple(PRESETS)} or a PrecisionPolicy, got {precision!r}")
