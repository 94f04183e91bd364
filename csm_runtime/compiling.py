"""torch.compile for decode steps and parallel passes: one cache per engine, a quick second start, a progress bar."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

logger = logging.getLogger("csm_runtime")


_INDUCTOR_OPTIONS: dict[str, Any] = {
    # Fuse multiply and add: 3 to 5 % on a GEMV here, and one rounding less per term.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Shapes and strides are the engine's own: checking 60 inputs in Python 32 times a frame is not needed.
    "size_asserts": False,
}
_DYNAMO_OPTIONS: dict[str, Any] = {
    # No guards: every compiled copy is called with one signature only. The engine makes new copies when a shape, dtype or
    # device changes (Engine.bind), and runs in a fixed grad mode.
    "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
}


def compile_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Compile one step: a callable with the step's own signature, for one set of shapes and positional arguments.

    Dynamo counts recompilations per code object. Two models, or two batch sizes, that share one function would eat into
    each other's limit of 8 and the ninth would silently run eagerly: each gets its own copy of the code object.
    """
    return CompiledStep(_own_code(step))


def compile_pass(function: Callable[..., Any], replaced: Counter[str]) -> Callable[..., Any]:
    """Compile a function over stock modules with the backend "csm": guarded as usual, for any batch and any length.

    What the backend replaces is added to ``replaced``.
    """
    from csm_runtime.backend import csm

    return torch.compile(_own_code(function), backend=functools.partial(csm, counts=replaced), dynamic=True)


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_serial)}")
    own = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


class CompiledStep:
    """A step whose compiled graph is called without Dynamo from the second call on.

    Dynamo's cache lookup and its bytecode take 0.3 ms of a depth step's 10 (60 tensors, 2 cores, 2026-11-22). The first
    call goes through Dynamo and shows which tensor of the arguments each input of the graph is, and which output of the
    graph each result is; later calls go straight to the graph. Where that cannot be told, every call goes through Dynamo.

    An argument that is no tensor, such as a stack of weights, is flattened once and known by its identity afterwards.
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        self._through_dynamo = torch.compile(
            step, fullgraph=True, dynamic=False, backend=self._backend, options=dict(_DYNAMO_OPTIONS)
        )
        self._graph: Callable[..., Any] | None = None
        self._seen: tuple[tuple[Any, ...], Any] | None = None
        self._inputs: list[tuple[int, int]] | None = None
        self._rebuild: Callable[[Any], Any] | None = None
        self._containers: dict[int, tuple[Any, list[Any]]] = {}

    def _backend(self, graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        from torch._inductor import compile as inductor_compile

        compiled = inductor_compile(graph, example, options=dict(_INDUCTOR_OPTIONS))

        def watched(*inputs: Any) -> Any:
            outputs = compiled(*inputs)
            self._seen = inputs, outputs
            return outputs

        self._graph = compiled
        return watched

    def __call__(self, *args: Any) -> Any:
        """Run the step."""
        if self._inputs is None or self._rebuild is None or self._graph is None:
            self._seen = None
            result = self._through_dynamo(*args)
            self._learn(args, result)
            return result
        leaves = self._flatten(args)
        return self._rebuild(self._graph(*[leaves[i][j] for i, j in self._inputs]))

    def _flatten(self, args: tuple[Any, ...]) -> list[list[Any]]:
        """The leaves of each argument; those of a container are kept with it, so that its id stays its own."""
        leaves = []
        for arg in args:
            if isinstance(arg, Tensor):
                leaves.append([arg])
                continue
            if id(arg) not in self._containers:
                if len(self._containers) >= _MAX_CONTAINERS:
                    self._containers.clear()
                self._containers[id(arg)] = arg, tree_leaves(arg)
            leaves.append(self._containers[id(arg)][1])
        return leaves

    def forget(self) -> None:
        """Let go of the containers seen so far and of the tensors in them."""
        self._containers.clear()

    def _learn(self, args: tuple[Any, ...], result: Any) -> None:
        if self._seen is None:
            return
        inputs, outputs = self._seen
        self._seen = None
        places: dict[int, list[tuple[int, int]]] = {}
        for i, leaves in enumerate(self._flatten(args)):
            for j, leaf in enumerate(leaves):
                places.setdefault(id(leaf), []).append((i, j))
        found = [places.get(id(value), []) for value in inputs]
        results, shape = tree_flatten(result)
        order = [[k for k, value in enumerate(outputs) if value is wanted] for wanted in results]
        if any(len(where) != 1 for where in found) or any(len(where) != 1 for where in order):
            logger.debug("a compiled step keeps going through Dynamo: its graph's arguments cannot be told apart")
            return
        picks = [where[0] for where in order]
        self._inputs = [where[0] for where in found]
        self._rebuild = lambda values: tree_unflatten([values[k] for k in picks], shape)


_serial = itertools.count()
_MAX_CONTAINERS = 256


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
    machine = f"{torch.__version__} {sys.version} {processor()}"
    known = read_json(path)

    def check_build(self: Any, code: str) -> bool:
        flags = self._arch_flags
        # The fingerprint runs the compiler's --version, so a changed compiler is a new question.
        text = "\n".join((machine, str(self), flags, str(probe_fingerprint(flags)), code))
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in known:
            known[key] = bool(stock(self, code))
            write_json(path, known)
        return known[key]

    with _patching:
        stock = VecISA.check_build
        VecISA.check_build = check_build
        try:
            yield
        finally:
            VecISA.check_build = stock


def processor() -> str:
    """The processor and what it can do, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform

        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote; nothing where there is no such file, or it is damaged."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Remember something between runs, where the folder can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        part.write_text(json.dumps(data))
        part.replace(path)
    except OSError as error:
        logger.debug("nothing is remembered in %s: %s", path, error)


class Progress:
    """A progress bar on stderr: tqdm's where it is installed, otherwise one line at the start and one at the end.

    ``total`` counts parts, or bytes with ``in_bytes``.
    """

    def __init__(self, total: int, title: str, enabled: bool, in_bytes: bool = False) -> None:
        self._bar: Any = None
        self._title = title
        self._plain = False
        if not enabled:
            return
        try:
            from tqdm.auto import tqdm

            unit: dict[str, Any] = {"unit": "B", "unit_scale": True} if in_bytes else {}
            self._bar = tqdm(total=total, desc=title, leave=False, file=sys.stderr, **unit)
        except ImportError:
            self._plain = True
            size = f"{total / 1e6:.0f} MB" if in_bytes else f"{total} parts"
            print(f"{title} ({size}) ...", file=sys.stderr, flush=True)

    def advance(self, name: str, amount: int = 1) -> None:
        """One part, or some bytes, are done."""
        if self._bar is not None:
            self._bar.set_postfix_str(name, refresh=False)
            self._bar.update(amount)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        elif self._plain:
            print(f"{self._title} done", file=sys.stderr, flush=True)
