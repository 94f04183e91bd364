"""What examples/train.py trains on: sound files with their text, made into Mimi codes once and cached.

A data set is a folder or a manifest. A folder has a ``transcripts.tsv`` (file, seconds and text, separated by tabs) or a
``.txt`` beside every sound file. A manifest is JSON lines: ``{"audio": "a.wav", "text": "...", "speaker": 0}``, or a
conversation ``{"turns": [{"audio": ..., "text": ..., "speaker": ..., "train": false}, ...]}``; paths are relative to it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from csm_runtime.speech import TRANSCRIPTS, conversation, read_wav
from csm_runtime.speech import Turn as SpokenTurn

SOUNDS = {".wav", ".flac", ".ogg", ".mp3"}


@dataclass(frozen=True)
class Turn:
    """What one speaker said, and the file that holds it."""

    audio: Path
    text: str
    speaker: int = 0
    train: bool = True


def read_data(path: str | Path, argument: str = "--data") -> list[list[Turn]]:
    """The conversations of a data set, most of them of one turn.

    Raises:
        ValueError: it is not there or not of the form above; names ``argument``, the file and the line.
    """
    path = Path(path)
    if path.is_dir():
        found = list(_folder(path, argument))
    elif path.is_file() and path.suffix == ".jsonl":
        found = list(_manifest(path, argument))
    else:
        raise ValueError(f"{argument} must be a folder or a .jsonl manifest, got {str(path)!r}")
    if not found:
        raise ValueError(f"{argument}: no sound file with a text in {path}; it needs a {TRANSCRIPTS} or .txt files")
    for turn in (turn for turns in found for turn in turns):
        if not turn.audio.is_file():
            raise ValueError(f"{argument}: {path} names {turn.audio}, which is not there")
        if not turn.text.strip():
            raise ValueError(f"{argument}: {turn.audio} has no text; CSM needs to know what is said in it")
    return found


def _folder(path: Path, argument: str) -> Iterable[list[Turn]]:
    table = path / TRANSCRIPTS
    if table.is_file():
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            cells = line.split("\t")
            if len(cells) != 3:
                raise ValueError(
                    f"{argument}: {table}:{number} must be file, seconds and text between tabs, got {line!r}"
                )
            yield [Turn(path / cells[0], cells[2])]
        return
    for sound in sorted(p for p in path.rglob("*") if p.suffix.lower() in SOUNDS):
        if sound.with_suffix(".txt").is_file():
            yield [Turn(sound, sound.with_suffix(".txt").read_text(encoding="utf-8").strip())]


def _manifest(path: Path, argument: str) -> Iterable[list[Turn]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            turns = [
                Turn(
                    path.parent / turn["audio"], str(turn["text"]), int(turn.get("speaker", 0)), turn.get("train", True)
                )
                for turn in entry.get("turns", [entry])
            ]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f'{argument}: {path}:{number} must be {{"audio", "text", "speaker"}} or {{"turns": [...]}}: '
                f"{type(error).__name__} {error}"
            ) from error
        if turns:
            yield turns


def codec_fingerprint(codec: Any) -> str:
    """Hash of a codec's config and weights: codes of another codec are other codes."""
    digest = hashlib.sha256(json.dumps(codec.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def encode(codec: Any, audio: Path, codebooks: int) -> Tensor:
    """Codes ``[frames, codebooks]`` of a sound file, by the codec in fp32."""
    samples = read_wav(audio).to(next(codec.parameters()).device)
    with torch.no_grad(), torch.autocast(samples.device.type, enabled=False):
        return codec.encode(samples[None, None], num_quantizers=codebooks).audio_codes[0].T


def tokenise(
    data: list[list[Turn]], model: Any, processor: Any, cache: Path, argument: str = "--data", quiet: bool = False
) -> list[dict[str, Any]]:
    """Examples for ``CsmDataCollator``; codes come from the cache or go there.

    A cached file is named by a hash of the codec and of the sound file's content: a moved file is found again, a changed
    one is encoded again.

    Raises:
        ValueError: a file that is no sound, or an example longer than the model's positions; names ``argument``.
    """
    codec, books = model.codec_model, model.config.num_codebooks
    fingerprint = f"{codec_fingerprint(codec)} {books}".encode()
    cache.mkdir(parents=True, exist_ok=True)
    examples = []
    for turns in tqdm(data, desc="Mimi codes", unit="clip", disable=quiet):
        made = []
        for turn in turns:
            key = hashlib.sha256(fingerprint + turn.audio.read_bytes()).hexdigest()
            path = cache / f"{key}.safetensors"
            if not path.is_file():
                try:
                    codes = encode(codec, turn.audio, books)
                except ValueError as error:
                    raise ValueError(f"{argument}: {error}") from error
                whole = path.with_suffix(
                    f".{os.getpid()}"
                )  # renamed when complete: an interrupted write leaves no code
                save_file({"codes": codes.to(torch.int16).cpu().contiguous()}, whole)
                whole.replace(path)
            messages = conversation([SpokenTurn(turn.speaker, turn.text)])
            ids = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
            codes = load_file(path)["codes"].long()
            made.append({"text_ids": torch.as_tensor(ids)[0], "codes": codes, "train": turn.train})
        positions = sum(len(part["text_ids"]) + len(part["codes"]) + 1 for part in made)
        if positions > model.config.max_position_embeddings:
            raise ValueError(
                f"{argument}: {turns[0].audio} makes {positions} positions, the model has "
                f"{model.config.max_position_embeddings}; cut it into shorter clips"
            )
        examples.append({"turns": made})
    return examples
