"""RVQ decode: the kernel against fp64 and against transformers' Mimi."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from csm_kernels import rvq
from csm_kernels._target import interpreting
from csm_kernels._tiles import override_tiles
from csm_kernels.rvq import rvq_decode, rvq_decode_ref
from csm_kernels.testing import assert_close, assert_untouched, guarded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Given = tuple[Tensor, Tensor, Tensor, Tensor, int]


def inputs(
    device: torch.device,
    shape: tuple[int, int, int] = (2, 4, 5),
    bins: int = 17,
    dim: int = 24,
    out: int = 20,
    dtype: torch.dtype = torch.float32,
    semantic: int = 1,
) -> Given:
    """The codebooks lie between rows of infinities, so that a read out of bounds shows."""
    books = torch.full((shape[1] * bins + 2, dim), float("inf"), dtype=dtype)
    books[1:-1] = torch.randn(shape[1] * bins, dim).to(dtype)
    codes = torch.randint(0, bins, shape)
    codes.view(-1)[:2] = torch.tensor([0, bins - 1])[: codes.numel()]
    first, second = (torch.randn(2, out, dim) / dim**0.5).to(dtype)
    return (
        codes.to(device),
        books.to(device)[1:-1].view(shape[1], bins, dim),
        first.to(device),
        second.to(device),
        semantic,
    )


def formula(given: Given, dtype: torch.dtype) -> Tensor:
    """Vectors of all codebooks, summed and projected in ``dtype``."""
    codes, books, first, second, semantic = given
    vectors = torch.stack([books[k][codes[:, k]] for k in range(codes.shape[1])]).to(dtype)
    sums = vectors[:semantic].sum(0), vectors[semantic:].sum(0)
    return (sums[0] @ first.to(dtype).t() + sums[1] @ second.to(dtype).t()).transpose(1, 2)


def check(given: Given, out: Tensor | None = None) -> Tensor:
    out = rvq_decode(*given) if out is None else out
    assert out.dtype == given[1].dtype and out.is_contiguous()
    terms = given[0].shape[1] + given[1].shape[2]
    assert_close(out, formula(given, torch.float64), formula(given, out.dtype), name="rvq_decode", terms=terms)
    return out


@pytest.mark.parametrize(
    ("shape", "dim", "out"),
    [
        ((1, 32, 1), 256, 512),
        ((2, 4, 6), 256, 512),
        ((3, 7, 1), 63, 127),
        ((1, 5, 63), 63, 127),
        ((2, 3, 5), 257, 20),
        ((1, 3, 2), 257, 20),
        ((9, 2, 2), 32, 65),
        ((2, 1, 3), 1, 1),
        ((1, 2, 17), 1, 1),
        ((1, 2, 1), 999, 3),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(device: torch.device, shape: tuple[int, int, int], dim: int, out: int, dtype: torch.dtype) -> None:
    check(inputs(device, shape, 17, dim, out, dtype))


@pytest.mark.parametrize("semantic", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("frames", [1, 11])
@pytest.mark.parametrize("dtype", DTYPES)
def test_semantic_codebooks(device: torch.device, semantic: int, frames: int, dtype: torch.dtype) -> None:
    check(inputs(device, (1, 4, frames), dtype=dtype, semantic=semantic))


def test_dtypes_may_differ(device: torch.device) -> None:
    codes, books, first, second, semantic = inputs(device)
    given = codes, books, first.bfloat16(), second.half(), semantic
    out = rvq_decode(*given)
    assert out.dtype == torch.float32
    assert torch.allclose(out.double(), formula(given, torch.float64), atol=1e-5)


def test_both_ways_of_summing_agree(device: torch.device) -> None:
    """One frame at a time by products in registers, sixteen by a matrix product."""
    given = inputs(device, (1, 5, 20), dim=70)
    outs = []
    for rows in (1, 16, 32):
        with override_tiles("rvq", BLOCK_R=rows, BLOCK_N=16, BLOCK_D=32):
            outs.append(check(given))
    assert torch.allclose(outs[0], outs[1], atol=1e-5) and torch.allclose(outs[1], outs[2], atol=1e-5)
    # Interpreted, a product is the host library's, and how that sums may depend on how many rows there are.
    assert interpreting() or torch.equal(outs[1], outs[2])


def test_strides_are_walked_and_not_copied(device: torch.device) -> None:
    codes, books, first, second, semantic = inputs(device, (6, 5, 8), dim=48, out=40)
    frames_first = codes.transpose(1, 2).contiguous().transpose(1, 2)
    for narrow in (codes[::2, :, 1::3], frames_first, codes[:1].expand(3, 5, 8), codes[:, 1:3, :1]):
        assert not narrow.is_contiguous()
        check((narrow, books[..., :33], first[:20, :33], second[::2, 15:], semantic))


@pytest.mark.parametrize("wild", (-1, 17, 10**9, -(2**62), 2**62))
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("frames", [3, 20])
def test_codes_out_of_range(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, wild: int, triton: bool, frames: int
) -> None:
    """The frame is NaN, the frames beside it are what they were."""
    if not triton:
        monkeypatch.setattr(rvq, "runs_triton", lambda *tensors: False)
    for book in (0, 1, 3):
        given = inputs(device, (2, 4, frames))
        clean = rvq_decode(*given)
        given[0][1, book, 1] = wild
        out = rvq_decode(*given)
        assert out[1, :, 1].isnan().all()
        out[1, :, 1] = clean[1, :, 1]
        assert torch.equal(out, clean)


@pytest.mark.parametrize("frames", [3, 20])
def test_broken_entries_stay_in_their_frames(device: torch.device, frames: int) -> None:
    given = inputs(device, (2, 4, frames))
    given[0][:] = given[0].clamp(max=15)
    clean = rvq_decode(*given)
    given[1][2, 16, 5] = float("nan")
    assert torch.equal(rvq_decode(*given), clean)
    given[0][0, 2, 2] = 16
    out = rvq_decode(*given)
    assert out[0, :, 2].isnan().all()
    out[0, :, 2] = clean[0, :, 2]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("shape", [(1, 4, 1), (3, 4, 7)])
@pytest.mark.parametrize(("dim", "out"), [(24, 20), (64, 64)])
def test_every_output_is_written_and_nothing_else(
    device: torch.device, shape: tuple[int, int, int], dim: int, out: int
) -> None:
    given = inputs(device, shape, dim=dim, out=out, dtype=torch.bfloat16)
    buffer, whole = guarded((shape[0], out, shape[2]), torch.bfloat16, device)
    rvq.launch_decode(*given, buffer)
    assert buffer.isfinite().all()
    assert_untouched(whole)


def test_the_same_every_time(device: torch.device) -> None:
    for frames in (1, 12):
        given = inputs(device, (1, 9, frames), dim=70)
        first = rvq_decode(*given)
        assert all(torch.equal(first, rvq_decode(*given)) for _ in range(3))


@pytest.mark.dispatcher
def test_the_reference_runs_where_triton_does_not(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(device, dtype=torch.bfloat16)
    ours = rvq_decode(*given)
    monkeypatch.setattr(rvq, "runs_triton", lambda *tensors: False)
    theirs = check(given)
    assert torch.equal(theirs, rvq_decode_ref(*given).bfloat16())
    assert torch.allclose(ours, theirs, atol=0.05)
    torch.library.opcheck(torch.ops.csm_kernels.rvq_decode.default, given)


def mimi() -> Any:
    """Stock's quantizer at Mimi's sizes with seeded weights and some dead entries."""
    stock = pytest.importorskip("transformers.models.mimi.modeling_mimi")
    from transformers import MimiConfig

    config = MimiConfig(num_quantizers=32)
    assert (config.codebook_size, config.codebook_dim, config.hidden_size) == (2048, 256, 512)
    quantizer = stock.MimiSplitResidualVectorQuantizer(config)
    draw = torch.Generator().manual_seed(5)
    for tensor in (*quantizer.parameters(), *(b for n, b in quantizer.named_buffers() if n.endswith("embed_sum"))):
        tensor.data.uniform_(-0.1, 0.1, generator=draw)
    for name, usage in quantizer.named_buffers():
        if name.endswith("cluster_usage"):
            usage.uniform_(0.5, 4.0, generator=draw)
            usage[::97] = 0.0
    return quantizer.eval()


def test_the_stock_quantizer(device: torch.device) -> None:
    quantizer = mimi()
    parts = quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer
    books = torch.stack([layer.codebook.embed for part in parts for layer in part.layers])
    weights = [part.output_proj.weight.detach().squeeze(-1) for part in parts]
    draw = torch.Generator().manual_seed(6)
    for shape in ((1, 32, 1), (2, 32, 6), (1, 1, 3), (2, 5, 1)):
        codes = torch.randint(0, 2048, shape, generator=draw)
        codes[0, 0, 0] = 97  # a dead entry
        with torch.no_grad():
            stock = quantizer.decode(codes)
        given = codes.to(device), books.to(device), *(w.to(device) for w in weights), 1
        ours = rvq_decode(*given)
        truth = formula(given, torch.float64)
        assert ours.shape == stock.shape
        assert_close(ours, truth, stock.to(device), name=f"Mimi, codes of {shape}", terms=32 + 256)


@pytest.mark.dispatcher
def test_the_ops_are_sound(device: torch.device) -> None:
    for frames in (1, 10):
        torch.library.opcheck(torch.ops.csm_kernels.rvq_decode.default, inputs(device, (1, 4, frames)))


@pytest.mark.slow
@pytest.mark.dispatcher
def test_compiles_whole(device: torch.device) -> None:
    codes, *rest = inputs(device)

    def step(codes: Tensor) -> Tensor:
        return rvq_decode(codes + 1, *rest) * 2

    codes = codes.clamp(max=15)
    assert torch.allclose(torch.compile(step, fullgraph=True)(codes), step(codes), atol=1e-6)


def test_empty(device: torch.device) -> None:
    codes, *rest = inputs(device)
    assert rvq_decode(codes[:0], *rest).shape == (0, 20, 5)
    assert rvq_decode(codes[..., :0], *rest).shape == (2, 20, 0)


CODES = torch.zeros(1, 4, 2, dtype=torch.int64)
BOOKS = torch.ones(4, 9, 8)
WEIGHT = torch.ones(6, 8)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((CODES.int(), BOOKS, WEIGHT, WEIGHT), "codes must be"),
        ((CODES[0], BOOKS, WEIGHT, WEIGHT), "codes must be"),
        ((CODES[:, :0], BOOKS, WEIGHT, WEIGHT), "K of at least 1"),
        ((CODES, BOOKS[0], WEIGHT, WEIGHT), "codebooks must be"),
        ((CODES, BOOKS[:, :0], WEIGHT, WEIGHT), "bins of at least 1"),
        ((CODES, BOOKS.int(), WEIGHT, WEIGHT), "codebooks must be"),
        ((CODES, BOOKS[:3], WEIGHT, WEIGHT), "codes must have at most 3 codebooks"),
        ((CODES, torch.ones(4, 8, 9).transpose(1, 2), WEIGHT, WEIGHT), "codebooks must have unit stride"),
        ((CODES, BOOKS, WEIGHT[:, :7], WEIGHT), "semantic_projection must be"),
        ((CODES, BOOKS, WEIGHT, WEIGHT.int()), "acoustic_projection must be"),
        ((CODES, BOOKS, WEIGHT, WEIGHT[:5]), "acoustic_projection must have the shape"),
        ((CODES, BOOKS, torch.ones(8, 6).t(), WEIGHT), "semantic_projection must have unit stride"),
        ((CODES, BOOKS, WEIGHT, WEIGHT, 0), "semantic must be at least 1"),
    ],
)
def test_bad_arguments(device: torch.device, args: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rvq_decode(*(a.to(device) if isinstance(a, Tensor) else a for a in args))  # type: ignore[arg-type]
