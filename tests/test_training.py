"""The training forward: stock's losses and gradients at fraction 1, unbiased below, and none of the flaws of others."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from csm_models import AUDIO, AUDIO_EOS, CONFIGS, audio_prompt, build, stock, text_prompt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from csm_runtime import accelerate
from csm_runtime.training import CsmDataCollator, CsmTrainingConfig, DepthGradientNoiseScale, share_counts

ALL = CsmTrainingConfig(depth_fraction=1.0)
SOUND = 1920


def turn(model: Any, frames: int, seed: int = 0, text: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    limit = min(model.config.vocab_size, model.config.depth_decoder_config.vocab_size)
    return {
        "text_ids": torch.randint(0, 80, (text,), generator=generator),
        "codes": torch.randint(0, limit, (frames, model.config.num_codebooks), generator=generator),
    }


def batch_of(model: Any, config: CsmTrainingConfig, frames: tuple[int, ...] = (20, 9), seed: int = 0) -> dict[str, Any]:
    return CsmDataCollator(model.config, config)([turn(model, n, seed + i) for i, n in enumerate(frames)])


def stock_inputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch as stock takes it: embeddings, and codes as labels ``[B, S, K]``."""
    ids, codes = batch["input_ids"], batch["audio_codes"]
    audible = ((ids == AUDIO) | (ids == AUDIO_EOS))[..., None]
    embeds = torch.where(audible, model.backbone_model.embed_tokens(codes), model.embed_text_tokens(ids))
    return {"inputs_embeds": embeds, "labels": torch.where((batch["labels"] == -100)[..., None], -100, codes)}


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    ours, theirs = gradients(ours), gradients(theirs)
    assert set(ours) == set(theirs)
    assert len(ours) > 20
    for name, grad in theirs.items():
        torch.testing.assert_close(
            ours[name],
            grad,
            rtol=tolerance,
            atol=tolerance * float(grad.abs().max()),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def assert_same_losses(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    for name in ("loss", "backbone_loss", "depth_decoder_loss"):
        torch.testing.assert_close(getattr(ours, name).float(), getattr(theirs, name).float(), rtol=tolerance, atol=0)


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """The stock model in training mode, and its accelerated twin at fraction 1."""
    model = build().train()
    return model, accelerate(copy.deepcopy(model), training=ALL)


# ------------------------------------------------------------------------------------------ the stock loss and gradient


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_stocks(name: str) -> None:
    model = build(name).train()
    inputs = audio_prompt(model, [[SOUND * 6, SOUND * 4], [SOUND * 5]])
    ids = inputs["input_ids"]
    labels = torch.where((ids == AUDIO) | (ids == AUDIO_EOS), ids, -100)
    ours = accelerate(copy.deepcopy(model), training=ALL)
    theirs = model(**inputs, labels=labels)
    found = ours(**inputs, labels=labels)
    assert type(found) is type(theirs)
    assert_same_losses(found, theirs)
    found.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(ours, model)


@pytest.mark.parametrize("form", ["codes", "inputs_embeds"])
def test_labels_per_codebook(pair: tuple[Any, Any], form: str) -> None:
    model, ours = pair
    codes = torch.randint(1, 32, (2, 12, 4))
    labels = codes.clone()
    labels[:, :3] = -100
    labels[0, 5, 2] = -100  # one codebook of a frame; stock cannot embed that one as an input
    fed = codes if form == "codes" else None
    embeds = None if form == "codes" else model.backbone_model.embed_tokens(codes).detach()
    found = ours(input_ids=fed, inputs_embeds=embeds, labels=labels)
    states = model.backbone_model(input_ids=fed, inputs_embeds=embeds).last_hidden_state
    rows = (labels[:, 1:, 1:] != -100).any(-1).nonzero()
    before = states[rows[:, 0], rows[:, 1]]
    wanted = labels[rows[:, 0], rows[:, 1] + 1]
    fed_depth = torch.nn.functional.pad(torch.where(wanted == -100, 0, wanted)[:, :-1], (1, 0))
    logits = model.depth_decoder(input_ids=fed_depth, backbone_last_hidden_state=before).logits
    depth = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(found.depth_decoder_loss, depth, rtol=1e-5, atol=0)


def test_collated_batch_is_stocks(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    batch = batch_of(model, ALL)
    found, theirs = ours(**batch), model(**stock_inputs(model, batch))
    assert_same_losses(found, theirs)
    found.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(ours, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_fp32_as_stock(dtype: torch.dtype) -> None:
    exact = build(dtype=dtype).float().train()
    batch = batch_of(exact, ALL)
    wanted = exact(**stock_inputs(exact, batch)).loss
    model = copy.deepcopy(exact).to(dtype)
    theirs = model(**stock_inputs(model, batch)).loss
    found = accelerate(model, training=ALL)(**batch).loss
    assert found.dtype == torch.float32
    assert abs(found - wanted) <= abs(theirs - wanted) + 2e-3 * abs(wanted)


def test_fp64_stays_fp64(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    model = model.double()
    batch = batch_of(model, ALL)
    ours = accelerate(copy.deepcopy(model), training=ALL)
    found, theirs = ours(**batch), model(**stock_inputs(model, batch))
    assert found.depth_decoder_loss.dtype == torch.float64
    found.loss.backward()
    found_grad = ours.depth_decoder.model.layers[0].mlp.gate_proj.weight.grad
    # Stock computes its norms and its losses in fp32 whatever the model's dtype, and so do we where it does.
    assert_same_losses(found, theirs, 1e-6)
    theirs.loss.backward()
    torch.testing.assert_close(
        found_grad, model.depth_decoder.model.layers[0].mlp.gate_proj.weight.grad, rtol=1e-4, atol=1e-9
    )


def test_autocast(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    batch = batch_of(model, ALL)
    exact = ours(**batch)
    exact.loss.backward()
    wanted = gradients(ours)
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = ours(**batch), model(**stock_inputs(model, batch))
    assert_same_losses(found, exact, 5e-3)
    found.loss.backward()
    theirs.loss.backward()
    for name, grad in gradients(ours).items():
        assert grad.dtype == torch.float32
        stocks = model.get_parameter(name).grad
        error, usual = ((g - wanted[name]).norm() / wanted[name].norm() for g in (grad, stocks))
        assert error <= 1.5 * usual + 1e-2, name


def test_golden_teacher_forced_likelihood(pair: tuple[Any, Any]) -> None:
    """Against stock's own decoding, one code after the other with its cache: a state too early or late would show."""
    model, ours = pair
    batch = batch_of(model, ALL, (7,))
    model.eval()
    ours.eval()
    with torch.no_grad():
        found = ours(**batch)
        embeds = stock_inputs(model, batch)["inputs_embeds"]
        first, later = [], []
        cache = None
        for place in range(embeds.shape[1] - 1):
            out = model.backbone_model(
                inputs_embeds=embeds[:, place : place + 1], past_key_values=cache, use_cache=True
            )
            cache, state = out.past_key_values, out.last_hidden_state[:, -1]
            if int(batch["labels"][0, place + 1]) == -100:
                continue
            codes = batch["audio_codes"][0, place + 1]
            first.append(-model.lm_head(state).log_softmax(-1)[0, codes[0]])
            step = model.depth_decoder(
                input_ids=torch.tensor([[0, int(codes[0])]]), backbone_last_hidden_state=state, use_cache=True
            )
            for book in range(1, len(codes)):
                later.append(-step.logits[0, -1].log_softmax(-1)[codes[book]])
                if book + 1 < len(codes):
                    step = model.depth_decoder(
                        input_ids=codes[None, book : book + 1],
                        past_key_values=step.past_key_values,
                        use_cache=True,
                        logits_to_keep=1,
                    )
    torch.testing.assert_close(found.backbone_loss, torch.stack(first).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.depth_decoder_loss, torch.stack(later).mean(), rtol=1e-5, atol=0)


def test_loss_weights() -> None:
    model = build().train()
    config = CsmTrainingConfig(depth_fraction=1.0, backbone_loss_weight=0.5, depth_loss_weight=31.0)
    out = accelerate(model, training=config)(**batch_of(model, config))
    torch.testing.assert_close(out.loss, 0.5 * out.backbone_loss + 31.0 * out.depth_decoder_loss)


def test_z_loss_is_the_squared_log_partition_of_the_depth_heads(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    batch = batch_of(model, ALL)
    plain = ours(**batch)
    ours.training_acceleration.config = CsmTrainingConfig(depth_fraction=1.0, z_loss=0.1)
    found = ours(**batch)
    inputs = stock_inputs(model, batch)
    logits = model(**inputs).depth_decoder_logits
    wanted = 0.1 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(found.depth_decoder_loss - plain.depth_decoder_loss, wanted, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------- the sample is unbiased


def test_gradient_is_unbiased() -> None:
    """Rows of different lengths, and few frames: the mean over draws is the gradient over all frames, on both sides."""
    model = build().train()
    config = CsmTrainingConfig(depth_frames=4, seed=1)
    ours = accelerate(copy.deepcopy(model), training=config)
    collate = CsmDataCollator(model.config, config)
    examples = [turn(model, n, i) for i, n in enumerate((14, 3))]
    heads = ours.depth_decoder.codebooks_head.weight, ours.depth_decoder.model.layers[0].mlp.down_proj.weight
    draws = []
    for _ in range(300):
        loss = ours(**collate(examples)).depth_decoder_loss
        draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, heads)]))
    everything = accelerate(model, training=ALL)(**batch_of(model, ALL, (14, 3))).depth_decoder_loss
    sources = model.depth_decoder.codebooks_head.weight, model.depth_decoder.model.layers[0].mlp.down_proj.weight
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(everything, sources)])
    found = torch.stack(draws)
    spread = found.std(0) / len(found) ** 0.5
    seen = spread > 1e-4 * wanted.abs().max()
    score = ((found.mean(0) - wanted)[seen] / spread[seen]).abs()
    assert float(score.mean()) < 0.95  # 0.80 where unbiased
    assert float((found.mean(0) - wanted).norm()) < 1.3 * float(spread.norm())
    assert float(spread.norm()) < 0.2 * float(wanted.norm())


def test_end_of_speech_frames_have_their_share_and_no_more() -> None:
    """Both flaws of the stock sampler: their weight is 15 times too high, and they are trivial to predict."""
    model = build().train()
    config = CsmTrainingConfig(depth_fraction=1 / 8, seed=2)
    collate = CsmDataCollator(model.config, config)
    examples = [turn(model, 40, i) for i in range(3)]
    ours = accelerate(model, training=config)
    with torch.no_grad():
        for module in (model.depth_decoder.codebooks_head,):
            module.weight[:, :, 0] += 0.5  # end-of-speech codes are likelier than others
        found = []
        for _ in range(300):
            batch = collate(examples)
            index = batch["depth_index"]
            ends = (batch["input_ids"] == AUDIO_EOS).flatten()
            assert int(ends[index[index >= 0]].sum()) == 3  # always there
            found.append(float(ours(**batch).depth_decoder_loss))
        model.eval()
        wanted = float(ours(**batch).depth_decoder_loss)
    found = torch.tensor(found)
    assert abs(float(found.mean()) - wanted) < 4 * float(found.std()) / len(found) ** 0.5


def test_micro_batches_are_one_batch(pair: tuple[Any, Any]) -> None:
    """Of different sizes: means of means would differ, which the control shows."""
    model, ours = pair
    whole = batch_of(model, ALL, (20, 3))
    parts = [batch_of(model, ALL, (20,)), batch_of(model, ALL, (3,), seed=1)]
    ours(**whole).loss.backward()
    wanted = gradients(ours)
    for part in parts:
        (ours(**part).loss / 2).backward()
    control = gradients(ours)
    share_counts(parts)
    for part in parts:
        ours(**part).loss.backward()
    found = gradients(ours)
    name = "depth_decoder.codebooks_head.weight"
    torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)
    assert float((control[name] - wanted[name]).norm() / wanted[name].norm()) > 0.1


def test_loss_does_not_depend_on_the_fraction() -> None:
    """Others' balance of the two losses goes from 31 : 1 to 2 : 1 with the ratio, also through Trainer's count."""
    model = build().train()
    batch = batch_of(model, ALL, (64, 64))
    count = int((batch["labels"][:, 1:] != -100).sum())
    seen = {}
    for fraction in (1.0, 0.25):
        config = CsmTrainingConfig(depth_fraction=fraction, seed=4)
        ours = accelerate(model, training=config)
        collate = CsmDataCollator(model.config, config)
        drawn = [collate([turn(model, 64, i) for i in range(2)]) for _ in range(20)]
        with torch.no_grad():
            seen[fraction] = sum(float(ours(**b).depth_decoder_loss) for b in drawn) / 20
            bare = {k: v for k, v in batch.items() if not k.startswith("num_")}
            counted = ours(**bare, num_items_in_batch=torch.tensor(count))
            plain = ours(**batch)
        assert_same_losses(counted, plain)
    assert abs(seen[0.25] / seen[1.0] - 1) < 0.02


# ------------------------------------------------------------------------------ flaws of other implementations, by name


class Watch(TorchDispatchMode):
    """Records the operators run, and the largest number of elements any of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return out


SYNCS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default", "aten.equal.default")


def test_no_step_waits_for_the_device(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    config = CsmTrainingConfig(depth_fraction=0.25)
    ours = accelerate(copy.deepcopy(model), training=config)
    batch = batch_of(model, config)
    with Watch() as watch:
        ours(**batch).loss.backward()
    waits = [name for name in watch.names if name in SYNCS]
    # On a CPU the reference of the loss looks at its masks, which are there already; nothing of it runs on a GPU.
    from csm_kernels import loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_rows_backward", lambda logits, *_: torch.zeros_like(logits))
        with Watch() as watch:
            ours(**batch).loss.backward()
    assert [name for name in watch.names if name in SYNCS] == []
    assert len(waits) <= 40
    with Watch() as watch:
        model(**stock_inputs(model, batch)).loss.backward()
    assert "aten.nonzero.default" in watch.names  # the watch sees what stock does


@pytest.mark.slow
def test_one_graph_for_any_number_of_frames() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = build().train()
    config = CsmTrainingConfig(depth_frames=6)
    ours = accelerate(copy.deepcopy(model), training=config)
    eager = accelerate(model, training=config)
    collate = CsmDataCollator(model.config, config, pad_to_multiple_of=64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for frames in ((20, 9), (1, 1), (40, 2), (0, 0)):
        batch = collate([turn(model, n, i) for i, n in enumerate(frames)])
        found = compiled(**batch)
        found.loss.backward()
        wanted = eager(**batch)
        wanted.loss.backward()
        assert_same_losses(found, wanted)
        assert_same_gradients(ours, eager)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    model = build().train()
    config = CsmTrainingConfig(depth_frames=6)
    ours = accelerate(copy.deepcopy(model), training=config)
    batch = batch_of(model, config)
    eager = accelerate(model, training=config)
    found, wanted = torch.compile(ours, fullgraph=True)(**batch), eager(**batch)
    assert_same_losses(found, wanted)
    found.loss.backward()
    wanted.loss.backward()
    assert_same_gradients(ours, eager, 1e-4)


@pytest.mark.slow
def test_compiled_model_draws_for_itself_as_eager_does() -> None:
    model = build().train()
    config = CsmTrainingConfig(depth_frames=5, seed=8)
    ours, eager = (accelerate(copy.deepcopy(model), training=config) for _ in range(2))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    batch = batch_of(model, config)
    del batch["depth_index"]
    losses = [float(compiled(**batch).loss.detach()) for _ in range(3)]
    assert losses == pytest.approx([float(eager(**batch).loss.detach()) for _ in range(3)], rel=1e-6)
    assert len(set(losses)) == 3


def test_no_frames_at_all_is_no_crash_and_no_nan(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    batch = CsmDataCollator(model.config, ALL)([{"text_ids": torch.arange(5)}, {"text_ids": torch.arange(3)}])
    out = ours(**batch)
    assert (float(out.loss.detach()), float(out.depth_decoder_loss.detach())) == (0.0, 0.0)
    out.loss.backward()
    found = gradients(ours)
    assert "depth_decoder.codebooks_head.weight" in found  # every rank runs every parameter
    assert all(not grad.any() for grad in found.values())
    with pytest.raises(RuntimeError):
        model(input_ids=torch.zeros(1, 4, 4, dtype=torch.long), labels=torch.full((1, 4, 4), -100))


def test_frames_for_the_backbone_only(pair: tuple[Any, Any]) -> None:
    """The stock processor's -101, all of them: codebook 0 is trained, the depth decoder is not."""
    model, ours = pair
    batch = batch_of(model, ALL)
    whole = ours(**batch)
    batch["labels"] = torch.where(batch["labels"] != -100, -101, -100)
    batch = {name: batch[name] for name in ("input_ids", "audio_codes", "labels")}
    out = ours(**batch)
    assert float(out.depth_decoder_loss.detach()) == 0.0
    torch.testing.assert_close(out.backbone_loss, whole.backbone_loss)
    half = batch["labels"].clone()
    half[0, 8:12] = AUDIO
    some = ours(**{**batch, "labels": half})
    expected = {**batch, "labels": torch.where(half == AUDIO, half, -100)}
    torch.testing.assert_close(some.depth_decoder_loss, ours(**expected).depth_decoder_loss)


def test_two_samples_of_the_frames_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """The stock processor's ratio and ours: the frames of the first sample would never change."""
    from csm_runtime.adapters import hf_training

    hf_training._warn_of_two_samples.cache_clear()
    model = build().train()
    sound = audio_prompt(model, [[SOUND * 8]])
    ids = sound["input_ids"]
    labels = torch.where(ids == AUDIO, -101, -100)
    accelerate(model, training=ALL)(**sound, labels=labels)
    assert "depth_decoder_labels_ratio" not in caplog.text
    for _ in range(2):
        accelerate(model, training=True)(**sound, labels=labels)
    assert caplog.text.count("depth_decoder_labels_ratio") == 1


def test_context_turns_can_be_left_out_of_the_loss(pair: tuple[Any, Any]) -> None:
    """Stock labels all audio, whatever the caller's -100 said."""
    model, ours = pair
    collate = CsmDataCollator(model.config, ALL)
    context, target = turn(model, 6, 0), turn(model, 9, 1)
    out = ours(**collate([{"turns": [{**context, "train": False}, target]}]))
    batch = collate([{"turns": [context, target]}])
    inputs = stock_inputs(model, batch)
    inputs["labels"][:, : 5 + 6 + 1] = -100
    assert_same_losses(out, model(**inputs))
    # The same from sound: the labels given say -100 in the first turn.
    sound = audio_prompt(model, [[SOUND * 6, SOUND * 4]])
    ids = sound["input_ids"]
    labels = torch.where((ids == AUDIO) | (ids == AUDIO_EOS), ids, -100)
    labels[:, : int((ids[0] == AUDIO_EOS).nonzero()[0]) + 1] = -100
    merged = model._merge_input_ids_with_input_values(
        ids, sound["input_values"], sound["input_values_cutoffs"], torch.where(labels == -100, ids, labels)
    )
    wanted = torch.where((labels == -100)[..., None], -100, merged["labels"])
    theirs = model(inputs_embeds=merged["inputs_embeds"], labels=wanted)
    assert_same_losses(ours(**sound, labels=labels), theirs)


def test_frame_at_the_first_position_is_not_predicted_from_the_last(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    codes = torch.randint(1, 32, (1, 8, 4))
    excluded = codes.clone()
    excluded[:, 0] = -100
    torch.testing.assert_close(
        ours(input_ids=codes, labels=codes).depth_decoder_loss,
        model(input_ids=codes, labels=excluded).depth_decoder_loss,
    )


def test_token_0_is_a_target_like_others(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    codes = torch.zeros(6, 4, dtype=torch.int64)
    batch = CsmDataCollator(model.config, ALL)([{"text_ids": torch.arange(4), "codes": codes}])
    assert int(batch["num_depth_targets"]) == 7 * 3
    assert_same_losses(ours(**batch), model(**stock_inputs(model, batch)))


def test_frames_are_drawn_anew_every_step() -> None:
    model = build()
    collate = CsmDataCollator(model.config, CsmTrainingConfig(depth_frames=5))
    examples = [turn(model, 60)]
    drawn = {tuple(sorted(collate(examples)["depth_index"].tolist())) for _ in range(10)}
    assert len(drawn) == 10


def test_fewer_frames_than_rows_are_taken_once() -> None:
    model = build().train()
    config = CsmTrainingConfig(depth_frames=16)
    ours = accelerate(copy.deepcopy(model), training=config)
    batch = batch_of(model, config, (3,))
    assert int((batch["depth_index"] >= 0).sum()) == 4
    assert_same_losses(ours(**batch), model(**stock_inputs(model, batch)))


def test_no_logits_no_caches_and_no_codec_in_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("thirty_two_codebooks").train()
    config = CsmTrainingConfig(depth_frames=5)
    ours = accelerate(copy.deepcopy(model), training=config)
    monkeypatch.setattr(ours.codec_model, "encode", None)
    batch = batch_of(model, config, (64, 64))
    from csm_kernels import loss

    rows, vocab = len(batch["depth_index"]), model.config.vocab_size
    monkeypatch.setattr(loss, "_WORKSPACE_CPU", 4 * rows * vocab * 4)  # four codebooks at a time

    def watched(which: Any, inputs: dict[str, Tensor]) -> tuple[Any, Watch, Watch, int]:
        """Output, what forward and backward ran, and the most elements of a saved tensor that is no parameter."""
        own = {p.untyped_storage().data_ptr() for p in which.parameters()}
        saved: list[int] = []

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                saved.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), Watch() as forward:
            out = which(**inputs)
        with Watch() as backward:
            out.loss.backward()
        return out, forward, backward, max(saved)

    out, forward, backward, saved = watched(ours, batch)
    assert out.logits is None
    assert out.depth_decoder_logits is None
    assert out.past_key_values is None
    head = model.depth_decoder.codebooks_head.weight.numel()
    embeddings = batch["audio_codes"].numel() * model.config.hidden_size
    # Neither a copy of the heads nor the embeddings of all frames' codes are made, and the backward has no tensor of all
    # matrices per codebook: the stock one's select_backward.
    assert saved < head < embeddings
    assert forward.largest < embeddings
    assert "aten.select_backward.default" not in backward.names
    assert not any("log_softmax" in name for name in forward.names + backward.names)
    _, forward, backward, saved = watched(model, stock_inputs(model, batch_of(model, ALL, (64, 64))))
    assert saved >= head
    assert sum(name == "aten.select_backward.default" for name in backward.names) >= 31


def test_saved_bytes_are_a_fraction_of_stocks() -> None:
    def saved(model: Any, inputs: dict[str, Tensor]) -> int:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(**inputs).loss.backward()
        return sum(held.values())

    model = build("thirty_two_codebooks", depth=dict(intermediate_size=256)).train()
    config = CsmTrainingConfig(depth_fraction=1 / 16)
    theirs = saved(model, stock_inputs(model, batch_of(model, ALL, (120, 120))))
    ours = accelerate(model, training=config)
    assert theirs > 8 * saved(ours, batch_of(model, config, (120, 120)))
    plain = accelerate(model, training=CsmTrainingConfig(depth_fraction=1 / 16, fused_layers=False))
    assert saved(plain, batch_of(model, config, (120, 120))) > 1.3 * saved(
        accelerate(model, training=config), batch_of(model, config, (120, 120))
    )


# --------------------------------------------------------------------------------------------------- validation and draw


def test_eval_mode_is_all_frames(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    ours = accelerate(copy.deepcopy(model), training=CsmTrainingConfig(depth_fraction=1 / 16))
    batch = batch_of(model, CsmTrainingConfig(depth_fraction=1 / 16))
    model.eval()
    ours.eval()
    with torch.no_grad():
        assert_same_losses(ours(**batch), model(**stock_inputs(model, batch)))
        nothing = CsmDataCollator(model.config, ALL)([{"text_ids": torch.arange(5)}])
        assert float(ours(**nothing).loss) == 0.0


def test_without_the_collators_draw_the_model_draws() -> None:
    model = build().train()
    ours = accelerate(model, training=CsmTrainingConfig(depth_fraction=0.25, seed=6))
    batch = batch_of(model, ALL, (60,))
    del batch["depth_index"]
    losses = [float(ours(**batch).depth_decoder_loss.detach()) for _ in range(4)]
    assert len(set(losses)) == 4
    handle = ours.training_acceleration
    state = handle.state_dict()
    after = [float(ours(**batch).depth_decoder_loss.detach()) for _ in range(2)]
    handle.load_state_dict(state)
    assert [float(ours(**batch).depth_decoder_loss.detach()) for _ in range(2)] == after
    with pytest.raises(ValueError, match="seed"):
        handle.load_state_dict({**state, "seed": 7})


def test_worker_processes_leave_the_draw_to_the_model() -> None:
    model = build().train()
    config = CsmTrainingConfig(depth_fraction=0.5)
    loader = torch.utils.data.DataLoader(
        [turn(model, 9, i) for i in range(4)],
        batch_size=2,
        collate_fn=CsmDataCollator(model.config, config),
        num_workers=1,
    )
    ours = accelerate(model, training=config)
    batches = list(loader)
    assert len(batches) == 2
    assert all("depth_index" not in batch for batch in batches)
    assert all(torch.isfinite(ours(**batch).loss) for batch in batches)


def test_collators_draw_is_a_function_of_seed_step_micro_step_and_rank() -> None:
    model = build()
    examples = [turn(model, 60)]

    def drawn(calls: int, seed: int = 0, rank: int = 0, accumulation: int = 1) -> list[int]:
        config = CsmTrainingConfig(depth_frames=8, seed=seed)
        collate = CsmDataCollator(model.config, config, rank=rank, gradient_accumulation=accumulation)
        return [collate(examples) for _ in range(calls)][-1]["depth_index"].tolist()

    assert drawn(3) == drawn(3)
    assert (
        len({tuple(d) for d in (drawn(3), drawn(4), drawn(3, seed=1), drawn(3, rank=1), drawn(3, accumulation=2))}) == 5
    )
    config = CsmTrainingConfig(depth_frames=8)
    resumed = CsmDataCollator(model.config, config)
    resumed.set_step(2)
    assert resumed.step == 2
    assert resumed(examples)["depth_index"].tolist() == drawn(3)
    other = CsmDataCollator(model.config, config)
    other.load_state_dict(resumed.state_dict())
    assert other(examples)["depth_index"].tolist() == drawn(4)
    with pytest.raises(ValueError, match="seed"):
        other.load_state_dict({"seed": 5, "batches": 1})


# ----------------------------------------------------------------------------------- what people put on and around a model


def test_gradient_checkpointing(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    batch = batch_of(model, ALL)
    ours(**batch).loss.backward()
    wanted = gradients(ours)
    ours.gradient_checkpointing_enable()
    calls = []
    layer = ours.depth_decoder.model.layers[0].mlp
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    ours(**batch).loss.backward()
    handle.remove()
    assert len(calls) == 2  # once more in the backward
    for name, grad in gradients(ours).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-7)


class Wrapped(torch.nn.Module):
    """A head that is not the stock one and knows nothing of losses, as a quantised one."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Tensor:
        return self.inner(*args)


@pytest.mark.parametrize("name", ["base", "two_codebooks"])
def test_heads_of_another_kind_give_logits(name: str) -> None:
    model = build(name).train()
    config = CsmTrainingConfig(depth_fraction=0.5, z_loss=0.01)
    batch = batch_of(model, config)
    wanted = accelerate(copy.deepcopy(model), training=config)(**batch)
    model.lm_head = Wrapped(model.lm_head)
    model.depth_decoder.codebooks_head = Wrapped(model.depth_decoder.codebooks_head)
    assert_same_losses(accelerate(model, training=config)(**batch), wanted)


LORA: dict[str, dict[str, Any]] = {
    "attention and MLP": dict(target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"]),
    "head of codebook 0": dict(target_modules=["q_proj", "lm_head"]),
    "heads saved whole": dict(target_modules=["q_proj"], modules_to_save=["codebooks_head", "lm_head"]),
    "embeddings": dict(target_modules=["q_proj", "embed_audio_tokens"]),
}


@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize("first", ["accelerate", "peft"])
def test_lora(pair: tuple[Any, Any], name: str, first: str) -> None:
    peft = pytest.importorskip("peft")
    model, _ = pair
    batch = batch_of(model, ALL)

    def adapted(base: Any) -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **LORA[name]))

    theirs = adapted(copy.deepcopy(model))
    base = copy.deepcopy(model)
    if first == "accelerate":
        ours = adapted(accelerate(base, training=ALL))
    else:
        ours = adapted(base)
        accelerate(ours.get_base_model(), training=ALL)
    inputs = stock_inputs(theirs.get_base_model(), batch)
    found, wanted = ours(**batch), theirs(**inputs)
    assert_same_losses(found, wanted)
    found.loss.backward()
    wanted.loss.backward()
    mine, others = gradients(ours), gradients(theirs)
    assert set(mine) == set(others)
    assert all(".lora_" in key or "modules_to_save" in key for key in mine)
    for key, grad in others.items():
        torch.testing.assert_close(mine[key], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["base", "biases", "llama3"])
def test_attention_with_our_rotation_is_stocks(name: str) -> None:
    """What stands in for the stock attention on CUDA, called on a CPU: output and gradients, with a mask and without."""
    from csm_runtime.adapters import hf_training

    model = build(name).train()
    accelerate(model, training=ALL).training_acceleration.restore()
    module = model.backbone_model.layers[1].self_attn
    x = torch.randn(2, 7, 32, requires_grad=True)
    tables = model.backbone_model.rotary_emb(x, torch.arange(7)[None])
    for mask in (None, torch.randn(2, 1, 7, 7)):
        found, _ = hf_training._rotated_attention(module, x, tables, mask, None)
        theirs, _ = module(x, position_embeddings=tables, attention_mask=mask)
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
        weights = [x, module.q_proj.weight, module.k_proj.weight]
        mine, others = (torch.autograd.grad(out.square().sum(), weights) for out in (found, theirs))
        for a, b in zip(mine, others):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_restore_leaves_nothing(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    handle = ours.training_acceleration
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(p.requires_grad for p in ours.codec_model.parameters())
    handle.restore()
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == before
    assert not any("forward" in module.__dict__ for module in ours.modules())
    assert "training_acceleration" not in ours.__dict__
    batch = batch_of(model, ALL)
    inputs = stock_inputs(model, batch)
    torch.testing.assert_close(ours(**inputs).loss, model(**inputs).loss, rtol=0, atol=0)


def test_accelerating_twice_and_copies(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    twice = accelerate(ours, training=CsmTrainingConfig(depth_frames=3))
    copied = copy.deepcopy(twice)
    with torch.no_grad():
        copied.depth_decoder.codebooks_head.weight.mul_(3.0)
    batch = batch_of(model, ALL)
    batch["depth_index"] = batch["depth_index"][:3]
    assert float(copied(**batch).loss.detach()) != float(twice(**batch).loss.detach())
    copied.training_acceleration.restore()
    assert not any("forward" in module.__dict__ for module in copied.modules())
    twice.training_acceleration.restore()
    assert not any("forward" in module.__dict__ for module in twice.modules())


def test_a_pickle_is_a_stock_model(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    again = pickle.loads(pickle.dumps(ours))
    assert again.training_acceleration is None
    batch = batch_of(model, ALL)
    inputs = stock_inputs(model, batch)
    torch.testing.assert_close(again(**inputs).loss, model(**inputs).loss, rtol=0, atol=0)
    assert again(**inputs).logits is not None
    assert_same_losses(accelerate(again, training=ALL)(**batch), model(**inputs))
    again.training_acceleration.restore()
    again.eval()
    prompt = text_prompt((4,))
    fast = accelerate(again, progress=False).generate(**prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(fast, stock(model.eval(), **prompt, max_new_tokens=3, do_sample=False))


def test_without_labels_it_is_the_stock_model(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    model.eval()
    ours.eval()
    prompt = text_prompt((5, 3))
    with torch.no_grad():
        theirs, found = model(**prompt), ours(**prompt)
        torch.testing.assert_close(found.logits, theirs.logits)
        wanted = stock(model, **prompt, max_new_tokens=4, do_sample=False)
        assert torch.equal(ours.generate(**prompt, max_new_tokens=4, do_sample=False), wanted)
        both = accelerate(ours, progress=False)
        assert torch.equal(both.generate(**prompt, max_new_tokens=4, do_sample=False), wanted)
        assert both.acceleration.metrics.counters["generate.fast"] == 1


def test_state_dict_and_saving_are_stocks(pair: tuple[Any, Any], tmp_path: Any) -> None:
    model, ours = pair
    assert list(ours.state_dict()) == list(model.state_dict())
    ours.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)


def test_tuple_output(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    batch = batch_of(model, ALL)
    out = ours(**batch, return_dict=False)
    assert isinstance(out, tuple)
    torch.testing.assert_close(out[0], ours(**batch).loss)


def test_hidden_states_on_request(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    batch = batch_of(model, ALL)
    found = ours(**batch, output_hidden_states=True).hidden_states
    theirs = model(**stock_inputs(model, batch), output_hidden_states=True).hidden_states
    assert len(found) == len(theirs)
    torch.testing.assert_close(found[-1], theirs[-1])


@pytest.fixture
def trainer_runs(tmp_path: Any) -> Iterator[Callable[..., dict[str, Tensor]]]:
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    from csm_runtime.training import csm_trainer

    def run(kind: str) -> dict[str, Tensor]:
        model = build().train()
        config = CsmTrainingConfig(depth_fraction=0.5, seed=11)
        ours = accelerate(model, training=config)
        collate = CsmDataCollator(model.config, config, gradient_accumulation=2)
        examples = [turn(model, frames, i) for i, frames in enumerate((30, 3, 12, 7))]
        if kind == "by hand":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(2):
                batches = [collate([examples[2 * step + micro]]) for micro in range(2)]
                share_counts(batches)
                for batch in batches:
                    ours(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            return {name: p.detach().clone() for name, p in model.named_parameters()}
        args = TrainingArguments(
            output_dir=str(tmp_path / kind),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=2,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        from transformers import Trainer

        make = csm_trainer() if kind == "csm_trainer" else Trainer
        trainer = make(model=ours, args=args, train_dataset=examples, data_collator=collate)
        trainer.train()
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    yield run


@pytest.mark.parametrize("kind", ["csm_trainer", "Trainer"])
def test_trainer_is_not_fooled_by_its_count(trainer_runs: Callable[..., dict[str, Tensor]], kind: str) -> None:
    """Micro-batches of 31, 4, 13 and 8 frames; the thin adapter, and Trainer itself, train as a loop by hand does."""
    wanted, found = trainer_runs("by hand"), trainer_runs(kind)
    moved = build().depth_decoder.codebooks_head.weight
    assert float((wanted["depth_decoder.codebooks_head.weight"] - moved).abs().max()) > 1e-4
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# --------------------------------------------------------------------------------------------------------- noise meter


def test_noise_meter_against_all_single_frames() -> None:
    """Per-frame gradients give the noise scale directly: variance of a frame's gradient over the squared mean."""
    model = build().train()
    ours = accelerate(model, training=CsmTrainingConfig(depth_frames=1, seed=5))
    examples = [turn(model, 30, seed) for seed in range(2)]
    for example in examples:
        example["codes"][:, 1:] = torch.where(torch.rand(30, 3) < 0.8, 7, example["codes"][:, 1:])  # something to learn
    batch = CsmDataCollator(model.config, ALL)(examples)
    wanted = [p for p in model.depth_decoder.parameters() if p.requires_grad]
    frames = (batch["labels"] == AUDIO).flatten().nonzero().flatten()
    bare = {k: v for k, v in batch.items() if not k.startswith(("num_", "depth_"))}
    single = []
    for place in frames:
        loss = ours(**bare, depth_index=place[None]).depth_decoder_loss
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        single.append(torch.cat([g.flatten() for g in grads if g is not None]))
    rows = torch.stack(single).double()
    noise = float(rows.var(0).sum())
    signal = float(rows.mean(0).square().sum()) - noise / len(rows)  # the mean of so many frames is noisy itself
    meter = DepthGradientNoiseScale(ours, num_frames=16, decay=0.98)
    for step in range(150):
        meter.measure(batch, step)
    reading = meter.reading(frames_per_step=1000)
    assert reading.noise_scale == pytest.approx(noise / signal, rel=0.35)
    assert 0 < reading.depth_fraction <= 1
    assert reading.depth_frames == pytest.approx(1000 * reading.depth_fraction, abs=1)
    wide = meter.reading(frames_per_step=1_000_000)
    assert wide.depth_fraction < reading.depth_fraction
    assert wide.depth_frames > reading.depth_frames


def test_noise_meter_leaves_gradients_and_mode_alone() -> None:
    model = build().eval()
    ours = accelerate(model, training=CsmTrainingConfig())
    meter = DepthGradientNoiseScale(ours, num_frames=4)
    assert meter.reading(100).depth_frames == 100
    meter.measure(batch_of(model, ALL), 0)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    meter.measure(CsmDataCollator(model.config, ALL)([{"text_ids": torch.arange(4)}]), 1)  # nothing to measure on


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depth_fraction", 1.5),
        ("depth_fraction", 0.0),
        ("depth_fraction", float("nan")),
        ("depth_frames", 0),
        ("depth_frames", 2.5),
        ("min_depth_frames", 0),
        ("depth_loss_weight", -1.0),
        ("backbone_loss_weight", float("inf")),
        ("z_loss", -0.1),
        ("seed", 1.5),
        ("data_parallel_rank", -1),
    ],
)
def test_config_errors_name_the_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        CsmTrainingConfig(**{name: value})


BAD_EXAMPLES: dict[str, tuple[Any, str]] = {
    "no examples": ([], "examples is empty"),
    "not a dict": ([3], r"examples\[0\]"),
    "no text": ([{"codes": torch.zeros(3, 4, dtype=torch.long)}], "text_ids"),
    "codebooks": ([{"text_ids": [1], "codes": torch.zeros(3, 5, dtype=torch.long)}], r"\['codes'\].*\(3, 5\)"),
    "float codes": ([{"text_ids": [1], "codes": torch.zeros(3, 4)}], "integers"),
    "code out of range": ([{"text_ids": [1], "codes": torch.full((3, 4), 99)}], "from 0 to 31"),
    "turns": ([{"turns": []}], "turns"),
    "nothing": ([{"text_ids": []}], "neither text nor audio"),
}


@pytest.mark.parametrize("name", BAD_EXAMPLES)
def test_collator_errors_say_what_is_wrong(name: str) -> None:
    examples, message = BAD_EXAMPLES[name]
    with pytest.raises(ValueError, match=message):
        CsmDataCollator(build().config, ALL)(examples)


def test_forward_errors_name_the_argument(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    batch = batch_of(model, ALL)
    with pytest.raises(ValueError, match="audio_codes"):
        ours(**{**batch, "audio_codes": batch["audio_codes"][:, :-1]})
    with pytest.raises(ValueError, match="labels"):
        ours(**{**batch, "labels": batch["labels"][:, :-1]})
    with pytest.raises(ValueError, match="neither audio_codes nor input_values"):
        ours(input_ids=batch["input_ids"], labels=batch["labels"])
    with pytest.raises(ValueError, match="without labels"):
        ours(input_ids=batch["input_ids"], audio_codes=batch["audio_codes"])
    with pytest.raises((IndexError, RuntimeError), match="(?i)index|range"):
        ours(**{**batch, "audio_codes": torch.where(batch["audio_codes"] > 0, 10_000, 0)})


def test_errors_of_the_call() -> None:
    with pytest.raises(TypeError, match="CsmForConditionalGeneration"):
        accelerate(torch.nn.Linear(2, 2), training=True)
    with pytest.raises(TypeError, match="training must be True or a CsmTrainingConfig"):
        accelerate(build(), training=0.5)
    with pytest.raises(ValueError, match="accelerate"):
        DepthGradientNoiseScale(build())
    with pytest.raises(ValueError, match="batches"):
        share_counts([])
    with pytest.raises(ValueError, match="CsmDataCollator"):
        share_counts([{"input_ids": torch.zeros(1)}])
