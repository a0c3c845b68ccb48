"""M-05: who of those that should speak with a coordinator does."""

from __future__ import annotations

import pytest

from services.coordinator.attendance import Attendance


@pytest.mark.parametrize(
    ("silent", "engines", "lacks"), [(0, 0, False), (0, 3, False), (1, 2, False), (2, 3, True), (1, 1, True)]
)
def test_more_than_half_of_the_engines_have_to_be_silent(silent: int, engines: int, lacks: bool) -> None:
    attendance = Attendance(silence_s=10)
    names = [f"e{i}" for i in range(engines)]
    assert attendance.look(names, 0.0) == (0, {})
    for name in names[silent:]:
        attendance.heard(name, 5.0)

    found, said = attendance.look(names, 10.1)

    assert found == silent
    assert ("engines_silent" in said) is lacks


def test_an_engine_gets_its_time_from_when_it_was_first_seen() -> None:
    attendance = Attendance(silence_s=10)
    attendance.look(["a"], 0.0)

    assert attendance.look(["b"], 9.0)[0] == 0
    assert attendance.look(["b"], 18.9)[0] == 0
    assert attendance.look(["b"], 19.1)[0] == 1


def test_an_engine_that_was_away_begins_anew() -> None:
    attendance = Attendance(silence_s=10)
    attendance.look(["a"], 0.0)
    attendance.look([], 5.0)

    assert attendance.look(["a"], 20.0)[0] == 0


def test_gateways_are_missed_only_where_there_were_some() -> None:
    attendance = Attendance(silence_s=10)
    assert attendance.look([], 100.0) == (0, {})
    attendance.gateways(1, 100.0)
    attendance.gateways(2, 101.0)
    attendance.gateways(1, 102.0)
    assert attendance.look([], 200.0) == (0, {})
    attendance.gateways(0, 200.0)
    assert attendance.look([], 210.0) == (0, {})
    assert "2 did" in attendance.look([], 210.1)[1]["no_gateways"]
    attendance.gateways(1, 211.0)
    assert attendance.look([], 300.0) == (0, {})
