"""Training steps: stock at all frames, stock at its own ratio of 1/16, and accelerated, interleaved in one process.

    python bench/train.py                    a CPU: small shapes, fp32, one thread, CPU time
    python bench/train.py --profile          where the time goes as well

A step is forward and backward over the same codes, labels and weights; no optimizer, which is the same for all. On a CPU the
time is the process's CPU time (minimum and median of ``--rounds``), for the wall time of a shared machine says little. Saved
memory is what autograd keeps for the backward: unique storages that are no parameters. Peak memory is measured in a process
of its own. On CUDA: CSM-1B's shapes in bf16, wall time by events, the loss op alone against its traffic bound, and
liger-kernel's fused linear cross-entropy per head; not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from csm_kernels import fused_codebook_linear_cross_entropy
from csm_kernels.frames import sample_frames
from csm_runtime import accelerate
from csm_runtime.doctor import machine
from csm_runtime.training import CsmTrainingConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
FRACTION = 1 / 16
IGNORED = -100
VARIANTS = (
    "stock, all frames",
    "stock, 1/16",
    "ours, all frames",
    "ours, 1/16",
    "liger per head, 1/16",
    "backbone alone",
)
BARS = (  # at the largest shape: what, at least how many times, of whom
    ("seconds", 7.0, "stock, all frames"),
    ("saved_bytes", 8.0, "stock, all frames"),
    ("seconds", 1.3, "stock, 1/16"),
)


def build() -> Any:
    """A stock model: CSM-1B's shapes on CUDA, on a CPU the small ones."""
    from transformers import CsmConfig, CsmDepthDecoderConfig, CsmForConditionalGeneration, MimiConfig

    codec = MimiConfig(hidden_size=64, num_filters=8, num_hidden_layers=1, num_attention_heads=4, upsample_groups=64)
    sizes: dict[str, Any] = {"text_vocab_size": 512, "codec_config": codec}
    if not ON_GPU:
        depth = CsmDepthDecoderConfig(
            backbone_hidden_size=256,
            hidden_size=128,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
        )
        sizes |= {"depth_decoder_config": depth, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    torch.manual_seed(0)
    model = CsmForConditionalGeneration(CsmConfig(**sizes)).to(DEVICE, torch.bfloat16 if ON_GPU else torch.float32)
    with torch.no_grad():  # not zero, as transformers leaves it
        head = model.depth_decoder.codebooks_head.weight
        head.normal_(std=head.shape[1] ** -0.5)
    return model.train()


class Steps:
    """The steps of every variant over one model and one batch ``[B, S]`` of frames."""

    def __init__(self, model: Any, batch: int, frames: int, inputs: str) -> None:
        self.model = model
        config = model.config
        generator = torch.Generator().manual_seed(1)
        codes = torch.randint(0, 2048, (batch, frames, config.num_codebooks), generator=generator).to(DEVICE)
        self.labels = codes.clone()
        self.labels[:, 0] = IGNORED  # no state predicts the first; stock would take the last position's
        trained = torch.ones(batch, frames, dtype=torch.bool, device=DEVICE)
        trained[:, 0] = False
        self.rows = CsmTrainingConfig(depth_fraction=FRACTION).rows(int(trained.sum()))
        self.index = sample_frames(trained, self.rows, seed=0).index
        self.few = self.labels.clone()
        left_out = trained.flatten().clone()
        left_out[self.index] = False
        self.few.flatten(0, 1)[left_out, 1:] = IGNORED
        if inputs == "codes":
            self.inputs = {"input_ids": codes}
        else:
            with torch.no_grad():
                self.inputs = {"inputs_embeds": model.backbone_model.embed_tokens(codes)}

    def forward(self, variant: str) -> Tensor:
        """The loss."""
        if variant == "backbone alone":
            states = self.model.backbone_model(**self.inputs, use_cache=False)[0]
            logits = self.model.lm_head(states[:, :-1]).float()
            return functional.cross_entropy(logits.flatten(0, 1), self.labels[:, 1:, 0].flatten())
        if variant == "liger per head, 1/16":
            return self._liger()
        labels = self.few if variant == "stock, 1/16" else self.labels
        more = {"depth_index": self.index} if variant == "ours, 1/16" else {}
        return self.model(**self.inputs, labels=labels, **more).loss

    def _liger(self) -> Tensor:
        """Stock's modules, liger-kernel's fused linear cross-entropy for every head."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        model, loss = self.model, LigerFusedLinearCrossEntropyLoss()
        states = model.backbone_model(**self.inputs, use_cache=False)[0]
        first = loss(model.lm_head.weight, states[:, :-1].flatten(0, 1), self.labels[:, 1:, 0].flatten())
        codes = self.labels.flatten(0, 1)[self.index]
        depth = model.depth_decoder
        hidden = depth.model(
            input_ids=functional.pad(codes[:, :-1], (1, 0)),
            backbone_last_hidden_state=states.flatten(0, 1)[self.index - 1],
            use_cache=False,
        )[0][:, 1:]
        heads = depth.codebooks_head.weight
        each = [
            loss(w.t().contiguous(), hidden[:, k].contiguous(), codes[:, k + 1]) for k, w in enumerate(heads.unbind())
        ]
        return first + torch.stack(each).mean()

    def run(self, variant: str) -> tuple[float, float]:
        """One step: seconds (of the CPU, or of the GPU) and the loss."""
        accelerated = variant.startswith("ours")
        if accelerated:
            fraction = 1.0 if "all" in variant else FRACTION
            accelerate(self.model, training=CsmTrainingConfig(depth_fraction=fraction))
        self.model.zero_grad(set_to_none=True)
        try:
            if ON_GPU:
                torch.cuda.synchronize()
            start = time.perf_counter() if ON_GPU else time.process_time()
            loss = self.forward(variant)
            loss.backward()
            if ON_GPU:
                torch.cuda.synchronize()
            seconds = (time.perf_counter() if ON_GPU else time.process_time()) - start
        finally:
            if accelerated:
                self.model.training_acceleration.restore()
        return seconds, float(loss.detach())

    def saved_bytes(self, variant: str) -> int:
        """Bytes of the unique storages autograd keeps that are no parameters."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        found: dict[int, int] = {}
        alive = []  # a storage freed and given out again would be counted once

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
                alive.append(storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.run(variant)
        return sum(found.values())


def peak_bytes(variant: str, shape: str, inputs: str) -> int:
    """Peak memory of a step over what was there before, gradients included."""
    if ON_GPU:
        steps = Steps(build(), *_shape(shape), inputs)
        steps.run(variant)
        steps.model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps.run(variant)
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, __file__, "--peak-only", variant, "--shapes", shape, "--inputs", inputs]
    # What is freed goes back to the system at once, so that the high-water mark is of memory in use.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(result.stdout.split()[-1])


def _own_peak(variant: str, shape: str, inputs: str) -> int:
    """In the process made for it: high-water mark over the memory resident before."""
    model = build()
    Steps(model, 1, 32, inputs).run(variant)  # libraries load
    steps = Steps(model, *_shape(shape), inputs)
    model.zero_grad(set_to_none=True)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    steps.run(variant)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def profile(steps: Steps, variant: str, count: int = 8) -> list[dict[str, Any]]:
    """The operators that take most of a step's own time."""
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if ON_GPU else [])
    with torch.profiler.profile(activities=activities) as recorded:
        steps.run(variant)
    key = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    rows = sorted(recorded.key_averages(), key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows)
    return [
        {"op": r.key, "ms": getattr(r, key) / 1e3, "share": getattr(r, key) / total, "calls": r.count}
        for r in rows[:count]
    ]


def loss_alone(rows: int) -> dict[str, float]:
    """On CUDA: the loss op, forward and backward, against the time its compulsory traffic takes."""
    from bandwidth import streaming_bandwidth
    from triton.testing import do_bench

    books, width, vocab = 31, 1024, 2051
    hidden = torch.randn(rows, books, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(books, width, vocab, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, vocab, (rows, books), device=DEVICE)

    def both() -> None:
        fused_codebook_linear_cross_entropy(hidden, weight, targets).loss.backward()

    # Each input is read in the forward and in the backward, each gradient written once.
    traffic = 3 * (hidden.nbytes + weight.nbytes)
    seconds = do_bench(both, grad_to_none=[hidden, weight]) / 1e3
    bound = traffic / streaming_bandwidth(DEVICE) / 1e9
    return {
        "rows": rows,
        "seconds": seconds,
        "bytes": traffic,
        "bound_seconds": bound,
        "share_of_bound": bound / seconds,
    }


def measure(shape: str, args: argparse.Namespace, skipped: dict[str, str]) -> dict[str, Any]:
    """All variants at one shape."""
    steps = Steps(build(), *_shape(shape), args.inputs)
    variants = [variant for variant in VARIANTS if variant not in skipped]
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    losses = {variant: steps.run(variant)[1] for variant in variants}  # and whatever starts lazily
    gc.disable()
    for number in range(args.rounds):
        for place in range(len(variants)):  # another one begins each round
            variant = variants[(place + number) % len(variants)]
            times[variant].append(steps.run(variant)[0])
        print(f"{shape}: round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    gc.enable()
    rows = []
    for variant in variants:
        row = {"variant": variant, "seconds": min(times[variant]), "median_seconds": statistics.median(times[variant])}
        row |= {"loss": losses[variant], "saved_bytes": steps.saved_bytes(variant)}
        row["peak_bytes"] = None if args.no_peak else peak_bytes(variant, shape, args.inputs)
        if args.profile:
            row["top"] = profile(steps, variant)
        rows.append(row)
    difference = abs(losses["ours, all frames"] / losses["stock, all frames"] - 1)
    few = abs(losses["ours, 1/16"] / losses["stock, 1/16"] - 1)
    return {
        "shape": shape,
        "depth_rows": steps.rows,
        "variants": rows,
        "relative_loss_difference": {"all frames": difference, "1/16": few},
    }


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar against what was measured at the largest shape."""
    last = {row["variant"]: row for row in result["shapes"][-1]["variants"]}
    found = []
    for key, least, rival in BARS:
        ratio = last[rival][key] / last["ours, 1/16"][key]
        found.append({"of": key, "over": rival, "least": least, "measured": ratio, "holds": ratio >= least})
    return found


def show(result: dict[str, Any]) -> None:
    """Tables and bars."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=110)
    for shape in result["shapes"]:
        table = Table(title=f"{shape['shape']} frames, {shape['depth_rows']} rows of depth at 1/16")
        for name in ("variant", "min ms", "median ms", "saved MB", "peak MB", "faster", "less saved"):
            table.add_column(name, justify="left" if name == "variant" else "right")
        stock = shape["variants"][0]
        for row in shape["variants"]:
            figures = (row["seconds"] * 1e3, row["median_seconds"] * 1e3, row["saved_bytes"] / 1e6)
            peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"
            ratios = (stock["seconds"] / row["seconds"], stock["saved_bytes"] / row["saved_bytes"])
            table.add_row(row["variant"], *(f"{x:.1f}" for x in figures), peak, *(f"{x:.2f}x" for x in ratios))
        console.print(table)
        for what, value in shape["relative_loss_difference"].items():
            console.print(f"loss of ours against stock's, {what}: relative difference {value:.1e}", highlight=False)
        for row in shape["variants"]:
            for op in row.get("top", ()):
                print(
                    f"{row['variant']:<20} {op['op']:<45} {op['ms']:>8.1f} ms {op['share']:>4.0%} {op['calls']:>5} calls"
                )
    for variant, why in result["skipped"].items():
        console.print(f"{variant}: skipped, {why}", highlight=False)
    for bar in result["bars"]:
        verdict = "holds" if bar["holds"] else "DOES NOT HOLD"
        text = f"{bar['of']}: at least {bar['least']}x less than {bar['over']}: {bar['measured']:.2f}x, {verdict}"
        console.print(text, highlight=False)


def plot(result: dict[str, Any], path: Path) -> None:
    """Time, saved and peak memory of every variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = (("seconds", 1e3, "ms a step, minimum"), ("saved_bytes", 1e-6, "MB saved for the backward"))
    kinds += (("peak_bytes", 1e-6, "MB at the peak, gradients included"),)
    figure, axes = pyplot.subplots(len(result["shapes"]), 3, figsize=(13, 2.6 * len(result["shapes"])), squeeze=False)
    for line, shape in zip(axes, result["shapes"]):
        names = [row["variant"] for row in shape["variants"]]
        for axis, (key, scale, title) in zip(line, kinds):
            drawn = axis.barh(names, [(row[key] or 0) * scale for row in shape["variants"]])
            for patch, name in zip(drawn.patches, names):
                patch.set_color("C1" if name.startswith("ours") else "C0" if name.startswith("stock") else "0.6")
            axis.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.15)
            axis.tick_params(labelleft=axis is line[0], labelsize=8)
            axis.set_title(f"{shape['shape']} frames: {title}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _shape(text: str) -> tuple[int, int]:
    batch, frames = text.split("x")
    return int(batch), int(frames)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns 1 where a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["1x2048"] if ON_GPU else ["1x256", "4x256"], help="BATCHxFRAMES"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved steps of every variant")
    parser.add_argument(
        "--inputs", choices=["codes", "embeds"], default="codes", help="embeds leaves the backbone's embedding out"
    )
    parser.add_argument("--no-peak", action="store_true", help="leave out the peak memory, a process for every variant")
    parser.add_argument("--profile", action="store_true", help="the operators that take most of every variant's step")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON and PNG"
    )
    parser.add_argument("--peak-only", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.peak_only:
        print(_own_peak(args.peak_only, args.shapes[0], args.inputs))
        return 0
    skipped = {} if ON_GPU else {"liger per head, 1/16": "its kernels need a GPU"}
    result: dict[str, Any] = {
        "machine": machine(),
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
        "settings": {"rounds": args.rounds, "inputs": args.inputs, "dtype": "bfloat16" if ON_GPU else "float32"},
        "time": "wall, synchronized" if ON_GPU else "CPU time of the process, one thread",
        "skipped": skipped,
        "shapes": [measure(shape, args, skipped) for shape in args.shapes],
    }
    result["bars"] = bars(result)
    if ON_GPU:
        result["loss_alone"] = [loss_alone(rows) for rows in (128, 2048)]
        print(json.dumps(result["loss_alone"], indent=1))
    show(result)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"train-{DEVICE.type}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, path.with_suffix(".png"))
    print(f"written to {path}")
    return 0 if all(bar["holds"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
