"""Who may be on a context after one has died: the suspects one by one, everybody else after them. Pure.

A prompt that kills its context would kill the next one too, and with it everybody's answer a second time. So each sequence that
was present is tried alone: the one that kills again is found at the cost of one more death, and all others go on together.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

__all__ = ["CLEARING_OUTPUTS", "Probation"]

#: Outputs after which a suspect that runs alone is cleared. The first repeats the step that died, from the same tokens; the
#: second is for runners whose errors show one step late.
CLEARING_OUTPUTS = 2


class Suspect(Protocol):
    """A sequence."""

    @property
    def sequence_id(self) -> int:
        """Rises with each launch."""
        ...


S = TypeVar("S", bound=Suspect)


class Probation(Generic[S]):
    """Sequences that are not on a context: those still to be tried, and those that wait for the end of the trials.

    Each sequence is in at most one of: untried, current (on the context, alone), cleared (waiting). What `board` returned is the
    caller's.
    """

    def __init__(self) -> None:
        self._untried: deque[S] = deque()
        self._cleared: list[S] = []
        self._outputs = 0
        #: The one that is tried now.
        self.current: S | None = None

    @property
    def active(self) -> bool:
        """Whether somebody is tried or still to be tried: nobody else may be on the context."""
        return self.current is not None or bool(self._untried)

    def suspect(self, present: list[S]) -> None:
        """A context died with these on it. The newest is tried first: a prompt that kills mostly does so when first read."""
        self.current = None
        self._untried.extend(sorted(present, key=lambda s: s.sequence_id, reverse=True))

    def suspend(self, present: list[S]) -> None:
        """A context was replaced for another reason, with these on it: they need no trial, but for one that was being tried."""
        if self.current is not None and self.current in present:
            self._untried.appendleft(self.current)
            present = [s for s in present if s is not self.current]
        self.current = None
        self._cleared += present

    def board(self) -> list[S]:
        """Who goes onto the context now: the next suspect, alone, or all that wait once nobody is left to try."""
        self._outputs = 0
        if self._untried:
            self.current = self._untried.popleft()
            return [self.current]
        self.current = None
        ready, self._cleared = self._cleared, []
        return ready

    def clears(self, suspect: S) -> bool:
        """Count an output of a sequence. True when it was tried and is cleared by this one."""
        if suspect is not self.current:
            return False
        self._outputs += 1
        return self._outputs >= CLEARING_OUTPUTS

    def clear(self) -> S | None:
        """The current one is innocent. Returns it if it must leave the context for the next suspect, else it may stay."""
        cleared, self.current = self.current, None
        if cleared is None or not self._untried:
            return None
        self._cleared.append(cleared)
        return cleared

    def drop(self, suspect: S) -> None:
        """Forget a sequence that waits here. No-op for any other."""
        if suspect in self._untried:
            self._untried.remove(suspect)
        elif suspect in self._cleared:
            self._cleared.remove(suspect)

    def empty(self) -> list[S]:
        """Forget all, and return those that wait here."""
        waiting = [*self._untried, *self._cleared]
        self._untried.clear()
        self._cleared, self.current = [], None
        return waiting
