"""One thread that drives a StepRunner.

`StepCycle` is what the thread does: its mailbox, its steps, its death. `StepLoop` runs it in a thread and reports to an event
loop. The engine uses both behind an admission queue of its own; `stepped.py` makes a ModelRunner of them.
"""

from __future__ import annotations

import asyncio
import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from inference_runtime.errors import Backpressure, ContextPoisoned, InferenceError, Internal
from inference_runtime.runner import LoadProgress, RunnerInfo, StepOutput, StepRequest, StepRunner
from inference_runtime.supervision.policy import Decider, Directive, Fault, FaultClass, FaultPhase, Probe, Verdict
from inference_runtime.telemetry import get_logger

__all__ = [
    "StepCycle",
    "StepListener",
    "StepLoop",
    "StepPhase",
    "StepReport",
    "StepSink",
    "mailbox_capacity",
    "mailbox_full",
    "probe",
    "ran_out_of_memory",
]

log = get_logger(__name__)

#: Steps whose outputs the event loop has not seen yet. The thread may run ahead of the loop by this many, so that a pause of the
#: loop costs no device time, and no more, so that it cannot fill the memory.
MAX_UNSEEN_STEPS = 4
#: Orders that may wait for the thread, as a multiple of the sequences it runs at once.
MAILBOX_FACTOR = 4
#: Time a closing loop gets to end its step, seconds. After it the thread is left behind: nothing can stop a thread.
CLOSE_TIMEOUT_S = 10.0
#: Metadata `cause` of an error that means: this step needed more memory than there is.
OUT_OF_MEMORY = "out_of_memory"
#: Time that a context gets to prove that it still computes, seconds.
PROBE_LIMIT_S = 2.0


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did: its outputs, sequences that are gone since the last report, KV use after it, its duration."""

    outputs: Sequence[StepOutput]
    aborted: Sequence[int]
    kv_use: float
    duration_s: float


class StepListener(Protocol):
    """Whoever hears what a StepLoop does. All calls come on the event loop, in the order things happened."""

    def on_loaded(self, info: RunnerInfo) -> None:
        """The runner is loaded and takes sequences."""
        ...

    def on_step(self, report: StepReport) -> None:
        """A step produced something, or dropped something."""
        ...

    def on_death(self, err: Exception, fault: Fault) -> None:
        """The loop is over, because of this. No call follows."""
        ...


class StepSink(Protocol):
    """Whoever hears what a StepCycle does, in the cycle's own thread."""

    def loaded(self, info: RunnerInfo) -> None:
        """The runner is loaded."""
        ...

    def stepped(self, report: StepReport) -> None:
        """A step is over. May block: the cycle waits, and must not run far ahead of whoever reads."""
        ...

    def died(self, err: Exception, fault: Fault) -> None:
        """The cycle is over, because of this. The runner is not closed yet."""
        ...


class StepPhase(enum.IntEnum):
    """What a StepCycle is doing. Values travel in heartbeats."""

    LOADING = 1
    IDLE = 2
    STEPPING = 3


class StepCycle:
    """Drives a StepRunner for its whole life: made, loaded, stepped and closed in the thread that calls `run`.

    The cycle is: read the mailbox, step, hand the step's outputs over in one call. What an exception out of a step means is
    decided from structure (supervision.policy): either the sequences of that step fail and the cycle goes on, or it is over.

    Args:
        make_runner: Makes the runner.
        sink: Hears of it.
        name: For logs.
        max_batch: Sequences at once; bounds the mailbox.
        progress: Called while the runner loads.
    """

    def __init__(
        self,
        make_runner: Callable[[], StepRunner],
        sink: StepSink,
        *,
        name: str,
        max_batch: int,
        progress: Callable[[LoadProgress], None],
    ) -> None:
        self._make_runner, self._sink, self._progress, self._name = make_runner, sink, progress, name
        self._mailbox: deque[StepRequest | int] = deque()
        self._capacity = mailbox_capacity(max_batch)
        self._wake = threading.Event()
        self._decider = Decider()
        self._fault: Fault | None = None
        self._live: set[int] = set()
        #: Whether `run` is to end.
        self.stopping = False
        #: What it does now.
        self.phase = StepPhase.LOADING
        #: Steps done.
        self.steps = 0
        #: Orders carried out.
        self.orders = 0

    # --- from any thread ---------------------------------------------------------------------------------------------

    def admit(self, request: StepRequest) -> None:
        """Order a sequence in. A refusal of the runner comes as an output with an error. Raises Backpressure when full."""
        if len(self._mailbox) >= self._capacity:
            raise mailbox_full()
        self._mailbox.append(request)
        self._wake.set()

    def abort(self, sequence_id: int) -> None:
        """Order a sequence out before the next step. Never refused: there is at most one for each admitted sequence."""
        self._mailbox.append(sequence_id)
        self._wake.set()

    def stop(self) -> None:
        """End after the present step."""
        self.stopping = True
        self._wake.set()

    # --- in its thread -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Load and step until stopped or dead. Raises nothing: the sink hears of a death."""
        runner: StepRunner | None = None
        phase = FaultPhase.LOAD
        try:
            runner = self._make_runner()
            info = runner.load(self._progress)
            phase, self.phase = FaultPhase.STEP, StepPhase.IDLE
            self._sink.loaded(info)
            while not self.stopping:
                self._turn(runner)
        except BaseException as err:  # noqa: BLE001 - the thread's boundary: a supervisor judges every exception
            cause = err if isinstance(err, Exception) else Internal(f"the runner ended its thread: {err!r}")
            self._sink.died(cause, self._fault or Fault.of(cause, phase))
        finally:
            try:
                if runner is not None:
                    runner.close()
            except Exception as err:  # noqa: BLE001 - as above; a poisoned device may refuse to be released
                log.warning("runner did not close cleanly", thread=self._name, error=repr(err))

    def _turn(self, runner: StepRunner) -> None:
        """Mailbox, step, hand over."""
        refused, aborted = self._read_mailbox(runner)
        begin = time.perf_counter()
        outputs: Sequence[StepOutput] = ()
        if runner.has_work():
            self.phase = StepPhase.STEPPING
            try:
                outputs = runner.step()
            except Exception as err:  # noqa: BLE001 - what it means is decided from its structure
                outputs = self._fail_batch(runner, err, self._survive(runner, err))
            self.steps += 1
            for output in outputs:
                if output.finish_reason is not None or output.error is not None:
                    self._live.discard(output.sequence_id)
        elif not refused and not aborted:
            self.phase = StepPhase.IDLE
            self._wake.wait()
            self._wake.clear()
            return
        if refused or outputs or aborted:
            self._sink.stepped(
                StepReport([*refused, *outputs] if refused else outputs, aborted, runner.kv_use(), time.perf_counter() - begin)
            )

    def _survive(self, runner: StepRunner, err: Exception) -> Verdict:
        """Probe and decide. Raises the exception when the context does not outlive it."""
        self._fault = Fault.of(err, FaultPhase.STEP, probe(runner))
        verdict = self._decider.judge(self._fault, time.monotonic())
        if verdict.directive is not Directive.RESUME:
            raise err
        self._fault = None
        err.__traceback__ = None  # its frames hold tensors
        if verdict.fault_class is FaultClass.OUT_OF_MEMORY:
            _free_memory(runner)
        return verdict

    def _read_mailbox(self, runner: StepRunner) -> tuple[list[StepOutput], list[int]]:
        """Carry out all orders. Returns refusals, and sequences that were dropped."""
        refused: list[StepOutput] = []
        aborted: list[int] = []
        while self._mailbox:
            order = self._mailbox.popleft()
            self.orders += 1
            if isinstance(order, int):
                runner.abort(order)
                self._live.discard(order)
                aborted.append(order)
                continue
            try:
                runner.admit(order)
            except InferenceError as err:
                if isinstance(err, ContextPoisoned):
                    raise
                refused.append(StepOutput(order.sequence_id, (), error=err))
            except Exception as err:  # noqa: BLE001 - as for a step
                refused.append(StepOutput(order.sequence_id, (), error=_step_error(err, self._survive(runner, err))))
            else:
                self._live.add(order.sequence_id)
        return refused, aborted

    def _fail_batch(self, runner: StepRunner, err: Exception, verdict: Verdict) -> list[StepOutput]:
        """Drop every sequence after a step that failed and left the context sound."""
        log.warning("step failed", thread=self._name, sequences=len(self._live), error=repr(err), fault=verdict.fault_class.value)
        failed = sorted(self._live)
        self._live.clear()
        for sequence_id in failed:
            runner.abort(sequence_id)
        error = _step_error(err, verdict)
        return [StepOutput(sequence_id, (), error=error) for sequence_id in failed]


def mailbox_capacity(max_batch: int) -> int:
    """Orders that may wait for a step loop."""
    return MAILBOX_FACTOR * max_batch + MAILBOX_FACTOR


def mailbox_full() -> Backpressure:
    """The refusal of a step loop that has too many orders."""
    return Backpressure("the engine's step loop has too many orders waiting; try another replica")


def _step_error(err: Exception, verdict: Verdict) -> InferenceError:
    """What the sequences of a failed step are told."""
    if verdict.fault_class is FaultClass.OUT_OF_MEMORY:
        return Backpressure("the replica ran out of memory in this step; try again, or another replica", cause=OUT_OF_MEMORY)
    if isinstance(err, InferenceError):
        return err
    fault = Internal(f"the step failed: {type(err).__name__}: {err}")
    fault.__cause__ = err
    return fault


def ran_out_of_memory(err: Exception) -> Backpressure | None:
    """The error, when it says that a step ran out of memory and its sequences may go on otherwise; else None."""
    return err if isinstance(err, Backpressure) and err.metadata.get("cause") == OUT_OF_MEMORY else None


def _free_memory(runner: StepRunner) -> None:
    """Have the runner give back what it can, by its optional `on_oom()`. It gets no second chance: this is no place to fail."""
    free: Callable[[], None] | None = getattr(runner, "on_oom", None)
    if free is None:
        return
    try:
        free()
    except Exception as err:  # noqa: BLE001 - the next step shows whether the context is sound
        log.warning("memory was not given back", error=repr(err))


def probe(runner: StepRunner, limit_s: float = PROBE_LIMIT_S) -> Probe:
    """Ask the runner's optional `probe()` whether its context still computes; on a fresh thread, for it may never answer."""
    ask: Callable[[], bool] | None = getattr(runner, "probe", None)
    if ask is None:
        return Probe.NONE
    answers: list[bool] = []

    def body() -> None:
        try:
            answers.append(bool(ask()))
        except Exception as err:  # noqa: BLE001 - any exception is an answer
            log.warning("probe raised", error=repr(err))
            answers.append(False)

    thread = threading.Thread(target=body, name="probe", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        return Probe.HUNG
    return Probe.OK if answers == [True] else Probe.FAILED


class StepLoop:
    """A StepCycle in a thread of this process, heard on the event loop. It never waits for a reader of the answers, only for the
    event loop itself, and that only after MAX_UNSEEN_STEPS steps.

    Args:
        make_runner: Makes the runner. Called in the thread.
        listener: Hears of it.
        name: Name of the thread.
        max_batch: Sequences at once; bounds the mailbox.
        progress: Called in the thread while the runner loads.
    """

    def __init__(
        self,
        make_runner: Callable[[], StepRunner],
        listener: StepListener,
        *,
        name: str,
        max_batch: int,
        progress: Callable[[LoadProgress], None] = lambda progress: None,
    ) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._cycle = StepCycle(make_runner, self, name=name, max_batch=max_batch, progress=progress)
        self._unseen = threading.Semaphore(MAX_UNSEEN_STEPS)
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread. `on_loaded` or `on_death` follows."""
        self._thread.start()

    @property
    def steps(self) -> int:
        """Steps done. Written by the thread, one word, whole."""
        return self._cycle.steps

    def admit(self, request: StepRequest) -> None:
        """Order a sequence in. A refusal of the runner comes as an output with an error.

        Raises:
            Backpressure: The mailbox is full.
        """
        self._cycle.admit(request)

    def abort(self, sequence_id: int) -> None:
        """Order a sequence out before the next step. Outputs of the present step may still come."""
        self._cycle.abort(sequence_id)

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """End the loop after its present step, and the thread with it. Idempotent.

        Returns:
            False when the thread did not end in time; it is left behind and ends with its step.
        """
        if not self._thread.ident:
            return True
        self._cycle.stop()
        self._unseen.release()
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            log.error("step loop does not end", thread=self._thread.name, timeout_s=timeout_s)
            return False
        self._thread.join()  # it has nothing left to do but to return
        return True

    def _run(self) -> None:
        self._cycle.run()
        self._tell(self._ended.set)

    def _tell(self, call: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the event loop is closed: the process is ending and nobody listens
            self._cycle.stop()

    def _report(self, report: StepReport) -> None:  # on the event loop
        self._unseen.release()
        self._listener.on_step(report)

    # --- StepSink, in the thread -------------------------------------------------------------------------------------

    def loaded(self, info: RunnerInfo) -> None:
        """Pass it on."""
        self._tell(self._listener.on_loaded, info)

    def stepped(self, report: StepReport) -> None:
        """Pass it on, when the event loop has seen the steps before the last few."""
        self._unseen.acquire()
        self._tell(self._report, report)

    def died(self, err: Exception, fault: Fault) -> None:
        """Pass it on."""
        self._tell(self._listener.on_death, err, fault)
