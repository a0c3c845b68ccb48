"""When a replica counts as failing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.outcomes import FAILING_AFTER_S, FORGET_S, LEAST_FAILURES, Outcomes


def after(*failures: float, success_before: int = 0) -> Outcomes:
    """Outcomes with failures at these times and one success before the failure of that number."""
    outcomes = Outcomes()
    for number, now in enumerate(failures):
        if success_before and number == success_before:
            outcomes.succeeded()
        outcomes.failed(now)
    return outcomes


@pytest.mark.parametrize(
    ("outcomes", "now", "failing"),
    [
        (after(), 100, False),
        (after(100), 120, False),
        (after(100, 101, 102, 103), 103, False),  # a burst of failures is one event
        (after(100, 106), 106, False),  # two may have reasons of their own
        (after(100, 103, 106), 106, True),
        (after(100, 103, 106, success_before=2), 106, False),
        (after(100, 103, 106), 106 + FORGET_S, True),
        (after(100, 103, 106), 107 + FORGET_S, False),  # nobody asked it since: try again
        (after(100, 103, 140), 140, False),
    ],
)
def test_only_failures_that_last_count(outcomes: Outcomes, now: float, failing: bool) -> None:
    assert outcomes.failing(now) is failing


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 20)), max_size=60))
def test_a_success_ends_it_at_once_and_failing_is_never_said_without_cause(steps: list[tuple[bool, float]]) -> None:
    outcomes, now = Outcomes(), 1000.0
    run: list[float] = []
    for good, later_s in steps:
        now += later_s
        if good:
            outcomes.succeeded()
            run = []
            assert not outcomes.failing(now)
        else:
            outcomes.failed(now)
            run.append(now)
        if outcomes.failing(now):
            assert len(run) >= LEAST_FAILURES
            assert run[-1] - run[0] > FAILING_AFTER_S
