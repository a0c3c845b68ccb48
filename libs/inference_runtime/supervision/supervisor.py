"""The loop that owns one restartable child: start it, watch it, replace it, give up.

How a child is made (thread, process) is the spawner's business; this loop is the same for all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from inference_runtime.errors import InferenceError
from inference_runtime.supervision.policy import Directive, RestartIntensity

__all__ = ["Child", "GaveUp", "Supervisor"]


class Child(Protocol):
    """One life of what is supervised."""

    async def start(self) -> None:
        """Return once it works. Raises what kept it from working."""
        ...

    async def died(self) -> Exception:
        """Wait for its death, and return the cause."""
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
        decide: What to do about the exception that ended a life.
        intensity: When restarts are too many.
        on_ready: Called with each child that works, and its generation.
        on_down: Called with the cause after each death that will be followed by a restart, before the old child is closed.
        now_s: Monotonic clock, seconds.
    """

    def __init__(
        self,
        spawn: Callable[[int], C],
        *,
        decide: Callable[[BaseException], Directive],
        intensity: RestartIntensity,
        on_ready: Callable[[C, int], None],
        on_down: Callable[[Exception], None],
        now_s: Callable[[], float],
    ) -> None:
        self._spawn, self._decide, self._intensity = spawn, decide, intensity
        self._on_ready, self._on_down, self._now_s = on_ready, on_down, now_s
        self._asked: asyncio.Future[Exception] | None = None
        #: Number of the present life, from 1.
        self.generation = 0
        #: Replacements of a child so far, those that were asked for included.
        self.restarts = 0

    def restart(self, cause: Exception) -> None:
        """Replace the child now. Does not count against the intensity. Ignored while no child works."""
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(cause)

    async def run(self) -> None:
        """Supervise until cancelled.

        Raises:
            GaveUp: The child died too often, or of something that a restart does not heal.

        On cancel: the child is closed, then CancelledError goes on.
        """
        while True:
            self.generation += 1
            child = self._spawn(self.generation)
            try:
                err, asked = await self._live(child)
                if not asked:
                    self._check(err)
                self.restarts += 1
                self._on_down(err)
            finally:
                await child.close()

    async def _live(self, child: C) -> tuple[Exception, bool]:
        """One life. Returns what ended it, and whether that was asked for."""
        try:
            await child.start()
        except Exception as err:  # noqa: BLE001 - whatever a child's start raises is the decider's to judge
            return err, False
        self._asked = asyncio.get_running_loop().create_future()
        self._on_ready(child, self.generation)
        try:
            return await _first(child.died(), self._asked)
        finally:
            self._asked.cancel()

    def _check(self, err: Exception) -> None:
        """Raise GaveUp when this fault ends it all."""
        directive = self._decide(err)
        if directive is not Directive.RESTART:
            raise GaveUp(_sentence(err)) from err
        if not self._intensity.allow(self._now_s()):
            raise GaveUp(
                f"died more than {self._intensity.max_restarts} times within {self._intensity.window_s:g} s; "
                f"the last cause: {_sentence(err)}"
            ) from err


def _sentence(err: Exception) -> str:
    return err.message if isinstance(err, InferenceError) else f"{type(err).__name__}: {err}"


async def _first(died: Awaitable[Exception], asked: asyncio.Future[Exception]) -> tuple[Exception, bool]:
    """Whichever comes first: a death, or a request to replace the child."""
    watch = asyncio.ensure_future(died)
    try:
        await asyncio.wait([watch, asked], return_when=asyncio.FIRST_COMPLETED)
        if watch.done():
            return watch.result(), False
        return asked.result(), True
    finally:
        watch.cancel()
