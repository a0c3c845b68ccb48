"""Which replicas are put aside because they are slow, for how long, and how many (R-08)."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.ejection import EjectionRule, Standing, Trust, review
from services.gateway.pace import WINDOW_S, Pace

RULE = EjectionRule()
#: Seconds between two reviews.
REVIEW_S = 1.0


@dataclass
class Replica:
    """A replica that takes `token_s` for each token of its answers, and `first_s` for each of `asked` first ones a second."""

    token_s: float = 0.02
    answers: int = 4
    first_s: float = 0.05
    asked: int = 0
    pace: Pace = field(default_factory=Pace)
    trust: Trust = field(default_factory=Trust)

    def live(self, seconds: float) -> None:
        """Let it answer for a while."""
        for number in range(self.answers):
            self.pace.went_on(number, seconds, int(seconds / self.token_s))
        for _ in range(self.asked):
            self.pace.began(self.first_s)

    @property
    def standing(self) -> Standing:
        return self.trust.standing


class Deployment:
    """Some replicas and a clock."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas, self.now = list(replicas), 1000.0

    def run(self, seconds: float) -> list[float]:
        """Let all of them answer, and review them. Returns when something was put aside, seconds from the start."""
        began, events = self.now, []
        while self.now < began + seconds:
            for replica in self.replicas:
                if replica.standing is not Standing.OUT:  # put aside: its answers have ended
                    replica.live(REVIEW_S)
            self.now += REVIEW_S
            events += [self.now - began] * len(review(self.replicas, self.now))
        return events

    @property
    def out(self) -> list[int]:
        """Numbers of those that get nothing new."""
        return [n for n, r in enumerate(self.replicas) if r.standing is Standing.OUT]


def test_r_08_a_replica_twenty_times_slower_is_put_aside_within_ten_seconds() -> None:
    deployment = Deployment(Replica(), Replica(), Replica(), Replica())
    assert deployment.run(30) == []
    deployment.replicas[2].token_s *= 20
    events = deployment.run(10)
    assert len(events) == 1
    assert events[0] <= 7
    assert deployment.out == [2]


def test_r_08_slow_first_tokens_count_where_answers_are_one_token_long() -> None:
    deployment = Deployment(*(Replica(answers=0, asked=5) for _ in range(3)))
    assert deployment.run(10) == []
    deployment.replicas[0].first_s = 1.0
    assert deployment.run(10)
    assert deployment.out == [0]


def test_requests_that_wait_for_a_first_token_count_before_they_have_it() -> None:
    deployment = Deployment(*(Replica(answers=0, asked=5) for _ in range(3)))
    deployment.run(5)
    stuck = deployment.replicas[1]
    stuck.asked, stuck.pace.waits = 0, [2.0] * 8
    deployment.run(6)
    assert deployment.out == [1]


def test_a_replica_whose_answers_stand_still_is_slow_without_a_single_token() -> None:
    deployment = Deployment(Replica(), Replica(), Replica())
    deployment.run(5)
    deployment.replicas[0].token_s = 1000.0
    assert deployment.run(8)
    assert deployment.out == [0]


def test_after_its_time_aside_it_is_tried_with_two_requests_and_comes_back() -> None:
    deployment = Deployment(Replica(token_s=0.4), Replica(), Replica())
    deployment.run(8)
    slow = deployment.replicas[0]
    assert deployment.out == [0]
    assert slow.trust.limit == 0
    slow.token_s, slow.answers = 0.02, 2
    states: list[tuple[Standing, float]] = []
    while slow.standing is not Standing.FULL and len(states) < 20:
        deployment.run(REVIEW_S)
        states.append((slow.standing, slow.trust.limit))
    assert (Standing.TRIAL, RULE.trial_requests) in states
    assert slow.standing is Standing.FULL
    assert 8 + len(states) >= RULE.out_s


def test_one_that_is_still_slow_is_put_aside_for_twice_as_long_up_to_a_limit() -> None:
    deployment = Deployment(Replica(token_s=0.4), Replica(), Replica())
    ends: list[float] = []
    lengths: list[float] = []
    while len(lengths) < 7:
        if deployment.run(REVIEW_S):
            lengths.append(deployment.replicas[0].trust.until - deployment.now)
            ends.append(deployment.replicas[0].trust.until)
    assert lengths == [10, 20, 40, 80, 160, 160, 160]
    assert all(later - earlier >= length for earlier, later, length in zip(ends, ends[1:], lengths[1:], strict=False))


@pytest.mark.parametrize(
    ("slow", "fast"),
    [
        (Replica(token_s=0.09), Replica()),  # four and a half times
        (Replica(token_s=0.01), Replica(token_s=0.001)),  # ten times, and nobody notices
        (Replica(token_s=0.4, answers=1), Replica()),  # one answer may be slow for reasons of its own
        (Replica(answers=0, asked=5, first_s=0.2), Replica(answers=0, asked=5, first_s=0.01)),
    ],
)
def test_what_is_no_proof(slow: Replica, fast: Replica) -> None:
    assert Deployment(slow, fast, Replica(fast.token_s, fast.answers, fast.first_s, fast.asked)).run(20) == []


def test_a_pause_of_a_second_is_no_proof_however_many_wait_through_it() -> None:
    """A thousand answers that stall for a moment are still one stall."""
    deployment = Deployment(*(Replica(answers=1000) for _ in range(3)))
    deployment.run(6)
    deployment.replicas[1].token_s = 1e9
    assert deployment.run(1) == []
    deployment.replicas[1].token_s = 0.02
    assert deployment.run(10) == []


def test_of_two_the_slower_one_is_put_aside_and_one_alone_never() -> None:
    pair = Deployment(Replica(token_s=0.4), Replica())
    pair.run(8)
    assert pair.out == [0]
    alone = Deployment(Replica(token_s=5.0))
    assert alone.run(60) == []


def test_where_most_are_slow_nobody_is() -> None:
    assert Deployment(Replica(token_s=0.4), Replica(token_s=0.4), Replica()).run(20) == []


def test_no_more_than_half_also_when_others_leave() -> None:
    deployment = Deployment(*(Replica(token_s=0.4) for _ in range(2)), *(Replica() for _ in range(4)))
    deployment.run(8)
    assert deployment.out == [0, 1]
    deployment.replicas = deployment.replicas[:3]  # three of the four that are well are gone
    deployment.run(REVIEW_S)
    assert len(deployment.out) == 1
    deployment.replicas = deployment.replicas[:1]
    deployment.run(REVIEW_S)
    assert deployment.out == []


steps = st.lists(
    st.tuples(
        st.lists(st.sampled_from([0.001, 0.02, 0.09, 0.4, 4.0, 1e6]), min_size=1, max_size=7),
        st.integers(0, 5),
        st.floats(0.1, 30.0),
    ),
    min_size=1,
    max_size=40,
)


@given(steps, st.integers(0, 6))
def test_never_more_than_half_never_the_last_and_only_the_slow(script: list[tuple[list[float], int, float]], asked: int) -> None:
    """Whatever paces come, replicas leave and return, and however irregular the reviews are."""
    everyone = [Replica(asked=asked) for _ in range(7)]
    now = 1000.0
    for paces, answers, later_s in script:
        present = everyone[: len(paces)]
        for replica, token_s in zip(present, paces, strict=True):
            replica.token_s, replica.answers = token_s, answers
            replica.first_s = token_s * 10
            replica.live(later_s)
        now += later_s
        out = review(present, now)
        held = [r for r in present if r.standing is not Standing.FULL]
        assert len(held) <= len(present) // 2
        assert any(r.trust.limit > RULE.trial_requests for r in present)
        for replica in out:
            assert replica.standing is Standing.OUT
            assert now + RULE.out_s <= replica.trust.until <= now + RULE.longest_out_s
        for replica in present:
            limit = {Standing.FULL: float("inf"), Standing.OUT: 0, Standing.TRIAL: RULE.trial_requests}[replica.standing]
            assert replica.trust.limit == limit


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 50), st.floats(0.0, 4.0)), max_size=60))
def test_a_window_holds_what_was_told_and_forgets_it(told: list[tuple[float, int, float]]) -> None:
    pace, now = Pace(), 1000.0
    pace.turn(now)
    log: list[tuple[float, float, int]] = []
    for busy_s, tokens, later_s in told:
        pace.went_on(1, busy_s, tokens)
        log.append((now, busy_s, tokens))
        now += later_s
        pace.turn(now)
        recent = [entry for entry in log if now - entry[0] < WINDOW_S]
        assert sum(t for _, _, t in log) >= pace.tokens
        if later_s < WINDOW_S:
            assert pace.tokens >= sum(t for _, _, t in recent)
    pace.turn(now + 2 * WINDOW_S + 1)
    assert (pace.tokens, pace.busy_s, pace.answers, pace.firsts) == (0, 0.0, 0, [])
