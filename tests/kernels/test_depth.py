"""The fused codebook decode: phase by phase, both drivers, every format, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from csm_kernels._target import interpreting
from csm_kernels.depth import depth_decode, depth_logits, make_workspace, plan
from csm_kernels.depth.args import Pointers
from csm_kernels.depth.kernel import Plan, depth_launches, depth_pointers, launch_depth, run_launches
from csm_kernels.depth.pack import PackedDepth, Workspace, poison
from csm_kernels.depth.reference import DepthReference
from csm_kernels.sampling import NoiseKey, SamplingParams
from csm_kernels.testing import assert_close
from kernels.depth_models import ALL_GROUPS, ODD, ONE_GROUP, TINY, depth_model, few_programs, inputs, reference, same

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Given = tuple[Tensor, Tensor, SamplingParams, NoiseKey]


class Step:
    """A planned step on its own workspace."""

    def __init__(
        self, packed: PackedDepth, given: Given, *, persistent: bool, programs: int = 1, device: torch.device
    ) -> None:
        hidden, token, params, key = given
        self.packed, self.batch = packed, len(token)
        self.workspace: Workspace = make_workspace(
            packed.stack, self.batch, 1, device, depth=packed, cache_dtype=packed.embedding.dtype
        )
        poison(self.workspace)
        self.workspace.buffers.token.copy_(token)
        self.codes = torch.full((self.batch, packed.codebooks), -1, device=device)
        self.logits = torch.full((packed.codebooks - 1, self.batch, packed.vocab), float("nan"), device=device)
        self.pointers: Pointers = depth_pointers(packed, self.workspace, hidden, self.codes, params, key)._replace(
            logits=self.logits
        )
        self.trace = self.batch * packed.vocab
        self.plan: Plan = plan(
            packed, self.batch, self.workspace, packed.codebooks, persistent=persistent, programs=programs
        )

    def run(self) -> None:
        launch_depth(self.plan, self.pointers, self.batch, self.trace)


def moved(thing: Any, device: torch.device) -> Any:
    """Every tensor of a nested tuple on the device."""
    if isinstance(thing, Tensor):
        return thing.to(device)
    if isinstance(thing, tuple):
        parts = [moved(part, device) for part in thing]
        return type(thing)(*parts) if hasattr(thing, "_fields") else tuple(parts)
    return thing


def forced(packed: PackedDepth, given: Given, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits ``[codebooks - 1, B, V]`` of the reference that is told the codes."""

    class Told(DepthReference):
        def draws(self, p: int) -> None:
            self.codes[:, p - 1] = codes[:, p - 1]

    told = Told(packed, *given, cache_dtype=packed.embedding.dtype, dtype=dtype)
    return told.run()[1].transpose(0, 1)


def assert_logits(step_logits: Tensor, codes: Tensor, packed: PackedDepth, given: Given, dtype: torch.dtype) -> None:
    truth = forced(packed, given, codes, torch.float64)
    eager = forced(packed, given, codes, dtype).to(dtype)
    assert_close(step_logits, truth, eager, name="logits", terms=packed.stack.shape.width)


# ---------------------------------------------------------------------------------------------------- phase by phase


def merged(workspace: Workspace) -> Tensor:
    """``[R, H * dim]`` from the attention's shares."""
    b = workspace.buffers
    shrink = torch.exp(b.peak - b.peak.amax(-1, keepdim=True))
    total = (b.attended * shrink[..., None]).sum(2) / (b.mass * shrink).sum(2)[..., None]
    return total.flatten(1)


def check_phase(name: str, step: Step, ours: int, references: list[DepthReference], p: int, l: int) -> None:
    """Run one phase of the references and compare what the launch left."""
    buffers, rows = step.workspace.buffers, ours

    def compare(what: str, value: Tensor, attribute: str) -> None:
        truth, eager = (getattr(reference, attribute) for reference in references)
        dtype = step.packed.embedding.dtype
        assert_close(value, truth, eager.to(dtype), name=f"{name}: {what}, pass {p}, layer {l}", terms=64)

    for one in references:
        if name == "draws":
            one.draws(p)
            if step.plan.sizes.TABLE and p < step.packed.codebooks:
                one.start(p)
        elif name in ("start", "head"):
            getattr(one, name)(p)
        elif name == "attend_project":
            one.attend(l, one.places(p), one.places(p))
            one.project(l)
        elif name == "attend":
            one.attend(l, one.places(p), one.places(p))
        else:
            getattr(one, name)(l)
    if name == "draws":
        assert step.codes[:, p - 1].tolist() == references[0].codes[:, p - 1].tolist()
    if name in ("start", "project", "down") or (
        name == "draws" and p < step.packed.codebooks and step.packed.table is not None
    ):
        compare("stream", buffers.stream[:rows], "stream")
    if name == "qkv":
        compare("qkv", buffers.qkv[:rows], "qkv_out")
    if name == "attend":
        compare("attention", merged(step.workspace)[:rows], "attended")
    if name == "attend_project":
        bias = step.packed.stack.o_bias
        whole = buffers.stream[:rows] + buffers.parts[:rows].sum(1) + (0 if bias is None else bias[l])
        compare("stream", whole, "stream")
    if name.startswith("attend"):
        slots = references[0].places(p).unique()
        for cache, attribute in ((step.workspace.keys, "keys"), (step.workspace.values, "values")):
            assert cache is not None
            truth, eager = (getattr(one, attribute)[l][:, :, slots] for one in references)
            assert_close(
                cache[l][:, :, slots], truth, eager, name=f"{name}: {attribute}, pass {p}, layer {l}", terms=64
            )
    if name == "gate_up":
        compare("act", buffers.act[:rows], "act")
    if name == "head":
        compare("logits", step.logits[p - 1], "logits")


PHASES = [
    pytest.param(TINY, F32, None, 1, True, False, id="fp32"),
    pytest.param(TINY, F32, None, 2, False, True, id="fp32 batch biases"),
    pytest.param(ODD, BF16, None, 1, True, True, id="bf16 odd biases"),
    pytest.param(TINY, BF16, None, 3, True, False, id="bf16 batch"),
    pytest.param(TINY, BF16, "int8", 1, False, False, id="int8"),
    pytest.param(ONE_GROUP, BF16, "fp8", 2, True, False, id="fp8 batch"),
    pytest.param(ALL_GROUPS, BF16, "int4", 1, True, True, id="int4 biases"),
    pytest.param(TINY, F16, None, 2, False, False, id="fp16 batch"),
]


@pytest.mark.parametrize(("shape", "dtype", "fmt", "batch", "table", "bias"), PHASES)
def test_every_phase_with_several_programs(
    shape: Any, dtype: torch.dtype, fmt: str | None, batch: int, table: bool, bias: bool, device: torch.device
) -> None:
    packed = moved(depth_model(shape, dtype, same(fmt), codebooks=3, table=table, bias=bias), device)
    given = moved(inputs(packed, batch), device)
    with few_programs(16):
        step = Step(packed, given, persistent=False, device=device)
    references = [reference(packed, given, torch.float64), reference(packed, given, dtype)]
    grids = []
    for launch in depth_launches(step.plan, step.pointers, batch, step.trace):
        name, arguments = launch[0], launch[3]
        grids.append(launch[2])
        run_launches(step.plan._replace(sync=0), iter([launch]))
        if name in ("start", "draws") or name == "head":
            p, l, rows = arguments[2], 0, batch
        else:
            rows = arguments[1]
            l = arguments[4] if name.startswith(("qkv", "attend")) else arguments[3]
        rows = 2 * batch if p == 1 else batch
        check_phase(name, step, rows, references, p, l)
    assert max(grids) > 1, "one program a phase proves nothing about tiles"
    assert sum(grid > 1 for grid in grids) > len(grids) // 2


# ------------------------------------------------------------------------------------------------------- whole frames


@pytest.mark.parametrize("persistent", [False, True], ids=["launches", "persistent"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_fp32_gives_the_references_codes(persistent: bool, batch: int, sample: bool, device: torch.device) -> None:
    packed = moved(depth_model(codebooks=5), device)
    given = moved(inputs(packed, batch, sample=sample), device)
    with few_programs():
        step = Step(packed, given, persistent=persistent, device=device)
        step.run()
    codes, _ = reference(packed, given).run()
    assert step.codes.tolist() == codes.tolist()
    assert_logits(step.logits, step.codes, packed, given, F32)
    assert step.workspace.buffers.flags.tolist() == [0] * batch


@pytest.mark.parametrize(
    ("dtype", "formats", "batch"),
    [
        pytest.param(F32, {}, 5, id="fp32-5"),
        pytest.param(BF16, {}, 1, id="bf16-1"),
        pytest.param(BF16, {}, 2, id="bf16-2"),
        pytest.param(F16, {}, 2, id="fp16-2"),
        pytest.param(BF16, same("int8"), 1, id="int8-1"),
        pytest.param(BF16, same("int8"), 5, id="int8-5"),
        pytest.param(BF16, same("fp8"), 2, id="fp8-2"),
        pytest.param(BF16, same("int4"), 1, id="int4-1"),
        pytest.param(BF16, same("int4"), 5, id="int4-5"),
        pytest.param(BF16, {"mlp": "int4", "attention": "int8"}, 2, id="int4 and int8-2"),
        pytest.param(F32, {"mlp": "fp8", "head": "int8"}, 1, id="fp8 and int8 in fp32-1"),
    ],
)
def test_both_drivers_give_the_same_bits(
    dtype: torch.dtype, formats: dict[str, str], batch: int, device: torch.device
) -> None:
    packed = moved(depth_model(dtype=dtype, formats=formats), device)
    given = moved(inputs(packed, batch, sample=True), device)
    steps = []
    for persistent in (True, False):
        with few_programs():
            steps.append(Step(packed, given, persistent=persistent, device=device))
        shared = steps[0].plan
        # Equal tiles, and slices of the tensor-core form, which the number of warps decides.
        steps[-1].plan = steps[-1].plan._replace(
            tiles=shared.tiles, warps=shared.warps, sizes=steps[-1].plan.sizes._replace(BC=shared.sizes.BC)
        )
        steps[-1].run()
    one, two = steps
    assert torch.equal(one.logits, two.logits)
    assert one.codes.tolist() == two.codes.tolist()
    assert one.codes[:, 0].tolist() == given[1].tolist()
    eager = dtype if dtype != F32 or not formats else BF16
    assert_logits(one.logits, one.codes, packed, given, eager)


@pytest.mark.parametrize(
    ("shape", "vocab", "codebooks", "batch"),
    [(ODD, 33, 3, 1), (ODD, 33, 3, 16), (ONE_GROUP, 7, 6, 3), (ALL_GROUPS, 64, 2, 16), (TINY, 4099, 3, 2)],
    ids=["odd", "odd, largest batch", "one KV head", "two codebooks", "large vocabulary"],
)
def test_other_shapes(shape: Any, vocab: int, codebooks: int, batch: int, device: torch.device) -> None:
    packed = moved(depth_model(shape, codebooks=codebooks, vocab=vocab, width=shape.width + 9), device)
    given = moved(inputs(packed, batch, sample=True), device)
    with few_programs(256):
        step = Step(packed, given, persistent=True, device=device)
        step.run()
    codes, _ = reference(packed, given).run()
    assert step.codes.tolist() == codes.tolist()


def test_a_step_runs_again_on_its_own_remains(device: torch.device) -> None:
    """The counter is zeroed, the cache overwritten, the flags kept."""
    packed = moved(depth_model(), device)
    given = moved(inputs(packed, 2, sample=True), device)
    with few_programs():
        step = Step(packed, given, persistent=True, device=device)
        step.run()
        first, logits = step.codes.clone(), step.logits.clone()
        step.workspace.buffers.token.copy_(given[1])
        step.run()
    assert torch.equal(step.codes, first)
    assert torch.equal(step.logits, logits)


def test_rows_depend_on_neither_slot_nor_batch(device: torch.device) -> None:
    packed = moved(depth_model(), device)
    hidden, token, params, key = moved(inputs(packed, 3, sample=True), device)
    with few_programs():
        whole = depth_decode(hidden, token, packed, params, key)
        order = [2, 0, 1]

        def rows(index: list[int]) -> tuple[Any, ...]:
            return (
                hidden[index],
                token[index],
                packed,
                type(params)(*(t[index] for t in params)),
                type(key)(*(t[index] for t in key)),
            )

        turned = depth_decode(*rows(order))
        alone = [depth_decode(*rows([i]))[0].tolist() for i in range(3)]
    assert turned.tolist() == whole[order].tolist()
    assert alone == whole.tolist()


def test_sampling_parameters_are_per_row_and_read_from_the_device(device: torch.device) -> None:
    """Rows that differ in one parameter only, all else equal: greedy, a colder one, another seed."""
    packed = moved(depth_model(codebooks=5), device)
    hidden, token, params, key = moved(inputs(packed, 1, sample=True), device)
    rows = [hidden.repeat(4, 1), token.repeat(4), packed]
    params = SamplingParams(
        torch.tensor([2.0, 2.0, 1e-3, 2.0], device=device),
        torch.full((4,), packed.vocab, device=device),
        torch.ones(4, device=device),
        torch.tensor([False, True, True, True], device=device),
    )
    key = NoiseKey(torch.tensor([1, 1, 1, 2], device=device), key.utterance.repeat(4), key.frame.repeat(4))
    with few_programs():
        codes = depth_decode(*rows, params, key).tolist()
    greedy, sampled, cold, other = codes
    assert greedy == cold
    assert sampled != greedy
    assert other != sampled


def test_broken_logits_are_flagged_and_stay_in_their_row(device: torch.device) -> None:
    packed = moved(depth_model(), device)
    given = moved(inputs(packed, 3), device)
    healthy, _ = reference(packed, given).run()
    given[0][1] = float("nan")
    with few_programs():
        step = Step(packed, given, persistent=True, device=device)
        step.run()
    assert step.workspace.buffers.flags.tolist() == [0, 1, 0]
    assert step.codes[[0, 2]].tolist() == healthy[[0, 2]].tolist()
    assert step.codes[1, 1:].tolist() == [0, 0, 0]


def test_tokens_out_of_range_read_nothing_outside_the_tables(device: torch.device) -> None:
    packed = moved(depth_model(), device)
    hidden, token, params, key = moved(inputs(packed, 2), device)
    token = torch.tensor([-7, 10**9], device=device)
    with few_programs():
        codes = depth_decode(hidden, token, packed, params, key)
    clamped = torch.tensor([0, 3 * packed.vocab - 1], device=device)
    expected, _ = DepthReference(packed, hidden, clamped, params, key, F32).run()
    assert codes[:, 1:].tolist() == expected[:, 1:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [None, "int4"], ids=["bf16", "int4"])
def test_one_layer_of_the_real_width(fmt: str | None, device: torch.device) -> None:
    shape = TINY._replace(layers=1, width=1024, ffn=8192, heads=8, groups=2, dim=128)
    packed = moved(depth_model(shape, BF16, same(fmt), codebooks=3, vocab=2051, width=2048, group=128), device)
    given = moved(inputs(packed, 1, sample=True), device)
    with few_programs(128):
        step = Step(packed, given, persistent=True, programs=1 if interpreting() else None, device=device)  # type: ignore[arg-type]
        step.run()
    assert_logits(step.logits, step.codes, packed, given, BF16)


# ------------------------------------------------------------------------------------------------- teacher forcing


@pytest.mark.parametrize("table", [True, False], ids=["table", "projection"])
@pytest.mark.parametrize("fmt", [None, "int8", "fp8", "int4"], ids=["plain", "int8", "fp8", "int4"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_teacher_forced_logits(table: bool, fmt: str | None, dtype: torch.dtype, device: torch.device) -> None:
    packed = moved(depth_model(ODD, dtype, same(fmt), table=table, bias=True, codebooks=5), device)
    given = moved(inputs(packed, 6), device)
    codes = torch.randint(packed.vocab, (6, packed.codebooks), generator=torch.Generator().manual_seed(3)).to(device)
    codes[:, 0] = given[1]
    made = depth_logits(given[0], codes, packed)
    assert made.shape == (6, 4, packed.vocab)
    # Between quantised weights the SwiGLU's output is bf16: which way a value near a tie goes is the library's last bit.
    eager = BF16 if fmt is not None else dtype
    assert_logits(made.transpose(0, 1), codes, packed, given, eager)
    fewer = depth_logits(given[0], codes[:, :2], packed, 3)
    assert torch.allclose(fewer, made[:, :2], atol=1e-5 if dtype == F32 else 0.1)


def test_teacher_forced_logits_are_those_of_the_kernels(device: torch.device) -> None:
    packed = moved(depth_model(codebooks=6), device)
    given = moved(inputs(packed, 4, sample=True), device)
    with few_programs():
        step = Step(packed, given, persistent=True, device=device)
        step.run()
    made = depth_logits(given[0], step.codes, packed)
    assert torch.allclose(made.transpose(0, 1), step.logits, atol=2e-5)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"hidden": a["hidden"].double()}, "hidden must be"),
        (lambda a: {"hidden": a["hidden"][:, :-1]}, "hidden must be"),
        (lambda a: {"token": a["token"].int()}, "token must be"),
        (lambda a: {"token": a["token"].repeat(20)}, "token must be"),
        (lambda a: {"token": a["token"][:0]}, "token must be"),
        (lambda a: {"params": a["params"]._replace(top_k=a["params"].top_k[:1])}, "params.top_k must be"),
        (lambda a: {"params": a["params"]._replace(do_sample=a["params"].do_sample.int())}, "params.do_sample must be"),
        (lambda a: {"key": a["key"]._replace(seed=a["key"].seed.float())}, "key.seed must be"),
        (lambda a: {"logits": torch.zeros(3, 2, 3)}, "logits must be"),
    ],
)
def test_bad_arguments_are_named(change: Any, message: str, device: torch.device) -> None:
    packed = moved(depth_model(), device)
    hidden, token, params, key = moved(inputs(packed, 2), device)
    arguments = {"hidden": hidden, "token": token, "packed": packed, "params": params, "key": key}
    with pytest.raises(ValueError, match=message):
        depth_decode(**{**arguments, **change(arguments)})


def test_bad_packing_is_named() -> None:
    with pytest.raises(ValueError, match="formats must name zones"):
        depth_model(formats={"heads": "int8"})
    with pytest.raises(ValueError, match="format must be keep or one of"):
        depth_model(formats={"mlp": "int3"})
    with pytest.raises(ValueError, match="even head width"):
        depth_model(TINY._replace(dim=15))
    with pytest.raises(ValueError, match="codes must be"):
        depth_logits(torch.zeros(2, 40), torch.zeros(2, 1, dtype=torch.int64), depth_model())
    with pytest.raises(ValueError, match="codes must be 0 to 34"):
        depth_logits(torch.zeros(2, 40), torch.full((2, 4), 2000), depth_model())
