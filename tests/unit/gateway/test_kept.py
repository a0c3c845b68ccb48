"""What is kept of a stream for a client that is away: exact where it reaches, refused where it does not, and bounded."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.errors import InferenceError
from inference_runtime.v1 import engine_service_pb2, generation_pb2
from services.gateway.kept import KEPT_BYTES, KeptSink, SkippingSink
from services.gateway.live import LiveRequests
from services.gateway.request import Request
from services.gateway.sink import NOBODY

ChunkDetail = engine_service_pb2.ChunkDetail
END = ChunkDetail(finish_reason=generation_pb2.FINISH_REASON_STOP)


class Shown:
    """A client: the text it was given, by index of the last token, and how often it was told the end."""

    def __init__(self) -> None:
        self.text = ""
        self.ends = 0
        self.errors: list[InferenceError] = []

    def token(self, index: int, token: int, text: str) -> None:
        self.text += text

    def chunk(self, index: int, tokens: Sequence[int], text: str, detail: ChunkDetail | None, done: bool) -> None:
        self.text += text
        self.ends += done

    def fail(self, error: InferenceError) -> None:
        self.errors.append(error)

    def hold(self) -> None: ...

    def release(self) -> None: ...

    def keep_alive(self) -> None: ...

    def resumed(self, count: int) -> None: ...


@pytest.fixture
def request_() -> Request:
    """Any request: only its identity matters here."""
    return Request(object.__new__(LiveRequests), engine_service_pb2.Submission(), NOBODY, shows_at_once=True)


#: An answer as it may come: pieces of one to three tokens.
PIECES = st.lists(st.integers(1, 3), min_size=1, max_size=40)


def play(sink: KeptSink | SkippingSink, pieces: Sequence[int], start: int = 0) -> list[str]:
    """Hand an answer to a sink, its end included. Returns the text after each token."""
    index, said = 0, [""]
    for size in pieces:
        text = "".join(f"{index + k} " for k in range(size))
        said += [said[-1]] * (size - 1) + [said[-1] + text]
        if index >= start:
            if size == 1:
                sink.token(index, 9, text)
            else:
                sink.chunk(index, [9] * size, text, None, False)
        index += size
    sink.chunk(index, (), "", END, True)
    return said


@given(PIECES, st.data())
def test_a_client_gets_exactly_what_is_behind_its_last_event(pieces: list[int], data: st.DataObject) -> None:
    request = Request(object.__new__(LiveRequests), engine_service_pb2.Submission(), NOBODY, shows_at_once=True)
    first, second = Shown(), Shown()
    kept = KeptSink(request, first)
    said = play(kept, pieces)
    ends = [sum(pieces[: n + 1]) - 1 for n in range(len(pieces))]
    index = data.draw(st.sampled_from([-1, *ends]))
    assert kept.covers(index)
    kept.attach(second, index)
    assert said[index + 1] + second.text == first.text == said[-1]
    assert second.ends == 1


def test_in_the_middle_of_a_piece_nothing_is_cut(request_: Request) -> None:
    kept = KeptSink(request_, NOBODY)
    kept.chunk(0, [1, 2, 3], "abc", None, False)
    assert [kept.covers(index) for index in (-2, -1, 0, 1, 2)] == [True, True, False, False, True]


def test_what_is_kept_is_bounded_and_what_is_gone_is_said_to_be(request_: Request) -> None:
    kept = KeptSink(request_, NOBODY)
    for index in range(5000):
        kept.token(index, 1, "x" * 50)
    assert kept.size_bytes <= KEPT_BYTES
    assert 0 < kept.first < 5000
    assert not kept.covers(kept.first - 2)
    assert kept.covers(kept.first - 1)


@given(PIECES, st.data())
def test_what_the_client_has_is_passed_over_and_nothing_else(pieces: list[int], data: st.DataObject) -> None:
    ends = [sum(pieces[: n + 1]) - 1 for n in range(len(pieces))]
    last = data.draw(st.sampled_from(ends))
    shown = Shown()
    skipping = SkippingSink(shown, last)
    said = play(skipping, pieces)
    assert said[last + 1] + shown.text == said[-1]
    assert shown.ends == 1
