"""Compiled steps are called past Dynamo, the first two depth positions as a pair, short contexts by a layer of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from csm_models import build, on_fast_path, stock, text_prompt
from torch import Tensor

from csm_kernels.gemv import gemv_ref, gemv_streamed
from csm_kernels.quant import quantize_int8
from csm_kernels.testing import assert_close
from csm_runtime import accelerate, engine
from csm_runtime.compiling import compile_step

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def mix(x: Tensor, pair: Pair, factor: int, cache: Tensor) -> tuple[Tensor, Pair]:
    cache[0] = x[0]
    return pair.right * factor - x, Pair(pair.left + x, pair.left * 2)


def forbidden(*_: Any) -> None:
    raise AssertionError("went through Dynamo")


@pytest.mark.slow
def test_later_calls_go_past_dynamo_with_their_own_tensors() -> None:
    step = compile_step(mix)
    for turn in range(4):
        x, cache = torch.randn(3), torch.zeros(3)
        pair = Pair(torch.randn(3), torch.randn(3))
        first, second = step(x, pair, 3, cache)
        step._through_dynamo = forbidden
        assert torch.allclose(first, pair.right * 3 - x) and cache[0] == x[0] and cache[1] == 0, turn
        assert isinstance(second, Pair)
        assert torch.allclose(second.left, pair.left + x) and torch.equal(second.right, pair.left * 2)


@pytest.mark.slow
def test_a_container_is_read_once_and_forgotten_on_request() -> None:
    step = compile_step(mix)
    args = (Pair(torch.ones(3), torch.ones(3)), 3, torch.zeros(3))
    for _ in range(3):
        step(torch.ones(3), *args)
    assert any(held is args[0] for held, _ in step._containers.values())
    step.forget()
    assert not step._containers
    assert torch.equal(step(torch.ones(3), *args)[0], torch.full((3,), 2.0))


@pytest.mark.slow
def test_arguments_that_cannot_be_told_apart_keep_going_through_dynamo() -> None:
    step = compile_step(mix)
    same = torch.ones(3)
    for value in (1.0, 5.0):
        # Dynamo sees one input where the caller has two.
        x = torch.full((3,), value)
        step(same, Pair(same, same), 3, torch.zeros(3))
        assert torch.equal(step(x, Pair(x, x), 3, torch.zeros(3))[0], x * 2)


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17])
@pytest.mark.parametrize(("height", "width"), [(1, 5), (3, 4097), (8, 8192), (5, 8209), (2, 12288), (7, 1)])
@pytest.mark.parametrize("int8", [False, True])
def test_streamed_gemv_of_any_shape(rows: int, height: int, width: int, int8: bool) -> None:
    x = torch.randn(rows, width)
    weight: Any = torch.randn(height, width)
    weight = quantize_int8(weight) if int8 else weight
    bias = torch.randn(height)
    wide = weight.data.double() * weight.scale.double()[:, None] if int8 else weight.double()
    truth = x.double() @ wide.t() + bias.double()
    eager = gemv_ref(x, weight, bias)
    assert_close(gemv_streamed(x, weight, bias), truth, eager, name="gemv_streamed", terms=width)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["base", "depth_vocabulary", "biases", "two_codebooks"])
def test_the_pair_is_two_steps(name: str, rows: int) -> None:
    """Tokens and caches of one two-row pass are those of position 0 and then position 1."""
    model = accelerate(build(name), mode="eager", batch_sizes=(rows,), progress=False)
    own = model.acceleration._engine
    runner = own.runner(rows)
    state = runner.state
    state.hidden.normal_()
    token = torch.randint(0, own.spec.vocab, (state.rows,))
    runner.depth_params.do_sample.fill_(True)
    state.seed.copy_(torch.arange(state.rows) + 3)
    with torch.no_grad():
        wanted = token
        for position in own._positions[:2]:
            wanted, _ = own.depth_position(runner, position, wanted)
        caches = [cache.clone() for cache in (*state.depth_keys, *state.depth_values)]
        for cache in (*state.depth_keys, *state.depth_values):
            cache[:, :, :2].fill_(float("nan"))
        got, _ = own.depth_pair(runner, token)
    assert torch.equal(got, wanted)
    for cache, copy in zip((*state.depth_keys, *state.depth_values), caches):
        assert torch.allclose(cache[:, :, :2], copy[:, :, :2], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_a_context_that_outgrows_the_short_layers(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_SHORT_WINDOW", 16)
    model = accelerate(build(), mode="compile", batch_sizes=(rows,), progress=False)
    own = model.acceleration._engine
    assert own.mode == "compile" and not model.acceleration.notes
    runner = own.runner(rows)
    assert [window.size for window in runner.windows] == [16, own.capacity]
    calls: list[int] = []
    runner.windows = [
        window._replace(layer=lambda *args, window=window: (calls.append(window.size), window.layer(*args))[1])
        for window in runner.windows
    ]
    prompt = text_prompt([12] * rows)
    wanted = stock(model, **prompt, **GREEDY, max_new_tokens=9)
    with on_fast_path(model):
        assert torch.equal(model.generate(**prompt, **GREEDY, max_new_tokens=9), wanted)
    layers = own.spec.backbone.layers
    # Frames 1 to 4 write slots 12 to 15, frame 5 slot 16.
    assert calls == [16] * 4 * layers + [own.capacity] * 4 * layers
