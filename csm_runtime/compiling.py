"""torch.compile for the decode steps: one cache per engine, a quick second start, a progress bar."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("csm_runtime")


_OPTIONS: dict[str, Any] = {
    # Fuse multiply and add: 3 to 5 % on a GEMV here, and one rounding less per term.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Shapes and strides are the engine's own: checking 60 inputs in Python 32 times a frame is not needed.
    "size_asserts": False,
    # Likewise Dynamo's guards, 0.3 ms per call of the depth step. Every compiled copy is called with one signature only:
    # the engine makes new copies when a shape, dtype or device changes (Engine.bind), and runs in a fixed grad mode.
    "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
}


def compile_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Compile one step with a Dynamo cache of its own.

    Dynamo counts recompilations per code object. Two models, or two batch sizes, that share one function would eat into
    each other's limit of 8 and the ninth would silently run eagerly: each gets its own copy of the code object.
    """
    code = step.__code__.replace(co_name=f"{step.__name__}_{next(_serial)}")
    own = types.FunctionType(code, step.__globals__, code.co_name, step.__defaults__, step.__closure__)
    own.__kwdefaults__ = step.__kwdefaults__
    return torch.compile(own, fullgraph=True, dynamic=False, options=_OPTIONS)


_serial = itertools.count()


def cache_dir() -> Path:
    """Where this package remembers things between runs: ``CSM_KERNELS_CACHE`` or ``~/.cache/csm-kernels``."""
    root = os.environ.get("CSM_KERNELS_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "csm-kernels"


_patching = threading.Lock()


@contextlib.contextmanager
def remembered_isa_checks() -> Iterator[None]:
    """Let Inductor's instruction-set checks be answered from disk where an earlier process made them.

    Inductor compiles and loads a probe for each candidate (AMX, AVX-512, ...) in a subprocess that imports torch: 15 of
    the 17 seconds of a warm start here, in every process (torch 2.11, 2 cores, 2026-11-22). The answer depends on the
    probe, the processor, torch and Python, and these are the key. Where torch's internals look different, nothing is
    changed and the checks run.
    """
    try:
        from torch._inductor.cpu_vec_isa import VecISA
        from torch._inductor.cpu_vec_isa import _get_isa_dry_compile_fingerprint as probe_fingerprint

        stock = VecISA.check_build  # read again under the lock
    except Exception as error:  # private names of torch: absent means do without
        logger.debug("instruction-set checks are not remembered: %s", error)
        yield
        return
    path = cache_dir() / "isa-checks.json"
    machine = f"{torch.__version__} {sys.version} {_processor()}"
    known = _read_json(path)

    def check_build(self: Any, code: str) -> bool:
        flags = self._arch_flags
        # The fingerprint runs the compiler's --version, so a changed compiler is a new question.
        text = "\n".join((machine, str(self), flags, str(probe_fingerprint(flags)), code))
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in known:
            known[key] = bool(stock(self, code))
            _write_json(path, known)
        return known[key]

    with _patching:
        stock = VecISA.check_build
        VecISA.check_build = check_build
        try:
            yield
        finally:
            VecISA.check_build = stock


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform

        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _read_json(path: Path) -> dict[str, bool]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write_json(path: Path, data: dict[str, bool]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        part.write_text(json.dumps(data))
        part.replace(path)
    except OSError as error:
        logger.debug("cannot remember instruction-set checks in %s: %s", path, error)


class Progress:
    """A progress bar on stderr: tqdm's where it is installed, otherwise one line at the start and one at the end."""

    def __init__(self, total: int, title: str, enabled: bool) -> None:
        self._bar: Any = None
        self._title = title
        self._plain = False
        if not enabled:
            return
        try:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc=title, leave=False, file=sys.stderr)
        except ImportError:
            self._plain = True
            print(f"{title} ({total} parts) ...", file=sys.stderr, flush=True)

    def advance(self, name: str) -> None:
        """One part is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(name, refresh=False)
            self._bar.update(1)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        elif self._plain:
            print(f"{self._title} done", file=sys.stderr, flush=True)
