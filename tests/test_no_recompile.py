"""Prompt length, frames, sampling values, seeds, voices and the caller's grad mode cost no compilation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from csm_models import FRAME_SAMPLES, audio_prompt, build, code_prompt, on_fast_path, text_prompt
from torch._dynamo.utils import counters
from torch._inductor import metrics as inductor_metrics

from csm_runtime.compiling import compile_step

pytestmark = pytest.mark.slow

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}


def graphs() -> tuple[int, ...]:
    """Graphs Dynamo has captured, calls it has made to the compiler, kernels Inductor has written."""
    return (
        counters["stats"]["unique_graphs"],
        counters["stats"]["calls_captured"],
        counters["inductor"]["fxgraph_cache_hit"] + counters["inductor"]["fxgraph_cache_miss"],
        inductor_metrics.generated_kernel_count,
    )


@contextlib.contextmanager
def no_new_graphs() -> Iterator[None]:
    before, breaks, limits = graphs(), sum(counters["graph_break"].values()), dict(counters["recompile_limit"])
    yield
    assert graphs() == before
    assert sum(counters["graph_break"].values()) == breaks
    assert dict(counters["recompile_limit"]) == limits


@pytest.fixture
def model(compiled: Any) -> Any:
    made = compiled()
    for rows in (1, 3):  # the two buckets the tests below use
        made.generate(**text_prompt([5] * rows), **GREEDY, max_new_tokens=2)
    return made


def test_the_counters_see_a_compilation() -> None:
    """Without this, all others could pass by looking at the wrong counters."""
    before = graphs()
    compile_step(lambda x: x + 1)(torch.ones(3))
    assert graphs() != before
    with pytest.raises(AssertionError), no_new_graphs():
        compile_step(lambda x: x + 2)(torch.ones(3))


def test_lengths(model: Any) -> None:
    with no_new_graphs(), on_fast_path(model, calls=6):
        for length, frames in ((1, 1), (2, 9), (17, 3), (40, 2)):
            model.generate(**text_prompt((length,)), **GREEDY, max_new_tokens=frames)
        model.generate(**text_prompt((4, 9, 2)), **GREEDY, max_new_tokens=5)
        model.generate(code_prompt(model, 1, 11), **GREEDY, max_new_tokens=2)


def test_batch_sizes_of_one_bucket(model: Any) -> None:
    with no_new_graphs(), on_fast_path(model, calls=2):
        model.generate(**text_prompt((4, 9, 2, 6)), **GREEDY, max_new_tokens=3)
        model.generate(**text_prompt((4, 9, 2)), **GREEDY, max_new_tokens=3)


def test_sampling_values_and_seeds(model: Any) -> None:
    settings: list[dict[str, Any]] = [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.3, "top_k": 3},
        {"do_sample": True, "top_p": 0.5, "depth_decoder_do_sample": True},
        {"do_sample": False, "depth_decoder_do_sample": True, "depth_decoder_temperature": 1.7},
        {**GREEDY, "seed": 3},
        {"do_sample": True, "seed": -(2**62), "utterance_ids": [2**40]},
        {"do_sample": True, "depth_decoder_top_k": 4, "depth_decoder_do_sample": True, "seed": [5]},
        GREEDY,
    ]
    with no_new_graphs(), on_fast_path(model, calls=len(settings)):
        for setting in settings:
            model.generate(**text_prompt((5,)), **setting, max_new_tokens=3)


def test_voices(model: Any) -> None:
    with no_new_graphs(), on_fast_path(model, calls=4):
        for segments in ([FRAME_SAMPLES], [3 * FRAME_SAMPLES], [700, 5000]):
            model.generate(**audio_prompt(model, [segments]), **GREEDY, max_new_tokens=2)
        model.generate(**audio_prompt(model, [[FRAME_SAMPLES], [], [3000]]), **GREEDY, max_new_tokens=2)


@pytest.mark.parametrize("caller", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(model: Any, caller: Any) -> None:
    with no_new_graphs(), on_fast_path(model), caller():
        model.generate(**text_prompt((5,)), **GREEDY, max_new_tokens=3)


def test_outputs(model: Any) -> None:
    with no_new_graphs(), on_fast_path(model, calls=2):
        model.generate(**text_prompt((5,)), **GREEDY, max_new_tokens=3, output_audio=True)
        model.generate(**text_prompt((5,)), **GREEDY, max_new_tokens=3, return_dict_in_generate=True)


def test_new_weights(model: Any) -> None:
    """In place, by another tensor in the parameter, and by another parameter; then back to what they were."""
    mlp = model.backbone_model.layers[0].mlp
    parameter, values = mlp.up_proj.weight, mlp.up_proj.weight.detach().clone()
    with no_new_graphs(), on_fast_path(model, calls=4):
        mlp.up_proj.weight.data.mul_(2.0)
        model.generate(**text_prompt((5,)), **GREEDY, max_new_tokens=2)
        mlp.up_proj.weight.data = values.clone()
        model.generate(**text_prompt((5,)), **GREEDY, max_new_tokens=2)
        mlp.up_proj.weight = torch.nn.Parameter(values.clone(), requires_grad=False)
        model.generate(**text_prompt((5,)), **GREEDY, max_new_tokens=2)
        mlp.up_proj.weight = parameter
        model.train()
        model.generate(**text_prompt((5,)), **GREEDY, max_new_tokens=2)
        model.eval()


def test_frozen_parts(model: Any) -> None:
    """A fine-tuner who freezes some layers, or some weights of a layer, and thaws them again."""
    parameters = list(model.backbone_model.parameters())
    wanted = [p.requires_grad for p in parameters]
    with no_new_graphs(), on_fast_path(model, calls=3):
        for period in (1, 2, 5):
            for i, p in enumerate(parameters):
                p.requires_grad_(i % period == 0)
            model.generate(**text_prompt((5,)), **GREEDY, max_new_tokens=2)
            assert [p.requires_grad for p in parameters] == [i % period == 0 for i in range(len(parameters))]
        for p, want in zip(parameters, wanted):
            p.requires_grad_(want)


def test_steps_compiled_many_times_keep_their_own_limits() -> None:
    """Dynamo gives one code object eight graphs and then runs it eagerly without a word."""

    def step(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 1

    breaks = dict(counters["recompile_limit"])
    before = counters["stats"]["unique_graphs"]
    for width in range(2, 14):
        mine = compile_step(step)
        assert torch.equal(mine(torch.ones(width)), torch.full((width,), 3.0))
    assert counters["stats"]["unique_graphs"] - before == 12
    assert dict(counters["recompile_limit"]) == breaks


def test_a_compiled_step_keeps_its_closure_and_defaults() -> None:
    offset = 5

    def step(x: torch.Tensor, factor: int = 3, *, extra: int = 7) -> torch.Tensor:
        return x * factor + offset + extra

    assert torch.equal(compile_step(step)(torch.ones(2)), torch.full((2,), 15.0))


def test_a_second_model_of_the_same_shape(model: Any) -> None:
    """It compiles its own graphs, from Inductor's cache, and leaves the first one's alone."""
    from csm_runtime import accelerate

    other = accelerate(build(seed=5), mode="compile", batch_sizes=(1,), progress=False)
    assert other.acceleration.mode == "compile"
    with no_new_graphs():
        for which in (model, other, model):
            with on_fast_path(which):
                which.generate(**text_prompt((5,)), **GREEDY, max_new_tokens=3)
