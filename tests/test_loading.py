"""Loading straight from files: the same weights as ``from_pretrained``, little memory, clear errors."""

from __future__ import annotations

import copy
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from csm_models import TRAINED, Recorder, assert_same_puts, audio_prompt, build, on_fast_path, text_prompt
from safetensors.torch import load_file, save_file
from transformers import CsmForConditionalGeneration

from csm_kernels import cpu
from csm_runtime import PrecisionPolicy, accelerate, loading, tensor_files
from csm_runtime.accelerate import Acceleration
from csm_runtime.adapters import hf, hf_loading, hf_passes
from csm_runtime.adapters.hf_passes import Passes
from csm_runtime.checkpoints import load_model, load_processor, prepare_inputs
from csm_runtime.loading import Loading, load
from csm_runtime.precision import resolve_policy
from csm_runtime.small_model import SmallProcessor, build_small_csm
from csm_runtime.tensor_files import StoredTensor, stored_tensors
from csm_runtime.weights import PackedWeights, named_sources

OPTIONS: dict[str, Any] = dict(mode="eager", progress=False, guard=False)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def saved(folder: Path, name: str = "base", shards: str = "1GB", **options: Any) -> Path:
    build(name, **options).save_pretrained(folder, max_shard_size=shards)
    return folder


def assert_same_tensors(got: Any, want: Any) -> None:
    for kind in ("state_dict", "named_buffers"):
        ours, theirs = dict(getattr(got, kind)()), dict(getattr(want, kind)())
        assert list(ours) == list(theirs)
        for key, tensor in theirs.items():
            assert (ours[key].dtype, ours[key].device) == (tensor.dtype, tensor.device), key
            assert torch.equal(ours[key], tensor), key


def speech(model: Any) -> torch.Tensor:
    with on_fast_path(model):
        return model.generate(**text_prompt((3, 5)), max_new_tokens=4, do_sample=False, depth_decoder_do_sample=False)


# ---------------------------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("shards", ["1GB", "20KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("name", ["base", "tied", "untied", "biases", "norms", "llama3"])
def test_state_equals_that_of_from_pretrained(tmp_path: Path, name: str, shards: str) -> None:
    saved(tmp_path, name, shards=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shards == "20KB")
    want = load_model(str(tmp_path))
    got = load(tmp_path, **OPTIONS)
    assert_same_tensors(got, want)
    assert type(got) is CsmForConditionalGeneration and not got.training
    assert got.config.to_dict() == want.config.to_dict()
    for one, other in ((got, want), (got.depth_decoder, want.depth_decoder)):
        assert one.generation_config.to_dict() == other.generation_config.to_dict()
    asked = {key: p.requires_grad for key, p in want.named_parameters()}
    assert {key: p.requires_grad for key, p in got.named_parameters()} == asked
    one = got.backbone_model.embed_tokens.embed_audio_tokens.weight is got.depth_decoder.model.embed_tokens.weight
    assert one == (name == "tied")


def test_a_trained_checkpoint() -> None:
    got, want = load(TRAINED, precision="int8", **OPTIONS), load_model(str(TRAINED))
    assert_same_packed(got, accelerate(want, precision="int8", drop_originals=True, **OPTIONS))


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", [None, *DTYPES])
def test_dtypes(tmp_path: Path, stored: str, wanted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "_PIECE", 100)  # conversions of several pieces, and an uneven last one
    saved(tmp_path, dtype=DTYPES[stored])
    dtype = None if wanted is None else DTYPES[wanted]
    want = CsmForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype or "auto")
    want.codec_model.float()
    got = load(tmp_path, dtype=dtype, **OPTIONS)
    assert_same_tensors(got, want)
    assert got.dtype == (dtype or DTYPES[stored]) and got.codec_model.dtype == torch.float32


@pytest.mark.parametrize("precision", ["stock", "balanced", "int8", "int4", "smallest"])
@pytest.mark.parametrize("name", ["base", "tied"])
def test_speech_and_packed_weights_equal_those_of_accelerate(tmp_path: Path, name: str, precision: str) -> None:
    saved(tmp_path, name, shards="50KB")
    want = accelerate(load_model(str(tmp_path)), precision=precision, drop_originals=precision != "stock", **OPTIONS)
    got = load(tmp_path, precision=precision, **OPTIONS)
    assert_same_packed(got, want)
    assert torch.equal(speech(got), speech(want))
    assert got.acceleration.originals_dropped == (precision != "stock")


@pytest.mark.skipif(cpu.why_not() is not None, reason=f"native kernels: {cpu.why_not()}")
def test_native_frames(tmp_path: Path) -> None:
    saved(tmp_path, "untied")
    options = {**OPTIONS, "mode": "native", "precision": "int4"}
    want = accelerate(load_model(str(tmp_path)), drop_originals=True, **options)
    got = load(tmp_path, **options)
    assert torch.equal(speech(got), speech(want))


def assert_same_packed(got: Any, want: Any) -> None:
    """Copies, what is on the meta device, whose forward is replaced, and what the report says."""
    ours, theirs = got.acceleration._weights._copies, want.acceleration._weights._copies
    assert set(ours) == set(theirs)
    for name, copy_ in theirs.items():
        assert torch.equal(ours[name].checksum, copy_.checksum), name
        assert type(ours[name].packed) is type(copy_.packed)
        assert (ours[name].format, ours[name].zones, ours[name].energy) == (
            copy_.format,
            copy_.zones,
            copy_.energy,
        ), name
        assert (ours[name].fingerprint is None) == (copy_.fingerprint is None), name
    if {"backbone.embedding", "depth.embedding"} <= set(ours):
        one, other = (kept["backbone.embedding"].packed is kept["depth.embedding"].packed for kept in (ours, theirs))
        assert one == other
    replaced = [
        {key: type(m.__dict__["forward"]).__name__ for key, m in model.named_modules() if "forward" in m.__dict__}
        for model in (got, want)
    ]
    assert replaced[0] == replaced[1]
    tensors = [{key: (t.device, t.dtype, t.shape) for key, t in model.state_dict().items()} for model in (got, want)]
    assert tensors[0] == tensors[1]
    for key, tensor in want.state_dict().items():
        if not tensor.is_meta:
            assert torch.equal(got.state_dict()[key], tensor), key
    reports = [model.acceleration.report() for model in (got, want)]
    assert reports[0].zones == reports[1].zones and reports[0].notes == reports[1].notes
    assert reports[0].copied_bytes == reports[1].copied_bytes
    assert got.acceleration._weights.corrupted() == []


MIXED = PrecisionPolicy(
    (
        ("backbone.head", "fp16"),
        ("backbone.attention", "int4"),
        ("depth.attention", "fp8"),
        ("depth.mlp", "bf16"),
        ("depth.head.1", "int8"),
        ("depth.embedding", "int8"),
    )
)
"""One of two tied tables is freed and the other one stays; so do heads of which one is not quantised."""


@pytest.mark.parametrize("name", ["base", "tied", "biases"])
def test_mixed_policies(tmp_path: Path, name: str) -> None:
    saved(tmp_path, name)
    want = accelerate(load_model(str(tmp_path)), precision=MIXED, drop_originals=True, **OPTIONS)
    got = load(tmp_path, precision=MIXED, **OPTIONS)
    assert_same_packed(got, want)
    assert torch.equal(speech(got), speech(want))


def test_with_the_guard_and_warm_up(tmp_path: Path) -> None:
    saved(tmp_path)
    model = load(tmp_path, precision="int8", mode="eager", progress=False)
    speech(model)
    assert model.acceleration.guard.floors and not model.acceleration.notes


def test_restore_and_saving(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    for model in (
        load(tmp_path / "a", **OPTIONS),
        load(tmp_path / "a", precision="int8", drop_originals=False, **OPTIONS),
    ):
        speech(model)
        model.acceleration.restore()
        assert not {"acceleration", "generate"} & set(model.__dict__)
        want = load_model(str(tmp_path / "a"))
        assert_same_tensors(model, want)
        prompt = dict(text_prompt((4,)), max_new_tokens=3, do_sample=False, depth_decoder_do_sample=False)
        assert torch.equal(model.generate(**prompt), want.generate(**prompt))
        model.save_pretrained(tmp_path / "b")
        assert_same_tensors(load(tmp_path / "b", **OPTIONS), want)
    with pytest.raises(RuntimeError, match="dropped"):
        load(tmp_path / "a", precision="int8", **OPTIONS).acceleration.restore()


def test_nothing_to_drop_is_said_where_it_was_asked_for(tmp_path: Path) -> None:
    saved(tmp_path)
    assert load(tmp_path, **OPTIONS).acceleration.notes == []
    model = load(tmp_path, drop_originals=True, **OPTIONS)
    assert "nothing to drop" in model.acceleration.notes[0] and not model.acceleration.originals_dropped


def test_packed_cache_is_shared_with_accelerate(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    first = accelerate(
        load_model(str(tmp_path / "model")),
        precision="int8",
        packed_cache=tmp_path / "cache",
        drop_originals=True,
        **OPTIONS,
    )
    for mapped in (False, True):
        options: dict[str, Any] = {**OPTIONS, "map_packed": mapped}
        model = load(tmp_path / "model", precision="int8", packed_cache=tmp_path / "cache", **options)
        counters = model.acceleration.metrics.counters
        assert counters["packed_cache.loaded"] == len(model.acceleration._weights._copies)
        assert counters["packed_cache.written"] == 0 and model.acceleration.originals_dropped
        assert torch.equal(speech(model), speech(first))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["backbone_model.layers.1.mlp.up_proj.weight"][3, 4] += 0.5
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    changed = load(tmp_path / "model", precision="int8", packed_cache=tmp_path / "cache", **OPTIONS)
    counters = changed.acceleration.metrics.counters
    assert counters["packed_cache.written"] == 1
    want = accelerate(load_model(str(tmp_path / "model")), precision="int8", drop_originals=True, **OPTIONS)
    assert_same_packed(changed, want)


def test_what_needs_the_whole_model_gets_it(tmp_path: Path) -> None:
    saved(tmp_path)
    model = load(tmp_path, precision="int4", rounding="gptq", **OPTIONS)
    want = accelerate(load_model(str(tmp_path)), precision="int4", rounding="gptq", drop_originals=True, **OPTIONS)
    assert_same_packed(model, want)
    with pytest.raises(ValueError, match="background"):
        load(tmp_path, precision="auto", background=True, **OPTIONS)


@pytest.mark.parametrize("background", [False, True])
def test_the_processor_of_a_small_model(tmp_path: Path, background: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = dict(layers=1, hidden=256, depth_layers=1, depth_hidden=64, codebooks=4)
    small = build_small_csm(1, **sizes, dtype=torch.bfloat16)
    small.save_pretrained(tmp_path)
    SmallProcessor(small).save_pretrained(tmp_path)
    gate = Gate(monkeypatch, "codec_model.")
    if not background:
        gate.open.set()
    model = load(tmp_path, background=background, **OPTIONS)
    content = [{"type": "text", "text": "Hello."}, {"type": "audio", "path": torch.zeros(4000)}]
    messages = [{"role": "0", "content": content}, {"role": "1", "content": content[:1]}]
    inputs = prepare_inputs(model, load_processor(str(tmp_path), model), messages)  # before the codec is there
    gate.open.set()
    options = dict(max_new_tokens=2, do_sample=False, depth_decoder_do_sample=False, output_audio=True)
    want = load_model(str(tmp_path)).generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options)[0], want[0])


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_few_matrices_are_there_in_full_precision_at_once(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of the matrices that are to be freed and are not yet, each time that one has been read."""
    saved(tmp_path, backbone={"num_hidden_layers": 4}, shards="50KB")
    policy = resolve_policy(precision)
    alive: list[int] = []
    sizes: dict[str, int] = {}
    take = Acceleration.take

    def counted(handle: Acceleration, names: Any) -> None:
        model = handle._model
        zones = {name: zone for name, (zone, _) in named_sources(hf.live_weights(model)).items()}
        zones |= {"depth.embedding": "depth.embedding", "depth.head": "depth.head.1"}
        lowered = [key for name, key in hf_loading.matrices(model).items() if policy.format_of(zones[name]) != "keep"]
        weights = {key: model.get_parameter(key) for key in lowered}
        sizes.update({key: weight.nbytes for key, weight in weights.items()})
        alive.append(sum(weight.nbytes for weight in weights.values() if not weight.is_meta))
        take(handle, names)

    monkeypatch.setattr(Acceleration, "take", counted)
    load(tmp_path, precision=policy, **OPTIONS)
    threads = max(2, min(4, torch.get_num_threads()))
    assert 0 < max(alive) <= sum(sorted(sizes.values())[-threads:]) < sum(sizes.values()) / 3


def test_lowered_weights_are_gone_when_all_is_read(tmp_path: Path) -> None:
    saved(tmp_path)
    model = load(tmp_path, precision="int8", **OPTIONS)
    left = {key for key, p in model.named_parameters() if p.ndim > 1 and p.numel() and not p.is_meta}
    left = {key for key in left if not key.startswith("codec_model.")}
    assert left == {
        "embed_text_tokens.weight",
        "lm_head.weight",
        "backbone_model.embed_tokens.embed_audio_tokens.weight",
        "depth_decoder.model.embed_tokens.weight",
    }


# ------------------------------------------------------------------------------------------------------- in the background


class Gate:
    """Holds readers of one stage back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
        self.open = threading.Event()
        read = loading._Plan.read

        def held(plan: Any, key: str) -> None:
            if key.startswith(prefix) and key not in plan.small:
                assert self.open.wait(20)
            read(plan, key)

        monkeypatch.setattr(loading._Plan, "read", held)


@pytest.mark.parametrize("precision", ["stock", "int8"])
def test_a_prompt_is_prefilled_while_the_depth_decoder_is_read(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    want = speech(load(tmp_path, precision=precision, **OPTIONS))
    gate = Gate(monkeypatch, "depth_decoder.")
    ahead = Passes.ahead

    def opening(self: Passes, *args: Any) -> None:
        assert not gate.open.is_set()
        ahead(self, *args)
        gate.open.set()

    runs: list[int] = []
    monkeypatch.setattr(Passes, "ahead", opening)
    model = load(tmp_path, precision=precision, background=True, **OPTIONS)
    assert isinstance(model.acceleration, Loading)
    assert any(p.is_meta for p in model.depth_decoder.model.layers.parameters())
    stock = hf_passes._stock_prefill

    def counted(*args: Any) -> Any:
        runs.append(1)
        return stock(*args)

    monkeypatch.setattr(hf_passes, "_stock_prefill", counted)
    got = model.generate(**text_prompt((3, 5)), max_new_tokens=4, do_sample=False, depth_decoder_do_sample=False)
    assert torch.equal(got, want)
    assert len(runs) == 1  # not again in the call itself
    assert isinstance(model.acceleration, Acceleration)
    assert model.acceleration.metrics.counters["generate.fast"] == 1
    assert torch.equal(speech(model), want)


def test_a_prompt_with_sound_waits_for_the_codec(tmp_path: Path) -> None:
    saved(tmp_path)
    plain = load(tmp_path, **OPTIONS)
    prompt = audio_prompt(plain, [[4000], [2500]])
    options = dict(max_new_tokens=3, do_sample=False, depth_decoder_do_sample=False, output_audio=True)
    want = plain.generate(**prompt, **options)
    got = load(tmp_path, background=True, **OPTIONS).generate(**prompt, **options)
    assert all(torch.equal(one, other) for one, other in zip(got, want))


def test_the_first_call_keeps_seeds_streamers_and_configs(tmp_path: Path) -> None:
    saved(tmp_path)
    prompt, puts, made, configs = text_prompt((5,)), [], [], []
    for background in (False, True):
        model = load(tmp_path, background=background, **OPTIONS)
        puts.append(Recorder())
        made.append(model.generate(**prompt, max_new_tokens=4, do_sample=True, seed=3, streamer=puts[-1]))
        configs.append(model.depth_decoder.generation_config.to_dict())
        with pytest.raises(ValueError, match="input_ids"):
            load(tmp_path, background=background, **OPTIONS).generate(prompt["input_ids"][:, :0])
    assert torch.equal(made[0], made[1]) and configs[0] == configs[1]
    assert_same_puts(puts[1], puts[0])


def test_whatever_is_asked_of_the_handle_waits(tmp_path: Path) -> None:
    saved(tmp_path)
    model = load(tmp_path, precision="int8", background=True, **OPTIONS)
    with pytest.raises(RuntimeError, match="still being loaded"):
        copy.deepcopy(model)
    with pytest.raises(ValueError, match="stage must be"):
        model.acceleration.wait("encoder")
    waiting = model.acceleration
    waiting.wait("codec")
    assert not any(p.is_meta for p in model.codec_model.parameters())
    assert model.acceleration is waiting
    assert model.acceleration.report().originals_dropped
    assert isinstance(model.acceleration, Acceleration)
    assert model.acceleration is waiting.wait() is model.acceleration.wait()


def test_errors_in_the_background_come_out_where_someone_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    gate = Gate(monkeypatch, "codec_model.")
    model = load(tmp_path, background=True, **OPTIONS)
    model.acceleration.wait("depth")
    with path.open("r+b") as file:
        file.truncate(stored_tensors([path])["codec_model.decoder.layers.0.conv.weight"].start + 1)
    gate.open.set()
    for use in (model.acceleration.wait, lambda: model.generate(**text_prompt((3,))), lambda: model.acceleration.mode):
        with pytest.raises(OSError, match=r"model\.safetensors: tensor 'codec_model.* too early.*again"):
            use()
    assert isinstance(model.acceleration, Loading)


def test_no_thread_outlives_a_load(tmp_path: Path) -> None:
    saved(tmp_path)
    load(tmp_path, **OPTIONS)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("csm-pack")]


# ------------------------------------------------------------------------------------------------------------- errors


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    said, data = header(path)
    change(said)
    raw = json.dumps(said).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def with_tensors(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


NORM = "backbone_model.norm.weight"
UP = "depth_decoder.model.layers.1.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "truncated or no safetensors"),
    "html": (lambda path: path.write_bytes(b"<!DOCTYPE html>" * 200), "truncated or no safetensors"),
    "half of the header": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "truncated or no safetensors"),
    "no header": (lambda path: path.write_bytes(path.read_bytes()[:7]), "8 bytes and a header"),
    "last byte": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated, in tensor"),
    "a byte more": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "belong to nothing"),
    "no json": (lambda path: path.write_bytes(path.read_bytes()[:8] + b"[" + path.read_bytes()[9:]), "damaged header"),
    "missing": (lambda path: with_tensors(path, lambda t: t.pop(UP)), f"lacks weights.*{UP}"),
    "shape": (
        lambda path: with_tensors(path, lambda t: t.update({UP: t[UP].T.contiguous()})),
        rf"{UP}' has shape \[24, 40\], wanted \[40, 24\]",
    ),
    "dtype": (lambda path: with_tensors(path, lambda t: t.update({NORM: t[NORM].int()})), f"{NORM}' is stored as"),
    "fp8": (
        lambda path: with_tensors(path, lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)})),
        f"{NORM}' is stored as",
    ),
    "unknown dtype": (
        lambda path: with_header(path, lambda said: said[NORM].update(dtype="F31")),
        "unknown dtype 'F31'",
    ),
    "negative": (lambda path: with_header(path, lambda said: said[NORM].update(shape=[-32])), "has shape"),
    "bytes": (lambda path: with_header(path, lambda said: said[NORM].update(shape=[31])), "128 bytes, 124 are wanted"),
    "overlap": (
        lambda path: with_header(
            path,
            lambda said: said[NORM].update(data_offsets=[n + 4 for n in said[NORM]["data_offsets"]]),
        ),
        "begins at byte",
    ),
    "a list": (lambda path: with_header(path, lambda said: said.update({NORM: [1]})), "damaged header"),
    "a number": (lambda path: with_header(path, lambda said: said[NORM].update(shape=32)), "damaged header"),
    "gone": (lambda path: path.unlink(), "model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    change, words = DAMAGE[damage]
    change(path)
    with pytest.raises((ValueError, OSError), match=f"(?s){words}") as caught:
        load(tmp_path, **OPTIONS)
    assert str(path) in str(caught.value) or damage == "gone"
    assert "again" in str(caught.value) or damage in ("gone", "dtype", "fp8")


def test_missing_shards_and_interrupted_downloads(tmp_path: Path) -> None:
    saved(tmp_path, shards="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(OSError, match=gone.name):
        load(tmp_path, **OPTIONS)
    half = tmp_path / ".cache" / "huggingface" / "download" / "abc.incomplete"
    half.parent.mkdir(parents=True)
    half.touch()
    with pytest.raises(OSError, match=r"interrupted \(abc\.incomplete\).*again"):
        load(tmp_path, **OPTIONS)


def test_other_things_that_are_no_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path / "a", shards="20KB")
    index = tmp_path / "a" / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-20])
    with pytest.raises(ValueError, match=r"index\.json is no JSON"):
        load(tmp_path / "a", **OPTIONS)
    config = saved(tmp_path / "b") / "config.json"
    config.write_text(config.read_text().replace('"csm"', '"llama"'))
    with pytest.raises(ValueError, match="is a 'llama', not a 'csm'"):
        load(tmp_path / "b", **OPTIONS)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        load(tmp_path / "b", **OPTIONS)
    saved(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "c" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load(tmp_path / "c", **OPTIONS)
    for name, words in ((tmp_path / "absent", "neither"), ("nowhere", "neither")):
        with pytest.raises(ValueError, match=words):
            load(name)


def test_bad_arguments_come_before_any_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)

    def never(*_: Any) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(loading, "Parts", never)
    for options, kind in (
        ({"precision": "int7"}, ValueError),
        ({"dtype": torch.int8}, ValueError),
        ({"dtype": "float8"}, ValueError),
        ({"device": "toaster"}, ValueError),
        ({"moed": "eager"}, TypeError),
        ({"mode": "quick"}, ValueError),
        ({"batch_sizes": (99,)}, ValueError),
        ({"guard": 3}, ValueError),
        ({"map_packed": True}, ValueError),
        ({"calibration": []}, ValueError),
        ({"without": ("sleep",)}, ValueError),
    ):
        with pytest.raises(kind):
            load(tmp_path, **options)


def test_a_weight_that_its_format_cannot_hold(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    with_tensors(path, lambda tensors: tensors[UP].fill_(1e6))
    with pytest.raises(ValueError, match=r"depth\.1\.up holds values beyond fp16"):
        load(tmp_path, precision=PrecisionPolicy((("depth.mlp", "fp16"), ("backbone.mlp", "int8"))), **OPTIONS)


def test_any_truncation_and_any_flipped_bit_of_the_header_is_harmless(tmp_path: Path) -> None:
    """An error that names the file; or, where the header still means the same, the same tensors."""
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    true = stored_tensors([path])
    chance = random.Random(0)
    for cut in [*range(0, 20), begin - 1, begin, begin + 1, *(chance.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            stored_tensors([path])
    refused = 0
    for place in [*range(8), *(chance.randrange(8, begin) for _ in range(400))]:
        broken = bytearray(whole)
        broken[place] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        try:
            got = stored_tensors([path])
        except ValueError as error:
            assert "model.safetensors" in str(error)
            refused += 1
            continue
        for name, tensor in got.items():  # a renamed tensor is missing later; none may be another's bytes
            assert tensor == true.get(name, tensor) or (tensor.start, tensor.nbytes) in {
                (t.start, t.nbytes) for t in true.values()
            }
    assert refused > 200


def test_a_read_of_each_tensor_equals_safetensors(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "bytes": torch.arange(5).to(torch.uint8),
    }
    tensors["big"] = torch.randn(300, 70).to(torch.bfloat16)
    save_file(tensors, tmp_path / "x.safetensors")
    for name, stored in stored_tensors([tmp_path / "x.safetensors"]).items():
        assert isinstance(stored, StoredTensor)
        assert torch.equal(stored.read(stored.dtype), tensors[name])
        assert torch.equal(stored.read(torch.float64), tensors[name].double())


def test_two_files_with_one_tensor(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"both hold a tensor 'x'"):
        stored_tensors(sorted(tmp_path.iterdir()))


def test_packing_a_part_is_what_refresh_makes_of_it() -> None:
    live = hf.live_weights(build("tied"))
    whole, parts = (PackedWeights(resolve_policy("smallest")) for _ in range(2))
    whole.refresh(live)
    parts.pack(live, ["backbone.embedding", "depth.embedding"])
    assert parts._copies["depth.embedding"].packed is parts._copies["backbone.embedding"].packed
    parts.pack(live, ["depth.head"])
    _, stale = parts.refresh(live)
    assert stale == [] and parts._copies.keys() == whole._copies.keys()
    assert all(torch.equal(copy_.checksum, whole._copies[name].checksum) for name, copy_ in parts._copies.items())


def test_progress_is_shown_in_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path)
    capsys.readouterr()
    load(tmp_path, **{**OPTIONS, "progress": True})
    said = capsys.readouterr().err
    assert "loading" in said and ("B/s" in said or "MB" in said)
