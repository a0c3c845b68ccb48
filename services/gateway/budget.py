"""How many further attempts the requests of one deployment may make together. Pure: the caller brings the time.

Attempts of one request are few, yet all requests trying twice would triple the load of replicas that are already in trouble.
Two allowances over one sliding window keep that apart from what a death must cost:

- A retry follows a refusal (full, broken, unreachable): a share of the requests accepted in the window, and a few besides.
- A move follows the loss of a replica, whether or not it had answered: twice the most requests that were in flight at once in the
  window, and a few besides. The death of an engine with everything it had is always within it, and so is a second one; a
  deployment whose contexts die as fast as they start is not.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AttemptBudget", "BudgetRule"]

#: Parts of the window. What was spent comes back with the part it was spent in: at most a tenth of the window late.
SLOTS = 10


@dataclass(frozen=True, slots=True)
class BudgetRule:
    """The numbers.

    Args:
        window_s: Length of the window, seconds.
        retry_share: Retries per accepted request.
        retry_floor: Retries in a window, besides.
        moves_per_request: Moves per request in flight.
        move_floor: Moves in a window, besides.
    """

    window_s: float = 10.0
    retry_share: float = 0.1
    retry_floor: int = 3
    moves_per_request: float = 2.0
    move_floor: int = 10


class AttemptBudget:
    """The budget of one deployment in one worker. `now` is any clock that never goes back, seconds."""

    __slots__ = ("_accepted", "_moves", "_peaks", "_retries", "_rule", "_slot", "_slot_s", "in_flight")

    def __init__(self, rule: BudgetRule) -> None:
        self._rule = rule
        self._slot_s = rule.window_s / SLOTS
        self._slot = 0
        self._accepted, self._retries, self._moves, self._peaks = ([0] * SLOTS for _ in range(4))
        self.in_flight = 0

    def accept(self, now: float) -> None:
        """A request begins."""
        at = self._at(now)
        self._accepted[at] += 1
        self.in_flight += 1
        if self.in_flight > self._peaks[at]:
            self._peaks[at] = self.in_flight

    def end(self) -> None:
        """A request that was accepted is over."""
        self.in_flight -= 1

    def take_retry(self, now: float) -> bool:
        """Whether one more retry is allowed; spends it if so."""
        at, rule = self._at(now), self._rule
        allowed = sum(self._retries) < rule.retry_floor + rule.retry_share * sum(self._accepted)
        self._retries[at] += allowed
        return allowed

    def may_move(self, now: float) -> bool:
        """Whether one more move is allowed."""
        self._at(now)
        return sum(self._moves) < self._rule.move_floor + self._rule.moves_per_request * max(self._peaks)

    def take_move(self, now: float) -> bool:
        """Whether one more move is allowed; spends it if so."""
        allowed = self.may_move(now)
        self._moves[self._at(now)] += allowed
        return allowed

    def _at(self, now: float) -> int:
        """The slot of this moment; slots that the window has left behind begin anew."""
        slot = int(now / self._slot_s)
        if slot > self._slot:
            for passed in range(max(self._slot + 1, slot - SLOTS + 1), slot + 1):
                at = passed % SLOTS
                self._accepted[at] = self._retries[at] = self._moves[at] = 0
                self._peaks[at] = self.in_flight
            self._slot = slot
        return slot % SLOTS
