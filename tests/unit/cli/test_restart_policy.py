"""When a process that died is started again. Pure: the clock is an argument."""

from __future__ import annotations

from inference_runtime.cli.processes import RestartPolicy


def test_pauses_double_and_the_fourth_death_within_a_minute_is_the_last() -> None:
    """Three restarts within 60 s, then it is given up."""
    policy = RestartPolicy(limit=3, window_s=60, first_pause_s=0.1)

    assert [policy.pause_s(now) for now in (0.0, 1.0, 2.0, 3.0)] == [0.1, 0.2, 0.4, None]


def test_restarts_are_forgotten_when_the_window_has_passed() -> None:
    """A process that dies once an hour is restarted for ever, without a growing pause."""
    policy = RestartPolicy(limit=3, window_s=60, first_pause_s=0.1)

    assert [policy.pause_s(3600.0 * n) for n in range(10)] == [0.1] * 10


def test_only_the_restarts_within_the_window_count() -> None:
    """The window slides."""
    policy = RestartPolicy(limit=3, window_s=60, first_pause_s=0.1)
    for now in (0.0, 50.0, 55.0):
        policy.pause_s(now)

    assert policy.pause_s(59.0) is None
    assert policy.pause_s(60.0) is not None
