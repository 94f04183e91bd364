"""Train a small CSM to convergence on real speech, with compute amortization; `make train-demo` runs it.

    python examples/train_demo.py --out train_demo_out

Writes into ``--out``: ``checkpoint/`` (a stock model folder with the tokenizer's codebooks, held-out tokens and
``metrics.json``), ``log.jsonl``, ``curves.png`` and three WAV files. docs/train-demo.md says what came of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from demo_csm import SHIFTS, Example, build_model, codebook_nll, examples, mean_nll, speak, split, unigram_nll
from speech_clips import SAMPLING_RATE, Clip, load_clips, repository_clips
from speech_tokens import FRAME, SpeechTokens, cut_at_end
from torch import Tensor
from tqdm import tqdm

from csm_runtime import accelerate
from csm_runtime.extras import need
from csm_runtime.training import CsmDataCollator, CsmTrainingConfig

POSITIONS_PER_BATCH = 2048
RESERVED_SECONDS = 60
"""Of the time, for what comes after the training."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        out: folder of the results.
        data: folder in which Debian's packages are kept between runs; None for the one of docs/env.md.
        minutes: wall time for everything. Where ``steps`` do not fit, the schedule is run through faster.
        steps: optimizer steps at most.
        seed: of weights, codebooks, order and the frames drawn.
        threads: of torch. Matrices this small gain little from a second one and lose much when the machine is busy.
        depth_fraction: fraction of the frames the depth decoder is trained on.
        learning_rate: at its highest.
        evaluate_every: steps between evaluations on all held-out frames.
        patience: evaluations without a new best after which the training has converged.
    """

    out: Path = Path("train_demo_out")
    data: Path | None = None
    minutes: float = 15.0
    steps: int = 1500
    seed: int = 0
    threads: int = 1
    depth_fraction: float = 0.25
    learning_rate: float = 3e-3
    evaluate_every: int = 100
    patience: int = 3

    def __post_init__(self) -> None:
        if not self.minutes * 60 > RESERVED_SECONDS:
            raise ValueError(f"minutes must be more than {RESERVED_SECONDS / 60:g}, got {self.minutes!r}")
        for name in ("steps", "threads", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")


def run(options: Options) -> dict[str, Any]:
    """The whole demo; returns what ``metrics.json`` holds."""
    begin = time.perf_counter()
    checkpoint = options.out / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()  # text ids lie beyond the audio vocabulary, as in CSM-1B

    torch.set_num_threads(options.threads)
    clips = [clip for clip in load_clips(options.data) if len(clip.samples) >= FRAME + max(SHIFTS)]
    train_clips, held_clips = split(clips)
    tokens = SpeechTokens.fit([clip.samples for clip in train_clips], options.seed)
    train, held = examples(train_clips, tokens, SHIFTS), examples(held_clips, tokens)
    prepared = time.perf_counter() - begin
    print(f"{_minutes(train_clips):.1f} minutes to train on, {_minutes(held_clips):.1f} held out, {prepared:.0f} s")

    model = build_model(options.seed)
    untrained = mean_nll(model, held)
    deadline = begin + 60 * options.minutes - RESERVED_SECONDS
    log, reason = fit(model, train, held, options, deadline)
    trained = time.perf_counter() - begin - prepared

    model.half().save_pretrained(checkpoint)
    tokens.save(checkpoint / "speech_tokens.safetensors")
    own = {clip.name for clip in repository_clips()}
    save_examples(checkpoint / "held_out.safetensors", examples([c for c in held_clips if c.name in own], tokens))
    model = type(model).from_pretrained(checkpoint, dtype=torch.float32).eval()  # from here on, what was saved
    baseline = unigram_nll(train, held, ends=True)
    draw_curves(options.out / "curves.png", log, float(baseline[0]), float(baseline[1:].mean()))
    best = min(log, key=_held_out_loss)
    metrics = {
        "stopped": reason,
        "steps": log[-1]["step"],
        "best_step": best["step"],
        "best": best,
        "seconds": {"data": prepared, "training": trained},
        "nll_per_codebook": {
            "held_out": mean_nll(model, held).tolist(),
            "held_out_unigram": unigram_nll(train, held).tolist(),
            "held_out_before_training": untrained.tolist(),
        },
        "loss_of_unigram": {"backbone": float(baseline[0]), "depth": float(baseline[1:].mean())},
        "data": {"train": _counts(train_clips), "held_out": _counts(held_clips), "shifts": list(SHIFTS)},
        "speech": let_listen(options.out, model, tokens, max(held_clips, key=lambda c: (c.name in own, c.seconds))),
        "parameters": sum(p.numel() for p in model.parameters()),
        "options": {key: value for key, value in asdict(options).items() if key not in {"out", "data"}},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    metrics["seconds"]["all"] = time.perf_counter() - begin
    (checkpoint / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def fit(
    model: Any, train: Sequence[Example], held: Sequence[Example], options: Options, deadline: float
) -> tuple[list[dict[str, Any]], str]:
    """Train in place and leave the weights that were best on the held-out frames.

    Args:
        model: a stock model; stock again afterwards.
        train: examples to learn from.
        held: examples to judge by.
        options: of the run.
        deadline: time of ``perf_counter`` by which the schedule has to be through.

    Returns:
        The evaluations, and why the training stopped.
    """
    config = CsmTrainingConfig(depth_fraction=options.depth_fraction, seed=options.seed)
    model = accelerate(model, training=config).train()
    collate, collate_held = (CsmDataCollator(model.config, config) for _ in range(2))  # evaluations move no draws on
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    log: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    sums, reason, begin = torch.zeros(2), "the schedule ended", time.perf_counter()
    bar = tqdm(range(1, options.steps + 1), desc="training", unit="step")
    for step, rows in zip(bar, endless_batches(train, options.seed)):
        now = time.perf_counter()
        done = max(step / options.steps, (now - begin) / max(deadline - begin, 1e-9))
        rate = min(1.0, step / 50) * max(0.01, (1 + math.cos(math.pi * min(done, 1.0))) / 2)
        optimizer.param_groups[0]["lr"] = options.learning_rate * rate
        output = model(**collate([train[row] for row in rows]))
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        sums += torch.stack([output.backbone_loss.detach(), output.depth_decoder_loss.detach()])
        if step % options.evaluate_every and done < 1:
            continue
        steps_since = step - (log[-1]["step"] if log else 0)
        record = {"step": step, "seconds": now - begin, "train": _named(sums / steps_since)}
        record["held_out"] = _named(evaluate(model, held, collate_held))
        sums = torch.zeros(2)
        log.append(record)
        with open(options.out / "log.jsonl", "w" if len(log) == 1 else "a") as file:
            file.write(json.dumps(record) + "\n")
        bar.set_postfix({key: f"{value:.3f}" for key, value in record["held_out"].items()})
        scores = [_held_out_loss(row) for row in log]
        if scores[-1] == min(scores):
            best = copy.deepcopy(model.state_dict())
        elif len(scores) - scores.index(min(scores)) > options.patience:
            reason = f"converged: no better on held-out frames for {options.patience} evaluations"
            break
        if done >= 1:
            reason = reason if step == options.steps else "the time ended"
            break
    bar.close()
    model.load_state_dict(best)
    model.training_acceleration.restore()
    model.eval()
    return log, reason


def endless_batches(data: Sequence[Example], seed: int) -> Iterator[list[int]]:
    """Rows of ``data`` of similar length, as many as fit the positions of a batch, epoch after epoch in new order."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([len(example["codes"]) + len(example["text_ids"]) + 1 for example in data])
    while True:
        jitter = torch.empty(len(sizes)).uniform_(0.8, 1.2, generator=generator)
        batches: list[list[int]] = [[]]
        widest = 0
        for row in (sizes * jitter).argsort().tolist():
            widest = max(widest, int(sizes[row]))
            if batches[-1] and widest * (len(batches[-1]) + 1) > POSITIONS_PER_BATCH:
                batches.append([])
                widest = int(sizes[row])
            batches[-1].append(row)
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[place]


@torch.no_grad()
def evaluate(model: Any, data: Sequence[Example], collate: CsmDataCollator) -> Tensor:
    """Backbone and depth loss ``[2]`` in nats per token over all frames of ``data``, ends included."""
    model.eval()
    total, count = torch.zeros(2), 0
    ordered = sorted(data, key=lambda example: len(example["codes"]) + len(example["text_ids"]))
    for first in range(0, len(ordered), 16):
        batch = collate(ordered[first : first + 16])
        output, frames = model(**batch), int(batch["num_backbone_targets"])
        total += frames * torch.stack([output.backbone_loss, output.depth_decoder_loss])
        count += frames
    model.train()
    return total / count


def save_examples(path: Path, data: Sequence[Example]) -> None:
    """Text ids and tokens as safetensors: ``text_ids.3`` int16 ``[n]`` and ``codes.3`` uint8 ``[F, 8]`` of example 3."""
    from safetensors.torch import save_file

    kinds = {"text_ids": torch.int16, "codes": torch.uint8}
    save_file(
        {f"{key}.{place}": row[key].to(kind) for place, row in enumerate(data) for key, kind in kinds.items()}, path
    )


def draw_curves(path: Path, log: Sequence[dict[str, Any]], backbone: float, depth: float) -> None:
    """Both losses over the steps, on training and held-out frames, above the loss of a unigram model."""
    matplotlib = need("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = {"backbone": "codebook 0 (backbone)", "depth": "codebooks 1 to 7 (depth decoder)"}
    for axis, (part, title), unigram in zip(axes, titles.items(), (backbone, depth)):
        steps = [record["step"] for record in log]
        axis.plot(
            steps, [record["train"][part] for record in log], marker=".", label="training, mean since the last point"
        )
        axis.plot(steps, [record["held_out"][part] for record in log], marker=".", label="held out, all frames")
        axis.axhline(unigram, color="gray", linestyle="--", label="token frequencies alone")
        axis.set(title=title, xlabel="step", ylabel="loss, nats per token")
        axis.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def let_listen(out: Path, model: Any, tokens: SpeechTokens, clip: Clip) -> dict[str, Any]:
    """Write a held-out recording as it is, from its own tokens, and as the model says its text."""
    soundfile = need("soundfile")
    example = examples([clip], tokens)[0]
    frames = len(example["codes"])
    made = speak(model, example["text_ids"], 2 * frames, seed=0)
    spoken = cut_at_end(made)
    waves = {"original": clip.samples, "from_tokens": tokens.decode(example["codes"])}
    if len(spoken):
        waves["generated"] = tokens.decode(spoken)
    for name, wave in waves.items():
        soundfile.write(out / f"{name}.wav", wave.clamp(-1, 1).numpy(), SAMPLING_RATE)
    return {
        "clip": clip.name,
        "text": clip.text,
        "frames": frames,
        "frames_generated": len(spoken),
        "end_of_speech_generated": len(spoken) < len(made),
        "nll": float(codebook_nll(model, example).mean()),
    }


def _named(losses: Tensor) -> dict[str, float]:
    return dict(zip(("backbone", "depth"), losses.tolist()))


def _held_out_loss(record: dict[str, Any]) -> float:
    return record["held_out"]["backbone"] + record["held_out"]["depth"]


def _minutes(clips: Sequence[Clip]) -> float:
    return sum(clip.seconds for clip in clips) / 60


def _counts(clips: Sequence[Clip]) -> dict[str, Any]:
    """Recordings and minutes by language."""
    by: dict[str, list[Clip]] = {}
    for clip in clips:
        by.setdefault(clip.name.partition("/")[0], []).append(clip)
    return {language: {"clips": len(own), "minutes": _minutes(own)} for language, own in by.items()}


def main() -> None:
    """Read the command line and run."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="wall time for everything")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="optimizer steps at most")
    parser.add_argument("--out", type=Path, default=defaults.out, help="folder of the results")
    parser.add_argument("--data", type=Path, help="folder in which the speech packages are kept between runs")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=defaults.threads)
    metrics = run(Options(**vars(parser.parse_args())))
    print(
        json.dumps(
            {key: metrics[key] for key in ("stopped", "best", "seconds", "nll_per_codebook", "speech")}, indent=1
        )
    )


if __name__ == "__main__":
    main()
