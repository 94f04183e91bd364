"""The native CPU kernels: products, sampling and whole frames against their references, on every instruction set.

Instruction sets this machine lacks are skipped; ``avx2`` and ``portable`` run everywhere that CI does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from csm_models import CONFIGS, build, on_fast_path, stock, text_prompt
from torch import Tensor

from csm_kernels import cpu
from csm_kernels.cpu import library
from csm_kernels.quant import QuantWeight, dequantize, quantize
from csm_kernels.sampling import NoiseKey, SamplingParams, gumbel_noise_ref, sample_ref
from csm_runtime import accelerate
from csm_runtime.doctor import diagnose
from csm_runtime.guard import GuardConfig
from csm_runtime.precision import PrecisionPolicy

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=f"native kernels: {cpu.why_not()}")

ISAS = ("portable", "avx2", "avx2vnni", "avx512")
GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}
FORMATS = ("fp32", "bf16", "fp16", "int8", "fp8", *(f"int4:{g}{a}" for g in (32, 64, 128) for a in ("", ":asymmetric")))
INTEGER_ERROR = 0.01
"""Of the largest output: activations are int8 there, a group's largest at 127."""


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in cpu.instruction_sets():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def stored(weight: Tensor, fmt: str) -> Tensor | QuantWeight:
    name, _, rest = fmt.partition(":")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name in dtypes:
        return weight.to(dtypes[name])
    group, _, kind = rest.partition(":")
    return quantize(weight, name, group=int(group or 128), symmetric=kind != "asymmetric")


def largest_error(made: Tensor, wanted: Tensor) -> float:
    return float((made.double() - wanted).abs().max() / wanted.abs().max())


# ----------------------------------------------------------------------------------------------------------- threads

BESIDE = """
import os, time
import torch
from csm_kernels import cpu

weight, x = torch.randn(4096, 1024), torch.randn(1, 1024)
before = set(os.listdir("/proc/self/task"))
cpu.gemv_cpu(x, weight, threads=2)
(worker,) = (int(task) for task in set(os.listdir("/proc/self/task")) - before)
allowed = os.sched_getaffinity(0)
first = min(allowed)
os.sched_setaffinity(0, {first})
together = 0
for _ in range(20):
    os.sched_setaffinity(worker, {first})  # where a scheduler may leave it, and is free to
    os.sched_setaffinity(worker, allowed)
    time.sleep(0.002)  # asleep
    cpu.gemv_cpu(x, weight, threads=2)
    stat = open(f"/proc/self/task/{worker}/stat").read().rpartition(")")[2].split()
    together += int(stat[36]) == first
assert os.sched_getaffinity(worker) == allowed, "the thread was not set free again"
print(together)
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_threads_of_a_call_do_not_stay_on_one_processor() -> None:
    done = subprocess.run([sys.executable, "-c", BESIDE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 5, f"{done.stdout.strip()} of 20 calls beside the caller"  # others may push it there


# ---------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(64, 256), (37, 129), (5, 1), (1, 31), (130, 1000), (16, 2048), (3, 65)])
def test_product_equals_the_dequantised_one(isa: str, fmt: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[0] * 7 + shape[1])
    weight = stored(torch.randn(shape, generator=generator), fmt)
    bias = torch.randn(shape[0], generator=generator)
    for rows in (1, 2, 3, 5, 7, 8, 9, 16):
        x = torch.randn(rows, shape[1], generator=generator)
        wanted = x.double() @ dequantize(weight).double().T + bias
        made = cpu.gemv_cpu(x, weight, bias, isa=isa)
        limit = 2e-6 if fmt.partition(":")[0] not in ("int8", "int4") else INTEGER_ERROR
        # Rows that cancel to little have no more than the size of what was added to measure an error by.
        scale = (x.double().abs() @ dequantize(weight).double().abs().T + bias.abs()).max()
        assert float((made - wanted).abs().max() / scale) < limit, rows


@pytest.mark.parametrize("fmt", ["int8", "int4:32", "int4:128", "int4:64:asymmetric"])
def test_integer_products_are_exact_on_their_own_codes(isa: str, fmt: str) -> None:
    """Activations that are their own int8 codes lose nothing: every nibble, byte and group must be in its place."""
    generator = torch.Generator().manual_seed(3)
    weight = stored(torch.randn(40, 640, generator=generator), fmt)
    x = torch.randint(-127, 128, (4, 640), generator=generator).float()
    x[:, ::32] = 127.0  # so that each group's scale is 1
    wanted = x.double() @ dequantize(weight).double().T
    assert largest_error(cpu.gemv_cpu(x, weight, isa=isa), wanted) < 1e-6


@pytest.mark.parametrize("fmt", FORMATS)
def test_bits_do_not_depend_on_threads_or_neighbours(isa: str, fmt: str) -> None:
    weight = stored(torch.randn(147, 384), fmt)
    x = torch.randn(16, 384)
    alone = cpu.gemv_cpu(x[:1], weight, threads=1, isa=isa)
    for threads in (2, 3, 7):
        assert torch.equal(cpu.gemv_cpu(x[:1], weight, threads=threads, isa=isa), alone)
    for rows in range(2, 17):
        made = cpu.gemv_cpu(x[:rows], weight, isa=isa)[:1]
        # Sums run along a row in one order, whatever the number of rows; only what is left over may be contracted otherwise.
        assert torch.equal(made, alone), rows


@pytest.mark.parametrize("fmt", FORMATS)
def test_instruction_sets_agree(fmt: str) -> None:
    weight = stored(torch.randn(64, 1024), fmt)
    x = torch.randn(2, 1024)
    made = [cpu.gemv_cpu(x, weight, isa=isa).double() for isa in cpu.instruction_sets()]
    for other in made[1:]:
        # A rounding tie of an activation may fall either way: one code of 127 in a thousand terms.
        assert largest_error(other, made[0]) < (1e-6 if fmt.partition(":")[0] not in ("int8", "int4") else 1e-3)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_activations_are_not_hidden(isa: str, fmt: str, bad: float) -> None:
    x = torch.randn(2, 200)
    x[1, 150] = bad
    made = cpu.gemv_cpu(x, stored(torch.randn(24, 200), fmt), isa=isa)
    assert torch.isfinite(made[0]).all()
    assert not torch.isfinite(made[1]).any()


def test_fp8_has_every_value(isa: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = QuantWeight(codes[:, None].expand(256, 64).contiguous(), torch.ones(256))
    for column in (0, 63):  # in a vector, and in a row that has no whole one
        x = torch.zeros(1, 64)
        x[0, column] = 1.0
        finite = torch.isfinite(codes.float())
        made = cpu.gemv_cpu(x, weight, isa=isa)[0]
        assert torch.equal(made[finite], codes.float()[finite])
    tail = QuantWeight(codes[:, None].contiguous(), torch.ones(256))
    assert cpu.gemv_cpu(torch.ones(1, 1), tail, isa=isa)[0].isnan().sum() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x.double(), w), "x must be"),
        (lambda x, w: (x[0], w), "x must be"),
        (lambda x, w: (x[:, :-1], w), "x must be"),
        (lambda x, w: (x.repeat(9, 1), w), "1 to 16 rows"),
        (lambda x, w: (x[:0], w), "1 to 16 rows"),
        (lambda x, w: (x, w.double()), "weight must be float32"),
        (lambda x, w: (x, w[None]), r"weight must be \[N, K\]"),
        (lambda x, w: (x, w.T.contiguous().T), "contiguous rows"),
        (lambda x, w: (x, w.to("meta")), "on the CPU"),
    ],
)
def test_products_name_what_is_wrong(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.gemv_cpu(*change(torch.randn(2, 64), torch.randn(8, 64)))


def before_a_forbidden_page(tensor: Tensor) -> Tensor:
    """The same numbers in memory that ends where reading on is a crash."""
    page = mmap.PAGESIZE
    size = -(-tensor.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + size), page, 0) == 0
    KEPT.append(memory)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=size - tensor.nbytes)
    return flat.copy_(tensor.contiguous().view(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)


KEPT: list[mmap.mmap] = []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect")
@pytest.mark.parametrize("fmt", FORMATS)
def test_nothing_is_read_beyond_a_matrix(isa: str, fmt: str) -> None:
    for shape in ((19, 128), (3, 100), (20, 1000), (2, 2048)):
        weight = stored(torch.randn(shape), fmt)
        if isinstance(weight, QuantWeight):
            guarded: Any = weight._replace(
                data=before_a_forbidden_page(weight.data), scale=before_a_forbidden_page(weight.scale)
            )
        else:
            guarded = before_a_forbidden_page(weight)
        x = torch.randn(3, shape[1])
        assert torch.equal(cpu.gemv_cpu(before_a_forbidden_page(x), guarded, isa=isa), cpu.gemv_cpu(x, weight, isa=isa))


def test_shapes_one_after_the_other() -> None:
    """Buffers are kept from product to product."""
    for rows, width in ((1, 4096), (16, 256), (2, 2048), (16, 128), (1, 8192)):
        for fmt in ("int4:32", "int8", "bf16"):
            weight, x = stored(torch.randn(40, width), fmt), torch.randn(rows, width)
            wanted = x.double() @ dequantize(weight).double().T
            assert largest_error(cpu.gemv_cpu(x, weight), wanted) < 0.03


def test_groups_of_another_size_are_refused() -> None:
    weight = quantize(torch.randn(4, 256), "int4", group=128)
    odd = weight._replace(scale=weight.scale[:, :1].contiguous())
    with pytest.raises(ValueError, match="groups of 32, 64, 128 columns, got 256"):
        cpu.gemv_cpu(torch.randn(1, 256), odd)


def test_default_dtypes_do_not_shrink_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library writes fp32: a buffer in the caller's default of bf16 would be half as large."""
    x, weight = torch.randn(2, 64), torch.randn(50, 64)
    wanted = cpu.gemv_cpu(x, weight)
    model = native(build("base"), batch_sizes=(), guard=False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = cpu.gemv_cpu(x, weight)
        frame = model.acceleration._engine.prepare(2).frame
        logits = frame.logits()
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.dtype == torch.float32 and torch.equal(made, wanted)
    assert [t.dtype for t in logits] == [torch.float32] * 2


def test_rows_of_a_wider_matrix(isa: str) -> None:
    wide = torch.randn(12, 300)
    x = torch.randn(1, 200)
    wanted = x.double() @ wide[:, 50:250].double().T
    assert largest_error(cpu.gemv_cpu(x, wide[:, 50:250], isa=isa), wanted) < 2e-6


def test_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="isa must be one of .*portable.* got 'sse'"):
        cpu.gemv_cpu(torch.randn(1, 8), torch.randn(8, 8), isa="sse")
    monkeypatch.setenv(library.ISA_VARIABLE, "mmx")
    with pytest.raises(ValueError, match="CSM_KERNELS_CPU_ISA must be one of"):
        cpu.gemv_cpu(torch.randn(1, 8), torch.randn(8, 8))


# ---------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("vocab", [2, 33, 2051])
@pytest.mark.parametrize("seed", range(4))
def test_sampling_draws_the_reference_tokens(vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = 64
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits[::5] = logits[::5].round()  # ties
    params = SamplingParams(
        torch.rand(rows, generator=generator) * 1.5 + 0.1,
        torch.randint(1, vocab + 9, (rows,), generator=generator),
        torch.where(torch.rand(rows, generator=generator) < 0.5, 1.0, torch.rand(rows, generator=generator)),
        torch.rand(rows, generator=generator) < 0.9,
    )
    key = NoiseKey(*(torch.randint(-(2**62), 2**62, (rows,), generator=generator) for _ in range(3)))
    tokens, flags = cpu.sample_cpu(logits, params, key, 5)
    noise = gumbel_noise_ref(key, torch.tensor([5]), vocab)
    wanted = sample_ref(logits, params, noise)
    assert not flags.any()
    assert (tokens == wanted).float().mean() > 0.98  # the last bit of a logarithm, and of a cumulative sum, is free
    assert torch.equal(tokens[~params.do_sample], wanted[~params.do_sample])
    plain = params.top_p == 1.0
    assert torch.equal(tokens[plain], wanted[plain])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sampling_flags_broken_rows(bad: float) -> None:
    logits = torch.randn(3, 20)
    logits[1, 7] = bad
    logits[2] = float("-inf")
    params = SamplingParams(torch.ones(3), torch.full((3,), 5), torch.ones(3), torch.ones(3, dtype=torch.bool))
    zeros = torch.zeros(3, dtype=torch.int64)
    tokens, flags = cpu.sample_cpu(logits, params, NoiseKey(zeros, zeros, zeros), 0)
    assert flags.tolist() == [0, 1, 1]
    assert tokens[1:].tolist() == [0, 0]


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 50), float("-inf"))
    logits[0, [3, 30]] = torch.tensor([0.0, 1.0])
    params = SamplingParams(torch.ones(1), torch.tensor([50]), torch.ones(1), torch.ones(1, dtype=torch.bool))
    drawn = set()
    for seed in range(200):
        key = NoiseKey(torch.tensor([seed]), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        drawn.add(int(cpu.sample_cpu(logits, params, key, 1)[0]))
    assert drawn == {3, 30}


# ------------------------------------------------------------------------------------------------------ whole frames


QUICK = {"progress": False, "without": ("compiled prefill",)}


def native(model: Any, **options: Any) -> Any:
    return accelerate(model, mode="native", **QUICK, **options)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_tokens_equal_the_stock_models(name: str) -> None:
    model = native(build(name))
    for rows in (1, 3):
        prompt = text_prompt((7, 12, 3)[:rows])
        wanted = stock(model, **prompt, **GREEDY, max_new_tokens=6)
        with on_fast_path(model):
            got = model.generate(**prompt, **GREEDY, max_new_tokens=6)
        assert torch.equal(got, wanted)
    assert model.acceleration.mode == "native"
    assert not model.acceleration.notes


class Made(NamedTuple):
    """What one frame left behind."""

    codes: Tensor
    first: Tensor
    others: Tensor
    hidden: Tensor


def frame_of(model: Any, rows: int, sampled: bool = False) -> Made:
    """A frame from a made-up context of three positions, with a gap in row 0's; then two positions of given codes."""
    engine, spec = model.acceleration._engine, model.acceleration._spec
    runner, generator = engine.prepare(rows), torch.Generator().manual_seed(2)
    state = runner.state

    def made_up(*shape: int) -> Tensor:
        """The same for every row."""
        return torch.randn(1, *shape, generator=generator).expand(state.rows, *shape)

    for cache in (*state.keys, *state.values):
        cache.copy_(made_up(*cache.shape[1:]))
    state.rewind(3)
    for flags in (state.allowed, state.ended, state.frame):
        flags.zero_()
    state.allowed[:, :3] = True
    state.allowed[0, 1] = False
    state.position[0] = 2
    state.seed.fill_(11)
    state.set_end(0, 1, None)
    for params in (runner.params, runner.depth_params):
        params.do_sample.fill_(sampled)
        params.top_k.fill_(7)
    state.hidden.copy_(made_up(spec.backbone.hidden))
    engine.emit(runner)
    first, others = runner.logits()
    made = (state.codes.clone(), first.clone(), others.clone())
    state.codes.copy_(torch.arange(spec.codebooks) % spec.depth_vocab)
    for _ in range(2):
        engine.advance(runner)
    assert state.length.tolist() == [5] * state.rows
    assert state.position.tolist() == [4] + [5] * (state.rows - 1)
    assert state.frame.tolist() == [2] * state.rows
    assert not state.faults.item()
    return Made(*made, state.hidden.clone())


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("name", ["base", "eight_codebooks", "biases", "depth_vocabulary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_frame_equals_the_eager_one(isa: str, name: str, rows: int, dtype: Any, monkeypatch: Any) -> None:
    """Weights of either width are read as what they are, and everything else is fp32."""
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    policy = PrecisionPolicy((("kv", "fp32"),)) if dtype != torch.float32 else "stock"
    options = dict(batch_sizes=(), guard=False)
    made = frame_of(native(build(name).to(dtype), precision=policy, **options), rows)
    wanted = frame_of(accelerate(build(name).to(dtype).float(), mode="eager", **QUICK, **options), rows)
    assert torch.equal(made.codes, wanted.codes)
    for ours, theirs in zip(made[1:], wanted[1:]):
        assert largest_error(ours, theirs.double()) < 2e-5


def stored_in(fmt: str) -> PrecisionPolicy:
    zones = ("backbone.head", "*.embedding", "backbone.attention", "backbone.mlp", "depth.*")
    return PrecisionPolicy(tuple((zone, fmt) for zone in zones))


@pytest.mark.parametrize("fmt", ["int8", "int4:32", "int4:64", "int4:128", "fp8", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["base", "biases"])
def test_a_frame_in_each_format_equals_the_dequantised_one(isa: str, name: str, fmt: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    options = dict(precision=stored_in(fmt), batch_sizes=(), guard=False)
    made = frame_of(native(build(name), **options), 2)
    wanted = frame_of(accelerate(build(name), mode="eager", **QUICK, **options), 2)
    limit = 0.03 if fmt.startswith("int") else 2e-5
    assert largest_error(made.first, wanted.first.double()) < limit
    assert largest_error(made.hidden, wanted.hidden.double()) < limit
    if not fmt.startswith("int"):  # where a code is another, what follows it is too
        assert torch.equal(made.codes, wanted.codes)
        assert largest_error(made.others, wanted.others.double()) < limit


def test_heads_in_several_formats() -> None:
    policy = PrecisionPolicy((("depth.head.1", "int8"), ("depth.head.2-3", "bf16"), ("depth.head", "fp8")))
    options = dict(precision=policy, batch_sizes=(), guard=False)
    made = frame_of(native(build("eight_codebooks"), **options), 1)
    wanted = frame_of(accelerate(build("eight_codebooks"), mode="eager", **QUICK, **options), 1)
    assert largest_error(made.others[0], wanted.others[0].double()) < 0.03
    assert torch.equal(made.codes, wanted.codes)


@pytest.mark.parametrize("precision", ["stock", "int8", "int4"])
def test_frames_do_not_depend_on_threads_or_rows(precision: str) -> None:
    """Row 1 of every batch is the same utterance: its bits are, whoever computes them beside whom."""
    before, made = torch.get_num_threads(), []
    try:
        for threads, rows in ((1, 2), (2, 2), (5, 2), (2, 8), (3, 16)):
            torch.set_num_threads(threads)
            frame = frame_of(
                native(build("base"), precision=precision, batch_sizes=(), guard=False), rows, sampled=True
            )
            made.append((frame.codes[1], frame.first[1], frame.others[:, 1], frame.hidden[1]))
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert all(map(torch.equal, other, made[0]))


def test_sampled_tokens_are_those_of_eager_frames() -> None:
    options = dict(do_sample=True, temperature=0.9, top_k=11, depth_decoder_do_sample=True, max_new_tokens=8)
    tokens = []
    for mode in ("native", "eager"):
        model = accelerate(build("base"), mode=mode, **QUICK)
        torch.manual_seed(7)
        with on_fast_path(model):
            tokens.append(model.generate(**text_prompt((5, 9)), **options))
    assert torch.equal(*tokens)


def test_flushed_subnormals_change_nothing() -> None:
    """A program may have told its own thread to flush them; the other threads have not heard of it."""
    model = native(build("base"), batch_sizes=(), guard=False, precision=stored_in("fp8"))
    made = frame_of(model, 2)
    torch.set_flush_denormal(True)
    try:
        again = frame_of(model, 2)
    finally:
        torch.set_flush_denormal(False)
    assert all(map(torch.equal, made, again))


# ----------------------------------------------------------------------------------------------- weights, faults, ends


def test_live_weights_are_read() -> None:
    model = native(build("base"))
    prompt = dict(text_prompt((6,)), **GREEDY, max_new_tokens=5)
    before = model.generate(**prompt)
    with torch.no_grad():
        model.depth_decoder.model.layers[0].mlp.down_proj.weight.mul_(-3.0)
    for step in ("in place", "moved"):
        if step == "moved":
            weight = model.backbone_model.layers[0].self_attn.q_proj.weight
            weight.data = weight.data.clone() * 2.0
        wanted = stock(model, **prompt)
        with on_fast_path(model):
            assert torch.equal(model.generate(**prompt), wanted), step
        assert not torch.equal(wanted, before)


@pytest.mark.parametrize("precision", ["stock", "int8"])
@pytest.mark.parametrize(("part", "call"), [("depth", "emit"), ("backbone", "advance")])
def test_frames_that_go_wrong_are_made_again(part: str, call: str, precision: str) -> None:
    """From frame 5 on one of the two calls goes wrong: that half of the frame runs on plain ops from there on."""
    model = native(build("eight_codebooks"), guard=GuardConfig(budget=1e9), precision=precision)
    prompt = dict(text_prompt((6,)), **GREEDY, max_new_tokens=40)
    healthy = model.generate(**prompt)
    runner = model.acceleration._engine.runner(1)
    frame, state = runner.frame, runner.state
    sound = getattr(frame, call)

    def broken() -> None:
        sound()
        if state.frame[0] >= 5:
            wrong = frame.logits()[1][3] if part == "depth" else state.hidden
            wrong += wrong.std() * torch.randn(
                wrong.shape, generator=torch.Generator().manual_seed(int(state.frame[0]))
            )
            state.codes[:, 4] = frame.logits()[1][3].argmax(-1) if part == "depth" else state.codes[:, 4]

    setattr(frame, call, broken)
    got = model.generate(**prompt)
    (event,) = model.acceleration.guard.events
    assert (event.suspect, event.mode, model.acceleration.guard.rung) == (part, "native", f"plain {part}")
    assert torch.equal(got[:, : event.frame], healthy[:, : event.frame])
    assert torch.equal(got, healthy) or precision == "int8"  # plain ops do not round activations to int8
    delattr(frame, call)
    model.acceleration.guard.rearm()
    assert torch.equal(model.generate(**prompt), healthy)


def test_nan_weights_end_in_the_stock_path_not_in_noise() -> None:
    model = native(build("base"), guard=False)
    with torch.no_grad():
        model.backbone_model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.generate(**text_prompt((6,)), **GREEDY, max_new_tokens=3)
    assert "NaN" in str(model.acceleration.metrics.snapshot()["faults"])


def test_a_full_cache_is_a_fault_and_is_not_written_beyond() -> None:
    model = native(build("base"), batch_sizes=(), guard=False)
    engine = model.acceleration._engine
    runner = engine.prepare(2)
    state = runner.state
    state.rewind(state.capacity - 1)
    state.length[1] = state.capacity
    keys = state.all_keys.clone()
    runner.frame.advance()
    assert state.faults.item() == 4
    assert torch.equal(state.all_keys, keys)
    assert state.length.tolist() == [state.capacity - 1, state.capacity]


def test_weights_that_cannot_be_read_are_compiled_instead() -> None:
    def broken() -> Any:
        model = build("base")
        head = model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().T.contiguous().T)
        return model

    with pytest.raises(
        ValueError, match="mode 'native' runs the native CPU kernels, and backbone.head must have contiguous"
    ):
        native(broken())
    model = accelerate(broken(), **QUICK)
    assert model.acceleration.mode == "compile"
    assert any(
        "native CPU kernels: backbone.head must have contiguous rows" in note for note in model.acceleration.notes
    )
    prompt = dict(text_prompt((6,)), **GREEDY, max_new_tokens=3)
    with on_fast_path(model):
        assert torch.equal(model.generate(**prompt), stock(model, **prompt))


def test_without_the_library_steps_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_not", lambda: "they were not built")
    with pytest.raises(ValueError, match="mode 'native' .* they were not built; use 'auto'"):
        native(build("base"))
    model = accelerate(build("base"), batch_sizes=(), **QUICK)
    assert model.acceleration.mode == "compile"
    assert any("they were not built" in note for note in model.acceleration.notes)
    found = diagnose()
    assert found.modes["cpu"][0] == "compile"
    assert any(lack.what == "the native CPU kernels" and "g++" in lack.command for lack in found.missing)


@pytest.mark.parametrize(("change", "message"), [(b"", "cannot be loaded"), (b"elf", "cannot be loaded")])
def test_a_broken_library_says_so(change: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "libcsm_cpu.so"
    path.write_bytes(change)
    monkeypatch.setattr(library, "PATH", path)
    assert message in library._loaded.__wrapped__()


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    assert "another version" in library._loaded.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(library, "CLayer", library.CMatrix)
    assert "lays out its structs otherwise" in library._loaded.__wrapped__()


def test_sessions_of_two_threads_do_not_mix() -> None:
    models = [native(build("base", seed=seed)) for seed in (0, 1)]
    prompts = [dict(text_prompt((6,), seed=seed), **GREEDY, max_new_tokens=8) for seed in (0, 1)]
    wanted = [model.generate(**prompt) for model, prompt in zip(models, prompts)]
    made: dict[tuple[int, int], Tensor] = {}

    def speak(which: int) -> None:
        for turn in range(4):
            made[which, turn] = models[which].generate(**prompts[which])

    threads = [threading.Thread(target=speak, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert all(torch.equal(tokens, wanted[which]) for (which, _), tokens in made.items())


FORKING = """
import os, sys, warnings
import torch
from csm_kernels import cpu
torch.set_num_threads(2)
x, w = torch.randn(1, 512), torch.randn(300, 512)
before = cpu.gemv_cpu(x, w)
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(cpu.gemv_cpu(x, w), before) else 3)
    if os.waitpid(child, 0)[1]:
        sys.exit("the child failed")
print("same", torch.equal(cpu.gemv_cpu(x, w), before))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    result = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.strip() == "same True", result.stderr


# ------------------------------------------------------------------------------------------------------------ building

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_wheel_carries_the_library_and_can_do_without(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__", "tests", "bench")
    shutil.copytree(ROOT, source, ignore=ignored)

    def wheel(name: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", str(tmp_path / name), str(source)]
        result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        files = [entry for path in (tmp_path / name).glob("*.whl") for entry in zipfile.ZipFile(path).namelist()]
        return result, files

    result, files = wheel("built", CSM_KERNELS_REQUIRE_NATIVE="1")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "csm_kernels/cpu/libcsm_cpu.so" in files
    shutil.rmtree(source / "build", ignore_errors=True)
    result, files = wheel("without", CC="/bin/false", CXX="/bin/false")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "csm_kernels/cpu/library.py" in files
    assert not [name for name in files if name.endswith(".so")]
    assert "the native CPU kernels were not built" in result.stdout + result.stderr
    result, files = wheel("required", CC="/bin/false", CXX="/bin/false", CSM_KERNELS_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert not files
