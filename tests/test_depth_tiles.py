"""What the heuristics choose at CSM-1B's shapes: enough bytes in flight, no program without work, nothing done too often."""

from __future__ import annotations

import pytest
from kernels.cases_depth import BACKBONE, CPU, DEPTH, stack

from csm_kernels._target import has_triton
from csm_kernels.depth import Plan, make_workspace, plan

PROCESSORS = 132
ITEMSIZE = {"bf16": 2, "int8": 1, "fp8": 1}

pytestmark = pytest.mark.skipif(not has_triton(), reason="tiles are Triton's")


def planned(kind: str, batch: int, persistent: bool, depth: bool = True) -> Plan:
    """A stack alone; the depth decoder's is cut by KV head."""
    packed = stack(kind, DEPTH, DEPTH.groups) if depth else stack(kind, BACKBONE, 1)
    workspace = make_workspace(packed, batch, 1, CPU)
    return plan(packed, batch, workspace, 2048, persistent=persistent, programs=PROCESSORS)


@pytest.mark.parametrize("depth", [True, False], ids=["depth decoder", "backbone"])
@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
def test_a_persistent_program_keeps_bytes_in_flight_and_its_share_fair(kind: str, depth: bool) -> None:
    chosen = planned(kind, 1, True, depth)
    for name in ("qkv", "gate_up", "down"):
        tile = getattr(chosen.tiles, name)
        asked = tile.BN * tile.BK * ITEMSIZE[kind] // (32 * chosen.warps)
        assert asked >= 16, f"{name}: {asked} bytes a thread"
        busiest = tile.BN * -(-tile.tiles // PROCESSORS)
        assert busiest <= 1.15 * max(tile.N / PROCESSORS, 1) + 3, f"{name}: {busiest} of {tile.N} rows"
    held = chosen.tiles.gate_up.BN * chosen.tiles.gate_up.BK
    assert held == 64 * 32 * chosen.warps, "as much as registers hold"


@pytest.mark.parametrize("persistent", [True, False])
def test_fused_attention_is_repeated_by_one_wave_at_most(persistent: bool) -> None:
    tile = planned("bf16", 1, persistent).tiles.o
    assert tile.SEGMENTS > 1
    assert DEPTH.groups * tile.tiles <= PROCESSORS
    assert DEPTH.groups * tile.tiles > PROCESSORS // 2


def test_launches_have_small_tiles_for_the_next_to_begin_beside_them() -> None:
    chosen = planned("bf16", 1, False)
    assert chosen.warps == 4
    assert {getattr(chosen.tiles, name).BN for name in ("qkv", "gate_up", "down")} == {2}


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_batches_run_on_tensor_cores(kind: str) -> None:
    for batch in (2, 16):
        chosen = planned(kind, batch, True)
        assert all(getattr(chosen.tiles, name).DOT for name in ("qkv", "o", "gate_up", "down"))
    assert not planned(kind, 1, True).tiles.qkv.DOT
    assert planned("int4", 1, True).tiles.qkv.DOT, "int4 always"
