"""From codes to sound chunk by chunk: Mimi's decoder with its state carried on, so that chunks join without a seam.

Every convolution of Mimi's decoder is causal and its transformer looks back over a sliding window: what a chunk needs of
those before it is a few samples of each layer's input, the overlap of each transposed convolution, and the transformer's
KV cache. The stock modules are read, called and never changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_SHORT = 32
"""Positions up to which a transposed convolution is one product here: PyTorch's own takes 17 ms for 2 positions of Mimi's
first on a CPU, whose weights can be read in 1 (2 cores, 2026-11-29)."""


class CodecStream:
    """Decodes the codes of ``N`` rows as they come; concatenated chunks are the offline decode of all codes.

    Args:
        codec: transformers' ``MimiModel``, as ``model.codec_model``, in any dtype.

    Raises:
        ValueError: a codec that is no causal Mimi: its chunks could not be joined.

    Example:
        >>> stream = CodecStream(model.codec_model)
        >>> sound = torch.cat([stream.decode(codes[:, i : i + 4]) for i in range(0, codes.shape[1], 4)], dim=1)

    Source: the streaming convolutions of Mimi (Défossez et al., 2024), for the modules of transformers.
    """

    def __init__(self, codec: nn.Module) -> None:
        reason = why_not(codec)
        if reason is not None:
            raise ValueError(f"codec must be a causal Mimi, {reason}")
        self._codec: Any = codec
        self._held: dict[int, Tensor] = {}
        self._past: Any = None
        self._rows = 0
        self.frames = 0

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The sound of the next frames.

        Args:
            codes: ``[N, F, K]`` int64, F at least 1; N as in the calls before.

        Returns:
            ``[N, F * 1920]`` fp32 samples at the codec's rate (24 kHz).

        Raises:
            ValueError: another shape.
            IndexError: a code that the codec has no vector for; the stream stands where it stood.
        """
        if codes.ndim != 3 or codes.shape[1] < 1 or (self.frames and codes.shape[0] != self._rows):
            rows = self._rows if self.frames else "N"
            raise ValueError(f"codes must be [{rows}, F, K] with F of 1 or more, got {tuple(codes.shape)}")
        size = self._codec.config.codebook_size
        if bool(((codes < 0) | (codes >= size)).any()):
            raise IndexError(f"codes must be 0 to {size - 1}, got {int(codes.min())} to {int(codes.max())}")
        self._rows = codes.shape[0]
        with torch.autocast(codes.device.type, enabled=False):
            x = self._transposed(self._codec.upsample, self._codec.quantizer.decode(codes.transpose(1, 2)))
            made = self._codec.decoder_transformer(
                x.transpose(1, 2), past_key_values=self._past, use_cache=True, return_dict=True
            )
            self._past = made.past_key_values
            x = made.last_hidden_state.transpose(1, 2)
            for layer in self._codec.decoder.layers:
                x = self._layer(layer, x)
        self.frames += codes.shape[1]
        return x[:, 0].float()

    def _layer(self, layer: Any, x: Tensor) -> Tensor:
        if hasattr(layer, "block"):
            out = x
            for part in layer.block:
                out = self._layer(part, out)
            return out + self._layer(layer.shortcut, x)
        inner = getattr(layer, "conv", None)
        if isinstance(inner, nn.ConvTranspose1d):
            return self._transposed(layer, x)
        if isinstance(inner, nn.Conv1d):
            return self._convolved(layer, x)
        return layer(x)

    def _convolved(self, layer: Any, x: Tensor) -> Tensor:
        """A causal convolution of stride 1, its left padding being what came before."""
        conv = layer.conv
        reach = (conv.kernel_size[0] - 1) * conv.dilation[0]
        if not reach:
            return conv(x)
        before = self._held.get(id(layer))
        if before is None:
            x = functional.pad(x, (reach, 0), layer.pad_mode)
        else:
            x = torch.cat([before, x], dim=-1)
        self._held[id(layer)] = x[..., -reach:].clone()
        return conv(x)

    def _transposed(self, layer: Any, x: Tensor) -> Tensor:
        """A transposed convolution; what it writes beyond the chunk is added to the next."""
        conv = layer.conv
        if conv.groups == 1 and x.shape[-1] <= _SHORT:
            whole = _transposed_product(conv, x)
        else:
            whole = conv(x)
            if conv.bias is not None:
                whole = whole - conv.bias[:, None]
        before = self._held.get(id(layer))
        if before is not None:
            whole[..., : before.shape[-1]] += before
        length = x.shape[-1] * conv.stride[0]
        self._held[id(layer)] = whole[..., length:].clone()
        out = whole[..., :length]
        return out if conv.bias is None else out + conv.bias[:, None]


def _transposed_product(conv: Any, x: Tensor) -> Tensor:
    """A transposed convolution without its bias, ``[N, C, L]`` to ``[N, D, (L - 1) * stride + kernel]``, as one product."""
    rows, _, length = x.shape
    inner, outer, kernel = conv.weight.shape
    stride = conv.stride[0]
    taps = (x.transpose(1, 2) @ conv.weight.reshape(inner, outer * kernel)).view(rows, length, outer, kernel)
    pieces = -(-kernel // stride)
    out = x.new_zeros(rows, outer, (length - 1 + pieces) * stride)
    for piece in range(pieces):  # the part of every position's taps that falls on the same stride of samples
        part = taps[..., piece * stride : (piece + 1) * stride].transpose(1, 2)
        part = functional.pad(part, (0, stride - part.shape[-1]))
        out[..., piece * stride : (piece + length) * stride] += part.reshape(rows, outer, length * stride)
    return out[..., : (length - 1) * stride + kernel]


def why_not(codec: Any) -> str | None:
    """What keeps a codec from being decoded chunk by chunk, or None."""
    parts = ("quantizer", "upsample", "decoder_transformer", "decoder")
    lacking = [name for name in parts if not hasattr(codec, name)]
    if lacking:
        return f"and {type(codec).__name__} has no {', '.join(lacking)}"
    if not codec.config.use_causal_conv:
        return "and this one's convolutions look ahead"
    for module in (codec.upsample, *codec.decoder.modules()):
        inner: Any = getattr(module, "conv", None)
        across = isinstance(inner, nn.ConvTranspose1d)
        if across and (module.padding_left or inner.kernel_size[0] < inner.stride[0] or inner.dilation[0] != 1):
            return "and this one trims its transposed convolutions on the left"
        along = isinstance(inner, nn.Conv1d)
        if along and (inner.stride[0] != 1 or module.pad_mode not in ("constant", "replicate")):
            return f"and this one has a decoder with stride {inner.stride[0]} and padding {module.pad_mode!r}"
    return None
