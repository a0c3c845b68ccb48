"""How one attempt gets on: what is late, and what its replica is told of it (O01, R-08)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.attempt import Attempt
from services.gateway.pace import Pace


@pytest.mark.parametrize(
    ("steady", "behind", "looks", "now", "late"),
    [
        (True, 0, [], 29.0, ""),
        (True, 7, [(29.0, 7)], 31.0, "no token came"),  # it was to go on behind 7
        (True, 7, [(29.0, 8)], 38.0, ""),
        (True, 7, [(29.0, 8)], 40.0, "no further token"),
        (True, 7, [(29.0, 8), (39.0, 8)], 40.0, "no further token"),  # a look alone is no progress
        (True, 7, [(29.0, 8), (38.0, 9)], 40.0, ""),
        (False, 7, [(29.0, 8)], 40.0, ""),  # in lumps
        (False, 7, [(29.0, 8)], 60.0, "no further token"),
    ],
)
def test_what_is_late(steady: bool, behind: int, looks: list[tuple[float, int]], now: float, late: str) -> None:
    """The first token of an attempt within 30 s, the next one within 10, or 30 where they come in lumps."""
    attempt = Attempt(Pace(), 1, 0.0, behind, steady=steady)
    for at, tokens in looks:
        attempt.look(at, tokens)
    said = attempt.overdue(now, 30.0, 10.0)
    assert said.startswith(late)
    assert bool(said) == bool(late)


@given(
    st.integers(0, 100),
    st.booleans(),
    st.lists(st.tuples(st.floats(0.01, 1.0), st.integers(0, 20)), min_size=1, max_size=60),
)
def test_a_replica_is_told_every_token_and_every_moment_once(behind: int, steady: bool, looks: list[tuple[float, int]]) -> None:
    """From the first token on, what was told adds up to what came and to how long it took."""
    pace, now, tokens = Pace(), 100.0, behind
    attempt = Attempt(pace, 1, now, tokens, steady=steady)
    began: float | None = None
    told_until = now
    for later_s, gained in looks:
        now += later_s
        tokens += gained
        if began is None and gained:
            began = told_until = now
            attempt.first(now, tokens)
            first_tokens = tokens
        attempt.look(now, tokens)
        if began is not None and (gained or steady):
            told_until = now
    if began is None:
        assert (pace.tokens, pace.busy_s, pace.firsts) == (0, 0.0, [])
        assert len(pace.waits) == len(looks)
    else:
        assert pace.tokens == tokens - first_tokens
        assert pace.busy_s == pytest.approx(told_until - began)
        assert pace.firsts == [pytest.approx(began - 100.0)]
