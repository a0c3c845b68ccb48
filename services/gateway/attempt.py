"""How one attempt at a request gets on: since when it waits, when something came last, and how fast that makes its replica. Pure.

Looked at by the sweeper a few times a second and not with each chunk, so a chunk costs nothing here.
"""

from __future__ import annotations

from services.gateway.pace import Pace

__all__ = ["Attempt"]


class Attempt:
    """One attempt. Times are seconds of any clock that never goes back; tokens are those of the request, of all attempts.

    Args:
        pace: Of the replica.
        key: Tells its attempts apart.
        now: When it was asked.
        tokens: Those that it goes on behind.
        steady: Tokens come as they are made. Else they come in lumps, and a pause between two tells nothing.
    """

    __slots__ = ("_behind", "_key", "_pace", "_seen", "_steady", "_told_at", "asked_at", "moved_at")

    def __init__(self, pace: Pace, key: int, now: float, tokens: int, *, steady: bool) -> None:
        self._pace, self._key, self._steady = pace, key, steady
        self._behind = self._seen = tokens
        #: When it was asked, when a look last found something new, and up to when the pace was told.
        self.asked_at = self.moved_at = self._told_at = now

    @property
    def begun(self) -> bool:
        """Something came of it, as of the last look."""
        return self._seen != self._behind

    def first(self, now: float, tokens: int) -> None:
        """The request's first tokens came."""
        self._pace.began(now - self.asked_at)
        self.moved_at = self._told_at = now
        self._seen = tokens

    def overdue(self, now: float, first_s: float, next_s: float) -> str:
        """What did not come in time, as of the last look, in words; "" while nothing is late.

        Args:
            now: The time.
            first_s: Limit of the first token. Also of the next one where tokens come in lumps.
            next_s: Limit of the next token.
        """
        if not self.begun:
            return "no token came from where the answer was to go on" if now - self.asked_at > first_s else ""
        late = now - self.moved_at > (next_s if self._steady else first_s)
        return "no further token came in the time that its deployment allows" if late else ""

    def look(self, now: float, tokens: int) -> None:
        """See what has come, while it goes on or when it ends well."""
        gained = tokens - self._seen
        if gained:
            self._seen = tokens
            self.moved_at = now
        elif tokens == self._behind:
            self._told_at = now
            self._pace.waits.append(now - self.asked_at)
            return
        if gained or self._steady:
            self._pace.went_on(self._key, now - self._told_at, gained)
            self._told_at = now
