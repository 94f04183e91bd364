"""What a frame needs beside the two stacks: end of speech, and one position further; a program per row."""

from __future__ import annotations

from torch import Tensor

from csm_kernels._target import tl, triton


@triton.jit
def _finish_kernel(
    codes_ptr,
    ended_ptr,
    end_code_ptr,
    judged_ptr,
    pad_code_ptr,
    pads_ptr,
    sync_ptr,
    other_sync_ptr,
    flags_ptr,
    faults_ptr,
    first_vocab,
    vocab,
    CODEBOOKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pads a row that had ended before, and marks one whose first ``judged`` codes all are the code of the end.

    What went wrong in the frame is judged before that, and added to the bits of ``faults``.
    """
    row, k = tl.program_id(0), tl.arange(0, BLOCK)
    inside = k < CODEBOOKS
    codes = tl.load(codes_ptr + row * CODEBOOKS + k, mask=inside, other=0)
    limit = tl.where(k == 0, first_vocab, vocab)
    stray = tl.max(((codes < 0) | ((codes >= limit) & inside)).to(tl.int32), 0)
    word = tl.where(tl.load(flags_ptr + row) != 0, 2, 0) | tl.where(stray != 0, 4, 0)
    word |= tl.where((tl.load(sync_ptr + 1) | tl.load(other_sync_ptr + 1)) != 0, 1, 0)
    tl.atomic_or(faults_ptr, word, mask=word != 0)
    ended = tl.load(ended_ptr + row) != 0
    if (tl.load(pads_ptr) != 0) & ended:
        codes = tl.zeros_like(codes) + tl.load(pad_code_ptr)
        tl.store(codes_ptr + row * CODEBOOKS + k, codes, mask=inside)
    other = (codes != tl.load(end_code_ptr)) & (k < tl.load(judged_ptr))
    tl.store(ended_ptr + row, ended | (tl.max(other.to(tl.int32), 0) == 0))


@triton.jit
def _advance_kernel(allowed_ptr, length_ptr, position_ptr, frame_ptr, capacity):
    """The position just computed may be looked at; the next one comes behind it."""
    row = tl.program_id(0)
    length = tl.load(length_ptr + row)
    tl.store(allowed_ptr + row.to(tl.int64) * capacity + length, True, mask=length < capacity)
    tl.store(length_ptr + row, length + 1)
    tl.store(position_ptr + row, tl.load(position_ptr + row) + 1)
    tl.store(frame_ptr + row, tl.load(frame_ptr + row) + 1)


def launch_finish(
    codes: Tensor,
    ended: Tensor,
    end_code: Tensor,
    judged: Tensor,
    pad_code: Tensor,
    pads: Tensor,
    syncs: tuple[Tensor, Tensor],
    flags: Tensor,
    faults: Tensor,
    vocabs: tuple[int, int],
) -> None:
    """End-of-speech rule and padding of one frame, in place, and what went wrong in it.

    Args:
        codes: ``[B, codebooks]`` int64, contiguous; a row that had ended is overwritten with ``pad_code`` where ``pads``.
        ended: ``[B]`` bool; True from the frame on whose first ``judged`` codes all are ``end_code``.
        end_code: ``[1]`` int64.
        judged: ``[1]`` int64: all codebooks but the last for Hugging Face, all for Sesame.
        pad_code: ``[1]`` int64.
        pads: ``[1]`` bool.
        syncs: the ``sync`` buffers of the frame's two stacks.
        flags: ``[B]`` int32, 1 where a row's logits were broken, as :func:`~csm_kernels.sampling.launch_sample` sets it.
        faults: ``[1]`` int32, to which are added 1 where a grid barrier timed out, 2 where logits were broken and 4 where
            a code is out of range.
        vocabs: tokens of the first codebook and of each other one.
    """
    batch, books = codes.shape
    block = triton.next_power_of_2(books)
    _finish_kernel[(batch,)](
        codes,
        ended,
        end_code,
        judged,
        pad_code,
        pads,
        *syncs,
        flags,
        faults,
        *vocabs,
        CODEBOOKS=books,
        BLOCK=block,
        num_warps=1,
    )


def launch_advance(allowed: Tensor, length: Tensor, position: Tensor, frame: Tensor) -> None:
    """Mark slot ``length`` in ``allowed`` ``[B, C]`` bool; add one to ``length``, ``position``, ``frame``, ``[B]`` int64."""
    _advance_kernel[(len(length),)](allowed, length, position, frame, allowed.shape[1], num_warps=1)
