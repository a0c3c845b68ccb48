"""What to do about a fault of a context, decided from structure: the exception's class and its `error_code`, never its text.

Pure: no clock of its own, no device library.
"""

from __future__ import annotations

import enum
from collections import deque

from inference_runtime.errors import ContextPoisoned

__all__ = ["DEVICE_CODES", "STICKY_CODES", "Directive", "RestartIntensity", "decide", "is_out_of_memory"]

#: CUDA errors after which every later call in the process fails too: illegal address, launch timeout, asserts, traps, stack and
#: instruction faults, unspecified launch failure, ECC found late. Only a new context heals them. (cuda.h, CUresult)
STICKY_CODES = frozenset({226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911})
#: CUDA errors of the device itself: uncorrectable ECC (214), NVLink (220). A new context meets them again.
DEVICE_CODES = frozenset({214, 220})

#: Restarts allowed within the window. A context that dies more often will die again.
MAX_RESTARTS = 3
#: The window, seconds.
WINDOW_S = 60.0


class Directive(enum.Enum):
    """What the owner of a context does after a fault."""

    RESUME = "resume"  #: the context is sound; what it was computing fails, nothing else
    RESTART = "restart"  #: a new context
    STOP = "stop"  #: no context on this device will work
    ESCALATE = "escalate"  #: unknown: give up and let the owner above decide


def is_out_of_memory(err: BaseException) -> bool:
    """Whether a device or a pool ran out of memory, known by the name of a class the exception derives from."""
    return any(c.__name__ == "OutOfMemoryError" for c in type(err).__mro__)


def decide(err: BaseException) -> Directive:
    """What to do about an exception that came out of a context."""
    if is_out_of_memory(err):
        return Directive.RESUME
    if isinstance(err, ContextPoisoned):
        return Directive.RESTART
    code = getattr(err, "error_code", None)
    if code in STICKY_CODES:
        return Directive.RESTART
    if code in DEVICE_CODES:
        return Directive.STOP
    return Directive.ESCALATE


class RestartIntensity:
    """Counts restarts in a sliding window and says when they are too many.

    Args:
        max_restarts: Restarts allowed within the window.
        window_s: The window, seconds.
    """

    def __init__(self, max_restarts: int = MAX_RESTARTS, window_s: float = WINDOW_S) -> None:
        self.max_restarts = max_restarts
        self.window_s = window_s
        self._times: deque[float] = deque(maxlen=max_restarts + 1)

    def allow(self, now_s: float) -> bool:
        """Count a fault at this time. True when a restart is allowed, False when it is one too many.

        Args:
            now_s: Monotonic time, seconds. Must not fall from call to call.
        """
        while self._times and now_s - self._times[0] >= self.window_s:
            self._times.popleft()
        self._times.append(now_s)
        return len(self._times) <= self.max_restarts
