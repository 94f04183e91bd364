"""Checkpoints of Sesame's own repository (torchtune) to the layout of transformers, and back.

Both hold the same numbers under other names, but for the rows of the query and key projections: torchtune rotates neighbours
``(2i, 2i + 1)`` of a head, transformers halves ``(i, i + n / 2)``. Nothing is rounded, so a round trip is bit for bit.
:func:`to_hf` and :func:`to_sesame` work on state dicts, :func:`convert_files` on files, a tensor at a time. Neither torchtune
nor transformers is needed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm_runtime.compiling import Progress
from csm_runtime.csm_shape import (
    AUDIO_TABLE,
    FLAVORS,
    LAYER,
    SPECIAL,
    STACKS,
    Flavor,
    Shape,
    hf_config,
    load_flavors,
    sesame_config,
    shape_of_hf,
    shape_of_sesame,
)
from csm_runtime.tensor_files import stored_tensors, write_tensors

HF, SESAME = "hf", "sesame"
_LAYOUTS = {HF: "transformers'", SESAME: "Sesame's"}
_PLAIN = {
    "text_embeddings.weight": "embed_text_tokens.weight",
    "projection.weight": "depth_decoder.model.inputs_embeds_projector.weight",
    "codebook0_head.weight": "lm_head.weight",
    "audio_head": "depth_decoder.codebooks_head.weight",
    "backbone.norm.scale": "backbone_model.norm.weight",
    "decoder.norm.scale": "depth_decoder.model.norm.weight",
}
_TABLES = ("backbone_model.embed_tokens.embed_audio_tokens.weight", "depth_decoder.model.embed_tokens.weight")
"""transformers has Sesame's one audio embedding twice; a checkpoint may hold either or both."""
_CODEC = "codec_model."
_MASKS = ("backbone_causal_mask", "decoder_causal_mask")
"""Buffers that Sesame's ``setup_caches()`` adds to the state dict."""


def hf_names(name: str) -> tuple[str, ...]:
    """What transformers calls a tensor of Sesame's layout: one name, or two for the audio embedding."""
    if name == AUDIO_TABLE:
        return _TABLES
    if name in _PLAIN:
        return (_PLAIN[name],)
    stack, layers, number, rest = name.split(".", 3)
    return (f"{STACKS[stack]}.{layers}.{number}.{LAYER[rest]}",)


# ------------------------------------------------------------------------------------------------------- state dicts


def to_hf(state: Mapping[str, Tensor], shape: Shape | None = None) -> dict[str, Tensor]:
    """A state dict of Sesame's ``Model`` as one of ``CsmForConditionalGeneration``, without its codec.

    Args:
        state: buffers that ``setup_caches()`` adds are left out.
        shape: None where the tensors' sizes say it, see :func:`shape_of_tensors`.

    Returns:
        The audio embedding stands under both its names, as the same tensor. All but query and key projections share their
        memory with ``state``.

    Raises:
        ValueError: tensors are missing, unexpected, or of another size; names them.
    """
    return _converted(state, shape, HF)


def to_sesame(state: Mapping[str, Tensor], shape: Shape | None = None) -> dict[str, Tensor]:
    """A state dict of ``CsmForConditionalGeneration`` as one of Sesame's ``Model``; the codec's tensors are left out.

    Args and errors as :func:`to_hf` has them; ValueError also where the two audio embeddings are not the same.
    """
    return _converted(state, shape, SESAME)


def _converted(state: Mapping[str, Tensor], shape: Shape | None, to: str) -> dict[str, Tensor]:
    sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    moves = _plan(sizes, shape_of_tensors(sizes) if shape is None else shape, to)
    return {name: tensor for move in moves for tensor in [move.take(state.__getitem__)] for name in move.targets}


def shape_of_tensors(
    sizes: Mapping[str, Sequence[int]],
    heads: tuple[int, int] | None = None,
    flavors: Mapping[str, Flavor] = FLAVORS,
) -> Shape:
    """A CSM's shape from the sizes of its tensors, in either layout.

    Args:
        sizes: by name.
        heads: query heads of backbone and decoder, which no size tells. None takes those of a flavor of the same sizes.
        flavors: where to look for one. What else no size tells, norm and rotary settings, is taken from there too, or is
            Sesame's usual.

    Raises:
        ValueError: not a CSM, sizes that contradict each other, or heads that have to be given.
    """
    layout = _layout(sizes)
    found: dict[str, tuple[int, ...]] = {}
    for name in (AUDIO_TABLE, *_PLAIN):
        known = [other for other in ((name,) if layout == SESAME else hf_names(name)) if other in sizes]
        if not known:
            raise ValueError(_message("lacks", [name if layout == SESAME else hf_names(name)[0]], layout))
        found[name] = tuple(sizes[known[0]])
    books, inner, vocab = _dims(found, "audio_head", 3)
    text, outer = _dims(found, "text_embeddings.weight", 2)
    parts = zip(STACKS, (outer, inner), heads or (None, None))
    stacks = [_stack_of(sizes, stack, width, layout, count, flavors) for stack, width, count in parts]
    return Shape(stacks[0], stacks[1], text, vocab, books + 1)


def _dims(sizes: Mapping[str, tuple[int, ...]], name: str, count: int) -> tuple[int, ...]:
    if len(sizes[name]) != count:
        raise ValueError(f"tensor {name!r} has shape {list(sizes[name])}, {count} dimensions are wanted")
    return sizes[name]


def _stack_of(
    sizes: Mapping[str, Sequence[int]],
    stack: str,
    width: int,
    layout: str,
    heads: int | None,
    flavors: Mapping[str, Flavor],
) -> Flavor:
    prefix = f"{stack if layout == SESAME else STACKS[stack]}.layers."
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    layers = 1 + max((int(match[1]) for match in map(pattern.match, sizes) if match), default=-1)
    names = [f"{stack}.layers.0.attn.k_proj.weight", f"{stack}.layers.0.mlp.w1.weight"]
    names = names if layout == SESAME else [hf_names(name)[0] for name in names]
    missing = [name for name in names if name not in sizes]
    if missing:
        raise ValueError(_message("lacks", missing, layout))
    keys, ffn = (sizes[name][0] for name in names)
    if heads is not None:
        if heads < 1 or width % heads or keys % (width // heads):
            raise ValueError(
                f"heads: {heads} of the {stack} do not go with its width of {width} and {keys} rows of keys"
            )
        return Flavor(layers, heads, keys // (width // heads), width, ffn)
    for flavor in flavors.values():
        have = (flavor.num_layers, flavor.embed_dim, flavor.num_kv_heads * flavor.head_dim, flavor.intermediate_dim)
        if have == (layers, width, keys, ffn):
            return flavor
    raise ValueError(
        f"no size of a tensor says how many heads the {stack} has ({layers} layers of width {width}, {keys} rows of keys), "
        f"and no flavor of {sorted(flavors)} has these sizes; give a config or flavors"
    )


def _layout(names: Iterable[str]) -> str:
    names = set(names)
    if any(name in names for name in ("audio_head", AUDIO_TABLE, "text_embeddings.weight")):
        return SESAME
    if any(name.startswith(("backbone_model.", "depth_decoder.")) for name in names):
        return HF
    some = ", ".join(map(repr, sorted(names)[:3])) or "nothing"
    raise ValueError(f"not a CSM in Sesame's layout or transformers': there are neither of the names, but {some}")


class _Move(NamedTuple):
    """One tensor of Sesame's layout on its way."""

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    """More than one have to be the same."""
    heads: int
    """Of a query or key projection, otherwise 0."""
    to: str

    def take(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor as the target wants it.

        Raises:
            ValueError: sources differ.
        """
        tensor = read(self.sources[0])
        for other in self.sources[1:]:
            if not _same_bits(tensor, read(other)):
                raise ValueError(
                    f"{self.sources[0]!r} and {other!r} differ; Sesame's layout has one audio embedding for both"
                )
        return _reordered(tensor, self.heads, self.to) if self.heads else tensor


def _reordered(weight: Tensor, heads: int, to: str) -> Tensor:
    """``[heads * n, K]`` with the rows of each head in the other order."""
    rows, columns = weight.shape
    half = rows // heads // 2
    split = (heads, half, 2, columns) if to == HF else (heads, 2, half, columns)
    return weight.reshape(split).transpose(1, 2).reshape(rows, columns)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _plan(sizes: Mapping[str, tuple[int, ...]], shape: Shape, to: str) -> list[_Move]:
    """What goes where. Raises ValueError where the tensors are not those of that shape in the other layout."""
    layout = SESAME if to == HF else HF
    if _layout(sizes) == to:
        raise ValueError(f"this CSM is in {_LAYOUTS[to]} layout already")
    moves, missing, wrong = [], [], []
    for name, size in shape.tensors().items():
        theirs = hf_names(name)
        names = (name,) if layout == SESAME else theirs
        known = tuple(one for one in names if one in sizes)
        if not known:
            missing.append(names[0])
        wrong += [f"{one!r} has shape {list(sizes[one])}, wanted {list(size)}" for one in known if sizes[one] != size]
        stack = shape.stack(name.partition(".")[0])
        heads = {"q_proj": stack.num_heads, "k_proj": stack.num_kv_heads}.get(name.split(".")[-2:][0], 0)
        moves.append(_Move(theirs if to == HF else (name,), known, heads, to))
    used = {one for move in moves for one in move.sources}
    ignored = _MASKS if layout == SESAME else (_CODEC,)
    unexpected = [name for name in sizes if name not in used and not name.startswith(ignored)]
    problems = [_message("lacks", missing, layout)] if missing else []
    problems += [_message("has besides", unexpected, layout)] if unexpected else []
    problems += [f"tensor {'; '.join(wrong[:3])}{_more(wrong)}"] if wrong else []
    if problems:
        raise ValueError("; ".join(problems))
    return moves


def _message(what: str, names: Sequence[str], layout: str) -> str:
    listed = ", ".join(map(repr, names[:3]))
    return f"the state {what} {listed}{_more(names)} (a CSM in {_LAYOUTS[layout]} layout)"


def _more(names: Sequence[Any]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""


# -------------------------------------------------------------------------------------------------------------- files


@dataclass
class Converted:
    """What :func:`convert_files` wrote."""

    files: list[Path]
    tensors: int
    nbytes: int
    notes: list[str] = field(default_factory=list)
    """What was left out, assumed, or remains to be done."""


class _Stored(NamedTuple):
    """A tensor that can be read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def convert_files(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str,
    config: str | os.PathLike[str] | None = None,
    flavors: Mapping[str, Flavor] | None = None,
    codec_from: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: bool = True,
) -> Converted:
    """Write ``model.safetensors`` and ``config.json`` of a checkpoint in the other layout.

    Tensors are read, reordered and written one by one. The files get their names when all is written.

    Args:
        source: a folder, a safetensors file, the index of several, or what ``torch.save`` wrote.
        out: folder to write to.
        to: ``"hf"`` or ``"sesame"``.
        config: of the source; by default ``config.json`` beside it, and without one what the sizes of the tensors say.
        flavors: beside :data:`FLAVORS` and what ``flavors.json`` beside the source has. Those that ``config.json`` of
            Sesame's layout needs besides are written to ``flavors.json``.
        codec_from: with ``to="hf"``, a checkpoint of a whole CSM or of Mimi alone in transformers' layout. A CSM gives the
            ids of its special tokens too, which otherwise are those of Llama 3's vocabulary.
        force: write over files that are there.
        progress: show a progress bar on stderr.

    Raises:
        FileExistsError: there are files at the output already.
        OSError: a file cannot be read or written; FileNotFoundError where one is missing.
        ValueError: not a checkpoint of the other layout, or one that the layout cannot hold; names what is the matter.
    """
    if to not in _LAYOUTS:
        raise ValueError(f"to must be one of {tuple(_LAYOUTS)}, got {to!r}")
    if codec_from is not None and to != HF:
        raise ValueError("codec_from is for to='hf'; Sesame's layout holds no codec")
    source, out = Path(source), Path(out)
    files = _weight_files(source, to)
    beside = files[0].parent / "flavors.json"
    known = {**FLAVORS, **(load_flavors(beside) if beside.is_file() else {}), **(flavors or {})}
    stored = _open(files)
    layout = _layout(stored)
    if layout == to:
        raise ValueError(f"{source} is in {_LAYOUTS[to]} layout already")
    sizes = {name: tensor.shape for name, tensor in stored.items()}
    notes: list[str] = []
    shape = _shape_of_files(files[0].parent, config, sizes, layout, known, notes)
    moves = _plan(sizes, shape, to)
    tensors = {name: _moved(move, stored) for move in moves for name in move.targets}
    texts: dict[str, Any] = {}
    if to == HF:
        codec, settings, special = _codec(codec_from, shape, notes)
        tensors |= codec
        texts["config.json"] = hf_config(shape, settings, stored["codebook0_head.weight"].dtype) | special
        notes.append("tokenizer, processor and generation config are not made; copy them from a CSM of transformers")
    else:
        args, new = sesame_config(shape, known)
        texts["config.json"] = args
        if new:
            texts["flavors.json"] = {name: asdict(flavor) for name, flavor in new.items()}
            notes.append(f"flavors {sorted(new)} are not among Sesame's; flavors.json has them for its FLAVORS")
        codec_names = [name for name in stored if name.startswith(_CODEC)]
        if codec_names:
            notes.append(f"the codec's {len(codec_names)} tensors are left out; Sesame's generator loads its own")
    return _write(out, tensors, texts, files, notes, force, progress)


def _moved(move: _Move, stored: Mapping[str, _Stored]) -> _Stored:
    first = stored[move.sources[0]]
    return first._replace(read=lambda: move.take(lambda name: stored[name].read()))


def _weight_files(source: Path, to: str) -> list[Path]:
    """Of a folder, those of the layout that is not ``to``, where it holds both."""
    if source.is_dir():
        named = (_json(source / "config.json") or {}).get("transformers_weights") if to == SESAME else None
        names = [*([named] if named else []), "model.safetensors", "model.safetensors.index.json", "ckpt.pt"]
        there = [source / name for name in names if (source / name).is_file()]
        others = sorted(path for path in source.iterdir() if path.suffix in (".safetensors", ".pt", ".pth"))
        if not there and len(others) != 1:
            raise FileNotFoundError(
                f"{source} holds none of {', '.join(names)}, and {len(others)} others; name the file"
            )
        source = (there or others)[0]
    if not source.is_file():
        raise FileNotFoundError(f"{source} is neither a file nor a folder")
    if not source.name.endswith(".index.json"):
        return [source]
    shards = (_json(source) or {}).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{source} is no index of safetensors files: it has no 'weight_map' of names")
    return [source.parent / name for name in sorted(set(shards.values()))]


def _open(files: Sequence[Path]) -> dict[str, _Stored]:
    """Tensors by name, none of which is read yet, or is mapped only."""
    if files[0].suffix == ".safetensors":
        stored = stored_tensors(files).items()
        return {name: _Stored(one.shape, one.dtype, partial(one.read, one.dtype)) for name, one in stored}
    state = _torch_state(files[0]).items()
    return {name: _Stored(tuple(one.shape), one.dtype, one.detach) for name, one in state}


def _torch_state(path: Path) -> dict[str, Tensor]:
    """A state dict that ``torch.save`` wrote, mapped where its format allows that; by itself or in a checkpoint's dict."""
    try:
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # of before torch 1.6
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read by torch.load(weights_only=True): {error}") from error
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(one, Tensor) for one in state.values()):
        raise ValueError(f"{path} holds no state dict: there has to be a dict of tensors")
    return {str(name): tensor for name, tensor in state.items()}


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, wanted an object")
    return found


def _shape_of_files(
    folder: Path,
    config: str | os.PathLike[str] | None,
    sizes: Mapping[str, tuple[int, ...]],
    layout: str,
    flavors: Mapping[str, Flavor],
    notes: list[str],
) -> Shape:
    path = folder / "config.json" if config is None else Path(config)
    found = _json(path)
    if found is None and config is not None:
        raise FileNotFoundError(f"{path} is missing")
    if found is not None:
        nested = found.get("args")
        args = nested if isinstance(nested, dict) else found
        try:
            if layout == SESAME and (config is not None or "backbone_flavor" in args):
                return shape_of_sesame(args, flavors)
            if layout == HF and (config is not None or found.get("model_type") == "csm"):
                return shape_of_hf(found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    shape = shape_of_tensors(sizes, flavors=flavors)
    notes.append(
        f"no config in {_LAYOUTS[layout]} layout; heads, norms and rotary positions are those of known flavors"
    )
    return shape


def _codec(
    path: str | os.PathLike[str] | None, shape: Shape, notes: list[str]
) -> tuple[dict[str, _Stored], dict[str, Any] | None, dict[str, Any]]:
    """The codec's tensors under the names they have in a CSM, its config, and ids of the CSM it comes from."""
    if path is None:
        notes.append("there is no codec in it: transformers would make one of random weights; see --codec-from")
        return {}, None, {}
    files = _weight_files(Path(path), SESAME)
    stored, config = _open(files), _json(files[0].parent / "config.json") or {}
    tensors = {name: tensor for name, tensor in stored.items() if name.startswith(_CODEC)}
    settings, special = config.get("codec_config"), {name: config[name] for name in SPECIAL if name in config}
    if not tensors and config.get("model_type") == "mimi":
        tensors, settings, special = {_CODEC + name: tensor for name, tensor in stored.items()}, config, {}
    if not tensors:
        raise ValueError(
            f"{path} holds no codec: neither a CSM of transformers with one, nor a 'mimi' with its config.json"
        )
    settings = {"model_type": "mimi"} if settings is None else settings
    if settings.get("num_quantizers", 32) < shape.codebooks:
        raise ValueError(
            f"the codec of {path} has {settings.get('num_quantizers', 32)} codebooks, the CSM {shape.codebooks}"
        )
    return tensors, settings, special


def _write(
    out: Path,
    tensors: Mapping[str, _Stored],
    texts: Mapping[str, Any],
    sources: Sequence[Path],
    notes: list[str],
    force: bool,
    progress: bool,
) -> Converted:
    targets = [out / "model.safetensors", *(out / name for name in texts)]
    for path in targets:
        if any(path.exists() and path.samefile(source) for source in sources):
            raise ValueError(f"{path} is what is to be converted; name another folder")
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists already; --force writes over it")
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}") for path in targets]
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    bar = Progress(total, "converting", progress, in_bytes=True)

    def read(name: str) -> Tensor:
        tensor = tensors[name].read()
        bar.advance(name, tensor.nbytes)
        return tensor

    try:
        write_tensors(temporary[0], layout, read)
        for path, content in zip(temporary[1:], texts.values(), strict=True):
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path, target in zip(temporary, targets, strict=True):
            os.replace(path, target)
    except BaseException:
        with contextlib.suppress(OSError):
            for path in temporary:
                path.unlink(missing_ok=True)
            if made:
                out.rmdir()
        raise
    finally:
        bar.close()
    return Converted(targets, len(tensors), total, notes)
