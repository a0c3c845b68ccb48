"""When a session counts as silent (R-03)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.silence import SILENT_SWEEPS, Ear


def test_an_engine_that_answers_no_ping_is_silent_half_a_second_later_and_well_at_its_first_word() -> None:
    ear = Ear()
    assert ear.sweep(expecting=True)
    for _ in range(SILENT_SWEEPS - 1):
        assert not ear.sweep(expecting=True)
        assert not ear.silent
    assert not ear.sweep(expecting=True)
    assert ear.silent
    ear.sweep(expecting=False)
    assert ear.silent  # its requests went elsewhere: that is no sign of life
    ear.heard = True
    ear.sweep(expecting=True)
    assert not ear.silent


def test_nothing_is_asked_of_an_engine_that_has_nothing_to_do() -> None:
    ear = Ear()
    assert not any(ear.sweep(expecting=False) for _ in range(100))
    assert not ear.silent


def test_a_session_that_begins_anew_owes_nothing() -> None:
    ear = Ear()
    for _ in range(SILENT_SWEEPS + 1):
        ear.sweep(expecting=True)
    assert ear.silent
    ear.reset()
    assert not ear.silent
    assert ear.sweep(expecting=True)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=50))
def test_silent_means_asked_and_unanswered_for_long_enough(sweeps: list[tuple[bool, bool]]) -> None:
    """Whatever comes and goes: silent exactly from the second sweep after an unanswered ping, until a word comes."""
    ear, asked_before = Ear(), -1
    for number, (heard, expecting) in enumerate(sweeps):
        if heard:
            ear.heard, asked_before = True, -1
        asked = ear.sweep(expecting=expecting)
        assert asked == (expecting and not heard and asked_before < 0)
        if asked:
            asked_before = number
        assert ear.silent == (asked_before >= 0 and number - asked_before >= SILENT_SWEEPS)
