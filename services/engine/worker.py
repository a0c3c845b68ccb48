"""The stable tier: owns the context through the supervisor and has an answer for every sequence, whatever happens to the context.

Imports no device library. A sequence that runs when its context dies is continued on the next one from the tokens it has, where
the runner can do that; otherwise its owner hears ContextPoisoned. It is tried alone first (probation.py): the one that kills its
context again, alone, is Quarantined.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from inference_runtime.errors import ContextPoisoned, InferenceError, Internal, Quarantined
from inference_runtime.generation import SamplingParams
from inference_runtime.runner import RunnerConfig, RunnerInfo, StepOutput, StepRequest
from inference_runtime.stepping import StepReport
from inference_runtime.supervision import DEFAULT_POLICY, ContextFault, GaveUp, Loss, RestartPolicy, Supervisor
from inference_runtime.supervision.policy import KILLED_STATUS
from inference_runtime.telemetry import get_logger
from services.engine.context import Context, ContextFactory
from services.engine.probation import Probation

__all__ = ["Flight", "FlightOwner", "Worker", "WorkerListener"]

log = get_logger(__name__)

#: Deaths of a context that one sequence may be present at, though it was cleared after each. At the last one it ends here: it may
#: be part of the cause.
MAX_CONTEXT_DEATHS = 3


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
    """One sequence on a context, with what is needed to continue it on the next. `launch` gives it another id each time, so that
    late outputs of an earlier launch belong to nobody."""

    sequence_id: int
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    owner: FlightOwner
    generated: list[int] = field(default_factory=list)
    cache_salt: str = ""
    context_deaths: int = 0
    choice: int = 0

    def step_request(self) -> StepRequest:
        """The sequence as a context takes it: from where it stands."""
        return StepRequest(
            self.sequence_id,
            self.prompt_token_ids,
            self.sampling,
            self.choice,
            generated_prefix=tuple(self.generated),
            cache_salt=self.cache_salt,
        )


class WorkerListener(Protocol):
    """Who hears about the worker as a whole."""

    def on_ready(self, info: RunnerInfo) -> None:
        """A context works and takes sequences; those that survived the last one are already on it."""
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
        self._flights: dict[int, Flight] = {}  # on the context
        self._probation: Probation[Flight] = Probation()  # those that are not, for now
        self._ids = itertools.count(1)
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
        return self._context is not None and not self._probation.active

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
        flight.sequence_id = next(self._ids)
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
            self._probation.drop(flight)
            return False
        self._context.abort(flight.sequence_id)
        if flight is self._probation.current:
            self._board()
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
        log.info("context ready", replica=self._name, generation=generation, on_probation=self._probation.active)
        self._board()

    def _board(self) -> None:
        """Put those on the context whose turn it is, and open it to others when nobody is on probation any more."""
        while self._context is not None and self._info is not None:
            for flight in self._probation.board():
                self.launch(flight)
            suspect = self._probation.current
            if suspect is None:
                self._listener.on_ready(self._info)
                return
            if suspect.sequence_id in self._flights:
                return

    def _on_down(self, err: Exception) -> None:
        self._context = None
        fault = not isinstance(err, _Rebuild)
        log.warning("context replaced", replica=self._name, cause=str(err), flights=len(self._flights), fault=fault)
        present = list(self._flights.values())
        self._flights.clear()
        suspicious = fault and not _from_outside(err)
        survivors = [flight for flight in present if self._survives(flight, suspicious, alone=len(present) == 1)]
        if suspicious:
            self._probation.suspect(survivors)
        else:
            self._probation.suspend(survivors)
        self._listener.on_down(ContextPoisoned(str(err)) if fault else err)

    def _survives(self, flight: Flight, suspicious: bool, *, alone: bool) -> bool:
        """Whether a sequence may go on after the end of the context it was on. One that may not is told."""
        flight.context_deaths += suspicious
        err: InferenceError
        if suspicious and alone and flight.context_deaths > 1:
            err = Quarantined(
                "the device context died twice with this request on it, the second time with nothing else; it is not run again",
                context_deaths=str(flight.context_deaths),
            )
        elif flight.context_deaths >= MAX_CONTEXT_DEATHS:
            err = _lost(f"was present at {MAX_CONTEXT_DEATHS} of its deaths", flight)
        elif flight.generated and not self._can_resume:
            err = _lost("had begun, and this runtime cannot continue an answer", flight)
        else:
            return True
        flight.owner.on_failure(err)
        return False

    @property
    def _can_resume(self) -> bool:
        return self._info is not None and self._info.capabilities.resume

    def _judge_suspect(self, suspect: Flight) -> None:
        """After an output of the sequence that is tried: go on to the next one if this one is over or cleared."""
        if suspect.sequence_id in self._flights:
            if not self._can_resume or not self._probation.clears(suspect):
                return
            leaves = self._probation.clear()
            if leaves is not None and self._context is not None:
                del self._flights[leaves.sequence_id]
                self._context.abort(leaves.sequence_id)
        self._board()

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
        suspect = self._probation.current
        if suspect is not None and any(output.sequence_id == suspect.sequence_id for output in report.outputs):
            self._judge_suspect(suspect)
        self.kv_use = report.kv_use
        self._listener.on_report(report)

    def _fail_all(self, err: InferenceError) -> None:
        flights = [*self._flights.values(), *self._probation.empty()]
        self._flights.clear()
        for flight in flights:
            flight.owner.on_failure(err)


def _from_outside(err: Exception) -> bool:
    """Whether the context was killed by somebody else: no sequence on it can have been the cause."""
    if not isinstance(err, ContextFault):
        return False
    fault = err.fault
    return fault.exit_status == KILLED_STATUS and not fault.oom_killed and fault.loss in (Loss.NONE, Loss.EOF)


def _lost(why: str, flight: Flight) -> ContextPoisoned:
    return ContextPoisoned(f"the device context died and the request {why}", context_deaths=str(flight.context_deaths))
