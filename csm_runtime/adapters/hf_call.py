"""One ``generate`` call of transformers' CSM: what it asks for, its prompt, its result, and the stock loop's rest.

The stock ``generate`` keeps doing everything before and after the decode loop (configs, prompt merging, codec); only the
loop itself is replaced, through its ``custom_generate`` hook.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from csm_runtime.codec import cut_at_end


@dataclass(frozen=True)
class Sampling:
    """How one of the two decoders draws its tokens."""

    do_sample: bool
    temperature: float = 1.0
    top_k: int = 0
    """0 switches it off."""
    top_p: float = 1.0


class Unsupported(Exception):
    """The fast path does not do this; the message is the reason the stock path is taken."""


def _sampling_of(config: Any, processors: Any, whose: str) -> Sampling:
    """Translate a prepared processor list, or say what in it the fast path does not do."""
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if not config.do_sample:
        if len(processors):
            raise Unsupported(f"{whose} uses {type(processors[0]).__name__}")
        return Sampling(False)
    order = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
    values: dict[type, float] = {}
    reached = 0
    for processor in processors:
        kind = type(processor)
        if (
            kind not in order
            or order.index(kind) < reached
            or getattr(processor, "filter_value", None)
            not in (
                None,
                float("-inf"),
            )
        ):
            raise Unsupported(f"{whose} uses {kind.__name__}")
        reached = order.index(kind) + 1
        values[kind] = getattr(processor, ("temperature", "top_k", "top_p")[reached - 1])
    return Sampling(
        True,
        float(values.get(TemperatureLogitsWarper, 1.0)),
        int(values.get(TopKLogitsWarper, 0)),
        float(values.get(TopPLogitsWarper, 1.0)),
    )


def backbone_sampling(generation_config: Any, processors: Any) -> Sampling:
    """How codebook 0 is drawn. Raises :class:`Unsupported`."""
    return _sampling_of(generation_config, processors, "the backbone")


def depth_sampling(model: Any) -> Sampling:
    """How the other codebooks are drawn, by the depth decoder's own generation config. Raises :class:`Unsupported`."""
    from transformers.generation.configuration_utils import GenerationMode
    from transformers.generation.logits_process import LogitsProcessorList

    depth = model.depth_decoder
    config, extra = depth._prepare_generation_config(None)
    depth._prepare_special_tokens(config, False, device=model.device)
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise Unsupported(f"the depth decoder uses generation mode {mode.value}")
    if config._eos_token_tensor is not None:
        raise Unsupported("the depth decoder has an eos_token_id")
    if extra or config.num_return_sequences not in (None, 1):
        raise Unsupported("the depth decoder has generation arguments of its own")
    processors = depth._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=2,
        encoder_input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device),
        prefix_allowed_tokens_fn=None,
        logits_processor=LogitsProcessorList(),
        device=model.device,
        model_kwargs={},
    )
    return _sampling_of(config, processors, "the depth decoder")


@dataclass
class Request:
    """One call of the decode loop, as the stock ``generate`` prepared it."""

    input_ids: Tensor
    backbone: Sampling
    depth: Sampling
    max_frames: int
    eos_token: Any
    """``config.codebook_eos_token_id`` as it is at this call."""
    judged: int
    """Speech ends with a frame whose first so many codes are that."""
    pad_token: int
    """What the frames of a finished row hold, where ``pads_finished_rows``."""
    pads_finished_rows: bool
    return_dict: bool
    prompt: dict[str, Any]
    """Keyword arguments of the stock prefill; or ``embeds`` ``[N, T, D]`` and ``sounds``, those of a prompt that another
    stack has embedded."""
    mask: Tensor | None
    """``[N, T]``"""
    positions: Tensor
    """``[N, T]`` or ``[1, T]``"""
    output_cache: Any
    """The cache object the caller gets back; None where nobody does."""


_PLAIN_KWARGS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "input_values",
    "input_values_cutoffs",
    "use_cache",
    "logits_to_keep",
}


def read_request(
    model: Any,
    input_ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    model_kwargs: dict[str, Any],
) -> Request:
    """What the stock loop would have been called with. Raises :class:`Unsupported` with the reason."""
    from transformers.cache_utils import DynamicCache, StaticCache

    for flag in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, flag):
            raise Unsupported(flag)
    unknown = sorted(k for k, v in model_kwargs.items() if v is not None and k not in _PLAIN_KWARGS)
    if unknown:
        raise Unsupported(f"the argument {unknown[0]}")
    if not model_kwargs.get("use_cache"):
        raise Unsupported("use_cache=False")
    cache = model_kwargs.get("past_key_values")
    if cache is None or type(cache) not in (DynamicCache, StaticCache) or getattr(cache, "offloading", False):
        raise Unsupported(f"a {type(cache).__name__} as past_key_values")
    if cache.get_seq_length() != 0:
        raise Unsupported("past_key_values that already hold a prompt")
    if getattr(cache, "_is_user_defined", False):
        raise Unsupported("a cache object of the caller's own")
    sampling = backbone_sampling(config, processors)
    if not isinstance(model.config.codebook_eos_token_id, int):
        raise Unsupported("a codebook_eos_token_id that is not one integer")
    tokens = input_ids.shape[1]
    limits = [criterion.max_length for criterion in criteria]
    if not limits:
        raise Unsupported("no limit on the number of frames")
    mask = model_kwargs.get("attention_mask")
    positions = model_kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(tokens, device=input_ids.device)[None]
    if positions.ndim != 2 or (mask is not None and mask.ndim != 2):
        raise Unsupported("position ids or an attention mask that are not two-dimensional")
    return Request(
        input_ids=input_ids,
        backbone=sampling,
        depth=depth_sampling(model),
        max_frames=max(1, min(limits) - tokens),
        eos_token=model.config.codebook_eos_token_id,
        judged=model.config.num_codebooks - 1,
        pad_token=model.config.codebook_pad_token_id,
        pads_finished_rows=config._eos_token_tensor is not None,
        return_dict=bool(config.return_dict_in_generate),
        prompt={k: model_kwargs.get(k) for k in ("input_values", "input_values_cutoffs")},
        mask=mask,
        positions=positions,
        output_cache=cache,
    )


def row_of(model: Any, request: Request, row: int) -> Request:
    """One row of a call as a call of its own, without its padding on the left and without a cache.

    What a mask hides makes no difference to the others, and without it a row's voice is known (:func:`sounds_of`).
    """
    one, first = slice(row, row + 1), 0
    ids, mask, positions = request.input_ids[one], request.mask, request.positions
    values, cutoffs = (request.prompt.get(name) for name in ("input_values", "input_values_cutoffs"))
    if cutoffs is not None and values is not None:
        spoken = bool((cutoffs[row] >= 0).any())  # the stock merge wants some sound where it is given any
        values, cutoffs = (values[one], cutoffs[one]) if spoken else (None, None)
    if mask is not None:
        mask = mask[one]
        first = int(mask[0].bool().int().argmax())
        if values is not None and bool((ids[0, :first] == model.config.audio_token_id).any()):
            first = 0  # its sound has frames for them
        mask = mask[:, first:]
    return replace(
        request,
        input_ids=ids[:, first:],
        mask=mask,
        positions=positions[one if len(positions) > 1 else slice(None), first:],
        prompt={"input_values": values, "input_values_cutoffs": cutoffs},
        output_cache=None,
    )


def prompt_embeddings(model: Any, request: Request) -> Tensor:
    """``[N, T, D]`` in the model's dtype: text tokens, encoded reference audio and codes, merged by the stock model."""
    ids = request.input_ids
    if "embeds" in request.prompt:
        return request.prompt["embeds"]
    if ids.ndim == 3:
        return model.backbone_model.embed_tokens(ids)
    return model._merge_input_ids_with_input_values(input_ids=ids, **request.prompt)["inputs_embeds"]


def prompt_with_frames(model: Any, request: Request, made: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Embeddings ``[N, T + n, D]``, mask and positions of the prompt and the frames ``[N, n, codebooks]`` made since."""
    x, mask, positions, n = prompt_embeddings(model, request), request.mask, request.positions, made.shape[1]
    if n:
        x = torch.cat([x, model.backbone_model.embed_tokens(made)], dim=1)
        steps = torch.arange(1, n + 1, device=positions.device)
        positions = torch.cat([positions, positions[:, -1:] + steps], dim=1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(mask.shape[0], n)], dim=1)
    return x, mask, positions


@dataclass(frozen=True)
class Sound:
    """A segment of sound in a prompt of one row."""

    start: int
    end: int
    """Of its positions; the one behind them is the end-of-sound token."""
    content: Tensor
    """Its samples ``[channels, samples]``, or its codes where those are what there is."""


def after(sound: Sound) -> int:
    """The first position behind a sound and its end-of-sound token."""
    return sound.end + 1


def sounds_of(model: Any, ids: Tensor, prompt: Mapping[str, Any], mask: Tensor | None) -> list[Sound]:
    """The segments of sound of a prompt, in order; nothing where it is not one unpadded row of text and sound in turn.

    Args:
        model: the stock model.
        ids: ``[N, T]`` or ``[N, T, K]``.
        prompt: ``input_values`` and ``input_values_cutoffs``, where there is sound.
        mask: ``[N, T]`` or None.
    """
    if "sounds" in prompt:
        return prompt["sounds"]
    values, cutoffs = prompt.get("input_values"), prompt.get("input_values_cutoffs")
    if values is None or cutoffs is None or ids.ndim != 2 or len(ids) != 1 or len(cutoffs) != 1:
        return []
    if mask is not None and not bool((mask == 1).all()):
        return []
    cuts = [0, *(cut for cut in cutoffs[0].tolist() if cut >= 0)]
    there = ids[0] == model.config.audio_token_id
    edges = torch.nn.functional.pad(there.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    runs = list(zip(edges[::2], edges[1::2]))
    lengths = torch.tensor([b - a for a, b in zip(cuts, cuts[1:])], dtype=torch.long)
    frames = model.codec_model.get_encoded_length(lengths).tolist() if len(lengths) else []
    closed = [end < ids.shape[1] and int(ids[0, end]) == model.config.audio_eos_token_id for _, end in runs]
    if [end - start for start, end in runs] != frames or not all(closed):
        return []
    return [Sound(start, end, values[0, :, a:b]) for (start, end), a, b in zip(runs, cuts, cuts[1:])]


def codes_of(model: Any, sound: Sound) -> Tensor:
    """``[F, K]`` int64 of a sound, encoded as the stock model encodes it."""
    with torch.no_grad():
        return model.codec_model.encode(sound.content[None]).audio_codes.transpose(1, -1)[0]


def embedded_with(model: Any, ids: Tensor, codes: Sequence[Tensor]) -> Tensor:
    """``[1, T, D]`` in the model's dtype, as the stock model merges text ``[1, T]`` and the codes ``[F, K]`` of its sounds."""
    x = model.embed_text_tokens(ids)
    if codes:
        x[ids == model.config.audio_token_id] = model.backbone_model.embed_tokens(torch.cat(list(codes))[None])[0]
    end = ids.new_full((1, 1, model.config.num_codebooks), model.config.codebook_eos_token_id)
    x[ids == model.config.audio_eos_token_id] = model.backbone_model.embed_tokens(end)[0]
    return x


def embedded(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings ``[N, T, D]``, mask and rotary positions ``[N, T]`` of a prompt as ``generate()`` takes it."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device) if mask is None else mask.long()
    if ids.ndim == 3:
        x = model.backbone_model.embed_tokens(ids)
    else:
        sound = {name: inputs.get(name) for name in ("input_values", "input_values_cutoffs")}
        x = model._merge_input_ids_with_input_values(input_ids=ids, **sound)["inputs_embeds"]
    return x, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def text_embeddings(model: Any, ids: Tensor) -> Tensor:
    """``[N, T, D]`` in the model's dtype, of text token ids ``[N, T]``."""
    return model._merge_input_ids_with_input_values(input_ids=ids)["inputs_embeds"]


def fill_cache(cache: Any, layers: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Put keys and values ``[N, KV, T, D]`` of every layer into an empty stock cache."""
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)


def output(request: Request, sequences: Tensor) -> Any:
    """What the stock loop would have returned."""
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    if request.input_ids.ndim == 3:
        sequences = torch.cat([request.input_ids, sequences], dim=1)
    if not request.return_dict:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=request.output_cache)


def frames_in(model: Any, made: Any) -> int:
    """How many frames, over all rows, the stock ``generate`` has returned: as codes, as an output, or as sound.

    0 for whatever else a decode loop of the caller's own returns.
    """
    if isinstance(made, list) and all(isinstance(sound, Tensor) for sound in made):
        rate = model.config.codec_config.sampling_rate / model.config.codec_config.frame_rate
        return int(sum(len(sound) for sound in made) / rate)
    sequences = made if isinstance(made, Tensor) else getattr(made, "sequences", None)
    return sequences.shape[0] * sequences.shape[1] if isinstance(sequences, Tensor) and sequences.ndim == 3 else 0


def spoken_frames(model: Any, made: Any, prompt: Any) -> int:
    """The same without what lies behind the end of a row's speech, and without a prompt of codes ``[N, T, K]``."""
    before = prompt.shape[1] if isinstance(prompt, Tensor) and prompt.ndim == 3 else 0
    sequences = made if isinstance(made, Tensor) else getattr(made, "sequences", None)
    if not isinstance(sequences, Tensor) or sequences.ndim != 3:
        return frames_in(model, made)
    return sum(map(len, cut_at_end(sequences[:, before:], model.config.codebook_eos_token_id)))


def with_audio(made: Any, sound: Callable[[Tensor], list[Tensor]]) -> Any:
    """What the stock ``generate`` returns with ``output_audio=True``, from what it returned without.

    Args:
        made: sequences, or an output that holds them.
        sound: from ``[N, frames, codebooks]`` to the samples of each row.
    """
    if isinstance(made, Tensor):
        return sound(made)
    return type(made)(**{**made, "audio": sound(made.sequences)})


class _Remaining:
    """The caller's streamer for the rest of an utterance: the prompt was put already, and ended rows get pads."""

    def __init__(self, streamer: Any, first_frame: Callable[[Tensor], Tensor]) -> None:
        self._streamer, self._fix = streamer, first_frame

    def put(self, value: Tensor) -> None:
        self._streamer.put(self._fix(value))
        self._fix = lambda later: later

    def end(self) -> None:
        self._streamer.end()


def continue_on_stock(
    model: Any, request: Request, made: Tensor, ended: Tensor, processors: Any, config: Any, streamer: Any
) -> Tensor:
    """Let the stock loop finish an utterance whose first frames exist.

    Args:
        model: the stock model.
        request: the call.
        made: ``[N, n, codebooks]`` frames already made, n >= 0, fewer than the call asks for.
        ended: ``[N]`` bool, rows whose speech has ended; not all of them.
        processors: the stock loop's logits processors.
        config: the prepared generation config.
        streamer: gets the remaining frames, or None.

    Returns:
        ``[N, frames, codebooks]``, ``made`` included.
    """
    from transformers.cache_utils import DynamicCache
    from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

    n, cache = made.shape[1], request.output_cache
    x, mask, positions = prompt_with_frames(model, request, made)
    config = copy.copy(config)
    config.return_dict_in_generate = False
    config.prefill_chunk_size = None

    def pad_ended(frame: Tensor) -> Tensor:
        # The stock loop learns which rows have ended only after its first frame.
        if not request.pads_finished_rows:
            return frame
        return torch.where(ended.to(frame.device)[:, None], request.pad_token, frame)

    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=request.max_frames - n), lambda ids, scores: ended])
    rest = type(model)._sample(
        model,
        torch.zeros(x.shape[0], 0, dtype=torch.long, device=x.device),
        logits_processor=processors,
        stopping_criteria=criteria,
        generation_config=config,
        streamer=None if streamer is None else _Remaining(streamer, pad_ended),
        inputs_embeds=x,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=DynamicCache(config=model.config) if cache is None else cache,
        use_cache=True,
        logits_to_keep=1,
    )
    rest[:, 0] = pad_ended(rest[:, 0])
    return torch.cat([made, rest], dim=1)
