"""Every kernel compiles for every GPU target at CSM's real shapes, within its budget, on a machine without a GPU.

``tests/kernels/cases_*.py`` name the launches. ``python tests/test_compile_budgets.py`` rewrites the budgets and the table
in docs; read the difference before committing it: a kernel that starts to spill is a defect. Whole frames take minutes to
compile for every target: ``test_frame_budgets.py`` holds each to sm_90 and one of the others, in turn.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from csm_kernels._target import has_triton, interpreting
from csm_kernels.testing import CompileReport, compile_only

HERE = Path(__file__).parent
BUDGETS = HERE / "compile_budgets.json"
PAGE = HERE.parent / "docs" / "compile-report.md"
TARGETS = (80, 89, 90, 100, 120)
FRAMES = ("depth ", "backbone ")
"""How the names of launches that are whole frames begin."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.compiled_ahead,
    pytest.mark.skipif(
        interpreting() or not has_triton(), reason="compiles with Triton's compiler, not its interpreter"
    ),
]


def cases() -> dict[str, tuple[Callable[[], object], tuple[int, ...]]]:
    """Name of a launch to (the call, the targets it is for)."""
    found: dict[str, tuple[Callable[[], object], tuple[int, ...]]] = {}
    for path in sorted((HERE / "kernels").glob("cases_*.py")):
        module = importlib.import_module(f"kernels.{path.stem}")
        skipped = getattr(module, "UNSUPPORTED", {})
        for name, call in module.CASES.items():
            assert name not in found, f"two cases are called {name}"
            found[name] = call, tuple(t for t in TARGETS if t not in skipped.get(name, ()))
    return found


def compile_case(call: Callable[[], object], target: int) -> list[CompileReport]:
    with compile_only(target) as reports:
        call()
    return reports


def summary(report: CompileReport) -> dict[str, int | str]:
    return {name: value for name, value in report._asdict().items() if name not in ("target", "loads")}


def check(name: str, targets: tuple[int, ...]) -> None:
    """Compile a case and compare it with its budgets."""
    call, _ = cases()[name]
    budgets = json.loads(BUDGETS.read_text())
    for target in targets:
        reports = compile_case(call, target)
        assert reports, "the case launched nothing"
        allowed = budgets[name][f"sm_{target}"]
        assert [r.kernel for r in reports] == [a["kernel"] for a in allowed], "other kernels than the budget knows"
        for report, budget in zip(reports, allowed):
            for what in ("registers", "stack", "spills", "shared"):
                assert getattr(report, what) <= budget[what], f"{name}, sm_{target}: {what} {report} over {budget}"
            assert report.wide_loads >= budget["wide_loads"], f"{name}, sm_{target}: fewer 16-byte loads than {budget}"


@pytest.mark.parametrize("name", [name for name in sorted(cases()) if not name.startswith(FRAMES)])
def test_within_budget(name: str) -> None:
    check(name, cases()[name][1])


def test_the_budget_names_no_case_that_is_gone() -> None:
    assert set(json.loads(BUDGETS.read_text())) == set(cases())


def page(table: dict[str, dict[str, list[dict[str, int | str]]]]) -> str:
    """The budgets as a page to read: sm_90 in full, of the other targets the most registers and spills."""
    lines = [
        "# Compile report",
        "",
        "Every kernel at CSM-1B's shapes, compiled ahead of time without a GPU; **none has run on one yet**. Written by",
        "`make budgets` from `tests/compile_budgets.json`, which `make test` holds the kernels to (whole frames: sm_90 and one",
        "other target each, in turn; they take minutes to compile for all). Registers are per thread,",
        "shared memory is in bytes per program, wide loads are 16-byte global load instructions. What an op has to move is in",
        'the column "bytes" of [bench/results/kernels-cpu.md](../bench/results/kernels-cpu.md).',
        "",
        "| launch | kernel | warps | registers | spills | stack | shared | wide loads | most registers elsewhere | spills |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, targets in sorted(table.items()):
        shown = targets["sm_90"]
        for i, row in enumerate(shown):
            others = [rows[i] for target, rows in targets.items() if target != "sm_90"]
            most = [max(int(other[what]) for other in others) for what in ("registers", "spills")]
            figures = [row[what] for what in ("warps", "registers", "spills", "stack", "shared", "wide_loads")]
            cells = [name if i == 0 else "", f"`{row['kernel']}`", *figures, *most]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def test_the_page_shows_the_budgets() -> None:
    assert PAGE.read_text() == page(json.loads(BUDGETS.read_text())), "make budgets writes both"


def test_a_spill_is_seen() -> None:
    """The report is only worth something if it shows what the budget forbids."""
    from kernels.cases_budget_probe import spilling

    (report,) = compile_case(spilling, 90)
    assert report.spills > 0
    assert report.stack > 0


def main() -> None:
    torch.manual_seed(0)
    table: dict[str, dict[str, list[dict[str, int | str]]]] = {}
    for name, (call, targets) in sorted(cases().items()):
        table[name] = {f"sm_{target}": [summary(r) for r in compile_case(call, target)] for target in targets}
        worst = max((r for rows in table[name].values() for r in rows), key=lambda r: (r["spills"], r["registers"]))
        print(f"{name}: at most {worst['registers']} registers, {worst['spills']} spills", flush=True)
    BUDGETS.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(table))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
