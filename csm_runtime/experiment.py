"""A/B comparison and user feedback in production: which requests get the candidate, what came of it, and what that says.

Privacy: the file holds the request ids as they were given, the numbers, the names of exception classes and the comments passed
to :meth:`Experiment.score`; no sound, no prompt, no other text. :meth:`Experiment.forget` removes all of one id.

The file is SQLite in WAL mode, for the threads and processes of one machine: put it on a local disk, not on a network one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from csm_runtime.comparison import ARMS, BASELINE, CANDIDATE, Comparison, Measured, judge

logger = logging.getLogger("csm_runtime")

_OWN_METRICS = ("failure", "seconds")
"""What ``run`` records; lower is better."""

_APPLICATION_ID = 0x43534D41
"""Marks our files in SQLite's header: "CSMA"."""
_SCHEMA_VERSION = 1
_SCHEMA = (
    "CREATE TABLE experiments (name TEXT PRIMARY KEY, salt TEXT NOT NULL, share REAL NOT NULL, lower_is_better TEXT NOT NULL)",
    "CREATE TABLE requests (experiment TEXT, request TEXT, arm TEXT NOT NULL, share REAL NOT NULL, time REAL NOT NULL, "
    "PRIMARY KEY (experiment, request)) WITHOUT ROWID",
    "CREATE TABLE measurements (experiment TEXT, metric TEXT, request TEXT, arm TEXT, value REAL NOT NULL, comment TEXT, "
    "time REAL NOT NULL, PRIMARY KEY (experiment, metric, request, arm)) WITHOUT ROWID",
)
_STOPPED = "CREATE TABLE IF NOT EXISTS stopped (experiment TEXT, request TEXT, PRIMARY KEY (experiment, request)) WITHOUT ROWID"
"""Requests of the candidate that last got the baseline, for share 0; files of version 1 may still lack it."""
_WAIT_SECONDS = 10.0
"""For another process's write; ours take well under a millisecond."""
_FORGET_SECONDS = 1.0
"""For readers to let go of what was forgotten: meanwhile nobody can write."""
_INHERITED: list[sqlite3.Connection] = []
"""Connections of parent processes."""
_reopening = threading.Lock()
"""Held by the thread that opens an experiment's file again after a fork."""


def _renew_lock() -> None:
    global _reopening  # noqa: PLW0603
    _reopening = threading.Lock()  # a thread that the child does not have may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)

T = TypeVar("T")


class Experiment:
    """One comparison of a candidate with a baseline, kept in an SQLite file; several fit in a file, by name.

    Usable from several threads and several processes at once, forked ones included, and as a context manager.

    An id's arm is drawn by a stable hash and written down, and it keeps it. So raising the share moves no id off the candidate,
    and requests that were assigned by different shares are compared apart. Share 0 also stops the candidate: every id gets
    the baseline, and what is then measured of the candidate's ids is not counted. What counts as one request is the caller's
    choice; if one person's requests are alike, or hear of each other, take an id of the person or conversation and record
    its mean: intervals assume independent ids.

    Example::

        with Experiment("ab.sqlite", "int8", share=0.1) as experiment:
            codes = experiment.run(request_id, lambda: stock.generate(**inputs), lambda: fast.generate(**inputs))
            experiment.score(request_id, 4)
            print(experiment.report("score"), experiment.report("seconds"))
    """

    def __init__(
        self,
        path: str | Path,
        name: str = "default",
        share: float | None = None,
        salt: str | None = None,
        *,
        lower_is_better: Iterable[str] | None = None,
        create: bool = True,
        read_only: bool = False,
    ) -> None:
        """Open or create.

        Args:
            path: the file.
            name: of the experiment.
            share: of the requests that get the candidate, in [0, 1]. None keeps the file's; 0.5 for a new experiment. Another
                one than the file's is written there and holds for all processes from their next new id on.
            salt: part of the hash, fixed for an experiment; None keeps the file's, "" for a new one.
            lower_is_better: metrics of which less is better, replacing the file's; "seconds" and "failure" always are.
            create: whether a missing file or experiment is made.
            read_only: for reports: nothing is made or written, whatever ``create`` says, and what would write raises.

        Raises:
            ValueError: the file is another one than ours or of another version, an argument is out of range, the salt differs
                from the file's, or the experiment is missing and not to be made.
            FileNotFoundError: the folder is missing, or the file and it is not to be made.
            sqlite3.OperationalError: the file cannot be opened or written.
        """
        self.path, self.name, self._read_only = Path(path), _text("name", name), read_only
        create = create and not read_only
        if share is not None:
            share = _share(share)
        if salt is not None and salt != "":
            _text("salt", salt)
        if isinstance(lower_is_better, str | bytes):  # its letters would be the metrics
            raise ValueError(f"lower_is_better={lower_is_better!r}: wanted a list of names, such as ['kl']")
        lower = None if lower_is_better is None else sorted({_text("lower_is_better", m) for m in lower_is_better})
        if read_only and (share is not None or lower is not None):
            raise ValueError("read_only=True: wanted no share and no lower_is_better, which are written to the file")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"path={str(path)!r}: there is no folder {self.path.parent}")
        if not create and not self.path.is_file():
            raise FileNotFoundError(f"path={str(path)!r}: there is no such file")
        self.unrecorded = 0
        """Requests that ``run`` served without writing them down, as the file could not be written."""
        self._open()
        try:
            with self._transaction(write=not read_only) as db:
                self._begin(db, share, salt, lower, create)
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._db: sqlite3.Connection | None = _connect(self.path, self._read_only)
        self._lock = threading.RLock()
        self._pid = os.getpid()  # last: whoever sees it sees the others

    def _after_fork(self, reopen: bool = True) -> None:
        """In a forked process, once: leave the parent's connection and lock alone, and open the file again."""
        if self._pid == os.getpid():
            return
        with _reopening:
            if self._pid == os.getpid():  # another thread was quicker
                return
            inherited = self._db
            if reopen and inherited is not None:
                self._open()
            else:
                self._db, self._lock = None, threading.RLock()
                self._pid = os.getpid()
            if inherited is not None:
                _INHERITED.append(inherited)  # SQLite's connections do not survive a fork, not even to be closed

    def _begin(
        self, db: sqlite3.Connection, share: float | None, salt: str | None, lower: list[str] | None, create: bool
    ) -> None:
        row = db.execute("SELECT salt FROM experiments WHERE name = ?", (self.name,)).fetchone()
        if row is None:
            if not create:
                names = [name for (name,) in db.execute("SELECT name FROM experiments ORDER BY name")]
                raise ValueError(f"name={self.name!r}: no such experiment in {self.path}, which has {names}")
            self._salt = salt or ""
            values = (self.name, self._salt, 0.5 if share is None else share, json.dumps(lower or []))
            db.execute("INSERT INTO experiments VALUES (?, ?, ?, ?)", values)
            return
        self._salt = row[0]
        if salt is not None and salt != self._salt:
            raise ValueError(f"salt={salt!r}: experiment {self.name!r} in {self.path} was begun with {self._salt!r}")
        if share is not None:
            db.execute("UPDATE experiments SET share = ? WHERE name = ?", (share, self.name))
        if lower is not None:
            db.execute("UPDATE experiments SET lower_is_better = ? WHERE name = ?", (json.dumps(lower), self.name))

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time."""
        self._after_fork()
        with self._lock:
            if self._db is None:
                raise ValueError(f"the experiment {self.name!r} is closed")
            yield self._db

    @contextmanager
    def _transaction(self, write: bool = True) -> Iterator[sqlite3.Connection]:
        """The connection, with everything inside done at once or not at all."""
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # a full disk ends it by itself
                    db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file; twice is fine."""
        self._after_fork(reopen=False)
        with self._lock:
            if self._db is not None:
                self._db.close()
            self._db = None

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- assignment

    @property
    def share(self) -> float:
        """The candidate's share of new requests, as the file has it now; set it to change it for all processes."""
        with self._transaction(write=False) as db:
            return self._stored_share(db)

    @share.setter
    def share(self, share: float) -> None:
        share = _share(share)
        with self._transaction() as db:
            db.execute("UPDATE experiments SET share = ? WHERE name = ?", (share, self.name))

    def assign(self, request_id: str) -> str:
        """The arm of a request, written down at the first call: "baseline" or "candidate".

        The same id gets the same arm in every process and at every later call, but for share 0, at which all get the baseline.

        Raises:
            ValueError: the id is no text or empty.
        """
        return self._assign(_text("request_id", request_id))[0]

    def _assign(self, request_id: str) -> tuple[str, bool]:
        """The arm to run, and whether it is the one that the request counts for."""
        with self._transaction(write=False) as db:
            share, arm, stopped = self._stored_share(db), *self._known(db, request_id)
        if arm is None or stopped != (share == 0 and arm == CANDIDATE):
            with self._transaction() as db:
                share, arm = self._stored_share(db), self._known(db, request_id)[0]
                if arm is None:  # still: another process may have been quicker, with another share
                    arm = CANDIDATE if position(self.name, self._salt, request_id) < share else BASELINE
                    values = (self.name, request_id, arm, share, time.time())
                    db.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?)", values)
                db.execute("DELETE FROM stopped WHERE experiment = ? AND request = ?", (self.name, request_id))
                if share == 0 and arm == CANDIDATE:
                    db.execute("INSERT INTO stopped VALUES (?, ?)", (self.name, request_id))
        run = arm if share > 0 else BASELINE
        return run, run == arm

    def _stored_share(self, db: sqlite3.Connection) -> float:
        return float(db.execute("SELECT share FROM experiments WHERE name = ?", (self.name,)).fetchone()[0])

    def _known(self, db: sqlite3.Connection, request_id: str) -> tuple[str | None, bool]:
        """A request's own arm, and whether it last got the baseline instead."""
        where = (self.name, request_id)
        row = db.execute("SELECT arm FROM requests WHERE experiment = ? AND request = ?", where).fetchone()
        stopped = db.execute("SELECT 1 FROM stopped WHERE experiment = ? AND request = ?", where).fetchone()
        return (None if row is None else str(row[0])), stopped is not None

    # -------------------------------------------------------------------------------------------------- recording

    def record(self, request_id: str, /, *, arm: str | None = None, **metrics: float) -> None:
        """Write down metrics of a request; a later value of the same metric replaces the earlier one.

        Args:
            request_id: of a request that was assigned.
            arm: which arm was measured; None is the request's own, and writes nothing if that is the candidate and the request
                last got the baseline, for share 0. Measuring both, by replaying a request, makes a pair.
            metrics: finite numbers, by name.

        Raises:
            ValueError: the id was never assigned, the arm is none, there is no metric, or a value is no finite number.
        """
        if not metrics:
            raise ValueError(f"record({request_id!r}) got no metrics; wanted at least one, such as seconds=1.5")
        self._write(request_id, arm, {_text("metric", m): (_number(m, v), None) for m, v in metrics.items()})

    def score(
        self, request_id: str, value: float, comment: str | None = None, *, kind: str = "score", arm: str | None = None
    ) -> None:
        """Write down what a user thought of a request, such as 1 to 5 or thumbs as 0 and 1; a later score replaces it.

        Args:
            request_id: of a request that was assigned.
            value: a finite number; more is better unless ``lower_is_better`` has the kind.
            comment: kept with it, never interpreted.
            kind: name of the metric, where users are asked more than one thing.
            arm: as for :meth:`record`, for listeners who judge both.

        Raises:
            ValueError: as :meth:`record`, or the comment is no text.
        """
        if comment is not None and (not isinstance(comment, str) or not _encodable(comment)):
            raise ValueError(f"comment={comment!r}: wanted text that UTF-8 can hold, or None")
        self._write(request_id, arm, {_text("kind", kind): (_number("value", value), comment)})

    def _write(self, request_id: str, arm: str | None, values: dict[str, tuple[float, str | None]]) -> None:
        _text("request_id", request_id)
        if arm is not None and arm not in ARMS:
            raise ValueError(f"arm={arm!r}: wanted one of {ARMS}, or None for the request's own")
        with self._transaction() as db:
            known, stopped = self._known(db, request_id)
            if known is None:
                raise ValueError(f"request_id={request_id!r} is not in experiment {self.name!r}; call assign() first")
            if arm is None and stopped:
                logger.info("experiment %r: %r last got the baseline for share 0, not counted", self.name, request_id)
                return
            rows = [
                (self.name, m, request_id, arm or known, v, comment, time.time()) for m, (v, comment) in values.items()
            ]
            db.executemany("INSERT OR REPLACE INTO measurements VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def forget(self, request_id: str) -> bool:
        """Remove a request with its metrics, scores and comments; True if there was one.

        They are overwritten in the file and in its write-ahead log. If others read the log just then it keeps them for now,
        which is logged as a warning; calling again overwrites them.

        Raises:
            ValueError: the id is no text or empty.
        """
        where = (self.name, _text("request_id", request_id))
        with self._connection() as db:
            with self._transaction():
                for table in ("measurements", "stopped"):
                    db.execute(f"DELETE FROM {table} WHERE experiment = ? AND request = ?", where)
                found = db.execute("DELETE FROM requests WHERE experiment = ? AND request = ?", where).rowcount > 0
            db.execute(f"PRAGMA busy_timeout = {_FORGET_SECONDS * 1000:.0f}")
            try:
                (busy, *_) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                db.execute(f"PRAGMA busy_timeout = {_WAIT_SECONDS * 1000:.0f}")
        if busy:
            text = "experiment %r: %s-wal is in use and still holds what was forgotten; call forget() again"
            logger.warning(text, self.name, self.path)
        return found

    def run(self, request_id: str, baseline: Callable[[], T], candidate: Callable[[], T]) -> T:
        """Assign a request, run its arm, and record ``seconds`` and ``failure`` (0 or 1).

        A candidate that raises costs the user time, but no audio: the baseline runs in its place. The request still counts for
        the candidate, with the seconds of both runs and failure 1, as does the score the user gives it; otherwise the requests
        that a candidate cannot do would make it look better. A file that cannot be written costs no audio either:
        the failure is logged and counted in ``unrecorded``.

        Args:
            request_id: of the request.
            baseline: makes the result; on CUDA it must have waited for the device, or the seconds say nothing.
            candidate: the same, the other way.

        Raises:
            ValueError: the id is no text or empty.
            Exception: what the baseline raised; it is recorded as a failure.
        """
        _text("request_id", request_id)
        try:
            arm, counts = self._assign(request_id)
        except sqlite3.Error as error:
            # not the candidate: what is not written down cannot be compared, and might be a candidate that fails
            self._not_written(request_id, error)
            return baseline()
        failure: str | None = None
        start = time.perf_counter()
        if arm == CANDIDATE:
            try:
                result = candidate()
            except Exception as error:
                failure = type(error).__name__
                logger.warning("experiment %r: the candidate failed, the baseline runs", self.name, exc_info=error)
        try:
            if arm == BASELINE or failure is not None:
                result = baseline()
        except Exception as error:
            if counts:
                self._try_write(request_id, arm, {"failure": (1.0, failure or type(error).__name__)})
            raise
        seconds = time.perf_counter() - start
        if counts:
            failed = (float(failure is not None), failure)
            self._try_write(request_id, arm, {"seconds": (seconds, None), "failure": failed})
        return result

    def _try_write(self, request_id: str, arm: str, values: dict[str, tuple[float, str | None]]) -> None:
        try:
            self._write(request_id, arm, values)
        except (sqlite3.Error, ValueError) as error:  # ValueError: closed, or the id forgotten, while the arm ran
            self._not_written(request_id, error)

    def _not_written(self, request_id: str, error: Exception) -> None:
        self.unrecorded += 1
        logger.warning(
            "experiment %r: request %r could not be written to %s: %s", self.name, request_id, self.path, error
        )

    # -------------------------------------------------------------------------------------------------- reporting

    def counts(self) -> dict[str, int]:
        """Assigned requests by arm."""
        with self._transaction(write=False) as db:
            return self._counts(db)

    def _counts(self, db: sqlite3.Connection) -> dict[str, int]:
        query = "SELECT arm, COUNT(*) FROM requests WHERE experiment = ? GROUP BY arm"
        return dict.fromkeys(ARMS, 0) | dict(db.execute(query, (self.name,)))

    def metrics(self) -> list[str]:
        """Names of what was recorded, sorted."""
        with self._transaction(write=False) as db:
            query = "SELECT DISTINCT metric FROM measurements WHERE experiment = ? ORDER BY metric"
            return [metric for (metric,) in db.execute(query, (self.name,))]

    def report(
        self,
        metric: str = "score",
        confidence: float = 0.95,
        higher_is_better: bool | None = None,
        margin: float = 0.0,
        *,
        pairs: bool | None = None,
        sequential: bool = False,
    ) -> Comparison:
        """Compare the arms by one metric.

        The verdict is "better" if the whole confidence interval lies more than ``margin`` on the good side, "worse" if on the
        bad side, "undecided" otherwise. Looking again and again until one appears makes false ones likely: decide the
        number of requests beforehand, or pass ``sequential=True``. Each metric has its own risk of a false verdict.

        Args:
            metric: its name.
            confidence: of the two-sided interval, in [0.5, 1).
            higher_is_better: None is what the experiment was told by ``lower_is_better``.
            margin: difference that does not matter, in the metric's unit.
            pairs: whether to compare requests measured on both arms (True) or each on its own arm (False). None takes pairs
                where they are at least as many as the smaller arm's requests that were measured on it alone.
            sequential: whether the interval must hold at all sizes at once, for reports that are read as they grow.

        Raises:
            ValueError: an argument is out of range. A metric without values is undecided.
        """
        _text("metric", metric)
        confidence, margin = _number("confidence", confidence), _number("margin", margin)
        if not 0.5 <= confidence < 1:
            raise ValueError(f"confidence={confidence!r}: wanted 0.5 <= confidence < 1")
        if margin < 0:
            raise ValueError(f"margin={margin!r}: wanted a number of at least 0")
        with self._transaction(write=False) as db:
            query = (
                "SELECT r.request, r.arm, r.share, m.arm, m.value FROM measurements m JOIN requests r "
                "ON r.experiment = m.experiment AND r.request = m.request WHERE m.experiment = ? AND m.metric = ?"
            )
            rows = db.execute(query, (self.name, metric)).fetchall()
            assigned = self._counts(db)
            (lower,) = db.execute("SELECT lower_is_better FROM experiments WHERE name = ?", (self.name,)).fetchone()
        if higher_is_better is None:
            higher_is_better = metric not in (*_OWN_METRICS, *json.loads(lower))
        data = Measured(rows)
        pairs = data.are_paired if pairs is None else pairs
        interval, notes = data.interval(pairs, confidence, sequential)
        verdict, reason = judge(interval, higher_is_better, margin)
        return Comparison(
            experiment=self.name,
            metric=metric,
            higher_is_better=higher_is_better,
            method=interval.method,
            sequential=sequential,
            confidence=confidence,
            margin=margin,
            n_baseline=interval.n_baseline,
            n_candidate=interval.n_candidate,
            mean_baseline=interval.mean_baseline,
            mean_candidate=interval.mean_candidate,
            difference=interval.difference,
            low=interval.low,
            high=interval.high,
            verdict=verdict,
            reason=reason,
            notes=tuple(notes if pairs else notes + data.missing(assigned)),
        )

    def reports(self, confidence: float = 0.95, *, sequential: bool = False) -> list[Comparison]:
        """Compare the arms by every metric that was recorded, in the order of their names."""
        return [self.report(metric, confidence, sequential=sequential) for metric in self.metrics()]


def position(name: str, salt: str, request_id: str) -> float:
    """Where a request stands in [0, 1), uniform over ids and fixed for ever: the candidate's if below its share.

    The first 53 of 64 bits of BLAKE2b over the JSON list of the three texts, over 2^53.
    """
    digest = hashlib.blake2b(json.dumps([name, salt, request_id]).encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def report_text(
    path: str | Path, name: str | None = None, confidence: float = 0.95, *, sequential: bool = False
) -> str:
    """What a file's experiments, or the one of that name, say on every metric.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of ours, is empty, cannot be read, or there is no such experiment in it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file")
    try:
        return _report_text(Path(path), name, confidence, sequential)
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _report_text(path: Path, name: str | None, confidence: float, sequential: bool) -> str:
    names = [name] if name is not None else []
    if name is None:
        db = _connect(path, read_only=True)
        try:
            names = [row[0] for row in db.execute("SELECT name FROM experiments ORDER BY name")]
        finally:
            db.close()
    if not names:
        raise ValueError(f"{path} holds no experiments")
    blocks = []
    for each in names:
        with Experiment(path, each, read_only=True) as experiment:
            counts = experiment.counts()
            head = f"experiment {each}: share {experiment.share:g}, {counts[BASELINE]} + {counts[CANDIDATE]} requests"
            comparisons = experiment.reports(confidence, sequential=sequential)
        blocks.append("\n".join([head, *(map(str, comparisons) if comparisons else ["nothing was recorded"])]))
    return "\n\n".join(blocks)


def _connect(path: Path, read_only: bool = False) -> sqlite3.Connection:
    """A connection to a file of ours, which is made where there is none or an empty one, unless it is only read.

    Raises:
        ValueError: the file is another one than ours or of another version, or is empty and only read.
    """
    # rw makes no file, reads one that is write-protected, and unlike ro leaves no -wal and -shm behind
    where = f"file:{quote(str(path.absolute()))}?mode=rw" if read_only else path
    db = sqlite3.connect(where, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False, uri=read_only)
    try:
        db.execute("PRAGMA query_only = ON" if read_only else "BEGIN IMMEDIATE")
        (application,), (version,) = (db.execute(f"PRAGMA {p}").fetchone() for p in ("application_id", "user_version"))
        if application == version == 0 and db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone() == (0,):
            if read_only:
                raise ValueError(f"{path} holds no experiments: it is empty")
            for statement in _SCHEMA:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        elif application != _APPLICATION_ID:
            raise ValueError(f"{path} is an SQLite file of something else, not of experiments")
        elif version != _SCHEMA_VERSION:
            raise ValueError(f"{path} holds experiments of schema version {version}, wanted {_SCHEMA_VERSION}")
        if read_only:
            return db
        db.execute(_STOPPED)
        db.execute("COMMIT")
        if db.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA secure_delete = ON")  # what forget() removes is overwritten
        db.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last requests, never the file
    except sqlite3.DatabaseError as error:
        db.close()
        if isinstance(error, sqlite3.OperationalError):
            raise
        raise ValueError(f"{path} is no file of experiments: {error}") from error
    except BaseException:
        db.close()
        raise
    return db


def _text(what: str, value: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what}={value!r}: wanted a text that is not empty")
    if not _encodable(value):
        raise ValueError(f"{what}={value!r}: wanted text that UTF-8 can hold")
    return value


def _encodable(text: str) -> bool:
    """Half a surrogate pair is a character to Python, but not to the file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(what: str, value: float) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what}={value!r}: wanted a finite number")
    return number


def _share(share: float) -> float:
    share = _number("share", share)
    if not 0 <= share <= 1:
        raise ValueError(f"share={share!r}: wanted 0 <= share <= 1")
    return share
