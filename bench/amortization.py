"""Does training the depth decoder on 1/16 of the frames cost quality? At equal steps, at equal compute, and where it breaks.

    python bench/amortization.py            about 15 minutes of one core
    python bench/amortization.py --quick    the controls alone, under a minute

A small stock CSM, accelerated for training, learns a synthetic RVQ chain whose entropy is known, so that what is reported is
the gap to the best loss there can be, on held-out sequences and all their frames. 8192 frames a step, seeds and step counts
below; the step counts of "equal compute" come from the CPU time of a step measured first. Controls: the same 1/16 of the
frames of each sequence in every epoch, and the depth loss weighed with the fraction. One learning rate for all, tuned for none.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm_kernels.frames import sample_frames
from csm_runtime import accelerate
from csm_runtime.doctor import machine
from csm_runtime.training import CsmTrainingConfig, DepthGradientNoiseScale

BOOKS, VOCAB, SPEAKERS, LENGTH = 4, 32, 4, 128
AUDIO = SPEAKERS
NOISE = [0.0] + [0.10 + 0.05 * k for k in range(1, BOOKS)]
"""Chance that a codebook's token is drawn at random instead of following from the ones before."""

EVALUATE_EVERY = 25


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    name: str
    fraction: float
    steps: int
    seed: int = 0
    depth_weight: float = 1.0
    frozen: bool = False
    sequences: int = 2048


def tables() -> tuple[Tensor, Tensor]:
    """The chain: four successors of each codebook-0 token by speaker, and for the others a permutation by condition."""
    generator = torch.Generator().manual_seed(1234)

    def permutations(*shape: int) -> Tensor:
        count = math.prod(shape)
        return torch.stack([torch.randperm(VOCAB, generator=generator) for _ in range(count)]).view(*shape, VOCAB)

    return permutations(SPEAKERS, VOCAB)[..., :4], permutations(BOOKS, 4)


def chain(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Speakers ``[count]`` and codes ``[count, LENGTH, BOOKS]``.

    Codebook 0 is one of four successors of the last one; codebook 1 follows from codebook 0 and the last frame's codebook 1,
    the others from the codebook before them and codebook 0.
    """
    successors, orders = tables()
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    speaker, first, before = draw(SPEAKERS), draw(VOCAB), torch.zeros(count, dtype=torch.int64)
    frames = []
    for _ in range(LENGTH):
        first = successors[speaker, first, draw(4)]
        frame = [first]
        for k in range(1, BOOKS):
            token = orders[k, (before if k == 1 else first) % 4, frame[-1]]
            random = torch.rand(count, generator=generator) < NOISE[k]
            frame.append(torch.where(random, draw(VOCAB), token))
        before = frame[1]
        frames.append(torch.stack(frame, dim=1))
    return speaker, torch.stack(frames, dim=1)


def floors() -> tuple[float, float]:
    """Entropy per token of codebook 0, and of the others on average: the lowest losses there are."""
    each = []
    for noise in NOISE[1:]:
        other = noise / VOCAB
        follows = 1 - noise + other
        each.append(-follows * math.log(follows) - (VOCAB - 1) * other * math.log(other))
    # Nothing predicts the first frame's codebook 0, which is all but uniform.
    return (math.log(VOCAB) + (LENGTH - 1) * math.log(4)) / LENGTH, statistics.mean(each)


def build(seed: int) -> Any:
    """A stock model of 0.2 M parameters."""
    from transformers import CsmConfig, CsmDepthDecoderConfig, CsmForConditionalGeneration, MimiConfig

    stack = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
    }
    stack |= {
        "vocab_size": VOCAB,
        "num_codebooks": BOOKS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    depth = CsmDepthDecoderConfig(
        **stack, backbone_hidden_size=64, intermediate_size=192, max_position_embeddings=BOOKS + 1
    )
    codec = MimiConfig(hidden_size=64, num_filters=4, num_hidden_layers=1, num_attention_heads=4, upsample_groups=64)
    tokens = {
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "audio_token_id": AUDIO,
        "audio_eos_token_id": AUDIO + 1,
    }
    config = CsmConfig(
        **stack,
        **tokens,
        text_vocab_size=AUDIO + 2,
        intermediate_size=128,
        max_position_embeddings=LENGTH + 1,
        codebook_eos_token_id=VOCAB - 1,
        codebook_pad_token_id=VOCAB - 1,
        depth_decoder_config=depth,
        codec_config=codec,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CsmForConditionalGeneration(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1 and not name.startswith("codec_model"):
                    weight.normal_(std=0.05)
    return model


def batch_of(speakers: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """A position of text, the speaker, and the frames."""
    rows = len(codes)
    ids = torch.cat([speakers[:, None], torch.full((rows, LENGTH), AUDIO)], dim=1)
    labels = torch.where(ids == AUDIO, ids, -100)
    labels[:, 0] = -100
    return {"input_ids": ids, "audio_codes": torch.nn.functional.pad(codes, (0, 0, 1, 0)), "labels": labels}


def frozen_frames(count: int, fraction: float) -> Tensor:
    """Positions ``[count, M]`` of each sequence that are the same in every epoch; position 0 is the text."""
    generator = torch.Generator().manual_seed(5)
    few = round(fraction * LENGTH)
    return torch.stack([torch.randperm(LENGTH, generator=generator)[:few] + 1 for _ in range(count)])


@torch.no_grad()
def evaluate(model: Any, held_out: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Losses of codebook 0 and of the others, over all frames."""
    model.eval()
    out = model(**batch_of(*held_out))
    model.train()
    return float(out.backbone_loss), float(out.depth_decoder_loss)


def train(arm: Arm, sequences_per_step: int, noise_at: tuple[int, ...] = ()) -> dict[str, Any]:
    """Train one arm; returns its curve of step, CPU seconds, and both gaps to the floor."""
    speakers, codes = chain(arm.sequences, 11)
    held_out = chain(32, 22)
    model = build(arm.seed)
    config = CsmTrainingConfig(depth_fraction=arm.fraction, depth_loss_weight=arm.depth_weight, seed=arm.seed)
    model = accelerate(model, training=config).train()
    model.codec_model.requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(arm.seed + 77)
    frozen = frozen_frames(arm.sequences, arm.fraction) if arm.frozen else None
    order = torch.zeros(0, dtype=torch.int64)
    floor, curve, noise, seconds = floors(), [], [], 0.0
    for step in range(arm.steps + 1):
        if step % EVALUATE_EVERY == 0 or step == arm.steps:
            losses = evaluate(model, held_out)
            gaps = [loss - least for loss, least in zip(losses, floor)]
            curve.append({"step": step, "cpu_seconds": seconds, "codebook_0_gap": gaps[0], "depth_gap": gaps[1]})
        if step == arm.steps:
            break
        start = time.process_time()
        if len(order) < sequences_per_step:
            order = torch.randperm(arm.sequences, generator=generator)
        chosen, order = order[:sequences_per_step], order[sequences_per_step:]
        batch = batch_of(speakers[chosen], codes[chosen])
        trained = batch["labels"] != -100
        if frozen is not None:
            place = torch.arange(sequences_per_step)[:, None] * (LENGTH + 1)
            batch["depth_index"] = (frozen[chosen] + place).flatten()
        else:
            rows = config.rows(int(trained.sum()))
            batch["depth_index"] = sample_frames(trained, rows, seed=arm.seed, step=step).index
        for group in optimizer.param_groups:
            cosine = 0.55 + 0.45 * math.cos(math.pi * step / arm.steps)
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * cosine
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.process_time() - start
        if step in noise_at:
            noise.append({"step": step, **measure_noise(model, batch, sequences_per_step * LENGTH)})
    last = curve[-1]
    print(
        f"{arm.name}, seed {arm.seed}, {arm.steps} steps: {seconds:.0f} s of CPU, gap {last['depth_gap']:.4f}, "
        f"codebook 0 {last['codebook_0_gap']:.4f}",
        file=sys.stderr,
        flush=True,
    )
    return {
        **vars(arm),
        "curve": curve,
        "noise": noise,
        **{k: last[k] for k in ("cpu_seconds", "depth_gap", "codebook_0_gap")},
    }


def measure_noise(model: Any, batch: dict[str, Tensor], frames: int) -> dict[str, float]:
    """The gradient noise scale of the depth decoder here, and what the meter makes of it."""
    meter = DepthGradientNoiseScale(model, num_frames=frames // 4)
    for number in range(12):
        meter.measure(batch, 100_000 + number)
    reading = meter.reading(frames)
    scale = reading.noise_scale if math.isfinite(reading.noise_scale) else None
    return {"noise_scale": scale, "predicted_fraction": reading.depth_fraction}


def step_seconds(fraction: float, sequences_per_step: int, repeats: int = 6) -> float:
    """CPU time of a step, the least of some."""
    model = accelerate(build(0), training=CsmTrainingConfig(depth_fraction=fraction)).train()
    batch = batch_of(*chain(sequences_per_step, 3))
    found = []
    for _ in range(repeats):
        start = time.process_time()
        model(**batch).loss.backward()
        found.append(time.process_time() - start)
    return min(found[1:])


def unbiasedness(draws: int, frozen: bool = False) -> dict[str, float]:
    """Monte Carlo: the mean gradient over draws of 1/16 of the frames against the gradient over all of them.

    ``ratio`` is the squared distance of the two over what the scatter of the draws lets one expect: around 1 where the
    estimate is unbiased. ``frozen`` takes the same draw every time, whose distance does not shrink.
    """
    model = accelerate(build(0), training=CsmTrainingConfig()).train()
    batch = batch_of(*chain(4, 7))
    trained = batch["labels"] != -100
    weights = [p for p in model.depth_decoder.parameters() if p.requires_grad]

    def gradient(index: Tensor) -> Tensor:
        found = torch.autograd.grad(model(**batch, depth_index=index).depth_decoder_loss, weights, allow_unused=True)
        return torch.cat([g.double().flatten() for g in found if g is not None])

    whole = gradient(trained.flatten().nonzero().flatten())
    rows = int(trained.sum()) // 16
    total, squares = torch.zeros_like(whole), 0.0
    for step in range(draws):
        one = gradient(sample_frames(trained, rows, seed=3, step=0 if frozen else step).index)
        total += one
        squares += float((one - whole).square().sum())
    error = float((total / draws - whole).square().sum())
    return {
        "draws": draws,
        "relative_error": math.sqrt(error / float(whole.square().sum())),
        "ratio": error / (squares / draws / draws),
    }


def arms_of(quick: bool, cost: dict[str, float]) -> list[Arm]:
    """The experiment."""
    few = 1 / 16
    if quick:
        return [
            Arm("1/16, drawn anew", few, 120, sequences=32),
            Arm("1/16, frozen", few, 120, frozen=True, sequences=32),
        ]
    budget = 300 * cost["1/16"]
    found = [Arm("1/16", few, 300, seed) for seed in (0, 1)]
    found += [Arm("all, compute of 1/16", 1.0, round(budget / cost["all"]), seed) for seed in (0, 1)]
    found += [Arm("1/4, compute of 1/16", 1 / 4, round(budget / cost["1/4"]), seed) for seed in (0, 1)]
    found += [Arm("1/16, 128 sequences", few, 300, sequences=128)]
    found += [Arm("1/16, 128 sequences, frozen", few, 300, frozen=True, sequences=128)]
    found += [Arm("1/16, depth weight 1/16", few, 300, depth_weight=few)]
    found += [Arm("all", 1.0, 300, seed) for seed in (0, 1)]
    return [*found, Arm("1/16, compute of all", few, round(300 * cost["all"] / cost["1/16"]))]


def table(result: dict[str, Any]) -> str:
    """Markdown: an arm a row, all its seeds."""
    lines = ["| arm | steps | CPU s | gap of the depth decoder, nats | gap of codebook 0 |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(run["name"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["name"] == name]
        figures = [" / ".join(f"{run[k]:.3f}" for run in runs) for k in ("depth_gap", "codebook_0_gap")]
        seconds = " / ".join(f"{run['cpu_seconds']:.0f}" for run in runs)
        lines.append(f"| {name} | {runs[0]['steps']} | {seconds} | {figures[0]} | {figures[1]} |")
    lines += ["", "| step | noise scale, frames | fraction it predicts |", "|---|---|---|"]
    for run in result["runs"]:
        for one in run["noise"]:
            scale = "no signal" if one["noise_scale"] is None else f"{one['noise_scale']:.0f}"
            lines.append(f"| {one['step']} | {scale} | {one['predicted_fraction']:.2f} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """The gap against steps and CPU time, and the controls."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    names = list(dict.fromkeys(run["name"] for run in result["runs"]))
    for run in result["runs"]:
        control = "sequences" in run["name"] or "weight" in run["name"] or result["quick"]
        label = run["name"] if run["seed"] == 0 else None
        gaps = [point["depth_gap"] for point in run["curve"]]
        for axis, key in zip(axes, ("step", "cpu_seconds")) if not control else [(axes[2], "step")]:
            axis.plot([point[key] for point in run["curve"]], gaps, color=f"C{names.index(run['name'])}", label=label)
    for axis, key, title in zip(axes, ("step", "CPU seconds", "step"), ("by step", "by CPU time", "controls")):
        axis.set(yscale="log", xlabel=key, ylabel="depth NLL above the entropy floor, nats", title=title)
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the frozen-frames control and the unbiasedness alone")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of JSON, PNG and tables"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    sequences = 16 if args.quick else 64
    cost = {}
    if not args.quick:
        cost = {name: step_seconds(f, sequences) for name, f in (("all", 1.0), ("1/4", 1 / 4), ("1/16", 1 / 16))}
    result: dict[str, Any] = {
        "machine": machine(),
        "quick": args.quick,
        "frames_per_step": sequences * LENGTH,
        "floors": dict(zip(("codebook_0", "depth"), floors())),
        "step_cpu_seconds": cost,
        "runs": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("amortization-quick.json" if args.quick else "amortization.json")
    draws = 100 if args.quick else 1000
    result["unbiasedness"] = {"drawn anew": unbiasedness(draws), "frozen": unbiasedness(draws, frozen=True)}
    for arm in arms_of(args.quick, cost):
        noise_at = (10, 50, 150, 299) if arm.name == "1/16" and arm.seed == 0 else ()
        result["runs"].append(train(arm, sequences, noise_at))
        path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(result))
    plot(result, path.with_suffix(".png"))
    print(table(result))
    for name, found in result["unbiasedness"].items():
        print(f"gradient, {name}: {found['ratio']:.2f} of the squared error that {draws} unbiased draws would leave")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
