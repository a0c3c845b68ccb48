"""Text assembly is a pure function of the token sequence: nothing lost, nothing early, stop strings never shown (S05, P07)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.text import TextAssembler


class Bytes:
    """Tokens that stand for arbitrary bytes: token i is the i-th entry."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id]


def pieces(tokens: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[list[str], TextAssembler]:
    """What comes out for each token, and at the end."""
    assembler = TextAssembler(Bytes(tokens), stop)
    out = [assembler.feed(i) for i in range(len(tokens))]
    return [*out, assembler.finish()], assembler


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """`data` in pieces, cut at these places."""
    edges = sorted({0, len(data), *(p % (len(data) + 1) for p in places)})
    return [data[a:b] for a, b in pairwise(edges)]


def first_stop(text: str, stops: Sequence[str]) -> tuple[str, str]:
    """The text before the stop string that is complete first (the longer one of two), and that stop string. By brute force."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, ""


TEXTS = st.text(alphabet="ab é€😀\n", max_size=30)
STOPS = st.lists(st.text(alphabet="ab é€😀", min_size=1, max_size=5), max_size=4)
CUTS = st.lists(st.integers(0, 200), max_size=30)


@given(TEXTS, CUTS)
def test_any_split_of_the_bytes_gives_the_same_text(text: str, places: list[int]) -> None:
    """Characters cut in two come out whole."""
    out, _ = pieces(cut(text.encode(), places))
    assert "".join(out) == text


@given(st.binary(max_size=30), CUTS)
def test_any_split_of_invalid_bytes_gives_the_text_of_the_whole(data: bytes, places: list[int]) -> None:
    """U+FFFD appears exactly where decoding everything at once puts it."""
    out, _ = pieces(cut(data, places))
    assert "".join(out) == data.decode("utf-8", "replace")


@given(st.binary(max_size=20), st.binary(max_size=8), CUTS)
def test_text_that_came_out_never_changes(data: bytes, more: bytes, places: list[int]) -> None:
    """What is shown after some tokens is the beginning of what is shown after more: nothing comes out before it is certain."""
    tokens = cut(data, places)
    shown = "".join(pieces(tokens)[0][:-1])
    longer = "".join(pieces([*tokens, more])[0])
    assert longer.startswith(shown)


@given(TEXTS, STOPS, CUTS)
def test_any_split_stops_at_the_same_place(text: str, stops: list[str], places: list[int]) -> None:
    """Stop strings across tokens, inside characters' bytes, overlapping each other: as if the whole text had been searched."""
    out, assembler = pieces(cut(text.encode(), places), stops)
    before, stop = first_stop(text, stops)
    assert "".join(out) == before
    assert assembler.stop_sequence == stop


@given(TEXTS, STOPS, CUTS)
def test_no_part_of_a_stop_string_is_shown_early(text: str, stops: list[str], places: list[int]) -> None:
    """At every moment, what was shown is a beginning of the final text."""
    out, _ = pieces(cut(text.encode(), places), stops)
    final, shown = first_stop(text, stops)[0], ""
    for piece in out:
        shown += piece
        assert final.startswith(shown)


@given(TEXTS, STOPS, CUTS, st.integers(0, 40))
def test_a_replayed_prefix_goes_on_as_the_original(text: str, stops: list[str], places: list[int], at: int) -> None:
    """Another replica that replays the first tokens produces exactly the pieces that were still to come."""
    tokens = cut(text.encode(), places)
    at = min(at, len(tokens))
    original, first = pieces(tokens, stops)
    second = TextAssembler(Bytes(tokens), stops)
    second.replay(range(at))
    assert [second.feed(i) for i in range(at, len(tokens))] + [second.finish()] == original[at:]
    assert (second.stop_sequence, second.tokens) == (first.stop_sequence, first.tokens)


@given(st.binary(max_size=30), STOPS, CUTS, st.integers(0, 40))
def test_feeding_several_tokens_at_once_is_feeding_each(data: bytes, stops: list[str], places: list[int], at: int) -> None:
    """A step of several tokens, a replay, and single steps: the same text, the same count."""
    tokens = cut(data, places)
    at = min(at, len(tokens))
    single, first = pieces(tokens, stops)
    second = TextAssembler(Bytes(tokens), stops)
    before, used_before = second.feed_all(range(at))
    after, used_after = second.feed_all(range(at, len(tokens)))
    assert before + after + second.finish() == "".join(single)
    assert used_before + used_after == second.tokens == first.tokens
    assert second.stop_sequence == first.stop_sequence


@given(TEXTS, STOPS, CUTS)
def test_tokens_counts_to_the_one_that_completed_the_stop_string(text: str, stops: list[str], places: list[int]) -> None:
    """Tokens after it do not count."""
    tokens = cut(text.encode(), places)
    _, assembler = pieces(tokens, stops)
    if not assembler.stopped:
        assert assembler.tokens == len(tokens)
        return
    needed = next(n for n in range(len(tokens) + 1) if first_stop(b"".join(tokens[:n]).decode("utf-8", "ignore"), stops)[1])
    assert assembler.tokens == needed


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        ([b"\xe2", b"\x82", b"\xac"], (), ["", "", "€", ""]),
        ([b"\xe2", b"\x82"], (), ["", "", "\ufffd"]),
        ([b"\xe2", b"a"], (), ["", "\ufffda", ""]),
        ([b"\xff", b"a"], (), ["\ufffd", "a", ""]),
        ([b"a ST", b"O", b"P b"], ("STOP",), ["a ", "", "", ""]),
        ([b"a ST", b"O", b"X"], ("STOP",), ["a ", "", "STOX", ""]),
        ([b"a ST"], ("STOP",), ["a ", "ST"]),
        ([b"x\xe2\x82", b"\xacy"], ("€y",), ["x", "", ""]),
        ([b"aab"], ("aab", "ab"), ["", ""]),
        ([b"aa", b"ab"], ("ab",), ["a", "a", ""]),
        ([b"", b"a", b""], (), ["", "a", "", ""]),
    ],
)
def test_pieces(tokens: list[bytes], stop: tuple[str, ...], expected: list[str]) -> None:
    """What comes out with each token."""
    assert pieces(tokens, stop)[0] == expected
