"""End to end: stock eager, stock with its static cache and torch.compile, and accelerated, interleaved in one process.

    python bench/e2e.py --size 1b --dtype bfloat16 --precision stock int8

Every variant is a model object of its own with the same seeded weights. Rounds are interleaved and medians reported,
because the bandwidth of a shared machine moves from minute to minute; it is measured in every round too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bandwidth import streaming_bandwidth

from csm_runtime import accelerate
from csm_runtime.demo import FrameClock
from csm_runtime.doctor import machine
from csm_runtime.small_model import build_small_csm
from csm_runtime.streaming import RowSound

FRAME_MS = 80.0
SIZES = {
    "tiny": {"layers": 2, "hidden": 256, "depth_layers": 2, "depth_hidden": 128, "codebooks": 8},
    "small": {},
}


def build(size: str, dtype: torch.dtype) -> Any:
    """A model of one size; ``1b`` has CSM-1B's real shapes and cheap random weights."""
    if size != "1b":
        return build_small_csm(0, dtype=dtype, **SIZES[size])
    from transformers import CsmConfig, CsmForConditionalGeneration
    from transformers.initialization import no_init_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = CsmForConditionalGeneration(CsmConfig())
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 20, generator=generator).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0 if "norm" in name else 0.0)
                continue
            flat, start = weight.view(-1), int(torch.randint(0, 1 << 19, (1,), generator=generator))
            for i in range(0, flat.numel(), 1 << 19):
                count = min(1 << 19, flat.numel() - i)
                flat[i : i + count] = block[start : start + count] * weight.shape[-1] ** -0.5
    return model.eval()


class Variant:
    """One way of running the model, and what its runs measured."""

    def __init__(self, name: str, model: Any, verify: bool = True) -> None:
        self.name, self.model, self.verify = name, model, verify
        self.checking: list[float] = []
        self.prefill: list[float] = []
        self.frames: list[float] = []
        self.depth: list[float] = []
        self.backbone: list[float] = []
        self.codec: list[float] = []
        self.codes: torch.Tensor | None = None

    def run(self, ids: torch.Tensor, frames: int) -> None:
        """One utterance, greedy; the codec is timed on its codes alone."""
        clock = FrameClock()
        accelerated = hasattr(self.model, "acceleration")
        if accelerated:
            metrics, guard = self.model.acceleration.metrics, self.model.acceleration.guard
            guard.config = replace(guard.config, verify=self.verify)
            metrics.reset_times()
        depth = [] if accelerated else _time_depth(self.model)
        self.codes = self.model.generate(
            ids, max_new_tokens=frames, do_sample=False, depth_decoder_do_sample=False, streamer=clock
        )
        self.prefill.append(clock.seconds[0])
        each = [b - a for a, b in zip(clock.seconds, clock.seconds[1:])]
        self.frames += each
        if accelerated:
            self.depth += metrics.times("depth")[1:]
            self.backbone += metrics.times("backbone")
            self.checking += metrics.times("guard")
        else:
            self.depth += depth[1:]
            self.backbone += [whole - part for whole, part in zip(each, depth[1:])]
            del self.model.depth_decoder.__dict__["generate"]
        start = time.perf_counter()
        with torch.no_grad():
            self.model.codec_model.decode(self.codes.clamp(max=2047).transpose(1, 2))
        self.codec.append((time.perf_counter() - start) / self.codes.shape[1])


def _time_depth(model: Any) -> list[float]:
    """Time every call of the stock depth decoder; undone after the run."""
    times: list[float] = []
    stock = model.depth_decoder.generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return stock(*args, **kwargs)
        finally:
            times.append(time.perf_counter() - start)

    model.depth_decoder.__dict__["generate"] = timed
    return times


def with_static_cache(model: Any) -> Any:
    """Stock's documented fast way: a static cache in both decoders, their forward compiled (on a CPU by asking)."""
    from transformers import CompileConfig

    for part in (model, model.depth_decoder):
        part.generation_config.cache_implementation = "static"
        compile_config = CompileConfig(fullgraph=False, dynamic=False, mode=None)
        compile_config._compile_all_devices = True
        part.generation_config.compile_config = compile_config
    return model


def start_times(args: argparse.Namespace, precision: str) -> dict[str, float]:
    """Seconds of ``accelerate()`` in a fresh process, with empty caches and again with filled ones."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "CSM_KERNELS_CACHE": f"{folder}/csm",
        }
        command = [sys.executable, __file__, "--start-only", "--size", args.size, "--dtype", args.dtype]
        for name in ("cold", "warm"):
            result = subprocess.run(
                [*command, "--precision", precision], env=environment, check=True, capture_output=True, text=True
            )
            seconds[name] = float(result.stdout.strip().splitlines()[-1])
    return seconds


def first_audio(stock: Any, models: dict[str, Any], seconds: float, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds until the first 80 ms of sound, behind a reference of ``seconds``, voice unknown and known; medians."""
    config, generator = stock.config, torch.Generator().manual_seed(2)
    samples = int(seconds * 12.5) * 1920
    frames = int(stock.codec_model.get_encoded_length(torch.tensor([samples])))
    text = torch.randint(0, 200, (60,), generator=generator).tolist()
    ids = [*text[:40], *[config.audio_token_id] * frames, config.audio_eos_token_id, *text[40:]]
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(
            1, len(ids), dtype=torch.long
        ),  # as the processor: inferred, it leaves the sound out
        "input_values": torch.randn(1, 1, samples, generator=generator).to(stock.dtype),
        "input_values_cutoffs": torch.tensor([[samples]]),
    }
    greedy = {"max_new_tokens": 1, "do_sample": False, "depth_decoder_do_sample": False}
    times: dict[str, list[float]] = {}
    add, most = RowSound.add, config.codec_config.codebook_size - 1
    RowSound.add = lambda self, codes: add(self, codes.clamp(max=most))  # random weights say more than the codec has
    try:
        for number in range(rounds + 1):
            start = time.perf_counter()
            codes = stock.generate(**inputs, **greedy)
            with torch.no_grad():
                stock.codec_model.decode(codes.clamp(max=most).transpose(1, 2))
            made = {"stock eager": time.perf_counter() - start}
            for name, model in models.items():
                model.acceleration.voices.clear()
                for known in ("unknown", "known"):
                    with model.acceleration.stream(**inputs, **greedy) as stream:
                        made[f"{name}, voice {known}"] = next(stream).made_after
            if number:  # the first round compiles
                for name, value in made.items():
                    times.setdefault(name, []).append(value * 1e3)
    finally:
        RowSound.add = add
    return {name: {"ms": statistics.median(values)} for name, values in times.items()}


def summary(variant: Variant, stock: Variant, bandwidth: float) -> dict[str, Any]:
    """Medians of one variant, and its ratio to stock in the same run."""
    frame = statistics.median(variant.frames)
    row: dict[str, Any] = {
        "variant": variant.name,
        "ms_per_frame": frame * 1e3,
        "frames_per_second": 1 / frame,
        "ratio_to_stock": statistics.median(stock.frames) / frame,
        "real_time_factor": (frame + statistics.median(variant.codec)) * 1e3 / FRAME_MS,
        "time_to_first_frame_ms": statistics.median(variant.prefill) * 1e3,
        "backbone_ms": statistics.median(variant.backbone) * 1e3,
        "depth_ms": statistics.median(variant.depth) * 1e3,
        "codec_ms_per_frame": statistics.median(variant.codec) * 1e3,
        "share_of_codes_equal_to_stock": _share_equal(variant.codes, stock.codes),
    }
    if hasattr(variant.model, "acceleration"):
        report = variant.model.acceleration.report()
        row |= {
            "mode": report.mode,
            "bytes_per_frame": report.bytes_per_frame,
            "gb_per_s": report.bytes_per_frame / frame / 1e9,
            "share_of_streaming_bandwidth": report.bytes_per_frame / frame / 1e9 / bandwidth,
            "copied_bytes": report.copied_bytes,
            "kv_bytes": report.kv_bytes,
            "notes": report.notes,
            "guard": guarded(variant, report.guard),
        }
    return row


def guarded(variant: Variant, guard: dict[str, Any]) -> dict[str, Any]:
    """What verification took of the time, and what it saw."""
    floors = guard["floors"].get("fast", {"seconds": {}})
    return {
        "verify": variant.verify,
        "budget": guard["budget"],
        "share_of_time": sum(variant.checking) / sum(variant.frames),
        "check_ms": {name: seconds * 1e3 for name, seconds in floors["seconds"].items()},
        "counters_of_all_runs": guard["counters"],
        "rung": guard["rung"],
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "1b"], default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--precision", nargs="+", default=["stock", "int8"])
    parser.add_argument("--frames", type=int, default=8, help="frames per run")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs of every variant")
    parser.add_argument("--prompt", type=int, default=100, help="text positions of the prompt")
    parser.add_argument(
        "--stock-frames", type=int, default=None, help="frames per run of stock eager, default --frames"
    )
    parser.add_argument(
        "--reference",
        type=float,
        default=10.0,
        help="seconds of the reference for the time to first audio, 0 to leave it out",
    )
    parser.add_argument("--guard-only", action="store_true", help="leave out the runs without verification")
    parser.add_argument("--no-static", action="store_true", help="leave out stock's static cache and compile")
    parser.add_argument("--no-starts", action="store_true", help="leave out the cold and warm start of fresh processes")
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON file, default bench/results/e2e-SIZE-DTYPE-DEVICE.json"
    )
    parser.add_argument("--start-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    if args.start_only:
        model = build(args.size, dtype)
        start = time.perf_counter()
        accelerate(model, precision=args.precision[0], progress=False)
        print(time.perf_counter() - start)
        return 0
    starts = {} if args.no_starts else {p: start_times(args, p) for p in args.precision}
    ids = torch.randint(0, 256, (1, args.prompt), generator=torch.Generator().manual_seed(1))
    stock = Variant("stock eager", build(args.size, dtype))
    memory = {"after stock": _rss()}
    variants = [stock]
    if not args.no_static:
        variants.append(Variant("stock static cache + compile", with_static_cache(build(args.size, dtype))))
    for precision in args.precision:
        model = accelerate(build(args.size, dtype), precision=precision)
        variants.append(Variant(f"accelerated, {precision}", model))
        if not args.guard_only:
            variants.append(Variant(f"accelerated, {precision}, guard off", model, verify=False))
        memory[f"after accelerated {precision}"] = _rss()
    for variant in variants:  # compiles what is compiled lazily
        variant.run(ids, 3)
    variants = [Variant(variant.name, variant.model, variant.verify) for variant in variants]
    stock = variants[0]
    bandwidths = []
    for number in range(args.rounds):
        for variant in variants:
            bandwidths.append(streaming_bandwidth(torch.device("cpu")))
            variant.run(ids, args.stock_frames or args.frames if variant is stock else args.frames)
            print(f"round {number + 1}, {variant.name}: {bandwidths[-1]:.1f} GB/s", file=sys.stderr, flush=True)
    bandwidth = statistics.median(bandwidths)
    heard = {v.name: v.model for v in variants if hasattr(v.model, "acceleration") and v.verify}
    first = first_audio(stock.model, heard, args.reference, args.rounds) if args.reference else {}
    rows = [summary(variant, stock, bandwidth) for variant in variants]
    result = {
        "machine": machine(),
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "start_only")},
        "streaming_gb_per_s": {"median": bandwidth, "min": min(bandwidths), "max": max(bandwidths)},
        "variants": rows,
        "first_audio": first,
        "accelerate_seconds": starts,
        "resident_bytes": memory | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024},
    }
    _show(result)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = args.out or Path(__file__).parent / "results" / f"e2e-{args.size}-{args.dtype}-{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, out.with_suffix(".png"))
    print(f"written to {out} and .png")
    return 0


def _share_equal(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Share of the codes of the frames both made that are the same; from the first that differs on, none need be."""
    frames = min(ours.shape[1], theirs.shape[1])
    return float((ours[:, :frames] == theirs[:, :frames]).float().mean())


def plot(result: dict[str, Any], path: Path) -> None:
    """Milliseconds per frame, part by part, and the 80 ms a frame lasts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["variants"]
    figure, axis = pyplot.subplots(figsize=(9, 0.45 * len(rows) + 1.8), layout="constrained")
    left = [0.0] * len(rows)
    for part, key in (("depth decoder", "depth_ms"), ("backbone", "backbone_ms"), ("codec", "codec_ms_per_frame")):
        values = [row[key] for row in rows]
        axis.barh([row["variant"] for row in rows], values, left=left, label=part)
        left = [a + b for a, b in zip(left, values)]
    axis.bar_label(axis.containers[-1], [f" {whole:.0f} ms" for whole in left], fontsize=8)
    axis.axvline(FRAME_MS, color="black", linestyle="--", label=f"a frame lasts {FRAME_MS:.0f} ms")
    axis.invert_yaxis()
    axis.margins(x=0.08)
    axis.set(xlabel="ms per frame, medians", title=f"CSM {result['settings']['size']} on {result['machine']['cpu']}")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _rss() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _show(result: dict[str, Any]) -> None:
    speed = result["streaming_gb_per_s"]
    print(f"streaming {speed['median']:.1f} GB/s ({speed['min']:.1f} to {speed['max']:.1f})")
    print(
        f"{'variant':<34} {'ms/frame':>9} {'ratio':>6} {'backbone':>9} {'depth':>7} {'codec':>6} {'first':>7} {'GB/s':>5} share"
    )
    for row in result["variants"]:
        share = f"{row['gb_per_s']:>5.1f} {row['share_of_streaming_bandwidth']:>4.0%}" if "gb_per_s" in row else ""
        print(
            f"{row['variant']:<34} {row['ms_per_frame']:>9.1f} {row['ratio_to_stock']:>6.2f} {row['backbone_ms']:>9.1f} "
            f"{row['depth_ms']:>7.1f} {row['codec_ms_per_frame']:>6.1f} {row['time_to_first_frame_ms']:>7.0f} {share}"
        )
    for row in result["variants"]:
        if row.get("guard", {}).get("verify"):
            guard, times = row["guard"], ", ".join(f"{k} {v:.0f}" for k, v in row["guard"]["check_ms"].items())
            print(f"{row['variant']}: checks took {guard['share_of_time']:.2%} of the time; ms per check: {times}")
    for name, value in result["first_audio"].items():
        print(f"first audio behind {result['settings']['reference']:.0f} s of reference, {name}: {value['ms']:.0f} ms")
    for precision, seconds in result["accelerate_seconds"].items():
        print(f"accelerate(precision={precision!r}): {seconds['cold']:.1f} s cold, {seconds['warm']:.1f} s warm")


if __name__ == "__main__":
    raise SystemExit(main())
