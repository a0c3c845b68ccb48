"""Suspects one by one, and fingerprints of what kills: the pure parts of the quarantine."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.generation import SamplingParams
from services.engine.probation import CLEARING_OUTPUTS, Probation
from services.engine.quarantine import MAX_FINGERPRINTS, QUARANTINE_S, Quarantine, fingerprint


@dataclass(eq=False)
class Sequence:
    """What a worker knows of one."""

    sequence_id: int
    outputs: int = 0
    over: bool = False
    history: list[str] = field(default_factory=list)


def clear_all(probation: Probation[Sequence], aboard: list[Sequence]) -> list[list[int]]:
    """Let every suspect be cleared. Returns who was on the context after each change."""
    seen = [[s.sequence_id for s in aboard]]
    while probation.current is not None:
        for _ in range(CLEARING_OUTPUTS - 1):
            assert not probation.clears(probation.current)
        assert probation.clears(probation.current)
        leaves = probation.clear()
        if leaves is not None:
            aboard.remove(leaves)
        aboard += probation.board()
        seen.append(sorted(s.sequence_id for s in aboard))
    return seen


def test_suspects_run_alone_the_newest_first_and_together_once_all_are_cleared() -> None:
    """Nobody else is on the context meanwhile."""
    probation: Probation[Sequence] = Probation()
    probation.suspect([Sequence(1), Sequence(2), Sequence(3)])
    assert probation.active

    assert clear_all(probation, probation.board()) == [[3], [2], [1], [1, 2, 3]]
    assert not probation.active


def test_a_death_during_the_trials_leaves_the_others_where_they_were() -> None:
    """Cleared ones stay cleared, untried ones are tried."""
    probation: Probation[Sequence] = Probation()
    first, second, third = (Sequence(i) for i in (1, 2, 3))
    probation.suspect([first, second, third])
    assert probation.board() == [third]
    probation.clears(third)
    probation.clears(third)
    assert probation.clear() is third
    assert probation.board() == [second]
    probation.suspect([])  # it killed the context, alone: the worker keeps it

    assert clear_all(probation, probation.board()) == [[1], [1, 3]]


def test_a_rebuild_by_hand_makes_nobody_a_suspect_and_interrupts_a_trial() -> None:
    """Only faults are held against a sequence."""
    probation: Probation[Sequence] = Probation()
    pair = [Sequence(1), Sequence(2)]
    probation.suspend(pair)
    assert not probation.active
    assert probation.board() == pair
    probation.suspect(pair)
    (tried,) = probation.board()
    probation.suspend([tried])
    assert probation.active
    assert probation.board() == [tried]


def test_who_leaves_while_waiting_does_not_come_back() -> None:
    """Cancelled and timed out ones."""
    probation: Probation[Sequence] = Probation()
    sequences = [Sequence(i) for i in range(4)]
    probation.suspect(sequences)
    assert probation.board() == [sequences[3]]
    probation.drop(sequences[1])
    probation.drop(sequences[1])
    assert probation.empty() == [sequences[2], sequences[0]]
    assert not probation.active


@given(st.integers(1, 12), st.sets(st.integers(0, 11), max_size=4), st.integers(0, 2**32))
def test_killers_are_found_with_one_death_each_and_nobody_else_is_lost(count: int, killers: set[int], seed: int) -> None:
    """A context that dies of every killer on it: all innocents end, each killer ends alone."""
    rng = random.Random(seed)
    probation: Probation[Sequence] = Probation()
    everybody = [Sequence(i) for i in range(count)]
    aboard, deaths, quarantined = list(everybody), 0, set()
    for _ in range(10_000):
        if not aboard and not probation.active:
            break
        if any(s.sequence_id in killers for s in aboard):
            deaths += 1
            alone = probation.current
            if alone is not None:
                assert aboard == [alone]
                quarantined.add(alone.sequence_id)
                aboard = []
            probation.suspect(aboard)
            aboard = probation.board()
            continue
        assert probation.current is None or aboard == [probation.current]
        current = probation.current
        for s in list(aboard):
            s.outputs += 1
            if rng.random() < 0.3:
                s.over = True
                aboard.remove(s)
        if current is not None:
            if current.over:
                aboard = probation.board()
            elif probation.clears(current):
                leaves = probation.clear()
                if leaves is not None:
                    aboard.remove(leaves)
                aboard += probation.board()
    present = {k for k in killers if k < count}
    assert quarantined == present
    assert deaths == (len(present) + 1 if present else 0)
    assert all(s.over for s in everybody if s.sequence_id not in present)


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
