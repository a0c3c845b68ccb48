"""The stable tier: owns the context through the supervisor and has an answer for every sequence, whatever happens to the context.

Imports no device library. A sequence that runs when its context dies, or runs out of memory, is continued from the tokens it has,
where the runner can do that; otherwise its owner hears why not. Which sequence was the cause is found by trial (probation.py):
the one that kills its context again is Quarantined, the one that does not fit even alone is RequestTooLarge.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from inference_runtime.errors import ContextPoisoned, InferenceError, Internal, Quarantined, RequestTooLarge
from inference_runtime.generation import SamplingParams
from inference_runtime.runner import RunnerConfig, RunnerInfo, StepOutput, StepRequest
from inference_runtime.stepping import StepReport, ran_out_of_memory
from inference_runtime.supervision import DEFAULT_POLICY, ContextFault, Fault, GaveUp, Loss, RestartPolicy, Supervisor
from inference_runtime.supervision.policy import KILLED_STATUS
from inference_runtime.telemetry import get_logger
from services.engine.context import Context, ContextFactory
from services.engine.probation import CLEARING_OUTPUTS, TRIALS_S, Probation

__all__ = ["Flight", "FlightOwner", "Worker", "WorkerListener"]

log = get_logger(__name__)

#: Deaths of a context that one sequence may be present at, though it was cleared after each. At the last one it ends here: it may
#: be part of the cause. Deaths whose cause was found do not count.
MAX_CONTEXT_DEATHS = 3
#: Part of a batch that leaves when all of it together, with nobody new in it, has become too large for the memory.
SHED_PART = 0.1


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
    #: Unexplained deaths that it was present at, those on other engines included.
    context_deaths: int = 0
    choice: int = 0
    #: Tokens it had when it was launched.
    launched_with: int = 0

    @property
    def outputs_here(self) -> int:
        """Tokens made since it was launched."""
        return len(self.generated) - self.launched_with

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
        """The context takes sequences, for the first time or again; those that survived the last one are already on it."""
        ...

    def on_down(self, err: Exception) -> None:
        """The context died and another one is coming."""
        ...

    def on_report(self, report: StepReport) -> None:
        """A step is over, its outputs delivered."""
        ...

    def on_out_of_memory(self, sequences: int) -> None:
        """A step with this many sequences, none of them new, was too large for the device. The context is sound."""
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
        trials_s: Time that finding the cause of a death may keep the others waiting, seconds.
    """

    def __init__(
        self,
        contexts: ContextFactory,
        config: RunnerConfig,
        *,
        name: str,
        listener: WorkerListener,
        policy: RestartPolicy = DEFAULT_POLICY,
        trials_s: float = TRIALS_S,
    ) -> None:
        self._contexts, self._config, self._name, self._listener = contexts, config, name, listener
        self._context: Context | None = None
        self._flights: dict[int, Flight] = {}  # on the context
        self._probation: Probation[Flight] = Probation(trials_s)  # those that are not, for now
        self._trials_end: asyncio.TimerHandle | None = None
        self._canary: Flight | None = None  # of ours: it is no suspect, and nobody waits for it
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
    def busy(self) -> bool:
        """Whether the context has something to do."""
        return bool(self._flights)

    @property
    def steps(self) -> int:
        """Steps that the present context has made."""
        return self._context.steps if self._context is not None else 0

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
            self._stop_trials_clock()
            self._fail_all(f"the replica failed: {err}", suspicious=not _from_outside(err.__cause__))
            raise

    def launch(self, flight: Flight) -> None:
        """Put a sequence on the context. `ready` must be true. A refusal is reported as the sequence's failure.

        One that was present at deaths elsewhere is tried here before it is one of many.
        """
        if self._canary is not None:
            self.abort(self._canary)
        if flight.context_deaths:
            self._probation.hold((), (flight,), time.monotonic())  # those of one replica that gave up come together
            self._board()
        else:
            self._put(flight)

    def launch_canary(self, flight: Flight) -> None:
        """Put a sequence of our own on an idle context. The first real one takes its place: its owner then hears nothing."""
        self._canary = flight
        self._put(flight)
        if flight.sequence_id not in self._flights:
            self._canary = None

    def _put(self, flight: Flight) -> None:
        assert self._context is not None
        flight.sequence_id, flight.launched_with = next(self._ids), len(flight.generated)
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
        if flight is self._canary:
            self._canary = None
        if self._flights.pop(flight.sequence_id, None) is None or self._context is None:
            self._probation.drop(flight)
            return False
        self._context.abort(flight.sequence_id)
        if self._probation.drop(flight):
            self._board()
        return True

    def holds(self, flight: Flight) -> bool:
        """Whether a sequence is on the context now."""
        return flight.sequence_id in self._flights

    def rebuild(self) -> None:
        """Replace the context now; what runs is continued on the next one."""
        self._supervisor.restart(_Rebuild("a rebuild was asked for"))

    def condemn(self, fault: Fault) -> None:
        """Replace the context because of this fault, which it cannot tell of itself. Ignored while there is none."""
        self._supervisor.restart(ContextFault(fault), fault=True)

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
        """Put those on the context whose turn it is, and open it to others when the trials are over."""
        self._stop_trials_clock()
        while self._context is not None and self._info is not None:
            now = time.monotonic()
            for flight in self._probation.board(now):
                self._put(flight)
            suspect = self._probation.current
            if suspect is not None and suspect.sequence_id in self._flights:
                loop = asyncio.get_running_loop()
                self._trials_end = loop.call_later(max(0.0, self._probation.left_s(now)), self._board)
                return
            if not self._probation.active:
                self._listener.on_ready(self._info)
                return

    def _stop_trials_clock(self) -> None:
        if self._trials_end is not None:
            self._trials_end.cancel()
            self._trials_end = None

    def _on_down(self, err: Exception) -> bool:
        """Take in the survivors. Returns whether what killed the context was found: it does not come back."""
        self._context = None
        found = False
        self._stop_trials_clock()
        fault = not isinstance(err, _Rebuild)
        present = self._take_all()
        log.warning("context replaced", replica=self._name, cause=str(err), flights=len(present), fault=fault)
        if fault and not _from_outside(err):
            found = self._blame(present)
        else:
            self._probation.suspend(present, time.monotonic())
        for flight in present:
            if flight.generated and not self._can_resume:
                self._end(flight, _lost("had begun, and this runtime cannot continue an answer", flight))
        self._listener.on_down(ContextPoisoned(str(err)) if fault else err)
        return found

    def _take_all(self) -> list[Flight]:
        """Those on the context, which is no more. The canary ends with it."""
        present = [flight for flight in self._flights.values() if flight is not self._canary]
        self._flights.clear()
        self._canary = None
        return present

    def _blame(self, present: list[Flight]) -> bool:
        """A context died with these on it: end the one that killed it, where that is certain, and have the others tried. Returns
        whether it was found."""
        again = len(present) == 1 and present[0].context_deaths > 0
        killer = self._probation.blame(present, time.monotonic(), again=again)
        if killer is not None:
            killer.context_deaths += 1
            present.remove(killer)
            self._end(killer, _quarantined(killer))
            return True
        for flight in list(present):
            flight.context_deaths += 1
            if flight.context_deaths >= MAX_CONTEXT_DEATHS:
                present.remove(flight)
                self._end(flight, _lost(f"was present at {MAX_CONTEXT_DEATHS} of its deaths", flight))
        return False

    def _end(self, flight: Flight, err: InferenceError) -> None:
        self._probation.drop(flight)
        flight.owner.on_failure(err)

    @property
    def _can_resume(self) -> bool:
        return self._info is not None and self._info.capabilities.resume

    def _on_step(self, report: StepReport) -> None:
        flights, trials = self._flights, self._probation.active
        if self._probation.watches:
            for output in report.outputs:
                flight = flights.get(output.sequence_id)
                if flight is not None and output.error is None:
                    self._probation.count(flight)
        starved: list[tuple[Flight, InferenceError]] = []
        for output in report.outputs:
            flight = flights.get(output.sequence_id)
            if flight is None:  # aborted while the step ran
                continue
            if output.finish_reason is not None or output.error is not None:
                del flights[output.sequence_id]
                if flight is self._canary:
                    self._canary = None
                elif output.error is not None and (err := ran_out_of_memory(output.error)) is not None:
                    starved.append((flight, err))
                    continue
            flight.generated += output.token_ids
            try:
                flight.owner.on_output(output)
            except Exception as err:
                log.error("output not delivered", replica=self._name, sequence=output.sequence_id, exc_info=err)
                self.abort(flight)  # the others of this step must not suffer
                flight.owner.on_failure(Internal(f"output cannot be delivered: {err!r}"))
        if starved:
            self._starve(starved)
        if starved or (trials and self._probation.current is None):
            self._board()
        self.kv_use = report.kv_use
        self._listener.on_report(report)

    def _starve(self, starved: list[tuple[Flight, InferenceError]]) -> None:
        """A step ran out of memory and made nothing; the context is sound. Most go on, who may have been too much waits.

        What had just been read is tried beside the others, and ends if it is too much a second time: elsewhere it would be, too.
        Where nobody was new, the batch has grown too large: its newest leave, and may go on elsewhere.
        """
        errors = dict(starved)
        present = [flight for flight, _ in starved]
        suspects = self._probation.take(present)
        if len(present) == 1 and len(self._flights) <= (self._canary is not None):
            self._end(present[0], _too_large("even with nothing else on it"))
            return
        leaving = suspects if len(suspects) == 1 else [f for f in present if f.generated and not self._can_resume]
        fresh = [] if len(suspects) == 1 else suspects or [f for f in present if f.outputs_here < CLEARING_OUTPUTS]
        if not leaving and not fresh:
            self._listener.on_out_of_memory(len(present))
            leaving = sorted(present, key=lambda f: f.sequence_id)[-max(1, int(SHED_PART * len(present))) :]
        for flight in leaving:
            self._end(flight, _too_large("beside what runs there") if suspects else errors[flight])
        others = [f for f in present if f not in fresh and f not in leaving]
        fresh = [f for f in fresh if f not in leaving]
        self._probation.hold(others, fresh, time.monotonic(), certain=len(suspects) > 1)

    def _fail_all(self, cause: str, *, suspicious: bool) -> None:
        """No context will work any more. Each is told at how many deaths it was present, for it may go on elsewhere."""
        present = self._take_all()
        if suspicious:
            self._blame(present)
        else:
            self._probation.suspend(present, time.monotonic())
        for flight in self._probation.empty():
            flight.owner.on_failure(ContextPoisoned(cause, context_deaths=str(flight.context_deaths)))


def _from_outside(err: BaseException | None) -> bool:
    """Whether the context was killed by somebody else: no sequence on it can have been the cause."""
    if not isinstance(err, ContextFault):
        return False
    fault = err.fault
    return fault.exit_status == KILLED_STATUS and not fault.oom_killed and fault.loss in (Loss.NONE, Loss.EOF)


def _quarantined(flight: Flight) -> Quarantined:
    return Quarantined(
        "the device context died twice with this request on it, the second time with nothing else that could be the cause; "
        "it is not run again",
        context_deaths=str(flight.context_deaths),
    )


def _too_large(beside: str) -> RequestTooLarge:
    return RequestTooLarge(
        f"this request needs more memory than the device of its replica has, {beside}; shorten the prompt", param="messages"
    )


def _lost(why: str, flight: Flight) -> ContextPoisoned:
    return ContextPoisoned(f"the device context died and the request {why}", context_deaths=str(flight.context_deaths))
