"""Train or fine-tune CSM on a folder of speech, with the depth decoder on a fraction of the frames.

    python examples/train.py --model sesame/csm-1b --data clips/ --out run --lora-rank 16 --bf16 --steps 500
    python examples/train.py --model small --data csm_runtime/data --out run --steps 20      # offline, on a CPU
    torchrun --nproc-per-node 8 examples/train.py --fsdp --model sesame/csm-1b --data train.jsonl --out run ...

The audio becomes Mimi codes once, cached in ``--cache``; training reads codes. ``--out`` gets ``log.jsonl``, ``curves.png``,
``checkpoints/`` and at the end ``model/`` (stock, by ``save_pretrained``) or ``adapter/``. ``--resume`` goes on from the
last checkpoint with the losses an uninterrupted run has: batches and frames drawn follow from the seed and the step.
Needs the extras ``cli`` and, for LoRA, ``train``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.utils.data import DistributedSampler
from tqdm import tqdm
from training_data import read_data, tokenise

from csm_runtime import accelerate
from csm_runtime.checkpoints import load
from csm_runtime.extras import need
from csm_runtime.training import CsmDataCollator, CsmTrainingConfig, DepthGradientNoiseScale, share_counts

LORA_TARGETS = r"(backbone_model|depth_decoder\.model)\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
SAME_ON_RESUME = ["model", "data", "seed", "steps", "batch_size", "accumulate", "lr", "warmup", "lora_rank", "bf16"]
SAME_ON_RESUME += ["depth_fraction", "depth_frames", "depth_weight", "val_data", "val_fraction", "clip"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="sesame/csm-1b", help="hub id, folder, or 'small' for the built-in model")
    add("--data", required=True, help="folder with transcripts.tsv or .txt files, or a .jsonl manifest")
    add("--val-data", help="the same for validation; default: a part of --data")
    add("--val-fraction", type=float, default=0.05, help="part of --data kept for validation")
    add("--out", type=Path, required=True, help="folder of logs, checkpoints and the final model")
    add("--cache", type=Path, help="folder of codes; default: OUT/codes")
    add("--steps", type=int, default=1000, help="optimizer steps")
    add("--batch-size", type=int, default=4, help="conversations per micro-batch and rank")
    add("--accumulate", type=int, default=1, help="micro-batches per optimizer step")
    add("--depth-fraction", type=float, default=1 / 16, help="part of the frames the depth decoder learns from")
    add("--depth-frames", type=int, help="frames per micro-batch instead of a fraction")
    add("--depth-weight", type=float, default=1.0, help="weight of the depth decoder's loss")
    add("--lr", type=float, help="peak learning rate; default 2e-5, with LoRA 2e-4")
    add("--warmup", type=int, default=20, help="steps of linear warm-up, then a cosine to a tenth")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--lora-rank", type=int, default=0, help="train LoRA adapters of this rank; 0 trains all weights")
    add("--merge", action="store_true", help="with LoRA, save a stock model with the adapters merged as well")
    add("--bf16", action="store_true", help="autocast to bfloat16; weights and optimizer stay fp32")
    add("--gradient-checkpointing", action="store_true", help="recompute layers in the backward")
    add("--fsdp", action="store_true", help="under torchrun, shard weights instead of copying them")
    add("--val-every", type=int, default=100, help="steps between validations on all frames")
    add("--checkpoint-every", type=int, default=200, help="steps between checkpoints, of which two are kept")
    add("--noise-every", type=int, default=50, help="steps between measurements of the gradient noise; 0 for none")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--tensorboard", action="store_true", help="write TensorBoard events beside log.jsonl")
    add("--device", default="auto", help="'auto', 'cpu', 'cuda'")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "accumulate", "val_every", "checkpoint_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("warmup", "lora_rank", "noise_every"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, got {getattr(args, name)}")
    if not 0.0 < args.val_fraction < 1.0:
        parser.error(f"--val-fraction must be between 0 and 1, got {args.val_fraction}")
    if args.merge and not args.lora_rank:
        parser.error("--merge needs --lora-rank")
    if args.fsdp and "RANK" not in os.environ:
        parser.error("--fsdp needs torchrun")
    if args.fsdp and args.merge:
        parser.error("--merge does not go with --fsdp; merge the saved adapter afterwards")
    args.lr = args.lr or (2e-4 if args.lora_rank else 2e-5)
    return args


class Ranks:
    """Who this process is among those of torchrun; alone without it."""

    def __init__(self, device: str) -> None:
        self.count, self.own, local = (
            int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
        )
        cuda = device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu" if device == "auto" else device)
        if "RANK" in os.environ:
            dist.init_process_group("nccl" if cuda else "gloo", device_id=self.device if cuda else None)
        if cuda:
            torch.cuda.set_device(self.device)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """For all."""
        if dist.is_initialized():
            dist.barrier()


class Log:
    """JSON lines, TensorBoard on request and the curves; rank 0 only."""

    def __init__(self, folder: Path, step: int, tensorboard: bool, writes: bool) -> None:
        self._path, self._writes, self._events = folder / "log.jsonl", writes, None
        self.lines: list[dict[str, Any]] = []
        if writes and step and self._path.is_file():  # what was logged after the checkpoint happens again
            self.lines = [line for line in map(json.loads, self._path.read_text().splitlines()) if line["step"] <= step]
        if writes:
            self._path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        if writes and tensorboard:
            need("tensorboard")
            self._events = need("torch.utils.tensorboard").SummaryWriter(
                str(folder / "tensorboard"), purge_step=step + 1
            )

    def add(self, step: int, **values: Any) -> None:
        """One line."""
        if not self._writes:
            return
        self.lines.append({"step": step, **values})
        with self._path.open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")
        for name, value in values.items() if self._events else ():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def plot(self) -> None:
        """``curves.png``: both losses of training and validation, and the gradient norm."""
        if not self._writes:
            return
        matplotlib = need("matplotlib")
        matplotlib.use("Agg")
        pyplot = need("matplotlib.pyplot")
        figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
        for axis, name in zip(axes, ("backbone_loss", "depth_loss", "grad_norm")):
            for kind, key in (("training", name), ("validation, all frames", f"val_{name}")):
                points = [(line["step"], line[key]) for line in self.lines if key in line]
                if points:
                    axis.plot(*zip(*points), label=kind, marker="o" if key.startswith("val") else None)
            axis.set(title=name.replace("_", " "), xlabel="step")
            axis.grid(alpha=0.3)
        axes[0].legend()
        figure.savefig(self._path.with_name("curves.png"), dpi=110)
        pyplot.close(figure)


def shard(model: Any, ranks: Ranks) -> None:
    """One unit per decoder layer; what is left, heads and embeddings, is the root's, inside whose forward the loss is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    frozen = {p for p in model.codec_model.parameters()}
    for layer in (*model.backbone_model.layers, *model.depth_decoder.model.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=frozen)


def take(
    examples: list[Any], step: int, micro: int, args: argparse.Namespace, sampler: DistributedSampler
) -> list[Any]:
    """The examples of one micro-batch, a function of seed, step and rank: epochs follow each other without a gap."""
    start = (step * args.accumulate + micro) * args.batch_size
    chosen, orders = [], {}
    for place in range(start, start + args.batch_size):
        epoch, within = divmod(place, len(sampler))
        if epoch not in orders:
            sampler.set_epoch(epoch)
            orders[epoch] = list(sampler)
        chosen.append(examples[orders[epoch][within]])
    return chosen


def moved(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch on the device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def train_step(
    model: Any,
    batches: list[dict[str, torch.Tensor]],
    optimizer: Any,
    schedule: Any,
    args: argparse.Namespace,
    ranks: Ranks,
) -> dict[str, float]:
    """One optimizer step; losses are means over the step's targets on all ranks."""
    share_counts(batches)
    losses = torch.zeros(2, device=ranks.device)
    for number, batch in enumerate(batches):
        last = number + 1 == len(batches)
        quiet = contextlib.nullcontext()
        if args.fsdp:
            model.set_requires_gradient_sync(last)
        elif dist.is_initialized() and not last:
            quiet = model.no_sync()
        with quiet:
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=args.bf16):
                out = model(**moved(batch, ranks.device))
            out.loss.backward()
        losses += torch.stack([out.backbone_loss, out.depth_decoder_loss]).detach().float()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], args.clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    lr = schedule.get_last_lr()[0]
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    backbone, depth = (value / ranks.count for value in ranks.sum(losses.tolist()))
    return {"backbone_loss": backbone, "depth_loss": depth, "grad_norm": float(norm), "lr": lr}


@torch.no_grad()
def validate(
    model: Any, examples: list[Any], collate: CsmDataCollator, args: argparse.Namespace, ranks: Ranks
) -> dict[str, float]:
    """Means over all frames of the validation set. Every rank runs as many batches, for FSDP's sake."""
    model.eval()
    mine = examples[ranks.own :: ranks.count]
    sums = [0.0] * 4
    for start in range(0, math.ceil(len(examples) / ranks.count), args.batch_size):
        part = mine[start : start + args.batch_size]
        batch = collate(part or examples[:1])
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=args.bf16):
            out = model(**moved(batch, ranks.device))
        if part:
            counts = float(batch["num_backbone_targets"]), float(batch["num_depth_targets"])
            parts = (float(out.backbone_loss) * counts[0], float(out.depth_decoder_loss) * counts[1], *counts)
            sums = [a + b for a, b in zip(sums, parts)]
    model.train()
    backbone, depth, frames, targets = ranks.sum(sums)
    return {"val_backbone_loss": backbone / max(frames, 1), "val_depth_loss": depth / max(targets, 1)}


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; the metadata is written last."""
    return sorted(path.parent for path in folder.glob("checkpoints/step-*/.metadata"))


def state_of(model: Any, optimizer: Any, schedule: Any, step: int, seed: int) -> dict[str, Any]:
    """What a checkpoint holds: trained weights, optimizer, schedule, seed and step."""
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": weights, "optimizer": moments, "schedule": schedule.state_dict(), "seed": seed, "step": step}


def save_checkpoint(folder: Path, state: dict[str, Any], ranks: Ranks) -> None:
    """Save, and keep the two last."""
    path = folder / "checkpoints" / f"step-{state['step']:08d}"
    dcp.save(state, checkpoint_id=str(path))
    ranks.wait()
    for old in checkpoints(folder)[:-2] if ranks.own == 0 else ():
        shutil.rmtree(old)


def load_checkpoint(folder: Path, model: Any, optimizer: Any, schedule: Any, args: argparse.Namespace) -> int:
    """Restore the last checkpoint; returns its step.

    Raises:
        ValueError: there is none, or it is of a run with other settings; names the argument.
    """
    found = checkpoints(folder)
    if not found:
        raise ValueError(f"--resume: no checkpoint in {folder}")
    before = json.loads((folder / "settings.json").read_text())
    for name in SAME_ON_RESUME:
        if before[name] != getattr(args, name):
            raise ValueError(
                f"--resume: the run had --{name.replace('_', '-')} {before[name]}, now it is {getattr(args, name)}"
            )
    state = state_of(model, optimizer, schedule, 0, args.seed)
    dcp.load(state, checkpoint_id=str(found[-1]))
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),  # frozen weights are not in it
    )
    schedule.load_state_dict(state["schedule"])
    return int(state["step"])


def save_model(csm: Any, peft: Any, wrapped: Any, processor: Any, args: argparse.Namespace, ranks: Ranks) -> None:
    """Stock files by ``save_pretrained``: of the model, or the adapter and on request the model with it merged."""
    csm.training_acceleration.restore()
    state = None
    if args.fsdp:
        state = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if csm.config.tie_codebooks_embeddings:  # gathered, the two are no longer one tensor
            state.pop("backbone_model.embed_tokens.embed_audio_tokens.weight", None)
    if ranks.own:
        return
    if peft is not None:
        named = None if state is None else {f"base_model.model.{name}": value for name, value in state.items()}
        peft.save_pretrained(args.out / "adapter", state_dict=named)
        if not args.merge:
            return
        csm = peft.merge_and_unload()
    csm.save_pretrained(args.out / "model", state_dict=state)
    processor.save_pretrained(args.out / "model")


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code, 1 if it was interrupted and has saved a checkpoint."""
    args = parse(argv)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves by itself
    ranks = Ranks(args.device)
    first = ranks.own == 0
    torch.manual_seed(args.seed)
    csm, processor = load(args.model, dtype="float32", device=str(ranks.device), seed=args.seed)
    csm.codec_model.requires_grad_(False)

    cache = args.cache or args.out / "codes"
    if not first:
        ranks.wait()  # rank 0 encodes, the others read
    sets = [tokenise(read_data(args.data), csm, processor, cache, quiet=not first)]
    if args.val_data:
        sets.append(tokenise(read_data(args.val_data, "--val-data"), csm, processor, cache, "--val-data", not first))
    if first:
        ranks.wait()
    training, validation = sets if len(sets) == 2 else split(sets[0], args, first)
    if not any(turn["train"] and len(turn["codes"]) for example in training for turn in example["turns"]):
        raise ValueError("--data: no turn is to be trained on; every one has train: false")

    config = CsmTrainingConfig(
        depth_fraction=args.depth_fraction,
        depth_frames=args.depth_frames,
        depth_loss_weight=args.depth_weight,
        seed=args.seed,
    )
    peft = None
    if args.lora_rank:
        adapters = need("peft", "train")
        lora = adapters.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=LORA_TARGETS)
        peft = adapters.get_peft_model(csm, lora)
    if args.gradient_checkpointing:
        csm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    csm = accelerate(csm, training=config)
    csm.train()
    model: Any = csm
    if args.fsdp:
        shard(csm, ranks)
    elif dist.is_initialized():
        model = torch.nn.parallel.DistributedDataParallel(csm)
    trained = [p for p in csm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)

    def rate(step: int) -> float:
        done = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
        return min(1.0, (step + 1) / max(1, args.warmup)) * (0.55 + 0.45 * math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    collate = CsmDataCollator(csm.config, config, rank=ranks.own, gradient_accumulation=args.accumulate)
    collate_all = CsmDataCollator(csm.config, config, rank=ranks.own)
    sampler = DistributedSampler(training, num_replicas=ranks.count, rank=ranks.own, shuffle=True, seed=args.seed)
    # Its moving averages are not in a checkpoint: after a resume it measures afresh, which changes no loss.
    meter = DepthGradientNoiseScale(csm) if args.noise_every and first and not args.fsdp else None

    start = load_checkpoint(args.out, model, optimizer, schedule, args) if args.resume else 0
    if not args.resume and checkpoints(args.out):
        raise ValueError(f"--out: {args.out} holds checkpoints of another run; pass --resume or another folder")
    if first:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "settings.json").write_text(json.dumps(vars(args), indent=1, default=str) + "\n")
        print(f"{len(training)} conversations to train on, {len(validation)} to validate on")
        print(f"{'LoRA' if peft else 'all weights'}: {sum(p.numel() for p in trained):,} parameters trained")
    log = Log(args.out, start, args.tensorboard, first)
    collate.set_step(start)
    asked: list[int] = []
    handlers = {
        number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step", disable=not first)
    step, done = start, start
    try:
        for step in bar:
            began = time.perf_counter()
            torch.manual_seed(hash((args.seed, step, ranks.own)) % 2**63)  # for dropout, where there is any
            batches = [collate(take(training, step, micro, args, sampler)) for micro in range(args.accumulate)]
            figures = train_step(model, batches, optimizer, schedule, args, ranks)
            done = step + 1
            frames = int(batches[0]["num_backbone_targets"])
            rows = ranks.count * sum(len(batch["depth_index"]) for batch in batches)
            log.add(done, **figures, frames=frames, depth_rows=rows, seconds=time.perf_counter() - began)
            bar.set_postfix({name: f"{figures[name]:.3f}" for name in ("backbone_loss", "depth_loss")})
            if meter is not None and done % args.noise_every == 0:
                with torch.autocast(ranks.device.type, torch.bfloat16, enabled=args.bf16):
                    meter.measure(moved(batches[0], ranks.device), step)
                reading = meter.reading(frames)
                each = math.ceil(reading.depth_frames / (ranks.count * args.accumulate))
                scale = reading.noise_scale if math.isfinite(reading.noise_scale) else None
                log.add(done, noise_scale_frames=scale, suggested_depth_frames=each)
            if done % args.val_every == 0 or done == args.steps:
                log.add(done, **validate(model, validation, collate_all, args, ranks))
                log.plot()
            stop = bool(ranks.sum([len(asked)])[0])  # all ranks stop after the same step
            if stop or done % args.checkpoint_every == 0 or done == args.steps:
                save_checkpoint(args.out, state_of(model, optimizer, schedule, done, args.seed), ranks)
            if stop:
                break
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    log.plot()
    if done == args.steps:
        save_model(csm, peft, model, processor, args, ranks)
    elif first:
        print(f"stopped after step {done}; the same command with --resume goes on")
    ranks.wait()  # for rank 0, which saves
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if done == args.steps else 1


def split(examples: list[Any], args: argparse.Namespace, says: bool) -> tuple[list[Any], list[Any]]:
    """Training and validation part of one data set, by the seed."""
    if len(examples) == 1:
        if says:
            print("--data has one conversation, which is validated on too; pass --val-data to see overfitting")
        return examples, examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.seed)).tolist()
    count = max(1, round(args.val_fraction * len(examples)))
    return [examples[i] for i in order[count:]], [examples[i] for i in order[:count]]


if __name__ == "__main__":
    raise SystemExit(main())
