"""A CSM's shape, and how Sesame's repository and transformers write it down.

Sesame's ``ModelArgs`` name two flavors, whose sizes are arguments in its ``models.py``; transformers has them all in
``config.json``. Configs are plain dicts: neither torchtune nor transformers is needed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

STACKS = {"backbone": "backbone_model", "decoder": "depth_decoder.model"}
"""What transformers calls Sesame's."""
AUDIO_TABLE = "audio_embeddings.weight"
LAYER = {
    "sa_norm.scale": "input_layernorm.weight",
    "attn.q_proj.weight": "self_attn.q_proj.weight",
    "attn.k_proj.weight": "self_attn.k_proj.weight",
    "attn.v_proj.weight": "self_attn.v_proj.weight",
    "attn.output_proj.weight": "self_attn.o_proj.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp.w1.weight": "mlp.gate_proj.weight",
    "mlp.w2.weight": "mlp.down_proj.weight",
    "mlp.w3.weight": "mlp.up_proj.weight",
}
"""Tensors of a layer, in both layouts."""
_LLAMA3_CONTEXT, _LOW, _HIGH = 8192, 1.0, 4.0
"""Of torchtune's ``Llama3ScaledRoPE``, which ``llama3_2()`` lets nobody change."""


@dataclass(frozen=True)
class Flavor:
    """One Llama stack as Sesame's ``FLAVORS`` have it: arguments of torchtune's ``llama3_2``."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int = 2048
    norm_eps: float = 1e-5
    rope_base: int = 500_000
    scale_factor: int = 32

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_heads, self.num_kv_heads, self.embed_dim, self.intermediate_dim) < 1:
            raise ValueError(f"sizes must be positive, got {self}")
        if self.embed_dim % (2 * self.num_heads) or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"embed_dim must be an even multiple of num_heads, and num_heads a multiple of num_kv_heads; got {self}"
            )

    @property
    def head_dim(self) -> int:
        """torchtune has no heads of another size."""
        return self.embed_dim // self.num_heads


FLAVORS = {
    "llama-1B": Flavor(16, 32, 8, 2048, 8192),
    "llama-100M": Flavor(4, 8, 2, 1024, 8192),
}
"""Those of Sesame's ``models.py``."""


@dataclass(frozen=True)
class Shape:
    """Of a CSM, in either layout."""

    backbone: Flavor
    decoder: Flavor
    text_vocab: int
    audio_vocab: int
    codebooks: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Sizes of all parameters by their names in Sesame's layout."""
        outer, inner = self.backbone.embed_dim, self.decoder.embed_dim
        out: dict[str, tuple[int, ...]] = {
            "text_embeddings.weight": (self.text_vocab, outer),
            AUDIO_TABLE: (self.audio_vocab * self.codebooks, outer),
            "projection.weight": (inner, outer),
            "codebook0_head.weight": (self.audio_vocab, outer),
            "audio_head": (self.codebooks - 1, inner, self.audio_vocab),
        }
        for stack in STACKS:
            flavor = self.stack(stack)
            width, keys, ffn = flavor.embed_dim, flavor.num_kv_heads * flavor.head_dim, flavor.intermediate_dim
            sizes = [(width,), (width, width), (keys, width), (keys, width), (width, width), (width,)]
            sizes += [(ffn, width), (width, ffn), (ffn, width)]
            for layer in range(flavor.num_layers):
                out |= {f"{stack}.layers.{layer}.{name}": size for name, size in zip(LAYER, sizes, strict=True)}
            out[f"{stack}.norm.scale"] = (width,)
        return out

    def stack(self, name: str) -> Flavor:
        """``backbone`` or ``decoder``."""
        return self.backbone if name == "backbone" else self.decoder


_HF_DEFAULTS: dict[str, Any] = {
    "num_codebooks": 32,
    "vocab_size": 2051,
    "text_vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
}
"""Of ``CsmConfig``: a saved config leaves out what is as it is by default."""
_HF_DEPTH_DEFAULTS: dict[str, Any] = {
    **{name: value for name, value in _HF_DEFAULTS.items() if name != "text_vocab_size"},
    "backbone_hidden_size": 2048,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 33,
}
SPECIAL = {"pad_token_id": 128_002, "bos_token_id": 128_000, "audio_token_id": 128_002, "audio_eos_token_id": 128_003}
"""Ids of Llama 3's vocabulary that CSM's processor uses."""
_ARGS = ("backbone_flavor", "decoder_flavor", "text_vocab_size", "audio_vocab_size", "audio_num_codebooks")


def shape_of_sesame(config: Mapping[str, Any], flavors: Mapping[str, Flavor] = FLAVORS) -> Shape:
    """From ``ModelArgs`` as a dict.

    Raises:
        ValueError: an argument is missing, or a flavor unknown.
    """
    missing = [name for name in _ARGS if name not in config]
    if missing:
        raise ValueError(f"the config lacks {missing} of Sesame's ModelArgs")
    for name in _ARGS[:2]:
        if config[name] not in flavors:
            raise ValueError(f"{name} is {config[name]!r}, known are {sorted(flavors)}; give its sizes as a flavor")
    backbone, decoder, text, vocab, books = (config[name] for name in _ARGS)
    return Shape(flavors[backbone], flavors[decoder], int(text), int(vocab), int(books))


def shape_of_hf(config: Mapping[str, Any]) -> Shape:
    """From ``CsmConfig`` as a dict, as saved or complete.

    Raises:
        ValueError: not a CSM's, or something that Sesame's stack cannot be; names the field.
    """
    if config.get("model_type") != "csm":
        raise ValueError(f"the config's model_type is {config.get('model_type')!r}, wanted 'csm'")
    top = _HF_DEFAULTS | {key: value for key, value in config.items() if value is not None}
    given = config.get("depth_decoder_config") or {}
    low = _HF_DEPTH_DEFAULTS | {key: value for key, value in given.items() if value is not None}
    pairs = [("num_codebooks", "num_codebooks"), ("vocab_size", "vocab_size"), ("hidden_size", "backbone_hidden_size")]
    for high, deep in pairs:
        if top[high] != low[deep]:
            raise ValueError(
                f"{high} is {top[high]} and depth_decoder_config.{deep} is {low[deep]}; Sesame's layout has them equal"
            )
    backbone = _flavor_of_hf(top, "")
    decoder = replace(_flavor_of_hf(low, "depth_decoder_config."), max_seq_len=2048)  # its caches take a frame
    return Shape(backbone, decoder, top["text_vocab_size"], top["vocab_size"], top["num_codebooks"])


def _flavor_of_hf(config: Mapping[str, Any], where: str) -> Flavor:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    for name in ("attention_bias", "mlp_bias"):
        if config[name]:
            raise ValueError(f"{where}{name} is {config[name]!r}; Sesame's stack has no biases")
    if config["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"{where}hidden_act is {config['hidden_act']!r}; Sesame's stack has 'silu'")
    if config["head_dim"] is not None and config["head_dim"] * heads != width:
        raise ValueError(
            f"{where}head_dim is {config['head_dim']}; Sesame's stack has hidden_size / num_attention_heads, {width // heads}"
        )
    base, factor = _rope_of_hf(config, where)
    return Flavor(
        config["num_hidden_layers"],
        heads,
        config["num_key_value_heads"],
        width,
        config["intermediate_size"],
        config["max_position_embeddings"],
        config["rms_norm_eps"],
        base,
        factor,
    )


def _rope_of_hf(config: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Base and scale factor, from ``rope_parameters`` or what transformers 4 had instead."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = rope.get("rope_theta") or config.get("rope_theta") or 500_000
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return _whole(base), 1
    if kind != "llama3":
        raise ValueError(f"{where}rope_parameters has rope_type {kind!r}; Sesame's stack has 'llama3' or 'default'")
    context = rope["original_max_position_embeddings"]
    for name, wanted in (("low_freq_factor", _LOW), ("high_freq_factor", _HIGH)):
        if not math.isclose(context / rope[name], _LLAMA3_CONTEXT / wanted):
            raise ValueError(
                f"{where}rope_parameters has original_max_position_embeddings / {name} = {context / rope[name]:g}; "
                f"Sesame's stack has {_LLAMA3_CONTEXT / wanted:g}"
            )
    return _whole(base), _whole(rope["factor"])


def _whole(number: float) -> Any:
    """As an integer where it is one."""
    return int(number) if number == int(number) else number


def hf_config(shape: Shape, codec: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """``config.json`` of transformers.

    Args:
        shape: the CSM's.
        codec: ``codec_config``; by default Mimi as transformers has it by default.
        dtype: of the weights, for loading with ``dtype="auto"``.
    """
    top = _hf_stack(shape.backbone, shape.backbone.max_seq_len)
    low = _hf_stack(shape.decoder, shape.codebooks + 1)
    both = {"num_codebooks": shape.codebooks, "vocab_size": shape.audio_vocab}
    if codec is None:
        codec = {"model_type": "mimi", "num_quantizers": max(32, shape.codebooks)}
    return {
        "architectures": ["CsmForConditionalGeneration"],
        "model_type": "csm",
        **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}),
        **both,
        "text_vocab_size": shape.text_vocab,
        **top,
        "codebook_eos_token_id": 0,
        "codebook_pad_token_id": shape.audio_vocab - 1,
        **SPECIAL,
        "tie_codebooks_embeddings": True,
        "depth_decoder_config": {
            "model_type": "csm_depth_decoder_model",
            **both,
            "backbone_hidden_size": shape.backbone.embed_dim,
            **low,
        },
        "codec_config": dict(codec),
    }


def _hf_stack(flavor: Flavor, positions: int) -> dict[str, Any]:
    return {
        "hidden_size": flavor.embed_dim,
        "intermediate_size": flavor.intermediate_dim,
        "num_hidden_layers": flavor.num_layers,
        "num_attention_heads": flavor.num_heads,
        "num_key_value_heads": flavor.num_kv_heads,
        "head_dim": flavor.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": positions,
        "rms_norm_eps": flavor.norm_eps,
        "rope_parameters": _hf_rope(flavor, positions),
    }


def _hf_rope(flavor: Flavor, positions: int) -> dict[str, Any]:
    """The same frequencies with an original context below ``positions``, as transformers wants it; the ratios are exact."""
    if flavor.scale_factor == 1:
        return {"rope_type": "default", "rope_theta": float(flavor.rope_base)}
    context = min(_LLAMA3_CONTEXT, 1 << max(0, (positions // 2).bit_length() - 1))
    return {
        "rope_type": "llama3",
        "rope_theta": float(flavor.rope_base),
        "factor": float(flavor.scale_factor),
        "low_freq_factor": context / _LLAMA3_CONTEXT * _LOW,
        "high_freq_factor": context / _LLAMA3_CONTEXT * _HIGH,
        "original_max_position_embeddings": context,
    }


def sesame_config(shape: Shape, flavors: Mapping[str, Flavor] = FLAVORS) -> tuple[dict[str, Any], dict[str, Flavor]]:
    """``ModelArgs`` as a dict, and the flavors in it that ``flavors`` lack, under new names."""
    new: dict[str, Flavor] = {}
    names = []
    for stack in STACKS:
        flavor = shape.stack(stack)
        known = (name for name, one in flavors.items() if one == flavor or _same_decoder(stack, one, flavor))
        name = next(known, f"{stack}-{flavor.num_layers}x{flavor.embed_dim}-{flavor.max_seq_len}")
        if name not in flavors:
            new[name] = flavor
        names.append(name)
    return dict(zip(_ARGS, [*names, shape.text_vocab, shape.audio_vocab, shape.codebooks], strict=True)), new


def _same_decoder(stack: str, known: Flavor, flavor: Flavor) -> bool:
    return stack == "decoder" and replace(known, max_seq_len=flavor.max_seq_len) == flavor


def load_flavors(path: str | os.PathLike[str]) -> dict[str, Flavor]:
    """A JSON file of names and their :class:`Flavor`. Raises ValueError where it is something else."""
    known = {one.name for one in fields(Flavor)}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return {str(name): Flavor(**{key: one[key] for key in one.keys() & known}) for name, one in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no flavors by name: {error}") from error
