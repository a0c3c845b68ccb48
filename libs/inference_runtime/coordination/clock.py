"""The clock of leases, and the pauses between attempts."""

from __future__ import annotations

import random
import time

__all__ = ["Backoff", "boottime"]

#: Counts the time a machine was suspended, which CLOCK_MONOTONIC on Linux does not. Where it is missing, monotonic is the best.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boottime() -> float:
    """Seconds since boot, suspend included. Never the wall clock: an operator or NTP may set that."""
    return time.clock_gettime(_CLOCK)


class Backoff:
    """Full-jitter exponential pauses: U(0, min(cap, first × 2^n)) seconds, so that many processes never come back together."""

    def __init__(self, first_s: float = 0.2, cap_s: float = 2.0) -> None:
        self._first_s, self._cap_s = first_s, cap_s
        self._failures = 0

    def next_s(self) -> float:
        """The pause before the next attempt, seconds."""
        ceiling = min(self._cap_s, self._first_s * 2 ** min(self._failures, 16))
        self._failures += 1
        return random.uniform(0, ceiling)

    def reset(self) -> None:
        """Call after a success."""
        self._failures = 0
