"""The optimisations of ``accelerate()``, each as a step that can be switched on alone, in the order of a rollout."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from csm_runtime import tuning
from csm_runtime.accelerate import OPTIONAL, Acceleration
from csm_runtime.precision import PRESETS, PrecisionPolicy
from csm_runtime.sides import BATCH_FRAMES, FRAME, PROMPT, SOUND

STATIC, COMPILED = "static buffers", "compiled step"

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
    """Whether it stores weights in fewer bits: only then may it cost fidelity."""
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
        policy: whose lowered zones are the last steps, one by one.
        codebooks: of the model.

    Raises:
        ValueError: a policy that gives the depth decoder's heads several formats.
    """

    def with_it(name: str) -> Callable[[Options], Options]:
        return lambda options: {**options, "without": tuple(one for one in options["without"] if one != name)}

    def in_mode(mode: str) -> dict[str, Any]:
        return {"change": lambda options: {**options, "mode": mode}, "idle": lambda handle: _other_mode(handle, mode)}

    def no_cuda(model: Any) -> str | None:
        return None if model.device.type == "cuda" else f"CUDA only, and the model is on {model.device}"

    def lowered(zone: str, fmt: str) -> Callable[[Options], Options]:
        def change(options: Options) -> Options:
            formats = tuning.formats_of(options["precision"], codebooks)
            return {**options, "precision": tuning.policy_of({**formats, zone: fmt}, "rollout")}

        return change

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
        Step("huge pages", with_it("huge pages"), unfit=_no_huge_pages, idle=_no_pages_made, stays=True),
        Step(
            "codec batching",
            lambda options: {**options, "codec_batch_frames": BATCH_FRAMES},
            timed=SOUND,
        ),
        Step("graph", **in_mode("library"), unfit=no_cuda),
        Step("fused depth", **in_mode("graph"), unfit=no_cuda),
        *(
            Step(f"{zone} in {fmt}", lowered(zone, fmt), lowers=True)
            for zone, fmt in tuning.formats_of(policy, codebooks).items()
        ),
    ]


def _other_mode(handle: Acceleration, wanted: str) -> str | None:
    unfused = handle._engine.unfused
    if handle.mode == wanted and (wanted != "graph" or unfused is None):
        return None
    return "; ".join(handle.notes) or f"frames run in mode {handle.mode!r}"


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
