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

from inference_runtime.answers import ChoiceAssembler, check_supported, encode_prompt, fit_context
from inference_runtime.deployment import DeploymentSpec
from inference_runtime.errors import (
    Backpressure,
    BadRequest,
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
from inference_runtime.generation import ChatPrompt, FinishReason, SamplingParams, TextPart, TextPrompt
from inference_runtime.runner import Codec, RunnerConfig, RunnerInfo, Runtime
from inference_runtime.stepping import StepReport
from inference_runtime.supervision import DEFAULT_POLICY, GaveUp, RestartPolicy
from inference_runtime.telemetry import Telemetry, get_logger
from services.engine.context import ContextFactory
from services.engine.quarantine import Quarantine, fingerprint
from services.engine.queue import WaitingRoom, cost_tokens
from services.engine.stream import STALL_S, Outlet, Stream
from services.engine.submission import Submission
from services.engine.turnover import Turnover
from services.engine.worker import Flight, Worker

__all__ = ["CoreMetrics", "CoreState", "EngineCore"]

log = get_logger(__name__)

#: Prompts up to this size are tokenised where they arrive: a hop to a thread and back costs more.
INLINE_PROMPT_CHARS = 1024
#: Work that may wait, as a multiple of what the runner can hold: a batch of requests as long as the context. Four batches take
#: longer than most callers wait; with answers of common length the bound by requests comes first.
WAITING_BATCHES = 4
#: Bounds of what a caller is told to wait, seconds, and what it is told while the rate is unknown.
LEAST_RETRY_S, MOST_RETRY_S, UNKNOWN_RETRY_S = 0.1, 60.0, 1.0


class CoreState(enum.Enum):
    """State of a replica."""

    LOADING = "loading"
    SERVING = "serving"
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"


class CoreMetrics:
    """What the cores of one process measure."""

    def __init__(self, telemetry: Telemetry) -> None:
        metrics = telemetry.metrics
        self.telemetry = telemetry
        self.queue_s = metrics.histogram("inference_queue_seconds", "deployment")
        self.step_s = metrics.histogram("inference_step_seconds", "deployment")
        self.cancel_s = metrics.histogram("inference_cancel_to_stop_seconds", "deployment")
        self.restarts = metrics.counter("inference_context_restarts_total", "deployment", "cause")
        self.running = metrics.gauge("inference_running", "deployment", "replica")
        self.queued = metrics.gauge("inference_queued", "deployment", "replica")
        self.kv_use = metrics.gauge("inference_kv_use", "deployment", "replica")


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
        on_change: Callable[[EngineCore], None],
    ) -> None:
        self.replica_id, self.spec, self.revision, self.runtime = replica_id, spec, revision, runtime
        self.state = CoreState.LOADING
        #: One sentence where the state needs one.
        self.reason = ""
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
        self._worker = Worker(contexts, self._config, name=replica_id, listener=self, policy=policy)
        self._tokenisers, self._metrics, self._on_change = tokenisers, metrics, on_change
        self._codec: Codec | None = None
        self._numbers = itertools.count(1)
        self._streams: dict[int, Stream] = {}  # admitted and not ended
        self._running: set[Stream] = set()  # of those, the ones with the worker
        self._room: WaitingRoom[Stream] = WaitingRoom(0, 0)  # of the admitted, those that are ready to run
        self._turnover = Turnover()
        self._quarantine = Quarantine()
        self._aborting: dict[int, float] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    # --- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Load, and serve until cancelled. A replica that cannot work ends in FAILED with its reason; nothing is raised."""
        loop = asyncio.get_running_loop()
        try:
            self.runtime.validate(self._config)
            self._codec = await loop.run_in_executor(self._tokenisers, self.runtime.make_codec, self._config)
            await self._worker.run()
        except (GaveUp, InferenceError) as err:
            self._give_up(str(err))
        except Exception as err:  # a runtime is foreign code: whatever it raises ends this replica, not the engine
            log.error("replica failed", replica=self.replica_id, exc_info=err)
            self._give_up(f"runtime {self.runtime.name!r} failed: {type(err).__name__}: {err}")

    def _give_up(self, reason: str) -> None:
        log.error("replica gave up", replica=self.replica_id, deployment=self.spec.name, reason=reason)
        self._set_state(CoreState.FAILED, reason)
        for stream in list(self._streams.values()):
            stream.fail(NoReplica(f"replica {self.replica_id} of deployment {self.spec.name!r} failed: {reason}"))

    def start_draining(self) -> None:
        """Take nothing new; what runs and waits goes on."""
        if self.state is not CoreState.FAILED:
            self._set_state(CoreState.DRAINING, "")

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nothing runs or waits. After `timeout_s` the rest fails with Draining, and the answer is False."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            left = list(self._streams.values())
            log.warning("drain timed out", replica=self.replica_id, streams=len(left), timeout_s=timeout_s)
            for stream in left:
                stream.fail(Draining(f"replica {self.replica_id} shut down before the answer was complete; continue elsewhere"))
            return False
        return True

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
        self._set_state(CoreState.LOADING, "")

    def _set_state(self, state: CoreState, reason: str) -> None:
        self.state, self.reason = state, reason
        self._on_change(self)

    # --- facts -------------------------------------------------------------------------------------------------------

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
        prepared = self._prepare(submission, info) if _prompt_chars(submission) <= INLINE_PROMPT_CHARS else None
        if prepared is not None:
            self._check_room(submission, *prepared, left_s=min(total_s, self.spec.timeouts.first_chunk_s))
        stream = Stream(self, next(self._numbers), submission, outlet, self.stall_s)
        self._streams[stream.number] = stream
        self._idle.clear()
        stream.start_clocks(self.spec.timeouts.first_chunk_s, total_s)
        if prepared is None:
            self._tokenise(stream, info)
        else:
            self._enqueue(stream, *prepared)
        return stream

    def _check(self, submission: Submission) -> RunnerInfo:
        request, info = submission.request, self.info
        name = f"replica {self.replica_id} of deployment {self.spec.name!r}"
        if self.state is CoreState.DRAINING:
            raise Draining(f"{name} is draining; send the request to another replica")
        if self.state is CoreState.FAILED:
            raise NoReplica(f"{name} failed: {self.reason}")
        if info is None:
            raise NoReplica(f"{name} is still loading; try again shortly", retry_after_s=1.0)
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
                retry_after_s=self._retry_after_s(),
            )
        return info

    @property
    def _most_streams(self) -> int:
        """Requests that may be here at once."""
        serving = self.spec.serving
        return self.max_concurrent + (serving.queue_capacity if serving.on_capacity_exhausted == "queue" else 0)

    def _size_room(self) -> None:
        if self.info is not None:
            # While the context is away, those that would run wait too: the room holds everybody. `_check` keeps the places apart.
            self._room.max_requests = self._most_streams
            self._room.max_tokens = WAITING_BATCHES * self.info.max_batch * self.info.max_context_tokens

    def _check_room(self, submission: Submission, tokens: Sequence[int], sampling: SamplingParams, left_s: float) -> None:
        """Refuse what is in quarantine, what would have to wait and may not, and what would wait for longer than it has time."""
        if self._quarantine:
            left_s_there = self._quarantine.left_s(fingerprint(self.revision, tokens, sampling), time.monotonic())
            if left_s_there:
                raise Quarantined(
                    "this request was on the device context at two of its deaths and is refused for now; change the prompt",
                    retry_after_s=left_s_there,
                )
        if self._has_place and not self._room:
            return
        request, cost = submission.request, cost_tokens(len(tokens), sampling, len(submission.prefix))
        name = f"replica {self.replica_id} of deployment {self.spec.name!r}"
        if not self._room.fits(cost):
            raise Backpressure(
                f"{name} has {self._room.tokens} tokens of work waiting; {cost} more are too many; try another replica, or later",
                retry_after_s=self._retry_after_s(),
            )
        rate = self._turnover.tokens_per_s(time.monotonic())
        wait_s = self._room.ahead(request.tenant, request.priority, cost) / rate if rate else 0.0
        if wait_s > left_s:
            raise Backpressure(
                f"{name} would begin this in about {wait_s:.1f} s and {left_s:.1f} s are left; try another replica, or later",
                retry_after_s=_bounded(wait_s),
            )

    def _retry_after_s(self) -> float:
        """When trying again may help: once what waits now is served, or, where nothing waits, once a place is free."""
        now = time.monotonic()
        rate, ends = self._turnover.tokens_per_s(now), self._turnover.ends_per_s(now)
        if not rate:
            return UNKNOWN_RETRY_S
        return _bounded(self._room.tokens / rate if self._room else 1.0 / ends)

    @property
    def _has_place(self) -> bool:
        """Whether a request could start now."""
        return self._worker.ready and len(self._running) < self.max_concurrent

    def _prepare(self, submission: Submission, info: RunnerInfo) -> tuple[Sequence[int], SamplingParams]:
        """Tokenise and fit into the context. Thread-safe: called here, or in a tokeniser thread."""
        assert self._codec is not None
        try:
            tokens = encode_prompt(self._codec, submission.request.prompt, info.max_context_tokens)
        except InferenceError:
            raise
        except Exception as err:
            log.error("tokenising failed", replica=self.replica_id, request_id=submission.request.request_id, exc_info=err)
            raise BadRequest("the prompt cannot be tokenised by this model", param="messages") from err
        if submission.prefix and max(submission.prefix) >= self._codec.vocab_size:  # clients bring tokens back, or make them up
            raise BadRequest("the answer so far holds a token that this model does not have", param="generated_prefix")
        return tokens, fit_context(info, len(tokens), submission.request.sampling)

    def _tokenise(self, stream: Stream, info: RunnerInfo) -> None:
        loop = asyncio.get_running_loop()

        def done(future: Future[tuple[Sequence[int], SamplingParams]]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._tokenised, stream, future)

        self._tokenisers.submit(self._prepare, stream.submission, info).add_done_callback(done)

    def _tokenised(self, stream: Stream, future: Future[tuple[Sequence[int], SamplingParams]]) -> None:
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
        assert self._codec is not None
        stream.outlet.admitted(stream, len(tokens))
        stream.choice = ChoiceAssembler(
            self._codec, stop=sampling.stop, prompt_tokens=len(tokens), choice=submission.choice, prefix=submission.prefix
        )
        if stream.choice.stopped or len(submission.prefix) >= sampling.max_tokens:  # the prefix is the whole answer
            stream.deliver(stream.choice.end(FinishReason.STOP if stream.choice.stopped else FinishReason.LENGTH))
            return
        request = submission.request
        stream.flight = Flight(0, tokens, sampling, stream, list(submission.prefix), request.tenant, choice=submission.choice)
        stream.place = self._room.put(
            stream,
            tenant=request.tenant,
            priority=request.priority,
            tokens=cost_tokens(len(tokens), sampling, len(submission.prefix)),
            now_s=time.monotonic(),
            deadline_s=stream.first_chunk_by_s,
        )
        self._pump()

    def _pump(self) -> None:
        """Give free places to those whose turn it is."""
        if self._room and self._has_place:
            now = time.monotonic()
            while self._has_place:
                waiting, expired = self._room.take(now)
                if waiting is not None:
                    self._start(waiting.item, now)
                for late in expired:  # after that: each end may give away the places that are left
                    late.item.expire()
                if waiting is None:
                    break
        self._turnover.note_full(time.monotonic(), len(self._running) >= self.max_concurrent)

    def _start(self, stream: Stream, now: float) -> None:
        assert stream.flight is not None
        self._running.add(stream)
        self._metrics.queue_s.observe(now - stream.admitted_s, self.spec.name)
        self._worker.launch(stream.flight)

    def _leave_room(self, stream: Stream) -> None:
        """A place in the batch or in the room is free, and what it was used for is known."""
        place, flight = stream.place, stream.flight
        if place is None or flight is None:
            return
        if place.inside:
            self._room.drop(place)
        elif stream in self._running:
            used = len(flight.prompt_token_ids) + len(flight.generated)
            self._room.settle(place, used)
            self._turnover.note_end(time.monotonic(), place.tokens, self.max_concurrent)

    def end(self, stream: Stream, err: InferenceError | None) -> None:
        """Take a stream out: its place is free, its sequence gone before the next step. Idempotent. Delivers nothing."""
        if self._streams.pop(stream.number, None) is None:
            return
        stream.ended = True
        stream.stop_clocks()
        self._leave_room(stream)
        self._running.discard(stream)
        flight = stream.flight
        if flight is not None and self._worker.abort(flight) and isinstance(err, RequestCancelled):
            self._aborting[flight.sequence_id] = time.monotonic()
        if flight is not None and isinstance(err, Quarantined):
            self._quarantine.add(fingerprint(self.revision, flight.prompt_token_ids, flight.sampling), time.monotonic())
            log.warning("request quarantined", replica=self.replica_id, request_id=stream.submission.request.request_id)
        self._record(stream, err)
        self._pump()
        if not self._streams:
            self._idle.set()

    def _record(self, stream: Stream, err: InferenceError | None) -> None:
        request = stream.submission.request
        if err is not None and not isinstance(err, RequestCancelled):
            log.debug("request failed", request_id=request.request_id, replica=self.replica_id, reason=err.reason)
        if self._metrics.telemetry.tracer is not None:
            self._metrics.telemetry.record_span(
                "engine.request",
                traceparent=stream.submission.traceparent,
                start_ns=stream.admitted_ns,
                end_ns=time.time_ns(),
                attributes={
                    "inference.request_id": request.request_id,
                    "inference.replica_id": self.replica_id,
                    "gen_ai.request.model": self.spec.name,
                    "gen_ai.usage.output_tokens": stream.index,
                },
                error=err.reason if err is not None else "",
            )

    # --- WorkerListener ----------------------------------------------------------------------------------------------

    def on_ready(self, info: RunnerInfo) -> None:
        """A context works."""
        self.info = info
        self._size_room()
        if self.state is CoreState.DRAINING:
            self._on_change(self)
        else:
            self._set_state(CoreState.SERVING, "")
        self._pump()

    def on_down(self, err: Exception) -> None:
        """The context died; another one is coming."""
        self._aborting.clear()
        self._turnover.forget()
        cause = err.reason.lower() if isinstance(err, InferenceError) else type(err).__name__.lower().lstrip("_")
        self._metrics.restarts.inc(self.spec.name, cause)
        if self.state is CoreState.DRAINING:
            self._on_change(self)
        else:
            self._set_state(CoreState.RESTARTING, str(err))

    def on_report(self, report: StepReport) -> None:
        """A step is over."""
        if report.outputs:
            self._metrics.step_s.observe(report.duration_s, self.spec.name)
        for sequence_id in report.aborted:
            asked_at = self._aborting.pop(sequence_id, None)
            if asked_at is not None:
                self._metrics.cancel_s.observe(time.monotonic() - asked_at, self.spec.name)


def _prompt_chars(submission: Submission) -> int:
    """Size of what would have to be tokenised."""
    prompt = submission.request.prompt
    if isinstance(prompt, ChatPrompt):
        return sum(len(p.text) for m in prompt.messages for p in m.content if isinstance(p, TextPart))
    return len(prompt.text) if isinstance(prompt, TextPrompt) else 0


def _bounded(seconds: float) -> float:
    """A wait as a caller is told it."""
    return min(max(seconds, LEAST_RETRY_S), MOST_RETRY_S)
