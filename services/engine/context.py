"""The restartable tier: one life of a device context with its runner and what steps it.

`Context` is its face for the worker. `ThreadContext` lives in a thread of the engine process: for CPU and tests. Heavy packages
are imported only in that thread, by the runtime's `make_runner`. `process_context.py` offers the same face for a child process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from inference_runtime.errors import InferenceError
from inference_runtime.runner import Isolation, LoadProgress, RunnerConfig, RunnerInfo, Runtime, StepRequest
from inference_runtime.stepping import StepLoop, StepReport
from inference_runtime.supervision import ContextFault, Fault
from inference_runtime.telemetry import get_logger

__all__ = ["Context", "ContextFactory", "OnStep", "ThreadContext"]

log = get_logger(__name__)

OnStep = Callable[[StepReport], None]


class Context(Protocol):
    """One life. Made by the worker's supervisor, which starts, watches and closes it."""

    @property
    def progress(self) -> LoadProgress:
        """How far loading is."""
        ...

    @property
    def info(self) -> RunnerInfo:
        """What was loaded. Valid after `start`."""
        ...

    @property
    def steps(self) -> int:
        """Steps made so far, those that gave nothing included. Known within a fraction of a second."""
        ...

    async def start(self) -> None:
        """Load the model. Raises ContextFault."""
        ...

    async def died(self) -> Exception:
        """Wait for its death; the answer is a ContextFault."""
        ...

    async def close(self) -> None:
        """Release the device and everything else."""
        ...

    def admit(self, request: StepRequest) -> None:
        """Order a sequence in. Raises Backpressure when too many orders wait, BadRequest when this one cannot be carried."""
        ...

    def abort(self, sequence_id: int) -> None:
        """Order a sequence out before the next step."""
        ...


#: Makes the context of a life: what to load, name, generation, who hears of each step (on the event loop; not after `close`).
ContextFactory = Callable[[RunnerConfig, str, int, OnStep], Context]


class ThreadContext:
    """A context in a thread of this process.

    Args:
        runtime: Makes the runner.
        config: What it is configured with.
        name: Name of the thread.
        on_step: Hears of each step, on the event loop. Not called after `close`.
    """

    def __init__(self, runtime: Runtime, config: RunnerConfig, *, name: str, on_step: OnStep) -> None:
        loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[RunnerInfo] = loop.create_future()
        self._died: asyncio.Future[Exception] = loop.create_future()
        self._deliver = on_step
        self._closed = False
        self.progress = LoadProgress(0, 0, "starting")
        self._steps = StepLoop(
            lambda: runtime.make_runner(config), self, name=name, max_batch=config.max_batch, progress=self._note_progress
        )

    async def start(self) -> None:
        """Load the model. Raises ContextFault."""
        self._steps.start()
        await self._loaded

    @property
    def info(self) -> RunnerInfo:
        """What was loaded. Valid after `start`."""
        return self._loaded.result()

    @property
    def steps(self) -> int:
        """Steps made so far."""
        return self._steps.steps

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
            self._loaded.set_result(replace(info, isolation=Isolation.THREAD))

    def on_step(self, report: StepReport) -> None:
        """Pass a step on, unless this life was given up: what it did since is not wanted any more."""
        if not self._closed:
            self._deliver(report)

    def on_death(self, err: Exception, fault: Fault) -> None:
        """The loop is over. The exception goes no further: its frames hold the runner, and with it the device's memory."""
        if not isinstance(err, InferenceError):
            log.error("context died", exc_info=err, fault=fault.sentence)
        death = ContextFault(fault)
        if not self._loaded.done():
            self._loaded.set_exception(death)
        if not self._died.done():
            self._died.set_result(death)
