"""Signs of life of a replica, and what its memory has shown to be too much: pure, with a clock of the test's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.engine.admission import WATERMARK_S, Watermark
from services.engine.vitals import FAILING_S, FIRST_REST_S, FORGET_S, LEAST_FAILURES, LONGEST_REST_S, SILENCE_STEPS, Vitals

READY_S = 5.0


def failing(vitals: Vitals, begin_s: float) -> float:
    """Let it fail until it counts; returns when."""
    now = begin_s
    while not vitals.judge(now):
        vitals.moved(now)
        vitals.failed(now)
        now += 1.0
        assert now < begin_s + 2 * FAILING_S
    return now


def test_silence_is_judged_by_the_last_sign_of_life() -> None:
    """Five seconds by default, and no less."""
    vitals = Vitals(READY_S, 100.0)
    assert vitals.judge(100.0 + READY_S) == ""
    assert "no step" in vitals.judge(100.1 + READY_S)
    vitals.moved(106.0)
    assert vitals.judge(106.0 + READY_S) == ""


def test_a_slow_model_is_not_silent_between_its_steps() -> None:
    """Steps of three seconds are expected to take longer some time."""
    vitals = Vitals(READY_S, 0.0)
    vitals.step(3.0)
    vitals.moved(10.0)
    assert vitals.judge(10.0 + SILENCE_STEPS * 3.0) == ""
    assert vitals.judge(10.1 + SILENCE_STEPS * 3.0) != ""


def test_failures_count_when_they_are_many_and_nothing_else_for_long() -> None:
    """A burst is no proof, and neither is a failure now and then."""
    vitals = Vitals(READY_S, 0.0)
    for _ in range(50):
        vitals.failed(1.0)
    assert vitals.judge(1.0) == ""
    vitals = Vitals(READY_S, 0.0)
    for i in range(LEAST_FAILURES - 1):
        vitals.failed(i * 2 * FAILING_S)
        vitals.moved(i * 2 * FAILING_S)
    assert vitals.judge(2 * FAILING_S) == ""
    vitals.failed(3 * FORGET_S)
    vitals.moved(3 * FORGET_S)
    assert vitals.judge(3 * FORGET_S) == ""


def test_one_request_that_ends_well_makes_it_ready() -> None:
    """At once."""
    vitals = Vitals(READY_S, 0.0)
    now = failing(vitals, 0.0)
    vitals.succeeded()
    assert vitals.judge(now) == ""


def test_one_that_only_failed_rests_longer_each_time_before_its_canary_is_believed() -> None:
    """Else it would be ready for five seconds, and fail everybody, again and again."""
    vitals = Vitals(READY_S, 0.0)
    now, rests = 0.0, []
    for _ in range(6):
        now = began = failing(vitals, now)
        while vitals.judge(now):
            now += 0.5
            vitals.canary_lived(now)
        rests.append(now - began)
    assert rests == [min(FIRST_REST_S * 2**i, LONGEST_REST_S) for i in range(6)]


def test_another_context_begins_with_a_clean_slate() -> None:
    """What the last one did says nothing about it."""
    vitals = Vitals(READY_S, 0.0)
    now = failing(vitals, 0.0)
    vitals.reset(now)
    assert vitals.judge(now) == ""


@given(st.lists(st.tuples(st.sampled_from("mfsl"), st.floats(0.0, 3.0)), max_size=60))
def test_a_replica_that_moves_and_ends_requests_well_is_ready_whatever_else_happens(events: list[tuple[str, float]]) -> None:
    """Health never lies in the other direction."""
    vitals, now = Vitals(READY_S, 0.0), 0.0
    for kind, pause_s in events:
        now += pause_s
        if kind == "f":
            vitals.failed(now)
        elif kind == "l":
            vitals.canary_lived(now)
        elif kind == "m":
            vitals.moved(now)
        else:
            vitals.succeeded()
            vitals.moved(now)
            assert vitals.judge(now) == ""


def test_fewer_run_for_a_while_after_the_memory_was_too_small() -> None:
    """Nine tenths of what did not fit, never less than one, and as deployed again after a minute."""
    mark = Watermark()
    assert mark.limit(32, 0.0) == 32
    mark.lower(20, 10.0)
    assert mark.limit(32, 10.0) == 18
    assert mark.limit(4, 10.0) == 4
    mark.lower(1, 20.0)
    assert mark.limit(32, 20.0 + WATERMARK_S - 0.1) == 1
    assert mark.limit(32, 20.0 + WATERMARK_S) == 32
