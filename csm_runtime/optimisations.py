"""The optimisations of ``accelerate()``, each as a step that can be switched on alone, in the order of a rollout."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from csm_kernels import cpu
from csm_runtime.accelerate import OPTIONAL, Acceleration
from csm_runtime.precision import PRESETS, ZONES, PrecisionPolicy
from csm_runtime.sides import BATCH_FRAMES, FRAME, PROMPT, SOUND
from csm_runtime.weights import head_banks, spans

STATIC, COMPILED, NATIVE = "static buffers", "compiled step", "native kernels"

Options = dict[str, Any]
"""Keyword arguments of ``accelerate()``: ``mode``, ``precision``, ``without`` and ``codec_batch_frames``."""


@dataclass(frozen=True)
class Step:
    """One optimisation."""

    name: str
    change: Callable[[Options], Options]
    """The arguments with it, from those without."""
    unfit: Callable[[Any], str | None] = lambda model: None
    """Why a model, where it is, cannot have it; None where it can."""
    idle: Callable[[Acceleration], str | None] = lambda handle: None
    """Why it does nothing although it was switched on."""
    needs: str | None = STATIC
    """The step without which it means nothing."""
    timed: str = FRAME
    lowers: bool = False
    """Whether it stores weights in another format: only then may it cost fidelity."""
    founds: bool = False
    """Whether the others stand on it: its speed is judged with theirs, at the end."""
    stays: bool = False
    """Whether the memory it changes stays so: the side before is timed before it is switched on, not in turns."""


def base_options() -> Options:
    """Static buffers and nothing else."""
    return {"mode": "eager", "precision": PRESETS["exact"], "without": OPTIONAL}


def steps(policy: PrecisionPolicy, codebooks: int) -> list[Step]:
    """The list, in the order in which it is walked.

    Args:
        policy: whose zones that are not kept are the last steps, one by one, safe zones that it names included; the depth
            decoder's heads are one for each of their formats.
        codebooks: of the model.

    Raises:
        ValueError: a policy about heads that a model with this many codebooks does not have.
    """

    def with_it(name: str) -> Callable[[Options], Options]:
        return lambda options: {**options, "without": tuple(one for one in options["without"] if one != name)}

    def in_mode(mode: str) -> dict[str, Any]:
        return {"change": lambda options: {**options, "mode": mode}, "idle": lambda handle: _other_mode(handle, mode)}

    def no_cuda(model: Any) -> str | None:
        return None if model.device.type == "cuda" else f"CUDA only, and the model is on {model.device}"

    def stored(zones: str, fmt: str) -> Step:
        def change(options: Options) -> Options:
            # No two steps are about the same zone: no rule is in another's way.
            return {**options, "precision": PrecisionPolicy((*options["precision"].rules, (zones, fmt)), "rollout")}

        if zones == "codec":
            return Step(f"codec in {fmt}", change, idle=_no_other_codec, timed=SOUND, lowers=True)
        return Step(f"{zones} in {fmt}", change, lowers=True)

    return [
        Step(STATIC, lambda options: base_options(), needs=None, founds=True),
        Step(COMPILED, **in_mode("compile")),
        Step(
            "compiled prefill",
            with_it("compiled prefill"),
            idle=lambda handle: None if handle._passes.compiled else "the compiled layers do not work here",
            needs=COMPILED,
            timed=PROMPT,
        ),
        Step("paired positions", with_it("paired positions")),
        Step("context trimming", with_it("context trimming"), idle=_no_short_window, needs=COMPILED),
        Step(NATIVE, **in_mode("native"), unfit=_no_native),
        Step("huge pages", with_it("huge pages"), unfit=_no_huge_pages, idle=_no_pages_made, stays=True),
        Step(
            "codec batching",
            lambda options: {**options, "codec_batch_frames": BATCH_FRAMES},
            idle=_codec_fell_back,
            timed=SOUND,
        ),
        Step("graph", **in_mode("library"), unfit=no_cuda),
        Step("fused depth", **in_mode("graph"), unfit=no_cuda),
        *(stored(zones, fmt) for zones, fmt in _formats(policy, codebooks)),
    ]


def _formats(policy: PrecisionPolicy, codebooks: int) -> list[tuple[str, str]]:
    """Zones that are not kept, as a rule's pattern names them, and their formats; heads of one format are together."""
    policy.check_codebooks(codebooks)
    out: list[tuple[str, str]] = []
    for zone in ZONES:
        if zone != "depth.head":
            out.append((zone, policy.format_of(zone)))
            continue
        banks = head_banks(policy, codebooks)
        out += [(zone if len(banks) == 1 else f"{zone}.{spans(books)}", fmt) for fmt, books in banks.items()]
    return [(zones, fmt) for zones, fmt in out if fmt != "keep"]


def _other_mode(handle: Acceleration, wanted: str) -> str | None:
    unfused = handle._engine.unfused
    if handle.mode == wanted and (wanted != "graph" or unfused is None):
        return None
    return "; ".join(handle.notes) or f"frames run in mode {handle.mode!r}"


def _no_native(model: Any) -> str | None:
    return cpu.why_not() if model.device.type == "cpu" else f"CPU only, and the model is on {model.device}"


def _no_short_window(handle: Acceleration) -> str | None:
    if len(handle._engine.runner(1).windows) > 1:
        return None
    return f"a KV buffer of {handle.capacity} positions has no shorter window"


def _no_huge_pages(model: Any) -> str | None:
    if sys.platform.startswith("linux") and model.device.type == "cpu":
        return None
    return f"Linux on a CPU only, and the model is on {model.device}"


def _no_pages_made(handle: Acceleration) -> str | None:
    return None if handle._huge_bytes else "the system made no huge pages: small weights, or a kernel before 6.1"


def _codec_fell_back(handle: Acceleration) -> str | None:
    """Its sound is the stock codec's then, and says nothing of the step."""
    if handle.guard.codec_trusted:
        return None
    return "; ".join(["the stock codec took over", *handle.metrics.snapshot()["faults"]])


def _no_other_codec(handle: Acceleration) -> str | None:
    fell_back, codec = _codec_fell_back(handle), handle._codec
    if fell_back is None and codec is not None and not codec._converts():
        return f"the codec is in {codec.format} already"
    return fell_back
