"""Which segments stay in the window: what has to hold for any conversation, and what should come of particular ones."""

from __future__ import annotations

import ast
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csm_runtime import context
from csm_runtime.context import (
    ContextChoice,
    Segment,
    count_frames,
    count_tokens,
    lexical_scores,
    position_budget,
    prioritize_context,
    segment_positions,
    sound_positions,
)

any_of = settings(
    derandomize=True, deadline=None, database=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow]
)
"""The same examples in every run, however busy the machine."""

WORDS = ["cat", "dog", "rain", "tea", "moon", "yes", "well", "river"]
texts = st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join)
one_segment = st.builds(
    Segment,
    speaker=st.integers(0, 3),
    text=texts,
    positions=st.integers(1, 300),
    pinned=st.sampled_from([False] * 7 + [True]),
    payload=st.builds(object),
)
conversations = st.lists(one_segment, max_size=40)
budgets = st.integers(-50, 2048)
options = st.fixed_dictionaries({"recent": st.integers(0, 12), "active": st.integers(0, 12)})


def conversation(*turns: tuple[int | str, str, int], pins: Sequence[int] = ()) -> list[Segment]:
    return [Segment(who, text, size, i in pins, object()) for i, (who, text, size) in enumerate(turns)]


def chatter(turns: int, speakers: int = 2, seed: int = 0) -> list[Segment]:
    """Speakers in turn, 2 to 8 seconds each, and a pinned reference of each first."""
    draw = random.Random(seed)
    pins = [Segment(who, "a reference", 100, True, object()) for who in range(speakers)]
    return pins + [
        Segment(i % speakers, " ".join(draw.choices(WORDS, k=8)), draw.randrange(35, 115), payload=object())
        for i in range(turns)
    ]


def assert_sound(choice: ContextChoice, segments: Sequence[Segment], budget: int) -> None:
    """What holds of any choice from any conversation."""
    assert choice.positions == sum(segments[i].positions for i in choice.indices) <= max(budget, 0)
    assert choice.counts == tuple(segments[i].positions for i in choice.indices)
    assert list(choice.indices) == sorted(choice.indices)
    assert all(kept is segments[i] for kept, i in zip(choice.segments, choice.indices))
    assert len(choice.segments) == len(choice.indices) == len(choice.reasons) == len(choice.counts)
    dropped = [one.index for one in choice.dropped]
    assert dropped == sorted(dropped)
    assert sorted([*choice.indices, *dropped]) == list(range(len(segments)))
    assert all(one.reason and one.positions == segments[one.index].positions for one in choice.dropped)
    assert all(one.speaker == segments[one.index].speaker for one in choice.dropped)
    assert choice.share == choice.positions / choice.window
    total = sum(one.positions for one in segments)
    assert choice.kept_share == (choice.positions / total if total else 1.0)
    assert json.loads(json.dumps(choice.to_dict())) == choice.to_dict()


def active_speakers(segments: Sequence[Segment], speaker: int, active: int) -> set[int]:
    return {speaker} | {one.speaker for one in segments[max(len(segments) - active, 0) :]}


# ------------------------------------------------------------------------------------------------- any conversation


@any_of
@given(conversations, texts, st.integers(0, 4), budgets, options)
def test_budget_order_and_partition(
    segments: list[Segment], text: str, speaker: int, budget: int, kw: dict[str, int]
) -> None:
    choice = prioritize_context(segments, text, speaker, budget, **kw)
    assert_sound(choice, segments, budget)
    assert prioritize_context(segments, text, speaker, budget, **kw).to_dict() == choice.to_dict()
    if sum(one.positions for one in segments) <= budget:
        assert choice.dropped == ()
    room = budget - choice.positions
    assert all(one.positions > room for one in choice.dropped)  # nothing more would have fitted
    for one in choice.dropped:
        wanted = context.NO_BUDGET if budget <= 0 else context.NO_ROOM if one.positions <= budget else context.TOO_LARGE
        assert one.reason == wanted


@any_of
@given(conversations, st.integers(0, 4), budgets, options)
def test_pins_stay_whenever_they_fit(segments: list[Segment], speaker: int, budget: int, kw: dict[str, int]) -> None:
    choice = prioritize_context(segments, "tea", speaker, budget, **kw)
    pins = [i for i, one in enumerate(segments) if one.pinned]
    if sum(segments[i].positions for i in pins) <= budget:
        assert set(pins) <= set(choice.indices)
    elif budget > 0:  # then nothing else takes the room of a pin that would have fitted
        room = budget - sum(segments[i].positions for i in pins if i in choice.indices)
        assert all(segments[i].positions > room for i in pins if i not in choice.indices)


@any_of
@given(conversations, st.integers(0, 4), budgets, options)
def test_active_speakers_stay_whenever_their_shortest_fit(
    segments: list[Segment], speaker: int, budget: int, kw: dict[str, int]
) -> None:
    choice = prioritize_context(segments, "tea", speaker, budget, **kw)
    present = {segments[i].speaker for i in choice.indices}
    pins = [one for one in segments if one.pinned]
    room = budget - sum(one.positions for one in pins)
    theirs = {
        who: [one.positions for one in segments if one.speaker == who]
        for who in active_speakers(segments, speaker, kw["active"]) - {one.speaker for one in pins}
    }
    least = {who: min(sizes) for who, sizes in theirs.items() if sizes}
    if room >= 0 and least.get(speaker, room + 1) <= room:
        assert speaker in present
    if sum(least.values()) <= room:
        assert set(least) <= present
        # and the latest of the speaker to speak, where that costs nobody else their place
        latest = max((i for i, one in enumerate(segments) if one.speaker == speaker), default=None)
        others = sum(size for who, size in least.items() if who != speaker)
        if latest is not None and (segments[latest].pinned or segments[latest].positions + others <= room):
            assert latest in choice.indices


@any_of
@given(st.lists(st.tuples(st.integers(0, 3), texts, st.booleans()), max_size=25), st.integers(60, 300), options)
def test_a_larger_budget_keeps_more_where_all_are_of_one_size(
    turns: list[tuple[int, str, bool]], size: int, kw: dict[str, int]
) -> None:
    segments = [Segment(who, text, size, pinned) for who, text, pinned in turns]
    kept: set[int] = set()
    for budget in range(0, 2048, size):
        more = set(prioritize_context(segments, "tea river", 0, budget, **kw).indices)
        assert kept <= more and len(more) == min(budget // size, len(segments))
        kept = more


@any_of
@given(conversations, st.lists(budgets, min_size=1, max_size=12), st.integers(1, 5), st.sampled_from([0.3, 0.75, 1.0]))
def test_a_prefix_changes_only_where_it_must(
    segments: list[Segment], allowed: list[int], step: int, watermark: float
) -> None:
    previous: ContextChoice | None = None
    length = 0
    for turn, budget in enumerate(allowed):
        seen, length = length, min(len(segments), (turn + 1) * step)
        now, speaker = segments[:length], turn % 4
        choice = prioritize_context(now, "tea", speaker, budget, previous=previous, watermark=watermark)
        assert_sound(choice, now, budget)
        if previous is not None:
            both = zip(previous.segments, choice.segments)
            same = [old is new for old, new in both] + [False]
            assert choice.common_prefix == same.index(False)
            assert choice.prefix_positions == sum(choice.counts[: choice.common_prefix])
        if previous is not None and previous.indices and choice.common_prefix < len(previous.indices):
            appended = {*previous.indices, *range(seen, length)}
            used = sum(now[i].positions for i in appended)
            lacks = {i for i in range(length) if now[i].pinned} - appended
            there = {one.speaker for one in now} & active_speakers(now, speaker, 8)
            gone = there - {now[i].speaker for i in appended}
            assert used > budget or lacks or gone or used < (2 * watermark - 1) * budget
        previous = choice


# ------------------------------------------------------------------------------------------- particular conversations


def kept(segments: Sequence[Any], text: str, speaker: int | str, budget: int, **kw: Any) -> list[int]:
    return list(prioritize_context(segments, text, speaker, budget, **kw).indices)


def test_the_order_of_importance() -> None:
    segments = conversation(
        (0, "a reference voice", 50),
        (1, "do you like the river", 50),
        (2, "never mind", 50),
        (1, "the weather is fine", 50),
        (0, "so it is", 50),
        (1, "shall we go", 50),
        pins=[0],
    )
    orders = [kept(segments, "to the river", 1, budget, recent=1, active=3) for budget in range(0, 301, 50)]
    assert orders == [[], [0], [0, 5], [0, 4, 5], [0, 1, 4, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    choice = prioritize_context(segments, "to the river", 1, 250, recent=1, active=3)
    assert choice.reasons == (context.PINNED, context.RELEVANT, context.RELEVANT, context.SPEAKER, context.SPEAKER)
    choice = prioritize_context(segments, "to the river", 1, 250, recent=3, active=3)
    assert choice.reasons[2:] == (context.RECENT, context.SPEAKER, context.SPEAKER)
    assert prioritize_context(segments, "", 1, 250, recent=0, active=3).reasons[1] == context.ROOM


def test_pins_beyond_the_budget() -> None:
    segments = conversation((0, "", 60), (0, "", 50), (1, "", 40), (1, "", 45), (2, "", 70), pins=range(5))
    assert kept(segments, "tea", 0, 50) == [1]
    assert kept(segments, "tea", 1, 50) == [3]
    assert kept(segments, "tea", 1, 115) == [3, 4]  # the latest of each speaker before the rest
    assert kept(segments, "tea", 0, 95) == [1, 3]  # 2's is passed over, 1's smaller one fits
    assert kept(segments, "tea", 9, 265) == [0, 1, 2, 3, 4]
    assert kept(segments, "tea", 9, 39) == []


def test_a_shorter_earlier_segment_stands_in() -> None:
    segments = conversation((1, "", 30), (1, "", 20), (1, "", 400), (0, "", 50))
    choice = prioritize_context(segments, "tea", 0, 90)
    assert choice.indices == (1, 3)  # the latest that fits beside 0's, not the first
    assert [one.reason for one in choice.dropped] == [context.NO_ROOM, context.TOO_LARGE]
    # 0's latest fits the budget, but only without 1: 0's earlier one stands in
    segments = conversation((0, "", 30), (1, "", 40), (0, "", 90))
    assert kept(segments, "tea", 0, 100) == [0, 1]
    assert kept(segments, "tea", 0, 130) == [1, 2]


def test_who_has_a_pin_is_there_already() -> None:
    segments = conversation((1, "", 50), (1, "tea", 30), (0, "", 20), (1, "", 80), pins=[0])
    assert kept(segments, "", 0, 100, recent=0) == [0, 1, 2]
    choice = prioritize_context(segments, "", 0, 100, recent=0)
    assert choice.reasons == (context.PINNED, context.ROOM, context.SPEAKER)
    assert kept(segments, "", 0, 150, recent=0) == [0, 2, 3]


def test_speakers_that_are_not_active() -> None:
    segments = conversation((5, "", 50), *[(i % 2, "", 50) for i in range(8)])
    assert 0 not in kept(segments, "", 0, 200)
    assert 0 in kept(segments, "", 0, 200, active=9)
    assert 0 in kept(segments, "", 5, 200)  # about to speak
    assert kept(segments, "", "5", 200) == kept(segments, "", 5, 200)  # both are written [5]


def test_speakers_of_whom_nothing_fits_are_named() -> None:
    segments = conversation(*[(who, "", 90) for who in range(8)])
    choice = prioritize_context(segments, "", 0, 100)
    assert choice.indices == (0,)
    assert choice.notes == ("no segment fits of active speakers: '7', '6', '5', '4', '3' and 2 more",)
    assert prioritize_context(segments, "", 99, 2000).notes == ()


def test_relevance_goes_before_recency() -> None:
    segments = conversation((0, "the blue whale", 50), *[(0, "other things", 50) for _ in range(9)])
    assert 0 in kept(segments, "how large is a whale", 0, 150, recent=1)
    assert kept(segments, "how large is a hall", 0, 150, recent=1) == [7, 8, 9]


def test_no_conversation_is_too_long() -> None:
    segments = chatter(10_000, speakers=3)
    started = time.process_time()
    choice = prioritize_context(segments, "tea by the river", 1, 1500)
    again = prioritize_context([*segments, *chatter(9)[2:]], "tea by the river", 1, 1500, previous=choice)
    took = time.process_time() - started
    assert_sound(choice, segments, 1500)
    assert choice.positions > 1450 and len(again.indices) > 5
    assert took < 2.0
    everyone = [Segment(i, "tea", 50) for i in range(10_000)]
    started = time.process_time()
    prioritize_context(everyone, "tea", 1, 1500, active=10_000, recent=10_000)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("budget", [0, -1, -5000])
def test_an_empty_budget(budget: int) -> None:
    segments = chatter(3)
    choice = prioritize_context(segments, "tea", 0, budget)
    assert choice.indices == () and choice.positions == 0 and choice.share == 0.0
    assert {one.reason for one in choice.dropped} == {context.NO_BUDGET}
    again = prioritize_context(segments, "tea", 0, 500, previous=choice)
    assert again.common_prefix == 0 and again.dropped == ()


def test_an_empty_conversation() -> None:
    choice = prioritize_context([], "tea", 0, 1000)
    assert (choice.segments, choice.dropped, choice.share, choice.kept_share) == ((), (), 0.0, 1.0)
    assert str(choice) == (
        "context: 0 of 0 segments, 0 positions of a budget of 1000, 0.0% of the window; 100.0% of the conversation"
    )
    later = prioritize_context(chatter(2), "tea", 0, 1000, previous=choice)
    assert len(later.indices) == 4 and later.common_prefix == 0


def test_the_report() -> None:
    segments = conversation((0, "", 100), (1, "", 400), (1, "", 50), (0, "", 62), pins=[0])
    before = prioritize_context(segments[:3], "", 0, 300)
    choice = prioritize_context(segments, "", 0, 300, previous=before)
    assert str(choice) == (
        "context: 3 of 4 segments, 212 positions of a budget of 300, 10.4% of the window; 34.6% of the conversation\n"
        "          segments positions\n"
        "  kept           1       100  pinned\n"
        "  kept           1        50  kept before\n"
        "  kept           1        62  new since the choice before\n"
        "  dropped        1       400  larger than the whole budget\n"
        "  as before: the first 2 segments, 150 positions"
    )
    said = choice.to_dict()
    assert said["kept"][0] == {"index": 0, "speaker": 0, "positions": 100, "reason": context.PINNED}
    assert said["dropped"] == [{"index": 1, "speaker": 1, "positions": 400, "reason": context.TOO_LARGE}]
    assert said["share"] == 212 / 2048 and said["kept_share"] == 212 / 612
    assert said["common_prefix"] == 2 and said["prefix_positions"] == 150
    assert prioritize_context(segments, "", 0, 300, window=1000).share == 0.212


# ------------------------------------------------------------------------------------------------- an unchanged prefix


def changed(segments: Sequence[Segment], follow: bool, wobble: int = 0) -> tuple[int, int, int]:
    """Turns whose prefix changed, positions computed anew and least kept once full, over a growing conversation."""
    draw, previous = random.Random(1), None
    turns = positions = 0
    least = 2048
    for end in range(2, len(segments)):
        budget = 1500 - draw.randrange(wobble + 1)
        choice = prioritize_context(
            segments[:end], segments[end].text, segments[end].speaker, budget, previous=previous if follow else None
        )
        if previous is None:
            prefix = 0
        else:
            same = [a is b for a, b in zip(previous.segments, choice.segments)] + [False]
            prefix = same.index(False)
            turns += prefix < len(previous.segments)
        positions += choice.positions - sum(choice.counts[:prefix])
        if choice.dropped:
            least = min(least, choice.positions)
        previous = choice
    return turns, positions, least


@pytest.mark.parametrize("wobble", [0, 60])
def test_most_turns_of_a_long_conversation_only_append(wobble: int) -> None:
    segments = chatter(200)
    turns, positions, least = changed(segments, True, wobble)
    naive_turns, naive_positions, _ = changed(segments, False, wobble)
    assert naive_turns > 150
    assert turns < 45
    assert positions < naive_positions / 3
    assert least > 0.65 * 1500


def test_an_appended_choice_is_the_previous_one_and_what_is_new() -> None:
    segments = chatter(60)
    before = prioritize_context(segments[:50], "tea", 0, 1400)
    before = prioritize_context(segments[:55], "tea", 0, 1400, previous=before)
    after = prioritize_context(segments[:57], "river", 1, 1400, previous=before)
    assert after.indices == (*before.indices, 55, 56)
    assert after.common_prefix == len(before.indices)
    assert set(after.reasons[-2:]) == {context.NEW} and after.reasons[:2] == (context.PINNED,) * 2
    assert {one.reason for one in after.dropped} == {context.PREFIX}


def test_when_it_no_longer_fits_room_is_left_for_turns_to_come() -> None:
    segments = [Segment(i % 2, "tea", 100, payload=object()) for i in range(30)]
    before = prioritize_context(segments[:10], "", 0, 1000)
    assert len(before.indices) == 10
    after = prioritize_context(segments[:11], "", 0, 1000, previous=before)
    assert after.indices == tuple(range(4, 11)) and after.positions == 700
    assert {one.reason for one in after.dropped} == {context.WATERMARK}
    for end in (12, 13, 14):
        after = prioritize_context(segments[:end], "", 0, 1000, previous=after)
        assert after.indices == tuple(range(4, end))
    after = prioritize_context(segments[:15], "", 0, 1000, previous=after, watermark=1.0)
    assert after.positions == 1000


def test_a_pin_or_a_speaker_that_the_previous_choice_lacks_comes_back() -> None:
    segments = conversation((7, "", 100), *[(i % 2, "", 100) for i in range(12)])
    before = prioritize_context(segments, "", 0, 800)
    assert 0 not in before.indices
    back = prioritize_context(segments, "", 7, 800, previous=before)
    assert 0 in back.indices and back.common_prefix == 0
    assert 1 not in before.indices and 0 in {one.speaker for one in before.segments}
    pinned = [segments[0], replace(segments[1], pinned=True), *segments[2:]]
    assert 1 in kept(pinned, "", 0, 800, previous=before)


def test_a_small_budget_for_one_turn_does_not_last() -> None:
    segments = chatter(30)
    full = prioritize_context(segments, "", 0, 1500)
    small = prioritize_context(segments, "", 0, 400, previous=full)
    again = prioritize_context(segments, "", 0, 1500, previous=small)
    assert small.positions <= 400 and again.positions > 1000
    assert prioritize_context(segments, "", 0, 1500, previous=again).indices == again.indices


def test_the_caller_may_shorten_the_conversation() -> None:
    segments = chatter(60)
    pins, turns = segments[:2], segments[2:]
    before = prioritize_context(segments[:50], "", 0, 1500)
    before = prioritize_context(segments[:51], "", 0, 1500, previous=before)
    cut = [*pins, *turns[20:50]]
    assert all(one in cut for one in before.segments)
    after = prioritize_context(cut, "", 0, 1500, previous=before)
    assert after.segments == (*before.segments, turns[49]) and after.common_prefix == len(before.segments)
    gone = prioritize_context(turns[45:50], "", 0, 1500, previous=before)
    assert len(gone.indices) == 5 and gone.common_prefix == 0


def test_segments_made_anew_are_the_same_with_the_same_payload_alone() -> None:
    segments = chatter(5)
    before = prioritize_context(segments, "", 0, 1500)
    copies = [replace(one, speaker=str(one.speaker), pinned=False) for one in segments]
    assert prioritize_context(copies, "", 0, 1500, previous=before).common_prefix == 7
    copies[3] = replace(copies[3], payload=object())
    assert prioritize_context(copies, "", 0, 1500, previous=before).common_prefix == 3
    copies[1] = replace(copies[1], positions=copies[1].positions + 1)
    assert prioritize_context(copies, "", 0, 1500, previous=before).common_prefix == 1


def test_a_late_yes_like_the_last_one_is_new() -> None:
    yes = Segment(0, "Yes.", 10)
    segments = [Segment(1, "tea", 900), Segment(0, "well", 200), yes]
    before = prioritize_context(segments, "", 0, 950)
    assert before.indices == (0, 2)
    after = prioritize_context([*segments, yes], "", 0, 950, previous=before)
    assert after.indices == (0, 2, 3)
    segments = [yes, Segment(1, "tea", 900), yes, Segment(1, "well", 50)]
    before = prioritize_context(segments, "", 0, 62)
    after = prioritize_context([*segments, Segment(0, "oh", 2)], "", 0, 62, previous=before)
    assert before.indices == (2, 3) and after.indices == (2, 3, 4)


# ----------------------------------------------------------------------------------------------------------- relevance


def ranks(text: str, *others: str) -> list[int]:
    """Those with anything in common, best first."""
    scores = lexical_scores(text, [Segment(0, other, 1) for other in others])
    return [i for i in sorted(range(len(others)), key=lambda i: -scores[i]) if scores[i] > 0]


@pytest.mark.parametrize(
    ("text", "others", "wanted"),
    [
        ("the blue whale", ["the the the", "a whale", "the end", "the"], [1]),  # most have "the"
        ("blue whale", ["blue", "a whale", "blue", "x", "blue", "x"], [1, 0, 2, 4]),  # the rarer word first
        ("WHALE", ["whales", "Whale!", "«whale»", ""], [1, 2]),
        ("STRASSE", ["die Straße", "der Weg"], [0]),
        ("don't", ["I don’t", "don", "t"], [0]),
        ("snake_case", ["a snake", ""], [0]),
        ("ｆｕｌｌ", ["full", ""], [0]),
        ("cafe\u0301", ["café", "cafe"], [0]),
        ("我的猫在哪里", ["他喜欢狗", "那只猫很可爱", "猫在哪", ""], [2, 1]),
        ("東京タワー", ["京都", "大阪", "東京", ""], [2, 0]),
        ("แมวอยู่ไหน", ["แมว", "hello"], [0]),
        ("고양이가", ["고양이는 어디", "우리집"], [0]),
        ("हिन्दी", ["हम", "हिन्दी में", "न"], [1]),
        ("число 42", ["сорок два", "42"], [1]),
        ("", ["anything", ""], []),
        ("?!", ["?!", ""], []),
    ],
)
def test_words_in_common(text: str, others: list[str], wanted: list[int]) -> None:
    assert ranks(text, *others) == wanted


def test_bm25() -> None:
    segments = [Segment(0, text, 1) for text in ("cat", "cat cat dog", "dog", "moon rain")]
    cat, moon = math.log(1 + 2.5 / 2.5), math.log(1 + 3.5 / 1.5)  # in 2 and in 1 of 4

    def term(rarity: float, times: int, length: int) -> float:
        return rarity * times * (1.2 + 1) / (times + 1.2 * (1 - 0.75 + 0.75 * length / 1.75))

    wanted = [term(cat, 1, 1), term(cat, 2, 3), 0.0, term(moon, 1, 2)]
    assert lexical_scores("cat moon cat", segments) == pytest.approx(wanted, rel=1e-12)
    assert lexical_scores("cat", []) == []


def test_a_scorer_decides_and_is_asked_only_where_it_matters() -> None:
    segments = chatter(40)
    asked: list[tuple[str, Sequence[Any]]] = []

    def oldest(text: str, all_of_them: Sequence[Any]) -> torch.Tensor:
        asked.append((text, all_of_them))
        return torch.arange(len(all_of_them), 0, -1, dtype=torch.float32)

    choice = prioritize_context(segments, "tea", 0, 1000, scorer=oldest, recent=2)
    assert choice.indices[:7] == (0, 1, 2, 3, 4, 5, 6) and choice.notes == ()
    assert [(text, list(those)) for text, those in asked] == [("tea", segments)]
    prioritize_context(segments, "tea", 0, 1000, scorer=oldest, previous=choice)
    prioritize_context(segments[:5], "tea", 0, 1000, scorer=oldest)
    prioritize_context(segments, "tea", 0, 200, scorer=oldest)  # full of pins
    assert len(asked) == 1


def test_scores_below_nothing_are_nothing() -> None:
    segments = chatter(40)
    against = prioritize_context(
        segments, "", 0, 1000, scorer=lambda _, all_of_them: [-i for i in range(len(all_of_them))]
    )
    assert against.indices == prioritize_context(segments, "", 0, 1000).indices


def broken(text: str, segments: Sequence[Any]) -> list[float]:
    raise RuntimeError("no connection\nto anything")


@pytest.mark.parametrize(
    ("scorer", "note"),
    [
        (broken, "RuntimeError: no connection"),
        (lambda _, those: [float("nan")] * len(those), "ValueError: 42 finite numbers were wanted, 42 came"),
        (
            lambda _, those: [1.0] * len(those[1:]) + [float("inf")],
            "ValueError: 42 finite numbers were wanted, 42 came",
        ),
        (lambda _, those: [1.0], "ValueError: 42 finite numbers were wanted, 1 came"),
        (lambda _, those: None, "TypeError: 'NoneType' object is not iterable"),
        (lambda _, those: ["good"] * len(those), "ValueError: could not convert string to float: 'good'"),
        (3, "TypeError: 'int' object is not callable"),
    ],
)
def test_a_scorer_that_fails(scorer: Callable[..., Any], note: str) -> None:
    segments = chatter(40)
    choice = prioritize_context(segments, "tea by the river", 0, 1000, scorer=scorer)
    assert choice.notes == (f"the scorer failed, words were compared instead: {note}",)
    assert choice.indices == prioritize_context(segments, "tea by the river", 0, 1000).indices
    assert note in str(choice)


# --------------------------------------------------------------------------------------------------- counting positions


@dataclass
class Foreign:
    """As Sesame's own."""

    speaker: int
    text: str
    audio: torch.Tensor


def test_segments_of_another_class() -> None:
    segments = [Foreign(i % 2, "hello there", torch.zeros(24_000 * (2 + i % 3))) for i in range(12)]
    choice = prioritize_context(segments, "hello", 0, 200, count=sound_positions)
    sizes = [sound_positions(one) for one in segments]
    assert sizes[0] == count_tokens("hello there", 0) + 25 + 1
    assert choice.positions == sum(sizes[i] for i in choice.indices) <= 200 and len(choice.indices) > 3
    assert all(one is segments[i] for one, i in zip(choice.segments, choice.indices))
    after = prioritize_context(segments, "hello", 0, 200, count=sound_positions, previous=choice)
    assert after.common_prefix == len(choice.indices)
    with pytest.raises(ValueError, match=r"segments\[0\] is a Foreign without positions: pass count="):
        prioritize_context(segments, "hello", 0, 200)


def test_count_goes_before_positions() -> None:
    segments = chatter(4)
    choice = prioritize_context(segments, "", 0, 120, count=lambda _: 20)
    assert choice.positions == 120
    assert prioritize_context(segments, "", 0, 120, count=lambda _: 20, previous=choice).common_prefix == 6
    assert prioritize_context(segments, "", 0, 120, count=lambda _: 19, previous=choice).common_prefix == 0


def test_frames_and_positions() -> None:
    assert [count_frames(s) for s in (0, 0.001, 0.08, 0.081, 1, 0.1 + 0.2, 0.24, 10, 90.0)] == [
        *(0, 1, 1, 2, 13, 4, 3, 125, 1125)
    ]
    assert segment_positions(7, 125) == 133
    assert segment_positions(0, 0) == 1
    assert position_budget(max_frames=125, text_positions=20) == 1902
    assert position_budget(max_frames=1125, text_positions=20, window=1024) == -122
    segment = Segment.from_seconds(0, "hi", 10, tokenizer=lambda text: text.split(), pinned=True, payload=[1])
    assert (segment.positions, segment.pinned, segment.payload) == (1 + 125 + 1, True, [1])


def test_tokens() -> None:
    written: list[str] = []

    def tokenizer(text: str) -> list[int]:
        written.append(text)
        return [0] * 9

    assert count_tokens("Hello", 3, tokenizer) == 9 and written == ["[3]Hello"]
    assert count_tokens("Hello", 3, lambda text: {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}) == 3
    assert count_tokens("Hello", 3, lambda text: torch.zeros(1, 6)) == 6
    with pytest.raises(ValueError, match=r"tokenizer\(text\) must be one sequence, got Tensor of shape"):
        count_tokens("Hello", 3, lambda text: torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"tokenizer\(text\) must be one sequence, got int"):
        count_tokens("Hello", 3, lambda text: 7)
    assert count_tokens("", 0) == 5  # begin, [, 0, ], end
    assert count_tokens("Hi, conversation!", 0) == 5 + 1 + 1 + 3 + 1
    assert count_tokens("我的猫", 0) == 8


@pytest.mark.parametrize("shape", [(48_000,), (1, 48_000), (1, 1, 48_000)])
def test_sound_positions(shape: tuple[int, ...]) -> None:
    tokens = partial(sound_positions, tokenizer=lambda text: text)
    assert tokens(Foreign(0, "hi", torch.zeros(shape))) == 5 + 25 + 1
    assert tokens(Foreign(0, "hi", torch.zeros(48_001))) == 5 + 26 + 1


@pytest.mark.parametrize("audio", [torch.zeros(2, 48_000), torch.zeros(48_000, 1), torch.zeros(()), None])
def test_sound_of_another_shape(audio: Any) -> None:
    with pytest.raises(ValueError, match="audio must be one sequence"):
        sound_positions(Foreign(0, "hi", audio))


# ----------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": "abc"}, "segments must be a sequence of segments, got str"),
        ({"segments": 3}, "segments must be a sequence of segments, got int"),
        ({"segments": [Segment(0, "", 1), 3]}, r"segments\[1\] must have a speaker and a text, got int"),
        ({"segments": [Foreign(0, None, None)], "count": lambda _: 1}, r"segments\[0\].text must be a text, got None"),
        ({"segments": [Foreign(None, "", None)], "count": lambda _: 1}, r"segments\[0\].speaker must be an integer or"),
        ({"count": lambda _: 0}, r"count\(segments\[0\]\) must be at least 1, got 0"),
        ({"count": lambda _: 1.5}, r"count\(segments\[0\]\) must be an integer, got 1.5"),
        ({"count": 3}, "count must be a function of a segment or None, got 3"),
        ({"text": None}, "text must be a text, got None"),
        ({"speaker": 1.0}, "speaker must be an integer or a text, got 1.0"),
        ({"speaker": True}, "speaker must be an integer or a text, got True"),
        ({"budget": 10.0}, "budget must be an integer, got 10.0"),
        ({"budget": True}, "budget must be an integer, got True"),
        ({"budget": 2049}, "budget must be at most the window of 2048 positions, got 2049"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"recent": -1}, "recent must be at least 0, got -1"),
        ({"active": "8"}, "active must be an integer, got '8'"),
        ({"watermark": 0}, "watermark must be a number above 0 and at most 1, got 0"),
        ({"watermark": float("nan")}, "watermark must be a number above 0 and at most 1, got nan"),
        ({"previous": (0, 1)}, r"previous must be a ContextChoice or None, got \(0, 1\)"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        prioritize_context(**{"segments": chatter(3), "text": "", "speaker": 0, "budget": 100, **change})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segment(0.5, "", 1), "speaker must be an integer or a text"),
        (lambda: Segment(0, b"", 1), "text must be a text"),
        (lambda: Segment(0, "", 0), "positions must be at least 1, got 0"),
        (lambda: Segment(0, "", 1.5), "positions must be an integer"),
        (lambda: Segment(0, "", 1, 1), "pinned must be True or False, got 1"),
        (lambda: count_frames(-1), "seconds must be a finite number of at least 0, got -1"),
        (lambda: count_frames(float("inf")), "seconds must be a finite number"),
        (lambda: segment_positions(-1, 0), "text_tokens must be at least 0"),
        (lambda: segment_positions(0, 2.5), "frames must be an integer"),
        (lambda: position_budget(max_frames=-1, text_positions=0), "max_frames must be at least 0"),
    ],
)
def test_bad_values(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_the_standard_library_alone() -> None:
    tree = ast.parse(Path(context.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {str(name).partition(".")[0] for name in modules} <= set(sys.stdlib_module_names)


def test_every_process_chooses_the_same() -> None:
    code = (
        "import random, sys; sys.path.insert(0, sys.argv[1]); from context import *\n"
        "words, draw = 'cat dog rain tea moon yes well river'.split(), random.Random(0)\n"
        "said = [' '.join(draw.choices(words, k=8)) for _ in range(80)]\n"
        "turns = [Segment(f'speaker {i % 4}', text, 40 + i) for i, text in enumerate(said)]\n"
        "print(lexical_scores(' '.join(words), turns))\n"
        "print(prioritize_context(turns, 'tea river moon', 'speaker 1', 1200).to_dict())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(Path(context.__file__).parent)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1 and "kept_share" in said.pop()
