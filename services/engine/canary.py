"""A request of our own to an idle replica: one token, so that a context that hangs or fails is found before a user finds it.

One at a time, only while nothing else is there, and gone as soon as something is. It is no stream: it has no usage, no place, and
no part in any count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from inference_runtime.errors import Backpressure, BadRequest, InferenceError, Internal, Unsupported
from inference_runtime.generation import SamplingParams
from inference_runtime.runner import StepOutput
from services.engine.worker import Flight, Worker

__all__ = ["Canary"]

#: What it asks for: the least that makes a runner compute.
SAMPLING = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
#: Prefix caches keep it apart from what tenants send.
SALT = "canary"
#: Refusals: the replica answered, and the question was wrong for it.
REFUSALS = (Backpressure, BadRequest, Unsupported)


class Canary:
    """The canary of one replica.

    Args:
        worker: Where it is put.
        lived: Called when it was answered.
        died: Called when it failed by a fault of the replica's.
    """

    def __init__(self, worker: Worker, lived: Callable[[], None], died: Callable[[InferenceError], None]) -> None:
        self._worker, self._lived, self._died = worker, lived, died
        self._flight: Flight | None = None
        #: When the one that is out was sent, monotonic seconds.
        self.sent_s = 0.0

    @property
    def out(self) -> bool:
        """Whether one is on the context."""
        return self._flight is not None and self._worker.holds(self._flight)

    def send(self, prompt: Sequence[int], now_s: float) -> None:
        """Send one. There must be none."""
        self.sent_s = now_s
        self._flight = Flight(0, prompt, SAMPLING, self, cache_salt=SALT)
        self._worker.launch_canary(self._flight)

    def on_output(self, output: StepOutput) -> None:
        """It was answered."""
        if output.error is None:
            self._lived()
        else:
            self.on_failure(output.error if isinstance(output.error, InferenceError) else Internal(repr(output.error)))

    def on_failure(self, err: InferenceError) -> None:
        """It was refused, or failed."""
        if isinstance(err, REFUSALS):
            self._lived()
        else:
            self._died(err)
