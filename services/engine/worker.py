"""The stable tier: owns the context through the supervisor and has an answer for every sequence, whatever happens to the context.

Imports no device library. A sequence that runs when its context dies is continued on the next one from the tokens it has, where
the runner can do that; otherwise its owner hears ContextPoisoned.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from inference_runtime.errors import ContextPoisoned, InferenceError, Internal
from inference_runtime.generation import SamplingParams
from inference_runtime.runner import RunnerConfig, RunnerInfo, StepOutput, StepRequest
from inference_runtime.stepping import StepReport
from inference_runtime.supervision import DEFAULT_POLICY, GaveUp, RestartPolicy, Supervisor
from inference_runtime.telemetry import get_logger
from services.engine.context import Context, ContextFactory

__all__ = ["Flight", "FlightOwner", "Worker", "WorkerListener"]

log = get_logger(__name__)

#: Deaths of a context that one sequence may be present at. At the last one it ends: it may be the cause.
MAX_CONTEXT_DEATHS = 2


class FlightOwner(Protocol):
    """Who hears about one sequence. Calls come on the event loop."""

    def on_output(self, output: StepOutput) -> None:
        """New tokens, the end, or an error of this sequence. After an end or error nothing follows."""
        ...

    def on_failure(self, err: InferenceError) -> None:
        """The sequence ends because its context is gone."""
        ...


@dataclass(slots=True, eq=False)
class Flight:
    """One sequence on a context, with what is needed to continue it on the next."""

    sequence_id: int
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    owner: FlightOwner
    generated: list[int] = field(default_factory=list)
    cache_salt: str = ""
    context_deaths: int = 0

    def step_request(self) -> StepRequest:
        """The sequence as a context takes it: from where it stands."""
        return StepRequest(
            self.sequence_id,
            self.prompt_token_ids,
            self.sampling,
            generated_prefix=tuple(self.generated),
            cache_salt=self.cache_salt,
        )


class WorkerListener(Protocol):
    """Who hears about the worker as a whole."""

    def on_ready(self, info: RunnerInfo) -> None:
        """A context works; sequences that survived the last one are already on it."""
        ...

    def on_down(self, err: Exception) -> None:
        """The context died and another one is coming."""
        ...

    def on_report(self, report: StepReport) -> None:
        """A step is over, its outputs delivered."""
        ...


class _Rebuild(Exception):
    """A person asked for another context."""


class Worker:
    """Runs sequences on a context that may die.

    Args:
        contexts: Makes contexts, in a thread or a process of their own.
        config: What their runners are configured with.
        name: For threads and logs.
        listener: Hears about the whole.
        policy: When restarts are too many, and the pauses between them.
    """

    def __init__(
        self,
        contexts: ContextFactory,
        config: RunnerConfig,
        *,
        name: str,
        listener: WorkerListener,
        policy: RestartPolicy = DEFAULT_POLICY,
    ) -> None:
        self._contexts, self._config, self._name, self._listener = contexts, config, name, listener
        self._context: Context | None = None
        self._flights: dict[int, Flight] = {}
        self._info: RunnerInfo | None = None
        self._supervisor: Supervisor[Context] = Supervisor(
            self._spawn,
            policy=policy,
            on_ready=self._on_ready,
            on_down=self._on_down,
            now_s=time.monotonic,
        )
        #: Share of the KV cache in use after the last step.
        self.kv_use = 0.0

    @property
    def ready(self) -> bool:
        """Whether there is a context that takes sequences."""
        return self._context is not None

    @property
    def generation(self) -> int:
        """Number of the present context, from 1."""
        return self._supervisor.generation

    @property
    def restarts(self) -> int:
        """Contexts that were replaced so far."""
        return self._supervisor.restarts

    async def run(self) -> None:
        """Keep a context alive until cancelled.

        Raises:
            GaveUp: No context will work. Every sequence has been told.
        """
        try:
            await self._supervisor.run()
        except GaveUp as err:
            self._context = None
            self._fail_all(ContextPoisoned(f"the replica failed: {err}"))
            raise

    def launch(self, flight: Flight) -> None:
        """Put a sequence on the context. `ready` must be true. A refusal is reported as the sequence's failure."""
        assert self._context is not None
        self._flights[flight.sequence_id] = flight
        try:
            self._context.admit(flight.step_request())
        except InferenceError as err:
            del self._flights[flight.sequence_id]
            flight.owner.on_failure(err)

    def abort(self, flight: Flight) -> bool:
        """Drop a sequence before the next step. Its owner hears nothing more.

        Returns:
            Whether a context has to drop it. False for sequences that ended, or that no context holds.
        """
        if self._flights.pop(flight.sequence_id, None) is None or self._context is None:
            return False
        self._context.abort(flight.sequence_id)
        return True

    def rebuild(self) -> None:
        """Replace the context now; what runs is continued on the next one."""
        self._supervisor.restart(_Rebuild("a rebuild was asked for"))

    def reset(self) -> None:
        """Forget all faults, so that `run` may be called again after it gave up."""
        self._supervisor.reset()

    # --- what the supervisor and the context say ---------------------------------------------------------------------

    def _spawn(self, generation: int) -> Context:
        return self._contexts(self._config, f"{self._name}-context-{generation}", generation, self._on_step)

    def _on_ready(self, context: Context, generation: int) -> None:
        self._context, self._info = context, context.info
        for flight in list(self._flights.values()):
            self.launch(flight)
        log.info("context ready", replica=self._name, generation=generation, resumed=len(self._flights))
        self._listener.on_ready(context.info)

    def _on_down(self, err: Exception) -> None:
        self._context = None
        fault = not isinstance(err, _Rebuild)
        log.warning("context replaced", replica=self._name, cause=str(err), flights=len(self._flights), fault=fault)
        can_resume = self._info is not None and self._info.capabilities.resume
        for flight in list(self._flights.values()):
            flight.context_deaths += fault
            if flight.context_deaths >= MAX_CONTEXT_DEATHS:
                self._fail(flight, "was present at the death of two contexts")
            elif flight.generated and not can_resume:
                self._fail(flight, "had begun, and this runtime cannot continue an answer")
        self._listener.on_down(ContextPoisoned(str(err)) if fault else err)

    def _on_step(self, report: StepReport) -> None:
        flights = self._flights
        for output in report.outputs:
            flight = flights.get(output.sequence_id)
            if flight is None:  # aborted while the step ran
                continue
            if output.finish_reason is not None or output.error is not None:
                del flights[output.sequence_id]
            flight.generated += output.token_ids
            try:
                flight.owner.on_output(output)
            except Exception as err:
                log.error("output not delivered", replica=self._name, sequence=output.sequence_id, exc_info=err)
                self.abort(flight)  # the others of this step must not suffer
                flight.owner.on_failure(Internal(f"output cannot be delivered: {err!r}"))
        self.kv_use = report.kv_use
        self._listener.on_report(report)

    def _fail(self, flight: Flight, why: str) -> None:
        del self._flights[flight.sequence_id]
        flight.owner.on_failure(
            ContextPoisoned(f"the device context died and the request {why}", context_deaths=str(flight.context_deaths))
        )

    def _fail_all(self, err: InferenceError) -> None:
        flights = list(self._flights.values())
        self._flights.clear()
        for flight in flights:
            flight.owner.on_failure(err)
