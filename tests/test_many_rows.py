"""Calls of more rows than the largest bucket: each row says what it says alone, and the batch is the stock model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from csm_models import (
    AUDIO,
    FRAME_SAMPLES,
    Recorder,
    assert_same_puts,
    audio_prompt,
    build,
    code_prompt,
    copy_first_codebook,
    on_fast_path,
    on_stock_path,
    stock,
    text_prompt,
)
from test_batching import Slow, make
from test_exactness import assert_caches_equal
from test_no_recompile import no_new_graphs
from torch import Tensor

from csm_runtime import accelerate, many_rows
from csm_runtime.adapters import hf_call
from csm_runtime.adapters.hf_passes import Passes
from csm_runtime.engine import BUCKETS, Engine, bucket_for
from csm_runtime.generate import FastGenerate, as_it_was
from csm_runtime.guard import Guard, GuardConfig, Interrupted
from csm_runtime.kv import State, bytes_of
from csm_runtime.many_rows import ManyRows
from csm_runtime.memory import MemoryReading
from csm_runtime.slots import Slots

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}
SAMPLED = {"do_sample": True, "depth_decoder_do_sample": True}
END = 4
"""End-of-speech id of :func:`ending`: rows of :func:`prompt` say it in frames 0 to 35, a third of them not at all."""


def prompt(rows: int) -> dict[str, Tensor]:
    """Text of 1 to 13 tokens, padded on the left."""
    everybody = text_prompt([1 + (7 * n) % 13 for n in range(33)], seed=3)
    return {key: value[:rows] for key, value in everybody.items()}


def row(inputs: dict[str, Tensor], n: int, padded: bool = False) -> dict[str, Tensor]:
    """One row of a batch as a call of its own, without its padding and without sounds that it has not."""
    one = {key: value[n : n + 1] for key, value in inputs.items()}
    if not padded and "attention_mask" in one:
        first = int(one["attention_mask"][0].argmax())
        for name in ("input_ids", "attention_mask"):
            one[name] = one[name][:, first:]
    if "input_values" in one and not bool((one["input_values_cutoffs"] >= 0).any()):
        del one["input_values"], one["input_values_cutoffs"]
    return one


def audible(model: Any) -> dict[str, Tensor]:
    """Rows of :func:`prompt` that say more than the end: the stock codec has no sound of no frames."""
    inputs = prompt(33)
    counts = ends(stock(model, **inputs, **GREEDY, max_new_tokens=2))
    return {key: value[[n for n, count in enumerate(counts) if count > 1]] for key, value in inputs.items()}


def ending(mode: str = "eager", pads: bool = False, **options: Any) -> Any:
    """A model whose rows end when they like."""
    model = copy_first_codebook(build("base", seed=2))
    model.config.codebook_eos_token_id = END
    if pads:  # any eos_token_id switches on stock's padding of finished rows
        model.generation_config.eos_token_id = 5
    return accelerate(model, mode=mode, progress=False, without=("compiled prefill",), **options)


@pytest.fixture(scope="module")
def kept() -> Callable[..., Any]:
    """``kept(mode)``, ``kept(mode, pads)``: models for the module; tests leave weights and guard as they are."""
    made: dict[Any, Any] = {}

    def model(mode: str = "eager", pads: bool | None = None) -> Any:
        if (mode, pads) not in made:
            made[mode, pads] = make(mode) if pads is None else ending(mode, pads)
        return made[mode, pads]

    return model


def ends(codes: Tensor) -> list[int]:
    """Frames of each row up to the end of its speech, the last one included."""
    ended = (codes[..., :-1] == END).all(-1)
    return [int(one.int().argmax()) + 1 if bool(one.any()) else len(one) for one in ended]


def grown(model: Any, before: dict[str, int], *names: str) -> list[int]:
    counters = model.acceleration.metrics.counters
    return [counters[name] - before.get(name, 0) for name in names]


def clean(model: Any) -> None:
    """Nothing of a call is left on the model."""
    handle = model.acceleration
    assert not handle._engine._owned and not handle._busy
    assert handle.metrics.counters["batch.joined"] == handle.metrics.counters["batch.left"]


# --------------------------------------------------------------------------------------- the same as the stock model


@pytest.mark.parametrize("mode", ["eager", "native"])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("rows", [20, 33])
def test_a_greedy_batch_is_the_stock_models(kept: Any, rows: int, pads: bool, mode: str) -> None:
    model, inputs = kept(mode, pads), prompt(rows)
    wanted = stock(model, **inputs, **GREEDY, max_new_tokens=20)
    counts = ends(wanted)
    assert len(set(counts)) > 6 and max(counts) == 20 and counts.index(20) < rows - 1
    before = dict(model.acceleration.metrics.counters)
    with on_fast_path(model):
        made = model.generate(**inputs, **GREEDY, max_new_tokens=20)
    assert made.dtype == wanted.dtype == torch.int64 and made.device == wanted.device
    assert made.shape == wanted.shape == (rows, 20, 4)
    assert torch.equal(made, wanted)
    short = sum(count < 20 for count in counts)
    frames, joined = (sum(counts), rows) if pads else (20 * rows, rows + short)
    assert grown(model, before, "frames", "batch.joined") == [frames, joined]
    assert len(model.acceleration.metrics.times("first_frame")) >= 1
    clean(model)


@pytest.mark.slow
def test_compiled(kept: Any) -> None:
    """And compiled once: a second call of another size makes no new graphs."""
    model = kept("compile", False)
    model.generate(**prompt(20), **GREEDY, max_new_tokens=3)
    with no_new_graphs(), on_fast_path(model):
        made = model.generate(**prompt(33), **GREEDY, max_new_tokens=20)
    assert torch.equal(made, stock(model, **prompt(33), **GREEDY, max_new_tokens=20))


@pytest.mark.parametrize("pads", [False, True])
def test_a_batch_is_as_long_as_its_longest_row(kept: Any, pads: bool) -> None:
    """Rows that all end before the limit: the stock loop stops with the last of them."""
    model = kept("eager", pads)
    everybody = prompt(33)
    counts = ends(stock(model, **everybody, **GREEDY, max_new_tokens=40))
    early = [n for n, count in enumerate(counts) if count < 18]
    inputs = {key: value[early] for key, value in everybody.items()}
    wanted = stock(model, **inputs, **GREEDY, max_new_tokens=40)
    assert len(early) > 16 and wanted.shape[1] < 20
    with on_fast_path(model):
        assert torch.equal(model.generate(**inputs, **GREEDY, max_new_tokens=40), wanted)


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("audio", [False, True])
@pytest.mark.parametrize("cache", [None, "static"])
def test_return_dict(kept: Any, pads: bool, audio: bool, cache: str | None) -> None:
    model, inputs = kept("eager", pads), audible(kept("eager", pads))
    options = {**GREEDY, "max_new_tokens": 12, "return_dict_in_generate": True, "output_audio": audio}
    if pads:
        model.config.codebook_pad_token_id = 0  # the codec has no sound for the usual one
    if cache is not None:
        options["cache_implementation"] = cache
    wanted = stock(model, **inputs, **options)
    with on_fast_path(model):
        made = model.generate(**inputs, **options)
    assert type(made) is type(wanted) and set(made) == set(wanted)
    assert torch.equal(made.sequences, wanted.sequences)
    if audio:
        assert len(made.audio) == len(wanted.audio) and all(torch.equal(a, b) for a, b in zip(made.audio, wanted.audio))
    else:
        assert made.audio is None
    if cache is None:
        assert_caches_equal(made.past_key_values, wanted.past_key_values)
    assert type(made.past_key_values) is type(wanted.past_key_values)
    for ours, theirs in zip(made.past_key_values.layers, wanted.past_key_values.layers):
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)


def test_sound(kept: Any) -> None:
    """Nobody makes what lies behind the end of a row's speech, where only the codec gets it."""
    model, inputs = kept("eager", False), audible(kept("eager", False))
    options = {**GREEDY, "max_new_tokens": 14}
    counts = ends(stock(model, **inputs, **options))
    wanted = stock(model, **inputs, **options, output_audio=True)
    before = dict(model.acceleration.metrics.counters)
    with on_fast_path(model):
        made = model.generate(**inputs, **options, output_audio=True)
    assert isinstance(made, list) and len({len(one) for one in made}) > 5
    assert all(
        ours.dtype == theirs.dtype and torch.equal(ours, theirs) for ours, theirs in zip(made, wanted, strict=True)
    )
    assert grown(model, before, "frames") == [sum(counts)]


def test_an_end_that_the_codec_does_not_see(kept: Any) -> None:
    """The loop judges all codebooks but the last, the codec every one: it goes on behind such an end."""
    model = copy_first_codebook(build("base", seed=2))
    model.config.codebook_eos_token_id = END
    with torch.no_grad():  # the last codebook never says what the first ones do
        model.depth_decoder.codebooks_head.weight[-1].mul_(-1.0)
    accelerate(model, mode="eager", progress=False)
    inputs, options = prompt(20), {**GREEDY, "max_new_tokens": 14, "output_audio": True}
    wanted = stock(model, **inputs, **options)
    assert {len(one) for one in wanted} == {14 * FRAME_SAMPLES}
    with on_fast_path(model):
        made = model.generate(**inputs, **options)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, wanted, strict=True))


# ------------------------------------------------------------------------------------------------ the same as alone


def inputs_of(model: Any, kind: str, rows: int) -> dict[str, Tensor]:
    if kind == "text":
        return prompt(rows)
    if kind == "codes":
        return {"input_ids": code_prompt(model, rows, 6)}
    lengths = ([], [3], [2, 1], [1])
    return audio_prompt(model, [[frames * FRAME_SAMPLES for frames in lengths[n % 4]] for n in range(rows)])


@pytest.mark.parametrize("drawn", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("kind", "rows", "mode"),
    [("text", 33, "eager"), ("text", 20, "native"), ("sounds", 20, "native"), ("codes", 20, "eager")],
)
def test_rows_say_what_they_say_alone(kept: Any, kind: str, rows: int, mode: str, drawn: dict[str, Any]) -> None:
    model = kept(mode, True)
    inputs = inputs_of(model, kind, rows)
    before = inputs["input_ids"].shape[1] if kind == "codes" else 0
    options = {**drawn, "max_new_tokens": 11}
    if drawn is SAMPLED:
        options |= {"temperature": 0.9, "top_k": 12, "depth_decoder_top_p": 0.9}
    seeds = [(-1) ** n * (n * 2**57 + n) % 2**62 for n in range(rows)]
    numbers = [(5 * n) % 7 for n in range(rows)]
    with as_it_was(model.depth_decoder.generation_config):
        alone = [
            model.generate(**row(inputs, n), **options, seed=seeds[n], utterance_ids=[numbers[n]])[0, before:]
            for n in range(rows)
        ]
        padded = model.generate(**row(inputs, 1, padded=True), **options, seed=seeds[1], utterance_ids=[numbers[1]])
        with on_fast_path(model):
            made = model.generate(**inputs, **options, seed=seeds, utterance_ids=numbers)
    assert torch.equal(padded[0, before:], alone[1])
    assert len({tuple(one.flatten().tolist()) for one in alone}) > rows - 3
    if before:
        assert torch.equal(made[:, :before], inputs["input_ids"])
    made = made[:, before:]
    assert made.shape[1] == max(map(len, alone))
    for n in range(rows):
        assert torch.equal(made[n, : len(alone[n])], alone[n]), n
        assert bool((made[n, len(alone[n]) :] == model.config.codebook_pad_token_id).all()), n


def test_sounds_are_the_stock_models(kept: Any) -> None:
    model = kept("eager")
    inputs = inputs_of(model, "sounds", 20)
    wanted = stock(model, **inputs, **GREEDY, max_new_tokens=6)
    with on_fast_path(model):
        assert torch.equal(model.generate(**inputs, **GREEDY, max_new_tokens=6), wanted)


def test_one_seed_for_all_and_none(kept: Any) -> None:
    model, inputs = kept("eager"), {key: value[:1].repeat(18, 1) for key, value in prompt(20).items()}
    options = {**SAMPLED, "max_new_tokens": 5}
    made = model.generate(**inputs, **options, seed=3)
    assert len({tuple(one.flatten().tolist()) for one in made}) == 18, "rows number themselves"
    few = model.generate(**{key: value[:4] for key, value in inputs.items()}, **options, seed=3)
    assert torch.equal(made[:4], few), "as in a batch of four"
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(**inputs, **options))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_rows_of_a_request() -> None:
    model = build()
    inputs = audio_prompt(model, [[2 * FRAME_SAMPLES], [], [FRAME_SAMPLES, 3 * FRAME_SAMPLES]])
    mask = inputs["attention_mask"]
    mask[1, -2] = 0  # a hole stays
    mask[0, :4] = 0
    first = [int(one.argmax()) for one in mask]
    found: list[hf_call.Request] = []

    def capture(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:
        args = (input_ids, logits_processor, stopping_criteria, generation_config, kwargs)
        found.append(hf_call.read_request(model, *args))
        return input_ids

    stock(model, **inputs, **GREEDY, max_new_tokens=3, custom_generate=capture)
    request = found[0]
    for n in range(3):
        one = hf_call.row_of(model, request, n)
        assert torch.equal(one.input_ids, inputs["input_ids"][n : n + 1, first[n] :])
        assert torch.equal(one.mask, mask[n : n + 1, first[n] :])
        assert torch.equal(one.positions, request.positions[n : n + 1, first[n] :]) and int(one.positions[0, 0]) == 0
        assert (one.prompt["input_values"] is None) == (one.prompt["input_values_cutoffs"] is None) == (n == 1)
        assert one.output_cache is None and one.max_frames == request.max_frames
    hidden = replace(request, mask=(mask * (torch.arange(mask.shape[1]) >= mask.shape[1] - 2)))
    assert bool((inputs["input_ids"][2] == AUDIO).any())
    assert hf_call.row_of(model, hidden, 2).input_ids.shape == hidden.input_ids[:1].shape, (
        "its sound wants its positions"
    )
    plain = replace(request, mask=None, positions=torch.arange(mask.shape[1])[None])
    assert torch.equal(hf_call.row_of(model, plain, 1).positions, plain.positions)


# ------------------------------------------------------------------------------------------------------------ slots


def test_rows_join_as_slots_fall_free(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen at once, and no frame with a slot that nobody uses while somebody waits."""
    model, speaking = kept("eager", True), []
    frame = Slots._frame

    def counted(slots: Slots) -> None:
        speaking.append((len(slots.speaking), len(slots._waiting.__self__._waiting)))
        frame(slots)

    monkeypatch.setattr(Slots, "_frame", counted)
    counts = ends(model.generate(**prompt(33), **GREEDY, max_new_tokens=20))
    assert all(there == 16 for there, waiting in speaking if waiting)
    assert sum(there for there, _ in speaking) == sum(counts)
    assert len(speaking) < 60, "one after the other in groups of sixteen it would be 60"


@pytest.mark.parametrize("mode", ["eager", "native"])
def test_the_last_rows_have_buffers_of_their_number(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Copied, not made again: one pass for every row, and the guard, which looks at what it can, finds nothing."""
    model, inputs = ending(mode, True, guard=GuardConfig(budget=1e9)), prompt(33)
    wanted = stock(model, **inputs, **GREEDY, max_new_tokens=40)
    sampled = {**SAMPLED, "max_new_tokens": 40, "seed": 5, "top_k": 3, "depth_decoder_top_k": 2}
    with as_it_was(model.depth_decoder.generation_config):
        alone = [model.generate(**row(inputs, n), **sampled, utterance_ids=[n])[0] for n in range(33)]
    sizes, passes, frame, prefill = [], [], Slots._frame, Passes.prefill
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "_frame", lambda slots: sizes.append((slots.count, len(slots.speaking))) or frame(slots))
        patch.setattr(Passes, "prefill", lambda *args: passes.append(1) or prefill(*args))
        with on_fast_path(model):
            made = model.generate(**inputs, **GREEDY, max_new_tokens=40)
        assert torch.equal(made, wanted) and sum(passes) == 33
        assert all(bucket_for(there) == count for count, there in sizes) and {count for count, _ in sizes} >= {16, 8, 4}
        with as_it_was(model.depth_decoder.generation_config), on_fast_path(model):
            made = model.generate(**inputs, **sampled)
        assert all(torch.equal(made[n, : len(alone[n])], alone[n]) for n in range(33)) and sizes[-1][0] < 16
    guard = model.acceleration.guard
    assert not guard.events and model.acceleration.metrics.counters["guard.checked.backbone"] > 60
    clean(model)


def test_native_sums_do_not_depend_on_the_turn() -> None:
    """In bf16 as well, wherever a row is and is moved to."""
    model = build("eight_codebooks", dtype=torch.bfloat16)
    accelerate(model, mode="native", precision="int8", progress=False, without=("compiled prefill",))
    inputs = prompt(20)
    options = {**SAMPLED, "max_new_tokens": 12}
    with as_it_was(model.depth_decoder.generation_config):
        made = model.generate(**inputs, **options, seed=list(range(20)))
        for n in range(20):
            alone = model.generate(**row(inputs, n), **options, seed=n, utterance_ids=[n])[0]
            assert torch.equal(made[n, : len(alone)], alone), n


@pytest.mark.parametrize("why", ["slow to make", "does not work", "interrupted"])
def test_rows_that_cannot_move(kept: Any, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    model, inputs = kept("eager", True), prompt(20)
    wanted = stock(model, **inputs, **GREEDY, max_new_tokens=30)
    handle, counts, frame = model.acceleration, [], Slots._frame
    faults = handle.metrics.counters["faults"]
    model.generate(**inputs, **GREEDY, max_new_tokens=2)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt if why == "interrupted" else RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "_frame", lambda slots: counts.append(slots.count) or frame(slots))
        if why == "slow to make":
            patch.setattr(many_rows, "_QUICK", ())
            patch.setattr(handle, "_warm", {16})
        else:
            patch.setattr(Slots, "_move", fail)
        if why == "interrupted":
            with pytest.raises(KeyboardInterrupt):
                model.generate(**inputs, **GREEDY, max_new_tokens=30)
        else:
            assert torch.equal(model.generate(**inputs, **GREEDY, max_new_tokens=30), wanted)
        assert why == "does not work" or set(counts) == {16}
    assert (handle.metrics.counters["faults"] > faults) == (why == "does not work")
    assert handle.guard.rung == "fast"
    clean(model)
    assert torch.equal(model.generate(**inputs, **GREEDY, max_new_tokens=30), wanted)


def test_fewer_slots_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = ending(batch_sizes=(1,)), prompt(20)
    wanted = stock(model, **inputs, **GREEDY, max_new_tokens=5)
    handle = model.acceleration
    engine = handle._engine
    for rows in (1, 4):
        state = State(engine.spec, rows, engine.capacity, engine.kv_dtype, engine.device)
        assert bytes_of(engine.spec, rows, engine.capacity, engine.kv_dtype) == state.bytes()
    one = bytes_of(engine.spec, 1, engine.capacity, engine.kv_dtype)
    free = {"bytes": 9 * one}
    assert handle.memory.source is not None
    source = handle.memory.source._replace(probe=lambda: MemoryReading(1 << 40, free["bytes"], 1 << 20, 1 << 20))
    monkeypatch.setattr(handle.memory, "source", source)
    assert many_rows.slots_that_fit(handle) == 4
    assert torch.equal(model.generate(**inputs, **GREEDY, max_new_tokens=5), wanted)
    assert handle._engine.holds(4) and not handle._engine.holds(16)
    free["bytes"] = 0
    assert many_rows.slots_that_fit(handle) == 4, "those that are there"
    free["bytes"] = 1 << 30
    assert many_rows.slots_that_fit(handle) == 16 == BUCKETS[-1]
    monkeypatch.setattr(handle.memory, "source", source._replace(probe=lambda: 1 // 0))
    assert many_rows.slots_that_fit(handle) == 16, "what cannot be known is found out"


def test_beside_a_batcher(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same bucket, while it speaks: neither writes the other's rows."""
    model, inputs = kept("eager", True), prompt(20)
    wanted = model.generate(**inputs, **GREEDY, max_new_tokens=9)
    one = model.generate(**row(inputs, 6), **GREEDY, max_new_tokens=40)[0]
    Slow(monkeypatch, 0.005)
    with model.acceleration.batcher(slots=16) as batcher:
        utterance = batcher.submit(**row(inputs, 6), **GREEDY, max_new_tokens=40, sound=True)
        next(iter(utterance))
        assert torch.equal(model.generate(**inputs, **GREEDY, max_new_tokens=9), wanted)
        assert not utterance.done
        assert torch.equal(utterance.result(60), one)
    clean(model)


# ------------------------------------------------------------------------------------------------- the stock path


def test_a_streamer_wants_all_rows_at_once(kept: Any) -> None:
    model, inputs, ours, theirs = kept("eager"), prompt(20), Recorder(), Recorder()
    wanted = stock(model, **inputs, **GREEDY, max_new_tokens=4, streamer=theirs)
    with on_stock_path(model, "a streamer for 20 rows"):
        assert torch.equal(model.generate(**inputs, **GREEDY, max_new_tokens=4, streamer=ours), wanted)
    assert_same_puts(ours, theirs)
    torch.manual_seed(3)
    wanted = stock(model, **inputs, **SAMPLED, max_new_tokens=4)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**inputs, **SAMPLED, max_new_tokens=4, streamer=Recorder()), wanted)


def test_what_is_not_supported_and_what_does_not_fit(kept: Any) -> None:
    model, inputs = kept("eager"), prompt(20)
    with on_stock_path(model, "MinP"):
        model.generate(**inputs, **SAMPLED, max_new_tokens=2, min_p=0.2)
    with on_stock_path(model, "more than 64 positions"):
        model.generate(**inputs, **GREEDY, max_new_tokens=53)
    with on_fast_path(model):
        model.generate(**inputs, **GREEDY, max_new_tokens=52)
    small = make(max_positions=16)
    with pytest.raises(ValueError, match="max_positions=16 is too small"):
        small.generate(**inputs, **GREEDY, max_new_tokens=9)
    with pytest.raises(ValueError, match="20 of them"):
        model.generate(**inputs, **GREEDY, max_new_tokens=2, seed=[1, 2, 3])


# ------------------------------------------------------------------------------------------------------------ faults


def spoil(kind: str) -> Callable[[Any, Any], None]:
    def spoiled(engine: Engine, runner: Any) -> None:
        if kind == "NaN":
            runner.state.hidden[6].fill_(float("nan"))
        elif kind == "memory":
            raise torch.OutOfMemoryError("injected: you tried to allocate 4096 bytes")
        elif kind == "interrupt":
            raise KeyboardInterrupt
        else:
            raise RuntimeError("injected")

    return spoiled


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("mode", ["eager", "native"])
@pytest.mark.parametrize("kind", ["exception", "NaN", "memory", "memory twice"])
def test_a_fault_costs_no_token(monkeypatch: pytest.MonkeyPatch, kind: str, mode: str, pads: bool) -> None:
    """On the next rung, which is the stock path in mode eager and for a second lack of memory: greedy there."""
    model, inputs = ending(mode, pads), prompt(20)
    ends_on_stock = mode == "eager" and kind != "memory" or kind == "memory twice"
    options: dict[str, Any] = {**(GREEDY if ends_on_stock else SAMPLED), "max_new_tokens": 12}
    if not ends_on_stock:
        options |= {"seed": list(range(20)), "top_k": 3}
    with as_it_was(model.depth_decoder.generation_config):
        wanted = model.generate(**inputs, **options)
        handle = model.acceleration
        handle.metrics.counters.clear()
        slow = Slow(monkeypatch)
        slow.before[7] = spoil(kind.split(maxsplit=1)[0])
        if kind == "memory twice":
            slow.before[10] = spoil("memory")
        assert torch.equal(model.generate(**inputs, **options), wanted)
        counters = handle.metrics.counters
        if kind == "memory":
            ways = {"fast": (1, 0, 0), "retries": 1, "rung": "fast"}
        elif ends_on_stock:
            ways = {"fast": (0, 0, 1), "retries": int(kind == "memory twice"), "rung": "stock"}
        else:
            ways = {"fast": (0, 1, 0), "retries": 0, "rung": "eager" if kind == "exception" else "plain backbone"}
        assert tuple(counters[f"generate.{way}"] for way in ("fast", "rung", "stock")) == ways["fast"]
        assert (counters["memory.retries"], handle.guard.rung) == (ways["retries"], ways["rung"])
        assert counters["faults"] == (2 if kind == "memory twice" else 1)
        clean(model)
        if ends_on_stock:
            with on_stock_path(model, "the guard trusts no faster one"):
                assert torch.equal(model.generate(**inputs, **options), wanted)
        handle.guard.rearm()
        with on_fast_path(model):
            assert torch.equal(model.generate(**inputs, **options), wanted)


@pytest.mark.parametrize("when", ["speaking", "behind the end"])
def test_the_rest_on_stock_behind_the_end(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """A stock loop of one row stops at every end, also at those that a row says after its first one."""
    model = ending()
    inputs = audible(model)
    wanted = stock(model, **inputs, **GREEDY, max_new_tokens=30)
    again = [int((one[..., :-1] == END).all(-1).sum()) for one in wanted]
    assert max(again) > 1, "a row that says the end twice"
    slow, frames = Slow(monkeypatch), 0
    model.generate(**inputs, **GREEDY, max_new_tokens=30, output_audio=True)
    frames, slow.frames = slow.frames, 0
    slow.before[5 if when == "speaking" else frames + 2] = spoil("exception")
    assert torch.equal(model.generate(**inputs, **GREEDY, max_new_tokens=30), wanted)
    assert model.acceleration.guard.rung == "stock" and model.acceleration.metrics.counters["faults"] == 1
    assert model.acceleration.metrics.counters["generate.stock"] == 1


@pytest.mark.parametrize("mode", ["eager", "native"])
def test_a_breach_is_made_again(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Every row comes out wrong from some frame on, and some have left by the time the guard looks."""
    model, inputs = ending(mode, True, guard=GuardConfig(budget=1e9)), prompt(33)
    handle = model.acceleration
    wanted = stock(model, **inputs, **GREEDY, max_new_tokens=24)
    emit, back, count = Engine.emit, [], [0]
    monkeypatch.setattr(Guard, "draw", lambda guard: 15)  # not before a row's sixteenth frame

    def spoiled(engine: Engine, runner: Any) -> None:
        count[0] += runner.state.rows == 16
        emit(engine, runner)
        if handle.guard.rung == "fast" and count[0] > 9:
            runner.state.codes[:, -1] = (runner.state.codes[:, -1] + 3) % 32

    take_back = ManyRows._take_back

    def taken(call: ManyRows, doubtful: int) -> None:
        left = [one.number for one in call._rows if one.complete]
        take_back(call, doubtful)
        back.append([n for n in left if not call._rows[n].complete])
        assert [one.number for one in call._waiting][: len(back[-1])] == back[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "emit", spoiled)
        patch.setattr(ManyRows, "_take_back", taken)
        model.generate(**text_prompt([3] * 16), **GREEDY, max_new_tokens=1)
        count[0] = 0
        assert torch.equal(model.generate(**inputs, **GREEDY, max_new_tokens=24), wanted)
    (event,) = handle.guard.events
    assert event.kind == "verification" and event.rows == 16
    assert event.next_rung == handle.guard.rung == ("stock" if mode == "eager" else "plain depth")
    assert len(back) == 1 and len(back[0]) > 1, "rows that had left"
    clean(model)
    handle.guard.rearm()
    assert handle.replay(event), "the same finding"


def test_forbidden_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = ending(guard=GuardConfig(fallback="forbid")), prompt(20)
    wanted = model.generate(**inputs, **GREEDY, max_new_tokens=9)
    slow = Slow(monkeypatch)
    slow.before[3] = spoil("exception")
    with pytest.raises(Interrupted, match="injected"):
        model.generate(**inputs, **GREEDY, max_new_tokens=9)
    clean(model)
    assert torch.equal(model.generate(**inputs, **GREEDY, max_new_tokens=9), wanted)
    with monkeypatch.context() as patch:
        refuse(patch, [5])
        with pytest.raises(ValueError, match="injected: bad audio"):
            model.generate(**inputs, **GREEDY, max_new_tokens=9)
    clean(model)


@pytest.mark.parametrize("kind", ["interrupt", "a bug of ours"])
def test_an_interrupted_call_leaves_the_engine_usable(kept: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model, inputs = kept("eager", True), prompt(33)
    wanted = model.generate(**inputs, **GREEDY, max_new_tokens=9)
    with monkeypatch.context() as patch:
        if kind == "interrupt":
            slow = Slow(patch)
            slow.before[6] = spoil(kind)
        else:
            patch.setattr(Slots, "_frame", lambda slots: 1 / 0)
            patch.setattr(Slots, "_stumbled", lambda slots, error: 1 // 0)
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
            model.generate(**inputs, **GREEDY, max_new_tokens=9)
    clean(model)
    assert model.acceleration.guard.rung == "fast"
    with on_fast_path(model):
        assert torch.equal(model.generate(**inputs, **GREEDY, max_new_tokens=9), wanted)
    with on_fast_path(model):
        few = {key: value[:12] for key, value in inputs.items()}
        assert torch.equal(
            model.generate(**few, **GREEDY, max_new_tokens=9), stock(model, **few, **GREEDY, max_new_tokens=9)
        )


def refuse(patch: pytest.MonkeyPatch, lengths: Sequence[int]) -> None:
    """Prompts of so many positions fail on the fast path, whatever is cached of them."""
    prefill = Passes.prefill

    def failing(passes: Passes, x: Tensor, *args: Any) -> Any:
        if x.shape[1] in lengths and len(x) == 1:
            raise ValueError("injected: bad audio")
        return prefill(passes, x, *args)

    patch.setattr(Passes, "prefill", failing)


def test_a_prompt_that_fails_is_for_the_stock_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = ending(pads=True), prompt(33)
    handle = model.acceleration
    wanted = stock(model, **inputs, **GREEDY, max_new_tokens=9)
    refuse(monkeypatch, [5, 11])
    handle.metrics.counters.clear()
    assert torch.equal(model.generate(**inputs, **GREEDY, max_new_tokens=9), wanted)
    assert handle.guard.rung == "fast" and not handle.guard.events, "the others have no part in it"
    assert handle.metrics.counters["generate.stock"] == 1 and handle.metrics.counters["generate.fast"] == 0
    assert handle.metrics.counters["faults"] == sum(int(n) in (5, 11) for n in inputs["attention_mask"].sum(1))
    clean(model)

    def bad(*args: Any) -> Any:
        raise IndexError("injected: a token that no table has")

    monkeypatch.setattr(hf_call, "continue_on_stock", bad)
    with pytest.raises(IndexError, match="no table has"):
        model.generate(**inputs, **GREEDY, max_new_tokens=9)
    clean(model)
    assert isinstance(model.generate, FastGenerate)


def test_a_prompt_without_memory_is_tried_again(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = kept("eager", True), prompt(20)
    wanted = stock(model, **inputs, **GREEDY, max_new_tokens=9)
    prefill, tried = Passes.prefill, []

    def failing(passes: Passes, x: Tensor, *args: Any) -> Any:
        if x.shape[1] == 8 and not tried:
            tried.append(1)
            raise torch.OutOfMemoryError("injected: you tried to allocate 4096 bytes")
        return prefill(passes, x, *args)

    monkeypatch.setattr(Passes, "prefill", failing)
    before = dict(model.acceleration.metrics.counters)
    assert torch.equal(model.generate(**inputs, **GREEDY, max_new_tokens=9), wanted)
    assert tried and model.acceleration.guard.rung == "fast"
    assert grown(model, before, "memory.retries", "generate.fast") == [1, 1]


def test_a_cache_that_cannot_be_filled_costs_no_token(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = kept("eager", True), prompt(20)
    options = {**GREEDY, "max_new_tokens": 5, "return_dict_in_generate": True}
    wanted = stock(model, **inputs, **options)
    monkeypatch.setattr(hf_call, "fill_cache", lambda *args: 1 // 0)
    faults = model.acceleration.metrics.counters["faults"]
    assert torch.equal(model.generate(**inputs, **options).sequences, wanted.sequences)
    assert model.acceleration.metrics.counters["faults"] == faults + 1
