"""examples/train_demo.py on the clips of the repository: what it writes, what it holds out, when it stops."""

from __future__ import annotations

import importlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("train_demo")
    monkeypatch.setattr(module, "load_clips", lambda folder: module.repository_clips())
    return module


@pytest.fixture
def data(demo: Any) -> tuple[list[Any], list[Any]]:
    """A few short examples to train on and to hold out."""
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 9, 3, 12, 7, 4)
    made = [
        {"text_ids": torch.arange(4), "codes": torch.randint(1, 65, (size, 8), generator=generator)} for size in sizes
    ]
    return made[:4], made[4:]


@pytest.mark.slow
def test_from_clips_to_checkpoint(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "POSITIONS_PER_BATCH", 512)
    options = demo.Options(out=tmp_path, steps=12, evaluate_every=4, learning_rate=2e-2)
    metrics = demo.run(options)
    assert json.loads((tmp_path / "checkpoint" / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    costs = metrics["nll_per_codebook"]
    assert sum(costs["held_out"]) < sum(costs["held_out_before_training"])
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8, 12]
    assert records[2]["train"]["backbone"] < records[0]["train"]["backbone"]
    assert metrics["best"] in records
    assert metrics["data"]["train"]["en"]["clips"] == 9 and metrics["data"]["held_out"]["en"]["clips"] == 3
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    lengths = {name: len(soundfile.read(tmp_path / f"{name}.wav")[0]) for name in ("original", "from_tokens")}
    assert 0 <= lengths["original"] - lengths["from_tokens"] < 1280
    assert lengths["from_tokens"] == 1280 * metrics["speech"]["frames"]


def test_no_prompt_is_on_both_sides(demo: Any) -> None:
    own = demo.repository_clips()
    clip = own[0]
    many = [demo.Clip(f"{language}/{k}", 0, "", clip.samples) for language in ("en", "fr") for k in range(300)]
    for clips in (own, own + many):
        train, held = demo.split(clips)
        prompts = [{clip.name.partition("/")[2] for clip in part} for part in (train, held)]
        assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
        assert len(train) + len(held) == len(clips)
    assert {clip.name for clip in own} <= {clip.name for clip in held}
    assert 0.05 < len(held) / len(many) < 0.2


def test_batches_hold_every_row_once_an_epoch(demo: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 400, (60,), generator=generator).tolist() + [3000]
    data = [{"text_ids": torch.zeros(10), "codes": torch.zeros(size, 8)} for size in sizes]
    stream = demo.endless_batches(data, seed=0)
    first: list[list[int]] = []
    while sum(map(len, first)) < len(data):
        first.append(next(stream))
    assert sorted(itertools.chain(*first)) == list(range(len(data)))
    for rows in first:
        assert len(rows) == 1 or len(rows) * max(sizes[row] + 11 for row in rows) <= demo.POSITIONS_PER_BATCH
    again = demo.endless_batches(data, seed=0)
    assert [next(again) for _ in first] == first
    assert [next(stream) for _ in first] != first


def test_stops_when_held_out_frames_get_no_better(demo: Any, data: Any, tmp_path: Path) -> None:
    """Random tokens: the more is learned of some, the worse are the others; the weights that were best stay."""
    options = demo.Options(out=tmp_path, steps=500, evaluate_every=5, patience=2, learning_rate=1e-2)
    model = demo.build_model(0, layers=1, depth_layers=1)
    log, reason = demo.fit(model, *data, options, time.perf_counter() + 600)
    assert reason.startswith("converged") and log[-1]["step"] < 500
    scores = [record["held_out"]["backbone"] + record["held_out"]["depth"] for record in log]
    assert scores.index(min(scores)) == len(scores) - 3
    assert not hasattr(model, "training_acceleration") and not model.training

    config = demo.CsmTrainingConfig()
    collate = demo.CsmDataCollator(model.config, config)
    accelerated = demo.accelerate(model, training=config)
    assert float(demo.evaluate(accelerated, data[1], collate).sum()) == pytest.approx(min(scores), rel=1e-5)


def test_stops_when_the_time_ends(demo: Any, data: Any, tmp_path: Path) -> None:
    options = demo.Options(out=tmp_path, steps=100_000)
    log, reason = demo.fit(demo.build_model(0, layers=1, depth_layers=1), *data, options, time.perf_counter() + 1.0)
    assert reason == "the time ended" and log[-1]["seconds"] < 10


def test_options_name_what_is_wrong(demo: Any) -> None:
    with pytest.raises(ValueError, match="minutes must be more than 1, got 1"):
        demo.Options(minutes=1)
    with pytest.raises(ValueError, match="steps must be a positive integer, got 0"):
        demo.Options(steps=0)


def test_likelihood_of_single_frames(demo: Any, data: Any) -> None:
    """Frame by frame as in one pass, and a random model's costs are near those of guessing."""
    model = demo.build_model(0)
    example = data[0][3]
    whole = demo.codebook_nll(model, example)
    assert whole.shape == (12, 8)
    first = demo.codebook_nll(model, {**example, "codes": example["codes"][:1]})
    torch.testing.assert_close(first, whole[:1], rtol=1e-4, atol=1e-4)
    assert abs(float(whole.mean()) - torch.log(torch.tensor(66.0))) < 0.4


def test_unigram(demo: Any) -> None:
    train = [{"codes": torch.tensor([[1] * 8, [1] * 8, [2] * 8])}]
    held = [{"codes": torch.tensor([[1] * 8, [2] * 8])}, {"codes": torch.tensor([[1] * 8])}]
    share = torch.tensor([1.0, 3.0, 2.0]) / (3 + 66)
    wanted = -(2 * share[1].log() + share[2].log()) / 3
    torch.testing.assert_close(demo.unigram_nll(train, held), wanted.expand(8))
    share = torch.tensor([2.0, 3.0, 2.0]) / (4 + 66)
    wanted = -(2 * share[0].log() + 2 * share[1].log() + share[2].log()) / 5
    torch.testing.assert_close(demo.unigram_nll(train, held, ends=True), wanted.expand(8))
