"""The training forward of transformers' CSM: what the stock modules run instead of their own ``forward``.

Every function here takes a stock module as ``self`` and stands on the instance, so that hooks (FSDP, PEFT, gradient
checkpointing) work as on any module. A call without labels is the stock one.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from csm_kernels.frames import frame_weights, sample_frames
from csm_kernels.loss import fused_codebook_linear_cross_entropy
from csm_kernels.norm import rms_norm, rms_norm_ref
from csm_kernels.rope import apply_rope
from csm_kernels.swiglu import swiglu, swiglu_linear, swiglu_ref

logger = logging.getLogger("csm_runtime")

IGNORED = -100
BACKBONE_ONLY = -101
HANDLE = "training_acceleration"

stock: Any = None
"""transformers' ``modeling_csm``, imported by :func:`install`: an import inside a forward breaks a compiled graph."""


Changes = list[tuple[nn.Module, Any]]
"""Modules, and what stood on them as their ``forward`` before; None for nothing."""


def install(model: Any, fused_layers: bool) -> Changes:
    """Put the functions below on a model's modules. A deep copy has its own, a pickle is a stock model."""
    global stock  # noqa: PLW0603
    from transformers.models.csm import modeling_csm as stock

    kinds: dict[type, Callable[..., Any]] = {}
    if fused_layers:
        kinds = {stock.CsmRMSNorm: _norm_forward, stock.CsmMLP: _mlp_forward, stock.CsmAttention: _attention_forward}
    changed: Changes = []

    def put(module: Any, function: Callable[..., Any]) -> None:
        changed.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = types.MethodType(function, module)

    for root in (model.backbone_model, model.depth_decoder.model):
        for module in root.modules():
            for kind, function in kinds.items():
                if isinstance(module, kind) and not is_changed(module):
                    put(module, function)
    put(model.depth_decoder, _depth_forward)
    if _takes_targets(model.lm_head):
        put(model.lm_head, _linear_head_forward)
    if _takes_targets(model.depth_decoder.codebooks_head):
        put(model.depth_decoder.codebooks_head, _head_forward)
    put(model, _forward)
    return changed


def remove(changes: Changes) -> None:
    """Undo :func:`install`."""
    for module, before in changes:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before


def is_changed(module: Any) -> bool:
    """Whether something else than its class's stands on a module as ``forward``, ours excepted."""
    own = module.__dict__.get("forward")
    # A pickle of a model of ours comes back with the methods of its class where ours stood.
    return own is not None and not is_ours(own) and getattr(own, "__func__", None) is not type(module).forward


def is_ours(forward: Any) -> bool:
    """Whether what stands on a module is one of these functions, which compute what the stock ones do."""
    return getattr(forward, "__func__", None) in _OURS


def _takes_targets(head: nn.Module) -> bool:
    """Whether a head is a plain matrix; one that is quantised, or anything else, gives logits and is left as it is."""
    plain = isinstance(head, (nn.Linear, stock.CsmCodebooksHead)) and getattr(head, "bias", None) is None
    return plain and bool(head.get_parameter("weight").is_floating_point())


class _NoCache:
    """Stands where a KV cache could and keeps nothing.

    Without any cache the stock modules look for packed sequences in the positions: a wait for the device in eager mode, a
    full mask instead of causal attention in a compiled graph, and an IndexError where a depth decoder's batch has as many
    rows as there are codebooks (transformers 5.17).
    """

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values


_NO_CACHE = _NoCache()


def _no_cache(module: Any) -> _NoCache | None:
    """The cache to pass; None where the layers are checkpointed, which warn of any."""
    return None if module.training and module.is_gradient_checkpointing else _NO_CACHE


# --------------------------------------------------------------------------------------------------------- the model


def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    input_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    input_values_cutoffs: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    audio_codes: Tensor | None = None,
    depth_index: Tensor | None = None,
    num_backbone_targets: Tensor | int | None = None,
    num_depth_targets: Tensor | int | None = None,
    num_ranks: Tensor | int = 1,
    **kwargs: Any,
) -> Any:
    """Stock's ``forward(labels=...)``, with the depth decoder on a sample of the frames and no logits in memory.

    Beside stock's arguments: ``audio_codes`` ``[B, S, codebooks]``, the codes at the positions of audio, instead of
    ``input_values``; ``depth_index`` ``[M]``, the frames drawn (the collator's; drawn here where it is missing);
    ``num_backbone_targets``, ``num_depth_targets`` and ``num_ranks``, the divisors of
    :func:`~csm_runtime.training.share_counts` (default: this batch's own).
    """
    if labels is None and audio_codes is None:
        return type(self).forward(
            self,
            input_ids=input_ids,
            input_values=input_values,
            attention_mask=attention_mask,
            input_values_cutoffs=input_values_cutoffs,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
    handle = self.__dict__[HANDLE]
    config = handle.config
    return_dict = kwargs.pop("return_dict", None)
    trainer_count = kwargs.pop("num_items_in_batch", None)
    if trainer_count is not None and labels is not None:
        # What Trainer counts over the step are labels[..., 1:]: frames where labels are [B, S], the depth decoder's targets
        # where they are [B, S, K]. It makes up for the ranks itself.
        num_ranks = 1
        per_frame = self.config.num_codebooks - 1
        num_backbone_targets = trainer_count if labels.ndim == 2 else trainer_count / per_frame
        num_depth_targets = trainer_count * per_frame if labels.ndim == 2 else trainer_count
    inputs_embeds, targets, ends = _prepared(
        self, input_ids, input_values, input_values_cutoffs, inputs_embeds, labels, audio_codes
    )
    if past_key_values is None and not use_cache:
        past_key_values = _no_cache(self.backbone_model)
    outputs = self.backbone_model(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=bool(use_cache),
        **kwargs,
    )
    states = outputs[0]
    first = targets[:, 1:, 0]
    backbone_sum = _head_loss(self.lm_head, states[:, :-1].flatten(0, 1)[:, None], first.reshape(-1, 1), None, 0.0)
    counted = (first != IGNORED).sum() if num_backbone_targets is None else num_backbone_targets
    backbone_loss = backbone_sum * _share(num_ranks, counted)

    frames = (targets[..., 1:] != IGNORED).any(-1)
    frames = torch.cat([torch.zeros_like(frames[:, :1]), frames[:, 1:]], dim=1)
    index, weight = _drawn(handle, self.training, frames, ends, depth_index)
    depth_sum = _depth_loss(self, config, states, targets, index, weight)
    if num_depth_targets is None:
        num_depth_targets = ((targets[..., 1:] != IGNORED) & frames[..., None]).sum()
    depth_loss = depth_sum * _share(num_ranks, num_depth_targets)

    output = stock.CsmOutputWithPast(
        loss=config.backbone_loss_weight * backbone_loss + config.depth_loss_weight * depth_loss,
        backbone_loss=backbone_loss,
        depth_decoder_loss=depth_loss,
        past_key_values=None if past_key_values is _NO_CACHE else outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    plain = return_dict is False or (return_dict is None and not self.config.return_dict)
    return output.to_tuple() if plain else output


def _share(ranks: Tensor | int, count: Tensor | int | float) -> Any:
    """What a sum is multiplied by to be its part of the mean over the step; nothing to count makes it 0, never NaN."""
    if isinstance(count, Tensor):
        return ranks / count.clamp(min=1)
    return ranks / max(1, count)


def _prepared(
    model: Any,
    input_ids: Tensor | None,
    input_values: Tensor | None,
    cutoffs: Tensor | None,
    inputs_embeds: Tensor | None,
    labels: Tensor | None,
    audio_codes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings ``[B, S, D]``, targets ``[B, S, K]`` and which frames end speech ``[B, S]``."""
    config = model.config
    books = config.num_codebooks
    if labels is None:
        raise ValueError("audio_codes came without labels; pass labels, or leave audio_codes out for a stock forward")
    if labels.ndim == 3:
        if audio_codes is not None:
            raise ValueError("audio_codes goes with labels [B, S]; labels [B, S, codebooks] are the codes already")
        if labels.shape[2] != books:
            raise ValueError(f"labels must be [B, S] or [B, S, {books}], got {tuple(labels.shape)}")
        ends = (labels == config.codebook_eos_token_id).all(-1)
        if inputs_embeds is not None:
            return inputs_embeds, labels, ends
        if input_ids is None or input_ids.ndim != 3:
            raise ValueError("labels [B, S, codebooks] need inputs_embeds [B, S, D] or input_ids [B, S, codebooks]")
        return _audio_embeddings(model, input_ids), labels, ends
    if labels.ndim != 2 or input_ids is None or input_ids.shape != labels.shape:
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"labels must be [B, S] like input_ids, got {tuple(labels.shape)} and input_ids {shape}")
    ends = input_ids == config.audio_eos_token_id
    sounds = input_ids == config.audio_token_id
    if audio_codes is not None:
        if audio_codes.shape != (*labels.shape, books):
            raise ValueError(f"audio_codes must be {(*labels.shape, books)}, got {tuple(audio_codes.shape)}")
        codes = torch.where(ends[..., None], config.codebook_eos_token_id, audio_codes)
        audible = (sounds | ends)[..., None]
        spoken = _audio_embeddings(model, torch.where(audible, codes, 0))
        text = model.embed_text_tokens(input_ids)
        embeds = torch.where(audible, spoken.to(text.dtype), text)
        return embeds, _labelled(codes, labels), ends
    if input_values is None:
        if not torch.compiler.is_compiling() and bool((labels != IGNORED).any()):
            raise ValueError(
                "labels ask for audio frames and there are neither audio_codes nor input_values to take them from"
            )
        silent = labels.new_zeros(*labels.shape, books)
        return model.embed_text_tokens(input_ids), _labelled(silent, labels), ends
    fraction = model.__dict__[HANDLE].config.depth_fraction
    if fraction < 1.0 and bool((labels == BACKBONE_ONLY).any()):
        _warn_of_two_samples(fraction)
    marks = torch.where(sounds | ends, input_ids, IGNORED)  # stock fills in the codes of all audio, context included
    merged = model._merge_input_ids_with_input_values(input_ids, input_values, cutoffs, marks)
    return merged["inputs_embeds"], _labelled(merged["labels"], labels), ends


@functools.cache
def _warn_of_two_samples(fraction: float) -> None:
    logger.warning(
        "labels leave frames out already (-101, the processor's depth_decoder_labels_ratio) and of the others a fraction of %g "
        "is drawn; set the ratio to 1, so that all frames have a chance, or depth_fraction to 1",
        fraction,
    )


def _labelled(codes: Tensor, labels: Tensor) -> Tensor:
    """Codes where the labels want a loss: -100 excludes a position, also one of audio; -101 all but codebook 0."""
    marks = labels[..., None]
    books = torch.arange(codes.shape[-1], device=codes.device)
    out = (marks == IGNORED) | ((marks == BACKBONE_ONLY) & (books > 0))
    return torch.where(out, IGNORED, codes)


def _audio_embeddings(model: Any, codes: Tensor) -> Tensor:
    """Sum of the embeddings of a frame's codes, without one tensor of them all where the module is the stock one."""
    module = model.backbone_model.embed_tokens
    table = getattr(module, "embed_audio_tokens", None)
    if type(module) is not stock.CsmBackboneModelEmbeddings or type(table) is not nn.Embedding:
        return module(codes)
    if module._forward_hooks or module._forward_pre_hooks or table._forward_hooks or table._forward_pre_hooks:
        return module(codes)
    places = (codes + module.audio_tokens_offsets).flatten(0, -2)
    return functional.embedding_bag(places, table.weight, mode="sum").view(*codes.shape[:-1], -1)


def _drawn(
    handle: Any, training: bool, frames: Tensor, ends: Tensor, depth_index: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Rows of the depth decoder: index ``[M]`` into ``B * S`` and weight ``[M]``, None for all ones."""
    if not training:  # validation is on all frames
        if torch.compiler.is_compiling():
            return torch.arange(frames.numel(), device=frames.device), frames.flatten().float()
        index = frames.flatten().nonzero().flatten()
        return (index, None) if len(index) else (index.new_zeros(1), torch.zeros(1, device=frames.device))
    if depth_index is not None:
        return depth_index.clamp(0, frames.numel() - 1), frame_weights(depth_index, frames, ends)
    # Without the collator's draw the count is asked of the device, or, in a compiled graph, bounded by the positions.
    count = frames.numel() if torch.compiler.is_compiling() else int(frames.sum())
    config = handle.config
    return sample_frames(
        frames, config.rows(count), seed=config.seed, step=handle.next_draw(), rank=config.rank, keep=ends
    )


def _depth_loss(
    model: Any, config: Any, states: Tensor, targets: Tensor, index: Tensor, weight: Tensor | None
) -> Tensor:
    """Weighted sum over the rows drawn; a frame is predicted from the state one position before it."""
    rows = targets.flatten(0, 1).index_select(0, index)
    before = states.flatten(0, 1).index_select(0, (index - 1).clamp(min=0))
    if weight is not None:
        # A row that does not count may hold anything; what is computed of it is finite, and then weighed with 0.
        rows = torch.where((weight > 0)[:, None], rows, IGNORED)
    # As bits: FSDP's mixed precision rounds what floats in a unit's inputs.
    bits = None if weight is None else weight.view(torch.int32)
    return model.depth_decoder(
        backbone_last_hidden_state=before, frame_targets=rows, row_weight_bits=bits, z_loss=config.z_loss
    )


# ----------------------------------------------------------------------------------------- the depth decoder and heads


def _depth_forward(
    self: Any,
    input_ids: Tensor | None = None,
    backbone_last_hidden_state: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    frame_targets: Tensor | None = None,
    row_weight_bits: Tensor | None = None,
    z_loss: float = 0.0,
    **kwargs: Any,
) -> Any:
    """With ``frame_targets`` ``[M, K]``, and ``backbone_last_hidden_state`` ``[M, D]``, the sum of the loss; else stock."""
    if frame_targets is None:
        return type(self).forward(
            self,
            input_ids=input_ids,
            backbone_last_hidden_state=backbone_last_hidden_state,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
    fed = torch.where(frame_targets == IGNORED, 0, frame_targets)[:, :-1]
    offsets = torch.arange(fed.shape[1], device=fed.device) * self.vocab_size
    embeds = self.model.embed_tokens(fed + offsets)
    assert backbone_last_hidden_state is not None
    x = torch.cat([backbone_last_hidden_state.to(embeds.dtype)[:, None], embeds], dim=1)
    rows, cache = len(x), _no_cache(self.model)
    if cache is None and rows == x.shape[1]:
        x = functional.pad(x, (0, 0, 0, 0, 0, 1))  # see _NoCache: any other number of rows will do
    hidden = self.model(inputs_embeds=x, past_key_values=cache, use_cache=False)[0][:rows]
    books = torch.arange(1, x.shape[1], device=x.device)
    return _head_loss(self.codebooks_head, hidden[:, 1:], frame_targets[:, 1:], row_weight_bits, z_loss, books)


def _head_loss(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    row_weight_bits: Tensor | None,
    z_loss: float,
    codebook_indices: Tensor | None = None,
) -> Tensor:
    """The fused loss where the head is a stock one, inside its own call; from its logits where it is not (LoRA)."""
    inner = getattr(head, "original_module", head)  # PEFT's modules_to_save hand on what their copy is called with
    if is_ours(inner.__dict__.get("forward")):
        return head(hidden, loss_targets=targets, row_weight_bits=row_weight_bits, z_loss=z_loss)
    logits = (head(hidden) if codebook_indices is None else head(hidden, codebook_indices)).float()
    nll = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    nll = nll.view(targets.shape)
    if z_loss:
        nll = nll + z_loss * torch.where(targets != IGNORED, logits.logsumexp(-1).square(), 0.0)
    return nll.sum() if row_weight_bits is None else (nll * row_weight_bits.view(torch.float32)[:, None]).sum()


def _head_forward(
    self: Any,
    hidden_states: Tensor,
    codebook_indices: Tensor | None = None,
    loss_targets: Tensor | None = None,
    row_weight_bits: Tensor | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Of the codebooks' heads: the loss with ``loss_targets`` ``[M, K - 1]``, else stock."""
    if loss_targets is None:
        return type(self).forward(self, hidden_states, codebook_indices)
    return _fused(hidden_states, self.weight, loss_targets, row_weight_bits, z_loss)


def _linear_head_forward(
    self: Any,
    hidden_states: Tensor,
    loss_targets: Tensor | None = None,
    row_weight_bits: Tensor | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Of codebook 0's head: the loss with ``loss_targets`` ``[M, 1]``, else stock."""
    if loss_targets is None:
        return type(self).forward(self, hidden_states)
    return _fused(hidden_states, self.weight.t()[None], loss_targets, row_weight_bits, z_loss)


def _fused(hidden: Tensor, weight: Tensor, targets: Tensor, row_weight_bits: Tensor | None, z_loss: float) -> Tensor:
    row_weight = None if row_weight_bits is None else row_weight_bits.view(torch.float32)
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)
    if row_weight is not None and hidden.dtype == torch.float64:
        row_weight = row_weight.double()
    return fused_codebook_linear_cross_entropy(hidden, weight, targets, row_weight=row_weight, z_loss=z_loss).loss


# ------------------------------------------------------------------------------------------------------------- layers


def _left_to_inductor(x: Tensor) -> bool:
    """Whether the compiler fuses and recomputes the plain formula better than it can call an op of ours."""
    return torch.compiler.is_compiling() and not x.is_cuda


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype == torch.float64:
        return type(self).forward(self, hidden_states)
    if _left_to_inductor(hidden_states):
        out = rms_norm_ref(hidden_states, self.weight, self.variance_epsilon).to(hidden_states.dtype)
    else:
        out = rms_norm(hidden_states, self.weight, self.variance_epsilon)
    return out.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    if getattr(self.config, "hidden_act", None) not in ("silu", "swish") or x.dtype == torch.float64:
        return type(self).forward(self, x)
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    if _left_to_inductor(x):
        return down(swiglu_ref(gate, up).to(gate.dtype))
    plain = type(down) is nn.Linear and not (down._forward_hooks or down._forward_pre_hooks)
    if not plain or type(down.weight) is not nn.Parameter:
        return down(swiglu(gate, up))
    return swiglu_linear(gate, up, down.weight, down.bias)


def _attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stock's, with queries and keys rotated by one kernel each, which on a CPU would be no gain."""
    ours = hidden_states.is_cuda and hidden_states.dtype != torch.float64 and self.head_dim % 2 == 0
    if not ours or position_embeddings is None:
        return type(self).forward(
            self,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    return _rotated_attention(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)


def _rotated_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    batch, tokens = hidden_states.shape[:-1]
    cos, sin = (table.expand(batch, tokens, -1).reshape(batch * tokens, -1).float() for table in position_embeddings)
    place = torch.arange(batch * tokens, device=hidden_states.device).view(batch, tokens)

    def heads(projection: nn.Module) -> Tensor:
        return projection(hidden_states).view(batch, tokens, -1, self.head_dim)

    query = apply_rope(heads(self.q_proj), cos, sin, place).transpose(1, 2)
    key = apply_rope(heads(self.k_proj), cos, sin, place).transpose(1, 2)
    value = heads(self.v_proj).transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    attend = stock.ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, stock.eager_attention_forward
    )
    out, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=0.0 if not self.training else self.attention_dropout,
        scaling=self.scaling,
        **kwargs,
    )
    return self.o_proj(out.reshape(batch, tokens, -1).contiguous()), weights


_OURS = frozenset(
    (
        _forward,
        _depth_forward,
        _head_forward,
        _linear_head_forward,
        _norm_forward,
        _mlp_forward,
        _attention_forward,
    )
)
for _function in _OURS:
    _function.__name__ = "forward"  # a pickle holds a bound method by its name: that of the stock one
