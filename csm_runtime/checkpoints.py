"""A CSM and its processor by name: the built-in small one, a saved folder, or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from csm_runtime.extras import need
from csm_runtime.small_model import MARKER, SmallProcessor, build_small_csm

SMALL = "small"
"""Name of the built-in model."""

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""``auto`` is the dtype a checkpoint was saved in, fp32 for the built-in model."""

_TIED = "backbone_model.embed_tokens.embed_audio_tokens.weight"


def load(name: str, *, dtype: str = "auto", device: str = "auto", seed: int = 0) -> tuple[Any, Any]:
    """Load a stock model in eval mode, and what prepares its inputs.

    Args:
        name: ``"small"``, a folder written by ``save_pretrained``, or a hub id such as ``"sesame/csm-1b"``. A folder
            needs the processor's files, or the mark :meth:`SmallProcessor.save_pretrained` leaves.
        dtype: a key of :data:`DTYPES`. The codec is fp32 in any case.
        device: ``"auto"`` (CUDA where there is one, otherwise CPU) or a torch device.
        seed: of the built-in model's weights.

    Returns:
        The model and a processor with ``apply_chat_template``.

    Raises:
        ValueError: an unknown name, a folder without a CSM or a processor, or an unknown dtype or device.
    """
    model = load_model(name, dtype=dtype, device=device, seed=seed)
    return model, load_processor(name, model)


def load_processor(name: str, model: Any) -> Any:
    """What prepares the inputs of a model that is there already. Arguments and errors as :func:`load`."""
    own = name == SMALL or (Path(name) / MARKER).is_file()
    return SmallProcessor(model) if own else _load_processor(name)


def load_model(name: str, *, dtype: str = "auto", device: str = "auto", seed: int = 0) -> Any:
    """The model alone, which then needs no processor's files. Arguments and errors as :func:`load`."""
    need("transformers", "hf")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {tuple(DTYPES)}, got {dtype!r}")
    where = usable_device(device)
    if name == SMALL:
        return build_small_csm(seed, dtype=DTYPES[dtype] or torch.float32).to(where)
    model = _load_model(name, DTYPES[dtype])
    model.codec_model.float()
    return model.to(where).eval()


def prepare_inputs(model: Any, processor: Any, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Keyword arguments of ``generate`` for a conversation, on the model's device, audio in the codec's dtype."""
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    device = model.backbone_model.norm.weight.device  # the codec may still be loading
    return dict(inputs.to(device, dtype=next(model.codec_model.parameters()).dtype))


def usable_device(device: str) -> torch.device:
    """The device of that name, ``"auto"`` as :func:`load` has it. Raises ValueError for one that cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {first_line(error)}") from error
    return where


def check_name(name: str, *others: str) -> None:
    """Raise ValueError for what is neither a folder nor looks like a hub id; ``others`` are to be named as well."""
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") != 1):
        known = ", nor ".join([*map(repr, others), "a folder", "a hub id of the form owner/name"])
        raise ValueError(f"model {name!r} is neither {known}")


def _load_model(name: str, dtype: torch.dtype | None) -> Any:
    from transformers import AutoConfig, CsmForConditionalGeneration

    check_name(name, SMALL)
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "csm":
            raise ValueError(f"model {name!r} is a {config.model_type!r}, not a 'csm'")
        model, info = CsmForConditionalGeneration.from_pretrained(name, dtype=dtype or "auto", output_loading_info=True)
    except OSError as error:
        raise ValueError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    _fill_missing(name, model, set(info["missing_keys"]))
    return model


def _fill_missing(name: str, model: Any, missing: set[str]) -> None:
    """Tie the audio embeddings where a checkpoint holds one of the two; transformers 5.17 leaves the other at random.

    Raises:
        ValueError: weights are missing that nothing in the checkpoint stands for.
    """
    if _TIED in missing and model.config.tie_codebooks_embeddings:
        model.backbone_model.embed_tokens.embed_audio_tokens.weight = model.depth_decoder.model.embed_tokens.weight
        missing = missing - {_TIED}
    if missing:
        raise ValueError(f"model {name!r} lacks weights of a CSM: {min(missing)}, {len(missing)} in all")


def _load_processor(name: str) -> Any:
    from transformers import AutoProcessor, CsmProcessor

    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r} has no processor that can be loaded ({first_line(error)}); save a "
            "CsmProcessor there too, or a SmallProcessor for a model of build_small_csm()"
        ) from error
    if not isinstance(processor, CsmProcessor):
        raise ValueError(f"model {name!r} comes with a {type(processor).__name__}, not a CsmProcessor")
    return processor


def first_line(error: BaseException) -> str:
    """Of an error's message; its type where there is none."""
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__
