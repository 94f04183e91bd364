"""Voices that have been through the backbone once: a store of their keys and values, so that they need not go again.

A profile is a prompt prefix, such as a reference recording with its transcript, found by a digest of its content and good for
one model, policy and tokenizer. The least recently used go when the bytes run out; in a folder they outlive the process.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from csm_runtime.memory import MemoryReading, process_probe
from csm_runtime.metrics import Metrics
from csm_runtime.voice_files import VoiceFiles
from csm_runtime.voice_profile import Digest, Profile, fingerprint_of, is_digest, prompt_digests

__all__ = ["Digest", "Profile", "Voices", "default_budget", "fingerprint_of", "prompt_digests"]

_SHARE, _LEAST, _MOST = 8, 64 << 20, 2 << 30
_ABSURD = 1 << 50
_COUNTS = {
    "hit": "hits",
    "miss": "misses",
    "eviction": "evictions",
    "refused": "refused",
    "stale": "stale",
    "disk_hit": "disk_hits",
    "corrupt": "corrupt",
    "written": "written",
    "unwritable": "unwritable",
    "file_eviction": "file_evictions",
}
"""Counters by their names in the metrics, after ``voices.``, and in :meth:`Voices.status`."""


def default_budget(probe: Callable[[], MemoryReading | None] = process_probe) -> int:
    """Bytes: an eighth of what the memory has free now, at least 64 MiB and at most 2 GiB; 64 MiB where nothing is known."""
    reading = probe()
    return _LEAST if reading is None else min(_MOST, max(_LEAST, reading.free // _SHARE))


class _Flight:
    """One making of a profile, and what came of it."""

    def __init__(self) -> None:
        self.maker = threading.get_ident()
        self.done = threading.Event()
        self.profile: Profile | None = None
        self.error: BaseException | None = None


class Voices:
    """Profiles by key, least recently used first, within a budget of bytes. Any thread may call any method.

    Files are read and written, and profiles made, outside the lock: nobody waits for another one's voice. Counters:
    ``voices.hit``, ``voices.miss``, ``voices.disk_hit`` (which is a hit as well), ``voices.eviction``, ``voices.refused``
    (larger than the budget leaves room for), ``voices.stale`` (dropped for another fingerprint), ``voices.corrupt`` (files
    refused), ``voices.written``, ``voices.unwritable``, ``voices.file_eviction``.

    Pinned profiles always fit: one that would not is refused. :meth:`put` evicts others only; :meth:`shrink` and a smaller
    budget evict pinned ones too, after all others, for then memory is wanted more than time.

    Args:
        budget: bytes of the tensors in memory, by default :func:`default_budget`; 0 keeps nothing.
        folder: where profiles are kept beyond this process, in files of one each; None for memory alone. A file that is
            damaged or somebody else's is never used, and a folder that cannot be written is a warning.
        folder_budget: bytes of the files in it, least recently used first; None for no limit.
        metrics: where counts go as well. ``metrics.watch("voices", voices.status)`` shows the rest.
        probe: the memory that the default budget is a share of: by default this process's; ``cuda_probe`` of a device where
            profiles are on it.

    Raises:
        ImportError: safetensors is not installed and a folder is asked for.
        ValueError: an argument of another type or out of range.
    """

    def __init__(
        self,
        *,
        budget: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        folder_budget: int | None = None,
        metrics: Metrics | None = None,
        probe: Callable[[], MemoryReading | None] | None = None,
    ) -> None:
        if budget is None:
            budget = default_budget(process_probe if probe is None else probe)
        if not (folder is None or (isinstance(folder, (str, os.PathLike)) and os.fspath(folder))):
            raise ValueError(f"folder must be a path or None, got {folder!r}")
        if folder is None and folder_budget is not None:
            raise ValueError("folder_budget has no meaning where folder is None")
        self._budget = _amount("budget", budget)
        limit = None if folder_budget is None else _amount("folder_budget", folder_budget)
        self._metrics = Metrics() if metrics is None else metrics
        self._lock = threading.RLock()
        self._counts: Counter[str] = Counter()
        self._profiles: OrderedDict[str, Profile] = OrderedDict()
        self._pinned: set[str] = set()
        self._bytes = 0
        self._removals = 0  # what was read or is to be written before one must not come back after it
        self._flights: dict[tuple[str, str], _Flight] = {}
        self._files = None if folder is None else VoiceFiles(folder, limit, self._count)

    # ------------------------------------------------------------------------------------------------------- finding

    def get(self, key: str, fingerprint: str) -> Profile | None:
        """The profile of that key, from memory or the folder, and most recently used from now on.

        One in memory with another fingerprint is dropped. What comes from the folder is on the CPU.

        Returns:
            None where there is none; its tensors are the store's own otherwise and must not be written to.
        """
        return self._counted(self._find(key, fingerprint))

    def lengths(self, fingerprint: str, limit: int) -> list[int]:
        """Positions of the stored profiles with this fingerprint, each once, the longest first, none above ``limit``."""
        return sorted({positions for positions in self._candidates(fingerprint).values() if positions <= limit})[::-1]

    def longest(self, fingerprint: str, digest_at: Callable[[int], str | None], limit: int) -> Profile | None:
        """The longest profile that is a prefix of a prompt; one hit or one miss.

        Args:
            fingerprint: of the profile.
            digest_at: the prompt's digest at a length in positions, or None where it has none there. It is asked for
                :meth:`lengths`, so ``prompt_digests(ids, sounds, voices.lengths(fingerprint, limit)).get`` does.
            limit: positions that the profile may have.
        """
        stored = self._candidates(fingerprint)
        for positions in sorted({each for each in stored.values() if each <= limit}, reverse=True):
            key = digest_at(positions)
            if key is not None and stored.get(key) == positions:
                profile = self._find(key, fingerprint)
                if profile is not None and profile.positions == positions:
                    return self._counted(profile)
        return self._counted(None)

    def get_or_make(self, key: str, fingerprint: str, make: Callable[[], Profile]) -> Profile:
        """:meth:`get`, or make it and :meth:`put` it: once, however many threads ask at the same time.

        Args:
            key: of the profile.
            fingerprint: of the profile.
            make: makes it. Its exception is raised in every thread that waits, and the next one to ask makes it anew; one
                that ends a thread, such as KeyboardInterrupt, is raised in its own alone. It must not ask for the same
                profile again.

        Raises:
            ValueError: what was made has another key or fingerprint.
            RuntimeError: ``make`` has asked for what it makes.
        """
        while True:
            with self._lock:
                profile = self._in_memory(key, fingerprint)
                if profile is not None:
                    self._count("hit")
                    return profile
                flight = self._flights.get((key, fingerprint))
                if flight is None:
                    flight = self._flights[key, fingerprint] = _Flight()
                    break
                if flight.maker == threading.get_ident():
                    raise RuntimeError(f"get_or_make: the making of {key} asks for itself")
            flight.done.wait()
            if flight.profile is not None:
                self._count("hit")
                return flight.profile
            if isinstance(flight.error, Exception):
                self._count("miss")
                try:
                    raise flight.error
                finally:
                    del flight  # with it the error would hold its own traceback, and that what was made so far
        removals = self._removals
        try:
            profile = self._counted(self._find(key, fingerprint))
            if profile is None:
                profile = make()
                if not isinstance(profile, Profile) or (profile.key, profile.fingerprint) != (key, fingerprint):
                    raise ValueError(f"make must return the profile of {key} and {fingerprint}, got {profile!r}")
                profile = self._put(profile, False, removals)[1]
            flight.profile = profile
            return profile
        except BaseException as error:
            flight.error = error
            raise
        finally:
            with self._lock:
                del self._flights[key, fingerprint]
            flight.done.set()
            del flight

    # ------------------------------------------------------------------------------------------------------- keeping

    def put(self, profile: Profile, pinned: bool = False) -> bool:
        """Keep a copy of a profile, in place of one with its key, and write its file.

        Args:
            profile: on any device, where its copy stays.
            pinned: keep it whatever else is put; a profile that takes a pinned one's place is pinned too.

        Returns:
            False where it is larger than what the budget leaves beside pinned ones: nothing is evicted or written then.
        """
        return self._put(profile, pinned)[0]

    def pin(self, key: str) -> bool:
        """Keep what is in memory under a key whatever else is put; False where nothing is."""
        with self._lock:
            if key in self._profiles:
                self._pinned.add(key)
            return key in self._profiles

    def unpin(self, key: str) -> bool:
        """Undo :meth:`pin`; False where nothing was pinned."""
        with self._lock:
            was = key in self._pinned
            self._pinned.discard(key)
            return was

    def remove(self, key: str) -> bool:
        """Forget a key, pinned or not, in memory and in the folder, under any fingerprint; False where there was nothing."""
        with self._lock:
            self._removals += 1
            there = key in self._profiles
            if there:
                self._drop(key)
        return (self._files is not None and is_digest(key) and self._files.remove(key)) or there

    def clear(self, files: bool = False) -> None:
        """Forget everything in memory, pinned or not, and with ``files`` delete the folder's profiles too."""
        with self._lock:
            self._removals += 1
            for key in list(self._profiles):
                self._drop(key)
        if files and self._files is not None:
            self._files.clear()

    def shrink(self, wanted: int) -> int:
        """Evict, least recently used first and pinned ones last, until so many bytes are let go; for a lack of memory.

        Args:
            wanted: bytes.

        Returns:
            Bytes let go, which are free once no caller holds the profiles either. Files stay.
        """
        with self._lock:
            return self._evict(wanted, pinned=True)

    # ------------------------------------------------------------------------------------------------------- looking

    def keys(self) -> list[str]:
        """Of what is in memory, least recently used first."""
        with self._lock:
            return list(self._profiles)

    def __len__(self) -> int:
        return len(self._profiles)

    def __contains__(self, key: object) -> bool:
        """Whether a key is in memory; not a use of it."""
        return key in self._profiles

    @property
    def bytes(self) -> int:
        """Of the tensors in memory; never more than the budget."""
        return self._bytes

    @property
    def budget(self) -> int:
        """Bytes of the tensors in memory at most; a smaller one evicts at once, pinned ones last."""
        return self._budget

    @budget.setter
    def budget(self, value: int) -> None:
        value = _amount("budget", value)
        with self._lock:
            self._budget = value
            self._evict(self._bytes - value, pinned=True)

    def status(self) -> dict[str, float]:
        """Plain numbers: all counts so far, bytes and budget, and how many profiles are in memory and pinned."""
        with self._lock:
            counts = {plural: self._counts[name] for name, plural in _COUNTS.items()}
            sizes = {"bytes": self._bytes, "budget": self._budget}
            return {**counts, **sizes, "count": len(self._profiles), "pinned": len(self._pinned)}

    # -------------------------------------------------------------------------------------------------------- inside

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1
        self._metrics.count(f"voices.{name}")

    def _counted(self, profile: Profile | None) -> Profile | None:
        self._count("miss" if profile is None else "hit")
        return profile

    def _candidates(self, fingerprint: str) -> dict[str, int]:
        """Keys with this fingerprint, in memory and by the headers of files, and their positions."""
        stored = {} if self._files is None else self._files.positions(fingerprint)
        with self._lock:
            here = {key: each.positions for key, each in self._profiles.items() if each.fingerprint == fingerprint}
        return stored | here

    def _in_memory(self, key: str, fingerprint: str) -> Profile | None:
        """Under the lock."""
        profile = self._profiles.get(key)
        if profile is None:
            return None
        if profile.fingerprint != fingerprint:
            self._drop(key)
            self._count("stale")
            return None
        self._profiles.move_to_end(key)
        return profile

    def _find(self, key: str, fingerprint: str) -> Profile | None:
        """In memory or in the folder, not counted."""
        with self._lock:
            profile = self._in_memory(key, fingerprint)
            removals, budget = self._removals, self._budget
        if profile is not None or self._files is None or not (is_digest(key) and is_digest(fingerprint)):
            return profile
        profile = self._files.load(key, fingerprint, budget)
        if profile is None:
            return None
        with self._lock:
            self._count("disk_hit")
            first = self._in_memory(key, fingerprint)  # another thread may have been quicker
            if first is not None:
                return first
            if self._removals == removals:
                self._keep(profile, False)
        return profile

    def _put(self, profile: Profile, pinned: bool, removals: int | None = None) -> tuple[bool, Profile]:
        """Whether it is kept, which it is not after more than so many removals, and what the store holds then."""
        with self._lock:
            fits = self._fits(profile)
        if fits:
            profile = profile.copy()  # what it was made from may be a buffer that goes on
            with self._lock:
                removals = self._removals if removals is None else removals
                if removals != self._removals:
                    return False, profile
                fits = self._keep(profile, pinned)
        if not fits:
            self._count("refused")
            return False, profile
        if self._files is not None:
            self._files.write(profile, lambda: self._removals == removals)
        return True, profile

    def _fits(self, profile: Profile) -> bool:
        pinned = sum(self._profiles[key].bytes for key in self._pinned if key != profile.key)
        return pinned + profile.bytes <= self._budget

    def _keep(self, profile: Profile, pinned: bool) -> bool:
        """Under the lock; False, and nothing is changed, where there is no room."""
        if not self._fits(profile):
            return False
        key = profile.key
        pinned = pinned or key in self._pinned
        if key in self._profiles:
            self._drop(key)
        self._evict(self._bytes + profile.bytes - self._budget, pinned=False)
        self._profiles[key] = profile
        self._bytes += profile.bytes
        if pinned:
            self._pinned.add(key)
        return True

    def _evict(self, wanted: int, pinned: bool) -> int:
        """Under the lock: let go of at least so many bytes where that can be, and say how many."""
        order = [key for key in self._profiles if key not in self._pinned]
        order += [key for key in self._profiles if pinned and key in self._pinned]
        freed = 0
        for key in order:
            if freed >= wanted:
                break
            freed += self._drop(key)
            self._count("eviction")
        return freed

    def _drop(self, key: str) -> int:
        """Under the lock; bytes let go."""
        size = self._profiles.pop(key).bytes
        self._pinned.discard(key)
        self._bytes -= size
        return size


def _amount(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _ABSURD:
        raise ValueError(f"{name} must be a whole number of bytes from 0 to {_ABSURD}, got {value!r}")
    return value
