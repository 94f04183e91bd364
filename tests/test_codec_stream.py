"""Chunks of sound that join without a seam: concatenated they are the offline decode, at any chunk size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from csm_models import FRAME_SAMPLES, build
from torch import Tensor

from csm_runtime.codec_stream import CodecStream


@pytest.fixture(scope="module")
def codec() -> Any:
    model = build("base")
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.codec_model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_(generator=generator)
    return model.codec_model.eval()


def codes_of(codec: Any, rows: int, frames: int) -> Tensor:
    shape = (rows, frames, codec.config.num_quantizers)
    return torch.randint(0, codec.config.codebook_size, shape, generator=torch.Generator().manual_seed(1))


def offline(codec: Any, codes: Tensor) -> Tensor:
    with torch.no_grad():
        return codec.decode(codes.transpose(1, 2)).audio_values[:, 0].float()


def in_chunks(codec: Any, codes: Tensor, sizes: list[int]) -> Tensor:
    stream, parts, at = CodecStream(codec), [], 0
    for size in sizes:
        parts.append(stream.decode(codes[:, at : at + size]))
        assert parts[-1].shape == (len(codes), size * FRAME_SAMPLES) and parts[-1].dtype == torch.float32
        at += size
    assert stream.frames == at == codes.shape[1]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("sizes", [[1] * 12, [2] * 6, [5, 7], [1, 9, 2], [12]])
@pytest.mark.parametrize("rows", [1, 3])
def test_chunks_are_the_offline_decode(codec: Any, rows: int, sizes: list[int]) -> None:
    codes = codes_of(codec, rows, 12)
    wanted = offline(codec, codes)
    assert wanted.std() > 1e-3
    assert float((in_chunks(codec, codes, sizes) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_longer_than_the_transformer_looks_back(codec: Any) -> None:
    codec = copy.deepcopy(codec)
    codec.config.sliding_window = 10
    codes = codes_of(codec, 1, 30)  # two positions of the transformer per frame
    wanted = offline(codec, codes)
    far = copy.deepcopy(codec)
    far.config.sliding_window = 250
    assert float((offline(far, codes) - wanted).abs().max()) > 1e-3 * float(wanted.abs().max()), "the window matters"
    assert float((in_chunks(codec, codes, [1, 4] * 6) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_replicated_padding(codec: Any) -> None:
    codec = copy.deepcopy(codec)
    for module in codec.decoder.modules():
        if hasattr(module, "pad_mode"):
            module.pad_mode = "replicate"
    codes = codes_of(codec, 1, 6)
    wanted = offline(codec, codes)
    assert float((in_chunks(codec, codes, [1, 2, 3]) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_bf16_codec_gives_fp32_sound(codec: Any) -> None:
    half = copy.deepcopy(codec).bfloat16()
    for module in half.modules():
        if hasattr(module, "_embed"):
            module._embed = None
    codes = codes_of(half, 1, 6)
    made, wanted = in_chunks(half, codes, [1] * 6), offline(half, codes)
    assert float((made - wanted).norm() / wanted.norm()) < 0.05


def test_the_codec_is_not_changed(codec: Any) -> None:
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    codes = codes_of(codec, 1, 4)
    first = in_chunks(codec, codes, [2, 2])
    assert all(torch.equal(before[name], tensor) for name, tensor in codec.state_dict().items())
    assert torch.equal(in_chunks(codec, codes, [2, 2]), first), "streams share nothing"


def test_a_bad_code_leaves_the_stream_where_it_stood(codec: Any) -> None:
    codes = codes_of(codec, 1, 4)
    stream = CodecStream(codec)
    first = stream.decode(codes[:, :2])
    bad = codes[:, 2:].clone()
    bad[0, 1, 3] = codec.config.codebook_size
    with pytest.raises(IndexError, match="codes must be 0 to"):
        stream.decode(bad)
    made = torch.cat([first, stream.decode(codes[:, 2:])], dim=1)
    assert float((made - offline(codec, codes)).abs().max()) < 1e-4 * float(made.abs().max())


@pytest.mark.parametrize("shape", [(1, 0, 4), (4, 4), (2, 1, 4)])
def test_other_shapes_are_refused(codec: Any, shape: tuple[int, ...]) -> None:
    stream = CodecStream(codec)
    stream.decode(codes_of(codec, 1, 1))
    with pytest.raises(ValueError, match=r"codes must be \[1, F, K\]"):
        stream.decode(torch.zeros(shape, dtype=torch.int64))


def test_codecs_that_cannot_be_streamed_are_refused(codec: Any) -> None:
    with pytest.raises(ValueError, match="Linear has no quantizer"):
        CodecStream(torch.nn.Linear(2, 2))
    ahead = copy.deepcopy(codec)
    ahead.config.use_causal_conv = False
    with pytest.raises(ValueError, match="look ahead"):
        CodecStream(ahead)
    trimmed = copy.deepcopy(codec)
    trimmed.upsample.padding_left = 1
    with pytest.raises(ValueError, match="trims its transposed"):
        CodecStream(trimmed)
