"""How fast a full replica gets work done, measured over its last turnover. Pure: times are passed in."""

from __future__ import annotations

from collections import deque

__all__ = ["Turnover"]

#: Fewest and most ends that the rate is taken over. One turnover lies between: as many ends as there are places.
LEAST_ENDS, MOST_ENDS = 8, 256


class Turnover:
    """Rate at which work ends while all places are taken. Time with a free place does not count: nobody waits in it.

    A rate is known once `places` requests (at least LEAST_ENDS) have ended, so that a burst that starts and ends together is
    not mistaken for its first end.
    """

    def __init__(self) -> None:
        self._ends: deque[tuple[float, int]] = deque()  # on the clock of full time: when, and how much work
        self._work = self._places = 0
        self._full_s = 0.0  # the clock
        self._since_s: float | None = None  # when it was last set going

    def forget(self) -> None:
        """Start anew: what was measured says nothing about what comes."""
        self._ends.clear()
        self._work, self._since_s = 0, None

    def note_full(self, now_s: float, full: bool) -> None:
        """Say whether all places are taken from now on."""
        if full and self._since_s is None:
            self._since_s = now_s
        elif not full and self._since_s is not None:
            self._full_s += now_s - self._since_s
            self._since_s = None

    def note_end(self, now_s: float, tokens: int, places: int) -> None:
        """Count work that ended. Work that ends while a place is free is left out."""
        if self._since_s is None:
            return
        self._ends.append((self._clock(now_s), tokens))
        self._work += tokens
        keep = 1 + min(MOST_ENDS, max(LEAST_ENDS, places))  # the first marks the beginning of the span
        while len(self._ends) > keep:
            self._work -= self._ends.popleft()[1]
        self._places = places

    def tokens_per_s(self, now_s: float) -> float:
        """Work ended per second of full time; 0.0 while unknown."""
        return self._per_s(now_s, self._work - self._ends[0][1]) if self._known else 0.0

    def ends_per_s(self, now_s: float) -> float:
        """Requests ended per second of full time; 0.0 while unknown."""
        return self._per_s(now_s, len(self._ends) - 1) if self._known else 0.0

    @property
    def _known(self) -> bool:
        return len(self._ends) > min(MOST_ENDS, max(LEAST_ENDS, self._places))

    def _per_s(self, now_s: float, amount: int) -> float:
        span_s = self._clock(now_s) - self._ends[0][0]
        return amount / span_s if span_s > 0 else 0.0

    def _clock(self, now_s: float) -> float:
        return self._full_s + (now_s - self._since_s if self._since_s is not None else 0.0)
