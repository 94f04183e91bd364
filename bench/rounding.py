"""What rounding int4 by GPTQ is worth, by format and by zone; writes JSON and the tables of docs/precision.md.

    python bench/rounding.py --out bench/results

On the small model of ``tests/data/trained_csm``: GPTQ is calibrated on half of the held-out recordings, or on speech that the
model makes after made-up text, as ``accelerate(rounding="gptq")`` does by default; all figures are of the other half,
teacher-forced, against the stock weights in fp32. On depth decoders of CSM-1B's width with random weights: normal ones,
whose activations are hardly correlated, and ones with a part of rank 64 in common, whose activations are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from precision import GROUPS, ROOT, TRAINED, Teacher, books, machine
from torch import Tensor

from csm_kernels.testing import sqnr_db
from csm_runtime.adapters import hf
from csm_runtime.calibration import Calibration, Passage, Reference, made_up_prompts, speak
from csm_runtime.precision import PRESETS, PrecisionPolicy
from csm_runtime.rounding import Rounding, calibrate_rounding
from csm_runtime.weights import PackedWeights

FORMATS = ("int4", "int4:64", "int4:32", "int4:128:asymmetric", "int4:64:asymmetric", "int4:32:asymmetric")
MATRICES = (
    "backbone.attention", "backbone.mlp", "backbone.head", "depth.attention", "depth.mlp", "depth.projection", "depth.head",
)  # fmt: skip
SAFE = ("backbone.head",)
WIDE_FORMATS = ("int4",)
HOW = ("nearest", "gptq, made-up text", "gptq, recordings")
RANK = 64
KINDS = ("normal", f"rank {RANK} in common")


def policies(fmt: str) -> dict[str, PrecisionPolicy]:
    """Each zone alone, all matrices but codebook 0's head, and the preset ``smallest`` with its MLPs in this format."""
    alone = {zone: PrecisionPolicy(((zone, fmt),)) for zone in MATRICES}
    every = PrecisionPolicy(tuple((zone, fmt) for zone in MATRICES if zone not in SAFE))
    smallest = PRESETS["smallest"].after((("*.mlp", fmt),), "smallest")
    return {**alone, "all but backbone.head": every, "smallest": smallest}


def figures(found: dict[str, Any]) -> dict[str, float]:
    """KL and SQNR of codebook 0, and of the others."""
    rest = [(found[group], len(books(group))) for group in GROUPS[1:]]
    count = sum(n for _, n in rest)
    none = float("inf")  # nothing differs
    return {
        "kl0": found["0"]["kl_nats"],
        "sqnr0": found["0"]["sqnr_db"] or none,
        "top1_0": found["0"]["top1"],
        "kl": sum(one["kl_nats"] * n for one, n in rest) / count,
        "sqnr": sum((one["sqnr_db"] or none) * n for one, n in rest) / count,
        "top1": sum(one["top1"] * n for one, n in rest) / count,
    }


def trained(most: int | None, formats: tuple[str, ...], say: Callable[[str], None]) -> dict[str, Any]:
    """The small model: figures by way of rounding, format and zone."""
    teacher = Teacher(TRAINED, most)
    known, unknown = teacher.speech[::2], teacher.speech[1::2]
    calls = [{"input_ids": text[None], "codes": codes} for text, codes in known]
    made_up = [
        {**row, "codes": speak(teacher.model, row, Calibration().frames, 0, None)}
        for row in made_up_prompts(teacher.model)
    ]
    teacher.keep(unknown)
    found: dict[str, Any] = {how: {fmt: {} for fmt in formats} for how in HOW}
    seconds = 0.0
    for fmt in formats:
        whole = PrecisionPolicy(tuple((zone, fmt) for zone in MATRICES))
        started = time.perf_counter()
        roundings: dict[str, Rounding | None] = {"nearest": None}
        roundings["gptq, recordings"] = calibrate_rounding(teacher.model, whole, calls, progress=False)
        seconds = max(seconds, time.perf_counter() - started)
        roundings["gptq, made-up text"] = calibrate_rounding(teacher.model, whole, made_up, progress=False)
        for how in HOW:
            for name, policy in policies(fmt).items():
                found[how][fmt][name] = figures(teacher.compare(policy, roundings[how]))
            say(f"{fmt}, {how}: {found[how][fmt]['smallest']}")
    frames = {"calibrated": sum(len(codes) for _, codes in known), "judged": sum(len(codes) for _, codes in unknown)}
    return {"frames": frames, "slowest_calibration_s": seconds, "figures": found}


def wide_model(common: bool) -> Any:
    """One backbone layer of width 2048 and two depth layers of CSM-1B's width, weights random, 4 codebooks."""
    from transformers import CsmConfig, CsmForConditionalGeneration

    low = dict(num_codebooks=4, backbone_hidden_size=2048, vocab_size=2051, num_hidden_layers=2)
    config = CsmConfig(num_codebooks=4, num_hidden_layers=1, text_vocab_size=96, depth_decoder_config=low)
    with torch.device("meta"):
        model = CsmForConditionalGeneration(config)
    torch.manual_seed(0)
    model.codec_model = torch.nn.Identity()

    def made(shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape)
        noise = torch.randn(shape)
        if common:
            part = torch.randn(*shape[:-1], RANK) @ torch.randn(*shape[:-2], RANK, shape[-1])
            noise = (noise + part / RANK**0.5) / 2**0.5
        return 0.02 * noise

    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(made(parameter.shape), False))
    for root in (model.backbone_model, model.depth_decoder.model):
        root.rotary_emb = type(root.rotary_emb)(root.config)
    offsets = torch.arange(4) * config.vocab_size
    model.backbone_model.embed_tokens.register_buffer("audio_tokens_offsets", offsets, persistent=False)
    return model.eval()


def at_width(say: Callable[[str], None]) -> dict[str, Any]:
    """Signal of the depth decoder's logits, all its matrices in int4, on frames that GPTQ has not seen."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        model = wide_model(kind != "normal")
        codes = torch.randint(2051, (2, 128, 4), generator=torch.Generator().manual_seed(1))
        text = torch.arange(1, 9)[None]
        calls = Calibration([{"input_ids": text, "codes": codes[0]}])
        x = model.backbone_model.embed_tokens(codes[1, :8][None])
        passage = Passage(x, torch.ones(1, 8, dtype=torch.long), torch.arange(8)[None], codes[1])
        judged = Reference(model, [passage])
        found[kind] = {}
        for fmt in WIDE_FORMATS:
            policy = PrecisionPolicy(tuple((zone, fmt) for zone in MATRICES if zone.startswith("depth.")))
            started = time.perf_counter()
            rounding = calibrate_rounding(model, policy, calls, progress=False)
            took = time.perf_counter() - started
            row = {"seconds": took, "matrices": len(rounding.matrices)}
            for how, one in (("nearest", None), ("gptq", rounding)):
                packed, _ = PackedWeights(policy, rounding=one).refresh(hf.live_weights(model))
                _, rest = judged.logits(packed, judged.hidden, torch.float32)
                row[how] = sqnr_db(rest, judged.rest)
            found[kind][fmt] = row
            say(f"{kind}, {fmt}: {row}")
    return found


def tables(found: dict[str, Any]) -> str:
    """Everything as Markdown."""
    lines: list[str] = []
    data = found["trained"]["figures"]
    formats = list(data["nearest"])
    for key, title, digits in (("kl", "KL, nats", ".2g"), ("sqnr", "SQNR, dB", ".1f")):
        lines += [
            f"| {title} | rounding | {' | '.join(f'`{fmt}`' for fmt in formats)} |",
            "|---" * (len(formats) + 2) + "|",
        ]
        for zone in data["nearest"][formats[0]]:
            books_shown = ("0",) if zone.startswith("backbone") else ("",) if zone.startswith("depth") else ("0", "")
            for books_of in books_shown:
                which = "codebook 0" if books_of else "codebooks 1 to 7"
                shown = f"{zone}, {which}" if len(books_shown) > 1 else zone
                for how in HOW:
                    cells = [format(data[how][fmt][zone][f"{key}{books_of}"], digits) for fmt in formats]
                    lines.append(f"| {shown} | {how} | {' | '.join(cells)} |")
        lines.append("")
    if "at_width" in found:
        lines += [
            "| random weights at width | format | nearest, dB | gptq, dB | calibration, s |",
            "|---|---|---|---|---|",
        ]
        for kind, rows in found["at_width"].items():
            for fmt, row in rows.items():
                lines.append(f"| {kind} | `{fmt}` | {row['nearest']:.1f} | {row['gptq']:.1f} | {row['seconds']:.0f} |")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--frames", type=int, help="frames of each recording at most, for a quick look")
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="of the small model")
    parser.add_argument("--no-width", action="store_true", help="the small model only")
    args = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine()}
    with torch.no_grad():
        for name, part in (
            ("trained", lambda: trained(args.frames, tuple(args.formats), say)),
            ("at_width", lambda: at_width(say)),
        ):
            if name == "trained" or not args.no_width:
                found[name] = part()
                (args.out / "precision-int4.json").write_text(json.dumps(found, indent=2) + "\n")
                (args.out / "precision-int4.md").write_text(tables(found))
    print(tables(found))


if __name__ == "__main__":
    main()
