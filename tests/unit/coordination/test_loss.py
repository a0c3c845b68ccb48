"""The panic rule: which losses are believed, and for how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.coordination.loss import LossGuard, is_crowd


@pytest.mark.parametrize(
    ("lost", "alive", "crowd"),
    [
        (0, 0, False),
        (0, 5, False),
        (1, 0, True),
        (2, 0, True),
        (1, 1, False),
        (2, 2, False),
        (2, 1, False),
        (3, 7, False),
        (3, 6, True),
        (3, 1, True),
        (30, 70, False),
        (31, 69, True),
    ],
)
def test_what_is_a_crowd(lost: int, alive: int, crowd: bool) -> None:
    """E-06: more than 30 % and at least three, or all there were."""
    assert is_crowd(lost, alive) is crowd


def test_one_that_was_alone_may_be_left_out() -> None:
    assert not is_crowd(1, 0, least=2)
    assert is_crowd(2, 0, least=2)


def test_a_crowd_is_believed_in_as_a_whole_and_for_a_while() -> None:
    """Those that were seen to go before it was a crowd, too; and one alarm is enough."""
    guard = LossGuard(window_s=20, freeze_s=60)
    assert not guard.lost(["a"], {"b", "c", "d"}, 100.0)
    assert not guard.believed("a", 100.0, 100.0)
    assert not guard.lost(["b"], {"c", "d"}, 100.5)
    assert guard.lost(["c"], {"d"}, 101.0)
    assert not guard.lost(["d"], set(), 101.0), "said once"

    for engine, at_s in (("a", 100.0), ("b", 100.5), ("c", 101.0), ("d", 101.0)):
        assert guard.believed(engine, at_s, 159.9)
        assert guard.believed_until(engine) == at_s + 60
    assert not guard.believed("a", 100.0, 160.0)
    assert not guard.believed("c", 104.0, 120.0), "removed long after its engine was lost: on purpose"
    assert guard.next_change_s() == 160.0
    guard.calm_down(161.5)
    assert guard.next_change_s() is None


def test_losses_far_apart_are_no_crowd() -> None:
    guard = LossGuard(window_s=20, freeze_s=60)
    for i, engine in enumerate("abc"):
        assert not guard.lost([engine], {"x"}, 100.0 + 21 * i)
        assert guard.believed_until(engine) == 0


def test_who_came_back_does_not_count() -> None:
    guard = LossGuard(window_s=20, freeze_s=60)
    guard.lost(["a", "b"], {"c", "d"}, 100.0)

    assert not guard.lost(["c"], {"a", "b", "d"}, 105.0)


def test_it_can_be_switched_off() -> None:
    guard = LossGuard(window_s=20, freeze_s=0)

    assert not guard.lost(["a", "b", "c"], set(), 100.0)
    assert not guard.believed("a", 100.0, 100.0)


@given(st.lists(st.tuples(st.floats(0, 30), st.sets(st.sampled_from("abcdefgh"), max_size=8)), max_size=12))
def test_nobody_is_believed_in_who_was_not_lost_and_every_belief_ends(steps: list[tuple[float, set[str]]]) -> None:
    guard, now_s, alive, ever = LossGuard(20, 60), 0.0, set("abcdefgh"), set[str]()
    for pause_s, gone in steps:
        now_s += pause_s
        lost = gone & alive
        alive = set("abcdefgh") - gone
        ever |= lost
        if lost:
            guard.lost(lost, alive, now_s)
        believed = {engine for engine in "abcdefgh" if now_s < guard.believed_until(engine)}
        assert believed <= ever
        assert all(guard.believed_until(engine) <= now_s + 60 for engine in believed)
    guard.calm_down(now_s + 61)
    assert guard.next_change_s() is None
