"""Whether a replica that looks well fails what it is given. Pure: the caller brings the time.

Judged by real requests only. What begins to answer is well; what only fails, for five seconds and several requests, is not. After
half a minute without another failure that is forgotten, so that a gateway that was taken out of service is tried again.
"""

from __future__ import annotations

__all__ = ["FAILING_AFTER_S", "FORGET_S", "LEAST_FAILURES", "Outcomes"]

#: Time between the first and the last failure, with nothing but failures between them, seconds.
FAILING_AFTER_S = 5.0
#: Two requests that fail for reasons of their own are no proof.
LEAST_FAILURES = 3
#: A failure older than this tells nothing about now, seconds.
FORGET_S = 30.0


class Outcomes:
    """What became of one replica's latest requests. `now` is any clock that never goes back, seconds."""

    __slots__ = ("_failures", "_first", "_last")

    def __init__(self) -> None:
        self._failures = 0
        self._first = self._last = 0.0

    def succeeded(self) -> None:
        """A request began to be answered."""
        self._failures = 0

    def failed(self, now: float) -> None:
        """A request failed there, and another replica might have done better."""
        if not self._failures or now - self._last > FORGET_S:
            self._failures, self._first = 0, now
        self._failures += 1
        self._last = now

    def failing(self, now: float) -> bool:
        """It does nothing but fail."""
        return self._failures >= LEAST_FAILURES and self._last - self._first > FAILING_AFTER_S and now - self._last <= FORGET_S
