"""KV buffers of the backbone and the depth decoder, and where each row stands in them."""

from __future__ import annotations

from enum import IntFlag

import torch
from torch import Tensor

from csm_runtime.adapters.spec import ModelSpec


class Fault(IntFlag):
    """What a frame's own checks on the device found."""

    TIMED_OUT = 1
    NOT_FINITE = 2
    OUT_OF_RANGE = 4

    def __str__(self) -> str:
        return " and ".join(_FAULTS[bit] for bit in Fault if bit in self)


_FAULTS = {
    Fault.TIMED_OUT: "a grid barrier of the fused decode kernel timed out",
    Fault.NOT_FINITE: "logits that are NaN or infinite",
    Fault.OUT_OF_RANGE: "a code out of range",
}


def bytes_of(spec: ModelSpec, rows: int, capacity: int, dtype: torch.dtype) -> int:
    """Bytes that the KV buffers of a :class:`State` hold."""
    b, d = spec.backbone, spec.depth
    per_row = b.layers * b.kv_heads * capacity * b.head_dim + d.layers * d.kv_heads * spec.codebooks * d.head_dim
    return 2 * rows * per_row * dtype.itemsize


class State:
    """Everything of a batch of utterances that changes from frame to frame, preallocated.

    Sizes: ``B`` rows, ``C`` cached positions of the backbone, ``K`` codebooks.

    ``hidden`` ``[B, D]`` fp32 is the backbone's normalised last hidden state; ``codes`` ``[B, K]`` the latest frame;
    ``length`` ``[B]`` the next free cache slot; ``position`` ``[B]`` the next rotary position, which differs from
    ``length`` under left padding; ``filled`` the next free slot as the host knows it; ``allowed`` ``[B, C]`` which
    slots a row may look at; ``frame`` ``[B]`` frames made. ``all_keys`` and ``all_values`` ``[L, B, KV, C, D]`` are the
    backbone's caches, ``keys`` and ``values`` their layers.

    End of speech: ``ended`` ``[B]`` from the frame on whose first ``judged`` codes all are ``end_code``, ``[1]`` each; the
    frames after it are ``pad_code`` where ``pads``. ``faults`` ``[1]`` int32: the bits of :class:`Fault`, of all frames so far.
    ``idle`` ``[B]``: rows that :meth:`vacate` has emptied.
    """

    def __init__(self, spec: ModelSpec, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        b, d = spec.backbone, spec.depth

        def caches(layers: int, heads: int, positions: int, dim: int) -> list[Tensor]:
            return [torch.zeros(rows, heads, positions, dim, dtype=dtype, device=device) for _ in range(layers)]

        def ints(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self.rows, self.capacity = rows, capacity
        self.filled = 0
        size = (b.layers, rows, b.kv_heads, capacity, b.head_dim)
        self.all_keys = torch.zeros(size, dtype=dtype, device=device)
        self.all_values = torch.zeros(size, dtype=dtype, device=device)
        self.keys, self.values = list(self.all_keys.unbind()), list(self.all_values.unbind())
        self.depth_keys = caches(d.layers, d.kv_heads, spec.codebooks, d.head_dim)
        self.depth_values = caches(d.layers, d.kv_heads, spec.codebooks, d.head_dim)
        self.hidden = torch.zeros(rows, b.hidden, dtype=torch.float32, device=device)
        self.codes = ints(rows, spec.codebooks)
        self.length, self.position, self.frame = ints(rows), ints(rows), ints(rows)
        self.seed, self.utterance = ints(rows), ints(rows)
        self.allowed = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.end_code, self.judged, self.pad_code = ints(1), ints(1), ints(1)
        self.pads = torch.zeros(1, dtype=torch.bool, device=device)
        self.faults = torch.zeros(1, dtype=torch.int32, device=device)
        self.idle = torch.zeros(rows, dtype=torch.bool, device=device)

    def bytes(self) -> int:
        """Bytes held by the KV buffers."""
        buffers = (*self.keys, *self.values, *self.depth_keys, *self.depth_values)
        return sum(t.numel() * t.element_size() for t in buffers)

    def rewind(self, filled: int = 0) -> None:
        """Stand at a slot, with whatever the cache holds before it."""
        self.filled = filled
        self.length.fill_(filled)
        self.position.fill_(filled)

    def set_end(self, end_code: int, judged: int, pad_code: int | None) -> None:
        """The end-of-speech rule of a call; ``pad_code`` None where rows that have ended go on as they like."""
        self.end_code.fill_(end_code)
        self.judged.fill_(judged)
        self.pads.fill_(pad_code is not None)
        self.pad_code.fill_(pad_code or 0)

    def load_prompt(
        self,
        layers: list[tuple[Tensor, Tensor]],
        hidden: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        frames: int = 0,
        ended: Tensor | None = None,
    ) -> None:
        """Take over a prefilled prompt; rows beyond its batch repeat its first row and are never returned.

        Args:
            layers: per backbone layer the prompt's keys and values, ``[N, KV, T, D]``, N <= rows.
            hidden: ``[N, D]`` normalised hidden state of the last position.
            mask: ``[N, T]`` 1 where a prompt position counts, or None for all.
            positions: ``[N]`` rotary position of the last prompt position.
            frames: how many of the prompt's last positions are frames of this utterance, made before.
            ended: ``[N]`` bool, rows whose speech has ended in them; None for none.
        """
        count = layers[0][0].shape[0]
        rows = torch.arange(self.rows, device=self.hidden.device)
        rows = torch.where(rows < count, rows, torch.zeros_like(rows))
        self.filled = self._take(slice(None), rows, layers, hidden, mask, positions, frames)
        if ended is not None:
            self.ended.copy_(ended[rows])
        self.faults.zero_()

    def load_row(
        self,
        row: int,
        layers: list[tuple[Tensor, Tensor]],
        hidden: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        frames: int = 0,
    ) -> int:
        """Take over one prefilled prompt into one row, whatever the others are at.

        Args:
            row: which.
            layers: as :meth:`load_prompt` takes them, of one row.
            hidden: ``[1, D]``.
            mask: ``[1, T]`` or None.
            positions: ``[1]``.
            frames: likewise.

        Returns:
            The next free slot of the row.
        """
        first = torch.zeros(1, dtype=torch.int64, device=self.hidden.device)
        self.idle[row] = False
        return self._take(slice(row, row + 1), first, layers, hidden, mask, positions, frames)

    def _take(
        self,
        into: slice,
        rows: Tensor,
        layers: list[tuple[Tensor, Tensor]],
        hidden: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        frames: int,
    ) -> int:
        """``rows`` of a prompt into as many rows of the state; its length."""
        tokens = layers[0][0].shape[2]
        for cache, source in zip(self.keys, (k for k, _ in layers)):
            cache[into, :, :tokens].copy_(source[rows])
        for cache, source in zip(self.values, (v for _, v in layers)):
            cache[into, :, :tokens].copy_(source[rows])
        self.hidden[into].copy_(hidden[rows])
        self.length[into].fill_(tokens)
        self.position[into].copy_(positions[rows] + 1)
        self.frame[into].fill_(frames)
        self.ended[into].fill_(False)
        self.allowed[into].zero_()
        self.allowed[into, :tokens] = True if mask is None else mask[rows].bool()
        return tokens

    def copy_row(self, row: int, other: State, source: int, length: int) -> None:
        """Stand in a row where another state's row ``source`` stands, ``length`` slots of its cache filled."""
        for ours, theirs in ((self.all_keys, other.all_keys), (self.all_values, other.all_values)):
            ours[:, row, :, :length].copy_(theirs[:, source, :, :length])
        for name in ("hidden", "codes", "length", "position", "frame", "seed", "utterance", "allowed", "ended", "idle"):
            getattr(self, name)[row].copy_(getattr(other, name)[source])

    def vacate(self, row: int) -> None:
        """Nobody speaks in a row any more: it goes on with pads from an empty cache, see :meth:`park`."""
        self.ended[row] = self.idle[row] = True
        for target in (self.length, self.position, self.hidden, self.allowed):
            target[row].zero_()

    def park(self) -> None:
        """Keep vacated rows at the start of their cache, so that they never run over its end; before every frame."""
        self.length.masked_fill_(self.idle, 0)
        self.position.masked_fill_(self.idle, 0)

    def clear(self) -> None:
        """Forget everything, caches included: after a fault they may hold NaN, which a mask does not stop."""
        for buffer in (self.all_keys, self.all_values, *self.depth_keys, *self.depth_values):
            buffer.zero_()
        for row in range(self.rows):
            self.vacate(row)
        self.faults.zero_()
        self.filled = 0
