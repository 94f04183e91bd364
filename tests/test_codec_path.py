"""Codes to sound: the stock samples bit for bit by default, close to them on request, and whole whatever goes wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from csm_models import FRAME_SAMPLES, build, code_prompt
from torch import Tensor

from csm_runtime import codec as codec_file
from csm_runtime.codec import CodecPath, cut_at_end
from csm_runtime.small_model import build_small_csm

LENGTHS = (3, 9, 10, 12, 1, 12)


@pytest.fixture(scope="module")
def made() -> Any:
    model = build("base")
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.codec_model.named_buffers():
        if name.endswith("cluster_usage"):  # all ones in a fresh codec: dividing by them would lose no bit
            buffer.uniform_(0.5, 2.0, generator=generator)
    return model


@pytest.fixture
def codec(made: Any) -> Any:
    return forget_tables(copy.deepcopy(made.codec_model))


@pytest.fixture
def half(made: Any) -> Any:
    """In bf16, as a checkpoint loaded in bf16 has it."""
    return forget_tables(copy.deepcopy(made.codec_model)).bfloat16()


def codes(codec: Any, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = codec.config.codebook_size, codec.config.num_quantizers
    return [torch.randint(0, shape[0], (n, shape[1]), generator=generator) for n in lengths]


def stock_loop(codec: Any, rows: list[Tensor]) -> list[Tensor]:
    """As at the end of transformers' generate()."""
    with torch.no_grad():
        return [codec.decode(row.transpose(0, 1).unsqueeze(0)).audio_values[0, 0] for row in rows]


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert [x.dtype for x in got] == [x.dtype for x in wanted]
    assert [len(x) for x in got] == [len(x) for x in wanted]
    assert all(torch.equal(x, y) for x, y in zip(got, wanted))


def forget_tables(codec: Any) -> Any:
    """Stock divides its codebook vectors out once and never looks again,
    not even where the codec has changed its dtype meanwhile."""
    for module in codec.modules():
        if hasattr(module, "_embed"):
            module._embed = None
    return codec


class Calls:
    """Batch sizes and dtypes of a codec's calls, its copies' included; and, if wanted, what to do to their results."""

    def __init__(self, codec: Any, harm: Callable[[Tensor], Tensor] | None = None) -> None:
        self.rows: list[int] = []
        self.dtypes: list[torch.dtype] = []
        self._harm = harm
        codec.decoder.register_forward_hook(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        return self  # the copy of a codec reports here too

    def __call__(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        self.rows.append(output.shape[0])
        self.dtypes.append(output.dtype)
        return None if self._harm is None else self._harm(output)


# ------------------------------------------------------------------------------------------------------------ cutting


def stock_cut(sequences: Tensor, eos: int) -> list[Tensor]:
    out = []
    for row in sequences:
        ends = (row == eos).all(dim=-1).nonzero()
        out.append(row[: ends.min() if ends.numel() != 0 else row.shape[0]])
    return out


@pytest.mark.parametrize("eos", [0, 5])
def test_cut_at_end_is_the_stock_rule(eos: int) -> None:
    sequences = torch.randint(0, 3, (6, 11, 3), generator=torch.Generator().manual_seed(0)) + max(eos - 1, 0)
    sequences[0, 0] = eos
    sequences[1, 4] = eos
    sequences[1, 7] = eos
    sequences[2, 10] = eos
    sequences[3] = eos
    sequences[4, :, 2] = eos + 1
    got, wanted = cut_at_end(sequences, eos), stock_cut(sequences, eos)
    assert [len(row) for row in got][:4] == [0, min(4, len(wanted[1])), min(10, len(wanted[2])), 0]
    assert len(got[4]) == 11
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_cut_of_no_frames() -> None:
    assert [row.shape for row in cut_at_end(torch.zeros(2, 0, 4, dtype=torch.int64), 0)] == [(0, 4)] * 2


# ------------------------------------------------------------------------------------------------------------ default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_is_the_stock_loop(codec: Any, dtype: torch.dtype) -> None:
    codec.to(dtype)
    rows = codes(codec)
    wanted, calls = stock_loop(codec, rows), Calls(codec)
    path = CodecPath(codec, on_fault=pytest.fail)
    assert_equal(path.decode(rows), wanted)
    assert calls.rows == [1] * len(rows)
    assert path.bytes() == 0
    assert path.dtype == dtype


def test_the_end_of_generate(made: Any) -> None:
    """Codes as generate() returns them, views of one tensor: what stock makes of them."""
    sequences = code_prompt(made, rows=3, frames=7)
    sequences[1, 4] = made.config.codebook_eos_token_id
    rows = cut_at_end(sequences, made.config.codebook_eos_token_id)
    assert [len(row) for row in rows] == [7, 4, 7]
    assert_equal(CodecPath(made.codec_model).decode(rows), stock_loop(made.codec_model, rows))


def test_asking_for_the_dtype_it_has_copies_nothing(codec: Any) -> None:
    rows = codes(codec)
    path = CodecPath(codec, "fp32")
    assert_equal(path.decode(rows), stock_loop(codec, rows))
    assert path.bytes() == 0


@pytest.mark.parametrize("options", [{}, {"format": "bf16"}, {"batch_frames": 99}])
def test_a_row_without_frames_is_refused_as_stock_refuses_it(codec: Any, options: dict[str, Any]) -> None:
    rows = codes(codec, (4, 0, 4))
    with pytest.raises(RuntimeError) as wanted:
        stock_loop(codec, rows)
    with pytest.raises(RuntimeError) as got:
        CodecPath(codec, **options, on_fault=pytest.fail).decode(rows)
    assert str(got.value) == str(wanted.value)


def test_nothing_to_decode(codec: Any) -> None:
    assert CodecPath(codec).decode([]) == []


# ------------------------------------------------------------------------------------------------------------ batches


def small_window() -> Any:
    codec = build("base").codec_model
    codec.decoder_transformer.config.sliding_window = 5
    return codec


@pytest.mark.parametrize(
    "make",
    [lambda: build("base").codec_model, lambda: build_small_csm(codebooks=8).codec_model, small_window],
    ids=["tiny", "small", "short window"],
)
def test_padding_on_the_right_changes_nothing(make: Callable[[], Any]) -> None:
    """In fp64, where the order of a sum shows in the 15th digit and a leak of padding would show at once."""
    codec = forget_tables(make().double())
    rows = codes(codec, (7, 8, 8, 8))
    wanted, calls = stock_loop(codec, rows), Calls(codec)
    got = CodecPath(codec, batch_frames=32, on_fault=pytest.fail).decode(rows)
    assert calls.rows == [4]
    for ours, theirs in zip(got, wanted):
        assert len(ours) == len(theirs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))


def test_a_batch_in_fp32_is_within_rounding(codec: Any) -> None:
    rows = codes(codec)
    wanted, calls = stock_loop(codec, rows), Calls(codec)
    got = CodecPath(codec, batch_frames=100, on_fault=pytest.fail).decode(rows)
    assert calls.rows == [4, 1, 1]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 * max(float(x.abs().max()) for x in wanted))


@pytest.mark.parametrize(
    ("batch_frames", "lengths", "calls"),
    [
        (100, (10, 10, 10, 10), [4]),
        (20, (10, 10, 10, 10), [2, 2]),
        (39, (10, 10, 10, 10), [1, 3]),
        (19, (10, 10, 10), [1, 1, 1]),
        (10**6, (40, 5, 39, 4, 38, 3), [3, 3]),
        (10**6, (1, 2, 4, 8, 16), [1, 1, 1, 1, 1]),
    ],
)
def test_rows_of_similar_length_share_a_call(
    codec: Any, batch_frames: int, lengths: tuple[int, ...], calls: list[int]
) -> None:
    seen = Calls(codec)
    sounds = CodecPath(codec, batch_frames=batch_frames, on_fault=pytest.fail).decode(codes(codec, lengths))
    assert [len(sound) for sound in sounds] == [n * FRAME_SAMPLES for n in lengths]
    assert sorted(seen.rows) == calls


# ------------------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("batch_frames", [0, 100])
def test_fp32_sound_of_a_bf16_codec(half: Any, batch_frames: int) -> None:
    rows = codes(half)
    wanted = stock_loop(copy.deepcopy(half).float(), rows)
    calls = Calls(half)
    path = CodecPath(half, "fp32", batch_frames, on_fault=pytest.fail)
    got = path.decode(rows)
    assert set(calls.dtypes) == {torch.float32}
    assert path.dtype == torch.float32
    if batch_frames:
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    else:
        assert_equal(got, wanted)
    assert half.dtype == torch.bfloat16
    stock = stock_loop(half, rows)
    assert all(x.dtype == torch.bfloat16 and not torch.equal(x.float(), y) for x, y in zip(stock, wanted))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_lowered_codec(codec: Any, name: str, dtype: torch.dtype) -> None:
    """At most twice the error of the stock codec cast whole, and the caller's dtype stays."""
    rows = codes(codec)
    truth = torch.cat(stock_loop(copy.deepcopy(codec).double(), rows))
    eager = torch.cat(stock_loop(copy.deepcopy(codec).to(dtype), rows))
    calls = Calls(codec)
    path = CodecPath(codec, name, on_fault=pytest.fail)
    got = path.decode(rows)
    assert set(calls.dtypes) == {dtype}
    assert {sound.dtype for sound in got} == {path.dtype} == {torch.float32}
    for size in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
        assert 0 < size(torch.cat(got) - truth) <= 2 * size(eager - truth)


def test_counts_that_do_not_fit_fp16(codec: Any) -> None:
    for module in codec.modules():
        if hasattr(module, "cluster_usage"):
            module.cluster_usage.mul_(1e6)
            module.embed_sum.mul_(1e6)
    rows = codes(codec)
    got, wanted = CodecPath(codec, "fp16", on_fault=pytest.fail).decode(rows), stock_loop(codec, rows)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-2 * float(wanted[3].abs().max()))


def test_the_copy_holds_what_decoding_reads(codec: Any) -> None:
    path = CodecPath(codec, "bf16")
    assert path.bytes() == 0
    path.decode(codes(codec, (2,)))
    parts = (codec.quantizer, codec.upsample, codec.decoder_transformer, codec.decoder)
    values = sum(p.numel() for part in parts for p in part.parameters())
    values += codec.config.num_quantizers * codec.config.codebook_size * codec.config.codebook_dim
    assert 2 * values <= path.bytes() < 2 * values + 4096  # rotary frequencies and the sizes of convolutions
    path.use(format="keep")
    assert path.bytes() == 0
    assert_equal(path.decode(codes(codec)), stock_loop(codec, codes(codec)))


def test_autocast_does_not_reach_the_copy(half: Any) -> None:
    rows, path = codes(half), CodecPath(half, "fp32", on_fault=pytest.fail)
    wanted = path.decode(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(path.decode(rows), wanted)


def test_a_copy_made_in_inference_mode_serves_outside(half: Any) -> None:
    rows, path = codes(half), CodecPath(half, "fp32", on_fault=pytest.fail)
    with torch.inference_mode():
        path.decode(rows)
    assert_equal(path.decode(rows), stock_loop(copy.deepcopy(half).float(), rows))


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.conv.weight",
        "decoder_transformer.layers.0.mlp.fc1.weight",
        "upsample.conv.weight",
        "embed_sum",
    ],
)
@pytest.mark.parametrize("assign", [False, True], ids=["in place", "assigned"])
def test_stale_weights_are_noticed(half: Any, name: str, assign: bool) -> None:
    rows, path = codes(half), CodecPath(half, "fp32", on_fault=pytest.fail)
    before = path.decode(rows)
    tensors = dict((*half.named_parameters(), *half.named_buffers()))
    name = next(key for key in tensors if key.endswith(name))
    changed = tensors[name].detach().clone()
    changed.view(-1)[3] += 0.5
    if name.endswith("embed_sum"):
        rows[0][0, 0] = 0  # the vector that changes is code 0's, in the first codebook
        before = path.decode(rows)
    if assign:
        tensors[name].data = changed
    else:
        tensors[name].data.copy_(changed)
    got = path.decode(rows)
    assert_equal(got, stock_loop(forget_tables(copy.deepcopy(half)).float(), rows))
    assert not torch.equal(got[0], before[0])


def test_the_copy_is_made_once(half: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions = []
    convert = codec_file._converted
    monkeypatch.setattr(codec_file, "_converted", lambda *a: conversions.append(1) or convert(*a))
    path = CodecPath(half, "fp32")
    for seed in range(3):
        path.decode(codes(half, seed=seed))
    next(half.encoder.parameters()).data += 1  # which decoding never reads
    path.decode(codes(half))
    assert len(conversions) == 1


# -------------------------------------------------------------------------------------------------------------- faults


def explode(output: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("not enough memory, says the test")


def spoil(value: float) -> Callable[[Tensor], Tensor]:
    def harm(output: Tensor) -> Tensor:
        output = output.clone()
        output[-1, 0, 17] = value
        return output

    return harm


HARMS = {
    "exception": (explode, "OutOfMemoryError: not enough memory"),
    "nan": (spoil(math.nan), "1 samples that are not finite"),
    "infinity": (spoil(-math.inf), "1 samples that are not finite"),
    "short": (lambda output: output[..., :-1], "samples instead of"),
    "long": (lambda output: torch.cat([output, output[..., -5:]], dim=-1), "samples instead of"),
    "rows missing": (lambda output: output[:-1], "samples instead of"),
}


@pytest.fixture(params=["batched", "converted", "both"])
def way(request: pytest.FixtureRequest, codec: Any, half: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A codec and settings under which some calls are not the stock loop's."""
    yield {
        "batched": (codec, {"batch_frames": 100}),
        "converted": (half, {"format": "fp32"}),
        "both": (half, {"format": "fp32", "batch_frames": 100}),
    }[request.param]


@pytest.mark.parametrize("harm", HARMS)
def test_every_fault_ends_in_the_stock_sound(way: tuple[Any, dict[str, Any]], harm: str) -> None:
    codec, options = way
    rows = codes(codec, (6, 6, 5))
    wanted = stock_loop(codec, rows)
    stock_dtype, broken, faults = codec.dtype, [True], []
    act, said = HARMS[harm]

    def fast_only(output: Tensor) -> Tensor:
        return act(output) if broken[0] and (output.shape[0] > 1 or output.dtype != stock_dtype) else output

    Calls(codec, fast_only)
    path = CodecPath(codec, **options, on_fault=faults.append)
    got = path.decode(rows)
    assert {sound.dtype for sound in got} == {path.dtype}
    assert_equal(got, [sound.to(path.dtype) for sound in wanted])
    assert len(faults) == (1 if "batch_frames" in options else 3)
    assert all(said in fault for fault in faults), faults
    broken[0] = False
    again = path.decode(rows)
    assert len(faults) == (1 if "batch_frames" in options else 3)
    assert not all(torch.equal(a, b) for a, b in zip(again, got)), "the fast way is tried again"


def test_only_the_rows_of_the_broken_call_are_decoded_again(codec: Any) -> None:
    rows, faults = codes(codec, (12, 12, 6, 6)), []
    calls = Calls(codec, lambda output: output / 0 if output.shape == (2, 1, 6 * FRAME_SAMPLES) else output)
    wanted = stock_loop(codec, rows)
    calls.rows.clear()
    got = CodecPath(codec, batch_frames=24, on_fault=faults.append).decode(rows)
    assert calls.rows == [2, 2, 1, 1]
    assert_equal(got[2:], wanted[2:])
    assert len(faults) == 1
    assert "2 rows of 6, 6 frames" in faults[0]


def test_no_room_for_the_copy(half: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(codec_file, "_converted", full)
    rows, faults = codes(half, (4, 2)), []
    path = CodecPath(half, "fp32", on_fault=faults.append)
    assert_equal(path.decode(rows), [sound.float() for sound in stock_loop(half, rows)])
    assert all("MemoryError" in fault for fault in faults)
    assert path.bytes() == 0


def test_an_exception_of_the_stock_codec_is_tried_once_more(codec: Any) -> None:
    rows, faults, failures = codes(codec, (4, 2, 3)), [], [1]
    wanted = stock_loop(codec, rows)
    seen: list[int] = []

    def now_and_then(output: Tensor) -> Tensor:
        seen.append(output.shape[-1])
        return explode(output) if len(seen) in failures else output

    Calls(codec, now_and_then)
    path = CodecPath(codec, on_fault=faults.append)
    assert_equal(path.decode(rows), wanted)
    assert len(seen) == 4
    assert faults == ["the stock codec failed on row 0: OutOfMemoryError: not enough memory, says the test"]

    seen.clear()
    failures[:] = [2, 3]
    with pytest.raises(RuntimeError, match=r"failed twice on the 2 frames of row 1 .*the codes are intact") as raised:
        path.decode(rows)
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert len(seen) == 3


@pytest.mark.parametrize("options", [{}, {"format": "bf16"}, {"batch_frames": 99}])
@pytest.mark.parametrize("code", [-1, 32])
def test_a_code_without_a_vector(codec: Any, options: dict[str, Any], code: int) -> None:
    rows = codes(codec, (4, 4))
    rows[1][2, 3] = code
    with pytest.raises(IndexError):
        stock_loop(codec, rows)
    calls = Calls(codec)
    with pytest.raises(IndexError, match=f"row 1 holds the code {code} in frame 2, codebook 3: .* 0 to 31"):
        CodecPath(codec, **options, on_fault=pytest.fail).decode(rows)
    assert calls.rows == [], "on a GPU the call would abort the process"


# -------------------------------------------------------------------------------------------------------------- errors


def test_errors(codec: Any) -> None:
    with pytest.raises(ValueError, match="format must be one of keep, fp32, bf16, fp16, got 'int8'"):
        CodecPath(codec, "int8")
    with pytest.raises(ValueError, match="batch_frames must be at least 0, got -1"):
        CodecPath(codec, batch_frames=-1)
    path = CodecPath(codec)
    with pytest.raises(ValueError, match="format"):
        path.use(format="fp8", batch_frames=8)
    assert (path.format, path.batch_frames) == ("keep", 0)


@pytest.mark.parametrize("options", [{"format": "fp32"}, {"batch_frames": 8}])
def test_only_a_causal_mimi_is_changed(codec: Any, options: dict[str, Any]) -> None:
    """Without causality padding reaches the sound: one frame of it changes the last samples of a row."""
    codec.config.use_causal_conv = False
    for module in codec.modules():
        if hasattr(module, "causal"):
            module.causal = False
    rows = codes(codec, (4, 3))
    assert_equal(CodecPath(codec).decode(rows), stock_loop(codec, rows))
    with pytest.raises(ValueError, match=r"no causal Mimi.*MimiModel"):
        CodecPath(codec, **options)
