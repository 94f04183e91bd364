"""The divisors of the losses: how many targets the whole optimizer step has."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed

COUNTS = ("num_backbone_targets", "num_depth_targets")


def share_counts(batches: Sequence[MutableMapping[str, Any]], group: Any = None) -> None:
    """Make the counts in the micro-batches of one optimizer step those of the step: all micro-batches, all ranks.

    Call it once per step, before the first forward, on every rank, also on one whose batches hold no frames. The losses are
    then means over the step, however its frames are spread: gradients equal those of one process with one large batch.
    DDP and FSDP average gradients over ranks, which the model makes up for by ``num_ranks``, set here too.
    One ``all_reduce`` of two integers where ``torch.distributed`` is initialized, none otherwise.

    Args:
        batches: what the collator made, changed in place.
        group: process group of the ranks that gradients are averaged over; default: all.

    Raises:
        ValueError: no batches, or one without the counts.
    """
    if not batches:
        raise ValueError("batches is empty; pass the micro-batches of one optimizer step")
    for place, batch in enumerate(batches):
        if not all(name in batch for name in COUNTS):
            raise ValueError(f"batches[{place}] has no {' and '.join(COUNTS)}; make it with CsmDataCollator")
    totals = torch.stack([sum((batch[name] for batch in batches), torch.tensor(0)) for name in COUNTS]).cpu()
    ranks = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size(group)
        on_gpu = torch.distributed.get_backend(group) == "nccl"
        shared = totals.cuda() if on_gpu else totals
        torch.distributed.all_reduce(shared, group=group)
        totals = shared.cpu()
    for batch in batches:
        for name, total in zip(COUNTS, totals):
            batch[name] = total.to(batch[name].device, non_blocking=True)
        batch["num_ranks"] = torch.tensor(ranks)
