"""One replica's front: admits or refuses at once, queues, and turns what the worker produces into chunks for whoever asked.

It owns every request of the replica from admission to its end, and counts nothing: what runs and what waits is read off the
collections that hold it.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

from inference_runtime.answers import ChoiceAssembler, check_supported
from inference_runtime.deployment import DeploymentSpec
from inference_runtime.errors import (
    Backpressure,
    Draining,
    InferenceError,
    Internal,
    NoReplica,
    Quarantined,
    RequestCancelled,
    RevisionMismatch,
    Timeout,
    Unsupported,
)
from inference_runtime.generation import FinishReason, SamplingParams
from inference_runtime.runner import RunnerConfig, RunnerInfo, Runtime
from inference_runtime.stepping import StepReport
from inference_runtime.supervision import DEFAULT_POLICY, ContextFault, Fault, GaveUp, RestartPolicy
from inference_runtime.telemetry import get_logger
from services.engine.admission import Admission
from services.engine.context import ContextFactory
from services.engine.health import READY_S, Health
from services.engine.measures import CoreMetrics
from services.engine.preparing import Prepared, Preparer, is_short
from services.engine.probation import TRIALS_S
from services.engine.process_context import HANG_S
from services.engine.quarantine import Quarantine
from services.engine.queue import cost_tokens
from services.engine.stream import STALL_S, Outlet, Stream
from services.engine.submission import Submission
from services.engine.worker import Flight, Worker

__all__ = ["CoreState", "EngineCore"]

log = get_logger(__name__)


class CoreState(enum.Enum):
    """State of a replica."""

    LOADING = "loading"
    SERVING = "serving"
    NOT_READY = "not_ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"


class EngineCore:
    """One replica: submissions in, chunks out.

    At most `max_concurrent` requests run (fewer where the runner's batch is smaller) and `queue_capacity` wait, bounded in tokens
    too: WAITING_BATCHES times what the runner holds. Who is next is the waiting room's decision (queue.py). All methods belong to
    the event loop that runs `run`.

    Args:
        replica_id: Its id in the cluster.
        spec: The deployment.
        revision: Of the deployment.
        runtime: Makes the codec.
        contexts: Makes the contexts that its runners live in.
        policy: When restarts of a context are too many.
        accelerators: Devices it may use.
        tokenisers: Threads that tokenise long prompts.
        metrics: Where it counts.
        stall_s: Time after which a stream that its reader grants no credit is cut off, seconds.
        ready_s: Age of the last step, or of the canary's last answer, beyond which it is not ready, seconds.
        hang_s: Least time without either that is taken for a hang, seconds.
        trials_s: Time that finding the cause of a context's death may keep other requests waiting, seconds.
        quarantine: Requests that it refuses, shared with other replicas; None: of its own.
        on_change: Called when state, reason, info or restarts changed.
    """

    def __init__(
        self,
        replica_id: str,
        spec: DeploymentSpec,
        revision: str,
        runtime: Runtime,
        *,
        contexts: ContextFactory,
        policy: RestartPolicy = DEFAULT_POLICY,
        accelerators: tuple[int, ...] = (),
        tokenisers: Executor,
        metrics: CoreMetrics,
        stall_s: float = STALL_S,
        ready_s: float = READY_S,
        hang_s: float = HANG_S,
        trials_s: float = TRIALS_S,
        quarantine: Quarantine | None = None,
        on_change: Callable[[EngineCore], None],
    ) -> None:
        self.replica_id, self.spec, self.revision, self.runtime = replica_id, spec, revision, runtime
        self.state = CoreState.LOADING
        #: One sentence where the state needs one.
        self.reason = ""
        #: Of the context that it gave up on.
        self.last_fault: Fault | None = None
        #: Time after which a stream that its reader grants no credit is cut off, seconds.
        self.stall_s = stall_s
        #: What was loaded; None before that.
        self.info: RunnerInfo | None = None
        self._config = RunnerConfig(
            model=spec.model,
            options=spec.runtime_config,
            accelerators=accelerators,
            max_context_tokens=spec.serving.max_context_tokens,
            max_batch=spec.serving.max_concurrent,
        )
        self._worker = Worker(contexts, self._config, name=replica_id, listener=self, policy=policy, trials_s=trials_s)
        self._health = Health(self._worker, replica_id, ready_s, hang_s, time.monotonic())
        self._tokenisers, self._metrics, self._on_change = tokenisers, metrics, on_change
        self._preparer: Preparer | None = None
        self._numbers = itertools.count(1)
        self._streams: dict[int, Stream] = {}  # admitted and not ended
        self._running: set[Stream] = set()  # of those, the ones with the worker
        self._admission = Admission(self._name, revision, Quarantine() if quarantine is None else quarantine)
        self._aborting: dict[int, float] = {}
        self._admits = True

    # --- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Load, and serve until cancelled. A replica that cannot work ends in FAILED with its reason; nothing is raised."""
        async with asyncio.TaskGroup() as tasks:
            looking = tasks.create_task(self._health.keep_looking(self._look), name=f"health-{self.replica_id}")
            try:
                self.runtime.validate(self._config)
                await asyncio.get_running_loop().run_in_executor(self._tokenisers, self._make_codec)
                await self._worker.run()
            except (GaveUp, InferenceError) as err:
                self.last_fault = err.__cause__.fault if isinstance(err.__cause__, ContextFault) else None
                self._give_up(str(err))
            except Exception as err:  # a runtime is foreign code: whatever it raises ends this replica, not the engine
                log.error("replica failed", replica=self.replica_id, exc_info=err)
                self._give_up(f"runtime {self.runtime.name!r} failed: {type(err).__name__}: {err}")
            finally:
                looking.cancel()

    def _make_codec(self) -> None:
        codec = self.runtime.make_codec(self._config)
        self._preparer = Preparer(codec, self.replica_id)
        self._health.choose_canary(codec)

    def _look(self, now: float, away: bool) -> None:
        """Publish whether it is ready, and use places that are free again."""
        if self.state in (CoreState.SERVING, CoreState.NOT_READY):
            since = min((s.admitted_s for s in self._running if s.flight is not None and s.flight.outputs_here), default=None)
            reason = self._health.look(now, running_since_s=since, idle=not self._streams, away=away)
            if bool(reason) != (self.state is CoreState.NOT_READY):
                log.warning(
                    "replica is not ready" if reason else "replica is ready again", replica=self.replica_id, reason=reason
                )
                self._set_state(CoreState.NOT_READY if reason else CoreState.SERVING, reason)
        self._pump()

    def _give_up(self, reason: str) -> None:
        log.error("replica gave up", replica=self.replica_id, deployment=self.spec.name, reason=reason)
        self._set_state(CoreState.FAILED, reason)
        for stream in list(self._streams.values()):
            stream.fail(NoReplica(f"replica {self.replica_id} of deployment {self.spec.name!r} failed: {reason}"))

    def start_draining(self) -> None:
        """Say that it will close. What runs and waits goes on, and who has not heard of it is still served."""
        if self.state is not CoreState.FAILED:
            self._set_state(CoreState.DRAINING, "")

    def stop_draining(self) -> None:
        """Take requests again."""
        self._admits = True
        if self.state is CoreState.DRAINING:
            up = CoreState.SERVING if self._worker.ready else CoreState.RESTARTING
            self._set_state(CoreState.LOADING if self.info is None else up, "")

    def stop_admission(self) -> None:
        """Take nothing new; what runs and waits goes on."""
        self._admits = False

    def hand_over(self) -> None:
        """Have somebody else go on with what still runs and waits. Whoever asked is told, after the tokens that are ready."""
        left = list(self._streams.values())
        if left:
            log.info("requests handed over", replica=self.replica_id, deployment=self.spec.name, streams=len(left))
        for stream in left:
            stream.fail(Draining(f"replica {self.replica_id} closed before the answer was complete; continue elsewhere"))

    def reconfigure(self, spec: DeploymentSpec) -> None:
        """Take over bounds and timeouts of a newer generation of the same revision. Model and runtime stay."""
        self.spec = spec
        self._size_room()
        self._pump()

    def rebuild(self) -> None:
        """Replace the context; running requests continue on the next one where the runner can resume."""
        self._worker.rebuild()

    def reset(self) -> None:
        """Forget why it failed, so that `run` may be called again. Only for a replica in FAILED whose `run` is over."""
        self._worker.reset()
        self.last_fault = None
        self._set_state(CoreState.LOADING, "")

    def _set_state(self, state: CoreState, reason: str) -> None:
        self.state, self.reason = state, reason
        self._metrics.ready.set(state is CoreState.SERVING, self.spec.name, self.replica_id)
        self._on_change(self)

    # --- facts -------------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"replica {self.replica_id} of deployment {self.spec.name!r}"

    @property
    def context_generation(self) -> int:
        """Number of the present context, from 1."""
        return self._worker.generation

    @property
    def restarts(self) -> int:
        """Context restarts so far."""
        return self._worker.restarts

    @property
    def max_concurrent(self) -> int:
        """Requests that run at once: as deployed, or the runner's batch where that is smaller."""
        limit = self.spec.serving.max_concurrent
        return limit if self.info is None else min(limit, self.info.max_batch)

    @property
    def _places(self) -> int:
        """Requests that may run at once now: fewer for a while after the device's memory was too small for as many."""
        return self._admission.watermark.limit(self.max_concurrent, time.monotonic())

    @property
    def running(self) -> int:
        """Requests that run."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Requests that wait, those being tokenised included."""
        return len(self._streams) - len(self._running)

    @property
    def kv_use(self) -> float:
        """Share of the KV cache in use."""
        return self._worker.kv_use if self._running else 0.0

    def pending_tokens(self) -> int:
        """Upper bound of tokens still to be computed: prompts that wait, and output that is allowed."""
        total = 0
        for stream in self._streams.values():
            flight = stream.flight
            if flight is not None:
                total += flight.sampling.max_tokens - len(flight.generated)
                if stream not in self._running or not flight.generated:
                    total += len(flight.prompt_token_ids)
        return total

    # --- admission ---------------------------------------------------------------------------------------------------

    def submit(self, submission: Submission, outlet: Outlet) -> Stream:
        """Admit a request or refuse it, at once.

        A long prompt is tokenised after admission; what is wrong with it then comes as the stream's error.

        Raises:
            NoReplica: The replica does not serve (yet, or any more).
            Draining: It takes nothing new.
            RevisionMismatch: It has another revision than the prefix was made with.
            Unsupported: The runtime lacks what was asked for.
            BadRequest, ContextLengthExceeded: The prompt is wrong, or too long.
            Quarantined: It was found to kill contexts, a short while ago.
            Backpressure: As many run and wait as may, or the wait would be longer than the time that is left.
            Timeout: No time is left.
        """
        info = self._check(submission)
        total_s = self.spec.timeouts.total_s if submission.time_left_s is None else submission.time_left_s
        if total_s <= 0:
            raise Timeout("no time is left for this request", phase="admission", elapsed_s="0")
        assert self._preparer is not None
        prepared = self._preparer.prepare(submission, info) if is_short(submission) else None
        if prepared is not None:
            self._check_room(submission, *prepared, left_s=min(total_s, self.spec.timeouts.first_chunk_s))
        stream = Stream(self, next(self._numbers), submission, outlet, self.stall_s)
        self._streams[stream.number] = stream
        stream.start_clocks(self.spec.timeouts.first_chunk_s, total_s)
        if prepared is None:
            self._tokenise(stream, info)
        else:
            self._enqueue(stream, *prepared)
        return stream

    def _check(self, submission: Submission) -> RunnerInfo:
        request, info = submission.request, self.info
        name = self._name
        if not self._admits:
            raise Draining(f"{name} is draining; send the request to another replica")
        if self.state is CoreState.FAILED:
            raise NoReplica(f"{name} failed: {self.reason}")
        if info is None:
            raise NoReplica(f"{name} is still loading; try again shortly", retry_after_s=1.0)
        if self.state is CoreState.NOT_READY:
            raise NoReplica(f"{name} is not ready: {self.reason}", retry_after_s=1.0)
        if submission.revision and submission.revision != self.revision:
            raise RevisionMismatch(
                f"{name} has revision {self.revision}; the request asks for {submission.revision}, and only replicas of one "
                "revision continue each other's answers",
                revision=self.revision,
            )
        check_supported(info, request, submission.prefix, submission.choice)
        if request.sampling.n > 1:
            raise Unsupported("a submission is one choice: set n to 1", feature="n", runtime=info.runtime, param="n")
        if len(self._streams) >= self._most_streams:
            waits = (
                f"and {self.queued} wait"
                if self.spec.serving.on_capacity_exhausted == "queue"
                else "at once and lets nobody wait"
            )
            raise Backpressure(
                f"{name} runs {self.running} requests {waits}; it takes no more; try another replica, or later",
                retry_after_s=self._admission.retry_after_s(),
            )
        return info

    @property
    def _most_streams(self) -> int:
        """Requests that may be here at once."""
        serving = self.spec.serving
        return self.max_concurrent + (serving.queue_capacity if serving.on_capacity_exhausted == "queue" else 0)

    def _size_room(self) -> None:
        if self.info is not None:  # `_check` keeps the places of those that run and those that wait apart
            self._admission.resize(self.info, self._most_streams)

    def _check_room(self, submission: Submission, tokens: Sequence[int], sampling: SamplingParams, left_s: float) -> None:
        done, waits = len(submission.prefix), not self._has_place
        self._admission.check(submission.request, tokens, sampling, done, waits=waits, left_s=left_s)

    @property
    def _has_place(self) -> bool:
        """Whether a request could start now."""
        return self._worker.ready and len(self._running) < self._places

    def _tokenise(self, stream: Stream, info: RunnerInfo) -> None:
        assert self._preparer is not None
        loop = asyncio.get_running_loop()

        def done(future: Future[Prepared]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._tokenised, stream, future)

        self._tokenisers.submit(self._preparer.prepare, stream.submission, info).add_done_callback(done)

    def _tokenised(self, stream: Stream, future: Future[Prepared]) -> None:
        if stream.ended or future.cancelled():
            return
        err = future.exception()
        if err is not None:
            stream.fail(err if isinstance(err, InferenceError) else Internal(f"tokenising failed: {err!r}"))
            return
        tokens, sampling = future.result()
        try:
            self._check_room(stream.submission, tokens, sampling, left_s=stream.first_chunk_by_s - time.monotonic())
        except InferenceError as refusal:
            stream.fail(refusal)
        else:
            self._enqueue(stream, tokens, sampling)

    def _enqueue(self, stream: Stream, tokens: Sequence[int], sampling: SamplingParams) -> None:
        submission = stream.submission
        assert self._preparer is not None
        stream.outlet.admitted(stream, len(tokens))
        codec, prefix = self._preparer.codec, submission.prefix
        stream.choice = ChoiceAssembler(
            codec, stop=sampling.stop, prompt_tokens=len(tokens), choice=submission.choice, prefix=prefix
        )
        if stream.choice.stopped or len(submission.prefix) >= sampling.max_tokens:  # the prefix is the whole answer
            stream.deliver(stream.choice.end(FinishReason.STOP if stream.choice.stopped else FinishReason.LENGTH))
            return
        request = submission.request
        stream.flight = Flight(
            0,
            tokens,
            sampling,
            stream,
            list(prefix),
            request.tenant,
            context_deaths=submission.context_deaths,
            choice=submission.choice,
        )
        self._admission.enter(stream, request, cost_tokens(len(tokens), sampling, len(prefix)))
        self._pump()

    def _pump(self) -> None:
        """Give free places to those whose turn it is."""
        room = self._admission.room
        if room and self._has_place:
            now = time.monotonic()
            while self._has_place:
                waiting, expired = room.take(now)
                if waiting is not None:
                    self._start(waiting.item, now)
                for late in expired:  # after that: each end may give away the places that are left
                    late.item.expire()
                if waiting is None:
                    break
        self._admission.note_full(len(self._running) >= self._places)

    def _start(self, stream: Stream, now: float) -> None:
        assert stream.flight is not None
        if not self._running:
            self._health.began(now)
        self._running.add(stream)
        self._metrics.queue_s.observe(now - stream.admitted_s, self.spec.name)
        self._worker.launch(stream.flight)

    def end(self, stream: Stream, err: InferenceError | None) -> None:
        """Take a stream out: its place is free, its sequence gone before the next step. Idempotent. Delivers nothing."""
        if self._streams.pop(stream.number, None) is None:
            return
        stream.ended = True
        stream.stop_clocks()
        self._admission.leave(stream, ran=stream in self._running, places=self._places)
        self._running.discard(stream)
        flight = stream.flight
        if flight is not None and self._worker.abort(flight) and isinstance(err, RequestCancelled):
            self._aborting[flight.sequence_id] = time.monotonic()
        if flight is not None and isinstance(err, Quarantined):
            log.warning("request quarantined", replica=self.replica_id, request_id=stream.submission.request.request_id)
            for twin in self._admission.quarantine(flight, self._streams.values()):
                twin.fail(err)
        self._health.ended(err, time.monotonic())
        self._metrics.record(stream, err, self.spec.name, self.replica_id)
        self._pump()

    # --- WorkerListener ----------------------------------------------------------------------------------------------

    def on_ready(self, info: RunnerInfo) -> None:
        """The context takes sequences: a new one, or one on which somebody was tried."""
        self.info = info
        self._size_room()
        self._health.context_up(time.monotonic())
        if self.state is CoreState.DRAINING:
            self._on_change(self)
        elif self.state not in (CoreState.SERVING, CoreState.NOT_READY):
            self._set_state(CoreState.SERVING, "")
        self._pump()

    def on_down(self, err: Exception) -> None:
        """The context died; another one is coming."""
        self._aborting.clear()
        self._admission.forget_rate()
        self._health.context_down(time.monotonic())
        cause = err.reason.lower() if isinstance(err, InferenceError) else type(err).__name__.lower().lstrip("_")
        self._metrics.restarts.inc(self.spec.name, cause)
        if self.state is CoreState.DRAINING:
            self._on_change(self)
        else:
            self._set_state(CoreState.RESTARTING, str(err))

    def on_report(self, report: StepReport) -> None:
        """A step is over."""
        self._health.stepped(report, time.monotonic())
        if report.outputs and self._running:  # else it was the canary's
            self._metrics.step_s.observe(report.duration_s, self.spec.name)
        for sequence_id in report.aborted:
            asked_at = self._aborting.pop(sequence_id, None)
            if asked_at is not None:
                self._metrics.cancel_s.observe(time.monotonic() - asked_at, self.spec.name)

    def on_out_of_memory(self, sequences: int) -> None:
        """A step with this many sequences was too large: let fewer run for a while."""
        self._admission.watermark.lower(sequences, time.monotonic())
        log.warning("out of memory", replica=self.replica_id, sequences=sequences, places=self._places)
