"""Resident memory of CSM-1B at int4, from loading to speaking, and what a frame costs where the packed weights lie.

    python bench/memory.py                               # packs; with --packed-cache FOLDER twice: the second start reads
    python bench/memory.py --packed-cache FOLDER --map   # leaves them in the mapped file

All matrices in int4 but codebook 0's head and the embeddings in int8, native kernels, originals dropped, guard on. MB are
10^6 bytes. Resident memory is what the system says; ``file`` is the part of it that is backed by files and can be evicted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from e2e import build

from csm_runtime import PrecisionPolicy, accelerate
from csm_runtime.doctor import machine
from csm_runtime.weights import storage_bytes

GOAL_MB = 2500
POLICY = PrecisionPolicy(
    (
        ("backbone.head", "int8"),
        ("*.embedding", "int8"),
        ("backbone.*", "int4"),
        ("depth.*", "int4"),
    ),
    name="int4",
)


def resident() -> dict[str, float]:
    """MB of this process: all, and of that memory of its own and mapped files."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "RssAnon", "RssFile"):
            fields[key] = int(value.split()[0]) * 1024 / 1e6
    return {"all": fields["VmRSS"], "own": fields["RssAnon"], "file": fields["RssFile"]}


class Peak:
    """The highest resident memory while the block runs, looked at every 10 ms."""

    def __enter__(self) -> Peak:
        self.mb, self._over, self._process = 0.0, threading.Event(), psutil.Process()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.mb = max(self.mb, self._process.memory_info().rss / 1e6)

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._watcher.join()


def parts(model: Any) -> dict[str, float]:
    """MB of what the process holds, as far as tensors tell."""
    handle = model.acceleration
    report = handle.report()
    copies = handle._weights._copies

    def held(module: Any) -> float:
        return sum(p.nbytes for p in (*module.parameters(), *module.buffers()) if not p.is_meta) / 1e6

    named = {
        "text embedding": held(model.embed_text_tokens),
        "codec": held(model.codec_model),
        "depth decoder's embedding, original": held(model.depth_decoder.model.embed_tokens),
        "packed embeddings": sum(storage_bytes(copies[f"{s}.embedding"].packed) for s in ("backbone", "depth")) / 1e6,
        "KV buffers": report.kv_bytes / 1e6,
    }
    everything = {id(copy.packed): copy.packed for copy in copies.values()}
    named["packed matrices"] = sum(map(storage_bytes, everything.values())) / 1e6 - named["packed embeddings"]
    named["other stock weights"] = held(model) - sum(named[key] for key in list(named)[:3])
    return named


def main() -> None:
    """Measure, print, and save as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b", choices=("1b", "small", "tiny"))
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument(
        "--positions", type=int, default=1024, help="of the KV buffer; 1024 are 80 s of speech and prompt"
    )
    parser.add_argument("--packed-cache", type=Path)
    parser.add_argument("--map", action="store_true", help="leave the packed weights in the mapped file")
    parser.add_argument("--without", nargs="*", default=[], help="optimisations to leave out, such as 'huge pages'")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "size": args.size, "goal_mb": GOAL_MB, "mb": {}}
    result["positions"] = args.positions
    mb = result["mb"]
    mb["libraries"] = resident()
    model = build(args.size, torch.bfloat16)
    mb["loaded"] = resident()
    cache = {} if args.packed_cache is None else {"packed_cache": args.packed_cache, "map_packed": args.map}
    start = time.perf_counter()
    options = {"mode": "native", "drop_originals": True, "progress": False, "without": args.without}
    with Peak() as peak:
        accelerate(model, precision=POLICY, max_positions=args.positions, **options, **cache)
    mb["peak of accelerate()"] = {"all": peak.mb}
    mb["originals dropped"] = resident()
    handle = model.acceleration
    result["accelerate_seconds"] = time.perf_counter() - start
    result["setup_seconds"] = dict(handle.metrics.setup_seconds)
    ids = torch.randint(0, 1000, (1, 100), generator=torch.Generator().manual_seed(0))
    times: list[float] = []
    with Peak() as peak:
        for _ in range(2):
            handle.metrics.reset_times()
            model.generate(ids, max_new_tokens=args.frames, do_sample=False, depth_decoder_do_sample=False)
            times = handle.metrics.times("frame")
    mb["peak while generating"] = {"all": peak.mb}
    mb["after generating"] = resident()
    result["frame_ms"] = {"median": statistics.median(times) * 1e3, "least": min(times) * 1e3}
    result["parts_mb"] = parts(model)
    report = handle.report()
    result["huge_page_mb"] = report.huge_page_bytes / 1e6
    result["counters"] = dict(handle.metrics.counters)
    result["mode"], result["notes"] = report.mode, report.notes
    result["within_goal"] = peak.mb <= GOAL_MB
    print(json.dumps(result, indent=1, default=str))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
    if not result["within_goal"]:
        print(f"{peak.mb:.0f} MB while generating, more than {GOAL_MB}", file=sys.stderr)


if __name__ == "__main__":
    main()
