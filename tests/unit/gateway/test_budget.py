"""The budget of further attempts, against a model that remembers everything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.budget import SLOTS, AttemptBudget, BudgetRule

RULE = BudgetRule(window_s=10, retry_share=0.1, retry_floor=3, moves_per_request=2, move_floor=10)
STEPS = st.lists(st.tuples(st.sampled_from(["accept", "end", "retry", "move"]), st.floats(0, 3)), max_size=200)


@given(STEPS)
def test_no_window_spends_more_than_the_rule_and_nothing_is_refused_within_it(steps: list[tuple[str, float]]) -> None:
    """In whole slots the window is exact: what it holds is at least nine tenths of window_s and at most all of it."""
    budget, now = AttemptBudget(RULE), 1000.0
    accepted: list[int] = []
    spent: dict[str, list[int]] = {"retry": [], "move": []}
    peaks: dict[int, int] = {}
    in_flight, last = 0, 1000

    def in_window(slots: list[int], slot: int) -> int:
        return sum(slot - SLOTS < s <= slot for s in slots)

    for step, later_s in steps:
        now += later_s
        slot = int(now)
        if step == "end":
            if in_flight:
                budget.end()
                in_flight -= 1
            continue
        for passed in range(last + 1, slot + 1):
            peaks[passed] = in_flight
        last = slot
        if step == "accept":
            budget.accept(now)
            in_flight += 1
            accepted.append(slot)
            peaks[slot] = max(peaks.get(slot, 0), in_flight)
            continue
        if step == "retry":
            allowance, took = 3 + 0.1 * in_window(accepted, slot), budget.take_retry(now)
        else:
            peak = max((n for s, n in peaks.items() if slot - SLOTS < s <= slot), default=0)
            allowance, took = 10 + 2.0 * peak, budget.take_move(now)
        assert took == (in_window(spent[step], slot) < allowance)
        if took:
            spent[step].append(slot)
    assert budget.in_flight == in_flight


@given(st.integers(0, 500), st.integers(0, 40))
def test_two_deaths_with_everything_in_flight_can_be_resumed(in_flight: int, extra: int) -> None:
    """Also when what was moved has ended in between, and only newer requests meet the second death."""
    budget = AttemptBudget(RULE)
    for _ in range(in_flight):
        budget.accept(5.0)
    assert all(budget.take_move(6.0) for _ in range(in_flight))
    for _ in range(in_flight):
        budget.end()
    for _ in range(extra):
        budget.accept(7.0)
    assert all(budget.take_move(8.0) for _ in range(min(extra, in_flight + 10)))


def test_a_storm_of_refusals_is_not_doubled() -> None:
    """A tenth of what was accepted and three: the rest fails at once."""
    budget = AttemptBudget(RULE)
    for _ in range(1000):
        budget.accept(0.0)
    assert sum(budget.take_retry(1.0) for _ in range(1000)) == 103
    assert not budget.take_retry(9.9)
    assert sum(budget.take_retry(21.0) for _ in range(10)) == 3  # what was accepted long ago gives nothing any more
