"""How often a request may be tried again: bounds by kind, who pays, and what the client is told when there is no more."""

from __future__ import annotations

from collections import Counter

import pytest

from inference_runtime.errors import Backpressure, BadRequest, ContextPoisoned, Draining, InferenceError, Timeout
from services.gateway.allowance import MAX_HAND_OVERS, NEXT_CHUNK, Again, Allowance
from services.gateway.budget import AttemptBudget, BudgetRule
from services.gateway.settings import LimitSettings


class Case:
    """An allowance over a budget, and what was counted."""

    def __init__(self, rule: BudgetRule | None = None, **limits: int) -> None:
        self.counted: Counter[str] = Counter()
        self.budget = AttemptBudget(rule or BudgetRule(retry_floor=100, move_floor=100))
        self.budget.accept(0.0)
        self.allowance = Allowance(LimitSettings(**limits), self.budget, lambda kind: self.counted.update([kind]))

    def take(
        self, error: InferenceError, *, shown: bool = False, begun: bool = False, resumable: bool = True
    ) -> tuple[Again, InferenceError]:
        return self.allowance.take(error, shown=shown, begun=begun, resumable=resumable, now=1.0)


LOST, FULL = ContextPoisoned("lost"), Backpressure("full")


@pytest.mark.parametrize(
    ("shown", "begun", "resumable", "again"),
    [
        (False, False, True, Again.GO_ON),
        (False, False, False, Again.GO_ON),
        (False, True, True, Again.GO_ON),
        (False, True, False, Again.START_OVER),
        (True, True, True, Again.GO_ON),
        (True, True, False, Again.NO),
    ],
)
@pytest.mark.parametrize("error", [LOST, FULL, Draining("closing")])
def test_what_another_attempt_is_depends_on_what_there_is(
    error: InferenceError, shown: bool, begun: bool, resumable: bool, again: Again
) -> None:
    """Where nobody can continue, what was shown is lost and what was not is made anew."""
    assert Case().take(error, shown=shown, begun=begun, resumable=resumable) == (again, error)


def test_each_kind_has_a_bound_of_its_own() -> None:
    case = Case(max_retries=2, max_resumptions=1)
    assert [case.take(LOST)[0] for _ in range(3)] == [Again.GO_ON, Again.GO_ON, Again.NO]
    assert [case.take(LOST, shown=True, begun=True)[0] for _ in range(2)] == [Again.GO_ON, Again.NO]
    assert case.allowance.failures == 3
    assert not case.allowance.left(shown=False, resumable=True)


def test_hand_overs_are_free_and_end_all_the_same() -> None:
    """An upgrade of many engines uses up nothing of what is meant for deaths."""
    case = Case(BudgetRule(retry_share=0, retry_floor=0, moves_per_request=0, move_floor=0))
    taken = [case.take(Draining("closing"))[0] for _ in range(MAX_HAND_OVERS + 1)]
    assert taken == [Again.GO_ON] * MAX_HAND_OVERS + [Again.NO]
    assert case.counted == {"hand_over": MAX_HAND_OVERS}
    assert case.allowance.failures == 0


def test_a_caller_at_fault_is_not_helped_by_trying_again() -> None:
    error = BadRequest("no")
    assert Case().take(error) == (Again.NO, error)


@pytest.mark.parametrize(
    ("error", "kind", "budget"),
    [(LOST, "move", "moves"), (Timeout("late", phase=NEXT_CHUNK), "move", "moves"), (FULL, "retry", "retries")],
)
def test_the_deployment_pays_and_says_when_it_has_no_more(error: InferenceError, kind: str, budget: str) -> None:
    """A loss is paid as a move, anything else as a retry. The error that many requests share is left as it is."""
    case = Case(BudgetRule(retry_share=0, retry_floor=1, moves_per_request=0, move_floor=1), max_retries=5)
    assert case.take(error)[0] is Again.GO_ON
    again, refused = case.take(error)
    assert again is Again.NO
    assert case.counted == {kind: 1}
    assert type(refused) is type(error)
    assert (refused.metadata["retry_budget_exhausted"], refused.metadata["code"]) == (budget, "retry_budget_exhausted")
    assert refused.retry_after_s == 1.0
    assert "retry_budget_exhausted" not in error.metadata
