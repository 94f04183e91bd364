"""Sesame's own repository, or a fork of it, under ``accelerate()``: nothing of it is edited.

In a checkout of SesameAILabs/csm or of CSM-Multi:

    python sesame_csm.py --load generator:load_csm_1b --precision int8

``--load module:function`` is whatever makes your ``Generator``; ``--device`` goes to it as its argument. The first utterance
is spoken by the stock model, the second by the accelerated one, and the sound of both is written.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import soundfile
import torch

from csm_runtime import accelerate


def spoken(generator, text: str, seconds: float) -> tuple[torch.Tensor, float]:
    """The sound of a text, and the seconds it took."""
    torch.manual_seed(0)
    start = time.perf_counter()
    audio = generator.generate(text=text, speaker=0, context=[], max_audio_length_ms=1000 * seconds)
    return audio, time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    """Run the example; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", default="generator:load_csm_1b")
    parser.add_argument("--device", default=None, help="passed on where given")
    parser.add_argument("--text", default="Hello from Sesame.")
    parser.add_argument("--seconds", type=float, default=4.0, help="of sound at most")
    parser.add_argument("--precision", default="exact")
    parser.add_argument("--out", type=Path, default=Path("sesame.wav"))
    options = parser.parse_args(argv)
    sys.path.insert(0, "")
    module, _, function = options.load.partition(":")
    load = getattr(importlib.import_module(module), function)
    generator = load(options.device) if options.device else load()

    stock, stock_seconds = spoken(generator, options.text, options.seconds)
    accelerate(generator, precision=options.precision)
    spoken(generator, options.text, 0.4)  # whatever the first call still has to do
    audio, seconds = spoken(generator, options.text, options.seconds)
    rate = generator.sample_rate
    for name, sound, took in (("stock", stock, stock_seconds), ("accelerated", audio, seconds)):
        factor = took * rate / len(sound)
        print(f"{name:<12} {took:6.2f} s for {len(sound) / rate:5.2f} s of sound, real-time factor {factor:.2f}")

    with generator.acceleration.stream(
        text=options.text, speaker=0, max_audio_length_ms=1000 * options.seconds
    ) as stream:
        for chunk in stream:
            if chunk.index == 0:
                print(f"first 80 ms of sound after {1e3 * chunk.made_after:.0f} ms")
    print(generator.acceleration.report())
    soundfile.write(options.out, audio.float().cpu().numpy(), rate)
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
