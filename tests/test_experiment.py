"""The file of an experiment: who gets which arm, what is written down, and who may write at once."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import csm_runtime.experiment as module
from csm_runtime.cli import main
from csm_runtime.experiment import Experiment, position, report_text
from csm_runtime.intervals import unpaired

BAD_NUMBERS = [math.nan, math.inf, -math.inf, True, "4", None, 10**400]
GOLDEN = [0.5448025484863412, 0.21737028533120473, 0.6436500457817046]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ab.sqlite"


def fill(experiment: Experiment, count: int, value: Callable[[str, int], float], metric: str = "score") -> None:
    """Assign ids and record a value by arm and index."""
    for index in range(count):
        arm = experiment.assign(f"r{index}")
        experiment.record(f"r{index}", **{metric: value(arm, index)})


def rows(path: Path, query: str) -> list[tuple[object, ...]]:
    db = sqlite3.connect(path, isolation_level=None)
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


# ------------------------------------------------------------------------------------------------------ assignment


def test_positions_are_fixed_for_ever() -> None:
    """Changing the hash would move every user of a running experiment."""
    got = [position("default", "", "request-1"), position("default", "", "request-2"), position("a", "b", "ü")]
    assert got == GOLDEN


def test_positions_are_uniform_and_independent_between_experiments() -> None:
    ids = [f"user-{index}" for index in range(20_000)]
    one = np.array([position("one", "", i) for i in ids])
    assert stats.kstest(one, "uniform").pvalue > 0.001
    for name, salt in (("two", ""), ("one", "salt")):
        other = np.array([position(name, salt, i) for i in ids])
        table = np.histogram2d(one, other, bins=8, range=[[0, 1], [0, 1]])[0]
        assert stats.chi2_contingency(table).pvalue > 0.001


def test_parts_of_the_hash_are_kept_apart() -> None:
    assert (
        len({position("ab", "c", "d"), position("a", "bc", "d"), position("a", "b", "cd"), position('a","b', "c", "d")})
        == 4
    )


@pytest.mark.parametrize(("share", "wanted"), [(0.0, {"baseline"}), (1.0, {"candidate"})])
def test_shares_at_the_ends(path: Path, share: float, wanted: set[str]) -> None:
    with Experiment(path, share=share) as experiment:
        assert {experiment.assign(f"r{i}") for i in range(300)} == wanted


def test_share_is_kept(path: Path) -> None:
    with Experiment(path, share=0.2) as experiment:
        for index in range(1000):
            experiment.assign(f"r{index}")
        assert stats.binomtest(experiment.counts()["candidate"], 1000, 0.2).pvalue > 0.001


def test_raising_the_share_takes_nobody_off_the_candidate(tmp_path: Path) -> None:
    """In files of their own, so that it is the hash that holds, and not what was written down."""
    before: set[str] = set()
    for share in (0.05, 0.3, 0.9):
        with Experiment(tmp_path / f"{share}.sqlite", share=share) as experiment:
            now = {f"r{i}" for i in range(400) if experiment.assign(f"r{i}") == "candidate"}
        assert before < now
        before = now


def test_ids_keep_their_arm_when_the_share_changes(path: Path) -> None:
    with Experiment(path, share=0.5) as experiment:
        first = {f"r{i}": experiment.assign(f"r{i}") for i in range(200)}
        with Experiment(path) as other:
            assert other.share == 0.5
            other.share = 0.9
        assert experiment.share == 0.9  # at once, in who has it open already
        assert {i: experiment.assign(i) for i in first} == first
        later = [experiment.assign(f"new{i}") for i in range(300)]
        assert later.count("candidate") > 240


def test_the_quicker_process_decides(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process assigns the id between our look and our writing, by a share that was then raised."""
    with Experiment(path, share=1.0) as experiment, Experiment(path) as other:
        transaction, done = experiment._transaction, []

        def late(write: bool = True) -> object:
            if write and not done:
                done.append(True)
                other.share = 1e-9
                assert other.assign("r") == "baseline"
                other.share = 1.0
            return transaction(write)

        monkeypatch.setattr(experiment, "_transaction", late)
        assert experiment.assign("r") == "baseline"
        assert done
        assert experiment.counts() == {"baseline": 1, "candidate": 0}


def test_share_zero_stops_the_candidate_and_keeps_what_was_written(path: Path) -> None:
    with Experiment(path, share=1.0) as experiment:
        assert experiment.run("r", lambda: "stock", lambda: "fast") == "fast"
        seconds = rows(path, "SELECT value FROM measurements WHERE metric = 'seconds'")
        experiment.share = 0
        assert experiment.assign("r") == "baseline"
        assert experiment.run("r", lambda: "stock", lambda: "fast") == "stock"
        assert rows(path, "SELECT value FROM measurements WHERE metric = 'seconds'") == seconds
        experiment.share = 1
        assert experiment.assign("r") == "candidate"


def test_what_the_baseline_sounded_like_is_not_booked_to_a_stopped_candidate(path: Path) -> None:
    with Experiment(path, share=1.0) as experiment, Experiment(path) as other:
        ids = [f"r{i}" for i in range(30)]
        for i in ids:
            assert experiment.assign(i) == "candidate"
        experiment.score("r0", 2)
        experiment.share = 0
        experiment.score("r1", 3)  # no other audio since: of the candidate
        for i in ids:
            assert experiment.run(i, lambda: "stock", lambda: "fast") == "stock"
            other.score(i, 5)  # what one process served, another is told of
            other.record(i, noise=1.0)
        query = "SELECT request, metric, arm, value FROM measurements ORDER BY request"
        wanted = [("r0", "score", "candidate", 2.0), ("r1", "score", "candidate", 3.0)]
        assert rows(path, query) == wanted
        experiment.record("r2", arm="candidate", score=4)  # who says which arm is believed
        assert rows(path, query)[2:] == [("r2", "score", "candidate", 4.0)]
        experiment.share = 0.5
        assert experiment.run("r3", lambda: "stock", lambda: "fast") == "fast"
        experiment.score("r3", 1)
        other.score("r4", 1)
        assert ("r3", "score", "candidate", 1.0) in rows(path, query)
        assert experiment.report().n_candidate == 4
        assert other.forget("r4")
        assert rows(path, "SELECT request FROM stopped WHERE request IN ('r3', 'r4')") == []


def test_share_zero_counts_for_the_baseline_what_was_always_the_baselines(path: Path) -> None:
    with Experiment(path, share=0) as experiment:
        assert experiment.run("r", lambda: "stock", lambda: "fast") == "stock"
        experiment.score("r", 5)
        assert experiment.report().n_baseline == 1


def test_files_from_before_stops_were_kept(path: Path) -> None:
    with Experiment(path, share=1) as experiment:
        experiment.assign("r")
    rows(path, "DROP TABLE stopped")
    assert report_text(path) == "experiment default: share 1, 0 + 1 requests\nnothing was recorded"
    with Experiment(path, share=0) as experiment:
        experiment.assign("r")
        experiment.score("r", 5)
        assert experiment.metrics() == []


def test_the_same_arm_in_every_process(path: Path) -> None:
    """With another seed of Python's own hash each."""
    code = (
        "import sys, tempfile, os\nfrom csm_runtime.experiment import Experiment\n"
        "e = Experiment(os.path.join(tempfile.mkdtemp(), 'x'), share=0.5)\n"
        "print(''.join(e.assign(f'r{i}')[0] for i in range(64)))"
    )
    with Experiment(path) as experiment:
        here = "".join(experiment.assign(f"r{i}")[0] for i in range(64))
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, timeout=120
        )
        assert out.stdout.strip() == here


# ------------------------------------------------------------------------------------------------ what is written


def test_a_later_score_replaces_the_earlier(path: Path) -> None:
    with Experiment(path) as experiment:
        experiment.assign("r")
        experiment.score("r", 1, "bad")
        experiment.score("r", 5)
        experiment.score("r", 2, kind="naturalness")
        assert experiment.metrics() == ["naturalness", "score"]
    assert rows(path, "SELECT metric, value, comment FROM measurements ORDER BY metric") == [
        ("naturalness", 2.0, None),
        ("score", 5.0, None),
    ]


def test_the_file_holds_ids_numbers_and_comments_alone(path: Path) -> None:
    def fails() -> str:
        raise RuntimeError("a secret prompt")

    with Experiment(path, share=1) as experiment:
        assert experiment.run("an id", lambda: "secret sound", fails) == "secret sound"
        experiment.score("an id", 3, "a comment")
    text = path.read_bytes()
    assert b"secret" not in text
    assert b"an id" in text and b"a comment" in text and b"RuntimeError" in text


def test_forgetting_leaves_nothing_of_the_id(path: Path) -> None:
    with Experiment(path) as experiment:
        for i in ("keep", "drop"):
            experiment.assign(i)
            experiment.score(i, 3, f"comment of {i}")
        assert experiment.forget("drop")
        assert not experiment.forget("drop")
        assert sum(experiment.counts().values()) == 1
        assert experiment.report().n_baseline + experiment.report().n_candidate == 1
        with pytest.raises(ValueError, match="drop"):
            experiment.score("drop", 3)
    assert b"drop" not in path.read_bytes()


def in_files(path: Path, text: bytes) -> bool:
    return any(text in file.read_bytes() for file in path.parent.iterdir())


def test_forgetting_reaches_the_log_of_an_open_file(path: Path) -> None:
    """With enough rows that SQLite has split pages since."""
    with Experiment(path, share=1) as experiment:
        ids = [f"drop-{i}" if i % 2 else f"keep-{i}" for i in range(120)]
        for i in ids:
            experiment.assign(i)
            experiment.score(i, 3, f"comment of {i} " + 50 * "long ")
        assert in_files(path, b"drop-")
        experiment.share = 0
        experiment.assign("drop-1")
        assert all(experiment.forget(i) for i in ids if i.startswith("drop"))
        assert not in_files(path, b"drop-")
        assert in_files(path, b"comment of keep-")
        with pytest.raises(ValueError, match="request_id=''"):
            experiment.forget("")


def test_forgetting_says_if_the_log_is_in_use(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("csm_runtime.experiment._FORGET_SECONDS", 0.02)
    with Experiment(path) as experiment:
        experiment.assign("drop")
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM requests").fetchall()
        assert experiment.forget("drop")
        assert "still holds what was forgotten" in caplog.text
        reader.execute("COMMIT")
        caplog.clear()
        assert not experiment.forget("drop")
        assert caplog.text == ""
        assert not in_files(path, b"drop")
        reader.close()
        assert experiment.assign("r") in ("baseline", "candidate")


def test_experiments_of_one_file_are_apart(path: Path) -> None:
    with Experiment(path, "one") as one, Experiment(path, "two", share=0.25) as two:
        one.assign("r")
        one.score("r", 3)
        assert two.metrics() == []
        with pytest.raises(ValueError, match=r"request_id='r' is not in experiment 'two'.*assign"):
            two.score("r", 3)
        assert (one.share, two.share) == (0.5, 0.25)


@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_numbers_that_are_none_are_refused_whole(path: Path, value: float) -> None:
    with Experiment(path) as experiment:
        experiment.assign("r")
        with pytest.raises(ValueError, match="kl=.*finite number"):
            experiment.record("r", seconds=1.0, kl=value)
        with pytest.raises(ValueError, match="value=.*finite number"):
            experiment.score("r", value)
        with pytest.raises(ValueError, match="share="):
            experiment.share = value
        assert experiment.metrics() == []


def test_numbers_of_numpy_are_numbers(path: Path) -> None:
    with Experiment(path) as experiment:
        experiment.assign("r")
        experiment.record("r", a=np.float32(0.5), b=np.int64(3))
    assert rows(path, "SELECT value FROM measurements ORDER BY metric") == [(0.5,), (3.0,)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.assign(""), "request_id=''"),
        (lambda e: e.assign(7), "request_id=7"),
        (lambda e: e.run(None, int, int), "request_id=None"),
        (lambda e: e.run("\ud800", int, int), r"request_id='\\ud800': wanted text that UTF-8 can hold"),
        (lambda e: e.assign("a\udfff"), r"request_id='a\\udfff'"),
        (lambda e: e.score("r", 1, comment="\ud800"), r"comment='\\ud800': wanted text that UTF-8 can hold"),
        (lambda e: e.record("r", **{"\ud800": 1.0}), r"metric='\\ud800'"),
        (lambda e: Experiment(e.path, "\ud800"), r"name='\\ud800'"),
        (lambda e: Experiment(e.path, "other", salt="\ud800"), r"salt='\\ud800'"),
        (lambda e: Experiment(e.path, "other", salt=7), "salt=7"),
        (lambda e: Experiment(e.path, lower_is_better="kl"), r"lower_is_better='kl': wanted a list"),
        (lambda e: Experiment(e.path, lower_is_better=b"kl"), r"lower_is_better=b'kl': wanted a list"),
        (lambda e: Experiment(e.path, lower_is_better=["kl", ""]), "lower_is_better=''"),
        (lambda e: Experiment(e.path, read_only=True, share=0.5), "read_only=True"),
        (lambda e: Experiment(e.path, read_only=True, lower_is_better=[]), "read_only=True"),
        (lambda e: e.record("r"), "got no metrics"),
        (lambda e: e.record("nobody", seconds=1.0), "request_id='nobody' is not in experiment 'default'"),
        (lambda e: e.record("r", arm="control", seconds=1.0), "arm='control'.*baseline.*candidate"),
        (lambda e: e.score("r", 1, comment=b"x"), "comment="),
        (lambda e: e.score("r", 1, kind=""), "kind=''"),
        (lambda e: e.report("score", confidence=1.0), "confidence=1.0"),
        (lambda e: e.report("score", confidence=95), "confidence=95"),
        (lambda e: e.report("score", margin=-0.1), "margin=-0.1"),
        (lambda e: e.report(""), "metric=''"),
    ],
)
def test_bad_arguments(path: Path, call: Callable[[Experiment], object], message: str) -> None:
    with Experiment(path) as experiment:
        experiment.assign("r")
        with pytest.raises(ValueError, match=message):
            call(experiment)


# --------------------------------------------------------------------------------------------------------- opening


def test_reopening_keeps_everything(path: Path) -> None:
    with Experiment(path, share=0.25, salt="s", lower_is_better=["kl"]) as experiment:
        arm = experiment.assign("r")
        experiment.record("r", kl=0.1)
    assert not list(path.parent.glob("*-wal"))
    with Experiment(path, create=False) as experiment:
        assert experiment.share == 0.25
        assert experiment.assign("r") == arm
        assert not experiment.report("kl").higher_is_better
        assert experiment.report("score").higher_is_better
    with pytest.raises(ValueError, match="salt='other'.*begun with 's'"):
        Experiment(path, salt="other")
    with Experiment(path, share=0.75, salt="s", lower_is_better=[]) as experiment:
        assert experiment.share == 0.75
        assert experiment.report("kl").higher_is_better
        assert not experiment.report("seconds").higher_is_better


def test_what_must_exist(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        Experiment(path, create=False)
    with pytest.raises(FileNotFoundError, match="no folder"):
        Experiment(path.parent / "missing" / "ab.sqlite")
    assert not path.exists()
    Experiment(path, "one").close()
    with pytest.raises(ValueError, match=r"name='two'.*\['one'\]"):
        Experiment(path, "two", create=False)


def test_other_files_are_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"RIFF" + bytes(5000))
    with pytest.raises(ValueError, match="is no file of experiments"):
        Experiment(path)
    assert path.read_bytes() == b"RIFF" + bytes(5000)

    foreign = path.with_name("foreign.sqlite")
    db = sqlite3.connect(foreign)
    db.execute("CREATE TABLE notes (x)")
    db.commit()
    db.close()
    before = foreign.read_bytes()
    with pytest.raises(ValueError, match="something else"):
        Experiment(foreign)
    assert foreign.read_bytes() == before

    later = path.with_name("later.sqlite")
    Experiment(later).close()
    rows(later, "PRAGMA user_version = 2")
    with pytest.raises(ValueError, match="schema version 2, wanted 1"):
        Experiment(later)


def test_read_only_reads_only(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        Experiment(path, read_only=True)
    assert not path.exists()
    with Experiment(path, "one", share=1) as experiment:
        fill(experiment, 20, lambda arm, i: float(i))
        with Experiment(path, "one", read_only=True) as reader:
            assert (reader.share, reader.counts()["candidate"]) == (1, 20)
            fill(experiment, 30, lambda arm, i: float(i))
            assert reader.report().n_candidate == 30
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                reader.assign("new")
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                reader.share = 0
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"name='two'.*\['one'\]"):
        Experiment(path, "two", read_only=True)
    with Experiment(path, "one", read_only=True) as reader:
        assert reader.metrics() == ["score"]
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_closed_is_closed(path: Path) -> None:
    experiment = Experiment(path)
    experiment.close()
    experiment.close()
    with pytest.raises(ValueError, match="is closed"):
        experiment.assign("r")


# ------------------------------------------------------------------------------------------------------ many writers


def test_threads(path: Path) -> None:
    arms: list[dict[str, str]] = [{} for _ in range(8)]

    def work(experiment: Experiment, index: int) -> None:
        for i in range(100):
            arms[index][f"r{i}"] = experiment.assign(f"r{i}")
            experiment.record(f"r{i}", **{f"of_{index}": float(i)})

    with Experiment(path) as experiment:
        threads = [threading.Thread(target=work, args=(experiment, index)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(each == arms[0] for each in arms)
        assert sum(experiment.counts().values()) == 100
        for index in range(8):
            report = experiment.report(f"of_{index}")
            assert report.n_baseline + report.n_candidate == 100


def in_process(path: Path, index: int, barrier: Barrier) -> None:
    barrier.wait(60)
    with Experiment(path, share=0.5) as experiment:
        for i in range(150):
            experiment.assign(f"r{i}")
            experiment.record(f"r{i}", **{f"of_{index}": float(i)})


def test_processes_create_and_write_at_once(path: Path) -> None:
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")  # spawning imports torch for 5 s
    barrier = context.Barrier(4)
    processes = [context.Process(target=in_process, args=(path, index, barrier)) for index in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    with Experiment(path, create=False) as experiment:
        assert sum(experiment.counts().values()) == 150
        assert experiment.metrics() == [f"of_{index}" for index in range(4)]
    assert rows(path, "SELECT COUNT(*) FROM measurements") == [(600,)]
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_worker_opens_the_file_anew(path: Path) -> None:
    """What a server that loads first and forks then does."""
    with Experiment(path) as experiment:
        experiment.assign("parent")
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=fork_work, args=(experiment, index)) for index in range(3)]
        for worker in workers:
            worker.start()
        for i in range(100):
            experiment.assign(f"parent-{i}")
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0] * 3
        assert sum(experiment.counts().values()) == 1 + 100 + 3 * 100
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


def fork_work(experiment: Experiment, index: int) -> None:
    inherited = experiment._db
    with experiment:
        for i in range(100):
            experiment.assign(f"{index}-{i}")
        assert experiment._db is not inherited


def in_fork(work: Callable[[], object]) -> bool:
    """Whether it was done in a forked process, within a minute."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    return process.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_threads_of_a_forked_process(path: Path) -> None:
    """All find the parent's connection at once; one opens the file again, and no other uses what it replaced."""

    def threads() -> None:
        failed: list[BaseException] = []
        start = threading.Barrier(8)

        def work(index: int) -> None:
            try:
                start.wait(30)
                for i in range(5):
                    experiment.assign(f"{index}-{i}")
            except BaseException as error:
                failed.append(error)

        workers = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        sys.exit(repr(failed) if failed else 0)

    with Experiment(path) as experiment:
        for _ in range(3):
            experiment.assign("parent")
            assert in_fork(threads)
            assert sum(experiment.counts().values()) == 1 + 40
            for index in range(8):
                assert all(experiment.forget(f"{index}-{i}") for i in range(5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_another_thread_writes(path: Path) -> None:
    """The child has the lock as the thread held it, but not the thread."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with experiment._transaction(), module._reopening:
            held.set()
            done.wait(60)

    with Experiment(path) as experiment, Experiment(path) as closed:
        closed.close()
        writer = threading.Thread(target=hold)
        writer.start()
        held.wait(60)
        try:
            assert in_fork(experiment.close)
            assert in_fork(closed.close)
        finally:
            done.set()
            writer.join()
        assert experiment.assign("r") in ("baseline", "candidate")


# -------------------------------------------------------------------------------------------------------------- run


def test_run_times_the_arm_it_assigned(path: Path) -> None:
    ran: list[str] = []

    def arm(name: str, seconds: float) -> Callable[[], str]:
        def call() -> str:
            time.sleep(seconds)
            ran.append(name)
            return name

        return call

    with Experiment(path) as experiment:
        for i in range(30):
            assert experiment.run(f"r{i}", arm("baseline", 0.02), arm("candidate", 0.002)) == experiment.assign(f"r{i}")
        assert len(ran) == 30
        report = experiment.report("seconds")
        assert (report.n_baseline, report.n_candidate) == (ran.count("baseline"), ran.count("candidate"))
        assert report.verdict == "better"
        assert -0.03 < report.difference < -0.01
        assert experiment.report("failure").mean_candidate == 0


def test_a_candidate_that_fails_costs_no_audio_and_counts_against_it(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def slow_failure() -> str:
        time.sleep(0.02)
        raise RuntimeError("no kernel image")

    with Experiment(path, share=1) as experiment:
        assert experiment.run("r", lambda: "audio", slow_failure) == "audio"
    assert "no kernel image" in caplog.text
    got = rows(path, "SELECT metric, arm, value >= 0.02, comment FROM measurements ORDER BY metric")
    assert got == [("failure", "candidate", 1, "RuntimeError"), ("seconds", "candidate", 1, None)]


def test_a_baseline_that_fails_raises_and_is_recorded(path: Path) -> None:
    def fails() -> str:
        raise KeyError("x")

    for share, arm in ((0, "baseline"), (1, "candidate")):
        with Experiment(path, arm, share=share) as experiment, pytest.raises(KeyError):
            experiment.run("r", fails, fails)
        assert rows(path, f"SELECT metric, arm, value, comment FROM measurements WHERE experiment = '{arm}'") == [
            ("failure", arm, 1.0, "KeyError")
        ]


def test_an_interruption_is_no_failure(path: Path) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    with Experiment(path, share=1) as experiment:
        with pytest.raises(KeyboardInterrupt):
            experiment.run("r", lambda: "audio", interrupted)
        assert experiment.metrics() == []


def test_a_file_that_cannot_be_written_costs_no_audio(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("csm_runtime.experiment._WAIT_SECONDS", 0.01)
    with Experiment(path, share=1) as experiment:
        blocker = sqlite3.connect(path, isolation_level=None)

        def block_then_answer() -> str:
            blocker.execute("BEGIN IMMEDIATE")
            return "candidate"

        assert experiment.run("r1", lambda: "baseline", block_then_answer) == "candidate"  # after it ran
        assert experiment.run("r2", lambda: "baseline", lambda: "candidate") == "baseline"  # before
        assert experiment.unrecorded == 2
        assert "'r1'" in caplog.text and "'r2'" in caplog.text
        blocker.execute("ROLLBACK")
        blocker.close()
        assert experiment.run("r2", lambda: "baseline", lambda: "candidate") == "candidate"
        assert experiment.metrics() == ["failure", "seconds"]


@pytest.mark.parametrize("end", [Experiment.close, lambda e: e.forget("r")])
def test_what_ends_the_request_meanwhile_costs_no_audio(path: Path, end: Callable[[Experiment], object]) -> None:
    def candidate() -> str:
        end(experiment)
        return "audio"

    with Experiment(path, share=1) as experiment:
        assert experiment.run("r", lambda: "baseline", candidate) == "audio"
        assert experiment.unrecorded == 1


# -------------------------------------------------------------------------------------------------------- reporting


def test_verdicts(path: Path) -> None:
    spread = np.random.default_rng(0).normal(0, 0.5, 400)
    with Experiment(path, lower_is_better=["kl"]) as experiment:
        fill(experiment, 400, lambda arm, i: 3 + spread[i] + (arm == "candidate"))
        fill(experiment, 400, lambda arm, i: 3 + spread[i] + (arm == "candidate"), "kl")
        fill(experiment, 400, lambda arm, i: spread[i], "same")
        got = {c.metric: c.verdict for c in experiment.reports()}
        assert got == {"kl": "worse", "same": "undecided", "score": "better"}
        assert {c.metric: c.verdict for c in experiment.reports(sequential=True)} == got
        assert experiment.report("kl", higher_is_better=True).verdict == "better"
        assert experiment.report("score", margin=0.5).verdict == "better"
        wide = experiment.report("score", margin=1.0)
        assert (wide.verdict, wide.reason) == ("undecided", "the interval reaches into the margin of 1")
        same = experiment.report("same", margin=0.5)
        assert (same.verdict, same.not_worse) == ("undecided", True)
        assert "no difference that matters" in same.reason
        assert not experiment.report("same").not_worse
        assert experiment.report("score", higher_is_better=False, margin=0.5).not_worse is False
        assert experiment.report("score", higher_is_better=False, margin=2).not_worse is True


def test_a_report_is_that_of_its_arms(path: Path) -> None:
    spread = np.random.default_rng(1).gamma(2, 1, 100)
    with Experiment(path, share=0.3) as experiment:
        fill(experiment, 100, lambda arm, i: spread[i])
        report = experiment.report(confidence=0.9)
        arms = [
            [spread[i] for i in range(100) if experiment.assign(f"r{i}") == arm] for arm in ("baseline", "candidate")
        ]
    welch = stats.ttest_ind(arms[1], arms[0], equal_var=False).confidence_interval(0.9)
    assert 1 <= (report.high - report.low) / (welch.high - welch.low) < 1.05
    wanted = unpaired([(arms[0], arms[1])], 0.9)
    assert (report.low, report.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)
    assert (report.mean_baseline, report.mean_candidate) == pytest.approx((np.mean(arms[0]), np.mean(arms[1])))
    assert (report.n_baseline, report.n_candidate, report.method) == (len(arms[0]), len(arms[1]), "Welch t")


def test_both_arms_of_one_request_make_a_pair(path: Path) -> None:
    """Shadow mode: share 0, so that users hear the baseline, with every request replayed on the candidate."""
    rng = np.random.default_rng(2)
    length, noise = rng.gamma(2, 4, 60), rng.normal(0, 0.05, (60, 2))
    with Experiment(path, share=0) as experiment:
        for i in range(60):
            assert experiment.assign(f"r{i}") == "baseline"
            experiment.record(f"r{i}", seconds=length[i] + noise[i, 0])
        assert experiment.report("seconds").reason.startswith("too few requests: 0 of the smaller arm")
        for i in range(40):
            experiment.record(f"r{i}", arm="candidate", seconds=length[i] + noise[i, 1] - 0.1)
        report = experiment.report("seconds")
        assert (report.method, report.n_baseline, report.n_candidate, report.verdict) == ("paired t", 40, 40, "better")
        assert report.notes == ("20 requests measured on one arm only are left out",)
        wanted = stats.ttest_1samp(noise[:40, 1] - 0.1 - noise[:40, 0], 0).confidence_interval()
        assert (report.low, report.high) == pytest.approx((wanted.low, wanted.high), rel=1e-6)
        assert experiment.report("seconds", pairs=False).n_candidate == 0


def test_few_pairs_do_not_displace_many_requests(path: Path) -> None:
    with Experiment(path) as experiment:
        fill(experiment, 200, lambda arm, i: float(i % 7))
        for i in range(12):
            experiment.score(f"r{i}", 1, arm="baseline")
            experiment.score(f"r{i}", 2 + i % 2, arm="candidate")
        report = experiment.report()
        assert (report.method, report.n_baseline + report.n_candidate) == ("Welch t", 200)
        assert (experiment.report(pairs=True).method, experiment.report(pairs=True).n_baseline) == ("paired t", 12)


def test_a_changed_share_does_not_make_a_difference(path: Path) -> None:
    """First slow hours with few candidates, then fast ones with many: pooled, the candidate would seem a second faster."""
    rng = np.random.default_rng(3)
    with Experiment(path, share=0.1) as experiment:
        pooled: dict[str, list[float]] = {"baseline": [], "candidate": []}
        for share, mean in ((0.1, 5.0), (0.9, 3.0)):
            experiment.share = share
            for i in range(300):
                arm = experiment.assign(f"{share}-{i}")
                pooled[arm].append(rng.normal(mean, 0.5))
                experiment.record(f"{share}-{i}", seconds=pooled[arm][-1])
        report = experiment.report("seconds")
        assert stats.ttest_ind(pooled["candidate"], pooled["baseline"]).pvalue < 1e-6
        assert report.verdict == "undecided"
        assert abs(report.difference) < 0.3
        assert report.notes == ("2 shares were in force: requests of each are compared apart, then averaged",)
        experiment.share = 1.0
        for i in range(50):
            experiment.assign(f"all-{i}")
            experiment.record(f"all-{i}", seconds=1.0)
        later = experiment.report("seconds")
        assert (later.difference, later.low) == (report.difference, report.low)
        assert later.notes[1].startswith("50 requests are left out")


def test_scores_that_one_arm_lacks_are_noted(path: Path) -> None:
    with Experiment(path) as experiment:
        for i in range(200):
            arm = experiment.assign(f"r{i}")
            if arm == "baseline" or i % 3 == 0:
                experiment.record(f"r{i}", score=float(i % 5), seconds=1.0 + i % 3)
            else:
                experiment.record(f"r{i}", seconds=1.0 + i % 3)
        (note,) = experiment.report("score").notes
        assert note.startswith("100.0% of the baseline's requests and 3") and "may explain" in note
        assert experiment.report("seconds").notes == ()


def test_nothing_and_no_variance_are_undecided(path: Path) -> None:
    with Experiment(path) as experiment:
        nothing = experiment.report("score")
        assert (nothing.verdict, nothing.n_baseline, nothing.method) == ("undecided", 0, "none")
        assert "too few" in nothing.reason
        assert experiment.reports() == []
        fill(experiment, 40, lambda arm, i: 3.1 + 0.2 * (arm == "candidate"))
        report = experiment.report()
        assert (report.verdict, report.low) == ("undecided", -math.inf)
        assert report.reason.startswith("no variance")
        json.loads(json.dumps(report.to_dict(), allow_nan=False))
        json.loads(json.dumps(nothing.to_dict(), allow_nan=False))
        assert report.to_dict()["low"] is None
        assert report.to_dict()["difference"] == pytest.approx(0.2)


@pytest.mark.parametrize("scale", [1e200, 1e307])
def test_numbers_whose_squares_are_none(path: Path, scale: float) -> None:
    with Experiment(path) as experiment:
        fill(experiment, 100, lambda arm, i: scale * (1 + i % 3 + 2 * (arm == "candidate")))
        report = experiment.report()
        assert (report.verdict, report.difference / scale) == ("better", pytest.approx(2, abs=0.5))
        assert "better" in report_text(path)


def test_text(path: Path) -> None:
    with Experiment(path, "int8", share=0.4) as experiment:
        fill(experiment, 50, lambda arm, i: float(i % 2))
        table = str(experiment.report())
    assert table.splitlines()[0] == "score (higher is better)"
    assert "Newcombe, 0.95 confidence" in table
    assert table.splitlines()[-1] == "  undecided: the interval holds zero"
    Experiment(path, "empty").close()
    text = report_text(path)
    assert text == report_text(path, "empty") + "\n\n" + report_text(path, "int8")
    assert report_text(path, "empty") == "experiment empty: share 0.5, 0 + 0 requests\nnothing was recorded"
    assert table in text
    assert ", at all sizes at once" in report_text(path, "int8", sequential=True)
    with pytest.raises(ValueError, match="name='other'"):
        report_text(path, "other")
    with pytest.raises(FileNotFoundError, match="no such file"):
        report_text(path.with_name("missing"))


def test_the_command_line_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ab.sqlite"
    with Experiment(path, "one", share=0.5) as experiment:
        for number in range(60):
            arm = experiment.assign(str(number))
            experiment.score(str(number), (arm == "candidate") + number % 3)
    assert main(["ab-report", str(path), "--name", "one"]) == 0
    said = capsys.readouterr().out
    assert "score (higher is better)" in said
    assert "better" in said.rpartition("confidence")[2]
    assert main(["ab-report", str(path), "--name", "two"]) == 2
    assert "one" in capsys.readouterr().err
    assert main(["ab-report", str(tmp_path / "none")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_command_line_says_what_is_wrong_with_a_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Experiment(path) as experiment:
        fill(experiment, 300, lambda arm, i: float(i))
    whole = path.read_bytes()
    rows(path, "DELETE FROM experiments")
    for content, wanted in (
        (b"", "holds no experiments: it is empty"),
        (path.read_bytes(), "holds no experiments"),
        (b"RIFF" + bytes(5000), "is no file of experiments"),
        (whole[: len(whole) // 2], "cannot be read|is no file of experiments"),
    ):
        path.write_bytes(content)
        assert main(["ab-report", str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.search(f"csm-accelerate: error: .*({wanted})", err)
        assert path.read_bytes() == content
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_bytes(b"")
    assert main(["ab-report", str(path), "--name", "one"]) == 2
    assert "it is empty" in capsys.readouterr().err
