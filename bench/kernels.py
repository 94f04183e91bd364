"""Microbenchmarks of every op at CSM-1B's shapes: time, bytes, share of the memory bandwidth measured in the same run.

    python bench/kernels.py                    all ops on the device there is
    python bench/kernels.py --ops gemv norm    some of them

Runs on pytest-benchmark: each case is one test, each round times our op and every rival, so that a machine whose speed
moves moves all of them, beginning with another one each time; a few calls in a row on a CPU, as in a frame. On CUDA
ours are the Triton kernels, timed by ``triton.testing`` with a cold L2; on a CPU they are the references under
torch.compile, as compiled frames run them, and for ``native`` the native kernels. An op whose tests fail gets no speed:
its tests run first. Rivals: the same in eager PyTorch, in torch.compile, PyTorch's own kernels of the format for ``native`` and
ggml's where its package is installed (:mod:`ggml_rival`), and, for norm, rope and swiglu on CUDA, liger-kernel.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ggml_rival
import pytest
import torch
from bandwidth import streaming_bandwidth
from torch import Tensor
from torch.nn import functional

from csm_kernels import cpu
from csm_kernels.attention import attention_step, attention_step_ref
from csm_kernels.embed import embed_frame, embed_frame_ref
from csm_kernels.gemv import gemv, gemv_streamed, gemv_swiglu
from csm_kernels.loss import fused_codebook_linear_cross_entropy
from csm_kernels.norm import rms_norm, rms_norm_ref
from csm_kernels.quant import QuantWeight, dequantize, quantize
from csm_kernels.rope import apply_rope, apply_rope_ref
from csm_kernels.rvq import rvq_decode, rvq_decode_ref
from csm_kernels.sampling import NoiseKey, SamplingParams, gumbel_noise_ref, sample, sample_bisected, sample_ref
from csm_kernels.swiglu import swiglu, swiglu_ref
from csm_runtime import hugepages
from csm_runtime.doctor import machine

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
OPS = ("norm", "rope", "swiglu", "gemv", "native", "attention", "embed", "sampling", "rvq", "loss")


class Case(NamedTuple):
    """One op at one shape. ``make()`` gives the variants, callables without arguments, ours first."""

    op: str
    name: str
    bytes: int
    flops: int
    make: Callable[[], dict[str, Callable[[], Any]]]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with a code object and a cache of its own."""
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(function, dynamic=False)


def variants(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    eager: Callable[..., Any],
    inputs: list[tuple[Any, ...]],
    **more: Callable[..., Any],
) -> dict[str, Callable[[], Any]]:
    """Ours, eager and compiled eager over a ring of inputs large enough to miss the caches.

    They go round it far apart from one another: what one has just read must not be in the cache for the next.
    """
    assert reference is not eager, "a race against itself"
    found = {"ours": ours if ON_GPU else compiled(reference), "eager": eager, "compile": compiled(eager), **more}
    starts = {name: i * len(inputs) // len(found) for i, name in enumerate(found)}
    return {name: _ring(function, inputs, starts[name]) for name, function in found.items()}


def _ring(function: Callable[..., Any], inputs: list[tuple[Any, ...]], start: int = 0) -> Callable[[], Any]:
    """The function on one input after the other, round and round."""
    turn = itertools.count(start)
    return lambda: function(*inputs[next(turn) % len(inputs)])


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def _liger(name: str) -> Any:
    """An op of liger-kernel, None where it is not installed or there is no GPU for it."""
    if not ON_GPU:
        return None
    try:
        from liger_kernel.transformers import functional as liger
    except ImportError:
        return None
    return getattr(liger, name, None)


def norm_case(rows: int, width: int) -> Case:
    def make() -> dict[str, Callable[[], Any]]:
        weight = normal(width)

        def eager(x: Tensor) -> Tensor:
            wide = x.float()
            return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

        liger = _liger("liger_rms_norm")
        more = {} if liger is None else {"liger": lambda x: liger(x, weight, 1e-5)}
        inputs = [(normal(rows, width),) for _ in range(4)]
        ours = lambda x: rms_norm(x, weight, 1e-5)  # noqa: E731
        return variants(ours, lambda x: rms_norm_ref(x, weight, 1e-5).to(x.dtype), eager, inputs, **more)

    return Case("norm", f"rms_norm {rows} x {width} bf16", 4 * rows * width + 2 * width, 4 * rows * width, make)


def rope_case(rows: int, heads: int, dim: int) -> Case:
    def make() -> dict[str, Callable[[], Any]]:
        angle = torch.randn(2048, dim // 2, device=DEVICE)
        cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
        positions = torch.arange(rows, device=DEVICE)

        def eager(x: Tensor) -> Tensor:
            half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
            return x * cos[positions][:, None].to(x.dtype) + half * sin[positions][:, None].to(x.dtype)

        liger = _liger("liger_rope")

        def rival(x: Tensor) -> Any:
            tables = (t[positions][None].to(x.dtype) for t in (cos, sin))
            heads_first = x.transpose(0, 1)[None]
            return liger(heads_first, heads_first[:, :1], *tables)

        more = {} if liger is None else {"liger": rival}
        inputs = [(normal(rows, heads, dim),) for _ in range(4)]
        reference = lambda x: apply_rope_ref(x, cos[positions], sin[positions]).to(x.dtype)  # noqa: E731
        return variants(lambda x: apply_rope(x, cos, sin, positions), reference, eager, inputs, **more)

    size = rows * heads * dim
    return Case("rope", f"rope {rows} x {heads} x {dim} bf16", 4 * size + 8 * rows * dim, 4 * size, make)


def swiglu_case(rows: int, width: int) -> Case:
    def make() -> dict[str, Callable[[], Any]]:
        liger = _liger("liger_swiglu")
        more = {} if liger is None else {"liger": liger}
        inputs = [(normal(rows, width), normal(rows, width)) for _ in range(4)]
        reference = lambda g, u: swiglu_ref(g, u).to(g.dtype)  # noqa: E731
        return variants(swiglu, reference, lambda g, u: functional.silu(g) * u, inputs, **more)

    return Case("swiglu", f"swiglu {rows} x {width} bf16", 6 * rows * width, 6 * rows * width, make)


def _weights(height: int, width: int, fmt: str) -> list[Any]:
    """Copies of a matrix in one format, enough of them to miss every cache: a server's may hold 480 MB."""
    count = max(2, -(-(256 << 20 if ON_GPU else 1 << 30) // _stored(height, width, fmt)))
    plain = normal(height, width) * width**-0.5
    if fmt in ("bf16", "fp32"):
        copies: list[Any] = [
            plain.to(torch.bfloat16 if fmt == "bf16" else torch.float32, copy=True) for _ in range(count)
        ]
    else:
        packed = quantize(plain, fmt)
        copies = [packed._replace(data=packed.data.clone(), scale=packed.scale.clone()) for _ in range(count)]
    hugepages.collapse([copy.data for copy in copies])  # as accelerate() does
    return copies


def _stored(height: int, width: int, fmt: str) -> int:
    """Bytes of one matrix: its numbers, and an fp32 scale for each row or a bf16 one for each group of 128."""
    numbers = {"fp32": 4 * width, "bf16": 2 * width, "int8": width, "fp8": width, "int4": -(-width // 128) * 64}[fmt]
    scales = {"fp32": 0, "bf16": 0, "int8": 4, "fp8": 4, "int4": -(-width // 128) * 2}[fmt]
    return height * (numbers + scales)


def gemv_case(rows: int, height: int, width: int, fmt: str) -> Case:
    size = _stored(height, width, fmt) + 4 * rows * (width + height)

    def make() -> dict[str, Callable[[], Any]]:
        weights = _weights(height, width, fmt)
        x = normal(rows, width, dtype=torch.float32)

        def eager(weight: Any) -> Tensor:
            if isinstance(weight, QuantWeight):
                return functional.linear(x, dequantize(weight))
            return functional.linear(x.to(weight.dtype), weight)

        return variants(lambda w: gemv(x, w), lambda w: gemv_streamed(x, w), eager, [(w,) for w in weights])

    return Case("gemv", f"gemv {rows} x {height} x {width} {fmt}", size, 2 * rows * height * width, make)


def native_case(rows: int, height: int, width: int, fmt: str) -> Case:
    """The native CPU kernel beside what a frame runs without it, and beside PyTorch's own kernels for the format."""

    def make() -> dict[str, Callable[[], Any]]:
        weights = _weights(height, width, fmt)
        x = normal(rows, width, dtype=torch.float32)
        narrow = x.bfloat16()
        ours = [(w,) for w in weights]
        made = {
            "ours": _ring(lambda w: cpu.gemv_cpu(x, w), ours),
            "compile": _ring(compiled(lambda w: gemv_streamed(x, w)), ours, len(ours) // 2),
        }
        if fmt == "fp32":
            made["F.linear"] = _ring(lambda w: functional.linear(x, w), ours, len(ours) // 4)
        else:
            made["F.linear bf16"] = _ring(lambda w: functional.linear(narrow, w), _copies(normal(height, width)))
        if fmt == "int8":
            pairs = [(w.data, w.scale.bfloat16()) for w in weights]
            made["_weight_int8pack_mm"] = _ring(lambda *w: torch._weight_int8pack_mm(narrow, *w), pairs, len(ours) // 4)
        if fmt == "int4" and height % 16 == 0:
            packed = torch._convert_weight_to_int4pack_for_cpu(
                torch.randint(0, 16, (height, width), dtype=torch.int32), 1
            )
            steps, op = normal(width // 128, height, 2), torch._weight_int4pack_mm_for_cpu
            made["_weight_int4pack_mm_for_cpu"] = _ring(lambda w: op(narrow, w, 128, steps), _copies(packed))
        ggml = ggml_rival.products(rows, height, width, fmt, len(ours), 4)
        if ggml is not None:
            made["ggml"] = ggml
        return made

    size = _stored(height, width, fmt) + 4 * rows * (width + height)
    return Case("native", f"native {rows} x {height} x {width} {fmt}", size, 2 * rows * height * width, make)


def _copies(matrix: Tensor) -> list[tuple[Tensor]]:
    copies = [matrix.clone() for _ in range(max(2, -(-(1 << 30) // matrix.nbytes)))]
    hugepages.collapse(copies)
    return [(copy,) for copy in copies]


def mlp_case(height: int, width: int, fmt: str) -> Case:
    size = 2 * _stored(height, width, fmt) + 4 * (width + height)

    def make() -> dict[str, Callable[[], Any]]:
        weights = _weights(height, width, fmt)
        x = normal(1, width, dtype=torch.float32)

        def eager(gate: Any, up: Any) -> Tensor:
            both = [dequantize(w) if isinstance(w, QuantWeight) else w for w in (gate, up)]
            narrow = x.to(both[0].dtype)
            return functional.silu(functional.linear(narrow, both[0])) * functional.linear(narrow, both[1])

        pairs = list(zip(weights[::2], weights[1::2]))
        reference = lambda g, u: swiglu_ref(gemv_streamed(x, g), gemv_streamed(x, u))  # noqa: E731
        return variants(lambda g, u: gemv_swiglu(x, g, u), reference, eager, pairs)

    return Case("gemv", f"gate and up 1 x {height} x {width} {fmt}", size, 4 * height * width, make)


def attention_case(heads: int, groups: int, dim: int, capacity: int, length: int) -> Case:
    def make() -> dict[str, Callable[[], Any]]:
        lengths = torch.full((1,), length, device=DEVICE)
        bias = torch.zeros(1, capacity, device=DEVICE).masked_fill(
            torch.arange(capacity, device=DEVICE) >= length, -1e30
        )
        q = normal(1, heads, dim, dtype=torch.float32)
        caches = [(normal(1, groups, capacity, dim), normal(1, groups, capacity, dim)) for _ in range(16)]

        def eager(k: Tensor, v: Tensor) -> Tensor:
            mask = bias[:, None, None].to(k.dtype)
            query = q[:, :, None].to(k.dtype)
            return functional.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=True)

        ours = lambda k, v: attention_step(q, k, v, lengths)  # noqa: E731
        return variants(ours, lambda k, v: attention_step_ref(q, k, v, bias), eager, caches)

    name = f"attention {heads}/{groups} x {dim}, {length} of {capacity} bf16"
    return Case("attention", name, 4 * groups * length * dim, 4 * heads * length * dim, make)


def embed_case(width: int) -> Case:
    def make() -> dict[str, Callable[[], Any]]:
        table = normal(32 * 2051, width)
        codes = [(torch.randint(0, 2051, (1, 32), device=DEVICE),) for _ in range(16)]
        offsets = torch.arange(32, device=DEVICE) * 2051
        reference = lambda c: embed_frame_ref(c, table, 2051).to(table.dtype)  # noqa: E731
        return variants(lambda c: embed_frame(c, table, 2051), reference, lambda c: table[c + offsets].sum(1), codes)

    return Case("embed", f"embed 32 codes x {width} bf16", 2 * 33 * width, 32 * width, make)


def sampling_case(vocab: int, top_k: int, top_p: float) -> Case:
    def make() -> dict[str, Callable[[], Any]]:
        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((1,), value, dtype=dtype, device=DEVICE)

        params = SamplingParams(
            full(0.9, torch.float32), full(top_k, torch.int64), full(top_p, torch.float32), full(1, torch.bool)
        )
        key = NoiseKey(*(full(value, torch.int64) for value in (7, 0, 3)))
        codebook = full(5, torch.int64)
        rows = [(normal(1, vocab, dtype=torch.float32) * 3,) for _ in range(16)]

        def stock(logits: Tensor) -> Tensor:
            """What transformers' warpers and multinomial do."""
            scores = logits / 0.9
            scores = scores.masked_fill(scores < torch.topk(scores, top_k).values[..., -1:], float("-inf"))
            return torch.multinomial(torch.softmax(scores, -1), 1)

        reference = lambda l: sample_bisected(l, params, gumbel_noise_ref(key, codebook, vocab))  # noqa: E731
        sorted_ = compiled(lambda l: sample_ref(l, params, gumbel_noise_ref(key, codebook, vocab)))
        return variants(lambda l: sample(l, params, key, codebook), reference, stock, rows, **{"with a sort": sorted_})

    return Case("sampling", f"sample {vocab}, top-k {top_k}, top-p {top_p}", 4 * vocab, 100 * vocab, make)


def rvq_case(frames: int) -> Case:
    def make() -> dict[str, Callable[[], Any]]:
        books = normal(32, 2048, 256, dtype=torch.float32)
        first, rest = (normal(512, 256, dtype=torch.float32) for _ in range(2))
        codes = [(torch.randint(0, 2048, (1, 32, frames), device=DEVICE),) for _ in range(8)]

        def eager(c: Tensor) -> Tensor:
            vectors = torch.stack([functional.embedding(c[:, k], books[k]) for k in range(32)], 1)
            both = (functional.linear(vectors[:, 0], first), functional.linear(vectors[:, 1:].sum(1), rest))
            return (both[0] + both[1]).transpose(1, 2)

        reference = lambda c: rvq_decode_ref(c, books, first, rest)  # noqa: E731
        return variants(lambda c: rvq_decode(c, books, first, rest), reference, eager, codes)

    size = 4 * (32 * 256 * frames + 2 * 512 * 256 + 512 * frames)
    return Case("rvq", f"rvq 32 codes x {frames} frames fp32", size, 2 * 2 * 512 * 256 * frames, make)


def loss_case(rows: int, width: int, dtype: torch.dtype) -> Case:
    """Forward and backward of all heads' losses; the bound reads states and matrices twice and writes both gradients."""
    books, vocab = 31, 2051

    def make() -> dict[str, Callable[[], Any]]:
        with torch.inference_mode(False):  # what autograd is to use must not be made in it
            hidden = normal(rows, books, width, dtype=dtype).requires_grad_()
            weight = (normal(books, width, vocab, dtype=dtype) / width**0.5).requires_grad_()
            targets = torch.randint(vocab, (rows, books), device=DEVICE)

        def stock(x: Tensor, w: Tensor) -> Tensor:
            """``CsmCodebooksHead`` of transformers and its loss, as a sum."""
            picked = w[torch.arange(books, device=DEVICE)]
            logits = torch.stack([functional.linear(x[:, k], picked[k].T) for k in range(books)], dim=1)
            return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")

        def both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
            def run() -> Any:
                with torch.inference_mode(False), torch.enable_grad():
                    return torch.autograd.grad(function(hidden, weight), (hidden, weight))

            return run

        ours = both(lambda x, w: fused_codebook_linear_cross_entropy(x, w, targets).loss)
        return {"ours": ours, "eager": both(stock), "compile": both(compiled(stock))}

    size = 3 * dtype.itemsize * books * width * (rows + vocab)
    name = f"loss {rows} x {books} x {width} x {vocab} {'bf16' if dtype == torch.bfloat16 else 'fp32'}, both ways"
    return Case("loss", name, size, 8 * rows * books * width * vocab, make)


NATIVE_SHAPES = ((1, 8192, 1024), (1, 1024, 8192), (1, 2048, 2048), (1, 2051, 1024), (2, 8192, 1024), (8, 8192, 1024))

CASES = [
    norm_case(1, 2048),
    norm_case(512, 2048),
    rope_case(1, 32, 64),
    rope_case(512, 32, 64),
    swiglu_case(1, 8192),
    swiglu_case(512, 8192),
    *(mlp_case(8192, 1024, fmt) for fmt in ("bf16", "int8", "fp8", "int4") if ON_GPU or fmt in ("bf16", "int8")),
    *(gemv_case(1, 1024, 8192, fmt) for fmt in ("bf16", "int8", "fp8", "int4") if ON_GPU or fmt in ("bf16", "int8")),
    gemv_case(1, 2051, 1024, "bf16"),
    gemv_case(1, 2048, 2048, "bf16"),
    gemv_case(8, 1024, 8192, "bf16"),
    *(
        native_case(*shape, fmt)
        for shape in NATIVE_SHAPES
        for fmt in ("fp32", "bf16", "int8", "fp8", "int4")
        if not ON_GPU and cpu.why_not() is None
    ),
    attention_case(32, 8, 64, 2048, 512),
    attention_case(8, 2, 128, 32, 32),
    embed_case(2048),
    sampling_case(2051, 50, 1.0),
    rvq_case(1),
    rvq_case(125),
    loss_case(128, 1024, torch.bfloat16) if ON_GPU else loss_case(16, 256, torch.float32),
]


CALLS = 16
"""Calls in a row per timing on a CPU, as in a frame."""
_REST, _WARM = 0.02, 0.01
"""Seconds before each timing on a CPU. PyTorch's threads spin for 8 ms after a call, beside whoever comes next; and a
processor that has slept is slow for some milliseconds, which nobody is within a frame: calls of its own come first."""


def _once(function: Callable[[], Any]) -> float:
    """Seconds of one call: by CUDA events on a cold L2, or by the wall clock."""
    if ON_GPU:
        from triton.testing import do_bench

        return float(do_bench(function, warmup=5, rep=20, return_mode="median")) / 1e3
    start = time.perf_counter()
    for _ in range(CALLS // getattr(function, "products", 1)):
        function()
    return (time.perf_counter() - start) / CALLS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_speed(case: Case, benchmark: Any) -> None:
    """Time one case; what it found is in the benchmark's ``extra_info``."""
    chosen = os.environ.get("CSM_BENCH_OPS")
    if chosen and case.op not in chosen.split():
        pytest.skip("not asked for")
    rounds = 15 if ON_GPU else 7 if case.op == "loss" else 25  # the stock head takes seconds
    with torch.inference_mode():
        made = case.make()
        for function in made.values():
            for _ in range(3):
                function()
        times: dict[str, list[float]] = {name: [] for name in made}
        speeds = [streaming_bandwidth(DEVICE)]
        turns = itertools.count()

        def race() -> None:
            """Time each once, by the same clock, after a call of its own; another one begins every time."""
            names, first = list(made), next(turns)
            for i in range(len(names)):
                name = names[(first + i) % len(names)]
                if not ON_GPU:
                    time.sleep(_REST)
                until = time.perf_counter() + (0.0 if ON_GPU else _WARM)
                made[name]()
                while time.perf_counter() < until:
                    made[name]()
                times[name].append(_once(made[name]))

        benchmark.pedantic(race, rounds=rounds, iterations=1)
        speeds.append(streaming_bandwidth(DEVICE))
    benchmark.extra_info.update(
        op=case.op,
        case=case.name,
        bytes=case.bytes,
        flops=case.flops,
        bandwidth=statistics.median(speeds) * 1e9,
        seconds={name: statistics.median(found) for name, found in times.items()},
    )


def green(op: str) -> bool:
    """Whether the op's own tests pass here: on the GPU, or under Triton's interpreter."""
    environment = os.environ | ({} if ON_GPU else {"TRITON_INTERPRET": "1"})
    tests = [ROOT / "tests" / "test_native.py" if op == "native" else ROOT / "tests" / "kernels" / f"test_{op}.py"]
    if op == "native":
        environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:benchmark", *map(str, tests)]
    return subprocess.run(command, check=False, env=environment, cwd=ROOT, capture_output=True).returncode == 0


def row(info: dict[str, Any]) -> dict[str, Any]:
    """One line of the result."""
    seconds = info["seconds"]
    ours = seconds["ours"]
    return {
        "op": info["op"],
        "case": info["case"],
        "bytes": info["bytes"],
        "flops": info["flops"],
        "us": ours * 1e6,
        "gb_per_s": info["bytes"] / ours / 1e9,
        "share_of_bandwidth": info["bytes"] / ours / info["bandwidth"],
        "gflop_per_s": info["flops"] / ours / 1e9,
        "us_of": {name: value * 1e6 for name, value in seconds.items() if name != "ours"},
        "speed_up_over": {name: value / ours for name, value in seconds.items() if name != "ours"},
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rivals = sorted({name for line in result["rows"] for name in line["us_of"]})
    head = ["op", "bytes", "us", "GB/s", "share", *(f"over {name}" for name in rivals)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in result["rows"]:
        ratios = [f"{line['speed_up_over'][n]:.2f}x" if n in line["speed_up_over"] else "" for n in rivals]
        figures = [
            f"{line['bytes']:,}",
            f"{line['us']:.1f}",
            f"{line['gb_per_s']:.1f}",
            f"{line['share_of_bandwidth']:.0%}",
        ]
        lines.append("| " + " | ".join([line["case"], *figures, *ratios]) + " |")
    lines += [f"| {op}: tests fail, no speed given |" + " |" * (len(head) - 1) for op in result["red"]]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Roofline: what each case reaches against arithmetic intensity under the measured bandwidth, and its share of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    colours = {op: f"C{i}" for i, op in enumerate(OPS)}
    figure, (roof, bars) = pyplot.subplots(1, 2, figsize=(13, 0.26 * len(rows) + 2.5), layout="constrained")
    intensity = [line["flops"] / line["bytes"] for line in rows]
    for op in dict.fromkeys(line["op"] for line in rows):
        points = [(x, line["gflop_per_s"]) for x, line in zip(intensity, rows) if line["op"] == op]
        roof.scatter(*zip(*points), label=op, color=colours[op], zorder=3)
    ends = [min(intensity) / 2, max(intensity) * 2]
    speed = result["bandwidth_gb_per_s"]
    roof.plot(ends, [speed * x for x in ends], color="black", label=f"memory, {speed:.0f} GB/s measured")
    roof.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s", title="roofline")
    roof.grid(alpha=0.3)
    roof.legend(fontsize=8)
    bars.barh([line["case"] for line in rows], [100 * line["share_of_bandwidth"] for line in rows])
    for patch, line in zip(bars.patches, rows):
        patch.set_color(colours[line["op"]])
    bars.axvline(100, color="black")
    bars.invert_yaxis()
    bars.tick_params(axis="y", labelsize=8)
    bars.set(xlabel="% of the bandwidth measured beside it", title="share of the memory bandwidth")
    figure.suptitle(result["device"])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--out", type=Path, default=None, help="folder of the results, default bench/results")
    args = parser.parse_args(argv)
    asked = [op for op in OPS if op in args.ops]
    passing = [op for op in asked if green(op)]
    for op in asked:
        print(f"{op}: tests {'pass' if op in passing else 'FAIL, no speed will be given'}", file=sys.stderr, flush=True)
    infos: list[dict[str, Any]] = []
    if passing:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "benchmark.json"
            os.environ["CSM_BENCH_OPS"] = " ".join(passing)
            command = [__file__, "-q", "-p", "no:cacheprovider", f"--benchmark-json={found}", "--benchmark-quiet"]
            status = pytest.main([*command, f"--rootdir={ROOT}"])
            if status != 0:
                return int(status)
            infos = [entry["extra_info"] for entry in json.loads(found.read_text())["benchmarks"]]
    device = torch.cuda.get_device_name() if ON_GPU else "cpu"
    result = {
        "machine": machine(),
        "device": f"{device}, {'Triton kernels' if ON_GPU else 'compiled references; Triton kernels not yet run on a GPU'}",
        "bandwidth_gb_per_s": statistics.median([i["bandwidth"] for i in infos]) / 1e9 if infos else None,
        "red": [op for op in asked if op not in passing],
        "rows": [row(info) for info in infos],
    }
    lines = table(result)
    print(lines)
    folder = args.out or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    which = "" if len(asked) == len(OPS) else "-".join(asked) + "-"  # some ops do not overwrite the result of all
    stem = folder / f"kernels-{which}{device.lower().replace(' ', '-')}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    note = (
        f"{result['device']}; {result['bandwidth_gb_per_s']:.1f} GB/s streaming, median of the run\n\n" if infos else ""
    )
    stem.with_suffix(".md").write_text(f"{note}{lines}\n")
    if infos:
        plot(result, stem.with_suffix(".png"))
    print(f"written to {stem}.json, .md and .png")
    return 1 if result["red"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
