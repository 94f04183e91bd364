"""examples/train.py end to end on a tiny model and the recording in the package."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from csm_runtime.small_model import SmallProcessor, build_small_csm

ROOT = Path(__file__).parent.parent
CLIP = ROOT / "csm_runtime" / "data" / "tt-weasels.wav"
TEXT = "Weasels have eaten our phone system."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four codebooks on disk."""
    folder = tmp_path_factory.mktemp("tiny-csm")
    model = build_small_csm(0, layers=1, hidden=256, depth_layers=1, depth_hidden=64, codebooks=4)
    model.save_pretrained(folder)
    SmallProcessor(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codes")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A manifest of a clip, and of a conversation whose first turn is context only."""
    lines = [
        {"audio": str(CLIP), "text": TEXT, "speaker": 1},
        {"turns": [{"audio": str(CLIP), "text": TEXT, "train": False}, {"audio": str(CLIP), "text": "Again."}]},
        {"audio": str(CLIP), "text": "Once more."},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("train")


@pytest.fixture
def run(train: Any, tiny: Path, codes: Path, data: Path, tmp_path: Path) -> Any:
    """``run(name, *arguments)``: train, and read the log."""

    def once(name: str, *arguments: str, source: Path = data) -> list[dict[str, Any]]:
        common = ["--model", str(tiny), "--data", str(source), "--out", str(tmp_path / name), "--cache", str(codes)]
        common += ["--device", "cpu", "--steps", "4", "--batch-size", "2", "--warmup", "1", "--noise-every", "0"]
        assert train.main([*common, "--val-every", "4", "--lr", "1e-3", *arguments]) == 0
        return [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    return once


def test_end_to_end(run: Any, tmp_path: Path, tiny: Path) -> None:
    arguments = ["--depth-fraction", "0.25", "--accumulate", "2", "--gradient-checkpointing", "--bf16"]
    log = run("full", *arguments, "--noise-every", "2", "--val-every", "2")
    steps = [line for line in log if "depth_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    # All frames count for the backbone, a quarter of them (rounded up per micro-batch) is rows of the depth decoder.
    assert all(line["frames"] / 4 <= line["depth_rows"] < line["frames"] / 4 + 2 for line in steps)
    assert all("suggested_depth_frames" in line for line in log if "noise_scale_frames" in line)
    first, last = (line for line in log if "val_depth_loss" in line)
    assert last["val_backbone_loss"] < first["val_backbone_loss"] and last["val_depth_loss"] < first["val_depth_loss"]
    assert (tmp_path / "full" / "curves.png").read_bytes().startswith(b"\x89PNG")
    before, after = (load_file(path / "model.safetensors") for path in (tiny, tmp_path / "full" / "model"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == name.startswith("codec_model."), name

    from csm_runtime.checkpoints import load

    model, processor = load(str(tmp_path / "full" / "model"), device="cpu")
    assert not hasattr(model, "training_acceleration") and processor.sampling_rate == 24_000


def test_codes_are_cached_by_content(train: Any, run: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    calls = []
    module = importlib.import_module("training_data")
    encode = module.encode
    monkeypatch.setattr(module, "encode", lambda *a: calls.append(a[1]) or encode(*a))
    cache = ["--steps", "1", "--cache", str(tmp_path / "codes")]
    run("first", *cache)
    assert calls == [CLIP]  # four turns, one sound
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(CLIP, moved / "renamed.wav")
    (moved / "renamed.txt").write_text(TEXT)
    run("second", *cache, source=moved)
    assert len(calls) == 1
    sound = bytearray((moved / "renamed.wav").read_bytes())
    sound[-100:] = bytes(100)
    (moved / "renamed.wav").write_bytes(sound)
    run("third", *cache, source=moved)
    assert len(calls) == 2


@pytest.mark.parametrize("more", [[], ["--lora-rank", "2"]], ids=["full", "lora"])
def test_resume_gives_the_same_losses(train: Any, run: Any, tmp_path: Path, monkeypatch: Any, more: list[str]) -> None:
    more = [*more, "--checkpoint-every", "2", "--accumulate", "2", "--depth-frames", "5"]
    whole = run("whole", *more)
    step, calls = train.train_step, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # one step after the checkpoint
            raise RuntimeError("the power is out")
        return step(*args)

    monkeypatch.setattr(train, "train_step", failing)
    with pytest.raises(RuntimeError, match="power"):
        run("broken", *more)
    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(ValueError, match="--resume: the run had --seed 0, now it is 3"):
        run("broken", *more, "--resume", "--seed", "3")
    resumed = run("broken", *more, "--resume")
    for log in (whole, resumed):
        for line in log:
            line.pop("seconds", None)
    assert resumed == whole
    kind = "adapter/adapter_model" if "--lora-rank" in more else "model/model"
    weights = [load_file(tmp_path / name / f"{kind}.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] | weights[1])


def test_interrupt_saves(train: Any, run: Any, tmp_path: Path, monkeypatch: Any) -> None:

    whole = run("whole")
    step, calls = train.train_step, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(AssertionError):  # exit code 1
        run("stopped")
    assert [path.name for path in train.checkpoints(tmp_path / "stopped")] == ["step-00000003"]
    resumed = run("stopped", "--resume")
    assert [line["depth_loss"] for line in resumed[:4]] == [line["depth_loss"] for line in whole[:4]]


def test_lora_leaves_base_weights(run: Any, tmp_path: Path, tiny: Path) -> None:
    run("lora", "--lora-rank", "2", "--merge")
    adapter = load_file(tmp_path / "lora" / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)
    assert any("depth_decoder" in name for name in adapter) and any("backbone_model" in name for name in adapter)
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    before, after = (load_file(path / "model.safetensors") for path in (tiny, tmp_path / "lora" / "model"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        adapted = "_proj.weight" in name and ".layers." in name and "codec_model" not in name
        assert torch.equal(weight, after[name]) != adapted, name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"audio": "gone.wav", "text": "x"}', r"--data: .*gone.wav, which is not there"),
        ('{"text": "x"}', r"--data: .*data.jsonl:1 must be .*'audio'"),
        ("no json", r"--data: .*data.jsonl:1 must be"),
        (f'{{"audio": "{CLIP}", "text": " "}}', r"--data: .* has no text"),
        ('{"audio": "data.jsonl", "text": "x"}', r"--data: .*cannot be read as a sound file"),
        (f'{{"audio": "{CLIP}", "text": "x", "train": false}}', r"--data: no turn is to be trained on"),
        ("", r"--data: no sound file with a text"),
    ],
)
def test_bad_data(run: Any, data: Path, content: str, message: str) -> None:
    data.write_text(content)
    with pytest.raises(ValueError, match=message):
        run("bad")


def test_bad_arguments(train: Any, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--data must be a folder or a .jsonl manifest"):
        run("bad", source=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--resume: no checkpoint"):
        run("none", "--resume")
    for arguments in (["--steps", "0"], ["--merge"], ["--fsdp"]):
        with pytest.raises(SystemExit):
            run("bad", *arguments)
        assert arguments[0] in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_sharded_are_one_process(run: Any, tiny: Path, codes: Path, tmp_path: Path) -> None:
    """Under torchrun with FSDP the losses are those of one process with the batch of both."""
    data = tmp_path / "four.jsonl"
    texts = ("One.", "Twice two.", "Three.", "And another four.")
    data.write_text("".join(json.dumps({"audio": str(CLIP), "text": text}) + "\n" for text in texts))
    same = ["--val-data", str(data), "--depth-fraction", "1", "--steps", "2", "--val-every", "1"]
    alone = run("alone", *same, source=data)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "train.py"), "--fsdp", "--model", str(tiny), "--data", str(data), *same]
    command += ["--out", str(tmp_path / "two"), "--cache", str(codes), "--device", "cpu", "--batch-size", "1"]
    command += ["--warmup", "1", "--lr", "1e-3", "--noise-every", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True)
    two = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in two] == [line["step"] for line in alone]
    for ours, expected in zip(two, alone):
        for name, value in expected.items():
            if name != "seconds":
                assert ours[name] == pytest.approx(value, rel=1e-5), name
    saved = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("alone", "two")]
    assert saved[0].keys() == saved[1].keys()
