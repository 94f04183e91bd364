"""The phases of a decode step in PyTorch: the specification, and what runs where there is no Triton.

Same names, same order, same buffers as ``phases.py``, on the dequantised weights; every sum in ``dtype``. What the kernels
round on purpose is rounded here: keys and values to the cache's dtype, the SwiGLU's output to the workspace's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from csm_kernels.depth.pack import PackedDepth, PackedStack, act_dtype, one, unpacked_o
from csm_kernels.sampling import NoiseKey, SamplingParams, gumbel_noise_ref, sample_ref


class StackReference:
    """A stack's phases on ``[R, ...]`` buffers: rows ``j * B + b`` are position ``j`` of utterance ``b``.

    Args:
        stack: packed weights.
        batch: B.
        capacity: cached positions.
        cache_dtype: dtype that keys and values are rounded to.
        dtype: of every product and sum.
    """

    def __init__(
        self, stack: PackedStack, batch: int, capacity: int, cache_dtype: torch.dtype, dtype: torch.dtype
    ) -> None:
        shape, device = stack.shape, stack.norm.device
        self.stack, self.batch, self.dtype = stack, batch, dtype
        self.keys = torch.zeros(
            shape.layers, batch, shape.groups, capacity, shape.dim, dtype=cache_dtype, device=device
        )
        self.values = torch.zeros_like(self.keys)
        self.allowed = torch.ones(batch, capacity, dtype=torch.bool, device=device)
        self.act_dtype = act_dtype(stack)
        self.stream = self.qkv_out = self.attended = self.act = torch.zeros(batch, shape.width, device=device)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A product in ``dtype``."""
        return linear(x.to(self.dtype), weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm in ``dtype``."""
        x = x.to(self.dtype)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.stack.shape.eps) * weight.to(self.dtype)

    def qkv(self, l: int) -> None:
        """Norm, q, k and v."""
        bias = self.stack.qkv_bias
        x = self.norm(self.stream, self.stack.input_norm[l])
        self.qkv_out = self.linear(x, one(self.stack.qkv, l), None if bias is None else bias[l])

    def _turn(self, x: Tensor, position: Tensor) -> Tensor:
        cos, sin = (table.to(self.dtype)[position][:, None] for table in (self.stack.cos, self.stack.sin))
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-high, low], dim=-1) * sin

    def attend(self, l: int, slot: Tensor, position: Tensor) -> None:
        """``slot`` and ``position`` ``[R]`` int64: where each row's key goes, and its rotary position."""
        shape, rows = self.stack.shape, len(self.qkv_out)
        heads = self.qkv_out.view(rows, -1, shape.dim)
        q, k, v = heads.split([shape.heads, shape.groups, shape.groups], dim=1)
        q, k = self._turn(q, position), self._turn(k, position)
        b = torch.arange(self.batch, device=slot.device).repeat(rows // self.batch)
        self.keys[l, b, :, slot] = k.to(self.keys.dtype)
        self.values[l, b, :, slot] = v.to(self.values.dtype)
        keys = self.keys[l, b].to(self.dtype).repeat_interleave(shape.heads // shape.groups, dim=1)
        values = self.values[l, b].to(self.dtype).repeat_interleave(shape.heads // shape.groups, dim=1)
        scores = torch.einsum("rhd,rhcd->rhc", q, keys) * shape.dim**-0.5
        c = torch.arange(keys.shape[2], device=slot.device)
        seen = ((c < slot[:, None]) & self.allowed[b]) | (c == slot[:, None])
        if rows > self.batch:  # positions of one pass see one another
            seen |= (c >= slot.view(-1, self.batch)[0].repeat(rows // self.batch)[:, None]) & (c < slot[:, None])
        weights = torch.softmax(scores.masked_fill(~seen[:, None], float("-inf")), dim=-1)
        values = values.masked_fill(~seen[:, None, :, None], 0.0)
        self.attended = torch.einsum("rhc,rhcd->rhd", weights, values).reshape(rows, -1)

    def project(self, l: int) -> None:
        """O, added to the stream."""
        bias = self.stack.o_bias
        self.stream = self.stream + self.linear(
            self.attended, unpacked_o(self.stack, l), None if bias is None else bias[l]
        )

    def gate_up(self, l: int) -> None:
        """Norm, gate, up and SwiGLU."""
        bias = self.stack.gate_up_bias
        x = self.norm(self.stream, self.stack.post_norm[l])
        both = self.linear(x, one(self.stack.gate_up, l), None if bias is None else bias[l])
        self.act = (silu(both[:, 0::2]) * both[:, 1::2]).to(self.act_dtype)

    def down(self, l: int) -> None:
        """Down, added to the stream."""
        bias = self.stack.down_bias
        self.stream = self.stream + self.linear(self.act, one(self.stack.down, l), None if bias is None else bias[l])

    def layer(self, l: int, slot: Tensor, position: Tensor) -> None:
        """One layer."""
        self.qkv(l)
        self.attend(l, slot, position)
        self.project(l)
        self.gate_up(l)
        self.down(l)


class DepthReference(StackReference):
    """The depth decoder's phases; ``codes`` ``[B, codebooks]`` fills up, ``logits`` ``[B, V]`` are the latest.

    Args:
        packed: packed weights.
        hidden: ``[B, W]``, the backbone's hidden state.
        token: ``[B]`` int64, codebook 0.
        params: sampling parameters of each row.
        key: noise of each row.
        cache_dtype: as there.
        dtype: as there.
    """

    def __init__(
        self,
        packed: PackedDepth,
        hidden: Tensor,
        token: Tensor,
        params: SamplingParams,
        key: NoiseKey,
        cache_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(packed.stack, len(token), packed.codebooks, cache_dtype, dtype)
        self.packed, self.hidden, self.params, self.key = packed, hidden, params, key
        self.codes = torch.zeros(len(token), packed.codebooks, dtype=torch.int64, device=token.device)
        self.codes[:, 0] = token
        self.logits = torch.zeros(len(token), packed.vocab, dtype=dtype, device=token.device)

    def _entered(self, p: int) -> Tensor:
        """The stream of position ``p``, from codebook ``p - 1``."""
        packed, bias = self.packed, self.packed.projection_bias
        place = (p - 1) * packed.vocab + self.codes[:, p - 1]
        if packed.table is not None:
            return packed.table[place.clamp(0, len(packed.table) - 1)].to(self.dtype)
        assert isinstance(packed.embedding, Tensor), "pack_depth() wants a table with a quantised embedding"
        rows = packed.embedding[place.clamp(0, (p - 1 + packed.codebooks - 1) * packed.vocab - 1)]
        return self.linear(rows, one(packed.projection, 0), bias)

    def start(self, p: int) -> None:
        """The stream at the head of pass ``p``; in the first pass positions 0 and 1."""
        if p > 1:
            self.stream = self._entered(p)
            return
        first = self.linear(self.hidden, one(self.packed.projection, 0), self.packed.projection_bias)
        self.stream = torch.cat([first, self._entered(1)])

    def places(self, p: int) -> Tensor:
        """Slots of the rows of pass ``p``, which are their rotary positions too."""
        device = self.codes.device
        if p > 1:
            return torch.full((self.batch,), p, device=device)
        return torch.arange(2, device=device).repeat_interleave(self.batch)

    def head(self, p: int) -> None:
        """Logits of codebook ``p``."""
        self.logits = self.linear(self.norm(self.stream[-self.batch :], self.stack.norm), one(self.packed.heads, p - 1))

    def draws(self, p: int) -> None:
        """Codebook ``p - 1``."""
        codebook = torch.full((1,), p - 1, dtype=torch.int64, device=self.codes.device)
        noise = gumbel_noise_ref(self.key, codebook, self.packed.vocab)
        self.codes[:, p - 1] = sample_ref(self.logits.float(), self.params, noise)

    def run(self) -> tuple[Tensor, Tensor]:
        """Codes ``[B, codebooks]`` and logits ``[B, codebooks - 1, V]`` of the frame."""
        logits = []
        for p in range(1, self.packed.codebooks):
            if p > 1:
                self.draws(p)
            self.start(p)
            for l in range(self.stack.shape.layers):
                self.layer(l, self.places(p), self.places(p))
            self.head(p)
            logits.append(self.logits)
        self.draws(self.packed.codebooks)
        return self.codes, torch.stack(logits, dim=1)
