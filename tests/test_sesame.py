"""Sesame's stack under ``accelerate()``: the same frames from the same calls, whatever happens on the way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchtune", reason="the extra 'sesame' is not installed")

import sesame_models as sesame
from scipy.stats import chi2_contingency

from csm_runtime import PrecisionPolicy, accelerate
from csm_runtime.adapters.sesame import Twin, halves, matches
from csm_runtime.context import prioritize_context, sound_positions
from csm_runtime.engine import Engine
from csm_runtime.guard import FAST, STOCK, GuardConfig
from csm_runtime.sesame import GeneratorCodec

QUIET = {"progress": False, "guard": False, "mode": "eager"}
"""Steps as they are: what is tested here is what stands around them."""


def prompt_of(
    model: Any, rows: int = 1, length: int = 9, text: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Text, then frames of codes: tokens, mask and positions."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    shape = (rows, length, config.audio_num_codebooks + 1)
    tokens = torch.randint(0, config.audio_vocab_size, shape, generator=generator)
    tokens[..., -1] = torch.randint(0, config.text_vocab_size, shape[:2], generator=generator)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, :text, -1] = mask[:, text:, :-1] = True
    return tokens, mask, torch.arange(length).expand(rows, -1)


def fed_back(frame: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the generator feeds after a frame."""
    none = torch.zeros(len(frame), 1, dtype=torch.long)
    tokens = torch.cat([frame, none], dim=1).unsqueeze(1)
    mask = torch.cat([torch.ones_like(frame).bool(), none.bool()], dim=1).unsqueeze(1)
    return tokens, mask, positions[:, -1:] + 1


@torch.inference_mode()
def frames_of(model: Any, count: int = 8, topk: int = 1, temperature: float = 0.9, **prompt: Any) -> Tensor:
    """``[B, count, C]`` frames behind a prompt, as the generator's loop makes them."""
    model.reset_caches()
    call, out = prompt_of(model, **prompt), []
    for _ in range(count):
        out.append(model.generate_frame(*call, temperature, topk))
        call = fed_back(out[-1], call[2])
    return torch.stack(out, dim=1)


def ready(preset: str = "tiny", rows: int = 1, **options: Any) -> Any:
    model = sesame.build(preset, **options)
    model.setup_caches(rows)
    return model


def counters(model: Any) -> dict[str, int]:
    return model.acceleration.metrics.snapshot()["counters"]


# ------------------------------------------------------------------------------------------------------ the same frames


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("preset", ["tiny", "unscaled", "wide", "fork"])
def test_greedy_frames_equal_the_stock_models(preset: str, rows: int) -> None:
    model = ready(preset, rows)
    wanted = frames_of(model, rows=rows)
    accelerate(model, progress=False, max_positions=256)
    made = frames_of(model, rows=rows)
    assert made.dtype == wanted.dtype == torch.int32
    assert torch.equal(made, wanted)
    assert counters(model)["frames"] == 8 * rows
    assert "generate.stock" not in counters(model)
    assert len(wanted.unique()) > 5, "greedy frames of this model say nothing"


@pytest.mark.parametrize("precision", ["exact", "int8", "int4"])
def test_frames_of_the_real_number_of_codebooks(precision: str) -> None:
    model = ready("codebooks")
    wanted = frames_of(model)
    accelerate(model, progress=False, precision=precision, max_positions=64)
    made = frames_of(model)
    assert made.shape == wanted.shape
    if precision == "exact":
        assert torch.equal(made, wanted)


def test_positions_beyond_llamas_first_context() -> None:
    """Where the scaled rotary table differs most, at the end of a table longer than 8192."""
    model = ready("long")
    wanted = frames_of(model, count=3, length=8200, text=8100)
    accelerate(model, **QUIET, max_positions=8300)
    assert torch.equal(frames_of(model, count=3, length=8200, text=8100), wanted)


def test_bf16_with_its_rounded_rotary_table() -> None:
    model = ready("codebooks", dtype=torch.bfloat16)
    twin = Twin(model, None)
    table = model.backbone.layers[0].attn.pos_embeddings.cache
    assert table.dtype == torch.bfloat16
    cos, sin = twin.module.backbone_model.rotary_emb(torch.zeros(1), torch.arange(50)[None])
    half = cos.shape[-1] // 2
    assert torch.equal(cos[0, :, :half], table[:50, :, 0].float())
    assert torch.equal(sin[0, :, half:], table[:50, :, 1].float())
    accelerate(model, **QUIET)
    made = frames_of(model)
    assert made.shape == (1, 8, 32) and "generate.stock" not in counters(model)


def test_sampled_frames_have_the_stock_models_distribution() -> None:
    model, draws = ready(), 400

    def drawn() -> Tensor:
        with torch.inference_mode():
            out = []
            for _ in range(draws):
                model.reset_caches()
                out.append(model.generate_frame(*prompt_of(model), 0.9, 6))
            return torch.cat(out)

    torch.manual_seed(0)
    wanted = drawn()
    accelerate(model, **QUIET, voices=False)
    made = drawn()
    for codebook in range(2):  # later ones have too many values for so few draws
        values = torch.cat([made, wanted])[:, codebook].unique()
        table = [[int((part[:, codebook] == value).sum()) for value in values] for part in (made, wanted)]
        kept = [column for column in zip(*table) if sum(column) >= 10]
        assert len(kept) >= 3
        assert chi2_contingency(list(zip(*kept))).pvalue > 1e-4, (codebook, table)


def test_seed_of_torch_decides() -> None:
    model = accelerate(ready(), **QUIET)
    torch.manual_seed(1)
    first = frames_of(model, topk=10)
    torch.manual_seed(1)
    assert torch.equal(frames_of(model, topk=10), first)
    torch.manual_seed(2)
    assert not torch.equal(frames_of(model, topk=10), first)


def test_end_of_speech_is_a_frame_of_zeros() -> None:
    model = ready()
    with torch.no_grad():
        model.codebook0_head.weight.zero_()
        model.audio_head.zero_()
    accelerate(model, **QUIET)
    assert not frames_of(model).any()


def test_odd_calls_equal_stock() -> None:
    """Text behind frames, several frames at once, text alone, frames that nobody drew."""
    model = ready()

    @torch.inference_mode()
    def odd() -> Tensor:
        model.reset_caches()
        tokens, mask, _ = prompt_of(model, length=14, text=6)
        mask[:, 10:12], mask[:, 10:12, -1] = False, True
        mask[:, 13, -1] = True  # a frame that holds both
        out, at = [], 0
        for size in (4, 3, 1, 1, 2, 1, 1, 1):
            part = slice(at, at + size)
            out.append(model.generate_frame(tokens[:, part], mask[:, part], torch.arange(at, at + size)[None], 1.0, 1))
            at += size
        return torch.stack(out)

    wanted = odd()
    accelerate(model, **QUIET)
    assert torch.equal(odd(), wanted)
    assert "generate.stock" not in counters(model)


# -------------------------------------------------------------------------------------------------------- the generator


def segments() -> list[Any]:
    def segment(seconds: float, text: str, speaker: int) -> Any:
        audio = 0.1 * torch.randn(int(24000 * seconds), generator=torch.Generator().manual_seed(int(10 * seconds)))
        return sesame.Segment(text=text, speaker=speaker, audio=audio)

    return [segment(0.8, "hello there", 0), segment(0.4, "well", 1)]


SPEECH = ("some text", 0, segments())
GREEDY = {"max_audio_length_ms": 800, "topk": 1}


@pytest.mark.parametrize("kind", [sesame.Generator, sesame.StreamingGenerator])
def test_generator_speaks_the_same(kind: Any) -> None:
    generator = kind(sesame.build("fork"))
    wanted, marks = generator.generate(*SPEECH, **GREEDY), list(generator._watermarker.calls)
    streams = hasattr(generator, "generate_stream")
    wanted_chunks = list(generator.generate_stream(*SPEECH, **GREEDY)) if streams else []
    assert accelerate(generator, **QUIET) is generator
    generator._watermarker.calls.clear()
    assert torch.equal(generator.generate(*SPEECH, **GREEDY), wanted)
    assert generator._watermarker.calls == marks
    if streams:
        made = list(generator.generate_stream(*SPEECH, **GREEDY))
        assert [len(chunk) for chunk in made] == [len(chunk) for chunk in wanted_chunks]
        assert all(torch.equal(a, b) for a, b in zip(made, wanted_chunks))
    assert "generate.stock" not in counters(generator)


def test_references_are_encoded_and_prefilled_once() -> None:
    generator = sesame.Generator(sesame.build("fork"))
    wanted = generator.generate(*SPEECH, **GREEDY)
    accelerate(generator, **QUIET)
    for _ in range(3):
        assert torch.equal(generator.generate(*SPEECH, **GREEDY), wanted)
    found = counters(generator)
    assert (found["recordings.encoded"], found["recordings.known"]) == (2, 4)
    assert (found["voices.miss"], found["voices.hit"]) == (1, 2)
    with torch.no_grad():
        generator._audio_tokenizer.tables.mul_(-1.0)
    stock = copy.deepcopy(generator._model)
    generator.generate(*SPEECH, **GREEDY)
    assert counters(generator)["recordings.encoded"] == 4, "codes of another codec"
    assert not hasattr(stock.generate_frame, "is_accelerated")


def test_weights_that_change_are_followed() -> None:
    model = ready("wide")
    accelerate(model, **QUIET)
    before = frames_of(model)
    changes = {
        "in place": lambda: model.backbone.layers[0].attn.q_proj.weight.data.mul_(-1.0),
        "keys": lambda: model.decoder.layers[0].attn.k_proj.weight.data.add_(0.3),
        "values": lambda: model.backbone.layers[1].attn.v_proj.weight.data.mul_(2.0),
        "loaded": lambda: model.load_state_dict(sesame.build("wide", seed=5).state_dict(), strict=False),
        "replaced": lambda: setattr(model.decoder.layers[0].attn.q_proj, "weight", nn.Parameter(torch.randn(48, 48))),
    }
    for name, change in changes.items():
        with torch.no_grad():
            change()
        stock = copy.deepcopy(model)
        made = frames_of(model)
        assert torch.equal(made, frames_of(stock)), name
        assert not torch.equal(made, before), name
        before = made
    model.to(torch.bfloat16)
    model.setup_caches(1)
    frames_of(model)
    assert model.acceleration.report().dtype == "bfloat16"


def test_stacks_under_torch_compile() -> None:
    """The streaming forks wrap both stacks in torch.compile when they load."""
    model = ready()
    wanted = frames_of(model)
    model.backbone = torch.compile(model.backbone, backend="eager")
    model.decoder = torch.compile(model.decoder, backend="eager")
    assert matches(model)
    accelerate(model, **QUIET)
    assert torch.equal(frames_of(model), wanted)
    assert "generate.stock" not in counters(model)


def test_halves_are_rows_of_a_head() -> None:
    rows = torch.arange(12.0)[:, None].expand(-1, 2)
    assert halves(rows, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


# ------------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("at", [0, 3])
def test_a_fault_hands_over_to_stock(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    model = ready()
    wanted = frames_of(model)
    accelerate(model, **QUIET)
    stock, calls = Engine.next_frame, []

    def broken(self: Engine, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        if len(calls) > at:
            raise RuntimeError("injected")
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "next_frame", broken)
    assert torch.equal(frames_of(model), wanted)
    assert model.acceleration.guard.rung == STOCK
    assert torch.equal(frames_of(model), wanted), "the next utterance, on the stock path from its start"
    monkeypatch.undo()
    model.acceleration.guard.rearm()
    assert torch.equal(frames_of(model), wanted)
    assert model.acceleration.guard.rung != STOCK


def test_what_the_guard_finds_is_made_on_a_safer_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that the caller has cannot be taken back; those from the finding on are another rung's."""
    model = ready("codebooks")
    wanted = frames_of(model, count=5)
    accelerate(model, progress=False, guard=GuardConfig(budget=1e9))
    stock, handle = Engine.emit, model.acceleration

    def wrong(self: Engine, runner: Any) -> None:
        stock(self, runner)
        if not self.plain and handle.guard.rung == FAST and int(runner.state.frame.max()) >= 5:
            runner.state.codes[:, 3:] = (runner.state.codes[:, 3:] + 7) % 35

    monkeypatch.setattr(Engine, "emit", wrong)
    made = frames_of(model, count=40)
    assert torch.equal(made[:, :5], wanted)
    assert handle.guard.events and handle.guard.rung != FAST
    assert handle.guard.events[0].tensors


def test_calls_of_another_kind_go_to_stock() -> None:
    model = ready()
    tokens, mask, positions = prompt_of(model)
    accelerate(model, **QUIET)
    with torch.inference_mode():
        model.reset_caches()
        later = model.generate_frame(tokens, mask, positions + 3, 0.9, 1)
        model.acceleration.restore()
        model.reset_caches()
        assert torch.equal(later, model.generate_frame(tokens, mask, positions + 3, 0.9, 1))


def test_more_positions_than_the_buffer_go_on_with_stock() -> None:
    model = ready()
    wanted = frames_of(model, count=10)
    accelerate(model, **QUIET, max_positions=12)
    assert torch.equal(frames_of(model, count=10), wanted)
    assert counters(model)["generate.stock"] == 1


def test_errors_of_the_stock_call_stay_its_own() -> None:
    model = sesame.build("tiny")
    accelerate(model, **QUIET)
    with pytest.raises(AssertionError, match="caches"):
        model.generate_frame(*prompt_of(model), 0.9, 1)
    model.setup_caches(1)
    with pytest.raises(Exception):  # noqa: B017 (torchtune's own, of more rows than its caches hold)
        model.generate_frame(*prompt_of(model, rows=2), 0.9, 1)
    model.reset_caches()
    with pytest.raises(RuntimeError):
        model.generate_frame(*prompt_of(model), 0.9, 10_000)


def test_modified_modules() -> None:
    model = ready()
    accelerate(model, **QUIET)

    class Lora(nn.Linear):
        pass

    model.backbone.layers[0].attn.q_proj.__class__ = Lora
    frames_of(model)
    assert counters(model)["generate.stock"] == 1
    model.backbone.layers[0].attn.q_proj.__class__ = nn.Linear
    model.acceleration.restore()
    hook = model.backbone.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"backbone\.layers\.0 has forward hooks"):
        accelerate(model, **QUIET)
    hook.remove()
    accelerate(model, **QUIET)
    frames_of(model)
    assert "generate.stock" not in counters(model)


def test_restored_and_copied_models_are_stock() -> None:
    generator = sesame.Generator(sesame.build("tiny"))
    model = generator._model
    wanted = frames_of(model)
    accelerate(generator, **QUIET)
    accelerate(generator, **QUIET)  # again: one of us is enough
    copied = copy.deepcopy(model)
    assert torch.equal(frames_of(copied), wanted)
    generator.acceleration.restore()
    assert not hasattr(generator, "acceleration") and not hasattr(model, "acceleration")
    assert not {"generate_frame", "reset_caches", "setup_caches"} & set(vars(model))
    assert "_tokenize_audio" not in vars(generator)
    assert torch.equal(frames_of(model), wanted)


def test_what_is_not_of_this_structure() -> None:
    with pytest.raises(TypeError, match="Sesame"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="drop_originals"):
        accelerate(ready(), drop_originals=True)
    with pytest.raises(ValueError, match="max_positions must be at most the 2048"):
        accelerate(ready(), max_positions=5000)
    odd = ready()
    odd.audio_head = nn.Parameter(odd.audio_head[:-1].detach())
    with pytest.raises(ValueError, match="codebooks"):
        accelerate(odd, **QUIET)


def test_policy_and_report() -> None:
    model = ready("codebooks")
    policy = PrecisionPolicy((("depth.*", "int8"),), name="mine")
    accelerate(model, progress=False, precision=policy, max_positions=64)
    report = model.acceleration.report()
    assert report.policy == "mine" and report.capacity == 64 and report.model == "Model"
    assert "int8" in str(report)


# ------------------------------------------------------------------------------------- streams, batches, voices, by text

TEXT = {"text": "some text", "speaker": 0, "max_audio_length_ms": 800, "topk": 1}


def codes_of(generator: Any, **call: Any) -> Tensor:
    """``[F, C]`` of the stock loop, the frame that ends speech not among them."""
    text, speaker, context = call["text"], call["speaker"], call.get("context", [])
    with torch.inference_mode():
        generator._model.reset_caches()
        prompt, mask = generator._prompt(text, speaker, context)
        frames = list(generator._speak(prompt, mask, call["max_audio_length_ms"] // 80, 0.9, call["topk"]))
    return torch.cat(frames).long()


@pytest.mark.parametrize("chunk_frames", [1, (2, 3)])
def test_streams_are_the_offline_sound(chunk_frames: Any) -> None:
    generator = sesame.Generator(sesame.build("fork"))
    wanted = generator._decode(list(codes_of(generator, **TEXT, context=segments())[:, None]))
    accelerate(generator, **QUIET)
    with generator.acceleration.stream(**TEXT, context=segments(), chunk_frames=chunk_frames) as stream:
        chunks = list(stream)
    made = torch.cat([chunk.samples for chunk in chunks])
    assert chunks[0].frames == (chunk_frames if isinstance(chunk_frames, int) else chunk_frames[0])
    assert made.dtype == torch.float32 and made.shape == wanted.shape
    assert float((made - wanted).abs().max()) < 1e-4


def test_batches_speak_what_each_speaks_alone() -> None:
    generator = sesame.Generator(sesame.build("fork"))
    calls = [{**TEXT, "text": f"text number {n}", "speaker": n % 2} for n in range(5)]
    wanted = [codes_of(generator, **call) for call in calls]
    accelerate(generator, **QUIET)
    with generator.acceleration.batcher(slots=2) as batcher:
        utterances = [batcher.submit(**call) for call in calls]
        made = [utterance.result(60) for utterance in utterances]
        sound = utterances[0].audio(60)
    assert all(torch.equal(a, b) for a, b in zip(made, wanted))
    assert len(sound) == 1920 * len(wanted[0])


def test_a_stream_beside_an_utterance_of_the_callers_own() -> None:
    generator = sesame.Generator(sesame.build("fork"))
    model, wanted = generator._model, frames_of(generator._model)
    accelerate(generator, **QUIET)
    with torch.inference_mode():
        model.reset_caches()
        call, out = prompt_of(model), []
        for number in range(8):
            if number == 3:
                with generator.acceleration.stream(**TEXT) as stream:
                    assert len(list(stream)) == 10
            out.append(model.generate_frame(*call, 0.9, 1))
            call = fed_back(out[-1], call[2])
    assert torch.equal(torch.stack(out, dim=1), wanted)


@pytest.mark.parametrize("stumbles", [0, 4])
def test_streams_and_batches_on_the_stock_path(monkeypatch: pytest.MonkeyPatch, stumbles: int) -> None:
    """From the start, and after a fault in the middle; beside an utterance of the caller's own on the stock path."""
    generator = sesame.Generator(sesame.build("fork"))
    model, own = generator._model, frames_of(generator._model)
    wanted = codes_of(generator, **TEXT)
    accelerate(generator, **QUIET)
    stock, calls = Engine.next_frame, []

    def broken(self: Engine, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        if len(calls) > stumbles:
            raise RuntimeError("injected")
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "next_frame", broken)
    with generator.acceleration.batcher(slots=2) as batcher:
        assert torch.equal(batcher.submit(**TEXT).result(60), wanted)
    with torch.inference_mode():
        model.reset_caches()
        call, out = prompt_of(model), []
        for number in range(8):
            if number == 3:
                with generator.acceleration.stream(**TEXT, chunk_frames=4) as stream:
                    sound = torch.cat([chunk.samples for chunk in stream])
            out.append(model.generate_frame(*call, 0.9, 1))
            call = fed_back(out[-1], call[2])
    assert torch.equal(torch.stack(out, dim=1), own)
    assert len(sound) == 1920 * len(wanted)


def test_a_stream_whose_frames_fail_is_spoken_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = sesame.Generator(sesame.build("fork"))
    wanted = generator._decode(list(codes_of(generator, **TEXT)[:, None]))
    accelerate(generator, **QUIET)
    stock, calls = Engine.next_frame, []

    def broken(self: Engine, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        if len(calls) > 6:
            raise RuntimeError("injected")
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "next_frame", broken)
    with generator.acceleration.stream(**TEXT, chunk_frames=4) as stream:
        made = torch.cat([chunk.samples for chunk in stream])
    assert made.shape == wanted.shape and float((made - wanted).abs().max()) < 1e-4


def test_voices_before_anybody_speaks() -> None:
    generator = sesame.Generator(sesame.build("fork"))
    wanted = codes_of(generator, **TEXT, context=segments())
    accelerate(generator, **QUIET)
    profile = generator.acceleration.add_voice(context=segments())
    assert profile.positions > 15
    with generator.acceleration.batcher(slots=1) as batcher:
        assert torch.equal(batcher.submit(**TEXT, context=segments()).result(60), wanted)
    assert counters(generator)["voices.hit"] == 1
    with pytest.raises(ValueError, match="context"):
        generator.acceleration.add_voice(text="no reference")


def test_calls_of_a_model_alone_are_tokens() -> None:
    model = ready()
    wanted = frames_of(model, count=6)
    accelerate(model, **QUIET)
    tokens, mask, _ = prompt_of(model)
    call = {"tokens": tokens, "tokens_mask": mask, "max_audio_length_ms": 480, "topk": 1}
    with model.acceleration.batcher(slots=1) as batcher:
        assert torch.equal(batcher.submit(**call).result(60), wanted[0].long())
        with pytest.raises(TypeError, match="tokens"):
            batcher.submit(text="hello", speaker=0)
        with pytest.raises(TypeError, match="top_k"):
            batcher.submit(**call, top_k=3)
        with pytest.raises(ValueError, match="topk must be"):
            batcher.submit(**{**call, "topk": 0})
        with pytest.raises(ValueError, match="temperature"):
            batcher.submit(**call, temperature=0.0)
        with pytest.raises(ValueError, match="tokens and tokens_mask"):
            batcher.submit(**{**call, "tokens_mask": mask[:, :-1]})
        with pytest.raises(ValueError, match="max_audio_length_ms"):
            batcher.submit(**{**call, "max_audio_length_ms": 10})
        late = batcher.submit(**{**call, "max_audio_length_ms": 10**6})
        with pytest.raises(ValueError, match="too long"):
            late.result(60)


def test_context_is_chosen_among_sesames_segments() -> None:
    many = [sesame.Segment(text=f"turn {n}", speaker=n % 2, audio=torch.zeros(24000)) for n in range(20)]
    choice = prioritize_context(many, "what is said", speaker=0, budget=120, count=sound_positions)
    assert 2 <= len(choice.segments) < 20 and all(type(one) is sesame.Segment for one in choice.segments)


def test_streams_side_by_side_share_moshis_codec() -> None:
    """Each with a state of its own, beside the caller's own streaming."""
    pytest.importorskip("moshi", reason="moshi is not installed: it pins older versions of torch and numpy")
    tokenizer = sesame.small_mimi(4, bins=35)
    codec = GeneratorCodec(tokenizer)
    codes = [torch.randint(0, 35, (1, 9, 4), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    with torch.no_grad():
        wanted = [codec.decode(one.transpose(1, 2)).audio_values[:, 0] for one in codes]
        streams, made = [codec.stream(), codec.stream()], [[], [], []]
        with tokenizer.streaming(1):
            for start in range(0, 9, 3):
                for number, stream in enumerate(streams):
                    made[number].append(stream.decode(codes[number][:, start : start + 3]))
                made[2].append(tokenizer.decode(codes[2][:, start : start + 3].transpose(1, 2))[:, 0])
    assert not tokenizer.is_streaming
    for parts, whole in zip(made, wanted):
        assert float((torch.cat(parts, dim=-1) - whole).abs().max()) < 1e-4 * max(1.0, float(whole.abs().max()))
    with pytest.raises(IndexError, match="0 to 34"):
        streams[0].decode(codes[0] + 40)
