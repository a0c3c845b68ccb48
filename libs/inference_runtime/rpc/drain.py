"""The orderly end of something that serves: give notice, serve who has not heard of it, take nothing new, let run what runs.

    OPEN ── begin ──► NOTICE ── notice over, or nobody left to hear it ──► CLOSED ── nothing runs, or time is up ──► OVER

Whoever serves asks `admits` for each new request, and after OVER takes care of what still runs: hands it over, or ends it with an
error. Stages only go forward. The decision is pure, `until` is the thin shell around it.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable

__all__ = ["Drain", "Stage"]

#: Seconds between two looks at what still runs.
LOOK_S = 0.02


class Stage(enum.IntEnum):
    """How far it has come."""

    OPEN = 0  #: nobody asked for an end
    NOTICE = 1  #: it is being told around; who has not heard is served as before
    CLOSED = 2  #: nothing new is taken; what runs goes on
    OVER = 3  #: nothing runs any more, or its time is up


class Drain:
    """One drain. `now` is any clock that never goes back, seconds.

    Args:
        timeout_s: From the beginning to OVER, at most; the notice is part of it.
        notice_s: For how long who has not heard is still served.
    """

    def __init__(self, timeout_s: float, notice_s: float) -> None:
        self._timeout_s, self._notice_s = timeout_s, notice_s
        self._stage = Stage.OPEN
        self._close_at = self._over_at = float("inf")

    @property
    def stage(self) -> Stage:
        """How far it has come, as of the last look."""
        return self._stage

    @property
    def admits(self) -> bool:
        """Whether a new request is taken."""
        return self._stage <= Stage.NOTICE

    def begin(self, now: float) -> None:
        """Somebody asks for the end. Asking again changes nothing."""
        if self._stage is Stage.OPEN:
            self._stage = Stage.NOTICE
            self._over_at = now + self._timeout_s
            self._close_at = min(now + self._notice_s, self._over_at)

    def left_s(self, now: float) -> float:
        """Seconds until OVER at the latest, once it has begun."""
        return max(0.0, self._over_at - now)

    def look(self, now: float, running: int, callers: int) -> Stage:
        """Go one stage further where the facts allow it. One, so that who closes a door on CLOSED may still find somebody in it.

        Args:
            now: The time.
            running: Requests that run or wait here.
            callers: Those who may still send requests because they have not heard. While there are none, nothing can come.
        """
        if self._stage is Stage.NOTICE and (now >= self._close_at or not (running or callers)):
            self._stage = Stage.CLOSED
        elif self._stage is Stage.CLOSED and (now >= self._over_at or not running):
            self._stage = Stage.OVER
        return self._stage

    async def until(self, stage: Stage, running: Callable[[], int], callers: Callable[[], int]) -> int:
        """Begin, if nobody did, and return once it has come this far, with what still runs. On cancel: it stays where it is."""
        loop = asyncio.get_running_loop()
        self.begin(loop.time())
        while self.look(loop.time(), left := running(), callers()) < stage:  # noqa: ASYNC110 - what runs is many owners' state
            await asyncio.sleep(LOOK_S)
        return left
