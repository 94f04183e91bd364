"""What launches stand on: tile tables, walks over strided rows, guarded buffers, the choice of kernel or reference."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from csm_kernels import _target, _tiles
from csm_kernels._rows import rows_of, walkable
from csm_kernels._tiles import override_tiles, tiles
from csm_kernels.testing import assert_untouched, guarded

SHAPE = {"N": 8192, "K": 1024, "format": "int8"}


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A tensor that says it is on an H100."""
    facts = _target.Device("NVIDIA H100", 90, 132, 50 * 2**20)
    monkeypatch.setattr(_tiles, "device_facts", lambda index: facts)
    table = [
        {"gpu": "sm_90", "shape": {"N": 8192}, "tiles": {"BLOCK_N": 2}, "measured": "capability"},
        {"gpu": "NVIDIA H100", "shape": {"N": 8192, "format": "int8"}, "tiles": {"BLOCK_N": 4}, "measured": "name"},
        {"gpu": "NVIDIA H100", "shape": {"N": 8192}, "tiles": {"BLOCK_N": 8}, "measured": "later"},
        {"gpu": "sm_80", "shape": {}, "tiles": {"BLOCK_N": 64}, "measured": "another GPU"},
    ]
    monkeypatch.setattr(_tiles, "_table", lambda op: table if op == "gemv" else [])
    _tiles._measured.cache_clear()
    yield SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))  # type: ignore[misc]
    _tiles._measured.cache_clear()


def test_the_table_by_name_then_by_capability(h100: Any) -> None:
    default = {"BLOCK_N": 1, "num_warps": 4}
    assert tiles("gemv", h100, SHAPE, default) == {"BLOCK_N": 4, "num_warps": 4}
    assert tiles("gemv", h100, SHAPE | {"format": "bf16"}, default)["BLOCK_N"] == 8
    assert tiles("gemv", h100, SHAPE | {"N": 1024}, default) == default
    assert tiles("norm", h100, SHAPE, default) == default
    assert tiles("gemv", torch.ones(1), SHAPE, default) == default


def test_overrides_win_nest_and_end(h100: Any) -> None:
    def block() -> int:
        return tiles("gemv", h100, SHAPE, {"BLOCK_N": 1})["BLOCK_N"]

    with override_tiles("gemv", BLOCK_N=16):
        assert block() == 16
        with override_tiles("gemv", BLOCK_N=32):
            assert block() == 32
        assert block() == 16
        assert tiles("norm", h100, SHAPE, {"BLOCK_N": 1}) == {"BLOCK_N": 1}
    assert block() == 4
    with pytest.raises(RuntimeError), override_tiles("gemv", BLOCK_N=16):
        raise RuntimeError
    assert block() == 4


@pytest.mark.parametrize("size", [0, 3, -2, 48])
def test_tiles_are_powers_of_two(size: int) -> None:
    with (
        pytest.raises(ValueError, match=f"BLOCK_N must be a power of two, got {size}"),
        override_tiles("gemv", BLOCK_N=size),
    ):
        pass


def test_the_shipped_tables_are_sound() -> None:
    for path in (Path(_tiles.__file__).parent / "tiles").glob("*.json"):
        for entry in json.loads(path.read_text()):
            assert set(entry) == {"gpu", "shape", "tiles", "measured"}
            assert all(size & (size - 1) == 0 for size in entry["tiles"].values())


# ----------------------------------------------------------------------------------------------------------- strides


@pytest.mark.parametrize(
    "make",
    [
        lambda base: base,
        lambda base: base[:, ::2],
        lambda base: base[:, :, 1],
        lambda base: base[::2, :, :, 3:7],
        lambda base: base.transpose(0, 1)[:, :, 0],
        lambda base: base[0, 0, 0],
        lambda base: base[:, :1].expand(-1, 5, -1, -1)[:, :, 0],
        lambda base: base[..., :1],
        lambda base: base[:0],
    ],
)
def test_rows_are_found_where_they_are(make: Any) -> None:
    base = torch.arange(4 * 6 * 3 * 8).view(4, 6, 3, 8)
    x = make(base)
    rows = rows_of(x, "x")
    flat = torch.as_strided(base, (base.numel(),), (1,))
    assert rows.total == x.shape[:-1].numel()
    for number, row in enumerate(x.reshape(-1, x.shape[-1])):
        start = (
            x.storage_offset() + (number // rows.inner) * rows.outer_stride + (number % rows.inner) * rows.inner_stride
        )
        assert torch.equal(flat[start : start + x.shape[-1]], row), number


def test_rows_that_cannot_be_walked() -> None:
    base = torch.zeros(4, 6, 3, 8)
    with pytest.raises(ValueError, match="x must have unit stride in its last dimension"):
        rows_of(base.transpose(2, 3), "x")
    with pytest.raises(ValueError, match="x with strides .* cannot be walked"):
        rows_of(base[:, 1:5:2, ::2], "x")
    with pytest.raises(ValueError, match="x needs at least one dimension"):
        rows_of(torch.tensor(1.0), "x")
    assert walkable(base[:, 1:5:2, ::2]).is_contiguous()
    view = base[:, ::2, 0]
    assert walkable(view) is view


# ----------------------------------------------------------------------------------------------------------- testing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int8])
@pytest.mark.parametrize("where", [-1, 0, -1024, 1023])
def test_a_write_beside_the_buffer_is_seen(dtype: torch.dtype, where: int) -> None:
    buffer, whole = guarded((2, 5), dtype)
    assert buffer.isnan().all() if dtype.is_floating_point else (buffer == torch.iinfo(dtype).min).all()
    buffer.fill_(1)
    assert_untouched(whole)
    index = 1024 + (where if where < 0 else 10 + where)
    whole[index] = 3
    with pytest.raises(AssertionError, match=re.escape(f"the first at {where:+d}")):
        assert_untouched(whole)


# ------------------------------------------------------------------------------------------------- kernel or reference


def test_without_triton_the_references_run() -> None:
    """Windows and macOS: kernels are defined, never launched."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, csm_kernels\n"
        "from csm_kernels import _target\n"
        "from csm_kernels.norm import rms_norm, rms_norm_ref\n"
        "assert not _target.has_triton() and not _target.interpreting()\n"
        "x, w = torch.randn(3, 8), torch.ones(8)\n"
        "assert torch.equal(rms_norm(x, w, 1e-5), rms_norm_ref(x, w, 1e-5)); print('fine')"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert out.stdout.strip() == "fine", out.stderr[-2000:]


def test_cpu_tensors_take_the_reference() -> None:
    assert not _target.runs_triton(torch.ones(1)) or _target.interpreting()
    meta = SimpleNamespace(is_cuda=True)
    assert _target.runs_triton(meta, None) == _target.has_triton()  # type: ignore[arg-type]
