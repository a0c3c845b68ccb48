"""The journal: every token once, in order, whatever arrives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.journal import Journal, Verdict


def test_chunks_in_order_are_new() -> None:
    journal = Journal()
    assert journal.accept_one(0, 0, 7) is Verdict.NEW
    assert journal.accept(0, 1, [8, 9]) is Verdict.NEW
    assert journal.accept(0, 3, [], last=True) is Verdict.NEW
    assert journal.tokens == [7, 8, 9]
    assert journal.ended


def test_a_known_index_is_a_duplicate_and_changes_nothing() -> None:
    journal = Journal()
    journal.accept(0, 0, [1, 2, 3])
    assert journal.accept_one(0, 2, 99) is Verdict.DUPLICATE
    assert journal.accept(0, 1, [98, 97, 96]) is Verdict.DUPLICATE
    assert journal.tokens == [1, 2, 3]


def test_a_skipped_index_is_a_gap() -> None:
    journal = Journal()
    journal.accept_one(0, 0, 1)
    assert journal.accept_one(0, 2, 3) is Verdict.GAP
    assert journal.tokens == [1]


def test_an_old_epoch_is_dropped_even_at_the_right_index() -> None:
    journal = Journal()
    journal.accept_one(0, 0, 1)
    journal.begin_epoch()
    assert journal.accept_one(0, 1, 2) is Verdict.OLD_EPOCH
    assert journal.accept_one(1, 1, 2) is Verdict.NEW


def test_an_epoch_that_was_never_begun_is_a_gap() -> None:
    assert Journal().accept_one(3, 0, 1) is Verdict.GAP


def test_nothing_follows_the_end_of_a_choice() -> None:
    journal = Journal()
    journal.accept(0, 0, [1], last=True)
    assert journal.accept_one(0, 1, 2) is Verdict.DUPLICATE
    assert journal.tokens == [1]


def test_forgetting_starts_over() -> None:
    journal = Journal()
    journal.accept(0, 0, [1, 2])
    journal.forget()
    journal.begin_epoch()
    assert journal.accept_one(1, 0, 9) is Verdict.NEW
    assert journal.tokens == [9]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(1, 3)), max_size=60))
def test_whatever_arrives_what_is_taken_is_the_output_without_holes(arrivals: list[tuple[int, int, int]]) -> None:
    """Chunks of the true output, doubled, reordered, cut and from any epoch: the journal is always a prefix of the output."""
    truth = list(range(100, 120))
    journal = Journal()
    for epoch, index, count in arrivals:
        tokens = truth[index : index + count]
        before = list(journal.tokens)
        verdict = journal.accept_one(epoch, index, tokens[0]) if count == 1 else journal.accept(epoch, index, tokens)
        assert (verdict is Verdict.NEW) == (epoch == 0 and index == len(before))
        assert journal.tokens == (before + tokens if verdict is Verdict.NEW else before)
        assert journal.tokens == truth[: len(journal.tokens)]


@given(st.integers(0, 10), st.integers(0, 10))
def test_after_a_new_epoch_only_the_next_index_goes_on(taken: int, index: int) -> None:
    journal = Journal()
    journal.accept(0, 0, list(range(taken)))
    journal.begin_epoch()
    expected = Verdict.NEW if index == taken else Verdict.DUPLICATE if index < taken else Verdict.GAP
    assert journal.accept_one(1, index, 1) is expected
