"""The restartable tier: one life of a device context with its runner and the thread that steps it.

This is thread isolation: the context lives in a thread of the engine process. Heavy packages are imported only in that thread,
by the runtime's `make_runner`. A spawner for child processes offers the same face.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from inference_runtime.runner import LoadProgress, RunnerConfig, RunnerInfo, Runtime, StepRequest
from inference_runtime.stepping import StepLoop, StepReport

__all__ = ["ThreadContext"]


class ThreadContext:
    """One life. Made by the worker's supervisor, which starts, watches and closes it.

    Args:
        runtime: Makes the runner.
        config: What it is configured with.
        name: Name of the thread.
        on_step: Hears of each step, on the event loop. Not called after `close`.
    """

    def __init__(self, runtime: Runtime, config: RunnerConfig, *, name: str, on_step: Callable[[StepReport], None]) -> None:
        loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[RunnerInfo] = loop.create_future()
        self._died: asyncio.Future[Exception] = loop.create_future()
        self._deliver = on_step
        self._closed = False
        #: How far loading is.
        self.progress = LoadProgress(0, 0, "starting")
        self._steps = StepLoop(
            lambda: runtime.make_runner(config), self, name=name, max_batch=config.max_batch, progress=self._note_progress
        )

    async def start(self) -> None:
        """Load the model. Raises what its load raises."""
        self._steps.start()
        await self._loaded

    @property
    def info(self) -> RunnerInfo:
        """What was loaded. Valid after `start`."""
        return self._loaded.result()

    async def died(self) -> Exception:
        """Wait for the death of the step loop."""
        return await asyncio.shield(self._died)

    async def close(self) -> None:
        """End the thread, which releases the device."""
        self._closed = True
        await self._steps.close()

    def admit(self, request: StepRequest) -> None:
        """Order a sequence in. Raises Backpressure when the mailbox is full."""
        self._steps.admit(request)

    def abort(self, sequence_id: int) -> None:
        """Order a sequence out before the next step."""
        self._steps.abort(sequence_id)

    def _note_progress(self, progress: LoadProgress) -> None:  # in the thread; one reference, written whole
        self.progress = progress

    # --- StepListener ------------------------------------------------------------------------------------------------

    def on_loaded(self, info: RunnerInfo) -> None:
        """The runner is ready."""
        if not self._loaded.done():
            self._loaded.set_result(info)

    def on_step(self, report: StepReport) -> None:
        """Pass a step on, unless this life was given up: what it did since is not wanted any more."""
        if not self._closed:
            self._deliver(report)

    def on_death(self, err: Exception) -> None:
        """The loop is over."""
        if not self._loaded.done():
            self._loaded.set_exception(err)
        if not self._died.done():
            self._died.set_result(err)
