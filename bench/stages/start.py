"""Stage 7: memory, cold start and time to first audio, each in a fresh process; with empty caches and with full ones."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm_runtime import accelerate
from csm_runtime.demo import FrameClock
from stages.common import Stage, read_json
from stages.end_to_end import build, fast_mode, prompt

BENCH = Path(__file__).parent.parent


class FirstAudio(FrameClock):
    """A streamer that decodes the first frame as soon as it arrives and notes when its samples are on the host."""

    def __init__(self, codec: Any) -> None:
        super().__init__()
        self._codec = codec
        self.audio_seconds: float | None = None
        self.samples = 0

    def put(self, value: Tensor) -> None:
        seen = len(self.seconds)
        super().put(value)
        if len(self.seconds) == 1 and not seen:
            device = next(self._codec.parameters()).device
            with torch.no_grad():
                codes = value.to(device).clamp(max=self._codec.config.codebook_size - 1)
                audio = self._codec.decode(codes[:, :, None]).audio_values.cpu()
            self.samples = audio.shape[-1]
            self.audio_seconds = time.perf_counter() - self._start


def run(stage: Stage) -> None:
    """The same process three times: compiled from nothing, then from caches that the first has filled, bf16 and int8."""
    with tempfile.TemporaryDirectory() as folder:
        for name, precision in (("cold", "stock"), ("warm", "stock"), ("int8", "int8")):
            if stage.rehearse and name != "cold":
                continue
            stage.measure(name, lambda n=name, p=precision: _fresh(stage, Path(folder), n, p))


def _fresh(stage: Stage, folder: Path, name: str, precision: str) -> dict[str, Any]:
    """One fresh process; its caches are in ``folder``, empty the first time."""
    out = folder / f"{name}.json"
    names = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CSM_KERNELS_CACHE": "csm"}
    environment = os.environ | {key: str(folder / value) for key, value in names.items()}
    command = [sys.executable, "-m", "stages.start", "--out", str(out), "--precision", precision]
    command += ["--rehearse"] if stage.rehearse else []
    done = subprocess.run(
        command,
        cwd=BENCH,
        env=environment,
        capture_output=True,
        text=True,
        timeout=max(stage.left() - 3, 1),
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
    return read_json(out)["pieces"]


def probe(stage: Stage, precision: str) -> None:
    """In the fresh process: from the model in memory to the first frame, then a second utterance to its first audio."""
    model = build(stage)
    codec = model.codec_model
    ids = prompt(stage)
    _memory(stage, "model")
    options = {"max_positions": 64} if stage.rehearse else {}
    start = _now(stage)
    accelerate(model, mode=fast_mode(stage), precision=precision, progress=False, **options)
    ready = _now(stage)
    clock = FrameClock()
    model.generate(ids, max_new_tokens=1, streamer=clock, do_sample=True, seed=1)
    report = model.acceleration.report()
    if report.notes or report.metrics["faults"]:  # whatever ran, it was not what the bar is about
        raise RuntimeError(f"the fused kernels did not run as planned: {report.notes}, {report.metrics['faults']}")
    if not stage.rehearse:
        stage.put("accelerate_seconds", ready - start)
        stage.put("first_frame_seconds", clock.seconds[0])
        stage.put("cold_start_seconds", ready - start + clock.seconds[0])
    _memory(stage, "accelerated")
    stage.put("mode", report.mode)
    stage.put("copied_bytes", report.copied_bytes)
    stage.put("kv_bytes", report.kv_bytes)
    for turn in range(1 if stage.rehearse else 2):  # the first call of the codec loads its libraries
        audio = FirstAudio(codec)
        model.generate(ids, max_new_tokens=1, streamer=audio, do_sample=True, seed=1)
        assert audio.samples > 0, "no audio came"
        if turn and not stage.rehearse:
            stage.put("first_audio_ms", None if audio.audio_seconds is None else 1e3 * audio.audio_seconds)
    stage.put("samples", audio.samples)
    _memory(stage, "after speech")


def _now(stage: Stage) -> float:
    if not stage.rehearse:
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory(stage: Stage, when: str) -> None:
    """Bytes of the device's memory, held and at the most."""
    if not stage.rehearse:
        stage.put(f"bytes, {when}", torch.cuda.memory_allocated())
        stage.put(f"peak bytes, {when}", torch.cuda.max_memory_allocated())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One fresh process of stage 7.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    fresh = Stage(args.out, rehearse=args.rehearse, limit=600)
    with fresh.prepared():
        probe(fresh, args.precision)
