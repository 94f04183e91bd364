"""Calls of Sesame's stack as the runtime reads them: prompts of frames, how codes are drawn, and the stock model's caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from csm_runtime.adapters.hf_call import Request, Sampling, Sound
from csm_runtime.adapters.sesame import embedded, plain_stack


def request_of(
    model: Any, tokens: Tensor, mask: Tensor, positions: Tensor, temperature: float, topk: int, max_frames: int
) -> Request:
    """A prompt of frames as a call of the decode loop.

    Args:
        model: of Sesame's structure.
        tokens: ``[N, T, codebooks + 1]``, text last.
        mask: likewise, which of them count.
        positions: ``[N, T]``.
        temperature: of all codebooks.
        topk: likewise; 1 is greedy.
        max_frames: to be made.
    """
    sampling = Sampling(topk > 1, temperature, topk) if topk > 1 else Sampling(False)
    text = mask[..., -1]
    return Request(
        input_ids=torch.where(text, tokens[..., -1], -1).long(),
        backbone=sampling,
        depth=sampling,
        max_frames=max_frames,
        eos_token=0,
        judged=tokens.shape[2] - 1,
        pad_token=0,
        pads_finished_rows=True,
        return_dict=False,
        prompt={"embeds": embedded(model, tokens, mask), "sounds": _sounds(tokens, mask)},
        mask=None,
        positions=positions,
        output_cache=None,
    )


def _sounds(tokens: Tensor, mask: Tensor) -> list[Sound]:
    """The segments of sound of a prompt of one row; nothing where a frame holds both, or neither, text and all codes."""
    if len(tokens) != 1:
        return []
    text, audio = mask[0, :, -1], mask[0, :, :-1]
    whole = audio.all(dim=1)
    if not bool((text != whole).all()) or not bool((whole == audio.any(dim=1)).all()):
        return []
    edges = torch.nn.functional.pad(whole.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    # The last frame of a run takes the place of the end-of-sound token: what is known of a prompt ends behind it.
    return [Sound(a, b - 1, tokens[0, a:b, :-1].contiguous()) for a, b in zip(edges[::2], edges[1::2])]


def fed(frame: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and mask ``[1, 1, codebooks + 1]`` with which a frame ``[codebooks]`` is fed back."""
    tokens = torch.nn.functional.pad(frame.long(), (0, 1))[None, None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[..., -1] = False
    return tokens, mask


def lengthened(request: Request, positions: int) -> Request:
    """The same call with a prompt of so many positions, of whose tokens only the last are known."""
    shape = (len(request.input_ids), positions)
    return replace(request, input_ids=request.input_ids.new_full(shape, -1))


def cached_rows(model: Any) -> int:
    """Rows of the stock model's own KV caches."""
    return int(plain_stack(model, "backbone").layers[0].attn.kv_cache.k_cache.shape[0])


@torch.no_grad()
def refill(model: Any, kind: Any, tokens: Tensor, mask: Tensor, positions: Tensor) -> None:
    """Have the stock model's caches hold what has been fed to somebody else.

    Args:
        model: the model; ``kind`` its class, whose own methods are called.
        kind: likewise.
        tokens: ``[B, S, codebooks + 1]`` all of it; masks and positions likewise.
        mask: see above.
        positions: ``[B, S]``.
    """
    kind.reset_caches(model)
    x = embedded(model, tokens, mask)
    allowed = model.backbone_causal_mask[positions]
    model.backbone(x, input_pos=positions, mask=allowed)
