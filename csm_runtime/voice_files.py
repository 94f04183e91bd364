"""Voice profiles in a folder, one safetensors file each, none of which is believed before everything about it is checked.

Checked are the header, dtypes, shapes, key, fingerprint, and a checksum of the tensors and of what is said about them. That is
against damage and mistakes, not against someone who may write to the folder and can compute a checksum too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from csm_runtime.extras import need
from csm_runtime.packed_store import save_whole
from csm_runtime.voice_profile import Profile, is_digest, raw_bytes

logger = logging.getLogger("csm_runtime")

FORMAT = 1
"""Of the files; one with another number is refused."""
_KEY = "csm_voice"
"""The entry of a file's metadata that holds the JSON."""
_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{8}\.safetensors")
_TEMPORARY = re.compile(rf"\.{_NAME.pattern}\.\d+\.[0-9a-f]{{32}}")
_LONGEST_HEADER = 1 << 20
_ABANDONED = 3600.0
"""Seconds after which a temporary file is taken for a dead process's."""
_SETTLED = 2_000_000_000
"""Nanoseconds: a folder that has changed since may change again without a later time."""
_MOST_WARNED = 256


class _Entry(NamedTuple):
    """What is known of a file without reading its tensors; ``key`` is empty where its header is no profile's."""

    stamp: tuple[int, int, int]
    key: str
    fingerprint: str
    positions: int


class VoiceFiles:
    """The profiles of one folder, for any number of processes. None of its methods raises for what is in the folder.

    Args:
        folder: made with the first file where it is absent.
        limit: bytes of all its files; None for no limit. The least recently used go first, by modification time.
        count: called with ``corrupt``, ``written``, ``unwritable`` and ``file_eviction``, once for each.

    Raises:
        ImportError: safetensors is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int | None, count: Callable[[str], None]) -> None:
        need("safetensors.torch", "hf")
        self.folder, self.limit = Path(folder), limit
        self._count = count
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._index: dict[str, _Entry] = {}
        self._seen: tuple[int, int] | None = None
        self._warned: set[str] = set()

    def path(self, key: str, fingerprint: str) -> Path:
        """Where a profile's file is, or would be."""
        return self.folder / f"{key[:32]}-{fingerprint[:8]}.safetensors"

    def positions(self, fingerprint: str) -> dict[str, int]:
        """Keys of the files with this fingerprint, by their headers alone, and how many positions each says it has."""
        with self._reading:
            self._refresh()
            found = [entry for entry in self._index.values() if entry.key and entry.fingerprint == fingerprint]
        return {entry.key: entry.positions for entry in found}

    def load(self, key: str, fingerprint: str, most: int) -> Profile | None:
        """A profile on the CPU, bit for bit as it was written; None where there is none.

        Args:
            key: of the profile.
            fingerprint: of the profile.
            most: bytes that its tensors may have; a larger file stays where it is, unread.

        What is at the file's place and is not that profile is counted, warned of and taken away.
        """
        path = self.path(key, fingerprint)
        try:
            data = _read(path, most + _LONGEST_HEADER)
            if data is None:
                return None
            profile = _profile(data, key, fingerprint)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, MemoryError) as error:  # of this process or its machine: the file may be good
            self._warn("", f"{path} could not be read: {_said(error)}")
            return None
        except Exception as error:  # whatever a foreign or damaged file makes of its readers
            self._count("corrupt")
            self._warn(path.name, f"the voice profile in {path} is not used, it is made again: {_said(error)}")
            self._take_away(path)
            return None
        if profile.bytes > most:
            return None
        _touch(path)
        return profile

    def write(self, profile: Profile, wanted: Callable[[], bool]) -> None:
        """Write a profile's file, and delete others where the limit asks for it; a folder that cannot be written is a warning.

        Args:
            profile: on any device.
            wanted: asked when no other write and no removal is in progress; False leaves the file unwritten.
        """
        path = self.path(profile.key, profile.fingerprint)
        with self._writing:
            if not wanted():
                return
            try:
                if self.limit is not None and profile.bytes > self.limit:
                    raise ValueError(f"{profile.bytes} bytes are more than folder_budget, {self.limit}")
                if path.is_symlink() or (path.exists() and not path.is_file()):
                    self._take_away(path)
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in profile.tensors.items()}
                said = _about(profile)
                said["checksum"] = _checksum(said, tensors)
                metadata = {_KEY: json.dumps(said)}
                if len(json.dumps(metadata)) > _LONGEST_HEADER // 2:
                    raise ValueError("meta is too long for the header of a file")
                save_whole(path, tensors, metadata)
            except Exception as error:  # safetensors has errors of its own for a full disk
                self._count("unwritable")
                self._warn("", f"voice profiles cannot be saved in {self.folder}, they stay in memory: {_said(error)}")
                return
            self._count("written")
            _touch(path)
            self._make_room(path.name)

    def remove(self, key: str) -> bool:
        """Delete the files of a key, whatever their fingerprints; whether there were any."""
        with self._writing:
            paths = [entry for entry in self._scan() if entry.name.startswith(f"{key[:32]}-")]
            return any([self._delete(Path(entry.path)) for entry in paths])

    def clear(self) -> None:
        """Delete the files of all profiles; what else is in the folder stays."""
        with self._writing:
            for entry in list(self._scan()):
                self._delete(Path(entry.path))

    # -------------------------------------------------------------------------------------------------------- inside

    def _scan(self) -> Iterator[os.DirEntry[str]]:
        """Regular files that are named as profiles are."""
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    yield entry

    def _refresh(self) -> None:
        """Read the headers that have changed, where the folder has."""
        try:
            before = os.stat(self.folder)
        except OSError:
            self._index, self._seen = {}, None
            return
        seen = before.st_mtime_ns, before.st_ino
        if seen == self._seen:
            return
        index = {}
        for entry in self._scan():
            try:
                about = entry.stat(follow_symlinks=False)
                stamp = about.st_ino, about.st_size, about.st_mtime_ns
                known = self._index.get(entry.name)
                same = known is not None and known.stamp == stamp
                index[entry.name] = known if known is not None and same else _entry(Path(entry.path), stamp)
            except (OSError, MemoryError):
                continue
        self._index = index
        self._seen = seen if time.time_ns() - before.st_mtime_ns > _SETTLED else None
        self._sweep()

    def _sweep(self) -> None:
        """Delete what processes left that died while they wrote."""
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                ours = _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
                if ours and time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED:
                    self._delete(Path(entry.path))

    def _make_room(self, written: str) -> None:
        """Delete the least recently used beside the file just written until all are within the limit."""
        if self.limit is None:
            return
        sizes = {}
        for entry in self._scan():
            with contextlib.suppress(OSError):
                about = entry.stat(follow_symlinks=False)
                sizes[entry.name] = about.st_mtime_ns, about.st_size
        total = sum(size for _, size in sizes.values())
        for name, (_, size) in sorted(sizes.items(), key=lambda item: (item[0] == written, item[1])):
            if total <= self.limit:
                break
            if self._delete(self.folder / name):
                self._count("file_eviction")
                total -= size

    def _delete(self, path: Path) -> bool:
        try:
            path.unlink()
        except OSError:
            return False
        return True

    def _take_away(self, path: Path) -> None:
        """Make the place free: a file or a link is deleted, a folder gets another name."""
        if not self._delete(path):
            with contextlib.suppress(OSError):
                path.rename(path.with_name(f"{path.name}.refused-{uuid.uuid4().hex}"))

    def _warn(self, about: str, what: str) -> None:
        """Once for each file, and once for the folder."""
        if about not in self._warned and len(self._warned) < _MOST_WARNED:
            self._warned.add(about)
            logger.warning(what)


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _touch(path: Path) -> None:
    """Used now, in the finest time there is: what files get by themselves is some milliseconds behind."""
    with contextlib.suppress(OSError):
        now = time.time_ns()
        os.utime(path, ns=(now, now))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, int]]:
    """A regular file and its size; a link, a pipe or a folder is a ValueError, and none of them is waited for."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError("it is no regular file")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no regular file")
        yield file, about.st_size


def _read(path: Path, most: int) -> bytes | None:
    """All of a file at once, so that what is checked is what is used; None where it has more bytes than ``most``."""
    with _opened(path) as (file, size):
        return None if size > most else file.read(size)


def _header(start: bytes) -> Any:
    """The JSON of a file that begins like this, the tensors' places included."""
    length = int.from_bytes(start[:8], "little")
    if not 0 < length <= min(_LONGEST_HEADER, len(start) - 8):
        raise ValueError("it has no header")
    return json.loads(start[8 : 8 + length])


def _entry(path: Path, stamp: tuple[int, int, int]) -> _Entry:
    """By the header alone; nothing of it is believed later."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        with _opened(path) as (file, _):
            start = file.read(8)
            start += file.read(min(_LONGEST_HEADER, int.from_bytes(start, "little")))
        said = json.loads(_header(start)["__metadata__"][_KEY])
        key, fingerprint, positions = said["key"], said["fingerprint"], said["positions"]
        named = is_digest(key) and is_digest(fingerprint) and path.name.startswith(f"{key[:32]}-{fingerprint[:8]}.")
        if named and type(positions) is int and positions > 0:
            return _Entry(stamp, key, fingerprint, positions)
    return _Entry(stamp, "", "", 0)


def _about(profile: Profile) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "key": profile.key,
        "fingerprint": profile.fingerprint,
        "positions": profile.positions,
        "meta": dict(profile.meta),
    }


def _checksum(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Of everything in a file, names, dtypes and shapes included."""
    layout = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    made = hashlib.blake2b(json.dumps([said, layout], sort_keys=True).encode(), digest_size=32, person=b"csm voice")
    for name in sorted(tensors):
        made.update(raw_bytes(tensors[name]).data)
    return made.hexdigest()


def _profile(data: bytes, key: str, fingerprint: str) -> Profile:
    """What a file holds; any exception refuses it."""
    said = json.loads(_header(data)["__metadata__"][_KEY])
    checksum = said.pop("checksum")
    if said["format"] != FORMAT or said["key"] != key or said["fingerprint"] != fingerprint:
        raise ValueError("it was written for something else")
    tensors = need("safetensors.torch", "hf").load(data)
    if checksum != _checksum(said, tensors):
        raise ValueError("it is damaged: its checksum is another one")
    return Profile(key, fingerprint, said["positions"], tensors, said["meta"])
