"""Whether a replica that has a context does its work: judged by what it did last, not by what it says. Pure: times are passed in.

Three things make it not ready. Nothing moved for too long: no step while there is work, or no answer to the canary while there
is none. Or it only fails: every request that ended for a while ended by a fault of the replica's.
"""

from __future__ import annotations

from collections import deque

__all__ = ["FAILING_S", "LEAST_FAILURES", "Vitals"]

#: Time over which everything that ends must fail before the replica is not ready, seconds.
FAILING_S = 5.0
#: Failures that are needed for that; two requests that fail for reasons of their own prove nothing.
LEAST_FAILURES = 3
#: A failure older than this says nothing about now, seconds.
FORGET_S = 30.0
#: A step that takes this many times as long as the longest of the last ones is not a silence: a slow CPU may read a prompt for
#: longer than `ready_s`.
SILENCE_STEPS = 4.0
STEPS_REMEMBERED = 64
#: Rest of a replica that only failed before it is tried again, if its canary lives, seconds; doubled when it fails again.
FIRST_REST_S, LONGEST_REST_S = 5.0, 60.0


class Vitals:
    """Signs of life of one replica.

    Args:
        ready_s: Age at which the last step, or the last answer of the canary, is too old, seconds.
        now_s: The time.
    """

    def __init__(self, ready_s: float, now_s: float) -> None:
        self.ready_s = ready_s
        self.moved_s = now_s
        self._durations: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._failures = 0
        self._first_failure_s = self._last_failure_s = now_s
        self._rest_s, self._resting_until_s = FIRST_REST_S, 0.0

    def reset(self, now_s: float) -> None:
        """Another context: what the last one did says nothing about it."""
        self.moved_s = now_s
        self._failures = 0
        self._durations.clear()

    def moved(self, now_s: float) -> None:
        """It made a step, or answered, or has just been given its first work."""
        self.moved_s = now_s

    def step(self, duration_s: float) -> None:
        """A step took this long, seconds."""
        self._durations.append(duration_s)

    def failed(self, now_s: float) -> None:
        """A request ended by a fault of the replica's."""
        if not self._failures or now_s - self._last_failure_s > FORGET_S:
            self._failures, self._first_failure_s = 0, now_s
        self._failures += 1
        self._last_failure_s = now_s

    def succeeded(self) -> None:
        """A request ended well."""
        self._failures, self._rest_s, self._resting_until_s = 0, FIRST_REST_S, 0.0

    def canary_lived(self, now_s: float) -> None:
        """It answers again. One that only failed is not believed before it has rested."""
        self.moved_s = now_s
        if self._failures and self._resting_until_s and now_s >= self._resting_until_s:
            self._failures, self._resting_until_s = 0, 0.0

    @property
    def typical_s(self) -> float:
        """Duration of a step, the median of the last ones, seconds."""
        return sorted(self._durations)[len(self._durations) // 2] if self._durations else 0.0

    @property
    def silence_s(self) -> float:
        """The longest silence that is none, seconds."""
        return max(self.ready_s, SILENCE_STEPS * max(self._durations, default=0.0))

    @property
    def failing_since_s(self) -> float | None:
        """When the first of many failures was; None while they are too few or too close together to mean anything."""
        many = self._failures >= LEAST_FAILURES and self._last_failure_s - self._first_failure_s > FAILING_S
        return self._first_failure_s if many else None

    def judge(self, now_s: float) -> str:
        """ "" for a replica that is ready, else why it is not."""
        if now_s - self.moved_s > self.silence_s:
            return f"no step and no answer for {now_s - self.moved_s:.1f} s"
        if self.failing_since_s is None:
            return ""
        if not self._resting_until_s:
            self._resting_until_s = now_s + self._rest_s
            self._rest_s = min(2 * self._rest_s, LONGEST_REST_S)
        return f"all of its last {self._failures} requests failed"
