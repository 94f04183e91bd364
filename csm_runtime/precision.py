"""Which zone of the model is stored in which format.

A policy is an ordered list of (pattern, format) over named zones; the first match wins and what no rule matches is kept.
``keep`` is the stock tensor in its own dtype, ``fp32``, ``bf16`` and ``fp16`` are casts, ``int8`` and ``fp8`` have one
scale per row, ``int4`` one per group of 128 columns, ``int4:64`` and ``int4:32`` per smaller ones, and a group of
``int4:64:asymmetric`` has an offset as well. Weights only: activations, norms, softmax, rotary, the residual stream, logits
and sampling are fp32 and no zones.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ZONES = (
    "backbone.attention",
    "backbone.mlp",
    "backbone.head",
    "backbone.embedding",
    "depth.attention",
    "depth.mlp",
    "depth.projection",
    "depth.head",
    "depth.embedding",
    "kv",
    "codec",
)
"""``backbone.head`` is codebook 0's head. ``depth.head`` stands for the zones ``depth.head.K``, one for each codebook K
from 1 on: see :func:`zones_of`. ``kv`` is the KV cache of both stacks, ``codec`` the codec's weights."""

SAFE_ZONES = ("backbone.head", "codec")
"""Zones that only a rule with their own name lowers: a wrong codebook 0 is a wrong word, and the codec is the audio."""

_CASTS = ("keep", "fp32", "bf16", "fp16")
_ALIASES = {"int4:128": "int4", "int4:asymmetric": "int4:128:asymmetric"}
_INT4 = {"int4": (128, True)} | {f"int4:{g}{end}": (g, not end) for end in ("", ":asymmetric") for g in (32, 64, 128)}
FORMATS = (*_CASTS, "fp8", "int8", *_INT4, "int4:asymmetric")
"""``int4`` is ``int4:128``, ``int4:asymmetric`` is ``int4:128:asymmetric``."""

_SUPPORTED = {"kv": _CASTS, "codec": _CASTS}
"""What zones other than weight matrices can be stored in."""
_NOT_LOWERING = ("keep", "fp32")
_NEVER = ("norm", "softmax", "rotary", "rope", "residual", "sampling", "logits", "audio")
"""What people may look for among the zones."""
_MOST_CODEBOOKS = 256
_SCHEMA = 1

_NUMBERS = re.compile(r"(.*)\.([1-9]\d*(?:-[1-9]\d*)?(?:,[1-9]\d*(?:-[1-9]\d*)?)*)")
"""``depth.head.1-3,7``."""
_WIDE_BRACKET = re.compile(r"\[[^]]*(?:\d-\d\d|\d\d-\d|\d\d,|,\d\d)[^]]*\]")
"""``fnmatch`` reads ``[1-31]`` as one character: 1 to 3, or 1."""


def zones_of(codebooks: int) -> tuple[str, ...]:
    """Every zone of a model with this many codebooks, ``depth.head.1`` to ``depth.head.{codebooks - 1}`` one by one."""
    at = ZONES.index("depth.head")
    return (*ZONES[:at], *(f"depth.head.{k}" for k in range(1, codebooks)), *ZONES[at + 1 :])


def int4_layout(fmt: str) -> tuple[int, bool] | None:
    """Columns that share a scale, and whether groups are symmetric; None for formats other than int4."""
    return _INT4.get(_ALIASES.get(fmt, fmt))


def matches(pattern: str, zone: str) -> bool:
    """Whether a rule's pattern takes a zone in.

    Patterns are those of ``fnmatch``, and ``depth.head.8-12`` or ``depth.head.1-3,7`` for heads by number, both ends
    included. One that takes in ``depth.head`` takes all heads.
    """
    if not zone.startswith("depth.head."):
        return fnmatchcase(zone, pattern)
    if fnmatchcase(zone, pattern) or fnmatchcase("depth.head", pattern):
        return True
    prefix, ranges = _numbered(pattern)
    return int(zone.rpartition(".")[2]) in ranges and fnmatchcase("depth.head", prefix)


@functools.lru_cache(maxsize=256)
def _numbered(pattern: str) -> tuple[str, frozenset[int]]:
    """What stands before the numbers at a pattern's end, and the numbers; none where there are none."""
    found = _NUMBERS.fullmatch(pattern)
    if found is None:
        return "", frozenset()
    spans = [span.partition("-") for span in found[2].split(",")]
    most = _MOST_CODEBOOKS
    return found[1], frozenset(
        k for first, _, last in spans for k in range(int(first), min(int(last or first), most) + 1)
    )


@dataclass(frozen=True)
class PrecisionPolicy:
    """Ordered ``(zone pattern, format)`` rules; the first that matches a zone decides, ``keep`` if none does.

    Args:
        rules: zone patterns (``fnmatch``: ``*``, ``?``, ``[1-9]``; heads also by numbers: ``depth.head.8-12``,
            ``depth.head.1-3,7``) and formats.
        name: what reports call it.

    Raises:
        ValueError: a pattern that matches no zone, or only zones that rules before it decide; an unknown format, one that a
            zone cannot have, or a safe zone that would be lowered by a pattern that is not its own name.

    Example: ``PrecisionPolicy((("depth.head.1-3", "keep"), ("depth.mlp", "int4:64"), ("depth.*", "int8")))`` stores the
    depth decoder in int8, its MLPs in int4, leaves three of its heads and the backbone as they are.
    """

    rules: tuple[tuple[str, str], ...] = ()
    name: str = "custom"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"precision: name must be a string, got {self.name!r}")
        if not isinstance(self.rules, (tuple, list)) or not all(_is_rule(rule) for rule in self.rules):
            raise ValueError(f"precision: rules must be pairs of a zone pattern and a format, got {self.rules!r}")
        rules = tuple((pattern, _ALIASES.get(fmt, fmt)) for pattern, fmt in self.rules)
        object.__setattr__(self, "rules", rules)
        hits = [_zones_hit(pattern, fmt) for pattern, fmt in rules]
        for index, hit in enumerate(hits):
            self._check(index, [zone for zone in hit if self._decider(zone) == index])
        self._check_dead(hits)

    def _check(self, index: int, decided: list[str]) -> None:
        pattern, fmt = self.rules[index]
        for zone in decided:
            supported = _SUPPORTED.get(zone, FORMATS)
            if fmt not in supported:
                raise ValueError(
                    f"precision: pattern {pattern!r} gives zone {zone!r} the format {fmt!r}, which it cannot have; it "
                    f"supports {supported}; put a rule for {zone!r} before it"
                )
            if zone in SAFE_ZONES and fmt not in _NOT_LOWERING and pattern != zone:
                raise ValueError(
                    f"precision: pattern {pattern!r} would lower the safe zone {zone!r} to {fmt}; name the zone itself to "
                    f"insist, or put ({zone!r}, 'keep') before it"
                )

    def _check_dead(self, hits: list[list[str]]) -> None:
        """Raise ValueError for a rule that decides no zone because earlier ones take all of its zones."""
        for index, hit in enumerate(hits):
            deciders = sorted({decider for zone in hit if (decider := self._decider(zone)) is not None})
            if index in deciders:
                continue
            takers = " and ".join(f"rule {k + 1}, {self.rules[k]}," for k in deciders)
            raise ValueError(
                f"precision: rule {index + 1}, {self.rules[index]}, decides no zone: {takers} "
                f"{'takes' if len(deciders) == 1 else 'take'} all of them first; put it before, or leave it out"
            )

    def after(self, rules: tuple[tuple[str, str], ...], name: str) -> PrecisionPolicy:
        """The policy of these rules and, after them, of those of its own that still decide a zone."""
        decided, alive = set[str](), []
        for pattern, fmt in (*rules, *self.rules):
            hit = set(_zones_hit(pattern, fmt))
            if not hit <= decided:
                alive.append((pattern, fmt))
            decided |= hit
        return PrecisionPolicy(tuple(alive), name)

    def _decider(self, zone: str) -> int | None:
        """The number of the rule that decides a zone."""
        return next((index for index, (pattern, _) in enumerate(self.rules) if matches(pattern, zone)), None)

    def format_of(self, zone: str) -> str:
        """The format of one zone, such as ``depth.mlp`` or ``depth.head.7``; groups of 128 are plain ``int4``.

        Raises:
            ValueError: not one zone: a wrong name, or ``depth.head``, which is many.
        """
        if zone not in zones_of(_MOST_CODEBOOKS):
            raise ValueError(f"zone must be one of {ZONES}, heads by their codebook as 'depth.head.1', got {zone!r}")
        return next((fmt for pattern, fmt in self.rules if matches(pattern, zone)), "keep")

    def check_codebooks(self, codebooks: int) -> None:
        """Raise ValueError where a rule is about heads only that a model with this many codebooks does not have."""
        zones = zones_of(codebooks)
        for pattern, _ in self.rules:
            if not any(matches(pattern, zone) for zone in zones):
                raise ValueError(
                    f"precision: zone pattern {pattern!r} matches no zone of this model, whose depth decoder has heads "
                    f"depth.head.1 to depth.head.{codebooks - 1}"
                )

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; :meth:`from_dict` reads it."""
        rules = [{"zone": pattern, "format": fmt} for pattern, fmt in self.rules]
        return {"schema": _SCHEMA, "name": self.name, "rules": rules}

    @classmethod
    def from_dict(cls, data: Any) -> PrecisionPolicy:
        """The policy that :meth:`to_dict` made this of.

        Raises:
            ValueError: another schema, fields that are missing or unknown, or rules that are no policy.
        """
        _check_fields("a precision policy", data, ("schema", "name", "rules"))
        if type(data["schema"]) is not int or data["schema"] != _SCHEMA:
            raise ValueError(f"precision: schema must be {_SCHEMA}, got {data['schema']!r}")
        if not isinstance(data["rules"], list):
            raise ValueError(f"precision: rules must be a list, got {data['rules']!r}")
        for rule in data["rules"]:
            _check_fields("a rule", rule, ("zone", "format"))
        return cls(tuple((rule["zone"], rule["format"]) for rule in data["rules"]), data["name"])

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PrecisionPolicy:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: not JSON, or not a policy; names the file.
            OSError: the file cannot be read.
        """
        try:
            return cls.from_dict(strict_json(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def strict_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: no JSON (NaN and Infinity are none), a key that an object has twice, or too deep a nesting.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
        return out

    def constant(name: str) -> None:
        raise ValueError(f"not JSON: {name} is no number there")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=constant)
    except RecursionError:
        raise ValueError("not what it should be: nested too deep") from None


def _zones_hit(pattern: str, fmt: str) -> list[str]:
    """The zones that a rule's pattern matches.

    Raises:
        ValueError: none, or an unknown format.
    """
    if fmt not in FORMATS:
        raise ValueError(f"precision: unknown format {fmt!r} for zone pattern {pattern!r}; choose from {FORMATS}")
    if _WIDE_BRACKET.search(pattern):
        raise ValueError(
            f"precision: in zone pattern {pattern!r} brackets stand for one character, not for a number; write heads by "
            "number as 'depth.head.8-12' or 'depth.head.1-3,7'"
        )
    hit = [zone for zone in zones_of(_MOST_CODEBOOKS) if matches(pattern, zone)]
    if not hit:
        if any(word in pattern for word in _NEVER):
            raise ValueError(
                f"precision: {pattern!r} is no zone: norms, softmax, rotary, the residual stream, logits, sampling and "
                f"the audio are always fp32 and cannot be lowered; zones are {ZONES}"
            )
        raise ValueError(
            f"precision: zone pattern {pattern!r} matches no zone; zones are {ZONES}, and heads by number "
            "'depth.head.1', 'depth.head.8-12', 'depth.head.1-3,7'"
        )
    return hit


def _is_rule(rule: Any) -> bool:
    return isinstance(rule, (tuple, list)) and len(rule) == 2 and all(isinstance(part, str) for part in rule)


def _check_fields(what: str, data: Any, wanted: tuple[str, ...]) -> None:
    if not isinstance(data, dict) or set(data) != set(wanted):
        got = sorted(map(str, data)) if isinstance(data, dict) else repr(data)
        raise ValueError(f"precision: {what} must have the fields {wanted} and no others, got {got}")


_BUT_MLP = (("*.attention", "int8"), ("depth.projection", "int8"), ("depth.head", "int8"))
_INT8 = (*_BUT_MLP, ("*.mlp", "int8"))
_MATRICES_INT4 = (("backbone.attention", "int4"), ("backbone.mlp", "int4"), ("depth.*", "int4"))
_DEPTH_INT8 = (("depth.embedding", "keep"), ("depth.*", "int8"))

PRESETS = {
    "exact": PrecisionPolicy((), "exact"),
    "balanced": PrecisionPolicy(_DEPTH_INT8, "balanced"),
    "fast": PrecisionPolicy(_INT8, "fast"),
    "smallest": PrecisionPolicy((("*.mlp", "int4"), ("*.embedding", "int8"), *_BUT_MLP), "smallest"),
    "stock": PrecisionPolicy((), "stock"),
    "int8": PrecisionPolicy(_INT8, "int8"),
    "int4": PrecisionPolicy((("*.embedding", "int8"), *_MATRICES_INT4), "int4"),
}
"""By name. ``exact`` keeps every weight; ``balanced`` stores the depth decoder in int8 and keeps the backbone, so codebook 0
is drawn from the stock weights; ``fast`` stores all matrices but codebook 0's head in int8; ``smallest`` also the
embeddings, and the MLPs in int4; ``int4`` stores all matrices but codebook 0's head in int4 and the embeddings in int8. What
they cost: docs/precision.md. ``stock`` is ``exact`` and ``int8`` is ``fast`` under
their older names."""


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
