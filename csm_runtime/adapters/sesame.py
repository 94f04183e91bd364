"""Adapter of Sesame's original stack: torchtune transformers in a ``Model``, and the ``Generator`` around it.

Recognised by structure: people vendor these files. A model is read through a *twin*: transformers' CSM whose parameters
are the model's own memory, so that everything written for that model serves this one. Only queries and keys are copies:
torchtune rotates neighbouring pairs, transformers the two halves of a head. transformers is imported inside functions.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from csm_runtime.weights import fingerprint

_STACKS = ("backbone", "decoder")
_PARTS = (*_STACKS, "text_embeddings", "audio_embeddings", "projection", "codebook0_head", "audio_head")
_NO_TOKEN = -1
"""What the twin's config calls special text tokens: nothing reads them, prompts of this stack are embedded before."""


def matches(model: Any) -> bool:
    """Whether an object has the structure of Sesame's ``Model``."""
    return (
        isinstance(model, nn.Module)
        and all(hasattr(model, name) for name in _PARTS)
        and all(callable(getattr(model, name, None)) for name in ("generate_frame", "setup_caches", "reset_caches"))
        and all(hasattr(plain_stack(model, stack), "layers") for stack in _STACKS)
    )


def model_of(generator: Any) -> Any:
    """The ``Model`` inside an object with the structure of Sesame's ``Generator``, or None."""
    model = getattr(generator, "_model", None)
    return model if matches(model) and callable(getattr(generator, "generate", None)) else None


def plain_stack(model: Any, name: str) -> Any:
    """A transformer, out of the wrapper that ``torch.compile(model.backbone)`` leaves, as the streaming forks do."""
    stack = getattr(model, name)
    return getattr(stack, "_orig_mod", stack)


def modification(model: Any) -> str | None:
    """What makes this model's modules differ from stock, so that reading bare weights would not be the same; or None."""
    for stack in _STACKS:
        transformer = plain_stack(model, stack)
        for name in ("tok_embeddings", "output"):
            if type(getattr(transformer, name, None)) is not nn.Identity:
                return f"{stack}.{name} is no Identity"
        if getattr(transformer, "output_hidden_states", None) or getattr(transformer, "num_output_chunks", 0):
            return f"{stack} returns more than its output"
        for i, layer in enumerate(transformer.layers):
            reason = _odd(layer, model.training)
            if reason is not None:
                return f"{stack}.layers.{i}{reason}"
    for name, module in _linears(model):
        if type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}"
    for name in ("text_embeddings", "audio_embeddings"):
        if type(getattr(model, name)) is not nn.Embedding:
            return f"{name} is a {type(getattr(model, name)).__name__}"
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            continue
        if "forward" in module.__dict__:
            return f"{name or 'the model'}.forward is overridden"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has forward hooks"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"its weights are spread over {', '.join(sorted(map(str, devices)))}"
    return "its weights are on the meta device: load them first" if next(iter(devices)).type == "meta" else None


def _odd(layer: Any, training: bool) -> str | None:
    attn, mlp = layer.attn, layer.mlp
    for name in ("q_norm", "k_norm"):
        if getattr(attn, name, None) is not None:
            return f".attn.{name} is there"
    for name in ("sa_scale", "mlp_scale"):
        if type(getattr(layer, name, None)) not in (nn.Identity, type(None)):
            return f".{name} is a {type(getattr(layer, name)).__name__}"
    if training and attn.attn_dropout:
        return ".attn drops out: call eval() first"
    if type(mlp.activation) is not nn.SiLU:
        return f".mlp.activation is a {type(mlp.activation).__name__}, not SiLU"
    if not isinstance(getattr(attn.pos_embeddings, "cache", None), Tensor):
        return ".attn.pos_embeddings has no table"
    return None


def _linears(model: Any) -> Iterator[tuple[str, nn.Module]]:
    yield from (("projection", model.projection), ("codebook0_head", model.codebook0_head))
    for stack in _STACKS:
        for i, layer in enumerate(plain_stack(model, stack).layers):
            for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
                yield f"{stack}.layers.{i}.attn.{name}", getattr(layer.attn, name)
            for name in ("w1", "w2", "w3"):
                yield f"{stack}.layers.{i}.mlp.{name}", getattr(layer.mlp, name)


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix ``[heads * D, ...]``: from neighbouring rotary pairs to the two halves of each head."""
    rest = weight.shape[1:]
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *rest)
    return pairs.transpose(1, 2).reshape(weight.shape)


def _config(model: Any) -> Any:
    from transformers import CsmConfig
    from transformers.models.csm.configuration_csm import CsmDepthDecoderConfig

    head = model.audio_head.shape
    codebooks, vocab = head[0] + 1, head[2]

    def stack(transformer: Any) -> dict[str, Any]:
        layer = transformer.layers[0]
        attn = layer.attn
        return dict(
            hidden_size=attn.q_proj.in_features,
            intermediate_size=layer.mlp.w1.out_features,
            num_hidden_layers=len(transformer.layers),
            num_attention_heads=attn.num_heads,
            num_key_value_heads=attn.num_kv_heads,
            head_dim=attn.head_dim,
            rms_norm_eps=layer.sa_norm.eps,
            max_position_embeddings=transformer.max_seq_len,
            attention_bias=attn.q_proj.bias is not None,
            mlp_bias=layer.mlp.w1.bias is not None,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},  # the twin gets torchtune's own table
            num_codebooks=codebooks,
            vocab_size=vocab,
            attention_dropout=0.0,
        )

    special = dict(
        pad_token_id=_NO_TOKEN,
        bos_token_id=_NO_TOKEN,
        audio_token_id=_NO_TOKEN,
        audio_eos_token_id=_NO_TOKEN,
        codebook_pad_token_id=_NO_TOKEN,
        codebook_eos_token_id=0,
    )
    depth = CsmDepthDecoderConfig(
        **stack(plain_stack(model, "decoder")),
        backbone_hidden_size=model.audio_embeddings.embedding_dim,
        pad_token_id=_NO_TOKEN,
    )
    return CsmConfig(
        **stack(plain_stack(model, "backbone")),
        **special,
        text_vocab_size=model.text_embeddings.num_embeddings,
        depth_decoder_config=depth,
        tie_codebooks_embeddings=True,
    )


class Twin:
    """transformers' CSM around the weights of a Sesame model.

    Args:
        model: of the structure that :func:`matches` looks for.
        codec: what decodes its frames, see :class:`GeneratorCodec`, or None.

    Attributes:
        module: the ``CsmForConditionalGeneration``.

    Raises:
        ValueError: a shape that the two have not in common; the model is untouched.
    """

    def __init__(self, model: Any, codec: nn.Module | None) -> None:
        from transformers import CsmForConditionalGeneration

        changed = modification(model)
        if changed is not None:
            raise ValueError(
                f"model is not a plain CSM: {changed}. Merge adapters, remove hooks and undo quantisation first"
            )
        books, vocab = model.audio_head.shape[0] + 1, model.audio_head.shape[2]
        if model.audio_embeddings.num_embeddings != books * vocab or model.codebook0_head.out_features != vocab:
            raise ValueError(
                f"model has heads of {books} codebooks of {vocab} codes, an audio_embeddings of "
                f"{model.audio_embeddings.num_embeddings} rows and a codebook0_head of {model.codebook0_head.out_features}; "
                f"they must be {books} x {vocab} and {vocab}"
            )
        self._model = model
        with torch.device("meta"), _quiet():  # about special tokens, of which there are none
            self.module: Any = CsmForConditionalGeneration(_config(model)).eval()
        self.module.__dict__["read_from"] = self
        self.module.codec_model = codec if codec is not None else NoCodec()
        self._linked: list[tuple[Any, ...]] = []
        self._marks: list[Tensor] = []
        self.follow()

    @property
    def class_name(self) -> str:
        """Of the model."""
        return type(self._model).__name__

    def modification(self) -> str | None:
        """Of the model, see :func:`modification`."""
        return modification(self._model)

    def follow(self) -> None:
        """Be what the model is now: its memory where that has moved, its queries and keys where they have changed.

        Raises:
            ValueError: its modules have been modified.
        """
        changed = modification(self._model)
        if changed is not None:
            raise ValueError(f"the model is not a plain CSM any more: {changed}")
        where = [(p.data_ptr(), p.dtype, p.device, p.shape) for p in self._model.parameters()]
        if where != self._linked:
            self._link()
            self._linked = where
            self._marks = [fingerprint(source) for source, _, _ in self._rotated()]
            return
        for i, (source, target, heads) in enumerate(self._rotated()):
            mark = fingerprint(source)
            if not torch.equal(mark, self._marks[i]):
                target.data.copy_(halves(source.detach(), heads))
                self._marks[i] = mark

    def _rotated(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Query and key parameters: the model's, the twin's, and heads."""
        for stack, twin in self._stacks():
            for layer, other in zip(stack.layers, twin.layers):
                attn, mine = layer.attn, other.self_attn
                for name, heads in (("q_proj", attn.num_heads), ("k_proj", attn.num_kv_heads)):
                    source, target = getattr(attn, name), getattr(mine, name)
                    yield source.weight, target.weight, heads
                    if source.bias is not None:
                        yield source.bias, target.bias, heads

    def _stacks(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        twin = self.module
        backbone, decoder = (plain_stack(self._model, name) for name in _STACKS)
        return (backbone, twin.backbone_model), (decoder, twin.depth_decoder.model)

    def _link(self) -> None:
        model, twin = self._model, self.module

        def share(target: Any, source: Any) -> None:
            for name in ("weight", "bias"):
                value = getattr(source, name, None)
                if value is not None:
                    _set(target, name, value)

        for stack, other in self._stacks():
            for layer, mine in zip(stack.layers, other.layers):
                attn = layer.attn
                for name, heads in (("q_proj", attn.num_heads), ("k_proj", attn.num_kv_heads)):
                    source = getattr(attn, name)
                    _set(getattr(mine.self_attn, name), "weight", halves(source.weight.detach(), heads))
                    if source.bias is not None:
                        _set(getattr(mine.self_attn, name), "bias", halves(source.bias.detach(), heads))
                share(mine.self_attn.v_proj, attn.v_proj)
                share(mine.self_attn.o_proj, attn.output_proj)
                for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
                    share(getattr(mine.mlp, ours), getattr(layer.mlp, theirs))
                _set(mine.input_layernorm, "weight", layer.sa_norm.scale)
                _set(mine.post_attention_layernorm, "weight", layer.mlp_norm.scale)
            _set(other.norm, "weight", stack.norm.scale)
            other.rotary_emb = _Table(stack.layers[0].attn.pos_embeddings.cache.detach())
        share(twin.lm_head, model.codebook0_head)
        share(twin.embed_text_tokens, model.text_embeddings)
        share(twin.backbone_model.embed_tokens.embed_audio_tokens, model.audio_embeddings)
        share(twin.depth_decoder.model.embed_tokens, model.audio_embeddings)
        share(twin.depth_decoder.model.inputs_embeds_projector, model.projection)
        _set(twin.depth_decoder.codebooks_head, "weight", model.audio_head)
        config, device = twin.config, model.audio_head.device
        offsets = torch.arange(config.num_codebooks, device=device) * config.vocab_size
        twin.backbone_model.embed_tokens.audio_tokens_offsets = offsets


class _Table(nn.Module):
    """torchtune's own rotary table, which ``.to(dtype)`` rounds with the model, as transformers' rotary module.

    Args:
        cache: ``[positions, D / 2, 2]``, cosines and sines.
    """

    def __init__(self, cache: Tensor) -> None:
        super().__init__()
        self.inv_freq = nn.Buffer(cache, persistent=False)  # where the module is, is asked of this name

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T, D]`` each, in the dtype of ``x``."""
        both = self.inv_freq[position_ids].to(x.dtype)
        return both[..., 0].repeat(1, 1, 2), both[..., 1].repeat(1, 1, 2)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _set(module: Any, name: str, value: Tensor) -> None:
    have = getattr(module, name)
    if have is None or have.shape != value.shape:
        wanted = None if have is None else tuple(have.shape)
        raise ValueError(f"model has a {type(module).__name__} {name} of {tuple(value.shape)}, expected {wanted}")
    module.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))


def embedded(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """``[B, S, D]``: what a Sesame model feeds its backbone for frames of codes and text.

    Args:
        model: the model.
        tokens: ``[B, S, codebooks + 1]``, text last.
        mask: likewise, which of them count.
    """
    books, vocab = tokens.shape[2] - 1, model.audio_head.shape[2]
    offsets = vocab * torch.arange(books, device=tokens.device)
    audio = model.audio_embeddings((tokens[..., :-1] + offsets).reshape(-1)).view(*tokens.shape[:2], books, -1)
    every = torch.cat([audio, model.text_embeddings(tokens[..., -1:])], dim=2)
    return (every * mask.unsqueeze(-1)).sum(dim=2)


class NoCodec(nn.Module):
    """Where only a ``Model`` was accelerated."""

    dtype = torch.float32
    config = SimpleNamespace(sampling_rate=24000, frame_rate=12.5, codebook_size=2048, use_causal_conv=False)

    def decode(self, codes: Tensor) -> Any:
        """Raises ValueError."""
        raise ValueError("this Model has no codec: accelerate(generator) instead of accelerate(model) to hear it")
