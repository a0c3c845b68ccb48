"""The loop that owns one restartable child: start it, watch it, replace it, give up.

How a child is made (thread, process) is the spawner's business; this loop is the same for all.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from inference_runtime.supervision.policy import (
    DEFAULT_POLICY,
    Decider,
    Directive,
    Fault,
    FaultPhase,
    RestartIntensity,
    RestartPolicy,
    restart_delay_s,
)

__all__ = ["Child", "GaveUp", "Supervisor"]


class Child(Protocol):
    """One life of what is supervised."""

    async def start(self) -> None:
        """Return once it works. Raises what kept it from working."""
        ...

    async def died(self) -> Exception:
        """Wait for its death, and return the cause: a ContextFault, or what the decider will take for one."""
        ...

    async def close(self) -> None:
        """Release everything it holds. Idempotent; called after each life, whatever its end."""
        ...


class GaveUp(Exception):
    """The supervisor stopped restarting. Its text is the reason, one sentence; its cause is the last fault."""


C = TypeVar("C", bound=Child)


class Supervisor(Generic[C]):
    """Keeps one child alive.

    Args:
        spawn: Makes the child of a generation (1, 2, …). Does not start it.
        policy: When restarts are too many, and the pauses between them.
        on_ready: Called with each child that works, and its generation.
        on_down: Called with the cause after each death that will be followed by a restart, before the old child is closed.
            Returns True when it has removed the cause: the next life then begins without a pause.
        now_s: Monotonic clock, seconds.
    """

    def __init__(
        self,
        spawn: Callable[[int], C],
        *,
        policy: RestartPolicy = DEFAULT_POLICY,
        on_ready: Callable[[C, int], None],
        on_down: Callable[[Exception], bool | None],
        now_s: Callable[[], float],
    ) -> None:
        self._spawn, self._policy = spawn, policy
        self._decider, self._intensity = Decider(), RestartIntensity(policy)
        self._on_ready, self._on_down, self._now_s = on_ready, on_down, now_s
        self._asked: asyncio.Future[tuple[Exception, bool]] | None = None  # the cause, and whether it is a fault
        #: Number of the present life, from 1.
        self.generation = 0
        #: Replacements of a child so far, those that were asked for included.
        self.restarts = 0

    def restart(self, cause: Exception, *, fault: bool = False) -> None:
        """Replace the child now. Counts as its death when it is a fault, else against nobody. Ignored while no child works."""
        if self._asked is not None and not self._asked.done():
            self._asked.set_result((cause, fault))

    def reset(self) -> None:
        """Forget all faults, so that `run` may be called again after it gave up."""
        self._decider.reset()
        self._intensity.reset()

    async def run(self) -> None:
        """Supervise until cancelled.

        Raises:
            GaveUp: The child died too often, or of something that a restart does not heal.

        On cancel: the child is closed, then CancelledError goes on.
        """
        while True:
            self.generation += 1
            child = self._spawn(self.generation)
            pause_s = 0.0
            try:
                err, worked_s, asked = await self._live(child)
                if not asked:
                    pause_s = self._check(err, worked_s)
                self.restarts += 1
                if self._on_down(err):
                    pause_s = 0.0
            finally:
                await child.close()
            if pause_s:
                await asyncio.sleep(pause_s)

    async def _live(self, child: C) -> tuple[Exception, float | None, bool]:
        """One life. Returns what ended it, how long it worked (seconds; None: never), and whether the end was asked for."""
        try:
            await child.start()
        except Exception as err:  # noqa: BLE001 - whatever a child's start raises is the decider's to judge
            return err, None, False
        self._asked = asyncio.get_running_loop().create_future()
        begin_s = self._now_s()
        self._on_ready(child, self.generation)
        try:
            cause, asked = await _first(child.died(), self._asked)
            return cause, self._now_s() - begin_s, asked
        finally:
            self._asked.cancel()

    def _check(self, err: Exception, worked_s: float | None) -> float:
        """The pause before the next life, seconds. Raises GaveUp when this fault ends it all."""
        fault = Fault.of(err, FaultPhase.LOAD if worked_s is None else FaultPhase.STEP)
        now_s = self._now_s()
        verdict = self._decider.judge(fault, now_s)
        if verdict.directive is Directive.STOP:  # RESUME is too late here: the life is over, so it restarts
            raise GaveUp(fault.sentence) from err
        refusal = self._intensity.note(now_s, worked_s or 0.0)
        if refusal:
            raise GaveUp(f"{refusal}; the last cause: {fault.sentence}") from err
        return restart_delay_s(self._policy, self._intensity.in_a_row, random.random())


async def _first(died: Awaitable[Exception], asked: asyncio.Future[tuple[Exception, bool]]) -> tuple[Exception, bool]:
    """Whichever comes first: a death, or a request to replace the child. Returns the cause, and whether it is no fault."""
    watch = asyncio.ensure_future(died)
    either: list[asyncio.Future[Exception] | asyncio.Future[tuple[Exception, bool]]] = [watch, asked]
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if watch.done():
            return watch.result(), False
        cause, fault = asked.result()
        return cause, not fault
    finally:
        watch.cancel()
