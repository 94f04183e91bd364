"""What two data-parallel processes of test_training_distributed.py do: every case against one process with all the data.

Run as ``python distributed_training.py RANK WORLD PORT FOLDER``; writes ``rankN.json`` with each case's worst relative error.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from csm_models import build
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from csm_runtime import accelerate
from csm_runtime.training import CsmDataCollator, CsmTrainingConfig, share_counts

LENGTHS = {"uneven": [30, 6], "none on one": [17, 0]}
"""Frames of each rank's batch."""


def example(model: Any, frames: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    books, vocab = model.config.num_codebooks, model.config.vocab_size
    return {
        "text_ids": torch.randint(0, 80, (5,), generator=generator),
        "codes": torch.randint(1, vocab, (frames, books), generator=generator),
    }


def batch_of(model: Any, config: CsmTrainingConfig, rank: int, frames: int, micro_step: int = 0) -> dict[str, Tensor]:
    collate = CsmDataCollator(model.config, config, rank=rank, gradient_accumulation=8)
    for _ in range(micro_step):
        collate([example(model, 1, 0)])
    return collate([example(model, frames, 100 * rank + micro_step)])


def joined(batches: list[dict[str, Tensor]]) -> None:
    """What share_counts does over ranks, in one process."""
    for name in ("num_backbone_targets", "num_depth_targets"):
        total = sum(batch[name] for batch in batches)
        for batch in batches:
            batch[name] = total


def gradients(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def reference(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    joined(batches)
    for batch in batches:
        model(**batch).loss.backward()
    return gradients(model)


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert {name.partition(".")[0] for name in theirs} >= {"backbone_model", "depth_decoder", "lm_head"}
    assert set(theirs) <= set(ours), sorted(set(theirs) - set(ours))
    errors = [float((ours[name] - grad).norm() / grad.norm().clamp(min=1e-12)) for name, grad in theirs.items()]
    assert all(bool(torch.isfinite(grad).all()) for grad in ours.values())
    return max(errors)


def sharded(model: Any, dtype: torch.dtype | None = None) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for layer in (*model.backbone_model.layers, *model.depth_decoder.model.layers):
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def sharded_to_the_heads(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Every module with weights of its own a unit, so that none is whole but in its own forward."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype)

    depth, backbone = model.depth_decoder, model.backbone_model
    units = [*backbone.layers, *depth.model.layers, backbone.embed_tokens, depth.model.embed_tokens]
    units += [depth.model.inputs_embeds_projector, depth.codebooks_head, model.lm_head, model.embed_text_tokens]
    for module in (*units, depth, model):
        fully_shard(module, mp_policy=policy)
    return model


def replicated(model: Any) -> Any:
    return DistributedDataParallel(model)


def gradients_match(rank: int, wrap: Callable[[Any], Any], frames: list[int], fraction: float, **options: Any) -> float:
    config = CsmTrainingConfig(depth_fraction=fraction, seed=3)
    plain = accelerate(build(options.get("name", "base")).train(), training=config)
    wrapped = wrap(copy.deepcopy(plain))
    steps = options.get("micro_steps", 1)
    mine = [batch_of(plain, config, rank, frames[rank], micro) for micro in range(steps)]
    if options.get("shared", True):
        share_counts(mine)
    for batch in mine:
        wrapped(**batch).loss.backward()
    everyone = [batch_of(plain, config, r, frames[r], micro) for r in range(len(frames)) for micro in range(steps)]
    return worst(gradients(wrapped), reference(plain, everyone))


def resumes(rank: int, folder: Path) -> float:
    """Save model, optimizer and step after two of four steps, load them into a new model: the same losses after that."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    config = CsmTrainingConfig(depth_fraction=0.25, seed=9)

    def fresh(seed: int) -> tuple[Any, Any, CsmDataCollator]:
        model = sharded(accelerate(build(seed=seed).train(), training=config))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2), CsmDataCollator(model.config, config)

    def steps(model: Any, optimizer: Any, collate: CsmDataCollator, numbers: range) -> list[float]:
        losses = []
        for step in numbers:
            batch = collate([example(model, 20 + step, 10 * rank + step)])
            share_counts([batch])
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    model, optimizer, collate = fresh(0)
    steps(model, optimizer, collate, range(2))
    weights, moments = get_state_dict(model, optimizer)
    progress = collate.state_dict()
    checkpoint.save({"model": weights, "optimizer": moments, "progress": progress}, checkpoint_id=folder / "checkpoint")
    expected = steps(model, optimizer, collate, range(2, 4))
    model, optimizer, collate = fresh(1)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "progress": collate.state_dict()}
    checkpoint.load(state, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    collate.load_state_dict(state["progress"])
    assert collate.step == 2
    return max(abs(a - b) for a, b in zip(steps(model, optimizer, collate, range(2, 4)), expected))


def main() -> None:
    rank, world, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    cases: dict[str, Callable[[], float]] = {}
    for kind, wrap in (("DDP", replicated), ("FSDP2", sharded)):
        for spread, frames in LENGTHS.items():
            for fraction in (1.0, 0.25):
                cases[f"{kind}, {spread}, {fraction}"] = lambda w=wrap, f=frames, x=fraction: gradients_match(
                    rank, w, f, x
                )
        cases[f"{kind}, not shared"] = lambda w=wrap: gradients_match(rank, w, [30, 6], 1.0, shared=False)
        cases[f"{kind}, tied"] = lambda w=wrap: gradients_match(rank, w, [30, 6], 0.25, name="tied")
        cases[f"{kind}, accumulation"] = lambda w=wrap: gradients_match(rank, w, [30, 6], 0.25, micro_steps=2)
    cases["FSDP2, to the heads"] = lambda: gradients_match(rank, sharded_to_the_heads, [30, 6], 0.25)
    cases["FSDP2, bf16"] = lambda: gradients_match(rank, lambda m: sharded(m, torch.bfloat16), [30, 6], 0.25)
    low = functools.partial(sharded_to_the_heads, dtype=torch.bfloat16)
    cases["FSDP2, bf16 to the heads"] = lambda: gradients_match(rank, low, [30, 6], 0.25)
    cases["resume"] = lambda: resumes(rank, folder)
    found = {name: case() for name, case in cases.items()}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter otherwise


if __name__ == "__main__":
    main()
