"""Voices in ``generate()``: what a prompt's references made of the backbone is kept, and tokens are those without it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from csm_models import AUDIO, AUDIO_EOS, FRAME_SAMPLES, audio_prompt, build, code_prompt, stock, text_prompt
from torch import Tensor

from csm_runtime import accelerate
from csm_runtime.adapters.hf_passes import Passes
from csm_runtime.voices import Voices

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}
F = FRAME_SAMPLES


def speaking(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return accelerate(build("base", dtype=dtype), mode="eager", progress=False, guard=False, **options)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of every prefill."""
    lengths: list[int] = []
    prefill = Passes.prefill

    def counted(self: Passes, x: Tensor, *args: Any) -> Any:
        lengths.append(x.shape[1])
        return prefill(self, x, *args)

    monkeypatch.setattr(Passes, "prefill", counted)
    return lengths


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    from transformers import MimiModel

    count: Counter[str] = Counter()
    encode = MimiModel.encode

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        count["encoded"] += 1
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(MimiModel, "encode", counted)
    return count


def longer(prompt: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    """A conversation and one that goes on behind it, as the processor makes them of all turns together."""
    cutoffs = torch.cat(
        [prompt["input_values_cutoffs"], more["input_values_cutoffs"] + prompt["input_values"].shape[-1]], 1
    )
    return {
        "input_ids": torch.cat([prompt["input_ids"], more["input_ids"]], 1),
        "attention_mask": torch.cat([prompt["attention_mask"], more["attention_mask"]], 1),
        "input_values": torch.cat([prompt["input_values"], more["input_values"]], 2),
        "input_values_cutoffs": cutoffs,
    }


def with_text(prompt: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
    """The same references and another text behind them."""
    kept = int((prompt["input_ids"][0] == AUDIO_EOS).nonzero()[-1]) + 1
    made = torch.cat([prompt["input_ids"][:, :kept], torch.tensor([ids])], 1)
    return {**prompt, "input_ids": made, "attention_mask": torch.ones_like(made)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hit_has_the_tokens_of_a_miss(dtype: torch.dtype, passed: list[int], encoded: Counter[str]) -> None:
    model = speaking(dtype)
    prompt = audio_prompt(model, [[3 * F, 2 * F]])
    total = prompt["input_ids"].shape[1]
    first = model.generate(**prompt, max_new_tokens=6, **GREEDY)
    assert sum(passed) == total and len(passed) == 3 and encoded["encoded"] == 2
    passed.clear()
    encoded.clear()
    again = model.generate(**prompt, max_new_tokens=6, **GREEDY)
    assert torch.equal(again, first) and passed == [4] and not encoded
    assert model.acceleration.voices.status()["hits"] == 1
    if dtype == torch.float32:
        assert torch.equal(first, stock(model, **prompt, max_new_tokens=6, **GREEDY))


def test_the_same_voice_says_something_else(passed: list[int]) -> None:
    model = speaking()
    prompt = audio_prompt(model, [[3 * F]])
    model.generate(**prompt, max_new_tokens=2, **GREEDY)
    other = with_text(prompt, [5, 17, 3, 44, 8])
    passed.clear()
    made = model.generate(**other, max_new_tokens=6, **GREEDY)
    assert passed == [5]
    assert torch.equal(made, stock(model, **other, max_new_tokens=6, **GREEDY))


def test_a_conversation_that_grows_begins_where_it_was(passed: list[int]) -> None:
    model = speaking()
    turns = audio_prompt(model, [[3 * F]])
    turns = {**turns, "input_ids": turns["input_ids"][:, :-4], "attention_mask": turns["attention_mask"][:, :-4]}
    for turn in range(3):
        prompt = with_text(turns, [1 + turn, 2, 3])
        passed.clear()
        made = model.generate(**prompt, max_new_tokens=4, **GREEDY)
        assert torch.equal(made, stock(model, **prompt, max_new_tokens=4, **GREEDY))
        ends = [0, *((prompt["input_ids"][0] == AUDIO_EOS).nonzero()[:, 0] + 1).tolist()]
        assert passed == [ends[-1] - ends[-2], 3]
        more = audio_prompt(model, [[(2 + turn) * F]], seed=turn + 5)
        more = {**more, "input_ids": more["input_ids"][:, :-4], "attention_mask": more["attention_mask"][:, :-4]}
        turns = longer(turns, more)


def test_another_sound_under_the_same_ids_is_another_voice() -> None:
    model = speaking()
    prompt = audio_prompt(model, [[3 * F]])
    model.generate(**prompt, max_new_tokens=2, **GREEDY)
    other = {**prompt, "input_values": prompt["input_values"].flip(-1)}
    made = model.generate(**other, max_new_tokens=6, **GREEDY)
    assert torch.equal(made, stock(model, **other, max_new_tokens=6, **GREEDY))
    assert model.acceleration.voices.status()["hits"] == 0


@pytest.mark.parametrize("changed", ["backbone", "text", "codec", "audio"])
def test_changed_weights_make_other_voices(changed: str) -> None:
    model = speaking()
    prompt = audio_prompt(model, [[3 * F]])
    model.generate(**prompt, max_new_tokens=2, **GREEDY)
    with torch.no_grad():
        {
            "backbone": model.backbone_model.layers[1].mlp.up_proj.weight,
            "text": model.embed_text_tokens.weight,
            "codec": model.codec_model.encoder.layers[0].conv.weight,
            "audio": model.backbone_model.embed_tokens.embed_audio_tokens.weight,
        }[changed].data.mul_(1.5)
    made = model.generate(**prompt, max_new_tokens=6, **GREEDY)
    assert torch.equal(made, stock(model, **prompt, max_new_tokens=6, **GREEDY))
    assert model.acceleration.voices.status()["hits"] == 0


def test_padded_rows_batches_and_text_take_the_whole_way(passed: list[int]) -> None:
    model = speaking()
    batch = audio_prompt(model, [[3 * F], [2 * F, 2 * F]])
    padded = {
        key: torch.nn.functional.pad(value, (2, 0), value=90 if key == "input_ids" else 0)
        if key in ("input_ids", "attention_mask")
        else value
        for key, value in audio_prompt(model, [[3 * F]]).items()
    }
    for prompt in (batch, padded, text_prompt((5,))):
        passed.clear()
        made = model.generate(**prompt, max_new_tokens=4, **GREEDY)
        assert passed == [prompt["input_ids"].shape[1]]
        assert torch.equal(made, stock(model, **prompt, max_new_tokens=4, **GREEDY))
    assert len(model.acceleration.voices) == 0


def test_ids_that_do_not_fit_their_sound_are_left_to_the_stock_merge(passed: list[int]) -> None:
    """Two sounds without anything between them: which belongs to which is the stock model's business."""
    model = speaking()
    prompt = audio_prompt(model, [[2 * F, 2 * F]])
    ids = prompt["input_ids"][0].tolist()
    joined = [i for i in ids if i == AUDIO] + [AUDIO_EOS, 4, 5]
    prompt |= {"input_ids": torch.tensor([joined]), "attention_mask": torch.ones(1, len(joined), dtype=torch.long)}
    made = model.generate(**prompt, max_new_tokens=4, **GREEDY)
    assert passed == [len(joined)]
    assert torch.equal(made, stock(model, **prompt, max_new_tokens=4, **GREEDY))


def test_a_voice_that_is_added_is_there_for_the_first_call(passed: list[int]) -> None:
    model = speaking()
    prompt = audio_prompt(model, [[3 * F]])
    kept = int((prompt["input_ids"][0] == AUDIO_EOS).nonzero()[-1]) + 1
    reference = {
        **prompt,
        "input_ids": prompt["input_ids"][:, :kept],
        "attention_mask": prompt["attention_mask"][:, :kept],
    }
    profile = model.acceleration.add_voice(**reference, meta={"transcript": "hello"})
    assert profile.positions == kept == sum(passed) and profile.meta["transcript"] == "hello"
    assert model.acceleration.voices.status()["pinned"] == 1
    passed.clear()
    made = model.generate(**prompt, max_new_tokens=6, **GREEDY)
    assert passed == [4] and torch.equal(made, stock(model, **prompt, max_new_tokens=6, **GREEDY))
    passed.clear()
    assert model.acceleration.add_voice(**reference).key == profile.key and not passed
    with pytest.raises(ValueError, match="must end with the end of its last sound, got 4 more positions"):
        model.acceleration.add_voice(**prompt)
    with pytest.raises(ValueError, match="a voice must be one row of text and sound"):
        model.acceleration.add_voice(**text_prompt((5,)))


def test_a_folder_outlives_the_model(tmp_path: Path, passed: list[int]) -> None:
    prompt = None
    for turn in range(3):
        model = speaking(voices=Voices(budget=64 << 20, folder=tmp_path))
        prompt = prompt or audio_prompt(model, [[3 * F]])
        passed.clear()
        made = model.generate(**prompt, max_new_tokens=5, **GREEDY)
        assert torch.equal(made, stock(model, **prompt, max_new_tokens=5, **GREEDY))
        assert len(passed) == (2 if turn != 1 else 1)
        if turn == 1:  # a damaged file is not used
            (file,) = tmp_path.glob("*.safetensors")
            raw = bytearray(file.read_bytes())
            raw[-5] ^= 1
            file.write_bytes(raw)
    assert model.acceleration.voices.status()["corrupt"] == 1


def test_without_voices_and_with_a_fault_of_theirs(passed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = speaking(voices=False)
    prompt = audio_prompt(model, [[3 * F]])
    total = prompt["input_ids"].shape[1]
    wanted = stock(model, **prompt, max_new_tokens=5, **GREEDY)
    assert model.acceleration.voices is None
    for _ in range(2):
        passed.clear()
        assert torch.equal(model.generate(**prompt, max_new_tokens=5, **GREEDY), wanted) and passed == [total]
    with pytest.raises(ValueError, match="voices are switched off"):
        model.acceleration.add_voice(**prompt)
    model = speaking()

    def broken(self: Voices, *args: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Voices, "longest", broken)
    assert torch.equal(model.generate(**prompt, max_new_tokens=5, **GREEDY), wanted)
    assert any("voices cannot be used: RuntimeError: a bug" in what for what in model.acceleration.metrics.faults)
    with pytest.raises(ValueError, match="voices must be True, False or a Voices, got 3"):
        accelerate(build("base"), voices=3)


def test_memory_that_runs_out_takes_the_voices_first() -> None:
    model = speaking()
    prompt = audio_prompt(model, [[3 * F]])
    model.generate(**prompt, max_new_tokens=2, **GREEDY)
    assert len(model.acceleration.voices) == 1
    model.acceleration.memory.make_room("CUDA out of memory. Tried to allocate 2.00 MiB")
    assert len(model.acceleration.voices) == 0


def test_dropped_originals_have_voices_too(passed: list[int]) -> None:
    model = speaking(precision="int8", drop_originals=True)
    prompt = audio_prompt(model, [[3 * F]])
    first = model.generate(**prompt, max_new_tokens=5, **GREEDY)
    passed.clear()
    assert torch.equal(model.generate(**prompt, max_new_tokens=5, **GREEDY), first) and passed == [4]


def test_a_stream_speaks_in_a_kept_voice(passed: list[int]) -> None:
    model = speaking()
    prompt = audio_prompt(model, [[3 * F]])
    wanted = model.generate(**prompt, max_new_tokens=4, output_audio=True, **GREEDY)[0]
    passed.clear()
    made = torch.cat([chunk.samples for chunk in model.acceleration.stream(**prompt, max_new_tokens=4, **GREEDY)])
    assert passed == [4] and float((made - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_metrics_say_what_was_spoken() -> None:
    model = speaking()
    handle = model.acceleration
    prompt = audio_prompt(model, [[3 * F]])
    model.generate(**prompt, max_new_tokens=5, output_audio=True, **GREEDY)
    model.generate(code_prompt(model, 1, 7), max_new_tokens=3, **GREEDY)
    said = handle.metrics.snapshot()
    assert said["audio"]["seconds"] == pytest.approx(8 * 0.08) and said["audio"]["spent_seconds"] > 0
    assert said["latencies"]["codec"]["count"] == 1 and said["gauges"]["context.positions"] == 7
    assert said["watched"]["guard"]["rung"] == "fast" and said["watched"]["voices"]["count"] == 1
    assert "pressure" in said["watched"]["memory"]
