"""A CSM of transformers without its weights: the modules on the meta device, and where the weights are to come from.

``from_pretrained`` itself does everything but read: configs, dtype, which files, renamed keys. transformers is imported
inside functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from csm_runtime.adapters import hf

DEPTH_TABLE = "depth_decoder.model.embed_tokens.weight"
BACKBONE_TABLE = "backbone_model.embed_tokens.embed_audio_tokens.weight"
"""The two embeddings that a checkpoint may hold as one."""


@dataclass
class Empty:
    """A model in eval mode whose parameters and buffers are on the meta device."""

    model: Any
    files: list[Path]
    """Of the checkpoint, by transformers' own rules."""
    rename: Callable[[str], str]
    """From a key of the checkpoint to one of the model's state dict."""


def empty_model(name: str, dtype: torch.dtype | None) -> Empty:
    """Everything of ``CsmForConditionalGeneration.from_pretrained`` but the weights.

    Args:
        name: a folder or a hub id, which is downloaded where it is not in the cache.
        dtype: of the model; None is that of the checkpoint.

    Raises:
        ValueError: not a CSM.
        OSError: files are missing; whatever else transformers raises for files that it cannot read.
        RuntimeError: a transformers whose ``from_pretrained`` works in another way.
    """
    from transformers import AutoConfig, CsmForConditionalGeneration
    from transformers.utils.loading_report import LoadStateDictInfo

    config = AutoConfig.from_pretrained(name)
    if config.model_type != "csm":
        raise ValueError(f"model {name!r} is a {config.model_type!r}, not a 'csm'")
    seen: list[tuple[list[str], list[Any]]] = []

    class WithoutWeights(CsmForConditionalGeneration):
        @staticmethod
        def _load_pretrained_model(model: Any, state_dict: Any, files: Any, how: Any, *_: Any, **__: Any) -> Any:
            seen.append((files, how.weight_mapping or []))
            return LoadStateDictInfo(set(), set(), set(), [], {}, set()), None

        @staticmethod
        def _finalize_model_loading(model: Any, how: Any, info: Any) -> Any:
            return info

    model = WithoutWeights.from_pretrained(name, dtype=dtype or "auto")
    if not seen or not all(weight.is_meta for weight in model.parameters()):
        raise RuntimeError("this transformers loads models in a way that is not known here; use from_pretrained()")
    model.__class__ = CsmForConditionalGeneration
    ((files, mapping),) = seen
    return Empty(model, [Path(file) for file in files], _renaming(mapping, set(model.state_dict())))


def _renaming(mapping: list[Any], known: set[str]) -> Callable[[str], str]:
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    plain = [rule for rule in mapping if isinstance(rule, WeightRenaming)]

    def rename(key: str) -> str:
        # Rules that change more than a name have no place in a CSM; the key they are about is then reported as missing.
        return key if key in known else rename_source_key(key, plain, [])[0]

    return rename


def make_buffers(model: Any, device: torch.device) -> None:
    """Make the buffers that no checkpoint holds as transformers makes them: rotary frequencies and the like."""
    for root in (model.codec_model, model):
        for module in root.modules():
            names = module._non_persistent_buffers_set
            gone = [name for name in names if (value := module._buffers.get(name)) is not None and value.is_meta]
            for name in gone:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            if gone:
                root._init_weights(module)
            for name in gone:
                module._buffers[name] = module._buffers[name].to(device)


def matrices(model: Any) -> dict[str, str]:
    """State-dict keys of what can be packed, by the names :class:`~csm_runtime.weights.PackedWeights` gives it.

    The depth decoder's heads are one, ``depth.head``.
    """
    keys = {id(module): key for key, module in model.named_modules()}
    out = {name: f"{keys[id(module)]}.weight" for name, module in hf.linears(model).items()}
    return {
        **out,
        "backbone.embedding": BACKBONE_TABLE,
        "depth.embedding": DEPTH_TABLE,
        "depth.head": "depth_decoder.codebooks_head.weight",
    }


def put(model: Any, key: str, value: torch.Tensor | nn.Parameter) -> nn.Parameter | None:
    """Set a parameter or a buffer by its key of the state dict; the parameter, for others to share."""
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    if name not in module._parameters:
        module._buffers[name] = value
        return None
    parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, value.is_floating_point())
    module._parameters[name] = parameter
    return parameter
