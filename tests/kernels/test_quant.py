"""The kernels read every weight of every format as ``dequantize`` does: one-hot activations pick the columns out."""

from __future__ import annotations

import pytest
import torch

from csm_kernels.gemv import gemv
from csm_kernels.quant import GROUPS, QuantWeight, dequantize, quantize
from kernels.interpreter import large_tiles


def columns(weight: QuantWeight, rows: int, device: torch.device) -> torch.Tensor:
    """The matrix, ``rows`` columns of it at a time."""
    placed = QuantWeight(weight.data.to(device), weight.scale.to(device), weight.padding)
    units = torch.eye(weight.width, device=device)
    with large_tiles("gemv_plain", BLOCK_N=32):
        return torch.cat([gemv(part, placed) for part in units.split(rows)]).t()


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("width", [33, 150])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_rows_with_a_scale(device: torch.device, format: str, width: int, rows: int) -> None:
    weight = quantize(torch.randn(21, width), format)
    assert torch.equal(columns(weight, rows, device).cpu(), dequantize(weight))


@pytest.mark.parametrize("width", [33, 150, 256])
@pytest.mark.parametrize("group", GROUPS)
def test_symmetric_groups(device: torch.device, group: int, width: int) -> None:
    weight = quantize(torch.randn(21, width), "int4", group=group)
    assert torch.equal(columns(weight, 16, device).cpu(), dequantize(weight))


@pytest.mark.parametrize("width", [33, 150, 256])
@pytest.mark.parametrize("group", GROUPS)
def test_asymmetric_groups(device: torch.device, group: int, width: int) -> None:
    """Product and offset may be one rounding or two."""
    weight = quantize(torch.randn(21, width) + 0.5, "int4", group=group, symmetric=False)
    torch.testing.assert_close(columns(weight, 16, device).cpu(), dequantize(weight), rtol=1e-6, atol=1e-6)


def test_every_byte(device: torch.device) -> None:
    """All 256 values of a byte in all of a group's places, with a scale of its own in every group."""
    data = torch.stack([torch.arange(i, i + 64) % 256 for i in range(0, 256, 16)]).to(torch.uint8)
    scale = torch.linspace(0.1, 2.0, 32).view(16, 2).to(torch.bfloat16)
    weight = QuantWeight(data, scale)
    assert weight.group == 64 and len(data.unique()) == 256
    assert torch.equal(columns(weight, 16, device).cpu(), dequantize(weight))
