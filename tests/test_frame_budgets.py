"""Whole frames within their budgets: compiled for sm_90 and, in turn, for one of the other targets."""

from __future__ import annotations

import pytest
import test_compile_budgets as budgets

pytestmark = budgets.pytestmark
NAMES = [name for name in sorted(budgets.cases()) if name.startswith(budgets.FRAMES)]


def targets_of(index: int) -> tuple[int, ...]:
    """sm_90, and another that the case compiles for."""
    others = [target for target in budgets.cases()[NAMES[index]][1] if target != 90]
    return 90, others[index % len(others)]


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_within_budget(index: int) -> None:
    budgets.check(NAMES[index], targets_of(index))


def test_every_target_has_its_turn() -> None:
    assert {target for index in range(len(NAMES)) for target in targets_of(index)} == set(budgets.TARGETS)
