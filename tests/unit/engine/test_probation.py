"""Suspects one at a time, and fingerprints of what kills: the pure parts of the quarantine."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_runtime.generation import SamplingParams
from services.engine.probation import CERTAIN_TRIALS_S, CLEARING_OUTPUTS, INCIDENT_S, TRIALS_S, Probation
from services.engine.quarantine import MAX_FINGERPRINTS, QUARANTINE_S, Quarantine, fingerprint


@dataclass(eq=False)
class Sequence:
    """What a worker knows of one."""

    sequence_id: int
    outputs_here: int = 0
    deaths: int = 0
    over: bool = False

    def __repr__(self) -> str:
        return f"<{self.sequence_id}>"


def make(*outputs: int) -> list[Sequence]:
    """Sequences that have made so many outputs, numbered from 1."""
    return [Sequence(i, n) for i, n in enumerate(outputs, 1)]


def clear(probation: Probation[Sequence], sequence: Sequence) -> None:
    """Let it make the outputs that it needs."""
    for _ in range(CLEARING_OUTPUTS):
        assert probation.current is sequence
        probation.count(sequence)
    assert probation.current is None


def test_what_had_just_been_read_is_tried_first_and_those_that_are_cleared_go_on() -> None:
    """The newest before the others; nobody has to leave again."""
    old, older, new, newer = sequences = make(50, 70, 0, 1)
    probation: Probation[Sequence] = Probation()
    assert probation.blame(sequences, 0.0) is None
    order = []
    while probation.active:
        (suspect,) = probation.board(0.0)
        order.append(suspect)
        clear(probation, suspect)
    assert order == [newer, new, older, old]
    assert probation.board(0.0) == []
    assert not probation.watches


def test_a_death_with_one_suspect_on_board_names_it_and_nobody_else_is_held_up() -> None:
    """It explains the first death too: only what had just been read is still tried."""
    old, new, newer = sequences = make(50, 0, 0)
    probation: Probation[Sequence] = Probation()
    probation.blame(sequences, 0.0)
    assert probation.board(0.0) == [newer]
    assert probation.blame([newer], 0.1) is newer
    assert probation.board(0.2) == [old, new]
    assert probation.current is new
    clear(probation, new)
    assert not probation.active


def test_the_clear_ones_that_are_present_at_the_death_of_a_suspect_are_not_blamed() -> None:
    """They were not even suspects."""
    running, suspect = make(50, 0)
    probation: Probation[Sequence] = Probation()
    probation.hold((), (suspect,), 100.0)
    assert probation.board(100.0) == [suspect]
    assert probation.blame([running, suspect], 100.1) is suspect
    assert probation.board(100.2) == [running]
    assert not probation.active


def test_a_sequence_that_is_alone_at_two_deaths_is_the_cause_though_it_was_cleared() -> None:
    """Nothing else was there."""
    (alone,) = make(0)
    probation: Probation[Sequence] = Probation()
    assert probation.blame([alone], 0.0) is None
    assert probation.board(0.0) == [alone]
    clear(probation, alone)
    assert probation.blame([alone], 1.0, again=True) is alone


def test_after_the_time_for_trials_all_others_go_on_together() -> None:
    """The one that is being tried stays on board, and a suspect."""
    a, b, c = sequences = make(5, 5, 5)
    probation: Probation[Sequence] = Probation()
    probation.blame(sequences, 0.0)
    assert probation.board(10.0) == [c]  # the clock starts with the context
    assert probation.left_s(10.0) == TRIALS_S
    assert probation.board(10.0 + TRIALS_S / 2) == []
    assert probation.board(10.0 + TRIALS_S) == [b, a]
    assert not probation.active
    assert probation.watches


def test_a_death_with_several_suspects_has_them_tried_for_certain() -> None:
    """One death more finds a killer that the first trials did not reach."""
    a, b, c, clean = sequences = make(5, 5, 5, 5)
    probation: Probation[Sequence] = Probation()
    probation.blame(sequences[:3], 0.0)
    probation.board(0.0)
    probation.board(TRIALS_S)
    assert probation.blame([a, b, c, clean], 1.0) is None
    assert probation.board(1.0) == [clean, c]
    assert probation.left_s(1.0) == CERTAIN_TRIALS_S
    clear(probation, c)
    assert probation.board(5.0) == [b]
    assert probation.blame([clean, c, b], 5.0) is b
    assert probation.board(5.1) == [clean, c, a]
    assert not probation.active


def test_a_rebuild_by_hand_makes_nobody_a_suspect_and_interrupts_a_trial() -> None:
    """Only faults are held against a sequence."""
    probation: Probation[Sequence] = Probation()
    pair = make(3, 3)
    probation.suspend(pair, 0.0)
    assert not probation.active
    assert probation.board(0.0) == pair
    probation.blame(pair, 0.0)
    (tried,) = probation.board(0.0)
    probation.suspend([tried], 0.1)
    assert probation.active
    assert probation.board(0.2) == [tried]


def test_suspects_that_come_one_after_the_other_share_the_time_of_one_incident() -> None:
    """A hundred that were moved together do not hold up others a hundred times."""
    probation: Probation[Sequence] = Probation()
    now, tried = 100.0, 0
    for suspect in make(*[0] * 100):
        probation.hold((), (suspect,), now)
        assert probation.board(now) == [suspect]
        if probation.active:
            tried += 1
            now += 0.05
            clear(probation, suspect)
            probation.board(now)
    assert tried * 0.05 == pytest.approx(TRIALS_S, abs=0.06)
    (later,) = make(0)
    probation.hold((), (later,), now + INCIDENT_S)
    assert probation.board(now + INCIDENT_S) == [later]
    assert probation.current is later


def test_who_leaves_while_waiting_does_not_come_back() -> None:
    """Cancelled and timed out ones."""
    probation: Probation[Sequence] = Probation()
    a, b, c, d = sequences = make(5, 5, 5, 5)
    probation.blame(sequences, 0.0)
    assert probation.board(0.0) == [d]
    assert not probation.drop(b)
    assert not probation.drop(b)
    assert probation.drop(d)
    assert probation.empty() == [c, a]
    assert not probation.active


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30),
    st.integers(-1, 29),
    st.floats(0.001, 0.2),
    st.integers(0, 2**32),
)
def test_one_killer_costs_two_deaths_and_never_more_than_three_and_no_innocent(
    outputs: list[int], killer_at: int, step_s: float, seed: int
) -> None:
    """PP-1, as a machine: a context that dies of its killer in each step. Two deaths when it had just been read, or when all can
    be tried in time; else three. Innocents end, and none of them waits for more than the time for trials at once."""
    rng = random.Random(seed)
    everybody = [Sequence(i, n) for i, n in enumerate(outputs)]
    killer = everybody[killer_at] if 0 <= killer_at < len(everybody) else None
    fresh = killer is not None and killer.outputs_here < CLEARING_OUTPUTS
    others_fresh = sum(s.outputs_here < CLEARING_OUTPUTS for s in everybody)
    probation: Probation[Sequence] = Probation()
    aboard, found, now = list(everybody), False, 0.0
    total_deaths = certain = 0
    silent = dict.fromkeys(everybody, 0.0)
    for _ in range(5000):
        if all(s.over or s is killer for s in everybody) and (found or killer is None):
            break
        if killer in aboard or total_deaths == 0:
            total_deaths += 1
            again = len(aboard) == 1 and aboard[0].deaths > 0
            suspects = len(aboard) > 1 and killer is not None and total_deaths > 1 and not probation.active
            certain += suspects
            blamed = probation.blame(aboard, now, again=again)
            for s in aboard:
                s.deaths += 1
            if blamed is not None:
                assert blamed is killer
                found = True
            aboard = []
        if not probation.active or probation.current is None or probation.left_s(now) <= 0:
            for s in probation.board(now):
                s.outputs_here = 0
                aboard.append(s)
        now += step_s
        for s in everybody:
            silent[s] += step_s
        if killer in aboard:
            continue
        for s in list(aboard):
            probation.count(s)
            s.outputs_here += 1
            assert certain or silent[s] <= TRIALS_S + 3 * step_s + 1e-6
            silent[s] = 0.0
            if s is not killer and rng.random() < 0.1:
                s.over = True
                aboard.remove(s)
                probation.drop(s)
    assert all(s.over for s in everybody if s is not killer)
    if killer is None:
        assert total_deaths == 1
        return
    assert found
    assert total_deaths <= 3
    trials = others_fresh if fresh else len(everybody)
    if trials * (CLEARING_OUTPUTS + 1) * step_s < TRIALS_S:
        assert total_deaths == 2


def test_a_fingerprint_is_kept_for_its_time_and_no_longer() -> None:
    """Ten minutes, counted from the last death."""
    quarantine = Quarantine()
    assert not quarantine
    quarantine.add(b"a", 0.0)
    quarantine.add(b"b", 10.0)
    quarantine.add(b"a", 20.0)
    assert quarantine.left_s(b"a", 20.0) == QUARANTINE_S
    assert quarantine.left_s(b"c", 20.0) == 0.0
    assert quarantine.left_s(b"b", QUARANTINE_S + 10.0) == 0.0
    assert quarantine.left_s(b"a", QUARANTINE_S + 19.0) == pytest.approx(1.0)
    assert quarantine.left_s(b"a", QUARANTINE_S + 20.0) == 0.0
    assert not quarantine


def test_fingerprints_are_bounded_and_the_oldest_goes() -> None:
    """A flood of killers must not fill the memory."""
    quarantine = Quarantine()
    for i in range(2 * MAX_FINGERPRINTS):
        quarantine.add(f"{i}".encode(), float(i) / 1000)
    assert len(quarantine) == MAX_FINGERPRINTS
    assert quarantine.left_s(b"0", 3.0) == 0.0
    assert quarantine.left_s(f"{2 * MAX_FINGERPRINTS - 1}".encode(), 3.0) > 0


def test_a_fingerprint_sees_what_a_device_sees() -> None:
    """Revision, prompt and kernels make another request; seed, limits and stop strings do not."""
    sampling = SamplingParams(max_tokens=10, temperature=0.7, seed=1)
    same = fingerprint("rev", [1, 2, 300_000], sampling)
    assert same == fingerprint("rev", (1, 2, 300_000), replace(sampling, seed=2, max_tokens=99, stop=("x",), temperature=0.9))
    others = [
        fingerprint("rev2", [1, 2, 300_000], sampling),
        fingerprint("rev", [1, 2, 300_001], sampling),
        fingerprint("rev", [1, 2], sampling),
        *(
            fingerprint("rev", [1, 2, 300_000], replace(sampling, **change))
            for change in (
                {"temperature": 0.0},
                {"top_p": 0.5},
                {"top_k": 5},
                {"min_p": 0.1},
                {"presence_penalty": 1.0},
                {"repetition_penalty": 1.1},
                {"top_logprobs": 2},
                {"logit_bias": {5: 1.0}},
            )
        ),
    ]
    assert len({same, *others}) == 12
