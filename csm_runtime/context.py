"""Which segments of a conversation stay in the window of positions. Imports the standard library alone.

The backbone sees 2048 positions: the segments before, text and sound, the text to be spoken and the frames it makes. A longer
conversation has to lose something, and :func:`prioritize_context` says what. It runs no model and touches no sound.
"""

from __future__ import annotations

import math
import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

WINDOW = 2048
"""Positions of CSM's backbone."""
SAMPLE_RATE = 24_000
"""Of the codec, in Hz."""
_SAMPLES_PER_FRAME = 1920
"""80 ms: 12.5 frames per second."""

PINNED = "pinned"
SPEAKER = "the latest of an active speaker that fits"
RECENT = "among the latest turns"
RELEVANT = "relevant to the text"
ROOM = "there was room left"
ALL = "everything fits"
BEFORE = "kept before"
NEW = "new since the choice before"

TOO_LARGE = "larger than the whole budget"
NO_ROOM = "no room beside what matters more"
WATERMARK = "no room below the watermark, which leaves some for turns to come"
PREFIX = "left out before; taking it back would change the prefix"
NO_BUDGET = "the budget is empty"

Tokenizer = Callable[[str], Sized]
Scorer = Callable[[str, Sequence[Any]], Iterable[float]]


@dataclass(frozen=True)
class Segment:
    """One turn of a conversation.

    Args:
        speaker: as the model is told it; ``0`` and ``"0"`` are one speaker, as both are written ``[0]``.
        text: what was said.
        positions: of the backbone that it takes, at least 1: tokens of the text, frames of the sound and the frame that ends
            it. :meth:`from_seconds` counts them.
        pinned: a reference that stays whatever else goes.
        payload: sound, codes or whatever else belongs to it; never looked at.

    Raises:
        ValueError: something of another type, or no position at all.
    """

    speaker: int | str
    text: str
    positions: int
    pinned: bool = False
    payload: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        _speaker("speaker", self.speaker)
        _text("text", self.text)
        if not isinstance(self.pinned, bool):
            raise ValueError(f"pinned must be True or False, got {self.pinned!r}")
        object.__setattr__(self, "positions", _whole("positions", self.positions, 1))

    @classmethod
    def from_seconds(
        cls,
        speaker: int | str,
        text: str,
        seconds: float,
        *,
        tokenizer: Tokenizer | None = None,
        pinned: bool = False,
        payload: Any = None,
    ) -> Segment:
        """With positions counted by :func:`count_tokens` and :func:`count_frames`."""
        positions = segment_positions(count_tokens(text, speaker, tokenizer), count_frames(seconds))
        return cls(speaker, text, positions, pinned, payload)


@dataclass(frozen=True)
class Dropped:
    """A segment that was left out."""

    index: int
    """In the conversation."""
    speaker: int | str
    positions: int
    reason: str
    """One of this module's constants."""


@dataclass(frozen=True)
class ContextChoice:
    """What :func:`prioritize_context` kept and what it left out; ``print()`` shows it.

    All tuples about what was kept have one entry a segment, in the order of the conversation.
    """

    segments: tuple[Any, ...] = field(repr=False, compare=False)
    """The very objects that were passed in."""
    indices: tuple[int, ...]
    """Ascending, in the conversation."""
    counts: tuple[int, ...]
    """Positions of each."""
    reasons: tuple[str, ...]
    """Why each was kept: one of this module's constants."""
    budget: int
    window: int
    dropped: tuple[Dropped, ...]
    """By ascending index; with what was kept, the whole conversation."""
    common_prefix: int = 0
    """Leading segments that are those of the previous choice: their keys and values are still good."""
    notes: tuple[str, ...] = ()
    """What the caller should know of: a scorer that failed, a speaker without a segment."""
    newest: Any = field(default=None, repr=False, compare=False)
    """The conversation's last segment: what comes after it is new to a later choice."""

    @property
    def positions(self) -> int:
        """Positions of all that was kept; never more than the budget, or than 0 where that is negative."""
        return sum(self.counts)

    @property
    def prefix_positions(self) -> int:
        """Positions of the common prefix, which need no second prefill."""
        return sum(self.counts[: self.common_prefix])

    @property
    def share(self) -> float:
        """Share of the window that was used, 0 to 1."""
        return self.positions / self.window

    @property
    def kept_share(self) -> float:
        """Share of the conversation's positions that was kept, 0 to 1; 1 for an empty conversation."""
        total = self.positions + sum(one.positions for one in self.dropped)
        return self.positions / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON, without the segments themselves."""
        kept = zip(self.indices, self.segments, self.counts, self.reasons)
        return {
            "kept": [
                {"index": index, "speaker": segment.speaker, "positions": count, "reason": reason}
                for index, segment, count, reason in kept
            ],
            "dropped": [
                {"index": one.index, "speaker": one.speaker, "positions": one.positions, "reason": one.reason}
                for one in self.dropped
            ],
            "positions": self.positions,
            "budget": self.budget,
            "window": self.window,
            "share": self.share,
            "kept_share": self.kept_share,
            "common_prefix": self.common_prefix,
            "prefix_positions": self.prefix_positions,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        total = len(self.indices) + len(self.dropped)
        lines = [
            f"context: {len(self.indices)} of {total} segments, {self.positions} positions of a budget of {self.budget}, "
            f"{self.share:.1%} of the window; {self.kept_share:.1%} of the conversation"
        ]
        groups: dict[tuple[str, str], list[int]] = {}
        for reason, count in zip(self.reasons, self.counts):
            groups.setdefault(("kept", reason), []).append(count)
        for one in self.dropped:
            groups.setdefault(("dropped", one.reason), []).append(one.positions)
        lines += [f"  {'':7} segments positions" for _ in groups][:1]
        for (word, reason), counts in groups.items():
            lines.append(f"  {word:7} {len(counts):8} {sum(counts):9}  {reason}")
        if self.common_prefix:
            lines.append(f"  as before: the first {self.common_prefix} segments, {self.prefix_positions} positions")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


# -------------------------------------------------------------------------------------------------- counting positions


def count_tokens(text: str, speaker: int | str, tokenizer: Tokenizer | None = None) -> int:
    """Positions of a text as CSM reads it, ``[speaker]text`` between a begin and an end token.

    Args:
        text: what is said.
        speaker: who says it.
        tokenizer: makes tokens of ``"[0]text"``, begin and end included: its result's length counts, or that of its
            ``input_ids``. Without one the number is an estimate that is meant to be too high rather than too low: a token
            for each four letters or digits of ASCII begun in a word, one for each other character that is no space.
    """
    written = f"[{_speaker('speaker', speaker)}]{_text('text', text)}"
    if tokenizer is None:
        return 2 + sum(-(-len(piece) // 4) for piece in re.findall(r"[A-Za-z0-9]+|\S", written))
    tokens = tokenizer(written)
    if isinstance(tokens, Mapping):
        tokens = tokens["input_ids"]
    return _length("tokenizer(text)", tokens)


def count_frames(seconds: float) -> int:
    """Frames of sound of that length, 12.5 per second, the last one begun included."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds must be a finite number of at least 0, got {seconds!r}")
    return -(-round(seconds * SAMPLE_RATE) // _SAMPLES_PER_FRAME)


def segment_positions(text_tokens: int, frames: int) -> int:
    """Positions of a segment of the context: its text, its frames, and the frame that ends the sound."""
    return _whole("text_tokens", text_tokens, 0) + _whole("frames", frames, 0) + 1


def sound_positions(segment: Any, tokenizer: Tokenizer | None = None) -> int:
    """Positions of any object with ``speaker``, ``text`` and ``audio``, ``[samples]`` at 24 kHz: Sesame's own segments.

    For ``prioritize_context(count=sound_positions)``, or with a tokenizer ``count=partial(sound_positions, tokenizer=...)``.
    """
    frames = -(-_length("audio", getattr(segment, "audio", None)) // _SAMPLES_PER_FRAME)
    return segment_positions(count_tokens(segment.text, segment.speaker, tokenizer), frames)


def position_budget(*, max_frames: int, text_positions: int, window: int = WINDOW) -> int:
    """Positions that are left for the context.

    Args:
        max_frames: that will be generated at most; 12.5 per second.
        text_positions: of the text to be spoken: :func:`count_tokens`.
        window: positions of the model.

    One position stays free, as Sesame's generator refuses a prompt that with ``max_frames`` fills the window to the last.
    0 or less where the text and the frames leave nothing.
    """
    taken = _whole("max_frames", max_frames, 0) + _whole("text_positions", text_positions, 0) + 1
    return _whole("window", window, 1) - taken


# ------------------------------------------------------------------------------------------------------------ choosing


def prioritize_context(
    segments: Iterable[Any],
    text: str,
    speaker: int | str,
    budget: int,
    *,
    count: Callable[[Any], int] | None = None,
    scorer: Scorer | None = None,
    recent: int = 6,
    active: int = 8,
    previous: ContextChoice | None = None,
    watermark: float = 0.75,
    window: int = WINDOW,
) -> ContextChoice:
    """What of a conversation the model shall see before it speaks, in the order of the conversation.

    What does not fit is passed over and smaller segments are tried. In this order:

    1. pinned segments; where they alone are too many, the latest of ``speaker`` before the latest of each other speaker
       before the rest;
    2. a segment of ``speaker`` and of everybody who spoke in the last ``active`` turns: the latest that fits, never at the
       price of another active speaker's only one;
    3. the last ``recent`` turns;
    4. by relevance to ``text``, the later of equals first; then, of those that have nothing in common with it, the latest.

    Keys and values of an unchanged prefix need not be computed again. With ``previous`` the choice before is therefore kept
    and the new segments are appended while that fits and lacks no pin and no active speaker. When it no longer fits the order
    above is gone through again, 3 and 4 up to ``watermark`` of the budget, so that the turns after that fit.

    Args:
        segments: the conversation, oldest first: :class:`Segment`, or any objects with ``speaker`` and ``text``.
        text: what will be spoken.
        speaker: who will speak it.
        budget: positions for the context, at most ``window``: :func:`position_budget`. 0 or less keeps nothing.
        count: gives the positions of a segment; by default they are its ``positions``. Objects without them need it:
            ``count=sound_positions`` for Sesame's segments.
        scorer: ``scorer(text, segments)`` gives one finite number for each segment of the whole conversation, higher for more
            relevant and at most 0 for not at all; by default :func:`lexical_scores`, which also stands in, with a note, for
            one that raises or gives something else. Not called where everything fits or the previous choice goes on.
        recent: turns.
        active: turns.
        previous: the choice for the turn before, of the same conversation. Segments are recognised as the same objects, or
            as equal :class:`Segment` with the same object as payload. The conversation may have lost turns since.
        watermark: share of the budget, above 0 and at most 1.
        window: positions of the model, of which :attr:`ContextChoice.share` is a share.

    Deterministic, linear in the length of the conversation up to a sort, and no conversation is too long.

    Raises:
        ValueError: an argument of another type or outside its range, or a segment without what is needed of it.
    """
    _text("text", text)
    mine, budget, window = _speaker("speaker", speaker), _whole("budget", budget), _whole("window", window, 1)
    recent, active = _whole("recent", recent, 0), _whole("active", active, 0)
    if budget > window:
        raise ValueError(f"budget must be at most the window of {window} positions, got {budget}")
    if isinstance(watermark, bool) or not isinstance(watermark, (int, float)) or not 0 < watermark <= 1:
        raise ValueError(f"watermark must be a number above 0 and at most 1, got {watermark!r}")
    if previous is not None and not isinstance(previous, ContextChoice):
        raise ValueError(f"previous must be a ContextChoice or None, got {previous!r}")
    if count is not None and not callable(count):
        raise ValueError(f"count must be a function of a segment or None, got {count!r}")
    turns = _read(segments, count)

    chosen, notes, stays = _Chosen(turns.costs), list[str](), False
    if budget > 0:
        chosen, lacking = _essential(turns, mine, budget, active)
        if lacking:
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            notes.append(f"no segment fits of active speakers: {', '.join(map(repr, lacking[:5]))}{more}")
        appended = None if previous is None else _appended(turns, previous, chosen, budget, watermark)
        if appended is not None:
            chosen, stays = appended, True
        elif sum(turns.costs) <= budget:
            chosen.take(range(len(turns.costs)), ALL, budget)
        else:
            notes += _fill(turns, chosen, text, scorer, recent, budget if previous is None else int(watermark * budget))

    indices = tuple(sorted(chosen.why))
    kept, counts = tuple(turns.segments[i] for i in indices), tuple(turns.costs[i] for i in indices)
    before = () if previous is None else zip(previous.segments, previous.counts)
    prefix = 0
    for (old, old_count), new, new_count in zip(before, kept, counts):
        if not _same(old, new) or old_count != new_count:
            break
        prefix += 1
    return ContextChoice(
        segments=kept,
        indices=indices,
        counts=counts,
        reasons=tuple(chosen.why[i] for i in indices),
        budget=budget,
        window=window,
        dropped=tuple(
            Dropped(i, segment.speaker, cost, _why_not(cost, budget, budget - chosen.used, stays))
            for i, (segment, cost) in enumerate(zip(turns.segments, turns.costs))
            if i not in chosen.why
        ),
        common_prefix=prefix,
        notes=tuple(notes),
        newest=turns.segments[-1] if turns.segments else None,
    )


def lexical_scores(text: str, segments: Sequence[Any]) -> list[float]:
    """BM25 of each segment's ``text`` for the words of a text, over these segments; 0 where they share none.

    A word that more than half of the segments hold says nothing and counts for nothing.

    Words are runs of letters, marks and digits of any script, whatever their case; of scripts that put no spaces between
    words, and of Hangul, whose particles stick to them, every character and every pair of neighbours is a word.
    """
    wanted = dict.fromkeys(_words(text))
    if not wanted or not segments:
        return [0.0] * len(segments)
    found: list[Counter[str]] = []
    lengths: list[int] = []
    for segment in segments:
        words = _words(segment.text)
        found.append(Counter(word for word in words if word in wanted))
        lengths.append(len(words))
    holding = Counter(word for words in found for word in words)
    total, mean = len(segments), max(sum(lengths) / len(segments), 1.0)
    rarity = {
        word: math.log1p((total - holding[word] + 0.5) / (holding[word] + 0.5)) if 2 * holding[word] <= total else 0.0
        for word in wanted
    }
    return [
        # in the order of the text: sums of floats depend on the order, and that of a set on the process
        sum(
            rarity[word] * words[word] * (_K1 + 1) / (words[word] + _K1 * (1 - _B + _B * length / mean))
            for word in wanted
            if word in words
        )
        for words, length in zip(found, lengths)
    ]


_K1, _B = 1.2, 0.75
"""BM25's usual constants: how soon a repeated word stops to count, and how much a long segment loses."""
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, kana, Han, Hangul."""
_RUNS = re.compile(f"[{_UNSPACED}]+|[^{_UNSPACED}\\s]+")


def _words(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).casefold()
    # \w would split words at the vowel signs of Indic scripts, which are marks
    text = "".join(c if unicodedata.category(c)[0] in "LMN" else " " if c not in "'’" else "" for c in text)
    words: list[str] = []
    for run in _RUNS.findall(text):
        if re.match(f"[{_UNSPACED}]", run):
            words += [*run, *(a + b for a, b in zip(run, run[1:]))]
        else:
            words.append(run)
    return words


class _Turns(NamedTuple):
    """A conversation as it is chosen from, one entry a segment."""

    segments: list[Any]
    speakers: list[str]
    costs: list[int]
    pinned: list[bool]


class _Chosen:
    """Segments taken so far, each with its reason, and the positions they use."""

    def __init__(self, costs: list[int]) -> None:
        self.costs, self.used = costs, 0
        self.why: dict[int, str] = {}

    def take(self, indices: Iterable[int], why: str, capacity: int) -> None:
        """Those that fit, one after the other; one taken before keeps its reason."""
        for i in indices:
            if i not in self.why and self.used + self.costs[i] <= capacity:
                self.why[i] = why
                self.used += self.costs[i]


def _read(segments: Iterable[Any], count: Callable[[Any], int] | None) -> _Turns:
    """Check a conversation and count its positions."""
    if isinstance(segments, (str, bytes, Mapping)) or not isinstance(segments, Iterable):
        raise ValueError(f"segments must be a sequence of segments, got {type(segments).__name__}")
    turns = _Turns(list(segments), [], [], [])
    for i, segment in enumerate(turns.segments):
        for name in ("speaker", "text"):
            if not hasattr(segment, name):
                raise ValueError(f"segments[{i}] must have a speaker and a text, got {type(segment).__name__}")
        if count is None and not hasattr(segment, "positions"):
            raise ValueError(
                f"segments[{i}] is a {type(segment).__name__} without positions: pass count=, for segments with 24 kHz sound "
                "in .audio count=sound_positions"
            )
        _text(f"segments[{i}].text", segment.text)
        turns.speakers.append(_speaker(f"segments[{i}].speaker", segment.speaker))
        what = f"segments[{i}].positions" if count is None else f"count(segments[{i}])"
        turns.costs.append(_whole(what, segment.positions if count is None else count(segment), 1))
        turns.pinned.append(bool(getattr(segment, "pinned", False)))
    return turns


def _essential(turns: _Turns, mine: str, budget: int, active: int) -> tuple[_Chosen, list[str]]:
    """Pins and active speakers, and the active speakers of whom nothing fits."""
    chosen, rank, seen = _Chosen(turns.costs), dict[int, int](), set[str]()
    latest_first = range(len(turns.costs) - 1, -1, -1)
    for i in latest_first:
        if turns.pinned[i]:
            name = turns.speakers[i]
            rank[i] = 2 if name in seen else 0 if name == mine else 1
            seen.add(name)
    chosen.take(sorted(rank, key=lambda i: (rank[i], -i)), PINNED, budget)

    present = {turns.speakers[i] for i in chosen.why}
    wanted = dict.fromkeys((mine, *(turns.speakers[i] for i in latest_first[:active])))
    theirs: dict[str, list[int]] = {name: [] for name in wanted}
    for i in latest_first:
        if turns.speakers[i] in theirs:
            theirs[turns.speakers[i]].append(i)
    # The shortest of each is set aside first, so that nobody's latest takes the room of another's only one.
    aside: dict[str, int] = {}
    free = budget - chosen.used
    for name in wanted:
        least = min((turns.costs[i] for i in theirs[name]), default=budget + 1)
        if name not in present and least <= free:
            aside[name] = least
            free -= least
    for name in wanted:
        latest = theirs[name][:1]
        if name in aside:
            free += aside[name]
            latest = [next(i for i in theirs[name] if turns.costs[i] <= free)]
        elif name not in present:
            continue
        # Who has a pin is there already: their latest is welcome, an older one instead is not.
        used = chosen.used
        chosen.take(latest, SPEAKER, used + free)
        free -= chosen.used - used
        present.add(name)
    return chosen, [name for name in wanted if name not in present and theirs[name]]


def _appended(
    turns: _Turns, previous: ContextChoice, essential: _Chosen, budget: int, watermark: float
) -> _Chosen | None:
    """The previous choice and what is new, or None where the choice has to be made again."""
    found = _found(turns, previous)
    if found is None:
        return None
    old, new = found
    chosen = _Chosen(turns.costs)
    chosen.take(old, BEFORE, budget)
    chosen.take(range(new, len(turns.costs)), NEW, budget)
    if len(chosen.why) < len(old) + len(turns.costs) - new:
        return None
    for i in essential.why:
        if turns.pinned[i]:
            if i not in chosen.why:
                return None
            chosen.why[i] = PINNED
    if {turns.speakers[i] for i in essential.why} - {turns.speakers[i] for i in chosen.why}:
        return None
    # A budget that was small for one turn must not keep the context small for ever.
    room = int(watermark * budget) - chosen.used
    if chosen.used < (2 * watermark - 1) * budget and any(
        cost <= room for i, cost in enumerate(turns.costs) if i not in chosen.why
    ):
        return None
    return chosen


def _found(turns: _Turns, previous: ContextChoice) -> tuple[list[int], int] | None:
    """Where the segments of a choice are now and where new ones begin; None where any is gone or there were none."""
    if not previous.indices:
        return None

    seen, length = len(previous.indices) + len(previous.dropped), len(turns.costs)
    in_place = seen <= length and _same(turns.segments[seen - 1], previous.newest)
    if in_place and all(_same(turns.segments[i], old) for i, old in zip(previous.indices, previous.segments)):
        return list(previous.indices), seen
    indices: list[int] = []
    for old in previous.segments:  # turns may have been removed from the conversation in between
        start = indices[-1] + 1 if indices else 0
        index = next((i for i in range(start, length) if _same(turns.segments[i], old)), None)
        if index is None:
            return None
        indices.append(index)
    last = next((i for i in range(indices[-1], length) if _same(turns.segments[i], previous.newest)), None)
    return None if last is None else (indices, last + 1)


def _same(a: Any, b: Any) -> bool:
    """Whether two segments are one; foreign ones only as the same object, as equality of tensors has no truth value."""
    if a is b:
        return True
    if not isinstance(a, Segment) or not isinstance(b, Segment) or a.payload is not b.payload:
        return False
    return (str(a.speaker), a.text, a.positions) == (str(b.speaker), b.text, b.positions)


def _fill(turns: _Turns, chosen: _Chosen, text: str, scorer: Scorer | None, recent: int, capacity: int) -> list[str]:
    """Take the latest turns and then the relevant ones; returns notes."""
    latest_first = range(len(turns.costs) - 1, -1, -1)
    chosen.take(latest_first[:recent], RECENT, capacity)
    rest = [i for i in latest_first if i not in chosen.why and chosen.used + turns.costs[i] <= capacity]
    if not rest:
        return []
    notes: list[str] = []
    try:
        scores = (
            lexical_scores(text, turns.segments)
            if scorer is None
            else _checked(scorer(text, tuple(turns.segments)), turns)
        )
    except Exception as error:  # a stranger's code; what is to be spoken is spoken all the same
        scores = lexical_scores(text, turns.segments)
        why = (str(error).strip().splitlines() or [""])[0][:200]
        notes.append(f"the scorer failed, words were compared instead: {type(error).__name__}: {why}")
    rest.sort(key=lambda i: -max(scores[i], 0.0))
    for i in rest:
        chosen.take((i,), RELEVANT if scores[i] > 0 else ROOM, capacity)
    return notes


def _checked(scores: Iterable[float], turns: _Turns) -> list[float]:
    """Of a scorer, as finite floats."""
    out = [float(score) for score in scores]
    if len(out) != len(turns.costs) or not all(map(math.isfinite, out)):
        raise ValueError(f"{len(turns.costs)} finite numbers were wanted, {len(out)} came")
    return out


def _why_not(cost: int, budget: int, room: int, stays: bool) -> str:
    if budget <= 0:
        return NO_BUDGET
    if cost > budget:
        return TOO_LARGE
    if stays:
        return PREFIX
    return WATERMARK if cost <= room else NO_ROOM


# ----------------------------------------------------------------------------------------------------------- arguments


def _whole(name: str, value: Any, least: int | None = None) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _length(name: str, value: Any) -> int:
    """Of one sequence; a batch of one counts as that one."""
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape) and math.prod(shape) == shape[-1]:
        return int(shape[-1])
    if shape is not None or not isinstance(value, Sized):
        raise ValueError(f"{name} must be one sequence, got {type(value).__name__} of shape {shape}")
    return len(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r}")
    return value


def _speaker(name: str, value: Any) -> str:
    """As it is written in the model's prompt."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{name} must be an integer or a text, got {value!r}")
    return str(value)
