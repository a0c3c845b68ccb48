"""The history checker must find what it claims to find: each kind of fault is put in and must come out, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.testing.history import History, HistoryError, Stream
from inference_runtime.testing.scripted import expected_text, expected_tokens, user_says

TOKENS = expected_tokens(user_says("hello"), 7, 0, 64)
TEXT = expected_text(user_says("hello"), 7, 0, 64)


def begun(history: History | None = None) -> Stream:
    """A stream whose truth is TOKENS."""
    return (history or History()).begin("hello", seed=7, tokens=64, name="s")


def kinds_after(tokens: list[int], finish: Callable[[Stream], None] = Stream.end) -> list[tuple[str, int]]:
    """What the checker says of a stream that received these tokens."""
    history = History()
    stream = begun(history)
    stream.chunk(0, tokens)
    finish(stream)
    return [(f.kind, f.position) for f in history.findings()]


def test_a_whole_answer_has_no_fault() -> None:
    """Tokens with their places, and text cut anywhere, both pass."""
    history = History()
    by_token, by_text = begun(history), begun(history)
    for index in range(0, 64, 5):
        by_token.chunk(index, TOKENS[index : index + 5])
    for start in range(0, len(TEXT), 7):
        by_text.text(TEXT[start : start + 7])
    by_token.end()
    by_text.end()

    history.check()


def test_faults_are_named_with_their_kind_and_place() -> None:
    """Lost, doubled, reordered, foreign."""
    swapped = [*TOKENS[:10], TOKENS[11], TOKENS[10], *TOKENS[12:]]

    assert kinds_after([*TOKENS[:10], *TOKENS[11:]]) == [("lost", 10)]
    assert kinds_after(TOKENS[:-2]) == [("lost", 62), ("lost", 63)]
    assert kinds_after([*TOKENS[:10], TOKENS[9], *TOKENS[10:]]) in ([("doubled", 10)], [("doubled", 9)])
    assert {kind for kind, _ in kinds_after(swapped)} == {"reordered"}
    assert kinds_after([*TOKENS[:10], 5, *TOKENS[10:]]) == [("foreign", 10)]


def test_a_replayed_answer_is_doubled_from_its_first_token() -> None:
    """Trap 16: a retry that replays the request into the same stream."""
    found = kinds_after([*TOKENS[:20], *TOKENS])

    assert {kind for kind, _ in found} == {"doubled"}
    assert len(found) == 20


def test_an_honest_error_excuses_what_is_missing_and_nothing_else() -> None:
    """A typed error may cut an answer; what came before it must be right."""

    def fail(stream: Stream) -> None:
        stream.fail("ENGINE_LOST")

    assert kinds_after(TOKENS[:20], fail) == []
    assert kinds_after([*TOKENS[:20], 5], fail) == [("foreign", 20)]
    assert {kind for kind, _ in kinds_after([*TOKENS[:10], *TOKENS[11:20]], fail)} >= {"lost"}


def test_an_answer_that_just_stops_is_cut() -> None:
    """Neither an end nor an error: the client waits for ever."""
    assert kinds_after(TOKENS[:20], lambda stream: None) == [("cut", 20)]


def test_a_chunk_with_a_wrong_place_is_misplaced() -> None:
    """The tokens are right and the index lies."""
    history = History()
    stream = begun(history)
    stream.chunk(0, TOKENS[:10])
    stream.chunk(11, TOKENS[10:])
    stream.end()

    assert [f.kind for f in history.findings()] == ["misplaced"]


def test_tokens_of_another_answer_are_traced_to_it() -> None:
    """Mixed-up streams: the finding says whose token it may be."""
    history = History()
    mine, other = begun(history), history.begin("other", seed=1, tokens=64, name="theirs")
    theirs = other.expected()
    mine.chunk(0, [*TOKENS[:5], theirs[5], *TOKENS[6:]])
    other.chunk(0, theirs)
    mine.end()
    other.end()

    found = history.findings()
    assert sorted(f.kind for f in found) == ["foreign", "lost"]
    assert any("theirs" in f.detail for f in found)


def test_text_that_is_no_word_is_foreign() -> None:
    """An error message that leaks into an answer is seen."""
    history = History()
    stream = begun(history)
    stream.text(TEXT + "oops")
    stream.end()

    assert [f.kind for f in history.findings()] == ["foreign"]


def test_an_empty_history_does_not_pass() -> None:
    """Nothing recorded proves nothing."""
    with pytest.raises(HistoryError, match="empty"):
        History().check()


@given(st.lists(st.integers(0, 63), unique=True, max_size=8))
def test_whatever_is_taken_out_is_found(places: list[int]) -> None:
    """For any set of lost tokens, each is found (a value that occurs twice may be blamed at either place)."""
    kept = [token for place, token in enumerate(TOKENS) if place not in places]

    assert len([kind for kind, _ in kinds_after(kept) if kind == "lost"]) == len(places)


@given(st.lists(st.integers(0, 64), min_size=1, max_size=8))
def test_whatever_is_put_in_is_found(places: list[int]) -> None:
    """For any foreign tokens at any place, each is found."""
    tokens = list(TOKENS)
    for place in sorted(places, reverse=True):
        tokens.insert(place, 5)

    assert [kind for kind, _ in kinds_after(tokens)] == ["foreign"] * len(places)
