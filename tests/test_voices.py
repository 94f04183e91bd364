"""Voices that need no second prefill: what the store keeps, for how long, and that it never gives back anything else."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from csm_runtime import packed_store, voice_files, voices
from csm_runtime.memory import MemoryReading
from csm_runtime.metrics import Metrics
from csm_runtime.voices import Digest, Profile, Voices, default_budget, fingerprint_of, prompt_digests

any_of = settings(
    derandomize=True, deadline=None, database=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
"""The same examples in every run, however busy the machine."""

MODEL, OTHER = fingerprint_of({"model": "a"}), fingerprint_of({"model": "b"})
LAYERS, HEADS, DIM, HIDDEN = 2, 1, 3, 4


def name(number: int) -> str:
    return fingerprint_of({"key": number})


def size(positions: int) -> int:
    """Bytes of a profile without codes."""
    return 2 * LAYERS * HEADS * positions * DIM * 4 + 4 * HIDDEN


def profile(
    number: int = 0,
    positions: int = 5,
    fingerprint: str = MODEL,
    dtype: torch.dtype = torch.float32,
    codes: int | None = None,
    **meta: Any,
) -> Profile:
    """Its content follows from what it is called."""
    draw = torch.Generator().manual_seed(1000 * number + positions)
    keys, values = torch.randn(2, LAYERS, HEADS, positions, DIM, generator=draw).to(dtype)
    tensors = {"keys": keys, "values": values, "hidden": torch.randn(HIDDEN, generator=draw)}
    if codes is not None:
        tensors["codes"] = torch.randint(2051, (codes, 8), generator=draw)
    return Profile(name(number), fingerprint, positions, tensors, meta)


def bits(one: Profile) -> Any:
    raw = {
        key: (t.dtype, list(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for key, t in one.tensors.items()
    }
    meta = sorted((key, type(value), value) for key, value in one.meta.items())
    return one.key, one.fingerprint, one.positions, raw, meta


def same(got: Profile | None, want: Profile) -> bool:
    return got is not None and bits(got) == bits(want)


def counts(store: Voices) -> dict[str, float]:
    left_out = ("bytes", "budget", "count", "pinned")
    return {key: value for key, value in store.status().items() if value and key not in left_out}


# --------------------------------------------------------------------------------------------------------- profiles


def test_a_profile_knows_its_bytes_and_its_layers() -> None:
    one = profile(positions=5, codes=7, seconds=0.5)
    assert one.bytes == size(5) + 7 * 8 * 8
    layers = one.layers()
    assert len(layers) == LAYERS
    for i, (keys, values) in enumerate(layers):
        assert torch.equal(keys, one.tensors["keys"][i : i + 1]) and keys.shape == (1, HEADS, 5, DIM)
        assert torch.equal(values, one.tensors["values"][i : i + 1])
        assert keys.untyped_storage().data_ptr() == one.tensors["keys"].untyped_storage().data_ptr()


def test_a_profile_moves_as_a_whole() -> None:
    one = profile(codes=2)
    assert one.to("cpu") is one and one.to("cpu", torch.float32) is one
    half = one.to("cpu", torch.bfloat16)
    assert {key: t.dtype for key, t in half.tensors.items()} == {
        "keys": torch.bfloat16,
        "values": torch.bfloat16,
        "hidden": torch.float32,
        "codes": torch.int64,
    }
    assert (half.key, half.fingerprint, half.positions) == (one.key, one.fingerprint, one.positions)
    with pytest.raises(TypeError):
        one.tensors["keys"] = one.tensors["values"]  # type: ignore[index]


def broken(**changes: Any) -> Callable[[], Profile]:
    def make() -> Profile:
        one = profile(codes=2)
        tensors = {**one.tensors, **changes.pop("tensors", {})}
        tensors = {key: value for key, value in tensors.items() if value is not None}
        fields = {"key": one.key, "fingerprint": one.fingerprint, "positions": 5, "meta": {}, **changes}
        return Profile(tensors=tensors, **fields)

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (broken(key="abc"), "key must be"),
        (broken(key=name(0).upper()), "key must be"),
        (broken(key="../" + name(0)), "key must be"),
        (broken(fingerprint=None), "fingerprint must be"),
        (broken(positions=4), r"keys must be floating-point \[L, KV, 4, D\]"),
        (broken(positions=True), "positions must be"),
        (broken(positions=0), "positions must be"),
        (broken(meta={"x": None}), "meta must map"),
        (broken(meta={"x": float("nan")}), r"meta\['x'\] must be finite"),
        (broken(tensors={"keys": None}), "tensors must be keys, values, hidden"),
        (broken(tensors={"extra": torch.ones(1)}), "tensors must be keys, values, hidden"),
        (broken(tensors={"keys": torch.ones(2, 1, 5, 3, dtype=torch.int64)}), "keys must be floating-point"),
        (broken(tensors={"values": torch.ones(2, 1, 5, 2)}), "values must be as keys are"),
        (broken(tensors={"values": torch.ones(2, 1, 5, 3).half()}), "values must be as keys are"),
        (broken(tensors={"hidden": torch.ones(4).double()}), "hidden must be float32"),
        (broken(tensors={"hidden": torch.tensor([1.0, torch.inf])}), "hidden must be finite"),
        (broken(tensors={"codes": torch.ones(2, 3)}), "codes must be int64"),
        (broken(tensors={"hidden": [1.0]}), "hidden must be a tensor"),
        (broken(tensors={"hidden": torch.ones(4, device="meta")}), "tensors must be on one device"),
    ],
)
def test_what_is_no_profile(make: Callable[[], Profile], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# ---------------------------------------------------------------------------------------------------------- digests


def digest(*pieces: Any) -> str:
    made = Digest()
    for piece in pieces:
        if isinstance(piece, tuple):
            made.update_sound(*piece)
        else:
            made.update_ids(piece)
    return made.hexdigest()


def test_digests_of_the_same_content_are_the_same() -> None:
    ids, wave = torch.arange(12), torch.randn(50)
    assert digest(ids) == digest(ids.int()) == digest(ids[:5], ids[5:5], ids[5:]) == digest(torch.arange(24)[::2] // 2)
    rows = ids.view(3, 4)
    assert digest(rows) == digest(rows[:1], rows[1:]) == digest(rows.t().contiguous().t())
    assert digest((wave, 24_000)) == digest((wave.double(), 24_000)) == digest((wave.repeat_interleave(2)[::2], 24_000))


def test_digests_of_other_content_are_others() -> None:
    ids, wave = torch.arange(12), torch.linspace(-1, 1, 6)
    contents: list[tuple[Any, ...]] = [
        (),
        (ids,),
        (ids.flip(0),),
        (ids[:11],),
        (-ids,),
        (ids[:, None],),
        (ids.view(6, 2),),
        (ids.view(2, 6),),
        (ids.view(3, 4),),
        (ids[:6], (wave, 24_000), ids[6:]),
        (ids[:7], (wave, 24_000), ids[7:]),
        (ids, (wave, 24_000)),
        ((wave, 24_000), ids),
        (ids, (wave, 16_000)),
        (ids, (wave, 24_000, 1)),
        (ids, (wave[:3], 24_000), (wave[3:], 24_000)),
        (ids, (wave[:2], 24_000), (wave[2:], 24_000)),
        (ids, (wave.nextafter(torch.ones(())), 24_000)),
    ]
    assert len({digest(*pieces) for pieces in contents}) == len(contents)


def test_digests_refuse_what_is_no_prompt() -> None:
    for ids in (torch.ones(3), torch.ones(3, dtype=torch.bool), torch.ones(1, 2, 3).long(), torch.ones(3, 0).long()):
        with pytest.raises(ValueError, match="ids must be integers"):
            Digest().update_ids(ids)
    for wave in (torch.ones(3).long(), torch.ones(1, 3)):
        with pytest.raises(ValueError, match="waveform must be"):
            Digest().update_sound(wave, 24_000)
    for sounds in ([(0, 5, torch.ones(2))], [(2, 2, torch.ones(2))], [(0, 2, torch.ones(1)), (1, 3, torch.ones(1))]):
        with pytest.raises(ValueError, match="sounds must be segments"):
            prompt_digests(torch.arange(4), sounds, [4])


@any_of
@given(st.data())
def test_a_prefix_has_one_digest_whatever_follows(data: Any) -> None:
    total = data.draw(st.integers(1, 24))
    ids = torch.randint(9, (total, 3) if data.draw(st.booleans()) else (total,))
    cuts = sorted(data.draw(st.sets(st.integers(0, total), max_size=6)))
    sounds = [(a, b, torch.randn(4 * (b - a))) for a, b in list(zip(cuts, cuts[1:]))[:: data.draw(st.integers(1, 2))]]
    lengths = data.draw(st.lists(st.integers(-2, total + 3)))
    got = prompt_digests(ids, data.draw(st.permutations(sounds)), lengths)
    whole = {n for n in lengths if 0 < n <= total and not any(a < n < b for a, b, _ in sounds)}
    assert got.keys() == whole
    for n, made in got.items():
        inside = [sound for sound in sounds if sound[0] < n]
        assert prompt_digests(ids[:n], inside, [n]) == {n: made}
        for a, b, _ in inside:
            changed = [(c, d, w if c != a else w + 1) for c, d, w in inside]
            assert prompt_digests(ids[:n], changed, [n]) != {n: made}
            assert prompt_digests(ids[:n], [s for s in inside if s[0] != a], [n]) != {n: made}
            if b - a > 1:
                shorter = [(c, d - (c == a), w) for c, d, w in inside]
                assert prompt_digests(ids[:n], shorter, [n]) != {n: made}
        other = ids[:n].clone()
        other[data.draw(st.integers(0, n - 1))] += 1
        assert prompt_digests(other, inside, [n]) != {n: made}
    assert len(set(got.values())) == len(got)


def test_fingerprints() -> None:
    weights = torch.arange(6.0)
    parts: list[dict[str, Any]] = [
        {},
        {"a": 1},
        {"a": 1.0},
        {"a": True},
        {"a": "1"},
        {"b": 1},
        {"a": "", "b": ""},
        {"a": "bc"},
        {"ab": "c"},
        {"a": weights},
        {"a": weights.view(2, 3)},
        {"a": weights.half()},
        {"a": weights.view(torch.int32)},
        {"a": weights + 1},
    ]
    assert len({fingerprint_of(each) for each in parts}) == len(parts)
    assert fingerprint_of({"a": 1, "b": weights}) == fingerprint_of({"b": weights.view(2, 3).t().t().view(6), "a": 1})
    with pytest.raises(ValueError, match=r"parts\['a'\] must be"):
        fingerprint_of({"a": None})  # type: ignore[dict-item]


# ------------------------------------------------------------------------------------------------- the store, plainly


def test_hits_misses_and_evictions() -> None:
    metrics = Metrics()
    store = Voices(budget=3 * size(5), metrics=metrics)
    made = [profile(i) for i in range(4)]
    assert store.get(name(0), MODEL) is None
    assert all(store.put(one) for one in made[:3])
    assert same(store.get(name(0), MODEL), made[0])
    assert store.put(made[3])
    assert store.keys() == [name(2), name(0), name(3)] and name(1) not in store and len(store) == 3
    assert store.bytes == store.budget == 3 * size(5)
    assert store.get(name(1), MODEL) is None
    assert counts(store) == {"hits": 1, "misses": 2, "evictions": 1}
    assert metrics.counters == {"voices.hit": 1, "voices.miss": 2, "voices.eviction": 1}
    metrics.watch("voices", store.status)
    assert metrics.snapshot()["watched"]["voices"] == store.status()


def test_another_fingerprint_is_a_miss_and_drops_the_profile() -> None:
    store = Voices(budget=1 << 20)
    store.put(profile(0), pinned=True)
    assert store.get(name(0), OTHER) is None
    assert len(store) == store.bytes == store.status()["pinned"] == 0
    assert counts(store) == {"misses": 1, "stale": 1}


def test_what_is_kept_is_a_copy() -> None:
    buffer = torch.zeros(2, LAYERS, HEADS, 9, DIM)
    hidden = torch.ones(HIDDEN)
    one = Profile(name(0), MODEL, 4, {"keys": buffer[0, :, :, :4], "values": buffer[1, :, :, :4], "hidden": hidden})
    store = Voices(budget=1 << 20)
    store.put(one)
    buffer.fill_(7.0)
    hidden.fill_(7.0)
    kept = store.get(name(0), MODEL)
    assert kept is not None and not kept.tensors["keys"].any() and float(kept.tensors["hidden"].sum()) == HIDDEN
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in kept.tensors.values())
    assert store.get(name(0), MODEL) is kept


def test_too_large_is_refused_and_evicts_nothing() -> None:
    store = Voices(budget=3 * size(5))
    store.put(profile(0))
    store.put(profile(1), pinned=True)
    before = store.keys()
    assert not store.put(profile(2, 16))  # larger than all
    assert not store.put(profile(2, 11))  # larger than what is left beside the pinned one
    assert store.keys() == before and counts(store) == {"refused": 2}
    assert not Voices(budget=0).put(profile(0))
    big = profile(3, 16)
    assert store.get_or_make(name(3), MODEL, lambda: big) is big
    assert counts(store) == {"refused": 3, "misses": 1}


def test_pins() -> None:
    store = Voices(budget=3 * size(5))
    for i in range(3):
        store.put(profile(i), pinned=i == 0)
    assert store.pin(name(1)) and not store.pin(name(7))
    store.put(profile(3))
    assert store.keys() == [name(0), name(1), name(3)]
    store.put(profile(0))  # in a pinned one's place
    assert store.status()["pinned"] == 2
    assert store.unpin(name(0)) and not store.unpin(name(0)) and not store.unpin(name(3))
    store.put(profile(4))
    store.put(profile(5))
    assert store.keys() == [name(1), name(4), name(5)]
    assert store.shrink(1) == size(5) and store.keys() == [name(1), name(5)]
    assert store.shrink(size(5) + 1) == 2 * size(5) and len(store) == 0 and store.status()["pinned"] == 0
    assert store.shrink(1) == store.shrink(-5) == 0


def test_a_smaller_budget_evicts_pinned_ones_last() -> None:
    store = Voices(budget=3 * size(5))
    for i in range(3):
        store.put(profile(i), pinned=i == 0)
    store.budget = 2 * size(5)
    assert store.keys() == [name(0), name(2)]
    store.budget = size(5) - 1
    assert store.keys() == [] and store.bytes == 0 and counts(store) == {"evictions": 3}


def test_removing() -> None:
    store = Voices(budget=1 << 20)
    for i in range(3):
        store.put(profile(i), pinned=True)
    assert store.remove(name(1)) and not store.remove(name(1)) and not store.remove("anything")
    assert store.keys() == [name(0), name(2)] and store.bytes == 2 * size(5)
    store.clear()
    assert len(store) == store.bytes == store.status()["pinned"] == 0 and counts(store) == {}


def test_the_longest_prefix() -> None:
    store = Voices(budget=1 << 20)
    for number, positions in ((1, 4), (2, 9), (3, 9), (4, 20)):
        store.put(profile(number, positions))
    store.put(profile(5, 12, OTHER))
    assert store.lengths(MODEL, 19) == [9, 4] and store.lengths(OTHER, 99) == [12]
    asked: list[int] = []

    def digest_at(positions: int) -> str | None:
        asked.append(positions)
        return {4: name(1), 9: name(3), 12: name(5)}.get(positions)

    assert same(store.longest(MODEL, digest_at, 99), profile(3, 9)) and asked == [20, 9]
    assert store.keys()[-1] == name(3)
    assert same(store.longest(MODEL, digest_at, 8), profile(1, 4))
    assert store.longest(MODEL, digest_at, 3) is None
    assert store.longest(MODEL, lambda n: name(4) if n == 9 else None, 99) is None  # a key of another length
    assert same(store.longest(OTHER, digest_at, 12), profile(5, 12, OTHER))
    assert counts(store) == {"hits": 3, "misses": 2}


def test_a_turn_finds_the_turn_before_it() -> None:
    store, ids, wave = Voices(budget=1 << 20), torch.arange(30), torch.randn(40)
    (key,) = prompt_digests(ids[:12], [(5, 12, wave)], [12]).values()
    one = profile(positions=12)
    store.put(Profile(key, MODEL, 12, one.tensors))
    sounds = [(5, 12, wave), (20, 30, wave)]
    found = store.longest(MODEL, prompt_digests(ids, sounds, store.lengths(MODEL, 30)).get, 30)
    assert found is not None and found.key == key
    sounds = [(5, 12, wave + 1), (20, 30, wave)]
    assert store.longest(MODEL, prompt_digests(ids, sounds, store.lengths(MODEL, 30)).get, 30) is None


def test_the_default_budget() -> None:
    def free(amount: int) -> MemoryReading:
        return MemoryReading(1 << 40, amount, 0, 0)

    for amount, budget in ((0, 64 << 20), (1 << 30, 128 << 20), (8 << 30, 1 << 30), (1 << 39, 2 << 30)):
        assert default_budget(lambda amount=amount: free(amount)) == budget
    assert default_budget(lambda: None) == 64 << 20
    assert Voices(probe=lambda: free(1 << 30)).budget == 128 << 20
    assert 64 << 20 <= Voices().budget <= 2 << 30


@pytest.mark.parametrize("bad", [-1, 1 << 60, 1.5, True, "1 GB"])
def test_budgets_that_are_none(bad: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^budget must be a whole number of bytes"):
        Voices(budget=bad)
    with pytest.raises(ValueError, match="^folder_budget must be a whole number of bytes"):
        Voices(folder=tmp_path, folder_budget=bad)
    store = Voices(budget=100)
    with pytest.raises(ValueError, match="^budget must be a whole number of bytes"):
        store.budget = bad
    assert store.budget == 100


def test_folders_that_are_none() -> None:
    for bad in (3, "", True):
        with pytest.raises(ValueError, match="folder must be a path"):
            Voices(folder=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="folder_budget has no meaning"):
        Voices(folder_budget=3)


def test_safetensors_is_needed_for_a_folder_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("csm_runtime.extras.importlib.import_module", absent)
    assert Voices(budget=1 << 20).put(profile())
    with pytest.raises(ImportError, match=r'pip install "csm-kernels\[hf\]"'):
        Voices(folder=tmp_path)


# --------------------------------------------------------------------------------------------- the store, by a model

BUDGETS = st.integers(0, 6 * size(5))


class StoreMachine(RuleBasedStateMachine):
    """Against a list of (key, fingerprint, positions, pinned), the least recently used first."""

    @initialize(budget=BUDGETS)
    def start(self, budget: int) -> None:
        self.store = Voices(budget=budget)
        self.budget, self.held = budget, list[list[Any]]()
        self.hits = self.misses = self.evictions = self.refused = self.stale = 0

    def index(self, number: int) -> int | None:
        return next((i for i, one in enumerate(self.held) if one[0] == number), None)

    def evict(self, until: Callable[[], bool], pinned: bool) -> int:
        freed = 0
        for which in (False, True)[: 1 + pinned]:
            for one in [one for one in self.held if one[3] == which]:
                if not until():
                    self.held.remove(one)
                    freed += size(one[2])
                    self.evictions += 1
        return freed

    def total(self) -> int:
        return sum(size(one[2]) for one in self.held)

    def look(self, number: int, fingerprint: str) -> list[Any] | None:
        at = self.index(number)
        if at is None:
            return None
        one = self.held.pop(at)
        if one[1] != fingerprint:
            self.stale += 1
            return None
        self.held.append(one)
        return one

    numbers = st.integers(0, 5)
    prints = st.sampled_from([MODEL, MODEL, MODEL, OTHER])

    @rule(
        number=numbers, positions=st.integers(1, 16), fingerprint=prints, pinned=st.sampled_from([False, False, True])
    )
    def put(self, number: int, positions: int, fingerprint: str, pinned: bool) -> None:
        rest = sum(size(one[2]) for one in self.held if one[3] and one[0] != number)
        fits = rest + size(positions) <= self.budget
        assert self.store.put(profile(number, positions, fingerprint), pinned) == fits
        if not fits:
            self.refused += 1
            return
        at = self.index(number)
        if at is not None:
            pinned = self.held.pop(at)[3] or pinned
        self.evict(lambda: self.total() + size(positions) <= self.budget, False)
        self.held.append([number, fingerprint, positions, pinned])

    @rule(number=numbers, fingerprint=prints)
    def get(self, number: int, fingerprint: str) -> None:
        want, got = self.look(number, fingerprint), self.store.get(name(number), fingerprint)
        assert (got is None) == (want is None)
        if want is None:
            self.misses += 1
            return
        self.hits += 1
        assert same(got, profile(number, want[2], fingerprint))

    @rule(pairs=st.dictionaries(st.integers(1, 16), numbers), limit=st.integers(0, 17), fingerprint=prints)
    def longest(self, pairs: dict[int, int], limit: int, fingerprint: str) -> None:
        got = self.store.longest(fingerprint, lambda n: name(pairs[n]) if n in pairs else None, limit)
        found = [one for one in self.held if one[1] == fingerprint and one[2] <= limit and pairs.get(one[2]) == one[0]]
        if not found:
            self.misses += 1
            assert got is None
            return
        self.hits += 1
        want = max(found, key=lambda one: one[2])
        self.look(want[0], fingerprint)
        assert same(got, profile(want[0], want[2], fingerprint))

    @rule(number=numbers)
    def pin(self, number: int) -> None:
        at = self.index(number)
        assert self.store.pin(name(number)) == (at is not None)
        if at is not None:
            self.held[at][3] = True

    @rule(number=numbers)
    def unpin(self, number: int) -> None:
        at = self.index(number)
        assert self.store.unpin(name(number)) == (at is not None and self.held[at][3])
        if at is not None:
            self.held[at][3] = False

    @rule(number=numbers)
    def remove(self, number: int) -> None:
        at = self.index(number)
        assert self.store.remove(name(number)) == (at is not None)
        if at is not None:
            self.held.pop(at)

    @rule(wanted=st.integers(-5, 3 * size(5)))
    def shrink(self, wanted: int) -> None:
        before = self.total()
        assert self.store.shrink(wanted) == self.evict(lambda: before - self.total() >= wanted, True)

    @rule(budget=BUDGETS)
    def rebudget(self, budget: int) -> None:
        self.store.budget = self.budget = budget
        self.evict(lambda: self.total() <= budget, True)

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.held.clear()

    @invariant()
    def agrees(self) -> None:
        assert self.store.keys() == [name(one[0]) for one in self.held]
        assert self.store.bytes == self.total() <= self.budget
        kept = ("hits", "misses", "evictions", "refused", "stale")
        want: dict[str, float] = {key: getattr(self, key) for key in kept if getattr(self, key)}
        assert counts(self.store) == want
        status = self.store.status()
        assert (status["count"], status["pinned"]) == (len(self.held), sum(one[3] for one in self.held))


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(any_of, max_examples=150, stateful_step_count=40)


# --------------------------------------------------------------------------------------------------- many threads


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """All at once; the first failure of any is the test's."""
    errors: list[BaseException] = []
    together = threading.Barrier(count)

    def run(index: int) -> None:
        try:
            together.wait(20)
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a deadlock"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("on_disk", [False, True])
def test_asked_at_once_it_is_made_once(on_disk: bool, tmp_path: Path) -> None:
    store = Voices(budget=1 << 20, folder=tmp_path if on_disk else None)
    made, got = list[int](), list[Profile]()

    def make(number: int) -> Profile:
        made.append(number)
        time.sleep(0.02)
        return profile(number)

    in_threads(8, lambda i: got.append(store.get_or_make(name(i % 2), MODEL, lambda: make(i % 2))))
    assert sorted(made) == [0, 1]
    assert len({id(one) for one in got}) == 2 and all(same(one, profile(0)) or same(one, profile(1)) for one in got)
    assert {"hits": 6, "misses": 2}.items() <= counts(store).items() and not store._flights


def test_an_exception_of_make_reaches_all_and_leaves_nothing() -> None:
    store, calls, seen = Voices(budget=1 << 20), list[int](), list[BaseException]()

    def make() -> Profile:
        calls.append(1)
        (flight,) = store._flights.values()
        deadline = time.monotonic() + 20
        while len(flight.done._cond._waiters) < 2 and time.monotonic() < deadline:  # type: ignore[attr-defined]
            time.sleep(0.001)
        raise ArithmeticError("no voice")

    def ask(index: int) -> None:
        with pytest.raises(ArithmeticError, match="no voice") as raised:
            store.get_or_make(name(0), MODEL, make)
        seen.append(raised.value)

    in_threads(3, ask)
    assert len(calls) == 1 and len(seen) == 3 and len(store) == 0 and not store._flights
    assert counts(store) == {"misses": 3}
    assert same(store.get_or_make(name(0), MODEL, lambda: profile(0)), profile(0))


def test_an_interrupt_is_for_its_own_thread() -> None:
    store, begun, calls = Voices(budget=1 << 20), threading.Event(), list[int]()

    def interrupted() -> Profile:
        begun.set()
        time.sleep(0.1)
        raise KeyboardInterrupt

    def ask(index: int) -> None:
        if index == 0:
            with pytest.raises(KeyboardInterrupt):
                store.get_or_make(name(0), MODEL, interrupted)
            return
        begun.wait(5)

        def make() -> Profile:
            calls.append(index)
            return profile(0)

        assert same(store.get_or_make(name(0), MODEL, make), profile(0))

    in_threads(3, ask)
    assert len(calls) == 1


def test_made_profiles_have_to_be_those_asked_for() -> None:
    store = Voices(budget=1 << 20)
    for wrong in (profile(1), profile(0, fingerprint=OTHER), None):
        with pytest.raises(ValueError, match="make must return the profile of"):
            store.get_or_make(name(0), MODEL, lambda wrong=wrong: wrong)  # type: ignore[misc]

    def again() -> Profile:
        return store.get_or_make(name(0), MODEL, again)

    with pytest.raises(RuntimeError, match="asks for itself"):
        store.get_or_make(name(0), MODEL, again)
    assert len(store) == 0 and not store._flights


def test_what_is_removed_while_it_is_made_or_written_stays_away(tmp_path: Path) -> None:
    store = Voices(budget=1 << 20, folder=tmp_path)

    def make() -> Profile:
        store.remove(name(0))
        return profile(0)

    assert same(store.get_or_make(name(0), MODEL, make), profile(0))
    assert len(store) == 0 and list(tmp_path.iterdir()) == []
    assert same(store.get_or_make(name(0), MODEL, lambda: profile(0)), profile(0))
    store.clear()
    load = store._files.load  # type: ignore[union-attr]

    def slow_load(*args: Any) -> Profile | None:
        found = load(*args)
        store.remove(name(0))
        return found

    store._files.load = slow_load  # type: ignore[union-attr, method-assign]
    assert same(store.get(name(0), MODEL), profile(0))
    assert len(store) == 0 and list(tmp_path.iterdir()) == []
    write = store._files.write  # type: ignore[union-attr]

    def late_write(*args: Any) -> None:
        store.remove(name(0))
        write(*args)

    store._files.write = late_write  # type: ignore[union-attr, method-assign]
    store.put(profile(0))
    assert len(store) == 0 and list(tmp_path.iterdir()) == []


def test_a_failure_holds_no_memory() -> None:
    store, held = Voices(budget=1 << 20), list[weakref.ref[torch.Tensor]]()

    def make() -> Profile:
        large = torch.ones(3)
        held.append(weakref.ref(large))
        raise ArithmeticError("no voice")

    gc.collect()
    gc.disable()  # only a cycle would wait for it
    try:
        for _ in range(2):
            with contextlib.suppress(ArithmeticError):
                store.get_or_make(name(0), MODEL, make)
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("on_disk", [False, True])
def test_many_threads_at_everything(on_disk: bool, tmp_path: Path) -> None:
    folder = tmp_path if on_disk else None
    store = Voices(budget=4 * size(5), folder=folder, folder_budget=5_000 if on_disk else None)
    lookups = [0] * 6

    def work(index: int) -> None:
        draw = random.Random(index)
        for _ in range(60 if on_disk else 300):
            number, what = draw.randrange(8), draw.randrange(10)
            positions = 3 + number
            if what < 4:
                got = store.get_or_make(name(number), MODEL, partial(profile, number, positions))
                assert same(got, profile(number, positions))
                lookups[index] += 1
            elif what < 6:
                found = store.get(name(number), MODEL)
                assert found is None or same(found, profile(number, positions))
                lookups[index] += 1
            elif what == 6:
                store.put(profile(number, positions), pinned=draw.random() < 0.2)
            elif what == 7:
                store.shrink(draw.randrange(3 * size(5)))
            elif what == 8:
                found = store.longest(MODEL, {3 + i: name(i) for i in range(8)}.get, 11)
                assert found is None or same(found, profile(found.positions - 3, found.positions))
                lookups[index] += 1
            else:
                draw.choice([store.remove, store.unpin, store.pin])(name(number))
            assert 0 <= store.bytes <= store.budget

    in_threads(6, work)
    assert store.bytes == sum(each.bytes for each in store._profiles.values()) <= store.budget
    assert not store._flights and store._pinned <= set(store.keys())
    status = store.status()
    assert status["hits"] + status["misses"] == sum(lookups)
    assert status["corrupt"] == status["unwritable"] == 0
    if on_disk:
        assert all(voice_files._NAME.fullmatch(path.name) for path in tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------- the folder


def file_of(folder: Path, number: int = 0, fingerprint: str = MODEL) -> Path:
    return folder / f"{name(number)[:32]}-{fingerprint[:8]}.safetensors"


@contextlib.contextmanager
def warnings_of(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    caplog.clear()
    said: list[str] = []
    with caplog.at_level(logging.WARNING, "csm_runtime"):
        yield said
    said += [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("codes", [None, 0, 6])
def test_profiles_outlive_the_process(tmp_path: Path, dtype: torch.dtype, codes: int | None) -> None:
    folder = tmp_path / "made" / "here"
    one = profile(0, dtype=dtype, codes=codes, transcript='"Ärger"\n\ud800', speaker=3, seconds=0.1, whole=2.0)
    first = Voices(budget=1 << 20, folder=folder)
    assert not folder.exists() and first.get(name(0), MODEL) is None
    assert first.put(one) and counts(first) == {"misses": 1, "written": 1}
    assert list(folder.iterdir()) == [file_of(folder)]
    (tmp_path / "other").touch()
    assert file_of(folder).stat().st_mode == (tmp_path / "other").stat().st_mode
    second = Voices(budget=1 << 20, folder=folder)
    assert second.get(name(0), OTHER) is None
    got = second.get(name(0), MODEL)
    assert same(got, one) and second.get(name(0), MODEL) is got
    assert counts(second) == {"hits": 2, "disk_hits": 1, "misses": 1}
    assert got is not None
    got.tensors["keys"].view(torch.uint8).zero_()  # in memory of its own
    assert same(Voices(budget=1 << 20, folder=folder).get(name(0), MODEL), one)
    never = Voices(budget=1 << 20, folder=folder)
    assert same(never.get_or_make(name(0), MODEL, lambda: pytest.fail("made again")), one)


def test_evicted_profiles_come_back_from_the_folder(tmp_path: Path) -> None:
    store = Voices(budget=size(5), folder=tmp_path)
    for i in range(3):
        store.put(profile(i))
    assert store.keys() == [name(2)]
    assert same(store.get(name(0), MODEL), profile(0)) and store.keys() == [name(0)]
    assert counts(store) == {"evictions": 3, "written": 3, "hits": 1, "disk_hits": 1}
    assert same(store.get(name(0), MODEL), profile(0))
    assert counts(store)["disk_hits"] == 1


def test_the_longest_prefix_is_looked_for_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Voices(budget=1 << 20, folder=tmp_path / "f")
    digests = {4: name(1), 9: name(2), 20: name(3)}
    assert reader.longest(MODEL, digests.get, 99) is None
    writer = Voices(budget=1 << 20, folder=tmp_path / "f")
    for number, positions in ((1, 4), (2, 9), (3, 20)):
        writer.put(profile(number, positions))
    writer.put(profile(7, 7, OTHER))
    assert reader.lengths(MODEL, 99) == [20, 9, 4] and reader.lengths(OTHER, 99) == [7]
    assert same(reader.longest(MODEL, digests.get, 19), profile(2, 9))
    assert reader.keys() == [name(2)] and counts(reader) == {"misses": 1, "hits": 1, "disk_hits": 1}
    damage = bytearray(file_of(tmp_path / "f", 3).read_bytes())
    damage[-1] ^= 1
    file_of(tmp_path / "f", 3).write_bytes(damage)
    assert same(reader.longest(MODEL, digests.get, 99), profile(2, 9)), "the next shorter one"
    assert counts(reader)["corrupt"] == 1
    # What has not changed for long is not read again.
    old = time.time() - 60
    os.utime(tmp_path / "f", (old, old))
    reader.lengths(MODEL, 99)
    monkeypatch.setattr(voice_files.os, "scandir", lambda path: pytest.fail("looked through again"))
    assert reader.lengths(MODEL, 99) == [9, 4]
    monkeypatch.undo()
    writer.put(profile(3, 20))
    assert reader.lengths(MODEL, 99) == [20, 9, 4]


def flip(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def cut(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    del data[start : start + draw.randrange(1, 20)]


def insert(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data) + 1)
    data[start:start] = draw.randbytes(draw.randrange(1, 20))


def overwrite(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    data[start : start + 8] = draw.randbytes(8)


def garbage(data: bytearray, draw: random.Random) -> None:
    data[:] = draw.randbytes(draw.randrange(400))


def digit(data: bytearray, draw: random.Random) -> None:
    """A digit of the header becomes another one, which JSON does not mind."""
    places = [i for i in range(8, 8 + int.from_bytes(data[:8], "little")) if chr(data[i]) in "0123456789"]
    data[draw.choice(places)] = ord(draw.choice("0123456789"))


DAMAGES = (flip, flip, truncate, cut, insert, overwrite, garbage, digit, digit, digit)


@pytest.mark.parametrize("start", range(0, 2400, 400))
def test_no_damaged_file_is_ever_used(tmp_path: Path, start: int) -> None:
    one = profile(0, 5, codes=3, transcript="a12", seconds=1.5, count=1)
    Voices(budget=1 << 20, folder=tmp_path).put(one)
    path = file_of(tmp_path)
    good = path.read_bytes()
    refused = 0
    for seed in range(start, start + 400):
        draw, data = random.Random(seed), bytearray(good)
        draw.choice(DAMAGES)(data, draw)
        path.write_bytes(data)
        store = Voices(budget=1 << 20, folder=tmp_path)
        if seed % 2:
            got = store.longest(MODEL, {5: name(0), 6: name(0)}.get, 99)
        else:
            got = store.get(name(0), MODEL)
        assert got is None or same(got, one), seed
        if bytes(data) == good:
            assert got is not None
        refused += got is None
        assert same(store.get_or_make(name(0), MODEL, lambda: one), one)
        assert same(Voices(budget=1 << 20, folder=tmp_path).get(name(0), MODEL), one), f"{seed}: not rebuilt"
        assert list(tmp_path.iterdir()) == [path]
    assert refused > 320


def with_metadata(path: Path, change: Callable[[dict[str, Any]], Any], seal: bool = False) -> None:
    """Change what a file says of itself; ``seal`` makes the checksum fit again."""
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()[voice_files._KEY])
    tensors = load_file(path)
    change(said)
    if seal:
        said.pop("checksum")
        said["checksum"] = voice_files._checksum(said, tensors)
    save_file(tensors, path, {voice_files._KEY: json.dumps(said)})


def with_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any], seal: bool) -> None:
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()[voice_files._KEY])
    tensors = load_file(path)
    change(tensors)
    if seal:
        said.pop("checksum")
        said["checksum"] = voice_files._checksum(said, tensors)
    save_file(tensors, path, {voice_files._KEY: json.dumps(said)})


def folder_there(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").touch()


def link_to(path: Path, other: Path) -> None:
    path.rename(other)
    path.symlink_to(other)


def pipe_there(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a tensor in it " * 99),
    "other safetensors": lambda path: save_file({"x": torch.ones(3)}, path),
    "other JSON": lambda path: save_file({"x": torch.ones(3)}, path, {voice_files._KEY: "[1]"}),
    "deep JSON": lambda path: save_file({"x": torch.ones(3)}, path, {voice_files._KEY: "[" * 100_000}),
    "a header without end": lambda path: path.write_bytes(b"\xff" * 8 + b"{}" * 99),
    "an empty folder": lambda path: (path.unlink(), path.mkdir()),
    "a folder": folder_there,
    "a pipe": pipe_there,
    "a link to itself": lambda path: link_to(path, path.with_name("elsewhere")),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to(path.with_name("nowhere"))),
    "another format": lambda path: with_metadata(path, lambda said: said.update(format=2), seal=True),
    "another key": lambda path: with_metadata(path, lambda said: said.update(key=name(1)), seal=True),
    "another fingerprint": lambda path: with_metadata(path, lambda said: said.update(fingerprint=OTHER), seal=True),
    "a key alike": lambda path: with_metadata(path, lambda said: said.update(key=name(0)[:32] + "0" * 32), seal=True),
    "other positions": lambda path: with_metadata(path, lambda said: said.update(positions=4), seal=True),
    "true positions": lambda path: with_metadata(path, lambda said: said.update(positions=5.0)),
    "another transcript": lambda path: with_metadata(path, lambda said: said["meta"].update(transcript="b")),
    "a number for a text": lambda path: with_metadata(path, lambda said: said["meta"].update(count=1.0)),
    "one entry more": lambda path: with_metadata(path, lambda said: said.update(extra=1)),
    "no checksum": lambda path: with_metadata(path, lambda said: said.pop("checksum")),
    "a NaN": lambda path: with_tensors(path, lambda t: t["hidden"].fill_(torch.nan), seal=True),
    "other shapes": lambda path: with_tensors(path, lambda t: t.update(keys=t["keys"][:, :, :4].clone()), seal=True),
    "keys for values": lambda path: with_tensors(
        path, lambda t: t.update(keys=t["values"], values=t["keys"]), seal=False
    ),
    "another dtype": lambda path: with_tensors(path, lambda t: t.update(keys=t["keys"].view(torch.int32)), seal=False),
    "a tensor less": lambda path: with_tensors(path, lambda t: t.pop("values"), seal=True),
    "codes less": lambda path: with_tensors(path, lambda t: t.pop("codes"), seal=False),
    "a tensor more": lambda path: with_tensors(path, lambda t: t.update(more=torch.ones(1)), seal=True),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_files_are_refused_and_replaced(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    if what == "a pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names")
    one = profile(0, 5, codes=3, transcript="a", count=1)
    Voices(budget=1 << 20, folder=tmp_path).put(one)
    path = file_of(tmp_path)
    FOREIGN[what](path)
    store = Voices(budget=1 << 20, folder=tmp_path)
    with warnings_of(caplog) as said:
        assert store.longest(MODEL, {4: name(0)}.get, 4) is None
        assert store.get(name(0), MODEL) is None
        assert store.get(name(0), MODEL) is None
    assert len(said) == 1 and "is not used" in said[0]
    assert store.status()["corrupt"] == 1
    assert same(store.get_or_make(name(0), MODEL, lambda: one), one)
    assert path.is_file() and not path.is_symlink()
    assert same(Voices(budget=1 << 20, folder=tmp_path).get(name(0), MODEL), one)
    assert counts(store).get("unwritable") is None


@pytest.mark.parametrize("what", ["an empty folder", "a folder", "a link to itself", "a pipe"])
def test_a_put_takes_the_place_of_whatever_is_there(tmp_path: Path, what: str) -> None:
    Voices(budget=1 << 20, folder=tmp_path).put(profile(0))
    FOREIGN[what](file_of(tmp_path))
    target = tmp_path / "elsewhere"
    before = target.read_bytes() if target.exists() else None
    store = Voices(budget=1 << 20, folder=tmp_path)
    store.put(profile(0, seconds=3))
    assert same(Voices(budget=1 << 20, folder=tmp_path).get(name(0), MODEL), profile(0, seconds=3))
    assert counts(store) == {"written": 1}
    assert before is None or target.read_bytes() == before, "written through a link"


def test_files_swapped_between_keys_are_refused(tmp_path: Path) -> None:
    store = Voices(budget=1 << 20, folder=tmp_path)
    for i in range(2):
        store.put(profile(i))
    store.put(profile(0, fingerprint=OTHER))
    a, b, c = file_of(tmp_path, 0), file_of(tmp_path, 1), file_of(tmp_path, 0, OTHER)
    whole = [path.read_bytes() for path in (a, b, c)]
    for path, data in zip((a, b, c), (whole[1], whole[2], whole[0])):
        path.write_bytes(data)
    fresh = Voices(budget=1 << 20, folder=tmp_path)
    for number, fingerprint in ((0, MODEL), (1, MODEL), (0, OTHER)):
        assert fresh.get(name(number), fingerprint) is None
    assert fresh.lengths(MODEL, 99) == [] and counts(fresh) == {"misses": 3, "corrupt": 3}
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_larger_than_the_budget_stays(tmp_path: Path) -> None:
    Voices(budget=1 << 20, folder=tmp_path).put(profile(0))
    small = Voices(budget=size(5) - 1, folder=tmp_path)
    assert small.get(name(0), MODEL) is None and counts(small) == {"misses": 1}
    with file_of(tmp_path).open("r+b") as file:
        file.truncate(1 << 40)  # a hole: nothing that could be read
    assert small.get(name(0), MODEL) is None and counts(small) == {"misses": 2}
    small.budget = size(5)
    file_of(tmp_path).unlink()
    small.put(profile(0))
    assert same(small.get(name(0), MODEL), profile(0))


def test_a_crash_before_the_file_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = profile(0, seconds=1), profile(0, seconds=2)
    Voices(budget=1 << 20, folder=tmp_path).put(old)

    class Died(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(packed_store.os, "replace", die)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)  # a dead process does not tidy up
        with pytest.raises(Died):
            Voices(budget=1 << 20, folder=tmp_path).put(new)
    (left,) = [path for path in tmp_path.iterdir() if path != file_of(tmp_path)]
    assert voice_files._TEMPORARY.fullmatch(left.name)
    store = Voices(budget=1 << 20, folder=tmp_path)
    assert store.lengths(MODEL, 99) == [5] and same(store.get(name(0), MODEL), old)
    assert left.exists(), "it might be a living one's"
    long_ago = time.time() - 7200
    os.utime(left, (long_ago, long_ago))
    Voices(budget=1 << 20, folder=tmp_path).lengths(MODEL, 99)
    assert list(tmp_path.iterdir()) == [file_of(tmp_path)]
    store.put(new)
    assert same(Voices(budget=1 << 20, folder=tmp_path).get(name(0), MODEL), new)


def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_store.os, "replace", full)
    store = Voices(budget=1 << 20, folder=tmp_path)
    with warnings_of(caplog) as said:
        assert store.put(profile(0)) and store.put(profile(1))
    assert counts(store) == {"unwritable": 2} and list(tmp_path.iterdir()) == []
    assert len(said) == 1 and "No space left" in said[0]
    assert same(store.get(name(0), MODEL), profile(0))


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for folder in (blocked, blocked / "below"):
        store = Voices(budget=1 << 20, folder=folder)
        with warnings_of(caplog) as said:
            assert store.get(name(0), MODEL) is None
            assert same(store.get_or_make(name(0), MODEL, lambda: profile(0)), profile(0))
            store.put(profile(1))
            assert store.lengths(MODEL, 99) == [5]
            assert store.remove(name(1)) and not store.remove(name(2))
            store.clear(files=True)
        assert len(said) == 1 and "they stay in memory" in said[0]
        assert counts(store) == {"misses": 2, "unwritable": 2}
    assert blocked.read_text() == "not a folder"


def test_a_read_that_fails_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Voices(budget=1 << 20, folder=tmp_path).put(profile(0))
    store = Voices(budget=1 << 20, folder=tmp_path)
    for error in (OSError(24, "Too many open files"), MemoryError()):

        def failing(*_: Any, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(voice_files, "_read", failing)
            assert store.get(name(0), MODEL) is None
    assert counts(store) == {"misses": 2}
    assert same(store.get(name(0), MODEL), profile(0))


def test_the_folder_has_a_limit_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Voices(budget=1 << 20, folder=tmp_path).put(profile(0))
    each = file_of(tmp_path).stat().st_size
    (tmp_path / "notes.txt").write_text("mine " * 9999)
    store = Voices(budget=1 << 20, folder=tmp_path, folder_budget=3 * each + 50)
    store.put(profile(1))
    store.put(profile(2))
    store.clear()
    assert same(store.get(name(0), MODEL), profile(0))  # used: now 1 is the oldest
    store.put(profile(3))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {file_of(tmp_path, i).name for i in (0, 2, 3)} | {"notes.txt"}
    assert counts(store)["file_evictions"] == 1 and len(store) == 2
    with warnings_of(caplog) as said:
        tiny = Voices(budget=1 << 20, folder=tmp_path, folder_budget=size(5) - 1)
        assert tiny.put(profile(4))
    assert len(said) == 1 and "folder_budget" in said[0] and not file_of(tmp_path, 4).exists()
    assert len(list(tmp_path.iterdir())) == 4


def test_what_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    store = Voices(budget=1 << 20, folder=tmp_path)
    assert store.put(profile(0, transcript="a" * 600_000)) and store.put(profile(1, transcript='"' * 100_000))
    assert counts(store) == {"unwritable": 1, "written": 1}
    assert same(Voices(budget=1 << 20, folder=tmp_path).get(name(1), MODEL), profile(1, transcript='"' * 100_000))


def test_removing_removes_files(tmp_path: Path) -> None:
    store = Voices(budget=1 << 20, folder=tmp_path)
    for number, fingerprint in ((0, MODEL), (0, OTHER), (1, MODEL), (2, MODEL)):
        store.put(profile(number, fingerprint=fingerprint))
    other = tmp_path / "other.safetensors"
    other.touch()
    assert store.remove(name(0)) and not store.remove(name(0))
    assert {path.name for path in tmp_path.iterdir()} == {
        *(file_of(tmp_path, i).name for i in (1, 2)),
        other.name,
    }
    store.clear()
    assert same(store.get(name(1), MODEL), profile(1))
    store.clear(files=True)
    assert store.get(name(1), MODEL) is None and list(tmp_path.iterdir()) == [other]
    assert not store.remove("") and not store.remove("../" * 11) and other.exists()


def test_two_stores_share_a_folder(tmp_path: Path) -> None:
    stores = [Voices(budget=3 * size(5), folder=tmp_path) for _ in range(3)]

    def work(index: int) -> None:
        draw = random.Random(index)
        for _ in range(40):
            number = draw.randrange(6)
            got = stores[index].get_or_make(name(number), MODEL, partial(profile, number))
            assert same(got, profile(number))
            if draw.random() < 0.3:
                stores[index].put(profile(number))

    in_threads(3, work)
    assert all(store.status()["corrupt"] == store.status()["unwritable"] == 0 for store in stores)
    assert sorted(tmp_path.iterdir()) == sorted(file_of(tmp_path, i) for i in range(6))


def test_the_store_says_what_it_counts() -> None:
    assert set(voices._COUNTS.values()) < set(Voices(budget=0).status())
    text = Voices.__doc__ or ""
    assert all(f"voices.{counted}" in text for counted in voices._COUNTS)
