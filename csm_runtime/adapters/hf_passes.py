"""Parallel passes through the stock modules: a prompt through the backbone, given codes through the depth decoder.

The layers of a stack are alike, so one of them is compiled, with the backend "csm", and serves all of them: that takes a
sixteenth of the time that the whole backbone takes. Batch and prompt length are symbols to it, keys and values go straight
into buffers, and where a chunk begins is a tensor: neither a longer prompt nor padding compiles again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csm_runtime import compiling
from csm_runtime.metrics import Metrics

logger = logging.getLogger("csm_runtime")

CHUNK = 512
"""Positions per pass: bounds the attention mask and the activations of a long prompt."""


@dataclass
class Prefilled:
    """A prompt's keys and values per layer, ``[N, KV, T, D]``, and its last normalised hidden state ``[N, D]``."""

    layers: list[tuple[Tensor, Tensor]]
    hidden: Tensor


class _Slots:
    """A stock cache of one layer: writes new keys and values at ``slots`` and shows the first ``count`` of all."""

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor, count: int) -> None:
        self.keys, self.values, self.slots, self.count = keys, values, slots, count

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.slots, keys)
        self.values.index_copy_(2, self.slots, values)
        return self.keys[:, :, : self.count], self.values[:, :, : self.count]


def _layer_pass(
    layer: Any, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """One stock layer over ``[N, T, D]``; ``mask`` is ``[N, 1, T, C]`` bool, ``keys`` and ``values`` are written."""
    cache = _Slots(keys, values, slots, mask.shape[-1])
    return layer(x, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=cache, use_cache=True)


def _frozen(module: Any) -> Any:
    """A copy of a module around the same weights, none of which wants a gradient.

    Dynamo guards on that: without it, a model of which parts are frozen compiles for every pattern of them.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {
        name: None if p is None else torch.nn.Parameter(p.detach(), requires_grad=False)
        for name, p in module._parameters.items()
    }
    twin.__dict__["_modules"] = {name: None if m is None else _frozen(m) for name, m in module._modules.items()}
    return twin


def _own(tensor: Tensor) -> Tensor:
    """A contiguous tensor that is no view: Dynamo guards on what a view is a view of."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


class Passes:
    """Parallel passes of one model, through compiled layers where that works and stock ones elsewhere.

    Args:
        model: transformers' CSM, with its own weights; it may be moved or changed between calls.
        compiled: whether to compile.
        metrics: where a fault of the compiled layers is counted.

    Attributes:
        replaced: what the backend replaced, by op, over all graphs it has compiled for this model.
    """

    def __init__(self, model: Any, compiled: bool, metrics: Metrics) -> None:
        self._model, self._metrics = model, metrics
        self.replaced: Counter[str] = Counter()
        self._layer: Callable[..., Tensor] | None = None
        self._ahead: tuple[tuple[Tensor, Tensor | None, Tensor], Prefilled] | None = None
        if compiled:
            self._layer = compiling.compile_pass(_layer_pass, self.replaced)

    @property
    def compiled(self) -> bool:
        """Whether layers are compiled, and have not failed so far."""
        return self._layer is not None

    def warm_up(self, rows: int) -> None:
        """Compile for batches of one row, or of several, and compare with the stock layer.

        Whatever comes of it, passes work afterwards: a layer that fails or differs is not used.
        """
        stack = self._model.backbone_model
        weight = stack.norm.weight
        # All sizes differ from one another, so that none is taken for another one.
        start, end, room = 4, 23, 29
        slots = torch.arange(start, end, device=weight.device)
        x = torch.randn(rows, end - start, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight)
        mask = _own((torch.arange(end, device=weight.device) <= slots[:, None]).expand(rows, 1, -1, -1))
        cos, sin = map(_own, stack.rotary_emb(x, position_ids=slots.expand(rows, -1)))
        cache = weight.new_zeros(rows, stack.config.num_key_value_heads, room, stack.config.head_dim)

        def compare(layer: Callable[..., Tensor]) -> None:
            made, frozen = [], _frozen(stack.layers[0])
            for run in (layer, _layer_pass):
                caches = cache.clone(), cache.clone()
                made.append((run(frozen, x, mask, cos, sin, slots, *caches), *caches))
            for ours, stock in zip(*made):
                error = float((ours - stock).abs().max()) / max(float(stock.abs().max()), 1e-12)
                if not error <= (1e-3 if x.dtype == torch.float32 else 5e-2):
                    raise ArithmeticError(
                        f"a compiled layer differs from the stock one by {error:.1e} of its largest value"
                    )

        self._attempt(compare)

    def prefill(self, x: Tensor, mask: Tensor | None, positions: Tensor, past: Prefilled | None = None) -> Prefilled:
        """Run a prompt through the backbone.

        Args:
            x: ``[N, T, D]`` embeddings in the model's dtype.
            mask: ``[N, P + T]`` 1 where a position counts, or None for all.
            positions: ``[N, T]`` or ``[1, T]`` rotary positions.
            past: the P positions before these, or None for none.

        Returns:
            Keys and values of all ``P + T`` positions.
        """
        if self._ahead is not None and all(map(_equal, self._ahead[0], (x, mask, positions))):
            made, self._ahead = self._ahead[1], None
            return made
        backbone = self._model.backbone_model
        found = self._attempt(lambda layer: self._stack(layer, backbone, x, mask, positions, past))
        if found is None:
            return _stock_prefill(self._model, x, mask, positions, past)
        hidden, layers = found
        return Prefilled(layers, hidden[:, -1].float())

    def ahead(self, x: Tensor, mask: Tensor | None, positions: Tensor) -> None:
        """Run a prompt before it is asked for: :meth:`prefill` takes the result when that comes."""
        self._ahead = (x, mask, positions), self.prefill(x, mask, positions)

    def forget_ahead(self) -> None:
        """Give up what :meth:`ahead` made and nobody asked for."""
        self._ahead = None

    def codebook_logits(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced logits of the depth decoder: what each codebook is drawn from, given those before it.

        Args:
            hidden: ``[N, D]`` normalised hidden states of the backbone.
            codes: ``[N, n]`` the first codebooks of the frames, 1 to all but the last of them.

        Returns:
            ``[N, n, V]`` fp32: logits of codebooks 1 to n.
        """
        depth, count = self._model.depth_decoder, codes.shape[1]
        hidden = hidden.to(depth.model.norm.weight.dtype)
        offsets = torch.arange(count, device=codes.device) * depth.model.vocab_size
        x = torch.cat([hidden[:, None], depth.model.embed_tokens(codes + offsets)], dim=1)
        x = depth.model.inputs_embeds_projector(x)
        found = self._attempt(lambda layer: self._stack(layer, depth.model, x, None, None))
        if found is None:
            fed = torch.nn.functional.pad(codes, (1, 0))
            return depth(input_ids=fed, backbone_last_hidden_state=hidden).logits.float()
        heads = torch.arange(1, count + 1, device=codes.device)
        return depth.codebooks_head(found[0][:, 1:], heads).float()

    def _attempt(self, work: Callable[[Callable[..., Tensor]], Any]) -> Any:
        """``work`` with compiled layers; None where there are none, or no longer any."""
        model = self._model
        # A training-mode layer may checkpoint, which does without a cache; another attention wants another mask.
        if self._layer is None or model.training or model.config._attn_implementation != "sdpa":
            return None
        try:
            return work(self._layer)
        except Exception as error:  # no compiler, or a bug in one: the stock layers do the same
            what = f"compiled passes do not work here: {type(error).__name__}: {str(error).strip()[:200]}"
            if self._metrics.fault(what):
                logger.warning("%s; prompts go through the stock layers", what, exc_info=True)
            self._layer = None
            return None

    def _stack(
        self,
        layer: Callable[..., Tensor],
        stack: Any,
        x: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        past: Prefilled | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """All layers of a stack, in chunks: the last chunk's normalised output, and keys and values per layer."""
        rows, new = x.shape[:2]
        config, device = stack.config, x.device
        done = 0 if past is None else past.layers[0][0].shape[2]
        tokens = done + new
        # One position more than are ever used: whether a part of a cache is all of it would be a guard.
        shape = (rows, config.num_key_value_heads, tokens + 1, config.head_dim)
        layers = [_frozen(module) for module in stack.layers[: config.num_hidden_layers]]
        caches = [(x.new_empty(shape), x.new_empty(shape)) for _ in layers]
        for cache, before in zip(caches, [] if past is None else past.layers):
            for own, other in zip(cache, before):
                own[:, :, :done].copy_(other)
        steps = torch.arange(tokens, device=device)
        positions = steps[None] if positions is None else positions
        if mask is not None:
            mask = mask.bool()
        chunks = -(-new // CHUNK)
        # Chunks of nearly equal length: a last one of a single position would be compiled for separately.
        ends = [done + new * (i + 1) // chunks for i in range(chunks)]
        out, start = x, done
        for end in ends:
            slots = _own(steps[start:end])
            allowed = (steps[:end] <= slots[:, None]).expand(rows, 1, -1, -1)
            if mask is not None:
                allowed = allowed & mask[:, None, None, :end]
            out = _own(x[:, start - done : end - done])
            where = positions[:, start - done : end - done]
            cos, sin = stack.rotary_emb(out, position_ids=where.expand(rows, -1))
            allowed, cos, sin = map(_own, (allowed, cos, sin))
            run = layer if end - start > 1 else _layer_pass
            for module, (keys, values) in zip(layers, caches):
                out = run(module, out, allowed, cos, sin, slots, keys, values)
            start = end
        return stack.norm(out), [(keys[:, :, :tokens], values[:, :, :tokens]) for keys, values in caches]


def _stock_prefill(
    model: Any, x: Tensor, mask: Tensor | None, positions: Tensor, past: Prefilled | None = None
) -> Prefilled:
    """The same by the stock backbone's own forward."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=model.config)
    for index, pair in enumerate([] if past is None else past.layers):
        cache.update(*pair, index)
    done = cache.get_seq_length()
    hidden = x[:, -1]
    for start in range(0, x.shape[1], CHUNK):
        end = min(start + CHUNK, x.shape[1])
        out = model.backbone_model(
            inputs_embeds=x[:, start:end],
            attention_mask=None if mask is None else mask[:, : done + end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        hidden = out.last_hidden_state[:, -1]
    return Prefilled([(layer.keys, layer.values) for layer in cache.layers], hidden.float())
