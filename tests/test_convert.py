"""Checkpoints of Sesame's repository and of transformers: the same weights, bit for bit, and the same speech."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sesame_models
import torch
from csm_models import config_of
from safetensors.torch import load_file, save_file
from sesame_models import PRESETS
from transformers import CsmConfig, CsmForConditionalGeneration, MimiModel

from csm_runtime import convert, csm_shape, tensor_files
from csm_runtime.cli import main
from csm_runtime.convert import convert_files, shape_of_tensors, to_hf, to_sesame
from csm_runtime.csm_shape import Flavor, Shape, hf_config, sesame_config, shape_of_hf, shape_of_sesame
from csm_runtime.tensor_files import stored_tensors, write_tensors

SIZES = ["tiny", "unscaled", "wide", "codebooks"]
FLAVORS = {name: Flavor(**options) for name, options in sesame_models.FLAVORS.items()}
CSM_1B = shape_of_sesame(vars(PRESETS["1b"]))
AUDIO, AUDIO_EOS = 297, 298
"""Ids of the vocabularies here; text is below :data:`TEXT_IDS`."""
TEXT_IDS = 290
State = dict[str, torch.Tensor]


def shape(preset: str) -> Shape:
    return shape_of_sesame(vars(PRESETS[preset]), FLAVORS)


def random_state(preset: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    """In Sesame's layout, without torchtune."""
    generator = torch.Generator().manual_seed(seed)
    sizes = shape(preset).tensors()
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}


def codec_settings(preset: str) -> dict[str, Any]:
    """A Mimi that is small, and whose codes the CSM's vocabulary has."""
    return config_of("base").codec_config.to_dict() | {"num_quantizers": PRESETS[preset].audio_num_codebooks}


def hf_settings(preset: str) -> dict[str, Any]:
    special = {"pad_token_id": 296, "bos_token_id": 295, "audio_token_id": AUDIO, "audio_eos_token_id": AUDIO_EOS}
    return hf_config(shape(preset), codec_settings(preset)) | special


def hf_model(preset: str, state: State, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with the weights of a state in Sesame's layout, and a codec of random ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CsmForConditionalGeneration(CsmConfig(**hf_settings(preset))).eval()
        for key, buffer in model.codec_model.named_buffers():
            if key.endswith("embed_sum"):  # zeros in a fresh codec: every sound would get code 0
                buffer.normal_()
    left = model.load_state_dict(to_hf(state, shape(preset)), strict=False)
    assert not left.unexpected_keys
    assert all(key.startswith("codec_model.") for key in left.missing_keys)
    return model.to(dtype)


def assert_same(got: State, want: State) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


# ------------------------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("preset", SIZES)
def test_round_trips_are_bit_for_bit(preset: str, dtype: torch.dtype) -> None:
    ours = random_state(preset, dtype)
    theirs = to_hf(ours, shape(preset))
    assert_same(to_sesame(theirs, shape(preset)), ours)
    assert_same(to_hf(to_sesame(theirs, shape(preset)), shape(preset)), theirs)


@pytest.mark.parametrize("preset", [*SIZES, "1b"])
def test_names_and_sizes_are_those_of_transformers(preset: str) -> None:
    args = PRESETS[preset]
    known = shape_of_sesame(vars(args), FLAVORS)
    ours = {name: torch.empty(size, device="meta") for name, size in known.tensors().items()}
    with torch.device("meta"):
        model = CsmForConditionalGeneration(CsmConfig(**hf_config(known)))
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith("codec_model.")}
    assert {name: tensor.shape for name, tensor in to_hf(ours, known).items()} == wanted


def test_only_rotary_projections_are_copied() -> None:
    ours = random_state("wide")
    theirs = to_hf(ours, shape("wide"))
    both = {name: convert.hf_names(name) for name in ours}
    assert sum(map(len, both.values())) == len(theirs)
    for name, others in both.items():
        rotary = name.endswith(("q_proj.weight", "k_proj.weight"))
        for other in others:
            assert (theirs[other].data_ptr() != ours[name].data_ptr()) == rotary, name
            assert torch.equal(theirs[other], ours[name]) != rotary, name


def test_rotary_rows_of_a_head_go_from_pairs_to_halves() -> None:
    ours = random_state("tiny")
    name = "decoder.layers.1.attn.q_proj.weight"
    (theirs,) = convert.hf_names(name)
    head, pair, half = 1, 3, 8  # 2 heads of 16
    got = to_hf(ours, shape("tiny"))[theirs]
    for part in (0, 1):
        assert torch.equal(got[head * 16 + part * half + pair], ours[name][head * 16 + 2 * pair + part])


def test_sizes_tell_the_shape_but_for_heads() -> None:
    ours = random_state("wide")
    sizes = {name: tensor.shape for name, tensor in ours.items()}
    found = shape_of_tensors(sizes, heads=(8, 4))
    assert found.backbone == FLAVORS["wide"]
    assert (found.decoder.num_kv_heads, found.codebooks, found.audio_vocab, found.text_vocab) == (4, 8, 67, 300)
    assert shape_of_tensors(sizes, flavors=FLAVORS) == shape("wide")
    theirs = {name: tensor.shape for name, tensor in to_hf(ours, found).items()}
    assert shape_of_tensors(theirs, heads=(8, 4)) == found
    with pytest.raises(ValueError, match="how many heads the backbone has .*give a config or flavors"):
        to_hf(ours)
    with pytest.raises(ValueError, match="5 of the decoder do not go with its width of 48 and 48 rows"):
        shape_of_tensors(sizes, heads=(8, 5))
    meta = {name: torch.empty(size, device="meta") for name, size in CSM_1B.tensors().items()}
    assert shape_of_tensors({name: tensor.shape for name, tensor in to_hf(meta).items()}) == CSM_1B


def test_one_audio_embedding_is_enough_and_two_have_to_be_the_same() -> None:
    ours = random_state("tiny")
    theirs = to_hf(ours, shape("tiny"))
    tables = convert.hf_names("audio_embeddings.weight")
    for gone in tables:
        assert_same(to_sesame({k: v for k, v in theirs.items() if k != gone}, shape("tiny")), ours)
    other = theirs[tables[1]].clone()
    assert_same(to_sesame(theirs | {tables[1]: other}, shape("tiny")), ours)
    other[3, 5] += 1
    with pytest.raises(ValueError, match="embed_audio_tokens.weight' and .* differ"):
        to_sesame(theirs | {tables[1]: other}, shape("tiny"))


def test_masks_and_the_codec_are_left_out() -> None:
    ours = random_state("tiny")
    masks = {"backbone_causal_mask": torch.ones(8, 8), "decoder_causal_mask": torch.ones(4, 4)}
    theirs = to_hf(ours | masks, shape("tiny"))
    assert_same(to_sesame(theirs | {"codec_model.upsample.weight": torch.ones(3)}, shape("tiny")), ours)


def _without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def _with(name: str, *size: int) -> Callable[[State], State]:
    return lambda state: state | {name: torch.ones(size)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("projection.weight"), "lacks 'projection.weight' .a CSM in Sesame's layout"),
        (_without(*(f"decoder.layers.1.mlp.w{n}.weight" for n in (1, 2, 3)), "codebook0_head.weight", "audio_head"),
         "lacks 'codebook0_head.weight', 'audio_head', 'decoder.layers.1.mlp.w1.weight' and 2 more"),
        (_with("backbone.layers.2.sa_norm.scale", 64), "has besides 'backbone.layers.2.sa_norm.scale'"),
        (_with("backbone.layers.0.attn.q_proj.bias", 64), "has besides 'backbone.layers.0.attn.q_proj.bias'"),
        (_with("backbone.layers.1.attn.k_proj.weight", 16, 64),
         r"tensor 'backbone.layers.1.attn.k_proj.weight' has shape \[16, 64\], wanted \[32, 64\]"),
        (_with("audio_head", 4, 32, 35), r"'audio_head' has shape \[4, 32, 35\], wanted \[3, 32, 35\]"),
        (lambda state: to_hf(state, shape("tiny")), "is in transformers' layout already"),
        (lambda state: {"weight": torch.ones(1)}, "not a CSM in Sesame's layout or transformers'.*'weight'"),
        (lambda state: {}, "not a CSM .*nothing"),
    ],
    ids=["missing", "many missing", "layer", "bias", "size", "codebooks", "layout", "other", "empty"],
)  # fmt: skip
def test_a_state_that_is_another_is_refused(change: Callable[[State], State], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_hf(change(random_state("tiny")), shape("tiny"))


# ------------------------------------------------------------------------------------------------------------ configs


def test_defaults_are_those_of_transformers() -> None:
    config = CsmConfig()
    depth = config.depth_decoder_config
    for name, value in csm_shape._HF_DEFAULTS.items():
        assert name == "head_dim" or getattr(config, name) == value, name
    for name, value in csm_shape._HF_DEPTH_DEFAULTS.items():
        assert name == "head_dim" or getattr(depth, name) == value, name
    for name, value in csm_shape.SPECIAL.items():
        assert getattr(config, name) == value, name


def test_config_of_csm_1b() -> None:
    """As published, and otherwise what ``CsmConfig`` has by default."""
    made = CsmConfig(**hf_config(CSM_1B))
    usual = CsmConfig().to_dict()
    differing = {name for name, value in made.to_dict().items() if usual.get(name) != value}
    assert differing <= {"architectures", "rope_parameters", "depth_decoder_config", "codec_config"}
    llama3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0}
    wanted = {"low_freq_factor": 0.125, "high_freq_factor": 0.5, "original_max_position_embeddings": 1024}
    assert made.rope_parameters == llama3 | wanted
    wanted = {"low_freq_factor": 0.001953125, "high_freq_factor": 0.0078125, "original_max_position_embeddings": 16}
    assert made.depth_decoder_config.rope_parameters == llama3 | wanted
    assert made.codec_config.to_dict() == CsmConfig().codec_config.to_dict()
    assert sesame_config(shape_of_hf(made.to_dict())) == (vars(PRESETS["1b"]), {})


@pytest.mark.parametrize("preset", [*PRESETS])
def test_configs_round_trip(preset: str, tmp_path: Path) -> None:
    wanted = shape_of_sesame(vars(PRESETS[preset]), FLAVORS)
    CsmConfig(**hf_config(wanted)).save_pretrained(tmp_path)  # leaves out what is as it is by default
    found = shape_of_hf(json.loads((tmp_path / "config.json").read_text()))
    assert found == wanted
    args, new = sesame_config(found)
    assert shape_of_sesame(args, csm_shape.FLAVORS | new) == wanted
    assert (not new) == (preset == "1b")


def test_rope_as_transformers_4_wrote_it() -> None:
    config = hf_config(CSM_1B)
    for part in (config, config["depth_decoder_config"]):
        rope = part.pop("rope_parameters")
        part["rope_theta"] = rope.pop("rope_theta")
        part["rope_scaling"] = rope
    assert shape_of_hf(config) == CSM_1B


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="llama"), "model_type is 'llama', wanted 'csm'"),
        (dict(attention_bias=True), "attention_bias is True; Sesame's stack has no biases"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(head_dim=32), "head_dim is 32; .* 64"),
        (dict(vocab_size=1024), "vocab_size is 1024 and depth_decoder_config.vocab_size is 2051"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type 'yarn'"),
        (dict(rope_parameters=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                   original_max_position_embeddings=1024)), "low_freq_factor = 1024; .*has 8192"),
    ],
)  # fmt: skip
def test_what_sesame_has_no_word_for_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape_of_hf(hf_config(CSM_1B) | changes)


def test_sesame_configs_that_say_too_little_are_refused() -> None:
    with pytest.raises(ValueError, match="lacks .'audio_vocab_size'. of Sesame's ModelArgs"):
        shape_of_sesame({k: v for k, v in vars(PRESETS["1b"]).items() if k != "audio_vocab_size"})
    with pytest.raises(ValueError, match="backbone_flavor is 'tiny', known are .'llama-100M', 'llama-1B'.; give"):
        shape_of_sesame(vars(PRESETS["tiny"]))
    for wrong in (dict(num_heads=3), dict(num_kv_heads=3), dict(embed_dim=36), dict(num_layers=0)):
        with pytest.raises(ValueError, match="embed_dim must be|sizes must be positive"):
            Flavor(**sesame_models.FLAVORS["tiny"] | wrong)


# -------------------------------------------------------------------------------------------------------- same speech


def prompt(model: Any, turns: list[tuple[int, int]], last: int, seed: int = 0) -> tuple[dict[str, Any], Any, Any]:
    """Text and sound for transformers, and the same as tokens and mask for Sesame's model.

    Args:
        model: transformers', whose codec makes the codes.
        turns: how many text ids and samples of sound each has.
        last: text ids at the end.
        seed: of both.
    """
    generator = torch.Generator().manual_seed(seed)
    books = model.config.num_codebooks
    ids, rows, sounds = [], [], []

    def text(count: int) -> None:
        some = torch.randint(0, TEXT_IDS, (count,), generator=generator)
        ids.append(some)
        rows.append((torch.nn.functional.pad(some[:, None], (books, 0)), [False] * books + [True]))

    for words, samples in turns:
        text(words)
        sound = torch.randn(1, 1, samples, generator=generator)
        codes = model.codec_model.encode(sound).audio_codes[0].t()  # [frames, books]
        frames = torch.nn.functional.pad(codes, (0, 1, 0, 1))  # and the frame that ends it
        sounds.append(sound)
        rows.append((frames, [True] * books + [False]))
        ids.append(torch.tensor([AUDIO] * len(codes) + [AUDIO_EOS]))
    text(last)
    tokens = torch.cat([frames for frames, _ in rows])[None]
    mask = torch.cat([torch.tensor(kind).expand(len(frames), -1) for frames, kind in rows])[None]
    joined = torch.cat(ids)[None]
    inputs = {"input_ids": joined, "attention_mask": torch.ones_like(joined)}
    if sounds:
        ends = torch.tensor([[sound.shape[-1] for sound in sounds]]).cumsum(-1)
        inputs |= {"input_values": torch.cat(sounds, dim=-1), "input_values_cutoffs": ends}
    return inputs, tokens, mask


@torch.inference_mode()
def greedy_frames(model: Any, tokens: Any, mask: Any, count: int) -> Any:
    """``[count, codebooks]`` of Sesame's model."""
    model.reset_caches()
    frames, positions = [], torch.arange(tokens.shape[1])[None]
    for _ in range(count):
        frame = model.generate_frame(tokens, mask, positions, 0.9, 1)
        frames.append(frame[0].long())
        tokens = torch.nn.functional.pad(frame, (0, 1)).long()[:, None]
        mask = torch.nn.functional.pad(torch.ones_like(frame), (0, 1)).bool()[:, None]
        positions = positions[:, -1:] + 1
    return torch.stack(frames)


def spoken(model: Any, inputs: dict[str, Any], count: int) -> Any:
    with torch.inference_mode():
        return model.generate(**inputs, max_new_tokens=count, do_sample=False, depth_decoder_do_sample=False)[0]


@torch.inference_mode()
def first_logits(model: Any, inputs: dict[str, Any], frame: Any) -> Any:
    """``[codebooks, V]`` of transformers' model for the first frame, told the codes of it that come before each."""
    said = model(**inputs, output_hidden_states=True)
    hidden = said.hidden_states[-1][:, -1]
    fed = torch.nn.functional.pad(frame[None, :-1], (1, 0))
    deep = model.depth_decoder(input_ids=fed, backbone_last_hidden_state=hidden).logits
    return torch.cat([said.logits[:, -1], deep[0]])


@pytest.mark.parametrize("preset", [*SIZES, "fork"])
def test_both_models_say_the_same(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy frames in fp32 behind a prompt of text and sound, and the logits that the first of them is drawn from."""
    pytest.importorskip("torchtune", reason="needs torchtune, Sesame's stack")
    ours = sesame_models.build(preset)
    theirs = hf_model(preset, ours.state_dict())
    ours.setup_caches(1)
    drawn: list[Any] = []
    stock = sesame_models.sample_topk
    monkeypatch.setattr(sesame_models, "sample_topk", lambda logits, *how: drawn.append(logits) or stock(logits, *how))
    for seed, (turns, last) in enumerate([([(7, 1920 * 5), (3, 1920 * 2 + 100)], 6), ([], 9)]):
        inputs, tokens, mask = prompt(theirs, turns, last, seed)
        drawn.clear()
        frames = greedy_frames(ours, tokens, mask, 10)
        assert len(frames.unique(dim=0)) > 5
        assert torch.equal(spoken(theirs, inputs, 10), frames)
        wanted = torch.cat(drawn[: frames.shape[1]])
        torch.testing.assert_close(first_logits(theirs, inputs, frames[0]), wanted, rtol=1e-4, atol=1e-4)


def test_both_models_say_the_same_beyond_llamas_original_context() -> None:
    pytest.importorskip("torchtune", reason="needs torchtune, Sesame's stack")
    ours = sesame_models.build("long")
    theirs = hf_model("long", ours.state_dict())
    ours.setup_caches(1)
    inputs, tokens, mask = prompt(theirs, [(4000, 1920 * 3), (300, 1920 * 4)], 4200)
    assert tokens.shape[1] > 8192
    frames = greedy_frames(ours, tokens, mask, 4)
    assert torch.equal(spoken(theirs, inputs, 4), frames)
    late, early = tokens[:, -4000:], mask[:, -4000:]
    assert not torch.equal(greedy_frames(ours, late, early, 4), frames)  # the beginning is heard


@pytest.mark.parametrize("preset", ["1b", "tiny", "unscaled", "wide", "long"])
def test_rotary_frequencies(preset: str) -> None:
    """Of both stacks: equal to a unit in the last place, whatever the original context is written as."""
    pytest.importorskip("torchtune", reason="needs torchtune, Sesame's stack")
    from torchtune.models.llama3_1 import Llama3ScaledRoPE
    from transformers.models.csm.modeling_csm import CsmRotaryEmbedding

    known = shape_of_sesame(vars(PRESETS[preset]), FLAVORS)
    config = CsmConfig(**hf_config(known))
    for flavor, part in ((known.backbone, config), (known.decoder, config.depth_decoder_config)):
        theta = Llama3ScaledRoPE(
            flavor.head_dim, flavor.max_seq_len, flavor.rope_base, scale_factor=flavor.scale_factor
        ).theta
        torch.testing.assert_close(CsmRotaryEmbedding(part).inv_freq, theta, rtol=1.2e-7, atol=0)


def test_state_of_sesames_model() -> None:
    pytest.importorskip("torchtune", reason="needs torchtune, Sesame's stack")
    model = sesame_models.build("wide")
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shape("wide").tensors()
    before = to_hf(model.state_dict(), shape("wide"))
    model.setup_caches(2)
    assert "backbone_causal_mask" in model.state_dict()
    assert_same(to_hf(model.state_dict(), shape("wide")), before)


# -------------------------------------------------------------------------------------------------------------- files


def save_sesame(folder: Path, preset: str = "tiny", dtype: torch.dtype = torch.bfloat16) -> State:
    folder.mkdir(exist_ok=True, parents=True)
    state = random_state(preset, dtype)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(vars(PRESETS[preset])))
    return state


def to(layout: str, source: Path, out: Path, **options: Any) -> convert.Converted:
    return convert_files(source, out, to=layout, progress=False, **{"flavors": FLAVORS} | options)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("preset", ["tiny", "wide"])
def test_files_round_trip(preset: str, tmp_path: Path) -> None:
    state = save_sesame(tmp_path / "ours", preset)
    done = to("hf", tmp_path / "ours", tmp_path / "theirs")
    assert names(tmp_path / "theirs") == {"model.safetensors", "config.json"}
    assert [path.name for path in done.files] == ["model.safetensors", "config.json"]
    wanted = to_hf(state, shape(preset))
    assert_same(load_file(tmp_path / "theirs" / "model.safetensors"), wanted)
    assert (done.tensors, done.nbytes) == (len(wanted), sum(tensor.nbytes for tensor in wanted.values()))
    assert any("no codec in it" in note for note in done.notes)
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["dtype"] == "bfloat16"

    done = to("sesame", tmp_path / "theirs", tmp_path / "again")
    assert done.notes == []
    for name in ("model.safetensors", "config.json"):
        ours, again = tmp_path / "ours" / name, tmp_path / "again" / name
        if name == "config.json":
            assert json.loads(ours.read_text()) == json.loads(again.read_text())
        else:
            assert_same(load_file(again), load_file(ours))


def test_flavors_of_ones_own(tmp_path: Path) -> None:
    """What Sesame's FLAVORS lack is written, and read where it lies beside the weights or is named."""
    save_sesame(tmp_path / "ours", "wide")
    to("hf", tmp_path / "ours", tmp_path / "theirs")
    done = to("sesame", tmp_path / "theirs", tmp_path / "again", flavors=None)
    assert names(tmp_path / "again") == {"model.safetensors", "config.json", "flavors.json"}
    assert any("flavors.json has them" in note for note in done.notes)
    to("hf", tmp_path / "again", tmp_path / "beside", flavors=None)
    known = csm_shape.load_flavors(tmp_path / "again" / "flavors.json")
    assert set(known.values()) == {FLAVORS["wide"], FLAVORS["wide-depth"]}
    (tmp_path / "again" / "flavors.json").unlink()
    with pytest.raises(ValueError, match=r"config.json: backbone_flavor is 'backbone-3x128-2048', known are"):
        to("hf", tmp_path / "again", tmp_path / "no", flavors=None)
    to("hf", tmp_path / "again", tmp_path / "named", flavors=known)
    for folder in ("beside", "named"):
        got, wanted = (load_file(tmp_path / one / "model.safetensors") for one in (folder, "theirs"))
        assert_same(got, wanted)
    (tmp_path / "no.json").write_text('{"a": {"num_heads": 3}}')
    with pytest.raises(ValueError, match="no.json holds no flavors by name"):
        csm_shape.load_flavors(tmp_path / "no.json")


@pytest.mark.parametrize("shards", ["1GB", "60KB"], ids=["single", "sharded"])
def test_a_model_of_transformers_there_and_back(tmp_path: Path, shards: str) -> None:
    """Codec and all: what comes back is what was saved, and from_pretrained loads it."""
    model = hf_model("tiny", random_state("tiny"))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shards)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (shards != "1GB")
    done = to("sesame", tmp_path / "theirs", tmp_path / "ours")
    assert any("codec's" in note for note in done.notes)
    assert_same(load_file(tmp_path / "ours" / "model.safetensors"), random_state("tiny"))
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == vars(PRESETS["tiny"])

    done = to("hf", tmp_path / "ours", tmp_path / "back", codec_from=tmp_path / "theirs")
    assert not any("no codec" in note for note in done.notes)
    back, info = CsmForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(back.state_dict(), model.state_dict())
    again = CsmForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    got, wanted = (one.config.to_dict() | {"_name_or_path": ""} for one in (back, again))
    assert got == wanted


def test_codec_of_a_mimi_alone(tmp_path: Path) -> None:
    save_sesame(tmp_path / "ours")
    model = hf_model("tiny", random_state("tiny"))
    model.codec_model.save_pretrained(tmp_path / "mimi")
    to("hf", tmp_path / "ours", tmp_path / "theirs", codec_from=tmp_path / "mimi")
    found = load_file(tmp_path / "theirs" / "model.safetensors")
    codec = {name.removeprefix("codec_model."): one for name, one in found.items() if name.startswith("codec_model.")}
    assert_same(codec, load_file(tmp_path / "mimi" / "model.safetensors"))
    loaded = CsmForConditionalGeneration.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert isinstance(loaded.codec_model, MimiModel)
    assert_same(loaded.codec_model.state_dict(), model.codec_model.state_dict())

    (tmp_path / "mimi" / "config.json").write_text(json.dumps(codec_settings("tiny") | {"num_quantizers": 3}))
    with pytest.raises(ValueError, match="has 3 codebooks, the CSM 4"):
        to("hf", tmp_path / "ours", tmp_path / "no", codec_from=tmp_path / "mimi")
    with pytest.raises(ValueError, match="holds no codec"):
        to("hf", tmp_path / "ours", tmp_path / "no", codec_from=tmp_path / "ours")
    with pytest.raises(ValueError, match="codec_from is for to='hf'"):
        to("sesame", tmp_path / "theirs", tmp_path / "no", codec_from=tmp_path / "mimi")


@pytest.mark.parametrize("kind", ["plain", "nested", "old", "alone"])
def test_what_torch_saved(tmp_path: Path, kind: str) -> None:
    state = random_state("tiny")
    path = tmp_path / ("ckpt.pt" if kind != "alone" else "weights.pth")
    saved: Any = {"model": state} if kind == "nested" else state
    torch.save(saved, path, _use_new_zipfile_serialization=kind != "old")
    if kind != "alone":
        (tmp_path / "config.json").write_text(json.dumps({"args": vars(PRESETS["tiny"])}))
    done = to("hf", tmp_path if kind == "plain" else path, tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), to_hf(state, shape("tiny")))
    assert any("no config in Sesame's layout" in note for note in done.notes) == (kind == "alone")


def test_a_folder_with_both_layouts(tmp_path: Path) -> None:
    """As on the hub: each direction takes the files of the other layout."""
    model = hf_model("tiny", random_state("tiny", seed=1))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    index.rename(tmp_path / "transformers.safetensors.index.json")
    config = json.loads((tmp_path / "config.json").read_text())
    both = config | vars(PRESETS["tiny"]) | {"transformers_weights": "transformers.safetensors.index.json"}
    state = random_state("tiny")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(both))
    to("sesame", tmp_path, tmp_path / "ours")
    assert_same(load_file(tmp_path / "ours" / "model.safetensors"), random_state("tiny", seed=1))
    to("hf", tmp_path, tmp_path / "theirs")
    assert_same(load_file(tmp_path / "theirs" / "model.safetensors"), to_hf(state, shape("tiny")))
    to("hf", tmp_path, tmp_path / "whole", codec_from=tmp_path)
    assert any(name.startswith("codec_model.") for name in load_file(tmp_path / "whole" / "model.safetensors"))


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sesame(tmp_path / "ours")
    alive: list[weakref.ref[Any]] = []
    most = 0
    stock = tensor_files.StoredTensor.read

    def read(self: Any, dtype: torch.dtype) -> Any:
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        out = stock(self, dtype)
        alive.append(weakref.ref(out))
        return out

    monkeypatch.setattr(tensor_files.StoredTensor, "read", read)
    to("hf", tmp_path / "ours", tmp_path / "theirs")
    assert len(alive) == len(shape("tiny").tensors()) + 1  # the audio embedding is written twice
    assert most <= 1


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sesame(tmp_path / "ours")
    to("hf", tmp_path / "ours", tmp_path / "theirs")
    before = {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    stock, count = tensor_files.StoredTensor.read, 0

    def read(self: Any, dtype: torch.dtype) -> Any:
        nonlocal count
        count += 1
        if count % 9 == 0:
            raise OSError("the disk is gone")
        return stock(self, dtype)

    monkeypatch.setattr(tensor_files.StoredTensor, "read", read)
    for out in ("theirs", "new"):
        with pytest.raises(OSError, match="the disk is gone"):
            to("hf", tmp_path / "ours", tmp_path / out, force=True)
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()} == before


def test_nothing_is_written_over(tmp_path: Path) -> None:
    state = save_sesame(tmp_path / "ours")
    out = tmp_path / "theirs"
    out.mkdir()
    (out / "config.json").write_text("mine")
    (out / "tokenizer.json").write_text("mine too")
    with pytest.raises(FileExistsError, match="config.json exists already; --force"):
        to("hf", tmp_path / "ours", out)
    assert names(out) == {"config.json", "tokenizer.json"}
    to("hf", tmp_path / "ours", out, force=True)
    assert names(out) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert_same(load_file(out / "model.safetensors"), to_hf(state, shape("tiny")))
    with pytest.raises(ValueError, match="is what is to be converted; name another folder"):
        to("hf", tmp_path / "ours", tmp_path / "ours", force=True)
    assert_same(load_file(tmp_path / "ours" / "model.safetensors"), state)


def test_sources_that_are_none(tmp_path: Path) -> None:
    save_sesame(tmp_path / "ours")
    ours = tmp_path / "ours"
    with pytest.raises(ValueError, match="is in Sesame's layout already"):
        to("sesame", ours, tmp_path / "no")
    with pytest.raises(FileNotFoundError, match="nowhere is neither a file nor a folder"):
        to("hf", tmp_path / "nowhere", tmp_path / "no")
    with pytest.raises(FileNotFoundError, match="holds none of model.safetensors, .* and 0 others; name the file"):
        to("hf", tmp_path, tmp_path / "no")
    with pytest.raises(FileNotFoundError, match="none.json is missing"):
        to("hf", ours, tmp_path / "no", config=tmp_path / "none.json")
    whole = (ours / "model.safetensors").read_bytes()
    (ours / "model.safetensors").write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        to("hf", ours, tmp_path / "no")
    (ours / "model.safetensors").write_bytes(whole)
    (ours / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        to("hf", ours, tmp_path / "no")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt holds no state dict"):
        to("hf", tmp_path / "list.pt", tmp_path / "no")
    (tmp_path / "text.pt").write_text("weights")
    with pytest.raises(ValueError, match="text.pt cannot be read by torch.load"):
        to("hf", tmp_path / "text.pt", tmp_path / "no")
    (tmp_path / "a.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="is no index of safetensors files"):
        to("hf", tmp_path / "a.index.json", tmp_path / "no")
    with pytest.raises(ValueError, match="to must be one of"):
        to("gguf", ours, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_written_files_are_read_by_others(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 5).t(), "b": torch.tensor(7), "c": torch.empty(0, 4, dtype=torch.bfloat16)}
    path = tmp_path / "some.safetensors"
    write_tensors(path, {name: (one.dtype, one.shape) for name, one in state.items()}, state.__getitem__)
    assert_same(load_file(path), state)
    assert_same({name: one.read(one.dtype) for name, one in stored_tensors([path]).items()}, state)
    with pytest.raises(FileExistsError):
        write_tensors(path, {}, state.__getitem__)
    with pytest.raises(ValueError, match=r"tensor 'a' is torch.float32 \[5, 3\], wanted torch.float32 \[5, 4\]"):
        write_tensors(tmp_path / "no", {"a": (torch.float32, (5, 4))}, state.__getitem__)
    with pytest.raises(ValueError, match="tensor 'a' is torch.complex64, which"):
        write_tensors(tmp_path / "complex", {"a": (torch.complex64, (5, 4))}, state.__getitem__)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = save_sesame(tmp_path / "ours")
    flavors = tmp_path / "flavors.json"
    flavors.write_text(json.dumps({name: sesame_models.FLAVORS[name] for name in ("tiny", "tiny-depth")}))
    command = ["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "hf", "--quiet"]
    assert main(command) == 2
    assert "backbone_flavor is 'tiny'" in capsys.readouterr().err
    assert main([*command, "--flavors", str(flavors)]) == 0
    said = capsys.readouterr()
    assert "model.safetensors: 44 tensors" in said.out
    assert "note: there is no codec in it" in said.err
    assert main([*command, "--flavors", str(flavors)]) == 2
    assert "--force writes over it" in capsys.readouterr().err
    assert main([*command, "--flavors", str(flavors), "--force"]) == 0
    back = ["convert", str(tmp_path / "theirs" / "model.safetensors"), str(tmp_path / "again"), "--to", "sesame"]
    assert main([*back, "--flavors", str(flavors)]) == 0
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), state)
