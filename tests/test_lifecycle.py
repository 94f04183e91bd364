"""The accelerated model stays the model: restore, save, copy, train, merge, convert, share between threads."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import types
import weakref
from typing import Any

import pytest
import torch
from csm_models import (
    FRAME_SAMPLES,
    Recorder,
    audio_prompt,
    build,
    code_prompt,
    int8_twin,
    on_fast_path,
    on_stock_path,
    stock,
    text_prompt,
)
from test_bad_input import LoraLinear
from torch import nn

from csm_kernels.quant import QuantWeight
from csm_runtime import PrecisionPolicy, accelerate, compiling
from csm_runtime.adapters import hf
from csm_runtime.weights import fingerprint

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False, "max_new_tokens": 4}
PROMPT = text_prompt((5, 8))


def assert_follows_stock(model: Any, **options: Any) -> torch.Tensor:
    with on_fast_path(model):
        got = model.generate(**PROMPT, **{**GREEDY, **options})
    assert torch.equal(got, stock(model, **PROMPT, **{**GREEDY, **options}))
    return got


def assert_stock_object(model: Any) -> None:
    """Nothing of ours hangs on the model or on any of its modules."""
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            kind = type(value)
            assert not kind.__module__.startswith(("csm_runtime", "csm_kernels")), (name, key)
    assert "generate" not in model.__dict__
    assert not hasattr(model, "acceleration")
    assert isinstance(model.generate, types.MethodType)
    assert model.generate.__func__ is type(model).generate


# ------------------------------------------------------------------------------------------------ the handle


def test_returns_the_same_object() -> None:
    model = build()
    kind, names = type(model), dir(model)
    assert accelerate(model, mode="eager", progress=False) is model
    assert type(model) is kind
    assert set(dir(model)) - set(names) == {"acceleration"}


@pytest.mark.parametrize("precision", ["stock", "int8"])
def test_restore_gives_back_the_model_bit_by_bit(precision: str) -> None:
    model = build()
    ids = code_prompt(model, 2, 5)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    torch.manual_seed(5)
    tokens = model.generate(**PROMPT, do_sample=True, depth_decoder_do_sample=True, max_new_tokens=4)
    before_keys = {name: set(module.__dict__) for name, module in model.named_modules()}
    accelerate(model, precision=precision, mode="eager", progress=False)
    model.generate(**PROMPT, do_sample=True, max_new_tokens=4)
    handle = model.acceleration
    handle.restore()
    assert_stock_object(model)
    after_keys = {name: set(module.__dict__) for name, module in model.named_modules()}
    assert after_keys == before_keys
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)
    torch.manual_seed(5)
    again = model.generate(**PROMPT, do_sample=True, depth_decoder_do_sample=True, max_new_tokens=4)
    assert torch.equal(again, tokens)
    handle.restore()  # a second time is harmless
    assert_follows_stock(accelerate(model, mode="eager", progress=False))


def test_restore_frees_the_copies() -> None:
    import weakref

    model = accelerate(build(), precision="int8", mode="eager", progress=False)
    model.generate(**PROMPT, **GREEDY)
    packed = weakref.ref(model.acceleration._engine.packed.depth_heads.banks[0].data)
    model.acceleration.restore()
    gc.collect()
    assert packed() is None


def test_signature_and_docs(shared: Any) -> None:
    model = shared()
    kind = type(model)
    assert inspect.signature(model.generate) == inspect.signature(kind.generate.__get__(model))
    assert model.generate.__doc__ == kind.generate.__doc__
    assert model.generate.__name__ == "generate"
    for name in ("forward", "__call__", "state_dict", "save_pretrained", "to", "train"):
        assert getattr(model, name).__func__ is getattr(kind, name)


def test_accelerate_twice(fast: Any) -> None:
    model = fast()
    first = model.acceleration
    accelerate(model, precision="int8", mode="eager", progress=False)
    assert model.acceleration is not first
    assert model.acceleration.policy.name == "int8"
    model.acceleration.restore()
    assert_stock_object(model)


def test_an_override_of_the_instance_survives(fast: Any) -> None:
    """A generate() the user put on the instance is theirs: refused, kept, or given back by restore()."""
    model = build()
    calls = []
    stock_generate = model.generate

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock_generate(*args, **kwargs)

    model.generate = mine
    try:
        fast(of=model)
    except ValueError:
        assert model.generate is mine
        return
    model.acceleration.restore()
    assert model.generate is mine


# ------------------------------------------------------------------------------------------------ saving and copying


def test_state_dict_and_parameters_are_stock(fast: Any) -> None:
    model, plain = fast(precision="int8"), build()
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


def test_save_and_load(fast: Any, tmp_path: Any) -> None:
    from transformers import CsmForConditionalGeneration

    model = fast("biases")
    tokens = model.generate(**PROMPT, **GREEDY)
    model.save_pretrained(tmp_path / "ours")
    build("biases").save_pretrained(tmp_path / "theirs")
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {p.name for p in (tmp_path / "theirs").iterdir()}
    loaded = CsmForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert_stock_object(loaded)
    assert torch.equal(loaded.generate(**PROMPT, **GREEDY), tokens)
    assert_follows_stock(accelerate(loaded, mode="eager", progress=False))
    assert_follows_stock(model)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_seen(fast: Any, assign: bool) -> None:
    model, other = fast(), build(seed=9)
    before = assert_follows_stock(model)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    assert not torch.equal(assert_follows_stock(model), before)


def copies(model: Any) -> dict[str, Any]:
    return {
        "deepcopy": copy.deepcopy(model),
        "deepcopy of a deepcopy": copy.deepcopy(copy.deepcopy(model)),
        "pickle": pickle.loads(pickle.dumps(model)),
        "deepcopy in a list": copy.deepcopy([model, model])[1],
    }


def test_copies_are_stock_models_that_work(fast: Any) -> None:
    model = fast()
    tokens = model.generate(**PROMPT, **GREEDY)
    for how, other in copies(model).items():
        assert other is not model
        assert not other.__dict__.get("acceleration"), how
        assert type(other.generate).__module__.split(".")[0] not in ("csm_runtime", "csm_kernels"), how
        assert other.generate.__self__ is other, how
        assert torch.equal(other.generate(**PROMPT, **GREEDY), tokens), how
        for parameter in other.parameters():
            parameter.data.zero_()
        assert not torch.equal(other.generate(**PROMPT, **GREEDY), tokens), how
        assert torch.equal(model.generate(**PROMPT, **GREEDY), tokens), how
    assert_follows_stock(model)


def test_copies_can_be_accelerated_and_restored(fast: Any) -> None:
    other = copy.deepcopy(fast())
    accelerate(other, mode="eager", progress=False)
    assert_follows_stock(other)
    other.acceleration.restore()
    assert torch.equal(other.generate(**PROMPT, **GREEDY), stock(other, **PROMPT, **GREEDY))
    assert not hasattr(other, "acceleration")


def test_torch_save(fast: Any, tmp_path: Any) -> None:
    model = fast()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded.generate(**PROMPT, **GREEDY), model.generate(**PROMPT, **GREEDY))


# ------------------------------------------------------------------------------------------------ weights that change


def scale_in_place(model: Any) -> None:
    with torch.no_grad():
        model.backbone_model.layers[1].mlp.down_proj.weight.mul_(-1.5)
        model.depth_decoder.model.layers[0].self_attn.v_proj.weight.mul_(-1.5)
        model.depth_decoder.codebooks_head.weight.mul_(-1.0)


def merge_through_data(model: Any) -> None:
    """What LoRA merges do; it does not move the tensor's version counter."""
    projection = model.backbone_model.layers[0].self_attn.q_proj
    generator = torch.Generator().manual_seed(4)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(projection.out_features, 2, generator=generator)
    projection.weight.data += up @ down
    model.depth_decoder.codebooks_head.weight.data += 0.5 * torch.randn(3, 24, 32, generator=generator)


def new_parameter(model: Any) -> None:
    layer = model.depth_decoder.model.layers[1].mlp
    layer.gate_proj.weight = nn.Parameter(-layer.gate_proj.weight.detach().flip(0))
    model.depth_decoder.codebooks_head.weight = nn.Parameter(model.depth_decoder.codebooks_head.weight.detach().flip(2))


def new_data(model: Any) -> None:
    weight = model.depth_decoder.codebooks_head.weight
    weight.data = weight.data.flip(-1).clone()
    model.backbone_model.layers[0].mlp.up_proj.weight.data = -model.backbone_model.layers[0].mlp.up_proj.weight.data


def swapped_rows(model: Any) -> None:
    weight = model.depth_decoder.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data[torch.randperm(40, generator=torch.Generator().manual_seed(1))]


def one_norm(model: Any) -> None:
    model.backbone_model.norm.weight.data.mul_(torch.linspace(-2, 2, 32))
    model.depth_decoder.model.norm.weight.data.mul_(torch.linspace(2, -2, 24))


def optimizer_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = code_prompt(model, 1, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


CHANGES = [scale_in_place, merge_through_data, new_parameter, new_data, swapped_rows, one_norm, optimizer_step]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_are_seen(fast: Any, change: Any) -> None:
    model = fast()
    before = assert_follows_stock(model, max_new_tokens=6)
    change(model)
    assert not torch.equal(assert_follows_stock(model, max_new_tokens=6), before)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_are_packed_again_in_int8(fast: Any, change: Any) -> None:
    model = fast(precision="int8")
    before = model.generate(**PROMPT, **GREEDY)
    assert model.acceleration.metrics.counters["weights.repacked"] == 0
    change(model)
    with on_fast_path(model):
        after = model.generate(**PROMPT, **GREEDY)
    assert not torch.equal(after, before)
    repacked = model.acceleration.metrics.counters["weights.repacked"]
    expected = {"scale_in_place": 3, "merge_through_data": 2, "new_parameter": 2, "new_data": 2, "swapped_rows": 1}
    if change is one_norm:
        assert repacked == 0
    elif change is optimizer_step:
        assert repacked > 10
    else:
        assert repacked == expected[change.__name__]
    fresh = build()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(
        accelerate(fresh, precision="int8", mode="eager", progress=False).generate(**PROMPT, **GREEDY), after
    )
    model.generate(**PROMPT, **GREEDY)
    assert model.acceleration.metrics.counters["weights.repacked"] == repacked, "packed again without need"


def test_report_sees_stale_weights_too(fast: Any) -> None:
    """report() between an update and the next call must not hide the repacking, nor spoil it for later calls."""
    model = fast(precision="int8")
    scale_in_place(model)
    with torch.inference_mode():
        model.acceleration.report()
    model.generate(**PROMPT, **GREEDY)
    assert model.acceleration.metrics.counters["weights.repacked"] == 3
    scale_in_place(model)
    model.generate(**PROMPT, **GREEDY)
    assert model.acceleration.metrics.counters["weights.repacked"] == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [64, 201, 1024])
def test_small_changes_move_the_fingerprint(dtype: torch.dtype, width: int) -> None:
    """One element changed by one part in a hundred, anywhere, is seen."""
    generator = torch.Generator().manual_seed(width)
    weight = (0.02 * torch.randn(8, width, generator=generator)).to(dtype)
    mark = fingerprint(weight)
    assert torch.equal(mark, fingerprint(weight.clone()))
    missed = []
    for column in range(width):
        changed = weight.clone()
        changed[3, column] *= 1.01 if dtype == torch.float32 else 1.0 + 2.0**-6
        if not torch.equal(changed, weight) and torch.equal(fingerprint(changed), mark):
            missed.append(column)
    assert not missed, f"{len(missed)} of {width} columns, the first {missed[:5]}"


def test_replaced_layer_goes_to_the_stock_path(fast: Any) -> None:
    """An unmerged adapter: its bare weight is not what the layer computes."""
    model = fast()
    before = assert_follows_stock(model)
    attention = model.backbone_model.layers[0].self_attn
    original = attention.q_proj
    attention.q_proj = LoraLinear(original)
    with on_stock_path(model, "LoraLinear"):
        got = model.generate(**PROMPT, **GREEDY)
    assert torch.equal(got, stock(model, **PROMPT, **GREEDY))
    attention.q_proj = original
    assert torch.equal(assert_follows_stock(model), before)


@pytest.mark.parametrize(
    "where", ["", "lm_head", "backbone_model.layers.1", "depth_decoder", "depth_decoder.model.norm"]
)
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_are_called(fast: Any, where: str, kind: str) -> None:
    model = fast()
    calls = []
    register = getattr(model.get_submodule(where), f"register_{kind}_hook")
    handle = register(lambda *_: calls.append(1))
    with on_stock_path(model, "hooks"):
        model.generate(**PROMPT, **GREEDY)
    assert len(calls) >= 4
    handle.remove()
    assert_follows_stock(model)


def test_replaced_method_goes_to_the_stock_path(fast: Any) -> None:
    model = fast()
    forward = model.backbone_model.norm.forward
    model.backbone_model.norm.forward = lambda x: -forward(x)
    with on_stock_path(model, "backbone_model.norm.forward is overridden"):
        got = model.generate(**PROMPT, **GREEDY)
    assert torch.equal(got, stock(model, **PROMPT, **GREEDY))


def test_hidden_states_recorded_earlier_do_not_cost_the_fast_path(fast: Any) -> None:
    """transformers leaves hooks of its own behind when it has once recorded hidden states."""
    model = build()
    stock(model, **PROMPT, **GREEDY, return_dict_in_generate=True, output_hidden_states=True)
    assert_follows_stock(fast(of=model))


# ------------------------------------------------------------------------------------------------ dtype and training


@pytest.mark.parametrize("precision", ["stock", "int8"])
def test_conversion_after_accelerate(fast: Any, precision: str) -> None:
    model = fast(precision=precision)
    model.generate(**PROMPT, **GREEDY)
    model.to(torch.bfloat16)
    with on_fast_path(model):
        got = model.generate(**PROMPT, **GREEDY)
    assert model.acceleration.metrics.counters["engine.rebuilt"] == 1
    assert model.acceleration.report().dtype == "bfloat16"
    fresh = accelerate(build(dtype=torch.bfloat16), precision=precision, mode="eager", progress=False)
    assert torch.equal(got, fresh.generate(**PROMPT, **GREEDY))
    cache = model.generate(**PROMPT, **GREEDY, return_dict_in_generate=True).past_key_values
    assert cache.layers[0].keys.dtype == torch.bfloat16
    model.float()
    model.generate(**PROMPT, **GREEDY)
    assert model.acceleration.metrics.counters["engine.rebuilt"] == 2


def test_half_precision(fast: Any) -> None:
    model = fast(of=build(dtype=torch.float16))
    with on_fast_path(model):
        assert model.generate(**PROMPT, **GREEDY).shape == (2, 4, 4)


def test_training_mode_with_dropout_is_stock(fast: Any) -> None:
    model = fast(of=build(backbone={"attention_dropout": 0.5}))
    assert_follows_stock(model)
    model.train()
    with on_stock_path(model, "training mode with dropout"):
        torch.manual_seed(2)
        got = model.generate(**PROMPT, **GREEDY)
    torch.manual_seed(2)
    assert torch.equal(got, stock(model, **PROMPT, **GREEDY))
    model.eval()
    assert_follows_stock(model)


def test_training_mode_without_dropout(fast: Any) -> None:
    model = fast()
    model.train()
    assert_follows_stock(model)
    assert model.training


def test_training_mode_with_checkpointing_equals_stock(fast: Any) -> None:
    model = fast()
    model.gradient_checkpointing_enable()
    model.train()
    got = model.generate(**PROMPT, **GREEDY)
    assert torch.equal(got, stock(model, **PROMPT, **GREEDY))
    assert model.acceleration.metrics.counters["faults"] == 0


@pytest.mark.parametrize("precision", ["stock", "int8"])
def test_loss_and_gradients_are_stock(fast: Any, precision: str) -> None:
    ours, theirs = fast(precision=precision), build()
    ours.generate(**PROMPT, **GREEDY)
    prompt = audio_prompt(theirs, [[2 * FRAME_SAMPLES], [FRAME_SAMPLES, 100]])
    labels = prompt["input_ids"].clone()
    labels[labels < 90] = -100
    labels[labels == 90] = -100
    losses = []
    for model in (ours, theirs):
        model.train()
        out = model(**prompt, labels=labels)
        out.loss.backward()
        losses.append(out)
    assert torch.equal(losses[0].loss, losses[1].loss)
    assert torch.equal(losses[0].depth_decoder_loss, losses[1].depth_decoder_loss)
    grads = 0
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert torch.equal(a.grad, b.grad), name
            grads += 1
    assert grads > 20


def test_generation_leaves_gradients_alone(fast: Any) -> None:
    model = fast()
    ids = code_prompt(model, 1, 4)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.generate(**PROMPT, **GREEDY)
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if name in grads)
    assert all(p.requires_grad for name, p in model.named_parameters() if name in grads)


# ------------------------------------------------------------------------------------------------ threads


def test_threads(fast: Any) -> None:
    model = fast()
    prompts = [text_prompt(lengths, seed=i) for i, lengths in enumerate([(4,), (7, 3), (5,), (2, 9, 6)])]
    wanted = [stock(model, **prompt, **GREEDY) for prompt in prompts]
    results: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(prompts))}
    errors = []

    def work(index: int) -> None:
        try:
            for _ in range(3):
                results[index].append(model.generate(**prompts[index], **GREEDY))
        except BaseException as error:
            errors.append(error)

    with on_fast_path(model, calls=12):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    for index, tokens in enumerate(wanted):
        assert all(torch.equal(got, tokens) for got in results[index]), index


def test_two_models_do_not_share_state(fast: Any) -> None:
    one, two = fast("base"), fast("llama3")
    streamer = Recorder()
    inner = {}

    class Other(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            inner[len(self.puts)] = two.generate(**PROMPT, **GREEDY)

    with on_fast_path(two, calls=5):
        tokens = one.generate(**PROMPT, **GREEDY, streamer=Other())
    assert torch.equal(tokens, stock(one, **PROMPT, **GREEDY, streamer=streamer))
    assert all(torch.equal(got, stock(two, **PROMPT, **GREEDY)) for got in inner.values())


# ------------------------------------------------------------------------------------------------ dropped originals


def test_dropped_originals_are_gone_and_nothing_was_compiled_for_them(tmp_path: Any) -> None:
    """Cycles that compilers and exceptions leave must not hold them until somebody collects."""
    with pytest.MonkeyPatch.context() as patch:
        compiled: list[Any] = []
        accelerate(build(), precision="int8", progress=False, packed_cache=tmp_path, guard=False, mode="eager")
        patch.setattr(compiling, "compile_pass", lambda *args: compiled.append(args))
        gc.disable()
        try:
            model = build()
            kept = [weakref.ref(layer.mlp.up_proj.weight) for layer in model.backbone_model.layers]
            knot: list[Any] = [model.backbone_model.layers[0].mlp.up_proj.weight]
            knot.append(knot)
            gc.collect()  # it is old then, as those are that nobody collects for a while
            del knot
            accelerate(model, precision="int8", drop_originals=True, progress=False, packed_cache=tmp_path)
        finally:
            gc.enable()
        assert not compiled and all(weight() is None for weight in kept)
        accelerate(build(), precision="stock", drop_originals=True, progress=False, guard=False)
        assert compiled, "nothing is dropped there, and prompts are worth compiling for"


def test_wide_matrices_of_dropped_originals_are_widened_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(
        build("biases"), precision="int8", drop_originals=True, progress=False, mode="eager", guard=False
    )
    wanted = stock(model, **PROMPT, **GREEDY)
    sizes: list[int] = []
    widen = hf.widen
    monkeypatch.setattr(hf, "_WIDENED", 100)
    monkeypatch.setattr(hf, "widen", lambda packed, dtype: sizes.append(packed.data.numel()) or widen(packed, dtype))
    assert torch.equal(stock(model, **PROMPT, **GREEDY), wanted)
    linear = [size for size in sizes if size <= 100]
    assert len(linear) > 50 and max(linear) > 32


def test_dropped_originals(fast: Any) -> None:
    model = fast("biases", precision="int8", drop_originals=True)
    matrices = [p for name, p in model.named_parameters() if "layers" in name and p.ndim == 2 and "codec" not in name]
    matrices += [model.depth_decoder.codebooks_head.weight, model.depth_decoder.model.inputs_embeds_projector.weight]
    assert len(matrices) == 4 * 7 + 2
    assert all(weight.is_meta for weight in matrices)
    assert not model.lm_head.weight.is_meta
    assert not model.backbone_model.embed_tokens.embed_audio_tokens.weight.is_meta
    report = model.acceleration.report()
    assert report.originals_dropped
    assert "in their place" in str(report)

    twin = int8_twin("biases")
    with on_fast_path(model):
        got = model.generate(**PROMPT, **GREEDY)
    assert torch.equal(got, stock(twin, **PROMPT, **GREEDY))
    assert torch.equal(stock(model, **PROMPT, **GREEDY), got), "the stock path computes from the int8 copies"
    with on_stock_path(model, "output_scores"):
        out = model.generate(**PROMPT, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences, got)
    ids = code_prompt(model, 1, 4)
    with torch.no_grad():
        ours, theirs = model(input_ids=ids, labels=ids), twin(input_ids=ids, labels=ids)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.depth_decoder_logits, theirs.depth_decoder_logits)


def test_dropping_frees_the_memory(fast: Any) -> None:
    import weakref

    model = build()
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n and "codec" not in n]
    owners = [weakref.ref(module.weight) for module in linears]
    assert len(owners) == 4 * 7
    fast(of=model, precision="int8", drop_originals=True)
    model.generate(**PROMPT, **GREEDY)
    gc.collect()
    assert all(owner() is None for owner in owners)


def test_dropped_originals_cannot_come_back(fast: Any, tmp_path: Any) -> None:
    model = fast(precision="int8", drop_originals=True)
    tokens = model.generate(**PROMPT, **GREEDY)
    with pytest.raises(RuntimeError, match="dropped"):
        model.acceleration.restore()
    with pytest.raises(RuntimeError, match="dropped"):
        accelerate(model, progress=False)
    with pytest.raises(Exception):  # noqa: B017 - whoever refuses, no file of empty weights is written
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert torch.equal(model.generate(**PROMPT, **GREEDY), tokens)


def test_a_copy_of_a_model_without_originals(fast: Any) -> None:
    model = fast(precision="int8", drop_originals=True)
    tokens = model.generate(**PROMPT, **GREEDY)
    other = copy.deepcopy(model)
    assert torch.equal(other.generate(**PROMPT, **GREEDY), tokens)
    del model
    gc.collect()
    assert torch.equal(other.generate(**PROMPT, **GREEDY), tokens)


def test_conversion_without_originals(fast: Any) -> None:
    """It works, or it is refused in words; it never turns to rubbish."""
    model = fast(precision="int8", drop_originals=True)
    model.to(torch.bfloat16)
    try:
        got = model.generate(**PROMPT, **GREEDY)
    except (RuntimeError, ValueError) as error:
        assert "dropped" in str(error)
        return
    reference = accelerate(build(), precision="int8", mode="eager", progress=False)
    wanted = reference.generate(**PROMPT, **GREEDY)
    assert (got == wanted).float().mean() > 0.3


def test_what_was_not_dropped_is_still_watched(fast: Any) -> None:
    """The depth heads are copied for their layout even where the policy keeps their format."""
    policy = PrecisionPolicy((("depth.mlp", "int8"),))
    model = fast(precision=policy, drop_originals=True)
    before = model.generate(**PROMPT, **GREEDY)
    assert not model.depth_decoder.codebooks_head.weight.is_meta
    model.depth_decoder.codebooks_head.weight.data.neg_()
    model.backbone_model.layers[0].mlp.down_proj.weight.data.neg_()
    after = assert_follows_stock(model)
    assert not torch.equal(after, before)


def test_packed_copies_are_what_the_engine_reads(fast: Any) -> None:
    model = fast(precision="int8")
    packed = model.acceleration._engine.packed
    assert isinstance(packed.depth_heads.banks[0], QuantWeight)
    assert isinstance(packed.backbone.layers[0].q.weight, QuantWeight)
    assert packed.backbone_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    stock_packed = fast()
    layers = stock_packed.acceleration._engine.packed.backbone.layers
    assert layers[0].q.weight.data_ptr() == stock_packed.backbone_model.layers[0].self_attn.q_proj.weight.data_ptr()
