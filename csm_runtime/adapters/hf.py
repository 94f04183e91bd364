"""Adapter of transformers' ``CsmForConditionalGeneration``: shape, live weights, and whether the modules are stock.

transformers is imported inside functions, so that importing this package does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from csm_kernels.quant import QuantWeight, dequantize, take_rows, widen
from csm_runtime.adapters import hf_training
from csm_runtime.adapters.spec import (
    LayerWeights,
    LinearWeights,
    ModelSpec,
    ModelWeights,
    RotaryTables,
    StackSpec,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
_OVERRIDABLE = (
    "forward",
    "prepare_inputs_for_generation",
    "_merge_input_ids_with_input_values",
    "_sample",
    "_prefill",
    "_prepare_generation_config",
    "_get_stopping_criteria",
    "_get_logits_processor",
    "_update_model_kwargs_for_generation",
)


def matches(model: Any) -> bool:
    """Whether this adapter knows the model's class."""
    return any(
        base.__name__ == "CsmForConditionalGeneration" and base.__module__.startswith("transformers.")
        for base in type(model).__mro__
    )


def _modules() -> Any:
    from transformers.models.csm import modeling_csm

    return modeling_csm


def read_spec(model: Any) -> ModelSpec:
    """The model's shape.

    Raises:
        ValueError: something in the config the engine does not implement; names the field, its value and what works.
    """
    config = model.config
    depth = config.depth_decoder_config
    for name, part in (("config", config), ("config.depth_decoder_config", depth)):
        if part.hidden_act not in ("silu", "swish"):
            raise ValueError(f"{name}.hidden_act is {part.hidden_act!r}; supported: 'silu'")
        kind = (part.rope_parameters or {}).get("rope_type", "default")
        if kind not in _STATIC_ROPE:
            raise ValueError(
                f"{name}.rope_parameters has rope_type {kind!r}, whose frequencies change with the length; "
                f"supported: {_STATIC_ROPE}"
            )
        if part.num_attention_heads % part.num_key_value_heads:
            raise ValueError(
                f"{name}: num_attention_heads ({part.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({part.num_key_value_heads})"
            )
    if depth.num_codebooks != config.num_codebooks:
        raise ValueError(
            f"config.num_codebooks is {config.num_codebooks} and config.depth_decoder_config.num_codebooks is "
            f"{depth.num_codebooks}; they must be equal"
        )
    if config.num_codebooks < 2:
        raise ValueError(f"config.num_codebooks is {config.num_codebooks}; at least 2 are needed")
    if depth.backbone_hidden_size != config.hidden_size:
        raise ValueError(
            f"config.depth_decoder_config.backbone_hidden_size is {depth.backbone_hidden_size}, config.hidden_size is "
            f"{config.hidden_size}; they must be equal"
        )
    if not isinstance(config.codebook_eos_token_id, int):
        raise ValueError(f"config.codebook_eos_token_id must be one integer, got {config.codebook_eos_token_id!r}")
    if read_dtype(model) not in _DTYPES:
        raise ValueError(f"model dtype is {read_dtype(model)}; supported: {_DTYPES}")
    return ModelSpec(
        backbone=_stack(config),
        depth=_stack(depth),
        codebooks=config.num_codebooks,
        vocab=config.vocab_size,
        depth_vocab=depth.vocab_size,
    )


def read_dtype(model: Any) -> torch.dtype:
    """The dtype the model computes in, and so that of its KV cache."""
    return model.backbone_model.layers[0].input_layernorm.weight.dtype


def codec_size(model: Any) -> tuple[torch.dtype, int]:
    """Dtype and bytes of the codec's parameters."""
    parameters = list(model.codec_model.parameters())
    return model.codec_model.dtype, sum(p.nbytes for p in parameters)


def encoding_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """What the codec encodes sound with, by name."""
    codec = model.codec_model
    named = (*codec.named_parameters(), *codec.named_buffers())
    return [(name, x.detach()) for name, x in named if not name.startswith(("decoder", "upsample"))]


def _stack(config: Any) -> StackSpec:
    return StackSpec(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        positions=config.max_position_embeddings,
    )


def class_name(model: Any) -> str:
    """Of the model, or of the one whose parameters it has."""
    other = model.__dict__.get("read_from")
    return type(model).__name__ if other is None else other.class_name


def follow(model: Any) -> None:
    """Bring a model up to date whose parameters are those of another, see :class:`csm_runtime.adapters.sesame.Twin`.

    Raises:
        ValueError: the other has been modified.
    """
    other = model.__dict__.get("read_from")
    if other is not None:
        other.follow()


def live_weights(model: Any) -> ModelWeights:
    """The model's parameters as they are now, without gradient."""
    depth = model.depth_decoder

    def linear(module: nn.Linear) -> LinearWeights:
        return LinearWeights(module.weight.detach(), None if module.bias is None else module.bias.detach())

    def layers(stack: Any) -> list[LayerWeights]:
        return [
            LayerWeights(
                input_norm=layer.input_layernorm.weight.detach(),
                post_norm=layer.post_attention_layernorm.weight.detach(),
                **{name: linear(getattr(layer.self_attn, f"{name}_proj")) for name in "qkvo"},
                **{name: linear(getattr(layer.mlp, f"{name}_proj")) for name in ("gate", "up", "down")},
            )
            for layer in stack.layers[: stack.config.num_hidden_layers]
        ]

    return ModelWeights(
        backbone=layers(model.backbone_model),
        backbone_norm=model.backbone_model.norm.weight.detach(),
        backbone_head=linear(model.lm_head),
        backbone_embedding=model.backbone_model.embed_tokens.embed_audio_tokens.weight.detach(),
        depth=layers(depth.model),
        depth_norm=depth.model.norm.weight.detach(),
        depth_projection=linear(depth.model.inputs_embeds_projector),
        depth_heads=depth.codebooks_head.weight.detach(),
        depth_embedding=depth.model.embed_tokens.weight.detach(),
    )


def linears(model: Any) -> dict[str, nn.Linear]:
    """The linear modules by the names :class:`~csm_runtime.weights.PackedWeights` gives their matrices."""
    depth = model.depth_decoder
    out = {"backbone.head": model.lm_head, "depth.projection": depth.model.inputs_embeds_projector}
    for name, stack in (("backbone", model.backbone_model), ("depth", depth.model)):
        for i, layer in enumerate(stack.layers):
            out.update({f"{name}.{i}.{part}": getattr(layer.self_attn, f"{part}_proj") for part in "qkvo"})
            out.update({f"{name}.{i}.{part}": getattr(layer.mlp, f"{part}_proj") for part in ("gate", "up", "down")})
    return out


def rotary_tables(model: Any, positions: int) -> tuple[RotaryTables, RotaryTables]:
    """Backbone and depth-decoder rotary tables in fp32, made by the stock modules themselves."""

    def table(module: Any, count: int) -> RotaryTables:
        device = module.inv_freq.device
        with torch.no_grad():
            cos, sin = module(
                torch.zeros(1, device=device, dtype=torch.float32), torch.arange(count, device=device)[None]
            )
        return RotaryTables(cos[0].contiguous(), sin[0].contiguous())

    return (
        table(model.backbone_model.rotary_emb, positions),
        table(model.depth_decoder.model.rotary_emb, model.config.num_codebooks),
    )


class _PackedForward:
    """A stock module's forward from quantised copies, for a module whose own weight is gone."""

    def __init__(self, packed: Sequence[QuantWeight], module: Any) -> None:
        self._packed, self._module = packed, module


_WIDENED = 1 << 22
"""Weights of a dropped matrix that are wide at once: all of CSM-1B's largest are 100 MB on the way to bf16."""


class _PackedLinear(_PackedForward):
    def __call__(self, hidden: Tensor) -> Tensor:
        packed, bias = self._packed[0], self._module.bias
        rows, some_rows = len(packed.data), max(1, _WIDENED // packed.width)
        if rows <= some_rows:
            return nn.functional.linear(hidden, widen(packed, hidden.dtype), bias)
        out = hidden.new_empty(*hidden.shape[:-1], rows)
        for first in range(0, rows, some_rows):
            part = slice(first, first + some_rows)
            some = packed._replace(data=packed.data[part], scale=packed.scale[part])
            out[..., part] = nn.functional.linear(
                hidden, widen(some, hidden.dtype), None if bias is None else bias[part]
            )
        return out


class _PackedHeads(_PackedForward):
    def __call__(self, hidden: Tensor, codebook_indices: Tensor) -> Tensor:
        heads = [self._packed[k - 1] for k in codebook_indices.tolist()]
        parts = [nn.functional.linear(hidden[:, i], widen(one, hidden.dtype)) for i, one in enumerate(heads)]
        return torch.stack(parts, dim=1)


class _PackedEmbedding(_PackedForward):
    def __call__(self, ids: Tensor) -> Tensor:
        return dequantize(take_rows(self._packed[0], ids)).to(self._module.weight.dtype)


def drop_originals(
    model: Any, copies: Mapping[str, QuantWeight], heads: Sequence[Tensor | QuantWeight] | None
) -> list[str]:
    """Free every matrix and embedding that has a quantised copy; its module computes from the copy, widened when used.

    Casts (fp32, bf16, fp16) keep their originals. So do all depth heads while one of them is not quantised, stock has one
    parameter for them.

    Args:
        model: the model.
        copies: quantised copies by the names :class:`~csm_runtime.weights.PackedWeights` gives them.
        heads: the depth decoder's heads as they are read, ``[V, D]``, by codebook; None leaves them alone.

    Returns:
        Names of the copies whose originals were freed.
    """
    depth = model.depth_decoder
    modules: dict[str, nn.Module] = {**linears(model)}
    modules["backbone.embedding"] = model.backbone_model.embed_tokens.embed_audio_tokens
    modules["depth.embedding"] = depth.model.embed_tokens

    def free(module: nn.Module, packed: Sequence[QuantWeight], forward: type[_PackedForward]) -> None:
        weight = torch.empty_like(module.get_parameter("weight"), device="meta")
        module.register_parameter("weight", nn.Parameter(weight, False))
        module.__dict__["forward"] = forward(packed, module)

    freed = [name for name in copies if name in modules]
    if "depth.embedding" in freed:  # its first parameter, which the stock ``generate`` asks for the device
        empty = torch.empty_like(modules["depth.embedding"].get_parameter("weight")[:0])
        depth.register_parameter("where_weights_were", nn.Parameter(empty, False))
    for name in freed:
        free(modules[name], [copies[name]], _PackedEmbedding if name.endswith(".embedding") else _PackedLinear)
    quantised = [head for head in heads or () if isinstance(head, QuantWeight)]
    if heads is not None and len(quantised) == len(heads):
        free(depth.codebooks_head, quantised, _PackedHeads)
        freed += [name for name in copies if name.startswith("depth.head.")]
    return freed


def modification(model: Any) -> str | None:
    """What makes this model's modules differ from stock, so that reading bare weights would not be the same; or None.

    Unmerged LoRA layers, quantised linears, parametrizations, hooks and replaced methods are all of that kind.
    """
    other = model.__dict__.get("read_from")
    if other is not None:
        return other.modification()
    stock = _modules()
    own = model.__dict__.get("generate")
    # Ours, or what a copy of an accelerated model has instead: the plain method of its class.
    if (
        own is not None
        and not hasattr(own, "is_accelerated")
        and getattr(own, "__func__", None) is not type(model).generate
    ):
        return "generate() is overridden"
    for name in _OVERRIDABLE:
        changed = hf_training.is_changed(model) if name == "forward" else name in model.__dict__
        if changed or getattr(type(model), name) is not getattr(stock.CsmForConditionalGeneration, name):
            return f"{name}() is overridden"
    known = (
        nn.Linear,
        nn.Embedding,
        nn.ModuleList,
        stock.CsmRMSNorm,
        stock.CsmRotaryEmbedding,
        stock.CsmMLP,
        stock.CsmAttention,
        stock.CsmDecoderLayer,
        stock.CsmBackboneModel,
        stock.CsmBackboneModelEmbeddings,
        stock.CsmDepthDecoderModel,
        stock.CsmDepthDecoderForCausalLM,
        stock.CsmCodebooksHead,
    )
    devices = set()
    for root in ("lm_head", "embed_text_tokens", "backbone_model", "depth_decoder"):
        for name, module in model.get_submodule(root).named_modules(prefix=root):
            dropped = isinstance(module.__dict__.get("forward"), _PackedForward)
            if type(module) not in known and type(module).__name__ not in ("SiLU", "SiLUActivation"):
                return f"{name} is a {type(module).__name__}"
            if _foreign_hooks(module):
                return f"{name} has forward hooks"
            if hf_training.is_changed(module) and not dropped:
                return f"{name}.forward is overridden"
            devices |= {weight.device for weight in module.parameters(recurse=False) if not dropped}
    if len(devices) > 1:
        return f"its weights are spread over {', '.join(sorted(map(str, devices)))}"
    if next(iter(devices)).type == "meta":
        return "its weights are on the meta device: load them first"
    return "the model has forward hooks" if _foreign_hooks(model) else None


def _foreign_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks besides those with which transformers itself records hidden states."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)
