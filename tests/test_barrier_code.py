"""The grid barrier in PTX: who arrives, who polls, and that no thread runs ahead of either."""

from __future__ import annotations

import re

import pytest
from kernels.cases_barrier import launch

from csm_kernels import testing
from csm_kernels._target import has_triton, interpreting
from csm_kernels.depth import barrier

TARGETS = (80, 89, 90, 100, 120)
WARPS = 8

pytestmark = [
    pytest.mark.compiled_ahead,
    pytest.mark.skipif(
        interpreting() or not has_triton(), reason="compiles with Triton's compiler, not its interpreter"
    ),
]


def ptx(monkeypatch: pytest.MonkeyPatch, target: int, sync: int) -> str:
    """The body of the litmus kernel."""
    texts: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(testing, "_report", lambda kernel, name, capability: texts.append(kernel.asm["ptx"]))
        with testing.compile_only(target):
            launch(sync, WARPS)
    (text,) = texts
    return text.split("\n{", 1)[1]


def steps(text: str) -> list[str]:
    """What touches memory, waits for others or leaves the way, in the order of the text; one letter's worth each.

    Loads of parameters do not count, and the predicate of an instruction is kept: ``@%p1 atom...``.
    """
    kept = re.compile(r"(@!?%?\w+\s+)?(ld|st|atom|red|bar|fence|membar|griddepcontrol)\.(?!param)\S*")
    found = (kept.match(line.strip()) for line in text.splitlines())
    return [match.group().replace("\t", " ") for match in found if match]


def of_the_first_thread(text: str, predicate: str) -> bool:
    """Whether the predicate register is true in one thread: ``tid & (threads - 1) == 0``."""
    compared = re.search(rf"setp\.eq\.[bsu]32\s+{predicate}, (%r\d+), 0;", text)
    assert compared, f"{predicate} is no comparison with zero"
    masked = re.search(rf"and\.b32\s+{compared[1]}, (%r\d+), {32 * WARPS - 1};", text)
    assert masked, f"{compared[1]} does not number all threads"
    return re.search(rf"mov\.u32\s+{masked[1]}, %tid\.x;", text) is not None


def only(lines: list[str], what: str) -> int:
    (index,) = (i for i, line in enumerate(lines) if what in line)
    return index


@pytest.mark.parametrize("target", TARGETS)
def test_triton_atomics(monkeypatch: pytest.MonkeyPatch, target: int) -> None:
    text = ptx(monkeypatch, target, barrier.GRID)
    lines = steps(text)
    assert not [line for line in lines if ".nc" in line or ".volatile" in line]

    arrival = only(lines, "release.add")
    predicate, what = lines[arrival].split()
    assert predicate.startswith("@%p") and what == "atom.global.gpu.release.add.u32"
    assert of_the_first_thread(text, predicate[1:])
    assert lines[arrival - 1] == "bar.sync" and "st.global" in lines[arrival - 2]

    polls = [i for i, line in enumerate(lines) if "acquire" in line]
    assert len(polls) == 2, "the first look, and the looks of the loop"
    for i in polls:
        assert lines[i] == f"{predicate} ld.global.gpu.acquire.b32"
        assert lines[i + 1].startswith(f"{predicate} st.shared") and lines[i + 2] == "bar.sync"
    data = next(i for i, line in enumerate(lines) if line.startswith("ld.global.v4"))
    assert lines[data - 1] == "bar.sync"

    error, lift = only(lines, "relaxed.max"), only(lines, "release.max")
    assert lift == error + 1
    assert lines[error].startswith(predicate) and lines[lift].startswith(predicate)


@pytest.mark.parametrize("target", TARGETS)
def test_inline_ptx(monkeypatch: pytest.MonkeyPatch, target: int) -> None:
    text = ptx(monkeypatch, target, barrier.GRID_PTX)
    lines = steps(text)
    assert not [line for line in lines if ".nc" in line or ".volatile" in line or "shared" in line]
    assert not [line for line in lines if "atom" in line], "an arrival waits for no answer"

    arrival = only(lines, "release.gpu.global.add")
    assert lines[arrival] == "@p red.release.gpu.global.add.s32"
    assert lines[arrival - 1] == "bar.sync" and "st.global" in lines[arrival - 2]
    first = re.search(r"mov\.u32 t, %tid\.x;\s+setp\.eq\.u32 p, t, 0;\s+@p red\.release\.gpu\.global\.add", text)
    assert first, "one thread arrives"

    poll, error, lift = only(lines, "acquire"), only(lines, "relaxed"), only(lines, "release.gpu.global.max")
    assert lines[poll : poll + 4] == [
        "ld.acquire.gpu.global.s32",
        "red.relaxed.gpu.global.max.s32",
        "red.release.gpu.global.max.s32",
        "bar.sync",
    ]
    assert (error, lift) == (poll + 1, poll + 2)
    assert lines[poll + 4].startswith("ld.global")
    skipped = re.search(r"mov\.u32 t, %tid\.x;\s+setp\.ne\.u32 p, t, 0;\s+@p bra (DONE\d+);", text)
    assert skipped, "one thread polls"
    assert text.index(skipped[0]) < text.index("ld.acquire") < text.index(f"{skipped[1]}:") < text.index("bar.sync")
    assert len(re.findall(rf"bra {skipped[1]};", text)) == 2, "the others, and the one that has seen enough"
    assert str(1 << 30) in text[text.index("release.gpu.global.max") :].split(";", 1)[0]


@pytest.mark.parametrize("target", [target for target in TARGETS if target >= 90])
def test_programmatic_dependent_launch(monkeypatch: pytest.MonkeyPatch, target: int) -> None:
    lines = steps(ptx(monkeypatch, target, barrier.PDL))
    trigger, wait = only(lines, "launch_dependents"), only(lines, "griddepcontrol.wait")
    assert trigger < wait
    assert not [line for line in lines[:wait] if "global" in line], "nothing is read before the wait"
    assert [line for line in lines[wait:] if "ld.global" in line] and [line for line in lines if "st.global" in line]
    assert not [line for line in lines if re.search("atom|red|acquire|release", line.replace("griddepcontrol", ""))]


def test_without_synchronisation_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = steps(ptx(monkeypatch, 90, barrier.NO_SYNC))
    assert {line.split(".")[0] for line in lines} == {"ld", "st"}
