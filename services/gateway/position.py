"""Ids of a stream's events: which stream, and how much of it has been shown. Pure.

    <request id>:<index>            shown up to the token of this index; -1: nothing but the opening
    <request id>:<index>:[9,4]      … and these are the last of those tokens
    <request id>:<index>:last       all text was shown, its end was not
    <request id>:<index>:end        the reason of the end was shown as well
    <request id>:<index>:done       … and everything else

An id carries the tokens that no other gateway is known to have yet. So the client itself brings them back, and a gateway that has
the older ones knows every token that was shown, whatever its runtime would have drawn again.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

import msgspec

from inference_runtime.errors import BadRequest

__all__ = ["MAX_TAIL", "Position", "Seen", "parse_position", "place"]

#: Tokens that an id carries at most: a second of a fast stream. With more on the way it carries none.
MAX_TAIL = 64

_ID = re.compile(
    rb"(?P<request>[0-9a-f]{32})(?::(?P<index>-1|0|[1-9][0-9]{0,8})(?::(?:(?P<seen>last|end|done)|(?P<tail>\[[0-9,]{1,704}\])))?)?"
)
_encode = msgspec.json.encode
_tail_decoder = msgspec.json.Decoder(list[int])


class Seen(enum.Enum):
    """How far a client is, besides the tokens."""

    TOKENS = b""  #: somewhere in the text
    LAST = b"last"  #: all of the text
    END = b"end"  #: and why it ended
    DONE = b"done"  #: and the counts


_SEEN = {seen.value: seen for seen in Seen}


@dataclass(frozen=True, slots=True)
class Position:
    """How much of a stream a client has."""

    request_id: str
    index: int = -2  #: last token whose text it has; -1: the opening, -2: not even that
    seen: Seen = Seen.TOKENS
    tail: tuple[int, ...] = ()  #: the last tokens up to there

    @property
    def shown(self) -> int:
        """Tokens whose text it has."""
        return max(0, self.index + 1)


def parse_position(value: bytes) -> Position:
    """The position that an event id stands for. A request id alone stands for the beginning.

    Raises:
        BadRequest: It is no id of ours.
    """
    found = _ID.fullmatch(value.strip())
    if found is None:
        raise BadRequest(
            "Last-Event-ID is not the id of an event of a stream; send the last one that came", code="invalid_event_id"
        )
    tail: list[int] = []
    if found["tail"] is not None:
        try:
            tail = _tail_decoder.decode(found["tail"])
        except msgspec.DecodeError as err:
            raise BadRequest("Last-Event-ID is damaged; send it as it came", code="invalid_event_id") from err
    index = -2 if found["index"] is None else int(found["index"])
    if len(tail) > min(MAX_TAIL, max(0, index + 1)) or any(token >= 1 << 32 for token in tail):
        raise BadRequest("Last-Event-ID is damaged; send it as it came", code="invalid_event_id")
    return Position(found["request"].decode(), index, _SEEN[found["seen"] or b""], tuple(tail))


def place(copied: int, tokens: list[int], index: int) -> bytes:
    """What follows the request's id in the id of an event with the text of token `index`. On every copied chunk's path.

    Args:
        copied: Tokens that another gateway has.
        tokens: All tokens so far.
        index: Of the last one that the event shows.
    """
    tail = tokens[copied : index + 1]
    return b"%d:%b" % (index, _encode(tail)) if 0 < len(tail) <= MAX_TAIL else b"%d" % index
