"""The checkpoint that `make train-demo` made: it knows held-out speech, and accelerated it says what stock says."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from csm_models import TRAINED, held_out_speech, int8_twin, on_fast_path, stock, teacher_forced, trained
from torch.nn import functional

from csm_runtime import accelerate

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    return json.loads((TRAINED / "metrics.json").read_text())


def nll_per_codebook(model: Any) -> torch.Tensor:
    """Mean over all held-out frames, ``[8]`` nats, each recording after its text."""
    costs = []
    for text_ids, codes in held_out_speech():
        prompt = {"input_ids": text_ids[None], "attention_mask": torch.ones_like(text_ids)[None]}
        _, first, rest = teacher_forced(model, prompt, codes[None])
        logits = torch.cat([first[:, :, None], rest], dim=2)[0]
        costs.append(functional.cross_entropy(logits.transpose(1, 2), codes, reduction="none"))
    return torch.cat(costs).mean(0)


def test_it_knows_speech_it_never_heard(metrics: dict[str, Any]) -> None:
    model = trained()
    frames = torch.cat([codes for _, codes in held_out_speech()])
    assert len(frames) > 300
    got = nll_per_codebook(model)
    # Of all distributions that know no context, a column's own frequencies cost its tokens least, and these few frames
    # flatter them: 400 tokens cannot show what 64 cost.
    entropies = torch.stack([torch.distributions.Categorical(torch.bincount(c).float()).entropy() for c in frames.T])
    unigram = torch.tensor(metrics["nll_per_codebook"]["held_out_unigram"])
    assert (got < unigram).all(), (got, unigram)
    assert got.mean() < unigram.mean() - 0.4 and got.mean() < entropies.mean(), (got, unigram, entropies)
    assert got[0] < unigram[0] - 1.0

    random = type(model)(model.config).eval()
    assert got.mean() < nll_per_codebook(random).mean() - 0.6


def test_text_matters() -> None:
    """The first codebook of a recording is likelier after its own text than after another one's."""
    model, speech = trained(), held_out_speech()
    own, other = [], []
    for place, (text_ids, codes) in enumerate(speech):
        for ids, costs in ((text_ids, own), (speech[place - 1][0], other)):
            prompt = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
            _, first, _ = teacher_forced(model, prompt, codes[None])
            costs.append(functional.cross_entropy(first[0], codes[:, 0], reduction="none"))
    assert torch.cat(own).mean() < torch.cat(other).mean()


def test_codes_are_those_of_the_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed tokens are what the committed codebooks make of the repository's recordings."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    tokens = importlib.import_module("speech_tokens").SpeechTokens.load(TRAINED / "speech_tokens.safetensors")
    clips = importlib.import_module("speech_clips").repository_clips()
    text_ids = importlib.import_module("demo_csm").text_ids
    for clip, (ids, codes) in zip(clips, held_out_speech(), strict=True):
        assert torch.equal(text_ids(clip.speaker, clip.text), ids)
        # A frame halfway between two entries may go to the other one under another version of torch.
        assert (tokens.encode(clip.samples) == codes).float().mean() > 0.98


def test_greedy_speech_is_stocks() -> None:
    """After a text and after the first half of a recording: the same tokens, ends of speech included."""
    model = accelerate(trained(), mode="eager", batch_sizes=(1,), progress=False)
    ends = 0
    for text_ids, codes in held_out_speech()[1:6:2]:
        text = {"input_ids": text_ids[None], "attention_mask": torch.ones_like(text_ids)[None]}
        for prompt in (text, {"input_ids": codes[None, : len(codes) // 2]}):
            wanted = stock(model, **prompt, **GREEDY, max_new_tokens=24)
            with on_fast_path(model):
                got = model.generate(**prompt, **GREEDY, max_new_tokens=24)
            assert torch.equal(got, wanted)
            assert len(got[0].unique(dim=0)) > 1
            ends += bool((got[0, -1] == 0).all())
    assert ends, "a trained model stops talking"


def test_int8_keeps_what_was_learned() -> None:
    """The tokens are those of the rounded weights, and rounding costs next to nothing of what training gained."""
    twin = int8_twin(of=trained())
    model = accelerate(trained(), precision="int8", drop_originals=True, mode="eager", batch_sizes=(1,), progress=False)
    for text_ids, _ in held_out_speech()[1:4:2]:
        prompt = {"input_ids": text_ids[None], "attention_mask": torch.ones_like(text_ids)[None]}
        with on_fast_path(model):
            got = model.generate(**prompt, **GREEDY, max_new_tokens=20)
        assert torch.equal(got, stock(twin, **prompt, **GREEDY, max_new_tokens=20))
    before, after = nll_per_codebook(trained()), nll_per_codebook(twin)
    assert not torch.equal(before, after)
    assert (after - before).abs().max() < 0.02, (before, after)


def test_it_is_as_described(metrics: dict[str, Any]) -> None:
    """What ``metrics.json`` says of all held-out recordings holds for the few that are committed, within their spread."""
    got = nll_per_codebook(trained())
    said = torch.tensor(metrics["nll_per_codebook"]["held_out"])
    assert (got.mean() - said.mean()).abs() < 0.25, (got, said)
    assert metrics["parameters"] == sum(p.numel() for p in trained().parameters())
    assert sum(path.stat().st_size for path in TRAINED.iterdir()) < 5_000_000
