"""What each precision preset costs in bytes and in fidelity; writes JSON and the table of docs/precision.md.

    python bench/precision.py --out bench/results

Bytes are those of CSM-1B's shape, computed. Fidelity is measured twice. On the small model of ``tests/data/trained_csm``,
which was really trained: recordings it never heard are fed to it frame by frame, teacher-forced, once with the stock
weights in fp32 and once with what the policy stores; the prompt runs through the stock weights both times, as in
``generate``. On matrices of CSM-1B's width with random weights: the signal that is left of each zone's weights and of the
depth decoder's logits; those say nothing about speech, only that errors do not grow with width.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm_runtime.adapters import hf
from csm_runtime.adapters.spec import ModelSpec, StackSpec
from csm_runtime.precision import PRESETS, PrecisionPolicy
from csm_runtime.replay import Replay
from csm_runtime.rounding import Rounding
from csm_runtime.weights import DTYPES, Packed, PackedWeights, planned_table, unlowered

ROOT = Path(__file__).resolve().parents[1]
TRAINED = ROOT / "tests" / "data" / "trained_csm"
SHOWN = ("exact", "balanced", "fast", "smallest")
GROUPS = ("0", "1", "2-3", "4-7")
"""Codebooks whose figures are averaged together, of the small model's eight."""
ZONES = (
    "backbone.attention", "backbone.mlp", "backbone.head", "backbone.embedding",
    "depth.attention", "depth.mlp", "depth.projection", "depth.head", "depth.embedding",
)  # fmt: skip
FORMATS = ("bf16", "fp8", "int8", "int4", "int4:32")
CSM_1B = ModelSpec(
    backbone=StackSpec(16, 2048, 8192, 32, 8, 64, 1e-5, 2048),
    depth=StackSpec(4, 1024, 8192, 8, 2, 128, 1e-5, 33),
    codebooks=32,
    vocab=2051,
    depth_vocab=2051,
)


def machine() -> dict[str, str]:
    """What everything was measured on."""
    return {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}


def books(group: str) -> range:
    """The codebooks of a group."""
    first, _, last = group.partition("-")
    return range(int(first), int(last or first) + 1)


class Teacher:
    """Held-out recordings and the stock model's word on every frame of them."""

    def __init__(self, folder: Path, most: int | None = None) -> None:
        from safetensors.torch import load_file
        from transformers import CsmForConditionalGeneration

        self.model = CsmForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.spec, tensors = hf.read_spec(self.model), load_file(folder / "held_out.safetensors")
        self.rotary = hf.rotary_tables(self.model, self.spec.backbone.positions)
        texts = [tensors[f"text_ids.{k}"].long() for k in range(len(tensors) // 2)]
        codes = [tensors[f"codes.{k}"].long() for k in range(len(tensors) // 2)]
        self.speech = [(text, made[:most]) for text, made in zip(texts, codes)]
        self.stock = unlowered(hf.live_weights(self.model))
        self.truth = self._logits(PrecisionPolicy(), self.stock)

    def _logits(self, policy: PrecisionPolicy, packed: Packed) -> list[Tensor]:
        """Log-probabilities ``[frames, codebooks, V]`` of every recording, prompts through the stock weights."""
        cache = DTYPES.get(policy.format_of("kv"), torch.float32)
        replay = Replay(self.spec, self.rotary, (cache, cache))
        out = []
        for text, codes in self.speech:
            x = self.model._merge_input_ids_with_input_values(text[None])["inputs_embeds"]
            tokens, frames = x.shape[1], len(codes)
            positions = torch.arange(tokens + frames)[None]
            seen = torch.ones(1, tokens + frames, dtype=torch.bool)
            prompt = replay.backbone(self.stock, x, positions[:, :tokens], seen[:, :tokens])
            fed = replay.embed(packed, codes[None, :-1])
            at = slice(tokens, tokens + frames - 1)
            before = (prompt.keys, prompt.values)
            later = replay.backbone(packed, fed, positions[:, at], seen[:, : tokens + frames - 1], before)
            hidden = torch.cat([prompt.hidden[0, -1:], later.hidden[0]])
            first = replay.first_logits(packed, hidden)[:, None]
            depth = replay.depth_logits(packed, hidden, codes)
            out.append(torch.cat([first, depth], dim=1))
        return out

    def keep(self, speech: list[tuple[Tensor, Tensor]]) -> None:
        """Compare on these recordings from now on, texts and codes."""
        self.speech = speech
        self.truth = self._logits(PrecisionPolicy(), self.stock)

    def compare(self, policy: PrecisionPolicy, rounding: Rounding | None = None) -> dict[str, Any]:
        """KL in nats, share of equal first choices and SQNR in dB, by group of codebooks."""
        packed, _ = PackedWeights(policy, rounding=rounding).refresh(hf.live_weights(self.model))
        ours, theirs = torch.cat(self._logits(policy, packed)), torch.cat(self.truth)
        p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean(0)
        same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean(0)
        centred = theirs - theirs.mean(-1, keepdim=True)
        noise = (ours - ours.mean(-1, keepdim=True) - centred).square().sum((0, 2))
        signal = centred.square().sum((0, 2))
        found: dict[str, Any] = {}
        for group in GROUPS:
            index = list(books(group))
            error, whole = float(noise[index].sum()), float(signal[index].sum())
            found[group] = {
                "kl_nats": float(kl[index].mean()),
                "top1": float(same[index].mean()),
                "sqnr_db": 10 * math.log10(whole / error) if error else None,
            }
        return found


def at_width(policies: Iterable[PrecisionPolicy]) -> dict[str, Any]:
    """Random weights of CSM-1B's width: the weights' signal by zone, and that of the depth decoder's logits."""
    from transformers import CsmConfig, CsmForConditionalGeneration

    low = dict(num_codebooks=4, backbone_hidden_size=2048, vocab_size=2051)
    config = CsmConfig(num_codebooks=4, num_hidden_layers=1, text_vocab_size=96, depth_decoder_config=low)
    with torch.device("meta"):
        model = CsmForConditionalGeneration(config)
    torch.manual_seed(0)
    model.codec_model = torch.nn.Identity()
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        made = torch.ones(parameter.shape) if parameter.ndim == 1 else 0.02 * torch.randn(parameter.shape)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(made, False))
    spec, live = hf.read_spec(model), hf.live_weights(model)
    angles = torch.outer(torch.arange(4.0), 5e5 ** (-torch.arange(0, 1, 2 / spec.depth.head_dim))).repeat(1, 2)
    tables = hf.RotaryTables(angles.cos(), angles.sin())
    replay = Replay(spec, (tables, tables), (torch.float32, torch.float32))
    hidden, codes = torch.randn(16, 2048), torch.randint(2051, (16, 4))
    truth = replay.depth_logits(unlowered(live), hidden, codes)
    found: dict[str, Any] = {}
    for policy in policies:
        weights = PackedWeights(policy)
        packed, _ = weights.refresh(live)
        noise = replay.depth_logits(packed, hidden, codes) - truth
        error, whole = float(noise.square().sum()), float(truth.square().sum())
        zones = {zone: weights.sqnr_db(f"{zone}.1" if zone == "depth.head" else zone) for zone in ZONES}
        found[policy.name] = {
            "logits_sqnr_db": 10 * math.log10(whole / error) if error else None,
            "weights_sqnr_db": zones,
        }
    return found


def table(presets: dict[str, Any]) -> str:
    """The presets as Markdown."""
    lines = [
        "| preset | MB per frame | share of bf16 | KL of codebook 0, nats | its first choice kept | KL of codebooks 1 to 7 | "
        "their first choices kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in presets.items():
        rest = [row["trained"][group] for group in GROUPS[1:] for _ in books(group)]
        first = row["trained"]["0"]
        kl, same = (sum(part[key] for part in rest) / len(rest) for key in ("kl_nats", "top1"))
        lines.append(
            f"| `{name}` | {row['bytes_per_frame'] / 1e6:,.0f} | {row['share_of_bf16']:.1%} | {first['kl_nats']:.2g} | "
            f"{first['top1']:.2%} | {kl:.2g} | {same:.2%} |"
        )
    return "\n".join(lines) + "\n"


def measure(frames: int | None, zones: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything, as plain data."""
    teacher = Teacher(TRAINED, frames)
    bf16 = sum(row["bytes_per_frame"] for row in planned_table(CSM_1B, PrecisionPolicy(), torch.bfloat16))
    presets: dict[str, Any] = {}
    for name in SHOWN:
        policy = PRESETS[name]
        read = sum(row["bytes_per_frame"] for row in planned_table(CSM_1B, policy, torch.bfloat16))
        presets[name] = {"rules": policy.to_dict()["rules"], "bytes_per_frame": read, "share_of_bf16": read / bf16}
        presets[name]["trained"] = teacher.compare(policy)
        say(f"{name}: {presets[name]['trained']}")
    found: dict[str, Any] = {
        "machine": machine(),
        "frames": sum(len(codes) for _, codes in teacher.speech),
        "presets": presets,
    }
    if zones:
        found["zones"] = {}
        for zone in ZONES:
            for fmt in FORMATS:
                found["zones"][f"{zone} {fmt}"] = teacher.compare(PrecisionPolicy(((zone, fmt),)))
                say(f"{zone} {fmt}: {found['zones'][f'{zone} {fmt}']['0']}")
        found["at_width"] = at_width(PRESETS[name] for name in SHOWN)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--frames", type=int, help="frames of each recording at most, for a quick look")
    parser.add_argument("--no-zones", action="store_true", help="presets only")
    args = parser.parse_args()
    with torch.inference_mode():
        found = measure(args.frames, not args.no_zones, lambda line: print(line, file=sys.stderr))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "precision.json").write_text(json.dumps(found, indent=2) + "\n")
    text = table(found["presets"])
    (args.out / "precision.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
