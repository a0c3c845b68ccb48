"""How fast one replica answers, as this worker sees it, over the last few seconds. Pure: the caller brings the times.

Two figures. The time of one token in answers that have begun is a mean: whoever has stalled counts for as long as it has. The
time to the first token is kept as single values: prompts differ, and one long prompt proves nothing.
"""

from __future__ import annotations

from collections.abc import Hashable

__all__ = ["ANSWERS_KEPT", "WINDOW_S", "Pace"]

#: What counts is the window in the making and the whole one before it: two and a half to five seconds, so that a pause of one or
#: two is no proof.
WINDOW_S = 2.5
#: First-token times kept of one window. More would not move their median.
FIRSTS_KEPT = 64
#: Answers told apart in one window: whether it was one or several is all that is asked.
ANSWERS_KEPT = 4


class _Window:
    __slots__ = ("answers", "busy_s", "firsts", "tokens")

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.tokens = 0
        self.answers: set[Hashable] = set()
        self.firsts: list[float] = []


class Pace:
    """The figures of one replica. Times are seconds."""

    __slots__ = ("_before", "_busy_at_turn_s", "_current", "_turned_at", "turns", "waits")

    def __init__(self) -> None:
        self._before, self._current = _Window(), _Window()
        self._turned_at = self._busy_at_turn_s = 0.0
        #: Turns in a row before each of which something went on.
        self.turns = 0
        #: How long those have waited that wait for their first token, at the last look.
        self.waits: list[float] = []

    def began(self, waited_s: float) -> None:
        """An answer began, this long after it was asked for."""
        firsts = self._current.firsts
        if len(firsts) < FIRSTS_KEPT:
            firsts.append(waited_s)

    def went_on(self, answer: Hashable, busy_s: float, tokens: int) -> None:
        """An answer that had begun took so long for so many more tokens, of which there may be none."""
        window = self._current
        window.busy_s += busy_s
        window.tokens += tokens
        if len(window.answers) < ANSWERS_KEPT:
            window.answers.add(answer)

    def turn(self, now: float) -> None:
        """Once a second or so: begin another window when the present one is full. `now` is any clock that never goes back."""
        busy_s = self._current.busy_s
        self.turns = self.turns + 1 if busy_s != self._busy_at_turn_s else 0
        if now - self._turned_at >= WINDOW_S:
            stale = now - self._turned_at >= 2 * WINDOW_S
            self._before = _Window() if stale else self._current
            self._current = _Window()
            self._turned_at, busy_s = now, 0.0
        self._busy_at_turn_s = busy_s

    def clear(self) -> None:
        """Forget everything: from here on it is another replica, or another time."""
        self._before, self._current = _Window(), _Window()
        self._busy_at_turn_s = 0.0
        self.turns = 0
        self.waits = []

    @property
    def busy_s(self) -> float:
        """Time that begun answers took, all together."""
        return self._before.busy_s + self._current.busy_s

    @property
    def tokens(self) -> int:
        """Tokens that came in that time."""
        return self._before.tokens + self._current.tokens

    @property
    def answers(self) -> int:
        """Answers that this was seen in, at least; `ANSWERS_KEPT` at most."""
        return min(len(self._before.answers | self._current.answers), ANSWERS_KEPT)

    @property
    def token_s(self) -> float:
        """Time of one token. Where none has come yet, the least that the first one will have taken."""
        return self.busy_s / max(self.tokens, 1)

    @property
    def firsts(self) -> list[float]:
        """Times to the first token."""
        return self._before.firsts + self._current.firsts
