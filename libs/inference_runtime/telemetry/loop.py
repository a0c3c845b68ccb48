"""Says when the event loop of a process was blocked: whatever blocks it keeps every stream of the process waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from inference_runtime.telemetry.logs import get_logger
from inference_runtime.telemetry.metrics import MetricSet

__all__ = ["LoopWatch", "watched"]

log = get_logger(__name__)

#: Time between two looks, seconds: ten wake-ups a second cost a process nothing that can be measured.
LOOK_S = 0.1
#: Lateness from which on a look is reported, seconds. Clients feel a token that comes this late.
BLOCKED_S = 0.2

T = TypeVar("T")


class LoopWatch:
    """Looks at the clock from the event loop, and reports when it could not.

    A process that was stopped, or had no processor, looks the same from inside: the report says for how long, not why.

    Args:
        metrics: Where each time is counted.
        blocked_s: Least lateness that is reported, seconds.
    """

    def __init__(self, metrics: MetricSet, blocked_s: float = BLOCKED_S) -> None:
        self._late_s = metrics.histogram("inference_loop_blocked_seconds")
        self._blocked_s = blocked_s
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look from now on. On the event loop."""
        self._due_s = time.monotonic() + LOOK_S
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def stop(self) -> None:
        """Look no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        late_s = time.monotonic() - self._due_s
        if late_s >= self._blocked_s:
            self._late_s.observe(late_s)
            log.warning("event loop was blocked", blocked_s=round(late_s, 3))
        self.start()


async def watched(metrics: MetricSet, body: Awaitable[T]) -> T:
    """Run the whole of a process under a LoopWatch."""
    watch = LoopWatch(metrics)
    watch.start()
    try:
        return await body
    finally:
        watch.stop()
