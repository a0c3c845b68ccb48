"""Who may be on a context after one has died: suspects one at a time, beside all that are clear. Pure: times are passed in.

A prompt that kills its context would kill the next one too. Everybody who was present is a suspect, until it has made a few
outputs on the next context. With one suspect on board at a time, a second death names the one that did it: a killer costs two
contexts. The trials are short, because innocents wait for them: after TRIALS_S those that are left go on board together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

__all__ = ["CERTAIN_TRIALS_S", "CLEARING_OUTPUTS", "TRIALS_S", "Probation"]

#: Outputs after which a suspect is cleared. The first repeats the step that died, from the same tokens; the second is for runners
#: whose errors show one step late. One that had made fewer when its context died had just been read: that is when most prompts
#: that kill do so, and such a one is tried first.
CLEARING_OUTPUTS = 2
#: Time that trials after a death may take in all, seconds. What restarts must not keep everybody waiting to find out who did it:
#: with steps of 20 ms this is enough for the dozen that are the most suspicious, and one death more finds all others.
TRIALS_S = 0.5
#: The same after a death with several suspects on board, seconds. Now certainty is worth the wait: another such death would be
#: one too many for the replica.
CERTAIN_TRIALS_S = 10.0
#: Trials of suspects that come from elsewhere share one budget for this long, seconds.
INCIDENT_S = 10.0


class Suspect(Protocol):
    """A sequence."""

    @property
    def sequence_id(self) -> int:
        """Rises with each launch."""
        ...

    @property
    def outputs_here(self) -> int:
        """Made since it was launched."""
        ...


S = TypeVar("S", bound=Suspect)


class Probation(Generic[S]):
    """Who waits to be tried, who is tried, and who waits to go on.

    Each sequence is in at most one of: untried, on board as a suspect, clear (waiting for the context). What `board` returned
    is the caller's; the suspects among it are watched until they are cleared.

    Args:
        trials_s: See TRIALS_S.
    """

    def __init__(self, trials_s: float = TRIALS_S) -> None:
        self._trials_s = trials_s
        self._fresh: deque[S] = deque()  # untried; the first that are tried
        self._others: deque[S] = deque()  # untried
        self._clear: list[S] = []
        self._aboard: dict[S, int] = {}  # suspects on the context, with their outputs there
        self._began_s = float("-inf")  # the incident
        self._left_s = trials_s  # of its trials
        self._since_s: float | None = None  # when the present trials began
        #: The one that is tried: the only suspect that came on board since the trials began and is not cleared.
        self.current: S | None = None

    @property
    def active(self) -> bool:
        """Whether trials go on: nobody new may come on board, lest it be taken for the killer or hide it."""
        return self.current is not None or bool(self._fresh or self._others)

    @property
    def watches(self) -> bool:
        """Whether there are suspects on board: their outputs must be counted."""
        return bool(self._aboard)

    # --- what happens ------------------------------------------------------------------------------------------------

    def blame(self, present: Sequence[S], now_s: float, *, again: bool = False) -> S | None:
        """What these did together failed, and none of them is on the context any more.

        Args:
            present: All that took part.
            now_s: The time.
            again: The only one present has seen this before, so that it is no suspect but the cause.

        Returns:
            The one that is the cause, when that is certain. It is the caller's; all others wait here.
        """
        self._stop_clock(now_s)
        suspects = self.take(present)
        self.current = None
        found = suspects[0] if len(suspects) == 1 else present[0] if again and len(present) == 1 else None
        if found is not None:
            # It explains what happened before, too. Only those that had just been read could still be killers of their own.
            self._clear += [*(s for s in present if s is not found), *self._others]
            self._others.clear()
            return found
        if suspects:
            self._left_s = max(self._trials_s, CERTAIN_TRIALS_S)
            self._clear += [s for s in present if s not in suspects]
            self._await_trial(suspects)
        else:
            self._left_s = self._trials_s
            self._await_trial(present)
        self._began_s = now_s
        return None

    def suspend(self, present: Sequence[S], now_s: float) -> None:
        """The context was replaced for a reason that is none of theirs. Suspects stay suspects."""
        self._stop_clock(now_s)
        self._fresh.extendleft(s for s in present if s in self._aboard)
        self._clear += [s for s in present if s not in self._aboard]
        self._aboard.clear()
        self.current = None

    def take(self, present: Sequence[S]) -> list[S]:
        """Those of these that are suspects on board. They are not any more: the caller has them."""
        suspects = [s for s in present if s in self._aboard]
        for s in suspects:
            del self._aboard[s]
            if s is self.current:
                self.current = None
        return suspects

    def hold(self, clear: Sequence[S], suspects: Sequence[S], now_s: float, *, certain: bool = False) -> None:
        """Let these wait for `board`; the suspects are tried, the others are not. `certain` gives the trials all the time."""
        self._clear += clear
        if certain:
            self._began_s, self._left_s = now_s, max(self._trials_s, CERTAIN_TRIALS_S)
        elif suspects:
            self._renew(now_s)
        self._await_trial(suspects)

    def board(self, now_s: float) -> list[S]:
        """Who goes on board now: all that are clear and the next suspect, or everybody once the time for trials is over."""
        ready, self._clear = self._clear, []
        if self.current is not None and self.left_s(now_s) > 0:
            return ready
        self.current = None
        if not (self._fresh or self._others):
            self._stop_clock(now_s)
            return ready
        if self._since_s is None:
            self._since_s = now_s
        if self.left_s(now_s) > 0:
            self.current = (self._fresh or self._others).popleft()
            self._aboard[self.current] = 0
            return [*ready, self.current]
        rest = [*self._fresh, *self._others]
        self._fresh.clear()
        self._others.clear()
        self._aboard.update(dict.fromkeys(rest, 0))
        self._stop_clock(now_s)
        return ready + rest

    def count(self, sequence: S) -> None:
        """It made an output without an error. The last one that a suspect needs clears it."""
        outputs = self._aboard.get(sequence)
        if outputs is None:
            return
        if outputs + 1 < CLEARING_OUTPUTS:
            self._aboard[sequence] = outputs + 1
        else:
            self.drop(sequence)

    def drop(self, sequence: S) -> bool:
        """Forget a sequence. True when it was the one that is tried: somebody else's turn has come."""
        self._aboard.pop(sequence, None)
        for waiting in (self._fresh, self._others, self._clear):
            if sequence in waiting:
                waiting.remove(sequence)
        if sequence is not self.current:
            return False
        self.current = None
        return True

    def empty(self) -> list[S]:
        """Forget all, and return those that wait here."""
        waiting = [*self._fresh, *self._others, *self._clear]
        self._fresh.clear()
        self._others.clear()
        self._clear, self.current, self._since_s = [], None, None
        self._aboard.clear()
        return waiting

    # --- time --------------------------------------------------------------------------------------------------------

    def left_s(self, now_s: float) -> float:
        """Time that is left for trials, seconds."""
        return self._left_s - (now_s - self._since_s if self._since_s is not None else 0.0)

    def _stop_clock(self, now_s: float) -> None:
        self._left_s, self._since_s = max(0.0, self.left_s(now_s)), None

    def _renew(self, now_s: float) -> None:
        """A new incident has time of its own; what belongs to the last one has what is left of it."""
        if now_s - self._began_s > INCIDENT_S and not self.active:
            self._began_s, self._left_s = now_s, self._trials_s

    def _await_trial(self, suspects: Sequence[S]) -> None:
        """Put these in order: the newest first, those that had just been read before all others."""
        for s in sorted(suspects, key=lambda s: s.sequence_id, reverse=True):
            (self._fresh if s.outputs_here < CLEARING_OUTPUTS else self._others).append(s)
