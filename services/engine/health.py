"""Whether a replica is ready, found out by looking: at its steps while it works, at its canary while it does not.

The core looks a few times a second and publishes what comes out. A context that neither steps nor answers for as long as a hang
takes is condemned, whatever it says of itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from inference_runtime.errors import InferenceError, Internal, NetworkError, ServerError, Timeout
from inference_runtime.runner import Codec
from inference_runtime.stepping import StepReport
from inference_runtime.supervision import Fault, Loss
from inference_runtime.telemetry import get_logger
from services.engine.canary import Canary
from services.engine.vitals import Vitals
from services.engine.worker import Worker

__all__ = ["READY_S", "Health"]

log = get_logger(__name__)

#: Age at which the last step, or the last answer of the canary, is too old for a replica that is ready, seconds.
READY_S = 5.0
#: Time between two looks, seconds. A loop that was away for longer than LATE_S more saw nothing meanwhile.
LOOK_S, LATE_S = 0.25, 1.0
#: What the canary asks, and its tokens at most.
CANARY_TEXT, CANARY_TOKENS = "ok", 4
#: A canary is sent when this part of that time is over: it has the rest to answer.
CANARY_PART = 0.4
#: Part of a device's time that a canary may take, as one in so many: a slow model on a CPU is asked less often.
CANARY_COST = 20.0
#: Time that a child's own watch gets to find a hang first, seconds: it has the stacks.
GRACE_S = 2.0
#: Ends that are the replica's fault. What restarts a context is judged there.
FAULTS = (Internal, ServerError, NetworkError, Timeout)


class Health:
    """Signs of life of one replica, and its canary.

    Args:
        worker: Whose context it is.
        name: Of the replica, for logs.
        ready_s: See READY_S.
        hang_s: Least time without a sign of life that is taken for a hang, seconds.
        now_s: The time.
    """

    def __init__(self, worker: Worker, name: str, ready_s: float, hang_s: float, now_s: float) -> None:
        self._worker, self._name, self._ready_s, self._hang_s = worker, name, ready_s, hang_s
        self._vitals = Vitals(ready_s, now_s)
        self._canary = Canary(worker, self._canary_lived, self._canary_died)
        self._steps = 0
        self._now_s = self._worked_s = now_s  # of the last look, and of the last that saw work
        #: Prompt of the canary; empty for none.
        self.canary_prompt: Sequence[int] = ()

    # --- what happens ------------------------------------------------------------------------------------------------

    def context_up(self, now_s: float) -> None:
        """The context takes sequences."""
        self._vitals.moved(now_s)

    def context_down(self, now_s: float) -> None:
        """The context is gone."""
        self._vitals.reset(now_s)

    def began(self, now_s: float) -> None:
        """Work begins where nothing ran. A canary that has not answered yet says since when there is silence."""
        self._vitals.moved(self._canary.sent_s if self._canary.out else now_s)

    def stepped(self, report: StepReport, now_s: float) -> None:
        """A step is over."""
        self._vitals.moved(now_s)
        self._vitals.step(report.duration_s)

    def ended(self, err: InferenceError | None, now_s: float) -> None:
        """A request ended, well or with this error."""
        if err is None:
            self._vitals.succeeded()
        elif isinstance(err, FAULTS) and err.metadata.get("phase") not in ("first_chunk", "total"):
            self._vitals.failed(now_s)

    def _canary_lived(self) -> None:
        self._vitals.canary_lived(self._now_s)

    def _canary_died(self, err: InferenceError) -> None:
        log.warning("canary failed", replica=self._name, reason=err.reason, error=err.message)
        self._vitals.moved(self._now_s)
        self._vitals.failed(self._now_s)

    # --- looking -----------------------------------------------------------------------------------------------------

    def choose_canary(self, codec: Codec) -> None:
        """Make the canary's prompt. A model that takes no plain text has none."""
        try:
            self.canary_prompt = tuple(codec.encode(CANARY_TEXT)[:CANARY_TOKENS])
        except Exception as err:  # noqa: BLE001 - foreign code
            log.warning("no canary for this model", replica=self._name, error=repr(err))

    async def keep_looking(self, look: Callable[[float, bool], None]) -> None:
        """Call this a few times a second, with the time and whether the loop was away, until cancelled."""
        pause_s = min(LOOK_S, self._ready_s / 10)
        looked_s = time.monotonic()
        while True:
            await asyncio.sleep(pause_s)
            now = time.monotonic()
            look(now, now - looked_s > pause_s + LATE_S)
            looked_s = now

    def look(self, now_s: float, *, running_since_s: float | None, idle: bool, away: bool) -> str:
        """ "" for a replica that is ready, else why it is not. Sends the canary, and condemns a context that hangs.

        Args:
            now_s: The time.
            running_since_s: When the oldest of those that run and have tokens came; None when there is none.
            idle: Nothing is here, running or waiting.
            away: The looker itself was away: silence until now proves nothing.
        """
        vitals, canary, worker = self._vitals, self._canary, self._worker
        self._now_s = now_s
        steps = worker.steps
        if steps != self._steps or away:
            self._steps = steps
            vitals.moved(now_s)
        expecting = worker.busy
        if expecting:
            self._worked_s = now_s
        pause_s = max(CANARY_PART * self._ready_s, CANARY_COST * vitals.typical_s)
        if not expecting and idle and self.canary_prompt and worker.ready and now_s - self._worked_s >= pause_s:
            canary.send(self.canary_prompt, now_s)
        elif not expecting and (not idle or not self.canary_prompt or not worker.ready or pause_s > self._ready_s):
            vitals.moved(now_s)  # nothing is expected of it
        elif expecting and now_s - vitals.moved_s > max(self._hang_s, 2 * vitals.silence_s) + GRACE_S:
            log.error("context neither steps nor answers", replica=self._name, silence_s=now_s - vitals.moved_s)
            worker.condemn(Fault(loss=Loss.HANG))
            vitals.moved(now_s)
        failing_since_s = vitals.failing_since_s
        if failing_since_s is not None and running_since_s is not None and running_since_s < failing_since_s:
            vitals.succeeded()  # somebody's answer has been going on all the time
        return vitals.judge(now_s)
