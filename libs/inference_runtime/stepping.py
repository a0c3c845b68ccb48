"""One thread that drives a StepRunner, and what turns its steps into an answer.

`StepCycle` is what the thread does: its mailbox, its steps, its death. `StepLoop` runs it in a thread and reports to an event
loop. `ChoiceAssembler` makes chunks of one choice from step outputs. `SteppedRunner` puts both behind the ModelRunner contract.
The engine uses the first three with an admission queue of its own.
"""

from __future__ import annotations

import asyncio
import enum
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from inference_runtime.errors import (
    Backpressure,
    BadRequest,
    ContextLengthExceeded,
    ContextPoisoned,
    InferenceError,
    Internal,
    Unsupported,
)
from inference_runtime.generation import (
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    Prompt,
    SamplingParams,
    TextPart,
    TextPrompt,
    TokenChunk,
    Usage,
)
from inference_runtime.runner import (
    Codec,
    LoadProgress,
    RateLimits,
    RebuildCause,
    RunnerConfig,
    RunnerInfo,
    StepOutput,
    StepRequest,
    StepRunner,
)
from inference_runtime.supervision.policy import Decider, Directive, Fault, FaultClass, FaultPhase, Probe, Verdict
from inference_runtime.telemetry import get_logger
from inference_runtime.text import TextAssembler

__all__ = [
    "ChoiceAssembler",
    "StepCycle",
    "StepListener",
    "StepLoop",
    "StepPhase",
    "StepReport",
    "StepSink",
    "SteppedRunner",
    "check_supported",
    "encode_prompt",
    "fit_context",
    "mailbox_capacity",
    "mailbox_full",
    "probe",
]

log = get_logger(__name__)

#: Steps whose outputs the event loop has not seen yet. The thread may run ahead of the loop by this many, so that a pause of the
#: loop costs no device time, and no more, so that it cannot fill the memory.
MAX_UNSEEN_STEPS = 4
#: Orders that may wait for the thread, as a multiple of the sequences it runs at once.
MAILBOX_FACTOR = 4
#: Time a closing loop gets to end its step, seconds. After it the thread is left behind: nothing can stop a thread.
CLOSE_TIMEOUT_S = 10.0
#: Time that a context gets to prove that it still computes, seconds.
PROBE_LIMIT_S = 2.0


# --- requests --------------------------------------------------------------------------------------------------------


def encode_prompt(codec: Codec, prompt: Prompt, max_context_tokens: int) -> Sequence[int]:
    """Token ids of a prompt. May take milliseconds for a long one.

    Raises:
        BadRequest: It has no tokens, or ids that the vocabulary lacks.
        ContextLengthExceeded: Its size alone shows that it cannot fit.
        Unsupported: It has content that the model cannot read.
    """
    tokens: Sequence[int]
    longest = codec.max_token_bytes
    if longest and (least := -(-_prompt_bytes(prompt) // longest)) > max_context_tokens:
        raise ContextLengthExceeded(
            f"the prompt has {least} tokens or more; the context of this model holds {max_context_tokens}; shorten the prompt",
            tokens=str(least),
            max_tokens=str(max_context_tokens),
            param="messages",
        )
    if isinstance(prompt, ChatPrompt):
        tokens = codec.encode_chat(prompt.messages)
    elif isinstance(prompt, TextPrompt):
        tokens = codec.encode(prompt.text)
    else:
        tokens = prompt.token_ids
        if tokens and not 0 <= min(tokens) <= max(tokens) < codec.vocab_size:
            raise BadRequest(f"a prompt token id lies outside 0 to {codec.vocab_size - 1}", param="prompt")
    if not tokens:
        raise BadRequest("the prompt is empty; give it at least one token", param="prompt")
    return tokens


def _prompt_bytes(prompt: Prompt) -> int:
    """Size of a prompt's text in UTF-8, at least: a character counts as one byte, since counting the rest costs as much as
    refusing saves."""
    if isinstance(prompt, ChatPrompt):
        return sum(len(part.text) for message in prompt.messages for part in message.content if isinstance(part, TextPart))
    return len(prompt.text) if isinstance(prompt, TextPrompt) else 0


def check_supported(info: RunnerInfo, request: GenerationRequest, prefix: Sequence[int] = (), choice: int = 0) -> None:
    """Refuse what the runner cannot do, by name. Raises Unsupported with `feature` and `runtime`."""
    can, sampling = info.capabilities, request.sampling
    chat = isinstance(request.prompt, ChatPrompt)
    wanted = (
        ("chat", chat, can.chat),
        ("completion", not chat, can.completion),
        ("logprobs", sampling.top_logprobs is not None, can.logprobs),
        ("seed", sampling.seed is not None, can.seed),
        ("penalties", _has_penalties(sampling), can.penalties),
        ("logit_bias", bool(sampling.logit_bias), can.logit_bias),
        ("min_p", bool(sampling.min_p), can.min_p),
        ("n", sampling.n > 1 or choice > 0, can.max_choices >= max(sampling.n, choice + 1)),
        ("resume", len(prefix) > 0, can.resume),
    )
    for feature, asked, able in wanted:
        if asked and not able:
            raise Unsupported(
                f"runtime {info.runtime!r} of deployment {request.deployment!r} does not support {feature}; leave it out, "
                "or use a deployment that has it",
                feature=feature,
                runtime=info.runtime,
                param=feature,
            )


def _has_penalties(s: SamplingParams) -> bool:
    return bool(s.presence_penalty or s.frequency_penalty) or s.repetition_penalty not in (0.0, 1.0)


def fit_context(info: RunnerInfo, prompt_tokens: int, sampling: SamplingParams) -> SamplingParams:
    """The sampling parameters with `max_tokens` > 0: as asked for, or the rest of the context for 0.

    Raises:
        ContextLengthExceeded: Prompt and output together are more than the context holds.
    """
    room = info.max_context_tokens - prompt_tokens
    if room <= 0 or sampling.max_tokens > room:
        asked = f" and {sampling.max_tokens} of output" if sampling.max_tokens else ""
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens} tokens{asked}; the context of this model holds {info.max_context_tokens}; "
            "shorten the prompt or lower max_tokens",
            tokens=str(prompt_tokens + sampling.max_tokens),
            max_tokens=str(info.max_context_tokens),
            param="messages",
        )
    return sampling if sampling.max_tokens else replace(sampling, max_tokens=room)


# --- answers ---------------------------------------------------------------------------------------------------------


class ChoiceAssembler:
    """Makes the chunks of one choice from what steps produce.

    Args:
        codec: Of the model.
        stop: Stop strings.
        prompt_tokens: For the usage.
        choice: Number of the choice.
        prefix: Tokens that were generated elsewhere. Their text is not repeated; the first chunk's index follows them.
    """

    __slots__ = ("_cached", "_choice", "_prompt_tokens", "_text", "index")

    def __init__(
        self, codec: Codec, *, stop: Sequence[str], prompt_tokens: int, choice: int = 0, prefix: Sequence[int] = ()
    ) -> None:
        self._text = TextAssembler(codec, stop)
        self._text.replay(prefix)
        self._choice, self._prompt_tokens, self._cached = choice, prompt_tokens, 0
        #: Index of the next chunk: tokens so far.
        self.index = len(prefix)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the choice."""
        return self._text.stopped

    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self._prompt_tokens, self.index, cached_input_tokens=self._cached)

    def take(self, output: StepOutput) -> TokenChunk:
        """The chunk for one step's output. Tokens after the one that completed a stop string are dropped.

        The chunk has a finish reason when the output has one, or when a stop string is complete; the caller then drops the
        sequence from the runner where the output had none.
        """
        text, tokens, finish, logprobs = self._text, output.token_ids, output.finish_reason, output.logprobs
        index = self.index
        if output.cached_tokens:
            self._cached = output.cached_tokens
        if len(tokens) == 1:
            certain = text.feed(tokens[0])
        else:
            certain, used = text.feed_all(tokens)
            if used < len(tokens):
                tokens, logprobs = tokens[:used], logprobs[:used]
        self.index = index + len(tokens)
        if text.stop_sequence:
            finish = FinishReason.STOP
        if finish is None:
            return TokenChunk(self._choice, index, tokens, certain, None, None, logprobs)
        certain += text.finish()
        return TokenChunk(self._choice, index, tokens, certain, finish, self.usage(), logprobs, text.stop_sequence)

    def end(self, finish: FinishReason) -> TokenChunk:
        """A last chunk without tokens: the choice ends where it stands."""
        return self.take(StepOutput(0, (), finish))


# --- the loop --------------------------------------------------------------------------------------------------------


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
        return Backpressure("the replica ran out of memory in this step; try again, or another replica", cause="out_of_memory")
    if isinstance(err, InferenceError):
        return err
    fault = Internal(f"the step failed: {type(err).__name__}: {err}")
    fault.__cause__ = err
    return fault


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


# --- a ModelRunner of it ---------------------------------------------------------------------------------------------


class _Lane:
    """One life of a StepLoop inside a SteppedRunner: its streams and its end."""

    def __init__(self, make_runner: Callable[[], StepRunner], config: RunnerConfig, name: str) -> None:
        self.streams: dict[int, asyncio.Queue[StepOutput]] = {}
        self.retired = False
        self.loaded: asyncio.Future[RunnerInfo] = asyncio.get_running_loop().create_future()
        self.death: Exception | None = None
        self.loop = StepLoop(make_runner, self, name=name, max_batch=config.max_batch)

    def on_loaded(self, info: RunnerInfo) -> None:
        if not self.loaded.done():
            self.loaded.set_result(info)

    def on_step(self, report: StepReport) -> None:
        for output in report.outputs:
            queue = self.streams.get(output.sequence_id)
            if queue is not None:
                queue.put_nowait(output)

    def on_death(self, err: Exception, fault: Fault) -> None:
        self.die(err)

    def die(self, err: Exception) -> None:
        """Tell every stream."""
        self.death = err
        if not self.loaded.done():
            self.loaded.set_exception(err)
        for sequence_id, queue in self.streams.items():
            queue.put_nowait(StepOutput(sequence_id, (), error=err))


class SteppedRunner:
    """A ModelRunner over a StepRunner: every choice is a sequence of one shared loop.

    After the loop died, requests fail with the cause until `rebuild_session`. There is no admission queue: more than `max_batch`
    requests at once wait inside the StepRunner.

    Args:
        codec: Of the model.
        make_runner: Makes the StepRunner, in the loop's thread.
        config: What the runner was configured with.
    """

    def __init__(self, codec: Codec, make_runner: Callable[[], StepRunner], config: RunnerConfig) -> None:
        self._codec, self._make_runner, self._config = codec, make_runner, config
        self._lane: _Lane | None = None
        self._retired: set[_Lane] = set()
        self._info: RunnerInfo | None = None
        self._sequences = 0
        self._lanes = 0

    @property
    def info(self) -> RunnerInfo:
        """What it is. Valid after `load`."""
        assert self._info is not None, "load() comes first"
        return self._info

    async def load(self) -> None:
        """Start the loop and load the model. Raises what the StepRunner's load raises."""
        if self._lane is None:
            self._lane = await self._new_lane()

    async def _new_lane(self) -> _Lane:
        self._lanes += 1
        lane = _Lane(self._make_runner, self._config, f"steps-{self._config.model[:40]}-{self._lanes}")
        lane.loop.start()
        try:
            self._info = await lane.loaded
        except BaseException:
            await lane.loop.close()
            raise
        return lane

    async def execute(
        self, request: GenerationRequest, generated_prefix: Sequence[int] = (), choice: int = 0
    ) -> AsyncIterator[TokenChunk]:
        """Stream one choice of the answer.

        Raises:
            Unsupported, BadRequest, ContextLengthExceeded: Before the first chunk.
            InferenceError: What failed the sequence. ContextPoisoned when the loop died.

        On cancel: the sequence is dropped before the next step.
        """
        lane = self._lane
        if lane is None:
            raise ContextPoisoned("the runner is not loaded, or was closed; call load() first")
        if lane.death is not None:
            raise _death(lane.death)
        info = self.info
        check_supported(info, request, generated_prefix, choice)
        if request.sampling.n > 1:
            raise Unsupported("a call makes one choice: set n to 1, and say which one it is", feature="n", runtime=info.runtime)
        tokens = encode_prompt(self._codec, request.prompt, self.info.max_context_tokens)
        sampling = fit_context(info, len(tokens), request.sampling)
        prefix = tuple(generated_prefix)
        answer = ChoiceAssembler(self._codec, stop=sampling.stop, prompt_tokens=len(tokens), choice=choice, prefix=prefix)
        if answer.stopped or len(prefix) >= sampling.max_tokens:
            yield answer.end(FinishReason.STOP if answer.stopped else FinishReason.LENGTH)
            return
        self._sequences += 1
        sequence_id = self._sequences
        queue: asyncio.Queue[StepOutput] = asyncio.Queue()  # bounded by max_tokens
        lane.streams[sequence_id] = queue
        finished = False
        try:
            lane.loop.admit(StepRequest(sequence_id, tokens, sampling, choice, prefix))
            while not finished:
                output = await queue.get()
                if output.error is not None:
                    finished = True
                    raise _death(output.error) if lane.death is not None else output.error
                chunk = answer.take(output)
                finished = output.finish_reason is not None
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            del lane.streams[sequence_id]
            if not finished and lane.death is None:
                lane.loop.abort(sequence_id)
            if lane.retired and not lane.streams:
                self._retired.discard(lane)
                await lane.loop.close()

    async def rebuild_session(self, cause: RebuildCause) -> None:
        """Load a new StepRunner for later requests. What runs finishes on the old one, which is closed after it."""
        old, self._lane = self._lane, None
        if old is not None:
            if old.streams and old.death is None:
                old.retired = True
                self._retired.add(old)
            else:
                await old.loop.close()
        log.info("runner rebuilt", model=self._config.model, cause=cause.name.lower())
        self._lane = await self._new_lane()

    def rate_limits(self) -> RateLimits:
        """None: nothing stands behind a local runner."""
        return RateLimits()

    def estimate_cost(self, request: GenerationRequest) -> int:
        """0: a local runner charges nothing."""
        return 0

    async def close(self) -> None:
        """End every loop and its thread. Streams that still run fail with ContextPoisoned. Idempotent."""
        lanes = [*self._retired, *([self._lane] if self._lane else [])]
        self._lane = None
        self._retired.clear()
        for lane in lanes:
            await lane.loop.close()
            if lane.death is None:
                lane.die(ContextPoisoned("the runner was closed"))


def _death(err: Exception) -> InferenceError:
    """What a request gets for the death of its loop."""
    if isinstance(err, InferenceError):
        return err
    fault = Internal(f"the step loop died: {type(err).__name__}: {err}")
    fault.__cause__ = err
    return fault
