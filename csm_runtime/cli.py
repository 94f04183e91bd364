"""The command ``csm-accelerate``: demo, generate, verify, bench, doctor, convert, guard-report, ab-report, monitor.

Exit codes: 0 done, 1 something failed, 2 bad input, 130 interrupted. Errors are one line on stderr; ``--debug`` shows
the traceback.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from csm_runtime import __version__, checkpoints, rollout, speech
from csm_runtime.accelerate import accelerate
from csm_runtime.calibration import Calibration
from csm_runtime.compiling import Progress
from csm_runtime.convert import convert_files
from csm_runtime.csm_shape import load_flavors
from csm_runtime.demo import DemoOptions, FrameClock, run_demo, sampling
from csm_runtime.doctor import diagnose
from csm_runtime.events import load_events
from csm_runtime.experiment import report_text
from csm_runtime.extras import need
from csm_runtime.monitor import DEFAULT_URL, monitor
from csm_runtime.precision import PRESETS
from csm_runtime.tuning import AUTO, load_policy

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the arguments default to the process's own. Returns the exit code."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        return _report(args, error, BAD_INPUT)
    except Exception as error:
        return _report(args, error, FAILED)


def _report(args: argparse.Namespace, error: Exception, code: int) -> int:
    """One line about an error, or its traceback."""
    if args.debug:
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    kind = "error" if code == BAD_INPUT else f"failed, {type(error).__name__}"
    print(f"csm-accelerate: {kind}: {text}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="csm-accelerate", description="Faster speech from Sesame's CSM.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_generate(commands)
    _add_verify(commands)
    bench = commands.add_parser(
        "bench", help="run bench/e2e.py of a checkout; all options are passed on", add_help=False
    )
    bench.set_defaults(run=_bench, debug=False)
    doctor = commands.add_parser("doctor", help="what this machine has, what will be used, what is missing")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    _add_convert(commands)
    _add_guard_report(commands)
    _add_ab_report(commands)
    _add_monitor(commands)
    return parser


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert", help="a checkpoint of Sesame's own repository to transformers' layout, or back"
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="a folder, a safetensors file, the index.json of several, or a .pt file"
    )
    parser.add_argument("out", metavar="DIR", help="folder for model.safetensors and config.json")
    parser.add_argument("--to", choices=("hf", "sesame"), required=True, help="layout to write")
    parser.add_argument(
        "--codec-from", metavar="PATH", help="with --to hf, where its codec comes from: a CSM or Mimi of transformers"
    )
    parser.add_argument("--config", metavar="FILE", help="config.json of SOURCE (default: the one beside it)")
    parser.add_argument(
        "--flavors",
        metavar="FILE",
        help="JSON with sizes of flavors that are not Sesame's own: {name: {num_heads: ...}}",
    )
    parser.add_argument("--force", action="store_true", help="write over files that are there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_convert)


def _add_guard_report(commands: Any) -> None:
    parser = commands.add_parser(
        "guard-report", help="the guard's incidents in a folder; with --model their frames are checked again"
    )
    _model_options(parser, default=None)
    parser.add_argument("--precision", choices=tuple(PRESETS), default="stock", help="format of the weights")
    parser.add_argument("folder", metavar="DIR", help="what GuardConfig(events_dir=...) was")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_guard_report)


def _add_ab_report(commands: Any) -> None:
    parser = commands.add_parser("ab-report", help="what an experiment's file says of candidate and baseline")
    parser.add_argument("file", metavar="FILE", help="the SQLite file of csm_runtime.experiment.Experiment")
    parser.add_argument("--name", help="one of its experiments (default: all)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: 0.95)")
    parser.add_argument(
        "--sequential", action="store_true", help="intervals that hold however often they are looked at"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_ab_report)


def _add_monitor(commands: Any) -> None:
    parser = commands.add_parser("monitor", help="what a process says after model.acceleration.metrics.serve(), live")
    parser.add_argument("url", metavar="URL", nargs="?", default=DEFAULT_URL, help=f"default: {DEFAULT_URL}")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="from one reading to the next (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="one reading, then the end")
    parser.add_argument("--json", action="store_true", help="print each reading as a line of JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_monitor)


def _common(parser: argparse.ArgumentParser) -> None:
    """Options of every command that speaks."""
    _model_options(parser, default=checkpoints.SMALL)
    parser.add_argument("--speaker", type=int, default=0, help="speaker of the sentence (default: 0)")


def _model_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Options of every command that loads a model."""
    parser.add_argument(
        "--model",
        default=default,
        help=f"'small' (built in, untrained), a folder, or a hub id (default: {default or 'none'})",
    )
    parser.add_argument("--dtype", choices=tuple(checkpoints.DTYPES), default="auto", help="default: as saved")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, and of the small model's weights")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=(*PRESETS, AUTO),
        default="stock",
        help="format of the weights; auto finds it, measuring on this sentence (default: stock)",
    )


def _add_demo(commands: Any) -> None:
    default = DemoOptions()
    parser = commands.add_parser("demo", help="stock against accelerated: a table, a WAV, a JSON and a plot")
    _common(parser)
    _add_precision(parser)
    parser.add_argument("--text", default=default.text, help="the sentence to say")
    parser.add_argument(
        "--speech",
        metavar="DIR",
        help=f"folder of recordings with {speech.TRANSCRIPTS}, the first is the reference "
        f"(default: {speech.DEFAULT_SPEECH} if it exists, otherwise the packaged recording)",
    )
    parser.add_argument("--reference", metavar="WAV", help="a recording to use as the reference instead")
    parser.add_argument("--transcript", metavar="TEXT", help="what is said in --reference")
    parser.add_argument(
        "--frames", type=int, default=default.frames, help="frames of 80 ms to make at most (default: 50)"
    )
    parser.add_argument("--repeats", type=int, default=default.repeats, help="measured runs of each side (default: 3)")
    parser.add_argument("--sample", action="store_true", help="sample instead of greedy; tokens are not compared then")
    parser.add_argument(
        "--out", metavar="DIR", default=default.out, help=f"folder for the files (default: {default.out})"
    )
    parser.set_defaults(run=_demo)


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="text, optionally with spoken context, to a WAV")
    _common(parser)
    _add_precision(parser)
    parser.add_argument("--text", required=True, help="the sentence to say")
    parser.add_argument(
        "--context",
        metavar="[SPEAKER:]WAV=TRANSCRIPT",
        action="append",
        default=[],
        help="a recording that came before and what is said in it, by --speaker unless a number is given; repeatable",
    )
    parser.add_argument("--out", metavar="WAV", default="out.wav", help="the file to write (default: out.wav)")
    parser.add_argument(
        "--max-frames", type=int, default=125, help="frames of 80 ms to make at most (default: 125, 10 s)"
    )
    parser.add_argument("--temperature", type=float, default=0.9, help="of both decoders (default: 0.9)")
    parser.add_argument("--top-k", type=int, default=50, help="of both decoders, 0 for all tokens (default: 50)")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.set_defaults(run=_generate)


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify", help="every optimisation one at a time: fidelity and speed before and after, kept or rolled back"
    )
    _common(parser)
    parser.add_argument(
        "--prompts", metavar="FILE", help="sentences to calibrate on, one a line (default: two built in)"
    )
    parser.add_argument("--frames", type=int, default=24, help="frames the stock model says of each (default: 24)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of both sides of each step (default: 3)")
    parser.add_argument(
        "--policy",
        default="fast",
        metavar="NAME|FILE",
        help=f"whose lowered zones are tried one by one: {', '.join(PRESETS)}, or a JSON file (default: fast)",
    )
    parser.add_argument(
        "--thresholds",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="max_kl0, max_kl, min_top1_0, min_top1, min_near, tie, max_kl_added, min_sound_db or min_speed; repeatable",
    )
    parser.add_argument(
        "--alone", action="store_true", help="each on the bare engine instead of on top of what has been kept so far"
    )
    parser.add_argument("--skip", action="append", default=[], metavar="STEP", help="a step to leave out; repeatable")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    parser.set_defaults(run=_verify)


def _demo(args: argparse.Namespace) -> int:
    names = DemoOptions.__dataclass_fields__.keys() - {"progress"}
    run_demo(DemoOptions(**{name: getattr(args, name) for name in names}, progress=not args.quiet))
    return OK


def _generate(args: argparse.Namespace) -> int:
    if not args.text.strip():
        raise ValueError("--text is empty; give a sentence to say")
    if args.max_frames < 1:
        raise ValueError(f"--max-frames must be at least 1, got {args.max_frames}")
    if args.speaker < 0:
        raise ValueError(f"--speaker must be 0 or more, got {args.speaker}")
    if not args.greedy and args.temperature <= 0:
        raise ValueError(f"--temperature must be above 0, got {args.temperature}; --greedy takes the likeliest token")
    if args.top_k < 0:
        raise ValueError(f"--top-k must be 0 or more, got {args.top_k}")
    need("soundfile")
    turns = [parse_context(value, args.speaker) for value in args.context]
    turns.append(speech.Turn(args.speaker, args.text))
    model, processor = checkpoints.load(args.model, dtype=args.dtype, device=args.device, seed=args.seed)
    inputs = checkpoints.prepare_inputs(model, processor, speech.conversation(turns))
    calibration = [inputs] if args.precision == AUTO else None
    model = accelerate(model, precision=args.precision, progress=not args.quiet, calibration=calibration)
    bar = Progress(args.max_frames, "generating", not args.quiet)
    start = time.perf_counter()
    try:
        audio = model.generate(
            **inputs,
            **sampling(not args.greedy, args.temperature, args.top_k),
            seed=args.seed,
            max_new_tokens=args.max_frames,
            streamer=FrameClock(lambda: bar.advance("")),
            output_audio=True,
        )[0]
    finally:
        bar.close()
    seconds, spoken = time.perf_counter() - start, len(audio) / speech.SAMPLING_RATE
    speech.write_wav(args.out, audio)
    print(f"wrote {args.out}: {spoken:.2f} s of audio in {seconds:.2f} s of computing")
    for note in [*model.acceleration.notes, *model.acceleration.metrics.stock_reasons]:
        print(f"note: {note}", file=sys.stderr)
    return OK


_SENTENCES = ("Hello from two processor cores, spoken a frame at a time.", "Is it any good? Listen, and then decide.")


def _verify(args: argparse.Namespace) -> int:
    limits = rollout.Limits.parse(args.thresholds)
    policy = PRESETS[args.policy] if args.policy in PRESETS else load_policy(args.policy)
    sentences: Sequence[str] = _SENTENCES
    if args.prompts is not None:
        text = Path(args.prompts).read_text(encoding="utf-8")
        sentences = [line.strip() for line in text.splitlines() if line.strip()]
        if not sentences:
            raise ValueError(f"{args.prompts} holds no sentences")
    model, processor = checkpoints.load(args.model, dtype=args.dtype, device=args.device, seed=args.seed)
    turns = [[speech.Turn(args.speaker, sentence)] for sentence in sentences]
    inputs = [checkpoints.prepare_inputs(model, processor, speech.conversation(turn)) for turn in turns]
    found = rollout.verify(
        model,
        Calibration(inputs, frames=args.frames, seed=args.seed),
        policy=policy,
        limits=limits,
        repeats=args.repeats,
        alone=args.alone,
        skip=args.skip,
        progress=not args.quiet,
    )
    rollout.show(found)
    if args.json is not None:
        found.save(args.json)
        print(f"wrote {args.json}")
    return FAILED if found.failed else OK


def parse_context(value: str, speaker: int) -> speech.Turn:
    """Read ``[SPEAKER:]WAV=TRANSCRIPT``.

    Raises:
        ValueError: another form, or not a sound file.
        FileNotFoundError: no such file.
    """
    match = re.fullmatch(r"(?:(\d+):)?([^=]+)=(.*\S.*)", value, flags=re.DOTALL)
    if match is None:
        raise ValueError(f"--context must be [SPEAKER:]WAV=TRANSCRIPT, got {value!r}")
    who, path, transcript = match.groups()
    return speech.Turn(speaker if who is None else int(who), transcript.strip(), speech.read_wav(path))


def _bench(args: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parent.parent
    script = root / "bench" / "e2e.py"
    if not script.is_file():
        raise FileNotFoundError(
            f"the benchmark is not installed with the package: no {script}; run this in a git checkout"
        )
    before = sys.argv
    sys.argv = [str(script), *args.rest]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or OK
        raise RuntimeError(str(stop.code)) from stop
    finally:
        sys.argv = before
    return OK


def _convert(args: argparse.Namespace) -> int:
    done = convert_files(
        args.source,
        args.out,
        to=args.to,
        config=args.config,
        flavors=None if args.flavors is None else load_flavors(args.flavors),
        codec_from=args.codec_from,
        force=args.force,
        progress=not args.quiet,
    )
    print(f"wrote {done.files[0]}: {done.tensors} tensors, {done.nbytes / 1e6:.1f} MB")
    for path in done.files[1:]:
        print(f"wrote {path}")
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    return OK


def _guard_report(args: argparse.Namespace) -> int:
    events = load_events(args.folder)
    again: dict[str, list[str]] = {}
    if args.model is not None:
        model = checkpoints.load_model(args.model, dtype=args.dtype, device=args.device, seed=args.seed)
        handle = accelerate(model, precision=args.precision, mode="eager", progress=not args.quiet).acceleration
        for event in events:
            try:
                again[event.id] = [str(finding) for finding in handle.replay(event)]
            except ValueError as error:
                again[event.id] = [f"not run again: {error}"]
    if args.json:
        found = [event.to_dict() | ({"again": again[event.id]} if event.id in again else {}) for event in events]
        print(json.dumps(found, indent=2))
        return OK
    print(f"incidents in {args.folder}: {len(events)}")
    for event in events:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
        print(f"{event.id}  {when}  {event.kind} at frame {event.frame}: rung {event.rung!r} to {event.next_rung!r}")
        print(f"    {event.reason}")
        print(f"    {event.mode}, {event.policy}, {event.dtype} on {event.device}, {event.rows} rows")
        if event.id in again:
            said = again[event.id][:3] or ["all frames are within their limits now"]
            print("".join(f"    again: {line}\n" for line in said), end="")
    return OK


def _ab_report(args: argparse.Namespace) -> int:
    print(report_text(args.file, args.name, args.confidence, sequential=args.sequential))
    return OK


def _monitor(args: argparse.Namespace) -> int:
    monitor(args.url, args.interval, args.once, args.json)
    return OK


def _doctor(args: argparse.Namespace) -> int:
    found = diagnose()
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return OK if found.fast else FAILED


if __name__ == "__main__":
    raise SystemExit(main())
