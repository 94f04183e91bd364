"""Packed weights in a file: a second start reads what the first packed, and nothing but that."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from csm_models import build, on_fast_path, text_prompt
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from csm_kernels.quant import QuantWeight
from csm_runtime import PrecisionPolicy, accelerate, packed_store, weights
from csm_runtime.adapters import hf
from csm_runtime.metrics import Metrics
from csm_runtime.packed_store import PackedStore
from csm_runtime.rounding import calibrate_rounding
from csm_runtime.weights import PackedWeights

MIXED = PrecisionPolicy(
    (
        ("backbone.head", "fp16"),
        ("backbone.attention", "int4"),
        ("backbone.mlp", "int4:32"),
        ("backbone.embedding", "int8"),
        ("depth.attention", "fp8"),
        ("depth.mlp", "bf16"),
        ("depth.head.1", "int8"),
        ("depth.embedding", "int8"),
    )
)
"""Every kind of copy; rows of 32 columns are padded to int4's groups of 128, and two banks of heads."""
OPTIONS: dict[str, Any] = dict(mode="eager", progress=False, guard=False)


def counters(model: Any) -> dict[str, int]:
    kept = model.acceleration.metrics.counters
    return {key.partition(".")[2]: value for key, value in kept.items() if key.startswith("packed_cache.") and value}


def start(folder: Path, name: str = "base", change: Any = None, **options: Any) -> Any:
    model = build(name)
    if change is not None:
        with torch.no_grad():
            change(model)
    return accelerate(model, **{"precision": MIXED, "packed_cache": folder, **OPTIONS, **options})


def speech(model: Any) -> torch.Tensor:
    with on_fast_path(model):
        return model.generate(**text_prompt((3, 5)), max_new_tokens=4, do_sample=False, depth_decoder_do_sample=False)


def file_in(folder: Path) -> Path:
    (found,) = folder.iterdir()  # no temporary file is left either
    assert found.name.startswith("csm-packed-") and found.suffix == ".safetensors"
    return found


def bits(packed: torch.Tensor | QuantWeight) -> list[tuple[torch.dtype, list[int], bytes]]:
    parts = packed[:2] if isinstance(packed, QuantWeight) else (packed,)
    return [(t.dtype, list(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes()) for t in parts]


def assert_as_packed(model: Any) -> None:
    """The copies in force are those that packing the model's weights makes."""
    fresh = PackedWeights(model.acceleration.policy)
    fresh.refresh(hf.live_weights(model))
    got = model.acceleration._weights._copies
    assert got.keys() == fresh._copies.keys()
    for name, want in fresh._copies.items():
        copy = got[name]
        assert bits(copy.packed) == bits(want.packed), name
        assert (copy.format, copy.zones, copy.energy) == (want.format, want.zones, want.energy), name
        assert torch.equal(copy.checksum, want.checksum) and torch.equal(copy.fingerprint, want.fingerprint)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is packed."""
    names: list[str] = []
    convert = weights._converted

    def counted(name: str, *args: Any, **options: Any) -> Any:
        names.append(name)
        return convert(name, *args, **options)

    monkeypatch.setattr(weights, "_converted", counted)
    return names


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", ["base", "tied", "untied", "eight_codebooks"])
def test_second_start_packs_nothing(tmp_path: Path, packings: list[str], name: str, mapped: bool) -> None:
    folder = tmp_path / "made" / "here"
    first = start(folder, name)
    made = len(packings)
    assert made > 10 and counters(first) == {"written": 1}
    before = file_in(folder).stat()
    (tmp_path / "other").touch()
    assert before.st_mode == (tmp_path / "other").stat().st_mode
    second = start(folder, name, map_packed=mapped)
    assert len(packings) == made
    assert counters(second) == {"loaded": len(second.acceleration._weights._copies)}
    after = file_in(folder).stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert torch.equal(speech(second), speech(first))
    assert_as_packed(second)
    copies = second.acceleration._weights._copies
    one = copies["depth.embedding"].packed is copies["backbone.embedding"].packed
    assert one == (name == "tied")
    assert second.acceleration.report().copied_bytes == first.acceleration.report().copied_bytes


@pytest.mark.parametrize("mapped", [False, True])
def test_where_the_tensors_lie(tmp_path: Path, mapped: bool) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps")
    start(tmp_path)
    model = start(tmp_path, map_packed=mapped)
    path = file_in(tmp_path)
    spans = []
    for line in maps.read_text().splitlines():
        if line.endswith(str(path)):
            assert line.split()[1].endswith("p"), "a private mapping: writes stay in this process"
            spans.append([int(end, 16) for end in line.split()[0].split("-")])
    for name, copy in model.acceleration._weights._copies.items():
        for tensor in copy.packed[:2] if isinstance(copy.packed, QuantWeight) else (copy.packed,):
            assert any(low <= tensor.data_ptr() < high for low, high in spans) == mapped, name
    written = path.read_bytes()
    weight = model.acceleration._weights._copies["backbone.0.q"].packed.data
    weight.bitwise_xor_(1)
    assert model.acceleration._weights.corrupted() == ["backbone.0.q"]
    assert path.read_bytes() == written
    model.acceleration._weights.forget(["backbone.0.q"])  # and it is packed again, from the weights
    speech(model)
    assert_as_packed(model)


def test_only_what_changed_is_packed_again(tmp_path: Path, packings: list[str]) -> None:
    start(tmp_path)

    def change(model: Any) -> None:
        model.backbone_model.layers[1].mlp.up_proj.weight[3, 4] += 0.25

    packings.clear()
    model = start(tmp_path, change=change)
    assert packings == ["backbone.1.up"]
    assert counters(model) == {"loaded": len(model.acceleration._weights._copies) - 1, "written": 1}
    assert_as_packed(model)
    packings.clear()
    again = start(tmp_path, change=change, map_packed=True)
    assert packings == [] and counters(again).keys() == {"loaded"}
    assert_as_packed(again)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def in_metadata(path: Path, old: str, new: str) -> None:
    with safe_open(path, "pt") as file:
        said = file.metadata()[packed_store._KEY]
    assert old in said
    save_file(load_file(path), path, {packed_store._KEY: said.replace(old, new, 1)})


def with_tensors(path: Path, change: Any) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


DAMAGE = {
    "a byte of the data": lambda path: flip(path, path.stat().st_size - 70),
    "the first byte of the data": lambda path: flip(path, 8 + int.from_bytes(path.read_bytes()[:8], "little")),
    "a byte of the header": lambda path: flip(path, 9),
    "a length without end": lambda path: flip(path, 6),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "half of the header": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "empty": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_bytes(b"\x00\x01 something else" * 99),
    "foreign": lambda path: save_file({"x": torch.ones(3)}, path),
    "foreign with metadata": lambda path: save_file({"x": torch.ones(3)}, path, {packed_store._KEY: "[1]"}),
    "another format": lambda path: in_metadata(path, '"format": 1', '"format": 2'),
    "another key": lambda path: in_metadata(path, '"key": "', '"key": "0'),
    "energy": lambda path: in_metadata(path, '"energy": [', '"energy": [1'),
    "a tensor less": lambda path: with_tensors(path, lambda tensors: tensors.pop("backbone.0.q.scale")),
    "another shape": lambda path: with_tensors(
        path, lambda tensors: tensors.update({"depth.0.up": tensors["depth.0.up"].flatten()})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_packed_anew(
    tmp_path: Path, damage: str, packings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path)
    made = len(packings)
    DAMAGE[damage](file_in(tmp_path))
    packings.clear()
    with caplog.at_level(logging.WARNING, "csm_runtime"):
        model = start(tmp_path)
    assert len(packings) == made
    assert counters(model) == {"refused": 1, "written": 1}
    assert sum("packed again" in record.message for record in caplog.records) == 1
    assert_as_packed(model)
    packings.clear()
    assert counters(start(tmp_path)).keys() == {"loaded"} and packings == []


def test_a_file_of_other_shapes_under_the_same_name_is_refused(tmp_path: Path) -> None:
    start(tmp_path / "a")
    start(tmp_path / "b", "untied")
    path = file_in(tmp_path / "a")
    path.write_bytes(file_in(tmp_path / "b").read_bytes())
    model = start(tmp_path / "a")
    assert counters(model) == {"refused": 1, "written": 1}
    assert_as_packed(model)


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for folder in (blocked, blocked / "below"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "csm_runtime"):
            model = start(folder)
        assert counters(model) == {"unwritable": 1}
        assert ["could not be saved" in record.message for record in caplog.records] == [True]
        speech(model)
    assert blocked.read_text() == "not a folder"


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_store.os, "replace", full)
    assert counters(start(tmp_path)) == {"unwritable": 1}
    assert list(tmp_path.iterdir()) == []


def test_writers_at_once_leave_a_whole_file(tmp_path: Path, packings: list[str]) -> None:
    live = hf.live_weights(build())
    made = PackedWeights(MIXED)
    made.refresh(live)
    metrics, together = Metrics(), threading.Barrier(4)

    def write() -> None:
        for _ in range(10):
            together.wait()
            PackedStore(tmp_path, MIXED, live, metrics).save(made)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for _ in range(10):
        together.wait()
        PackedStore(tmp_path, MIXED, live, metrics).load(MIXED)
    for writer in writers:
        writer.join()
    assert metrics.counters["packed_cache.written"] == 30 and metrics.counters["packed_cache.refused"] == 0
    packings.clear()
    assert counters(start(tmp_path)).keys() == {"loaded"} and packings == []
    file_in(tmp_path)


def test_policies_shapes_and_dtypes_have_files_of_their_own(tmp_path: Path) -> None:
    for model, policy in (
        (build(), MIXED),
        (build(), "int8"),
        (build("untied"), MIXED),
        (build(dtype=torch.bfloat16), MIXED),
    ):
        accelerate(model, precision=policy, packed_cache=tmp_path, **OPTIONS)
    assert len(list(tmp_path.iterdir())) == 4
    named = PrecisionPolicy(MIXED.rules, name="another name")
    assert counters(start(tmp_path, precision=named)).keys() == {"loaded"}


@pytest.mark.parametrize("fmt", ["int4:asymmetric", "int4:32:asymmetric"])
def test_asymmetric_int4(fmt: str, tmp_path: Path) -> None:
    options = dict(precision=PrecisionPolicy((("backbone.attention", fmt), *MIXED.rules[2:])))
    start(tmp_path, **options)
    model = start(tmp_path, map_packed=True, **options)
    assert counters(model).keys() == {"loaded"}
    copy = model.acceleration._weights._copies["backbone.0.q"].packed
    assert isinstance(copy, QuantWeight) and not copy.symmetric and copy.padding == (0 if "32" in fmt else 96)
    assert_as_packed(model)


def test_each_rounding_has_a_file_of_its_own(tmp_path: Path) -> None:
    rounding = calibrate_rounding(build("base"), MIXED, max_frames=8, progress=False)
    plain, rounded = (start(tmp_path, rounding=each) for each in ("nearest", rounding))
    assert len(list(tmp_path.iterdir())) == 2
    again = start(tmp_path, rounding=rounding)
    assert counters(again).keys() == {"loaded"} and not again.acceleration.notes
    q = [model.acceleration._weights._copies["backbone.0.q"].packed for model in (plain, rounded, again)]
    assert bits(q[1]) == bits(q[2]) != bits(q[0])


@pytest.mark.parametrize("mapped", [False, True])
def test_dropped_originals(tmp_path: Path, mapped: bool) -> None:
    start(tmp_path)
    wanted = speech(start(tmp_path, drop_originals=True))
    model = start(tmp_path, drop_originals=True, map_packed=mapped)
    assert (
        model.backbone_model.layers[0].mlp.up_proj.weight.is_meta
        and model.depth_decoder.model.embed_tokens.weight.is_meta
    )
    assert model.depth_decoder.device.type == "cpu"
    assert torch.equal(speech(model), wanted)
    assert counters(model).keys() == {"loaded"}
    assert model.acceleration._weights.corrupted() == []


def test_later_changes_are_followed_but_not_written(tmp_path: Path) -> None:
    model = start(tmp_path)
    before = file_in(tmp_path).read_bytes()
    with torch.no_grad():
        model.backbone_model.layers[0].mlp.up_proj.weight.mul_(1.5)
    speech(model)
    assert_as_packed(model)
    assert file_in(tmp_path).read_bytes() == before


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="packed_cache must be the path of a folder"):
        accelerate(build(), packed_cache=3)
    with pytest.raises(ValueError, match="packed_cache is None"):
        accelerate(build(), map_packed=True)

    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("csm_runtime.extras.importlib.import_module", absent)
    model = build()
    with pytest.raises(ImportError, match=r'pip install "csm-kernels\[hf\]"'):
        accelerate(model, packed_cache=tmp_path, **OPTIONS)
    assert not hasattr(model, "acceleration")


def test_metadata_says_what_is_there(tmp_path: Path) -> None:
    model = start(tmp_path)
    with safe_open(file_in(tmp_path), "pt") as file:
        said = json.loads(file.metadata()[packed_store._KEY])
    entry = said["copies"]["backbone.0.q"]
    assert (entry["format"], entry["zones"], entry["padding"]) == ("int4", ["backbone.attention"], 96)
    energy = model.acceleration._weights._copies["backbone.0.q"].energy
    assert entry["energy"] == list(energy)


@pytest.mark.parametrize("fmt", ["int8", "fp8", "int4", "int4:32"])
def test_copies_do_not_depend_on_the_number_of_threads(fmt: str) -> None:
    rules = tuple((zone, fmt) for zone in ("backbone.head", "backbone.*", "depth.*"))
    live, made = hf.live_weights(build(backbone=dict(hidden_size=160, vocab_size=2051))), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            packing, names = PackedWeights(PrecisionPolicy(rules)), list[str]()
            packing.refresh(live, names.append)
            made.append(({name: (bits(copy.packed), copy.energy) for name, copy in packing._copies.items()}, names))
            assert torch.get_num_threads() == threads
            seen = list[int]()
            other = threading.Thread(target=lambda out: out.append(torch.get_num_threads()), args=(seen,))
            other.start()
            other.join()
            assert seen == [threads]
    finally:
        torch.set_num_threads(before)
    assert made[0][0] == made[1][0]
    assert sorted(made[0][1]) == sorted(made[1][1]) and len(set(made[0][1])) == len(made[0][1])


def test_a_matrix_that_cannot_be_packed_stops_the_others() -> None:
    model = build()
    with torch.no_grad():
        model.backbone_model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"backbone\.1\.up cannot be stored as int8: weight holds NaN"):
        PackedWeights(PrecisionPolicy((("backbone.mlp", "int8"),))).refresh(hf.live_weights(model))
