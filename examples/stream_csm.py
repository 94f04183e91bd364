"""Speak while thinking: chunks of sound as they are made, written to a WAV file, with the time each was ready.

    python examples/stream_csm.py --model sesame/csm-1b --text "Hello." --chunk-frames 2

Without ``--model`` a small untrained CSM speaks noise.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import soundfile
import torch

from csm_runtime import accelerate, checkpoints


async def speak(model, inputs: dict, options: argparse.Namespace) -> list[torch.Tensor]:
    """Listen to one utterance; another task could run meanwhile."""
    heard = []
    async for chunk in model.acceleration.astream(
        **inputs, max_new_tokens=options.frames, chunk_frames=options.chunk_frames, seed=0
    ):
        late = chunk.made_after - chunk.start / chunk.rate
        print(
            f"chunk {chunk.index}: {chunk.seconds * 1e3:.0f} ms of sound, ready after {chunk.made_after * 1e3:.0f} ms "
            f"(decoding {chunk.codec_seconds * 1e3:.1f}), to be heard from {late * 1e3:.0f} ms on"
        )
        heard.append(chunk.samples)
    return heard


def main(argv: list[str] | None = None) -> int:
    """Run the example; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=checkpoints.SMALL)
    parser.add_argument("--text", default="Hello from two processor cores.")
    parser.add_argument("--precision", default="stock")
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--chunk-frames", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("stream.wav"))
    options = parser.parse_args(argv)
    model, processor = checkpoints.load(options.model)
    accelerate(model, precision=options.precision)
    messages = [{"role": "0", "content": [{"type": "text", "text": options.text}]}]
    inputs = checkpoints.prepare_inputs(model, processor, messages)
    heard = asyncio.run(speak(model, inputs, options))
    soundfile.write(options.out, torch.cat(heard).numpy(), model.config.codec_config.sampling_rate)
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
