"""Ids of events: they come back as they went out, and nothing else is taken."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.errors import BadRequest
from services.gateway.position import MAX_TAIL, Position, Seen, parse_position, place

REQUEST = "0123456789abcdef0123456789abcdef"
TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200)


@given(TOKENS, st.data())
def test_an_id_says_how_much_was_shown_and_carries_the_tokens_that_no_other_gateway_has(
    tokens: list[int], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(tokens) - 1))
    copied = data.draw(st.integers(0, len(tokens)))
    position = parse_position(f"{REQUEST}:".encode() + place(copied, tokens, index))
    missing = tuple(tokens[copied : index + 1])
    assert position == Position(REQUEST, index, Seen.TOKENS, missing if len(missing) <= MAX_TAIL else ())


def test_an_id_never_grows_beyond_a_header_that_every_proxy_takes() -> None:
    longest = place(0, [2**32 - 1] * MAX_TAIL, MAX_TAIL - 1)
    assert len(longest) < 1024
    assert parse_position(f"{REQUEST}:".encode() + longest).tail == (2**32 - 1,) * MAX_TAIL


@pytest.mark.parametrize(
    ("text", "position"),
    [
        (REQUEST, Position(REQUEST, -2)),
        (f"{REQUEST}:-1", Position(REQUEST, -1)),
        (f"{REQUEST}:0", Position(REQUEST, 0)),
        (f" {REQUEST}:7 ", Position(REQUEST, 7)),
        (f"{REQUEST}:7:last", Position(REQUEST, 7, Seen.LAST)),
        (f"{REQUEST}:7:end", Position(REQUEST, 7, Seen.END)),
        (f"{REQUEST}:-1:done", Position(REQUEST, -1, Seen.DONE)),
    ],
)
def test_every_place_has_an_id(text: str, position: Position) -> None:
    assert parse_position(text.encode()) == position


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"7",
        b"0123456789ABCDEF0123456789ABCDEF:1",
        f"{REQUEST}:".encode(),
        f"{REQUEST}:-2".encode(),
        f"{REQUEST}:01".encode(),
        f"{REQUEST}:1e3".encode(),
        f"{REQUEST}:9999999999".encode(),
        f"{REQUEST}:1:over".encode(),
        f"{REQUEST}:1:[".encode(),
        f"{REQUEST}:1:[]".encode(),
        f"{REQUEST}:1:[,]".encode(),
        f"{REQUEST}:1:[1,2,3]".encode(),
        f"{REQUEST}:1:[4294967296]".encode(),
        f"{REQUEST}:1:[99999999999999999999999]".encode(),
        f"{REQUEST}:900:[{','.join(['1'] * (MAX_TAIL + 1))}]".encode(),
        f"{REQUEST}:1\r\nx: y".encode(),
        b"\xff" * 40,
    ],
)
def test_what_is_no_id_of_ours_is_refused_by_name(text: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_position(text)
    assert refused.value.metadata["code"] == "invalid_event_id"


@given(st.binary(max_size=200))
def test_no_bytes_at_all_do_anything_but_parse_or_be_refused(text: bytes) -> None:
    with contextlib.suppress(BadRequest):
        parse_position(f"{REQUEST}:".encode() + text)
