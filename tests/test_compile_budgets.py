"""Every kernel compiles for every GPU target at CSM's real shapes, within its budget, on a machine without a GPU.

``tests/kernels/cases_*.py`` name the launches. ``python tests/test_compile_budgets.py`` rewrites the budgets; read the
difference before committing it: a kernel that starts to spill is a defect.
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
TARGETS = (80, 89, 90, 100, 120)

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


@pytest.mark.parametrize("name", sorted(cases()))
def test_within_budget(name: str) -> None:
    call, targets = cases()[name]
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


def test_the_budget_names_no_case_that_is_gone() -> None:
    assert set(json.loads(BUDGETS.read_text())) == set(cases())


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


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
