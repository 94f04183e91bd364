"""Embedding of a frame: the kernel against fp64 and against transformers' own module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csm_kernels import embed
from csm_kernels._tiles import override_tiles
from csm_kernels.embed import embed_frame, embed_frame_ref, embed_tokens_ref
from csm_kernels.quant import dequantize, quantize
from csm_kernels.testing import assert_close, assert_untouched, guarded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Inputs:
    """Codes and tables; the tables lie between rows of infinities, so that a read out of bounds shows."""

    def __init__(self, device: torch.device, books: int, vocab: int, width: int, dtype: torch.dtype, rows: int = 3):
        def table(height: int) -> Tensor:
            whole = torch.full((height + 2, width), float("inf"), dtype=dtype)
            whole[1:-1] = torch.randn(height, width).to(dtype)
            return whole.to(device)[1:-1]

        self.vocab = vocab
        self.table, self.text_table = table(books * vocab), table(40)
        self.codes = torch.randint(0, vocab, (rows, books), device=device)
        self.codes[0, 0], self.codes[0, -1], self.codes[1, 0] = 0, vocab - 1, vocab - 1
        self.text_ids = torch.randint(0, 40, (rows,), device=device)
        self.text_ids[0], self.text_ids[1] = 39, 0
        self.mask = torch.rand(rows, books + 1, device=device) < 0.6


def summed(given: Inputs, dtype: torch.dtype, text: bool = False, mask: Tensor | None = None) -> Tensor:
    """All embeddings, masked and summed in ``dtype``, as Sesame's model does; every id in range."""
    books = given.codes.shape[-1]
    offsets = torch.arange(books, device=given.codes.device) * given.vocab
    vectors = given.table[given.codes + offsets]
    if text:
        vectors = torch.cat([vectors, given.text_table[given.text_ids][..., None, :].to(vectors.dtype)], dim=-2)
    if mask is not None:
        if text and mask.shape[-1] == books:
            mask = torch.cat([mask, torch.ones_like(mask[..., :1])], dim=-1)
        vectors = vectors * mask[..., None]
    return vectors.to(dtype).sum(dim=-2)


def check(given: Inputs, out: Tensor, text: bool = False, mask: Tensor | None = None) -> None:
    assert out.dtype == given.table.dtype and out.is_contiguous()
    truth = summed(given, torch.float64, text, mask)
    assert_close(
        out, truth, summed(given, out.dtype, text, mask), name="embed_frame", terms=given.codes.shape[-1] + text
    )


@pytest.mark.parametrize(
    ("books", "vocab", "width"), [(32, 67, 1024), (32, 11, 63), (1, 5, 127), (3, 2, 257), (33, 7, 999), (70, 3, 1)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(device: torch.device, books: int, vocab: int, width: int, dtype: torch.dtype) -> None:
    given = Inputs(device, books, vocab, width, dtype)
    args = given.codes, given.table, given.vocab
    check(given, embed_frame(*args))
    check(given, embed_frame(*args, given.text_ids, given.text_table), True)
    for mask in (given.mask, given.mask[:, :-1]):
        check(given, embed_frame(*args, given.text_ids, given.text_table, mask), True, mask)
    check(given, embed_frame(*args, mask=given.mask[:, :-1]), False, given.mask[:, :-1])


def test_a_real_frame(device: torch.device) -> None:
    given = Inputs(device, 32, 2051, 2048, torch.bfloat16, rows=2)
    check(given, embed_frame(given.codes, given.table, 2051, given.text_ids, given.text_table), True)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_codebooks_in_several_pieces(device: torch.device, size: int) -> None:
    given = Inputs(device, 13, 5, 70, torch.float32)
    with override_tiles("embed", BLOCK_K=size, BLOCK_D=32):
        out = embed_frame(given.codes, given.table, 5, given.text_ids, given.text_table, given.mask)
    check(given, out, True, given.mask)


def test_dtypes_of_the_tables_may_differ(device: torch.device) -> None:
    given = Inputs(device, 4, 5, 64, torch.float32)
    given.text_table = given.text_table.bfloat16()
    check(given, embed_frame(given.codes, given.table, 5, given.text_ids, given.text_table), True)


def test_prefill_and_strides(device: torch.device) -> None:
    """Sesame's tokens, ``[B, T, K + 1]`` with the text last, and codes that came as ``[B, K, T]``, read where they are."""
    given = Inputs(device, 8, 9, 96, torch.float32)
    given.table = torch.cat([given.table, given.table], dim=1)[:, 32:128]
    given.text_table = torch.cat([given.text_table, given.text_table], dim=1)[:, 32:128]
    tokens = torch.randint(0, 9, (2, 10, 9), device=device)[:, ::2]
    mask = (torch.rand(2, 10, 9, device=device) < 0.6)[:, 1::2]
    given.codes, given.text_ids = tokens[..., :-1], tokens[..., -1]
    out = embed_frame(given.codes, given.table, 9, given.text_ids, given.text_table, mask)
    assert out.shape == (2, 5, 96)
    check(given, out, True, mask)
    given.codes = torch.randint(0, 9, (2, 8, 5), device=device).transpose(1, 2)
    strided = torch.rand(2, 8, 5, device=device).transpose(1, 2) < 0.6
    check(given, embed_frame(given.codes, given.table, 9, mask=strided), False, strided)
    given.codes = given.codes[:1, :1].expand(3, 4, 8)
    check(given, embed_frame(given.codes, given.table, 9))


WILD = (-1, 9, 10**9, -(2**62), 2**62)


@pytest.mark.parametrize("wild", WILD)
@pytest.mark.parametrize("triton", [True, False])
def test_ids_out_of_range(device: torch.device, monkeypatch: pytest.MonkeyPatch, wild: int, triton: bool) -> None:
    """A row with one that counts is NaN, its neighbours are not; one that does not count changes nothing."""
    if not triton:
        monkeypatch.setattr(embed, "runs_triton", lambda *tensors: False)
    for book in (0, 2, 5):
        given = Inputs(device, 6, 9, 63, torch.bfloat16, rows=4)
        given.mask[:] = True
        given.mask[2, book] = False
        clean = embed_frame(given.codes, given.table, 9, given.text_ids, given.text_table, given.mask)
        given.codes[1, book] = given.codes[2, book] = wild
        out = embed_frame(given.codes, given.table, 9, given.text_ids, given.text_table, given.mask)
        assert out[1].isnan().all()
        assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])
        alone = embed_frame(given.codes, given.table, 9)
        assert alone.isnan().all(dim=1).tolist() == [False, True, True, False] and alone[[0, 3]].isfinite().all()


@pytest.mark.parametrize("wild", (-1, 40, 2**62, -(2**62)))
@pytest.mark.parametrize("triton", [True, False])
def test_text_out_of_range(device: torch.device, monkeypatch: pytest.MonkeyPatch, wild: int, triton: bool) -> None:
    if not triton:
        monkeypatch.setattr(embed, "runs_triton", lambda *tensors: False)
    given = Inputs(device, 6, 9, 63, torch.bfloat16, rows=4)
    given.mask[:, -1] = torch.tensor([True, True, False, True])
    clean = embed_frame(given.codes, given.table, 9, given.text_ids, given.text_table, given.mask)
    given.text_ids[1] = given.text_ids[2] = wild
    out = embed_frame(given.codes, given.table, 9, given.text_ids, given.text_table, given.mask)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])
    for mask in (None, given.mask[:, :-1]):
        alone = embed_frame(given.codes, given.table, 9, given.text_ids, given.text_table, mask)
        assert alone.isnan().all(dim=1).tolist() == [False, True, True, False] and alone[[0, 3]].isfinite().all()


def test_broken_embeddings_stay_in_their_rows(device: torch.device) -> None:
    given = Inputs(device, 4, 9, 70, torch.float32)
    given.codes[:] = torch.tensor([[1], [2], [3]])
    clean = embed_frame(given.codes, given.table, 9)
    given.table[9 + 2, 5] = float("nan")
    out = embed_frame(given.codes, given.table, 9)
    assert out[1, 5].isnan()
    out[1, 5] = clean[1, 5]
    assert torch.equal(out, clean)
    mask = torch.ones(3, 4, dtype=torch.bool, device=device)
    mask[1, 1] = False
    assert embed_frame(given.codes, given.table, 9, mask=mask).isfinite().all()


@pytest.mark.parametrize("width", [63, 1024])
def test_every_output_is_written_and_nothing_else(device: torch.device, width: int) -> None:
    given = Inputs(device, 5, 9, width, torch.bfloat16)
    out, whole = guarded((3, width), torch.bfloat16, device)
    embed.launch_embed(given.codes, given.table, 9, given.text_ids, given.text_table, given.mask, out)
    assert out.isfinite().all()
    assert_untouched(whole)


def test_the_same_every_time(device: torch.device) -> None:
    given = Inputs(device, 32, 9, 999, torch.bfloat16)
    first = embed_frame(given.codes, given.table, 9)
    assert all(torch.equal(first, embed_frame(given.codes, given.table, 9)) for _ in range(3))


@pytest.mark.dispatcher
def test_the_reference_runs_where_triton_does_not(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Inputs(device, 8, 9, 64, torch.bfloat16)
    args = given.codes, given.table, 9, given.text_ids, given.text_table, given.mask
    ours = embed_frame(*args)
    monkeypatch.setattr(embed, "runs_triton", lambda *tensors: False)
    theirs = embed_frame(*args)
    assert torch.equal(theirs, embed_tokens_ref(*args).bfloat16())
    check(given, theirs, True, given.mask)
    assert torch.allclose(ours, theirs, atol=0.05)
    assert torch.allclose(embed_tokens_ref(*args[:3]), embed_frame_ref(*args[:3]), atol=1e-5)
    torch.library.opcheck(torch.ops.csm_kernels.embed_frame.default, args)


def test_the_stock_embedding(device: torch.device) -> None:
    csm = pytest.importorskip("transformers.models.csm.modeling_csm")
    from transformers import CsmConfig

    config = CsmConfig(num_codebooks=8, vocab_size=51, hidden_size=64)
    module = csm.CsmBackboneModelEmbeddings(config)
    codes = torch.randint(0, 51, (2, 5, 8))
    table = module.embed_audio_tokens.weight.detach()
    ours = embed_frame(codes.to(device), table.to(device), 51).cpu()
    assert torch.allclose(ours, module(codes), atol=1e-5)


@pytest.mark.dispatcher
def test_the_ops_are_sound(device: torch.device) -> None:
    given = Inputs(device, 4, 9, 16, torch.float32)
    torch.library.opcheck(torch.ops.csm_kernels.embed_frame.default, (given.codes, given.table, 9, None, None, None))
    args = given.codes, given.table, 9, given.text_ids, given.text_table, given.mask
    torch.library.opcheck(torch.ops.csm_kernels.embed_frame.default, args)


@pytest.mark.slow
@pytest.mark.dispatcher
def test_compiles_whole(device: torch.device) -> None:
    given = Inputs(device, 4, 9, 16, torch.float32)

    def step(codes: Tensor, mask: Tensor) -> Tensor:
        return embed_frame(codes + 1, given.table, 9, given.text_ids, given.text_table, mask) * 2

    codes = given.codes.clamp(0, 7)
    got = torch.compile(step, fullgraph=True)(codes, given.mask)
    assert torch.allclose(got, step(codes, given.mask), atol=1e-6)


def test_empty(device: torch.device) -> None:
    table = torch.ones(18, 8, device=device)
    assert embed_frame(torch.zeros(0, 2, dtype=torch.int64, device=device), table, 9).shape == (0, 8)
    assert embed_frame(torch.zeros(3, 0, 2, dtype=torch.int64, device=device), table, 9).shape == (3, 0, 8)


CODES = torch.zeros(2, 4, dtype=torch.int64)
TABLE = torch.ones(36, 8)
TEXT = torch.zeros(2, dtype=torch.int64)
MASK = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((CODES.int(), TABLE, 9), "codes must be"),
        ((CODES[:, :0], TABLE, 9), "codes must be"),
        ((CODES, TABLE, 0), "vocab must be positive"),
        ((CODES, TABLE[:35], 9), "table must have 4 x 9 rows"),
        ((CODES, TABLE.int(), 9), "table must be two-dimensional and floating"),
        ((CODES, TABLE[0], 9), "table must be two-dimensional"),
        ((CODES, torch.ones(8, 36).t(), 9), "table must have unit stride"),
        ((CODES, TABLE, 9, TEXT), "text_ids and text_table come together"),
        ((CODES, TABLE, 9, None, TABLE), "text_ids and text_table come together"),
        ((CODES, TABLE, 9, TEXT.int(), TABLE), "text_ids must be"),
        ((CODES, TABLE, 9, TEXT[:1], TABLE), "text_ids must be"),
        ((CODES, TABLE, 9, TEXT, TABLE[:, :4]), "text_table must be as wide"),
        ((CODES, TABLE, 9, TEXT, torch.ones(8, 8).t()), "text_table must have unit stride"),
        ((CODES, TABLE, 9, None, None, MASK[:, :3]), "mask must be"),
        ((CODES, TABLE, 9, None, None, MASK.float()), "mask must be"),
        ((CODES, TABLE, 9, None, None, MASK[:1]), "mask must be"),
        ((CODES, TABLE, 9, None, None, torch.ones(2, 5, dtype=torch.bool)), "mask must be"),
        ((CODES, TABLE, 9, TEXT, TABLE, torch.ones(2, 6, dtype=torch.bool)), "mask must be"),
    ],
)
def test_bad_arguments(device: torch.device, args: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed_frame(*(a.to(device) if isinstance(a, Tensor) else a for a in args))  # type: ignore[arg-type]


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
@pytest.mark.parametrize(("books", "vocab", "width"), [(32, 67, 256), (3, 2, 257), (33, 7, 63)])
def test_a_quantised_table(device: torch.device, books: int, vocab: int, width: int, fmt: str) -> None:
    """As the fused frame launches it, against the reference on what the table stands for; one code is out of range."""
    given = Inputs(device, books, vocab, width, torch.float32)
    table = quantize(given.table * torch.rand(books * vocab, 1, device=device), fmt)
    out = torch.full((3, width), float("nan"), device=device)
    embed.launch_embed(given.codes, table, vocab, None, None, None, out)
    torch.testing.assert_close(out, embed_frame_ref(given.codes, dequantize(table), vocab), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embed_frame_ref(given.codes, table, vocab), out, rtol=1e-5, atol=1e-5)
    given.codes[1, -1] = vocab
    embed.launch_embed(given.codes, table, vocab, None, None, None, out)
    assert torch.isnan(out[1]).all() and torch.isfinite(out[[0, 2]]).all()
