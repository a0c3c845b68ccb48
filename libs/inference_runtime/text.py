"""Text from tokens: what is certain, as early as it is certain. A pure function of the token sequence.

The engine's stable tier feeds each generated token once. How the tokens were cut into steps or frames makes no difference, and an
assembler that replayed a prefix goes on exactly as the one that produced it: that is what lets another replica resume a stream.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

__all__ = ["TextAssembler", "TokenBytes"]


class TokenBytes(Protocol):
    """The part of a Codec that text assembly needs."""

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes a token stands for; b"" for special tokens."""
        ...


class _StopMatcher:
    """Follows one stop string through a text, character by character (Knuth, Morris, Pratt)."""

    __slots__ = ("_fallback", "matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        #: Characters at the end of the text so far that begin this stop string.
        self.matched = 0
        fallback = [0] * len(stop)
        length = 0
        for i in range(1, len(stop)):
            while length and stop[i] != stop[length]:
                length = fallback[length - 1]
            if stop[i] == stop[length]:
                length += 1
            fallback[i] = length
        self._fallback = fallback

    def take(self, char: str) -> bool:
        """Go on by one character. True when the stop string is complete."""
        stop, length = self.stop, self.matched
        while length and stop[length] != char:
            length = self._fallback[length - 1]
        if stop[length] == char:
            length += 1
        self.matched = length
        return length == len(stop)


class TextAssembler:
    """Assembles the text of one choice, token by token.

    Text comes out as soon as it cannot change: a half UTF-8 character waits for its other half, bytes that can never become a
    character turn into U+FFFD, and text that may be the beginning of a stop string waits until it is not. The stop string itself
    never comes out. Of several stop strings the one that is complete first ends the text; of two complete at the same
    character, the longer.

    Args:
        codec: Gives the bytes of a token.
        stop: Strings that end the text. None of them is empty.
    """

    __slots__ = ("_codec", "_held", "_pending", "_stops", "stop_sequence", "tokens")

    def __init__(self, codec: TokenBytes, stop: Sequence[str] = ()) -> None:
        self._codec = codec
        self._stops = [_StopMatcher(s) for s in stop]
        self._pending = b""
        self._held = ""
        #: Tokens fed, the one that completed a stop string included and none after it.
        self.tokens = 0
        #: The stop string that ended the text, "" while none has.
        self.stop_sequence = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text. Nothing comes out after it."""
        return self.stop_sequence != ""

    def feed(self, token_id: int) -> str:
        """The text that this token makes certain. "" after a stop string, whatever is fed."""
        if self.stop_sequence:
            return ""
        self.tokens += 1
        data = self._codec.token_bytes(token_id)
        if self._pending:
            data = self._pending + data
            self._pending = b""
        text, used = utf_8_decode(data, "replace", False)
        if used != len(data):
            self._pending = data[used:]
        return self._until_stop(text) if self._stops else text

    def feed_all(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """As `feed` for each, and how many were used: all, or those up to the one that completed a stop string."""
        if not self._stops:
            self.tokens += len(token_ids)
            data = self._pending + b"".join(map(self._codec.token_bytes, token_ids))
            text, used = utf_8_decode(data, "replace", False)
            self._pending = data[used:]
            return text, len(token_ids)
        before = self.tokens
        pieces = [self.feed(token_id) for token_id in token_ids]
        return "".join(pieces), self.tokens - before

    def finish(self) -> str:
        """The rest of the text, once no token follows: what was held back, and U+FFFD for half a character."""
        if self.stop_sequence:
            return ""
        text = utf_8_decode(self._pending, "replace", True)[0] if self._pending else ""
        self._pending = b""
        if not self._stops:
            return text
        text = self._until_stop(text)
        if not self.stop_sequence:
            text += self._held
            self._held = ""
        return text

    def replay(self, prefix: Sequence[int]) -> None:
        """Feed tokens whose text was delivered elsewhere."""
        self.feed_all(prefix)

    def _until_stop(self, text: str) -> str:
        """Move `text` past the stop strings and return what is certain of it and of what was held back."""
        stops, before = self._stops, len(self._held)
        for position, char in enumerate(text):
            complete = [m.stop for m in stops if m.take(char)]
            if complete:
                self.stop_sequence = max(complete, key=len)
                end = before + position + 1 - len(self.stop_sequence)
                certain = (self._held + text)[:end]
                self._held = ""
                return certain
        whole = self._held + text
        keep = max(m.matched for m in stops)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]
